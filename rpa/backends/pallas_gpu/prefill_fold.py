# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
"""The arithmetic of the prefill role: how one warpgroup folds the blocks of a tile into its running softmax.

Blocks are folded from the causal edge backwards. Those that an edge cuts are masked. The whole ones between are folded
in one of two ways. `ahead`: the scores of a block are multiplied together with the values of the one before, so that
the tensor cores have work during a warpgroup's softmax; on large pages the warpgroups issue their products in turn (the
order is FlashAttention-3's). Or one product after the other, two warpgroups in step, one in its softmax while the other
multiplies: what head sizes past 128 and pages of 8 bits have registers for. In a short window all keys that a
warpgroup sees are one product, and no softmax is rescaled.
A row's bits are the same whichever way a block is folded that it sees whole, or not at all.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu.prefill_work import ALIGN, WG, Item, M, Scratch, Tiling
from rpa.backends.pallas_gpu.tiles import FLOOR, I32, LOG2E, Shape, ceil_div, first_key, zero_unseen


class Fold(NamedTuple):
    """One warpgroup's share of a tile."""

    wg: Any  # of its team
    place: Any  # of its queries
    item: Item  # the team's
    mine: Item  # the same with this warpgroup's rows
    step: Any  # ring slots used before
    s: Scratch
    shape: Shape
    tiling: Tiling

    def slots(self, i) -> tuple:
        """Where the keys and the values of the `i`th block are."""
        return self.tiling.slots(self.step + i)

    def key(self, i):
        """The first key of the `i`th block."""
        return self.item.base + (self.item.blocks - 1 - i) * self.tiling.block


def fold_all(f: Fold, state, freed):
    """Folds every block of the tile into (acc [M, D], m [M], l [M]); `freed()` once the queries are read no more."""
    item, shape, tiling = f.item, f.shape, f.tiling
    if tiling.packed:
        return fold_once(f, state, freed)
    first, second = whole_blocks(f, item)
    # A long window and the causal edge never cut one block both: then each is looked at where it cuts.
    apart = shape.window is not None and shape.window >= tiling.tokens(shape) + tiling.block - 1
    edge, far = ("causal", "window") if apart else ("both", "both")
    fold = functools.partial(fold_block, f)
    if tiling.ahead:
        skipped = I32(0)
        if shape.window is None:  # each warpgroup from its own edge on
            first, second = whole_blocks(f, f.mine)
            seen = jnp.where(f.mine.end > f.mine.begin, f.mine.position + f.mine.end - item.base, 0)
            skipped = item.blocks - jnp.minimum(ceil_div(jnp.maximum(seen, 0), tiling.block), item.blocks)
            lax.fori_loop(0, skipped, functools.partial(skip, f), None)
        # The pipeline starts at the last of the cut blocks, masked, unless one of these has values to be cleaned.
        clean = item.dirty == 0
        begin = jnp.maximum(first - jnp.where(clean, 1, 0), skipped)
        second = jnp.where(clean, jnp.maximum(second, jnp.minimum(begin + 1, item.blocks)), second)
        state = lax.fori_loop(skipped, begin, functools.partial(fold, cut=edge), state)
        state = fold_ahead(f, begin, second, state, edge, freed)
    else:
        state = lax.fori_loop(0, first, functools.partial(fold, cut=edge), state)
        if tiling.turns:
            pl.when(f.wg == 1)(lambda: meet(f.s))
        state = lax.fori_loop(first, second, functools.partial(fold, cut=""), state)
        if tiling.turns:
            pl.when(f.wg == 0)(lambda: meet(f.s))
    if shape.window is not None:
        state = lax.fori_loop(second, item.blocks, functools.partial(fold, cut=far), state)
    if not tiling.ahead or shape.window is not None:
        freed()
    return state


def whole_blocks(f: Fold, rows: Item) -> tuple:
    """The blocks, in folding order, that every one of these rows sees whole: from the first of both to the second."""
    item, b = f.item, I32(f.tiling.block)
    end = jnp.minimum(lax.div(jnp.maximum(rows.position + rows.begin + 1 - item.base, 0), b), item.blocks)
    start = I32(0)
    if f.shape.window is not None:
        unseen = jnp.maximum(rows.position + rows.end - f.shape.window - item.base, 0)
        start = jnp.minimum(ceil_div(unseen, f.tiling.block), item.blocks)
    return item.blocks - jnp.maximum(end, start), item.blocks - start


