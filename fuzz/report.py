"""A campaign told to a person: a table in the terminal, Markdown, and one HTML page that needs no network."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fuzz import plots
from fuzz.coverage import AXES
from fuzz.files import write_atomically
from fuzz.plan import Plan
from fuzz.tally import Tally

_HEADLINE = {
    "pass": ("no failure found", "green"),
    "fail": ("fails", "red"),
    "nothing": ("nothing verified", "orange"),
    "infrastructure": ("did not run", "orange"),
    "interrupted": ("interrupted", "orange"),
}


def write(out: Path, whole: dict[str, Any], tally: Tally) -> None:
    """Write `report.md` and `report.html` from a campaign's summary and record."""
    tried = whole["triples"]
    triples = f"{tried['seen']:,} of {tried['possible']:,} triples" if tally.cases else ""
    write_atomically(out / "report.md", lambda draft: draft.write_text(markdown(whole, triples)))
    text = page(whole, tally, triples, _failures(out, whole), _kills(out))
    write_atomically(out / "report.html", lambda draft: draft.write_text(text))


def tell(console: Any, whole: dict[str, Any], out: Path) -> None:
    """The outcome in a few lines, and where to read on."""
    words, colour = _HEADLINE[whole["status"]]
    colour = {"orange": "yellow"}.get(colour, colour)
    console.print(f"[bold {colour}]{whole['target']}: {words}[/]")
    for number, what in _tiles(whole):
        console.print(f"  {number:>12}  {what}", highlight=False)
    for reason, count in whole["skipped"].items():
        console.print(f"  {count:>12}  cases refused: {reason}", highlight=False, markup=False)
    if whole.get("never_taken"):
        console.print(f"  never drawn, since it does not take them: {_in_words(whole['never_taken'])}", markup=False)
    if not whole["cases"]:
        for reason, count in whole.get("declined", {}).items():
            console.print(f"  {count:>12}  shapes not taken: {reason}", highlight=False, markup=False)
    for text in (*whole["accepts_illegal"], *whole["waiver_complaints"], *filter(None, [whole["trouble"]])):
        console.print(f"  {text}", style="red", markup=False)
    for failure in whole["failures"]:
        console.print(f"\n  {failure['id']}: {failure['diagnosis']}", style="bold", markup=False)
        console.print(f"  {failure['text']}", markup=False, highlight=False)
        console.print(f"  {out / 'failures' / failure['id'] / 'reproduce.py'}", markup=False)
    console.print(f"\nreport: {out / 'report.html'}", markup=False)


