"""One run of `rpa bench`: ceilings, cells, table, record, comparison, page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fuzz.bench import ceilings, cells, page, peers, record, run
from fuzz.bench.record import Comparison, Record, RecordError
from fuzz.files import write_atomically

PASS, FAIL, USAGE, NOTHING = 0, 1, 2, 3


def main(json: Path | None, html: Path | None, against: Path | None, platforms: list[str], only: str,
         with_peers: bool, history: list[Path], resume: bool = False) -> int:  # fmt: skip
    """The exit code of `rpa bench`; every path is read before the first measurement."""
    console = Console()
    try:
        earlier = record.load(against) if against else None
        past = [record.load(path) for path in history]
        if resume and json is None:
            raise ValueError("--resume goes on with the record that --json names: give both")
        begun = record.resumed(json) if resume and json else None
        contenders = _contenders(platforms, with_peers)
        chosen = _cells(only)
    except (RecordError, ValueError) as error:
        console.print(f"[red]rpa bench:[/] {error}", highlight=False)
        return USAGE
    from rpa import policy_override

    with policy_override(cache_miss_fallback="heuristics"):  # what ships is timed, not what tuning would find
        made = _measure(console, chosen, contenders, begun, _saver(json))
    _print(console, made)
    return _finish(console, made, earlier, past, json, html)


def _chip() -> str:
    import jax

    return jax.devices()[0].platform.replace("cuda", "gpu")


def _cells(only: str) -> list[cells.Cell]:
    """The cells of this device whose name contains `only`, or matches it as a regular expression."""
    try:
        pattern = re.compile(only)
    except re.error:
        pattern = re.compile(re.escape(only))
    chosen = [cell for cell in cells.cells_for(_chip()) if only in cell.name or pattern.search(cell.name)]
    if not chosen:
        raise ValueError(f"--only {only!r}: no cell's name contains or matches it")
    return chosen


def _contenders(platforms: list[str], with_peers: bool) -> list[run.Contender]:
    from rpa import registry

    chip = _chip()
    ours = run.backends_here(chip)
    names: set[str] = set()
    for platform in platforms:
        known = {slot.name for slot in registry.SLOTS if platform in (slot.name, slot.platform)}
        if not known & {contender.name for contender in ours}:
            able = ", ".join(contender.name for contender in ours) or "none"
            raise ValueError(f"--platform {platform!r}: no such backend runs on this {chip}; here there are: {able}")
        names |= known
    ours = [contender for contender in ours if not platforms or contender.name in names]
    return ours + (peers.here(chip) if with_peers else [])


def _saver(path: Path | None) -> Callable[[Record], None]:
    """Writes the record so far, so that a killed run loses one cell at most."""
    return lambda made: write_atomically(path, lambda draft: draft.write_text(made.to_json())) if path else None


def _measure(console: Console, chosen: list[cells.Cell], contenders: list[run.Contender], begun: Record | None,
             save: Callable[[Record], None]) -> Record:  # fmt: skip
    """Every contender on every cell, under a progress bar; Ctrl-C keeps what was done, `begun` is gone on with."""
    results = list(begun.results) if begun else []
    done = {(result.cell, result.backend) for result in results}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring the ceilings", total=len(chosen))
        limits = begun.ceilings if begun else ceilings.measure()
        try:
            jobs = [(cell, [c for c in contenders if (cell.name, c.name) not in done]) for cell in chosen]
            jobs = [(cell, missing) for cell, missing in jobs if missing]
            progress.update(task, description="compile and judge", completed=len(chosen) - len(jobs))
            for measured in run.run(jobs, limits, _chip()):
                results += measured
                save(record.of(results, limits))
                progress.update(task, description=measured[0].cell, advance=1)
        except KeyboardInterrupt:
            console.print("[yellow]interrupted: what was measured so far follows[/]")
    return record.of(results, limits)


def _finish(console: Console, made: Record, earlier: Record | None, past: list[Record], json: Path | None,
            html: Path | None) -> int:  # fmt: skip
    if json:
        _saver(json)(made)
        console.print(f"record: {json}")
    comparison = None
    if earlier is not None:
        try:
            comparison = record.compare(earlier, made)
        except RecordError as error:
            console.print(f"[red]rpa bench:[/] --compare: {error}", highlight=False)
            return USAGE
        console.print(_changes(comparison, earlier.date))
    if html:
        text = page.render(made, comparison, past + ([earlier] if earlier else []))
        write_atomically(html, lambda draft: draft.write_text(text))
        console.print(f"page: {html}")
    if not made.passed:
        console.print("[red]nothing was timed[/]: no case passed its verdict")
        return NOTHING if not any(r.status == "fail" for r in made.results) else FAIL
    wrong = [r for r in made.results if r.status in ("fail", "suspect", "error") and not r.backend.startswith("peer:")]
    return FAIL if wrong or (comparison is not None and comparison.failed) else PASS


def _print(console: Console, made: Record) -> None:
    """A line for each cell's every contender, narrow enough for any terminal."""
    limits = made.ceilings
    console.print(f"[bold]{limits.device}[/]: read {limits.read / 1e9:.1f} GB/s, "
                  f"bf16 {limits.burst['bfloat16'] / 1e12:.3g} TFLOP/s", highlight=False)  # fmt: skip
    for cell in dict.fromkeys(r.cell for r in made.results):
        console.print(f"\n{cell}", highlight=False, soft_wrap=True)
        for r in made.results:
            if r.cell == cell:
                console.print(f"  {r.backend:22}{_line(r)}", highlight=False, soft_wrap=True)


def _line(r: run.Result) -> str:
    if r.seconds is None:
        colour = "dim" if r.status == "unsupported" else "red"
        return f"[{colour}]{escape(f'{r.status}: {r.reason.splitlines()[0] if r.reason else ""}')}[/]"
    facts = [f"{duration(r.time):>8} ±{100 * (r.spread or 0):.0f} %", f"{100 * (r.fraction or 0):3.0f} % of ceiling"]
    facts += [] if r.launches is None else [f"launches {r.launches}"]
    return "  ".join([*facts, f"host {duration(r.host_seconds or 0.0)}", f"error {r.ratio:.2f} of bound"])


def _changes(comparison: Comparison, date: str) -> Table:
    table = Table("cell", "backend", "before", "after", "ratio", "noise", "", title=f"against the record of {date}")
    for c in (*comparison.overall, *sorted(comparison.changes, key=lambda c: -c.ratio)):
        mark = "[red]slower[/]" if c.regressed else "[green]faster[/]" if c.improved else ""
        table.add_row(
            c.cell, c.backend, duration(c.before), duration(c.after), f"{c.ratio:.3f}", f"{100 * c.noise:.0f} %", mark
        )
    for r in comparison.lost:
        table.add_row(r.cell, r.backend, "a number", r.status, "", "", "[red]lost its number[/]")
    return table


def duration(seconds: float) -> str:
    """`seconds` with a unit that leaves one to three digits before the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
