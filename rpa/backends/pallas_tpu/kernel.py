"""The TPU kernel: one loop over tiles of query rows, one inside it over blocks of KV pages.

Three cursors walk the same list of blocks (tile by tile, sequence by sequence): the first asks for the page ids of
a block, the second, once they are there, for its pages, the third computes. The first runs TABLE_LEAD blocks ahead
of the second and the second `buffers - 1` ahead of the third, across the borders of tiles and sequences. Slots are
rings; a slot's semaphore belongs to it alone.

A block's pages arrive as stored, [tokens, 2 * Hkv, D] with key and value of a head side by side. `unpack` rewrites
them as rows of 32-bit words, [tokens * pitch, 128], each word a bf16 key beside its value, so that one head is a
strided load and a shift away. A tile of one row (decode) scores [group, keys] for each head; larger tiles score
transposed, [keys, rows * group], so that running maxima and sums are single registers.

Reshapes and bitcasts are applied to loaded values, never to refs: the interpreter runs what the compiler compiles.
Past 400 lines because it is one kernel: cursors, staging, two score paths and their ends share the refs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa.backends.pallas_tpu.plan import (
    LANES,
    TABLE_ENTRIES,
    TABLE_LEAD,
    TABLE_SLOTS,
    Plan,
    power_of_two_below,
)
from rpa.backends.pallas_tpu.tiles import Tiles

LOG2E = float(np.log2(np.e))
LN2 = float(np.log(2.0))
# Where running maxima start: finite, so that -inf - m is -inf and never NaN; below every finite logit that matters.
FLOOR = -2.0e38
# A block of up to this many pages asks for them in straight-line code when all are visible.
UNROLLED_PAGES = 32
CLEARED_TOKENS = 16
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


def body(refs: Refs, plan: Plan) -> None:
    """Every tile of one core: tiles core, core + cores, ..."""
    core = pl.program_id(0)
    count = refs.tiles.count[0]
    _clear_padding(refs, plan)
    _start_cursors(refs, plan, core)

    def step(index, _):
        tile = core + index * plan.cores
        slot = lax.rem(index, 2)
        _wait_queries(refs, plan, tile, slot)
        _fetch_queries(refs, plan, tile + plan.cores, 1 - slot)

        @pl.when(index >= 2)
        def _():
            _wait_out(refs, plan, tile - 2 * plan.cores, slot)

        rows = refs.tiles.rows[tile]
        pl.when(rows == 1)(lambda: _decode_tile(refs, plan, tile, slot))
        pl.when(rows > 1)(lambda: _mixed_tile(refs, plan, tile, slot))
        _store_out(refs, plan, tile, slot)
        return 0

    mine = lax.div(count - core + plan.cores - 1, plan.cores)
    _fetch_queries(refs, plan, core, 0)
    lax.fori_loop(0, mine, step, 0)
    _drain_tables(refs, plan)
    for back in (2, 1):

        @pl.when(mine >= back)
        def _(back=back):
            last = mine - back
            _wait_out(refs, plan, core + last * plan.cores, lax.rem(last, 2))


def _clear_padding(refs: Refs, plan: Plan) -> None:
    """Zero the lanes past the head size and the rows past a block's tokens: read by every dot, never written."""
    if plan.head_dim != plan.dim:
        refs.stage[plan.lane_tiles - 1] = jnp.zeros(refs.stage.shape[1:], refs.stage.dtype)
    if plan.head_dim != plan.dim or plan.keys != plan.tokens:
        refs.words[...] = _full(refs.words, 0)


def _full(ref, value):
    return jnp.full(ref.shape, value, ref.dtype)


def _lane_tiles(plan: Plan) -> list[tuple[int, int, int]]:
    """(index, first column, columns) of each tile of lanes; columns past the head size stay zero."""
    starts = range(0, plan.head_dim, LANES)
    return [(lane, start, min(LANES, plan.head_dim - start)) for lane, start in enumerate(starts)]


# ------------------------------------------------ transfers


