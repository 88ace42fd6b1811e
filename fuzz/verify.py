"""`rpa verify`'s loop: every step of a replay, every layer of the model, every backend, judged by the oracle.

trace -> scheduler -> case -> backend, twice -> verdict -> report. The second call finds other values in every slot
that no row sees and must give the same bits.
"""

from __future__ import annotations

import inspect
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.files import write_atomically
from fuzz.models import Layer, Model
from fuzz.serve import Limits, Scale, Scheduler, Step
from fuzz.targets import BACKENDS, Target, Unsupported
from fuzz.trace import BLOCK_TOKENS, Request, Scan
from fuzz.traffic import PagedCache, case_of, twice
from oracle import Case, analyse, compare

ENOUGH_FAILURES = 3  # of one backend on one layer; more would say the same
_LIMITS = {"tiny": Limits(tokens=64, seqs=16, pages=384, pages_per_seq=256, page_size=8)}
_FULL_SIZE = Limits(tokens=64, seqs=16, pages=640, pages_per_seq=512, page_size=16)
_OUT_OF_RESOURCES = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "CUDA_ERROR_OUT_OF_MEMORY")


class Infrastructure(RuntimeError):
    """The machine gave out, not the kernel: memory, disk, device."""


@dataclass(frozen=True)
class Plan:
    """What is replayed: the model, the server's static shapes, and how trace tokens and time map to them.

    `again` is the command that replays it, but for platform and steps.
    """

    model: Model
    limits: Limits
    scale: Scale
    step_ms: float
    seed: int
    source: str
    again: str


