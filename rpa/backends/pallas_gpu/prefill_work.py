# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
"""What the prefill role works on: its tile shapes, its shared memory, and one tile of the list with its keys."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu.tiles import I32, Ring, Shape, ceil_div, first_key, piece, smem

M = 64  # rows of a warpgroup's wgmma
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row, replicated along it
WG = plgpu.Layout.WGMMA


# Where a tile's output waits for its copy: whole tiles swizzled, partial ones not, each in memory of its own (what the
# interpreter can tell apart); both in one spare buffer; or both in the queries' own memory, where no buffer fits.
APART, SPARE, SHARED = 0, 1, 2


class Tiling(NamedTuple):
    """Static parameters of the prefill role."""

    tiles: int  # tiles the list may hold
    block: int  # keys a ring slot
    stages: int
    ctas: int
    fresh: bool = False  # P V into a fresh accumulator, added afterwards, rather than on top of the old one
    staged: bool = False  # the weights pass through shared memory: the interpreter takes no register operand
    turns: bool = True  # the warpgroups take turns at the tensor cores
    ahead: bool = False  # the next block's scores are computed under this block's softmax
    registers: tuple[int, int] = (232, 40)  # consumer, producer
    memory: int = 0  # where the output is staged: APART, SPARE or SHARED
    queries: int = 2  # tiles whose queries have room: with two, the next tile's load under this tile's work
    teams: int = 1  # pairs of consumer warpgroups a CTA, each pair with tiles and a ring of its own
    raw: int = 0  # ring slots of stored numbers, where a warpgroup converts them; one team only

    def heads(self, shape: Shape) -> int:
        """Heads of a group that one tile serves."""
        return 2 if shape.group % 2 == 0 else 1

    def tokens(self, shape: Shape) -> int:
        return 2 * M // self.heads(shape)


class Item(NamedTuple):
    """One tile of one pair of heads, traced."""

    token: jax.Array  # query row of the tile's row 0, a multiple of 8
    begin: jax.Array  # live rows of the tile: begin..end-1
    end: jax.Array
    position: jax.Array  # of row 0; may be negative
    sequence: jax.Array
    kv_head: jax.Array
    head: jax.Array  # first query head
    low: jax.Array  # first key any row sees
    base: jax.Array  # first key of block 0
    stop: jax.Array  # one past the last key any row sees
    blocks: jax.Array
    scale: Any  # of the logits


class Scratch(NamedTuple):
    """A CTA's shared memory and barriers."""

    q: jax.Ref  # [2 * queries, M, D]
    k: jax.Ref  # [stages, block, D]
    v: jax.Ref  # [stages, block, D]
    out: jax.Ref  # [2, M, D] (or as `q`), whole tiles on their way out; `place_rows` allocated, as of `tail`
    tail: jax.Ref  # as `out`, not swizzled: tiles that are not whole leave by rows, padded to what TMA can address
    lse: jax.Ref  # [2, M]
    p: jax.Ref  # [2, M, block] where `staged`
    q_full: jax.Ref  # [2 * queries]
    q_free: jax.Ref  # [queries]
    k_full: jax.Ref  # [stages]
    v_full: jax.Ref
    k_free: jax.Ref
    v_free: jax.Ref
    turn: jax.Ref
    clean: jax.Ref
    raw: Any = ()  # the ring of stored numbers, where they are narrower than the operands


