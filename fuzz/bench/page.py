"""One self-contained HTML page of a record: what stands out, ratios to the peers, roofline, growth, history, tables."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from fuzz.bench import plot
from fuzz.bench.plot import Chart, Scale
from fuzz.bench.record import Comparison, Record
from fuzz.bench.run import Result

KINDS = {"decode": "circle", "prefill": "square", "chunk": "diamond", "mixed": "triangle"}
_COLOURS = 12  # classes c0 to c11 of the page's style


@dataclass(frozen=True)
class View:
    """A record as the page shows it."""

    record: Record

    @cached_property
    def names(self) -> dict[str, str]:
        """The colour class of every contender: ours first."""
        found = dict.fromkeys(r.backend for r in self.record.passed)
        ours = sorted(found, key=lambda name: name.startswith("peer:"))
        return {name: f"c{i % _COLOURS}" for i, name in enumerate(ours)}

    def style(self, name: str) -> str:
        """Ours are filled, peers are rings."""
        return f"mark {self.names.get(name, 'c0')}" + (" ring" if name.startswith("peer:") else "")

    @cached_property
    def best_peer(self) -> dict[str, Result]:
        """The fastest verified peer of each cell that has one."""
        best: dict[str, Result] = {}
        for r in self.record.passed:
            if r.backend.startswith("peer:") and (r.cell not in best or r.time < best[r.cell].time):
                best[r.cell] = r
        return best

    @property
    def ours(self) -> list[Result]:
        return [r for r in self.record.passed if not r.backend.startswith("peer:")]

    def legend(self, *, kinds: bool = False, peers: bool = True) -> Markup:
        """What colours and shapes mean."""
        keys = [plot.symbol(self.style(name)) + f"<span>{_short(name)}</span>" for name in self.names
                if peers or not name.startswith("peer:")]  # fmt: skip
        keys += [plot.symbol("mark plain", shape) + f"<span>{kind}</span>" for kind, shape in KINDS.items() if kinds]
        return Markup('<p class="legend">' + "".join(f"<span>{key}</span>" for key in keys) + "</p>")


def render(record: Record, comparison: Comparison | None, history: list[Record], static: Any = None) -> str:
    """The page as text: inline SVG and CSS, no script, nothing fetched from anywhere.

    Args:
        static: the record of the TPU compiler's estimates, where there is one.
    """
    view = View(record)
    return _environment().get_template("page.html.j2").render(
        record=record, comparison=comparison, view=view, summary=_summary(view), ratios=_ratios(view),
        roofline=_roofline(view), growth=_growth(view), ceilings=_fractions(view),
        history=_history([*history, record]) if history else None, static=_static(static),
        denied=[r for r in record.results if r.seconds is None and r.status != "unsupported"],
        unsupported=[r for r in record.results if r.status == "unsupported"],
        duration=duration, short=_short, si=plot.si,
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def duration(seconds: float) -> str:
    """Three digits with a unit.

    >>> duration(0.0123), duration(4.5e-6)
    ('12.3 ms', '4.5 µs')
    """
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if seconds >= s), ("ns", 1e-9))
    return f"{seconds / size:.3g} {unit}"


def _short(name: str) -> str:
    return name.removeprefix("peer:")


def _tell(r: Result) -> str:
    """What is shown when a mark is pointed at."""
    said = f"{r.cell}\n{_short(r.backend)}: {duration(r.time)} ±{100 * (r.spread or 0):.1f} %"
    return said + (f"\n{100 * r.fraction:.0f} % of the ceiling" if r.fraction else "")


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


# ------------------------------------------------------------------ what stands out


def _summary(view: View) -> list[tuple[str, str]]:
    """(figure, what it is), a few of them."""
    limits, passed = view.record.ceilings, view.record.passed
    found = [(f"{plot.si(limits.read, ' ')}B/s", "read stream of this machine")]
    found += [(f"{plot.si(rate, ' ')}FLOP/s", f"{dtype} product, in a burst") for dtype, rate in limits.burst.items()
              if dtype != "float16"]  # fmt: skip
    judged = [r for r in view.record.results if r.status != "unsupported"]
    found.append((f"{len(passed)} of {len(judged)}", "lines verified, and so timed"))
    for name in dict.fromkeys(r.backend for r in view.ours):
        ratios = [r.time / view.best_peer[r.cell].time for r in view.ours
                  if r.backend == name and r.cell in view.best_peer]  # fmt: skip
        if ratios:
            ahead = sum(ratio <= 1 for ratio in ratios)
            found.append((f"{_mean(ratios):.2f} ×", f"{name}: mean time over the best peer's; "
                          f"ahead in {ahead} of {len(ratios)} cells"))  # fmt: skip
    return found


# ------------------------------------------------------------------ charts of rows: HTML, so that they fit any width


@dataclass(frozen=True)
class Row:
    """A cell's marks on a common scale."""

    cell: str
    note: str
    marks: list[tuple[float, str, str]]  # (place in per cent, style, what is told)


