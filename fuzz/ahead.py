"""Compile what comes next while the present cases are judged: half of a campaign's time is XLA's compiler.

The compiler lets go of Python's lock, so one thread beside the judging one keeps two cores busy; where the judging one
must wait for a shape, it compiles too. (Tracing and lowering, a sixth of a shape's CPU time, hold the lock. Handing it
over every 0.5 ms instead of every 5 changes nothing; every 20, the judge gets a third less done.)

What is compiled when, and by whom, depends on the clock, what is judged does not: a case whose shape is not ready waits
for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable

from fuzz.plan import Shape

Wanted = tuple[Shape, bool]  # the shape's own program, or what its relations need beside


class Ahead:
    """Calls `warm` for each program that is wanted, once, begun in order, in its own thread and in those that wait.

    The one that a thread waits for comes before all others, if nobody has begun it.
    """

    def __init__(self, warm: Callable[[Wanted], object]):
        self.warm = warm
        self.ready: dict[Wanted, threading.Event] = {}
        self.waiting: dict[Wanted, None] = {}  # wanted and not begun, in order
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.stopping = False

    def want(self, those: Iterable[Wanted]) -> None:
        """Have these compiled after those that were wanted before."""
        with self.changed:
            for one in those:
                if one not in self.ready:
                    self.ready[one] = threading.Event()
                    self.waiting[one] = None
            self.changed.notify()
        if not self.thread.is_alive() and self.ready:
            self.thread.start()

    def wait(self, one: Wanted) -> None:
        """Until one that was wanted is ready, compiling meanwhile; at once for any other."""
        if one not in self.ready:
            return
        while not self.ready[one].is_set():
            if (mine := self._take(one)) is None:
                self.ready[one].wait()
            else:
                self._compile(mine)

    def end(self) -> None:
        """Compile no more; wait for what is being compiled, which must not outlive the interpreter."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join()

    def _take(self, first: Wanted | None = None) -> Wanted | None:
        """The one to begin now, or None where all are begun."""
        with self.changed:
            chosen = first if first in self.waiting else next(iter(self.waiting), None)
            if chosen is not None:
                del self.waiting[chosen]
            return chosen

    def _compile(self, one: Wanted) -> None:
        try:
            with contextlib.suppress(Exception):  # the case itself will show it
                self.warm(one)
        finally:
            self.ready[one].set()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.stopping)
                if self.stopping:
                    return
            if (one := self._take()) is not None:
                self._compile(one)
