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
    longest: jax.Array  # i32, no valid sequence has a longer context


class Tiles(NamedTuple):
    """The prefill list, in the order it is dealt in."""

    told: jax.Array  # i32, what `prefill_work.told` finds in it
    tiles: jax.Array  # i32 [6, tiles], see `prefill_work.item_of`


def owners(inputs: Inputs, shape: Shape) -> Owners:
    """Sequences with offsets that cannot collide, and whether each is one a kernel may run."""
    s, total = inputs.context_lens.shape[0], inputs.queries.shape[0]
    index = jnp.arange(s)
    live = index < inputs.num_seqs[0]
    begin = jnp.where(live, inputs.query_start_loc[:-1], 0)
    end = jnp.where(live, inputs.query_start_loc[1:], 0)
    context = jnp.where(live, inputs.context_lens, 0)
    earlier = index[None, :] <= index[:, None]
    tops = [jnp.max(jnp.where(earlier, x[None, :], 0), axis=1) for x in (begin, end, context)]
    start, after = jnp.clip(tops[0], 0, total), jnp.clip(jnp.maximum(tops[0][-1], tops[1][-1]), 0, total)
    stop = jnp.clip(end, start, total)
    valid = (begin == start) & (end >= begin) & (end <= total) & (context >= 0) & (context <= shape.capacity)
    valid &= ~astray(inputs.block_tables, begin, end, context, shape)
    longest = jnp.minimum(tops[2][-1], shape.capacity)
    return Owners(start, jnp.where(live, stop, start), context, valid, live, after, longest)


def astray(tables, begin, end, context, shape: Shape):
    """bool [S]: whether a live entry lies outside the pool."""
    column = jnp.arange(shape.table_width)[None, :] * shape.page
    wrong = (column < context[:, None]) & ((tables < 0) | (tables >= shape.pages))
    if shape.window is not None:
        low = jnp.maximum(context - (end - begin), 0) - shape.window + 1
        wrong &= column + shape.page > low[:, None]
    return (jnp.sum(wrong, axis=1, dtype=jnp.int32) > 0) & (end > begin)


def row_owners(own: Owners, rows: int):
    """i32 [T]: every query row's owner: 1 where it is a valid sequence, 2 an invalid one, 0 nobody."""
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    mine = (row >= own.start) & (row < own.stop) & own.live  # [T, S], at most one a row
    return jnp.max(jnp.where(mine, jnp.where(own.valid, 1, 2), 0), axis=1).astype(jnp.int32)


