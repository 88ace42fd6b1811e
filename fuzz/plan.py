"""Plans: the small description that Hypothesis draws, the shrinker reduces and a builder turns into a `Case`.

A plan has two halves. The `Shape` is all that a compiled kernel may depend on, and comes from a bounded stream
(`fuzz.stream`), so that a campaign compiles little; the rest (lengths, tables, data) varies freely inside it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
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
# Where a kernel rounds the operands of its dots: large logits would leave no bound to judge by.
ROUNDED = frozenset({"f32_as_bf16", "e4m3", "int8"})
# A word stands for several numbers that are one feature: a bug of one of them is mostly one of the others too.
PAGES = (1, 3, "4-8", 16, 32, "64-128")
KV_HEADS = (1, 2, "3-8")
GROUPS = (1, 2, "3,5-7", 4, "8-16")
HEAD_DIMS = ("3,20", 8, 64, "72-112", 128, "192-256")
# (axis, word) -> its numbers, the plainest first, which a shape holds unless another fits too
SIZES = {
    ("page", "4-8"): (8, 4),
    ("page", "64-128"): (64, 128),
    ("kv_heads", "3-8"): (3, 5, 4, 8),
    ("group", "3,5-7"): (3, 7, 5, 6),
    ("group", "8-16"): (8, 16, 12),
    ("head_dim", "3,20"): (3, 20),
    ("head_dim", "72-112"): (72, 96, 80, 112),
    ("head_dim", "192-256"): (256, 192),
}
_WORDS = {(axis, number): word for (axis, word), numbers in SIZES.items() for number in numbers}
WINDOWS = ("none", "one", "few", "page", "wide", "over")
CAPS = (None, 5.0, 30.0)
SCALES = ("default", "unit", "odd")

TABLES = ("identity", "shuffled", "reversed", "shared", "repeated")
HOLES = ("minus_one", "max", "alias")
DATA = ("normal", "spikes", "ladder", "cliff", "equal", "offset", "peaky", "zero", "exact")
AMPLITUDES = (1.0, 3.0, 0.1)


def sizes(axis: str, value: int | str) -> tuple[int, ...]:
    """The numbers that a value of an axis stands for."""
    return SIZES[axis, value] if isinstance(value, str) else (value,)


def word(axis: str, number: Any) -> Any:
    """The value of an axis that stands for a number."""
    return _WORDS.get((axis, number), number)


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
    lse: bool = False  # asked for, of targets that return one

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
        return json.dumps({**vars(self), "shape": vars(self.shape)}, sort_keys=True, separators=(",", ":"))

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
