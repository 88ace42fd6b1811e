"""The public function: validate, select, run. One call, read top to bottom."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from rpa import device as devices
from rpa import select
from rpa import validate as rules
from rpa.config import RaggedPageAttentionv2Config
from rpa.registry import Implementation
from rpa.signature import Inputs, Signature


def ragged_page_attention_v2(
    queries: jax.Array,
    kv_pages: jax.Array,
    context_lens: jax.Array,
    block_tables: jax.Array,
    query_start_loc: jax.Array,
    num_seqs: jax.Array | int,
    softmax_aux: jax.Array | None = None,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    compute_dtype: Any = jnp.bfloat16,
    optimized: bool = False,
    sliding_window: int | None = None,
    mask_value: float | None = None,
    vmem_limit_bytes: int | None = None,
    platform: str | None = None,
    cfg: RaggedPageAttentionv2Config | None = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
    return_lse: bool = False,
    k_scale: Any = None,
    v_scale: Any = None,
    validate: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of ragged query rows over a paged KV cache.

    Args:
        queries: [T, Hq, D] f32, bf16 or f16; the query tokens of all sequences, concatenated.
        kv_pages: [P, page, 2 * Hkv, D]; key of kv head h at 2h, its value at 2h + 1. Also fp8 and int8.
        context_lens: int32 [S], tokens in the cache of each sequence, its query tokens included.
        block_tables: int32 [S, pages_per_seq], logical page to physical page.
        query_start_loc: int32 [S + 1]; sequence s owns rows query_start_loc[s] .. query_start_loc[s + 1] - 1.
        num_seqs: live sequences; metadata rows past it are never used.
        softmax_aux: [Hq] attention sinks, one logit a query head, in the denominator only.
        softmax_scale: multiplies q . k; `D ** -0.5` by default.
        logits_soft_cap: cap in `cap * tanh(x / cap)`; None leaves logits as they are.
        compute_dtype: what the operands of the two dot products are rounded to, None for the queries' own dtype;
            accumulation is f32.
        optimized: lets a backend schedule by the whole batch, giving up batch invariance.
        sliding_window: keys a row sees, its own included; None keeps all.
        mask_value: accepted for compatibility; masked keys weigh exactly 0 whatever it is.
        vmem_limit_bytes: limit for the TPU kernel; without effect elsewhere.
        platform: "triton", "pallas", "cuda", "xla", "auto" or None (auto).
        cfg: block sizes; None lets selection find them.
        mesh, in_specs, out_specs: run under `shard_map`; specs have defaults for the mesh.
        return_lse: also return the log-sum-exp, f32 [T, Hq].
        k_scale, v_scale: float or [Hkv]; `k = k_scale * stored`, `v = v_scale * stored`.
        validate: also check the values of metadata that lives on a device (waits for it).

    Returns:
        [T, Hq, D] in the dtype of `queries`; with `return_lse` a pair with f32 [T, Hq]. Rows that no sequence
        owns are 0 with lse -inf; rows that see no key are 0 with lse = sink or -inf.

    Raises:
        TypeError, ValueError: naming the argument, its value, the rule and, for metadata, the sequence.
    """
    arrays = (
        queries,
        kv_pages,
        context_lens,
        block_tables,
        query_start_loc,
        num_seqs,
        softmax_aux,
        k_scale,
        v_scale,
    )
    options = (softmax_scale, logits_soft_cap, compute_dtype, optimized, sliding_window, mask_value, vmem_limit_bytes,
               return_lse)  # fmt: skip
    inputs, signature = prepare(arrays, options, validate)
    _check_config(cfg)
    wanted = rules.platform_of(platform)
    if mesh is not None or in_specs is not None or out_specs is not None:
        from rpa import shard

        return shard.run(inputs, signature, wanted, cfg, mesh, in_specs, out_specs)
    return execute(inputs, signature, wanted, cfg)


