"""The judgement of one output: pass, fail, suspect or vacuous, and where and why.

An element passes when its error is within HARD. What the contract answers exactly (zeros of rows that see nothing,
NaN of rows whose metadata is invalid, an lse of -inf) is compared exactly.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from oracle.attend import blocks, solve
from oracle.bound import LARGEST, Analysis, analyse, operands_overflow
from oracle.case import Case, Sequence, visible
from oracle.claim import Claim, default_claim

Status = Literal["pass", "fail", "suspect", "vacuous"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found. Place and numbers are those of the worst element; they are None where there is none."""

    status: Status
    text: str
    ratio: float = 0.0  # largest error / HARD over judged elements; inf for a broken exact answer
    soft_ratio: float = 0.0  # largest error / SOFT
    lse_ratio: float = 0.0
    judged: int = 0  # elements compared with a finite bound
    vacuous_rows: int = 0  # (row, head) pairs too ill conditioned to judge
    token: int | None = None  # row of the output
    head: int | None = None
    dim: int | None = None
    sequence: int | None = None
    row: int | None = None  # within the sequence
    position: int | None = None
    got: float | None = None
    expected: float | None = None
    bound: float | None = None
    key: str | None = None  # the key whose absence or presence explains the row, if one does

    @property
    def ok(self) -> bool:
        return self.status == "pass"


def judge(case: Case, output, claim: Claim | None = None, lse=None, *, structured: bool = False) -> Verdict:
    """Judges an output (and an lse, where one was asked for) by the claim, `default_claim(case)` when None.

    `structured=True` says that the data is not random, so SOFT (a statement about random roundings) is not applied;
    nor is it to the rows of a sequence that has a page twice.
    """
    complaint = _misshapen(case, output, lse)
    if complaint:
        return Verdict("fail", complaint, ratio=np.inf)
    return compare(case, analyse(case, claim or default_claim(case)), output, lse, structured=structured)


def compare(case: Case, analysis: Analysis, output, lse=None, *, structured: bool = False) -> Verdict:
    """`judge` for a case that has been analysed already: several outputs, one analysis."""
    complaint = _misshapen(case, output, lse)
    if complaint:
        return Verdict("fail", complaint, ratio=np.inf)
    got = np.asarray(output).astype(np.float64)
    ratio = _ratio(case, got, analysis.output, analysis.hard)
    soft = ratio if analysis.soft is analysis.hard else _ratio(case, got, analysis.output, analysis.soft)
    if analysis.vacuous.any():
        soft = np.where(analysis.vacuous[..., None], 0.0, soft)
    claimed = np.isfinite(analysis.hard)
    counts: dict[str, Any] = {
        "ratio": float(ratio.max(initial=0.0)),
        "soft_ratio": float(soft.max(initial=0.0)),
        "judged": int(np.count_nonzero(claimed)),
        "vacuous_rows": int(np.count_nonzero(analysis.vacuous | ~claimed.all(axis=-1))),
    }
    if lse is not None:
        got_lse = np.asarray(lse).astype(np.float64)
        lse_ratio = _ratio(case, got_lse, analysis.lse, analysis.lse_bound)
        counts["lse_ratio"] = float(lse_ratio.max(initial=0.0))
    if counts["ratio"] > 1:
        return _accuse("fail", "HARD", case, analysis, got, ratio, analysis.hard, counts)
    if counts.get("lse_ratio", 0.0) > 1:
        return _accuse_lse(case, analysis, np.asarray(lse), lse_ratio, counts)
    if counts["vacuous_rows"]:
        text = f"{counts['vacuous_rows']} (row, head) pairs are too ill conditioned to be judged"
        return Verdict("vacuous", text, **counts)
    if counts["soft_ratio"] > 1 and not structured:
        soft = np.where(_reads_twice(case)[:, None, None], 0.0, soft)
        counts["soft_ratio"] = float(soft.max(initial=0.0))
    if counts["soft_ratio"] > 1 and not structured:
        return _accuse("suspect", "SOFT", case, analysis, got, soft, analysis.soft, counts)
    return Verdict("pass", f"{counts['judged']} elements, worst {counts['ratio']:.3g} of the bound", **counts)


