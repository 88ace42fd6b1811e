"""Which work there is, found on the device from the metadata: decode rows, prefill tiles, rows to fill.

A handful of small arrays computed by XLA before the kernels run; nothing here waits for the host or depends on values.
Prefix sums and maxima are masked reductions: for the sizes of a batch they are one small kernel where a scan is many.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpa.backends.pallas_gpu import decode, prefill
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

    count: jax.Array  # i32 [1]
    tiles: jax.Array  # i32 [5, tiles], see `prefill.item_at`


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
    strays = astray(inputs.block_tables, begin, end, context, shape)
    valid &= jnp.sum(strays, axis=1, dtype=jnp.int32) == 0
    return Owners(start, jnp.where(live, stop, start), context, valid, live)


def astray(tables, begin, end, context, shape: Shape):
    """bool [S, pages_per_seq]: live entries outside the pool."""
    column = jnp.arange(shape.table_width)[None, :] * shape.page
    seen = (column < context[:, None]) & (end > begin)[:, None]
    if shape.window is not None:
        low = jnp.maximum(context - (end - begin), 0) - shape.window + 1
        seen &= column + shape.page > low[:, None]
    return seen & ((tables < 0) | (tables >= shape.pages))


def decode_rows(own: Owners, rows: int):
    """i32 [4, T]: token, sequence, position (-1 where nothing is to be read) and owner of every query row.

    The owner is 1 where a valid sequence owns the row, 2 where an invalid one does, 0 where none.
    """
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    mine = (row >= own.start) & (row < own.stop) & own.live  # [T, S], at most one a row
    sequence = jnp.max(jnp.where(mine, jnp.arange(own.start.shape[0], dtype=jnp.int32), 0), axis=1)
    position = jnp.max(jnp.where(mine & own.valid, own.context - own.stop + row, -1), axis=1)
    owner = jnp.max(jnp.where(mine, jnp.where(own.valid, 1, 2), 0), axis=1)
    return jnp.stack([row[:, 0], sequence, position, owner]).astype(jnp.int32)


def single_rows(own: Owners):
    """i32 [4, S]: the one-token sequences as decode rows, like `decode_rows`; the others' position is -1.

    The token is the sequence's own number: decode is given one query row of each sequence.
    """
    single = own.live & own.valid & (own.stop - own.start == 1)
    position = jnp.where(single, own.context - 1, -1)
    sequence = jnp.arange(own.start.shape[0])
    return jnp.stack([sequence, sequence, position, jnp.where(single, 1, 0)]).astype(jnp.int32)


def tile_bound(shape: Shape, sequences: int, tokens: int, shortest: int) -> int:
    """Tiles that any layout can need, sequences of fewer than `shortest` tokens left out."""
    busy = min(sequences, max(shape.tokens // shortest, 1))
    return max(1, (shape.tokens + busy * (tokens + 6)) // tokens)


def prefill_tiles(own: Owners, shape: Shape, tiling: prefill.Tiling, shortest: int) -> Tiles:
    """The tiles of every sequence of at least `shortest` tokens, those with the most keys first."""
    tokens, s = tiling.tokens(shape), own.start.shape[0]
    serves = own.live & own.valid & (own.stop - own.start >= shortest)
    first = own.start // 8 * 8
    needed = jnp.where(serves, (own.stop - first + tokens - 1) // tokens, 0)
    index = jnp.arange(s)
    through = jnp.sum(jnp.where(index[None, :] <= index[:, None], needed[None, :], 0), axis=1)
    total = through[-1]
    tile = jnp.arange(tiling.tiles, dtype=jnp.int32)[:, None]
    mine = (tile < through) & (tile >= through - needed)  # [tiles, S], exactly one a live tile
    # The last tiles of a sequence come first: they see the most keys.
    token = first + (through - 1 - tile) * tokens
    fields = [token // 8, own.start - token, own.stop - token, own.context - own.stop + token, index]
    token8, begin, end, position, sequence = (jnp.sum(jnp.where(mine, field, 0), axis=1) for field in fields)
    fields = jnp.stack([token8, jnp.maximum(begin, 0), jnp.minimum(end, tokens), position, sequence])
    if s > 1 and (shape.window is None or shape.window > 16 * tiling.block):
        keys = jnp.where(tile[:, 0] < total, -(position + end), 2**30)
        fields = sorted_by(keys, fields)
    return Tiles(total[None].astype(jnp.int32), fields.astype(jnp.int32))


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


def fills(own: Owners, rows: int):
    """i32 [2 * S + 4]: ends of the rows to be zeroed (before, after), then of each invalid sequence's, and whether any.

    [0] and [1]: rows below [0] and from [1] on belong to nobody. [2]: invalid sequences with rows. From [4]: start and
    stop of each sequence's rows to be filled with NaN.
    """
    bad = own.live & ~own.valid
    before = jnp.where(jnp.any(own.live), own.start[0], rows)
    after = jnp.max(own.stop)
    head = jnp.stack([before, jnp.maximum(after, before), jnp.sum(bad), jnp.zeros((), jnp.int32)])
    ends = jnp.stack([own.start, jnp.where(bad, own.stop, own.start)], axis=1).reshape(-1)
    return jnp.concatenate([head, ends]).astype(jnp.int32)


class Units(NamedTuple):
    """The splits of decode rows that a kernel runs through, and where a row's are."""

    fields: (
        jax.Array
    )  # i32 [5, units]: token, sequence, position or -1, split; [4, 0] holds how many there are
    splits: jax.Array  # i32 [R], live splits of each row
    first: (
        jax.Array | None
    )  # i32 [R], the unit of a row's first split; None: split `c` of row `r` is unit c * R + r


def splits_of(rows, shape: Shape, tiling: decode.Tiling):
    """i32 [R]: how many splits of each row hold keys, as the kernel finds them."""
    position = rows[2]
    base = 0
    if shape.window is not None:
        align = piece(shape.page, tiling.block)
        base = jnp.maximum(position - (shape.window - 1), 0) // align * align
    return (position + 1 - base + tiling.chunk - 1) // tiling.chunk


def units_of_rows(rows, shape: Shape, tiling: decode.Tiling) -> Units:
    """Every split of every row, live or not: nothing to search, for batches whose rows are about equally long."""
    fields = jnp.broadcast_to(rows[:3, None], (3, tiling.splits, tiling.rows))
    split = jnp.broadcast_to(
        jnp.arange(tiling.splits, dtype=jnp.int32)[:, None], (tiling.splits, tiling.rows)
    )
    fields = jnp.concatenate([fields, split[None], jnp.full_like(split, tiling.units)[None]])
    return Units(fields.reshape(5, tiling.units), splits_of(rows, shape, tiling), None)


def live_units(rows, shape: Shape, tiling: decode.Tiling) -> Units:
    """The live splits alone, row by row: for batches where most rows are short or not decode rows at all."""
    splits = splits_of(rows, shape, tiling)
    index = jnp.arange(tiling.rows)
    through = jnp.sum(jnp.where(index[None, :] <= index[:, None], splits[None, :], 0), axis=1)
    first = through - splits
    unit = jnp.arange(tiling.units, dtype=jnp.int32)[:, None]
    mine = (unit < through) & (unit >= first)
    token, sequence, position, start = (
        jnp.sum(jnp.where(mine, field, 0), axis=1) for field in (rows[0], rows[1], rows[2], first)
    )
    count = jnp.full_like(token, through[-1])
    return Units(
        jnp.stack([token, sequence, position, unit[:, 0] - start, count]).astype(jnp.int32), splits, first
    )
