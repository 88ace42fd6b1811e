"""The public function: validate, select, run. One call, read top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpa import device as devices
from rpa import select
from rpa import validate as rules
from rpa.config import RaggedPageAttentionv2Config
from rpa.program import compiled
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
    arrays = (queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, softmax_aux,
              k_scale, v_scale)  # fmt: skip
    options = (softmax_scale, logits_soft_cap, compute_dtype, optimized, sliding_window, mask_value, vmem_limit_bytes,
               return_lse)  # fmt: skip
    if mesh is not None or in_specs is not None or out_specs is not None:
        from rpa import shard

        return shard.run(arrays, options, validate, platform, cfg, mesh, in_specs, out_specs)
    key = None if validate is not False else _facts(arrays, (*options, platform, cfg))
    plan = None if key is None else _PLANS.get(key)
    if plan is not None and plan.moment == select.moment():
        return plan.run(arrays)
    inputs, signature = prepare(arrays, options, validate)
    choice = _choose(inputs, signature, platform, cfg)
    if choice is None:
        return nothing_to_do(signature)
    device = devices.current(inputs.queries)
    if key is not None and select.is_plain():
        _remember(key, arrays, inputs, signature, choice, device)
    return run_on(choice.implementation, inputs, signature, choice.config, device)


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
    inputs: Inputs,
    signature: Signature,
    platform: str | None,
    cfg: RaggedPageAttentionv2Config | None,
    chain: select.ConfigSelectorChain | None = None,
) -> Any:
    """Select a backend and a config for a validated call, and run it."""
    choice = _choose(inputs, signature, platform, cfg, chain)
    if choice is None:
        return nothing_to_do(signature)
    device = devices.current(inputs.queries)
    return run_on(choice.implementation, inputs, signature, choice.config, device)


def _choose(
    inputs: Inputs, signature: Signature, platform: Any, cfg: Any, chain: Any = None, *, dry: bool = False
) -> select.Choice | None:
    """The choice for a validated call; None where there is nothing to compute."""
    platform = rules.platform_of(platform)
    check_config(cfg)
    if signature.num_tokens == 0 or signature.max_seqs == 0:
        return None
    concrete = None if any(rules.is_traced(array) for array in inputs) else inputs
    device = devices.current(inputs.queries)
    return select.choose(signature, device, platform, cfg, inputs=concrete, chain=chain, dry=dry)


def run_on(
    implementation: Implementation, inputs: Inputs, signature: Signature, config: Any, device: devices.Device
) -> Any:
    """Run a validated call on exactly this backend and config."""
    output, lse = compiled(implementation, signature, config, device)(inputs)
    return (output, lse) if signature.return_lse else output


def nothing_to_do(signature: Signature) -> Any:
    """The answer where there is no row or no sequence: every row is nobody's."""
    shape = (signature.num_tokens, signature.num_q_heads)
    output = jnp.zeros((*shape, signature.head_dim), signature.q_dtype)
    return (output, jnp.full(shape, -jnp.inf, jnp.float32)) if signature.return_lse else output


def check_config(cfg: Any) -> None:
    if cfg is not None and not isinstance(cfg, RaggedPageAttentionv2Config):
        raise TypeError(f"cfg={cfg!r}: a RaggedPageAttentionv2Config or None is expected")


# ------------------------------------------------------------------ warm calls
# A call whose static facts were seen before skips their validation and selection; host metadata is still checked.


class Plan(NamedTuple):
    """What a call with known facts does."""

    program: Callable[[Inputs], Any]
    signature: Signature
    moment: tuple[Any, ...]  # what the choice depended on besides the call
    convert: tuple[tuple[int, Callable[[Any], Any]], ...]  # host values that change form, by position
    check: bool  # whether there are host metadata to check

    def run(self, arrays: tuple[Any, ...]) -> Any:
        values = list(arrays)
        for position, form in self.convert:
            values[position] = form(values[position])
        inputs = Inputs(*values)
        if self.check and not rules.plainly_right(inputs, self.signature):
            rules.check_metadata(inputs, self.signature, False)
        output, lse = self.program(inputs)
        return (output, lse) if self.signature.return_lse else output


_PLANS: dict[Any, Plan] = {}


def _facts(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """Everything static about a call as a hashable value; None for what is not worth remembering."""
    facts: list[Any] = [devices.current(arrays[0])]
    for value in arrays:
        kind = _KINDS.get(type(value)) or _kind(value)
        if kind == "array":
            facts.append((value.shape, value.dtype))
        elif kind == "host":
            facts.append((value.shape, value.dtype, kind))
        elif kind == "other":
            return None
        else:
            facts.append(kind)
    facts += options
    facts += map(type, options)  # True == 1 == 1.0, and they are not the same option
    key = tuple(facts)
    try:
        hash(key)
    except TypeError:
        return None
    return key


_KINDS: dict[type, str] = {type(None): "none", int: "int", float: "float", np.ndarray: "host"}


def _kind(value: Any) -> str:
    """What an argument of this type is: "array" on a device, "host", a scalar's name, or "other"."""
    array = isinstance(value, jax.Array) and not rules.is_traced(value)
    _KINDS[type(value)] = kind = "array" if array else "other"
    return kind


def _remember(
    key: Any,
    arrays: tuple[Any, ...],
    inputs: Inputs,
    signature: Signature,
    choice: Any,
    device: devices.Device,
) -> None:
    """Keep the choice for calls with the same facts."""
    if len(_PLANS) >= 1024:
        _PLANS.clear()
    forms = _forms(signature)
    host = [rules.is_host(value) for value in arrays]
    convert = tuple((i, forms[i]) for i in range(len(arrays)) if host[i] and inputs[i] is not arrays[i])
    program = compiled(choice.implementation, signature, choice.config, device)
    _PLANS[key] = Plan(program, signature, select.moment(), convert, any(host[2:6]))


def _forms(signature: Signature) -> tuple[Callable[[Any], Any], ...]:
    """How each argument becomes a field of `Inputs`; an array on a device changes form inside the program."""
    heads = signature.num_kv_heads
    return (
        np.asarray,
        np.asarray,
        lambda value: rules.int_array("context_lens", value, 1, "[S]"),
        lambda value: rules.int_array("block_tables", value, 2, "[S, pages_per_seq]"),
        lambda value: rules.int_array("query_start_loc", value, 1, "[S + 1]"),
        lambda value: rules.count_of(value, signature.max_seqs),
        lambda value: rules.sinks_of(value, signature.num_q_heads),
        lambda value: rules.head_scales("k_scale", value, heads),
        lambda value: rules.head_scales("v_scale", value, heads),
    )
