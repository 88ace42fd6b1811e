# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
"""One query row against a long cache: the memory-bound half of the Hopper kernel.

The group's heads are the *columns* of both products, S^T = K Q^T and O^T = V^T P^T, so that a row of eight heads costs
an eight-wide wgmma instead of a padded 64-row one, and scores and sums are a few registers a thread. A worker is one
producer warp, which gathers pages into a ring of [block, D] tiles, and one consumer warpgroup; a CTA holds several, so
that the bubbles between two items of one are filled by the others. An item is (unit, kv head), a unit one split of one
row; splits lie at fixed distances from the first block a row sees, so a row's bits depend on nothing but the row.
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

COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # one value a column, replicated down the rows
WG = plgpu.Layout.WGMMA


class Tiling(NamedTuple):
    """Static parameters of the decode role."""

    rows: int  # query rows it may be given, R; up to `rows * splits` units
    block: int  # keys a ring slot
    stages: int  # ring slots a worker
    chunk: int  # keys a split, a multiple of `block`
    splits: int  # splits a row can need
    workers: int  # warpgroups a CTA, each with its own ring
    ctas: int

    def columns(self, shape: Shape) -> int:
        return -(-shape.group // 8) * 8

    @property
    def units(self) -> int:
        return self.splits * self.rows


class Item(NamedTuple):
    """What is left to read of one work item, traced."""

    index: jax.Array  # into the partial results
    token: jax.Array  # row of the queries
    head: jax.Array
    sequence: jax.Array
    low: jax.Array  # first key seen
    start: jax.Array  # first key of the first block
    stop: jax.Array  # one past the last key of this split
    blocks: jax.Array  # 0 where nothing is to be done


class Scratch(NamedTuple):
    """One worker's shared memory and barriers."""

    q: jax.Ref  # [N, D]
    k: jax.Ref  # [stages, block, D]
    v: jax.Ref  # [stages, block, D]
    p: jax.Ref  # [N, block], weights on their way back into a product
    q_full: jax.Ref
    q_free: jax.Ref
    k_full: jax.Ref  # [stages]
    v_full: jax.Ref
    k_free: jax.Ref
    v_free: jax.Ref


def scratch_types(shape: Shape, tiling: Tiling) -> Scratch:
    n, d, dtype = tiling.columns(shape), shape.head_dim, shape.dtype
    copies = tiling.block // piece(shape.page, tiling.block)
    ring = functools.partial(plgpu.Barrier, num_barriers=tiling.stages)
    return Scratch(
        q=smem((n, d), dtype),
        k=smem((tiling.stages, tiling.block, d), dtype),
        v=smem((tiling.stages, tiling.block, d), dtype),
        p=smem((n, tiling.block), dtype, like=d),
        q_full=plgpu.Barrier(),
        q_free=plgpu.Barrier(),
        k_full=ring(num_arrivals=copies),
        v_full=ring(num_arrivals=copies),
        k_free=ring(),
        v_free=ring(),
    )


def item_at(index, units_ref, shape: Shape, tiling: Tiling) -> Item:
    """Reads one item's unit (token, sequence, position or -1, split) and finds its keys."""
    head, unit = lax.rem(index, I32(shape.kv_heads)), lax.div(index, I32(shape.kv_heads))
    token, sequence, position, split = (units_ref[field, unit] for field in range(4))
    low, base = first_key(position, shape.window, piece(shape.page, tiling.block))
    start = base + split * tiling.chunk
    stop = jnp.minimum(position + 1, start + tiling.chunk)
    blocks = ceil_div(jnp.maximum(stop - start, 0), tiling.block)
    return Item(index, token, head, sequence, low, start, stop, blocks)


def for_each_item(worker, units_ref, shape: Shape, tiling: Tiling, body):
    """Runs `body(item, step, nth)` over this worker's items; `step` counts ring slots used before, `nth` live items.

    Returns both counts after the last item.
    """
    workers = tiling.workers * tiling.ctas
    total = units_ref[4, 0] * shape.kv_heads
    mine = lax.div(jnp.maximum(total - worker + (workers - 1), 0), I32(workers))

    def loop(i, carry):
        step, nth = carry
        item = item_at(worker + i * workers, units_ref, shape, tiling)
        pl.when(item.blocks > 0)(lambda: body(item, step, nth))
        return step + item.blocks, nth + jnp.minimum(item.blocks, 1)

    return lax.fori_loop(0, mine, loop, (I32(0), I32(0)))


