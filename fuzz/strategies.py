"""How plans are made of a few numbers: the static shape from a bounded pool, then the raggedness inside it.

`fuzz.draws` has Hypothesis draw the numbers; one of them seeds the small choices. A plan spells everything out, and the
shrinker of `fuzz.shrink` works on the plan, so nothing that is derived here is out of its reach.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from fuzz.plan import AMPLITUDES, DATA, HOLES, ROUNDED, TABLES, TYPES, Plan, Shape

MODES = ("mixed", "decode", "prefill", "chunk", "wild")
# Data whose roundings are independent enough for the probabilistic bound.
RANDOM_DATA = ("normal", "peaky")
# Weights by repetition.
_DATA = (*DATA, "spikes", "spikes", "spikes", "exact", "exact", "exact", "ladder", "normal")
# Only logits that neither a cap nor a sink holds overflow, or leave nothing.
_HELD, _LOOSE = (*_DATA, "exact", "ladder", "normal", "spikes"), (*_DATA, "cliff", "cliff", "cliff", "ladder")
CHECKS = ("second_fill",) * 30 + ("relation",) * 34 + ("plain",) * 55 + ("repeat",)
CROWDS = 8
FAR = 2**15  # contexts as long as this are what some shapes are for
# One case of so many of such a shape holds one: little work in a window, else 10 ms, and 50 where queries are wide.
FAR_WINDOWED, FAR_WHOLE, FAR_WIDE = 2, 8, 32
WIDE = 32  # query heads * head_dim past which a row is wide here
LITTER, MATES = 64, 4  # plans of one draw, and how many of them are of one shape
STYLES = len(_HELD) * len(MODES) * len(CHECKS) * CROWDS


def litter(pool: Sequence[Shape], first: int, style: int, seed: int) -> tuple[Plan, ...]:
    """`LITTER` plans of different styles: `MATES` of each of a few shapes of `pool`, in turn.

    What is of one shape, with random data or without, is analysed together: random data goes to as few shapes as hold
    it. In turn, for a bug is found by the shape as often as by the style.
    """
    shapes = LITTER // MATES
    step = max(1, len(pool) // shapes)
    styles = sorted(((style + i) % STYLES for i in range(LITTER)), key=lambda style: not _is_random(style))
    turns = [(mate, shape) for mate in range(MATES) for shape in range(shapes)]
    seeds = [(seed + 40_503 * (shape + mate * (shapes + 1))) % 2**20 for mate, shape in turns]  # mates' are unlike too
    return tuple(
        styled(pool[(first + step * shape) % len(pool)], styles[MATES * shape + mate], own)
        for (mate, shape), own in zip(turns, seeds, strict=True)
    )


def first_plans(shape: Shape, chance: random.Random, count: int) -> list[Plan]:
    """The first plans of a new shape; one of four at least holds a sequence as long as the shape is for."""
    seeds = [FAR_WIDE * chance.randrange(2**20 // FAR_WIDE) + i for i in range(count)]
    return [styled(shape, chance.randrange(STYLES), seed) for seed in seeds]


def _is_random(style: int) -> bool:
    """Whether the data of a style is of those that the probabilistic bound is for."""
    return _HELD[style * 7919 % STYLES % len(_HELD)] in RANDOM_DATA


def styled(shape: Shape, style: int, seed: int) -> Plan:
    """The plan of three drawn numbers; `style` counts through data, mode, check and crowd, mixed well."""
    style = style * 7919 % STYLES  # a prime that shares no factor with it: neighbours are nothing alike
    style, data = divmod(style, len(_HELD))
    style, mode = divmod(style, len(MODES))
    crowd, check = divmod(style, len(CHECKS))
    words = _LOOSE if shape.cap is None and not shape.sinks else _HELD
    return expand(shape, words[data], MODES[mode], CHECKS[check], crowd, seed)


def expand(shape: Shape, data: str, mode: str, check: str, crowd: int, seed: int) -> Plan:
    """The plan of these choices, the small ones seeded; `crowd` of 8 says how full the batch is."""
    chance = random.Random(seed)
    contexts = power_contexts(shape) if data == "exact" else likely_contexts(shape)
    far = [_far(chance, shape, data)] if is_far(shape, seed) else []
    return Plan(
        shape,
        _lengths(chance, shape, mode, contexts, _count(chance, crowd, shape.seqs), far),
        tables=chance.choice(TABLES),
        holes=chance.choice(HOLES),
        data=data,
        amplitude=_amplitude(chance, shape, data),
        seed=seed & 0xFFFF,
        check=check,
    )


def _amplitude(chance: random.Random, shape: Shape, data: str) -> float:
    """As loud as a bound allows that still tells right from wrong."""
    amplitude = chance.choice(AMPLITUDES)
    if data == "peaky" and TYPES[shape.types][2] != "float32":
        return 0.35 if shape.types in ROUNDED else 0.7
    if data == "ladder":
        return 0.5 if shape.types in ROUNDED else max(amplitude, 1.0)
    return amplitude


def _count(chance: random.Random, crowd: int, seqs: int) -> int:
    """The number of live sequences: mostly few, sometimes all, rarely none."""
    if crowd == 7:
        return chance.choice([seqs, seqs, seqs, 0])
    return chance.randint(1, min(seqs, 2 + crowd))


def is_far(shape: Shape, seed: int) -> bool:
    """Whether the plan of a seed holds a sequence as long as its shape is for."""
    return shape.capacity > FAR and seed % far_of(shape) == 0


def far_of(shape: Shape) -> int:
    """One case of how many of a long shape holds a long context."""
    if _windowed(shape):
        return FAR_WINDOWED
    return FAR_WIDE if shape.q_heads * shape.head_dim > WIDE else FAR_WHOLE


def _windowed(shape: Shape) -> bool:
    return shape.window is not None and shape.window < FAR


def _far(chance: random.Random, shape: Shape, data: str) -> tuple[int, int]:
    """(query rows, context) of the long sequence of a case."""
    edges = (FAR - 1, FAR, FAR, FAR + 1, FAR + 200, shape.capacity, shape.capacity - 1)
    if data == "exact" and not _windowed(shape):
        edges = (FAR,)  # a power of two
    rows = chance.choice((1, 1, 2)) if _windowed(shape) else 1
    return rows, chance.choice(edges)


def _lengths(
    chance: random.Random, shape: Shape, mode: str, contexts: tuple[int, ...], count: int, far: list[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """(query rows, context) of each live sequence, near the edges of pages, windows and blocks; `far` among them."""
    left, chosen = shape.tokens - sum(rows for rows, _ in far), []
    for _ in range(count - len(far)):
        context = chance.choice(contexts)
        rows = _rows(chance, mode, context, left)
        left -= rows
        chosen.append((rows, context))
    place = chance.randint(0, len(chosen)) if far else 0
    return (*chosen[:place], *far, *chosen[place:])


def _rows(chance: random.Random, mode: str, context: int, left: int) -> int:
    most = min(context, left)
    if mode == "decode" or left == 0:
        return min(1, left)
    if mode == "prefill":
        return most
    if mode == "chunk":
        return chance.randint(0, most)
    if mode == "wild":  # more rows than tokens too: the first ones stand before position 0
        return chance.randint(0, left)
    return chance.choice([1, 1, 0, most, most // 2, min(5, left), min(most, 9)]) if left else 0


@lru_cache(maxsize=4096)
def likely_contexts(shape: Shape) -> tuple[int, ...]:
    """Context lengths to draw from: half of them at an edge, half spread over what the table holds."""
    capacity = shape.capacity
    if capacity > FAR:  # beside the long one
        return 1, 5, shape.page, shape.page + 1
    edges = {0, 1, 2, capacity, capacity - 1}
    for step in {shape.page, 8, 16, 32, 64, 128, shape.window or 1}:
        edges.update(k * step + off for k in (1, 2, 3) for off in (-1, 0, 1))
    inside = sorted(e for e in edges if 0 <= e <= capacity)
    spread = [round(i * capacity / len(inside)) for i in range(len(inside))]
    return (*inside, *spread)


@lru_cache(maxsize=4096)
def power_contexts(shape: Shape) -> tuple[int, ...]:
    """Contexts whose last row sees a power of two of keys: what the exact stratum can judge."""
    powers = [1 << k for k in range(shape.capacity.bit_length()) if 1 << k <= shape.capacity]
    if shape.capacity > FAR:
        powers = [1, 4, 16]
    window = shape.window
    if window is not None and window & (window - 1) == 0:
        powers += [c for c in likely_contexts(shape) if c >= window] or [powers[-1]]
    return tuple(powers)
