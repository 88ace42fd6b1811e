"""The kill matrix of `rpa fuzz mutants`."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fuzz.corpus import read_lines
from fuzz.files import write_json
from fuzz.mutants import patched, score
from fuzz.mutants.catalogue import EQUIVALENT, MUTANTS, Mutant
from fuzz.plan import Plan


def _chosen(only: str | None) -> list[Mutant]:
    return [m for m in MUTANTS if only is None or re.search(only, m.id) or re.search(only, m.group)]


def table(only: str | None) -> None:
    """The catalogue, one line a mutant."""
    listed = Table("id", "group", "what it does")
    for mutant in _chosen(only):
        listed.add_row(mutant.id, mutant.group, mutant.line)
    for mutant in EQUIVALENT:
        listed.add_row(mutant.id, mutant.group, f"{mutant.line} (equivalent: {mutant.equivalent})")
    for patch in patched.found().values():
        listed.add_row(patch.id, f"patch of {patch.kernel}", patch.line)
    Console().print(listed)


@dataclass
class Matrix:
    """What is known of the kill matrix so far."""

    wanted: int
    kills: list[score.Kill] = field(default_factory=list)
    usuals: dict[str, dict[str, bool]] = field(default_factory=dict)
    accused: list[tuple[Plan, str]] = field(default_factory=list)
    alarms: int = 0  # cases of the right kernel that were judged
    interrupted: bool = False

    @property
    def exit(self) -> int:
        if self.accused or not all(kill.killed for kill in self.kills):
            return 1
        return 4 if self.interrupted else 0


def show(
    console: Any,
    seed: int,
    cases: int,
    only: str | None,
    sources: str | None,
    usual: bool,
    alarms: int,
    workers: int,
    out: Path | None,
) -> int:
    """Run the matrix under a progress bar, a line for each mutant that is done; print it, and give the exit status.

    What `out` holds of the same seed, number of cases and sources is not run again. Ctrl-C ends it with what there is.
    """
    chosen = _chosen(only)
    try:
        patches = patched.chosen(sources)
    except patched.PatchError as error:
        console.print(f"[red]{error}[/red]")
        return 2
    if not chosen and not patches:
        console.print(f"[red]no mutant matches {only!r}[/red]")
        return 2
    matrix, store = (
        Matrix(len(chosen) + len(patches)),
        _Store(out, {"seed": seed, "cases": cases, "sources": patched.version()}),
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), _LEFT)
    with Progress(*columns, console=console) as progress:
        try:
            _fill(matrix, store, progress, "mutants", chosen, lambda m: score.kill(m, seed, cases), 1)
            _fill(matrix, store, progress, "source patches", patches, lambda p: score.kill_patch(p, seed), workers)
            for judge in _each(progress, "usual judges", score.USUAL if usual else (), lambda judge: judge):
                matrix.usuals[judge.name] = score.usual_score(judge, seed, chosen)
            for accusation in _each(
                progress, "the right kernel", score.alarms(seed, alarms), lambda found: found, alarms
            ):
                matrix.alarms += 1
                matrix.accused += [accusation] if accusation else []
        except KeyboardInterrupt:
            matrix.interrupted = True
            patched.stop()
    _print(matrix)
    if out is not None:
        _write(out, matrix, seed, cases)
    return matrix.exit


_LEFT = TimeRemainingColumn()


class _Store:
    """The kills that a folder holds, one line each, so that a run goes on where another was stopped."""

    def __init__(self, out: Path | None, asked: dict[str, Any]):
        self.path, self.asked = None if out is None else out / "kills.jsonl", asked
        lines = read_lines(self.path) if self.path else []
        self.known = {line["kill"]["id"]: score.Kill(**line["kill"]) for line in lines if line["asked"] == asked}

    def add(self, kill: score.Kill) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as stream:
                stream.write(json.dumps({"asked": self.asked, "kill": asdict(kill)}) + "\n")


def _fill(
    matrix: Matrix, store: _Store, progress: Progress, title: str, items: list[Any], work: Any, workers: int
) -> None:
    """Run mutants, some at once, each in the matrix, the store and on the screen as soon as it is done."""
    new = [item for item in items if item.id not in store.known]
    matrix.kills += [store.known[item.id] for item in items if item.id in store.known]
    with ThreadPoolExecutor(workers) as pool:
        if workers == 1:
            found = map(work, new)
        else:
            found = (task.result() for task in as_completed([pool.submit(work, item) for item in new]))
        try:
            for kill in _each(progress, title, found, lambda kill: kill, len(new)):
                matrix.kills.append(kill)
                store.add(kill)
                progress.console.print(
                    f"{kill.id:40} {_fate(kill)}, {kill.seconds:.0f} s", markup=False, highlight=False
                )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            patched.stop()
            raise


def _fate(kill: score.Kill) -> str:
    if kill.killed and not kill.cases:
        return f"killed by a {kill.kind}"
    if kill.killed:
        return "caught by its proof" if kill.kind == "proof" else f"killed by case {kill.cases} ({kill.kind})"
    return f"ALIVE after {kill.cases} cases"


def _each(progress: Progress, title: str, items: Iterable[Any], work: Any, total: int | None = None) -> Iterable[Any]:
    if total is None:
        total = len(list(items))
    if not total:
        return
    task = progress.add_task(title, total=total)
    for item in items:
        yield work(item)
        progress.advance(task)


def _write(out: Path, matrix: Matrix, seed: int, cases: int) -> None:
    write_json(out / "kills.json", {
        "mutants": [asdict(kill) for kill in matrix.kills], "limit": cases, "seed": seed,
        "interrupted": matrix.interrupted, "wanted": matrix.wanted,
        "usual": {name: sum(found.values()) for name, found in matrix.usuals.items()},
        "alarms": [text for _, text in matrix.accused], "alarm_cases": matrix.alarms,
    })  # fmt: skip


def _print(matrix: Matrix) -> None:
    console, kills, usuals = Console(), matrix.kills, matrix.usuals
    shown = Table("mutant", "group", "cases", "seconds", "judge", *usuals)
    shown.columns[0].no_wrap = True  # an id that is cut short names nothing
    for column in shown.columns[1:]:
        column.overflow = "fold"
    for kill in kills:
        marks = [
            "" if kill.id not in found else "yes" if found[kill.id] else "[red]no[/red]" for found in usuals.values()
        ]
        by_search = kill.killed and kill.kind != "proof"
        count = str(kill.cases) if by_search else f"alive after {kill.cases}"
        count = count if kill.killed else f"[red]{count}[/red]"
        shown.add_row(kill.id, kill.group, count, f"{kill.seconds:.1f}", kill.kind, *marks)
    console.print(shown)
    for kill in kills:
        if kill.kind == "proof" or (kill.text and not kill.killed):
            told = "caught by the proof made for it," if kill.killed else "NOT caught:"
            console.print(f"{kill.id}: {told} {kill.text}", markup=False, highlight=False, soft_wrap=True)
    proofs = sum(k.kind == "proof" for k in kills)
    dead = [k.cases for k in kills if k.killed and k.kind != "proof"]
    if dead:
        console.print(
            f"{len(dead)} of {len(kills)} killed{f', {proofs} more by proofs' if proofs else ''}; "
            f"cases to the kill: median {statistics.median(dead):g}, "
            f"{sum(c <= 50 for c in dead)} within 50, most {max(dead)}; slowest {max(k.seconds for k in kills):.1f} s"
        )
    for name, found in usuals.items():
        console.print(f"{name}: {sum(found.values())} of {len(found)}")
    if matrix.alarms:
        console.print(f"{len(matrix.accused)} false alarms in {matrix.alarms} cases of the right kernel")
    for plan, text in matrix.accused:
        console.print(f"  {plan}: {text}", style="red", markup=False)
    if matrix.interrupted:
        console.print(f"stopped: {len(kills)} of {matrix.wanted} mutants were run", style="yellow")
