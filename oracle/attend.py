"""Ragged paged attention in float64: the answer, with nothing clever in it.

A case is cut into blocks (some rows of one sequence, some kv heads, the keys those rows see), and each block is
solved by the textbook formula. The bound (`oracle.bound`) walks the same blocks and reuses what is solved here.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from oracle.case import Case, Sequence, visible

MAX_KEY_ELEMENTS = 2**24  # float64 elements of gathered keys (or values) held at once
MAX_LOGITS = 2**22  # float64 logits held at once


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Some rows of one sequence, all query heads of some kv heads, every key that one of the rows sees."""

    case: Case
    rows: slice  # of the output's first axis
    heads: slice  # of the output's second axis
    kv_heads: slice
    queries: np.ndarray  # f64 [H, R, G, D]
    keys: np.ndarray  # f64 [H, N, D]
    values: np.ndarray  # f64 [H, N, D]
    mask: np.ndarray  # bool [R, 1, N], True where the row sees the key
    sinks: np.ndarray  # f64 [H, 1, G], -inf without sinks
    first_key: int

    def score(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """`[H, R, G, D]` times `[H, N, D]` to `[H, R, G, N]`."""
        H, R, G, D = queries.shape
        return np.matmul(queries.reshape(H, R * G, D), keys.transpose(0, 2, 1)).reshape(H, R, G, -1)

    def mix(self, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """`[H, R, G, N]` times `[H, N, D]` to `[H, R, G, D]`."""
        H, R, G, N = weights.shape
        return np.matmul(weights.reshape(H, R * G, N), values).reshape(H, R, G, -1)

    def scatter(self, block_result: np.ndarray, whole: np.ndarray) -> None:
        """Writes `[H, R, G, ...]` to its place in `[T, Hq, ...]`."""
        H, R, G = block_result.shape[:3]
        whole[self.rows, self.heads] = np.moveaxis(block_result, 0, 1).reshape(
            R, H * G, *block_result.shape[3:]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Solved:
    """The steps of the softmax of one block, in the symbols of the error bound."""

    x: np.ndarray  # [H, R, G, N] scaled logits; 0 where masked
    z: np.ndarray  # [H, R, G, N] capped logits; 0 where masked
    m: np.ndarray  # [H, R, G] the largest logit or sink; 0 for a row that sees no key and has no sink
    p: np.ndarray  # [H, R, G, N] weights; 0 where masked
    pi: np.ndarray  # [H, R, G] weight of the sink
    L: np.ndarray  # [H, R, G] the denominator over e^m
    output: np.ndarray  # [H, R, G, D]
    lse: np.ndarray  # [H, R, G]


def attend(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The right answer to a case: output f64 `[T, Hq, D]` and log-sum-exp f64 `[T, Hq]`.

    Rows of nobody hold 0 and -inf, rows of a sequence with invalid metadata NaN. `compute_dtype` has no part in it.
    """
    output, lse = blank(case)
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
        x = np.where(mask, x, 0.0)
    z = x if case.logits_soft_cap is None else case.logits_soft_cap * np.tanh(x / case.logits_soft_cap)
    m = np.max(z, axis=-1, initial=-np.inf, where=mask)
    m = np.maximum(m, block.sinks)
    lse_shift = m
    m = np.where(np.isneginf(m), 0.0, m)
    p = np.exp(z - m[..., None])
    p *= mask
    sink = np.exp(block.sinks - m)
    L = p.sum(axis=-1) + sink
    with np.errstate(divide="ignore"):
        lse = lse_shift + np.where(L > 0, np.log(L), 0.0)
    divisor = np.where(L == 0, 1.0, L)
    p /= divisor[..., None]
    return Solved(x, z, m, p, sink / divisor, L, block.mix(p, block.values), lse)


def blocks(case: Case) -> Iterator[Block]:
    """Every row that a valid sequence owns, for every head, exactly once."""
    for sequence in case.sequences():
        num_keys = sequence.keys[1] - sequence.keys[0]
        step = max(1, MAX_KEY_ELEMENTS // max(1, num_keys * case.head_dim))
        for first in range(0, case.num_kv_heads, step):
            kv_heads = slice(first, min(first + step, case.num_kv_heads))
            yield from _row_blocks(case, sequence, kv_heads)


def _row_blocks(case: Case, sequence: Sequence, kv_heads: slice) -> Iterator[Block]:
    keys, values = gather(case, sequence, kv_heads)
    heads = slice(kv_heads.start * case.group, kv_heads.stop * case.group)
    num_heads = heads.stop - heads.start
    num_keys = keys.shape[1]
    step = max(1, min(MAX_LOGITS // max(1, num_heads * num_keys), 1024))
    if not (np.isfinite(keys).all() and np.isfinite(values).all()):
        step = 1  # 0 * NaN: a row must not meet a slot that only its neighbours see
    for start in range(sequence.start, sequence.stop, step):
        stop = min(start + step, sequence.stop)
        positions = sequence.positions[start - sequence.start : stop - sequence.start]
        lo, hi = visible(positions, sequence.context_len, case.sliding_window)
        base = sequence.keys[0]
        first, last = max(base, int(lo[0])), max(base, int(hi[-1]))
        index = np.arange(first, last)
        queries = case.queries[start:stop, heads].astype(np.float64)
        yield Block(
            case,
            slice(start, stop),
            heads,
            kv_heads,
            _by_head(queries, case.group),
            keys[:, first - base : last - base],
            values[:, first - base : last - base],
            ((index >= lo[:, None]) & (index < hi[:, None]))[:, None, :],
            _sinks(case, heads),
            first,
        )


def gather(case: Case, sequence: Sequence, kv_heads: slice) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values that the sequence's rows see, dequantised: f64 `[H, N, D]` each. Reads no other slot."""
    lo, hi = sequence.keys
    if hi <= lo:
        empty = np.zeros((kv_heads.stop - kv_heads.start, 0, case.head_dim))
        return empty, empty
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


def _by_head(queries: np.ndarray, group: int) -> np.ndarray:
    """`[R, Hq, D]` to `[Hkv, R, group, D]`."""
    rows, heads, dim = queries.shape
    return np.ascontiguousarray(queries.reshape(rows, heads // group, group, dim).transpose(1, 0, 2, 3))


def _sinks(case: Case, heads: slice) -> np.ndarray:
    if case.softmax_aux is None:
        return np.full((1, 1, 1), -np.inf)
    return case.softmax_aux[heads].astype(np.float64).reshape(-1, 1, case.group)
