"""A cell's arrays, and the small cases by which the oracle judges a big answer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fuzz.bench.cells import Cell
from oracle import Case, Claim
from oracle.bound import Analysis, analyse
from oracle.claim import default_claim

POOL_BYTES = 8 << 30
JUDGED_ROWS = 24
JUDGED_KEYS = 64 << 10  # over all judged rows: what the oracle reads in a few seconds


@dataclass(frozen=True)
class Batch:
    """The arguments of one cell: pages on the device, metadata rotating over disjoint pages of the pool."""

    cell: Cell
    queries: Any  # [T, Hq, D]
    kv_pages: Any  # [P, page, 2 * Hkv, D]
    context_lens: np.ndarray
    tables: tuple[np.ndarray, ...]  # one block table a rotation, no page in two of them
    query_start_loc: np.ndarray
    sinks: Any
    _analyses: dict[Claim | None, list[Analysis]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def judged(self) -> list[tuple[np.ndarray, Case]]:
        """The small cases that judge this batch, the same for every contender."""
        return list(samples(self, JUDGED_ROWS))

    def analyses(self, claim: Claim | None) -> list[Analysis]:
        """What the oracle says of each judged case, once a claim; NumPy leaves the interpreter, so rows run abreast."""
        if claim not in self._analyses:
            with ThreadPoolExecutor() as pool:
                found = pool.map(lambda case: analyse(case, claim or default_claim(case)), [c for _, c in self.judged])
                self._analyses[claim] = list(found)
        return self._analyses[claim]

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)

    def arguments(self, rotation: int = 0) -> tuple:
        """The seven array arguments; another rotation reads other pages, past any cache."""
        tables = self.tables[rotation % len(self.tables)]
        return (self.queries, self.kv_pages, self.context_lens, tables, self.query_start_loc, self.num_seqs, self.sinks)

    @property
    def options(self) -> dict[str, Any]:
        layer = self.cell.layer
        options = {
            "softmax_scale": self.cell.model.softmax_scale,
            "logits_soft_cap": layer.logits_soft_cap,
            "sliding_window": layer.sliding_window,
            "compute_dtype": layer.compute_dtype,
        }
        return options | ({"k_scale": 0.02, "v_scale": 0.02} if layer.quantised else {})


def make(cell: Cell, cache_bytes: int, seed: int = 0) -> Batch:
    """Random arrays for `cell` on JAX's default device.

    Args:
        cache_bytes: the device's last-level cache; rotations touch at least four times as much.
    """
    import jax

    model, page = cell.model, cell.page_size
    pages = [-(-n // page) for n in cell.contexts]
    page_bytes = page * cell.kv_bytes // max(1, cell.read_tokens)
    touched = max(1, sum(pages) * page_bytes)
    rotations = max(1, min(32, -(-4 * cache_bytes // touched), POOL_BYTES // touched))
    total = sum(pages) * rotations
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (sum(cell.queries), model.num_q_heads, model.head_dim), "float32")
    kv = _pages(keys[1], (total, page, 2 * model.num_kv_heads, model.head_dim), cell.layer.pages_dtype)
    sinks = jax.random.normal(keys[2], (model.num_q_heads,), "float32") if cell.layer.sinks else None
    return Batch(
        cell, q.astype(cell.layer.dtype), kv, np.asarray(cell.contexts, np.int32),
        _tables(pages, rotations, total, seed), np.concatenate([[0], np.cumsum(cell.queries)]).astype(np.int32), sinks,
    )  # fmt: skip


def _pages(key, shape: tuple[int, ...], dtype: str):
    """A pool of random values; past 32 MiB they repeat, in memory of their own."""
    import jax
    import jax.numpy as jnp

    drawn = min(shape[0], max(1, (16 << 20) // int(np.prod(shape[1:]))))
    some = (drawn, *shape[1:])
    if dtype == "int8":
        values = jax.random.randint(key, some, -127, 128, jnp.int8)
    else:
        values = jax.random.normal(key, some, jnp.float32).astype(dtype)
    return jnp.concatenate([values] * -(-shape[0] // drawn))[: shape[0]] if drawn < shape[0] else values


def _tables(pages: list[int], rotations: int, total: int, seed: int) -> tuple[np.ndarray, ...]:
    ids = iter(np.random.default_rng(seed).permutation(total).astype(np.int32))
    width = -(-max(pages) // 8) * 8  # peers read rows of the table eight entries at a time
    tables = np.zeros((rotations, len(pages), width), np.int32)
    for rotation in range(rotations):
        for s, count in enumerate(pages):
            tables[rotation, s, :count] = [next(ids) for _ in range(count)]
    return tuple(tables)


def samples(batch: Batch, rows: int, seed: int = 0) -> Iterator[tuple[np.ndarray, Case]]:
    """Cases that judge some rows of a big batch, each with the rows of the output it speaks of.

    By the contract a row at position p is the decode row of the same table with p + 1 keys, so a case of such rows
    has the same answer, and the oracle reads only their pages.
    """
    cell, chosen = batch.cell, _chosen_rows(batch, rows, seed)
    for row in chosen:
        s = int(np.searchsorted(batch.query_start_loc, row, side="right")) - 1
        position = cell.contexts[s] - (int(batch.query_start_loc[s + 1]) - row)
        used = batch.tables[0][s, : position // cell.page_size + 1]
        yield (
            np.array([row]),
            Case(
                np.asarray(batch.queries[row : row + 1]), np.asarray(batch.kv_pages[used]),
                np.array([position + 1]), np.arange(len(used))[None], np.array([0, 1]), 1,
                None if batch.sinks is None else np.asarray(batch.sinks), **batch.options,
            ),
        )  # fmt: skip


def _chosen_rows(batch: Batch, count: int, seed: int) -> np.ndarray:
    """The first and last rows of some sequences, and rows at random: all heads of each."""
    offsets = batch.query_start_loc
    random = np.random.default_rng(seed)
    edges = np.concatenate([offsets[:-1], offsets[1:] - 1])
    edges = random.permutation(np.unique(edges))[: count // 2]
    anywhere = random.integers(0, offsets[-1], count - len(edges))
    chosen = random.permutation(np.unique(np.concatenate([edges, anywhere])))
    sequence = np.searchsorted(offsets, chosen, side="right") - 1
    keys = np.asarray(batch.cell.contexts)[sequence] - (offsets[sequence + 1] - chosen) + 1
    return np.sort(chosen[: max(1, np.searchsorted(np.cumsum(keys), JUDGED_KEYS, side="right"))])
