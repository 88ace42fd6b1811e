# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
"""What the prefill role works on: its tile shapes, its shared memory, and one tile of the list with its keys."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu.tiles import I32, Ring, Shape, ceil_div, first_key, piece, smem

M = 64  # rows of a warpgroup's wgmma
ALIGN = 16  # keys of one step of a product: what a tile that sees one block begins at a multiple of
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
    near: int = 24  # MiB of keys and values that tiles at work at one time share, about
    fetch: bool = False  # page ids are loaded a block ahead
    apart: bool = False  # keys and values by a producer warp each
    peek: bool = False  # what the list says of the next tile is loaded before this one is worked on
    wgs: int = 2  # consumer warpgroups a team
    more: int = 0  # ring slots of keys beyond those of values

    def slots(self, step) -> tuple:
        """Where the keys and the values of a step are."""
        return lax.rem(step, I32(self.stages + self.more)), lax.rem(step, I32(self.stages))
    raw: int = 0  # ring slots of stored numbers, where a warpgroup converts them; one team only
    packed: int = 0  # heads whose rows share a warpgroup, where one block holds all keys that a tile in a window sees

    def heads(self, shape: Shape) -> int:
        """Heads of a group that one tile serves."""
        if self.packed:
            return self.packed
        return 2 if shape.group % 2 == 0 and self.wgs == 2 else 1

    @property
    def align(self) -> int:
        """Where blocks start in the cache: at multiples of this many keys."""
        return ALIGN if self.packed else self.block

    def span(self, shape: Shape) -> int:
        """Keys of a block that one warpgroup multiplies."""
        return self.block - (self.wgs - 1) * self.rows(shape) if self.packed else self.block

    def rows(self, shape: Shape) -> int:
        """Query tokens whose rows one warpgroup has."""
        return M // max(self.packed, 1)

    def tokens(self, shape: Shape) -> int:
        return self.wgs * M // self.heads(shape)

    def piece(self, shape: Shape) -> int:
        """Keys of one copy."""
        return math.gcd(piece(shape.page, self.align), self.block)


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
    dirty: jax.Array  # 1: slots past the context are loaded, 2: slots before the sequence's window


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
    copies = tiling.block // tiling.piece(shape)
    keys = functools.partial(plgpu.Barrier, num_barriers=tiling.stages + tiling.more)
    ring = functools.partial(plgpu.Barrier, num_barriers=tiling.stages)
    wgs, held = tiling.wgs, tiling.wgs * tiling.queries
    staged = held if tiling.memory == SHARED else wgs
    rows, padded_rows = place_rows(d)
    q, tail = smem((held, M, d), dtype), plgpu.SMEM((staged, padded_rows, -(-d // 64) * 64), jnp.dtype(dtype))
    out = smem((staged, rows, d), dtype)
    both = plgpu.RefUnion(out, tail)
    # A product takes its rows by the length of a swizzled line: 64 of them, or 32 where a block is no multiple of 64.
    like = next((n for n in (64, 32, 16) if tiling.span(shape) % n == 0), None)
    like = None if like == 64 else like
    raw, filled = (), copies
    if tiling.raw:
        stored = smem((tiling.raw, tiling.block, d), shape.stored)
        full, free = (plgpu.Barrier(num_barriers=tiling.raw, num_arrivals=n) for n in (copies, 1))
        raw, filled = Ring(stored, stored, full, full, free, free), 1
    return Scratch(
        q=both if tiling.memory == SHARED else q,
        out=(out, both, ())[tiling.memory],
        tail=tail if tiling.memory == APART else (),
        k=smem((tiling.stages + tiling.more, tiling.block, d), dtype),
        v=smem((tiling.stages, tiling.block, d), dtype, like=like),
        lse=plgpu.SMEM((wgs, M), jnp.float32),
        p=smem((wgs, M, tiling.span(shape)), dtype, like=like or d) if tiling.staged else (),
        q_full=plgpu.Barrier(num_barriers=held, num_arrivals=max(tiling.packed, 1)),
        q_free=plgpu.Barrier(num_barriers=tiling.queries, num_arrivals=wgs),
        k_full=keys(num_arrivals=filled),
        v_full=ring(num_arrivals=filled),
        k_free=keys(num_arrivals=wgs),
        v_free=ring(num_arrivals=wgs),
        turn=plgpu.Barrier(num_barriers=wgs) if tiling.ahead else plgpu.Barrier(num_arrivals=2),
        clean=plgpu.Barrier(num_arrivals=wgs),
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


class Told:
    """A run of a flat array in global memory, indexed from its own start."""

    def __init__(self, ref, first: int, length: int):
        self.ref, self.first, self.shape = ref, first, (length,)

    def __getitem__(self, index):
        return self.ref[self.first + index]


def told(ref, sequences: int) -> tuple[Told, tuple[Told, ...]]:
    """What `plan.listed` tells beside the tiles: (tiles through each sequence, pairs at once, whether groups
    are odd in number; the first rows of sequences, one past those to be filled with NaN (the first where none are),
    [first row of nobody], [how many sequences are invalid])."""
    s, lengths = sequences, (sequences, sequences, 1, 1)
    firsts = (s + 2, 2 * s + 2, 3 * s + 2, 3 * s + 3)
    return Told(ref, 0, s + 2), tuple(Told(ref, a, n) for a, n in zip(firsts, lengths, strict=True))


def item_of(fields, pair, shape: Shape, tiling: Tiling) -> Item:
    """The tile of one entry of the list (token / 8, begin, end, position, sequence, dirty) for a pair, and its keys."""
    token, begin, end, position, sequence, dirty = fields
    head = pair * tiling.heads(shape)
    low, base = first_key(position + begin, shape.window, tiling.align)
    stop = jnp.maximum(position + end, 0)
    blocks = ceil_div(jnp.maximum(stop - base, 0), tiling.block)
    kv_head = lax.div(head, I32(shape.group))
    return Item(token * 8, begin, end, position, sequence, kv_head, head, low, base, stop, blocks, shape.scale, dirty)


def grouped(shape: Shape, tiling: Tiling) -> bool:
    """Whether tiles are ordered so that those at work together share keys: not where a window makes these few."""
    return tiling.near > 0 and (shape.window is None or shape.window > 16 * tiling.block)


def dealt(count_ref) -> tuple:
    """(tiles, pairs at once, whether groups are odd in number), as `told` has them."""
    return tuple(count_ref[count_ref.shape[0] - 3 + field] for field in range(3))


def place_of(index, deal: tuple, shape: Shape, tiling: Tiling):
    """(tile, pair) of the `index`th item: some pairs of every tile, then the next; back through the list, and on."""
    pairs = shape.q_heads // tiling.heads(shape)
    if not grouped(shape, tiling):
        return lax.div(index, I32(pairs)), lax.rem(index, I32(pairs))
    tiles, at_once, odd = deal
    several = jnp.maximum(tiles * at_once, 1)
    group = lax.div(index, several)
    within = index - group * several
    here = jnp.minimum(at_once, pairs - group * at_once)
    tile = lax.div(within, here)
    groups = lax.div(pairs + at_once - 1, at_once)
    back = odd & (groups - 1 - group) & 1
    return jnp.where(back == 1, tiles - 1 - tile, tile), group * at_once + within - tile * here


def for_each_item(team, count_ref, tiles_ref, shape: Shape, tiling: Tiling, body, feeds: bool = False):
    """Runs `body(item, step, nth)` over this team's items; the list is dealt back and forth, longest tiles first.

    `step` counts ring slots used before, `nth` items; both counts after the last item are returned. What the list says
    of the next item is loaded before this one is worked on, where `peek` says so.

    Args:
        feeds: the caller is a producer warp.
    """
    pairs = shape.q_heads // tiling.heads(shape)
    deal = dealt(count_ref)
    # A producer keeps it: looking it up for each item delays its copies, 2 % of 1 x 8k on pages of 16. A consumer on
    # large pages has better use for the registers: 811 us against 795, 4 x 512 on 16k.
    kept = feeds or tiling.apart
    total, n = deal[0] * pairs, tiling.ctas * tiling.teams

    def index_of(i):
        return i * n + jnp.where(lax.rem(i, I32(2)) == 0, team, n - 1 - team)

    def load(i):
        index = jnp.clip(index_of(i), 0, jnp.maximum(total - 1, 0))
        tile, pair = place_of(index, deal if kept else dealt(count_ref), shape, tiling)
        first = tiles_ref.shape[0] - 6 * tiling.tiles
        return tuple(tiles_ref[first + field * tiling.tiles + tile] for field in range(6)), pair

    def loop(i, carry):
        step, nth, entry = carry
        if not tiling.peek:
            entry = load(i)
        following = load(i + 1) if tiling.peek else ()
        item, here = item_of(*entry, shape, tiling), index_of(i) < total
        pl.when(here)(lambda: body(item, step, nth))
        return step + jnp.where(here, item.blocks, 0), nth + jnp.where(here, 1, 0), following

    start = (I32(0), I32(0), load(I32(0)) if tiling.peek else ())
    return lax.fori_loop(0, ceil_div(total, n), loop, start)[:2]
