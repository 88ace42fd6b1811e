# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false, reportAssignmentType=false
"""One query row against a long cache: the memory-bound half of the Hopper kernel.

The group's heads are the *columns* of both products, S^T = K Q^T and O^T = V^T P^T, so that a row of eight heads costs
an eight-wide wgmma instead of a padded 64-row one, and scores and sums are a few registers a thread. A worker is one
producer warp, which finds out from the raw metadata what there is to do and gathers pages into a ring of [block, D]
tiles, and one consumer warpgroup, which is told by a record a row what it gets; a CTA holds several, so that the
bubbles between two items of one are filled by the others. An item is (split, row, kv head); splits lie at fixed
distances from the first block a row sees, so a row's bits depend on nothing but the row. With one split the answer is
final; of several, `combine` joins the parts.

All workers run one copy of the code: each in a copy of its own, instructions arrived more slowly than they were run.

Slower on an H200: a window of 128 keys in one block of 192, 24.9 us against 22.7 (256 rows); rows in a window looked up
once a head, 26.4; keys and values of short rows on barriers of their own, 23.7, and of 64 rows of 8k 493 against 490;
long rows in blocks of 128 by one worker, 521 us against 494; one row of 8k in 64 splits, 12.7 us against 8.3 in 32:
their join takes longer. A CTA of its own for every two items of those 64 rows in two splits, 484 against 470. No gain:
page ids loaded a block ahead, 490 and 490; a lane that arrives for its warp, 495 and 496; neighbouring heads to the
workers of one CTA, 471 and 470; pages in their order in memory, 1926 and 1935 (64 rows of 32k).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu.decode_work import (
    RECORD,
    STRAY,
    Item,
    Listed,
    Outputs,
    Scratch,
    Tiling,
    for_each_item,
    heads_at,
    keys_of,
    pages_of,
    scratch_types,
)
from rpa.backends.pallas_gpu.rows import Metadata
from rpa.backends.pallas_gpu.tiles import (
    FLOOR,
    I32,
    LOG2E,
    Heads,
    Shape,
    down,
    drain,
    halved,
    piece,
    widen,
    zero_unseen,
)

COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # one value a column, replicated down the rows
WG = plgpu.Layout.WGMMA


# ------------------------------------------------------------------ producer


def produce(worker, q_ref, kv_ref, meta: Metadata, units, s: Scratch, shape: Shape, tiling: Tiling) -> None:
    """The producer warp: a record and queries, then the pages of each block, as ring slots fall free."""
    n = shape.columns

    def post(item: Item, nth):
        slot = lax.rem(nth, I32(2))
        pl.when(nth >= 2)(lambda: plgpu.barrier_wait(s.q_free.at[slot]))
        for place, value in enumerate(item[: STRAY + 1]):
            s.record[slot * RECORD + place] = value

        @pl.when(item.blocks > 0)
        def _():
            first, _ = heads_at(lax.rem(item.index, I32(shape.kv_heads)), shape)
            source = q_ref.at[item.token, pl.ds(first, n)]
            plgpu.copy_gmem_to_smem(source, s.q.at[slot], s.q_full.at[slot])

        pl.when(item.blocks <= 0)(lambda: plgpu.barrier_arrive(s.q_full.at[slot]))

    def body(item: Item, step, nth, following):
        post(item, nth)

        def block(i, stray):
            return fill_slot(item, i, step + i, nth, stray, kv_ref, meta, s, shape, tiling)

        if tiling.short:
            for i in range(tiling.chunk // tiling.block):

                @pl.when(i < item.blocks)
                def _(i=i):
                    block(i, item.stray)

            return following()
        # The next item is looked for while the ring is full.
        first = jnp.minimum(item.blocks, tiling.stages)
        stray = lax.fori_loop(0, first, block, item.stray)
        after = following()
        lax.fori_loop(first, item.blocks, block, stray)
        return after

    step, nth = for_each_item(worker, meta, units, shape, tiling, body)
    post(Item(I32(-1), *(I32(0),) * (len(Item._fields) - 2)), nth)
    drain(2, nth + 1, s.q_free)
    drain(tiling.stages, step, *(free for free in (s.k_free, s.v_free) if free))


def fill_slot(item: Item, i, step, nth, stray, kv_ref, meta: Metadata, s: Scratch, shape: Shape, tiling: Tiling):
    """Copies the keys and values of block `i`, page by page, into the slot of `step`; returns `stray`, updated."""
    run = piece(shape.page, tiling.block)
    slot, head = lax.rem(step, I32(tiling.stages)), lax.rem(item.index, I32(shape.kv_heads))
    keys = keys_of(item, i, shape, tiling)
    if tiling.short:
        pages = item.pages[i * len(keys) : (i + 1) * len(keys)]
    else:  # loaded before the wait, so that their latency hides behind it
        pages, bad = pages_of(item, i, meta, shape, tiling)
        stray = stray | bad
        s.record[lax.rem(nth, I32(2)) * RECORD + STRAY] = stray
    # Pieces past the last live key are not copied: the consumer masks their scores and zeroes their values.
    both = ((0, s.k, s.k_full, s.k_free), (1, s.v, s.v_full or s.k_full, s.v_free))
    # Keys and values of a slot, neighbours in memory, are asked for page by page where they fall free together.
    for streams in (both,) if tiling.joint else (both[:1], both[1:]):
        for free in (free for _, _, _, free in streams if free):
            pl.when(step >= tiling.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))

        for j, page in enumerate(pages):

            @pl.when(keys[j] < item.stop)
            def _(j=j, page=page, streams=streams):
                slots = pl.ds(lax.rem(keys[j], I32(shape.page)), run)
                for which, ring, full, _ in streams:
                    source = kv_ref.at[page, slots, 2 * head + which]
                    plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(j * run, run)], full.at[slot])

            if j:  # a block holds one key at least

                @pl.when(keys[j] >= item.stop)
                def _(streams=streams):
                    for _, _, full, _ in streams:
                        plgpu.barrier_arrive(full.at[slot])
    return stray


# ------------------------------------------------------------------ consumer


def consume(outs: Outputs, heads: Heads, s: Scratch, shape: Shape, tiling: Tiling) -> None:
    """The consumer warpgroup: an online softmax over the blocks of each item that the producer names."""
    n, d = shape.columns, shape.head_dim

    def body(item: Item, slot, step):
        start = (
            plgpu.layout_cast(jnp.zeros((d, n), jnp.float32), WG),
            plgpu.layout_cast(jnp.full((n,), FLOOR, jnp.float32), COLUMNS),
            plgpu.layout_cast(jnp.zeros((tiling.block, n), jnp.float32), WG),
        )
        head = lax.rem(item.index, I32(shape.kv_heads))
        sink = None
        if heads.sinks is not None:  # loaded now, so that nothing waits for it at the end
            sink = plgpu.load(heads.sinks.at[pl.ds(heads_at(head, shape)[0], n)], layout=COLUMNS, optimized=False)
        scale = shape.scale if heads.k_scale is None else shape.scale * heads.k_scale[head]
        queries = s.q.at[slot]
        if shape.operands != shape.dtype:
            queries = s.half
            most = functools.partial(down, "max", scratch_ref=s.warps, lanes=tiling.lanes)
            queries.transpose((1, 0))[...], unit = halved(s.q.at[slot].transpose((1, 0))[...], 0, most)
            scale = scale * unit
            plgpu.commit_smem()
        fold = functools.partial(fold_block, item, queries, step, scale, s=s, shape=shape, tiling=tiling)
        acc, m, l = lax.fori_loop(0, item.blocks, fold, start)
        if heads.v_scale is not None:
            acc = acc * heads.v_scale[head]
        # Known only now: the producer looks at page ids as it goes.
        wrong = (item.owner == 2) | (s.record[slot * RECORD + STRAY] != 0)
        plgpu.barrier_arrive(s.q_free.at[slot])
        l = down("sum", l, s.warps, tiling.lanes) + jnp.where(wrong, jnp.nan, 0.0)
        if tiling.splits == 1:
            write_answer(item, acc, m, l, outs, sink, s, shape, tiling)
        else:
            outs.acc[item.index], outs.m[item.index], outs.l[item.index] = acc, m, l
            if outs.live is not None:  # the first item of a row tells how many parts it has

                @pl.when(item.index < tiling.rows * shape.kv_heads)
                def _():
                    row = lax.div(item.index, I32(shape.kv_heads))
                    outs.live[row] = jnp.where(item.owner == 0, 0, item.live)

    def loop(carry):
        step, nth, _ = carry
        slot = lax.rem(nth, I32(2))
        plgpu.barrier_wait(s.q_full.at[slot])
        told = [s.record[slot * RECORD + place] for place in range(STRAY)]
        item = Item(*told, I32(0), I32(0), I32(0))
        pl.when(item.blocks >= 0)(lambda: body(item, slot, step))
        pl.when(item.blocks < 0)(lambda: plgpu.barrier_arrive(s.q_free.at[slot]))
        return step + jnp.maximum(item.blocks, 0), nth + 1, item.blocks

    lax.while_loop(lambda carry: carry[2] >= 0, loop, (I32(0), I32(0), I32(0)))
    plgpu.wait_smem_to_gmem(0)


def fold_block(item: Item, queries, step, scale, i, carry, *, s: Scratch, shape: Shape, tiling: Tiling):
    """Folds one block into (acc [D, N], m [N], l [block, N]); l is summed over its rows only at the end."""
    acc, m, l = carry
    slot = lax.rem(step + i, I32(tiling.stages))
    key = item.start + i * tiling.block
    z = masked(scores(s, queries, slot, scale, shape), key, item, tiling)
    m_new = jnp.maximum(m, down("max", z, s.warps, tiling.lanes))
    alpha = jnp.exp2(m - m_new)
    p = jnp.exp2(z - across(m_new, z))
    s.p.transpose((1, 0))[...] = p.astype(shape.operands)
    plgpu.commit_smem()
    if s.v_full:
        plgpu.barrier_wait(s.v_full.at[slot])
    v_free = (s.v_free or s.k_free).at[slot]
    values = operand(s.v.at[slot], v_free, s, shape)
    clean_values(values, key, item, shape, tiling)
    pv = product(values.transpose((1, 0)), s.p.transpose((1, 0)))
    if not shape.stored:
        plgpu.barrier_arrive(v_free)
    return acc * across(alpha, acc) + pv, m_new, l * across(alpha, l) + p


def scores(s: Scratch, queries, slot, scale, shape: Shape):
    """Capped, scaled logits of one block in units of log 2, [block, N]; `scale` is one number or [N]."""
    plgpu.barrier_wait(s.k_full.at[slot])
    keys = operand(s.k.at[slot], s.k_free.at[slot], s, shape)
    x = product(keys, queries.transpose((1, 0)))
    if not shape.stored and s.v_free:
        plgpu.barrier_arrive(s.k_free.at[slot])
    if shape.cap is None:
        return x * factor(scale * LOG2E, x)
    return jnp.tanh(x * factor(scale / shape.cap, x)) * (shape.cap * LOG2E)


def factor(scale, like):
    """One number, or one a column, as what `like` can be multiplied by."""
    return across(scale, like) if jnp.ndim(scale) else scale


def operand(ref, free, s: Scratch, shape: Shape):
    """A ring slot as wgmma takes it: itself, or converted, and then the slot is given back by `free`."""
    if not shape.stored:
        return ref
    plgpu.commit_smem()  # a barrier of the warpgroup: its other warps have done with what `wide` held before
    widen(ref, s.wide)
    plgpu.commit_smem()
    plgpu.barrier_arrive(free)
    return s.wide


def masked(z, key, item: Item, tiling: Tiling):
    """-inf where the row sees no key: before the window, past its own position, past the split."""
    keys = key + plgpu.broadcasted_iota(jnp.int32, z.shape, 0, layout=WG)
    return jnp.where((keys >= item.low) & (keys < item.stop), z, -jnp.inf)


def clean_values(v_ref, key, item: Item, shape: Shape, tiling: Tiling) -> None:
    """Zeroes values that no row may see, in the blocks that hold some: a weight of 0 does not silence a NaN."""

    @pl.when((key < item.low) | (key + tiling.block > item.stop))
    def _():
        zero_unseen(v_ref, key, item.low, item.stop)
        plgpu.commit_smem()


def product(a, b):
    """a @ b in a fresh f32 accumulator, waited for."""

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a, b)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def across(column, like):
    """[N] broadcast down the rows of `like`."""
    return lax.broadcast_in_dim(column, like.shape, [1])


# ------------------------------------------------------------------ output


def normalised(acc, m, l, sink, owned):
    """(output f32 [D, N], lse [N]) of a row: NaN where `l` is, 0 and -inf or the sink where nothing was seen."""
    if sink is not None:
        top = jnp.maximum(m, sink * LOG2E)
        scale = jnp.exp2(m - top)
        l = l * scale + jnp.exp2(sink * LOG2E - top)
    else:
        top, scale = m, 1.0
    empty = l == 0
    total = jnp.where(empty, 1.0, l)
    lse = jnp.where(empty | ~owned, -jnp.inf, (top + jnp.log2(total)) / LOG2E)
    return acc * across(scale / total, acc), lse


def write_answer(
    item: Item, acc, m, l, outs: Outputs, sink, s: Scratch, shape: Shape, tiling: Tiling
) -> None:
    """The row's answer for one kv head; nobody's rows, of no keys, become zeros."""
    head = lax.rem(item.index, I32(shape.kv_heads))
    _, before = heads_at(head, shape)
    out, lse = normalised(acc, m, l, sink, item.owner != 0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
    s.out.transpose((1, 0))[...] = out.astype(shape.dtype)
    if outs.lse is not None:
        s.lse[...] = lse
    plgpu.commit_smem()
    heads = pl.ds(head * shape.group, shape.group)
    plgpu.copy_smem_to_gmem(s.out.at[pl.ds(before, shape.group)], outs.output.at[item.token, heads])
    if outs.lse is not None:

        @pl.loop(0, shape.group)
        def _(i):
            outs.lse[item.token, head * shape.group + i] = s.lse[before + i]


# ------------------------------------------------------------------ the kernel of decode alone


def result_types(shape: Shape, tiling: Tiling, with_lse: bool) -> Outputs:
    """The arrays of `Outputs` that this tiling writes."""
    items, n = tiling.units * shape.kv_heads, shape.columns
    if tiling.splits > 1:
        parts = ((items, shape.head_dim, n), (items, n), (items, n))
        acc, m, l = (jax.ShapeDtypeStruct(dims, jnp.float32) for dims in parts)
        live = None if tiling.singles else jax.ShapeDtypeStruct((tiling.rows,), jnp.int32)
        return Outputs(acc=acc, m=m, l=l, live=live)
    dims = (shape.tokens, shape.q_heads)
    lse = jax.ShapeDtypeStruct(dims, jnp.float32) if with_lse else None
    return Outputs(jax.ShapeDtypeStruct((*dims, shape.head_dim), jnp.dtype(shape.dtype)), lse)


def attend(
    q, kv_pages, meta: Metadata, units, heads: Heads, shape: Shape, tiling: Tiling, with_lse: bool
) -> Outputs:
    """The decode rows' `Outputs`; parts of items that hold no keys are not written.

    Args:
        q: [T, heads, D], `shape.loaded_heads` of them. units: `Listed`, where the rows are, else None.
        heads: sinks, which are read with one split only, and scales.
    """
    types = result_types(shape, tiling, with_lse)
    heads = heads if tiling.splits == 1 else heads._replace(sinks=None)

    def body(q_ref, kv_ref, *rest):
        rest = list(rest)
        meta_refs = Metadata(*(rest.pop(0) for _ in Metadata._fields))
        unit_refs = None if units is None else Listed(rest.pop(0), rest.pop(0))
        head_refs = heads.of(rest)
        outs = Outputs(*(None if t is None else rest.pop(0) for t in types))
        (s,) = rest
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        registers = {1: (232, 72), 2: (216, 72), 3: (152, 56), 4: (104, 64)}[tiling.workers]

        @pl.when(wg < tiling.workers)
        def _():
            plgpu.set_max_registers(registers[0], action="increase")
            consume(outs, head_refs, s.of(wg, tiling), shape, tiling)

        @pl.when(wg == tiling.workers)
        def _():
            plgpu.set_max_registers(registers[1], action="decrease")

            @plgpu.warp_map
            def _(warp):
                @pl.when(warp < tiling.workers)
                def _():
                    mine = s.of(warp, tiling)
                    produce(cta + warp * tiling.ctas, q_ref, kv_ref, meta_refs, unit_refs, mine, shape, tiling)

    results = plgpu.kernel(
        body,
        out_type=tuple(t for t in types if t is not None),
        scratch_types=(scratch_types(shape, tiling),),
        grid=(tiling.ctas,),
        grid_names=("cta",),
        num_threads=tiling.workers + 1,
        thread_name="wg",
        # Safe: `commit_smem` or a reduction's barrier parts every write of shared memory from other warps' reads of it.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="rpa_decode",
    )(q, kv_pages, *meta, *(units or ()), *heads.present)
    results = list(results)
    return Outputs(*(None if t is None else results.pop(0) for t in types))
