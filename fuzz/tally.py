"""What the record of a campaign holds, as numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.corpus import read_lines
from fuzz.coverage import Coverage, Feature
from fuzz.plan import Plan


@dataclass
class Tally:
    """What the record holds, as numbers."""

    campaign: tuple[str, int] | None = None  # target and seed
    cases: int = 0
    seconds: float = 0.0
    verified: int = 0
    failed: int = 0
    vacuous: int = 0
    waived: int = 0
    skipped: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    worst: float = 0.0
    compiled: dict[str, int] = field(default_factory=dict)  # by session and worker
    declined: dict[str, int] = field(default_factory=dict)  # shapes that the target does not take, by its reason
    barred: set[tuple[Feature, ...]] = field(default_factory=set)  # features, and pairs of them, that it never takes
    exact: int = 0
    elements: int = 0  # compared with a finite bound
    next_chunk: int = 0
    session: int = 0
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    unshrunk: dict[str, str] = field(default_factory=dict)  # plans whose shrinking was cut short: what is wrong
    accepted: list[str] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)

    def add(self, line: dict[str, Any], plan: Plan | None = None) -> None:
        """Count one line of the record; `plan` is that of a case, where it is at hand."""
        self.seconds = max(self.seconds, line.get("t", 0.0))
        self.session = max(self.session, line.get("session", 0))
        kind = line["line"]
        if kind == "campaign":
            self.campaign = line["target"], line["seed"]
        elif kind == "chunk":
            self.next_chunk = max(self.next_chunk, line["chunk"] + 1)
        elif kind == "reducing":
            self.unshrunk[line["plan"]] = line["text"]
        elif kind == "reduced":
            self._reduced(line["plan"])
        elif kind == "failure":
            if line["kind"] != "unshrunk":
                self._reduced(line["found"])
            self.failures[line["id"]] = line
        elif kind == "gap":
            self.declined[line["text"]] = line["shapes"]
        elif kind == "barred":
            self.barred.update(tuple((axis, value) for axis, value in combination) for combination in line["those"])
        elif kind == "accepts":
            self.accepted = line["texts"]
        elif kind == "case":
            self._case(line, plan or Plan.from_json(line["plan"]))

    def pairs(self) -> tuple[int, int]:
        """Pairs of features seen and possible, without those that the target does not take."""
        return self.coverage.share(self.barred)

    def _reduced(self, plan: str) -> None:
        """A failure that was left as it was found, if it was, has been shrunk since."""
        self.unshrunk.pop(plan, None)
        for name in [
            name for name, line in self.failures.items() if (line["kind"], line["found"]) == ("unshrunk", plan)
        ]:
            del self.failures[name]

    def _case(self, line: dict[str, Any], plan: Plan) -> None:
        status = line["status"]
        self.cases += 1
        self.exact += plan.data == "exact"
        self.compiled[f"{line['session']}/{line['worker']}"] = line["compiled"]
        if status == "skipped":
            self.skipped[line["text"]] += 1
            return
        ratio = line["ratio"]
        self.elements += line.get("elements", 0)
        self.coverage.add(plan, ratio)
        if line.get("waived"):
            self.waived += 1
        elif status in ("fail", "suspect"):
            self.failed += 1
            self.kinds[line["kind"]] += 1
        elif status == "vacuous":
            self.vacuous += 1
        else:
            self.verified += 1
            self.worst = max(self.worst, ratio or 0.0)


def read_record(out: Path) -> Tally:
    """The tally of a record; empty where there is none."""
    tally = Tally()
    for line in read_lines(out / "record.jsonl"):
        tally.add(line)
    return tally
