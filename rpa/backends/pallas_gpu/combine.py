# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false
"""Joins the splits of decode rows: the second of the two kernels of a call whose rows are split.

A warpgroup takes one kv head of one row, 64 of its columns at a time, and reads several splits at once, since what it
waits for is their latency.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu import decode
from rpa.backends.pallas_gpu.decode import COLUMNS, WG, Outputs, across, heads_at, normalised
from rpa.backends.pallas_gpu.tiles import FLOOR, I32, Shape, ceil_div

SLICE = 64  # of the head size
GROUPS = 1  # warpgroups a CTA: more would share its way to the last-level cache
EAGER = 1 << 20  # numbers of all parts, 4 MiB


def combine(parts: Outputs, sinks, shape: Shape, tiling: decode.Tiling, with_lse: bool, into=None):
    """(output [R, Hq, D], lse f32 [R, Hq] or None) of the decode rows, nobody's and invalid sequences' included.

    Args:
        sinks: f32 [heads] or None.
        into: (output [T, Hq, D], lse f32 [T, Hq] or None, i32 [R] first query row of each sequence): what is to be
            returned but for the rows of decode.
    """
    n, d = shape.columns, shape.head_dim
    slices = d // SLICE
    work = tiling.rows * shape.kv_heads * slices
    ctas = min(ceil_div(work, GROUPS), 8 * tiling.ctas)

    def body(acc_ref, m_ref, l_ref, live_ref, *rest):
        rest = list(rest)
        sinks_ref = rest.pop(0) if sinks is not None else None
        start_ref = rest.pop(0) if into is not None else None
        o_ref = rest.pop(0)
        lse_ref = rest.pop(0) if with_lse else None
        out, stage = rest
        wg = lax.axis_index("wg")
        me = lax.axis_index("cta") * GROUPS + wg

        def one(index, row, token, live):
            column = lax.rem(index, I32(slices)) * SLICE
            head = lax.rem(lax.div(index, I32(slices)), I32(shape.kv_heads))
            acc, m, l = joined(row, head, column, live, acc_ref, m_ref, l_ref, shape, tiling)
            first, before = heads_at(head, shape)
            sink = None
            if sinks_ref is not None:
                sink = plgpu.load(sinks_ref.at[pl.ds(first, n)], layout=COLUMNS, optimized=False)
            result, lse = normalised(acc, m, l, sink, live > 0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
            out.at[wg].transpose((1, 0))[...] = result.astype(shape.dtype)
            stage[wg] = lse
            plgpu.commit_smem()
            heads = pl.ds(head * shape.group, shape.group)
            target = o_ref.at[token, heads, pl.ds(column, SLICE)]
            plgpu.copy_smem_to_gmem(out.at[wg, pl.ds(before, shape.group)], target)
            if lse_ref is not None:

                @pl.loop(0, jnp.where(column == 0, shape.group, 0))
                def _(j):
                    lse_ref[token, head * shape.group + j] = stage[wg, before + j]

        @pl.loop(0, lax.div(jnp.maximum(work - me + (GROUPS * ctas - 1), 0), I32(GROUPS * ctas)))
        def _(i):
            index = me + i * GROUPS * ctas
            row = lax.div(index, I32(slices * shape.kv_heads))
            live = live_ref[row]
            if start_ref is None:
                one(index, row, row, live)
            else:
                pl.when(live > 0)(lambda: one(index, row, start_ref[row], live))

        plgpu.wait_smem_to_gmem(0)

    dims = (tiling.rows, shape.q_heads)
    types = [jax.ShapeDtypeStruct((*dims, d), jnp.dtype(shape.dtype))]
    if with_lse:
        types.append(jax.ShapeDtypeStruct(dims, jnp.float32))
    arguments = [parts.acc, parts.m, parts.l, parts.live, *([] if sinks is None else [sinks])]
    targets = []
    if into is not None:
        output, lse, start = into
        types, targets = [], [jax.new_ref(x) for x in (output, lse) if x is not None]
        arguments += [start, *targets]
    results = plgpu.kernel(
        body,
        out_type=tuple(types),
        scratch_types=(
            plgpu.SMEM((GROUPS, n, SLICE), jnp.dtype(shape.dtype)),
            plgpu.SMEM((GROUPS, n), jnp.float32),
        ),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=GROUPS,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="rpa_combine",
    )(*arguments)
    results = [ref[...] for ref in targets] or results
    return results[0], results[1] if with_lse else None


def joined(row, head, column, live, acc_ref, m_ref, l_ref, shape: Shape, tiling: decode.Tiling):
    """Unnormalised (acc [SLICE, N], m [N], l [N]) of a row's live splits, several loaded at once."""
    n = shape.columns
    together = max(1, min(tiling.splits, 256 // n))  # what registers hold
    # Of few parts all are loaded, the dead ones too: waiting for `live` first would be most of this kernel's time.
    eager = tiling.splits <= together and tiling.units * shape.kv_heads * shape.head_dim * n <= EAGER
    most = tiling.splits if eager else live
    if tiling.singles and not eager:
        together = min(together, 4)  # most rows have fewer parts

    def fold(step, carry):
        acc, m, l = carry
        splits = [step * together + j for j in range(together)]
        items = [(jnp.minimum(c, most - 1) * tiling.rows + row) * shape.kv_heads + head for c in splits]
        parts = [
            plgpu.load(acc_ref.at[item, pl.ds(column, SLICE)], layout=WG, optimized=False) for item in items
        ]
        ms, ls = (
            [plgpu.load(ref.at[item], layout=COLUMNS, optimized=False) for item in items] for ref in (m_ref, l_ref)
        )
        ms = [kept(c < live, x, FLOOR) for c, x in zip(splits, ms, strict=True)]
        top = functools.reduce(jnp.maximum, ms, m)
        scale = jnp.exp2(m - top)
        acc, l = acc * across(scale, acc), l * scale
        for c, x, y, z in zip(splits, ms, ls, parts, strict=True):
            weight = jnp.exp2(x - top)
            acc, l = acc + across(weight, acc) * kept(c < live, z, 0.0), l + weight * kept(c < live, y, 0.0)
        return acc, top, l

    start = (
        plgpu.layout_cast(jnp.zeros((SLICE, n), jnp.float32), WG),
        plgpu.layout_cast(jnp.full((n,), FLOOR, jnp.float32), COLUMNS),
        plgpu.layout_cast(jnp.zeros((n,), jnp.float32), COLUMNS),
    )
    return fold(0, start) if eager else lax.fori_loop(0, ceil_div(live, together), fold, start)


def kept(condition, x, otherwise: float):
    """`x` where one condition holds, else that number everywhere: parts that no split wrote may hold anything."""
    return jnp.where(lax.broadcast(condition, x.shape), x, otherwise)