@dataclass(frozen=True)
class Rows:
    """Cells one below the other."""

    rows: list[Row]
    ticks: list[tuple[float, str]]  # (place in per cent, label)
    line: float | None = None  # a place to compare with


def _ratios(view: View) -> Rows | None:
    """Everybody's time over the best peer's."""
    cells = [cell for cell in dict.fromkeys(r.cell for r in view.ours) if cell in view.best_peer]
    if not cells:
        return None
    found = {cell: [(r.time / view.best_peer[cell].time, r) for r in view.record.passed if r.cell == cell]
             for cell in cells}  # fmt: skip
    scale = Scale.around([min(4.0, ratio) for marks in found.values() for ratio, _ in marks] + [0.8, 1.25], unit="×")
    rows = []
    for cell, marks in found.items():
        told = [(ratio, r, f"{_tell(r)}\n{ratio:.2f} × the best peer's ({_short(view.best_peer[cell].backend)})")
                for ratio, r in marks]  # fmt: skip
        # Ours last: on top of what they cover.
        told.sort(key=lambda each: not each[1].backend.startswith("peer:"))
        places = [(100 * scale.place(min(ratio, scale.high)), view.style(r.backend), words) for ratio, r, words in told]
        ours = [(ratio, r) for ratio, r in marks if not r.backend.startswith("peer:")]
        note = ", ".join(f"{ratio:.2f}" for ratio, _ in ours)
        rows.append(Row(cell, f"{note} × {_short(view.best_peer[cell].backend).split()[0]}", places))
    values = [value for value in (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4) if scale.low <= value <= scale.high]
    return Rows(rows, [(100 * scale.place(v), f"{v:g}×") for v in values], 100 * scale.place(1.0))


def _fractions(view: View) -> Rows | None:
    """How much of what the machine can do is used."""
    rows = []
    for cell in dict.fromkeys(r.cell for r in view.record.passed):
        own = [r for r in view.record.passed if r.cell == cell and r.fraction]
        own.sort(key=lambda r: not r.backend.startswith("peer:"))
        marks = [(100 * min(1.0, r.fraction or 0), view.style(r.backend), _tell(r)) for r in own]
        floor = own[0].floor if own else None
        rows.append(Row(cell, f"floor {duration(floor)}" if floor else "", marks))
    return Rows(rows, [(at, f"{at} %") for at in (0, 25, 50, 75, 100)]) if rows else None


# ------------------------------------------------------------------ charts on two axes


def _roofline(view: View) -> Markup | None:
    """Where each cell lies under the machine's roof."""
    passed, limits = [r for r in view.record.passed if r.flops and r.bytes], view.record.ceilings
    if not passed:
        return None
    x = Scale.around([r.flops / r.bytes for r in passed] + [1.0, 300.0], room=0.05)
    top = max(limits.burst.values())
    y = Scale.around([r.flops / r.time for r in passed] + [top * 1.6], room=0.04)
    chart = Chart(x, y, "operations for each byte that must move", "operations per second", 860, 470)
    parts = []
    for dtype, style in (("float32", "roof dashed"), ("bfloat16", "roof")):
        peak = limits.burst[dtype]
        points = [(at, min(at * limits.read, peak)) for at in np.geomspace(x.low, x.high, 120)]
        points = [point for point in points if y.low <= point[1] <= y.high]
        parts.append(chart.line(points, style, f"ceiling, {dtype}: {plot.si(peak)}FLOP/s, {plot.si(limits.read)}B/s"))
        if x.low < peak / limits.read < x.high / 1.5:  # beside the bend, where no cell can lie above it
            words = f"{dtype} {plot.si(peak, ' ')}FLOP/s"
            parts.append(chart.text(peak / limits.read, peak, words, "note end", (-8, -5)))
    for r in sorted(passed, key=lambda r: not r.backend.startswith("peer:")):
        shape, size = KINDS.get(r.tags.get("kind", ""), "circle"), 3.6 if r.backend.startswith("peer:") else 4.8
        told = f"{_tell(r)}\n{plot.si(r.flops / r.time)}FLOP/s, {plot.si(r.bytes / r.time)}B/s"
        parts.append(chart.mark(r.flops / r.bytes, r.flops / r.time, view.style(r.backend), told, shape, size))
    return Markup(chart.svg(*parts, name="roofline: operations per second over operations per byte"))


def _growth(view: View) -> list[dict[str, Any]]:
    """A chart for each family: time against what grows, with the line that fits and how straight it is."""
    found: dict[str, dict[str, list[tuple[float, Result]]]] = defaultdict(lambda: defaultdict(list))
    for r in view.record.passed:
        for family in r.tags.get("families", ()):
            found[family][r.backend].append((r.tags[family], r))
    times = [r.time for curves in found.values() for points in curves.values() for _, r in points]
    return [_grown(view, family, curves, times) for family, curves in found.items()
            if any(len(points) > 1 for points in curves.values())]  # fmt: skip


