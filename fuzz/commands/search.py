"""`rpa fuzz`: run, replay, mutants, report, targets."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fuzz.commands.duration import seconds

app = typer.Typer(help="Search for cases that a kernel gets wrong.", no_args_is_help=True)

USAGE, NOTHING, INFRASTRUCTURE = 2, 3, 4


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _load(name: str) -> Any:
    """The target, or the end of the program with the reason (usage)."""
    from fuzz.targets import TargetError, load

    try:
        return load(name)
    except TargetError as error:
        _console().print(f"[red]{error}[/red]")
        raise typer.Exit(USAGE) from None


@app.command()
def run(
    target: Annotated[str, typer.Option(help="one of our backends, an adapter, mutant:ID, or module:function")],
    budget: Annotated[str | None, typer.Option(help="time, as 90s, 10m, 1h30m; what the record holds counts")] = None,
    max_examples: Annotated[int | None, typer.Option(min=1, help="cases; what the record holds counts")] = None,
    seed: Annotated[int, typer.Option(help="of the stream of cases")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="processes, each with its own stream")] = 1,
    out: Annotated[Path | None, typer.Option(help="folder of the campaign; one that exists is resumed")] = None,
    case_timeout: Annotated[float, typer.Option(help="seconds one case may take, compilation included")] = 120.0,
    max_failures: Annotated[int, typer.Option(min=1, help="stop at this many distinct failures")] = 3,
    share: Annotated[
        str | None, typer.Option(help="redis://host:port or a folder that other campaigns use too")
    ] = None,
    waivers: Annotated[Path | None, typer.Option(help="TOML file of known findings")] = None,
) -> None:
    """Judge drawn cases until the budget is spent, and explain every failure.

    What XLA compiles is kept for the next campaign in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR.
    """
    from fuzz.campaign import Settings

    limit = _seconds(budget)
    if limit is None and max_examples is None:
        limit = 600.0
    _load(target)
    folder = out or Path("fuzz-out") / re.sub(r"[^\w.-]+", "-", target)
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is a file, not a folder", param_hint="--out")
    settings = Settings(target, folder, limit, max_examples, seed, workers, case_timeout, max_failures, share,
                        _waivers(waivers))  # fmt: skip
    raise typer.Exit(_campaign(settings))


def _waivers(path: Path | None) -> tuple[Any, ...]:
    from fuzz.ledger import WaiverError, read

    if path is None:
        return ()
    try:
        return tuple(read(path))
    except WaiverError as error:
        _console().print(f"[red]{error}[/red]")
        raise typer.Exit(USAGE) from None


def _campaign(settings: Any) -> int:
    """Run a campaign under a progress display, write its report, and tell the outcome."""
    from fuzz import report
    from fuzz.campaign import EXIT, Campaign, OtherCampaign, summary
    from fuzz.corpus import StoreError
    from fuzz.files import write_json

    console = _console()
    try:
        with _progress(settings, console) as watch:
            campaign = Campaign(settings, watch)
            status = campaign.run()
    except OtherCampaign as error:
        console.print(f"[red]{error}[/red]")
        return USAGE
    except OSError as error:
        console.print(f"[red]--out {settings.out} cannot be written: {error}[/red]")
        return INFRASTRUCTURE
    except StoreError as error:
        console.print(f"[red]{error}[/red]")
        return INFRASTRUCTURE
    whole = summary(settings, campaign.tally, status, campaign.ledger, campaign.trouble)
    write_json(settings.out / "summary.json", whole)
    report.write(settings.out, whole, campaign.tally)
    report.tell(console, whole, settings.out)
    if status == "interrupted":
        console.print("the same command goes on from here")
    return EXIT[status]


def _progress(settings: Any, console: Any) -> Any:
    """A context that gives a function to call with the tally: a bar of the budget and what was found."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    @contextmanager
    def shown() -> Any:
        words = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}")
        columns = (SpinnerColumn(), *words, TimeElapsedColumn())
        with Progress(*columns, console=console, refresh_per_second=4) as progress:
            total = settings.max_examples or settings.budget
            task = progress.add_task(settings.target, total=total, told="starting")

            def watch(tally: Any) -> None:
                done = tally.cases if settings.max_examples else tally.seconds
                rate = tally.cases / tally.seconds if tally.seconds else 0.0
                seen, possible = tally.pairs()
                told = (f"{tally.cases} cases, {rate:.0f}/s, error/bound {tally.worst:.2f}, "
                        f"pairs {seen / max(possible, 1):.0%}, failures {len(tally.failures)}")  # fmt: skip
                progress.update(task, completed=min(done, total), told=told)

            yield watch

    return shown()


