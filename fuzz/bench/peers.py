"""The peers that are installed on this machine, judged and timed on the same arrays in the same run.

A peer is an entry in `PEERS`: its chips, what must load, what binds it to a batch, what it cannot do. The JAX ones are
the search's own adapters; the PyTorch ones live in `torch_peers`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fuzz.bench import torch_peers
from fuzz.bench.arrays import Batch
from fuzz.bench.run import Contender

Prepared = tuple[Callable[..., Any], list[tuple]]  # a function and its arguments for each rotation


@dataclass(frozen=True)
class Peer:
    """Somebody else's kernel: none is required, those that load are timed."""

    chips: tuple[str, ...]
    load: Callable[[], Any]  # the library, or None where it is not installed
    prepare: Callable[[Any, Batch], Prepared]
    gap: Callable[[Any, Batch], str | None]  # why it cannot run this batch, or None
    torch: bool = False


def here(chip: str) -> list[Contender]:
    """Every peer that can run on `chip` in this process."""
    return [
        _contender(name, peer, library)
        for name, peer in PEERS.items()
        if chip in peer.chips and (library := peer.load()) is not None
    ]


def _contender(name: str, peer: Peer, library: Any) -> Contender:
    # No claim of its own: a peer is held to the default one for its dtypes.
    return Contender(
        f"peer:{name}",
        lambda batch: peer.prepare(library, batch),
        lambda batch: None,
        lambda batch: peer.gap(library, batch),
        torch_peers.to_numpy if peer.torch else np.asarray,
        torch_peers.wait if peer.torch else jax.block_until_ready,
        deterministic=False,  # it promises no bits
    )


# ------------------------------------------------------------------ JAX: the search's adapters


def _adapter(module: str, function: str) -> Callable[[], Any]:
    def load() -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other packages' deprecations
                return getattr(importlib.import_module(f"fuzz.adapters.{module}"), function)
        except ImportError:
            return None

    return load


def _prepare_adapter(adapter: Any, batch: Batch) -> Prepared:
    """The adapter under jit; tables as wide as a multiple of 64 pages, without which ejkernel reads the wrong ones."""
    program = jax.jit(lambda *arrays: adapter(*arrays, **batch.options))

    def arguments(rotation: int) -> tuple:
        q, kv, lens, tables, starts, count, sinks = batch.arguments(rotation)
        tables = np.pad(tables, ((0, 0), (0, -tables.shape[1] % 64)))
        return (q, kv, *map(jnp.asarray, (lens, tables, starts, np.array([count], np.int32))), sinks)

    return program, [arguments(i) for i in range(len(batch.tables))]


def _adapter_gap(adapter: Any, batch: Batch) -> str | None:
    return adapter.supports(batch.judged[0][1])


# ------------------------------------------------------------------ JAX: its paged decode kernel for GPUs


def _load_paged() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still what JAX has
        try:
            return importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention").paged_attention
        except ImportError:
            return None


def _prepare_paged(paged_attention: Any, batch: Batch) -> Prepared:
    """Keys and values as it wants them, `[Hkv, P, page, D]`, copied outside the timed call."""
    cell = batch.cell
    k, v = (jnp.transpose(batch.kv_pages[:, :, i::2], (2, 0, 1, 3)) for i in (0, 1))
    scale = cell.model.softmax_scale or cell.model.head_dim**-0.5
    options = {
        "block_h": 16,
        "pages_per_compute_block": max(1, 64 // cell.page_size),
        "k_splits": 16,
        "num_warps": 4,
        "num_stages": 2,
        "attn_logits_soft_cap": cell.layer.logits_soft_cap,
    }
    scaled = batch.queries * jnp.asarray(scale, batch.queries.dtype)
    program = jax.jit(lambda *arrays: paged_attention(*arrays, **options))
    lens = jnp.asarray(batch.context_lens)
    return program, [(scaled, k, v, jnp.asarray(tables), lens) for tables in batch.tables]


def _paged_gap(_: Any, batch: Batch) -> str | None:
    layer = batch.cell.layer
    if max(batch.cell.queries) > 1:
        return "it decodes only"
    if layer.sliding_window or layer.sinks:
        return "it has neither windows nor sinks"
    return None


# ------------------------------------------------------------------ the list


def _torch(load: Callable[[], Any], bind: Callable[[Any, Batch], Callable], gap: Callable) -> Peer:
    def prepare(library: Any, batch: Batch) -> Prepared:
        return bind(library, batch), [(i,) for i in range(len(batch.tables))]

    return Peer(("gpu",), load, prepare, lambda _, batch: torch_peers.gap(batch) or gap(batch), torch=True)


PEERS: dict[str, Peer] = {
    "ejkernel": Peer(("cpu", "gpu"), _adapter("ejkernel", "attention"), _prepare_adapter, _adapter_gap),
    "jax": Peer(("tpu",), _adapter("jax_upstream", "attention"), _prepare_adapter, _adapter_gap),
    "tpu-inference": Peer(("tpu",), _adapter("tpu_inference", "attention"), _prepare_adapter, _adapter_gap),
    "jax paged": Peer(("gpu",), _load_paged, _prepare_paged, _paged_gap),
    "fa3": _torch(torch_peers.load_fa3, torch_peers.bind_fa3, torch_peers.anything),
    "fa3 scheduled": _torch(torch_peers.load_fa3, torch_peers.bind_fa3_scheduled, torch_peers.anything),
    "fa3 two calls": _torch(torch_peers.load_fa3, torch_peers.bind_fa3_twice, torch_peers.only_mixed),
    "flashinfer fa2": _torch(torch_peers.load_flashinfer, torch_peers.bind_flashinfer, torch_peers.flashinfer_gap),
    "flashinfer decode": _torch(
        torch_peers.load_flashinfer, torch_peers.bind_flashinfer_decode, torch_peers.flashinfer_decode_gap
    ),
    "vllm": _torch(torch_peers.load_vllm, torch_peers.bind_vllm, torch_peers.anything),
}
