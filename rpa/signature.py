"""What a call is, split in two: the static part a program is compiled for, and the arrays it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax


class Inputs(NamedTuple):
    """The arrays of one call, ranks and dtypes already checked; any of them may be a tracer."""

    queries: jax.Array  # [T, Hq, D]
    kv_pages: jax.Array  # [P, page, 2 * Hkv, D], key of kv head h at 2h, its value at 2h + 1
    context_lens: jax.Array  # int32 [S]
    block_tables: jax.Array  # int32 [S, pages_per_seq]
    query_start_loc: jax.Array  # int32 [S + 1]
    num_seqs: jax.Array  # int32 [1]
    softmax_aux: jax.Array | None = None  # float32 [Hq]
    k_scale: jax.Array | None = None  # float32 [Hkv]
    v_scale: jax.Array | None = None  # float32 [Hkv]


@dataclass(frozen=True)
class Signature:
    """Everything about a call that a compiled program depends on. Hashable; dtypes by NumPy name."""

    num_tokens: int
    num_q_heads: int
    head_dim: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    max_seqs: int
    pages_per_seq: int
    q_dtype: str
    kv_dtype: str
    compute_dtype: str
    sinks: bool
    k_scale: bool
    v_scale: bool
    return_lse: bool
    optimized: bool
    softmax_scale: float
    logits_soft_cap: float | None
    sliding_window: int | None  # None also when the window covers the whole capacity
    vmem_limit_bytes: int | None

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def capacity(self) -> int:
        """Tokens a row of the block table can address."""
        return self.pages_per_seq * self.page_size
