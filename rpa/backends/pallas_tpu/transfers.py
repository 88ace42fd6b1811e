"""What moves between HBM and the kernel's buffers: page ids, pages, queries, outputs; and the cursors that ask.

Three cursors walk the same list of blocks (tile by tile, sequence by sequence): the first asks for the page ids of
a block, the second, once they are there, for its pages, the third computes. The first runs TABLE_LEAD blocks ahead
of the second and the second `buffers - 1` ahead of the third, across the borders of tiles and sequences. Slots are
rings; a slot's semaphore belongs to it alone.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa.backends.pallas_tpu.plan import TABLE_ENTRIES, TABLE_LEAD, TABLE_SLOTS, Plan
from rpa.backends.pallas_tpu.tiles import Tiles

# A block of up to this many pages asks for them in straight-line code when all are visible.
UNROLLED_PAGES = 32
# Fields of the cursor scratch in SMEM.
TABLE_TILE, TABLE_BLOCK, TABLE_SLOT, PAGE_TILE, PAGE_BLOCK, PAGE_TABLE_SLOT, PAGE_SLOT, SLOT = range(8)


class Refs(NamedTuple):
    """Everything the kernel reads and writes; shapes use the names of `Plan`."""

    tiles: Tiles  # SMEM, int32 [N] each
    scales: jax.Ref  # SMEM f32 [2, heads]: key scales, value scales
    sinks: jax.Ref  # VMEM f32 [heads, 1, packed_rows]
    decode_sinks: jax.Ref  # VMEM f32 [heads * decode_rows, 1]
    queries: jax.Ref  # HBM [T, q_heads, head_dim]
    tables: jax.Ref  # HBM int32 [S * slices, 1, table_entries]
    pages: jax.Ref  # HBM [P, page, 2 * heads, head_dim]
    out: jax.Ref  # HBM [T, q_heads, head_dim]
    lse: Any  # None without an lse; HBM f32 [N, heads, 1, packed_rows]
    cursor: jax.Ref  # SMEM int32 [8]
    table: jax.Ref  # SMEM int32 [TABLE_SLOTS * table_entries]
    raw: jax.Ref  # VMEM [buffers, block_pages, page, 2 * heads, head_dim]
    words: jax.Ref  # VMEM u32 or f32 [lane_tiles, keys * word_pitch, 128]
    q_tile: jax.Ref  # VMEM [2, block_q, q_heads, head_dim]
    out_tile: jax.Ref  # VMEM [2, block_q, q_heads, head_dim]
    stage: jax.Ref  # VMEM f32 [lane_tiles, stage_rows, 128], row i's heads at i * head_pitch
    operand: jax.Ref  # VMEM [heads, packed_rows, dim], row j * block_q + i is head j of row i
    m: jax.Ref  # VMEM f32 [heads, 1, packed_rows]
    l: jax.Ref  # VMEM f32 [heads, 1, packed_rows]
    acc: jax.Ref  # VMEM f32 [heads, dim, packed_rows]
    decode_m: jax.Ref  # VMEM f32 [heads * decode_rows, 1]
    decode_l: jax.Ref  # VMEM f32 [heads * decode_rows, 1]
    decode_acc: jax.Ref  # VMEM f32 [heads * decode_rows, dim]
    lse_tile: Any  # None without an lse; VMEM f32 [2, heads, 1, packed_rows]
    table_sem: jax.Ref  # DMA [TABLE_SLOTS]
    page_sem: jax.Ref  # DMA [buffers]
    q_sem: jax.Ref  # DMA [2]
    out_sem: jax.Ref  # DMA [2]
    lse_sem: Any  # None without an lse; DMA [2]


def start_cursors(refs: Refs, plan: Plan, core) -> None:
    for tile, block in ((TABLE_TILE, TABLE_BLOCK), (PAGE_TILE, PAGE_BLOCK)):
        refs.cursor[tile] = core
        refs.cursor[block] = refs.tiles.block[core]
    for slot in (TABLE_SLOT, PAGE_TABLE_SLOT, PAGE_SLOT, SLOT):
        refs.cursor[slot] = 0

    def ask(_, carry):
        fetch_table(refs, plan)
        return carry

    def fill(_, carry):
        wait_table(refs, plan)
        fetch_table(refs, plan)
        fetch_pages(refs, plan)
        return carry

    lax.fori_loop(0, TABLE_LEAD, ask, 0)
    lax.fori_loop(0, plan.buffers - 1, fill, 0)


def drain_tables(refs: Refs, plan: Plan) -> None:
    """Wait for the table transfers that ran past the last tile."""

    def wait(_, slot):
        _table_copy(refs, plan, 0, slot).wait()
        return jnp.where(slot + 1 == TABLE_SLOTS, 0, slot + 1)

    lax.fori_loop(0, TABLE_LEAD, wait, refs.cursor[PAGE_TABLE_SLOT])


def _advance(refs: Refs, plan: Plan, tile_field: int, block_field: int, tile, block) -> None:
    """Move a cursor to the next block of its tile, or to the first of the next tile."""
    more = block + 1 < refs.tiles.block_end[tile]
    next_tile = tile + plan.cores
    refs.cursor[tile_field] = jnp.where(more, tile, next_tile)
    refs.cursor[block_field] = jnp.where(more, block + 1, refs.tiles.block[next_tile])


def next_slot(refs: Refs, field: int, slots: int) -> None:
    slot = refs.cursor[field] + 1
    refs.cursor[field] = jnp.where(slot == slots, 0, slot)


def _table_copy(refs: Refs, plan: Plan, source, slot):
    # The ring is one-dimensional because SMEM then indexes without arithmetic on tiles.
    place = pl.ds(pl.multiple_of(slot * plan.table_entries, TABLE_ENTRIES), plan.table_entries)
    return pltpu.make_async_copy(refs.tables.at[source, 0], refs.table.at[place], refs.table_sem.at[slot])


def fetch_table(refs: Refs, plan: Plan) -> None:
    """Ask for the page ids of the first cursor's block; past the last tile it asks for ids that nobody uses."""
    tile, block = refs.cursor[TABLE_TILE], refs.cursor[TABLE_BLOCK]
    part = jnp.minimum(block >> _log2(plan.table_entries // plan.block_pages), plan.slices - 1)
    slot = refs.cursor[TABLE_SLOT]
    _table_copy(refs, plan, refs.tiles.seq[tile] * plan.slices + part, slot).start()
    _advance(refs, plan, TABLE_TILE, TABLE_BLOCK, tile, block)
    next_slot(refs, TABLE_SLOT, TABLE_SLOTS)


def wait_table(refs: Refs, plan: Plan) -> None:
    """Wait for the page ids of the second cursor's block."""
    _table_copy(refs, plan, 0, refs.cursor[PAGE_TABLE_SLOT]).wait()


def _page_range(refs: Refs, plan: Plan, tile, block):
    """Pages of a block that some row of the tile sees, half-open, counted from the block's first."""
    base = block * plan.block_pages
    first = jnp.maximum(refs.tiles.page[tile] - base, 0)
    end = jnp.minimum(refs.tiles.page_end[tile] - base, plan.block_pages)
    return first, end


def fetch_pages(refs: Refs, plan: Plan) -> None:
    """Ask for the pages of the second cursor's block, one transfer a page, all on the slot's semaphore."""
    tile, block = refs.cursor[PAGE_TILE], refs.cursor[PAGE_BLOCK]
    table_slot, slot = refs.cursor[PAGE_TABLE_SLOT], refs.cursor[PAGE_SLOT]
    first, end = _page_range(refs, plan, tile, block)
    within = block & (plan.table_entries // plan.block_pages - 1)
    offset = table_slot * plan.table_entries + within * plan.block_pages

    def start(page):
        source = refs.table[offset + page]
        page_copy(refs, source, slot, page).start()

    if plan.block_pages <= UNROLLED_PAGES:
        for page in range(plan.block_pages):
            pl.when((page >= first) & (page < end))(functools.partial(start, page))
    else:
        lax.fori_loop(first, end, lambda page, carry: start(page) or carry, 0)
    _advance(refs, plan, PAGE_TILE, PAGE_BLOCK, tile, block)
    next_slot(refs, PAGE_TABLE_SLOT, TABLE_SLOTS)
    next_slot(refs, PAGE_SLOT, plan.buffers)


def page_copy(refs: Refs, source, slot, page):
    """The transfer of one page of the pool to its place in a buffer."""
    return pltpu.make_async_copy(refs.pages.at[source], refs.raw.at[slot, page], refs.page_sem.at[slot])


def wait_pages(refs: Refs, plan: Plan, tile, block, slot) -> None:
    """Wait for as many pages as were asked for: a semaphore counts bytes, so powers of two add up to any number."""
    first, end = _page_range(refs, plan, tile, block)
    for pages in _powers(plan.block_pages):

        @pl.when((end - first) & pages != 0)
        def _(pages=pages):
            part = refs.raw.at[slot, pl.ds(0, pages)]
            pltpu.make_async_copy(part, part, refs.page_sem.at[slot]).wait()


def _log2(power: int) -> int:
    return power.bit_length() - 1


def _powers(most: int) -> list[int]:
    """Powers of two whose sums reach `most`."""
    return [1 << bit for bit in range(most.bit_length())]


def _each_part(rows, most: int, do) -> None:
    """Call `do(first, size)` for parts of static sizes that together cover `rows` rows, at most `most`."""
    for size in _powers(most):

        @pl.when(rows & size != 0)
        def _(size=size):
            do(rows & -(2 * size), size)


def start(copy) -> None:
    copy.start()


def wait(copy) -> None:
    copy.wait()


def _each_copy(refs: Refs, plan: Plan, tile, slot, copy, act) -> None:
    """Call `act` on the transfers of a tile's live rows between HBM and a slot."""
    row = refs.tiles.row[tile]
    _each_part(refs.tiles.rows[tile], plan.block_q, lambda first, size: act(copy(refs, row, first, size, slot)))


def _q_copy(refs: Refs, row, first, size: int, slot):
    source, target = refs.queries.at[pl.ds(row + first, size)], refs.q_tile.at[slot, pl.ds(first, size)]
    return pltpu.make_async_copy(source, target, refs.q_sem.at[slot])


def _out_copy(refs: Refs, row, first, size: int, slot):
    source, target = refs.out_tile.at[slot, pl.ds(first, size)], refs.out.at[pl.ds(row + first, size)]
    return pltpu.make_async_copy(source, target, refs.out_sem.at[slot])


def fetch_queries(refs: Refs, plan: Plan, tile, slot) -> None:
    """Ask for a tile's query rows; past the last tile for none."""
    pl.when(tile < refs.tiles.count[0])(lambda: _each_copy(refs, plan, tile, slot, _q_copy, start))


def wait_queries(refs: Refs, plan: Plan, tile, slot) -> None:
    _each_copy(refs, plan, tile, slot, _q_copy, wait)


def send_out(refs: Refs, plan: Plan, tile, slot, act) -> None:
    """`start` or `wait` for the transfers of a tile's output rows and lse."""
    _each_copy(refs, plan, tile, slot, _out_copy, act)
    if plan.lse:
        act(pltpu.make_async_copy(refs.lse_tile.at[slot], refs.lse.at[tile], refs.lse_sem.at[slot]))