# ------------------------------------------------------------------ producer


def produce(worker, q_ref, kv_ref, tables_ref, units_ref, s: Scratch, shape: Shape, tiling: Tiling) -> None:
    """The producer warp: queries, then the pages of each block, as ring slots fall free."""
    n = tiling.columns(shape)

    def body(item: Item, step, nth):
        pl.when(nth > 0)(lambda: plgpu.barrier_wait(s.q_free))
        first = (item.token * shape.kv_heads + item.head) * n
        plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(first, n)], s.q, s.q_full)
        last = lax.div(item.stop - 1, I32(piece(shape.page, tiling.block))) * piece(shape.page, tiling.block)

        @pl.loop(0, item.blocks)
        def _(i):
            fill_slot(
                item, item.start + i * tiling.block, last, step + i, kv_ref, tables_ref, s, shape, tiling
            )

    drain(*for_each_item(worker, units_ref, shape, tiling, body), s, tiling)


def drain(step, nth, s: Scratch, tiling: Tiling) -> None:
    """Waits for the consumer's last releases, so that no barrier is left a phase behind."""
    pl.when(nth > 0)(lambda: plgpu.barrier_wait(s.q_free))
    for slot in range(tiling.stages):

        @pl.when(step > slot)
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
    # it: its lines are in the L2, and the consumer zeroes what no row may see.
    places = [
        page_of(jnp.minimum(key + j * run, last), item.sequence, tables_ref, shape)
        for j in range(tiling.block // run)
    ]
    for which, ring, full, free in ((0, s.k, s.k_full, s.k_free), (1, s.v, s.v_full, s.v_free)):
        pl.when(step >= tiling.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
        for j, (page, offset) in enumerate(places):
            source = kv_ref.at[page, pl.ds(offset, run), 2 * item.head + which]
            plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(j * run, run)], full.at[slot])


# ------------------------------------------------------------------ consumer


def consume(worker, units_ref, o_ref, m_ref, l_ref, s: Scratch, shape: Shape, tiling: Tiling) -> None:
    """The consumer warpgroup: an online softmax over the blocks of each item, its partial result to global memory."""
    n, d = tiling.columns(shape), shape.head_dim

    def body(item: Item, step, nth):
        del nth
        plgpu.barrier_wait(s.q_full)
        start = (
            plgpu.layout_cast(jnp.zeros((d, n), jnp.float32), WG),
            plgpu.layout_cast(jnp.full((n,), FLOOR, jnp.float32), COLUMNS),
            plgpu.layout_cast(jnp.zeros((tiling.block, n), jnp.float32), WG),
        )
        fold = functools.partial(fold_block, item, step, s=s, shape=shape, tiling=tiling)
        acc, m, l = lax.fori_loop(0, item.blocks, fold, start)
        plgpu.barrier_arrive(s.q_free)
        o_ref[item.index] = acc
        m_ref[item.index] = m
        l_ref[item.index] = l.sum(axis=0)

    for_each_item(worker, units_ref, shape, tiling, body)


def fold_block(item: Item, step, i, carry, *, s: Scratch, shape: Shape, tiling: Tiling):
    """Folds one block into (acc [D, N], m [N], l [block, N]); l is summed over its rows only at the end."""
    acc, m, l = carry
    slot = lax.rem(step + i, I32(tiling.stages))
    key = item.start + i * tiling.block
    z = masked(scores(s, slot, shape, tiling), key, item, tiling)
    m_new = jnp.maximum(m, z.max(axis=0))
    alpha = jnp.exp2(m - m_new)
    p = jnp.exp2(z - across(m_new, z))
    s.p.transpose((1, 0))[...] = p.astype(shape.dtype)
    plgpu.commit_smem()
    plgpu.barrier_wait(s.v_full.at[slot])
    clean_values(s.v.at[slot], key, item, shape, tiling)
    pv = product(s.v.at[slot].transpose((1, 0)), s.p.transpose((1, 0)))
    plgpu.barrier_arrive(s.v_free.at[slot])
    return acc * across(alpha, acc) + pv, m_new, l * across(alpha, l) + p


