"""Plans: the small description that Hypothesis draws, the shrinker reduces and a builder turns into a `Case`.

A plan has two halves. The `Shape` is all that a compiled kernel may depend on, and comes from a bounded stream, so
that a campaign compiles little; the rest (lengths, tables, data) varies freely inside it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# (queries, pages, dot operands)
TYPES = {
    "f32": ("float32", "float32", "float32"),
    "bf16": ("bfloat16", "bfloat16", "bfloat16"),
    "f16": ("float16", "float16", "float16"),
    "f32_as_bf16": ("float32", "float32", "bfloat16"),
    "bf16_as_f32": ("bfloat16", "bfloat16", "float32"),
    "e4m3": ("bfloat16", "float8_e4m3fn", "bfloat16"),
    "e5m2": ("float32", "float8_e5m2", "float32"),
    "int8": ("bfloat16", "int8", "bfloat16"),
}
PAGES = (1, 3, 4, 8, 16, 32)
KV_HEADS = (1, 2, 3)
GROUPS = (1, 2, 3, 4, 8)
HEAD_DIMS = (3, 8, 20, 64, 72, 128)
WINDOWS = ("none", "one", "few", "page", "wide", "over")
CAPS = (None, 5.0, 30.0)
TIERS = ("small", "medium", "wide", "deep", "long")
SCALES = ("default", "unit", "odd")

TABLES = ("identity", "shuffled", "reversed", "shared", "repeated")
HOLES = ("minus_one", "max", "alias")
DATA = ("normal", "spikes", "ladder", "equal", "offset", "peaky", "zero", "exact")
AMPLITUDES = (1.0, 3.0, 0.1)


@dataclass(frozen=True)
class Shape:
    """What is static about a call; equal shapes share one compilation."""

    tokens: int
    seqs: int
    pages: int
    pages_per_seq: int
    page: int
    kv_heads: int
    group: int
    head_dim: int
    types: str  # a key of TYPES
    window: int | None = None
    cap: float | None = None
    sinks: bool = False
    scale: float | None = None

    @property
    def capacity(self) -> int:
        return self.pages_per_seq * self.page

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def quantised(self) -> bool:
        return self.types in ("e4m3", "e5m2", "int8")


@dataclass(frozen=True)
class Plan:
    """One case in a few words; `fuzz.build.build` gives the case, always the same one."""

    shape: Shape
    lengths: tuple[tuple[int, int], ...]  # (query rows, context length) of each live sequence
    tables: str = "shuffled"
    holes: str = "minus_one"
    data: str = "normal"
    amplitude: float = 1.0  # standard deviation of the logits
    seed: int = 0
    check: str = "second_fill"

    def __post_init__(self) -> None:
        shape = self.shape
        if sum(q for q, _ in self.lengths) > shape.tokens or len(self.lengths) > shape.seqs:
            raise ValueError(f"lengths {self.lengths} do not fit {shape.tokens} tokens and {shape.seqs} sequences")
        if any(q < 0 or not 0 <= c <= shape.capacity for q, c in self.lengths):
            raise ValueError(f"lengths {self.lengths} leave the capacity of {shape.capacity} tokens")

    def replace(self, **changes: Any) -> Plan:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote; `ValueError` on anything else."""
        try:
            data = json.loads(text) if isinstance(text, str) else dict(text)
            data["shape"] = Shape(**data["shape"])
            data["lengths"] = tuple((int(q), int(c)) for q, c in data["lengths"])
            return cls(**data)
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no plan: {error}") from error

    def __str__(self) -> str:
        s = self.shape
        options = [f"window {s.window}"] if s.window is not None else []
        options += [f"cap {s.cap:g}"] if s.cap is not None else []
        options += ["sinks"] if s.sinks else []
        lengths = ", ".join(f"{q}/{c}" for q, c in self.lengths[:6]) + (", …" if len(self.lengths) > 6 else "")
        return (f"{s.types}, page {s.page}, heads {s.q_heads}/{s.kv_heads}, D {s.head_dim}"
                f"{''.join(', ' + o for o in options)}; queries/context {lengths or 'none'}; "
                f"{self.data} data, {self.tables} pages")  # fmt: skip


SMALLEST = Plan(Shape(1, 1, 1, 1, 1, 1, 1, 4, "f32"), ((1, 1),))


# ---------------------------------------------------------------- the stream of shapes

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


