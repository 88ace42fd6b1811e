"""What a campaign's child process does: draw plans by chunks, judge each, shrink what fails."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz.ahead import Ahead, Wanted
from fuzz.build import build
from fuzz.corpus import read_lines
from fuzz.judge import Judgement, judge_plan, judge_plans, judge_rejections
from fuzz.plan import SMALLEST, Plan, Shape
from fuzz.programs import kept
from fuzz.related import recompiled
from fuzz.shrink import same_symptom, shrink
from fuzz.strategies import LITTER, first_plans
from fuzz.stream import Stream
from fuzz.targets import Target, load

# (cases, a shape after each so many of them): some soon, since a bug that wants a feature is found when a shape has it;
# then as many as go into 40 compilations in any 10,000 cases, with the relations that compile and what is compiled
# ahead, until 52 hold all pairs of features; then fewer, for a compilation costs as much as 500 cases. 95 % of all
# triples are seen in 160 shapes.
FIRST_SHAPES = 3
PACE = ((300, 50), (16_425, 375), (10**9, 1500))
FRESH = 4  # cases of a shape that come first when it is opened
CHEAP_SHAPES, CASES_A_CHEAP_SHAPE = 24, 12  # for a target that compiles nothing
# Whose programs are compiled before they are asked for, and how many by all workers. Ours on a CPU: a compiler that may
# crash must do so in the case that asked for it.
COMPILED_AHEAD, AHEAD = ("xla",), 2
MOST_SHAPES = 1000
FEW_ROWS, FEW_TOKENS = 16, 1000  # what an interpreter does in a few seconds
REDUCTIONS = 4  # failures a worker shrinks; more of the same symptom are only counted


@dataclass(frozen=True)
class Chunk:
    """A stretch of cases: its number seeds it, so no two chunks of a campaign draw the same stream."""

    number: int
    cases: int
    judged_before: int  # by the whole campaign: decides how many shapes are open
    plans: tuple[Plan, ...] = ()  # judged as they are, instead of drawn
    unshrunk: tuple[Plan, ...] = ()  # failures that are counted already: only shrunk


@dataclass
class State:
    """What a worker knows across its chunks."""

    pipe: Connection
    target: Target
    seed: int
    share: tuple[int, int]  # (this worker, workers)
    out: Path
    reduce: bool
    reduced: list[Judgement] = field(default_factory=list)
    judged: set[Plan] = field(default_factory=set)  # in any session: no case is judged twice
    tried: set[Shape] = field(default_factory=set)  # in any session
    compiled: int = 0
    listening: bool = False
    gaps: dict[Shape, str | None] = field(default_factory=dict)  # why the target does not take a shape
    stream: Stream = field(init=False)
    ahead: Ahead = field(init=False)

    def __post_init__(self) -> None:
        self.stream = Stream(self.seed, self.takes)
        self.ahead = Ahead(self._compile)

    def _compile(self, wanted: Wanted) -> None:
        """Have a shape's program compiled, or those of the relations that need others."""
        shape, related = wanted
        for case in recompiled(shape) if related else [build(Plan(shape, ((1, 1),)))]:
            self.target.asking(shape.lse).run(case)

    def offered(self, shape: Shape) -> Shape:
        """A shape of the stream as this target is given it."""
        return shape if self.target.returns_lse else dataclasses.replace(shape, lse=False)

    def takes(self, shape: Shape) -> bool:
        """Whether the target takes a shape, as it declares."""
        shape = self.offered(shape)
        if shape not in self.gaps:
            self.gaps[shape] = why_not(shape, self.target)
        return self.gaps[shape] is None


def serve(pipe: Connection, name: str, seed: int, share: tuple[int, int], out: str, reduce: bool) -> None:
    """Judge chunks until there are none, and tell: `ready`, then `begin`, `end`, `failure`, `gap` and `done`."""
    _prepare_jax(Path(out), name)
    state = State(pipe, load(name), seed, share, Path(out), reduce)
    lines = read_lines(Path(out) / "record.jsonl")
    state.judged = {Plan.from_json(line["plan"]) for line in lines if line["line"] == "case"}
    state.tried = {plan.shape for plan in state.judged}
    if not state.target.returns_lse:
        pipe.send(("barred", [(("lse", True),)]))  # outputs alone are judged
    pipe.send(("ready", [j.text for j in judge_rejections(build(SMALLEST), state.target)]))
    while (chunk := pipe.recv()) is not None:
        _run(pipe, state, chunk)
        pipe.send(("done", chunk.number))
    state.ahead.end()


