# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
"""Many query rows against a cache: the compute-bound half of the Hopper kernel.

A tile is 64 query tokens of two heads of one group (of one head and 128 tokens where the group is odd): one consumer
warpgroup for each 64 rows, both on the same keys. Tiles start at multiples of 8 rows, as TMA into a swizzled tile
asks; rows of other sequences that share a tile are computed and dropped. Blocks lie at multiples of their size in the
cache, so which rows share a tile changes no row's bits. A producer warp gathers pages into a ring of [block, D] tiles.
Blocks are folded from the causal edge backwards: the blocks that an edge cuts come first, masked and in step; the
whole ones follow, where the two warpgroups take turns at the tensor cores, one in its softmax while the other
multiplies.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu.tiles import (
    FLOOR,
    I32,
    LOG2E,
    Shape,
    ceil_div,
    first_key,
    page_of,
    piece,
    smem,
    zero_unseen,
)

M = 64  # rows of a warpgroup's wgmma
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row, replicated along it
WG = plgpu.Layout.WGMMA


# Where a tile's output waits for its copy: whole tiles swizzled, partial ones not, each in memory of its own (what the
# interpreter can tell apart); both in one spare buffer; or both in the queries' own memory, where no buffer fits.
APART, SPARE, SHARED = 0, 1, 2


class Tiling(NamedTuple):
    """Static parameters of the prefill role."""

    tiles: int  # tiles the list may hold
    block: int  # keys a ring slot
    stages: int
    ctas: int
    fresh: bool = False  # P V into a fresh accumulator, added afterwards, rather than on top of the old one
    staged: bool = False  # the weights pass through shared memory: the interpreter takes no register operand
    turns: bool = True  # the warpgroups take turns at the tensor cores
    ahead: bool = False  # the next block's scores are computed under this block's softmax
    registers: tuple[int, int] = (232, 40)  # consumer, producer
    memory: int = 0  # where the output is staged: APART, SPARE or SHARED
    queries: int = 2  # tiles whose queries have room: with two, the next tile's load under this tile's work
    teams: int = 1  # pairs of consumer warpgroups a CTA, each pair with tiles and a ring of its own

    def heads(self, shape: Shape) -> int:
        """Heads of a group that one tile serves."""
        return 2 if shape.group % 2 == 0 else 1

    def tokens(self, shape: Shape) -> int:
        return 2 * M // self.heads(shape)


class Item(NamedTuple):
    """One tile of one pair of heads, traced."""

    token: jax.Array  # query row of the tile's row 0, a multiple of 8
    begin: jax.Array  # live rows of the tile: begin..end-1
    end: jax.Array
    position: jax.Array  # of row 0; may be negative
    sequence: jax.Array
    kv_head: jax.Array
    head: jax.Array  # first query head
    low: jax.Array  # first key any row sees
    base: jax.Array  # first key of block 0
    stop: jax.Array  # one past the last key any row sees
    blocks: jax.Array


class Scratch(NamedTuple):
    """A CTA's shared memory and barriers."""

    q: jax.Ref  # [2 * queries, M, D]
    k: jax.Ref  # [stages, block, D]
    v: jax.Ref  # [stages, block, D]
    out: jax.Ref  # [2, M, D] (or as `q`), whole tiles on their way out
    tail: jax.Ref  # as `out`, not swizzled: tiles that are not whole leave by rows, padded to what TMA can address
    lse: jax.Ref  # [2, M]
    p: jax.Ref  # [2, M, block] where `staged`
    q_full: jax.Ref  # [2 * queries]
    q_free: jax.Ref  # [queries]
    k_full: jax.Ref  # [stages]
    v_full: jax.Ref
    k_free: jax.Ref
    v_free: jax.Ref
    turn: jax.Ref
    clean: jax.Ref