def _start_cursors(refs: Refs, plan: Plan, core) -> None:
    for tile, block in ((TABLE_TILE, TABLE_BLOCK), (PAGE_TILE, PAGE_BLOCK)):
        refs.cursor[tile] = core
        refs.cursor[block] = refs.tiles.block[core]
    for slot in (TABLE_SLOT, PAGE_TABLE_SLOT, PAGE_SLOT, SLOT):
        refs.cursor[slot] = 0

    def ask(_, carry):
        _fetch_table(refs, plan)
        return carry

    def fill(_, carry):
        _wait_table(refs, plan)
        _fetch_table(refs, plan)
        _fetch_pages(refs, plan)
        return carry

    lax.fori_loop(0, TABLE_LEAD, ask, 0)
    lax.fori_loop(0, plan.buffers - 1, fill, 0)


def _drain_tables(refs: Refs, plan: Plan) -> None:
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


def _next_slot(refs: Refs, field: int, slots: int) -> None:
    slot = refs.cursor[field] + 1
    refs.cursor[field] = jnp.where(slot == slots, 0, slot)


def _table_copy(refs: Refs, plan: Plan, source, slot):
    # The ring is one-dimensional because SMEM then indexes without arithmetic on tiles.
    place = pl.ds(pl.multiple_of(slot * plan.table_entries, TABLE_ENTRIES), plan.table_entries)
    return pltpu.make_async_copy(refs.tables.at[source, 0], refs.table.at[place], refs.table_sem.at[slot])


