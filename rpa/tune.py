"""Finding the fastest right config: judge every candidate, drop duplicates, time in rounds, ask for a clear margin."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any

import jax

from rpa.program import Program

VERIFIERS = "rpa.verifier"  # the entry point group in which a judge is found
_LEAST = 4  # rounds that show what is noise
_SHORT = 1e-3  # seconds; the wall time of shorter calls is the host's, and says nothing of the kernel
_EXHAUSTED = ("resource_exhausted", "out of resource", "outofresources", "shared memory", "too many resources")

# A verifier says why a program's output for some arguments is wrong, or None.
Verifier = Callable[[Any, tuple[Any, ...], Any], str | None]


class TuningFailed(RuntimeError):
    """No candidate could be used; the text holds every candidate's own error."""


@dataclass
class Trial:
    """One candidate and what became of it."""

    config: Any
    status: str = "waiting"  # "timed", "duplicate", "wrong", "failed", "hopeless", "out of resources" or "of budget"
    detail: str = ""
    program: Any = None  # compiled
    text: str | None = None  # lowered, once it ran
    warm: float = float("inf")  # seconds of one call after the first
    seconds: list[float] = field(default_factory=list)  # one sample a round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("inf")


@dataclass(frozen=True)
class Report:
    """The outcome of one tuning run."""

    winner: Any
    reason: str
    trials: tuple[Trial, ...]

    @property
    def decided(self) -> bool:
        """Whether there was time for more than one candidate, or there is only one."""
        counts = self.counts()
        return counts["timed"] > 1 or "out of budget" not in counts

    def counts(self) -> dict[str, int]:
        return dict(Counter(trial.status for trial in self.trials))


