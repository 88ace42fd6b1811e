"""Kernels that keep keys and values apart, `[P, page, Hkv, D]` each, as vLLM's and flash-attention's paged calls do.

`separate(function)` makes a target of any `function(q, key_cache, value_cache, query_start_loc, seq_lens,
block_table, softmax_scale, window, soft_cap, sinks)`; `window` counts the keys left of a token, itself not included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def separate(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the contract's arguments over one that takes keys and values apart, live metadata only."""

    def call(q: Any, kv: Any, lens: Any, tables: Any, starts: Any, num_seqs: Any, sinks: Any = None, **options: Any):
        count = int(np.asarray(num_seqs).reshape(-1)[0])
        scale = q.shape[2] ** -0.5 if options["softmax_scale"] is None else options["softmax_scale"]
        window = options["sliding_window"]
        live = int(starts[count])
        output = np.zeros(q.shape, q.dtype)
        output[:live] = function(
            q[:live], kv[:, :, 0::2], kv[:, :, 1::2], starts[: count + 1], lens[:count], tables[:count], scale,
            -1 if window is None else window - 1, options["logits_soft_cap"] or 0.0, sinks,
        )  # fmt: skip
        return output

    return call


def attention(*arrays: Any, **options: Any) -> Any:
    """vLLM's build of flash-attention, on a CUDA device."""
    return separate(_flash)(*arrays, **options)


def _flash(
    q: Any,
    k: Any,
    v: Any,
    starts: Any,
    lens: Any,
    tables: Any,
    scale: float,
    window: int,
    cap: float,
    sinks: Any,
):
    import torch  # type: ignore[import-not-found]
    from vllm.vllm_flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    def cuda(a: Any) -> Any:
        wide = torch.from_numpy(np.ascontiguousarray(a, np.float32 if a.dtype.kind in "fV" else a.dtype)).cuda()
        return wide.to(getattr(torch, str(a.dtype))) if a.dtype.kind in "fV" else wide

    rows, longest = int(np.diff(starts).max(initial=1)), int(lens.max(initial=1))
    output = flash_attn_varlen_func(
        cuda(q), cuda(k), cuda(v), max_seqlen_q=rows, cu_seqlens_q=cuda(starts), max_seqlen_k=longest,
        seqused_k=cuda(lens), block_table=cuda(tables), softmax_scale=scale, causal=True, softcap=cap,
        window_size=(window, 0 if window >= 0 else -1), s_aux=None if sinks is None else cuda(sinks),
    )  # fmt: skip
    return output.float().cpu().numpy()


def _gap(case: Any) -> str | None:
    if case.quantised or case.queries.dtype.name == "float32":
        return "it takes bfloat16 and float16 only"
    try:
        import vllm.vllm_flash_attn  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        return f"it is not installed: {error}"
    return None


attention.supports = _gap  # type: ignore[attr-defined]