def _fetch_table(refs: Refs, plan: Plan) -> None:
    """Ask for the page ids of the first cursor's block; past the last tile it asks for ids that nobody uses."""
    tile, block = refs.cursor[TABLE_TILE], refs.cursor[TABLE_BLOCK]
    part = jnp.minimum(block >> _log2(plan.table_entries // plan.block_pages), plan.slices - 1)
    slot = refs.cursor[TABLE_SLOT]
    _table_copy(refs, plan, refs.tiles.seq[tile] * plan.slices + part, slot).start()
    _advance(refs, plan, TABLE_TILE, TABLE_BLOCK, tile, block)
    _next_slot(refs, TABLE_SLOT, TABLE_SLOTS)


def _wait_table(refs: Refs, plan: Plan) -> None:
    """Wait for the page ids of the second cursor's block."""
    _table_copy(refs, plan, 0, refs.cursor[PAGE_TABLE_SLOT]).wait()


def _page_range(refs: Refs, plan: Plan, tile, block):
    """Pages of a block that some row of the tile sees, half-open, counted from the block's first."""
    base = block * plan.block_pages
    first = jnp.maximum(refs.tiles.page[tile] - base, 0)
    end = jnp.minimum(refs.tiles.page_end[tile] - base, plan.block_pages)
    return first, end


def _fetch_pages(refs: Refs, plan: Plan) -> None:
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
    _next_slot(refs, PAGE_TABLE_SLOT, TABLE_SLOTS)
    _next_slot(refs, PAGE_SLOT, plan.buffers)


def page_copy(refs: Refs, source, slot, page):
    """The transfer of one page of the pool to its place in a buffer."""
    return pltpu.make_async_copy(refs.pages.at[source], refs.raw.at[slot, page], refs.page_sem.at[slot])


def _wait_pages(refs: Refs, plan: Plan, tile, block, slot) -> None:
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


def _q_copy(refs: Refs, row, first, size: int, slot):
    return pltpu.make_async_copy(
        refs.queries.at[pl.ds(row + first, size)],
        refs.q_tile.at[slot, pl.ds(first, size)],
        refs.q_sem.at[slot],
    )


def _out_copy(refs: Refs, row, first, size: int, slot):
    return pltpu.make_async_copy(
        refs.out_tile.at[slot, pl.ds(first, size)],
        refs.out.at[pl.ds(row + first, size)],
        refs.out_sem.at[slot],
    )


def _fetch_queries(refs: Refs, plan: Plan, tile, slot) -> None:
    @pl.when(tile < refs.tiles.count[0])
    def _():
        row = refs.tiles.row[tile]
        _each_part(
            refs.tiles.rows[tile],
            plan.block_q,
            lambda first, size: _q_copy(refs, row, first, size, slot).start(),
        )


def _wait_queries(refs: Refs, plan: Plan, tile, slot) -> None:
    row = refs.tiles.row[tile]
    _each_part(refs.tiles.rows[tile], plan.block_q, lambda first, size: _q_copy(refs, row, first, size, slot).wait())


def _store_out(refs: Refs, plan: Plan, tile, slot) -> None:
    row = refs.tiles.row[tile]
    _each_part(
        refs.tiles.rows[tile],
        plan.block_q,
        lambda first, size: _out_copy(refs, row, first, size, slot).start(),
    )
    if plan.lse:
        _lse_copy(refs, tile, slot).start()


def _wait_out(refs: Refs, plan: Plan, tile, slot) -> None:
    row = refs.tiles.row[tile]
    _each_part(
        refs.tiles.rows[tile],
        plan.block_q,
        lambda first, size: _out_copy(refs, row, first, size, slot).wait(),
    )
    if plan.lse:
        _lse_copy(refs, tile, slot).wait()


def _lse_copy(refs: Refs, tile, slot):
    return pltpu.make_async_copy(refs.lse_tile.at[slot], refs.lse.at[tile], refs.lse_sem.at[slot])


# ------------------------------------------------ blocks


def _each_block(refs: Refs, plan: Plan, tile, fold) -> None:
    """Keep the transfers going, wait for each block of a tile, unpack it and `fold(base)` it."""
    position = refs.tiles.position[tile]
    end = position + refs.tiles.rows[tile]  # one past the last key any row sees
    first = 0 if plan.window is None else jnp.maximum(position - plan.window + 1, 0)

    def step(block, carry):
        _wait_table(refs, plan)
        _fetch_table(refs, plan)
        slot = refs.cursor[SLOT]
        _wait_pages(refs, plan, tile, block, slot)
        _next_slot(refs, SLOT, plan.buffers)
        base = block * plan.tokens
        _clear_dead(refs, plan, slot, first - base, end - base)
        _unpack(refs, plan, slot)
        # Here, because nothing below touches `raw`: the compiler packs these instructions between those of the dots.
        _fetch_pages(refs, plan)
        fold(base)
        return carry

    lax.fori_loop(refs.tiles.block[tile], refs.tiles.block_end[tile], step, 0)


def _clear_dead(refs: Refs, plan: Plan, slot, first, end) -> None:
    """Zero the tokens of a block outside first..end-1, which may hold anything: 0 * NaN is NaN.

    Only a tile's first and last blocks have any. Works on pieces of some 16 tokens that are not wholly visible.
    """
    if plan.page > CLEARED_TOKENS:
        size = next(n for n in range(CLEARED_TOKENS, 0, -1) if plan.page % n == 0)
        pages, each = 1, plan.page // size
    else:
        pages = min(power_of_two_below(CLEARED_TOKENS // plan.page), plan.block_pages)
        size, each = plan.page, 1
    stride = pages * size  # tokens a piece

    def clear(index, carry):
        page, start = (index * pages, 0) if each == 1 else (lax.div(index, each), lax.rem(index, each) * size)
        at = (slot, pl.ds(page, pages), pl.ds(start, size))
        stored = refs.raw[at]
        token = index * stride + lax.broadcasted_iota(jnp.int32, stored.shape, 0) * size
        token += lax.broadcasted_iota(jnp.int32, stored.shape, 1)
        refs.raw[at] = jnp.where((token >= first) & (token < end), stored, jnp.zeros_like(stored))
        return carry

    pieces = plan.tokens // stride
    if plan.window is not None:
        # A range that starts past the block's end leaves nothing visible.
        lax.fori_loop(0, jnp.minimum(lax.div(jnp.maximum(first, 0) + stride - 1, stride), pieces), clear, 0)
    lax.fori_loop(lax.div(jnp.clip(end, 0, plan.tokens), stride), pieces, clear, 0)


def _unpack(refs: Refs, plan: Plan, slot) -> None:
    """Write a block's tokens as rows of words, [tokens * word_pitch, 128] for each tile of lanes."""
    pages = max(1, plan.unpack_tokens // plan.page)
    tokens, rows, pitch = pages * plan.page, plan.word_rows, plan.word_pitch

    def piece(index, carry):
        stored = refs.raw[slot, pl.ds(index * pages, pages)]
        value = _as_words(stored.reshape(tokens, 2 * plan.heads, plan.head_dim), plan)
        base = index * (tokens * pitch)
        for lane, start, width in _lane_tiles(plan):
            for token in range(tokens):
                refs.words[lane, pl.ds(base + token * pitch, rows), :width] = value[token, :, start : start + width]
        return carry

    if pages >= plan.block_pages:
        piece(0, 0)
    else:
        lax.fori_loop(0, plan.block_pages // pages, piece, 0)


def _as_words(stored, plan: Plan):
    """[tokens, word_rows, head_dim] of words from [tokens, 2 * heads, head_dim] as stored."""
    if not plan.paired:
        return stored
    if plan.kv_dtype != "float16":  # float16 comes as int16: its bits travel, `half` widens them
        stored = stored.astype(jnp.bfloat16)  # fp8 and int8 values are all bf16 values
    return pltpu.bitcast(stored, jnp.uint32)


def _load_kv(refs: Refs, plan: Plan, head: int):
    """Keys and values of one head, [keys, dim] dot operands."""
    if not plan.paired:
        return _load_rows(refs, plan, 2 * head), _load_rows(refs, plan, 2 * head + 1)
    words = _load_rows(refs, plan, head)
    if plan.kv_dtype == "float16":
        kind = jnp.float32 if plan.f32_dots else jnp.bfloat16
        return half(words & 0xFFFF).astype(kind), half(words >> 16).astype(kind)
    if plan.f32_dots:
        return (
            lax.bitcast_convert_type(words << 16, jnp.float32),
            lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32),
        )
    return (
        lax.bitcast_convert_type(words.astype(jnp.uint16), jnp.bfloat16),
        lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), jnp.bfloat16),
    )


def _load_rows(refs: Refs, plan: Plan, row: int):
    """Row `row` of every token, [keys, dim]."""
    parts = [refs.words[lane, pl.ds(row, plan.keys, stride=plan.word_pitch)] for lane in range(plan.lane_tiles)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def half(bits):
    """f32 of IEEE half bits, subnormals, inf and NaN included: a TPU has no f16 arithmetic."""
    bits = bits.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    # The exponent moves by 112 places; done in floating point it must not meet an f32 subnormal.
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    tiny = magnitude.astype(jnp.float32) * 2.0**-24
    wide = lax.bitcast_convert_type((magnitude << 13) | 0x7F800000, jnp.float32)
    value = jnp.where(magnitude < 0x400, tiny, jnp.where(magnitude >= 0x7C00, wide, normal))
    return jnp.where(bits >= 0x8000, -value, value)


def _dot(a, b, contract: tuple[int, int], plan: Plan):
    """a . b over the named axes, accumulated in f32; f32 operands are not cut to bf16 passes."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if plan.f32_dots else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _logits(refs: Refs, plan: Plan, scores, head: int):
    """Scaled and capped logits in units of log2."""
    scale = refs.scales[0, head] if plan.k_scaled else None
    if plan.cap is None:
        factor = plan.scale * LOG2E
        return scores * (factor if scale is None else scale * factor)
    factor = plan.scale / plan.cap
    return jnp.tanh(scores * (factor if scale is None else scale * factor)) * (plan.cap * LOG2E)


def _visible(plan: Plan, token, base, position):
    """Whether the row at `position` sees each `token` of the block that starts at key `base`."""
    limit = position + 1 - base
    if plan.keys != plan.tokens:
        limit = jnp.minimum(limit, plan.tokens)
    seen = token < limit
    return seen if plan.window is None else seen & (token >= position + 1 - plan.window - base)


def _weights(p, plan: Plan):
    return p if plan.f32_dots else p.astype(jnp.bfloat16)


def _close(m, l, sink, plan: Plan):
    """Fold the sink in: what the accumulator is multiplied with, and the lse. A row that saw nothing gets 0.

    Args:
        m, l, sink: f32 of one shape; m in units of log2, sink as given.
    """
    keep, sums, blind = jnp.ones_like(m), l, -jnp.inf
    if plan.sinks:
        top = jnp.maximum(m, sink * LOG2E)
        keep = jnp.exp2(m - top)
        sums = l * keep + jnp.exp2(sink * LOG2E - top)
        m, blind = top, sink
    seen = l > 0.0
    sums = jnp.where(seen, sums, 1.0)
    return jnp.where(seen, keep / sums, 0.0), jnp.where(seen, m * LN2 + jnp.log(sums), blind)


# ------------------------------------------------ one row: decode


def _decode_tile(refs: Refs, plan: Plan, tile, slot) -> None:
    refs.decode_m[...] = _full(refs.decode_m, FLOOR)
    refs.decode_l[...] = _full(refs.decode_l, 0)
    refs.decode_acc[...] = _full(refs.decode_acc, 0)
    _stage_row(refs, plan, slot, 0)
    position = refs.tiles.position[tile]
    _each_block(refs, plan, tile, lambda base: _decode_block(refs, plan, base, position))
    _decode_end(refs, plan, slot)


def _decode_block(refs: Refs, plan: Plan, base, position) -> None:
    """Fold one block: heads in chunks of four, whose scores are one array and whose dots overlap."""
    token = lax.broadcasted_iota(jnp.int32, (1, plan.keys), 1)
    seen = _visible(plan, token, base, position)
    chunk, rows = 4, plan.decode_rows
    for first in range(0, plan.heads, chunk):
        heads = range(first, min(first + chunk, plan.heads))
        scores, values = [], []
        for head in heads:
            keys, value = _load_kv(refs, plan, head)
            logits = _logits(refs, plan, _dot(_decode_queries(refs, plan, head), keys, (1, 1), plan), head)
            scores.append(jnp.where(seen, logits, -jnp.inf))
            values.append(value)
        part = slice(first * rows, (heads[-1] + 1) * rows)
        s = jnp.concatenate(scores, axis=0)  # [chunk * rows, keys]
        old = refs.decode_m[part]
        m = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
        p = jnp.exp2(s - m)
        keep = jnp.exp2(old - m)
        refs.decode_m[part] = m
        refs.decode_l[part] = refs.decode_l[part] * keep + jnp.sum(p, axis=1, keepdims=True)
        parts = [
            _dot(_weights(p[i * rows : (i + 1) * rows], plan), value, (1, 0), plan) for i, value in enumerate(values)
        ]
        refs.decode_acc[part] = refs.decode_acc[part] * keep + jnp.concatenate(parts, axis=0)


def _decode_queries(refs: Refs, plan: Plan, head: int):
    """[decode_rows, dim] operand; rows past the group are other heads' and are never stored."""
    parts = [refs.stage[lane, pl.ds(head * plan.group, plan.decode_rows)] for lane in range(plan.lane_tiles)]
    q = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return q if plan.f32_dots else q.astype(jnp.bfloat16)


def _decode_end(refs: Refs, plan: Plan, slot) -> None:
    """Divide and put the heads beside each other; a head's surplus rows are overwritten by the next head."""
    factor, lse = _close(refs.decode_m[...], refs.decode_l[...], refs.decode_sinks[...] if plan.sinks else None, plan)
    out = refs.decode_acc[...] * factor
    for head in range(plan.heads):
        rows = out[head * plan.decode_rows : (head + 1) * plan.decode_rows]
        if plan.v_scaled:
            rows = rows * refs.scales[1, head]
        for lane, start, width in _lane_tiles(plan):
            refs.stage[lane, pl.ds(head * plan.group, plan.decode_rows), :width] = rows[:, start : start + width]
    _unstage_row(refs, plan, slot, 0)
    if plan.lse:
        row = lax.broadcasted_iota(jnp.int32, (plan.decode_rows, plan.packed_rows), 0)
        lane = lax.broadcasted_iota(jnp.int32, (plan.decode_rows, plan.packed_rows), 1)
        for head in range(plan.heads):
            column = lse[head * plan.decode_rows : (head + 1) * plan.decode_rows]
            # Rows to lanes: -inf survives a maximum, where a sum of selected values would meet inf * 0.
            refs.lse_tile[slot, head] = jnp.max(jnp.where(row == lane, column, -jnp.inf), axis=0, keepdims=True)


# ------------------------------------------------ many rows: prefill and mixed


def _mixed_tile(refs: Refs, plan: Plan, tile, slot) -> None:
    refs.m[...] = _full(refs.m, FLOOR)
    refs.l[...] = _full(refs.l, 0)
    refs.acc[...] = _full(refs.acc, 0)
    _pack_queries(refs, plan, slot)
    position = refs.tiles.position[tile]
    _each_block(refs, plan, tile, lambda base: _mixed_block(refs, plan, base, position))
    _mixed_end(refs, plan, slot)


def _pack_queries(refs: Refs, plan: Plan, slot) -> None:
    """Gather the tile's rows by kv head: a strided load takes one query head of every row."""

    def row(index, carry):
        _stage_row(refs, plan, slot, index)
        return carry

    lax.fori_loop(0, plan.block_q, row, 0)
    kind = refs.operand.dtype
    for head in range(plan.heads):
        for member in range(plan.group):
            for lane in range(plan.lane_tiles):
                q = refs.stage[lane, pl.ds(head * plan.group + member, plan.block_q, stride=plan.head_pitch)]
                refs.operand[head, pl.ds(member * plan.block_q, plan.block_q), pl.ds(lane * LANES, LANES)] = q.astype(
                    kind
                )


def _mixed_block(refs: Refs, plan: Plan, base, position) -> None:
    """Fold one block; the scores of the next two heads are on their way while a head's weights are made."""
    lane = lax.broadcasted_iota(jnp.int32, (1, plan.packed_rows), 1)
    at = position + lax.rem(lane, plan.block_q)
    token = lax.broadcasted_iota(jnp.int32, (plan.keys, plan.packed_rows), 0)
    seen = _visible(plan, token, base, at)
    ahead = []
    for head in range(plan.heads + 2):
        if head < plan.heads:
            keys, values = _load_kv(refs, plan, head)
            ahead.append((_dot(keys, refs.operand[head], (1, 1), plan), values))
        if head >= 2:
            _mixed_fold(refs, plan, head - 2, seen, *ahead[head - 2])


def _mixed_fold(refs: Refs, plan: Plan, head: int, seen, scores, values) -> None:
    """One step of the online softmax for one kv head; scores [keys, packed_rows]."""
    s = jnp.where(seen, _logits(refs, plan, scores, head), -jnp.inf)
    old = refs.m[head]
    m = jnp.maximum(old, jnp.max(s, axis=0, keepdims=True))
    p = jnp.exp2(s - m)
    keep = jnp.exp2(old - m)
    refs.m[head] = m
    refs.l[head] = refs.l[head] * keep + jnp.sum(p, axis=0, keepdims=True)
    refs.acc[head] = refs.acc[head] * keep + _dot(values, _weights(p, plan), (0, 0), plan)


def _mixed_end(refs: Refs, plan: Plan, slot) -> None:
    """Divide, transpose back and spread each head's rows to where the output wants them."""
    for head in range(plan.heads):
        factor, lse = _close(refs.m[head], refs.l[head], refs.sinks[head] if plan.sinks else None, plan)
        if plan.v_scaled:
            factor = factor * refs.scales[1, head]
        out = jnp.transpose(refs.acc[head] * factor)  # [packed_rows, dim]
        for member in range(plan.group):
            rows = out[member * plan.block_q : (member + 1) * plan.block_q]
            at = pl.ds(head * plan.group + member, plan.block_q, stride=plan.head_pitch)
            for lane, start, width in _lane_tiles(plan):
                refs.stage[lane, at, :width] = rows[:, start : start + width]
        if plan.lse:
            refs.lse_tile[slot, head] = lse

    def row(index, carry):
        _unstage_row(refs, plan, slot, index)
        return carry

    lax.fori_loop(0, plan.block_q, row, 0)


# ------------------------------------------------ between tiles as stored and the staging buffer


def _stage_row(refs: Refs, plan: Plan, slot, row) -> None:
    """Copy one query row's heads to the staging buffer, in f32."""
    q = refs.q_tile[slot, row].astype(jnp.float32)
    for lane, start, width in _lane_tiles(plan):
        refs.stage[lane, pl.ds(row * plan.head_pitch, plan.q_heads), :width] = q[:, start : start + width]


def _unstage_row(refs: Refs, plan: Plan, slot, row) -> None:
    """Copy one output row's heads from the staging buffer, rounding once."""
    for lane, start, width in _lane_tiles(plan):
        rows = refs.stage[lane, pl.ds(row * plan.head_pitch, plan.q_heads)]
        refs.out_tile[slot, row, :, pl.ds(start, width)] = rows[:, :width].astype(refs.out_tile.dtype)