@app.command()
def replay(
    case: Annotated[Path, typer.Argument(help="case.npz, a failure's folder, or a plan as JSON (file)")],
    target: Annotated[str | None, typer.Option(help="default: the target of the campaign the case lies in")] = None,
) -> None:
    """Judge one case again and print the verdict."""
    import json

    from fuzz.judge import judge_case, judge_plan
    from fuzz.plan import Plan
    from oracle import Case

    path, console = _case_file(case), _console()
    found = _load(target or _target_of(path))
    try:
        if path.suffix == ".npz":
            judgement = judge_case(Case.load(path), found.asking(True))
        else:
            data = json.loads(path.read_text())
            judgement = judge_plan(Plan.from_json(data.get("plan", data)), found)
    except (ValueError, OSError) as error:
        console.print(f"[red]{path} is no case: {error}[/red]")
        raise typer.Exit(USAGE) from None
    colour = {"pass": "green", "skipped": "yellow", "vacuous": "yellow"}.get(judgement.status, "red")
    console.print(f"[{colour}]{judgement.status}[/{colour}] {found.name}: {judgement.text}")
    raise typer.Exit({"pass": 0, "fail": 1, "suspect": 1}.get(judgement.status, NOTHING))


def _case_file(case: Path) -> Path:
    """The file that `replay` is asked for; an error lists the failures of the campaign it names, or stands in."""
    path = case / "case.npz" if case.is_dir() else case
    if path.exists():
        return path
    left = sorted(str(file.parent) for file in (case if case.is_dir() else Path()).glob("failures/*/case.npz"))
    _console().print(f"[red]{path} does not exist[/red]" + (f"; there are {', '.join(left)}" if left else ""))
    raise typer.Exit(USAGE)


def _target_of(path: Path) -> str:
    """The target of the campaign a case was left by."""
    import json

    for folder in path.resolve().parents:
        if (folder / "summary.json").exists():
            return json.loads((folder / "summary.json").read_text())["target"]
    _console().print(f"[red]{path} lies in no campaign's folder: give --target[/red]")
    raise typer.Exit(USAGE)


@app.command()
def mutants(
    seed: Annotated[int, typer.Option(help="of the stream of cases")] = 0,
    cases: Annotated[int, typer.Option(min=1, help="most cases a mutant")] = 300,
    only: Annotated[str | None, typer.Option(help="regular expression on ids or groups")] = None,
    listed: Annotated[bool, typer.Option("--list", help="only list the catalogue")] = False,
    sources: Annotated[
        str | None,
        typer.Option(
            "--patches", help="also source patches of our kernels: few, all, xla, triton, …, or part of an id"
        ),
    ] = None,
    usual: Annotated[bool, typer.Option(help="also what the usual judges kill")] = True,
    alarms: Annotated[int, typer.Option(min=0, help="cases of the right kernel that must raise no alarm")] = 2000,
    workers: Annotated[int, typer.Option(min=1, help="source patches at once, each a process")] = 1,
    out: Annotated[Path | None, typer.Option(help="write kills.json here; what it holds is not run again")] = None,
) -> None:
    """The mutation score: which known bugs are caught, and after how many cases."""
    from fuzz.commands.mutation import show, table

    console = _console()
    if listed:
        table(only)
        return
    raise typer.Exit(show(console, seed, cases, only, sources, usual, alarms, workers, out))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="the --out of a campaign")]) -> None:
    """Write report.md and report.html of a campaign again, from its record."""
    import json

    from fuzz import report as pages
    from fuzz.tally import read_record

    if not (folder / "summary.json").exists() or not (folder / "record.jsonl").exists():
        _console().print(f"[red]{folder} holds no finished campaign (summary.json and record.jsonl)[/red]")
        raise typer.Exit(USAGE)
    whole = json.loads((folder / "summary.json").read_text())
    tally = read_record(folder)
    pages.write(folder, whole, tally)
    pages.tell(_console(), whole, folder)
    raise typer.Exit(whole["exit"])


@app.command()
def targets() -> None:
    """List what can be judged here, and why the rest cannot."""
    from rich.console import Console
    from rich.table import Table

    from fuzz.targets import available

    table = Table("target", "here")
    for name, reason in available():
        table.add_row(name, "[green]yes[/green]" if reason is None else f"[yellow]no[/yellow]: {reason}")
    table.add_row("mutant:ID", "[green]yes[/green]: `rpa fuzz mutants --list`")
    table.add_row("module:function", "anything callable like ragged_page_attention_v2")
    Console(file=sys.stdout).print(table)
