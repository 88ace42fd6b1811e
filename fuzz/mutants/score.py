"""The mutation score: how many cases each mutant survives, under our judge and under the usual ones."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from fuzz.build import build
from fuzz.draws import litters
from fuzz.judge import judge_plan, judge_rejections
from fuzz.mutants import patched
from fuzz.mutants.catalogue import EQUIVALENT, MUTANTS, Mutant, model_target, right_target
from fuzz.mutants.model import Launch
from fuzz.plan import SMALLEST, Plan, Shape
from fuzz.strategies import LITTER
from fuzz.stream import first_shapes
from fuzz.targets import Target, load
from fuzz.worker import why_not
from oracle import Case, attend

CASES = 300
SECONDS = 60.0
SHAPES = 24
# Of a patched kernel: a shape is a compilation, and blocks are longer than most contexts, so cases must be many.
PATCH_SHAPES, PATCH_CASES = 14, 240
# In an interpreter a compilation takes 7 CPU seconds and a case half of one; what these leave alive is its proof's.
INTERPRETED_SHAPES, INTERPRETED_CASES = 3, 30
# What plays a kernel where its own chip is missing.
INTERPRETED = {"triton": "triton_interpret"}


@dataclass(frozen=True)
class Kill:
    """What became of one mutant. `cases` is how many were judged, the killing one included."""

    id: str
    group: str
    line: str
    killed: bool
    cases: int
    seconds: float
    kind: str = ""
    text: str = ""
    equivalent: str | None = None


@lru_cache(maxsize=8)
def drawn(seed: int, count: int, pool: tuple[Shape, ...] = ()) -> tuple[Plan, ...]:
    """The first plans that Hypothesis draws for a seed, of the first shapes of its stream or of a pool: the same
    cases for every mutant.
    """
    pool = pool or first_shapes(seed, SHAPES)
    found: list[Plan] = []

    @seeded(seed)
    @settings(
        max_examples=-(-count // LITTER),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
        phases=[Phase.generate],
    )
    @given(litters(pool))
    def collect(litter: tuple[Plan, ...]) -> None:
        found.extend(litter)

    collect()
    return tuple(found[:count])


def kill(mutant: Mutant, seed: int = 0, cases: int = CASES, seconds: float = SECONDS) -> Kill:
    """Judge cases until one kills the mutant, or cases or CPU seconds run out."""
    return _kill(model_target(mutant), drawn(seed, cases), seconds, mutant)


def _kill(target: Target, cases: tuple[Plan, ...], seconds: float, mutant: Mutant) -> Kill:
    began = time.process_time()  # of this process: what else runs on the machine is not the mutant's

    def result(killed: bool, count: int, kind: str = "", text: str = "") -> Kill:
        spent = time.process_time() - began
        return Kill(mutant.id, mutant.group, mutant.line, killed, count, spent, kind, text, mutant.equivalent)

    accepted = judge_rejections(build(SMALLEST), target)
    if accepted:
        return result(True, 1, accepted[0].kind, accepted[0].text)
    for count, plan in enumerate(cases, 1):
        judgement = judge_plan(plan, target)
        if judgement.bad:
            return result(True, count, judgement.kind, judgement.text)
        if time.process_time() - began > seconds:
            return result(False, count, text="out of time")
    return result(False, len(cases))


def kill_all(seed: int = 0, cases: int = CASES, equivalent: bool = False) -> Iterator[Kill]:
    """Every mutant of the model kernel in turn."""
    yield from (kill(mutant, seed, cases) for mutant in (EQUIVALENT if equivalent else MUTANTS))


# ---------------------------------------------------------------- source patches


_CODE = "import sys; from fuzz.mutants import score; score.main(*sys.argv[1:])"


def kill_patch(patch: patched.Patch, seed: int = 0, cases: int = PATCH_CASES, seconds: float = SECONDS) -> Kill:
    """Judge the patched kernel in a fresh process, where a crash is a kill too; then by the proof made for it.

    A race, a wait left out or a planner's bug may show only in the kernel's own proofs (its tests in a checkout): those
    are asked about what the plain search leaves alive, and the kill says so.
    """
    began = time.monotonic()
    kill = _searched(patch, seed, cases, seconds)
    if not kill.killed and (proof := patched.proof_of(patch)) is not None:
        caught, text = patched.proved(proof)
        kind, text = ("proof", proof) if caught else ("", f"{kill.text or 'survives'}; {proof}: {text}")
        kill = replace(kill, killed=caught, kind=kind, text=text, seconds=time.monotonic() - began)
    return kill


def _searched(patch: patched.Patch, seed: int, cases: int, seconds: float) -> Kill:
    """What the plain search makes of a patch."""
    began = time.monotonic()

    def result(killed: bool, kind: str, text: str = "") -> Kill:
        return Kill(patch.id, f"patch of {patch.kernel}", patch.line, killed, 0, time.monotonic() - began, kind, text)

    with patched.applied(patch) as root:
        arguments = (patch.target, str(seed), str(cases), str(seconds))
        try:
            done = patched.run_python(root, _CODE, *arguments, timeout=4 * seconds)
        except subprocess.TimeoutExpired:  # what hangs is wrong; what is only slow has run out of CPU seconds before
            return result(True, "timeout", "it hangs")
    if done.returncode:
        text = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return result(False, "", text) if "cannot run here" in text else result(True, "crash", text)
    found = json.loads(done.stdout.splitlines()[-1])
    return Kill(**{**found, "id": patch.id, "group": f"patch of {patch.kernel}", "line": patch.line})


def main(name: str, seed: str, cases: str, seconds: str) -> None:
    """In the fresh process: judge the (patched) target and print the `Kill` as JSON."""
    target, pool = _runnable(name, int(seed))
    plans = drawn(int(seed), int(cases), pool)
    if target.interpreted:
        plans = drawn(int(seed), min(int(cases), INTERPRETED_CASES), pool[:INTERPRETED_SHAPES])
    found = _kill(target, plans, float(seconds), Mutant(name, "", ""))
    print(json.dumps(asdict(found)))
    sys.stdout.flush()


def _runnable(name: str, seed: int) -> tuple[Target, tuple[Shape, ...]]:
    """The target, its interpreter where there is no chip for it, and the first shapes of the stream that it takes."""
    target = load(name)  # before JAX is imported: an interpreter may have to set its environment
    if name in INTERPRETED and target.gap(build(SMALLEST)) is not None:
        target = load(INTERPRETED[name])
    pool = first_shapes(seed, PATCH_SHAPES, lambda shape: why_not(shape, target) is None)
    if not pool:
        raise SystemExit(f"{name} cannot run here: {target.gap(build(SMALLEST))}")
    return target, pool


# ---------------------------------------------------------------- false alarms


# Tile sizes of right kernels: one key at a time, odd, larger than any context, split, sharded.
BLOCKINGS = tuple(
    Launch(block_q, block_k, splits, shards)
    for block_q, block_k, splits, shards in (
        (4, 8, 1, 1), (1, 1, 1, 1), (3, 5, 1, 1), (8, 16, 2, 1),
        (16, 128, 1, 2), (2, 7, 5, 1), (64, 33, 1, 1), (5, 4, 3, 2),
    )
)  # fmt: skip


def false_alarms(seed: int = 0, cases: int = 2000, pool: tuple[Shape, ...] = ()) -> list[tuple[Plan, str]]:
    """Every accusation of the right model kernel over `cases` cases and varied blocking."""
    return [accusation for accusation in alarms(seed, cases, pool) if accusation is not None]


def alarms(seed: int, cases: int, pool: tuple[Shape, ...] = ()) -> Iterator[tuple[Plan, str] | None]:
    """Of each case of the right model kernel, the accusation or None."""
    targets = [right_target(launch) for launch in BLOCKINGS]
    for count, plan in enumerate(drawn(seed, cases, pool) if cases else ()):
        judgement = judge_plan(plan, targets[count % len(targets)])
        yield (plan, judgement.text) if judgement.bad else None


# ---------------------------------------------------------------- the usual judges


@dataclass(frozen=True)
class Usual:
    """A judge as found in the field: a tolerance, and the data it is used with."""

    name: str
    accuses: Callable[[np.ndarray, np.ndarray, np.ndarray, str], bool]  # (got, expected, low precision, dtype)
    layouts: str  # "ours" | "published"


def _close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return bool(np.all(np.abs(got - expected) <= tolerance * (1 + np.abs(expected))))


# These tolerances are the field's, and are what is measured here; nothing of ours is judged by them.
_ALLCLOSE = {"float32": 1e-3, "float16": 1e-3, "bfloat16": 1e-2}
_PUBLISHED = {"float32": 0.15, "float16": 0.15, "bfloat16": 0.2}
USUAL = (
    Usual("allclose 1e-2 / 1e-3", lambda got, want, low, t: not _close(got, want, _ALLCLOSE[t]), "ours"),
    Usual("0.15 / 0.2", lambda got, want, low, t: not _close(got, want, _PUBLISHED[t]), "published"),
    Usual("twice the low-precision error", lambda got, want, low, t: not _twice(got, want, low), "ours"),
)


def _twice(got: np.ndarray, expected: np.ndarray, low: np.ndarray) -> bool:
    rounding = np.max(np.abs((expected + 0.3 - 0.3) - expected), initial=0.0)
    return bool(
        np.max(np.abs(got - expected), initial=0) <= 2 * np.max(np.abs(low - expected), initial=0) + 2 * rounding
    )


def usual_plans(layouts: str, seed: int = 0) -> tuple[Plan, ...]:
    """24 cases of plain data for the usual judges: no spikes, no poison that matters to them, logits of one sigma.

    Of the dtypes such tests use: with others a fixed tolerance accuses the right kernel too.
    """
    shapes = [s for s in first_shapes(seed, 80) if s.capacity < 2000 and s.types in ("f32", "bf16", "f16")][:16]
    if layouts == "published":
        shapes = [s for s in shapes if s.kv_heads <= 2 and s.types != "f16"]
    return tuple(
        plan.replace(data="normal", amplitude=1.0, check="plain", holes="alias")
        for plan in drawn(seed + 1, 400, tuple(shapes))
        if plan.data != "exact" and any(q for q, _ in plan.lengths)
    )[:24]


def usual_score(judge: Usual, seed: int = 0, mutants: Sequence[Mutant] = MUTANTS) -> dict[str, bool]:
    """Which mutants a usual judge kills."""
    return {mutant.id: accused_by(judge, mutant, seed) for mutant in mutants}


def accused_by(judge: Usual, mutant: Mutant, seed: int = 0) -> bool:
    """Whether a usual judge, on the data it is used with, accuses a mutant."""
    return _accused(judge, model_target(mutant), _prepared(judge.layouts, seed))


@lru_cache(maxsize=4)
def _prepared(layouts: str, seed: int) -> list[tuple[Case, np.ndarray, np.ndarray]]:
    """(case, the float64 answer, a low-precision answer), with numbers where the search would put poison."""
    prepared = []
    for plan in usual_plans(layouts, seed):
        case = build(plan, "tame")
        low = right_target(Launch(8, 16)).run(case)[0].astype(np.float64)
        prepared.append((case, attend(case)[0], low))
    return prepared


def _accused(judge: Usual, target: Target, prepared: list) -> bool:
    for case, expected, low in prepared:
        try:
            got = target.call(*(None if a is None else np.array(a) for a in case.arrays), **case.options)
        except Exception:  # any of them would fail its test on an exception
            return True
        got = np.asarray(got).astype(np.float64)
        if not np.isfinite(got).all() or judge.accuses(got, expected, low, case.queries.dtype.name):
            return True
    return False
