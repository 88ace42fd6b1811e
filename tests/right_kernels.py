"""Right kernels of unusual build, none of which the search was made with: it must accuse none of them.

They have the contract's signature and declare nothing, as somebody's kernel would that is judged for the first time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import model_kernel
import numpy as np

from oracle import Case
from oracle.case import Sequence, dtype_of, visible


def _case(arrays: tuple, options: dict[str, Any]) -> Case:
    queries, pages, contexts, tables, offsets, num_seqs, sinks = arrays
    return Case(queries, pages, contexts, tables, offsets, int(num_seqs[0]), sinks, **options)


def styled(**style: Any) -> Callable[..., np.ndarray]:
    """A blocked kernel of a style of `model_kernel`; weights are rounded to the dots' dtype."""

    def kernel(*arrays: Any, **options: Any) -> np.ndarray:
        case = _case(arrays, options)
        weights = model_kernel.operand_dtype(case)
        return model_kernel.run(case, model_kernel.Style(weights=weights, **style))[0]

    return kernel


def _rows(case: Case) -> Iterator[tuple[int, int, Sequence, int, int]]:
    """(row, query head, sequence, first key, one past the last) of every row that sees a key."""
    for sequence in case.sequences():
        for row, position in zip(range(sequence.start, sequence.stop), sequence.positions, strict=True):
            low, high = visible(int(position), sequence.context_len, case.sliding_window)
            for head in range(case.num_q_heads) if high > low else ():
                yield row, head, sequence, low, high


