"""One self-contained HTML page of a record: roofline, ratios against peers, growth curves, history, table."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jinja2
import matplotlib
import matplotlib.lines
import numpy as np

from fuzz.bench.record import Comparison, Record
from fuzz.bench.run import Result

INK, MUTED, GRID = "#1f2430", "#7a8194", "#e6e8ee"
PALETTE = ("#2f6fde", "#e0762f", "#2a9d76", "#b1479e", "#8a6d3b", "#c8384b", "#17a2b8", "#607080", "#9b59d0", "#d4a017",
           "#1b3a6b", "#7cb342")  # fmt: skip
MARKERS = {"decode": "o", "prefill": "s", "chunk": "D", "mixed": "^"}


def render(record: Record, comparison: Comparison | None, history: list[Record]) -> str:
    """The page as text: inline SVG and CSS, nothing fetched from anywhere."""
    peers = [r for r in record.passed if r.backend.startswith("peer:")]
    plots = [
        ("Roofline", "Each mark is one verified cell: how much arithmetic a byte of traffic feeds, and what was "
         "reached. The line is this machine's measured ceiling.", _roofline(record)),
        ("Against the peers", "Time of ours over the best peer's in the same run; left of the line is faster.",
         _ratios(record)) if peers else None,
        ("Growth", "Time against what grows, log-log. The dotted line is proportional growth through the first point; "
         "page size should be flat.", _growth(record)) if any(r.tags.get("families") for r in record.passed) else None,
        ("Fraction of the ceiling", "Floor (bytes over read stream, or operations over matrix peak) over time.",
         _fractions(record)) if any(not r.tags.get("families") for r in record.passed) else None,
        ("History", "The same cells in earlier records, as a ratio to the first.", _history([*history, record]))
        if history else None,
    ]  # fmt: skip
    return _TEMPLATE.render(
        record=record, comparison=comparison, plots=[plot for plot in plots if plot], rows=record.results,
        ms=lambda s: f"{s * 1e3:.3g}", denied=[r for r in record.results if r.seconds is None],
    )  # fmt: skip


# ------------------------------------------------------------------ plots


def _svg(draw: Callable, width: float = 8.4, height: float = 4.2, **subplots) -> str:
    """What `draw(axes)` paints, as an inline SVG that scales with the page."""
    style: dict[Any, Any] = {"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none",
             "axes.edgecolor": MUTED,
             "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.grid": True,
             "grid.color": GRID, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
             "svg.hashsalt": "rpa"}  # fmt: skip
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure  # the object itself: no global state, no display

        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots(**subplots))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _colours(record: Record) -> dict[str, str]:
    names = dict.fromkeys(r.backend for r in record.passed)
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def _styles(record: Record) -> dict[str, dict[str, Any]]:
    """A mark for each contender: ours filled, peers as rings."""
    return {
        name: {"color": colour, "ms": 5.5, "mew": 1.4, "mfc": "none" if name.startswith("peer:") else colour}
        for name, colour in _colours(record).items()
    }


def _roofline(record: Record) -> str:
    styles, limits = _styles(record), record.ceilings

    def draw(axes) -> None:
        intensity = np.geomspace(0.2, 1e4, 200)
        for dtype, style in (("bfloat16", "-"), ("float32", "--")):
            roof = np.minimum(intensity * limits.read, limits.burst[dtype])
            axes.loglog(intensity, roof, style, color=INK, lw=1.2, label=f"ceiling {dtype}")
        for r in record.passed:
            mark = MARKERS.get(r.tags.get("kind", ""), "x")
            axes.loglog(r.flops / r.bytes, r.flops / r.time, mark, **styles[r.backend])
        for name, style in styles.items():
            axes.plot([], [], "o", label=name, **style)
        for kind, mark in MARKERS.items():
            axes.plot([], [], mark, color=MUTED, label=kind)
        axes.set_xlabel("operations per byte that must move")
        axes.set_ylabel("operations per second")
        axes.legend(frameon=False, fontsize=8, ncols=2)

    return _svg(draw)


def _best_peers(record: Record) -> dict[str, Result]:
    best: dict[str, Result] = {}
    for r in record.passed:
        if r.backend.startswith("peer:") and (r.cell not in best or r.time < best[r.cell].time):
            best[r.cell] = r
    return best


def _ratios(record: Record) -> str:
    best, styles = _best_peers(record), _styles(record)
    ours = [r for r in record.passed if not r.backend.startswith("peer:") and r.cell in best]
    cells = list(dict.fromkeys(r.cell for r in ours))

    def draw(axes) -> None:
        for r in ours:
            ratio, y = r.time / best[r.cell].time, cells.index(r.cell)
            axes.plot([1, ratio], [y, y], color=styles[r.backend]["color"], lw=1, alpha=0.5)
            axes.plot(ratio, y, "o", **styles[r.backend])
        axes.axvline(1, color=INK, lw=1)
        axes.set_xscale("log")
        _name_rows(axes, [f"{c}  ({best[c].backend.removeprefix('peer:')})" for c in cells])
        _legend(axes, {name: style for name, style in styles.items() if not name.startswith("peer:")})
        axes.set_xlabel("our time / best peer's time")

    return _svg(draw, height=1.6 + 0.19 * len(cells))


def _growth(record: Record) -> str:
    families = ("context", "batch", "page size")
    curves: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for r in record.passed:
        for family in r.tags.get("families", ()):
            curves[family, r.backend].append((r.tags[family], r.time))
    colours = _colours(record)

    def draw(all_axes) -> None:
        for axes, family in zip(all_axes, families, strict=True):
            for (name, backend), points in curves.items():
                if name != family:
                    continue
                x, y = np.array(sorted(points)).T
                axes.loglog(x, y * 1e3, "o-", color=colours[backend], ms=4, lw=1.4, label=backend)
                if family != "page size":
                    axes.loglog(x, y[0] * 1e3 * x / x[0], ":", color=MUTED, lw=1)
            axes.set_xlabel(family)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.minorticks_off()
        all_axes[0].set_ylabel("milliseconds")
        handles = [matplotlib.lines.Line2D([], [], color=c, label=name) for name, c in colours.items()]
        all_axes[0].legend(handles=handles, frameon=False, fontsize=8)

    return _svg(draw, height=3.2, ncols=3, sharey=True)


def _fractions(record: Record) -> str:
    styles = _styles(record)
    cells = list(dict.fromkeys(r.cell for r in record.passed if not r.tags.get("families")))

    def draw(axes) -> None:
        for r in record.passed:
            if r.cell in cells:
                axes.plot(100 * (r.fraction or 0), cells.index(r.cell), "o", **styles[r.backend])
        _name_rows(axes, cells)
        _legend(axes, styles)
        axes.set_xlabel("% of this machine's ceiling")
        axes.set_xlim(0, 100)

    return _svg(draw, height=1.8 + 0.19 * len(cells))


def _name_rows(axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _legend(axes, styles: dict[str, dict[str, Any]]) -> None:
    """Above the plot, where it hides nothing."""
    for name, style in styles.items():
        axes.plot([], [], "o", label=name, **style)
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _history(records: list[Record]) -> str:
    lines: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.date):
        for r in record.passed:
            lines[r.cell, r.backend].append((record.date, r.time))
    colours = _colours(records[-1])

    def draw(axes) -> None:
        dates = sorted({record.date for record in records})
        for (_, backend), points in lines.items():
            if len(points) > 1:
                first = points[0][1]
                places = [dates.index(date) for date, _ in points]
                axes.plot(
                    places,
                    [s / first for _, s in points],
                    "o-",
                    color=colours.get(backend, MUTED),
                    ms=3,
                    lw=1,
                    alpha=0.6,
                )
        axes.axhline(1, color=INK, lw=0.8)
        axes.set_xticks(range(len(dates)), dates)
        axes.set_ylabel("time / first record's")

    return _svg(draw, height=3)


# ------------------------------------------------------------------ the page

_TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>rpa benchmarks, {{ record.date }}</title><style>
:root { color-scheme: light; --ink: #1f2430; --muted: #7a8194; --line: #e6e8ee; --bad: #c8384b; --good: #2a9d76 }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fafbfc; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 0 } p { color: var(--muted); margin: .2rem 0 .6rem }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem; margin: 1.2rem 0; overflow-x: auto }
svg { width: 100%; height: auto } table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--muted); font-weight: 500 } td, th { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
td.n, th.n { text-align: right } td.why { white-space: normal } .bad { color: var(--bad) } .good { color: var(--good) } code { font-size: 12px }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2rem } .facts b { display: block; font-size: 1.2rem }
</style></head><body>
<h1>Ragged paged attention, benchmarked</h1>
<p>{{ record.date }} · {{ record.ceilings.device }} · {% for name, version in record.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}</p>
<section class="facts">
<div><b>{{ "%.4g"|format(record.ceilings.read / 1e9) }} GB/s</b>read stream</div>
{% for dtype, rate in record.ceilings.burst.items() %}<div><b>{{ "%.3g"|format(rate / 1e12) }} TFLOP/s</b>{{ dtype }}, burst</div>{% endfor %}
<div><b>{{ record.passed|length }} of {{ rows|length }}</b>cells verified and timed</div></section>
{% if comparison %}<section><h2>Compared with an earlier record</h2>
<p class="{{ 'bad' if comparison.failed else 'good' }}">{{ comparison.regressions|length }} slower past 5 % and the noise, {{ comparison.lost|length }} lost their number, {{ comparison.changes|length }} compared.</p>
<table><tr><th>cell<th>backend<th class="n">before, ms<th class="n">after, ms<th class="n">ratio<th class="n">noise</tr>
{% for c in comparison.overall|list + comparison.changes|sort(attribute="ratio", reverse=true)|list %}<tr class="{{ 'bad' if c.regressed else 'good' if c.improved }}"><td><code>{{ c.cell }}</code><td>{{ c.backend }}<td class="n">{{ ms(c.before) }}<td class="n">{{ ms(c.after) }}<td class="n">{{ "%.3f"|format(c.ratio) }}<td class="n">{{ "%.0f"|format(100 * c.noise) }} %</tr>
{% endfor %}</table></section>{% endif %}
{% for title, text, svg in plots %}<section><h2>{{ title }}</h2><p>{{ text }}</p>{{ svg|safe }}</section>
{% endfor %}
{% if denied %}<section><h2>No number</h2><p>A cell that the oracle does not pass is not timed.</p>
<table><tr><th>cell<th>backend<th>why</tr>{% for r in denied %}<tr><td><code>{{ r.cell }}</code><td>{{ r.backend }}<td class="why {{ 'bad' if r.status in ('fail', 'error', 'suspect') }}">{{ r.status }}: {{ r.reason }}</tr>{% endfor %}</table></section>{% endif %}
<section><h2>Every number</h2><p>Time is the least of the samples, on a GPU the median sum of a call's kernels; ± is the noise of one run; host is what a warm call costs its caller.</p>
<table><tr><th>cell<th>backend<th class="n">ms<th class="n">±<th class="n">of ceiling<th class="n">GB/s<th class="n">GFLOP/s<th class="n">error / bound<th class="n">temporaries, MiB<th class="n">compile, s<th class="n">host, µs<th class="n">launches</tr>
{% for r in record.passed %}<tr><td><code>{{ r.cell }}</code><td>{{ r.backend }}<td class="n">{{ ms(r.seconds) }}<td class="n">{{ "%.0f"|format(100 * r.spread) }} %<td class="n">{{ "%.0f"|format(100 * (r.fraction or 0)) }} %<td class="n">{{ "%.1f"|format(r.bytes / r.seconds / 1e9) }}<td class="n">{{ "%.0f"|format(r.flops / r.seconds / 1e9) }}<td class="n">{{ "%.2f"|format(r.ratio) }}<td class="n">{{ "" if r.temp_bytes is none else "%.1f"|format(r.temp_bytes / 1048576) }}<td class="n">{{ "%.1f"|format(r.compile_seconds or 0) }}<td class="n">{{ "" if r.host_seconds is none else "%.0f"|format(r.host_seconds * 1e6) }}<td class="n">{{ "" if r.launches is none else r.launches }}</tr>
{% endfor %}</table></section></body></html>
""")  # noqa: E501
