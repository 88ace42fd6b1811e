"""Compile what comes next while the present cases are judged: half of a campaign's time was XLA's compiler.

The compiler lets go of Python's lock, so one thread beside the judging one is enough. What is compiled when depends on
the clock, what is judged does not: a case whose shape is not ready waits for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue

from fuzz.plan import Shape


class Ahead:
    """Calls `warm` with each shape that is wanted, once and in order, in a thread of its own."""

    def __init__(self, warm: Callable[[Shape], object]):
        self.warm = warm
        self.ready: dict[Shape, threading.Event] = {}
        self.queue: SimpleQueue[Shape | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.stopping = False

    def want(self, shapes: Iterable[Shape]) -> None:
        """Have these compiled after those that were wanted before."""
        for shape in shapes:
            if shape not in self.ready:
                self.ready[shape] = threading.Event()
                self.queue.put(shape)
        if not self.thread.is_alive() and self.ready:
            self.thread.start()

    def wait(self, shape: Shape) -> None:
        """Until a shape that was wanted is ready; at once for any other."""
        if shape in self.ready:
            self.ready[shape].wait()

    def end(self) -> None:
        """Compile no more; wait for what is being compiled, which must not outlive the interpreter."""
        self.stopping = True
        self.queue.put(None)
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        while (shape := self.queue.get()) is not None:
            if not self.stopping:
                with contextlib.suppress(Exception):  # the case itself will show it
                    self.warm(shape)
            self.ready[shape].set()
