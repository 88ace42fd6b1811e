"""From plan to case: deterministic, loud where bugs hide, poisoned where no row may look."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import ml_dtypes
import numpy as np

from fuzz.plan import ROUNDED, TYPES, Plan, Shape
from oracle import Case

_POOL = 1 << 19
NO_PAGE, FAR = -1, 2**31 - 1
# The largest value a kernel may meet in a slot it must not use, by dtype of the pages.
_HUGE = {
    "float32": 3e38,
    "bfloat16": 3e38,
    "float16": 6e4,
    "float8_e4m3fn": 448.0,
    "float8_e5m2": 57344.0,
    "int8": 127,
}


@dataclass(frozen=True)
class Layout:
    """Where everything of a plan lies."""

    starts: np.ndarray  # i32 [S + 1]
    contexts: np.ndarray  # i32 [S]
    tables: np.ndarray  # i32 [S, pages_per_seq]
    seen: np.ndarray  # bool [P, page]: some row of some sequence sees the slot
    spans: tuple[tuple[int, int, int], ...]  # (sequence, first key seen, one past the last)


def build(plan: Plan, fill: str = "nan") -> Case:
    """The case of a plan; what no row may see holds NaN, `huge` finite values, or (`tame`) threes."""
    shape, layout = plan.shape, layout_of(plan)
    q_dtype, kv_dtype, dot = (_dtype(name) for name in TYPES[shape.types])
    queries = _queries(plan)
    keys, values = _keys_values(plan, layout, queries)
    k_scale, v_scale = _scales(plan, keys, values)
    seen = np.flatnonzero(layout.seen)  # what no row sees is poisoned, whatever it was
    slots = np.empty((len(seen), 2 * shape.kv_heads, shape.head_dim), kv_dtype)
    slots[:, 0::2] = _store(keys, seen, k_scale, kv_dtype)
    slots[:, 1::2] = _store(values, seen, v_scale, kv_dtype)
    pages = np.empty((shape.pages, shape.page, *slots.shape[1:]), kv_dtype)
    pages.reshape(-1, *slots.shape[1:])[seen] = slots
    queries = queries.astype(q_dtype)
    _poison(plan, layout, queries, pages, fill)
    return Case(
        queries, pages, layout.contexts, layout.tables, layout.starts, len(plan.lengths), _sinks(plan),
        softmax_scale=shape.scale, logits_soft_cap=shape.cap, sliding_window=shape.window, compute_dtype=dot.name,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def refill(plan: Plan, case: Case, fill: str) -> Case:
    """The plan's case again, with another poison in everything no row may see."""
    queries, pages = np.array(case.queries), np.array(case.kv_pages)
    _poison(plan, layout_of(plan), queries, pages, fill)
    return case.replace(queries=queries, kv_pages=pages)


def _poison(plan: Plan, layout: Layout, queries: np.ndarray, pages: np.ndarray, fill: str) -> None:
    """Overwrite in place every slot that no row sees and every query row that nobody owns."""
    owned = int(layout.starts[len(plan.lengths)])
    for array, unseen in ((pages, ~layout.seen), (queries, slice(owned, None))):
        filling = _filling(array.dtype, fill, plan.shape.head_dim)
        bits = f"u{array.itemsize}"  # NumPy copies narrow floats one by one
        array.view(bits)[unseen] = filling.view(bits)


@lru_cache(maxsize=64)
def _filling(dtype: np.dtype, fill: str, head_dim: int) -> np.ndarray:
    """[1] or [D]: NaN where the dtype has one and it is asked for, else huge values of both signs."""
    if fill == "tame":
        return np.full((1,), 3).astype(dtype)
    if fill == "nan" and dtype != np.int8:
        return np.full((1,), np.nan).astype(dtype)
    sign = np.where(np.arange(head_dim) % 2, -1, 1) * (-1 if fill == "nan" else 1)
    return (_HUGE[dtype.name] * sign).astype(dtype)


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


# ---------------------------------------------------------------- layout


