"""The peers that are installed on this machine, judged and timed on the same arrays in the same run.

A peer is an entry in `PEERS`: what must load, and a function that binds it to a batch. FlashAttention-3 and vLLM's
Triton kernel run in PyTorch on the very buffers that JAX made (DLPack, no copy), keys and values as strided views of
the combined pages.
"""

# pyright: reportMissingImports=false
# PyTorch is no dependency: a peer is timed where its owner installed it.

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.bench.arrays import Batch
from fuzz.bench.run import Contender


def here(chip: str) -> list[Contender]:
    """Every peer that can run on `chip` in this process; none is required."""
    found = []
    for name, (wanted, load, bind) in PEERS.items():
        if wanted == chip and (library := load()) is not None:
            found.append(_contender(name, library, bind))
    return found


def _contender(name: str, library: Any, bind: Callable[[Any, Batch], Callable]) -> Contender:
    def prepare(batch: Batch) -> tuple[Callable, list[tuple]]:
        call = bind(library, batch)
        return call, [(i,) for i in range(len(batch.tables))]

    def unsupported(batch: Batch) -> str | None:
        layer = batch.cell.layer
        if layer.dtype not in ("bfloat16", "float16") or layer.quantised:
            return f"{name} is timed on 16-bit caches"
        return None

    # No claim of its own: a peer is held to the default one for its dtypes.
    return Contender(f"peer:{name}", prepare, lambda batch: None, unsupported, _from_torch, _wait)


def _from_torch(tensor: Any) -> np.ndarray:
    """A bfloat16 tensor as NumPy; float32 on the way, which holds every bfloat16."""
    import ml_dtypes

    return tensor.float().cpu().numpy().astype(ml_dtypes.bfloat16)


def _wait(result: Any) -> Any:
    import torch

    torch.cuda.synchronize()
    return result


def _tensors(batch: Batch) -> dict[str, Any]:
    """The batch as PyTorch tensors over the same device memory."""
    import torch

    pages = torch.from_dlpack(batch.kv_pages)  # [P, page, 2 * Hkv, D]
    queries = torch.from_dlpack(batch.queries)
    on_device = {"device": queries.device, "dtype": torch.int32}
    return {
        "q": queries,
        "k": pages[:, :, 0::2],
        "v": pages[:, :, 1::2],
        "lens": torch.tensor(batch.context_lens, **on_device),
        "offsets": torch.tensor(batch.query_start_loc, **on_device),
        "tables": [torch.tensor(table, **on_device) for table in batch.tables],
        "sinks": None if batch.sinks is None else torch.from_dlpack(batch.sinks),
        "out": torch.empty_like(queries),
    }


def _options(batch: Batch) -> tuple[float, tuple[int, int], float]:
    """Scale, window as (keys before, keys after), cap: the two libraries' shared conventions."""
    model, layer = batch.cell.model, batch.cell.layer
    window = (-1, -1) if layer.sliding_window is None else (layer.sliding_window - 1, 0)
    return model.softmax_scale or model.head_dim**-0.5, window, layer.logits_soft_cap or 0.0


# ------------------------------------------------------------------ FlashAttention-3, as vLLM ships it


def _load_fa3() -> Any:
    """The operator library: from an installed vllm, or `fa3.so` in the folder that RPA_PEERS names."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    spec = importlib.util.find_spec("vllm")
    places = [Path(os.environ["RPA_PEERS"]) / "fa3.so"] if "RPA_PEERS" in os.environ else []
    if spec is not None and spec.origin:
        places += Path(spec.origin).parent.glob("vllm_flash_attn/_vllm_fa3_C*.so")
    for place in places:
        if place.exists():
            torch.ops.load_library(str(place))
            return torch.ops._vllm_fa3_C
    return None


def _bind_fa3(library: Any, batch: Batch) -> Callable:
    import torch

    t = _tensors(batch)
    scale, window, cap = _options(batch)
    sinks = None if t["sinks"] is None else t["sinks"].to(torch.bfloat16)
    longest_q, longest_kv = max(batch.cell.queries), max(batch.cell.contexts)

    def call(rotation: int) -> Any:
        library.fwd(
            t["q"], t["k"], t["v"], None, None, None, t["out"], t["offsets"], None, None, None, t["lens"], longest_q,
            longest_kv, t["tables"][rotation], None, None, None, None, None, None, None, None, scale, True, *window,
            cap, True, None, 0, None, 0, sinks, 1, 0, None,
        )  # fmt: skip
        return t["out"]

    return call


# ------------------------------------------------------------------ vLLM's Triton kernel


def _load_vllm() -> Any:
    try:
        return importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
    except ImportError:
        return None


def _bind_vllm(library: Any, batch: Batch) -> Callable:
    import torch

    t = _tensors(batch)
    scale, window, cap = _options(batch)
    model, segments = batch.cell.model, 16
    threshold = 128 // model.num_kv_heads  # vLLM splits a decode batch up to this many sequences
    split = max(batch.cell.queries) == 1 and batch.num_seqs <= threshold
    rows, width = len(batch.queries) if split else 1, 1 << (model.head_dim - 1).bit_length()
    scratch = torch.empty(rows, model.num_q_heads, segments, width, device=t["q"].device)
    peak = torch.empty(rows, model.num_q_heads, segments, device=t["q"].device)
    total = torch.empty_like(peak)

    def call(rotation: int) -> Any:
        library.unified_attention(
            q=t["q"], k=t["k"], v=t["v"], out=t["out"], cu_seqlens_q=t["offsets"],
            max_seqlen_q=max(batch.cell.queries), seqused_k=t["lens"], max_seqlen_k=max(batch.cell.contexts),
            softmax_scale=scale, causal=True, window_size=window, block_table=t["tables"][rotation], softcap=cap,
            q_descale=None, k_descale=None, v_descale=None, seq_threshold_3D=threshold,
            num_par_softmax_segments=segments, softmax_segm_output=scratch, softmax_segm_max=peak,
            softmax_segm_expsum=total, sinks=t["sinks"],
        )  # fmt: skip
        return t["out"]

    return call


# name -> (chip, what must load, what binds it to a batch)
PEERS: dict[str, tuple[str, Callable[[], Any], Callable[[Any, Batch], Callable]]] = {
    "fa3": ("gpu", _load_fa3, _bind_fa3),
    "vllm": ("gpu", _load_vllm, _bind_vllm),
}
