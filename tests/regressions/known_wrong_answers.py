"""Inputs on which published kernels have answered wrongly, as literal cases with data of our own making.

Each carries the wrong answer too, so that the test of the test is in the same place: the oracle must refuse it.
Static shapes are those of the contract's cases where they can be: backends compile once for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from oracle import Case, attend
from oracle.poison import nan_fill


@dataclasses.dataclass(frozen=True)
class Regression:
    """One input, what a published kernel makes of it, and that answer in float64."""

    what: str
    case: Callable[[], Case]
    wrong: Callable[[Case], np.ndarray]


def literal(
    queries: tuple[int, ...],
    contexts: tuple[int, ...],
    *,
    rows: int = 24,
    seqs: int = 5,
    pages_per_seq: int = 6,
    pages: int = 31,
    page: int = 4,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    dtype=np.float32,
    **options,
) -> Case:
    """`queries[s]` new tokens on `contexts[s]` cached ones, on pages counted in elevens."""
    tables = np.full((seqs, pages_per_seq), -1)
    taken = 0
    for s, context in enumerate(contexts):
        for column in range(-(-context // page)):
            tables[s, column] = taken * 11 % pages  # no pool here has a multiple of 11 pages
            taken += 1
    assert taken <= pages
    offsets = np.full(seqs + 1, sum(queries))
    offsets[: len(queries) + 1] = np.cumsum([0, *queries])
    return Case(
        wave((rows, heads[0], dim), 0.37, dtype),
        wave((pages, page, 2 * heads[1], dim), 0.73, dtype),
        np.array([*contexts, *[0] * (seqs - len(contexts))]),
        tables,
        offsets,
        len(queries),
        **({"compute_dtype": "float32"} | options),
    )


def wave(shape: tuple[int, ...], step: float, dtype) -> np.ndarray:
    """Numbers between -3 and 3 of which no two near ones are alike."""
    return (3 * np.sin(step * np.arange(np.prod(shape)) ** 1.3)).reshape(shape).astype(dtype)


def queries_from_row_zero(case: Case) -> np.ndarray:
    """The second tile's slice of 8 rows does not fit after row 5 and is moved back to row 0."""
    queries = np.array(case.queries)
    queries[5:8] = case.queries[0:3]
    return attend(case.replace(queries=queries))[0]


def table_slice_moved_back(case: Case) -> np.ndarray:
    """A block of 64 pages that starts at column 64 is moved back so that it ends with the table."""
    tables = np.array(case.block_tables)
    tables[:, 64:] = case.block_tables[:, case.pages_per_seq - 64 :][:, : case.pages_per_seq - 64]
    return attend(case.replace(block_tables=tables))[0]


def nan_rows(case: Case) -> np.ndarray:
    return np.where(attend(case)[0] != 0, np.nan, 0.0)


