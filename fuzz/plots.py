"""Small SVG plots, drawn by hand: no script, no font file, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from html import escape
from typing import Any

from fuzz.coverage import AXES, Feature, Pair, valid_pairs, within


def bars(rows: Sequence[tuple[str, float, str]], width: int = 320) -> str:
    """Horizontal bars for values in [0, 1]: (label, value, note)."""
    left, right, line = 92, 64, 20
    scale = width - left - right
    parts = []
    for i, (label, value, note) in enumerate(rows):
        y = i * line
        length = max(1.0, min(value, 1.0) * scale)
        parts.append(
            f"<g><title>{escape(label)}: {value:.3f}, {escape(note)}</title>"
            f'<text class="label" x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="track" x="{left}" y="{y + 4}" width="{scale}" height="12" rx="3"/>'
            f'<rect class="bar" x="{left}" y="{y + 4}" width="{length:.1f}" height="12" rx="3"/>'
            f'<text class="note" x="{left + scale + 8}" y="{y + 14}">{value:.2f}</text></g>'
        )
    return _svg(width, len(rows) * line, parts)


def matrix(seen: Set[Pair], barred: Set[tuple[Feature, ...]] = frozenset(), cell: int = 10) -> str:
    """Pairs of features: tried, possible but not tried, impossible or barred by the target.

    The lower triangle, axes apart by a gap; in the empty squares of the diagonal stand the names of the axes.
    """
    order: list[Feature] = [(axis, value) for axis, values in AXES.items() for value in values]
    gap, left, top = 5, 120, 8
    place, position, last = {}, 0, None
    for feature in order:
        position += gap if last not in (None, feature[0]) else 0
        place[feature], last = position, feature[0]
        position += cell
    valid = valid_pairs()
    parts = [
        f'<text class="label" x="{left - 6}" y="{top + place[f] + cell - 2}" text-anchor="end">'
        f"{escape(name_of(f))}</text>"
        for f in order
    ]
    parts += [
        f'<text class="axis" x="{left + place[axis, values[0]] + 2}" y="{top + place[axis, values[-1]] + cell - 2}">'
        f"{escape(axis.replace('_', ' '))}</text>"
        for axis, values in AXES.items()
    ]
    for i, b in enumerate(order):
        for a in order[:i]:
            if a[0] == b[0]:
                continue
            kind = "hit" if (a, b) in seen else "miss" if (a, b) in valid and not within((a, b), barred) else "void"
            words = {"hit": "tried", "miss": "not tried", "void": "impossible, or not taken"}[kind]
            at = f'x="{left + place[a]}" y="{top + place[b]}" width="{cell - 1}" height="{cell - 1}"'
            parts.append(
                f'<rect class="{kind}" {at}>'
                f"<title>{escape(f'{a[0]} {name(a[1])} with {b[0]} {name(b[1])}: {words}')}</title></rect>"
            )
    return _svg(left + position, top + position + 4, parts, "matrix")


def dots(groups: dict[str, list[tuple[str, int, bool]]], limit: int, width: int = 1000) -> str:
    """Mutants by group on a logarithmic axis of cases to the kill: (id, cases, killed)."""
    left, right, line = 130, 30, 24
    span = width - left - right
    height = len(groups) * line + 34

    def x(cases: int) -> float:
        return left + span * math.log10(max(cases, 1)) / math.log10(max(limit, 10))

    parts = []
    for tick in (t for t in (1, 2, 5, 10, 20, 50, 100, 300, 1000) if t <= limit):
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="6" y2="{height - 26}"/>'
            f'<text class="note" x="{x(tick):.1f}" y="{height - 10}" text-anchor="middle">{tick}</text>'
        )
    for row, (group, mutants) in enumerate(groups.items()):
        y = row * line + 18
        parts.append(f'<text class="label" x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(group)}</text>')
        stacked: dict[int, int] = {}
        for name_, cases, killed in sorted(mutants, key=lambda m: m[1]):
            level = stacked[cases] = stacked.get(cases, -1) + 1
            kind = "dot" if killed else "dot alive"
            told = f"killed after {cases} cases" if killed else "alive"
            parts.append(
                f'<circle class="{kind}" cx="{x(cases) + 5 * level:.1f}" cy="{y}" r="4.5">'
                f"<title>{escape(name_)}: {told}</title></circle>"
            )
    return _svg(width, height, parts)


def name(value: Any) -> str:
    """A feature's value as a reader says it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")


def name_of(feature: Feature) -> str:
    """A feature as a short label."""
    axis = {"kv_heads": "kv heads", "head_dim": "D", "types": ""}.get(feature[0], feature[0])
    return f"{axis} {name(feature[1])}".strip()


def _svg(width: float, height: float, parts: Sequence[str], kind: str = "plot") -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="img" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
