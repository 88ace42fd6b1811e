"""A run in a child process: a contender that crashes or hangs costs its own number, not the others'."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from fuzz.bench.run import Event, Result
from fuzz.bench.work import Settings, serve
from fuzz.isolate import Child

_START = 120.0  # seconds more for the first event: a process loads JAX, finds its device and measures the ceilings


@dataclass
class _Life:
    """What one child was about when it ended."""

    begun: tuple[str, str] | None = None  # the (cell, contender) whose line is due
    preparing: frozenset[str] = field(default_factory=frozenset)  # cells that are compiled together
    hung: bool = False
    lost: bool = False  # it said itself that its device is lost to it


def watched(settings: Settings, patience: float) -> Iterator[Event]:
    """`work.events(settings)`, whatever becomes of the process that measures.

    What was begun when a child died or fell silent is a line that says so; cells that were compiled together are
    then taken one by one, by the next child. `("broken", why)` where no contender is to blame.

    Args:
        patience: seconds without an event after which a child is taken to hang.
    """
    with tempfile.TemporaryDirectory() as folder:
        while True:
            life = _Life()
            child = Child(serve, (settings,), Path(folder, "bench.log"))
            try:
                for event in _until_silent(child, patience, life):
                    settings = _learned(settings, life, event)
                    yield event
                    if event[0] == "broken":
                        return
            finally:
                how = child.end(gently=0.0 if life.hung else 5.0)
            words = f"hung: silent for {patience:g} s" if life.hung else f"{how}: {child.last_words()}"[:500]
            if life.begun is not None:
                failed = "hung" if life.hung else "its process died"
                result = Result(*life.begun, "error", words if life.hung else f"{failed}: {words}")
                settings = _learned(settings, life, ("result", result))
                yield "result", result
            elif life.preparing - settings.alone:
                settings = replace(settings, alone=settings.alone | life.preparing)
            elif not life.lost:
                if how != "exit code 0":
                    yield "broken", words
                return


def _until_silent(child: Child, patience: float, life: _Life) -> Iterator[Event]:
    start = _START
    while _heard(child, patience + start):
        event = child.receive()
        if event is None:
            return
        yield event
        start = 0.0
    life.hung = True


def _heard(child: Child, seconds: float) -> bool:
    """Whether the child says anything, or ends, in so many seconds."""
    return child.pipe.poll(seconds)


def _learned(settings: Settings, life: _Life, event: Event) -> Settings:
    """What the next child need not do again."""
    kind, what = event
    if kind == "prepare":
        life.preparing = frozenset(what)
    elif kind == "begin":
        life.begun, life.preparing = what, frozenset()
    elif kind == "lost":
        life.lost = True
    elif kind == "result":
        life.begun = None
        return replace(settings, done=settings.done | {(what.cell, what.backend)})
    elif kind == "ceilings":
        return replace(settings, ceilings=what)
    return settings
