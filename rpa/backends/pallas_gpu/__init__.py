"""The Hopper backend: Pallas Mosaic GPU kernels for sm_90, with TMA, wgmma and specialised warpgroups.

Short queries go through `decode` (memory bound, split over the cache) and `combine`; long ones through `prefill`
(compute bound); `plan` finds on the device which is which. `platform="pallas"` means this on an NVIDIA GPU.
"""

from __future__ import annotations

import jax.numpy as jnp

from rpa import device as devices
from rpa import numerics
from rpa.backends.pallas_gpu import combine, decode, mixed, plan, prefill, prefill_work
from rpa.backends.pallas_gpu.program import NARROW, Program, program, shape_of
from rpa.backends.pallas_gpu.rows import Metadata
from rpa.backends.pallas_gpu.tiles import Heads, Shape
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
    if todo.prefill is None:
        assert todo.decode is not None, "a program has at least one role"
        output, lse = decoded(inputs, shape, todo.decode, signature.return_lse)
    else:
        output, lse = prefilled(inputs, signature, shape, todo)
    return output.astype(signature.q_dtype), lse if signature.return_lse else None


def decoded(inputs: Inputs, shape: Shape, tiling: decode.Tiling, with_lse: bool):
    """Output [R, Hq, D] and lse f32 [R, Hq] or None of the decode rows: one kernel, and one more where they split."""
    q, sinks = padded_heads(inputs, shape)
    heads = Heads(sinks, inputs.k_scale, inputs.v_scale)
    done = decode.attend(q, inputs.kv_pages, metadata(inputs), None, heads, shape, tiling, with_lse)
    if tiling.splits == 1:
        return done.output, done.lse
    return combine.combine(done, sinks, shape, tiling, with_lse)


def metadata(inputs: Inputs) -> Metadata:
    return Metadata(inputs.context_lens, inputs.block_tables, inputs.query_start_loc, inputs.num_seqs)


def padded_heads(inputs: Inputs, shape: Shape):
    """Queries and sinks with as many heads as decode loads at once."""
    more = shape.loaded_heads - shape.q_heads
    if not more:
        return inputs.queries, inputs.softmax_aux
    sinks = None if inputs.softmax_aux is None else jnp.pad(inputs.softmax_aux, (0, more))
    return jnp.pad(inputs.queries, ((0, 0), (0, more), (0, 0))), sinks


