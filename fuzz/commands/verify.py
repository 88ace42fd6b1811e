"""`rpa verify`: replay a serving trace against every backend that this machine can run, and judge every step."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fuzz.commands.duration import seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fuzz.targets import Target
    from fuzz.trace import Request, Scan
    from fuzz.verify import Replay, Report

PASS, FAIL, USAGE, NOTHING, TROUBLE, INTERRUPTED = 0, 1, 2, 3, 4, 130
_EXIT = {
    "pass": PASS,
    "fail": FAIL,
    "nothing verified": NOTHING,
    "infrastructure": TROUBLE,
    "interrupted": INTERRUPTED,
}
PLATFORMS = ("xla", "triton", "pallas", "cuda", "auto")


class UsageError(Exception):
    """Something the caller can put right: one line, exit 2."""


def verify(
    trace: Annotated[
        Path | None,
        typer.Option(help="Mooncake .jsonl or Azure .csv trace; without one, requests are drawn from statistics."),
    ] = None,
    platform: Annotated[
        str | None,
        typer.Option(help="xla, triton, pallas, cuda, auto, or module:function. Default: every one that runs here."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="tiny, llama3-8b, llama3-70b-tp8, mistral-7b, gemma2 or gpt-oss.")
    ] = "tiny",
    seed: Annotated[int, typer.Option(min=0, help="Data, page order and drawn requests follow from it.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Stop after so many steps.")] = 300,
    budget: Annotated[str, typer.Option(help="Stop so long after the first step: 90s, 10m or 1h30m.")] = "60s",
    scale: Annotated[
        int | None,
        typer.Option(min=1, help="Prompt tokens of the trace to one of the replay. Default: so that 99 % fit."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the result there.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for failing cases.")] = Path(".rpa/verify"),
    interpret: Annotated[
        bool,
        typer.Option("--interpret", help="Let --platform pallas run in its interpreter where there is no TPU; slow."),
    ] = False,
) -> None:
    """Replay the steps of a server against every backend that runs here, each judged by the oracle.

    Exit status: 0 all pass, 1 a failure, 2 usage, 3 nothing verified, 4 infrastructure, 130 interrupted.
    """
    _one_blas_thread()
    try:
        options = {"steps": steps, "budget": _seconds(budget), "json": json, "out": out, "scale": scale}
        code = _verify(trace, platform, model, seed, interpret, options)
    except UsageError as error:
        typer.echo(f"error: {error}", err=True)
        code = USAGE
    except KeyboardInterrupt:
        typer.echo("interrupted before the first step", err=True)
        code = INTERRUPTED
    raise typer.Exit(code)


def _one_blas_thread() -> None:
    """The oracle's matrices are small: on a busy machine BLAS threads cost many times what they gain."""
    if "numpy" not in sys.modules:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _verify(trace: Path | None, platform: str | None, model: str, seed: int, interpret: bool, options: dict) -> int:
    """From options to exit code; whatever can be wrong with the options is found before anything slow."""
    from fuzz.models import model_named
    from fuzz.trace import TraceError

    try:
        chosen = model_named(model)
        requests, scan, source = _requests(trace, seed)
    except (TraceError, ValueError) as error:
        raise UsageError(f"--trace {error}" if isinstance(error, TraceError) else f"--model {error}") from None
    _check_writable(options["json"])
    try:
        targets, refused = targets_for(platform, interpret)
    except RuntimeError as error:  # JAX finds no device, or not the one JAX_PLATFORMS asks for
        typer.echo(f"error: JAX does not start: {str(error).splitlines()[0]}", err=True)
        return TROUBLE
    from fuzz.verify import Replay, plan_of

    plan = plan_of(chosen, scan, source, seed, options["scale"], trace)
    replay = Replay(plan, requests, targets, options["out"])
    replay.report.absent.update(refused)
    _run(replay, options["steps"], options["budget"])
    from fuzz.commands.verify_table import show

    show(replay.report, scan, remarks=scan.remarks)
    return _finish(replay.report, options["json"])


def _requests(trace: Path | None, seed: int) -> tuple[Iterator[Request], Scan, str]:
    """The requests to replay and what one pass over all of them says; a broken trace is found here."""
    from fuzz.trace import MOONCAKE_CONVERSATION, read, scan

    if trace is not None:
        return read(trace), scan(read(trace)), str(trace)
    statistics = MOONCAKE_CONVERSATION
    return statistics.draw(seed), scan(statistics.draw(seed, 2000)), statistics.source


