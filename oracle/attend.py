"""Ragged paged attention in float64: the answer, with nothing clever in it.

A case is cut into blocks, and each block is solved by the textbook formula. The bound (`oracle.bound`) walks the
same blocks and reuses what is solved here. Small sequences share a block, padded to the longest (a campaign lives
on cases of a few dozen tokens, where NumPy's call overhead is all the cost); a large one is cut by heads and rows.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from oracle.case import Case, Sequence, visible

MAX_KEY_ELEMENTS = 2**24  # float64 elements of gathered keys (or values) held at once
MAX_LOGITS = 2**22  # float64 logits held at once
SMALL = 2**18  # products p v up to which sequences share a block, and up to which `bound` forms each p |v - o|


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Rows and the keys they see. The leading axis E runs over sequences, then over kv heads of each.

    Padding: rows whose token is -1 go nowhere, keys that no row sees hold zeros and are masked.
    """

    case: Case
    tokens: np.ndarray  # int [Q, R] the output rows of each of Q sequences
    kv_heads: slice
    queries: np.ndarray  # f64 [E, R, G, D]
    keys: np.ndarray  # f64 [E, N, D]
    values: np.ndarray  # f64 [E, N, D]
    mask: np.ndarray  # bool [E, R, 1, N], True where the row sees the key
    sinks: np.ndarray  # f64 [E, 1, G], -inf without sinks
    first_key: int  # of a block of one sequence: the position of its key 0

    def score(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """`[E, R, G, D]` times `[E, N, D]` to `[E, R, G, N]`."""
        E, R, G, D = queries.shape
        return np.matmul(queries.reshape(E, R * G, D), keys.transpose(0, 2, 1)).reshape(E, R, G, -1)

    def mix(self, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """`[E, R, G, N]` times `[E, N, D]` to `[E, R, G, D]`."""
        E, R, G, N = weights.shape
        return np.matmul(weights.reshape(E, R * G, N), values).reshape(E, R, G, -1)

    @functools.cached_property
    def n(self) -> np.ndarray:
        """How many keys each row sees: `[E, R, 1]`."""
        return self.mask.sum(axis=-1, dtype=np.float64)

    @functools.cached_property
    def abs_values(self) -> np.ndarray:
        return np.abs(self.values)

    @functools.cached_property
    def value_sum(self) -> np.ndarray:
        """`sum_j |v_jd|` over visible keys: `[E, R, 1, D]`."""
        return np.matmul(self.mask[:, :, 0].astype(np.float64), self.abs_values)[:, :, None, :]

    def scatter(self, block_result: np.ndarray, whole: np.ndarray) -> None:
        """Writes `[E, R, G, ...]` to its place in `[T, Hq, ...]`."""
        (Q, R), (_, _, G, *rest) = self.tokens.shape, block_result.shape
        by_row = block_result.reshape(Q, -1, R, G, *rest).swapaxes(1, 2).reshape(Q * R, -1, *rest)
        tokens = self.tokens.reshape(-1)
        heads = slice(self.kv_heads.start * G, self.kv_heads.stop * G)
        if tokens.min() < 0:
            tokens, by_row = tokens[tokens >= 0], by_row[tokens >= 0]
        whole[tokens, heads] = by_row


@dataclasses.dataclass(frozen=True, eq=False)
class Solved:
    """The steps of the softmax of one block, in the symbols of the error bound."""

    x: np.ndarray  # [E, R, G, N] scaled logits; 0 where masked
    z: np.ndarray  # [E, R, G, N] capped logits; 0 where masked
    m: np.ndarray  # [E, R, G] the largest logit or sink; 0 for a row that sees no key and has no sink
    p: np.ndarray  # [E, R, G, N] weights; 0 where masked
    pi: np.ndarray  # [E, R, G] weight of the sink
    L: np.ndarray  # [E, R, G] the denominator over e^m
    output: np.ndarray  # [E, R, G, D]
    lse: np.ndarray  # [E, R, G]


def attend(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The right answer to a case: output f64 `[T, Hq, D]` and log-sum-exp f64 `[T, Hq]`.

    Rows of nobody hold 0 and -inf, rows of a sequence with invalid metadata NaN. `compute_dtype` has no part in it.
    """
    output, lse = blank(case)
    with np.errstate(over="ignore", invalid="ignore"):  # live inf and NaN go where they go
        for block in blocks(case):
            solved = solve(block)
            block.scatter(solved.output, output)
            block.scatter(solved.lse, lse)
    return output, lse


def blank(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Output and lse before any valid sequence is solved: 0 and -inf, NaN in rows of invalid sequences."""
    output = np.zeros(case.queries.shape)
    lse = np.full(case.queries.shape[:2], -np.inf)
    for start, stop, _ in case.invalid_rows():
        output[start:stop] = np.nan
        lse[start:stop] = np.nan
    return output, lse


def solve(block: Block) -> Solved:
    """One block by the textbook: logits, cap, maximum, weights, sums."""
    case, mask = block.case, block.mask
    x = block.score(block.queries, block.keys)
    x *= case.scale
    if not mask.all():
        x = np.where(mask, x, 0.0)  # a masked logit may be anything, and must not overflow below
    z = x if case.logits_soft_cap is None else case.logits_soft_cap * np.tanh(x / case.logits_soft_cap)
    m = np.max(z, axis=-1, initial=-np.inf, where=mask)
    m = np.maximum(m, block.sinks)
    lse_shift = m
    m = np.where(np.isneginf(m), 0.0, m)
    p = np.exp(np.where(mask, z - m[..., None], -np.inf))
    sink = np.exp(block.sinks - m)
    L = p.sum(axis=-1) + sink
    with np.errstate(divide="ignore"):
        lse = lse_shift + np.where(L > 0, np.log(L), 0.0)
    divisor = np.where(L == 0, 1.0, L)
    p /= divisor[..., None]
    return Solved(x, z, m, p, sink / divisor, L, block.mix(p, block.values), lse)


def blocks(case: Case) -> Iterator[Block]:
    """Every row that a valid sequence owns, for every head, exactly once."""
    small = []
    for sequence in case.sequences():
        if _products(case, sequence.num_rows, sequence.num_keys) <= SMALL:
            small.append(sequence)
        else:
            yield from _large(case, sequence)
    yield from _small(case, small)


def _products(case: Case, num_rows: int, num_keys: int) -> int:
    return num_rows * max(1, num_keys) * case.num_q_heads * case.head_dim


def _small(case: Case, sequences: list[Sequence]) -> Iterator[Block]:
    """Packs small sequences, like with like, while the padded block is small too."""
    every_head = slice(0, case.num_kv_heads)
    group: list[tuple[Sequence, np.ndarray, np.ndarray]] = []
    rows = keys = 0
    for sequence in sorted(sequences, key=lambda sequence: (sequence.num_rows, sequence.num_keys)):
        k, v = gather(case, sequence, every_head)
        if not (np.isfinite(k).all() and np.isfinite(v).all()):
            yield from _large(case, sequence)
            continue
        wider, longer = max(rows, sequence.num_rows), max(keys, sequence.num_keys)
        if group and _products(case, wider * (len(group) + 1), longer) > SMALL:
            yield _pack(case, group, rows, keys)
            group, wider, longer = [], sequence.num_rows, sequence.num_keys
        group.append((sequence, k, v))
        rows, keys = wider, longer
    if group:
        yield _pack(case, group, rows, keys)


def _pack(case: Case, group: list[tuple[Sequence, np.ndarray, np.ndarray]], R: int, N: int) -> Block:
    """One block of several whole sequences, all heads."""
    Q, H, D = len(group), case.num_kv_heads, case.head_dim
    tokens = np.full((Q, R), -1)
    queries = np.zeros((Q, R, case.num_q_heads, D))
    keys, values = np.zeros((2, Q, H, N, D))
    mask = np.zeros((Q, 1, R, 1, N), bool)
    for i, (sequence, k, v) in enumerate(group):
        rows, num_keys = sequence.num_rows, sequence.num_keys
        tokens[i, :rows] = np.arange(sequence.start, sequence.stop)
        queries[i, :rows] = case.queries[sequence.start : sequence.stop]
        keys[i, :, :num_keys] = k
        values[i, :, :num_keys] = v
        mask[i, 0, :rows, 0, :num_keys] = _mask(case, sequence, 0, rows, *sequence.keys)
    return Block(
        case,
        tokens,
        slice(0, H),
        np.ascontiguousarray(queries.reshape(Q, R, H, case.group, D).swapaxes(1, 2)).reshape(Q * H, R, -1, D),
        keys.reshape(Q * H, N, D),
        values.reshape(Q * H, N, D),
        np.broadcast_to(mask, (Q, H, R, 1, N)).reshape(Q * H, R, 1, N),
        np.tile(_sinks(case, slice(0, H)), (Q, 1, 1)),
        group[0][0].keys[0],
    )


def _large(case: Case, sequence: Sequence) -> Iterator[Block]:
    """One sequence cut by kv heads, then by rows, so that a block fits the two limits."""
    step = max(1, MAX_KEY_ELEMENTS // max(1, sequence.num_keys * case.head_dim))
    for first in range(0, case.num_kv_heads, step):
        kv_heads = slice(first, min(first + step, case.num_kv_heads))
        keys, values = gather(case, sequence, kv_heads)
        rows = min(1024, MAX_LOGITS // max(1, keys.shape[0] * case.group * keys.shape[1]))
        if not (np.isfinite(keys).all() and np.isfinite(values).all()):
            rows = 1  # 0 * NaN: a row must not meet a slot that only its neighbours see
        for row in range(0, sequence.num_rows, max(1, rows)):
            stop = min(row + max(1, rows), sequence.num_rows)
            yield _cut(case, sequence, kv_heads, keys, values, row, stop)


def _cut(case: Case, sequence: Sequence, kv_heads: slice, keys, values, row: int, stop: int) -> Block:
    """Rows `[row, stop)` of one sequence with just the keys that they see."""
    base = sequence.keys[0]
    lo = max(base, visible(int(sequence.positions[row]), sequence.context_len, case.sliding_window)[0])
    hi = max(lo, visible(int(sequence.positions[stop - 1]), sequence.context_len, case.sliding_window)[1])
    H, G = kv_heads.stop - kv_heads.start, case.group
    tokens = np.arange(sequence.start + row, sequence.start + stop)[None]
    queries = case.queries[tokens[0], kv_heads.start * G : kv_heads.stop * G].astype(np.float64)
    mask = _mask(case, sequence, row, stop, lo, hi)
    return Block(
        case,
        tokens,
        kv_heads,
        np.ascontiguousarray(queries.reshape(stop - row, H, G, -1).swapaxes(0, 1)),
        keys[:, lo - base : hi - base],
        values[:, lo - base : hi - base],
        np.broadcast_to(mask[None, :, None], (H, stop - row, 1, hi - lo)),
        _sinks(case, kv_heads),
        lo,
    )


def _mask(case: Case, sequence: Sequence, row: int, stop: int, first: int, last: int) -> np.ndarray:
    """Which of the keys `[first, last)` rows `[row, stop)` see: bool `[stop - row, last - first]`."""
    lo, hi = visible(sequence.positions[row:stop], sequence.context_len, case.sliding_window)
    index = np.arange(first, last)
    return (index >= lo[:, None]) & (index < hi[:, None])


def gather(case: Case, sequence: Sequence, kv_heads: slice) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values that the sequence's rows see, dequantised: f64 `[H, N, D]` each. Reads no other slot."""
    lo, hi = sequence.keys
    first_page = lo // case.page_size
    pages = sequence.pages[first_page : -(-hi // case.page_size)]
    combined = case.kv_pages[pages, :, 2 * kv_heads.start : 2 * kv_heads.stop]
    combined = combined.reshape(-1, *combined.shape[2:])[lo - first_page * case.page_size :][: hi - lo]
    combined = np.ascontiguousarray(combined.transpose(1, 0, 2)).astype(np.float64)  # [2H, N, D]
    keys, values = combined[0::2], combined[1::2]
    if case.k_scale is not None:
        keys = keys * scale_of(case.k_scale, kv_heads)
    if case.v_scale is not None:
        values = values * scale_of(case.v_scale, kv_heads)
    return keys, values


def scale_of(scale, kv_heads: slice) -> np.ndarray:
    """A quantisation scale as f64 `[H, 1, 1]` (or `[1, 1, 1]`)."""
    scale = np.asarray(scale, np.float64)
    return scale.reshape(1, 1, 1) if scale.ndim == 0 else scale[kv_heads, None, None]


def _sinks(case: Case, kv_heads: slice) -> np.ndarray:
    """Sinks of some kv heads' query heads: f64 `[H, 1, G]`."""
    if case.softmax_aux is None:
        return np.full((kv_heads.stop - kv_heads.start, 1, case.group), -np.inf)
    sinks = case.softmax_aux.reshape(case.num_kv_heads, 1, case.group)
    return sinks[kv_heads].astype(np.float64)
