"""Which known bug behaves like this failure? The model kernel's mutants, tried as explanations.

A mutant explains a failure when its errors look like the target's: the same elements wrong, by the same amounts. The
tile sizes tried are not the target's, which nobody knows, so a bug at a block edge is matched by the closest one. What
no mutant behaves like is explained by the weights that the target gives each key (`fuzz.weights`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fuzz.build import build
from fuzz.judge import Judgement, judge_case, judge_plan, judge_rejections
from fuzz.mutants import model
from fuzz.mutants.catalogue import BY_ID, MUTANTS, Mutant
from fuzz.mutants.model import Launch
from fuzz.plan import Plan
from fuzz.strategies import MODES, expand
from fuzz.targets import Target
from fuzz.weights import Explained, explain, measured
from oracle import Case, attend
from oracle.poison import owned_rows

TILES = (Launch(2, 3), Launch(4, 5), Launch(8, 16))
# A distance of 0 is the same errors, of 1 no likeness at all. Past the second what the weights surely show is believed
# first, past the third whatever they show, past the last nothing is named.
ALIKE, SURE, SIMILAR, LIKENESS = 0.15, 0.05, 0.45, 0.9
CANDIDATES = 20
KEYS = 2000  # a plan with longer contexts is no evidence if there is another: the model kernel is slow
SECONDS = 10.0  # for either round; a context of thousands of keys takes the model that long
# Failures that name their own family.
_BY_KIND = {
    "determinism": ("nondeterministic", "hygiene"),
    "input": ("writes_input", "hygiene"),
    "backend": ("silent_fallback", "selection"),
    "accepts": ("accepts_bad", "selection"),
    "relation:alone": ("batch_dependent", "hygiene"),
    "relation:dead_sequences": ("batch_dependent", "hygiene"),
}


@dataclass(frozen=True)
class Diagnosis:
    """The mutant a failure behaves like, its family, and how far apart their errors are (0 to 1)."""

    mutant: str | None
    family: str
    distance: float
    others: tuple[str, ...] = ()
    words: str = ""  # what its weights show

    def __str__(self) -> str:
        seen = f" ({self.words})" if self.words else ""
        if self.mutant is None:
            return _PLAIN.get(self.family, f"behaves like no bug in the catalogue: {self.family}{seen}")
        others = f" (or {', '.join(self.others)})" if self.others else ""
        how = "behaves like" if self.distance <= ALIKE else "resembles"
        return f"{how} {self.mutant}{others}: {self.family}{seen}"


# What needs no explanation.
_PLAIN = {
    "error": "raises on a legal call",
    "form": "returns no array of the right shape and dtype",
    "zeros": "returns 0 whatever it is given: nothing is computed, or nothing is written",
}
UNKNOWN = Diagnosis(None, "unknown", 1.0)
OTHER_LSE = Explained("lse", "the output is right, and the lse is not", sure=False)


def diagnose(plans: Sequence[Plan], target: Target, judgement: Judgement) -> Diagnosis:
    """The best explanation of a failure, by the target's answers to a few failing plans."""
    if judgement.kind in _BY_KIND:
        return Diagnosis(*_BY_KIND[judgement.kind], distance=0.0)
    if judgement.kind in _PLAIN:
        return Diagnosis(None, judgement.kind, distance=0.0)
    plans = [plan for plan in plans if _keys(plan) <= KEYS] or plans[:1]
    lse = judgement.kind == "lse"
    evidence = _gathered(plans, target, "lse" if lse else "output")
    if not any(e.error.any() or e.broken.any() for e in evidence):  # it raises, or misses by a rounding
        seen = OTHER_LSE if lse else _seen(plans, target)
        return dataclasses.replace(UNKNOWN, family=seen.family, words=seen.words) if seen else UNKNOWN
    if not lse and not any(e.owned for e in evidence):
        return Diagnosis("dead_rows_garbage", BY_ID["dead_rows_garbage"].group, distance=0.0)
    if not lse and _only_zeros(evidence, plans[-1], target):
        return Diagnosis(None, "zeros", distance=0.0)
    if not lse and _only_nan(plans, target):
        leaks = [BY_ID[name] for name in ("minus_one", "v_not_sanitised")]
        best, mutant = _ranked(leaks, evidence, time.process_time() + SECONDS)[0]
        mutant = mutant if best <= ALIKE else leaks[-1]  # whatever its tiles are
        return Diagnosis(mutant.id, mutant.group, distance=0.0)
    # The last is the largest case: what is unlike there is not tried on the rest.
    known = [m for m in MUTANTS if _numeric(m) and (m.group == "lse") == lse]
    late = time.process_time() + SECONDS
    likely = [m for _, m in _ranked(known, evidence[-1:], late)][:CANDIDATES]
    ranked = _ranked(likely, evidence, late + SECONDS)
    best = ranked[0][0]
    seen = OTHER_LSE if lse else _seen(plans, target)
    alike = [m for distance, m in ranked if distance <= best + 0.02]
    if seen is not None and best > (SURE if seen.sure else SIMILAR):  # a family by what was seen, and only those of it
        alike = [m for m in alike if m.group == seen.family and best <= SIMILAR]
    elif best > LIKENESS:
        alike = []
    if not alike:
        return Diagnosis(None, seen.family if seen else "unknown", best, words=seen.words if seen else "")
    family = _majority(alike)
    alike.sort(key=lambda m: m.group != family)  # the one that is named is of the family that is
    first, *others = (m.id for m in alike[:4])
    return Diagnosis(first, family, best, tuple(others), seen.words if seen else "")


