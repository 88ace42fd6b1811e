"""A record: one run's results with date, versions and device, as JSON; and the comparison of two."""

from __future__ import annotations

import datetime
import json
import math
import platform
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from fuzz.bench.ceilings import Ceilings
from fuzz.bench.run import Result

SCHEMA = 1
THRESHOLD = 0.05  # slower by less than this is no regression, whatever the noise
# What two processes on a CPU differ by beyond what either can see (where memory and threads landed), cell by cell and
# in the mean of all: about the most among 63 pairs of cells of three honest runs on two quiet cores.
BETWEEN = {"wall": 0.12, "cpu": 0.04}
TOGETHER = {"wall": 0.03, "cpu": 0.01}


class RecordError(ValueError):
    """A file that is not a record; the message names it and says what was expected."""


@dataclass(frozen=True)
class Record:
    """Results of one run on one device."""

    date: str
    versions: dict[str, str]
    ceilings: Ceilings
    results: tuple[Result, ...]

    @property
    def passed(self) -> list[Result]:
        """The results that have a number."""
        return [result for result in self.results if result.seconds is not None]

    def to_json(self) -> str:
        data = {"schema": SCHEMA, "date": self.date, "versions": self.versions, "ceilings": self.ceilings.to_dict(),
                "results": [result.to_dict() for result in self.results]}  # fmt: skip
        return json.dumps(data, indent=1) + "\n"


def of(results: list[Result], ceilings: Ceilings) -> Record:
    """A record of today's run."""
    return Record(datetime.date.today().isoformat(), versions(), ceilings, tuple(results))


def resumed(path: Path) -> Record | None:
    """The interrupted record at `path` that this machine can go on with; None where there is none.

    Raises:
        RecordError: it is another run's: of other versions.
    """
    if not path.exists():
        return None
    found = load(path)
    differ = [f"{k} {found.versions.get(k)} then, {v} now" for k, v in versions().items() if found.versions.get(k) != v]
    if differ:
        raise RecordError(f"{path}: cannot be resumed by other versions: {', '.join(differ)}")
    return found


def versions() -> dict[str, str]:
    """What the numbers depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in (
        "rpa",
        "jax",
        "jaxlib",
        "triton",
        "jax-triton",
        "numpy",
        "torch",
        "vllm",
        "flashinfer-python",
        "ejkernel",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def load(path: Path) -> Record:
    """Read what `Record.to_json` wrote.

    Raises:
        RecordError: the file is missing, is no JSON, or is no record of this schema.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise RecordError(f"{path}: not a benchmark record: {error}") from None
    return _record(path, data)


def _record(path: Path, data: Any) -> Record:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise RecordError(f"{path}: not a benchmark record of schema {SCHEMA}, as `rpa bench --json` writes it")
    try:
        return Record(data["date"], data["versions"], Ceilings(**data["ceilings"]),
                      tuple(Result(**result) for result in data["results"]))  # fmt: skip
    except (KeyError, TypeError) as error:
        raise RecordError(f"{path}: a benchmark record, but damaged: {error}") from None


# ------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Change:
    """One cell of one backend in two records, by one clock."""

    cell: str
    backend: str
    before: float
    after: float  # at the earlier run's pace of the machine, where both runs had the yardstick beside them
    noise: float  # the half widths of both runs' 95 % intervals together, and on a CPU `BETWEEN`
    clock: str = "time"  # "wall" or "cpu" beside the yardstick, else "time"
    contradicted: bool = False  # the other clock says that it is faster

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def regressed(self) -> bool:
        """Slower by more than the threshold and by more than the noise."""
        return not self.contradicted and self.ratio > 1 + max(THRESHOLD, self.noise)

    @property
    def improved(self) -> bool:
        return self.ratio < 1 / (1 + THRESHOLD) and self.ratio < 1 / (1 + self.noise)


def changes(before: Result, after: Result) -> list[Change]:
    """A cell's change by each clock that both runs read beside the same yardstick, or else of its plain time.

    CPU time is the steady clock of a busy machine, the wall alone sees a kernel that waits: a slowdown in either is
    a slowdown.
    """
    found = []
    for clock, then in before.beside.items():
        now = after.beside.get(clock)
        if now is not None and now["version"] == then["version"]:
            own = (before.time, after.time) if clock == "wall" else (then["seconds"], now["seconds"])
            pace = then["yardstick"] / now["yardstick"]
            noise = then["noise"] + now["noise"] + BETWEEN[clock]
            found.append(Change(after.cell, after.backend, own[0], own[1] * pace, noise, clock))
    if any(change.improved for change in found):  # more threads at once: less wall, more CPU time, or the reverse
        found = [replace(change, contradicted=True) for change in found]
    plain = Change(after.cell, after.backend, before.time, after.time, (before.spread or 0) + (after.spread or 0))
    return found or [plain]


def quicker(one: Result, other: Result) -> Result:
    """The better of two measurements of the same thing; one without a number is the worse, and is kept."""
    if one.seconds is None or other.seconds is None:
        return one if one.seconds is None else other
    ratios = [change.ratio for change in changes(one, other)]
    return one if math.prod(ratios) >= 1 else other


@dataclass(frozen=True)
class Comparison:
    """Two records, cell by cell; a cell that lost its number counts as a regression."""

    changes: tuple[Change, ...]
    lost: tuple[Result, ...]  # had a number before, has none now
    overall: tuple[Change, ...] = ()  # a backend's geometric mean over its cells: sees what hides in each one's noise

    @property
    def regressions(self) -> list[Change]:
        return [change for change in (*self.overall, *self.changes) if change.regressed]

    @property
    def failed(self) -> bool:
        return bool(self.regressions or self.lost)


def compare(before: Record, after: Record) -> Comparison:
    """What changed between two runs on the same device.

    Raises:
        RecordError: the devices differ, or no cell is in both.
    """
    if before.ceilings.device != after.ceilings.device:
        raise RecordError(f"records of two devices: {before.ceilings.device} and {after.ceilings.device}")
    old = {(r.cell, r.backend): r for r in before.passed}
    ours = [r for r in after.results if not r.backend.startswith("peer:")]  # a peer's slowdown is not our regression
    both = [(old[r.cell, r.backend], r) for r in ours if (r.cell, r.backend) in old]
    if not both:
        raise RecordError("no cell has a number in both records")
    found = [change for b, a in both if a.seconds is not None for change in changes(b, a)]
    return Comparison(tuple(found), tuple(a for _, a in both if a.seconds is None), _overall(found))


def _overall(changes: list[Change]) -> tuple[Change, ...]:
    """The mean change of each backend with several cells: noise of independent cells shrinks in their average."""
    means = []
    for backend, clock in dict.fromkeys((change.backend, change.clock) for change in changes):
        own = [change for change in changes if (change.backend, change.clock) == (backend, clock)]
        if len(own) > 1:
            before, after = _mean([change.before for change in own]), _mean([change.after for change in own])
            noise = math.sqrt(sum(change.noise**2 for change in own)) / len(own) + TOGETHER.get(clock, 0.0)
            means.append(Change(f"geometric mean of {len(own)} cells", backend, before, after, noise, clock))
    return tuple(means)


def _mean(seconds: list[float]) -> float:
    return math.exp(sum(map(math.log, seconds)) / len(seconds))
