"""Which work there is, found on the device from the metadata: decode rows, prefill tiles, rows to fill.

A handful of small arrays computed by XLA before the kernels run; nothing here waits for the host or depends on values.
Prefix sums and maxima are masked reductions: for the sizes of a batch they are one small kernel where a scan is many.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rpa.backends.pallas_gpu import decode, prefill_work
from rpa.backends.pallas_gpu.tiles import Shape, ceil_div, first_key, piece
from rpa.signature import Inputs


class Owners(NamedTuple):
    """Rows of each sequence, in order and without holes; the meaning of `rpa.layout.sanitize`, in fewer kernels."""

    start: jax.Array  # i32 [S], first query row
    stop: jax.Array  # i32 [S], one past the last; == start where dead
    context: jax.Array  # i32 [S]
    valid: jax.Array  # bool [S]; an invalid sequence's rows are NaN
    live: jax.Array  # bool [S]
    after: jax.Array  # i32, query rows from here on belong to nobody


class Tiles(NamedTuple):
    """The prefill list, in the order it is dealt in."""

    told: jax.Array  # i32, what `prefill_work.told` finds in it
    tiles: jax.Array  # i32 [.. + 6 * tiles], at its end what `prefill_work.item_of` takes, field by field


def owners(inputs: Inputs, shape: Shape) -> Owners:
    """Sequences with offsets that cannot collide, and whether each is one a kernel may run."""
    sequences, total = inputs.context_lens.shape[0], inputs.queries.shape[0]
    begin, end, context = inputs.query_start_loc[:-1], inputs.query_start_loc[1:], inputs.context_lens
    # The maxima of those before and what pages are astray have one width, so that one kernel finds all; of a power of
    # two columns XLA writes the latter to memory first.
    index, width = jnp.arange(sequences, dtype=jnp.int32), max(sequences, shape.table_width) + 1
    column = jnp.arange(width, dtype=jnp.int32)[None, :]
    earlier = (column <= index[:, None]) & (column < inputs.num_seqs[0])
    tops = [jnp.where(earlier, jnp.pad(x, (0, width - sequences))[None, :], 0) for x in (begin, end)]
    tables = jnp.pad(inputs.block_tables, ((0, 0), (0, width - shape.table_width)))
    *tops, stray = reduced(jnp.maximum, [*tops, astray(tables, column * shape.page, context, shape)])
    live = index < inputs.num_seqs[0]
    begin, end, context = (jnp.where(live, x, 0) for x in (begin, end, context))
    start, after = jnp.clip(tops[0], 0, total), jnp.clip(jnp.maximum(tops[0][-1], tops[1][-1]), 0, total)
    stop = jnp.clip(end, start, total)
    valid = (begin == start) & (end >= begin) & (end <= total) & (context >= 0) & (context <= shape.capacity)
    low = 0 if shape.window is None else jnp.maximum(context - (end - begin), 0) - shape.window + 1
    valid &= (stray <= jnp.maximum(low, 0)) | (end <= begin)
    return Owners(start, jnp.where(live, stop, start), context, valid, live, after)


def astray(tables, key, context, shape: Shape):
    """i32 [S, columns]: where a page inside the context lies outside the pool, one past its last key; else 0."""
    outside = tables.astype(jnp.uint32) >= shape.pages  # negative ones are large
    return jnp.where(outside & (key < context[:, None]), key + shape.page, 0)


def reduced(op, arrays):
    """Each of `arrays`, i32 [n, m], reduced along its rows by an operation whose unit is 0 (or by one of `op` each).

    One kernel does it, in 2.7 us for three arrays of 130 x 1000 on an H200; a fourth made that 5.1.
    """
    ops = op if isinstance(op, list) else [op] * len(arrays)
    units = (jnp.int32(0),) * len(arrays)

    def step(a, b):
        return tuple(o(x, y) for o, x, y in zip(ops, a, b, strict=True))

    return lax.reduce(tuple(arrays), units, step, (1,))


def row_owners(own: Owners, rows: int):
    """i32 [T]: every query row's owner: 1 where it is a valid sequence, 2 an invalid one, 0 nobody."""
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    mine = (row >= own.start) & (row < own.stop) & own.live  # [T, S], at most one a row
    return jnp.max(jnp.where(mine, jnp.where(own.valid, 1, 2), 0), axis=1).astype(jnp.int32)