def _seen(plans: Sequence[Plan], target: Target) -> Explained | None:
    """What the weights show in the smallest plan, knowing which options the largest fails without."""
    weights = measured(build(plans[0], "tame"), target, _needed(plans[0], plans[-1], target))
    return explain(weights) if weights else None


def _needed(small: Plan, large: Plan, target: Target) -> frozenset[str]:
    """The options of a shrunk plan without which the target is right: a sink may stay for the sake of fewer tokens."""
    plain = {"sinks": False, "cap": None}
    kept = [name for name, without in plain.items() if getattr(small.shape, name) != without]
    changes = {name: ({name: plain[name]}, {name: plain[name], "window": None}) for name in kept}  # more keys too
    return frozenset(name for name in kept if not any(_fails(large, changed, target) for changed in changes[name]))


def _fails(plan: Plan, changes: dict[str, object], target: Target) -> bool:
    changed = plan.replace(shape=dataclasses.replace(plan.shape, **changes))  # type: ignore[arg-type]
    return any(judge_plan(p, target).bad for p in (changed, changed.replace(data="normal", amplitude=1.0)))


def _only_nan(plans: Sequence[Plan], target: Target) -> bool:
    """Whether NaN in the slots that no row may see is all that goes wrong: they are multiplied by 0, not left out."""
    leaks = any(judge_case(build(plan, "nan"), target).kind == "nan" for plan in plans)
    return leaks and not any(judge_case(build(plan, fill), target).bad for plan in plans for fill in ("huge", "tame"))


def _only_zeros(evidence: Sequence[_Evidence], plan: Plan, target: Target) -> bool:
    """Whether the target returns 0 here, and for other lengths of that shape too: many a bug looks like it once."""
    if not all(e.zero for e in evidence):
        return False
    others = (expand(plan.shape, "normal", mode, "plain", 3, seed) for seed, mode in enumerate(MODES[:3], 1))
    found = [_evidence(build(other), target, "output") for other in others]
    return all(e is not None and (e.zero or not e.expected.any()) for e in found)


def _keys(plan: Plan) -> int:
    return sum(context for rows, context in plan.lengths if rows)


def _ranked(mutants: Sequence[Mutant], evidence: Sequence[_Evidence], late: float) -> list[tuple[float, Mutant]]:
    """Mutants by their distance, the closest first; those left when the time is up are not tried."""
    found = []
    for mutant in mutants:
        found.append((_distance(mutant, evidence), mutant))
        if time.process_time() > late:
            break
    return sorted(found, key=lambda pair: pair[0])


def _majority(mutants: list[Mutant]) -> str:
    """The family most of the equally good explanations belong to; the first of them where there is a tie."""
    groups = [m.group for m in mutants]
    return max(dict.fromkeys(groups), key=groups.count)


