# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
"""What the two roles of the Hopper kernel share: static tile shapes, shared-memory layouts, page arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
# Below every score a kernel can meet, and finite: a difference of two of them is 0 and not NaN.
FLOOR = -1e30
I32 = jnp.int32


@dataclass(frozen=True)
class Shape:
    """The static part of a call that the kernels see."""

    tokens: int  # T
    q_heads: int
    kv_heads: int
    head_dim: int
    page: int
    pages: int  # P, of the pool
    table_width: int  # pages_per_seq
    dtype: str  # of queries and both products' operands
    scale: float
    cap: float | None
    window: int | None
    stored: str = ""  # of pages, where they are narrower than the operands: float8_e4m3fn, float8_e5m2, int8

    @property
    def pages_dtype(self) -> str:
        return self.stored or self.dtype

    @property
    def operands(self) -> str:
        """What is multiplied: floats of 8 bits become float16 in a quarter of the instructions of bfloat16."""
        return "float16" if self.stored.startswith("float8") else self.dtype

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def columns(self) -> int:
        """Query heads that decode loads at once: whole eights, as TMA asks, around any group."""
        return max(-(-(head * self.group % 8 + self.group) // 8) * 8 for head in range(self.kv_heads))

    @property
    def loaded_heads(self) -> int:
        """Query heads of the array that decode loads from, padded to whole eights."""
        return max(-(-self.q_heads // 8) * 8, self.columns)

    @property
    def capacity(self) -> int:
        return self.table_width * self.page


class Heads(NamedTuple):
    """What a call holds one number a head of, arrays or refs."""

    sinks: Any = None  # f32 [Hq]
    k_scale: Any = None  # f32 [Hkv], of narrow pages
    v_scale: Any = None  # f32 [Hkv]

    @property
    def present(self) -> list:
        return [x for x in self if x is not None]

    def of(self, refs: list) -> Heads:
        """The same, with the first of `refs`, which are taken away, for what is present."""
        return Heads(*(None if x is None else refs.pop(0) for x in self))


def transforms(minor: int, dtype: str) -> tuple:
    """The tiled, swizzled layout that TMA writes and wgmma reads, for rows of `minor` elements."""
    size = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if minor * size % s == 0)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def smem(shape: tuple[int, ...], dtype: str, like: int | None = None):
    """A shared-memory operand; `like` is the row length whose swizzle it must match (wgmma wants one for both)."""
    return plgpu.SMEM(shape, jnp.dtype(dtype), transforms=transforms(like or shape[-1], dtype))


def piece(page: int, block: int) -> int:
    """Keys one TMA copies: the largest run that never crosses a page or a block."""
    return math.gcd(page, block)


def ceil_div(a, b: int):
    return lax.div(a + (b - 1), I32(b)) if not isinstance(a, int) else -(-a // b)


def first_key(position, window: int | None, align: int):
    """The first key a row at `position` sees, and where its blocks start: a multiple of `align` at or before it."""
    if window is None:
        return I32(0), I32(0)
    low = jnp.maximum(position - (window - 1), 0)
    return low, lax.div(low, I32(align)) * align


def entry_of(key, sequence, tables_ref, shape: Shape):
    """What the block table says of a key's page, right or wrong."""
    return tables_ref[sequence, jnp.minimum(lax.div(key, I32(shape.page)), shape.table_width - 1)]


def page_of(key, sequence, tables_ref, shape: Shape):
    """(page id inside the pool, slot, 1 if the entry is none) of a key; no address outside the pool is ever formed."""
    column = jnp.minimum(lax.div(key, I32(shape.page)), shape.table_width - 1)
    entry = tables_ref[sequence, column]
    page = jnp.clip(entry, 0, shape.pages - 1)
    return page, lax.rem(key, I32(shape.page)), jnp.where(entry != page, I32(1), I32(0))