def place_rows(d: int) -> tuple[int, int]:
    """Rows of a place for M rows, swizzled and padded, such that both are equally long in memory.

    Each warpgroup writes into its own place of one while the other may still read its own of the other: where the
    places were of different lengths, one's tail lay over its neighbour's output (head sizes that are no multiple of
    64; the interpreter, which keeps both apart, cannot see it).
    """
    padded = -(-d // 64) * 64
    rows = next(n for n in range(M, 8 * M, 8) if n * d % padded == 0 and n * d >= M * padded)
    return rows, rows * d // padded


def scratch_types(shape: Shape, tiling: Tiling) -> Scratch:
    d, dtype = shape.head_dim, shape.operands
    copies = tiling.block // piece(shape.page, tiling.block)
    ring = functools.partial(plgpu.Barrier, num_barriers=tiling.stages)
    held = 2 * tiling.queries
    staged = held if tiling.memory == SHARED else 2
    rows, padded_rows = place_rows(d)
    q, tail = smem((held, M, d), dtype), plgpu.SMEM((staged, padded_rows, -(-d // 64) * 64), jnp.dtype(dtype))
    out = smem((staged, rows, d), dtype)
    both, none = plgpu.RefUnion(out, tail), plgpu.SMEM((M,), jnp.float32)
    raw, filled = (), copies
    if tiling.raw:
        stored = smem((tiling.raw, tiling.block, d), shape.stored)
        full, free = (plgpu.Barrier(num_barriers=tiling.raw, num_arrivals=n) for n in (copies, 1))
        raw, filled = Ring(stored, stored, full, full, free, free), 1
    return Scratch(
        q=both if tiling.memory == SHARED else q,
        out=(out, both, none)[tiling.memory],
        tail=tail if tiling.memory == APART else none,
        k=smem((tiling.stages, tiling.block, d), dtype),
        v=smem((tiling.stages, tiling.block, d), dtype),
        lse=plgpu.SMEM((2, M), jnp.float32),
        p=smem((2, M, tiling.block) if tiling.staged else (2, 8, d), dtype, like=d),
        q_full=plgpu.Barrier(num_barriers=held),
        q_free=plgpu.Barrier(num_barriers=tiling.queries, num_arrivals=2),
        k_full=ring(num_arrivals=filled),
        v_full=ring(num_arrivals=filled),
        k_free=ring(num_arrivals=2),
        v_free=ring(num_arrivals=2),
        turn=plgpu.Barrier(num_arrivals=2),
        clean=plgpu.Barrier(num_arrivals=2),
        raw=raw,
    )


def fed_ring(s: Scratch, tiling: Tiling) -> tuple[Scratch, Tiling]:
    """Both with the ring that the producer fills in the place of the one that is multiplied."""
    if not tiling.raw:
        return s, tiling
    return s._replace(**s.raw._asdict()), tiling._replace(stages=tiling.raw)


def unpacked(s: Scratch, tiling: Tiling) -> Scratch:
    """The scratch with the names of shared memory told apart."""
    q, out, tail = s.q, s.out, s.tail
    if tiling.memory == SHARED:
        q, tail = s.q
        out = q
    elif tiling.memory == SPARE:
        out, tail = s.out
    return s._replace(q=tile(q), out=tile(out), tail=tile(tail))


def tile(ref):
    """The M rows that are used of each place."""
    return ref if ref.shape[1] == M else ref.at[:, pl.ds(0, M)]


def item_at(index, tiles_ref, shape: Shape, tiling: Tiling) -> Item:
    """Reads a tile of the list (i32 [5.., tiles]: token / 8, begin, end, position, sequence) and finds its keys."""
    pairs = shape.q_heads // tiling.heads(shape)
    tile, pair = lax.div(index, I32(pairs)), lax.rem(index, I32(pairs))
    token, begin, end, position, sequence = (tiles_ref[field, tile] for field in range(5))
    head = pair * tiling.heads(shape)
    low, base = first_key(position + begin, shape.window, tiling.block)
    stop = jnp.maximum(position + end, 0)
    blocks = ceil_div(jnp.maximum(stop - base, 0), tiling.block)
    kv_head = lax.div(head, I32(shape.group))
    return Item(token * 8, begin, end, position, sequence, kv_head, head, low, base, stop, blocks, shape.scale)


def for_each_item(team, count_ref, tiles_ref, shape: Shape, tiling: Tiling, body):
    """Runs `body(item, step, nth)` over this team's items; the list is dealt back and forth, longest tiles first.

    `step` counts ring slots used before, `nth` items; both counts after the last item are returned.
    """
    pairs = shape.q_heads // tiling.heads(shape)
    total, n = count_ref[count_ref.shape[0] - 1] * pairs, tiling.ctas * tiling.teams

    def loop(i, carry):
        step, nth = carry
        place = jnp.where(lax.rem(i, I32(2)) == 0, team, n - 1 - team)
        index = i * n + place
        item = item_at(jnp.minimum(index, total - 1), tiles_ref, shape, tiling)
        here = index < total
        pl.when(here)(lambda: body(item, step, nth))
        return step + jnp.where(here, item.blocks, 0), nth + jnp.where(here, 1, 0)

    return lax.fori_loop(0, ceil_div(total, n), loop, (I32(0), I32(0)))