@dataclass(eq=False)
class Tuner:
    """Times candidates and keeps the first one unless another is right and clearly faster.

    Args:
        warmup: calls before timing; iters: timed calls a candidate, spread over rounds in which every candidate
            has its turn, so that drift hits all alike.
        verify: `verify(program, args, output)` says why an output is wrong, or None; by default the verifier that
            an installed package offers under the entry point `rpa.verifier`. A candidate that it rejects is never
            timed. Without any, a program that makes a claim is not tuned at all.
        margin: the least relative gain that displaces the first candidate; the noise of the samples adds to it.
        budget: seconds for compiling and timing; what does not fit is counted, not tried.
        turns: argument tuples of the same shapes, timed in turn where one batch would stay in the device's cache.
        exclusive: makes a context in which the device is this process's alone, where several tune at once.
        clock: seconds, for tests.
    """

    warmup: int = 5
    iters: int = 100
    _: KW_ONLY
    verify: Verifier | None = None
    margin: float = 0.02
    budget: float = 60.0
    turns: Sequence[tuple[Any, ...]] = ()
    exclusive: Callable[[], AbstractContextManager[Any]] = nullcontext
    clock: Callable[[], float] = time.perf_counter
    history: deque[Report] = field(default_factory=lambda: deque(maxlen=64), init=False)

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.iters < 1:
            raise ValueError(f"warmup={self.warmup}, iters={self.iters}: at least 0 and 1 are expected")

    def measure(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Median seconds of one call of `fn`, compiled first; on a GPU the time its kernels take there."""
        trial = Trial(None, program=_jitted(fn).lower(*args, **kwargs).compile())
        self._warm(trial, args, kwargs, float("inf"))
        rounds, calls = _split(self.iters)
        return statistics.median(self._sample(trial.program, [args] * calls, kwargs) for _ in range(rounds))

    def autotune(
        self, make_fn: Callable[[Any], Any], args: Sequence[Any], kwargs: dict[str, Any], candidates: Iterable[Any]
    ) -> Any:
        """The best of `candidates`; the first is the one to beat. The whole report is appended to `history`.

        Raises:
            TuningFailed: no candidate compiles, runs and is right.
        """
        started, args = self.clock(), tuple(args)
        trials = [Trial(config) for config in candidates]
        for trial in trials:
            if self.clock() - started > self.budget / 2 and any(other.text for other in trials):
                trial.status, trial.detail = "out of budget", "no time was left to compile it"
            else:
                trial.status, trial.detail = self._admit(trial, trials, make_fn(trial.config), args, kwargs)
        alive = [trial for trial in trials if trial.status == "timed"]
        if not alive:
            raise TuningFailed("\n".join(f"  {t.config}: {t.status}: {t.detail}" for t in trials) or "no candidates")
        with self.exclusive():
            self._time(alive, args, kwargs, started)
        report = _decided(trials, self.margin)
        self.history.append(report)
        return report.winner

    def _admit(self, trial: Trial, trials: list[Trial], fn: Any, args: tuple, kwargs: dict) -> tuple[str, str]:
        """Compile, compare with what is there already, run and judge one candidate: its status and the reason."""
        platform = getattr(trial.config, "platform", None)  # its block sizes do not make up for ten times
        if platform and any(t.status == "hopeless" and t.config.platform == platform for t in trials):
            return "hopeless", f"another config of platform={platform!r} was"
        try:
            lowered = _jitted(fn).lower(*args, **kwargs)
            text = lowered.as_text().replace(getattr(fn, "label", "\0"), "")  # the label names the config
            same = next((other.config for other in trials if other.text == text), None)
            if same is not None:
                return "duplicate", f"lowers to the same program as {same}"
            trial.program = lowered.compile()
            fastest = min((other.warm for other in trials if other.status == "timed"), default=float("inf"))
            with self.exclusive():
                output = self._warm(trial, args, kwargs, 10 * max(fastest, _SHORT))
            if output is None:
                return "hopeless", f"one call took {trial.warm:.3g} s, ten times as long as another's"
            verify = self.verify or (installed_verifier() if isinstance(fn, Program) else None)
            wrong = verify(fn, args, output) if verify is not None else None
        except Exception as error:  # one candidate's failure must not end the search; it is shown, not swallowed
            text = f"{type(error).__name__}: {error}"
            return ("out of resources" if any(sign in text.lower() for sign in _EXHAUSTED) else "failed"), text
        trial.text = text
        return ("timed", "") if wrong is None else ("wrong", wrong)

    def _time(self, alive: list[Trial], args: tuple, kwargs: dict, started: float) -> None:
        """Rounds in which every candidate has its turn; who is far behind, ever less far, is given up."""
        rounds, calls = _split(self.iters)
        turns: Sequence[tuple[Any, ...]] = self.turns or [args]
        for done in range(rounds):
            if done >= _LEAST and self.clock() - started > self.budget:
                return
            batches = [turns[(done * calls + i) % len(turns)] for i in range(calls)]
            for trial in alive:
                trial.seconds.append(self._sample(trial.program, batches, kwargs))
            behind = min(trial.median for trial in alive) * (1 + 1 / (done + 1))
            alive = [alive[0], *(trial for trial in alive[1:] if trial.median < behind)]

    def _warm(self, trial: Trial, args: tuple[Any, ...], kwargs: dict[str, Any], limit: float) -> Any:
        """The output after the warm-up; None where its first round already takes longer than `limit` seconds."""
        output = jax.block_until_ready(trial.program(*args, **kwargs))
        for _ in range(self.warmup):
            started = self.clock()
            output = jax.block_until_ready(trial.program(*args, **kwargs))
            trial.warm = min(trial.warm, self.clock() - started)
            if trial.warm > limit:
                return None
        return output

    def _sample(self, compiled: Any, batches: Sequence[Any], kwargs: dict[str, Any]) -> float:
        """Seconds of one call, the mean over `batches`; on a GPU those of the kernels, without the host's part."""
        if _on_gpu(batches[0], kwargs):
            return _kernel_seconds(compiled, batches, kwargs)
        started = self.clock()
        outputs = [compiled(*args, **kwargs) for args in batches]
        jax.block_until_ready(outputs)
        return (self.clock() - started) / len(batches)


def _decided(trials: list[Trial], margin: float) -> Report:
    """The fastest, where it beats the first by more than margin and noise: round by round, free of drift."""
    timed = [trial for trial in trials if trial.status == "timed" and trial.seconds]
    first, best = timed[0], min(timed, key=lambda trial: trial.median)
    pairs = zip(first.seconds, best.seconds, strict=False)
    ratios = [a / b for a, b in pairs if a > 0 and b > 0] or [1.0]  # a clock may stand still or be set back
    quartiles = len(ratios) >= _LEAST
    low, middle, high = (
        statistics.quantiles(ratios, n=4) if quartiles else (min(ratios), statistics.median(ratios), max(ratios))
    )
    gain, needed = middle - 1, margin + high - low
    winner = best if gain > needed else first
    text = f"{winner.median * 1e6:.1f} us, best of {len(timed)} timed"
    if winner is not first:
        text += f", {gain:.1%} faster than the heuristic"
    elif best is not first:
        text += f"; the fastest gained {gain:.1%}, and {needed:.1%} are needed past the noise"
    return Report(winner.config, f"tuned: {text}", tuple(trials))


def why_not(tuner: Any) -> str | None:
    """The reason a tuner may not tune by itself: a `Tuner` without a verifier could crown a wrong candidate."""
    if isinstance(tuner, Tuner) and (tuner.verify or installed_verifier()) is None:
        return f"no verifier is installed (entry point group {VERIFIERS!r}), and no candidate is timed unjudged"
    return None


@lru_cache(maxsize=1)
def installed_verifier() -> Verifier | None:
    """The judge that an installed package offers; this package imports none by itself."""
    return next((point.load() for point in metadata.entry_points(group=VERIFIERS)), None)


def _jitted(fn: Any) -> Any:
    if isinstance(fn, Program):
        return fn.jitted
    return fn if hasattr(fn, "lower") else jax.jit(fn)


def _split(iters: int) -> tuple[int, int]:
    """Rounds, and calls in each."""
    rounds = min(10, iters)
    return rounds, -(-iters // rounds)


def _on_gpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if isinstance(leaf, jax.Array)]
    return bool(arrays) and next(iter(arrays[0].devices())).platform in ("gpu", "cuda")


def _kernel_seconds(compiled: Any, batches: Sequence[Any], kwargs: dict[str, Any]) -> float:
    from jax._src.lib import mosaic_gpu

    # The module that carries CUPTI has no public name; Mosaic's own profiler would repeat one batch from the cache.
    extension: Any = mosaic_gpu._mosaic_gpu_ext  # pyright: ignore[reportPrivateImportUsage]
    extension._cupti_init()
    try:
        jax.block_until_ready([compiled(*args, **kwargs) for args in batches])
    finally:
        timings = extension._cupti_get_timings(False)
    if not timings:
        raise RuntimeError("the GPU ran no kernel")
    return sum(milliseconds for _, milliseconds in timings) / 1e3 / len(batches)