# ------------------------------------------------------------------ all keys at once


def fold_once(f: Fold, state, freed):
    """Folds the one block of a tile in a window: one maximum, one sum, and nothing is ever rescaled."""
    window, step, span = f.shape.window, ALIGN, f.tiling.span(f.shape)
    assert window is not None, "without a window no block holds all keys"
    _, base = first_key(f.mine.position + f.mine.begin, window, ALIGN)
    begin = jnp.clip(base - f.item.base, 0, f.tiling.block - span)  # of the warpgroup's keys in the block

    def weigh(x, edges: bool):
        """(weights, m, l) of the scores `x`; only columns that the edges of a window cut are masked, unless `edges`."""
        seen = f.mine.position - f.item.base - begin + lax.rem(iota((M, step), 0), I32(f.tiling.rows(f.shape)))
        column, parts = iota((M, step), 1), []
        x, unit = logits(x, f.mine.scale, f.shape)
        for first in range(0, span, step):
            z = x[:, first : first + step]
            if edges or first + step > window:
                z = jnp.where(column <= seen - first, z, -jnp.inf)
            if first < f.tiling.rows(f.shape) + ALIGN - 2:
                z = jnp.where(column > seen - first - window, z, -jnp.inf)
            parts.append(z)
        # Column by column of the steps, in their order: which step is a tile's first changes no row's bits.
        m = jnp.maximum(FLOOR, functools.reduce(jnp.maximum, parts).max(axis=1) * unit)
        parts = [jnp.exp2(z * unit - along(m, z)) for z in parts]
        l = functools.reduce(jnp.add, parts).sum(axis=1)
        return lax.concatenate([p.astype(f.shape.operands) for p in parts], 1), m, l

    def fold(_):
        keys, values = f.slots(0)
        plgpu.barrier_wait(f.s.k_full.at[keys])

        def multiply(x_ref):
            plgpu.wgmma(x_ref, f.s.q.at[f.place], f.s.k.at[keys, pl.ds(begin, span)].transpose((1, 0)))
            return x_ref[...]

        x = pl.run_scoped(multiply, plgpu.ACC((M, span), jnp.float32))
        plgpu.barrier_arrive(f.s.k_free.at[keys])
        freed()
        inside = f.mine.position + f.mine.begin >= window - 1
        weights, m, l = lax.cond(inside, lambda: weigh(x, False), lambda: weigh(x, True))
        weights = operand(f, weights)
        plgpu.barrier_wait(f.s.v_full.at[values])
        clean_values(f, 0)

        def add(acc_ref):
            plgpu.wgmma(acc_ref, weights, f.s.v.at[values, pl.ds(begin, span)])
            return acc_ref[...]

        acc = pl.run_scoped(add, plgpu.ACC((M, f.shape.head_dim), jnp.float32))
        plgpu.barrier_arrive(f.s.v_free.at[values])
        return acc, m, l

    def none(state):
        freed()
        return state

    return lax.cond(f.item.blocks > 0, fold, none, state)


def iota(shape, axis: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WG)


# ------------------------------------------------------------------ whose turn it is


def meet(s: Scratch) -> None:
    """Two warpgroups in step: neither goes on before the other is here."""
    plgpu.barrier_arrive(s.turn)
    plgpu.barrier_wait(s.turn)


def await_turn(f: Fold, i) -> None:
    """Ahead: waits until the warpgroup before has issued its products; every block but a tile's first has a turn."""
    if f.tiling.ahead and f.tiling.turns:
        pl.when(i > 0)(lambda: plgpu.barrier_wait(f.s.turn.at[f.wg]))


def pass_turn(f: Fold, i) -> None:
    if f.tiling.ahead and f.tiling.turns:
        after = 1 - f.wg if f.tiling.wgs == 2 else lax.rem(f.wg + 1, I32(f.tiling.wgs))
        pl.when(i > 0)(lambda: plgpu.barrier_arrive(f.s.turn.at[after]))


