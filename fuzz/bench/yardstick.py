"""A plain program of a cell's kind of work, timed beside every contender on a CPU: what the machine's mood costs.

Two runs an hour apart on a shared machine differ by tens of percent in every program alike; a contender's time over
the yardstick's in the same moments does not. So `--compare` compares those ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fuzz.bench.arrays import Batch

VERSION = 1  # ratios to another version of this program mean nothing: raise it with every change below


def make(batch: Batch) -> Callable[[int], Any]:
    """Attention as one writes it first, over sequences of the cell's mean sizes; called with a rotation.

    It answers nothing that is asked: it gathers pages, multiplies, exponentiates and multiplies as the cell does.
    """
    cell, model = batch.cell, batch.cell.model
    count = len(cell.queries)
    rows = -(-sum(cell.queries) // count)
    width = -(-cell.read_tokens // count // cell.page_size)  # pages of a sequence
    q = batch.queries[:rows].reshape(rows, model.num_kv_heads, -1, model.head_dim)

    @jax.jit
    def program(q, kv_pages, tables):  # [rows, Hkv, group, D], [P, page, 2 * Hkv, D], [S, width]
        return jax.lax.map(lambda table: _dense(q, kv_pages[table]), tables)

    turns = [jnp.asarray(table[:, :width]) for table in batch.tables]
    return lambda rotation: program(q, batch.kv_pages, turns[rotation % len(turns)])


def _dense(q, pages):
    kv = pages.reshape(-1, *pages.shape[2:])
    k, v = kv[:, 0::2], kv[:, 1::2]  # [keys, Hkv, D]
    scores = jnp.einsum("qhgd,khd->hgqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    return jnp.einsum("hgqk,khd->qhgd", weights, v, preferred_element_type=jnp.float32)
