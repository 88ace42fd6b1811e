"""One run of `rpa bench`: ceilings, cells, table, record, comparison, page."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fuzz.bench import page, record, watch, work
from fuzz.bench.record import Comparison, Record, RecordError
from fuzz.bench.run import Event, Result
from fuzz.bench.work import Settings
from fuzz.files import write_atomically

PASS, FAIL, USAGE, NOTHING = 0, 1, 2, 3
_WRONG = ("fail", "suspect", "error", "vacuous")


@dataclass(frozen=True)
class Options:
    """What `rpa bench` was asked, as its command line says it."""

    json: Path | None = None
    html: Path | None = None
    compare: Path | None = None
    platforms: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    only: str = ""
    peers: bool = True
    history: tuple[Path, ...] = ()
    resume: bool = False
    budget: float | None = None  # seconds
    patience: float = 120.0  # seconds; 0: measure in this process, where nothing that hangs can be helped


def main(options: Options) -> int:
    """The exit code of `rpa bench`; every path is read before the first measurement."""
    console = Console()
    try:
        earlier = record.load(options.compare) if options.compare else None
        past = [record.load(path) for path in options.history]
        if options.resume and options.json is None:
            raise ValueError("--resume goes on with the record that --json names: give both")
        begun = record.resumed(options.json) if options.resume and options.json else None
        made = _measure(console, options, begun)
        if earlier is not None:
            made = _confirmed(console, options, earlier, made)
        comparison = None if earlier is None else record.compare(earlier, made)
    except (RecordError, ValueError) as error:
        console.print(f"[red]rpa bench:[/] {error}", highlight=False)
        return USAGE
    _print(console, made)
    return _finish(console, options, made, earlier, past, comparison)


def _saver(path: Path | None) -> Callable[[Record], None]:
    """Writes the record so far, so that a killed run loses one cell at most."""
    return lambda made: write_atomically(path, lambda draft: draft.write_text(made.to_json())) if path else None


def _events(settings: Settings, patience: float) -> Iterator[Event]:
    return watch.watched(settings, patience) if patience else work.events(settings)


def _measure(console: Console, options: Options, begun: Record | None) -> Record:
    """Every contender on every cell, under a progress bar; Ctrl-C keeps what was done, `begun` is gone on with.

    Raises:
        ValueError: what was asked is not to be had here, or the machine broke before it measured anything.
    """
    deadline = None if options.budget is None else time.time() + options.budget
    results = list(begun.results) if begun else []
    settings = Settings(options.platforms, options.targets, options.only, options.peers, deadline,
                        frozenset((r.cell, r.backend) for r in results), begun.ceilings if begun else None)  # fmt: skip
    limits: Any = settings.ceilings
    spent, save = 0.0, _saver(options.json)
    fresh: list[Result] = []
    due = 0
    with _Progress(console) as progress:
        try:
            for kind, what in _events(settings, options.patience):
                if kind == work.REFUSED or (kind == "broken" and limits is None):
                    raise ValueError(what)
                if kind == "broken":
                    console.print(f"[red]the run broke[/]: {escape(what)}")
                elif kind == "ceilings":
                    limits = what
                elif kind == "spent":
                    spent += what
                elif kind == "jobs":
                    due = len(fresh) + what
                elif kind == "result":
                    fresh.append(what)
                    save(record.of(results + fresh, limits))
                progress.tell(kind, what, len(fresh), due)
        except KeyboardInterrupt:
            console.print("[yellow]interrupted: what was measured so far follows[/]")
    if limits is None:
        raise ValueError("interrupted before the ceilings were measured")
    _tell_time(console, fresh, spent, due)
    return record.of(results + fresh, limits)


class _Progress:
    """A bar on a terminal; elsewhere a line on standard error for each thing that happens."""

    def __init__(self, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self.began = time.monotonic()

    def __enter__(self) -> _Progress:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("measuring the ceilings", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def tell(self, kind: str, what: Any, done: int, due: int) -> None:
        """What an event means to whoever waits."""
        words = {"prepare": lambda: f"compile and judge {what[0]}" + (f" and {len(what) - 1} more" if what[1:] else ""),
                 "begin": lambda: " on ".join(what)}.get(kind)  # fmt: skip
        if self.bar:
            self.bar.update(self.task, completed=done, total=due or None)
            if words:
                self.bar.update(self.task, description=words())
        elif kind in ("result", "prepare"):
            text = f"{what.cell} on {what.backend}: {_plain(what)}" if kind == "result" else words() if words else ""
            print(f"{time.monotonic() - self.began:5.0f} s, {done} of {due}: {text}", file=sys.stderr, flush=True)


def _plain(r: Result) -> str:
    """A result and what it cost, for a log."""
    if r.seconds is None:
        return f"{r.status} {r.reason.splitlines()[0] if r.reason else ''}"[:150]
    return (f"{duration(r.seconds)} ±{100 * (r.spread or 0):.1f} %, compiled {r.compile_seconds or 0:.1f} s, "
            f"judged {r.judge_seconds or 0:.1f} s, timed {r.timing_seconds or 0:.1f} s")  # fmt: skip


def _tell_time(console: Console, fresh: list[Result], spent: float, due: int) -> None:
    """Where the time went, and what the budget did not reach."""
    judged, timed = (sum(getattr(r, name) or 0.0 for r in fresh) for name in ("judge_seconds", "timing_seconds"))
    console.print(f"[dim]arrays, compiling and the oracle ahead {spent:.0f} s, judging {judged:.0f} s, "
                  f"timing {timed:.0f} s[/]", highlight=False)  # fmt: skip
    if len(fresh) < due:
        console.print(f"[yellow]{due - len(fresh)} lines were not reached[/]: --resume goes on", highlight=False)


def _confirmed(console: Console, options: Options, earlier: Record, made: Record) -> Record:
    """`made`, with what looks slower measured again: a moment's disturbance does not come twice, a slowdown does."""
    slower = [change for change in record.compare(earlier, made).changes if change.regressed]
    if not slower:
        return made
    console.print(f"{len(slower)} look slower: measured again", highlight=False)
    doubted = {(change.cell, change.backend) for change in slower}
    only = "|".join(f"^{re.escape(cell)}$" for cell in dict.fromkeys(change.cell for change in slower))
    kept = [r for r in made.results if (r.cell, r.backend) not in doubted]
    again = _measure(console, replace(options, only=only, json=None, resume=False),
                     record.of(kept, made.ceilings))  # fmt: skip
    second = {(r.cell, r.backend): r for r in again.results}
    best = [record.quicker(r, second.get((r.cell, r.backend), r)) for r in made.results]
    return replace(made, results=tuple(best))


