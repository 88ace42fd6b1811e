# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false
"""Which sequence owns a query row, read from the raw metadata by the warp that needs to know.

The meaning is `rpa.layout.sanitize`'s: a row belongs to the first live sequence whose end lies past it, and that
sequence is invalid where it starts before an earlier offset's maximum, ends past the last row, or has a context that
its table cannot hold. A warp looks at 128 offsets at once, so that no kernel has to run before this one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu.tiles import I32, Shape, ceil_div

LEAST = -(2**31)


class Metadata(NamedTuple):
    """A call's metadata as it came, refs in global memory (or arrays)."""

    context: Any  # i32 [S]
    tables: Any  # i32 [S, pages_per_seq]
    loc: Any  # i32 [S + 1], the query offsets
    count: Any  # i32 [1], live sequences


class Row(NamedTuple):
    """What a query row's owner says of it, traced."""

    sequence: jax.Array
    begin: jax.Array  # the sequence's rows, begin..end-1
    end: jax.Array
    context: jax.Array
    position: jax.Array  # -1 where it sees nothing
    owner: jax.Array  # 1: a valid sequence, 2: an invalid one, 0: nobody


def row_at(row, meta: Metadata, shape: Shape, lanes: bool) -> Row:
    """Finds the owner of `row`; `lanes` as `search` takes it."""
    sequences = meta.context.shape[0]
    count = jnp.clip(meta.count[0], 0, sequences)
    look = _search_lanes if lanes else search
    after, top, begin, end, context = look(row, count, meta.loc, meta.context)
    valid = (begin == top) & (begin >= 0) & (end <= shape.tokens) & (context >= 0) & (context <= shape.capacity)
    owner = jnp.where(after <= count, jnp.where(valid, I32(1), I32(2)), I32(0))
    position = jnp.where(owner == 1, jnp.maximum(context - end + row, -1), -1)
    return Row(jnp.clip(after - 1, 0, sequences - 1), begin, end, context, position, owner)


def search(row, count, loc, contexts):
    """First j in 1..count with loc[j] > row, else count + 1; the greatest of loc[0..j-1]; j - 1's begin, end, context.

    A row before loc[0] is after every sequence. `_search_lanes` is the same by the 32 lanes of a warp, which the
    interpreter cannot do.
    """

    def look(i, carry):
        first, top = carry
        value = loc[i]
        first = jnp.where((value > row) & (i >= 1) & (first > count), i, first)
        return first, jnp.where(i < first, jnp.maximum(top, value), top)

    first, top = lax.fori_loop(0, count + 1, look, (count + 1, I32(LEAST)))
    first = jnp.where(loc[0] > row, count + 1, first)
    s = jnp.clip(first - 1, 0, contexts.shape[0] - 1)
    return first, top, loc[s], loc[s + 1], contexts[s]


def strays(start, stop, needed, row: Row, meta: Metadata, shape: Shape):
    """1 where `needed` and a page that the row's sequence sees, outside this row's own keys start..stop-1, is none."""
    low = I32(0)
    if shape.window is not None:
        low = jnp.maximum(jnp.maximum(row.context - (row.end - row.begin), 0) - (shape.window - 1), 0)
    first, last = lax.div(low, I32(shape.page)), ceil_div(row.context, shape.page)

    def look(column, bad):
        return bad | astray(meta.tables[row.sequence, column], shape)

    before = lax.fori_loop(first, jnp.where(needed, lax.div(start, I32(shape.page)), 0), look, I32(0))
    after = jnp.maximum(first, ceil_div(stop, shape.page))
    return lax.fori_loop(after, jnp.where(needed, last, 0), look, before)


def astray(page, shape: Shape):
    """1 where a table entry names no page of the pool."""
    return jnp.where((page < 0) | (page >= shape.pages), I32(1), I32(0))


# ------------------------------------------------------------------ the search by lanes

