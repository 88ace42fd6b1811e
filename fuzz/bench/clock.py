"""Timing: wall clock on a CPU, kernel time on a GPU; samples, never one number."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

_BLOCKS = 8  # a run of samples is cut into this many, whose minima tell how far one run can be trusted


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and what two runs of the same program may differ by, as a fraction of them."""

    seconds: float
    spread: float
    samples: int
    launches: int | None = None  # kernels of one call, where they can be counted

    @classmethod
    def least(cls, samples: Sequence[float]) -> Timing:
        """Of wall times: a busy machine only ever adds. The spread is that of the minima of consecutive blocks."""
        least = min(samples)
        minima = [block.min() for block in np.array_split(np.asarray(samples), _BLOCKS) if block.size]
        return cls(float(least), float((np.median(minima) - least) / least), len(samples))

    @classmethod
    def middle(cls, samples: Sequence[float], launches: int | None = None) -> Timing:
        """Of kernel times, which err both ways: a luckily warm cache is no speed. The spread is half the quartiles'."""
        low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
        return cls(float(middle), float((high - low) / 2 / middle), len(samples), launches)


def wall(function: Callable[..., Any], arguments: Sequence[tuple], budget: float = 0.8, at_least: int = 24) -> Timing:
    """Wall time of `function` until its result is ready, going round `arguments`, for about `budget` seconds."""
    for args in arguments[:2]:
        jax.block_until_ready(function(*args))
    samples: list[float] = []
    end = time.perf_counter() + budget
    while len(samples) < at_least or (time.perf_counter() < end and len(samples) < 2000):
        args = arguments[len(samples) % len(arguments)]
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        samples.append(time.perf_counter() - begin)
    return Timing.least(samples)


def kernels(
    function: Callable[..., Any],
    arguments: Sequence[tuple],
    rest: float = 0.0,
    rounds: int = 8,
    ready: Callable[[Any], Any] = jax.block_until_ready,
) -> Timing:
    """Sum of the kernel times of one call of `function` on the GPU (CUPTI), going round `arguments`.

    Args:
        ready: waits for a call's result.
        rest: seconds of idling before each sample: a compute-bound kernel is judged in a burst, before the power
            cap pulls the clock down.
    """
    ready(function(*arguments[0]))
    calls = [arguments[i % len(arguments)] for i in range(max(rounds, len(arguments)))]
    if not rest:
        timings = _traced(function, calls, ready)
        launches, odd = divmod(len(timings), len(calls))
        if launches and not odd:  # one program launches the same kernels in each call
            return Timing.middle([sum(timings[i : i + launches]) for i in range(0, len(timings), launches)], launches)
    samples, launches = [], None
    for args in calls:
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


def dispatch(call: Callable[[], Any], repeats: int = 300) -> float:
    """Host seconds of a warm call, without waiting for its result."""
    jax.block_until_ready(call())
    samples = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = call()
        samples.append(time.perf_counter() - begin)
        jax.block_until_ready(result)
    return float(np.quantile(samples, 0.2))