def skip(f: Fold, i, _) -> None:
    """Lets a block pass that no row of this warpgroup sees."""
    keys, values = f.slots(i)
    plgpu.barrier_wait(f.s.k_full.at[keys])
    plgpu.barrier_arrive(f.s.k_free.at[keys])
    plgpu.barrier_wait(f.s.v_full.at[values])
    clean_values(f, i)
    plgpu.barrier_arrive(f.s.v_free.at[values])
    await_turn(f, i)
    pass_turn(f, i)


# ------------------------------------------------------------------ the blocks


def softmax(f: Fold, i, x, m, l, cut: str):
    """(weights as operands, m, l, alpha) with the scores `x` of a block."""
    z, unit = logits(x, f.mine.scale, f.shape)
    if cut:
        z = masked(f, z, f.key(i), cut)
    m_new = jnp.maximum(m, z.max(axis=1) * unit)
    alpha = jnp.exp2(m - m_new)
    p = jnp.exp2(z * unit - along(m_new, z))
    return p.astype(f.shape.operands), m_new, l * alpha + p.sum(axis=1), alpha


def scores(f: Fold, i, issued):
    """[M, block] of block `i`, whose keys are then given back; `issued()` once the product is under way."""
    keys, _ = f.slots(i)

    def multiply(x_ref):
        plgpu.wgmma(x_ref, f.s.q.at[f.place], f.s.k.at[keys].transpose((1, 0)))
        issued()
        return x_ref[...]

    x = pl.run_scoped(multiply, plgpu.ACC((M, f.tiling.block), jnp.float32))
    plgpu.barrier_arrive(f.s.k_free.at[keys])
    return x


def fold_block(f: Fold, i, state, *, cut: str):
    """Folds one block; where an edge cuts it, it is masked and dead values zeroed."""
    acc, m, l = state
    in_step = f.tiling.turns and not cut and not f.tiling.ahead
    in_turn = cut and f.shape.window is None
    keys, values = f.slots(i)
    plgpu.barrier_wait(f.s.k_full.at[keys])

    def issued():
        if in_turn:
            await_turn(f, i)
            pass_turn(f, i)
        if in_step:
            meet(f.s)

    weights, m, l, alpha = softmax(f, i, scores(f, i, issued), m, l, cut)
    if not f.tiling.fresh:
        acc = acc * along(alpha, acc)
    if in_step:
        acc, l, m, alpha, weights = lax.optimization_barrier((acc, l, m, alpha, weights))
        plgpu.barrier_arrive(f.s.turn)
    plgpu.barrier_wait(f.s.v_full.at[values])
    if in_step:
        plgpu.barrier_wait(f.s.turn)
    if cut:
        clean_values(f, i)
    acc = add_product(f, acc, alpha, operand(f, weights), f.s.v.at[values])
    plgpu.barrier_arrive(f.s.v_free.at[values])
    return acc, m, l


