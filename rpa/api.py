"""The public function: validate, select, run. One call, read top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpa import device as devices
from rpa import select, shard
from rpa import validate as rules
from rpa.arguments import Options, prepare
from rpa.config import RaggedPageAttentionv2Config
from rpa.mesh import explicit
from rpa.program import compiled, nothing_to_do
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
    arrays = Inputs._make((queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, softmax_aux,
                           k_scale, v_scale))  # fmt: skip
    options = Options(softmax_scale, logits_soft_cap, compute_dtype, optimized, sliding_window, mask_value,
                      vmem_limit_bytes, return_lse)  # fmt: skip
    return call(arrays, options, platform, cfg, mesh, in_specs, out_specs, validate=validate)


def call(
    arrays: Inputs, options: Options, platform: Any, cfg: Any, mesh: Any, in_specs: Any, out_specs: Any,
    check_vma: bool = False, validate: Any = False,
) -> Any:  # fmt: skip
    """The public function on its arguments in order: a call whose facts were seen before goes by its plan."""
    over = None if mesh is in_specs is out_specs is None else (mesh, in_specs, out_specs, check_vma)
    moment = select.moment()
    facts = _facts(arrays, (*options, platform, cfg, over)) if moment and validate is False else None
    try:
        plan = _PLANS.get(facts)
    except TypeError:  # an argument that cannot be hashed
        facts = plan = None
    if plan is not None and plan.moment == moment:
        return plan.run(arrays)
    inputs, signature = prepare(arrays, options, validate)
    program, lasting = _program(inputs, signature, rules.platform_of(platform), check_config(cfg), over)
    plan = _plan_of(arrays, inputs, signature, program, moment)
    if facts is None or not lasting:
        return plan.run(inputs)
    if len(_PLANS) >= 8192:  # one for each `num_seqs`
        _PLANS.clear()
    _PLANS[facts] = plan
    return plan.run(arrays)  # as given: the calls after this one meet the program that it compiles


def _program(inputs: Inputs, signature: Signature, platform: str, cfg: Any, over: Any) -> tuple[Any, bool]:
    """Select: what computes a validated call, `Inputs -> (output, lse)`, and whether it will do for its likes."""
    if over is not None:
        return shard.program(inputs, signature, platform, cfg, *over), True
    if found := explicit(inputs):  # another call's arrays, of the same types, may lie on other devices
        return shard.program(inputs, signature, platform, cfg, *found, None, False), False
    if signature.num_tokens == 0 or signature.max_seqs == 0:
        return lambda inputs: nothing_to_do(signature), True
    device = devices.current(inputs.queries)
    choice = select.choose(select.Attention(signature, device, platform, cfg, concrete(inputs)))
    return compiled(choice.implementation, signature, choice.config, device), not choice.of_this_batch


def call_of(given: Mapping[str, Any]) -> select.Attention:
    """What selection has to know about a call, from the public function's arguments by name."""
    options = Options(*(given.get(name, default) for name, default in Options._field_defaults.items()))
    inputs, signature = prepare(tuple(map(given.get, Inputs._fields)), options, given.get("validate", False))
    cfg, platform = check_config(given.get("cfg")), rules.platform_of(given.get("platform"))
    device, sharding = devices.current(inputs.queries), "none"
    over = tuple(map(given.get, ("mesh", "in_specs", "out_specs")))
    over = explicit(inputs) if over == (None,) * 3 else over
    if over is not None:
        signature, device, layout = shard.share_of(inputs, signature, *over[:2])
        sharding = layout.label
    return select.Attention(signature, device, platform, cfg, concrete(inputs), sharding)


def concrete(inputs: Inputs) -> Inputs | None:
    """The arrays where a tuner could run on them; inside jit there are none."""
    return None if any(rules.is_traced(array) for array in inputs) else inputs


def check_config(cfg: Any) -> Any:
    if cfg is not None and not isinstance(cfg, RaggedPageAttentionv2Config):
        raise TypeError(f"cfg={cfg!r}: a RaggedPageAttentionv2Config or None is expected")
    return cfg


# ------------------------------------------------------------------ warm calls
# A call whose static facts were seen before skips their validation and selection; host metadata is still checked.


class Plan(NamedTuple):
    """What a call with known facts does."""

    program: Any
    signature: Signature
    moment: Any  # what the choice depended on besides the call
    fixed: tuple[tuple[int, Any], ...]  # scalars in their final form, by position; their values are among the facts
    wide: tuple[int, ...]  # host metadata to narrow to int32
    check: bool  # whether there are host metadata to check
    scales: tuple[int, ...]  # scales on the host, whose values are checked at every call

    def run(self, arrays: Inputs) -> Any:
        inputs = arrays
        if self.fixed or self.wide:
            values: list[Any] = list(arrays)
            for i, value in self.fixed:
                values[i] = value
            for i in self.wide:
                values[i] = rules.int_array(Inputs._fields[i], values[i], values[i].ndim, "")
            inputs = Inputs(*values)
        if self.check and not rules.plainly_right(inputs, self.signature):
            rules.check_metadata(inputs, self.signature, False)
        for i in self.scales:
            if not np.isfinite(np.asarray(inputs[i])).all():
                rules.head_scales(Inputs._fields[i], inputs[i], self.signature.num_kv_heads)
        output, lse = self.program(inputs)
        return (output, lse) if self.signature.return_lse else output


def _plan_of(arrays: tuple[Any, ...], inputs: Inputs, signature: Signature, program: Any, moment: Any) -> Plan:
    scalars = [i for i, value in enumerate(arrays) if type(value) in (int, float)]
    fixed = tuple((i, inputs[i] if i < 6 else jnp.asarray(inputs[i])) for i in scalars)  # scales stay on the device
    host = [isinstance(array, np.ndarray) for array in arrays]
    wide = tuple(i for i in range(2, 6) if host[i] and arrays[i].dtype != np.int32)
    check = any(rules.is_host(array) for array in arrays[2:6])
    return Plan(program, signature, moment, fixed, wide, check, tuple(i for i in (7, 8) if host[i]))


_PLANS: dict[Any, Plan] = {}
_DEVICE, _HOST, _SCALAR, _OTHER = range(4)
_KINDS: dict[type, int] = {type(None): _SCALAR, int: _SCALAR, float: _SCALAR, np.ndarray: _HOST}


def _facts(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """Everything static about a call, and its scalars, as one value; None for what is not remembered."""
    facts: list[Any] = [devices.current(arrays[0])]
    for i, value in enumerate(arrays):
        kind = _KINDS.get(type(value))
        if kind is None:
            array = isinstance(value, jax.Array) and not rules.is_traced(value)
            kind = _KINDS[type(value)] = _DEVICE if array else _OTHER
        if kind == _DEVICE:
            facts.append(value.aval)  # shape and dtype, and it remembers its hash
        elif kind == _HOST and value.ndim and (i < 6 or value.dtype == np.float32):  # else it has to be converted
            facts += value.shape, value.dtype, "host"
        elif kind == _SCALAR:
            facts += type(value), value
        else:
            return None
    facts += options
    facts += map(type, options)  # True == 1 == 1.0, and they are not the same option
    return tuple(facts)