def tile_bound(shape: Shape, sequences: int, tokens: int, shortest: int) -> int:
    """Tiles that any layout can need, sequences of fewer than `shortest` tokens left out."""
    busy = min(sequences, max(shape.tokens // shortest, 1))
    return max(1, (shape.tokens + busy * (tokens + 6)) // tokens)


def prefill_tiles(own: Owners, shape: Shape, tiling: prefill_work.Tiling, shortest: int) -> Tiles:
    """The tiles of every sequence of at least `shortest` tokens, in an order for the cache and for balance.

    Tiles at work at one time should find their keys in the last-level cache: some heads of some sequences make a group
    of about `tiling.near` MiB. Within a group those with the most keys come first, in every other group last, so that
    the list dealt back and forth leaves every CTA about as much to do; the last group ends with the fewest.
    """
    tokens, s = tiling.tokens(shape), own.start.shape[0]
    serves, bad = own.live & own.valid & (own.stop - own.start >= shortest), own.live & ~own.valid
    first = own.start // 8 * 8
    needed = jnp.where(serves, (own.stop - first + tokens - 1) // tokens, 0)
    through, keys_through, bad_through = map(through_each, (needed, jnp.where(serves, own.context, 0), bad))
    tile = jnp.arange(tiling.tiles, dtype=jnp.int32)
    sequence = jnp.minimum(owner_of(tile, through), s - 1)
    first, last, start, stop, context = (x[sequence] for x in (first, through, own.start, own.stop, own.context))
    # The last tiles of a sequence come first: they see the most keys.
    token = first + (last - 1 - tile) * tokens
    begin, end = jnp.maximum(start - token, 0), jnp.minimum(stop - token, tokens)
    position = context - stop + token
    dirty = unclean(position, begin, end, context, context - stop + start, shape, tiling)
    fields = [token // 8, begin, end, position, sequence, dirty]
    heads, groups = jnp.int32(shape.kv_heads), jnp.int32(1)
    if prefill_work.grouped(shape, tiling):
        group = jnp.zeros_like(keys_through)
        room = (tiling.near << 20) // (2 * shape.head_dim * jnp.dtype(shape.pages_dtype).itemsize)  # keys of a head
        if shape.window is not None:
            # What tiles at work see of one head, about; all heads at once where few tiles would make uneven groups.
            heads = heads_at_once(room, jnp.minimum(own.longest, shape.window * 3 // 2), shape.kv_heads)
            several = through[-1] * heads * (shape.group // tiling.heads(shape)) >= 3 * tiling.ctas * tiling.teams
            heads = jnp.where(several, heads, shape.kv_heads)
        else:
            heads = heads_at_once(room, own.longest, shape.kv_heads)
            group = jnp.maximum(keys_through - 1, 0) // jnp.maximum(room // heads, 1)
        groups = group[-1] + 1
        if s > 1:
            keys, group = position + end, jnp.where(tile < through[-1], group[sequence], 2**30)
            keys = jnp.where((groups - 1 - group) & 1 == 0, -keys, keys)
            # One array, so that one kernel writes it.
            fields = sorted_by(*lax.optimization_barrier(jnp.stack([group, keys, *fields])))
    pairs = heads * (shape.group // tiling.heads(shape))
    fills = own.start, jnp.where(bad, own.stop, own.start), own.after[None], bad_through[-1:]
    told = jnp.concatenate([through, jnp.stack([pairs, groups & 1]), *fills])
    return Tiles(told.astype(jnp.int32), jnp.stack(fields) if isinstance(fields, list) else fields)


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


def through_each(counts):
    """Sums of counts [.., S] up to and including each."""
    index = jnp.arange(counts.shape[-1])
    earlier = index[None, :] <= index[:, None]
    return jnp.sum(jnp.where(earlier, counts[..., None, :], 0), axis=-1, dtype=jnp.int32)


def owner_of(nth, through):
    """Whose the `nth` of all is, where the first `through[i]` are those of 0..i; S past them all."""
    return jnp.sum(nth[:, None] >= through[None, :], axis=1, dtype=jnp.int32)


def sorted_by(first, second, *fields):
    """The columns of `fields` in ascending order of `first`, then of `second`, equal ones in place."""
    n, columns = first.shape[0], jnp.stack(fields)
    if n > 2048:
        return columns[:, jnp.lexsort((second, first))]
    # Counting is two small kernels; a sort is several.
    index = jnp.arange(n)
    tie = (second[None, :] == second[:, None]) & (index[None, :] < index[:, None])
    within = (first[None, :] == first[:, None]) & ((second[None, :] < second[:, None]) | tie)
    rank = jnp.sum((first[None, :] < first[:, None]) | within, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(rank[None, None, :] == index[None, :, None], columns[:, None, :], 0), axis=2)


class Units(NamedTuple):
    """The live splits of the one-token sequences, for the decode role of a mixed batch, row by row."""

    listed: jax.Array  # i32 [units], the sequence of each; past them all S
    through: jax.Array  # i32 [S], units of each sequence and those before it: the last is how many there are
    splits: jax.Array  # i32 [S], how many each sequence has; 0 where it is none of decode's


def live_units(own: Owners, shape: Shape, tiling: decode.Tiling) -> Units:
    """The live splits, row by row: in a mixed batch most rows are short, or not decode's at all."""
    single = own.live & own.valid & (own.stop - own.start == 1)
    position = jnp.where(single, own.context - 1, -1)
    base = 0
    if shape.window is not None:
        align = piece(shape.page, tiling.block)
        base = jnp.maximum(position - (shape.window - 1), 0) // align * align
    splits = jnp.where(single, jnp.maximum((position + 1 - base + tiling.chunk - 1) // tiling.chunk, 1), 0)
    through = through_each(splits)
    unit = jnp.arange(tiling.units, dtype=jnp.int32)
    return Units(owner_of(unit, through), through, splits.astype(jnp.int32))
