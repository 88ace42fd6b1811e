"""Several cases of equal shapes as one: to a row, the pages and rows of another case are what a neighbour's are."""

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as Several

import numpy as np

from oracle.case import Case, Sequence


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """C cases that differ in nothing but their numbers; rows, sequences and pages of each follow the one's before."""

    case: Case  # the first: what it says of shapes, dtypes and options holds for all
    sequences: list[Sequence]  # of all; rows and table as they are numbered here
    queries: np.ndarray  # [C * T, Hq, D]
    kv_pages: np.ndarray  # [C * P, page, 2 * Hkv, D]
    tables: np.ndarray  # int [C * S, pages_per_seq]
    scales: tuple[np.ndarray | None, np.ndarray | None]  # quantisation of keys and values: f64 [C, Hkv]
    sinks: np.ndarray  # f64 [C, Hkv, 1, G], -inf without sinks


def stack(cases: Several[Case]) -> Stack:
    """The cases as one. Copies nothing of a single case; ValueError where cases differ in more than their numbers."""
    first = cases[0]
    if any(_static(case) != _static(first) for case in cases[1:]):
        raise ValueError(f"{len(cases)} cases of different shapes or options cannot be walked as one")
    C, H, G = len(cases), first.num_kv_heads, first.group
    sinks = [-np.inf if case.softmax_aux is None else case.softmax_aux.reshape(H, G) for case in cases]
    return Stack(
        first,
        [sequence for c, case in enumerate(cases) for sequence in _numbered(case, c)],
        _joined(case.queries for case in cases),
        _joined(case.kv_pages for case in cases),
        _joined(case.block_tables + np.int64(c * case.num_pages) if c else case.block_tables
                for c, case in enumerate(cases)),
        (_by_case([case.k_scale for case in cases], (C, H)), _by_case([case.v_scale for case in cases], (C, H))),
        np.asarray(_by_case(sinks, (C, H, G)))[:, :, None],
    )  # fmt: skip


def _static(case: Case) -> tuple:
    options = (case.scale, case.logits_soft_cap, case.sliding_window, case.compute_dtype)
    given = (case.softmax_aux is None, case.k_scale is None, case.v_scale is None)
    arrays = (case.queries, case.kv_pages, case.block_tables)
    return (*options, *given, *((array.shape, array.dtype) for array in arrays))


def _numbered(case: Case, c: int) -> list[Sequence]:
    """Its sequences as those of number `c`."""
    if c == 0:
        return case.sequences()
    T, S = c * case.num_tokens, c * case.max_seqs
    return [s._replace(index=S + s.index, start=T + s.start, stop=T + s.stop) for s in case.sequences()]


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    several = list(arrays)
    return several[0] if len(several) == 1 else np.concatenate(several)


def _by_case(numbers: list, shape: tuple[int, ...]) -> np.ndarray | None:
    """f64 of the shape, from one number or one array a case; None where there are none."""
    if numbers[0] is None:
        return None
    whole = np.empty(shape)
    for one, its in zip(whole, numbers, strict=True):
        one[:] = its
    return whole
