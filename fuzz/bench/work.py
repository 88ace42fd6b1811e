"""What one run of `rpa bench` measures, as a stream of events; in this process or in a child that may die."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # JAX comes with them, and the process that watches does without
    from fuzz.bench.ceilings import Ceilings
    from fuzz.bench.run import Contender, Event

REFUSED = "refused"  # the event whose text tells a user what was asked wrongly


@dataclass(frozen=True)
class Settings:
    """What is asked: which contenders on which cells, less what is `done`."""

    platforms: tuple[str, ...] = ()  # of ours; none named means all that run here
    targets: tuple[str, ...] = ()  # anybody's kernels, as the search names them
    only: str = ""
    peers: bool = True
    deadline: float | None = None  # `time.time()` past which nothing is begun
    done: frozenset[tuple[str, str]] = frozenset()  # (cell, contender) that have their line
    ceilings: Ceilings | None = None  # measured already
    alone: frozenset[str] = frozenset()  # cells for which nothing is prepared ahead; see `run.run`


def serve(pipe: Connection, settings: Settings) -> None:
    """The child's part: every event goes through the pipe."""
    try:
        for event in events(settings):
            pipe.send(event)
            if event[0] == "result" and event[1].status == "error" and not _device_lives():
                pipe.send(("lost", None))
                return
    except Exception as error:  # no contender's: theirs are results
        pipe.send(("broken", f"{type(error).__name__}: {error}"))


def events(settings: Settings) -> Iterator[Event]:
    """Measure; `("ceilings", …)` and `("jobs", count)` come first, or `(REFUSED, why)` and nothing else."""
    import jax

    from fuzz.bench import ceilings, cells, run
    from rpa import policy_override

    chip = jax.devices()[0].platform.replace("cuda", "gpu")
    try:
        contenders = contenders_on(chip, settings)
        chosen = cells.named(cells.cells_for(chip), settings.only)
    except ValueError as error:
        yield REFUSED, str(error)
        return
    with policy_override(cache_miss_fallback="heuristics"):  # what ships is timed, not what tuning would find
        limits = settings.ceilings or ceilings.measure()
        yield "ceilings", limits
        jobs = [(cell, [c for c in contenders if (cell.name, c.name) not in settings.done]) for cell in chosen]
        jobs = [(cell, missing) for cell, missing in jobs if missing]
        yield "jobs", sum(len(missing) for _, missing in jobs)
        yield from run.run(jobs, limits, chip, settings.deadline, settings.alone)


def _device_lives() -> bool:
    """Whether this process may go on: a kernel that wrote where it must not takes its CUDA context with it."""
    import jax
    import jax.numpy as jnp

    try:
        return float(jax.block_until_ready(jnp.ones(()) + 1)) == 2.0
    except Exception:  # whatever it says, nothing runs here any more
        return False


def contenders_on(chip: str, settings: Settings) -> list[Contender]:
    """Ours, the named targets, and the peers installed here.

    Raises:
        ValueError: a platform or target that this machine does not have; the message names those it has.
    """
    from fuzz.bench import ours, peers
    from rpa import registry

    mine = ours.backends_here(chip)
    names: set[str] = set()
    for platform in settings.platforms:
        known = {slot.name for slot in registry.SLOTS if platform in (slot.name, slot.platform)}
        if not known & {contender.name for contender in mine}:
            able = ", ".join(contender.name for contender in mine) or "none"
            raise ValueError(f"--platform {platform!r}: no such backend runs on this {chip}; here there are: {able}")
        names |= known
    mine = [c for c in mine if c.name in names or not (settings.platforms or settings.targets)]
    theirs = [_target(name) for name in settings.targets]
    return mine + theirs + (peers.here(chip) if settings.peers else [])


def _target(name: str) -> Contender:
    """Anybody's kernel, called as it is written, NumPy or JAX."""
    from fuzz import targets
    from fuzz.bench.run import Contender

    target = targets.load(name)  # TargetError is a ValueError that says what it looked for

    def prepare(batch: Any) -> tuple[Callable[..., Any], list[tuple]]:
        def call(*arrays: Any) -> Any:
            answer = target.call(*arrays, **batch.options)
            return answer[0] if isinstance(answer, tuple) else answer

        turns = [batch.arguments(i) for i in range(len(batch.tables))]
        if not target.jax_arrays:
            return call, [tuple(None if a is None else np.asarray(a) for a in turn) for turn in turns]
        return call, turns

    def claim(batch: Any) -> Any:
        return target.claim(batch.judged[0][1])

    return Contender(name, prepare, claim, lambda batch: target.gap(batch.judged[0][1]),
                     deterministic=target.deterministic)  # fmt: skip
