"""Keys that a slip cannot miss: among thousands of like ones, no single key would show in an answer of 16 bits.

Each row's own key, the first one its window sees, and for the judged rows some at random are turned towards its
queries, so that each carries a good part of the weight; so are the two that it must not see, the next token's and the
one just out of the window. A mask wrong by one, a page left out or read twice then costs a kernel its number.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fuzz.bench.cells import Cell

_MORE = 6  # further loud keys of a judged row


def rows_of(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """For each query row its sequence and its position, both [T]."""
    sequences = np.repeat(np.arange(len(cell.queries)), cell.queries)
    first = np.cumsum([0, *cell.queries[:-1]])
    positions = np.arange(len(sequences)) - first[sequences] + (np.array(cell.contexts) - cell.queries)[sequences]
    return sequences, positions


def places(cell: Cell, judged: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, position of a key that is loud for it), both [N]."""
    _, positions = rows_of(cell)
    window = cell.layer.sliding_window
    found = [(np.arange(len(positions)), positions), (np.arange(len(positions)), positions + 1)]
    if window:
        found += [(np.arange(len(positions)), positions - window + back) for back in (0, 1)]
    random = np.random.default_rng(seed)
    low = np.maximum(0, positions[judged] - window + 1) if window else np.zeros(len(judged), np.int64)
    found.append((judged, low))
    found += [(judged, random.integers(low, positions[judged] + 1)) for _ in range(_MORE)]
    rows, keys = (np.concatenate(each) for each in zip(*found, strict=True))
    unique = np.unique(np.stack([rows, keys]), axis=1)
    return tuple(unique[:, unique[1] >= 0])


def louder(
    kv_pages: Any, queries: Any, cell: Cell, tables: tuple[np.ndarray, ...], judged: np.ndarray, seed: int
) -> Any:
    """`kv_pages` with the loud keys of every rotation; the array given is used up.

    Args:
        queries: [T, Hq, D].
        tables: one block table a rotation.
        judged: rows that the oracle reads.
    """
    rows, keys = places(cell, judged, seed)
    sequences, positions = rows_of(cell)
    held = -(-np.array(cell.contexts) // cell.page_size) * cell.page_size  # slots of the pages of each sequence
    inside = keys < held[sequences[rows]]
    rows, keys = rows[inside], keys[inside]
    seen = np.minimum(positions[rows] + 1, cell.layer.sliding_window or np.inf)
    # A query turned by gain * (the sum of its group) scores about gain * D * scale: as much as all others together.
    scale = cell.model.softmax_scale or cell.model.head_dim**-0.5
    gains = np.log(seen + 1) / (cell.model.head_dim * scale)
    if cell.layer.logits_soft_cap:  # some rows score where the cap bends
        gains[rows % 4 == 3] *= 3
    for table in tables:
        pages = table[sequences[rows], keys // cell.page_size]
        kv_pages = _add()(kv_pages, queries, rows, gains.astype(np.float32), pages, keys % cell.page_size)
    return kv_pages


def sinks(key: Any, cell: Cell) -> Any:
    """Sinks, float32 [Hq], that weigh as much as all the keys that a row sees."""
    import jax

    _, positions = rows_of(cell)
    seen = np.minimum(positions + 1, cell.layer.sliding_window or np.inf).mean()
    return jax.random.normal(key, (cell.model.num_q_heads,), "float32") + np.float32(np.log(seen))


@functools.cache
def _add() -> Any:
    import jax
    import jax.numpy as jnp

    def add(kv, queries, rows, gains, pages, slots):
        heads = kv.shape[2] // 2
        turned = queries.astype(jnp.float32).reshape(queries.shape[0], heads, -1, queries.shape[2]).sum(2)[rows]
        return kv.at[pages, slots, 0::2].add((turned * gains[:, None, None]).astype(kv.dtype))  # keys: even heads

    return jax.jit(add, donate_argnums=0)