def tile_bound(shape: Shape, sequences: int, tokens: int, shortest: int) -> int:
    """Tiles that any layout can need, sequences of fewer than `shortest` tokens left out."""
    busy = min(sequences, max(shape.tokens // shortest, 1))
    return max(1, (shape.tokens + busy * (tokens + 6)) // tokens)


def listed(own: Owners, shape: Shape, tiling: prefill_work.Tiling, decoding: decode.Tiling | None = None):
    """(`Tiles` of every sequence, `Units`); with `decoding` those of one token are units instead.

    Tiles are in an order for the cache and for balance. Those at work at one time should find their keys in the
    last-level cache: some heads of some sequences make a group of about `tiling.near` MiB. Within a group those with
    the most keys come first, in every other group last, so that the list dealt back and forth leaves every CTA about as
    much to do; the last group ends with the fewest.
    """
    tokens, s = tiling.tokens(shape), own.start.shape[0]
    rows, bad = own.stop - own.start, own.live & ~own.valid
    serves = own.live & own.valid & (rows >= (1 if decoding is None else 2))
    splits = jnp.zeros(s, jnp.int32) if decoding is None else live_splits(own, shape, decoding)
    needed = jnp.where(serves, ceil_div(own.stop - (own.start & ~7), tokens), 0)
    each = [needed, jnp.where(serves, own.context, 0), bad, splits, own.start, own.stop]
    each = [x.astype(jnp.int32) for x in each]
    if decoding is not None:  # too much work to be done once in every kernel that needs it
        each = lax.optimization_barrier(each)
    through, keys_through, bad_through, units_through, longest = summed(each[:4], each[1])
    bad, splits, starts, stops = each[2:]
    tile = jnp.arange(tiling.tiles, dtype=jnp.int32)
    if decoding is None and s <= 8:  # so few that no kernel of its own counts them
        before = ((tile >= through[sequence]).astype(jnp.int32) for sequence in range(s))
        owner = sum(before, jnp.zeros_like(tile))
    else:  # of tiles and of units, by one kernel
        unit = jnp.arange(0 if decoding is None else decoding.units, dtype=jnp.int32)
        of_tiles = jnp.arange(len(tile) + len(unit))[:, None] < len(tile)
        before = jnp.where(of_tiles, through, units_through) <= jnp.concatenate([tile, unit])[:, None]
        owner = jnp.sum(before, axis=1, dtype=jnp.int32)
    sequence = jnp.minimum(owner[: len(tile)], s - 1)
    last, start, stop, context = (x[sequence] for x in (through, starts, stops, own.context))
    # The last tiles of a sequence come first: they see the most keys.
    token = (start & ~7) + (last - 1 - tile) * tokens
    begin, end = jnp.maximum(start - token, 0), jnp.minimum(stop - token, tokens)
    position = context - stop + token
    dirty = unclean(position, begin, end, context, context - stop + start, shape, tiling)
    fields = [token // 8, begin, end, position, sequence, dirty]
    heads, groups, order = jnp.int32(1) * shape.kv_heads, jnp.int32(1), []
    if prefill_work.grouped(shape, tiling):
        group = jnp.zeros_like(keys_through)
        room = (tiling.near << 20) // (2 * shape.head_dim * jnp.dtype(shape.pages_dtype).itemsize)  # keys of a head
        if shape.window is not None:
            # What tiles at work see of one head, about; all heads at once where few tiles would make uneven groups.
            heads = heads_at_once(room, jnp.minimum(longest[-1], shape.window * 3 // 2), shape.kv_heads)
            several = through[-1] * heads * (shape.group // tiling.heads(shape)) >= 3 * tiling.ctas * tiling.teams
            heads = jnp.where(several, heads, shape.kv_heads)
        else:
            heads = heads_at_once(room, longest[-1], shape.kv_heads)
            group = lax.div(jnp.maximum(keys_through - 1, 0), jnp.maximum(lax.div(jnp.int32(room), heads), 1))
        groups = group[-1] + 1
        if s > 1:
            keys, group = position + end, jnp.where(tile < through[-1], group[sequence], 2**30)
            order = [group, jnp.where((groups - 1 - group) & 1 == 0, -keys, keys)]
    pairs = heads * (shape.group // tiling.heads(shape))
    fills = starts, jnp.where(bad > 0, stops, starts), own.after[None], bad_through[-1:]
    # One array, so that one kernel writes it.
    told = [through, jnp.stack([pairs, groups & 1]), *fills, *order, *fields]
    told = lax.optimization_barrier(jnp.concatenate([x.astype(jnp.int32) for x in told]))
    tiles = told if not order else sorted_by(told[-8 * len(tile) :].reshape(8, -1)).reshape(-1)
    return Tiles(told, tiles), Units(owner, units_through, splits, starts)


def heads_at_once(room: int, context, kv_heads: int):
    """How many kv heads' keys of one sequence have room, a divisor of all of them; one at least."""
    heads = jnp.int32(1)
    for several in (n for n in range(2, kv_heads + 1) if kv_heads % n == 0):
        heads = jnp.where(context <= room // several, several, heads)
    return heads


def unclean(position, begin, end, context, first, shape: Shape, tiling: prefill_work.Tiling):
    """Whether blocks of a tile hold slots that no row of its sequence sees: 1 past the context, 2 before the window."""
    run = tiling.piece(shape)
    past = (ceil_div(position + end, run) * run > context).astype(jnp.int32)
    if shape.window is None:
        return past
    _, base = first_key(position + begin, shape.window, tiling.align)
    return past + 2 * (base < first - (shape.window - 1))


def summed(counts, most):
    """Sums of each of `counts` [S] up to and including each, and the greatest of `most` [S], by one kernel."""
    index = jnp.arange(most.shape[0])
    earlier = index[None, :] <= index[:, None]
    ops = [jnp.add] * len(counts) + [jnp.maximum]
    return reduced(ops, [jnp.where(earlier, x[None, :], 0) for x in (*counts, most)])


def sorted_by(columns):
    """All but the first two rows of `columns`, their columns in ascending order of those two, equal ones in place."""
    (first, second), n = columns[:2], columns.shape[1]
    if n > 2048:
        return columns[2:, jnp.lexsort((second, first))]
    # Counting is two small kernels; a sort is several.
    index = jnp.arange(n)
    tie = (second[None, :] == second[:, None]) & (index[None, :] < index[:, None])
    within = (first[None, :] == first[:, None]) & ((second[None, :] < second[:, None]) | tie)
    rank = jnp.sum((first[None, :] < first[:, None]) | within, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(rank[None, None, :] == index[None, :, None], columns[2:, None, :], 0), axis=2)


class Units(NamedTuple):
    """The live splits of the one-token sequences, for the decode role of a mixed batch, row by row."""

    listed: jax.Array  # i32 [.. + units], at its end the sequence of each; past them all S
    through: jax.Array  # i32 [S], units of each sequence and those before it: the last is how many there are
    splits: jax.Array  # i32 [S], how many each sequence has; 0 where it is none of decode's
    start: jax.Array  # i32 [S], first query row of each


def live_splits(own: Owners, shape: Shape, tiling: decode.Tiling):
    """i32 [S]: in a mixed batch most rows are short, or not decode's at all."""
    single = own.live & own.valid & (own.stop - own.start == 1)
    position = jnp.where(single, own.context - 1, -1)
    base = 0
    if shape.window is not None:
        align = piece(shape.page, tiling.block)
        base = lax.div(jnp.maximum(position - (shape.window - 1), 0), jnp.int32(align)) * align
    splits = jnp.maximum(ceil_div(position + 1 - base, tiling.chunk), 1)
    return jnp.where(single, splits, 0).astype(jnp.int32)
