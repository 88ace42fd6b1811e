"""One cell on one contender: judge, time, and judge again. No number without a verdict."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
import numpy as np

from fuzz.bench import arrays, clock, yardstick
from fuzz.bench.arrays import Batch
from fuzz.bench.ceilings import Ceilings
from fuzz.bench.cells import Cell
from oracle import Claim
from oracle.verdict import compare

# Above this many operations a byte a GPU cell is bound by arithmetic, and judged in bursts.
_BURST_INTENSITY = 100
# Cells prepared together on an accelerator, and the bytes of their pools: peers hold copies beside them.
_AT_ONCE = 8
_HELD_BYTES = 12 << 30


@dataclass(frozen=True)
class Result:
    """A line of a record. `seconds` is None unless `status` is "pass"."""

    cell: str
    backend: str
    status: str  # "pass", the verdict that denied it a number, "unsupported" or "error"
    reason: str = ""
    ratio: float | None = None  # worst error over its bound
    seconds: float | None = None
    spread: float | None = None  # half of the 95 % interval of `seconds`, as a fraction
    samples: int = 0
    beside: dict[str, dict[str, float]] = field(default_factory=dict)  # on a CPU: see `clock.Timing`
    floor: float | None = None  # seconds no kernel can beat on this machine
    bytes: int = 0
    flops: int = 0
    temp_bytes: int | None = None
    compile_seconds: float | None = None
    host_seconds: float | None = None  # of a warm public call, without waiting
    launches: int | None = None  # kernels of one call, on a GPU
    judge_seconds: float | None = None  # what its first call and the verdicts took
    timing_seconds: float | None = None  # what its timing took
    tags: dict[str, Any] = field(default_factory=dict)  # what growth curves and charts group by

    @property
    def time(self) -> float:
        """`seconds` of a result that has a number."""
        assert self.seconds is not None, f"{self.cell} on {self.backend} has no number: {self.status}"
        return self.seconds

    @property
    def fraction(self) -> float | None:
        """Of the machine's ceiling: 1 is the floor itself."""
        return self.floor / self.seconds if self.seconds and self.floor else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Contender:
    """Something that can be timed on a batch: one of our backends or a peer."""

    name: str
    # batch -> (jitted function, its arguments for each rotation, reason it cannot)
    prepare: Callable[[Batch], tuple[Callable[..., Any], list[tuple]]]
    claim: Callable[[Batch], Claim | None]
    unsupported: Callable[[Batch], str | None]
    output: Callable[[Any], np.ndarray] = np.asarray
    ready: Callable[[Any], Any] = jax.block_until_ready
    # batch -> the call as its users write it, given a rotation: what is timed on a CPU, and everywhere the host time.
    # None: the prepared function itself
    public: Callable[[Batch], Callable[[int], Any]] | None = None
    deterministic: bool = True  # other bits for the same arguments cost it its number


@dataclass(frozen=True)
class Prepared:
    """A contender bound to a batch: compiled, not yet judged."""

    function: Callable[..., Any]
    arguments: list[tuple]
    compile_seconds: float


def prepared(batch: Batch, contender: Contender) -> Prepared:
    """Bind and compile; what is not compiled ahead of its first call compiles there."""
    begin = time.perf_counter()
    function, arguments = contender.prepare(batch)
    if hasattr(function, "lower"):
        function.lower(*arguments[0]).compile()
    return Prepared(function, arguments, time.perf_counter() - begin)


# What a run tells as it goes: ("prepare", cell names), ("tick", None), ("spent", seconds of preparation),
# ("begin", (cell, contender)), ("result", Result).
Event = tuple[str, Any]
Jobs = Iterable[tuple[Cell, list[Contender]]]


def run(jobs: Jobs, ceilings: Ceilings, platform: str, deadline: float | None = None,
        alone: frozenset[str] = frozenset()) -> Iterator[Event]:  # fmt: skip
    """Every cell on its contenders, one after another, so that the machine's moods hit all alike.

    On an accelerator the host's cores compile and consult the oracle for a group of cells at once, and nothing is
    timed meanwhile; then the group is timed one by one.

    Args:
        deadline: `time.time()` past which nothing is begun.
        alone: cells for which nothing is prepared ahead, so that who kills the process is who was begun.
    """
    for group in _groups(jobs, 1 if platform == "cpu" else _AT_ONCE, alone):
        if not _late(deadline):
            ahead = platform != "cpu" and group[0][0].name not in alone
            yield from _measured(group, ceilings, platform, deadline, ahead)


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.time() > deadline


