"""The stream of static shapes: a campaign compiles little, so each shape must try much that is new.

Every shape is a choice of one value for each axis. They come in an order that covers all pairs of values in about
sixty shapes and then the triples, a covering array built greedily (after AETG of Cohen et al., 1997).
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from fuzz.plan import CAPS, GROUPS, HEAD_DIMS, KV_HEADS, PAGES, SCALES, TYPES, WINDOWS, Shape

TIERS = ("small", "medium", "wide", "deep", "long")
Value = tuple[str, Any]  # an axis and its value
Choice = dict[str, Any]  # axis -> value

# Features of a shape that a pair may be asked of; the tier stands for tokens, sequences and table width.
AXES: dict[str, tuple[Any, ...]] = {
    "types": tuple(TYPES),
    "page": PAGES,
    "kv_heads": KV_HEADS,
    "group": GROUPS,
    "head_dim": HEAD_DIMS,
    "window": WINDOWS,
    "cap": CAPS,
    "sinks": (False, True),
    "tier": TIERS,
    "scale": SCALES,
    "lse": (False, True),
}
# tokens, sequences, capacity aimed at, widest heads * head_dim
_TIER = {
    "small": (12, 4, 40, 1024),
    "medium": (20, 4, 150, 512),
    "wide": (44, 36, 24, 256),
    "deep": (6, 3, 0, 256),
    "long": (3, 3, 33_000, 64),
}
_DEEP = (65, 100, 127)


def allowed(choice: Choice) -> bool:
    """Whether a combination is worth its time: rows times heads stay small where contexts are long."""
    width = choice["kv_heads"] * choice["group"] * choice["head_dim"]
    if choice["tier"] == "deep" and choice["page"] > 8:  # thousands of keys, and nothing more to see
        return False
    if choice.get("window") == "page" and (choice["page"] == 1 or choice["page"] >= _TIER[choice["tier"]][2] > 0):
        return False  # it would be another kind of window
    if choice["tier"] == "long":
        return choice["page"] >= 16 and width <= _TIER["long"][3] and choice["types"] in ("f32", "bf16", "f16")
    return width <= _TIER[choice["tier"]][3]


def shape_of(choice: Choice, jitter: int = 0) -> Shape:
    """The shape for one value of every axis."""
    tokens, seqs, capacity, _ = _TIER[choice["tier"]]
    page = choice["page"]
    per_seq = _DEEP[jitter % 3] if choice["tier"] == "deep" else max(1, -(-capacity // page))
    slots = 96 if choice["tier"] == "long" else seqs * per_seq * page
    slots = min(slots, max(48, 24_000 // (choice["kv_heads"] * choice["head_dim"] * 2)))
    head_dim = choice["head_dim"]
    return Shape(
        tokens=tokens + jitter % (8 if choice["tier"] == "wide" else 4),
        seqs=seqs,
        pages=max(2, -(-slots // page)) + 2,
        pages_per_seq=per_seq,
        page=page,
        kv_heads=choice["kv_heads"],
        group=choice["group"],
        head_dim=head_dim,
        types=choice["types"],
        window=_window(choice["window"], page, per_seq * page, jitter),
        cap=choice["cap"],
        sinks=choice["sinks"],
        scale={"default": None, "unit": 1.0, "odd": 0.3}[choice["scale"]],
        lse=choice["lse"],
    )


def _window(kind: str, page: int, capacity: int, jitter: int) -> int | None:
    wide = 17 + 16 * (jitter % 3 if capacity > 60 else 0)
    few = 2 + jitter % 5
    few += few == page  # else it would be the window of another kind
    return {"none": None, "one": 1, "few": few, "page": max(2, page), "wide": wide,
            "over": capacity + jitter % 2}[kind]  # fmt: skip


def shapes(seed: int) -> Iterator[Shape]:
    """An endless stream of shapes, the same for the same seed.

    The first shapes are switched full of options, since an option that is off can hide no bug; in the deep one every
    key is seen, so that kernels with blocks of hundreds of keys take several.
    """
    stream = _stream(seed)
    for count in itertools.count():
        yield stream.shape(count)


def first_shapes(seed: int, count: int) -> tuple[Shape, ...]:
    """The first `count` shapes of the stream."""
    return tuple(itertools.islice(shapes(seed), count))


@lru_cache(maxsize=16)
def _stream(seed: int) -> _Stream:
    return _Stream(seed)


class _Stream:
    """The shapes so far, and how often each pair and triple of values stands in one."""

    def __init__(self, seed: int):
        self.chance = random.Random(seed)
        self.found: list[Shape] = []
        self.pairs: Counter[tuple[Value, ...]] = Counter()
        self.triples: Counter[tuple[Value, ...]] = Counter()
        self.open = [pair for pair in _pairs_of_axes() if possible(dict(pair))]
        self.chance.shuffle(self.open)

    def shape(self, index: int) -> Shape:
        while len(self.found) <= index:
            count = len(self.found)
            choice = _OPENING[count] if count < len(_OPENING) else self._next()
            self.pairs.update(itertools.combinations(choice.items(), 2))
            self.triples.update(itertools.combinations(choice.items(), 3))
            self.found.append(shape_of(choice, count))
        return self.found[index]

    def _next(self) -> Choice:
        """The best of a few choices: each holds a pair that is new, as long as there is one."""
        while self.open and self.pairs[self.open[-1]]:
            self.open.pop()
        start = dict(self.open[-1]) if self.open else {}
        drafts = [draft for draft in (self._draft(start) for _ in range(6)) if draft is not None]
        return max(drafts, key=self._news) if drafts else self._draw()

    def _news(self, choice: Choice) -> tuple[int, int]:
        """How many pairs and triples a choice would be the first to hold."""
        items = choice.items()
        return (sum(not self.pairs[pair] for pair in itertools.combinations(items, 2)),
                sum(not self.triples[triple] for triple in itertools.combinations(items, 3)))  # fmt: skip

    def _draft(self, start: Choice) -> Choice | None:
        """One axis after the other, each set to the value that is new beside most of those before it."""
        choice, axes = dict(start), [axis for axis in AXES if axis not in start]
        self.chance.shuffle(axes)
        for axis in axes:
            values = [value for value in AXES[axis] if possible({**choice, axis: value})]
            if not values:
                return None
            if axis == "tier" and self.chance.random() < 0.5:  # a long context is dear, and one feature only
                values = [value for value in values if value != "long"] or values
            self.chance.shuffle(values)
            choice[axis] = max(values, key=lambda value: self._new_beside(choice, (axis, value)))
        return {axis: choice[axis] for axis in AXES}

    def _new_beside(self, choice: Choice, value: Value) -> tuple[int, int]:
        held = sorted([*choice.items(), value], key=lambda item: _PLACE[item[0]])
        pairs = (pair for pair in itertools.combinations(held, 2) if value in pair)
        if self.open:
            return sum(not self.pairs[pair] for pair in pairs), 0
        triples = (triple for triple in itertools.combinations(held, 3) if value in triple)
        return 0, sum(not self.triples[triple] for triple in triples)

    def _draw(self) -> Choice:
        while True:
            choice = {axis: self.chance.choice(values) for axis, values in AXES.items()}
            if allowed(choice):
                return choice


_PLACE = {axis: place for place, axis in enumerate(AXES)}
# The least demanding choices; a combination is possible when it is allowed on top of one of these.
_LEAST: tuple[Choice, ...] = tuple(
    {"types": "f32", "kv_heads": 1, "group": 1, "head_dim": 3, "tier": "small", "page": page} for page in (4, 16)
)


def possible(choice: Choice) -> bool:
    """Whether some allowed choice holds these values."""
    return any(allowed({**least, **choice}) for least in _LEAST)


def _pairs_of_axes() -> list[tuple[Value, ...]]:
    return [((a, x), (b, y)) for (a, xs), (b, ys) in itertools.combinations(AXES.items(), 2) for x in xs for y in ys]


def _opening(*rows: str) -> tuple[Choice, ...]:
    parsed = []
    for row in rows:
        types, page, kv, group, dim, window, cap, sinks, tier, scale, lse = row.split()
        options = (window, None if cap == "-" else float(cap), sinks == "sinks", tier, scale, lse == "lse")
        parsed.append(dict(zip(AXES, (types, int(page), int(kv), int(group), int(dim), *options), strict=True)))
    return tuple(parsed)


#   types page kv group D window cap sinks tier scale lse
_OPENING = _opening(
    "f32         4 2 3   8 few  5  sinks small  odd       -",
    "bf16        3 3 2  20 none -  none  small  default   lse",
    "f32         8 1 4   8 none -  none  deep   default   -",
    "f32        16 2 2   8 page 30 sinks medium unit      lse",
    "f16         4 3 1  72 one  -  sinks small  default   -",
    "f32         1 2 2   3 none 5  none  wide   default   -",
    "bf16_as_f32 16 1 2  8 few  -  none  long   default   lse",
    "int8        8 2 2  64 none 30 sinks medium default   -",
    "f32        32 1 2   8 wide 5  sinks long   default   lse",
)
