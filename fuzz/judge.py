"""The judgement of a plan: the computed bound first, then whatever needs no bound at all.

Plans of one shape may share a walk of the oracle, for a small case costs NumPy's call overhead and little else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fuzz.build import build, refill
from fuzz.errors import origin
from fuzz.plan import Plan
from fuzz.strategies import RANDOM_DATA
from fuzz.targets import InputChanged, Target, Unsupported, WrongBackend
from oracle import Case, Claim
from oracle.bound import Analysis, analyse, analyse_all
from oracle.verdict import Verdict, compare

Answer = tuple[np.ndarray, np.ndarray | None]  # output, lse

REPEATS = 20
ASKED_AGAIN = 4  # calls of a case that is answered wrongly
TOGETHER = 16  # cases that are held and analysed at once


@dataclass(frozen=True)
class Judgement:
    """What became of one plan.

    `status` is pass, fail, suspect, vacuous or skipped; `kind` names the judge that spoke, and for a failure the
    sort of failure, which the shrinker keeps.
    """

    status: str
    kind: str
    text: str
    ratio: float = 0.0
    verdict: Verdict | None = None

    @property
    def bad(self) -> bool:
        return self.status in ("fail", "suspect")


@dataclass
class Bench:
    """Cases of one shape, in the order they are judged, that are analysed together.

    The analysis waits for the first answer and for what the target claims of that case: nothing of a target runs
    before its case does. Where it claims something else of a later case, that one is analysed alone.
    """

    cases: list[Case]
    random: list[bool]  # whose roundings the probabilistic bound may take as independent
    claim: Claim | None = None  # for which the analyses are
    found: dict[int, Analysis] = field(default_factory=dict)  # of cases that are still to be judged

    def analysis(self, number: int, claim: Claim) -> Analysis:
        """The analysis of one case, asked for once."""
        random = self.random[number]
        if claim != (self.claim or claim):
            return analyse(self.cases[number], claim, soft=random)
        self.claim = claim
        if number not in self.found:
            alike = [i for i in range(number, len(self.cases)) if self.random[i] == random]
            together = analyse_all([self.cases[i] for i in alike], claim, soft=random)
            self.found.update(zip(alike, together, strict=True))
        return self.found.pop(number)


def judge_plan(plan: Plan, target: Target) -> Judgement:
    """Build the plan's case, run the target, and judge the answer by every judge the plan asks for."""
    return next(judge_plans([plan], target))


def judge_plans(plans: Sequence[Plan], target: Target) -> Iterator[Judgement]:
    """`judge_plan` of plans of one shape in turn, each when it is asked for."""
    asked, fill = target.asking(plans[0].shape.lse), "tame" if target.finite_slots else "nan"
    for first in range(0, len(plans), TOGETHER):
        some = plans[first : first + TOGETHER]
        bench = Bench([build(plan, fill) for plan in some], [plan.data in RANDOM_DATA for plan in some])
        for number, plan in enumerate(some):
            yield _judged(bench, number, asked, plan)


def judge_case(case: Case, target: Target, plan: Plan | None = None) -> Judgement:
    """Judge a case; without a plan by the bound and by repetition only."""
    return _judged(Bench([case], [plan is not None and plan.data in RANDOM_DATA]), 0, target, plan)


def _judged(bench: Bench, number: int, target: Target, plan: Plan | None) -> Judgement:
    try:
        return _judge(bench, number, target, plan)
    except Unsupported as refusal:
        return Judgement("skipped", "unsupported", str(refusal))
    except WrongBackend as error:
        return Judgement("fail", "backend", str(error), ratio=np.inf)
    except InputChanged as error:
        return Judgement("fail", "input", str(error), ratio=np.inf)


