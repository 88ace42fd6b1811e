"""A child process that judges: a kernel that crashes or hangs takes the child with it, not the campaign."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# One core a worker: BLAS threads of several workers would only wait for each other. And no worker takes the memory of
# an accelerator that they share, or tunes each of hundreds of shapes. What the user has set stays.
_SHARED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
           "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "RPA_AUTOTUNE_POLICY": "heuristics"}  # fmt: skip


class Child:
    """A process that runs `serve(connection, *arguments)` and reports through a pipe."""

    def __init__(self, serve: Callable[..., None], arguments: tuple[Any, ...], log: Path):
        context = multiprocessing.get_context("spawn")
        self.log = log
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_start, args=(serve, theirs, arguments, str(log)), daemon=True)
        added = {name: value for name, value in _SHARED.items() if name not in os.environ}
        os.environ.update(added)  # read when the child first imports NumPy and JAX
        try:
            self.process.start()
        finally:
            for name in added:
                del os.environ[name]
        theirs.close()
        self.busy_since = time.monotonic()

    def send(self, message: Any) -> None:
        """Send a task; a child that is gone is noticed when its answer is read."""
        with contextlib.suppress(BrokenPipeError, OSError):
            self.pipe.send(message)

    def receive(self) -> Any:
        """The next report, or None when the child is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def end(self, gently: float = 0.0) -> str:
        """Stop the child, and say how it ended."""
        if gently:
            self.process.join(gently)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.pipe.close()
        return describe_exit(self.process.exitcode)

    def last_words(self, lines: int = 3) -> str:
        """The end of what the child wrote to its log."""
        if not self.log.exists():
            return ""
        return " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-lines:])


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _start(serve: Callable[..., None], pipe: Connection, arguments: tuple[Any, ...], log: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    stream = open(log, "a", buffering=1)  # noqa: SIM115 - multiprocessing prints what `serve` raises after this returns
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    faulthandler.enable(stream)
    sys.stdout = sys.stderr = stream
    # A parent that was killed shows as a broken pipe; then there is nobody to report to.
    with contextlib.suppress(BrokenPipeError, EOFError, ConnectionResetError):
        serve(pipe, *arguments)
