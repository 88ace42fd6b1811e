"""The work list: which tiles of query rows exist and which pages their rows see, computed outside the kernel.

A tile is up to `block_q` consecutive rows of one sequence. Sequences without rows have no tile, so the kernel's
loops and its transfers run ahead over the same list and never meet an empty sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpa.backends.pallas_tpu.plan import Plan, list_size
from rpa.layout import Ragged
from rpa.signature import Signature


class Tiles(NamedTuple):
    """One entry a tile, int32 [N]; only the first `count[0]` are live. Page and block ranges are half-open."""

    count: jax.Array  # int32 [1]
    seq: jax.Array  # sequence
    row: jax.Array  # first row in `queries`
    rows: jax.Array  # live rows, 1..block_q
    position: jax.Array  # position of the first row, may be negative
    block: jax.Array  # first block with a visible key
    block_end: jax.Array  # > block: a tile that sees nothing has one block without pages
    page: jax.Array  # first page with a visible key
    page_end: jax.Array


def build(ragged: Ragged, signature: Signature, plan: Plan) -> Tiles:
    """The work list of a call, in the order of the sequences."""
    size = list_size(signature, plan)  # the last ones are never live
    length = ragged.stop - ragged.start  # [S]
    ends = jnp.cumsum(-(-length // plan.block_q))  # [S], tiles up to and with a sequence
    index = jnp.arange(size, dtype=jnp.int32)
    seq = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    seq = jnp.minimum(seq, signature.max_seqs - 1)
    before = ends[seq] - -(-length[seq] // plan.block_q)
    offset = (index - before) * plan.block_q
    rows = jnp.clip(length[seq] - offset, 0, plan.block_q)
    position = ragged.context[seq] - length[seq] + offset
    stop = position + rows  # one past the last key any row sees
    first = jnp.zeros_like(stop)
    if plan.window is not None:
        first = jnp.maximum(position - plan.window + 1, 0)
    stop = jnp.maximum(stop, first)  # nothing visible: an empty range
    page = first // plan.page
    page_end = jnp.where(stop > first, -(-stop // plan.page), page)
    block = page // plan.block_pages
    block_end = jnp.maximum(-(-page_end // plan.block_pages), block + 1)
    live = index < ends[-1]

    def keep(values, dead=0):
        return jnp.where(live, values, dead).astype(jnp.int32)

    return Tiles(
        count=ends[-1:].astype(jnp.int32),
        seq=keep(seq),
        row=keep(ragged.start[seq] + offset),
        rows=keep(rows),
        position=keep(position),
        block=keep(block),
        block_end=keep(block_end, 2**30),  # cursors that pass the last tile stay in the next, which has no pages
        page=keep(page),
        page_end=keep(page_end),
    )


def table_slices(tables, plan: Plan):
    """int32 [S * slices, 1, entries] from int32 [S, pages_per_seq]: rows that one transfer can fetch."""
    seqs, width = tables.shape
    entries = plan.table_entries
    padded = jnp.pad(tables, ((0, 0), (0, -width % entries)))
    return padded.reshape(seqs * (padded.shape[1] // entries), 1, entries)


def row_lse(lse, tiles: Tiles, signature: Signature, plan: Plan):
    """f32 [T, Hq] from the kernel's f32 [N, Hkv, 1, lanes]; rows that no tile owns get the last tile's garbage."""
    row = jnp.arange(signature.num_tokens, dtype=jnp.int32)
    live = jnp.arange(tiles.row.shape[0]) < tiles.count[0]
    first = jnp.where(live, tiles.row, 2**31 - 1)
    tile = jnp.clip(jnp.searchsorted(first, row, side="right") - 1, 0, lse.shape[0] - 1)
    offset = jnp.clip(row - tiles.row[tile], 0, plan.block_q - 1)[:, None]
    head = jnp.arange(signature.num_q_heads, dtype=jnp.int32)[None, :]
    member = head % plan.group
    lane = jnp.where((tiles.rows[tile] == 1)[:, None], member, member * plan.block_q + offset)
    return lse[tile[:, None], head // plan.group, 0, lane]
