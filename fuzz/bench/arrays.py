"""A cell's arrays, and the small cases by which the oracle judges a big answer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np

from fuzz.bench import loud
from fuzz.bench.cells import Cell
from oracle import Case, Claim
from oracle.bound import Analysis, analyse
from oracle.claim import default_claim

POOL_BYTES = 8 << 30
# Slices of one row and one kv head, and their seed: before the timing, and after it.
_JUDGEMENTS = ((64, 0), (8, 1))
JUDGED_KEYS = 512 << 10  # over all judged slices: what the oracle reads in a few seconds

Slice = tuple[slice, slice]  # rows and query heads of an output


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
    _analyses: dict[Claim | None, tuple[list[Analysis], list[Analysis]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @cached_property
    def judged(self) -> list[tuple[Slice, Case]]:
        """The small cases that judge this batch before it is timed, the same for every contender."""
        return list(samples(self, *_JUDGEMENTS[0]))

    @cached_property
    def judged_again(self) -> list[tuple[Slice, Case]]:
        """Those that judge the last rotation after the timing: other pages, other answers."""
        return list(samples(self, *_JUDGEMENTS[1], rotation=len(self.tables) - 1))

    def analyses(self, claim: Claim | None) -> tuple[list[Analysis], ...]:
        """The oracle's word on each judged case, once a claim: `judged` and `judged_again`.

        NumPy leaves the interpreter, so the cases run abreast.
        """
        if claim not in self._analyses:
            first, again = ([case for _, case in cases] for cases in (self.judged, self.judged_again))
            with ThreadPoolExecutor() as pool:
                found = list(pool.map(lambda case: analyse(case, claim or default_claim(case)), first + again))
            self._analyses[claim] = found[: len(first)], found[len(first) :]
        return self._analyses[claim]

    @cached_property
    def on_host(self) -> np.ndarray:
        """The queries, once."""
        return np.asarray(self.queries)

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
    shape = (total, page, 2 * model.num_kv_heads, model.head_dim)
    kv = _pages(keys[1], shape, cell.layer.pages_dtype, max(pages))
    sinks = loud.sinks(keys[2], cell) if cell.layer.sinks else None
    q, tables = q.astype(cell.layer.dtype), _tables(pages, rotations, total, seed)
    offsets = np.concatenate([[0], np.cumsum(cell.queries)]).astype(np.int32)
    if not cell.layer.quantised:  # whose keys are numbers of scaled steps
        judged = {row for count, seed in _JUDGEMENTS for row, _ in _chosen(cell, count, seed)}
        kv = loud.louder(kv, q, cell, tables, np.array(sorted(judged)), seed)
    return Batch(cell, q, kv, np.asarray(cell.contexts, np.int32), tables, offsets, sinks)


def _pages(key, shape: tuple[int, ...], dtype: str, longest: int):
    """A pool of random values; past 32 MiB and `longest` pages they repeat, in memory of their own."""
    import jax
    import jax.numpy as jnp

    drawn = min(shape[0], max(longest, (16 << 20) // int(np.prod(shape[1:]))))
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


def samples(batch: Batch, count: int, seed: int = 0, rotation: int = 0) -> Iterator[tuple[Slice, Case]]:
    """Cases that judge some slices of a big batch, each with the part of the output, `[rows, heads]`, it speaks of.

    By the contract a row at position p is the decode row of the same table with p + 1 keys, and a kv head with its
    group of query heads is a model of its own: such a case has the same answer, and the oracle reads little.
    """
    cell, queries, take = batch.cell, batch.on_host, _taker()
    group = cell.model.num_q_heads // cell.model.num_kv_heads
    sequences, positions = loud.rows_of(cell)
    for row, head in _chosen(cell, count, seed):
        s, keys = int(sequences[row]), int(positions[row]) + 1
        used = -(-keys // cell.page_size)
        rows, heads = slice(row, row + 1), slice(head * group, (head + 1) * group)
        # The whole row of the table is fetched: one shape, one compilation for all slices of the batch.
        pages = np.asarray(take(batch.kv_pages, batch.tables[rotation][s], head))[:used]
        yield (
            (rows, heads),
            Case(
                queries[rows, heads], pages, np.array([keys]), np.arange(used)[None], np.array([0, 1]), 1,
                None if batch.sinks is None else np.asarray(batch.sinks)[heads], **batch.options,
            ),
        )  # fmt: skip


@cache
def _taker() -> Any:
    import jax

    return jax.jit(lambda kv, pages, head: jax.lax.dynamic_slice_in_dim(kv[pages], 2 * head, 2, axis=2))


def _chosen(cell: Cell, count: int, seed: int) -> list[tuple[int, int]]:
    """(row, kv head): the first and last rows of some sequences and rows at random, with the heads in turn."""
    sequences, positions = loud.rows_of(cell)
    ends = np.flatnonzero(np.diff(sequences, prepend=-1, append=-1))
    edges = np.unique(np.concatenate([ends[:-1], ends[1:] - 1]))
    random = np.random.default_rng(seed)
    edges = random.permutation(edges)[: count // 2]
    rows = random.permutation(np.concatenate([edges, random.integers(0, len(sequences), count - len(edges))]))
    turn = random.permutation(cell.model.num_kv_heads)
    chosen = list(dict.fromkeys((int(row), int(turn[i % len(turn)])) for i, row in enumerate(rows)))
    keys = np.cumsum([positions[row] + 1 for row, _ in chosen])
    return sorted(chosen[: max(1, int(np.searchsorted(keys, JUDGED_KEYS, side="right")))])