def prepare(arrays: tuple, options: tuple, check_values: Any) -> tuple[Inputs, Signature]:
    """Validate a call and split it into its arrays and its static part."""
    (
        queries,
        kv_pages,
        context_lens,
        block_tables,
        query_start_loc,
        num_seqs,
        softmax_aux,
        k_scale,
        v_scale,
    ) = arrays
    queries = rules.float_array("queries", queries, 3, "[T, Hq, D]", rules.FLOATS)
    kv_dtypes = rules.FLOATS + rules.QUANTISED
    kv_pages = rules.float_array("kv_pages", kv_pages, 4, "[P, page, 2 * Hkv, D]", kv_dtypes)
    context_lens = rules.int_array("context_lens", context_lens, 1, "[S]")
    block_tables = rules.int_array("block_tables", block_tables, 2, "[S, pages_per_seq]")
    query_start_loc = rules.int_array("query_start_loc", query_start_loc, 1, "[S + 1]")
    rules.check_shapes(queries, kv_pages, context_lens, block_tables, query_start_loc)
    num_kv_heads = kv_pages.shape[2] // 2
    inputs = Inputs(
        queries, kv_pages, context_lens, block_tables, query_start_loc,
        rules.count_of(num_seqs, context_lens.shape[0]),
        rules.sinks_of(softmax_aux, queries.shape[1]),
        rules.head_scales("k_scale", k_scale, num_kv_heads),
        rules.head_scales("v_scale", v_scale, num_kv_heads),
    )  # fmt: skip
    signature = _signature(inputs, options)
    rules.check_metadata(inputs, signature, rules.flag("validate", check_values))
    return inputs, signature


def _signature(inputs: Inputs, options: tuple) -> Signature:
    scale, cap, compute_dtype, optimized, window, mask_value, vmem_limit, return_lse = options
    rules.check_mask_value(mask_value)
    num_tokens, num_q_heads, head_dim = inputs.queries.shape
    num_pages, page_size, combined, _ = inputs.kv_pages.shape
    max_seqs, pages_per_seq = inputs.block_tables.shape
    window = rules.window_of(window)
    if window is not None and window >= pages_per_seq * page_size:
        window = None  # no context is longer, so these are the bits of no window
    return Signature(
        num_tokens=num_tokens,
        num_q_heads=num_q_heads,
        head_dim=head_dim,
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=combined // 2,
        max_seqs=max_seqs,
        pages_per_seq=pages_per_seq,
        q_dtype=inputs.queries.dtype.name,
        kv_dtype=inputs.kv_pages.dtype.name,
        compute_dtype=rules.compute_dtype_of(compute_dtype, inputs.queries.dtype.name),
        sinks=inputs.softmax_aux is not None,
        k_scale=inputs.k_scale is not None,
        v_scale=inputs.v_scale is not None,
        return_lse=rules.flag("return_lse", return_lse),
        optimized=rules.flag("optimized", optimized),
        softmax_scale=rules.scale_of(scale, head_dim),
        logits_soft_cap=rules.cap_of(cap),
        sliding_window=window,
        vmem_limit_bytes=rules.limit_of(vmem_limit),
    )


def execute(
    inputs: Inputs, signature: Signature, platform: str, cfg: RaggedPageAttentionv2Config | None
) -> Any:
    """Select a backend and a config for a validated call, and run it."""
    if signature.num_tokens == 0 or signature.max_seqs == 0:
        return nothing_to_do(signature)
    device = devices.current(inputs.queries)
    choice = select.choose(signature, device, platform, cfg)
    output, lse = compiled(choice.implementation, signature, choice.config, device)(inputs)
    return (output, lse) if signature.return_lse else output


def nothing_to_do(signature: Signature) -> Any:
    """The answer where there is no row or no sequence: every row is nobody's."""
    shape = (signature.num_tokens, signature.num_q_heads)
    output = jnp.zeros((*shape, signature.head_dim), signature.q_dtype)
    return (output, jnp.full(shape, -jnp.inf, jnp.float32)) if signature.return_lse else output


@lru_cache(maxsize=4096)
def compiled(
    implementation: Implementation, signature: Signature, config: Any, device: devices.Device
) -> Any:
    """The jitted program; `device` is in the key because a program is lowered for one chip or interpreter."""

    def ragged_page_attention(inputs: Inputs) -> Any:
        return implementation.run(inputs, signature, config)

    return jax.jit(ragged_page_attention)


def _check_config(cfg: Any) -> None:
    if cfg is not None and not isinstance(cfg, RaggedPageAttentionv2Config):
        raise TypeError(f"cfg={cfg!r}: a RaggedPageAttentionv2Config or None is expected")
