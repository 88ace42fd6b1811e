"""The kill matrix of `rpa fuzz mutants`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fuzz.files import write_json
from fuzz.mutants import patched, score
from fuzz.mutants.catalogue import EQUIVALENT, MUTANTS, Mutant


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


def show(
    console: Any,
    seed: int,
    cases: int,
    only: str | None,
    sources: str | None,
    usual: bool,
    alarms: int,
    out: Path | None,
) -> int:
    """Run the matrix under a progress bar, print it, and give the exit status."""
    chosen = _chosen(only)
    try:
        patches = patched.chosen(sources)
    except patched.PatchError as error:
        console.print(f"[red]{error}[/red]")
        return 2
    if not chosen and not patches:
        console.print(f"[red]no mutant matches {only!r}[/red]")
        return 2
    with Progress(console=console) as progress:
        kills = list(_each(progress, "mutants", chosen, lambda m: score.kill(m, seed, cases)))
        kills += _each(progress, "source patches", patches, lambda p: score.kill_patch(p, seed))
        judges = list(
            _each(
                progress,
                "usual judges",
                score.USUAL if usual else (),
                lambda u: (u.name, score.usual_score(u, seed)),
            )
        )
        usuals = dict(judges)
        waiting = progress.add_task("the right kernel", total=None)
        accused = score.false_alarms(seed, alarms) if alarms else []
        progress.update(waiting, total=1, completed=1)
    _print(kills, usuals, accused, alarms)
    if out is not None:
        write_json(out / "kills.json", {
            "mutants": [asdict(k) for k in kills], "limit": cases, "seed": seed,
            "usual": {name: sum(found.values()) for name, found in usuals.items()},
            "alarms": [text for _, text in accused], "alarm_cases": alarms,
        })  # fmt: skip
    return 1 if accused or not all(k.killed for k in kills) else 0


def _each(progress: Progress, title: str, items: Iterable[Any], work: Any) -> Iterable[Any]:
    items = list(items)
    if not items:
        return
    task = progress.add_task(title, total=len(items))
    for item in items:
        progress.update(task, description=f"{title}: {getattr(item, 'id', getattr(item, 'name', ''))}")
        yield work(item)
        progress.advance(task)
    progress.update(task, description=title)


def _print(kills: list[score.Kill], usuals: dict[str, dict[str, bool]], accused: list, alarms: int) -> None:
    console = Console()
    shown = Table("mutant", "group", "cases", "seconds", "judge", *usuals)
    shown.columns[0].overflow = "fold"  # an id that is cut short names nothing
    for kill in kills:
        marks = [
            "" if kill.id not in found else "killed" if found[kill.id] else "[red]missed[/red]"
            for found in usuals.values()
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
    console.print(f"{len(accused)} false alarms in {alarms} cases of the right kernel")
    for plan, text in accused:
        console.print(f"  {plan}: {text}", style="red", markup=False)
