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

from rpa.backends.pallas_gpu import decode, prefill, prefill_work
from rpa.backends.pallas_gpu.decode import Outputs
from rpa.backends.pallas_gpu.rows import Metadata
from rpa.backends.pallas_gpu.tiles import Heads, Shape


def attend(
    q, kv_pages, meta: Metadata, count, tiles, sinks, shape: Shape, tiling: prefill_work.Tiling, units,
    decoding: decode.Tiling, with_lse: bool,
):  # fmt: skip
    """`prefill.attend` on the listed tiles, `decode.attend` on the listed units: (output, lse or None, parts).

    With one split the decode rows' answers are in `output` already, and of `Outputs` there is nothing.
    """
    spare = 512 - 2 * tiling.registers[0] - tiling.registers[1]  # registers left to the decode warpgroup
    dims = (shape.tokens, shape.q_heads)
    types = Outputs(jax.ShapeDtypeStruct((*dims, shape.head_dim), jnp.dtype(shape.dtype)))
    if with_lse:
        types = types._replace(lse=jax.ShapeDtypeStruct(dims, jnp.float32))
    if decoding.splits > 1:
        parts = decode.result_types(shape, decoding, with_lse)
        types = parts._replace(output=types.output, lse=types.lse)

    def body(*refs):
        q_ref, kv_ref, *rest = refs
        meta_refs = Metadata(*(rest.pop(0) for _ in Metadata._fields))
        count_ref, tiles_ref = rest.pop(0), rest.pop(0)
        count_ref, fill_refs = prefill_work.told(count_ref, meta.tables.shape[0])
        unit_refs = decode.Listed(rest.pop(0), rest.pop(0))
        scalars = Heads(rest.pop(0) if sinks is not None else None)
        outs = Outputs(*(None if t is None else rest.pop(0) for t in types))
        s, d = rest
        s, d = prefill_work.unpacked(s, tiling), d.of(0, decoding)
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        @pl.when(wg == 3)
        def _():
            plgpu.set_max_registers(tiling.registers[1], action="decrease")

            @plgpu.warp_map
            def _(warp):
                warps = [(0,), (1,)] if tiling.apart else [(0, 1)]
                for w, streams in enumerate(warps):

                    @pl.when(warp == w)
                    def _(streams=streams):
                        work = meta_refs.tables, count_ref, tiles_ref
                        prefill.produce(streams, cta, q_ref, kv_ref, *work, s, shape, tiling)

                @pl.when(warp == len(warps))
                def _():
                    decode.produce(cta, q_ref, kv_ref, meta_refs, unit_refs, d, shape, decoding)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(spare, action="decrease")
            decode.consume(outs, scalars, d, shape, decoding)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(tiling.registers[0], action="increase")
            prefill.consume(wg, cta, count_ref, tiles_ref, scalars, outs.output, outs.lse, s, shape, tiling)
            pl.when(wg == 0)(lambda: prefill.fill(cta, fill_refs, outs.output, s, shape, tiling))

    args = [q, kv_pages, *meta, count, tiles, *units] + ([] if sinks is None else [sinks])
    results = plgpu.kernel(
        body,
        out_type=tuple(t for t in types if t is not None),
        scratch_types=(prefill_work.scratch_types(shape, tiling), decode.scratch_types(shape, decoding)),
        grid=(tiling.ctas,),
        grid_names=("cta",),
        num_threads=4,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="rpa_mixed",
    )(*args)
    results = list(results)
    done = Outputs(*(None if t is None else results.pop(0) for t in types))
    return done.output, done.lse, done