def _finish(console: Console, options: Options, made: Record, earlier: Record | None, past: list[Record],
            comparison: Comparison | None) -> int:  # fmt: skip
    if options.json:
        _saver(options.json)(made)
        console.print(f"record: {options.json}")
    if comparison is not None and earlier is not None:
        _tell_changes(console, comparison, earlier.date)
        console.print(_sight(comparison), highlight=False)
    if options.html:
        text = page.render(made, comparison, past + ([earlier] if earlier else []), _static())
        write_atomically(options.html, lambda draft: draft.write_text(text))
        console.print(f"page: {options.html}")
    if not made.passed:
        console.print("[red]nothing was timed[/]: no case passed its verdict")
        return NOTHING if not any(r.status in _WRONG for r in made.results) else FAIL
    wrong = [r for r in made.results if r.status in _WRONG and not r.backend.startswith("peer:")]
    return FAIL if wrong or (comparison is not None and comparison.failed) else PASS


def _static() -> Any:
    """The TPU compiler's estimates, where this is a checkout that has them."""
    path = Path(__file__).resolve().parents[2] / "tests" / "bench" / "records" / "tpu_aot.json"
    return json.loads(path.read_text()) if path.exists() else None


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


def _line(r: Result) -> str:
    if r.seconds is None:
        colour = "dim" if r.status == "unsupported" else "red"
        return f"[{colour}]{escape(f'{r.status}: {r.reason.splitlines()[0] if r.reason else ""}')}[/]"
    facts = [f"{duration(r.time):>8} ±{100 * (r.spread or 0):.0f} %", f"{100 * (r.fraction or 0):3.0f} % of ceiling"]
    facts += [] if r.launches is None else [f"launches {r.launches}"]
    return "  ".join([*facts, f"host {duration(r.host_seconds or 0.0)}", f"error {r.ratio:.2f} of bound"])


def _tell_changes(console: Console, comparison: Comparison, date: str) -> None:
    """A line for each clock of each cell, the slowest first, as wide as it has to be."""
    console.print(f"\nagainst the record of {date}: after / before, ± what both runs' noise explains", highlight=False)
    for c in (*comparison.overall, *sorted(comparison.changes, key=lambda c: -c.ratio)):
        mark = "  [red]slower[/]" if c.regressed else "  [green]faster[/]" if c.improved else ""
        times = f"{duration(c.before):>8} to {duration(c.after):>8}"
        figures = f"{c.ratio:6.3f} ±{100 * c.noise:5.1f} %  {c.clock:4}  {times}"
        console.print(f"  {figures}  {c.cell} {c.backend}{mark}", highlight=False, soft_wrap=True)
    for r in comparison.lost:
        console.print(f"  [red]lost its number[/]  {r.cell} {r.backend}: {r.status}", highlight=False, soft_wrap=True)


def _sight(comparison: Comparison) -> str:
    """What this comparison could have seen."""
    cells = {(c.cell, c.backend) for c in comparison.changes}
    seen = {(c.cell, c.backend) for c in comparison.changes if c.noise < 0.1}
    return f"a slowdown of 10 % would show in {len(seen)} of {len(cells)} lines taken alone"


def duration(seconds: float) -> str:
    """`seconds` with a unit that leaves one to three digits before the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