class Ring(NamedTuple):
    """Blocks of keys and values on their way, slot by slot, with the barriers that say filled and free."""

    k: Any  # [slots, block, D]
    v: Any  # [slots, block, D]
    k_full: Any  # [slots]
    v_full: Any
    k_free: Any
    v_free: Any


def drain(slots: int, uses, *barriers) -> None:
    """Waits for the last release of each slot of `uses` fillings, so that no barrier is left a phase behind."""
    for slot in range(slots):

        @pl.when(uses > slot)
        def _(slot=slot):
            for barrier in barriers:
                plgpu.barrier_wait(barrier.at[slot])


def down(op: str, x, scratch_ref, lanes: bool):
    """The maximum ("max") or sum ("sum") of each column of `x` f32 [64 * m, N]; `scratch_ref` is f32 [256 or more].

    Pallas reduces across warps in memory that is the same for every warpgroup that runs the same code (jax 0.11.2):
    two at once corrupt each other. So a warpgroup names its own; the interpreter, not `lanes`, has no such memory.
    """
    if not lanes:
        return x.max(axis=0) if op == "max" else x.sum(axis=0)
    result = plgpu.ShapeDtypeStruct(x.shape[1:], jnp.float32, layout=plgpu.Layout.WGMMA.reduce(0))

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=result)
    def reduce(_, x, scratch):
        return x.reduce("add" if op == "sum" else op, 0, scratch)

    return reduce(x, scratch_ref)


def halved(x, axis: int, most=None):
    """(bfloat16 queries as float16, what a product with them is to be multiplied by), exact where it matters.

    Each query, along `axis`, is brought just below float16's greatest by a power of two. So what lies 2**32 below its
    own greatest number, where float16 has fewer bits than bfloat16, loses less than 2**-38 of that.
    """
    x = x.astype(jnp.float32)
    top = jnp.abs(x).max(axis=axis) if most is None else most(jnp.abs(x))
    top = lax.bitcast_convert_type(top, jnp.int32)
    exponent = jnp.clip(lax.shift_right_logical(top, 23), 28, 254)  # of the greatest, biased
    up, down = (lax.bitcast_convert_type(e << 23, jnp.float32) for e in (268 - exponent, exponent - 14))
    return (x * lax.broadcast_in_dim(up, x.shape, [1 - axis])).astype(jnp.float16), down


def widen(narrow_ref, wide_ref) -> None:
    """Converts a tile of stored numbers to operands, without a rounding; a scale, if any, is the products' affair."""
    d, dtype = narrow_ref.shape[1], wide_ref.dtype
    width = 128 if d % 128 == 0 else 64  # a swizzled row of the narrow tile
    for column in range(0, d, width):
        part = plgpu.load(narrow_ref.at[:, pl.ds(column, width)], layout=plgpu.Layout.WGMMA_UPCAST_2X)
        if part.dtype != jnp.int8:
            part = part.astype(jnp.float16)  # what the hardware converts to
            part = part if dtype == jnp.float16 else part.astype(jnp.float32)
        wide_ref.at[:, pl.ds(column, width)][...] = part.astype(dtype)


def zero_unseen(v_ref, first, low, stop) -> None:
    """Zeroes the rows of a [block, D] value tile whose keys, from `first` on, lie outside [low, stop)."""
    block, d = v_ref.shape
    width = (
        64 if d % 64 == 0 else d
    )  # a slice at a time: the whole tile would not fit beside the accumulators
    # By 64 rows, as the layout has them; the last ones overlap where the block is no multiple of that.
    for row in sorted({*range(0, block - 63, 64), block - 64}):
        keys = first + row + plgpu.broadcasted_iota(jnp.int32, (64, width), 0, layout=plgpu.Layout.WGMMA)
        seen = (keys >= low) & (keys < stop)
        for column in range(0, d, width):
            part = v_ref.at[pl.ds(row, 64), pl.ds(column, width)]
            part[...] = jnp.where(seen, part[...], jnp.zeros((), v_ref.dtype))
