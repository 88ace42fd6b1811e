"""The launches of a plan through jax-triton, inside jit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rpa import device as devices
from rpa.backends.triton import plan as planning
from rpa.config import RaggedPageAttentionv2Config
from rpa.signature import Inputs, Signature


def scratch(signature: Signature, plan: planning.Plan) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of what the launches write: output, lse and the splits; one element where a call has none.

    All four always exist, because jax-triton passes buffers in the order inputs, outputs: a dummy input behind an
    output (in the kernel's order of parameters) would silently swap pointers.
    """
    rows, heads, dim = signature.num_tokens, signature.num_q_heads, signature.head_dim
    dtype = getattr(ml_dtypes, signature.q_dtype, signature.q_dtype)
    splits = (plan.slots, heads, plan.max_splits) if plan.combine else ()
    single = np.dtype("float32")
    return {
        "output": ((rows, heads, dim), np.dtype(dtype)),
        "lse": ((rows, heads) if signature.return_lse else (1,), single),
        "part_acc": ((*splits, dim) if splits else (1,), single),
        "part_ml": ((*splits, 2) if splits else (1,), single),
    }


def bind(inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """Every pointer argument by name; what a call does not have points at the context lengths and is never read."""
    arrays = {name: value for name, value in inputs.items() if value is not None} | outputs
    if "softmax_aux" in arrays:
        arrays["sinks"] = arrays.pop("softmax_aux")
    unused = arrays["context_lens"]
    optional = ("sinks", "k_scale", "v_scale")
    return {name: unused for name in optional if name not in arrays} | arrays


def run(inputs: Inputs, signature: Signature, config: RaggedPageAttentionv2Config) -> tuple[Any, Any]:
    """The whole contract inside jit: [T, Hq, D] in the queries' dtype, and f32 [T, Hq] or None."""
    shape = (signature.num_tokens, signature.num_q_heads)
    if signature.num_tokens == 0 or signature.max_seqs == 0:  # nothing to launch a grid over
        lse = jnp.full(shape, -jnp.inf, jnp.float32) if signature.return_lse else None
        return jnp.zeros((*shape, signature.head_dim), signature.q_dtype), lse
    if signature.num_pages == 0:  # every page id is invalid, but a pointer must point somewhere
        inputs = inputs._replace(kv_pages=jnp.zeros((1, *inputs.kv_pages.shape[1:]), inputs.kv_pages.dtype))
    plan = planning.make(signature, config)
    capability = devices.current(inputs.queries).capability
    outputs = _attend(inputs, signature, plan, capability)
    if plan.combine:
        outputs = _combine(inputs, signature, plan, outputs, capability)
    return outputs["output"], outputs["lse"] if signature.return_lse else None


def _attend(inputs: Inputs, signature: Signature, plan: planning.Plan, capability: Any) -> dict[str, jax.Array]:
    """The first launch: every row that has one split, and the splits of the others."""
    from rpa.backends.triton.kernel import attend_kernel

    outputs = {name: jax.ShapeDtypeStruct(*spec) for name, spec in scratch(signature, plan).items()}
    arrays = bind(inputs._asdict(), dict.fromkeys(outputs))
    given = {name: arrays[name] for name in arrays if name not in outputs}
    written = _call(attend_kernel, plan.attend, given, tuple(outputs.values()), capability)
    return dict(zip(outputs, written, strict=True))


def _combine(inputs: Inputs, signature: Signature, plan: planning.Plan, outputs: dict[str, jax.Array], capability: Any):
    """The second launch: rows of several splits, written in place."""
    from rpa.backends.triton.kernel import combine_kernel

    assert plan.combine is not None
    updated = {name: jax.new_ref(outputs[name]) for name in ("output", "lse")}
    arrays = bind(inputs._asdict(), outputs | updated)
    unused = ("queries", "kv_pages", "block_tables", "k_scale")
    _call(combine_kernel, plan.combine, {n: a for n, a in arrays.items() if n not in unused}, (), capability)
    return {name: jax.freeze(ref) for name, ref in updated.items()}


def _call(kernel: Any, launch: planning.Launch, arrays: dict[str, Any], out_type: Any, capability: Any) -> Any:
    """One `triton_call`; the kernel's parameters that `arrays` lacks are its outputs."""
    constants = dict(launch.constants)
    if "COMPUTE" in constants:
        constants["COMPUTE"] = _triton_dtype(constants["COMPUTE"])
    options = planning.compiler_options(launch, capability)
    return jax_triton().triton_call(
        kernel=kernel,
        out_type=out_type,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        compute_capability=None if capability is None else capability[0] * 10 + capability[1],
        backend_options=options,
        **arrays,
        **constants,
    )


def _triton_dtype(name: str) -> Any:
    import triton.language as tl

    return getattr(tl, name)


def jax_triton() -> Any:
    """The jax_triton module; triton 3.6 lacks a constant that it imports, without which it finds no NVIDIA backend."""
    import triton.backends.nvidia.driver as driver

    if not hasattr(driver, "TMA_TF32"):
        driver.TMA_TF32 = 11  # type: ignore[attr-defined]
    import jax_triton  # pyright: ignore[reportMissingImports]

    return jax_triton
