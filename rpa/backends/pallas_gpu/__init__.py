"""The Hopper backend: Pallas Mosaic GPU kernels for sm_90, with TMA, wgmma and specialised warpgroups.

Short queries go through `decode` (memory bound, split over the cache) and `combine`; long ones through `prefill`
(compute bound); `plan` finds on the device which is which. `platform="pallas"` means this on an NVIDIA GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from rpa import device as devices
from rpa import layout, numerics
from rpa.backends.pallas_gpu import combine, decode, plan, prefill
from rpa.backends.pallas_gpu.tiles import Shape
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.registry import Implementation
from rpa.signature import Inputs, Signature

SMS = 132  # of an H100 or H200 SXM; on fewer, the CTAs of the persistent grids queue, on more some SMs idle
SMEM = 227 * 1024
RESERVED = 6 * 1024  # barriers and the reductions' scratch
LONG = 64  # mean query length from which every sequence takes the prefill role


class Program(NamedTuple):
    """The kernels of one signature; at least one of the two."""

    decode: decode.Tiling | None
    prefill: prefill.Tiling | None


def shape_of(signature: Signature) -> Shape:
    return Shape(
        tokens=signature.num_tokens,
        q_heads=signature.num_q_heads,
        kv_heads=signature.num_kv_heads,
        head_dim=signature.head_dim,
        page=signature.page_size,
        pages=max(signature.num_pages, 1),
        table_width=signature.pages_per_seq,
        dtype=signature.kv_dtype,
        scale=signature.softmax_scale,
        cap=signature.logits_soft_cap,
        window=signature.sliding_window,
    )


def program(signature: Signature, config: RaggedPageAttentionv2Config, interpreted: bool) -> Program:
    """Tile shapes from static shapes and the config alone, so that a row's bits depend on nothing else."""
    shape = shape_of(signature)
    tokens, sequences = signature.num_tokens, signature.max_seqs
    ctas = config.option("ctas", 2 if interpreted else SMS)
    if tokens <= 4 * sequences:
        return Program(decode_tiling(shape, tokens, config, ctas), None)
    tiling = prefill_tiling(
        shape, sequences, config, ctas, 1 if tokens >= LONG * sequences else 2, interpreted
    )
    if tokens >= LONG * sequences:
        return Program(None, tiling)
    return Program(decode_tiling(shape, sequences, config, ctas), tiling)


def decode_tiling(shape: Shape, rows: int, config: RaggedPageAttentionv2Config, ctas: int) -> decode.Tiling:
    workers = config.option("workers", 2 if shape.head_dim <= 128 else 1)
    block = config.option("decode_block", 64)
    slot = 2 * block * shape.head_dim * jnp.dtype(shape.dtype).itemsize
    small = 64 * (shape.head_dim + block)  # queries and weights of a worker, generously
    fits = ((SMEM - RESERVED) // workers - small) // slot
    stages = min(config.option("decode_stages", 8), fits)
    span = shape.capacity
    if shape.window is not None:
        span = min(span, shape.window + decode.piece(shape.page, block) - 1)
    wanted = config.num_kv_splits or max(1, workers * ctas // (rows * shape.kv_heads))
    chunk = max(-(-span // wanted), config.option("least_chunk", 256))
    chunk = -(-chunk // block) * block
    splits = -(-span // chunk)
    if splits > 64:
        chunk = -(-span // (64 * block)) * block
        splits = -(-span // chunk)
    return decode.Tiling(rows, block, stages, chunk, splits, workers, ctas)


def prefill_tiling(
    shape: Shape,
    sequences: int,
    config: RaggedPageAttentionv2Config,
    ctas: int,
    shortest: int,
    interpreted: bool,
) -> prefill.Tiling:
    block = config.option("prefill_block", 128 if shape.head_dim <= 128 else 64)
    stages = config.num_stages or config.option("prefill_stages", 2)
    size = jnp.dtype(shape.dtype).itemsize * shape.head_dim
    alias = (4 * prefill.M + 2 * stages * block) * size > SMEM - RESERVED
    tiling = prefill.Tiling(
        1, block, stages, ctas, fresh=interpreted or bool(config.option("fresh", 0)), staged=interpreted,
        turns=bool(config.option("turns", 1)), registers=(config.option("consumer_registers", 232), 40), alias=alias,
    )  # fmt: skip
    return tiling._replace(tiles=plan.tile_bound(shape, sequences, tiling.tokens(shape), shortest))


def run(inputs: Inputs, signature: Signature, config: RaggedPageAttentionv2Config):
    """The whole contract, inside jit: [T, Hq, D] in the queries' dtype and f32 [T, Hq] or None."""
    shape = shape_of(signature)
    todo = program(signature, config, devices.current(inputs.queries).interpreted)
    ragged = layout.sanitize(inputs, signature)
    pages = inputs.kv_pages
    if signature.num_pages == 0:  # no live sequence can see a key, yet a copy needs a page to name
        pages = jnp.zeros((1, *pages.shape[1:]), pages.dtype)
    inputs = inputs._replace(kv_pages=pages, queries=inputs.queries.astype(shape.dtype))
    if todo.prefill is None:
        rows = plan.decode_rows(ragged, inputs.num_seqs[0], signature.num_tokens)
        output, lse = decoded(inputs, rows, shape, todo.decode)
        output = output.astype(signature.q_dtype)
    else:
        output, lse = prefilled(inputs, ragged, signature, shape, todo)
    output, lse = layout.finish(output, lse if signature.return_lse else None, inputs, signature, ragged)
    return output, lse


def decoded(inputs: Inputs, rows, shape: Shape, tiling: decode.Tiling):
    """Output f32 [R, Hq, D] and lse [R, Hq] of decode rows (i32 [3, R])."""
    n, tokens = tiling.columns(shape), shape.tokens
    q = inputs.queries.reshape(tokens, shape.kv_heads, shape.group, shape.head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, n - shape.group), (0, 0))).reshape(-1, shape.head_dim)
    parts = decode.partials(q, inputs.kv_pages, inputs.block_tables, rows, shape, tiling)
    return combine.combine(parts, rows, inputs.softmax_aux, shape, tiling)


def prefilled(inputs: Inputs, ragged: layout.Ragged, signature: Signature, shape: Shape, todo: Program):
    """Output [T, Hq, D] and lse [T, Hq] of all rows that a valid sequence owns."""
    shortest = 1 if todo.decode is None else 2
    work = plan.prefill_tiles(ragged, shape, todo.prefill, shortest)
    tokens = max(-(-shape.tokens // 8) * 8, prefill.M)
    q = jnp.pad(inputs.queries, ((0, tokens - shape.tokens), (0, 0), (0, 0)))
    padded = Shape(**{**shape.__dict__, "tokens": tokens})
    output, lse = prefill.attend(
        q, inputs.kv_pages, inputs.block_tables, work.count, work.tiles, inputs.softmax_aux, padded, todo.prefill,
        signature.return_lse,
    )  # fmt: skip
    output = output[: shape.tokens].astype(signature.q_dtype)
    lse = None if lse is None else lse[:, : shape.tokens].T
    if todo.decode is None:
        return output, lse
    rows = plan.single_rows(ragged)
    single, single_lse = decoded(inputs, rows, shape, todo.decode)
    token = jnp.where(ragged.stop - ragged.start == 1, rows[0], shape.tokens)  # past the end: dropped
    output = output.at[token].set(single.astype(output.dtype), mode="drop")
    if lse is not None:
        lse = lse.at[token].set(single_lse, mode="drop")
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
    exact = numerics.claim(signature, device, 8)
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