def one_row(case: Case, row: int, head: int, sequence: Sequence, low: int, high: int, dtype: Any):
    """Logits [n] (the sink last, where there is one) and values [n, D] of one row, in `dtype` throughout."""
    dots, kv = dtype_of(model_kernel.operand_dtype(case)), head // case.group
    index = np.arange(low, high)
    slots = case.kv_pages[sequence.pages[index // case.page_size], index % case.page_size]
    k, v = (slots[:, 2 * kv + i].astype(dots).astype(dtype) for i in (0, 1))
    scales = (np.broadcast_to(1.0 if s is None else s, case.num_kv_heads) for s in (case.k_scale, case.v_scale))
    k_scale, v_scale = (float(scale[kv]) for scale in scales)
    x = k @ case.queries[row, head].astype(dots).astype(dtype) * dtype(case.scale) * dtype(k_scale)
    if case.logits_soft_cap is not None:
        x = dtype(case.logits_soft_cap) * np.tanh(x / dtype(case.logits_soft_cap))
    sink = [] if case.softmax_aux is None else [dtype(case.softmax_aux[head])]
    return np.concatenate([x, np.array(sink, dtype)]), v * dtype(v_scale)


def by_rows(dtype: Any) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """A kernel from the answer [D] of one row and head, given its logits, its values and the case."""

    def kernel_of(answer: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def kernel(*arrays: Any, **options: Any) -> np.ndarray:
            case = _case(arrays, options)
            output = np.zeros(case.queries.shape, case.queries.dtype)
            for place in _rows(case):
                output[place[:2]] = answer(*one_row(case, *place, dtype), case).astype(output.dtype)
            return output

        return kernel

    return kernel_of


@by_rows(np.float32)
def one_pass(x: np.ndarray, v: np.ndarray, case: Case) -> np.ndarray:
    """A row at a time, all its keys at once, the weights divided before they meet the values."""
    p = np.exp(x - x.max())
    return (p / p.sum())[: len(v)] @ v


@by_rows(np.float64)
def two_passes_in_float64(x: np.ndarray, v: np.ndarray, case: Case) -> np.ndarray:
    """The maximum first, then the weights, everything in float64, keys from the last to the first."""
    p = np.exp(x - x.max())
    total = sum(p[j] * v[j] for j in reversed(range(len(v))))
    return total / p[::-1].sum()


def _merged(a: tuple, b: tuple) -> tuple:
    """Two partial answers (maximum, sum, weighted values) as one."""
    m = max(a[0], b[0])
    left, right = np.exp2(a[0] - m), np.exp2(b[0] - m)
    return m, left * a[1] + right * b[1], left * a[2] + right * b[2]


@by_rows(np.float32)
def tree_of_odd_blocks(x: np.ndarray, v: np.ndarray, case: Case) -> np.ndarray:
    """Blocks that begin at 1, 4, 7, ... in powers of two, the weights rounded for their dot, merged two by two; the
    sink is a block of its own, and comes last."""
    dots = dtype_of(model_kernel.operand_dtype(case))
    x = x * np.float32(np.log2(np.e))
    edges = [0, *range(1, len(v), 3), len(v)]
    parts = []
    for i, j in itertools.pairwise(edges):
        p = np.exp2(x[i:j] - x[i:j].max())
        parts.append((x[i:j].max(), p.sum(), p.astype(dots).astype(np.float32) @ v[i:j]))
    while len(parts) > 1:
        pairs = [_merged(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
        parts = pairs
    if len(x) > len(v):
        parts = [_merged(parts[0], (x[-1], np.float32(1), np.float32(0)))]
    _, total, values = parts[0]
    return values / total


@by_rows(np.float32)
def sums_in_chunks(x: np.ndarray, v: np.ndarray, case: Case) -> np.ndarray:
    """Right to left in chunks of five keys, each chunk summed for itself; the maximum known before."""
    p = np.exp(x - x.max())
    total, weight = np.zeros(case.head_dim, np.float32), p[len(v) :].sum(dtype=np.float32)
    for stop in range(len(v), 0, -5):
        chunk = slice(max(0, stop - 5), stop)
        total, weight = total + p[chunk] @ v[chunk], weight + p[chunk].sum()
    return total * (np.float32(1) / weight)


@by_rows(np.float32)
def splits_of_five(x: np.ndarray, v: np.ndarray, case: Case) -> np.ndarray:
    """Splits of five keys, each divided by its own sum, then weighed by their log-sum-exp: as FlashDecoding merges."""
    answers, logs = [], [*x[len(v) :]]  # the sink is a split without values
    for start in range(0, len(v), 5):
        part = slice(start, min(start + 5, len(v)))
        p = np.exp(x[part] - x[part].max())
        answers.append(p @ v[part] / p.sum())
        logs.append(x[part].max() + np.log(p.sum()))
    p = np.exp(np.array(logs) - max(logs))
    return (p[-len(answers) :] @ np.array(answers)) / p.sum()


@by_rows(np.float32)
def a_ring_of_blocks(x: np.ndarray, v: np.ndarray, case: Case) -> np.ndarray:
    """Blocks of eight keys, each answered for itself; a sigmoid of two float32 logarithms blends it in, as a ring of
    devices does."""
    dots = dtype_of(model_kernel.operand_dtype(case))
    total, answer = (x[-1] if len(x) > len(v) else np.float32(-np.inf)), np.zeros(case.head_dim, np.float32)
    for start in range(0, len(v), 8):
        part = slice(start, min(start + 8, len(v)))
        p = np.exp(x[part] - x[part].max())
        rise = x[part].max() + np.log(p.sum()) - total
        fresh = p.astype(dots).astype(np.float32) @ v[part] / p.sum()
        answer = answer + (fresh - answer) * (np.float32(0.5) + np.tanh(rise / 2) / 2)  # the sigmoid of `rise`
        total = np.logaddexp(total, total + rise) if np.isfinite(rise) else x[part].max() + np.log(p.sum())
    return answer


@by_rows(np.float64)
def a_running_mean(x: np.ndarray, v: np.ndarray, case: Case) -> np.ndarray:
    """One key after the other moves a mean by its weight, from logarithms that are added in float64."""
    total, mean = (x[-1] if len(x) > len(v) else -np.inf), np.zeros(case.head_dim)
    for logit, value in zip(x, v, strict=False):
        new = np.logaddexp(total, logit)
        mean, total = mean * np.exp(total - new) + np.exp(logit - new) * value, new
    return mean


KERNELS: dict[str, Callable[..., np.ndarray]] = {
    "block 7, split 3, last block first": styled(block=7, splits=3, reverse=True),
    "block 33, base 2, scaled queries": styled(block=33, base2=True, sink_first=True, scale_query=True),
    "block 1, sequential sums": styled(block=1, sequential=True),
    "rounded weights in the sum": styled(block=100, rounded_weights_in_sum=True, scales_on_operands=True),
    "one pass": one_pass,
    "two passes in float64": two_passes_in_float64,
    "a tree of odd blocks": tree_of_odd_blocks,
    "sums in chunks": sums_in_chunks,
    "splits of five": splits_of_five,
    "a ring of blocks": a_ring_of_blocks,
    "a running mean": a_running_mean,
    "block 3, split 2": styled(block=3, splits=2),
}