@lru_cache(maxsize=64)  # several cases are held at once
def layout_of(plan: Plan) -> Layout:
    """Metadata with garbage in everything dead, and the slots that rows see."""
    shape, live = plan.shape, len(plan.lengths)
    chance = cache(lambda: np.random.default_rng(plan.seed))  # made where it is used: it costs as much as a sequence
    starts = np.full(shape.seqs + 1, FAR, np.int32)
    starts[0] = 0
    starts[1 : live + 1] = list(accumulate(q for q, _ in plan.lengths))
    starts[live + 2 :: 2] = -1
    contexts = np.full(shape.seqs, NO_PAGE, np.int32)
    contexts[live::2] = FAR
    contexts[:live] = [c for _, c in plan.lengths]
    tables = _holes(plan, chance)
    seen = np.zeros((shape.pages, shape.page), bool)
    spans = []
    pages = _Pages(plan, chance)
    for s, (rows, context) in enumerate(plan.lengths):
        low = max(0, max(0, context - rows) - (shape.window or context + 1) + 1)
        if rows == 0 or low >= context:
            continue
        first, stop = low // shape.page, -(-context // shape.page)
        taken = pages.take(first, stop)
        tables[s, first:stop] = taken
        _mark(seen, taken, low, context)
        spans.append((s, low, context))
    return Layout(starts, contexts, tables, seen, tuple(spans))


def _mark(seen: np.ndarray, pages: np.ndarray, low: int, high: int) -> None:
    """Mark the slots of the keys low .. high - 1; the first of these pages holds key `low`, the last `high - 1`."""
    size = seen.shape[1]
    begin, end = low % size, (high - 1) % size + 1
    if len(pages) == 1:
        seen[pages[0], begin:end] = True
        return
    seen[pages[0], begin:] = True
    seen[pages[1:-1]] = True
    seen[pages[-1], :end] = True


def _holes(plan: Plan, chance: Callable[[], np.random.Generator]) -> np.ndarray:
    """A table of dead entries only."""
    size = (plan.shape.seqs, plan.shape.pages_per_seq)
    if plan.holes == "alias":  # legal page ids, of pages that may be live for another sequence
        return chance().integers(0, plan.shape.pages, size, dtype=np.int32)
    return np.full(size, NO_PAGE if plan.holes == "minus_one" else FAR, np.int32)


class _Pages:
    """Hands out physical pages; guards lie around them, and a full pool is shared."""

    def __init__(self, plan: Plan, chance: Callable[[], np.random.Generator]):
        self.kind = plan.tables
        inner = np.arange(plan.shape.pages, dtype=np.int32)
        inner = inner[1:-1] if len(inner) > 2 else inner  # the first and last page stay guards
        if plan.tables in ("shuffled", "shared"):
            chance().shuffle(inner)
        self.order = inner[::-1] if plan.tables == "reversed" else inner
        self.next = 0

    def take(self, first: int, stop: int) -> np.ndarray:
        """The pages of a sequence's columns first .. stop - 1."""
        if self.kind == "shared":  # the same prefix for all
            return self.order[np.arange(first, stop) % len(self.order)]
        count = stop - first
        if self.kind == "repeated":  # each page twice in a row
            columns = np.arange(count) // 2
        else:
            columns = np.arange(count)
        taken = self.order[(self.next + columns) % len(self.order)]
        self.next += int(columns[-1]) + 1
        return taken


# ---------------------------------------------------------------- data


@lru_cache(maxsize=1)
def _normals() -> np.ndarray:
    """Standard normals to slice from: drawing fresh ones would cost more than judging the case."""
    pool = np.random.default_rng(2023).standard_normal(_POOL, np.float32)
    return np.concatenate([pool, pool])


def _noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    size = math.prod(shape)
    offset = (seed * 2_654_435_761) % _POOL
    if size > _POOL:
        return np.random.default_rng(seed).standard_normal(shape, np.float32)
    return _normals()[offset : offset + size].reshape(shape)


def _queries(plan: Plan) -> np.ndarray:
    """f32 [T, Hq, D]."""
    shape = plan.shape
    size = (shape.tokens, shape.q_heads, shape.head_dim)
    if plan.data == "zero" or (plan.data == "exact" and shape.cap is not None):
        return np.zeros(size, np.float32)  # tanh(0) is exact everywhere
    noise = _noise(size, 2 * plan.seed + 1)
    return np.clip(np.rint(noise), -2, 2) if plan.data == "exact" else noise.copy()


