"""The contract as cases: one small `Case` for each thing it says. Every backend runs them all.

Most share one signature (`SMALL`), so that a backend compiles once for many of them; what differs is the
raggedness inside. Values carry spikes at every boundary, so that one key too many or too few is loud.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from oracle import Case

DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int8": np.int8,
}


@dataclass(frozen=True)
class Shape:
    """The static part: padded rows, sequences and pages stay dead."""

    rows: int = 24
    seqs: int = 5
    pages_per_seq: int = 6
    pages: int = 31
    page: int = 4
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16


SMALL = Shape()


def build(
    queries: tuple[int, ...],
    contexts: tuple[int, ...],
    shape: Shape = SMALL,
    *,
    dtype: str = "float32",
    kv_dtype: str | None = None,
    compute_dtype: str | None = "float32",
    sinks: bool = False,
    amplitude: float = 1.0,
    first_row: int = 0,
    seed: int = 0,
    **options,
) -> Case:
    """A case with `queries[s]` new tokens on `contexts[s]` in the cache, on shuffled pages."""
    random = np.random.default_rng(seed)
    offsets = np.full(shape.seqs + 1, 2**31 - 1, np.int32)  # dead metadata rows hold garbage
    offsets[: len(queries) + 1] = first_row + np.concatenate([[0], np.cumsum(queries)])
    lens = np.full(shape.seqs, -1, np.int32)
    lens[: len(contexts)] = contexts
    q = _values(random, (shape.rows, shape.q_heads, shape.head_dim), dtype, amplitude)
    kv = _values(random, (shape.pages, shape.page, 2 * shape.kv_heads, shape.head_dim), kv_dtype or dtype, 1.0)
    return Case(
        q, kv, lens, _tables(random, queries, contexts, shape), offsets, len(queries),
        random.normal(size=shape.q_heads).astype(np.float32) if sinks else None,
        compute_dtype=None if compute_dtype is None else DTYPES[compute_dtype], **options,
    )  # fmt: skip


def _values(random, shape: tuple[int, ...], dtype: str, amplitude: float) -> np.ndarray:
    if dtype == "int8":
        return random.integers(-127, 128, shape).astype(np.int8)
    values = random.normal(size=shape) * amplitude
    # One slot in five is loud: an edge that is off by one reads or misses such a slot somewhere.
    loud = random.random((*shape[:-2], 1, 1)) < 0.2
    return np.where(loud, np.sign(values) * 8, values).astype(DTYPES[dtype])


def _tables(random, queries, contexts, shape: Shape) -> np.ndarray:
    """Distinct shuffled pages where a context needs them, garbage in every other entry."""
    tables = random.choice([-1, 2**31 - 1, shape.pages, -(2**31)], (shape.seqs, shape.pages_per_seq)).astype(np.int32)
    free = iter(random.permutation(shape.pages))
    for s, context in enumerate(contexts):
        if queries[s]:
            needed = -(-context // shape.page)
            tables[s, :needed] = [next(free) for _ in range(needed)]
    return tables


def _shared_prefix() -> Case:
    """Two sequences on the same first pages, and one page twice in one table."""
    case = build((3, 2, 1), (20, 18, 12))
    tables = np.array(case.block_tables)
    tables[1, :4] = tables[0, :4]
    tables[2, 1] = tables[2, 0]
    return case.replace(block_tables=tables)


def _with(case: Case, **changes) -> Case:
    return case.replace(**changes)


MIXED = ((5, 1, 3), (9, 24, 6))

CASES: dict[str, Callable[[], Case]] = {
    # ------------------------------------------------ ragged layouts
    "one_token": lambda: build((1,), (1,)),
    "decode": lambda: build((1, 1, 1, 1, 1), (1, 24, 4, 5, 13)),
    "prefill": lambda: build((24,), (24,)),
    "chunk": lambda: build((7,), (22,)),
    "mixed": lambda: build(*MIXED),
    "tail_tile_clamped": lambda: build((5, 3), (9, 6), Shape(rows=8)),
    "rows_past_the_last_query": lambda: build((2, 3), (7, 3)),
    "first_row_not_zero": lambda: build((2, 3), (7, 3), first_row=4),
    "no_sequence": lambda: build((), ()),
    "one_sequence_of_many": lambda: build((6,), (11,)),
    "sequence_without_queries_first": lambda: build((0, 3, 1), (5, 9, 8)),
    "sequence_without_queries_between": lambda: build((3, 0, 2, 0, 1), (9, 7, 5, 0, 8)),
    "empty_sequence_first": lambda: build((0, 3, 1), (0, 9, 8)),
    "empty_sequence_between": lambda: build((4, 0, 0, 3), (10, 0, 0, 9)),
    "all_sequences_empty": lambda: build((0, 0, 0), (0, 0, 0)),
    "queries_without_context": lambda: build((3, 2, 4), (8, 0, 6)),
    "context_shorter_than_queries": lambda: build((6, 3, 5), (2, 3, 1)),
    "context_shorter_than_queries_sinks": lambda: build((6, 3, 5), (2, 0, 1), sinks=True),
    "page_edges": lambda: build((1, 2, 1, 2, 1), (4, 4, 8, 9, 16)),
    "full_capacity": lambda: build((3, 1, 24 - 4), (24, 24, 20)),
    # ------------------------------------------------ page tables
    "shared_prefix": _shared_prefix,
    "wide_table": lambda: build((3, 1), (9, 30), Shape(pages_per_seq=67)),
    "table_65_wide_full": lambda: build((3, 1), (65, 65), Shape(pages_per_seq=65, page=1, pages=140)),
    "table_100_wide_full": lambda: build((3,), (100,), Shape(pages_per_seq=100, page=1, pages=140)),
    "table_one_wide": lambda: build((1, 3), (4, 3), Shape(pages_per_seq=1)),
    "page_1": lambda: build(*MIXED, Shape(page=1, pages_per_seq=24, pages=50)),
    "page_3": lambda: build(*MIXED, Shape(page=3, pages_per_seq=9, pages=20)),
    "page_16": lambda: build((5, 1, 3), (9, 40, 17), Shape(page=16, pages_per_seq=3, pages=9)),
    "page_128": lambda: build((5, 1), (130, 200), Shape(page=128, pages_per_seq=2, pages=5)),
    "one_page_in_the_pool": lambda: build((2,), (4,), Shape(pages=1)),
    # ------------------------------------------------ heads
    "mha": lambda: build(*MIXED, Shape(q_heads=3, kv_heads=3)),
    "mqa": lambda: build(*MIXED, Shape(q_heads=5, kv_heads=1)),
    "group_3_of_5": lambda: build(*MIXED, Shape(q_heads=15, kv_heads=5)),
    "group_16": lambda: build(*MIXED, Shape(q_heads=16, kv_heads=1)),
    "head_dim_1": lambda: build(*MIXED, Shape(head_dim=1)),
    "head_dim_7": lambda: build(*MIXED, Shape(head_dim=7)),
    "head_dim_80": lambda: build(*MIXED, Shape(head_dim=80)),
    "head_dim_128": lambda: build(*MIXED, Shape(head_dim=128)),
    "head_dim_256": lambda: build(*MIXED, Shape(head_dim=256)),
    # ------------------------------------------------ options
    "window_1": lambda: build(*MIXED, sliding_window=1),
    "window_3": lambda: build(*MIXED, sliding_window=3),
    "window_at_page_edge": lambda: build((5, 1, 8), (13, 24, 24), sliding_window=4),
    "window_of_the_context": lambda: build((1, 3), (9, 9), sliding_window=9),
    "window_past_the_capacity": lambda: build(*MIXED, sliding_window=10**6),
    "window_far_from_the_start": lambda: build(
        (2, 1), (500, 430), Shape(page=4, pages_per_seq=128, pages=240), sliding_window=8
    ),
    "window_sinks": lambda: build(*MIXED, sliding_window=5, sinks=True),
    "sinks": lambda: build(*MIXED, sinks=True),
    "sink_minus_inf": lambda: _with(
        build(*MIXED, sinks=True), softmax_aux=np.array([-np.inf, 0.5, -np.inf, 2.0], np.float32)
    ),
    "sink_dominates": lambda: _with(build(*MIXED, sinks=True), softmax_aux=np.full(4, 60.0, np.float32)),
    "cap": lambda: build(*MIXED, logits_soft_cap=2.5, amplitude=3.0),
    "cap_window_sinks": lambda: build(*MIXED, logits_soft_cap=5.0, sliding_window=4, sinks=True),
    "scale": lambda: build(*MIXED, softmax_scale=0.3),
    "scale_zero": lambda: build(*MIXED, softmax_scale=0.0),
    "scale_negative": lambda: build(*MIXED, softmax_scale=-0.5),
    "large_logits": lambda: build(*MIXED, amplitude=30.0),
    # ------------------------------------------------ dtypes
    "f16": lambda: build(*MIXED, dtype="float16", compute_dtype="float16"),
    "bf16": lambda: build(*MIXED, dtype="bfloat16", compute_dtype="bfloat16"),
    "bf16_default_compute": lambda: build(*MIXED, dtype="bfloat16", compute_dtype=None),
    "f32_computed_in_bf16": lambda: build(*MIXED, compute_dtype="bfloat16"),
    "bf16_computed_in_f32": lambda: build(*MIXED, dtype="bfloat16", compute_dtype="float32"),
    "bf16_everything": lambda: build(
        *MIXED, dtype="bfloat16", compute_dtype="bfloat16", sinks=True, sliding_window=6, logits_soft_cap=9.0
    ),
    "f32_queries_bf16_pages": lambda: build(*MIXED, kv_dtype="bfloat16"),
    "bf16_queries_f32_pages": lambda: build(*MIXED, dtype="bfloat16", kv_dtype="float32", compute_dtype="bfloat16"),
    "fp8_e4m3": lambda: build(
        *MIXED, dtype="bfloat16", kv_dtype="float8_e4m3fn", compute_dtype="bfloat16", k_scale=0.5, v_scale=1.7
    ),
    "fp8_e5m2_per_head": lambda: build(
        *MIXED,
        dtype="bfloat16",
        kv_dtype="float8_e5m2",
        compute_dtype="bfloat16",
        k_scale=np.array([0.5, 1.25], np.float32),
        v_scale=np.array([2.0, 0.1], np.float32),
    ),
    "int8_per_head": lambda: build(
        *MIXED,
        dtype="bfloat16",
        kv_dtype="int8",
        compute_dtype="bfloat16",
        k_scale=np.array([0.01, 0.02], np.float32),
        v_scale=np.array([0.05, 0.013], np.float32),
    ),
    "int8_f32": lambda: build(*MIXED, kv_dtype="int8", k_scale=0.01, v_scale=0.02, sinks=True, sliding_window=7),
    # ------------------------------------------------ sizes past a block
    "long_decode": lambda: build((1, 1), (1500, 777), Shape(page=16, pages_per_seq=96, pages=160)),
    "long_chunk": lambda: build((150, 70), (700, 300), Shape(rows=224, page=16, pages_per_seq=48, pages=70)),
    "long_prefill_window": lambda: build(
        (200,), (600,), Shape(rows=208, page=8, pages_per_seq=80, pages=90), sliding_window=33
    ),
    "positions_past_int16": lambda: build(
        (2, 1), (33000, 40), Shape(4, 2, pages_per_seq=260, pages=270, page=128, head_dim=8), sliding_window=50
    ),
}

# A program each, whose options the others cover between them: left to the long run.
SLOW = frozenset({
    "wide_table", "table_one_wide", "page_16", "one_page_in_the_pool", "mha", "group_16", "head_dim_1", "head_dim_80",
    "head_dim_128", "window_1", "window_of_the_context", "window_sinks", "scale", "scale_zero", "f16", "bf16",
    "bf16_computed_in_f32", "f32_queries_bf16_pages", "bf16_queries_f32_pages", "fp8_e5m2_per_head", "int8_f32",
    "long_decode", "long_chunk", "long_prefill_window",
})  # fmt: skip
