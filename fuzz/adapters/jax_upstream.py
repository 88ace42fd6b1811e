"""JAX's own ragged_paged_attention: the TPU kernel, and the reference that JAX tests it by (any device).

The reference returns live rows only and wants lengths it can read on the host; neither has sinks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as upstream


def _call(kernel: Any, q: Any, kv: Any, lens: Any, tables: Any, starts: Any, num_seqs: Any, options: dict[str, Any]):
    scale = q.shape[2] ** -0.5 if options["softmax_scale"] is None else options["softmax_scale"]
    return kernel(q, kv, lens, tables, starts, num_seqs, sm_scale=scale,
                  sliding_window=options["sliding_window"], soft_cap=options["logits_soft_cap"])  # fmt: skip


def attention(q: Any, kv: Any, lens: Any, tables: Any, starts: Any, num_seqs: Any, sinks: Any = None, **options: Any):
    """The Pallas TPU kernel."""
    return _call(upstream.ragged_paged_attention, q, kv, lens, tables, starts, num_seqs, options)


def reference(q: Any, kv: Any, lens: Any, tables: Any, starts: Any, num_seqs: Any, sinks: Any = None, **options: Any):
    """The reference; rows that nobody owns are filled with the zeros it leaves out."""
    live = _call(upstream.ref_ragged_paged_attention, q, kv, lens, tables, starts, num_seqs, options)
    return jnp.zeros(q.shape, q.dtype).at[: len(live)].set(live)


def _gap(case: Any) -> str | None:
    if case.softmax_aux is not None or case.quantised:
        return "it takes no sinks" if case.softmax_aux is not None else "it takes one scale for all heads"
    if case.compute_dtype not in (None, case.queries.dtype.name) or case.kv_pages.dtype != case.queries.dtype:
        return "it computes in the dtype of its inputs"
    return None


reference.supports = _gap  # type: ignore[attr-defined]
attention.supports = lambda case: (  # type: ignore[attr-defined]
    _gap(case) or (None if jax.default_backend() == "tpu" else f"it needs a TPU, this is {jax.default_backend()}")
)
attention.jax_arrays = reference.jax_arrays = True  # type: ignore[attr-defined]
