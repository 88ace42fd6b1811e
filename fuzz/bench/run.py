"""One cell on one backend: judge, and only then time."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from fuzz.bench import arrays, clock
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
    spread: float | None = None
    samples: int = 0
    floor: float | None = None  # seconds no kernel can beat on this machine
    bytes: int = 0
    flops: int = 0
    temp_bytes: int | None = None
    compile_seconds: float | None = None
    host_seconds: float | None = None  # of a warm public call, without waiting
    launches: int | None = None  # kernels of one call, on a GPU
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
    # batch -> the call as its users write it, for the host time; None: the prepared function itself
    public: Callable[[Batch], Callable[[], Any]] | None = None


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


def run(jobs: Iterable[tuple[Cell, list[Contender]]], ceilings: Ceilings, platform: str) -> Iterator[list[Result]]:
    """Every cell on its contenders: a list of results a cell, interleaved so that the machine's moods hit all alike.

    On an accelerator the host's cores compile and consult the oracle for a group of cells at once, and nothing is
    timed meanwhile; then the group is timed one by one.
    """
    for group in _groups(jobs, 1 if platform == "cpu" else _AT_ONCE):
        yield from _measured(group, ceilings, platform)


def _measured(group: list[tuple[Cell, list[Contender]]], ceilings: Ceilings, platform: str) -> Iterator[list[Result]]:
    """A function of its own, so that a group's pools are gone before the next group's are made."""
    batches = [(arrays.make(cell, ceilings.cache_bytes), contenders) for cell, contenders in group]
    ready = {} if platform == "cpu" else _prepared(batches)
    for batch, contenders in batches:
        name = batch.cell.name
        yield [one(batch, c, ceilings, platform, ready.pop((name, c.name), None)) for c in contenders]


def _groups(jobs: Iterable[tuple[Cell, list[Contender]]], most: int) -> Iterator[list[tuple[Cell, list[Contender]]]]:
    """Runs of at most `most` cells whose pools fit the device together; a big one may stand alone."""
    group: list[tuple[Cell, list[Contender]]] = []
    held = 0
    for cell, contenders in jobs:
        size = max(cell.cache_bytes, arrays.POOL_BYTES // 16)  # a small one rotates over several pools
        if group and (len(group) == most or held + size > _HELD_BYTES):
            yield group
            group, held = [], 0
        group.append((cell, contenders))
        held += size
    if group:
        yield group


def _prepared(batches: list[tuple[Batch, list[Contender]]]) -> dict[tuple[str, str], Future[Prepared]]:
    """Every contender of every batch compiled, and every case analysed, on all cores."""
    ready = {}
    with ThreadPoolExecutor() as pool:
        for batch, contenders in batches:
            able = [contender for contender in contenders if contender.unsupported(batch) is None]
            for c in able:
                ready[batch.cell.name, c.name] = pool.submit(contextvars.copy_context().run, prepared, batch, c)
            for claim in {contender.claim(batch) for contender in able}:
                pool.submit(batch.analyses, claim)
    return ready


def one(batch: Batch, contender: Contender, ceilings: Ceilings, platform: str,
        ready: Future[Prepared] | None = None) -> Result:  # fmt: skip
    """Judge one contender on one batch and, if it passes, time it."""
    cell = batch.cell
    floor = ceilings.floor(cell.bytes, cell.flops, cell.layer.compute_dtype)
    known = {"cell": cell.name, "backend": contender.name, "floor": floor, "bytes": cell.bytes, "flops": cell.flops,
             "tags": _tags(cell)}  # fmt: skip
    reason = contender.unsupported(batch)
    if reason is not None:
        return Result(**known, status="unsupported", reason=reason)
    try:
        bound = ready.result() if ready else prepared(batch, contender)
        function, arguments = bound.function, bound.arguments
        begin = time.perf_counter()
        answer = contender.output(function(*arguments[0]))
        first = time.perf_counter() - begin
        status, reason, ratio = verdict(batch, answer, contender.claim(batch))
        if status != "pass":
            return Result(**known, status=status, reason=reason, ratio=ratio)
        timing = _time(function, arguments, cell, platform, contender.ready)
        public = contender.public(batch) if contender.public else lambda: function(*arguments[0])
        host = clock.dispatch(public, repeats=20)
    except Exception as error:  # a crash is a finding about the contender, and must not end the others' run
        return Result(**known, status="error", reason=f"{type(error).__name__}: {error}"[:500])
    return Result(
        **known, status="pass", ratio=ratio, seconds=timing.seconds, spread=timing.spread, samples=timing.samples,
        temp_bytes=_temporaries(function, arguments[0]), host_seconds=host, launches=timing.launches,
        compile_seconds=bound.compile_seconds + max(0.0, first - timing.seconds),
    )  # fmt: skip


def _tags(cell: Cell) -> dict[str, Any]:
    return {"kind": cell.kind, "model": f"{cell.model.name}.{cell.layer.name}", "families": list(cell.families),
            "page size": cell.page_size, "batch": len(cell.queries), "context": max(cell.contexts),
            "dtype": cell.layer.dtype, "compute_dtype": cell.layer.compute_dtype}  # fmt: skip


def verdict(batch: Batch, answer: np.ndarray, claim: Claim | None) -> tuple[str, str, float]:
    """The worst verdict over sampled rows, all heads: (status, text, ratio)."""
    worst = ("vacuous", "no row was judged", 0.0)
    rank = {"vacuous": 0, "pass": 1, "suspect": 2, "fail": 3}
    for (rows, case), analysis in zip(batch.judged, batch.analyses(claim), strict=True):
        found = compare(case, analysis, answer[rows])
        if (rank[found.status], found.ratio) >= (rank[worst[0]], worst[2]):
            worst = (found.status, f"row {int(rows[0])}: {found.text}", found.ratio)
    return worst


def _time(function: Callable, arguments: list[tuple], cell: Cell, platform: str, ready: Callable) -> clock.Timing:
    if platform != "gpu":
        return clock.wall(function, arguments)
    rest = 0.1 if cell.flops / cell.bytes > _BURST_INTENSITY else 0.0
    return clock.kernels(function, arguments, rest, ready=ready)


def _temporaries(function: Any, args: tuple) -> int | None:
    """Bytes the program needs besides arguments and result, where the compiler tells."""
    if not hasattr(function, "lower"):
        return None
    analysis = function.lower(*args).compile().memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


# ------------------------------------------------------------------ our backends


def backend(name: str) -> Contender:
    """The backend in slot `name` ("xla", "triton", ...), through its own program, config by heuristic or table."""

    def chosen(batch: Batch) -> tuple:
        from rpa import api, device, registry

        inputs, signature = api.prepare((*batch.arguments(), *_scales(batch)), _static(batch), False)
        return inputs, signature, registry.load(name), device.current(inputs.queries)

    def config(batch: Batch) -> Any:
        from rpa import select

        _, signature, _, device = chosen(batch)
        return select.choose(signature, device, _platform(name), None).config

    def prepare(batch: Batch) -> tuple[Callable, list[tuple]]:
        from rpa import api

        _, signature, implementation, device = chosen(batch)
        program = api.compiled(implementation, signature, config(batch), device)
        rotations = [
            api.prepare((*batch.arguments(i), *_scales(batch)), _static(batch), False)[0]
            for i in range(len(batch.tables))
        ]
        return program, [(jax.device_put(inputs),) for inputs in rotations]

    def claim(batch: Batch) -> Claim:
        _, signature, implementation, device = chosen(batch)
        return Claim(**implementation.claim(signature, device))

    def unsupported(batch: Batch) -> str | None:
        from rpa import registry

        _, signature, _, device = chosen(batch)
        return registry.why_not(next(slot for slot in registry.SLOTS if slot.name == name), signature, device)

    def public(batch: Batch) -> Callable[[], Any]:
        from rpa import ragged_page_attention_v2

        arrays = jax.device_put(batch.arguments())
        options = batch.options | {"platform": _platform(name), "cfg": config(batch)}
        # The session's override of the policy is no part of what a user's warm call pays for.
        bare = contextvars.Context()
        return lambda: bare.run(ragged_page_attention_v2, *arrays, **options)

    return Contender(name, prepare, claim, unsupported, lambda answer: np.asarray(answer[0]), public=public)


def _platform(name: str) -> str:
    from rpa import registry

    return next(slot.platform for slot in registry.SLOTS if slot.name == name)


def _scales(batch: Batch) -> tuple:
    return batch.options.get("k_scale"), batch.options.get("v_scale")


def _static(batch: Batch) -> tuple:
    o = batch.options
    return (o["softmax_scale"], o["logits_soft_cap"], o["compute_dtype"], False, o["sliding_window"], None, None, False)


def backends_here(platform: str) -> list[Contender]:
    """Every backend of ours whose chip this is."""
    from rpa import registry

    return [backend(slot.name) for slot in registry.exists() if platform in slot.chips]