def _numeric(mutant: Mutant) -> bool:
    """Whether a mutant shows in the numbers of a single call."""
    return mutant.group not in ("selection", "hygiene")


@dataclass(frozen=True)
class _Evidence:
    case: Case
    what: str  # "output" or "lse": what the target got wrong
    expected: np.ndarray  # f64
    error: np.ndarray  # f64
    broken: np.ndarray  # bool, where it is not finite

    @property
    def zero(self) -> bool:
        """Whether the target returns 0 and nothing else, where something else is right."""
        return bool(self.expected.any() and not self.broken.any() and (self.error == -self.expected).all())

    @property
    def owned(self) -> bool:
        """Whether rows that some sequence owns are wrong too, by more than the noise of rounding."""
        mine, size = owned_rows(self.case), np.abs(self.error)
        return bool(self.broken[mine].any() or size[mine].max(initial=0.0) > size.max(initial=0.0) / 20)


def _gathered(plans: Sequence[Plan], target: Target, what: str) -> list[_Evidence]:
    """The target's answers to the plans, and to the last one's layout with other data.

    Where NaN was read, or nothing is wrong, the second fill shows how much was read, and from where.
    """
    near = [plans[-1].replace(seed=plans[-1].seed + more, check="plain") for more in (1, 2)]
    found = []
    for plan in [*near, *plans]:
        first = _evidence(build(plan), target, what)
        found.append(first)
        if first is not None and (first.broken.any() or not first.error.any()):
            found.append(_evidence(build(plan, "huge"), target, what))
    return [evidence for evidence in found if evidence is not None]


def _evidence(case: Case, target: Target, what: str) -> _Evidence | None:
    place = ("output", "lse").index(what)
    try:
        got = target.asking(what == "lse").run(case)[place]
    except Exception:  # the failure may be that it raises; then there are no numbers to explain
        return None
    expected = attend(case)[place]
    if got is None or got.shape != expected.shape:
        return None
    return _Evidence(case, what, expected, *_errors(got, expected))


def _errors(output: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    got = output.astype(np.float64)
    broken = ~np.isfinite(got) & np.isfinite(expected)
    stray = np.isneginf(expected) & np.isfinite(got)  # an lse where there is none
    with np.errstate(invalid="ignore"):
        error = np.where(broken | ~np.isfinite(expected), 1.0 * stray, got - expected)
    # Rounding is no symptom: the smallest step of the output dtype near each answer is taken off.
    step = 2.0**-8 if output.dtype.itemsize == 2 else 2.0**-20
    least = step * np.abs(np.where(np.isfinite(expected), expected, 0)).max(initial=0.0) / 2**20
    with np.errstate(invalid="ignore"):
        return np.where(~stray & (np.abs(error) <= 2 * step * np.abs(expected) + least), 0.0, error), broken


@lru_cache(maxsize=512)
def _kernel(mutant: Mutant, tile: Launch):
    launch = dataclasses.replace(tile, splits=mutant.splits, shards=mutant.shards, bugs=frozenset({mutant.id}))
    return model.launched(launch)


def _distance(mutant: Mutant, evidence: Sequence[_Evidence]) -> float:
    """The mean distance over the evidence, at the tile sizes that explain it best."""
    return min(float(np.mean([_apart(_kernel(mutant, tile), e) for e in evidence])) for tile in TILES)


def _apart(kernel, evidence: _Evidence) -> float:
    """0 for the same errors in the same places, 1 for nothing in common."""
    case = evidence.case
    answer = kernel(*(None if a is None else np.array(a) for a in case.arrays), **case.options, return_lse=True)
    error, broken = _errors(answer[("output", "lse").index(evidence.what)], evidence.expected)
    either = broken | evidence.broken
    nan_part = 1 - (broken & evidence.broken).sum() / either.sum() if either.any() else None
    size = np.linalg.norm(error) + np.linalg.norm(evidence.error)
    value_part = np.linalg.norm(error - evidence.error) / size if size > 0 else None
    parts = [part for part in (nan_part, value_part) if part is not None]
    return float(np.mean(parts)) if parts else 0.0


def accepts_illegal(plan: Plan, target: Target) -> list[Judgement]:
    """The illegal values that a target which promises to validate lets pass."""
    return judge_rejections(build(plan), target)
