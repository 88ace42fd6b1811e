"""Wrong kernels of kinds that the catalogue of mutants lacks: the search was not made with them, and must find each.

Each is a right kernel (a row at a time, all its keys at once) with one hook that breaks it. They have the contract's
signature and declare nothing, as somebody's kernel would that is judged for the first time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import model_kernel
import numpy as np
from right_kernels import _case, _rows

from oracle import Case
from oracle.case import Sequence, dtype_of


@dataclasses.dataclass(frozen=True)
class Bug:
    """What a bug does on the way, one hook a step; a right step where None."""

    span: Callable[[Case, Sequence, int, int], tuple[int, int]] | None = None  # the keys seen, half-open
    read: Callable[[Case, np.ndarray], np.ndarray] | None = None  # the keys read in their place
    head: Callable[[Case, int], int] | None = None  # the kv head of a query head
    logits: Callable[[Case, np.ndarray], np.ndarray] | None = None
    sink: Callable[[float, int], float] | None = None  # of a row that sees so many keys
    weights: Callable[[np.ndarray], np.ndarray] | None = None
    output: Callable[[Case, np.ndarray], np.ndarray] | None = None


def broken(make: Callable[[], Bug]) -> Callable[..., np.ndarray]:
    """The kernel of a bug; `make` is called once, so that a bug may keep a state."""
    bug = make()

    def kernel(*arrays: Any, **options: Any) -> np.ndarray:
        case = _case(arrays, options)
        output = np.zeros(case.queries.shape, case.queries.dtype)
        for row, head, sequence, *span in _rows(case):
            low, high = bug.span(case, sequence, *span) if bug.span else span
            output[row, head] = _answer(case, bug, row, head, sequence, np.arange(low, high)).astype(output.dtype)
        return bug.output(case, output) if bug.output else output

    return kernel


def _answer(case: Case, bug: Bug, row: int, head: int, sequence: Sequence, keys: np.ndarray) -> np.ndarray:
    """One row of one head over these keys: f32 [D]."""
    dots = dtype_of(model_kernel.operand_dtype(case))
    keys = bug.read(case, keys) if bug.read else keys
    kv = bug.head(case, head) if bug.head else head // case.group
    slots = case.kv_pages[sequence.pages[keys // case.page_size], keys % case.page_size]
    k, v = (slots[:, 2 * kv + i].astype(dots).astype(np.float32) for i in (0, 1))
    scales = (np.broadcast_to(1.0 if s is None else s, case.num_kv_heads) for s in (case.k_scale, case.v_scale))
    k_scale, v_scale = (np.float32(scale[kv]) for scale in scales)
    x = k @ case.queries[row, head].astype(dots).astype(np.float32) * np.float32(case.scale) * k_scale
    if case.logits_soft_cap is not None:
        x = np.float32(case.logits_soft_cap) * np.tanh(x / np.float32(case.logits_soft_cap))
    x = bug.logits(case, x) if bug.logits else x
    sink = -np.inf if case.softmax_aux is None else float(case.softmax_aux[head])
    sink = bug.sink(sink, len(keys)) if bug.sink else sink
    m = max(x.max(), sink)
    p = np.exp(x - np.float32(m))
    p = p / (p.sum() + np.exp(np.float32(sink - m)))
    p = bug.weights(p) if bug.weights else p
    return p[: len(v)] @ v * v_scale


def _int8_column(case: Case, keys: np.ndarray) -> np.ndarray:
    """Columns of the table wrap at 128."""
    return keys - keys // case.page_size // 128 * 128 * case.page_size


def _late_edge(case: Case, keys: np.ndarray) -> np.ndarray:
    """The first key of a page past the fourth is the one before."""
    return np.where((keys % case.page_size == 0) & (keys // case.page_size > 4) & (keys > keys[0]), keys - 1, keys)


def _from_the_start(case: Case, sequence: Sequence, low: int, high: int) -> tuple[int, int]:
    """The window is counted from the first key that the sequence sees."""
    if case.sliding_window is None:
        return low, high
    return sequence.keys[0], min(high, sequence.keys[0] + case.sliding_window)


def _masked_then_capped(case: Case, x: np.ndarray) -> np.ndarray:
    """One masked key weighs exp(-cap), with a value of 0."""
    cap = case.logits_soft_cap
    return x if cap is None else np.append(x, np.float32(-cap))


def _five_bits(case: Case, keys: np.ndarray) -> np.ndarray:
    """A slot has five bits: of a longer page the first 32 slots are read again."""
    slot = keys % case.page_size
    return keys - slot + slot % 32


def _padded_groups(case: Case, head: int) -> int:
    """Groups of 5 to 7 are padded to 8, and the padding is counted as heads."""
    return head // (8 if 5 <= case.group <= 7 else case.group)


def _halves_of_128(case: Case, output: np.ndarray) -> np.ndarray:
    """What a head holds past 128 is what it holds at its start."""
    more = case.head_dim - 128
    if more > 0:
        output[..., 128:] = output[..., :more]
    return output


def _not_itself(case: Case, sequence: Sequence, low: int, high: int) -> tuple[int, int]:
    """A token at the start of a page does not see itself."""
    return low, high - ((high - 1) % case.page_size == 0 and high - low > 1)


def _heads_by_two(case: Case, output: np.ndarray) -> np.ndarray:
    """Kv heads are computed in pairs; the last of an odd number is lost."""
    if case.num_kv_heads % 2 and case.num_kv_heads > 1:
        output[:, -case.group :] = 0
    return output


def _past_the_end(case: Case, output: np.ndarray) -> np.ndarray:
    """Rows past the last one repeat it."""
    live = case.live_rows
    if live:
        output[live:] = output[live - 1]
    return output


def _every_seventh() -> Callable[[np.ndarray], np.ndarray]:
    """A race, made of a counter: every seventh row of more than four keys loses the last one."""
    count = itertools.count()
    return lambda p: p * (np.arange(len(p)) < len(p) - 1) if len(p) > 4 and next(count) % 7 == 0 else p


def _last_answer() -> Callable[[Case, np.ndarray], np.ndarray]:
    """An eighth of the last answer of that shape is left in the buffer."""
    kept: dict[Any, np.ndarray] = {}

    def mixed(case: Case, output: np.ndarray) -> np.ndarray:
        before = kept.get(output.shape, output)
        kept[output.shape] = output.copy()
        return (output + (before - output) * np.float32(0.125)).astype(output.dtype)

    return mixed


BUGS: dict[str, Callable[[], Bug]] = {
    "int8 page index": lambda: Bug(read=_int8_column),
    "page edge after four": lambda: Bug(read=_late_edge),
    "window from the start": lambda: Bug(span=_from_the_start),
    "window in whole pages": lambda: Bug(span=lambda c, s, a, b: (a // c.page_size * c.page_size, b)),
    "itself at a page's start": lambda: Bug(span=_not_itself),
    "groups of powers of two": lambda: Bug(head=lambda c, h: h // (1 << (c.group - 1).bit_length())),
    "odd kv head": lambda: Bug(output=_heads_by_two),
    "sink as a key of 0": lambda: Bug(sink=lambda sink, keys: 0.0 if sink > -np.inf else sink),
    "past 4096": lambda: Bug(span=lambda case, sequence, low, high: (min(low, 4095), min(high, 4096))),
    "odd groups": lambda: Bug(head=lambda c, h: h % c.num_kv_heads if c.group % 2 else h // c.group),
    "scale twice with a window": lambda: Bug(logits=lambda c, x: x if c.sliding_window is None else x * c.scale),
    "cap after the mask": lambda: Bug(logits=_masked_then_capped),
    "sink twice": lambda: Bug(sink=lambda sink, keys: sink + float(np.log(2))),
    "no sink below five keys": lambda: Bug(sink=lambda sink, keys: sink if keys > 4 else -np.inf),
    "small weights dropped": lambda: Bug(weights=lambda p: np.where(p < 2**-8, np.float32(0), p)),
    "padding rows": lambda: Bug(output=_past_the_end),
    "race": lambda: Bug(weights=_every_seventh()),
    "state": lambda: Bug(output=_last_answer()),
    "pages past 32 slots": lambda: Bug(read=_five_bits),
    "groups of five to seven": lambda: Bug(head=_padded_groups),
    "head size past 128": lambda: Bug(output=_halves_of_128),
}
UNSTEADY = ("race", "state")  # what is wrong with them is that they change
LONG = ("int8 page index", "past 4096", "pages past 32 slots")  # no short case shows these