def fold_ahead(f: Fold, begin, second, state, edge: str, freed):
    """Folds blocks begin..second-1, whole but for the first; what `freed` is, `fold_all` says."""
    done = freed if f.shape.window is None else lambda: None

    def one(i, carry):
        acc, weights, m, l = carry
        (now, _), (_, before) = f.slots(i), f.slots(i - 1)
        weights = operand(f, weights)
        plgpu.barrier_wait(f.s.k_full.at[now])
        await_turn(f, 1)

        def multiply(x_ref, acc_ref):
            if not f.tiling.fresh:
                acc_ref[...] = acc
            plgpu.wgmma(x_ref, f.s.q.at[f.place], f.s.k.at[now].transpose((1, 0)))
            plgpu.barrier_wait(f.s.v_full.at[before])
            plgpu.wgmma(acc_ref, weights, f.s.v.at[before])
            pass_turn(f, 1)
            x = plgpu.wgmma_accumulator_load(x_ref, wait_n=1)
            plgpu.barrier_arrive(f.s.k_free.at[now])
            following = softmax(f, i, x, m, l, "")
            return *following, plgpu.wgmma_accumulator_load(acc_ref)

        both = plgpu.ACC((M, f.tiling.block), jnp.float32), plgpu.ACC(acc.shape, jnp.float32)
        *following, alpha, product = pl.run_scoped(multiply, *both)
        plgpu.barrier_arrive(f.s.v_free.at[before])
        acc = acc + product if f.tiling.fresh else product
        return acc * along(alpha, acc), *following

    def every(state):
        acc, m, l = state
        (keys, _), (_, last) = f.slots(begin), f.slots(second - 1)
        plgpu.barrier_wait(f.s.k_full.at[keys])
        await_turn(f, begin)
        x = scores(f, begin, lambda: pass_turn(f, begin))
        weights, m, l, alpha = softmax(f, begin, x, m, l, edge)
        acc, weights, m, l = lax.fori_loop(begin + 1, second, one, (acc * along(alpha, acc), weights, m, l))
        done()
        plgpu.barrier_wait(f.s.v_full.at[last])
        acc = add_product(f, acc, None, operand(f, weights), f.s.v.at[last])
        plgpu.barrier_arrive(f.s.v_free.at[last])
        return acc, m, l

    def none(state):
        done()
        return state

    return lax.cond(begin < second, every, none, state)


def operand(f: Fold, weights):
    """The weights as the product takes them: from registers, or from shared memory."""
    if not f.tiling.staged:
        return weights
    f.s.p.at[f.wg][...] = weights
    plgpu.commit_smem()
    return f.s.p.at[f.wg]


def add_product(f: Fold, acc, alpha, weights, v_ref):
    """acc * alpha + weights @ v; unless `fresh`, or without an alpha, `acc` is scaled already.

    Where not `fresh`, the product lands on top of it.
    """
    if f.tiling.fresh:

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, weights, v_ref)
            return acc_ref[...]

        product = pl.run_scoped(multiply, plgpu.ACC(acc.shape, jnp.float32))
        return (acc if alpha is None else acc * along(alpha, acc)) + product

    def add(acc_ref):
        plgpu.wgmma(acc_ref, weights, v_ref)

    return pl.run_state(add)(plgpu.ACC.init(acc))


def logits(x, scale, shape: Shape):
    """(z, unit): the scaled, capped logits are z * unit in units of log 2, with unit > 0."""
    if shape.cap is not None:
        return jnp.tanh(x * factor(scale / shape.cap, x)), shape.cap * LOG2E
    if isinstance(scale, float) and scale > 0:
        return x, scale * LOG2E
    return x * factor(scale * LOG2E, x), 1.0


def masked(f: Fold, z, key, cut: str):
    """-inf where a row sees no key: past its own position, or before its window."""
    keys = key + plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=WG)
    position = f.mine.position + plgpu.broadcasted_iota(jnp.int32, z.shape, 0, layout=WG)
    if f.shape.window is not None and cut != "causal":
        z = jnp.where(keys > position - f.shape.window, z, -jnp.inf)
    return z if cut == "window" else jnp.where(keys <= position, z, -jnp.inf)


def clean_values(f: Fold, i) -> None:
    """Zeroes values that no row of the sequence may see, since a weight of 0 does not silence a NaN."""
    item, key, block = f.item, f.key(i), f.tiling.block
    past = ((item.dirty & 1) != 0) & (key + block > item.stop)
    before = ((item.dirty & 2) != 0) & (key < item.low)

    @pl.when(past | before)
    def _():
        @pl.when(f.wg == 0)
        def _():
            zero_unseen(f.s.v.at[f.slots(i)[1]], key, item.low, item.stop)

        plgpu.commit_smem()
        plgpu.barrier_arrive(f.s.clean)
        plgpu.barrier_wait(f.s.clean)


def factor(scale, like):
    """One number, or one a row, as what `like` can be multiplied by."""
    return along(scale, like) if jnp.ndim(scale) else scale


def along(row, like):
    """[M] broadcast along the columns of `like`."""
    return lax.broadcast_in_dim(row, like.shape, [0])