def _tiles(whole: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = whole["pairs"]
    worst = max(whole["worst_ratio"].values(), default=0.0)
    tiles = [
        (f"{whole['verified']:,}", "cases verified"),
        (f"{whole['failed']:,}", "cases failed"),
        (f"{whole.get('elements', 0):,}", "output elements judged"),
        (f"{worst:.3f}", "largest error / bound"),
        (f"{pairs['seen'] / pairs['possible']:.1%}", "pairs of features tried"),
        (f"{whole['exact_cases']:,}", "cases of the exact stratum"),
        (f"{whole['vacuous']:,}", "too ill conditioned to judge"),
        (f"{whole['cases_per_second'] or 0:,.0f}", "cases a second"),
        (f"{whole['compilations']:,}", "compilations"),
    ]
    return tiles + ([(f"{whole['waived']:,}", "failures waived")] if whole["waived"] else [])


def _in_words(never: dict[str, list[Any]]) -> str:
    return "; ".join(f"{axis.replace('_', ' ')} {', '.join(map(plots.name, values))}" for axis, values in never.items())


def versions() -> str:
    """What ran, for the head of a report."""
    names = ("jax", "numpy", "hypothesis")
    found = [f"{name} {metadata.version(name)}" for name in names]
    return ", ".join([f"Python {platform.python_version()}", *found])


# ---------------------------------------------------------------- Markdown


def markdown(whole: dict[str, Any], triples: str) -> str:
    """The summary for a terminal, an issue or a pull request."""
    words, _ = _HEADLINE[whole["status"]]
    lines = [f"# {whole['target']}: {words}", "", f"Seed {whole['seed']}, {versions()}.", ""]
    lines += ["| | |", "|---|---|", *(f"| {what} | {number} |" for number, what in _tiles(whole))]
    lines += [f"| triples of features tried | {triples} |"] if triples else []
    if whole["skipped"]:
        lines += ["", "## Cases refused", "", *(f"- {n} cases: {why}" for why, n in whole["skipped"].items())]
    if whole.get("declined"):
        never = _in_words(whole["never_taken"])
        lines += ["", "## Not drawn, since the target does not take it", ""]
        lines += [f"Never: {never}.", ""] if never else []
        lines += [f"- {n} shapes: {why}" for why, n in whole["declined"].items()]
    for title, texts in (
        ("Accepts what is illegal", whole["accepts_illegal"]),
        ("Waivers", whole["waiver_complaints"]),
    ):
        lines += ["", f"## {title}", "", *(f"- {text}" for text in texts)] if texts else []
    if whole["failures"]:
        lines += ["", "## Failures"]
    for f in whole["failures"]:
        lines += ["", f"### {f['id']}", "", f"{f['diagnosis'].capitalize()}.", "", f"    {f['text']}", "",
                  f"`python failures/{f['id']}/reproduce.py`"]  # fmt: skip
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- HTML


def page(
    whole: dict[str, Any],
    tally: Tally,
    triples: str,
    failures: Sequence[dict[str, Any]],
    kills: dict[str, Any] | None,
) -> str:
    """One self-contained page."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    words, colour = _HEADLINE[whole["status"]]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template("report.html.j2").render(
        s=whole, headline=words, colour=colour, versions=versions(), tiles=_tiles(whole), failures=failures,
        ratios=[(axis.replace("_", " "), Markup(plot)) for axis, plot in _ratio_plots(tally)],
        coverage=Markup(plots.matrix(tally.coverage.seen, tally.barred)) if tally.coverage.pairs else None,
        triples=triples, never=_in_words(whole.get("never_taken", {})), **(_kill_parts(kills) if kills else {}),
    )  # fmt: skip


def _ratio_plots(tally: Tally) -> list[tuple[str, str]]:
    """A plot an axis: the worst ratio of each of its values."""
    count, worst = tally.coverage.count, tally.coverage.worst
    found = []
    for axis, values in AXES.items():
        rows = [
            (plots.name(value), worst.get((axis, value), 0.0), f"{count[axis, value]:,} cases")
            for value in values
            if (axis, value) in count
        ]
        if rows:
            found.append((axis, plots.bars(rows)))
    return found


def _failures(out: Path, whole: dict[str, Any]) -> list[dict[str, Any]]:
    """The failures with their scripts and their plans in words."""
    found = []
    for failure in whole["failures"]:
        script = out / "failures" / failure["id"] / "reproduce.py"
        text = script.read_text() if script.exists() else "(the script is not here)"
        found.append({**failure, "script": text, "plan": str(Plan.from_json(failure["plan"]))})
    return found


def _kills(out: Path) -> dict[str, Any] | None:
    """The mutation score that `rpa fuzz mutants --out` left in the folder, if it did."""
    path = out / "kills.json"
    return json.loads(path.read_text()) if path.exists() else None


def _kill_parts(kills: dict[str, Any]) -> dict[str, Any]:
    from markupsafe import Markup

    groups: dict[str, list[tuple[str, int, bool]]] = {}
    for kill in kills["mutants"]:
        groups.setdefault(kill["group"], []).append((kill["id"], kill["cases"], kill["killed"]))
    killed = [kill for kill in kills["mutants"] if kill["killed"]]
    words = f"{len(killed)} of {len(kills['mutants'])} known bugs are noticed."
    if kills["alarm_cases"]:
        words += f" {len(kills['alarms'])} false alarms in {kills['alarm_cases']:,} cases of the right kernel."
    usual = [(name, f"{count} of {len(kills['mutants'])}") for name, count in kills["usual"].items()]
    return {"kills": Markup(plots.dots(groups, kills["limit"])), "kill_words": words,
            "usual": [("this search", f"{len(killed)} of {len(kills['mutants'])}"), *usual]}  # fmt: skip