def _judge(bench: Bench, number: int, target: Target, plan: Plan | None) -> Judgement:
    case, random = bench.cases[number], bench.random[number]
    try:
        output, lse = target.run(case)
    except (Unsupported, WrongBackend, InputChanged):
        raise
    except (Exception, SystemExit) as error:  # whatever a foreign kernel raises on a legal call is its failure
        return Judgement("fail", "error", origin(error), ratio=np.inf)
    analysis = bench.analysis(number, target.claim(case))
    verdict = compare(case, analysis, output, lse, structured=not random)
    if verdict.status in ("fail", "suspect"):
        # A race, or state that an earlier call left: which number is wrong says nothing then, that it changes does.
        unsteady = _repeat(case, target, (output, lse), 2 if target.interpreted else ASKED_AGAIN)
        if unsteady is not None:
            return Judgement("fail", unsteady[0], f"{unsteady[1]}; {verdict.text}", ratio=np.inf)
        return Judgement(verdict.status, _kind(verdict), verdict.text, verdict.ratio, verdict)
    if target.asks_lse and lse is None:
        return Judgement("fail", "lse", "return_lse=True returned no lse", ratio=np.inf, verdict=verdict)
    found = _beyond_bound(case, target, plan, (output, lse), analysis)
    if found is not None:
        place = _placed(case, target, verdict, output, analysis) if found[0] == "exact" else verdict
        return Judgement("fail", *found, ratio=np.inf, verdict=place)
    return Judgement(verdict.status, "bound", verdict.text, verdict.ratio, verdict)


def _kind(verdict: Verdict) -> str:
    """The sort of a failure: wrong shape or dtype, an lse where only that is wrong, NaN, or a number past its bound."""
    if verdict.token is None:
        return "form"
    if verdict.ratio <= 1 and verdict.lse_ratio > 1:
        return "lse"
    broken = verdict.status == "fail" and verdict.got is not None and not np.isfinite(verdict.got)
    return "nan" if broken else "bound"


