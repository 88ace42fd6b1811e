"""FlashAttention-3, FlashInfer and vLLM's Triton kernel on the very buffers that JAX made (DLPack, no copy).

Keys and values are strided views of the combined pages. What a server computes once a step and shares between its
layers (FlashInfer's plan, FA3's scheduler metadata, scratch memory) stays outside the timed call.
"""

# pyright: reportMissingImports=false
# PyTorch is no dependency: a peer is timed where its owner installed it.

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.bench.arrays import Batch


@dataclass(frozen=True)
class Tensors:
    """A batch, or some of its sequences, as PyTorch tensors over the same device memory."""

    q: Any  # [T, Hq, D]
    k: Any  # [P, page, Hkv, D], strided
    v: Any
    lens: Any
    offsets: Any
    tables: list[Any]
    sinks: Any
    out: Any
    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    scale: float
    window: tuple[int, int]  # keys before, keys after; (-1, -1): all
    cap: float

    def part(self, begin: int, end: int) -> Tensors:
        """Sequences `begin` to `end` alone."""
        rows = slice(sum(self.queries[:begin]), sum(self.queries[:end]))
        return replace(
            self, q=self.q[rows], out=self.out[rows], lens=self.lens[begin:end].contiguous(),
            offsets=(self.offsets[begin : end + 1] - rows.start).contiguous(),
            tables=[table[begin:end].contiguous() for table in self.tables],
            queries=self.queries[begin:end], contexts=self.contexts[begin:end],
        )  # fmt: skip


def tensors(batch: Batch) -> Tensors:
    """The whole batch."""
    import torch

    pages, queries = torch.from_dlpack(batch.kv_pages), torch.from_dlpack(batch.queries)
    on_device = {"device": queries.device, "dtype": torch.int32}
    model, layer = batch.cell.model, batch.cell.layer
    return Tensors(
        queries, pages[:, :, 0::2], pages[:, :, 1::2], torch.tensor(batch.context_lens, **on_device),
        torch.tensor(batch.query_start_loc, **on_device), [torch.tensor(table, **on_device) for table in batch.tables],
        None if batch.sinks is None else torch.from_dlpack(batch.sinks), torch.empty_like(queries),
        batch.cell.queries, batch.cell.contexts, model.softmax_scale or model.head_dim**-0.5,
        (-1, -1) if layer.sliding_window is None else (layer.sliding_window - 1, 0), layer.logits_soft_cap or 0.0,
    )  # fmt: skip


def to_numpy(tensor: Any) -> np.ndarray:
    """A bfloat16 tensor as NumPy, which PyTorch does not know it has: bit by bit."""
    import ml_dtypes
    import torch

    return tensor.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)


def wait(result: Any) -> Any:
    """Let the GPU finish."""
    import torch

    torch.cuda.synchronize()
    return result


# ------------------------------------------------------------------ what they cannot do


def gap(batch: Batch) -> str | None:
    """What holds for all of them."""
    layer = batch.cell.layer
    return "it is timed on bfloat16 caches" if layer.dtype != "bfloat16" or layer.quantised else None


def anything(batch: Batch) -> None:
    """Takes every batch of 16 bits."""


def only_mixed(batch: Batch) -> str | None:
    """Two calls make a difference where decodes stand beside chunks."""
    return None if min(batch.cell.queries) == 1 < max(batch.cell.queries) else "one call does all of this batch"


def flashinfer_gap(batch: Batch) -> str | None:
    """Its sinks come with a window here."""
    layer = batch.cell.layer
    return "its module for sinks without a window is not timed" if layer.sinks and not layer.sliding_window else None


def flashinfer_decode_gap(batch: Batch) -> str | None:
    """The kernel without tensor cores: plain decode."""
    layer = batch.cell.layer
    plain = max(batch.cell.queries) == 1 and not (layer.sinks or layer.sliding_window or layer.logits_soft_cap)
    return None if plain else "its decode kernel is timed on plain decode"


# ------------------------------------------------------------------ FlashAttention-3, as vLLM ships it


def load_fa3() -> Any:
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


def bind_fa3(library: Any, batch: Batch) -> Callable:
    """One call that schedules itself."""
    return _fa3(library, tensors(batch), scheduled=False)


def bind_fa3_scheduled(library: Any, batch: Batch) -> Callable:
    """One call with the scheduler's metadata at hand."""
    return _fa3(library, tensors(batch), scheduled=True)


def bind_fa3_twice(library: Any, batch: Batch) -> Callable:
    """The one-token sequences, which come first in the cells, then the chunks: what serves a mixed batch best."""
    whole = tensors(batch)
    ones = whole.queries.count(1)
    parts = [_fa3(library, whole.part(*ends), scheduled=True) for ends in ((0, ones), (ones, len(whole.queries)))]

    def call(rotation: int) -> Any:
        for part in parts:
            part(rotation)
        return whole.out

    return call


