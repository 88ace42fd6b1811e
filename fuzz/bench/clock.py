"""Timing: wall clock and CPU time on a CPU, kernel time on a GPU; samples, never one number."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from fuzz.bench import yardstick

PRECISE = 0.015  # an estimate is good when its 95 % interval is this narrow to either side
_SHORTEST = 2e-3  # seconds of one sample: shorter calls are repeated in it
_BLOCKS = 12  # neighbours in time share a mood: whole blocks of them are drawn anew
_DRAWS = 200
_WALL, _CPU = 0.25, 0.5  # quantiles: others only ever add to a wall time; what they add to a CPU time goes both ways


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and the half width of their 95 % interval as a fraction of them.

    `beside` holds, for each clock ("wall", "cpu"), a contender's seconds, the yardstick's in the same moments, and
    the half width of their ratio's 95 % interval.
    """

    seconds: float
    spread: float
    samples: int
    launches: int | None = None  # kernels of one call, where they can be counted
    beside: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def least(cls, samples: Sequence[float]) -> Timing:
        """Of wall times: a busy machine only ever adds, so the lower quartile stands for the call."""
        return cls(*estimate(samples, _WALL), len(samples))

    @classmethod
    def middle(cls, samples: Sequence[float], launches: int | None = None) -> Timing:
        """Of kernel times, which err both ways: a luckily warm cache is no speed."""
        return cls(*estimate(samples, 0.5), len(samples), launches)


def estimate(samples: Any, quantile: float, others: Any = None) -> tuple[float, float]:
    """A quantile of `samples`, or its ratio to that of `others` taken beside them, with its uncertainty.

    Returns:
        the estimate, and the half width of its 95 % interval as a fraction of it: what a run like this one may
        differ by, not what its samples scatter by. From a bootstrap of blocks of neighbours.
    """
    both = np.stack([samples, np.ones(len(samples)) if others is None else others])  # [2, samples]
    blocks = min(_BLOCKS, both.shape[1])
    length = both.shape[1] // blocks
    grouped = both[:, both.shape[1] - blocks * length :].reshape(2, blocks, length)
    draws = np.random.default_rng(0).integers(0, blocks, (_DRAWS, blocks))
    drawn = np.quantile(grouped[:, draws].reshape(2, _DRAWS, -1), quantile, axis=-1)
    low, high = np.quantile(drawn[0] / drawn[1], [0.025, 0.975])
    ours, theirs = np.quantile(both, quantile, axis=-1)
    return float(ours / theirs), float((high - low) / 2 / (ours / theirs))


def paired(call: Callable[[int], Any], other: Callable[[int], Any], budget: float = 3.0,
           at_least: int = 36) -> Timing:  # fmt: skip
    """Time `call` and `other`, the yardstick, each given a rotation, turn by turn until their ratio is known well."""
    calls = (call, other)
    repeats = [_repeats(each) for each in calls]
    samples: list[list[tuple[float, float]]] = [[], []]  # (wall, CPU) of one call, for each of the two
    end, turns = time.perf_counter() + budget, at_least
    while True:
        for turn in range(len(samples[0]), turns):
            for who in (0, 1) if turn % 2 else (1, 0):
                samples[who].append(_sample(calls[who], turn, repeats[who]))
        ours, theirs = np.asarray(samples).transpose(0, 2, 1)  # each [clock, sample]
        beside = {"wall": _beside(ours[0], theirs[0], _WALL), "cpu": _beside(ours[1], theirs[1], _CPU)}
        if time.perf_counter() > end or max(found["noise"] for found in beside.values()) <= PRECISE:
            return Timing(*estimate(ours[0], _WALL), len(ours[0]), beside=beside)
        turns += turns // 3


def _beside(ours: np.ndarray, theirs: np.ndarray, quantile: float) -> dict[str, float]:
    return {"seconds": float(np.quantile(ours, quantile)), "yardstick": float(np.quantile(theirs, quantile)),
            "noise": estimate(ours, quantile, theirs)[1], "version": yardstick.VERSION}  # fmt: skip


