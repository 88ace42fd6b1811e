"""From a call's arrays to the kernel and back: metadata, padding, the `pallas_call`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import layout
from rpa.backends.pallas_tpu import kernel, tiles
from rpa.backends.pallas_tpu.plan import TABLE_SLOTS, Plan
from rpa.backends.pallas_tpu.transfers import Refs
from rpa.signature import Inputs, Signature

NAME = "ragged_paged_attention"


def attend(inputs: Inputs, signature: Signature, plan: Plan, vmem_limit_bytes: int | None) -> tuple[Any, Any]:
    """The whole contract, inside jit: [T, Hq, D] in the queries' dtype, and f32 [T, Hq] or None."""
    rows, heads = signature.num_tokens, signature.num_q_heads
    if rows == 0 or signature.max_seqs == 0:
        output = jnp.zeros((rows, heads, signature.head_dim), signature.q_dtype)
        return output, jnp.full((rows, heads), -jnp.inf, jnp.float32) if signature.return_lse else None
    ragged = layout.sanitize(inputs, signature)
    work = tiles.build(ragged, signature, plan)
    output, lse = _call(inputs, signature, plan, work, ragged.tables, vmem_limit_bytes)
    if lse is not None:
        lse = tiles.row_lse(lse, work, signature, plan)
    return layout.finish(output.astype(signature.q_dtype), lse, signature, ragged)


def _call(inputs: Inputs, signature: Signature, plan: Plan, work: tiles.Tiles, tables, limit: int | None):
    pages = inputs.kv_pages
    if signature.num_pages == 0:  # no page is ever asked for, yet a transfer needs one to name
        pages = jnp.zeros((1, *pages.shape[1:]), pages.dtype)
    if signature.kv_dtype == "float16":
        pages = jax.lax.bitcast_convert_type(pages, jnp.int16)
    queries = inputs.queries.astype(plan.q_dtype)
    shapes = [jax.ShapeDtypeStruct(queries.shape, queries.dtype)]
    if plan.lse:
        count = work.row.shape[0]
        shapes.append(jax.ShapeDtypeStruct((count, plan.heads, 1, plan.packed_rows), jnp.float32))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    smem, vmem = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.VMEM)
    results = pl.pallas_call(
        lambda *refs: kernel.body(_name_refs(refs, plan), plan),
        name=NAME,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work),
            grid=(plan.cores,),
            in_specs=[smem, vmem, vmem, hbm, hbm, hbm],
            out_specs=[hbm] * len(shapes),
            scratch_shapes=_scratch(plan, pages.dtype),
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=limit,
            disable_bounds_checks=True,  # `sanitize` clamped every id; the interpreter checks regardless
        ),
    )(*work, _scales(inputs, plan), *_sinks(inputs, plan), queries, tiles.table_slices(tables, plan), pages)
    return results[0], results[1] if plan.lse else None


def _scratch(plan: Plan, stored: Any) -> list[Any]:
    """The scratch buffers in the order of `Refs`."""
    f32, kind = jnp.float32, jnp.dtype(plan.q_dtype)
    words = jnp.uint32 if plan.paired else f32
    operand = f32 if plan.f32_dots else jnp.bfloat16
    tile = (2, plan.block_q, plan.q_heads, plan.head_dim)
    packed = (plan.heads, 1, plan.packed_rows)
    rows = plan.heads * plan.decode_rows
    scratch = [
        pltpu.SMEM((8,), jnp.int32),
        pltpu.SMEM((TABLE_SLOTS * plan.table_entries,), jnp.int32),
        pltpu.VMEM((plan.buffers, plan.block_pages, plan.page, 2 * plan.heads, plan.head_dim), stored),
        pltpu.VMEM((plan.lane_tiles, plan.keys * plan.word_pitch, 128), words),
        pltpu.VMEM(tile, kind),
        pltpu.VMEM(tile, kind),
        pltpu.VMEM((plan.lane_tiles, plan.stage_rows, 128), f32),
        pltpu.VMEM((plan.heads, plan.packed_rows, plan.dim), operand),
        pltpu.VMEM(packed, f32),
        pltpu.VMEM(packed, f32),
        pltpu.VMEM((plan.heads, plan.dim, plan.packed_rows), f32),
        pltpu.VMEM((rows, 1), f32),
        pltpu.VMEM((rows, 1), f32),
        pltpu.VMEM((rows, plan.dim), f32),
    ]
    if plan.lse:
        scratch.append(pltpu.VMEM((2, *packed), f32))
    semaphores = (TABLE_SLOTS, plan.buffers, 2, 2, 2) if plan.lse else (TABLE_SLOTS, plan.buffers, 2, 2)
    return scratch + [pltpu.SemaphoreType.DMA((count,)) for count in semaphores]


def _name_refs(refs: tuple[Any, ...], plan: Plan) -> Refs:
    """The refs by name; without an lse its output, buffer and semaphore are None."""
    fields = len(tiles.Tiles._fields)
    work, rest = tiles.Tiles(*refs[:fields]), list(refs[fields:])
    if not plan.lse:
        for name in ("lse", "lse_tile", "lse_sem"):
            rest.insert(Refs._fields.index(name) - 1, None)
    return Refs(work, *rest)


def _scales(inputs: Inputs, plan: Plan) -> jax.Array:
    """f32 [2, heads]: key and value scales, 1 where the pages are not scaled."""
    one = jnp.ones(plan.heads, jnp.float32)
    return jnp.stack([one if s is None else s.astype(jnp.float32) for s in (inputs.k_scale, inputs.v_scale)])


def _sinks(inputs: Inputs, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The sinks, laid out like the running maxima of the two paths."""
    if inputs.softmax_aux is None:
        return jnp.zeros((1, 1, 128), jnp.float32), jnp.zeros((8, 1), jnp.float32)
    sink = inputs.softmax_aux.astype(jnp.float32).reshape(plan.heads, plan.group)
    lanes = jnp.repeat(sink, plan.block_q, axis=1)
    lanes = jnp.pad(lanes, ((0, 0), (0, plan.packed_rows - lanes.shape[1])))
    rows = jnp.pad(sink, ((0, 0), (0, plan.decode_rows - plan.group)))
    return lanes[:, None, :], rows.reshape(-1, 1)