def plan_of(
    model: Model, scan: Scan, source: str, seed: int, scale: int | None = None, trace: Path | None = None
) -> Plan:
    """Shapes for `model` and a scale at which 99 % of the trace's requests fit and its prompts keep the server busy.

    Prompts shrink by a power of two, but no further than to one page a hash block, so that shared prefixes stay
    whole pages; outputs shrink by an eighth of that, so that decoding keeps its part. `scale` fixes the first.
    """
    limits = _LIMITS.get(model.name, _FULL_SIZE)
    limits = replace(limits, page_size=limits.page_size if model.name in _LIMITS else model.page_size)
    most = BLOCK_TOKENS // limits.page_size
    prompt = scale or 1
    while scale is None and prompt < most and scan.longest() > prompt * limits.capacity:
        prompt *= 2
    shrunk = Scale(prompt, max(1, prompt // 8))
    tokens = scan.prompt_tokens / prompt
    step_ms = limits.tokens * scan.duration / tokens if scan.duration else 1.0
    given = {"model": model.name, "seed": seed, "scale": scale, "trace": trace}
    options = [f" --{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    return Plan(model, limits, shrunk, step_ms, seed, source, "rpa verify" + "".join(options))


@dataclass
class Score:
    """One backend on one layer. A case is one step; it is verified when every live row of it is."""

    verified: int = 0
    failed: int = 0
    vacuous: int = 0
    rows: int = 0
    ratio: float = 0.0
    lse_ratio: float | None = None
    seconds: float = 0.0
    first: float = 0.0  # of these, seconds of the first case: it compiles


@dataclass(frozen=True)
class Failure:
    """One case a backend got wrong, where it was saved, and the command that judges it again."""

    backend: str
    layer: str
    step: int
    text: str
    case: str
    reproduce: str


@dataclass
class Report:
    """What has been done so far; complete at any moment, so an interrupted replay still has its table."""

    plan: Plan
    scores: dict[tuple[str, str], Score] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # backend: why it does not run here
    skipped: Counter[str] = field(default_factory=Counter)  # reason: cases
    features: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    steps: int = 0
    rows: int = 0
    requests: set[int] = field(default_factory=set)
    seconds: float = 0.0
    first_step: float = 0.0  # of these, the first step's: it compiles every program
    interrupted: bool = False
    trouble: str | None = None

    def total(self, what: str, backend: str | None = None) -> int:
        """The sum of `verified`, `failed`, `vacuous` or `rows` over layers, of one backend or all."""
        return sum(getattr(s, what) for (name, _), s in self.scores.items() if backend in (None, name))

    @property
    def status(self) -> str:
        if self.failures:
            return "fail"
        if self.trouble:
            return "infrastructure"
        if self.interrupted:
            return "interrupted"
        return "pass" if self.total("verified") else "nothing verified"

    def as_json(self) -> dict[str, Any]:
        """The contract's fields first, then where the numbers come from."""
        backends = {}
        for name in dict.fromkeys(name for name, _ in self.scores):
            layers = {layer: score for (backend, layer), score in self.scores.items() if backend == name}
            lse = [s.lse_ratio for s in layers.values() if s.lse_ratio is not None]
            backends[name] = {
                **{what: self.total(what, name) for what in ("verified", "failed", "vacuous", "rows")},
                "worst_ratio": _finite(max(s.ratio for s in layers.values())),
                "worst_lse_ratio": _finite(max(lse, default=None)),
                "seconds": round(sum(s.seconds for s in layers.values()), 3),
                "layers": {name: {k: _finite(v) for k, v in vars(score).items()} for name, score in layers.items()},
            }
        plan = self.plan
        return {
            "status": self.status,
            **{what: self.total(what) for what in ("verified", "failed", "vacuous")},
            "skipped": dict(self.skipped) | {f"{name}: {reason}": 1 for name, reason in self.absent.items()},
            "backends": backends,
            "failures": [vars(failure) for failure in self.failures],
            "steps": self.steps,
            "rows": self.rows,
            "requests": len(self.requests),
            "features": dict(self.features),
            "scheduler": dict(self.counts),
            "seconds": round(self.seconds, 3),
            "source": plan.source,
            "seed": plan.seed,
            "model": plan.model.name,
            "limits": vars(plan.limits),
            "scale": vars(plan.scale),
            "trouble": self.trouble,
        }


def with_lse(target: Target) -> Target:
    """The target asked for its log-sum-exp too, if it says that it can return one.

    `**options` says nothing: it may be handed on to a function that has no such argument.
    """
    if target.name not in BACKENDS and "return_lse" not in inspect.signature(target.call).parameters:
        return target
    return replace(target, call=partial(target.call, return_lse=True))


class Replay:
    """Steps of a plan against targets, judged as they come; `report` is what has been found so far."""

    def __init__(self, plan: Plan, requests: Iterable[Request], targets: list[Target], out: Path) -> None:
        self.plan, self.out = plan, out
        self.targets = [with_lse(target) for target in targets]
        self.scheduler = Scheduler(requests, plan.limits, plan.scale, plan.step_ms, plan.seed)
        self.caches: dict[str, PagedCache] = {}
        for layer in plan.model.layers:
            self.caches.setdefault(layer.pages_dtype, PagedCache(plan.model, layer, plan.limits, plan.seed))
        self.report = Report(plan)

    def run(self, steps: int, budget: float) -> Iterator[str]:
        """Judge up to `steps` steps, or all there are; yields the layer that comes next.

        `budget` counts seconds from the end of the first step, which compiles: a slow machine verifies too.

        Raises:
            Infrastructure: memory, disk or device gave out.
        """
        start = time.perf_counter()
        for step in self._steps():
            for cache in self.caches.values():
                cache.apply(step)
            for layer in self.plan.model.layers:
                yield layer.name
                self._judge(step, layer)
                self.report.seconds = time.perf_counter() - start
            self._note(step)
            self.report.first_step = self.report.first_step or self.report.seconds
            if self.report.steps >= steps or self.report.seconds - self.report.first_step >= budget:
                return

    def _steps(self) -> Iterator[Step]:
        """The scheduler's steps; what it counts stands in the report before a step and after the last."""
        steps = self.scheduler.steps()
        while True:
            step = next(steps, None)
            self.report.counts = self.scheduler.counts
            self.report.skipped.update(self.scheduler.skipped - self.report.skipped)
            if step is None:
                return
            yield step

    def _note(self, step: Step) -> None:
        self.report.steps += 1
        self.report.rows += step.rows
        self.report.requests |= {span.request for span in step.spans}

    def _judge(self, step: Step, layer: Layer) -> None:
        """One step of one layer on every target: answered twice, compared with the oracle and with itself."""
        case, refilled = twice(case_of(step, layer, self.caches[layer.pages_dtype], self.plan.limits))
        analyses: dict[Any, Any] = {}
        for target in self.targets:
            score = self.report.scores.setdefault((target.name, layer.name), Score())
            if score.failed >= ENOUGH_FAILURES:
                self.report.skipped[f"{target.name}, {layer.name}: not run after {ENOUGH_FAILURES} failures"] += 1
                continue
            try:
                reason = target.supports(case)
                if reason is not None:
                    raise Unsupported(f"{target.name}, {layer.name}: {reason}")
                claim = target.claim(case)
                if claim not in analyses:
                    analyses[claim] = analyse(case, claim)
                self._score(score, target, step, layer, case, refilled, analyses[claim])
            except Unsupported as gap:
                self.report.skipped[str(gap)] += 1
            except MemoryError:
                raise Infrastructure(f"out of memory in step {step.index}, layer {layer.name}") from None

    def _score(
        self,
        score: Score,
        target: Target,
        step: Step,
        layer: Layer,
        case: Case,
        refilled: Case,
        analysis: Any,
    ):
        begin = time.perf_counter()
        try:
            output, lse = target.run(case)
            again, lse_again = target.run(refilled)
        except (Unsupported, MemoryError):
            raise
        except Exception as error:  # whatever a kernel raises on a legal call is its failure
            if case.quantised and re.search("unexpected keyword argument '[kv]_scale'", str(error)):
                raise Unsupported(f"{target.name}, {layer.name}: takes no scales") from error
            if any(word in str(error) for word in _OUT_OF_RESOURCES):
                raise Infrastructure(f"{target.name}, step {step.index}: {_first_line(error)}") from error
            self._fail(score, target, step, layer, f"raised {type(error).__name__}: {_first_line(error)}", case)
            return
        finally:
            score.seconds += time.perf_counter() - begin
            score.first = score.first or score.seconds
        verdict = compare(case, analysis, output, lse)
        score.ratio = max(score.ratio, verdict.ratio)
        if lse is not None:
            score.lse_ratio = max(score.lse_ratio or 0.0, verdict.lse_ratio)
        if verdict.status in ("fail", "suspect"):
            # `rpa fuzz replay` judges the output of one call; what it does not see needs the replay itself.
            seen_alone = verdict.ratio > 1 or verdict.status == "suspect"
            self._fail(score, target, step, layer, verdict.text, case, alone=seen_alone)
        elif not (_same_bits(output, again) and _same_bits(lse, lse_again)):
            text = "the bits change with what lies in slots that no row sees"
            self._fail(score, target, step, layer, text, case, refilled, alone=False)
        elif verdict.status == "vacuous":
            score.vacuous += 1
        else:
            score.verified += 1
            score.rows += step.rows
            self.report.features.update(features(step, layer, case))

    def _fail(
        self,
        score: Score,
        target: Target,
        step: Step,
        layer: Layer,
        text: str,
        *cases: Case,
        alone: bool = True,
    ) -> None:
        """Count and save a failure; `alone` says that the saved case shows it by itself."""
        score.failed += 1
        name = f"{_safe(target.name)}-{_safe(layer.name)}-step{step.index:05d}"
        path = self.out / f"{name}.npz"
        try:
            for place, case in zip((path, self.out / f"{name}-refilled.npz"), cases, strict=False):
                write_atomically(place, case.save)
        except OSError as error:
            raise Infrastructure(f"cannot save the failing case to {path}: {error.strerror}") from error
        replayed = f"{self.plan.again} --platform {target.name} --steps {step.index + 1} --budget 1h"
        again = f"rpa fuzz replay {path} --target {target.name}" if alone else replayed
        self.report.failures.append(Failure(target.name, layer.name, step.index, text, str(path), again))


def features(step: Step, layer: Layer, case: Case) -> Iterator[str]:
    """What of the operation a step exercises."""
    kinds = {span.kind for span in step.spans}
    yield from kinds
    if "decode" in kinds and len(kinds) > 1:
        yield "mixed"
    if step.shared():
        yield "shared pages"
    if any(span.resumed for span in step.spans):
        yield "resumed after preemption"
    if step.rows < case.num_tokens:
        yield "rows of nobody"
    if layer.sliding_window is not None and any(span.stop > layer.sliding_window for span in step.spans):
        yield "window shorter than a context"
    if layer.logits_soft_cap is not None:
        yield "soft cap"
    if layer.sinks:
        yield "sinks"
    yield f"{layer.pages_dtype} pages"


def _finite(ratio: float | None) -> float | None:
    """JSON has no infinity: a broken exact answer (a NaN, a row of nobody) becomes the largest float."""
    return ratio if ratio is None else min(ratio, sys.float_info.max)


def _same_bits(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and first.tobytes() == second.tobytes()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:300]


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in name)
