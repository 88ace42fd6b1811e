"""The Hopper backend: Pallas Mosaic GPU kernels for sm_90, with TMA, wgmma and specialised warpgroups.

Short queries go through `decode` (memory bound, split over the cache) and `combine`; long ones through `prefill`
(compute bound); `plan` finds on the device which is which. `platform="pallas"` means this on an NVIDIA GPU.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from rpa import device as devices
from rpa import numerics
from rpa.backends.pallas_gpu import combine, decode, mixed, plan, prefill
from rpa.backends.pallas_gpu.program import Program, program, shape_of
from rpa.backends.pallas_gpu.tiles import Shape
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.registry import Implementation
from rpa.signature import Inputs, Signature


def run(inputs: Inputs, signature: Signature, config: RaggedPageAttentionv2Config):
    """The whole contract, inside jit: [T, Hq, D] in the queries' dtype and f32 [T, Hq] or None."""
    shape = shape_of(signature)
    todo = program(signature, config, devices.current(inputs.queries).interpreted)
    pages = inputs.kv_pages
    if signature.num_pages == 0:  # no live sequence can see a key, yet a copy needs a page to name
        pages = jnp.zeros((1, *pages.shape[1:]), pages.dtype)
    inputs = inputs._replace(kv_pages=pages, queries=inputs.queries.astype(shape.dtype))
    own = plan.owners(inputs, shape)
    if todo.prefill is None:
        assert todo.decode is not None, "a program has at least one role"
        rows = plan.decode_rows(own, shape.tokens)
        units = plan.units_of_rows(rows, shape, todo.decode)
        parts = decode.partials(
            grouped(inputs.queries, shape),
            inputs.kv_pages,
            inputs.block_tables,
            units.fields,
            shape,
            todo.decode,
        )
        output, lse = combine.combine(parts, rows, units, inputs.softmax_aux, shape, todo.decode)
        output = output.astype(signature.q_dtype)
    else:
        output, lse = prefilled(inputs, own, signature, shape, todo)
    return output, lse if signature.return_lse else None


def grouped(queries, shape: Shape):
    """Query rows as decode reads them, [rows * Hkv * N, D]: each group padded to a multiple of eight heads."""
    n = -(-shape.group // 8) * 8
    q = queries.reshape(-1, shape.kv_heads, shape.group, shape.head_dim)
    return jnp.pad(q, ((0, 0), (0, 0), (0, n - shape.group), (0, 0))).reshape(-1, shape.head_dim)


def prefilled(inputs: Inputs, own: plan.Owners, signature: Signature, shape: Shape, todo: Program):
    """Output [T, Hq, D] and lse [T, Hq] or None, of every row."""
    assert todo.prefill is not None, "decode alone needs no tiles of prefill"
    shortest = 1 if todo.decode is None else 2
    work = plan.prefill_tiles(own, shape, todo.prefill, shortest)
    tokens = max(-(-shape.tokens // 8) * 8, prefill.M)
    q = jnp.pad(inputs.queries, ((0, tokens - shape.tokens), (0, 0), (0, 0)))
    padded, sinks = dataclasses.replace(shape, tokens=tokens), inputs.softmax_aux
    fills = plan.fills(own, shape.tokens)
    args = (q, inputs.kv_pages, inputs.block_tables, work.count, work.tiles, fills, sinks)
    if todo.decode is None:
        output, lse = prefill.attend(*args, padded, todo.prefill, signature.return_lse)
    else:
        rows = plan.single_rows(own)
        units = plan.live_units(rows, shape, todo.decode)
        first = jnp.minimum(own.start, shape.tokens - 1)
        singles = (grouped(inputs.queries[first], shape), units.fields)
        if todo.fused:
            both = (padded, todo.prefill, todo.decode)
            output, lse, parts = mixed.attend(*args, *singles, *both, signature.return_lse)
        else:
            output, lse = prefill.attend(*args, padded, todo.prefill, signature.return_lse)
            pages, tables = inputs.kv_pages, inputs.block_tables
            parts = decode.partials(singles[0], pages, tables, units.fields, shape, todo.decode)
    output = output[: shape.tokens].astype(signature.q_dtype)
    if lse is not None:
        owner = plan.decode_rows(own, shape.tokens)[3][:, None]
        lse = jnp.where(owner == 1, lse[:, : shape.tokens].T, jnp.where(owner == 2, jnp.nan, -jnp.inf))
    if todo.decode is None:
        return output, lse
    single, single_lse = combine.combine(parts, rows, units, sinks, shape, todo.decode)
    token = jnp.where(rows[3] == 1, own.start, shape.tokens)  # past the end: dropped
    output = output.at[token].set(single.astype(output.dtype), mode="drop", unique_indices=True)
    if lse is not None:
        lse = lse.at[token].set(single_lse, mode="drop", unique_indices=True)
    return output, lse


# ------------------------------------------------------------------ what it takes


def supports(signature: Signature, device: Device) -> str | None:
    """Why this call cannot run here, or None."""
    if device.capability != (9, 0):
        return f"it is written for compute capability 9.0, not {device.capability}; platform='triton' serves others"
    if signature.kv_dtype not in ("bfloat16", "float16"):
        return f"kv_pages of {signature.kv_dtype}: pages must be bfloat16 or float16; platform='triton' takes them"
    if signature.q_dtype != signature.kv_dtype:
        return f"queries of {signature.q_dtype} on pages of {signature.kv_dtype}: both must have one dtype"
    if signature.compute_dtype not in (signature.kv_dtype, "bfloat16"):
        return f"compute_dtype={signature.compute_dtype}: wgmma multiplies {signature.kv_dtype} pages as they are"
    if signature.k_scale or signature.v_scale:
        return "k_scale and v_scale are for quantised pages, which this kernel does not take yet"
    if signature.head_dim % 16 or signature.head_dim > 256:
        return f"head_dim={signature.head_dim}: a multiple of 16 up to 256 is needed for wgmma"
    if signature.page_size % 8:
        return (
            f"page size {signature.page_size}: a multiple of 8 is needed for TMA into swizzled shared memory"
        )
    return None


def heuristic(signature: Signature, device: Device) -> RaggedPageAttentionv2Config:
    del signature, device
    return RaggedPageAttentionv2Config(platform="pallas", backend="gpu")


def candidates(signature: Signature, device: Device) -> tuple[RaggedPageAttentionv2Config, ...]:
    base = heuristic(signature, device)
    several = [base]
    for workers in (1, 3):
        several.append(base.replace(options=(("workers", workers),)))
    return tuple(several)


def claim(signature: Signature, device: Device) -> dict:
    """Operands as stored, weights rounded once; tanh and exp2 are the hardware's approximations."""
    exact = numerics.claim(signature, device, 32)  # blocks of 64 keys at least, and the joins of splits
    dots = numerics.ROUNDOFF[signature.kv_dtype]
    return exact | {
        "u_in": 0.0,
        "u_p": dots,
        "eta_p": numerics.UNDERFLOW[signature.kv_dtype],
        "eps_tanh": 2.0**-10,
    }


BACKEND = Implementation(
    name="pallas_gpu", run=run, supports=supports, heuristic=heuristic, candidates=candidates, claim=claim
)
