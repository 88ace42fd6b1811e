"""tpu-inference's v3 kernel: it writes new tokens into its cache itself, packs heads by 32 bits, pads D to 128."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def attention(q: Any, kv: Any, lens: Any, tables: Any, starts: Any, num_seqs: Any, sinks: Any = None, **options: Any):
    """The contract's call: the last tokens of each sequence are taken out of the pages and handed over as new."""
    from tpu_inference.kernels.ragged_paged_attention.v3.kernel import (  # type: ignore[import-not-found]
        ragged_paged_attention,
    )

    pages, page, combined, dim = kv.shape
    packing = 4 // kv.dtype.itemsize
    cache = jnp.pad(kv, ((0, 0), (0, 0), (0, -combined % packing), (0, -dim % 128)))
    cache = cache.reshape(pages, page, -1, packing, cache.shape[-1])
    count = int(num_seqs[0])
    rows = np.repeat(np.arange(count), np.diff(starts[: count + 1]))  # the sequence of each live row
    position = np.arange(len(rows)) - starts[rows + 1] + lens[rows]
    new = jnp.zeros((len(q), combined, dim), kv.dtype)
    new = new.at[: len(rows)].set(kv[tables[rows, position // page], position % page])
    scale = dim**-0.5 if options["softmax_scale"] is None else options["softmax_scale"]
    output, _ = ragged_paged_attention(
        q, new[:, 0::2], new[:, 1::2], cache, lens, tables.reshape(-1), starts,
        jnp.array([0, 0, count], jnp.int32), sinks,
        sm_scale=scale, sliding_window=options["sliding_window"], soft_cap=options["logits_soft_cap"],
    )  # fmt: skip
    return output


def _gap(case: Any) -> str | None:
    if jax.default_backend() != "tpu":
        return f"it needs a TPU, this is {jax.default_backend()}"
    if case.quantised or case.kv_pages.dtype != case.queries.dtype:
        return "this adapter passes no scales"
    blind = any(sequence.positions[0] < 0 for sequence in case.sequences())
    return "it has no rows before position 0: every query token is in its cache" if blind else None


attention.supports = _gap  # type: ignore[attr-defined]
attention.jax_arrays = True  # type: ignore[attr-defined]