def _keys_values(plan: Plan, layout: Layout, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [P, page, Hkv, D] twice: what the pages mean, before quantisation."""
    shape = plan.shape
    size = (shape.pages, shape.page, shape.kv_heads, shape.head_dim)
    keys, values = _noise((2, *size), 2 * plan.seed)
    if plan.data == "exact":
        return _exact_keys(size), np.clip(np.rint(2 * values), -4, 4)
    scale = shape.head_dim**-0.5 if shape.scale is None else shape.scale
    amplitude = plan.amplitude * (6 if plan.data == "peaky" else 1)
    keys = keys * np.float32(amplitude / (scale * shape.head_dim**0.5))
    if plan.data == "equal":
        keys = np.broadcast_to(keys[:1, :1], size).copy()
    if plan.data == "offset":
        values = values + np.float32(50)
    if plan.data == "ladder":
        _ladder(plan, layout, queries, keys, scale)
    if plan.data == "spikes":
        values = values.copy()
        _spikes(plan, layout, queries, keys, values, scale)
    if plan.data == "cliff":
        _cliffs(plan, layout, queries, keys, scale)
    return keys, values


def _exact_keys(size: tuple[int, ...]) -> np.ndarray:
    """One axis only, so that a dot product has one term and no order of summation matters."""
    keys = np.zeros(size, np.float32)
    keys[..., 0] = 2
    return keys


def _toward(plan: Plan, queries: np.ndarray, row: int, scale: float) -> np.ndarray:
    """[Hkv, D]: keys that raise the logit of `row` by one, for the first query head of each group."""
    q = queries[row, :: plan.shape.group]
    return q / np.maximum(scale * np.sum(q * q, axis=-1, keepdims=True), 1e-3).astype(np.float32)


def _slots(plan: Plan, layout: Layout, s: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return layout.tables[s, keys // plan.shape.page], keys % plan.shape.page


def _ladder(plan: Plan, layout: Layout, queries: np.ndarray, keys: np.ndarray, scale: float) -> None:
    """Logits that rise with the position, so that every block brings a maximum: exp overflows without."""
    rise = 12 if plan.shape.types in ROUNDED else 110 if TYPES[plan.shape.types][2] == "float32" else 20
    for s, low, high in layout.spans:
        position = np.arange(low, high)
        step = (rise * plan.amplitude * (position - low) / max(1, high - low)).astype(np.float32)
        last = int(layout.starts[s]) + plan.lengths[s][0] - 1  # the row that sees most of it
        direction = _toward(plan, queries, last, scale)
        keys[_slots(plan, layout, s, position)] += step[:, None, None] * direction


def _spikes(
    plan: Plan, layout: Layout, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float
) -> None:
    """+-8 on the values, and a raised logit, at every key where a kernel's arithmetic may be off by one."""
    for s, low, high in layout.spans:
        edges = boundaries(plan.shape, plan.lengths[s], low, high)
        page, slot = _slots(plan, layout, s, edges)
        sign = np.where((np.arange(len(edges)) + plan.seed) % 2, -8, 8).astype(np.float32)
        values[page, slot] += sign[:, None, None]
        raised = edges % 3 != plan.seed % 3  # some stay low, so that a missing key is not always the loudest
        row = int(layout.starts[s]) + plan.seed % plan.lengths[s][0]
        keys[page[raised], slot[raised]] += 4 * _toward(plan, queries, row, scale)


def _cliffs(plan: Plan, layout: Layout, queries: np.ndarray, keys: np.ndarray, scale: float) -> None:
    """Logits of about 120 at the keys that some rows of a tile see and others must not: nothing else survives there.

    Or every other logit of such a row, or each of all rows, lies so low instead: the same, but for a wrong maximum.
    Lower where the dots' operands are narrow, and where they are rounded: there would be no bound left to judge by.
    """
    rise = 25 if plan.shape.types in ROUNDED else 120 if TYPES[plan.shape.types][2] == "float32" else 100
    if plan.seed % 4 == 3:
        queries[..., 0] = 2
        keys[..., 0] -= np.float32(rise / scale / 2)
        return
    for s, low, high in layout.spans:
        rows, start = plan.lengths[s][0], int(layout.starts[s])
        cliffs = ((high - 1, start), (low, start + rows - 1))  # the future of one, before the window of the other
        for key, row in cliffs if rows > 1 else cliffs[plan.seed % 2 :][:1]:  # of one row, a maximum that comes last
            q = queries[row, :: plan.shape.group]  # [Hkv, D]
            square = np.maximum(np.sum(q * q, axis=-1, keepdims=True), plan.shape.head_dim / 4)
            step = np.float32(rise / scale) * q / square
            keys[_slots(plan, layout, s, np.array([key]))] += step
            if plan.seed % 4 == 2:
                keys[_slots(plan, layout, s, np.arange(low, high))] -= step


def boundaries(shape: Shape, length: tuple[int, int], low: int, high: int) -> np.ndarray:
    """The keys of a sequence at window, page, block and causal edges, inside what it sees."""
    rows, context = length
    first = max(0, context - rows)
    edges = {low, low + 1, high - 1, high - 2, first, first + 1, first - 1}
    edges.update(range(first, min(context, first + 8)))
    for step in (shape.page, 8, 16, 64, 128):
        last = (high - 1) // step * step
        edges.update((last, last - 1, last - step, -(-low // step) * step, -(-low // step) * step - 1))
    if shape.window is not None:
        edges.update(position - shape.window + off for position in (first, context - 1) for off in (0, 1, 2))
    return np.array(sorted(e for e in edges if low <= e < high), np.int64)


def _scales(plan: Plan, keys: np.ndarray, values: np.ndarray) -> tuple[Any, Any]:
    """Quantisation scales: powers of two for exact data, else odd ones, one a head."""
    shape = plan.shape
    if not shape.quantised:
        return None, None
    dtype = TYPES[shape.types][1]
    top = {"int8": 100.0, "float8_e4m3fn": 300.0, "float8_e5m2": 300.0}[dtype]
    heads = 1 + 0.37 * np.arange(shape.kv_heads, dtype=np.float32)
    if plan.data == "exact":
        return np.full(shape.kv_heads, 0.5, np.float32), np.full(shape.kv_heads, 0.25, np.float32)
    k_reach, v_reach = (max(float(np.abs(x).max()), 1e-3) for x in (keys, values))
    return (k_reach / top * heads).astype(np.float32), (v_reach / top * heads).astype(np.float32)


def _store(numbers: np.ndarray, seen: np.ndarray, scale: Any, dtype: np.dtype) -> np.ndarray:
    """[n, Hkv, D]: the slots that are seen, as they stand in the pages."""
    numbers = numbers.reshape(-1, *numbers.shape[2:]).take(seen, axis=0)
    if scale is None:
        return numbers.astype(dtype)
    stored = numbers / scale[:, None]
    top = _HUGE[dtype.name]
    if dtype == np.int8:
        return np.clip(np.rint(stored), -top, top).astype(dtype)
    return _eight_bits(np.clip(stored, -top, top), dtype)


def _eight_bits(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 rounded to an 8-bit float, by a table: ml_dtypes rounds one by one, at five times the cost.

    A number is looked up by its upper half, whose last bit says whether anything was cut off: the table's entry is then
    on the same side of every midpoint of the narrow type.
    """
    bits = numbers.view(np.uint32)
    return _by_upper_half(dtype).take((bits >> 16) | ((bits & 0xFFFF) != 0))


@lru_cache(maxsize=2)
def _by_upper_half(dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):  # infinity and NaN have no entry that is used
        return (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).astype(dtype)


def _sinks(plan: Plan) -> np.ndarray | None:
    if not plan.shape.sinks:
        return None
    if plan.data == "exact":  # too small to weigh anything in float32
        return np.full(plan.shape.q_heads, -40, np.float32)
    return 2 * plan.amplitude * _noise((plan.shape.q_heads,), plan.seed + 7)
