"""Hypothesis strategies for plans, apart from what makes plans of numbers: Hypothesis takes half a second to import.

It draws three numbers for every sixty-four plans, because a drawn example costs as much as half of a judged case.

The numbers are drawn digit by digit. Into integers of a hundred and more Hypothesis mixes constants out of whatever
modules are imported, so that a seed would mean other plans in another process; and it draws large ones mostly near 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from fuzz.plan import Plan, Shape
from fuzz.strategies import litter

_DIGIT = st.integers(0, 99)


@st.composite
def plans(draw: st.DrawFn, pool: Sequence[Shape]) -> Plan:
    """Plans whose shape is one of `pool`."""
    return draw(litters(pool))[0]


@st.composite
def litters(draw: st.DrawFn, pool: Sequence[Shape]) -> tuple[Plan, ...]:
    """Litters of plans whose shapes are in `pool`."""
    a, b, c, d, e, f, g, h = (draw(_DIGIT) for _ in range(8))
    return litter(pool, 100 * a + b, 10_000 * c + 100 * d + e, 10_000 * f + 100 * g + h)