def _grown(view: View, family: str, curves: dict[str, list[tuple[float, Result]]], times: list[float]) -> Any:
    """`times` are those of all families: one scale for all, so that flat looks flat."""
    points = [(at, r.time) for own in curves.values() for at, r in own]
    label = {"context": "tokens in each context", "batch": "sequences", "page size": "tokens in a page"}[family]
    places = tuple((at, _count(at)) for at in sorted({at for at, _ in points}))
    chart = Chart(
        Scale.around([at for at, _ in points]), Scale.around(times, unit="s"), label, "time", 340, 300, places
    )
    parts, fits = [], []
    for backend, own in curves.items():
        own.sort(key=lambda point: point[0])
        colour = view.names[backend]
        parts.append(chart.line([(at, r.time) for at, r in own], f"curve {colour}"))
        if len(own) > 1:
            fits.append((backend, _fit([(at, r.time) for at, r in own], family)))
        parts += [chart.mark(at, r.time, view.style(backend), _tell(r), size=3.8) for at, r in own]
    fewest = min(at for at, _ in points)
    start = min(time for at, time in points if at == fewest)
    if family != "page size":
        line = [(at, start * at / fewest) for at in np.geomspace(fewest, chart.x.high, 30)]
        line = [point for point in line if point[1] <= chart.y.high]
        parts.insert(0, chart.line(line, "proportional", "in proportion, from the first point"))
    return {"family": family, "svg": Markup(chart.svg(*parts, name=f"time over {label}")), "fits": fits}


def _count(n: float) -> str:
    return f"{n / 1024:.0f}k" if n >= 1024 and n % 1024 == 0 else f"{n:.0f}"


def _fit(points: list[tuple[float, float]], family: str) -> str:
    """What one more token, sequence or doubling of the page costs, and the exponent of the whole curve."""
    x, y = np.array(points).T
    exponent = np.polyfit(np.log(x), np.log(y), 1)[0]
    if family == "page size":
        return f"from {duration(y.min())} to {duration(y.max())}: × {y.max() / y.min():.2f} at most"
    # Least squares of relative errors: the short end counts as much as the long one.
    slope, start = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1) / y[:, None], np.ones_like(y), rcond=None)[0]
    off = np.abs((slope * x + start) / y - 1).max()
    unit = "a token" if family == "context" else "a sequence"
    return (f"{duration(max(0.0, start))} + {duration(max(1e-12, slope))} {unit}, within {100 * off:.0f} %; "
            f"grows as {family} to the {exponent:.2f}")  # fmt: skip


def _history(records: list[Record]) -> Markup | None:
    """The same cells in earlier records, as a ratio to the first that has them."""
    ordered = sorted(records, key=lambda record: record.date)  # stable: the newest of a day stays last
    lines: dict[tuple[str, str], list[tuple[int, Result]]] = defaultdict(list)
    for place, record in enumerate(ordered):
        for r in record.passed:
            lines[r.cell, r.backend].append((place, r))
    lines = {key: points for key, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    ratios = [r.time / points[0][1].time for points in lines.values() for _, r in points]
    dates = tuple((float(place), record.date) for place, record in enumerate(ordered))
    chart = Chart(Scale(-0.2, len(ordered) - 0.8, log=False), Scale.around([*ratios, 0.8, 1.25], unit="×"),
                  "record", "time over the first record's", 860, 340, dates)  # fmt: skip
    view = View(records[-1])
    parts = [chart.line([(-0.2, 1.0), (len(ordered) - 0.8, 1.0)], "roof")]
    for (_, backend), points in lines.items():
        first = points[0][1].time
        parts.append(
            chart.line([(at, r.time / first) for at, r in points], f"curve thin {view.names.get(backend, 'c0')}")
        )
        parts += [chart.mark(at, r.time / first, view.style(backend), f"{ordered[at].date}\n{_tell(r)}", size=3)
                  for at, r in points]  # fmt: skip
    return Markup(chart.svg(*parts, name="time of each cell over its time in the first record"))


# ------------------------------------------------------------------ the compiler's word on TPUs


def _static(found: Any) -> dict[str, Any] | None:
    """Bundles that the TPU compiler scheduled, beside the cycles in which the memory delivers."""
    if not found:
        return None
    shapes = {"llama_page16": "Llama-3-8B heads, page 16", "llama_page32": "page 32", "fp8_e4m3": "page 32, e4m3 pages",
              "int8": "page 32, int8 pages", "gpt_oss_d64": "gpt-oss heads", "gemma_d256": "Gemma heads"}  # fmt: skip
    chips = [chip for chip in ("v5e", "v6e", "tpu7x") if chip in found["chips"]]
    rows = []
    for shape, words in shapes.items():
        own = [found["chips"][chip].get(shape) for chip in chips]
        cells = [
            (f"{r['decode']['bundles']} / {r['hbm_cycles']}", r["static_bandwidth_use"]) if r else None for r in own
        ]
        rows.append((words, cells))
    return {"libtpu": found["libtpu"], "chips": chips, "rows": rows}
