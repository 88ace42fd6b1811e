"""Ragged paged attention in float64: the answer, with nothing clever in it.

A case is cut into blocks, and each block is solved by the textbook formula. The bound (`oracle.bound`) walks the
same blocks and reuses what is solved here. The rows of small sequences share a block, each with the keys that it sees
(a campaign lives on cases of a few dozen tokens, where NumPy's call overhead is most of the cost), be they of one
case or of several of equal shapes; a large sequence is cut by heads and rows.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from oracle.case import Case, Sequence, visible
from oracle.stack import Stack, stack

# Of a block, so that the arrays it is solved by stay in a core's cache.
MAX_KEY_ELEMENTS = 2**18  # float64 elements of gathered keys (or values)
MAX_LOGITS = 2**17  # float64 logits
SMALL = 2**18  # products p v up to which sequences share a block, and up to which `bound` forms each p |v - o|


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Rows and the keys they see. The leading axis E runs over Q sets of rows, then over the kv heads of each.

    Keys that a row does not see are masked; those that stand for none, so that all rows have N, hold zeros.
    """

    case: Case  # for shapes, dtypes and options alone: the rows may be those of several cases
    tokens: np.ndarray  # int [Q, R] the output rows of each set
    kv_heads: slice
    queries: np.ndarray  # f64 [E, R, G, D]
    keys: np.ndarray  # f64 [E, N, D]
    values: np.ndarray  # f64 [E, N, D]
    mask: np.ndarray  # bool [E, R, 1, N], True where the row sees the key
    sinks: np.ndarray  # f64 [E, 1, G], -inf without sinks
    k_scale: np.ndarray  # f64 [E, 1, 1] the size of the keys' quantisation scale, or [1, 1, 1] of 1

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
        (E, R, G, *rest), Q = block_result.shape, len(self.tokens)
        heads = slice(self.kv_heads.start * G, self.kv_heads.stop * G)
        rows = block_result.reshape(Q, E // Q, R, G, *rest).swapaxes(1, 2)  # [Q, R, H, G, ...]
        whole[self.tokens, heads] = rows.reshape(Q, R, E // Q * G, *rest)


@dataclasses.dataclass(frozen=True, eq=False)
class Solved:
    """The steps of the softmax of one block, in the symbols of the error bound."""

    x: np.ndarray  # [E, R, G, N] scaled logits; 0 where masked
    z: np.ndarray  # [E, R, G, N] capped logits; 0 where masked
    m: np.ndarray  # [E, R, G] the largest logit or sink; 0 for a row that sees no key and has no sink
    p: np.ndarray  # [E, R, G, N] weights; 0 where masked
    pi: np.ndarray  # [E, R, G] weight of the sink
    L: np.ndarray  # [E, R, G] the denominator over e^m
    divisor: np.ndarray  # [E, R, G] the same, 1 for a row that sees nothing
    mass: np.ndarray  # [E, R, G] sum of p: 1 - pi, or 0 for a row that sees nothing
    output: np.ndarray  # [E, R, G, D]
    lse: np.ndarray  # [E, R, G]

    @functools.cached_property
    def abs_output(self) -> np.ndarray:
        return np.abs(self.output)


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
    every = bool(mask.all())
    if not every:
        x = np.where(mask, x, 0.0)  # a masked logit may be anything, and must not overflow below
    z = x if case.logits_soft_cap is None else case.logits_soft_cap * np.tanh(x / case.logits_soft_cap)
    seen = z if every else np.where(mask, z, -np.inf)
    top = np.maximum(seen.max(axis=-1, initial=-np.inf), block.sinks)
    m = np.where(np.isneginf(top), 0.0, top)
    p = seen - m[..., None]
    np.exp(p, out=p)
    mass, sink = p.sum(axis=-1), np.exp(block.sinks - m)
    L = mass + sink
    divisor = np.where(L == 0, 1.0, L)
    lse = top + np.where(L > 0, np.log(divisor), 0.0)
    p /= divisor[..., None]
    return Solved(x, z, m, p, sink / divisor, L, divisor, mass / divisor, block.mix(p, block.values), lse)


def blocks(*cases: Case) -> Iterator[Block]:
    """Every row that a valid sequence owns, for every head, exactly once; rows of several cases as `stack` has them."""
    small, whole = [], stack(cases)
    for sequence in whole.sequences:
        if _products(whole.case, sequence.num_rows, sequence.num_keys) <= SMALL:
            small.append(sequence)
        else:
            yield from _large(whole, sequence)
    if small:
        yield from _small(whole, small)


def _products(case: Case, num_rows: int, num_keys: int) -> int:
    return num_rows * max(1, num_keys) * case.num_q_heads * case.head_dim


def _small(whole: Stack, sequences: list[Sequence]) -> Iterator[Block]:
    """The rows of small sequences, each with the keys that it sees and no others: like with like, all heads."""
    case = whole.case
    facts = np.array([(s.index, s.context_len, s.start - s.positions[0]) for s in sequences])
    index, context, shift = facts.repeat([s.num_rows for s in sequences], axis=0).T
    position = np.concatenate([s.positions for s in sequences])
    lo, hi = visible(position, context, case.sliding_window)
    order = np.argsort(lo - hi, kind="stable")  # the row that sees most comes first
    while len(order):
        longest = max(0, int(hi[order[0]] - lo[order[0]]))
        fit = max(1, SMALL // _products(case, 1, longest))
        rows, order = order[:fit], order[fit:]
        yield _pack(whole, index[rows], position[rows] + shift[rows], lo[rows], hi[rows], longest)


def _pack(whole: Stack, index: np.ndarray, tokens: np.ndarray, lo: np.ndarray, hi: np.ndarray, N: int) -> Block:
    """Rows `tokens` `[Q]` of sequences `index` with the keys `[lo, hi)` of each, at most N."""
    case, Q, every = whole.case, len(tokens), slice(0, whole.case.num_kv_heads)
    H, G, D = case.num_kv_heads, case.group, case.head_dim
    keys = lo[:, None] + np.arange(N)  # [Q, N] positions
    real = keys < hi[:, None]
    k, v = gather(whole, index[:, None], keys, real, every)
    return Block(
        case,
        tokens[:, None],
        every,
        whole.queries[tokens].astype(np.float64).reshape(Q * H, 1, G, D),
        k.reshape(Q * H, N, D),
        v.reshape(Q * H, N, D),
        real[:, None, None].repeat(H, axis=0),
        *_by_head(whole, index, every),
    )


def _large(whole: Stack, sequence: Sequence) -> Iterator[Block]:
    """One sequence cut by kv heads, then by rows, so that a block fits the two limits."""
    case, index = whole.case, np.array([[sequence.index]])
    step = max(1, MAX_KEY_ELEMENTS // max(1, sequence.num_keys * case.head_dim))
    for first in range(0, case.num_kv_heads, step):
        kv_heads = slice(first, min(first + step, case.num_kv_heads))
        positions = np.arange(*sequence.keys)[None]
        keys, values = gather(whole, index, positions, np.full(positions.shape, True), kv_heads)[:, 0]
        rows = min(1024, MAX_LOGITS // max(1, keys.shape[0] * case.group * keys.shape[1]))
        if not (np.isfinite(keys).all() and np.isfinite(values).all()):
            rows = 1  # 0 * NaN: a row must not meet a slot that only its neighbours see
        for row in range(0, sequence.num_rows, max(1, rows)):
            stop = min(row + max(1, rows), sequence.num_rows)
            yield _cut(whole, sequence, kv_heads, keys, values, row, stop)


def _cut(whole: Stack, sequence: Sequence, kv_heads: slice, keys, values, row: int, stop: int) -> Block:
    """Rows `[row, stop)` of one sequence with just the keys that they see."""
    case, base = whole.case, sequence.keys[0]
    lo = max(base, visible(int(sequence.positions[row]), sequence.context_len, case.sliding_window)[0])
    hi = max(lo, visible(int(sequence.positions[stop - 1]), sequence.context_len, case.sliding_window)[1])
    H, G = kv_heads.stop - kv_heads.start, case.group
    tokens = np.arange(sequence.start + row, sequence.start + stop)[None]
    queries = whole.queries[tokens[0], kv_heads.start * G : kv_heads.stop * G].astype(np.float64)
    mask = _mask(case, sequence.positions[None, row:stop], sequence.context_len, np.arange(lo, hi)[None])
    return Block(
        case,
        tokens,
        kv_heads,
        np.ascontiguousarray(queries.reshape(stop - row, H, G, -1).swapaxes(0, 1)),
        keys[:, lo - base : hi - base],
        values[:, lo - base : hi - base],
        np.broadcast_to(mask[:, :, None], (H, stop - row, 1, hi - lo)),
        *_by_head(whole, np.array([sequence.index]), kv_heads),
    )


def _mask(case: Case, positions: np.ndarray, context, keys: np.ndarray) -> np.ndarray:
    """Which of the keys `[Q, N]` the rows at positions `[Q, R]` see: bool `[Q, R, N]`."""
    lo, hi = visible(positions, context, case.sliding_window)
    mask = keys[:, None] < hi[:, :, None]
    return mask if case.sliding_window is None else mask & (keys[:, None] >= lo[:, :, None])


def gather(whole: Stack, index: np.ndarray, keys: np.ndarray, real: np.ndarray, kv_heads: slice) -> np.ndarray:
    """What lies at positions `keys` `[Q, N]` of sequences `index` `[Q, 1]`: f64 `[2, Q, H, N, D]`, keys and values,
    dequantised. Zeros where a position is not `real`.
    """
    case = whole.case
    page, slot = np.divmod(np.where(real, keys, 0), case.page_size)
    row = (whole.tables[index, page] * np.int64(case.page_size) + slot) * (2 * case.num_kv_heads)
    heads = np.arange(2 * kv_heads.start, 2 * kv_heads.stop).reshape(-1, 2).T  # [2, H]
    numbers = whole.kv_pages.reshape(-1, case.head_dim)
    # Clipped: a table's first entry stands in for what is not real, and may be dead.
    found = _float64(numbers.take(row[:, None] + heads[:, None, :, None], axis=0, mode="clip"))
    if not real.all():
        found.transpose(1, 3, 0, 2, 4)[~real] = 0
    for combined, scale in zip(found, whole.scales, strict=True):
        if scale is not None:
            combined *= scale[index[:, 0] // case.max_seqs, kv_heads, None, None]
    return found


def _float64(numbers: np.ndarray) -> np.ndarray:
    """The stored numbers in float64; those of float8 from a table, for their cast takes thirty times that of others."""
    if numbers.dtype.itemsize > 1 or numbers.dtype == np.int8:
        return numbers.astype(np.float64)
    return _of_each_byte(numbers.dtype)[numbers.view(np.uint8)]


@functools.cache
def _of_each_byte(dtype: np.dtype) -> np.ndarray:
    """f64 `[256]`"""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)


def _by_head(whole: Stack, index: np.ndarray, kv_heads: slice) -> tuple[np.ndarray, np.ndarray]:
    """Sinks f64 `[E, 1, G]` and key scales f64 `[E, 1, 1]` of some kv heads of sequences `index` `[Q]`."""
    cases = index // whole.case.max_seqs
    scale = whole.scales[0]
    sinks = whole.sinks[cases, kv_heads].reshape(-1, 1, whole.case.group)
    return sinks, np.ones((1, 1, 1)) if scale is None else np.abs(scale[cases, kv_heads].reshape(-1, 1, 1))
