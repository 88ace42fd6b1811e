# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
"""Many query rows against a cache: the compute-bound half of the Hopper kernel.

A tile is 64 query tokens of two heads of one group (of one head and 128 tokens where the group is odd, or 192 at head
size 64; in a short window of 48 tokens and 4 heads, 16 tokens a warpgroup): one consumer warpgroup for each 64 rows,
all on the same keys. Tiles start at multiples of 8 rows, as TMA into
a swizzled tile asks; rows of other sequences that share a tile are computed and dropped. Blocks lie at multiples of
their size in the cache, so which rows share a tile changes no row's bits. A producer warp, or one for keys and one for
values, gathers pages into a ring of [block, D] tiles; pages of 8 bits pass from a ring of their own through a
warpgroup that converts them. `prefill_work` says what a tile is, `prefill_fold` what is done with it.

Slower on an H200 (4 x 512 on 16k and 1 x 8k of 32/8 heads, head size 128, if nothing else is said): on pages of 16 one
producer warp, 858 and 890 us against 820 and 852 by two; no turns, 962 and 983 against 835 and 860, and on pages of 128
806 and 942 against 779 and 799; blocks of 64 keys, 1088 against 859; a third slot of the ring, 869 and 897 against 855
and 888; one sequence's tiles dealt by what keys they share, 805 against 771 on pages of 128. Two pairs at head size 64,
1217 against 1154. At head size 256 products ahead, 694 against 676; blocks of 80 keys, 680 against 658; no turns, 706
against 684; four heads at a time in a window of 4096, 683 against 658. In a window of 128 an online softmax, 99 against
71; what is told of the next tile loaded before this one, 73.5. Blocks of 64 keys at head sizes 96 and 80, 1235 and 1206
against 1136 and 1037.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu.prefill_fold import Fold, along, fold_all
from rpa.backends.pallas_gpu.prefill_work import (
    ROWS,
    SHARED,
    WG,
    Item,
    M,
    Scratch,
    Tiling,
    fed_ring,
    for_each_item,
    scratch_types,
    told,
    unpacked,
)
from rpa.backends.pallas_gpu.tiles import (
    FLOOR,
    I32,
    LOG2E,
    Heads,
    Shape,
    ceil_div,
    drain,
    entry_of,
    halved,
    widen,
)

# ------------------------------------------------------------------ producer


def produce(
    streams: tuple[int, ...], team, q_ref, kv_ref, tables_ref, count_ref, tiles_ref, s: Scratch, shape: Shape,
    tiling: Tiling,
) -> None:  # fmt: skip
    """The producer warp: the queries of each tile and its `streams` (0: keys, 1: values), last blocks first."""
    fill = functools.partial(fill_slot, kv_ref=kv_ref, s=s, shape=shape, tiling=tiling)

    def body(item: Item, step, nth):
        run = tiling.piece(shape)
        last = lax.div(item.stop - 1, I32(run)) * run

        def keys(i):
            # Pieces past the last live one repeat it: its lines are in the L2, and what no row may see is masked.
            key = item.base + (item.blocks - 1 - jnp.minimum(i, item.blocks - 1)) * tiling.block
            return [jnp.maximum(jnp.minimum(key + j * run, last), 0) for j in range(tiling.block // run)]

        def pages(i):
            return [entry_of(k, item.sequence, tables_ref, shape) for k in keys(i)]

        def block(i, found):
            # Page ids are loaded a block ahead, so that their latency hides behind the waits for this one.
            following = pages(i + 1) if tiling.fetch else found
            found = found if tiling.fetch else pages(i)
            places = [(k, jnp.clip(e, 0, shape.pages - 1)) for k, e in zip(keys(i), found, strict=True)]
            for which in streams:
                fill(which, item.kv_head, step + i, places)
            return following

        found = pages(I32(0)) if tiling.fetch else I32(0)
        if 0 not in streams:
            lax.fori_loop(0, item.blocks, block, found)
            return
        # Ring slots fall free before the queries' memory does, where it holds one tile: some blocks go first then.
        early = jnp.minimum(item.blocks, tiling.stages) if tiling.queries == 1 else I32(0)
        early = jnp.where(nth > 0, early, 0)
        found = lax.fori_loop(0, early, block, found)
        held = lax.rem(nth, I32(tiling.queries))
        pl.when(nth >= tiling.queries)(lambda: plgpu.barrier_wait(s.q_free.at[held]))
        for w in range(tiling.wgs):
            place = tiling.wgs * held + w
            for first, token, head in parts(w, shape, tiling):
                source = q_ref.at[pl.ds(item.token + token, tiling.rows(shape)), item.head + head]
                target = part(s.q, place, first, tiling.rows(shape))
                plgpu.copy_gmem_to_smem(source, target, s.q_full.at[place])
        lax.fori_loop(early, item.blocks, block, found)

    steps, nth = for_each_item(team, count_ref, tiles_ref, shape, tiling, body, feeds=True)
    if 0 in streams:
        drain(tiling.queries, nth, s.q_free)
        drain(tiling.stages + tiling.more, steps, s.k_free)
    if 1 in streams:
        drain(tiling.stages, steps, s.v_free)


def parts(wg: int, shape: Shape, tiling: Tiling) -> list[tuple[int, int, int]]:
    """(first row of the warpgroup's, token, head), both from the tile's first, of each head that `wg` has rows of."""
    if tiling.packed:
        return [(j * tiling.rows(shape), wg * tiling.rows(shape), j) for j in range(tiling.packed)]
    return [(0, 0, wg) if tiling.heads(shape) == 2 else (0, wg * M, 0)]


def part(ref, place, first: int, rows: int):
    """Rows first..first + rows - 1 of a place of M rows."""
    return ref.at[place] if rows == M else ref.at[place, pl.ds(first, rows)]


def fill_slot(which: int, kv_head, step, places, kv_ref, s: Scratch, shape: Shape, tiling: Tiling) -> None:
    """Copies the keys (`which` 0) or values of one block, page by page, into the slot of `step`."""
    run, slot, stages = tiling.piece(shape), tiling.slots(step)[which], tiling.stages
    stages += tiling.more * (1 - which)
    ring, full, free = ((s.k, s.k_full, s.k_free), (s.v, s.v_full, s.v_free))[which]
    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
    for j, (key, page) in enumerate(places):
        source = kv_ref.at[page, pl.ds(lax.rem(key, I32(shape.page)), run), 2 * kv_head + which]
        plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(j * run, run)], full.at[slot])


def convert(team, count_ref, tiles_ref, s: Scratch, shape: Shape, tiling: Tiling) -> None:
    """The converting warpgroup: blocks out of the ring of stored numbers into the ring that is multiplied, in order."""
    raw = s.raw

    def body(item: Item, step, nth):
        @pl.loop(0, item.blocks)
        def _(i):
            slot, place = lax.rem(step + i, I32(tiling.stages)), lax.rem(step + i, I32(tiling.raw))
            for stored, wide, filled, freed, full, free in (
                (raw.k, s.k, raw.k_full, raw.k_free, s.k_full, s.k_free),
                (raw.v, s.v, raw.v_full, raw.v_free, s.v_full, s.v_free),
            ):
                plgpu.barrier_wait(filled.at[place])
                pl.when(step + i >= tiling.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                widen(stored.at[place], wide.at[slot])
                plgpu.commit_smem()
                plgpu.barrier_arrive(freed.at[place])
                plgpu.barrier_arrive(full.at[slot])

    steps, _ = for_each_item(team, count_ref, tiles_ref, shape, tiling, body)
    drain(tiling.stages, steps, s.k_free, s.v_free)


# ------------------------------------------------------------------ consumers


def consume(
    wg, team, count_ref, tiles_ref, scalars: Heads, o_ref, lse_ref, s: Scratch, shape: Shape, tiling: Tiling
) -> None:
    """One consumer warpgroup, `wg` 0 or 1 of its team: an online softmax over each tile, its rows to memory."""
    apart, d, most = tiling.packed or tiling.heads(shape) == 1, shape.head_dim, tiling.rows(shape)

    def body(item: Item, step, nth):
        held = lax.rem(nth, I32(tiling.queries))
        place = tiling.wgs * held + wg
        ahead = wg * most if apart else 0
        mine = item._replace(
            token=item.token + ahead,
            begin=jnp.clip(item.begin - ahead, 0, most),
            end=jnp.clip(item.end - ahead, 0, most),
            position=item.position + ahead,
            head=item.head + (0 if apart else wg),
            scale=shape.scale if scalars.k_scale is None else shape.scale * scalars.k_scale[item.kv_head],
        )
        # Loaded long before it is needed.
        sink = None if scalars.sinks is None else sink_of(mine.head, scalars.sinks, shape, tiling)
        plgpu.barrier_wait(s.q_full.at[place])
        if shape.operands != shape.dtype:
            queries = lax.bitcast_convert_type(s.q.at[place][...], jnp.dtype(shape.dtype))
            s.q.at[place][...], unit = halved(queries, 1)
            plgpu.commit_smem()
            mine = mine._replace(scale=mine.scale * unit)
        state = (
            plgpu.layout_cast(jnp.zeros((M, d), jnp.float32), WG),
            plgpu.layout_cast(jnp.full((M,), FLOOR, jnp.float32), ROWS),
            plgpu.layout_cast(jnp.zeros((M,), jnp.float32), ROWS),
        )

        def freed():
            if tiling.memory != SHARED:
                plgpu.barrier_arrive(s.q_free.at[held])

        state = fold_all(Fold(wg, place, item, mine, step, s, shape, tiling), state, freed)
        if scalars.v_scale is not None:
            state = (state[0] * scalars.v_scale[item.kv_head], *state[1:])
        if tiling.memory != SHARED:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
        staged = place if tiling.memory == SHARED else wg
        store(staged, wg, mine, state, sink, o_ref, lse_ref, s, shape, tiling)
        if tiling.memory == SHARED:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(s.q_free.at[held])

    # The first warpgroup's first turn; what is left of it when all is done is the last one's last.
    taking = tiling.ahead and tiling.turns
    if taking:
        pl.when(wg == tiling.wgs - 1)(lambda: plgpu.barrier_arrive(s.turn.at[0]))
    for_each_item(team, count_ref, tiles_ref, shape, tiling, body)
    if taking:
        pl.when(wg == 0)(lambda: plgpu.barrier_wait(s.turn.at[0]))
    plgpu.wait_smem_to_gmem(0)


def sink_of(head, sinks_ref, shape: Shape, tiling: Tiling):
    """The sink of a warpgroup's rows: one number, or one a row where they are of several heads."""
    if not tiling.packed:
        return sinks_ref[head]
    # By columns of what is then reduced, as there is no counting of rows in the layout of one value a row.
    mine = lax.div(plgpu.broadcasted_iota(jnp.int32, (M, 8), 0, layout=WG), I32(tiling.rows(shape)))
    each = jnp.where(mine == 0, sinks_ref[head], -jnp.inf)
    for j in range(1, tiling.packed):
        each = jnp.where(mine == j, sinks_ref[head + j], each)
    return each.max(axis=1)


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


def store(place, wg, mine: Item, state, sink, o_ref, lse_ref, s: Scratch, shape: Shape, tiling: Tiling) -> None:
    """Rows to memory: a full tile by one TMA, a partial one by its binary parts, so that no neighbour is touched."""
    out, lse = normalised(state, sink, shape)
    out = lax.bitcast_convert_type(out.astype(shape.dtype), jnp.dtype(shape.operands))
    rows, most = mine.end - mine.begin, tiling.rows(shape)
    each = [(j * most, mine.head + j) for j in range(max(tiling.packed, 1))]  # first row and number of each head

    def whole():
        s.out.at[place][...] = out
        if lse_ref is not None and tiling.packed:
            s.lse.at[wg][...] = lse
        plgpu.commit_smem()
        for first, head in each:
            source = part(s.out, place, first, most)
            plgpu.copy_smem_to_gmem(source, o_ref.at[pl.ds(mine.token, most), head])
        if lse_ref is not None and tiling.packed:
            put_lse(wg, mine, each, lse_ref, s)
        elif lse_ref is not None:
            lse_ref[pl.ds(mine.token, M), mine.head] = lse

    # A swizzled copy asks for whole eights of rows, of the array too; else whole tiles leave as partial ones do.
    at_once = shape.tokens >= most and shape.tokens % 8 == 0
    if at_once:
        pl.when(rows == most)(whole)

    @pl.when((rows > 0) & ((rows < most) if at_once else True))
    def _():
        stage_rows(out, s.tail.at[place])
        if lse_ref is not None:
            s.lse.at[wg][...] = lse
        plgpu.commit_smem()
        for first, head in each:
            put_rows(mine, head, part(s.tail, place, first, most), o_ref, shape)
        if lse_ref is not None:
            put_lse(wg, mine, each, lse_ref, s)


def put_lse(wg, mine: Item, each, lse_ref, s: Scratch) -> None:
    """Lse of the live rows to memory, one by one: of each head the first row and the number."""
    for first, head in each:

        @pl.loop(mine.begin, mine.end)
        def _(i, first=first, head=head):
            lse_ref[mine.token + i, head] = s.lse[wg, first + i]


def stage_rows(out, tail_ref) -> None:
    """Rows into memory that TMA reads rows of: at multiples of 128 bytes, so padded where the head size is odd."""
    d = out.shape[1]
    if d % 64 == 0:
        tail_ref[...] = out
        return
    for column in range(0, d, 16):  # the padded pitch is a multiple of these, not of the whole row
        tail_ref.at[:, pl.ds(column, 16)][...] = out[:, column : column + 16]


def put_rows(mine: Item, head, tail_ref, o_ref, shape: Shape) -> None:
    """Copies rows begin..end-1 of a tile: in binary parts, or one by one where padding parts them."""
    d, rows = shape.head_dim, mine.end - mine.begin

    def put(first, count):
        plgpu.copy_smem_to_gmem(
            tail_ref.at[pl.ds(first, count)], o_ref.at[pl.ds(mine.token + first, count), head]
        )

    if d % 64:

        @pl.loop(mine.begin, mine.end)
        def _(i):
            target = o_ref.at[pl.ds(mine.token + i, 1), head]
            plgpu.copy_smem_to_gmem(tail_ref.at[pl.ds(i, 1), pl.ds(0, d)], target)

        return
    for bit in (bit for bit in (64, 32, 16, 8, 4, 2, 1) if bit <= min(shape.tokens, tail_ref.shape[0])):
        done = mine.begin + (rows & ~(2 * bit - 1))
        pl.when((rows & bit) != 0)(lambda bit=bit, done=done: put(done, bit))


def fill(cta, fills, o_ref, s: Scratch, shape: Shape, tiling: Tiling) -> None:
    """Zeroes the rows of nobody, and gives those of invalid sequences NaN (`prefill_work.told`), each CTA its share."""
    (first, last, after, bad), d = fills, shape.head_dim
    most = M if d % 64 == 0 else 1  # heads a copy

    def rows(first, stop, value):
        @pl.when(first + cta < stop)
        def _():
            constant = plgpu.layout_cast(jnp.full((M, d), value, jnp.dtype(shape.dtype)), WG)
            stage_rows(lax.bitcast_convert_type(constant, jnp.dtype(shape.operands)), s.tail.at[0])
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

    rows(I32(0), first[0], 0.0)
    rows(after[0], I32(shape.tokens), 0.0)

    @pl.when(bad[0] > 0)
    def _():
        @pl.loop(0, first.shape[0])
        def _(sequence):
            rows(first[sequence], last[sequence], jnp.nan)


# ------------------------------------------------------------------ the kernel of prefill alone


def attend(q, kv_pages, tables, count, tiles, scalars: Heads, shape: Shape, tiling: Tiling, with_lse: bool):
    """[T, Hq, D] and, with `with_lse`, f32 [T, Hq] (only the rows of listed tiles).

    Args:
        count: i32, see `told`. tiles: i32 [.. + 6 * tiles], see `plan.Tiles`.
        scalars: sinks and scales.
    """

    def body(*refs):
        q_ref, kv_ref, tables_ref, count_ref, tiles_ref, *rest = refs
        count_ref, fill_refs = told(count_ref, tables.shape[0])
        scalar_refs = scalars.of(rest)
        o_ref = rest.pop(0)
        lse_ref = rest.pop(0) if with_lse else None
        teams = [unpacked(s, tiling) for s in rest]
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        @pl.when(wg == tiling.wgs * tiling.teams)
        def _():
            plgpu.set_max_registers(tiling.registers[1], action="decrease")

            @plgpu.warp_map
            def _(warp):
                for t, s in enumerate(teams):
                    warps = [(0,), (1,)] if tiling.apart else [(0, 1)]
                    for w, streams in enumerate(warps):

                        @pl.when(warp == len(warps) * t + w)
                        def _(t=t, s=s, streams=streams):
                            team = cta + t * tiling.ctas
                            fed, how = fed_ring(s, tiling)
                            produce(streams, team, q_ref, kv_ref, tables_ref, count_ref, tiles_ref, fed, shape, how)

        if tiling.raw:

            @pl.when(wg == tiling.wgs * tiling.teams + 1)
            def _():
                left = 512 - 2 * tiling.registers[0] - tiling.registers[1]
                plgpu.set_max_registers(left, action="decrease")
                convert(cta, count_ref, tiles_ref, teams[0], shape, tiling)

        for t, s in enumerate(teams):

            @pl.when((wg >= tiling.wgs * t) & (wg < tiling.wgs * (t + 1)))
            def _(t=t, s=s):
                plgpu.set_max_registers(tiling.registers[0], action="increase")
                team = cta + t * tiling.ctas
                consume(wg - tiling.wgs * t, team, count_ref, tiles_ref, scalar_refs, o_ref, lse_ref, s, shape, tiling)
                if t == 0:
                    pl.when(wg == 0)(lambda: fill(cta, fill_refs, o_ref, s, shape, tiling))

    # Memory holds numbers of one type for each use: where products take another, queries come and answers go as bits.
    bits = jnp.dtype(shape.operands)
    outs = [jax.ShapeDtypeStruct((shape.tokens, shape.q_heads, shape.head_dim), bits)]
    if with_lse:
        outs.append(jax.ShapeDtypeStruct((shape.tokens, shape.q_heads), jnp.float32))
    args = [lax.bitcast_convert_type(q, bits), kv_pages, tables, count, tiles, *scalars.present]
    results = plgpu.kernel(
        body,
        out_type=tuple(outs),
        scratch_types=(scratch_types(shape, tiling),) * tiling.teams,
        grid=(tiling.ctas,),
        grid_names=("cta",),
        num_threads=tiling.wgs * tiling.teams + 1 + (tiling.raw > 0),
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=128 if tiling.packed else 512),
        kernel_name="rpa_prefill",
    )(*args)
    output = lax.bitcast_convert_type(results[0], jnp.dtype(shape.dtype))
    return output, results[1] if with_lse else None