def _beyond_bound(
    case: Case, target: Target, plan: Plan | None, answer: Answer, analysis: Analysis
) -> tuple[str, str] | None:
    """(kind, text) of the first judge without a tolerance that objects."""
    output = answer[0]
    if plan is None:
        return _repeat(case, target, answer, 2)
    if plan.data == "exact":
        found = _exact(case, target, output, analysis)
        if found is not None:
            return found
    repeats = 2 if target.interpreted else REPEATS
    if plan.check == "repeat":
        return _repeat(case, target, answer, repeats)
    found = None
    if not target.deterministic:  # no two of its answers can be compared bit by bit
        return None
    if plan.check == "second_fill" and not target.finite_slots:
        found = _second_fill(plan, case, target, answer)
    elif plan.check == "relation":
        from fuzz.related import check

        found = check(plan, case, target, output)
    # A kernel that never gives the same bits twice breaks every comparison of two calls; say so instead.
    return found and (_repeat(case, target, answer, repeats) or found)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two outputs hold the same numbers; +0 and -0 are one number, and so are all NaN."""
    if a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes():
        return True
    return a.shape == b.shape and bool(np.array_equal(a.astype(np.float64), b.astype(np.float64), equal_nan=True))


def first_difference(a: np.ndarray, b: np.ndarray) -> str:
    """Where two outputs, or two lse, first differ, in words."""
    one, two = a.astype(np.float64), b.astype(np.float64)
    place = np.argwhere(~((one == two) | (np.isnan(one) & np.isnan(two))))
    at = tuple(int(i) for i in place[0])
    where = ", ".join(f"{name} {i}" for name, i in zip(("row", "head", "dim"), at, strict=False))
    return f"{len(place)} elements, the first at {where}: {one[at]:.9g} and {two[at]:.9g}"


def _changed(before: Answer, after: Answer) -> str | None:
    """Where two answers differ, output or lse, or None."""
    for what, a, b in zip(("", "of the lse "), before, after, strict=True):
        if (a is None) != (b is None):
            return f"{what}one of two answers is missing"
        if a is not None and b is not None and not same_bits(a, b):
            return what + first_difference(a, b)
    return None


def _exact(case: Case, target: Target, output: np.ndarray, analysis: Analysis) -> tuple[str, str] | None:
    """Rows that see a power of two of equal keys: a right kernel returns these very bits, or misses them by no more
    than its sums do.
    """
    rows, expected = exact_rows(case), _expected_bits(analysis, output.dtype)
    if same_bits(output[rows], expected[rows]):
        return None
    missed = _missed(case, target, output, analysis)[0]
    if not len(missed):
        return None
    at = tuple(missed[0])
    text = f"{len(missed)} elements, the first at row {at[0]}, head {at[1]}, dim {at[2]}"
    numbers = f"{float(output[at]):.9g} and {float(expected[at]):.9g}"
    return "exact", f"an answer without rounding differs: got and expected in {text}: {numbers}"


def _missed(case: Case, target: Target, output: np.ndarray, analysis: Analysis) -> tuple[np.ndarray, np.ndarray]:
    """(row, head, dim) of each exact answer that is missed, and by how much each may be: [n, 3], [T, Hq, D].

    Operands and weights are exact there. What is left is a kernel that divides in each split, say by five, and weighs
    the splits by their logarithms; rounding to the output's dtype at most doubles what that costs.
    """
    claim = dataclasses.replace(target.claim(case), u_in=0.0, u_q=0.0, u_p=0.0, u_o=0.0, eta_o=0.0)
    allowed = 2 * analyse(case, claim, soft=False).hard
    wrong = np.zeros(output.shape, bool)
    rows = exact_rows(case)
    error = np.abs(output.astype(np.float64) - _expected_bits(analysis, output.dtype).astype(np.float64))
    wrong[rows] = ~(error[rows] <= allowed[rows])
    return np.argwhere(wrong), allowed


def _expected_bits(analysis: Analysis, dtype: np.dtype) -> np.ndarray:
    """The answers of the exact stratum: multiples of 2**-20; what float64 leaves beside them (a sink too small to
    weigh) is taken off.
    """
    return (np.rint(analysis.output * 2.0**20) / 2.0**20).astype(dtype)


def _placed(case: Case, target: Target, verdict: Verdict, output: np.ndarray, analysis: Analysis) -> Verdict:
    """The verdict with the place of the first exact answer that is missed."""
    missed, allowed = _missed(case, target, output, analysis)
    token, head, dim = at = tuple(int(i) for i in missed[0])
    owner = next(s for s in case.sequences() if s.start <= token < s.stop)
    return dataclasses.replace(
        verdict, token=token, head=head, dim=dim, sequence=owner.index, row=token - owner.start,
        position=int(owner.positions[token - owner.start]), got=float(output[at]),
        expected=float(_expected_bits(analysis, output.dtype)[at]), bound=float(allowed[at]),
    )  # fmt: skip


def exact_rows(case: Case) -> np.ndarray:
    """The rows whose number of visible keys is a power of two, or none."""
    rows: list[int] = []
    for sequence in case.sequences():
        seen = np.clip(sequence.positions + 1, 0, case.sliding_window)
        rows += [sequence.start + int(i) for i in np.flatnonzero((seen & (seen - 1)) == 0)]
    return np.array(rows, np.int64)


def _second_fill(plan: Plan, case: Case, target: Target, answer: Answer) -> tuple[str, str] | None:
    changed = _changed(answer, target.run(refill(plan, case, "huge")))
    if changed is None:
        return None
    return "poison", f"what lies in slots that no row may see changes the answer: {changed}"


def _repeat(case: Case, target: Target, answer: Answer, times: int) -> tuple[str, str] | None:
    if not target.deterministic:
        return None
    for count in range(1, times):
        changed = _changed(answer, target.run(case))
        if changed is not None:
            return "determinism", f"call {count + 1} of the same case differs: {changed}"
    return None


# ---------------------------------------------------------------- what must be rejected

# (argument, value): illegal by the contract whatever the arrays hold.
ILLEGAL: tuple[tuple[str, Any], ...] = (
    ("sliding_window", 0),
    ("sliding_window", -3),
    ("logits_soft_cap", 0.0),
    ("logits_soft_cap", -5.0),
    ("logits_soft_cap", float("nan")),
    ("softmax_scale", float("inf")),
    ("softmax_scale", float("nan")),
)


def judge_rejections(case: Case, target: Target) -> list[Judgement]:
    """Call the target with each illegal value; one failure for each that it takes. Empty if it promises nothing."""
    if not target.validates:
        return []
    found = []
    for name, value in ILLEGAL:
        options = {**case.options, name: value}
        try:
            target.call(*(None if a is None else np.array(a) for a in case.arrays), **options)
        except (ValueError, TypeError) as error:
            if name not in str(error):
                text = f"{name}={value} is rejected by an error that does not name {name}: {error}"
                found.append(Judgement("fail", "accepts", text, ratio=np.inf))
            continue
        found.append(Judgement("fail", "accepts", f"{name}={value} is illegal, and was accepted", ratio=np.inf))
    return found
