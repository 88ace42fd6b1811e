"""What a campaign has tried: pairs and triples of features, and which of them can exist at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Set
from functools import lru_cache
from typing import Any

import numpy as np

from fuzz import stream
from fuzz.plan import DATA, HOLES, TABLES, Plan, Shape, word

Feature = tuple[str, Any]
Pair = tuple[Feature, Feature]

# Axis -> values, in the order a reader wants them. Static axes first.
AXES: dict[str, tuple[Any, ...]] = {
    **stream.AXES,
    "rows": ("decode", "prefill", "chunk", "blind", "empty"),
    "context": ("none", "page_end", "page_start", "inside"),
    "batch": ("none", "one", "few", "full"),
    "tables": TABLES,
    "holes": HOLES,
    "data": DATA,
}
STATIC = tuple(stream.AXES)


def features(plan: Plan) -> frozenset[Feature]:
    """The features of a plan; the ragged axes may have several values in one batch.

    Those that the stream draws: a shrunk plan, or one of another version, has others too.
    """
    found = set(static_features(plan.shape))
    found.update(("rows", kind) for kind in _rows(plan))
    found.update(("context", kind) for kind in _contexts(plan))
    found.add(("batch", _batch(plan)))
    found.update((("tables", plan.tables), ("holes", plan.holes), ("data", plan.data)))
    return frozenset(found & _ID.keys())


@lru_cache(maxsize=4096)
def static_features(shape: Shape) -> frozenset[Feature]:
    scale = {None: "default", 1.0: "unit"}.get(shape.scale, "odd")
    names = ("types", "page", "kv_heads", "group", "head_dim", "cap", "sinks", "lse")
    found: list[Feature] = [(name, word(name, getattr(shape, name))) for name in names]
    return frozenset([*found, ("scale", scale), ("window", _window(shape)), ("tier", _tier(shape))])


def _window(shape: Shape) -> str:
    window = shape.window
    if window is None:
        return "none"
    if window >= shape.capacity:
        return "over"
    if window == 1:
        return "one"
    if window == shape.page:
        return "page"
    return "few" if window <= 8 else "wide"


def _tier(shape: Shape) -> str:
    if shape.capacity > 2**15:
        return "long"
    if shape.seqs >= 36:
        return "wide"
    if shape.pages_per_seq in (65, 100, 127):
        return "deep"
    return "medium" if shape.tokens >= 20 else "small"


def _rows(plan: Plan) -> set[str]:
    kinds = set()
    for rows, context in plan.lengths:
        if rows == 0:
            kinds.add("empty")
        elif rows > context:
            kinds.add("blind")
        elif rows == 1:
            kinds.add("decode")
        else:
            kinds.add("prefill" if rows == context else "chunk")
    return kinds


def _contexts(plan: Plan) -> set[str]:
    kinds, page = set(), plan.shape.page
    for rows, context in plan.lengths:
        if context == 0 or rows == 0:
            kinds.add("none")
        elif context % page == 0:
            kinds.add("page_end")
        else:
            kinds.add("page_start" if context % page == 1 else "inside")
    return kinds


def _batch(plan: Plan) -> str:
    live = sum(rows > 0 for rows, _ in plan.lengths)
    if live <= 1:
        return ("none", "one")[live]
    return "full" if len(plan.lengths) == plan.shape.seqs else "few"


def pairs(found: Iterable[Feature]) -> set[Pair]:
    """All pairs of features of different axes, in a fixed order."""
    ordered = sorted(found, key=_order)
    return {(a, b) for a, b in itertools.combinations(ordered, 2) if a[0] != b[0]}


_FEATURES: tuple[Feature, ...] = tuple((axis, value) for axis, values in AXES.items() for value in values)
_PLACE = {axis: i for i, axis in enumerate(AXES)}


_ID = {feature: i for i, feature in enumerate(_FEATURES)}


def _bits(mask: int) -> list[int]:
    """The features of a set."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


@lru_cache(maxsize=1)
def _partners() -> tuple[int, ...]:
    """Of each feature, those that may stand beside it."""
    partners = [0] * len(_FEATURES)
    for a, b in valid_pairs():
        partners[_ID[a]] |= 1 << _ID[b]
        partners[_ID[b]] |= 1 << _ID[a]
    return tuple(partners)


def _order(feature: Feature) -> tuple[int, int]:
    return _PLACE[feature[0]], AXES[feature[0]].index(feature[1])


@lru_cache(maxsize=1)
def valid_pairs() -> frozenset[Pair]:
    """The pairs that some plan of the stream can have."""
    return frozenset(p for p in _all(2) if possible(p))  # type: ignore[misc]


