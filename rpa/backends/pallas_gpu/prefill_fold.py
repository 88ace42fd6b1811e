# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
"""The arithmetic of the prefill role: how one warpgroup folds the blocks of a tile into its running softmax.

Blocks are folded from the causal edge backwards: the blocks that an edge cuts come first, masked and in step; the
whole ones follow, where the two warpgroups take turns at the tensor cores, one in its softmax while the other
multiplies.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu.prefill_work import WG, Item, M, Scratch, Tiling
from rpa.backends.pallas_gpu.tiles import I32, LOG2E, Shape, ceil_div, zero_unseen


def fold_all(wg, place, item: Item, mine: Item, step, state, s: Scratch, shape: Shape, tiling: Tiling):
    """Folds every block of the tile: the cut ones at the causal edge, the whole ones, those the window cuts."""
    b = tiling.block
    # Blocks from `whole_end` on hold keys that the first row must not see; below `whole_start`, that the last must not.
    whole_end = jnp.minimum(
        lax.div(jnp.maximum(item.position + item.begin + 1 - item.base, 0), I32(b)), item.blocks
    )
    whole_start = I32(0)
    if shape.window is not None:
        unseen = jnp.maximum(item.position + item.end - shape.window - item.base, 0)
        whole_start = jnp.minimum(ceil_div(unseen, b), item.blocks)
    whole_end = jnp.maximum(whole_end, whole_start)
    first, second = item.blocks - whole_end, item.blocks - whole_start  # in folding order
    fold = functools.partial(fold_block, wg, place, item, mine, step, s=s, shape=shape, tiling=tiling)
    # A long window and the causal edge never cut one block both: then each is looked at where it cuts.
    apart = shape.window is not None and shape.window >= tiling.tokens(shape) + b - 1
    state = lax.fori_loop(0, first, functools.partial(fold, cut="causal" if apart else "both"), state)
    if tiling.ahead:
        state = fold_ahead(place, mine.scale, step, first, second, state, s, shape, tiling)
    else:
        if tiling.turns:
            pl.when(wg == 1)(lambda: take_turn(s))
        state = lax.fori_loop(first, second, functools.partial(fold, cut=""), state)
        if tiling.turns:
            pl.when(wg == 0)(lambda: take_turn(s))
    if shape.window is not None:
        state = lax.fori_loop(second, item.blocks, functools.partial(fold, cut="window" if apart else "both"), state)
    return state


def take_turn(s: Scratch) -> None:
    plgpu.barrier_arrive(s.turn)
    plgpu.barrier_wait(s.turn)


def fold_block(
    wg, place, item: Item, mine: Item, step, i, state, *, cut: str, s: Scratch, shape: Shape, tiling: Tiling
):
    """Folds one block into (acc [M, D], m [M], l [M]); where an edge cuts it, it is masked and dead values zeroed."""
    acc, m, l = state
    turns = tiling.turns and not cut
    slot = lax.rem(step + i, I32(tiling.stages))
    key = item.base + (item.blocks - 1 - i) * tiling.block
    plgpu.barrier_wait(s.k_full.at[slot])

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, s.q.at[place], s.k.at[slot].transpose((1, 0)))
        if turns:
            take_turn(s)
        return acc_ref[...]

    x = pl.run_scoped(multiply, plgpu.ACC((M, tiling.block), jnp.float32))
    plgpu.barrier_arrive(s.k_free.at[slot])
    z, unit = logits(x, mine.scale, shape)
    if cut:
        z = masked(z, key, mine, cut, shape)
    m_new = jnp.maximum(m, z.max(axis=1) * unit)
    alpha = jnp.exp2(m - m_new)
    p = jnp.exp2(z * unit - along(m_new, z))
    l = l * alpha + p.sum(axis=1)
    weights = p.astype(shape.operands)
    if not tiling.fresh:
        acc = acc * along(alpha, acc)
    if turns:
        acc, l, m_new, alpha, weights = lax.optimization_barrier((acc, l, m_new, alpha, weights))
        plgpu.barrier_arrive(s.turn)
    plgpu.barrier_wait(s.v_full.at[slot])
    if turns:
        plgpu.barrier_wait(s.turn)
    if cut:
        clean_values(wg, s, slot, key, item, shape, tiling)
    if tiling.staged:
        s.p.at[wg][...] = weights
        plgpu.commit_smem()
        weights = s.p.at[wg]
    acc = add_product(acc, alpha, weights, s.v.at[slot], tiling.fresh)
    plgpu.barrier_arrive(s.v_free.at[slot])
    return acc, m_new, l


def fold_ahead(place, scale, step, first, second, state, s: Scratch, shape: Shape, tiling: Tiling):
    """Folds whole blocks first..second-1; scores of the next block are multiplied together with values of the last."""

    def slot_of(i):
        return lax.rem(step + i, I32(tiling.stages))

    def softmax(x, m, l):
        z, unit = logits(x, scale, shape)
        m_new = jnp.maximum(m, z.max(axis=1) * unit)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(z * unit - along(m_new, z))
        return p.astype(shape.operands), m_new, l * alpha + p.sum(axis=1), alpha

    def one(i, carry):
        acc, weights, m, l = carry
        now, before = slot_of(i), slot_of(i - 1)
        plgpu.barrier_wait(s.k_full.at[now])

        def multiply(x_ref, acc_ref):
            acc_ref[...] = acc
            plgpu.wgmma(x_ref, s.q.at[place], s.k.at[now].transpose((1, 0)))
            plgpu.barrier_wait(s.v_full.at[before])
            plgpu.wgmma(acc_ref, weights, s.v.at[before])
            x = plgpu.wgmma_accumulator_load(x_ref, wait_n=1)
            plgpu.barrier_arrive(s.k_free.at[now])
            following = softmax(x, m, l)
            return *following, plgpu.wgmma_accumulator_load(acc_ref)

        scores, values = plgpu.ACC((M, tiling.block), jnp.float32), plgpu.ACC(acc.shape, jnp.float32)
        weights, m, l, alpha, acc = pl.run_scoped(multiply, scores, values)
        plgpu.barrier_arrive(s.v_free.at[before])
        return acc * along(alpha, acc), weights, m, l

    def every(state):
        acc, m, l = state
        slot, last = slot_of(first), slot_of(second - 1)
        plgpu.barrier_wait(s.k_full.at[slot])

        def multiply(x_ref):
            plgpu.wgmma(x_ref, s.q.at[place], s.k.at[slot].transpose((1, 0)))
            return x_ref[...]

        x = pl.run_scoped(multiply, plgpu.ACC((M, tiling.block), jnp.float32))
        plgpu.barrier_arrive(s.k_free.at[slot])
        weights, m, l, alpha = softmax(x, m, l)
        acc, weights, m, l = lax.fori_loop(first + 1, second, one, (acc * along(alpha, acc), weights, m, l))
        plgpu.barrier_wait(s.v_full.at[last])
        acc = add_product(acc, alpha, weights, s.v.at[last], fresh=False)
        plgpu.barrier_arrive(s.v_free.at[last])
        return acc, m, l

    return lax.cond(first < second, every, lambda state: state, state)


def add_product(acc, alpha, weights, v_ref, fresh: bool):
    """acc * alpha + weights @ v; where not `fresh`, `acc` is scaled already and the product lands on top of it."""
    if fresh:

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, weights, v_ref)
            return acc_ref[...]

        return acc * along(alpha, acc) + pl.run_scoped(multiply, plgpu.ACC(acc.shape, jnp.float32))

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


def masked(z, key, mine: Item, cut: str, shape: Shape):
    """-inf where a row sees no key: past its own position, or before its window."""
    keys = key + plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=WG)
    position = mine.position + plgpu.broadcasted_iota(jnp.int32, z.shape, 0, layout=WG)
    if shape.window is not None and cut != "causal":
        z = jnp.where(keys > position - shape.window, z, -jnp.inf)
    return z if cut == "window" else jnp.where(keys <= position, z, -jnp.inf)


def clean_values(wg, s: Scratch, slot, key, item: Item, shape: Shape, tiling: Tiling) -> None:
    """Zeroes values that no row of the tile may see, since a weight of 0 does not silence a NaN."""

    @pl.when((key < item.low) | (key + tiling.block > item.stop))
    def _():
        @pl.when(wg == 0)
        def _():
            zero_unseen(s.v.at[slot], key, item.low, item.stop)

        plgpu.commit_smem()
        plgpu.barrier_arrive(s.clean)
        plgpu.barrier_wait(s.clean)


def factor(scale, like):
    """One number, or one a row, as what `like` can be multiplied by."""
    return along(scale, like) if jnp.ndim(scale) else scale


def along(row, like):
    """[M] broadcast along the columns of `like`."""
    return lax.broadcast_in_dim(row, like.shape, [0])
