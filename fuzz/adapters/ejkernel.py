"""ejkernel's ragged_page_attention_v2, XLA path: the same arguments, but `softmax_aux` is a keyword."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from ejkernel.kernels._xla.ragged_page_attention_v2 import ragged_page_attention_v2  # type: ignore[import-not-found]


def attention(q: Any, kv: Any, lens: Any, tables: Any, starts: Any, num_seqs: Any, sinks: Any = None, **options: Any):
    """The contract's arguments; `compute_dtype` arrives by name."""
    options["compute_dtype"] = jnp.dtype(options["compute_dtype"])
    return ragged_page_attention_v2(q, kv, lens, tables, starts, num_seqs, softmax_aux=sinks, **options)


attention.jax_arrays = True  # type: ignore[attr-defined]
attention.supports = lambda case: "it takes no quantised pages" if case.quantised else None  # type: ignore[attr-defined]


def finite(*arrays: Any, **options: Any):
    """The same, spared NaN in slots nobody owns: what else it gets wrong."""
    return attention(*arrays, **options)


finite.jax_arrays = finite.finite_slots = True  # type: ignore[attr-defined]
finite.supports = attention.supports  # type: ignore[attr-defined]