def _seconds(text: str) -> float:
    try:
        return seconds(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_writable(path: Path | None) -> None:
    """A result that could not be written is found out before the replay, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"--json {path}: a folder; expected a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--json {path}: the folder {path.absolute().parent} does not exist")


# -------------------------------------------------------------------------------------------------- backends


def targets_for(platform: str | None, interpret: bool) -> tuple[list[Target], dict[str, str]]:
    """The targets to judge, and the reason for each backend that does not run here.

    Raises:
        UsageError: the platform is unknown, or cannot run here.
    """
    from fuzz import targets
    from rpa import device, registry

    if platform is not None and ":" in platform:
        try:
            return [targets.load(platform)], {}
        except targets.TargetError as error:
            raise UsageError(f"--platform {error}") from None
    slots = registry.exists()
    known = [*PLATFORMS, *(slot.name for slot in slots if slot.name not in PLATFORMS)]
    if platform is not None and platform not in known:
        guess = get_close_matches(platform, known, 1)
        hint = f" (did you mean {guess[0]}?)" if guess else ""
        raise UsageError(f"--platform {platform}: unknown{hint}; there are {', '.join(known)}, or module:function")
    wanted = [slot for slot in slots if platform in (None, "auto", slot.platform, slot.name)]
    here, able, refused = device.current(), [], {}
    for slot in wanted:
        reason = _reason(slot, here, interpret and platform is not None)
        if reason is None:
            able.append(targets.load(slot.name))
        else:
            refused[slot.name] = reason
    if platform is not None and not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        reasons = reasons or f"no backend of this package has the platform {platform}"
        raise UsageError(f"--platform {platform} cannot run here: {reasons}")
    return (able[:1], {}) if platform == "auto" else (able, {} if platform else refused)


def _reason(slot: Any, here: Any, interpret: bool) -> str | None:
    """Why a backend cannot run on this machine, or None; what it says of single cases is asked later."""
    from rpa import registry

    interpreted = slot.name == "pallas_tpu" and here.platform == "cpu"
    if here.platform not in slot.chips and not (interpret and interpreted):
        hint = " (--platform pallas --interpret runs it in its interpreter)" if interpreted else ""
        kind = "" if here.kind == here.platform else f" ({here.kind})"
        return f"runs on {' and '.join(slot.chips)}, this machine has {here.platform}{kind}{hint}"
    try:
        registry.load(slot.name)
    except ImportError as error:
        return f"not installed: {error}"
    return None


# ------------------------------------------------------------------------------------------------- the replay


def _run(replay: Replay, steps: int, budget: float) -> None:
    """Step through the replay with a progress bar; Ctrl-C and trouble end it, and the report says so."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from fuzz.verify import Infrastructure
    from rpa import policy_override

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
    try:
        # Tuning would take longer than the replay; what a store or a shipped table holds is used.
        with (
            policy_override(cache_miss_fallback="heuristics"),
            Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        ):
            task = progress.add_task("", total=1.0)
            for layer in replay.run(steps, budget):
                report = replay.report
                done = max(report.steps / steps, (report.seconds - report.first_step) / budget)
                done = done if report.steps else 0.0
                progress.update(task, completed=done, description=_line(report, layer))
    except KeyboardInterrupt:
        replay.report.interrupted = True
    except Infrastructure as error:
        replay.report.trouble = str(error)


def _line(report: Report, layer: str) -> str:
    if not report.steps:
        return f"compiling for {layer}: {report.total('verified')} verified"
    worst = max((score.ratio for score in report.scores.values()), default=0.0)
    failed = report.total("failed")
    return f"step {report.steps}: {report.total('verified')} verified, {failed} failed, worst {worst:.2f}"


def _finish(report: Report, json: Path | None) -> int:
    from fuzz.files import write_json

    if json is not None:
        try:
            write_json(json, report.as_json())
        except OSError as error:
            print(f"error: --json {json}: {error.strerror}", file=sys.stderr)
            return FAIL if report.failures else TROUBLE
    return _EXIT[report.status]