def _reads_twice(case: Case) -> np.ndarray:
    """Rows whose sequence has a page twice, bool [T]: equal keys round alike, where SOFT takes roundings as random."""
    rows = np.zeros(case.num_tokens, bool)
    for sequence in case.sequences():
        low, high = sequence.keys
        pages = sequence.pages[low // case.page_size : -(-high // case.page_size)]
        rows[sequence.start : sequence.stop] = len(np.unique(pages)) < len(pages)
    return rows


def _misshapen(case: Case, output, lse) -> str | None:
    wanted = [("output", output, case.queries.shape, case.queries.dtype)]
    if lse is not None:
        wanted.append(("lse", lse, case.queries.shape[:2], np.dtype(np.float32)))
    for name, array, shape, dtype in wanted:
        array = np.asarray(array)
        if array.shape != tuple(shape):
            return f"{name} has shape {array.shape}; it must be {tuple(shape)}"
        if array.dtype != dtype:
            return f"{name} has dtype {array.dtype.name}; it must be {dtype.name}"
    return None


def _ratio(case: Case, got: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """error / bound of every element: inf where an exact or finite answer is missed, 0 where nothing is claimed."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(got - expected)
        ratio = error / bound
        ratio[error == 0] = 0.0
    if np.isfinite(ratio).all():
        return ratio
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    exact = ~np.isfinite(expected) & (bound == 0)  # -inf of an lse, NaN of invalid metadata
    unclaimed = ~np.isfinite(expected) & ~exact | np.isposinf(bound)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    # Ill conditioned or not, no convex combination of finite values is NaN, unless its making may overflow.
    absurd = unclaimed & np.isnan(got) & np.isfinite(expected)
    if absurd.any():
        absurd &= ~may_overflow(case).reshape(*got.shape[:2], *[1] * (got.ndim - 2))
    return np.where(same | unclaimed & ~absurd, 0.0, ratio)


def may_overflow(case: Case) -> np.ndarray:
    """Rows and heads where float32 sums or the dots' operands may overflow, so that even NaN is right: `[T, Hq]`."""
    found = np.zeros(case.queries.shape[:2], bool)
    for block in blocks(case):
        products = block.score(np.abs(block.queries), np.abs(block.keys)) * block.mask
        sums = (products > LARGEST).any(axis=-1) | (block.value_sum > LARGEST).any(axis=-1)
        block.scatter(sums | operands_overflow(block)[..., 0], found)
    return found


def _accuse(status: Status, name: str, case: Case, analysis: Analysis, got, ratio, bound, counts) -> Verdict:
    place = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    token, head, dim = (int(i) for i in place)
    where, fields = _place(case, token)
    key = _explain(case, analysis, got, token, head) if status == "fail" else None
    bad = int((ratio > 1).sum())
    text = (
        f"{bad} of {ratio.size} elements beyond {name}; worst at row {token}{where}, head {head}, dim {dim}: "
        f"got {got[place]:.9g}, expected {analysis.output[place]:.9g}, bound {bound[place]:.3g} "
        f"({ratio[place]:.3g} times)" + (f"; {key}" if key else "")
    )
    return Verdict(
        status,
        text,
        **counts,
        token=token,
        head=head,
        dim=dim,
        **fields,
        got=float(got[place]),
        expected=float(analysis.output[place]),
        bound=float(bound[place]),
        key=key,
    )


def _accuse_lse(case: Case, analysis: Analysis, got: np.ndarray, ratio: np.ndarray, counts) -> Verdict:
    token, head = (int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    where, fields = _place(case, token)
    expected, bound = float(analysis.lse[token, head]), float(analysis.lse_bound[token, head])
    text = (
        f"{int((ratio > 1).sum())} of {ratio.size} lse values beyond their bound; worst at row {token}{where}, "
        f"head {head}: got {got[token, head]:.9g}, expected {expected:.9g}, bound {bound:.3g}"
    )
    numbers: dict[str, Any] = {"got": float(got[token, head]), "expected": expected, "bound": bound}
    return Verdict("fail", text, **counts, token=token, head=head, **fields, **numbers)


def _owner(case: Case, token: int) -> Sequence | None:
    return next((s for s in case.sequences() if s.start <= token < s.stop), None)


def _place(case: Case, token: int) -> tuple[str, dict[str, Any]]:
    """Whose row a token is, in words and as fields."""
    sequence = _owner(case, token)
    if sequence is not None:
        row = token - sequence.start
        position = int(sequence.positions[row])
        words = f" (sequence {sequence.index}, its row {row} at position {position} of {sequence.context_len})"
        return words, {"sequence": sequence.index, "row": row, "position": position}
    for start, stop, reason in case.invalid_rows():
        if start <= token < stop:
            return f" (must be NaN: {reason})", {}
    return " (a row that no sequence owns)", {}


def _explain(case: Case, analysis: Analysis, got: np.ndarray, token: int, head: int) -> str | None:
    """The single key of the row's own sequence whose loss or addition puts the whole row back within its bound.

    The sink counts as a key that is seen, of value 0.
    """
    sequence = _owner(case, token)
    if sequence is None or sequence.context_len == 0 or not np.isfinite(got[token, head]).all():
        return None
    whole = _whole_context(case, sequence, token)
    block = next(b for b in blocks(whole) if b.kv_heads.start <= head // case.group < b.kv_heads.stop)
    place = (head // case.group - block.kv_heads.start, 0, head % case.group)
    solved = solve(block)
    v = np.vstack([block.values[place[0]], np.zeros(case.head_dim)])
    lo, hi = visible(int(sequence.positions[token - sequence.start]), sequence.context_len, case.sliding_window)
    index, sink = np.arange(len(v)), len(v) - 1
    seen = (index >= lo) & (index < hi) | (index == sink)
    weights = np.append(solved.p[place], solved.pi[place])
    p = np.where(seen, -1.0, 1.0) * weights  # what flipping each adds to the sums
    with np.errstate(invalid="ignore", divide="ignore"):
        flipped = (weights[seen] @ v[seen] + p[:, None] * v) / (weights[seen].sum() + p)[:, None]
        ratio = np.max(np.abs(flipped - got[token, head]) / analysis.hard[token, head], axis=-1)
    ratio = np.where(np.isfinite(ratio), ratio, np.inf)
    key = int(np.argmin(ratio))
    name = "the sink" if key == sink else f"key {key}"
    return None if ratio[key] > 1 else f"as if {name} were {'missing' if seen[key] else 'seen too'}"


def _whole_context(case: Case, sequence: Sequence, token: int) -> Case:
    """The one row alone, with every key of its context in sight; zeros where dead slots hold poison or no page."""
    pages = sequence.pages[: -(-sequence.context_len // case.page_size)]
    legal = (pages >= 0) & (pages < case.num_pages)
    kv_pages = case.kv_pages[np.where(legal, pages, 0)]
    known = np.isfinite(kv_pages) & legal[:, None, None, None]
    return case.replace(
        queries=case.queries[token : token + 1],
        kv_pages=np.where(known, kv_pages, np.zeros((), kv_pages.dtype)),
        context_lens=case.context_lens[sequence.index : sequence.index + 1],
        block_tables=np.arange(max(1, len(pages)))[None],
        query_start_loc=np.array([0, 1], np.int32),
        num_seqs=1,
        sliding_window=None,
    )
