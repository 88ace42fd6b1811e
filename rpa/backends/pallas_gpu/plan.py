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
from rpa.backends.pallas_gpu.tiles import Shape, piece
from rpa.signature import Inputs


class Owners(NamedTuple):
    """Rows of each sequence, in order and without holes; the meaning of `rpa.layout.sanitize`, in fewer kernels."""

    start: jax.Array  # i32 [S], first query row
    stop: jax.Array  # i32 [S], one past the last; == start where dead
    context: jax.Array  # i32 [S]
    valid: jax.Array  # bool [S]; an invalid sequence's rows are NaN
    live: jax.Array  # bool [S]


class Tiles(NamedTuple):
    """The prefill list, longest first."""

    through: jax.Array  # i32 [S], tiles of each sequence and those before it: the last is how many there are
    tiles: jax.Array  # i32 [5 or more, tiles], see `prefill_work.item_at`


def owners(inputs: Inputs, shape: Shape) -> Owners:
    """Sequences with offsets that cannot collide, and whether each is one a kernel may run."""
    s, total = inputs.context_lens.shape[0], inputs.queries.shape[0]
    index = jnp.arange(s)
    live = index < inputs.num_seqs[0]
    begin = jnp.where(live, inputs.query_start_loc[:-1], 0)
    end = jnp.where(live, inputs.query_start_loc[1:], 0)
    context = jnp.where(live, inputs.context_lens, 0)
    earlier = index[None, :] <= index[:, None]
    start = jnp.clip(jnp.max(jnp.where(earlier, begin[None, :], 0), axis=1), 0, total)
    stop = jnp.clip(end, start, total)
    valid = (begin == start) & (end >= begin) & (end <= total) & (context >= 0) & (context <= shape.capacity)
    valid &= ~astray(inputs.block_tables, begin, end, context, shape)
    return Owners(start, jnp.where(live, stop, start), context, valid, live)


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
    """The tiles of every sequence of at least `shortest` tokens, those with the most keys first."""
    tokens, s = tiling.tokens(shape), own.start.shape[0]
    serves = own.live & own.valid & (own.stop - own.start >= shortest)
    first = own.start // 8 * 8
    needed = jnp.where(serves, (own.stop - first + tokens - 1) // tokens, 0)
    through = through_each(needed)
    tile = jnp.arange(tiling.tiles, dtype=jnp.int32)
    sequence = jnp.minimum(owner_of(tile, through), s - 1)
    first, last, start, stop, context = (x[sequence] for x in (first, through, own.start, own.stop, own.context))
    # The last tiles of a sequence come first: they see the most keys.
    token = first + (last - 1 - tile) * tokens
    begin, end = jnp.maximum(start - token, 0), jnp.minimum(stop - token, tokens)
    position = context - stop + token
    keys = jnp.where(tile < through[-1], -(position + end), 2**30)
    # One array, so that one kernel writes it.
    fields = lax.optimization_barrier(jnp.stack([token // 8, begin, end, position, sequence, keys]))
    if s > 1 and (shape.window is None or shape.window > 16 * tiling.block):
        fields = sorted_by(fields[5], fields[:5])
    return Tiles(through, fields)


def through_each(counts):
    """Sums of counts up to and including each."""
    index = jnp.arange(counts.shape[0])
    return jnp.sum(jnp.where(index[None, :] <= index[:, None], counts[None, :], 0), axis=1, dtype=jnp.int32)


def owner_of(nth, through):
    """Whose the `nth` of all is, where the first `through[i]` are those of 0..i; S past them all."""
    return jnp.sum(nth[:, None] >= through[None, :], axis=1, dtype=jnp.int32)


def sorted_by(keys, fields):
    """The columns of `fields` in ascending order of `keys`, equal ones in place."""
    n = keys.shape[0]
    if n > 2048:
        return fields[:, jnp.argsort(keys, stable=True)]
    # Counting is two small kernels; a sort is several.
    index = jnp.arange(n)
    tie = (keys[None, :] == keys[:, None]) & (index[None, :] < index[:, None])
    rank = jnp.sum((keys[None, :] < keys[:, None]) | tie, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(rank[None, None, :] == index[None, :, None], fields[:, None, :], 0), axis=2)


class Fills(NamedTuple):
    """Rows that no tile answers: zeroed where nobody's, NaN where an invalid sequence's."""

    start: jax.Array  # i32 [S]; rows below the first belong to nobody
    stop: jax.Array  # i32 [S], one past the rows to be filled with NaN; == start of a sequence that is none of these
    after: jax.Array  # i32 [1], rows from here on belong to nobody
    bad: jax.Array  # i32 [1], invalid sequences with rows


def fills(own: Owners) -> Fills:
    """With no live sequence every row is past the last."""
    bad = own.live & ~own.valid
    after, count = jnp.max(own.stop), jnp.sum(bad, dtype=jnp.int32)
    return Fills(own.start, jnp.where(bad, own.stop, own.start), after[None], count[None])


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