def mean_of_values(case: Case) -> np.ndarray:
    """Rows that see no key weigh every key alike."""
    output = attend(case)[0]
    for sequence in case.sequences():
        values = case.kv_pages[sequence.pages[: -(-sequence.context_len // case.page_size)], :, 1::2]
        blind = sequence.start + np.flatnonzero(sequence.positions < 0)
        output[blind] = np.repeat(values.mean(axis=(0, 1), dtype=np.float64), case.group, axis=0)
    return output


def neighbour_reads_first_page_twice(case: Case) -> np.ndarray:
    """The sequence after an empty one meets the buffer that was loaded before it."""
    tables = np.array(case.block_tables)
    empty = np.flatnonzero(case.context_lens[: case.num_seqs] == 0)
    for s in empty + 1:
        if s < case.num_seqs and case.context_lens[s]:
            tables[s, 0] = tables[s - 2, 0] if s >= 2 else tables[s, 1]
    return attend(case.replace(block_tables=tables))[0]


def one_key_more(case: Case) -> np.ndarray:
    return attend(case.replace(sliding_window=(case.sliding_window or 0) + 1))[0]


def without_sinks(case: Case) -> np.ndarray:
    return attend(case.replace(softmax_aux=None))[0]


def narrow_sums(case: Case) -> np.ndarray:
    """The values' sum and the denominator of blocks of 128 keys, kept in bfloat16."""
    scale, narrow = case.scale, ml_dtypes.bfloat16
    pages = case.kv_pages[case.block_tables[0]].astype(np.float64).reshape(-1, 2, case.head_dim)
    x = pages[:, 0] @ case.queries[0, 0].astype(np.float64) * scale
    p = np.exp(x - x.max())
    total, mixed = np.zeros((), narrow), np.zeros(case.head_dim, narrow)
    for first in range(0, len(p), 128):
        block = slice(first, first + 128)
        total = (total.astype(np.float64) + p[block].sum()).astype(narrow)
        mixed = (mixed.astype(np.float64) + p[block] @ pages[block, 1]).astype(narrow)
    return (mixed.astype(np.float64) / total.astype(np.float64))[None, None]


def dead_rows_left_as_found(case: Case) -> np.ndarray:
    output = attend(case)[0]
    output[case.live_rows :] = case.queries[case.live_rows :].astype(np.float64)
    return output


def long_case() -> Case:
    """One decode row over 16,384 keys whose values have a mean, so that a sum of them grows long."""
    case = literal(
        (1,), (16384,), rows=1, seqs=1, pages_per_seq=128, pages=128, page=128, heads=(1, 1), dim=8,
        dtype=ml_dtypes.bfloat16, compute_dtype="bfloat16",
    )  # fmt: skip
    pages = case.kv_pages.astype(np.float32)
    pages[:, :, 1] += 1.5
    return case.replace(kv_pages=pages.astype(ml_dtypes.bfloat16), queries=case.queries / ml_dtypes.bfloat16(4))


WIDE = {"page": 1, "pages": 140}

REGRESSIONS: dict[str, Regression] = {
    "last_tile_moved_back": Regression(
        "8 rows, the last tile of 8 starts at row 5: error 2.75",
        lambda: literal((5, 3), (9, 6), rows=8),
        queries_from_row_zero,
    ),
    "table_65_wide": Regression(
        "a 64-page block at column 64 of 65 reads earlier pages",
        lambda: literal((3, 1), (65, 65), pages_per_seq=65, **WIDE),
        table_slice_moved_back,
    ),
    "table_100_wide": Regression(
        "a 64-page block at column 64 of 100 reads earlier pages: error 0.39",
        lambda: literal((3,), (100,), pages_per_seq=100, **WIDE),
        table_slice_moved_back,
    ),
    "table_127_wide": Regression(
        "a 64-page block at column 64 of 127 reads earlier pages",
        lambda: literal((3,), (127,), pages_per_seq=127, **WIDE),
        table_slice_moved_back,
    ),
    "first_block_before_the_window": Regression(
        "window 8 over 500 keys, the first block has no visible key: -inf minus -inf",
        lambda: literal((2, 1), (500, 430), pages_per_seq=128, pages=240, sliding_window=8),
        nan_rows,
    ),
    "nan_in_slots_of_nobody": Regression(
        "NaN in unused pages, table tails and the tail of the last page reaches every row",
        lambda: nan_fill(literal((5, 1, 3), (9, 21, 6))),
        nan_rows,
    ),
    "context_shorter_than_the_queries": Regression(
        "rows before position 0 get the mean of V, NaN or garbage",
        lambda: literal((6, 3, 5), (2, 3, 1)),
        mean_of_values,
    ),
    "empty_sequence_first": Regression(
        "after a sequence with neither context nor queries the next is wrong by 1.5",
        lambda: literal((0, 3, 1), (0, 9, 8)),
        neighbour_reads_first_page_twice,
    ),
    "empty_sequence_between": Regression(
        "between two live sequences one with neither context nor queries: the next is wrong by 2.3",
        lambda: literal((4, 0, 3), (10, 0, 9)),
        neighbour_reads_first_page_twice,
    ),
    "window_keeps_one_more": Regression(
        "a window of W keeps W + 1 keys: error 1.1",
        lambda: literal((5, 1, 3), (9, 24, 6), sliding_window=3),
        one_key_more,
    ),
    "sinks_ignored": Regression(
        "sinks are accepted and ignored",
        lambda: literal((5, 1, 3), (9, 24, 6), softmax_aux=np.array([2.0, -1.0, 0.5, 3.0], np.float32)),
        without_sinks,
    ),
    "bfloat16_sums_over_16k": Regression(
        "accumulators in bfloat16: relative error 1e-2 where float32 gives 1.7e-3",
        long_case,
        narrow_sums,
    ),
    "rows_past_the_last_query": Regression(
        "rows past the last live query hold garbage",
        lambda: literal((2, 3), (7, 3)),
        dead_rows_left_as_found,
    ),
}