def _fa3(library: Any, t: Tensors, scheduled: bool) -> Callable:
    import torch

    (_, page, kv_heads, dim), q_heads = t.k.shape, t.q.shape[1]
    sinks = None if t.sinks is None else t.sinks.to(torch.bfloat16)
    longest = (max(t.queries), max(t.contexts))
    plan = None
    if scheduled:
        plan = library.get_scheduler_metadata(
            len(t.queries), *longest, q_heads, kv_heads, dim, dim, t.q.dtype, t.lens, t.offsets, None, None, None,
            None, page, 0, True, *t.window, t.cap > 0, 0, None, 0,
        )  # fmt: skip

    def call(rotation: int) -> Any:
        library.fwd(
            t.q, t.k, t.v, None, None, None, t.out, t.offsets, None, None, None, t.lens, *longest, t.tables[rotation],
            None, None, None, None, None, None, None, None, t.scale, True, *t.window, t.cap, True, plan, 0, None, 0,
            sinks, 1, 0, None,
        )  # fmt: skip
        return t.out

    return call


# ------------------------------------------------------------------ FlashInfer


def load_flashinfer() -> Any:
    """The package; on a machine without a compiler, with its modules built ahead of time."""
    try:
        return importlib.import_module("flashinfer")
    except ImportError:
        return None


def bind_flashinfer(library: Any, batch: Batch) -> Callable:
    """The fa2 prefill kernel, which FlashInfer serves decode and mixed batches with as well."""
    import torch

    t, workspace = tensors(batch), torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    (_, page, kv_heads, dim), left = t.k.shape, t.window[0]
    same = {"q_data_type": t.q.dtype, "kv_data_type": t.k.dtype}
    runs = []
    for table in batch.tables:
        indptr, pages, last = _pages(batch, table)
        if t.sinks is not None:
            wrapper = library.BatchAttentionWithAttentionSinkWrapper(
                workspace, "NHD", backend="fa2", head_dim_qk=dim, head_dim_vo=dim, window_left=left, **same
            )
            wrapper.plan(t.offsets.cpu(), indptr, pages, last, t.q.shape[1], kv_heads, dim, page, causal=True,
                         sm_scale=t.scale, window_left=left, **same)  # fmt: skip
            runs.append(lambda w=wrapper: w.run(t.q, (t.k, t.v), t.sinks, t.scale, out=t.out))
        else:
            wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
            wrapper.plan(t.offsets.cpu(), indptr, pages, last, t.q.shape[1], kv_heads, dim, page, causal=True,
                         sm_scale=t.scale, window_left=left, logits_soft_cap=t.cap, **same)  # fmt: skip
            runs.append(lambda w=wrapper: w.run(t.q, (t.k, t.v), out=t.out))
    return lambda rotation: runs[rotation]()


def bind_flashinfer_decode(library: Any, batch: Batch) -> Callable:
    """The decode kernel without tensor cores."""
    import torch

    t, workspace = tensors(batch), torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    (_, page, kv_heads, dim) = t.k.shape
    runs = []
    for table in batch.tables:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=False)
        wrapper.plan(*_pages(batch, table), t.q.shape[1], kv_heads, dim, page, sm_scale=t.scale,
                     q_data_type=t.q.dtype, kv_data_type=t.k.dtype)  # fmt: skip
        runs.append(lambda w=wrapper: w.run(t.q, (t.k, t.v), out=t.out))
    return lambda rotation: runs[rotation]()


def _pages(batch: Batch, table: np.ndarray) -> tuple[Any, Any, Any]:
    """FlashInfer's tables: where each sequence's pages begin, their numbers, how full the last one is."""
    import torch

    page = batch.cell.page_size
    contexts = np.asarray(batch.cell.contexts)
    counts = -(-contexts // page)
    numbers = np.concatenate([table[s, :count] for s, count in enumerate(counts)])
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    last = ((contexts - 1) % page + 1).astype(np.int32)
    return torch.from_numpy(indptr), torch.from_numpy(numbers).to("cuda"), torch.from_numpy(last)


# ------------------------------------------------------------------ vLLM's Triton kernel


def load_vllm() -> Any:
    """The module that holds `unified_attention`."""
    try:
        return importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
    except ImportError:
        return None


def bind_vllm(library: Any, batch: Batch) -> Callable:
    """With the scratch memory for split decode that vLLM gives it."""
    import torch

    t, segments = tensors(batch), 16
    heads, kv_heads, dim = t.q.shape[1], t.k.shape[2], t.q.shape[2]
    threshold = 128 // kv_heads  # vLLM splits a decode batch up to this many sequences
    split = max(t.queries) == 1 and batch.num_seqs <= threshold
    rows, width = len(t.q) if split else 1, 1 << (dim - 1).bit_length()
    scratch = torch.empty(rows, heads, segments, width, device=t.q.device)
    peak = torch.empty(rows, heads, segments, device=t.q.device)
    total = torch.empty_like(peak)

    def call(rotation: int) -> Any:
        library.unified_attention(
            q=t.q, k=t.k, v=t.v, out=t.out, cu_seqlens_q=t.offsets, max_seqlen_q=max(t.queries), seqused_k=t.lens,
            max_seqlen_k=max(t.contexts), softmax_scale=t.scale, causal=True, window_size=t.window,
            block_table=t.tables[rotation], softcap=t.cap, q_descale=None, k_descale=None, v_descale=None,
            seq_threshold_3D=threshold, num_par_softmax_segments=segments, softmax_segm_output=scratch,
            softmax_segm_max=peak, softmax_segm_expsum=total, sinks=t.sinks,
        )  # fmt: skip
        return t.out

    return call