def chunk_seed(seed: int, chunk: int) -> int:
    """The seed of a chunk."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{chunk}".encode()).digest()[:8], "big")


def open_shapes(state: State, judged: int) -> tuple[Shape, ...]:
    """The shapes a chunk draws from: this worker's share of those open so far, all of which the target takes."""
    cheap = judged > 0 and not state.compiled and "jax" not in sys.modules
    mine, workers = state.share
    each = min(MOST_SHAPES, -(-wanted_shapes(judged, cheap) // workers))
    ahead = -(-AHEAD // workers) if state.target.name in COMPILED_AHEAD else 0
    narrowed = state.stream.narrowed
    pool = [state.offered(shape) for shape in itertools.islice(state.stream.shapes(), (each + ahead) * workers)]
    if state.stream.narrowed and not narrowed:
        _tell_gaps(state)
    pool = pool[mine::workers] or pool  # a target of very few shapes: every worker has them all
    if ahead:
        _listen(state)
        state.ahead.want((shape, related) for related in (False, True) for shape in pool)
    return tuple(pool[:each])


def _tell_gaps(state: State) -> None:
    """Tell the parent what the target does not take: the reasons, with the features that it never took."""
    reasons = Counter(gap for gap in state.gaps.values() if gap is not None)
    for text, shapes in reasons.most_common():
        state.pipe.send(("gap", text, shapes))
    if state.stream.found:
        state.pipe.send(("barred", state.stream.barred()))


def wanted_shapes(judged: int, cheap: bool = False) -> int:
    """How many shapes are open after so many cases."""
    if cheap:
        return CHEAP_SHAPES + judged // CASES_A_CHEAP_SHAPE
    shapes, since = FIRST_SHAPES, 0
    for until, cases in PACE:
        shapes += max(0, min(judged, until) - since) // cases
        since = until
    return shapes


def why_not(shape: Shape, target: Target) -> str | None:
    """Why a campaign gives a target no case of a shape, or None: the target's own gap, or an interpreter's patience."""
    if target.interpreted and (shape.tokens > FEW_ROWS or shape.capacity > FEW_TOKENS):
        return f"an interpreter is given at most {FEW_ROWS} rows and contexts of {FEW_TOKENS}"
    return target.gap(build(Plan(shape, ((1, 1),))))


def _run(pipe: Connection, state: State, chunk: Chunk) -> None:
    for plan in chunk.unshrunk:
        _reduce(pipe, state, plan, judge_plan(plan, state.target))
    _judge(pipe, state, chunk.plans)
    if chunk.plans or chunk.unshrunk:
        return
    if not open_shapes(state, chunk.judged_before):
        pipe.send(("barren",))
        return
    left, pool, chance = chunk.cases, [], random.Random(chunk_seed(state.seed, chunk.number))

    def some(plans: Iterable[Plan]) -> list[float]:
        nonlocal left
        new = [plan for plan in dict.fromkeys(plans) if plan not in state.judged][:left]
        left -= len(new)
        return _judge(pipe, state, new)

    def widen() -> None:
        """Open the shapes that are due by now, and judge their first plans."""
        pool[:] = open_shapes(state, chunk.judged_before + (chunk.cases - left) * state.share[1])
        some(_fresh(state, pool, chance))

    widen()
    widen()  # the first few cases of all show whether the target compiles: if not, more shapes are opened at once
    # Half a second to import: no case waits for it, and what compiles ahead runs beside it.
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import target as maximise

    from fuzz.draws import litters

    @seeded(chunk_seed(state.seed, chunk.number))
    @settings(
        max_examples=max(12, 3 * chunk.cases // (2 * LITTER)),  # from the half of them on, the worst ratios are raised
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
        phases=[Phase.generate, Phase.target],
    )
    @given(litters(pool))
    def judged(litter: tuple[Plan, ...]) -> None:
        worst = max((ratio for ratio in some(litter) if ratio <= 1), default=0.0)
        if left:
            widen()
        if worst > 0:
            maximise(worst, label="error / bound")

    judged()


def _fresh(state: State, pool: Sequence[Shape], chance: random.Random) -> list[Plan]:
    """Plans of the shapes that were never tried, which alone can hold a pair of static features that is new."""
    new = [shape for shape in pool if shape not in state.tried]
    return [plan for shape in new for plan in first_plans(shape, chance, FRESH)]


def _judge(pipe: Connection, state: State, plans: Sequence[Plan]) -> list[float]:
    """Judge plans in turn, telling the parent before and after each; see to failures. Their worst ratios.

    Those of one shape share their analysis, which is made when the first of them has its answer.
    """
    mates: dict[Shape, list[Plan]] = {}
    for plan in plans:
        mates.setdefault(plan.shape, []).append(plan)
    judgements = {shape: judge_plans(alike, state.target) for shape, alike in mates.items()}
    return [_one(pipe, state, plan, judgements[plan.shape]) for plan in plans]


def _one(pipe: Connection, state: State, plan: Plan, judgements: Iterator[Judgement]) -> float:
    """Judge one plan, whose judgement is the next, and see to a failure."""
    state.judged.add(plan)
    state.tried.add(plan.shape)
    state.ahead.wait((plan.shape, False))
    pipe.send(("begin", plan))
    began = time.monotonic()
    _listen(state)
    judgement = next(judgements)
    report = {"status": judgement.status, "kind": judgement.kind, "ratio": judgement.ratio, "text": judgement.text,
              "seconds": time.monotonic() - began, "compiled": state.compiled,
              "elements": judgement.verdict.judged if judgement.verdict else 0}  # fmt: skip
    pipe.send(("end", report))
    _reduce(pipe, state, plan, judgement)
    return judgement.ratio


def _reduce(pipe: Connection, state: State, plan: Plan, judgement: Judgement) -> None:
    """Shrink a failure of a new sort."""
    if judgement.bad and state.reduce and _is_news(state, judgement):
        state.reduced.append(judgement)
        pipe.send(("reducing", plan, judgement.text))
        pipe.send(("failure", left_behind(plan, state.target, judgement, state.out)))


def _is_news(state: State, judgement: Judgement) -> bool:
    """Whether a failure is worth the seconds of shrinking it: two of a symptom are, the third is only counted."""
    alike = sum(same_symptom(judgement, known) for known in state.reduced)
    return alike < 2 and len(state.reduced) < REDUCTIONS


def left_behind(plan: Plan, target: Target, judgement: Judgement, out: Path) -> dict[str, Any]:
    """Shrink a failing plan, diagnose it, and leave `failures/<id>/` behind; what the record says about it."""
    from fuzz.diagnose import diagnose
    from fuzz.repro import leave

    small = shrink(plan, target, judgement)
    diagnosis = diagnose([small.plan, plan], target, small.judgement)
    explained = (diagnosis.mutant or diagnosis.family).replace(" ", "_")
    kind = small.judgement.kind  # of the smallest: one bug, found twice, is one failure
    name = "-".join(dict.fromkeys([*kind.split(":"), explained]))
    final = leave(out / "failures" / name, small.plan, target, small.judgement, diagnosis)
    return {
        "id": name, "kind": kind, "status": judgement.status, "text": final.text, "diagnosis": str(diagnosis),
        "family": diagnosis.family, "mutant": diagnosis.mutant, "plan": small.plan.to_json(), "found": plan.to_json(),
        "shrink_seconds": round(small.seconds, 2), "tried": small.tried,
    }  # fmt: skip


def _listen(state: State) -> None:
    """Count XLA compilations once the target has imported JAX."""
    if state.listening or "jax" not in sys.modules:
        return
    import jax.monitoring

    def compiled(event: str, seconds: float, /, **rest: Any) -> None:
        state.compiled += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(compiled)  # type: ignore[arg-type]
    state.listening = True


def _prepare_jax(out: Path, name: str) -> None:
    """What JAX reads when it is imported: workers, and campaigns one after the other, share compiled programs.

    Our XLA backend gets one thread a worker, as BLAS does, and runs in the one that calls: handing a small program to
    another costs as much as running it. (Not the interpreters, nor what we do not know: their callbacks may need a
    second thread.) And its programs are compiled in one piece, which costs a tenth less than many and gives the same
    code.
    """
    if name == "xla":
        ours = {"NPROC": "1", "XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1"}
        os.environ.update({variable: value for variable, value in ours.items() if variable not in os.environ})
    os.environ.update(kept(out, os.environ))
    if name == "xla":
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)  # which has no variable
