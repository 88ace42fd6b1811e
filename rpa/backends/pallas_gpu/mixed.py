# Pallas refs and transforms are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
"""Decode and prefill in one CTA: the bytes of one under the arithmetic of the other.

Warpgroups 0 and 1 fold prefill tiles, warpgroup 2 decode rows, and two warps of warpgroup 3 feed them, each role
through its own ring and work list. Decode's loads are then in flight while the tensor cores work on prefill, on every
SM, which neither two kernels on two streams nor a division of the SMs achieves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu import decode, prefill
from rpa.backends.pallas_gpu.tiles import Shape


def attend(
    q, kv_pages, tables, count, tiles, fills, sinks, singles, units, shape: Shape, tiling: prefill.Tiling,
    decoding: decode.Tiling, with_lse: bool,
):  # fmt: skip
    """`prefill.attend` on the listed tiles and `decode.partials` on the units: (output, lse or None, partials).

    Args:
        singles: the queries as decode reads them. units: i32 [5, units]. The rest as `prefill.attend`.
    """
    spare = 512 - 2 * tiling.registers[0] - tiling.registers[1]  # registers left to the decode warpgroup

    def body(*refs):
        q_ref, kv_ref, tables_ref, count_ref, tiles_ref, fills_ref, singles_ref, units_ref, *rest = refs
        sinks_ref = rest.pop(0) if sinks is not None else None
        o_ref, acc_ref, m_ref, l_ref = (rest.pop(0) for _ in range(4))
        lse_ref = rest.pop(0) if with_lse else None
        s, d = rest
        s = prefill.unpacked(s, tiling)
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        @pl.when(wg == 3)
        def _():
            plgpu.set_max_registers(tiling.registers[1], action="decrease")

            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    prefill.produce(cta, q_ref, kv_ref, tables_ref, count_ref, tiles_ref, s, shape, tiling)

                @pl.when(warp == 1)
                def _():
                    decode.produce(cta, singles_ref, kv_ref, tables_ref, units_ref, d, shape, decoding)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(spare, action="decrease")
            decode.consume(cta, units_ref, acc_ref, m_ref, l_ref, d, shape, decoding)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(tiling.registers[0], action="increase")
            prefill.consume(wg, cta, count_ref, tiles_ref, sinks_ref, o_ref, lse_ref, s, shape, tiling)
            pl.when(wg == 0)(lambda: prefill.fill(cta, fills_ref, o_ref, s, shape, tiling))

    outs = [jax.ShapeDtypeStruct((shape.tokens, shape.q_heads, shape.head_dim), jnp.dtype(shape.dtype))]
    outs += decode.partial_types(shape, decoding)
    if with_lse:
        outs.append(jax.ShapeDtypeStruct((shape.q_heads, shape.tokens), jnp.float32))
    args = [q, kv_pages, tables, count, tiles, fills, singles, units] + ([] if sinks is None else [sinks])
    output, acc, m, l, *lse = plgpu.kernel(
        body,
        out_type=tuple(outs),
        scratch_types=(prefill.scratch_types(shape, tiling), decode.scratch_types(shape, decoding)),
        grid=(tiling.ctas,),
        grid_names=("cta",),
        num_threads=4,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=decode.REDUCTION),
        kernel_name="rpa_mixed",
    )(*args)
    return output, lse[0] if with_lse else None, (acc, m, l)