def allowed(choice: dict[str, Any]) -> bool:
    """Whether a combination is worth its time: rows times heads stay small where contexts are long."""
    width = choice["kv_heads"] * choice["group"] * choice["head_dim"]
    if choice["tier"] == "deep" and choice["page"] > 8:  # thousands of keys, and nothing more to see
        return False
    if choice["tier"] == "long":
        return choice["page"] >= 16 and width <= _TIER["long"][3] and choice["types"] in ("f32", "bf16", "f16")
    return width <= _TIER[choice["tier"]][3]


def shape_of(choice: dict[str, Any], jitter: int = 0) -> Shape:
    """The shape for one value of every axis."""
    tokens, seqs, capacity, _ = _TIER[choice["tier"]]
    page = choice["page"]
    per_seq = _DEEP[jitter % 3] if choice["tier"] == "deep" else max(1, -(-capacity // page))
    slots = 96 if choice["tier"] == "long" else seqs * per_seq * page
    slots = min(slots, max(48, 24_000 // (choice["kv_heads"] * choice["head_dim"] * 2)))
    head_dim = choice["head_dim"]
    return Shape(
        tokens=tokens + jitter % 4,
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
    )


def _window(kind: str, page: int, capacity: int, jitter: int) -> int | None:
    wide = 17 + 16 * (jitter % 3 if capacity > 60 else 0)
    return {"none": None, "one": 1, "few": 2 + jitter % 5, "page": max(2, page), "wide": wide,
            "over": capacity + jitter % 2}[kind]  # fmt: skip


def shapes(seed: int) -> Iterator[Shape]:
    """An endless stream of shapes that covers pairs of axes greedily; the same stream for the same seed.

    The first shapes are switched full of options, since an option that is off can hide no bug.
    """
    chance = random.Random(seed)
    yield from (shape_of(choice, i) for i, choice in enumerate(_OPENING))
    open_pairs = _pairs_of_axes()
    for choice in _OPENING:
        open_pairs -= _pairs(choice)
    for count in itertools.count(len(_OPENING)):
        if not open_pairs:
            open_pairs = _pairs_of_axes()
        best = max((_draw(chance) for _ in range(48)), key=lambda c: len(_pairs(c) & open_pairs))
        if not _pairs(best) & open_pairs:
            best = _forced(chance, min(open_pairs, key=repr))
            if best is None:
                open_pairs.discard(min(open_pairs, key=repr))
                continue
        open_pairs -= _pairs(best)
        yield shape_of(best, count)


@lru_cache(maxsize=64)
def first_shapes(seed: int, count: int) -> tuple[Shape, ...]:
    """The first `count` shapes of the stream."""
    return tuple(itertools.islice(shapes(seed), count))


def _draw(chance: random.Random) -> dict[str, Any]:
    while True:
        choice = {axis: chance.choice(values) for axis, values in AXES.items()}
        if choice["tier"] == "long" and chance.random() < 0.7:  # dear, and one feature only
            continue
        if allowed(choice):
            return choice


def _forced(chance: random.Random, pair: tuple[tuple[str, Any], ...]) -> dict[str, Any] | None:
    """A choice that holds a pair, or None where no allowed choice does."""
    for _ in range(400):
        choice = {axis: chance.choice(values) for axis, values in AXES.items()} | dict(pair)
        if allowed(choice):
            return choice
    return None


def _pairs(choice: dict[str, Any]) -> set[tuple[tuple[str, Any], ...]]:
    return set(itertools.combinations(choice.items(), 2))


def _pairs_of_axes() -> set[tuple[tuple[str, Any], ...]]:
    return {((a, x), (b, y)) for (a, xs), (b, ys) in itertools.combinations(AXES.items(), 2) for x in xs for y in ys}


def _opening(*rows: str) -> tuple[dict[str, Any], ...]:
    parsed = []
    for row in rows:
        types, page, kv, group, dim, window, cap, sinks, tier, scale = row.split()
        parsed.append(dict(zip(AXES, (types, int(page), int(kv), int(group), int(dim), window,
                      None if cap == "-" else float(cap), sinks == "sinks", tier, scale), strict=True)))  # fmt: skip
    return tuple(parsed)


#   types page kv group D window cap sinks tier scale
_OPENING = _opening(
    "f32         4 2 3   8 few  5  sinks small  odd",
    "bf16        3 3 2  20 none -  none  small  default",
    "f32         8 1 4   8 wide -  none  deep   default",
    "f32        16 2 2   8 page 30 sinks medium unit",
    "f16         4 3 1  72 one  -  sinks small  default",
    "f32         1 2 2   3 none 5  none  wide   default",
    "bf16_as_f32 16 1 2  8 few  -  none  long   default",
    "int8        8 2 2  64 none 30 sinks medium default",
    "f32        32 1 2   8 wide 5  sinks long   default",
)