def _measured(group: list[tuple[Cell, list[Contender]]], ceilings: Ceilings, platform: str, deadline: float | None,
              ahead: bool) -> Iterator[Event]:  # fmt: skip
    """A function of its own, so that a group's pools are gone before the next group's are made."""
    begin = time.perf_counter()
    yield "prepare", [cell.name for cell, _ in group]
    batches = [(arrays.make(cell, ceilings.cache_bytes), contenders) for cell, contenders in group]
    ready = (yield from _prepared(batches)) if ahead else {}
    yield "spent", time.perf_counter() - begin
    for batch, contenders in batches:
        for contender in contenders:
            if not _late(deadline):
                name = (batch.cell.name, contender.name)
                yield "begin", name
                yield "result", one(batch, contender, ceilings, platform, ready.pop(name, None))


def _groups(jobs: Jobs, most: int, alone: frozenset[str] = frozenset()) -> Iterator[list[tuple[Cell, list[Contender]]]]:
    """Runs of at most `most` cells whose pools fit the device together; a big one may stand alone."""
    group: list[tuple[Cell, list[Contender]]] = []
    held = 0
    for cell, contenders in jobs:
        size = max(cell.cache_bytes, arrays.POOL_BYTES // 16)  # a small one rotates over several pools
        single = cell.name in alone or (bool(group) and group[-1][0].name in alone)
        if group and (len(group) == most or held + size > _HELD_BYTES or single):
            yield group
            group, held = [], 0
        group.append((cell, contenders))
        held += size
    if group:
        yield group


def _prepared(batches: list[tuple[Batch, list[Contender]]]) -> Generator[Event, None, dict[tuple, Future[Prepared]]]:
    """Every contender of every batch compiled, and every case analysed, on all cores; a tick as each is done."""
    ready, analysed = {}, []
    with ThreadPoolExecutor() as pool:
        for batch, contenders in batches:
            able = [contender for contender in contenders if _able(contender, batch)]
            for c in able:
                ready[batch.cell.name, c.name] = pool.submit(contextvars.copy_context().run, prepared, batch, c)
            analysed.append(pool.submit(_analyse, batch, able))
        for _ in as_completed([*ready.values(), *analysed]):
            yield "tick", None
    return ready


def _analyse(batch: Batch, contenders: list[Contender]) -> None:
    """One claim after another: the batch's cases are then drawn once."""
    for claim in {contender.claim(batch) for contender in contenders}:
        batch.analyses(claim)


def _able(contender: Contender, batch: Batch) -> bool:
    """Whether it takes the batch; one that breaks when asked is left to `one`, which says so."""
    try:
        contender.claim(batch)
        return contender.unsupported(batch) is None
    except Exception:
        return False


def one(batch: Batch, contender: Contender, ceilings: Ceilings, platform: str,
        ready: Future[Prepared] | None = None) -> Result:  # fmt: skip
    """Judge one contender on one batch and, if it passes, time it and judge it again."""
    cell = batch.cell
    floor = ceilings.floor(cell.bytes, cell.flops, cell.layer.compute_dtype)
    none = Result(cell.name, contender.name, "error", floor=floor, bytes=cell.bytes, flops=cell.flops, tags=_tags(cell))
    try:
        reason = contender.unsupported(batch)
        if reason is not None:
            return replace(none, status="unsupported", reason=reason)
        # What did not compile beside others is given a chance alone.
        bound = ready.result() if ready and not ready.exception() else prepared(batch, contender)
        return _judged_and_timed(batch, contender, platform, none, bound)
    except Exception as error:  # a crash is a finding about the contender, and must not end the others' run
        return replace(none, reason=f"{type(error).__name__}: {error}"[:500])


def _judged_and_timed(batch: Batch, contender: Contender, platform: str, none: Result, bound: Prepared) -> Result:
    function, arguments = bound.function, bound.arguments
    public = contender.public(batch) if contender.public else lambda turn: function(*arguments[turn % len(arguments)])
    begin = time.perf_counter()
    answer = contender.output(function(*arguments[0]))
    first = time.perf_counter() - begin
    status, reason, ratio = verdict(batch, answer, contender.claim(batch))
    judged = time.perf_counter() - begin
    if status != "pass":
        return replace(none, status=status, reason=reason, ratio=ratio, judge_seconds=judged)
    begin = time.perf_counter()
    timing = _time(batch, function, arguments, public, platform, contender.ready)
    host = clock.dispatch(lambda: public(0), repeats=20)
    timed = time.perf_counter() - begin
    begin = time.perf_counter()
    status, reason = _again(batch, contender, function, arguments, public, answer)
    judged += time.perf_counter() - begin
    if status != "pass":
        return replace(none, status=status, reason=reason, ratio=ratio, judge_seconds=judged, timing_seconds=timed)
    return replace(
        none, status="pass", ratio=ratio, seconds=timing.seconds, spread=timing.spread, samples=timing.samples,
        beside=timing.beside, temp_bytes=_temporaries(function, arguments[0]), host_seconds=host,
        launches=timing.launches, compile_seconds=bound.compile_seconds + max(0.0, first - timing.seconds),
        judge_seconds=judged, timing_seconds=timed,
    )  # fmt: skip


def _again(batch: Batch, contender: Contender, function: Callable, arguments: list[tuple], public: Callable,
           answer: np.ndarray) -> tuple[str, str]:  # fmt: skip
    """The verdict on what was timed: the same arguments once more, other pages, and the call as users write it."""
    claim, last = contender.claim(batch), len(arguments) - 1
    once_more = contender.output(function(*arguments[0]))
    status, reason = "pass", ""
    if once_more.tobytes() != answer.tobytes():
        status, reason, _ = verdict(batch, once_more, claim)
        if status == "pass" and contender.deterministic:
            status, reason = "fail", "the same arguments gave other bits"
    if status == "pass":
        status, reason, _ = verdict(batch, contender.output(function(*arguments[last])), claim, again=True)
    if status == "pass" and contender.public:
        status, reason, _ = verdict(batch, np.asarray(public(last)), claim, again=True)
    return status, f"after the timing: {reason}"


def _tags(cell: Cell) -> dict[str, Any]:
    return {"kind": cell.kind, "model": f"{cell.model.name}.{cell.layer.name}", "families": list(cell.families),
            "page size": cell.page_size, "batch": len(cell.queries), "context": max(cell.contexts),
            "dtype": cell.layer.dtype, "compute_dtype": cell.layer.compute_dtype}  # fmt: skip


def verdict(batch: Batch, answer: np.ndarray, claim: Claim | None, again: bool = False) -> tuple[str, str, float]:
    """The worst verdict over sampled slices of an output: (status, text, ratio).

    Args:
        again: the answer is that of the last rotation.
    """
    queries = batch.on_host
    if (answer.shape, answer.dtype) != (queries.shape, queries.dtype):
        return "fail", f"{answer.dtype}{list(answer.shape)} came, {queries.dtype}{list(queries.shape)} was due", np.inf
    finite = np.isfinite(answer).all(axis=(1, 2))
    if not finite.all():
        return "fail", f"row {int(np.argmin(finite))} is not finite, {int((~finite).sum())} rows are not", np.inf
    worst = ("vacuous", "no row was judged", 0.0)
    rank = {"vacuous": 0, "pass": 1, "suspect": 2, "fail": 3}
    cases, analyses = (batch.judged_again if again else batch.judged), batch.analyses(claim)[again]
    for ((rows, heads), case), analysis in zip(cases, analyses, strict=True):
        found = compare(case, analysis, answer[rows, heads])
        if (rank[found.status], found.ratio) >= (rank[worst[0]], worst[2]):
            worst = (
                found.status,
                f"row {rows.start}, heads {heads.start} to {heads.stop - 1}: {found.text}",
                found.ratio,
            )
    return worst


def _time(batch: Batch, function: Callable, arguments: list[tuple], public: Callable[[int], Any], platform: str,
          ready: Callable) -> clock.Timing:  # fmt: skip
    if platform == "cpu":
        return clock.paired(public, yardstick.make(batch))
    if platform != "gpu":
        return clock.wall(function, arguments)
    rest = 0.1 if batch.cell.flops / batch.cell.bytes > _BURST_INTENSITY else 0.0
    return clock.kernels(function, arguments, rest, ready=ready)


def _temporaries(function: Any, args: tuple) -> int | None:
    """Bytes the program needs besides arguments and result, where the compiler tells."""
    if not hasattr(function, "lower"):
        return None
    analysis = function.lower(*args).compile().memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)