def _repeats(call: Callable[[int], Any]) -> int:
    """Warm `call` up, and say how often it fills a sample."""
    jax.block_until_ready(call(0))
    seconds = min(_sample(call, turn, 1)[0] for turn in range(3))
    return max(1, min(64, round(_SHORTEST / max(seconds, 1e-9))))


def _sample(call: Callable[[int], Any], turn: int, repeats: int) -> tuple[float, float]:
    """(wall, CPU) seconds of one call, the process's threads all counted."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for again in range(repeats):
        jax.block_until_ready(call(turn * repeats + again))
    return (time.perf_counter() - begin) / repeats, (time.process_time() - begin_cpu) / repeats


def wall(function: Callable[..., Any], arguments: Sequence[tuple], budget: float = 0.8) -> Timing:
    """Wall time of `function` until its result is ready."""
    return Timing.least(walls(function, arguments, budget))


def walls(function: Callable[..., Any], arguments: Sequence[tuple], budget: float, at_least: int = 24) -> list[float]:
    """Wall times of calls of `function`, going round `arguments`, for about `budget` seconds."""
    for args in arguments[:2]:
        jax.block_until_ready(function(*args))
    samples: list[float] = []
    end = time.perf_counter() + budget
    while len(samples) < at_least or (time.perf_counter() < end and len(samples) < 2000):
        args = arguments[len(samples) % len(arguments)]
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        samples.append(time.perf_counter() - begin)
    return samples


def kernels(
    function: Callable[..., Any],
    arguments: Sequence[tuple],
    rest: float = 0.0,
    rounds: int = 8,
    ready: Callable[[Any], Any] = jax.block_until_ready,
    budget: float = 0.2,
) -> Timing:
    """Sum of the kernel times of one call of `function` on the GPU (CUPTI), going round `arguments`.

    Args:
        ready: waits for a call's result.
        rest: seconds of idling before each sample: a compute-bound kernel is judged in a burst, before the power
            cap pulls the clock down.
        rounds: calls at least; without rests, as many more as `budget` seconds take, 64 at most.
    """
    ready(function(*arguments[0]))
    begin = time.perf_counter()
    ready(function(*arguments[-1]))
    one = time.perf_counter() - begin
    more = 0 if rest else min(64, int(budget / max(one, 1e-6)))
    calls = [arguments[i % len(arguments)] for i in range(max(rounds, more, len(arguments)))]
    if not rest:
        timings = _traced(function, calls, ready)
        launches, odd = divmod(len(timings), len(calls))
        if launches and not odd:  # one program launches the same kernels in each call
            return Timing.middle([sum(timings[i : i + launches]) for i in range(0, len(timings), launches)], launches)
    samples, launches = [], None
    for args in calls[:rounds]:
        time.sleep(rest)
        timings = _traced(function, [args], ready)
        samples.append(sum(timings))
        launches = len(timings)
    return Timing.middle(samples, launches)


def _traced(function: Callable[..., Any], calls: Sequence[tuple], ready: Callable[[Any], Any]) -> list[float]:
    """Seconds of every kernel that the calls launch, whoever launches them; CUPTI knows JAX's and PyTorch's alike."""
    from jax._src.lib import mosaic_gpu

    # The module that carries CUPTI has no public name; Mosaic's profiler uses it, but for jitted functions only.
    extension: Any = mosaic_gpu._mosaic_gpu_ext  # pyright: ignore[reportPrivateImportUsage]
    extension._cupti_init()
    try:
        for args in calls:
            ready(function(*args))
    finally:
        timings = extension._cupti_get_timings(False)
    return [milliseconds / 1e3 for _, milliseconds in timings or ()]


def dispatch(call: Callable[[], Any], repeats: int = 300, budget: float = 0.5) -> float:
    """Host seconds of a warm call, without waiting for its result."""
    jax.block_until_ready(call())
    samples: list[float] = []
    end = time.perf_counter() + budget
    while not samples or (len(samples) < repeats and time.perf_counter() < end):
        begin = time.perf_counter()
        result = call()
        samples.append(time.perf_counter() - begin)
        jax.block_until_ready(result)
    return float(np.quantile(samples, 0.2))
