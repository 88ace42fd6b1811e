"""Stand-ins for the process that measures: one for each way in which a contender takes it down."""

from __future__ import annotations

import os
import time
from typing import Any

HANGS = "nothing follows"


def serve(pipe: Any, settings: Any) -> None:
    """Contender "a" is well, "b" dies, "c" hangs; together they cannot even be compiled."""
    cells = ("one", "two")
    pipe.send(("ceilings", "measured" if settings.ceilings is None else settings.ceilings))
    if not settings.alone:
        pipe.send(("prepare", list(cells)))
        os.abort()
    for cell in cells:
        pipe.send(("prepare", [cell]))
        for name in "abc":
            if (cell, name) not in settings.done:
                pipe.send(("begin", (cell, name)))
                {"a": int, "b": os.abort, "c": lambda: _hang(pipe)}[name]()
                pipe.send(("result", Line(cell, name)))


def _hang(pipe: Any) -> None:
    pipe.send(("tick", HANGS))
    time.sleep(600)


class Line:
    """What the watcher reads of a result."""

    def __init__(self, cell: str, backend: str):
        self.cell, self.backend, self.status = cell, backend, "pass"


def broken(pipe: Any, settings: Any) -> None:
    """It dies before it begins anything."""
    raise RuntimeError("no device here")