def prefilled(inputs: Inputs, signature: Signature, shape: Shape, todo: Program):
    """Output [T, Hq, D] and lse [T, Hq] or None, of every row."""
    assert todo.prefill is not None, "decode alone needs no tiles of prefill"
    own, meta = plan.owners(inputs, shape), metadata(inputs)
    work, found = plan.listed(own, shape, todo.prefill, todo.decode)
    q, sinks = inputs.queries, inputs.softmax_aux
    if todo.decode is not None:
        q, sinks = padded_heads(inputs, shape)
    missing = max(-(-shape.tokens // 8) * 8, prefill_work.M) - shape.tokens  # a tile starts at whole eights of rows
    if missing:
        q = jnp.pad(q, ((0, missing), (0, 0), (0, 0)))
    heads, with_lse = Heads(sinks, inputs.k_scale, inputs.v_scale), signature.return_lse
    listed = (work.told, work.tiles)
    alone = (q, inputs.kv_pages, meta.tables, *listed, heads, shape, todo.prefill, with_lse)
    if todo.decode is None:
        output, lse = prefill.attend(*alone)
    else:
        units = decode.Listed(found.listed, found.through)
        if todo.fused:
            both = (*listed, sinks, shape, todo.prefill, units, todo.decode, with_lse)
            output, lse, parts = mixed.attend(q, inputs.kv_pages, meta, *both)
        else:
            output, lse = prefill.attend(*alone)
            parts = decode.attend(q, inputs.kv_pages, meta, units, heads, shape, todo.decode, with_lse)
        if todo.decode.splits > 1 or not todo.fused:
            parts = parts._replace(live=found.splits)
            output, lse = with_singles(output, lse, parts, own, found.start, sinks, shape, todo.decode)
    if lse is not None:
        owner = plan.row_owners(own, shape.tokens)[:, None]
        lse = jnp.where(owner == 1, lse, jnp.where(owner == 2, jnp.nan, -jnp.inf))
    return output, lse


def with_singles(
    output, lse, parts: decode.Outputs, own: plan.Owners, start, sinks, shape: Shape, tiling: decode.Tiling
):  # fmt: skip
    """Output and lse with the rows of the one-token sequences, which decode answered."""
    if tiling.splits > 1:
        return combine.combine(parts, sinks, shape, tiling, lse is not None, (output, lse, start))
    single = own.live & own.valid & (own.stop - own.start == 1)
    token = jnp.where(single, own.start, shape.tokens + jnp.arange(single.shape[0]))  # past the end: dropped
    here = jnp.minimum(own.start, shape.tokens - 1)
    output = output.at[token].set(parts.output[here], mode="drop", unique_indices=True)
    if lse is not None:
        lse = lse.at[token].set(parts.lse[here], mode="drop", unique_indices=True)
    return output, lse


# ------------------------------------------------------------------ what it takes


def supports(signature: Signature, device: Device) -> str | None:
    """Why this call cannot run here, or None."""
    if device.capability != (9, 0):
        return f"it is written for compute capability 9.0, not {device.capability}; platform='triton' serves others"
    q_dtype, kv_dtype = signature.q_dtype, signature.kv_dtype
    narrow = kv_dtype in NARROW
    if kv_dtype not in ("bfloat16", "float16") and not narrow:
        return f"kv_pages of {kv_dtype}: pages must be of 16 or 8 bits; platform='triton' takes others"
    if q_dtype not in ("bfloat16", "float16") or (q_dtype != kv_dtype and not narrow):
        return f"queries of {q_dtype} on pages of {kv_dtype}: both must be bfloat16, or float16, or the pages narrower"
    if signature.compute_dtype not in (q_dtype, "bfloat16"):
        return f"compute_dtype={signature.compute_dtype}: wgmma multiplies {q_dtype} queries as they are"
    if not narrow and (signature.k_scale or signature.v_scale):
        return f"k_scale and v_scale: pages of {kv_dtype} are multiplied as they are; scales are for pages of 8 bits"
    if signature.head_dim % 16 or signature.head_dim > 256:
        return f"head_dim={signature.head_dim}: a multiple of 16 up to 256 is needed for wgmma"
    decodes = signature.num_tokens <= 4 * signature.max_seqs  # as `program` has it
    if narrow and signature.head_dim > 192 and not decodes:
        rows = f"{signature.num_tokens} query rows of {signature.max_seqs} sequences"
        return f"head_dim={signature.head_dim} with pages of {kv_dtype} and {rows}: no registers left to convert them"
    if narrow and signature.head_dim % 64:
        return f"head_dim={signature.head_dim} with pages of {kv_dtype}: a multiple of 64 is needed to convert them"
    if signature.page_size % 8:
        return (
            f"page size {signature.page_size}: a multiple of 8 is needed for TMA into swizzled shared memory"
        )
    return None


def heuristic(signature: Signature, device: Device) -> RaggedPageAttentionv2Config:
    del signature, device
    return RaggedPageAttentionv2Config(platform="pallas", backend="gpu")


# What is worth measuring of each role; where two give one program, the tuner times one.
DECODES = (("workers", 1), ("workers", 2), ("workers", 3), ("workers", 4), ("least_chunk", 128), ("least_chunk", 1024),
           ("decode_block", 128))  # fmt: skip
PREFILLS = (("queries", 1), ("queries", 2), ("near", 0), ("near", 12), ("near", 24), ("apart", 0), ("peek", 0),
            ("prefill_block", 64), ("prefill_block", 128), ("turns", 0), ("packed", 0))  # fmt: skip
MIXES = (("mixed_chunk", 1024), ("mixed_chunk", 4096), ("mixed_stages", 2), ("turns", 0))


def candidates(signature: Signature, device: Device) -> tuple[RaggedPageAttentionv2Config, ...]:
    base = heuristic(signature, device)
    todo = program(signature, base, device.interpreted)
    if todo.prefill is None:
        several = DECODES
    elif todo.decode is None:
        several = PREFILLS
    else:
        several = MIXES if todo.fused else DECODES + PREFILLS
    return (base, *(config for option in several if fits(signature, config := base.replace(options=(option,)), device)))


def fits(signature: Signature, config: RaggedPageAttentionv2Config, device: Device) -> bool:
    """Whether shared memory holds what the options ask for."""
    try:
        program(signature, config, device.interpreted)
    except ValueError:
        return False
    return True


EPS_TANH = 2.0**-10  # `python -m fuzz.adapters.mosaic_sweep` measures it


def claim(signature: Signature, device: Device) -> dict:
    """Operands as stored, weights rounded once; tanh and exp2 are the hardware's approximations."""
    exact = numerics.claim(signature, device, 32)  # blocks of 64 keys at least, and the joins of splits
    dots = signature.q_dtype
    # Floats of 8 bits are multiplied in float16; `halved` queries lose far less than float16's underflow.
    lost = numerics.UNDERFLOW["float16" if signature.kv_dtype.startswith("float8") else dots]
    return exact | {
        "u_in": 0.0,
        "u_p": numerics.ROUNDOFF[dots],
        "eta_p": lost,
        "eta_in": lost,
        "eps_tanh": EPS_TANH,
    }


BACKEND = Implementation(
    name="pallas_gpu", run=run, supports=supports, heuristic=heuristic, candidates=candidates, claim=claim
)