def scores(s: Scratch, slot, shape: Shape, tiling: Tiling):
    """Capped, scaled logits of one block in units of log 2, [block, N]."""
    plgpu.barrier_wait(s.k_full.at[slot])
    x = product(s.k.at[slot], s.q.transpose((1, 0)))
    plgpu.barrier_arrive(s.k_free.at[slot])
    if shape.cap is None:
        return x * (shape.scale * LOG2E)
    return jnp.tanh(x * (shape.scale / shape.cap)) * (shape.cap * LOG2E)


def masked(z, key, item: Item, tiling: Tiling):
    """-inf where the row sees no key: before the window, past its own position, past the split."""
    keys = key + plgpu.broadcasted_iota(jnp.int32, z.shape, 0, layout=WG)
    return jnp.where((keys >= item.low) & (keys < item.stop), z, -jnp.inf)


def clean_values(v_ref, key, item: Item, shape: Shape, tiling: Tiling) -> None:
    """Zeroes values that no row may see, in the blocks that hold some: a weight of 0 does not silence a NaN."""

    @pl.when((key < item.low) | (key + tiling.block > item.stop))
    def _():
        zero_unseen(v_ref, key, item.low, item.stop, shape)
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


REDUCTION = 1024  # bytes a warpgroup needs to reduce across its warps


def apart(consumers, wg, nth: int = 0) -> None:
    """Runs `consumers[w]` on warpgroup `w`, each where its reductions across warps have memory of their own.

    Pallas places a reduction's scratch just past what is allocated where it stands, which is the same place in every
    warpgroup (jax 0.11.2): two that reduce at once corrupt each other. So each stands inside one allocation more than
    the one before it. All warpgroups enter all allocations first, since to enter one is a barrier of the whole CTA.
    """
    if nth + 1 < len(consumers):
        pad = plgpu.SMEM((REDUCTION,), jnp.int8)
        pl.run_scoped(lambda _: apart(consumers, wg, nth + 1), pad, collective_axes="wg")
    pl.when(wg == nth)(consumers[nth])


# ------------------------------------------------------------------ the kernel of decode alone


def partial_types(shape: Shape, tiling: Tiling) -> tuple:
    """Unnormalised results of every (unit, kv head): acc [items, D, N], m (log 2) and l [items, N], all f32."""
    items, n = tiling.units * shape.kv_heads, tiling.columns(shape)
    dims = ((items, shape.head_dim, n), (items, n), (items, n))
    return tuple(jax.ShapeDtypeStruct(d, jnp.float32) for d in dims)


def partials(q, kv_pages, tables, units, shape: Shape, tiling: Tiling):
    """`partial_types`, computed; items of no keys are not written.

    Args:
        q: [T * Hkv * N, D], the group padded to N heads.
        units: i32 [5, units], see `plan.units_of_rows`.
    """

    def body(q_ref, kv_ref, tables_ref, units_ref, o_ref, m_ref, l_ref, *workers):
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        def consumer(w, s):
            def run():
                plgpu.set_max_registers({1: 232, 2: 232, 3: 152}[tiling.workers], action="increase")
                consume(cta + w * tiling.ctas, units_ref, o_ref, m_ref, l_ref, s, shape, tiling)

            return run

        apart([consumer(w, s) for w, s in enumerate(workers)], wg)

        @pl.when(wg == tiling.workers)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.warp_map
            def _(warp):
                for w, s in enumerate(workers):

                    @pl.when(warp == w)
                    def _(w=w, s=s):
                        produce(cta + w * tiling.ctas, q_ref, kv_ref, tables_ref, units_ref, s, shape, tiling)

    return plgpu.kernel(
        body,
        out_type=partial_types(shape, tiling),
        scratch_types=(scratch_types(shape, tiling),) * tiling.workers,
        grid=(tiling.ctas,),
        grid_names=("cta",),
        num_threads=tiling.workers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=REDUCTION),
        kernel_name="rpa_decode",
    )(q, kv_pages, tables, units)