_STRIDE = 4  # offsets a lane loads at once
# Most often row r is sequence r's: what is asked of that one is loaded with the first offsets, not after the search.
_GUESS = """
  mul.wide.s32 a, g, 4; add.s64 b, a, $9; ld.global.nc.b32 $4, [b];
  add.s64 b, a, $8; ld.global.nc.b32 $2, [b]; ld.global.nc.b32 $3, [b+4];
"""
_LOOK = """
  add.s32 i, base, {skip}; setp.le.s32 p, i, $7; mov.b32 v{u}, {least};
  mul.wide.s32 a, i, 4; add.s64 a, a, $8; @p ld.global.nc.b32 v{u}, [a];
"""
_JUDGE = """
  add.s32 i, base, {skip}; setp.gt.s32 p, v{u}, $5; setp.ge.and.s32 p, i, 1, p; setp.le.and.s32 p, i, $6, p;
  vote.sync.ballot.b32 hit, p, 0xffffffff; brev.b32 hit, hit; bfind.shiftamt.u32 hit, hit;
  sub.s32 k, i, lane; add.s32 k, k, hit; setp.ne.u32 p, hit, 0xffffffff; setp.gt.and.s32 p, $0, $6, p;
  @p mov.b32 $0, k;
  setp.lt.s32 p, i, $0; @p max.s32 $1, $1, v{u};
"""
_FIND = """{{
  .reg .pred p; .reg .b32 i, k, g, s, low, lane, base, hit, v0, v1, v2, v3; .reg .b64 a, b;
  mov.u32 lane, %laneid; mov.b32 base, lane; mov.b32 $1, {least};
  ld.global.nc.b32 low, [$8]; sub.s32 k, $7, 1; min.s32 g, $5, k; {guess}
  {looks}
  add.s32 $0, $6, 1;
  bra JUDGE;
MORE:
  {looks}
JUDGE:
  {judges}
  add.s32 base, base, {step}; sub.s32 k, base, lane; setp.le.s32 p, k, $6; setp.gt.and.s32 p, $0, $6, p;
  @p bra MORE;
  redux.sync.max.s32 $1, $1, 0xffffffff;
  setp.gt.s32 p, low, $5; @p add.s32 $0, $6, 1;
  sub.s32 s, $0, 1; max.s32 s, s, 0; sub.s32 k, $7, 1; min.s32 s, s, k;
  setp.eq.s32 p, s, g;
  @p bra DONE;
  mov.b32 g, s; {guess}
DONE:
}}"""


def lanes_text() -> str:
    """PTX: $0..$4 are the results of `search`; $5 the row, $6 count, $7 S, $8 and $9 the addresses of both arrays."""
    chunks = [dict(u=u, skip=32 * u, least=LEAST) for u in range(_STRIDE)]
    looks, judges = (" ".join(part.format(**c) for c in chunks) for part in (_LOOK, _JUDGE))
    return _FIND.format(looks=looks, judges=judges, guess=_GUESS, least=LEAST, step=32 * _STRIDE)


def _search_lanes(row, count, loc, contexts):
    """`search` with a lane to every offset, until the first that lies past the row."""
    from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
    from jax._src.lib.mlir.dialects import llvm  # pyright: ignore[reportPrivateImportUsage]
    from jax.experimental.mosaic import gpu as mgpu

    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * 3), return_type=(scalar,) * 5
    )
    def find(_, loc, contexts, *scalars):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        results = llvm.StructType.get_literal([i32] * 5)
        places = [llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)) for ref in (loc, contexts)]
        operands = [*(x.registers.item() for x in scalars), *places]
        found = llvm.inline_asm(
            results, operands, lanes_text(), "=&r,=&r,=&r,=&r,=&r,r,r,r,l,l", has_side_effects=True
        )
        values = (llvm.extractvalue(i32, found, [n]) for n in range(5))
        return tuple(mgpu.FragmentedArray.splat(v, (), is_signed=True) for v in values)

    return find(loc, contexts, row, count, I32(contexts.shape[0]))