@lru_cache(maxsize=1)
def valid_triples() -> frozenset[tuple[Feature, ...]]:
    """The triples all of whose pairs are possible and whose static part is allowed."""
    return frozenset(t for t in _all(3) if possible(t))


def _all(size: int) -> Iterable[tuple[Feature, ...]]:
    for axes in itertools.combinations(AXES, size):
        for values in itertools.product(*(AXES[axis] for axis in axes)):
            yield tuple(zip(axes, values, strict=True))


def possible(combination: tuple[Feature, ...]) -> bool:
    """Whether a plan can have these features together."""
    wanted = dict(combination)
    static = {axis: value for axis, value in wanted.items() if axis in STATIC}
    return stream.possible(static) and not any(rule(wanted) for rule in _IMPOSSIBLE)


def _both(first: Feature, second: Feature):
    return lambda wanted: wanted.get(first[0]) == first[1] and wanted.get(second[0]) == second[1]


_IMPOSSIBLE = (
    _both(("page", 1), ("context", "page_start")),  # every context ends a page of one slot
    _both(("page", 1), ("context", "inside")),
    _both(("batch", "none"), ("rows", "decode")),  # nobody has rows
    _both(("batch", "none"), ("rows", "prefill")),
    _both(("batch", "none"), ("rows", "chunk")),
    _both(("batch", "none"), ("rows", "blind")),
    _both(("batch", "none"), ("context", "page_end")),
    _both(("batch", "none"), ("context", "page_start")),
    _both(("batch", "none"), ("context", "inside")),
    _both(("rows", "blind"), ("tier", "long")),  # its contexts are 1, 5 and thousands, its rows at most 6
    _both(("tier", "long"), ("data", "exact")),
)


class Coverage:
    """The pairs seen so far, and how often each feature was judged, with its worst ratio.

    Sets of features are integers with a bit each: a campaign counts hundreds of cases a second beside its workers.
    """

    def __init__(self) -> None:
        self.beside = [0] * len(_FEATURES)  # of each feature: the valid partners it has been seen with
        self.pairs = 0  # how many pairs that makes
        self.sets: set[int] = set()
        self.count: dict[Feature, int] = {}
        self.worst: dict[Feature, float] = {}

    @property
    def seen(self) -> set[Pair]:
        """The pairs seen, of those that are valid."""
        return {pair for pair in valid_pairs() if (self.beside[_ID[pair[0]]] >> _ID[pair[1]]) & 1}

    def add(self, plan: Plan, ratio: float | None) -> int:
        """Count a judged plan; how many valid pairs it was the first to have."""
        found, mask = features(plan), 0
        for feature in found:
            mask |= 1 << _ID[feature]
            self.count[feature] = self.count.get(feature, 0) + 1
            if ratio is not None and ratio <= 1:
                self.worst[feature] = max(self.worst.get(feature, 0.0), ratio)
        return self._add(mask)

    def _add(self, mask: int) -> int:
        if mask in self.sets:
            return 0
        self.sets.add(mask)
        before = self.pairs
        for i in _bits(mask):
            new = mask & _partners()[i] & ~self.beside[i]
            self.beside[i] |= new
            self.pairs += (new >> i).bit_count()  # a pair counts at its first feature
        return self.pairs - before

    def share(self, barred: Set[tuple[Feature, ...]] = frozenset()) -> tuple[int, int]:
        """(pairs seen, pairs possible), leaving out what a target does not take: features alone, and pairs of them."""
        if not barred:
            return self.pairs, len(valid_pairs())
        seen = self.seen
        return len(seen), sum(pair in seen or not within(pair, barred) for pair in valid_pairs())

    def triple_share(self, barred: Set[tuple[Feature, ...]] = frozenset()) -> tuple[int, int]:
        """(triples seen, triples possible), by matrix products: one row a feature set, one column a feature."""
        table = np.zeros((len(self.sets), len(_FEATURES)), np.float32)
        for row, found in enumerate(self.sets):
            table[row, _bits(found)] = 1
        together = [(table[table[:, i] > 0].T @ table[table[:, i] > 0]) > 0 for i in range(len(_FEATURES))]
        tried = [bool(together[_ID[a]][_ID[b], _ID[c]]) for a, b, c in valid_triples()]
        valid = [seen or not within(t, barred) for seen, t in zip(tried, valid_triples(), strict=True)]
        return sum(tried), sum(valid)


def within(features: tuple[Feature, ...], barred: Set[tuple[Feature, ...]]) -> bool:
    """Whether a feature or a pair of these is barred."""
    return bool(barred) and any(part in barred for size in (1, 2) for part in itertools.combinations(features, size))
