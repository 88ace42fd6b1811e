# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false, reportAssignmentType=false
"""What the decode role works on: its tile shapes, its shared memory, and one item with its keys and pages."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu import rows
from rpa.backends.pallas_gpu.rows import Metadata
from rpa.backends.pallas_gpu.tiles import I32, Shape, ceil_div, first_key, page_of, piece, smem


class Tiling(NamedTuple):
    """Static parameters of the decode role."""

    rows: int  # query rows it may be given, R; up to `rows * splits` units
    block: int  # keys a ring slot
    stages: int  # ring slots a worker
    chunk: int  # keys a split, a multiple of `block`
    splits: int  # splits a row can need
    workers: int  # warpgroups a CTA, each with its own ring
    ctas: int
    singles: bool = False  # the rows are one-token sequences, listed by `plan.listed`; else all query rows
    lanes: bool = True  # see `rows.search`
    short: bool = False  # a few blocks: neighbouring items go to one worker, which looks a row up once for its heads
    joint: bool = False  # keys and values share their barriers: fewer to set up, which short rows wait for

    @property
    def units(self) -> int:
        return self.splits * self.rows


class Item(NamedTuple):
    """One work item, traced: the first fields are what the producer tells the consumer."""

    blocks: jax.Array  # keys to fold, in blocks
    index: jax.Array  # into the partial results
    token: jax.Array  # row of the queries
    low: jax.Array  # first key seen
    start: jax.Array  # first key of the first block
    stop: jax.Array  # one past the last key of this split
    owner: jax.Array  # as `rows.Row`
    live: jax.Array  # splits of this row that hold keys, one at least
    stray: jax.Array  # 1 where a page is none: the row is NaN; told with the last block
    sequence: jax.Array
    post: jax.Array  # whether there is anything to do
    pages: tuple = ()  # of each piece, where rows are short


STRAY = Item._fields.index("stray")  # the last field of a record
RECORD = 16  # its room
REDUCTION = 256  # numbers


class Listed(NamedTuple):
    """The units that `plan.listed` lists, refs in global memory."""

    listed: Any  # i32 [.. + units], at its end the sequence of each
    through: Any  # i32 [S], the last is how many there are


class Scratch(NamedTuple):
    """Shared memory and barriers, of all workers of a CTA (each array with one more leading dimension) or of one."""

    q: jax.Ref  # [2, N, D], of this item and the next
    k: jax.Ref  # [stages, block, D], as stored
    v: jax.Ref  # [stages, block, D]
    wide: Any  # [block, D], keys or values of narrow pages, converted; else nothing
    half: Any  # [N, D], bfloat16 queries of narrow pages, converted; else nothing
    p: jax.Ref  # [N, block], weights on their way back into a product
    out: jax.Ref  # [N, D], a final answer on its way out
    lse: jax.Ref  # [N]
    record: jax.Ref  # [2 * RECORD]
    warps: jax.Ref  # [REDUCTION], see `tiles.down`
    q_full: Any  # [2]
    q_free: Any  # [2]
    k_full: Any  # [stages]
    v_full: Any
    k_free: Any
    v_free: Any

    def of(self, worker, tiling: Tiling) -> Scratch:
        """What belongs to one worker."""

        def mine(name, ref):
            if isinstance(ref, tuple):
                return ref
            counts = {"q_full": 2, "q_free": 2}
            barrier = name.endswith(("full", "free"))
            return Barriers(ref, worker * counts.get(name, tiling.stages)) if barrier else ref.at[worker]

        return Scratch(*(mine(name, ref) for name, ref in zip(self._fields, self, strict=True)))


class Barriers(NamedTuple):
    """Some of an array of barriers, from the first on."""

    ref: Any
    first: Any

    @property
    def at(self) -> Barriers:
        return self

    def __getitem__(self, slot):
        return self.ref.at[self.first + slot]


class Outputs(NamedTuple):
    """Where results go: the answer itself with one split, else the parts of every (split, row, kv head)."""

    output: Any = None  # [T, Hq, D]
    lse: Any = None  # f32 [T, Hq], where asked for
    acc: Any = None  # f32 [items, D, N], unnormalised
    m: Any = None  # f32 [items, N], in units of log 2
    l: Any = None  # f32 [items, N], NaN where a page is none or the row's sequence is invalid
    live: Any = None  # i32 [R], splits of each row that hold keys; 0 where the row is nobody's


def scratch_types(shape: Shape, tiling: Tiling) -> Scratch:
    w, n, d, dtype = tiling.workers, shape.columns, shape.head_dim, shape.dtype
    copies = tiling.block // piece(shape.page, tiling.block)
    pair = functools.partial(plgpu.Barrier, num_barriers=2 * w)
    ring = functools.partial(plgpu.Barrier, num_barriers=tiling.stages * w)
    return Scratch(
        q=smem((w, 2, n, d), dtype),
        k=smem((w, tiling.stages, tiling.block, d), shape.pages_dtype),
        v=smem((w, tiling.stages, tiling.block, d), shape.pages_dtype),
        wide=smem((w, tiling.block, d), shape.operands) if shape.stored else (),
        half=smem((w, n, d), shape.operands) if shape.operands != dtype else (),
        p=smem((w, n, tiling.block), shape.operands, like=d),
        out=plgpu.SMEM((w, n, d), jnp.dtype(dtype)),
        lse=plgpu.SMEM((w, n), jnp.float32),
        record=plgpu.SMEM((w, 2 * RECORD), jnp.int32),
        warps=plgpu.SMEM((w, REDUCTION), jnp.float32),
        q_full=pair(),
        q_free=pair(),
        k_full=ring(num_arrivals=copies * (1 + tiling.joint)),
        v_full=() if tiling.joint else ring(num_arrivals=copies),
        k_free=ring(),
        v_free=() if tiling.joint else ring(),
    )


def item_at(index, meta: Metadata, units, shape: Shape, tiling: Tiling) -> Item:
    """Finds one item's row and keys; items are dealt by split, row and head, heads fastest."""
    unit = lax.div(index, I32(shape.kv_heads))
    if tiling.singles:
        sequence = jnp.minimum(units.listed[units.listed.shape[0] - tiling.units + unit], tiling.rows - 1)
        split = unit - jnp.where(sequence > 0, units.through[jnp.maximum(sequence - 1, 0)], 0)
        token, position = meta.loc[sequence], meta.context[sequence] - 1
        owner = live = I32(1)
        head = lax.rem(index, I32(shape.kv_heads))
        index = (split * tiling.rows + sequence) * shape.kv_heads + head
    else:
        token, split = lax.rem(unit, I32(tiling.rows)), lax.div(unit, I32(tiling.rows))
        row = rows.row_at(token, meta, shape, tiling.lanes)
        sequence, position, owner = row.sequence, row.position, row.owner
    low, base = first_key(position, shape.window, piece(shape.page, tiling.block))
    start = base + split * tiling.chunk
    stop = jnp.minimum(position + 1, start + tiling.chunk)
    blocks = ceil_div(jnp.maximum(stop - start, 0), tiling.block)
    stray, post = I32(0), jnp.bool_(True)
    if not tiling.singles:  # `plan.owners` has looked at those
        live = jnp.maximum(ceil_div(position + 1 - base, tiling.chunk), 1)
        post = split < live
        needed = (owner == 1) & (split == 0)  # once a row is enough
        stray = rows.strays(base, position + 1, needed, row, meta, shape)
    item = Item(blocks, index, token, low, start, stop, owner, live, stray, sequence, post)
    if not tiling.short:
        return item
    # All of a row's page ids at once: their latency is most of its time.
    found = [pages_of(item, i, meta, shape, tiling) for i in range(tiling.chunk // tiling.block)]
    for _, bad in found:
        stray = stray | jnp.where(blocks > 0, bad, 0)
    return item._replace(stray=stray, pages=tuple(page for pages, _ in found for page in pages))


def keys_of(item: Item, i, shape: Shape, tiling: Tiling) -> list:
    """The first key of each piece of block `i`."""
    run = piece(shape.page, tiling.block)
    key = lax.div(item.start, I32(run)) * run + i * tiling.block  # the compiler must see that pieces are aligned
    return [key + j * run for j in range(tiling.block // run)]


def pages_of(item: Item, i, meta: Metadata, shape: Shape, tiling: Tiling):
    """(the page of each piece of block `i`, 1 where one is none); past the last live key that one's is repeated."""
    run = piece(shape.page, tiling.block)
    last = lax.div(item.stop - 1, I32(run)) * run
    keys = (jnp.minimum(key, last) for key in keys_of(item, i, shape, tiling))
    pages, _, bad = zip(*(page_of(key, item.sequence, meta.tables, shape) for key in keys), strict=True)
    return pages, functools.reduce(lax.bitwise_or, bad)


def for_each_item(worker, meta: Metadata, units, shape: Shape, tiling: Tiling, body):
    """Runs `body(item, step, nth, following)` over this worker's items; it returns `following()`, the next item.

    `step` counts ring slots used before, `nth` items; both counts after the last item are returned.
    """
    workers = tiling.workers * tiling.ctas
    count = units.through[units.through.shape[0] - 1] if tiling.singles else I32(tiling.units)
    total = count * shape.kv_heads
    mine = lax.div(jnp.maximum(total - worker + (workers - 1), 0), I32(workers))
    first, stride = worker, workers
    if tiling.short:
        each = ceil_div(total, workers)
        first, stride = worker * each, 1
        mine = jnp.clip(total - first, 0, each)

    def item_of(i):
        index = jnp.minimum(first + i * stride, total - 1)
        return item_at(jnp.maximum(index, 0), meta, units, shape, tiling)

    def after(i, item: Item):
        if not tiling.short:
            return item_of(i)
        next_head = item._replace(index=item.index + 1)  # of the same row and split
        same = lax.rem(first + i, I32(shape.kv_heads)) != 0
        return lax.cond(same, lambda: next_head, lambda: item_of(i))

    def loop(i, carry):
        step, nth, item = carry
        following = functools.partial(after, i + 1, item)
        item_after = lax.cond(item.post, lambda: body(item, step, nth, following), following)
        return step + jnp.where(item.post, item.blocks, 0), nth + jnp.where(item.post, 1, 0), item_after

    return lax.fori_loop(0, mine, loop, (I32(0), I32(0), item_of(0)))[:2]


def heads_at(head, shape: Shape):
    """(first of the N heads that are loaded for a kv head, how many of them lie before its group).

    The group's neighbours fill the columns that it leaves: columns do not mix.
    """
    eight = jnp.minimum(lax.div(head * shape.group, I32(8)), (shape.loaded_heads - shape.columns) // 8)
    first = eight * 8  # last, so that the compiler sees what TMA asks
    return first, head * shape.group - first
