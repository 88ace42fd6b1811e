"""The TPU kernel: one loop over tiles of query rows, one inside it over blocks of KV pages.

A block's pages arrive (`transfers`) as stored, [tokens, 2 * Hkv, D] with key and value of a head side by side.
`_unpack` rewrites them as rows of 32-bit words, [tokens * pitch, 128], each word a bf16 key beside its value, so that
one head is a strided load and a shift away (`operands`). A tile of one row (decode) scores [group, keys] for each head;
larger tiles score transposed, [keys, rows * group], so that running maxima and sums are single registers.

Reshapes and bitcasts are applied to loaded values, never to refs: the interpreter runs what the compiler compiles.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa.backends.pallas_tpu import operands
from rpa.backends.pallas_tpu import transfers as move
from rpa.backends.pallas_tpu.plan import LANES, Plan, power_of_two_below
from rpa.backends.pallas_tpu.transfers import Refs

LOG2E = float(np.log2(np.e))
LN2 = float(np.log(2.0))
# Where running maxima start: finite, so that -inf - m is -inf and never NaN; below every finite logit that matters.
FLOOR = -2.0e38
CLEARED_TOKENS = 16
# Heads that decode scores together: their rows fill registers, their dots overlap.
DECODE_HEADS = 4
# Pieces of the mixed path scored before one is folded: on v6e 1220 bundles a block at 8, 1289 at 6, 1199 at 10.
PIECES_AHEAD = 8


def body(refs: Refs, plan: Plan) -> None:
    """Every tile of one core: tiles core, core + cores, ..."""
    core = pl.program_id(0)
    count = refs.tiles.count[0]
    _clear_padding(refs, plan)
    move.start_cursors(refs, plan, core)

    def step(index, _):
        tile = core + index * plan.cores
        slot = lax.rem(index, 2)
        move.wait_queries(refs, plan, tile, slot)
        move.fetch_queries(refs, plan, tile + plan.cores, 1 - slot)

        @pl.when(index >= 2)
        def _():
            move.send_out(refs, plan, tile - 2 * plan.cores, slot, move.wait)

        rows = refs.tiles.rows[tile]
        pl.when(rows == 1)(lambda: _decode_tile(refs, plan, tile, slot))
        pl.when(rows > 1)(lambda: _mixed_tile(refs, plan, tile, slot))
        move.send_out(refs, plan, tile, slot, move.start)
        return 0

    mine = lax.div(count - core + plan.cores - 1, plan.cores)
    move.fetch_queries(refs, plan, core, 0)
    lax.fori_loop(0, mine, step, 0)
    move.drain_tables(refs, plan)
    for back in (2, 1):

        @pl.when(mine >= back)
        def _(back=back):
            last = mine - back
            move.send_out(refs, plan, core + last * plan.cores, lax.rem(last, 2), move.wait)


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


# ------------------------------------------------ blocks


def _each_block(refs: Refs, plan: Plan, tile, fold) -> None:
    """Keep the transfers going, wait for each block of a tile, unpack it and `fold(base)` it."""
    position = refs.tiles.position[tile]
    end = position + refs.tiles.rows[tile]  # one past the last key any row sees
    first = 0 if plan.window is None else jnp.maximum(position - plan.window + 1, 0)

    def step(block, carry):
        move.wait_table(refs, plan)
        move.fetch_table(refs, plan)
        slot = refs.cursor[move.SLOT]
        move.wait_pages(refs, plan, tile, block, slot)
        move.next_slot(refs, move.SLOT, plan.buffers)
        base = block * plan.tokens
        _clear_dead(refs, plan, slot, first - base, end - base)
        _unpack(refs, plan, slot)
        # Here, because nothing below touches `raw`: the compiler packs these instructions between those of the dots.
        move.fetch_pages(refs, plan)
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
    if plan.unit != 1.0:
        stored = operands.from_e4m3(stored.reshape(-1, plan.head_dim)).reshape(stored.shape)
    elif plan.kv_dtype != "float16":  # float16 comes as int16: its bits travel, `half` widens them
        stored = stored.astype(jnp.bfloat16)  # fp8 and int8 values are all bf16 values
    return pltpu.bitcast(stored, jnp.uint32)


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
    return jnp.where(seen, keep / sums * plan.unit, 0.0), jnp.where(seen, m * LN2 + jnp.log(sums), blind)


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
    """Fold one block: heads in chunks, whose scores are one array and whose dots overlap."""
    token = lax.broadcasted_iota(jnp.int32, (1, plan.keys), 1)
    seen = _visible(plan, token, base, position)
    rows = plan.decode_rows
    for first in range(0, plan.heads, DECODE_HEADS):
        heads = range(first, min(first + DECODE_HEADS, plan.heads))
        scores = []
        for head in heads:
            keys = operands.load(refs, plan, head, operands.KEYS)
            logits = _logits(refs, plan, operands.dot(_decode_queries(refs, plan, head), keys, (1, 1), plan), head)
            scores.append(jnp.where(seen, logits, -jnp.inf))
        part = slice(first * rows, (heads[-1] + 1) * rows)
        s = jnp.concatenate(scores, axis=0)  # [chunk * rows, keys]
        old = refs.decode_m[part]
        m = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
        p = jnp.exp2(s - m)
        keep = jnp.exp2(old - m)
        refs.decode_m[part] = m
        refs.decode_l[part] = refs.decode_l[part] * keep + jnp.sum(p, axis=1, keepdims=True)
        parts = []
        for i, head in enumerate(heads):
            weights = operands.rounded(p[i * rows : (i + 1) * rows], plan)
            # Loaded a second time, here: kept from above they would spill.
            values = operands.load(refs, plan, head, operands.VALUES)
            parts.append(operands.dot(weights, values, (1, 0), plan))
        refs.decode_acc[part] = refs.decode_acc[part] * keep + jnp.concatenate(parts, axis=0)


def _decode_queries(refs: Refs, plan: Plan, head: int):
    """[decode_rows, dim] operand; rows past the group are other heads' and are never stored."""
    parts = [refs.stage[lane, pl.ds(head * plan.group, plan.decode_rows)] for lane in range(plan.lane_tiles)]
    q = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return operands.rounded(q, plan)


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
    for head in range(plan.heads):
        for member in range(plan.group):
            rows = pl.ds(member * plan.block_q, plan.block_q)
            for lane in range(plan.lane_tiles):
                q = refs.stage[lane, pl.ds(head * plan.group + member, plan.block_q, stride=plan.head_pitch)]
                refs.operand[head, rows, pl.ds(lane * LANES, LANES)] = operands.rounded(q, plan)


