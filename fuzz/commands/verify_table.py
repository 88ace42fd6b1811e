"""What `rpa verify` prints at its end: the table, what was covered, what was not and why, and the verdict."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fuzz.trace import Scan
from fuzz.verify import Failure, Report

# In the order of a reader's interest; what a replay may cover, whatever the model.
FEATURES = (
    "prefill",
    "chunk",
    "decode",
    "mixed",
    "shared pages",
    "resumed after preemption",
    "rows of nobody",
    "window shorter than a context",
    "soft cap",
    "sinks",
)


def show(report: Report, scan: Scan, remarks: Counter[str], console: Console | None = None) -> None:
    """Print the whole end of a replay."""
    console = console or Console()
    plan = report.plan
    console.print(f"[bold]{plan.model.name}[/] on {plan.source}, seed {plan.seed}", highlight=False)
    scale = (
        f"1 of {plan.scale.prompt} prompt and 1 of {plan.scale.output} output tokens; " if plan.scale.prompt > 1 else ""
    )
    console.print(
        f"{scale}{plan.limits.tokens} tokens and {plan.limits.seqs} sequences a step, {plan.limits.pages} pages of "
        f"{plan.limits.page_size}",
        style="dim",
        highlight=False,
    )
    if report.scores:
        console.print(_table(report))
    _list(console, "covered", _covered(report))
    _list(console, "not covered", _uncovered(report, scan))
    _list(console, "skipped", [f"{reason} ({count})" for reason, count in report.skipped.items()])
    _list(console, "not run", [f"{name}: {reason}" for name, reason in report.absent.items()], "; ")
    _list(console, "remarks", [f"{remark}: {count} requests" for remark, count in remarks.items()])
    for failure in _first_of_each(report.failures):
        _show_failure(console, failure)
    console.print(_verdict(report))


def _table(report: Report) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("backend")
    table.add_column("layer")
    for name in ("verified", "failed", "rows", "worst", "lse", "first", "ms"):
        table.add_column(name, justify="right")
    for (backend, layer), score in report.scores.items():
        later = score.verified + score.failed + score.vacuous - 1
        table.add_row(
            backend, layer, f"{score.verified}", Text(f"{score.failed}", style="bold red" if score.failed else ""),
            f"{score.rows}", f"{score.ratio:.2f}", "-" if score.lse_ratio is None else f"{score.lse_ratio:.2f}",
            f"{score.first:.1f}", f"{(score.seconds - score.first) * 500 / later:.1f}" if later > 0 else "-",
        )  # fmt: skip
    table.caption = "worst: largest error / bound, above 1 fails; first: s, with compilation; ms: a later call"
    table.caption_justify = "left"
    return table


def _covered(report: Report) -> list[str]:
    names = [
        *(name for name in FEATURES if name in report.features),
        *sorted(set(report.features) - set(FEATURES)),
    ]
    return [f"{name} {report.features[name]}" for name in names]


def _uncovered(report: Report, scan: Scan) -> list[str]:
    """What no verified case had, with the reason where it is known."""
    layers = report.plan.model.layers
    reasons = {
        "shared pages": None if scan.with_blocks else "the trace has no hash_ids",
        "window shorter than a context": None if any(y.sliding_window for y in layers) else "not in this model",
        "soft cap": None if any(y.logits_soft_cap for y in layers) else "not in this model",
        "sinks": None if any(y.sinks for y in layers) else "not in this model",
    }
    missing = [name for name in FEATURES if name not in report.features]
    return [f"{name} ({reasons[name]})" if reasons.get(name) else name for name in missing]


def _list(console: Console, title: str, items: list[str], between: str = ", ") -> None:
    if items:
        console.print(Text.assemble((f"{title}: ", "bold"), between.join(items)))


def _first_of_each(failures: list[Failure]) -> list[Failure]:
    """One failure for each backend and layer: the others say the same."""
    return list({(failure.backend, failure.layer): failure for failure in reversed(failures)}.values())[::-1]


def _show_failure(console: Console, failure: Failure) -> None:
    where = f"{failure.backend}, {failure.layer}, step {failure.step}"
    console.print(Text.assemble(("FAIL ", "bold red"), (where, "bold"), f": {failure.text}"))
    # Not wrapped: a command that is broken over lines cannot be copied.
    console.print(Text(f"     again: {failure.reproduce}"), soft_wrap=True)


def _verdict(report: Report) -> Text:
    verified, failed, vacuous = (report.total(what) for what in ("verified", "failed", "vacuous"))
    done = (
        f"{verified} cases verified, {failed} failed, {vacuous} vacuous; "
        f"{report.steps} steps, {report.rows} rows and {len(report.requests)} requests in {report.seconds:.0f} s"
    )
    words = {
        "pass": ("PASS ", "bold green"),
        "fail": ("FAIL ", "bold red"),
        "nothing verified": ("NOTHING VERIFIED ", "bold yellow"),
        "infrastructure": (f"STOPPED: {report.trouble}. Until then: ", "bold yellow"),
        "interrupted": ("INTERRUPTED. Until then: ", "bold yellow"),
    }
    return Text.assemble(words[report.status], done)