def scratch_types(shape: Shape, tiling: Tiling) -> Scratch:
    d, dtype = shape.head_dim, shape.dtype
    copies = tiling.block // piece(shape.page, tiling.block)
    ring = functools.partial(plgpu.Barrier, num_barriers=tiling.stages)
    held = 2 * tiling.queries
    staged = held if tiling.memory == SHARED else 2
    q, tail = smem((held, M, d), dtype), plgpu.SMEM((staged, M, -(-d // 64) * 64), jnp.dtype(dtype))
    out = smem((staged, M, d), dtype)
    both, none = plgpu.RefUnion(out, tail), plgpu.SMEM((M,), jnp.float32)
    return Scratch(
        q=both if tiling.memory == SHARED else q,
        out=(out, both, none)[tiling.memory],
        tail=tail if tiling.memory == APART else none,
        k=smem((tiling.stages, tiling.block, d), dtype),
        v=smem((tiling.stages, tiling.block, d), dtype),
        lse=plgpu.SMEM((2, M), jnp.float32),
        p=smem((2, M, tiling.block) if tiling.staged else (2, 8, d), dtype, like=d),
        q_full=plgpu.Barrier(num_barriers=held),
        q_free=plgpu.Barrier(num_barriers=tiling.queries, num_arrivals=2),
        k_full=ring(num_arrivals=copies),
        v_full=ring(num_arrivals=copies),
        k_free=ring(num_arrivals=2),
        v_free=ring(num_arrivals=2),
        turn=plgpu.Barrier(num_arrivals=2),
        clean=plgpu.Barrier(num_arrivals=2),
    )


def unpacked(s: Scratch, tiling: Tiling) -> Scratch:
    """The scratch with the names of shared memory told apart."""
    if tiling.memory == SHARED:
        q, tail = s.q
        return s._replace(q=q, out=q, tail=tail)
    if tiling.memory == SPARE:
        out, tail = s.out
        return s._replace(out=out, tail=tail)
    return s


def item_at(index, tiles_ref, shape: Shape, tiling: Tiling) -> Item:
    """Reads a tile of the list (i32 [5, tiles]: token / 8, begin, end, position, sequence) and finds its keys."""
    pairs = shape.q_heads // tiling.heads(shape)
    tile, pair = lax.div(index, I32(pairs)), lax.rem(index, I32(pairs))
    token, begin, end, position, sequence = (tiles_ref[field, tile] for field in range(5))
    head = pair * tiling.heads(shape)
    low, base = first_key(position + begin, shape.window, tiling.block)
    stop = jnp.maximum(position + end, 0)
    blocks = ceil_div(jnp.maximum(stop - base, 0), tiling.block)
    kv_head = lax.div(head, I32(shape.group))
    return Item(token * 8, begin, end, position, sequence, kv_head, head, low, base, stop, blocks)


def for_each_item(team, count_ref, tiles_ref, shape: Shape, tiling: Tiling, body):
    """Runs `body(item, step, nth)` over this team's items; the list is dealt back and forth, longest tiles first.

    `step` counts ring slots used before, `nth` items; both counts after the last item are returned.
    """
    pairs = shape.q_heads // tiling.heads(shape)
    total, n = count_ref[0] * pairs, tiling.ctas * tiling.teams

    def loop(i, carry):
        step, nth = carry
        place = jnp.where(lax.rem(i, I32(2)) == 0, team, n - 1 - team)
        index = i * n + place
        item = item_at(jnp.minimum(index, total - 1), tiles_ref, shape, tiling)
        here = index < total
        pl.when(here)(lambda: body(item, step, nth))
        return step + jnp.where(here, item.blocks, 0), nth + jnp.where(here, 1, 0)

    return lax.fori_loop(0, ceil_div(total, n), loop, (I32(0), I32(0)))


# ------------------------------------------------------------------ producer


def produce(
    team, q_ref, kv_ref, tables_ref, count_ref, tiles_ref, s: Scratch, shape: Shape, tiling: Tiling
) -> None:
    """The producer warp: both query tiles, then keys and values from the causal edge backwards."""
    heads = tiling.heads(shape)

    def body(item: Item, step, nth):
        run = piece(shape.page, tiling.block)
        last = lax.div(item.stop - 1, I32(run)) * run

        def block(i, _):
            key = item.base + (item.blocks - 1 - i) * tiling.block
            fill_slot(item, key, last, step + i, kv_ref, tables_ref, s, shape, tiling)

        # Ring slots fall free before the queries' memory does, where it holds one tile: some blocks go first then.
        early = jnp.minimum(item.blocks, tiling.stages) if tiling.queries == 1 else I32(0)
        early = jnp.where(nth > 0, early, 0)
        lax.fori_loop(0, early, block, None)
        held = lax.rem(nth, I32(tiling.queries))
        pl.when(nth >= tiling.queries)(lambda: plgpu.barrier_wait(s.q_free.at[held]))
        for w in range(2):
            rows = pl.ds(item.token + (0 if heads == 2 else w * M), M)
            source = q_ref.at[rows, item.head + (w if heads == 2 else 0)]
            plgpu.copy_gmem_to_smem(source, s.q.at[2 * held + w], s.q_full.at[2 * held + w])
        lax.fori_loop(early, item.blocks, block, None)

    drain(*for_each_item(team, count_ref, tiles_ref, shape, tiling, body), s, tiling)


def drain(steps, nth, s: Scratch, tiling: Tiling) -> None:
    """Waits for the consumers' last releases, so that no barrier is left a phase behind."""
    for held in range(tiling.queries):
        pl.when(nth > held)(lambda held=held: plgpu.barrier_wait(s.q_free.at[held]))
    for slot in range(tiling.stages):

        @pl.when(steps > slot)
        def _(slot=slot):
            plgpu.barrier_wait(s.k_free.at[slot])
            plgpu.barrier_wait(s.v_free.at[slot])


def fill_slot(
    item: Item, key, last, step, kv_ref, tables_ref, s: Scratch, shape: Shape, tiling: Tiling
) -> None:
    """Copies the keys and values of one block, page by page, into the slot of `step`."""
    run = piece(shape.page, tiling.block)
    slot = lax.rem(step, I32(tiling.stages))
    # Page ids are loaded before the wait, so that their latency hides behind it. Pieces past the last live one repeat
    # it: its lines are in the L2, and the consumers zero what no row may see.
    places = [
        page_of(jnp.minimum(key + j * run, last), item.sequence, tables_ref, shape)[:2]
        for j in range(tiling.block // run)
    ]
    for which, ring, full, free in ((0, s.k, s.k_full, s.k_free), (1, s.v, s.v_full, s.v_free)):
        pl.when(step >= tiling.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
        for j, (page, offset) in enumerate(places):
            source = kv_ref.at[page, pl.ds(offset, run), 2 * item.kv_head + which]
            plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(j * run, run)], full.at[slot])


# ------------------------------------------------------------------ consumers


def consume(
    wg, team, count_ref, tiles_ref, sinks_ref, o_ref, lse_ref, s: Scratch, shape: Shape, tiling: Tiling
) -> None:
    """One consumer warpgroup, `wg` 0 or 1 of its team: an online softmax over each tile, its rows to memory."""
    heads, d = tiling.heads(shape), shape.head_dim

    def body(item: Item, step, nth):
        held = lax.rem(nth, I32(tiling.queries))
        place = 2 * held + wg
        ahead = 0 if heads == 2 else wg * M
        mine = item._replace(
            token=item.token + ahead,
            begin=jnp.clip(item.begin - ahead, 0, M),
            end=jnp.clip(item.end - ahead, 0, M),
            position=item.position + ahead,
            head=item.head + (wg if heads == 2 else 0),
        )
        plgpu.barrier_wait(s.q_full.at[place])
        state = (
            plgpu.layout_cast(jnp.zeros((M, d), jnp.float32), WG),
            plgpu.layout_cast(jnp.full((M,), FLOOR, jnp.float32), ROWS),
            plgpu.layout_cast(jnp.zeros((M,), jnp.float32), ROWS),
        )
        state = fold_all(wg, place, item, mine, step, state, s, shape, tiling)
        if tiling.memory != SHARED:
            plgpu.barrier_arrive(s.q_free.at[held])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
        store(place if tiling.memory == SHARED else wg, mine, state, sinks_ref, o_ref, lse_ref, s, shape)
        if tiling.memory == SHARED:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(s.q_free.at[held])

    for_each_item(team, count_ref, tiles_ref, shape, tiling, body)
    plgpu.wait_smem_to_gmem(0)


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
        state = fold_ahead(place, step, first, second, state, s, shape, tiling)
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
    z, unit = logits(x, shape)
    if cut:
        z = masked(z, key, mine, cut, shape)
    m_new = jnp.maximum(m, z.max(axis=1) * unit)
    alpha = jnp.exp2(m - m_new)
    p = jnp.exp2(z * unit - along(m_new, z))
    l = l * alpha + p.sum(axis=1)
    weights = p.astype(shape.dtype)
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


def fold_ahead(place, step, first, second, state, s: Scratch, shape: Shape, tiling: Tiling):
    """Folds whole blocks first..second-1; scores of the next block are multiplied together with values of the last."""

    def slot_of(i):
        return lax.rem(step + i, I32(tiling.stages))

    def softmax(x, m, l):
        z, unit = logits(x, shape)
        m_new = jnp.maximum(m, z.max(axis=1) * unit)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(z * unit - along(m_new, z))
        return p.astype(shape.dtype), m_new, l * alpha + p.sum(axis=1), alpha

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


def logits(x, shape: Shape):
    """(z, unit): the scaled, capped logits are z * unit in units of log 2, with unit > 0."""
    if shape.cap is not None:
        return jnp.tanh(x * (shape.scale / shape.cap)), shape.cap * LOG2E
    if shape.scale > 0:
        return x, shape.scale * LOG2E
    return x * (shape.scale * LOG2E), 1.0


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
            zero_unseen(s.v.at[slot], key, item.low, item.stop, shape)

        plgpu.commit_smem()
        plgpu.barrier_arrive(s.clean)
        plgpu.barrier_wait(s.clean)


def along(row, like):
    """[M] broadcast along the columns of `like`."""
    return lax.broadcast_in_dim(row, like.shape, [0])


# ------------------------------------------------------------------ output


def normalised(state, sink, shape: Shape):
    """(output f32 [M, D], lse [M]) from the folded state; rows that saw nothing give 0 and -inf, or the sink."""
    acc, m, l = state
    if sink is None:
        seen = l > 0
        inverse = jnp.where(seen, 1.0 / jnp.where(seen, l, 1.0), 0.0)
        lse = jnp.where(seen, (m + jnp.log2(jnp.where(seen, l, 1.0))) / LOG2E, -jnp.inf)
        return acc * along(inverse, acc), lse
    top = jnp.maximum(m, sink * LOG2E)
    scale = jnp.exp2(m - top)
    l = l * scale + jnp.exp2(sink * LOG2E - top)
    return acc * along(scale / l, acc), (top + jnp.log2(l)) / LOG2E


def store(place, mine: Item, state, sinks_ref, o_ref, lse_ref, s: Scratch, shape: Shape) -> None:
    """Rows to memory: a full tile by one TMA, a partial one by its binary parts, so that no neighbour is touched."""
    sink = None if sinks_ref is None else sinks_ref[mine.head]
    out, lse = normalised(state, sink, shape)
    out = out.astype(shape.dtype)
    rows, wg = mine.end - mine.begin, lax.rem(place, I32(2))

    def whole():
        s.out.at[place][...] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s.out.at[place], o_ref.at[pl.ds(mine.token, M), mine.head])
        if lse_ref is not None:
            lse_ref[pl.ds(mine.token, M), mine.head] = lse

    if shape.tokens >= M:
        pl.when(rows == M)(whole)

    @pl.when((rows > 0) & (rows < M))
    def _():
        stage_rows(out, s.tail.at[place])
        if lse_ref is not None:
            s.lse.at[wg][...] = lse
        plgpu.commit_smem()
        put_rows(mine, s.tail.at[place], o_ref, shape)
        if lse_ref is not None:

            @pl.loop(mine.begin, mine.end)
            def _(i):
                lse_ref[mine.token + i, mine.head] = s.lse[wg, i]


def stage_rows(out, tail_ref) -> None:
    """Rows into memory that TMA reads rows of: at multiples of 128 bytes, so padded where the head size is odd."""
    d = out.shape[1]
    if d % 64 == 0:
        tail_ref[...] = out
        return
    for column in range(0, d, 16):  # the padded pitch is a multiple of these, not of the whole row
        tail_ref.at[:, pl.ds(column, 16)][...] = out[:, column : column + 16]


def put_rows(mine: Item, tail_ref, o_ref, shape: Shape) -> None:
    """Copies rows begin..end-1 of a tile: in binary parts, or one by one where padding parts them."""
    d, rows = shape.head_dim, mine.end - mine.begin

    def put(first, count):
        plgpu.copy_smem_to_gmem(
            tail_ref.at[pl.ds(first, count)], o_ref.at[pl.ds(mine.token + first, count), mine.head]
        )

    if d % 64:

        @pl.loop(mine.begin, mine.end)
        def _(i):
            target = o_ref.at[pl.ds(mine.token + i, 1), mine.head]
            plgpu.copy_smem_to_gmem(tail_ref.at[pl.ds(i, 1), pl.ds(0, d)], target)

        return
    for bit in (bit for bit in (32, 16, 8, 4, 2, 1) if bit <= shape.tokens):
        done = mine.begin + (rows & ~(2 * bit - 1))
        pl.when((rows & bit) != 0)(lambda bit=bit, done=done: put(done, bit))


def fill(cta, fills_ref, o_ref, s: Scratch, shape: Shape, tiling: Tiling) -> None:
    """Zeroes the rows of nobody, and gives those of invalid sequences NaN (`plan.fills`), each CTA its share."""
    before, after, bad = fills_ref[0], fills_ref[1], fills_ref[2]
    sequences, d = (fills_ref.shape[0] - 4) // 2, shape.head_dim
    most = M if d % 64 == 0 else 1  # heads a copy

    def rows(first, stop, value):
        @pl.when(first + cta < stop)
        def _():
            constant = jnp.full((M, d), value, jnp.dtype(shape.dtype))
            stage_rows(plgpu.layout_cast(constant, WG), s.tail.at[0])
            plgpu.commit_smem()
            count = ceil_div(stop - first - cta, tiling.ctas)

            @pl.loop(0, count)
            def _(i):
                row = o_ref.at[first + cta + i * tiling.ctas]
                for head in range(0, shape.q_heads, most):
                    heads = min(most, shape.q_heads - head)
                    source = s.tail.at[0, pl.ds(0, heads)] if d % 64 == 0 else s.tail.at[0, pl.ds(0, 1), pl.ds(0, d)]
                    plgpu.copy_smem_to_gmem(source, row.at[pl.ds(head, heads)])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    rows(I32(0), before, 0.0)
    rows(after, I32(shape.tokens), 0.0)

    @pl.when(bad > 0)
    def _():
        @pl.loop(0, sequences)
        def _(sequence):
            rows(fills_ref[4 + 2 * sequence], fills_ref[5 + 2 * sequence], jnp.nan)


# ------------------------------------------------------------------ the kernel of prefill alone


def attend(q, kv_pages, tables, count, tiles, fills, sinks, shape: Shape, tiling: Tiling, with_lse: bool):
    """[T, Hq, D] and, with `with_lse`, f32 [T, Hq] (only the rows of listed tiles).

    Args:
        count: i32 [1], live tiles. tiles: i32 [5, tiles], see `item_at`.
        fills: rows of nobody and of invalid sequences, see `plan.fills`.
        sinks: f32 [Hq] or None.
    """

    def body(*refs):
        q_ref, kv_ref, tables_ref, count_ref, tiles_ref, fills_ref, *rest = refs
        sinks_ref = rest.pop(0) if sinks is not None else None
        o_ref = rest.pop(0)
        lse_ref = rest.pop(0) if with_lse else None
        teams = [unpacked(s, tiling) for s in rest]
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        @pl.when(wg == 2 * tiling.teams)
        def _():
            plgpu.set_max_registers(tiling.registers[1], action="decrease")

            @plgpu.warp_map
            def _(warp):
                for t, s in enumerate(teams):

                    @pl.when(warp == t)
                    def _(t=t, s=s):
                        team = cta + t * tiling.ctas
                        produce(team, q_ref, kv_ref, tables_ref, count_ref, tiles_ref, s, shape, tiling)

        for t, s in enumerate(teams):

            @pl.when((wg >= 2 * t) & (wg < 2 * t + 2))
            def _(t=t, s=s):
                plgpu.set_max_registers(tiling.registers[0], action="increase")
                team = cta + t * tiling.ctas
                consume(wg - 2 * t, team, count_ref, tiles_ref, sinks_ref, o_ref, lse_ref, s, shape, tiling)
                if t == 0:
                    pl.when(wg == 0)(lambda: fill(cta, fills_ref, o_ref, s, shape, tiling))

    outs = [jax.ShapeDtypeStruct((shape.tokens, shape.q_heads, shape.head_dim), jnp.dtype(shape.dtype))]
    if with_lse:
        outs.append(jax.ShapeDtypeStruct((shape.tokens, shape.q_heads), jnp.float32))
    args = [q, kv_pages, tables, count, tiles, fills] + ([] if sinks is None else [sinks])
    results = plgpu.kernel(
        body,
        out_type=tuple(outs),
        scratch_types=(scratch_types(shape, tiling),) * tiling.teams,
        grid=(tiling.ctas,),
        grid_names=("cta",),
        num_threads=2 * tiling.teams + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="rpa_prefill",
    )(*args)
    return results if with_lse else (results[0], None)
