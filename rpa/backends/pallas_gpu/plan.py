"""Which work there is, found on the device from the metadata: decode rows, prefill tiles, rows to fill.

A few small arrays computed by XLA before the kernels run; nothing here waits for the host or depends on values.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from rpa.backends.pallas_gpu import decode, prefill
from rpa.backends.pallas_gpu.tiles import Shape
from rpa.layout import Ragged


class Tiles(NamedTuple):
    """The prefill list, longest first."""

    count: object  # i32 [1]
    tiles: object  # i32 [5, tiles], see `prefill.item_at`


def decode_rows(ragged: Ragged, count, rows: int):
    """i32 [3, T]: token, sequence and position of every query row; position -1 where no valid sequence owns it."""
    row = jnp.arange(rows)
    live = jnp.arange(ragged.start.shape[0]) < count
    ends = jnp.maximum(ragged.stop, ragged.bad_stop)
    # Rows belong to sequences in order and without holes, so the sequences that end at or before a row number it.
    sequence = jnp.sum((ends[None, :] <= row[:, None]) & live[None, :], axis=1, dtype=jnp.int32)
    sequence = jnp.minimum(sequence, ragged.start.shape[0] - 1)
    start, stop = ragged.start[sequence], ragged.stop[sequence]
    position = ragged.context[sequence] - stop + row
    owned = (row >= start) & (row < stop)
    return jnp.stack([row, sequence, jnp.where(owned, jnp.maximum(position, -1), -1)]).astype(jnp.int32)


def single_rows(ragged: Ragged):
    """i32 [3, S]: the one-token sequences as decode rows, position -1 elsewhere."""
    single = ragged.stop - ragged.start == 1
    position = jnp.where(single, ragged.context - 1, -1)
    sequence = jnp.arange(ragged.start.shape[0])
    return jnp.stack([ragged.start, sequence, position]).astype(jnp.int32)


def tile_bound(shape: Shape, sequences: int, tokens: int, shortest: int) -> int:
    """Tiles that any layout can need, sequences of fewer than `shortest` tokens left out."""
    busy = min(sequences, shape.tokens // shortest)
    return max(1, (shape.tokens + busy * (tokens + 6)) // tokens)


def prefill_tiles(ragged: Ragged, shape: Shape, tiling: prefill.Tiling, shortest: int) -> Tiles:
    """The tiles of every sequence of at least `shortest` tokens, those with the most blocks first."""
    tokens = tiling.tokens(shape)
    serves = ragged.stop - ragged.start >= shortest
    first = ragged.start // 8 * 8
    needed = jnp.where(serves, (ragged.stop - first + tokens - 1) // tokens, 0)
    through = jnp.cumsum(needed)
    tile = jnp.arange(tiling.tiles)
    sequence = jnp.sum(through[None, :] <= tile[:, None], axis=1, dtype=jnp.int32)
    sequence = jnp.minimum(sequence, ragged.start.shape[0] - 1)
    start, stop = ragged.start[sequence], ragged.stop[sequence]
    token = first[sequence] + (tile - through[sequence] + needed[sequence]) * tokens
    begin, end = jnp.maximum(start - token, 0), jnp.minimum(stop - token, tokens)
    position = ragged.context[sequence] - stop + token
    live = tile < through[-1]
    fields = jnp.stack([token // 8, begin, end, position, sequence]).astype(jnp.int32)
    if shape.window is None or shape.window > 16 * tiling.block:
        longest_first = jnp.argsort(jnp.where(live, -(position + end), 2**30), stable=True)
        fields = fields[:, longest_first]
    return Tiles(through[-1:].astype(jnp.int32), fields)


def live_splits(rows, shape: Shape, tiling: decode.Tiling):
    """bool [splits, R]: the splits of each decode row that hold keys, as the kernel finds them."""
    position = rows[2]
    base = 0
    if shape.window is not None:
        align = decode.piece(shape.page, tiling.block)
        base = jnp.maximum(position - (shape.window - 1), 0) // align * align
    return base + jnp.arange(tiling.splits)[:, None] * tiling.chunk <= position
