"""What no row may see, made loud: poison in dead slots, garbage in dead metadata, guard pages around live ones.

`nan_fill` and `large_fill` are the same case for every correct kernel: the bits of both outputs must agree. NaN goes
only to slots that no row of any sequence sees: a row that shares a tile with one that sees the slot may multiply it
by a zero weight, and 0 * NaN is NaN.
"""

import numpy as np

from oracle.case import Case, dtype_of
from oracle.exact import live_slots

GARBAGE = (-1, 2**31 - 1, -(2**31), 10**6)  # for metadata that nobody may use
_LARGE = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}


def seen_slots(case: Case) -> np.ndarray:
    """Slots that some row of some valid sequence sees: bool `[P, page]`."""
    seen = np.zeros(case.num_pages * case.page_size, bool)
    for sequence in case.sequences():
        seen[live_slots(case, sequence)] = True
    return seen.reshape(case.num_pages, case.page_size)


def nan_fill(case: Case) -> Case:
    """NaN in every slot and query row nobody may see (int8 has none: its extremes), garbage in dead metadata."""
    return _fill(case, np.nan, 0)


def large_fill(case: Case) -> Case:
    """The second fill: large finite numbers of both signs, other garbage. Must give the bits of the first."""
    return _fill(case, 2.0**15, 1)


def _fill(case: Case, value: float, turn: int) -> Case:
    pages = np.array(case.kv_pages)
    dead = ~seen_slots(case)
    pages[dead] = _poison(pages[dead].shape, case.kv_pages.dtype, value)
    queries = np.array(case.queries)
    rows = ~owned_rows(case)
    queries[rows] = _poison(queries[rows].shape, case.queries.dtype, value)
    return dead_metadata(case.replace(kv_pages=pages, queries=queries), turn)


def _poison(shape: tuple[int, ...], dtype: np.dtype, value: float) -> np.ndarray:
    """An array of the value where the dtype has it, of its largest where not; large values alternate in sign."""
    if np.isnan(value) and dtype.name != "int8":
        return np.full(shape, value, dtype_of(dtype.name))
    value = min(_LARGE.get(dtype.name, 2.0**15), 2.0**15)
    sign = 1 - 2 * (np.arange(int(np.prod(shape))).reshape(shape) % 2)
    return (sign * value).astype(dtype)


def owned_rows(case: Case) -> np.ndarray:
    """Query rows that some live sequence, valid or not, owns: bool `[T]`."""
    owned = np.zeros(case.num_tokens, bool)
    for sequence in case.sequences():
        owned[sequence.start : sequence.stop] = True
    for start, stop, _ in case.invalid_rows():
        owned[start:stop] = True
    return owned


def live_entries(case: Case) -> np.ndarray:
    """Table entries whose page holds a key that some row sees: bool `[S, pages_per_seq]`."""
    live = np.zeros(case.block_tables.shape, bool)
    for sequence in case.sequences():
        lo, hi = sequence.keys
        live[sequence.index, lo // case.page_size : -(-hi // case.page_size)] = hi > lo
    return live


def dead_metadata(case: Case, turn: int = 0) -> Case:
    """Garbage in dead table entries and in the metadata of dead sequences. Invalid sequences are left as they are."""
    garbage = np.resize(np.roll(GARBAGE, turn), case.block_tables.size + case.max_seqs + 1).astype(np.int32)
    untouched = live_entries(case)
    untouched[[s for s in range(case.live_seqs) if case.invalid(s) is not None]] = True
    tables = np.where(untouched, case.block_tables, garbage[: untouched.size].reshape(untouched.shape))
    context_lens, offsets = np.array(case.context_lens), np.array(case.query_start_loc)
    context_lens[case.live_seqs :] = garbage[: case.max_seqs - case.live_seqs]
    offsets[case.live_seqs + 1 :] = garbage[: case.max_seqs - case.live_seqs]
    return case.replace(block_tables=tables, context_lens=context_lens, query_start_loc=offsets)


def guard_pages(case: Case) -> Case:
    """The same case with a page of poison before, between and after its pages, so that no neighbour is live."""
    pages = _poison((2 * case.num_pages + 1, *case.kv_pages.shape[1:]), case.kv_pages.dtype, np.nan)
    pages[1::2] = case.kv_pages
    legal = (case.block_tables >= 0) & (case.block_tables < case.num_pages)
    return case.replace(kv_pages=pages, block_tables=np.where(legal, 2 * case.block_tables + 1, case.block_tables))