def _mixed_block(refs: Refs, plan: Plan, base, position) -> None:
    """Fold one block in pieces of 128 keys, all heads of a piece before the next.

    The scores of the next PIECES_AHEAD are on their way while a piece's weights are made: a piece is a long chain
    (dot, maximum, exponential, dot) whose steps wait for each other, and a short one fits the registers.
    """
    lane = lax.broadcasted_iota(jnp.int32, (1, plan.packed_rows), 1)
    at = position + lax.rem(lane, plan.block_q)
    token = lax.broadcasted_iota(jnp.int32, (LANES, plan.packed_rows), 0)
    pieces = [(first, head) for first in range(0, plan.keys, LANES) for head in range(plan.heads)]
    ahead = []
    for index in range(len(pieces) + PIECES_AHEAD):
        if index < len(pieces):
            first, head = pieces[index]
            keys = operands.load(refs, plan, head, operands.KEYS, first, LANES)
            ahead.append(operands.dot(keys, refs.operand[head], (1, 1), plan))
        if 0 <= index - PIECES_AHEAD < len(pieces):
            first, head = pieces[index - PIECES_AHEAD]
            values = operands.load(refs, plan, head, operands.VALUES, first, LANES)
            _mixed_fold(refs, plan, head, _visible(plan, first + token, base, at), ahead.pop(0), values)


def _mixed_fold(refs: Refs, plan: Plan, head: int, seen, scores, values) -> None:
    """One step of the online softmax for one kv head; scores [128, packed_rows]."""
    s = jnp.where(seen, _logits(refs, plan, scores, head), -jnp.inf)
    old = refs.m[head]
    m = jnp.maximum(old, jnp.max(s, axis=0, keepdims=True))
    p = jnp.exp2(s - m)
    keep = jnp.exp2(old - m)
    refs.m[head] = m
    refs.l[head] = refs.l[head] * keep + jnp.sum(p, axis=0, keepdims=True)
    refs.acc[head] = refs.acc[head] * keep + operands.dot(values, operands.rounded(p, plan), (0, 0), plan)


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
