"""The stream of static shapes: a campaign compiles little, so each shape must try much that is new.

Every shape is a choice of one value for each axis. The first 52 hold all pairs of values (`fuzz.opening`); for a target
that does not take them all, and for the triples after them, a covering array is built greedily (after AETG of Cohen et
al., 1997); what a pair counts grows with how many its two axes still lack.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from fuzz.opening import FIRST, ROWS
from fuzz.plan import CAPS, GROUPS, HEAD_DIMS, KV_HEADS, PAGES, SCALES, TYPES, WINDOWS, Shape, sizes

TIERS = ("small", "medium", "wide", "deep", "long")
Value = tuple[str, Any]  # an axis and its value
Choice = dict[str, Any]  # axis -> value
Taken = Callable[[Shape], bool]  # whether a target takes a shape

DRAFTS = 40
PROBES = 750  # choices drawn, and as many of them with one head, to find what a target takes
PATIENCE = 400  # refusals in a row that end the stream

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
# Jitters that choose of a word's numbers, whatever it costs, the second, and the one of most factors of two. By these
# and the plainest a target is asked whether it takes the word.
SECOND, ROUNDEST = -1, -2
ASKED = (0, SECOND, ROUNDEST)
WIDE_SLOT = 256  # kv heads * head_dim of pages of 64 and more, of which a case has four at least
FEW_HEADS = 4  # of rows that see 33,000 keys
_SEEN_WHOLE = ("none", "over")  # windows that leave a row every key


def allowed(choice: Choice) -> bool:
    """Whether a combination is worth its time: rows times heads stay small where contexts are long."""
    page, kv, group, dim = (_least(choice, axis) for axis in ("page", "kv_heads", "group", "head_dim"))
    tier, window = choice["tier"], choice.get("window")
    if kv * group * dim > _TIER[tier][3] or (page > 32 and kv * dim > WIDE_SLOT):
        return False
    if dim > 128 and (tier not in ("small", "medium") or (tier == "medium" and kv * group > 1)):
        return False
    if tier == "deep" and page > 8:  # thousands of keys, and nothing more to see
        return False
    if window == "page" and (page == 1 or page >= _TIER[tier][2] > 0):
        return False  # it would be another kind of window
    if tier == "long":
        few = window not in _SEEN_WHOLE or kv * group <= FEW_HEADS
        return few and page >= 16 and choice["types"] in ("f32", "bf16", "f16")
    return True


def shape_of(choice: Choice, jitter: int = 0) -> Shape:
    """The shape for one value of every axis; of a word's numbers the plainest, but for the jitter."""
    tokens, seqs, capacity, _ = _TIER[choice["tier"]]
    page, kv_heads, group, head_dim = _numbers(choice, jitter)
    per_seq = _DEEP[jitter % 3] if choice["tier"] == "deep" else max(1, -(-capacity // page))
    slots = 96 if choice["tier"] == "long" else seqs * per_seq * page
    slots = min(slots, max(48, 24_000 // (kv_heads * head_dim * 2)))
    return Shape(
        tokens=tokens + jitter % (8 if choice["tier"] == "wide" else 4),
        seqs=seqs,
        pages=max(2, -(-slots // page)) + 2,
        pages_per_seq=per_seq,
        page=page,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        types=choice["types"],
        window=_window(choice["window"], page, per_seq * page, jitter),
        cap=choice["cap"],
        sinks=choice["sinks"],
        scale={"default": None, "unit": 1.0, "odd": 0.3}[choice["scale"]],
        lse=choice["lse"],
    )


def _least(choice: Choice, axis: str) -> int:
    """The plainest of the numbers that a choice's value stands for."""
    return sizes(axis, choice[axis])[0]


def _numbers(choice: Choice, jitter: int) -> tuple[int, int, int, int]:
    """(page, kv heads, group, head size): of a word's numbers one that costs little more than the plainest."""
    if jitter < 0:
        pick = _second if jitter == SECOND else _roundest
        page, kv_heads, group, head_dim = (pick(sizes(a, choice[a])) for a in ("page", "kv_heads", "group", "head_dim"))
        return page, kv_heads, group, head_dim
    found = {axis: _least(choice, axis) for axis in ("head_dim", "group", "kv_heads")}
    most = _TIER[choice["tier"]][3] if choice["tier"] != "long" else 0
    for turn, axis in enumerate(found, 1):
        room = most if axis == "group" else most // 2
        others = _product(found) // found[axis]
        fit = [n for n in sizes(axis, choice[axis]) if n <= found[axis] or n * others <= room]
        found[axis] = fit[jitter // turn % len(fit)]
    pages = [n for n in sizes("page", choice["page"]) if n <= 64 or _product(found) <= WIDE_SLOT // 4]
    return pages[jitter % len(pages)], found["kv_heads"], found["group"], found["head_dim"]


def _second(numbers: tuple[int, ...]) -> int:
    return numbers[:2][-1]


def _roundest(numbers: tuple[int, ...]) -> int:
    return max(numbers, key=lambda n: n & -n)


def _product(found: dict[str, int]) -> int:
    return found["kv_heads"] * found["group"] * found["head_dim"]


def _window(kind: str, page: int, capacity: int, jitter: int) -> int | None:
    wide = 17 + 16 * (jitter % 3 if capacity > 60 else 0)
    few = 2 + jitter % 5
    few += few == page  # else it would be the window of another kind
    return {"none": None, "one": 1, "few": few, "page": max(2, page), "wide": wide,
            "over": capacity + jitter % 2}[kind]  # fmt: skip


def first_shapes(seed: int, count: int, taken: Taken | None = None) -> tuple[Shape, ...]:
    """The first `count` shapes of a seed's stream; fewer where a target takes no more."""
    stream = _stream(seed) if taken is None else Stream(seed, taken)
    return tuple(itertools.islice(stream.shapes(), count))


@lru_cache(maxsize=16)
def _stream(seed: int) -> Stream:
    return Stream(seed)


class Stream:
    """An endless sequence of shapes, the same for the same seed, that covers all pairs of values and then the triples.

    Of a target that refuses a shape, the stream finds out which values, and which pairs of them, it takes at all, and
    draws from those alone.

    A set of values is an integer with a bit for each: how many pairs a value would add is then one bit count.
    """

    def __init__(self, seed: int, taken: Taken | None = None):
        self.chance = random.Random(seed)
        self.taken = taken or (lambda shape: True)
        self.found: list[Shape] = []
        # With jitters of their own: the same shapes for all seeds, whose programs are kept. From a number at which no
        # other than the sixth has the rows for which relations compile.
        first, rest = list(enumerate(_opening()[:FIRST])), list(enumerate(_opening()[FIRST:], FIRST + 1))
        self.chance.shuffle(rest)
        self.opening = first + rest
        self.least = _LEAST
        self.beside = list(_beside())  # of each value: those that it may stand with
        self.open = list(self.beside)  # of each value: those that it has not stood with yet
        self.triples: dict[tuple[int, int], int] = {}  # of each pair of values: those that have stood with it
        self.wanting: list[list[int]] = []  # of two values: how many pairs of their axes are new
        self.narrowed = False
        self.ended = False

    def shapes(self) -> Iterator[Shape]:
        """The shapes in their order; it ends only for a target that takes none."""
        for count in itertools.count():
            shape = self.shape(count)
            if shape is None:
                return
            yield shape

    def shape(self, index: int) -> Shape | None:
        """Shape `index`, or None where the target takes so few that none was found."""
        refusals = 0
        while len(self.found) <= index and not self.ended:
            jitter, choice = self.opening.pop(0) if self.opening else (len(self.found), self._next())
            shape = None if choice is None else self._taken_of(choice, jitter)
            if choice is not None and shape is not None:
                self._count(choice)
                self.found.append(shape)
                continue
            refusals += 1
            self.ended = refusals == PATIENCE
            if not self.narrowed:
                self._narrow()
        return self.found[index] if index < len(self.found) else None

    def _taken_of(self, choice: Choice, jitter: int) -> Shape | None:
        """The next shape of a choice, or one of those that are asked for, if the target takes it."""
        tried = (shape_of(choice, jitter) for jitter in (jitter, *ASKED))
        return next((shape for shape in tried if self.taken(shape)), None)

    def barred(self) -> list[tuple[Value, ...]]:
        """The values that stand in no shape the target takes, and the pairs of others that stand in none together."""
        lost = [_beside()[v] & ~mask for v, mask in enumerate(self.beside)]
        alone = [v for v, mask in enumerate(self.beside) if not mask]
        pairs = [(v, w) for v, mask in enumerate(lost) for w in _bits(mask) if v < w and not {v, w} & set(alone)]
        return [(VALUES[v],) for v in alone] + [(VALUES[v], VALUES[w]) for v, w in pairs]

    def _count(self, choice: Choice) -> None:
        held = [_ID[item] for item in choice.items()]
        mask = sum(1 << v for v in held)
        for v in held:
            self.open[v] &= ~mask
        for pair in itertools.combinations(sorted(held), 2):
            self.triples[pair] = self.triples.get(pair, 0) | mask

    def _next(self) -> Choice | None:
        """The best of many choices around a pair that is new, as long as there is one."""
        self.wanting = self._lacks()
        start = self._start()
        drafts = [draft for draft in (self._draft(start) for _ in range(DRAFTS if start else 6)) if draft]
        if drafts:
            best = max(drafts, key=self._news)
            return {VALUES[v][0]: VALUES[v][1] for v in sorted(best)}
        for v, w in itertools.permutations(start, 2):  # a third axis forbids the pair
            self.open[v] &= ~(1 << w)
        return None

    def _lacks(self) -> list[list[int]]:
        """How many pairs of two axes are new still, by value for quick use. A shape holds one pair of each two axes, so
        the axes that lack most need it most.
        """
        lacks = {
            (a, b): sum((self.open[v] & _MASK[b]).bit_count() for v in _OF_AXIS[a])
            for a in AXES
            for b in AXES
            if a != b
        }
        return [[lacks.get((a, b), 0) for b, _ in VALUES] for a, _ in VALUES]

    def _start(self) -> tuple[int, ...]:
        """A new pair, of a value that lacks most partners."""
        most = max(mask.bit_count() for mask in self.open)
        if not most:
            return ()
        first = self.chance.choice([v for v, mask in enumerate(self.open) if mask.bit_count() == most])
        return first, self.chance.choice(_bits(self.open[first]))

    def _news(self, held: tuple[int, ...]) -> tuple[int, int]:
        """How many pairs and triples a choice would be the first to hold, each counted more than once alike."""
        mask = sum(1 << v for v in held)
        pairs = sum(self._new_beside(held, mask, v) for v in held) if any(self.open) else 0
        together = itertools.combinations(sorted(held), 2)
        return pairs, sum((mask & ~self.triples.get(pair, 0)).bit_count() for pair in together)

    def _draft(self, start: tuple[int, ...]) -> tuple[int, ...] | None:
        """One axis after the other, each set to the value that is new beside most of those before it."""
        held, mask = list(start), sum(1 << v for v in start)
        choice = {VALUES[v][0]: VALUES[v][1] for v in start}
        axes = [axis for axis in AXES if axis not in choice]
        self.chance.shuffle(axes)
        for axis in axes:
            values = [v for v in _OF_AXIS[axis] if not mask & ~self.beside[v] and self._fits(choice, v)]
            if not values:
                return None
            if axis == "tier" and self.chance.random() < 0.5:  # a long context is dear, and one feature only
                values = [v for v in values if VALUES[v][1] != "long"] or values
            self.chance.shuffle(values)
            best = max(values, key=lambda v: self._new_beside(held, mask, v))
            held.append(best)
            mask |= 1 << best
            choice[axis] = VALUES[best][1]
        return tuple(held)

    def _fits(self, choice: Choice, value: int) -> bool:
        axis, chosen = VALUES[value]
        return axis not in _TOGETHER or possible({**choice, axis: chosen}, self.least)

    def _new_beside(self, held: Sequence[int], mask: int, value: int) -> int:
        if any(self.open):
            wanting, new = self.wanting[value], self.open[value]
            return sum(wanting[v] for v in held if (new >> v) & 1)
        pairs = ((v, value) if v < value else (value, v) for v in held)
        return sum((mask & ~self.triples.get(pair, 0)).bit_count() for pair in pairs)

    # -- what a target takes

    def _narrow(self) -> None:
        """Find the values and pairs that the target takes: by drawing, then by setting them in what it has taken."""
        self.narrowed, chance = True, random.Random(0)
        drawn = [_drawn(chance) for _ in range(PROBES)]
        single = ({**choice, "kv_heads": 1, "group": 1} for choice in drawn)  # hardly another may be long
        tried = (*_opening(), *drawn, *single)
        kept = sorted((choice for choice in tried if self._takes(choice)), key=_width)
        by_value: dict[int, Choice] = {}
        seen = [0] * len(VALUES)  # of each value: those that it was taken with
        for choice in kept:
            mask = sum(1 << _ID[item] for item in choice.items())
            for item in choice.items():
                by_value.setdefault(_ID[item], choice)
                seen[_ID[item]] |= mask
        self.least = tuple(kept[:4])

        def together(v: int, w: int) -> bool:
            if (seen[v] >> w) & 1:
                return True
            bases = [by_value[u] for u in (v, w) if u in by_value] + kept[:4]
            return any(self._takes({**base, VALUES[v][0]: VALUES[v][1], VALUES[w][0]: VALUES[w][1]}) for base in bases)

        able = {v for v in range(len(VALUES)) if v in by_value or together(v, v)}
        pairs = itertools.combinations(sorted(able), 2)
        kept_pairs = [(v, w) for v, w in pairs if (self.beside[v] >> w) & 1 and together(v, w)]
        self.beside = [0] * len(VALUES)
        for v, w in kept_pairs:
            self.beside[v] |= 1 << w
            self.beside[w] |= 1 << v
        self.open = [old & new for old, new in zip(self.open, self.beside, strict=True)]

    def _takes(self, choice: Choice) -> bool:
        return allowed(choice) and any(self.taken(shape_of(choice, jitter)) for jitter in ASKED)


def _drawn(chance: random.Random) -> Choice:
    """Any choice, allowed or not."""
    return {axis: chance.choice(values) for axis, values in AXES.items()}


def _width(choice: Choice) -> int:
    return _least(choice, "kv_heads") * _least(choice, "group") * _least(choice, "head_dim")


def _bits(mask: int) -> list[int]:
    return [v for v in range(len(VALUES)) if (mask >> v) & 1]


VALUES: tuple[Value, ...] = tuple((axis, value) for axis, values in AXES.items() for value in values)
_ID = {value: i for i, value in enumerate(VALUES)}
_OF_AXIS = {axis: [_ID[axis, value] for value in values] for axis, values in AXES.items()}
_MASK = {axis: sum(1 << v for v in values) for axis, values in _OF_AXIS.items()}
_TOGETHER = frozenset({"types", "page", "kv_heads", "group", "head_dim", "window", "tier"})  # what `allowed` looks at
# The least demanding choices; a combination is possible when it is allowed on top of one of these.
_LEAST: tuple[Choice, ...] = tuple(
    {"types": "f32", "kv_heads": 1, "group": 1, "head_dim": "3,20", "tier": tier, "page": page}
    for tier, page in (("small", "4-8"), ("small", 16), ("medium", 16))
)


def possible(choice: Choice, least: tuple[Choice, ...] = _LEAST) -> bool:
    """Whether some allowed choice holds these values."""
    return any(allowed({**base, **choice}) for base in least)


@lru_cache(maxsize=1)
def _beside() -> tuple[int, ...]:
    """Of each value, the values of other axes that are possible beside it."""
    return tuple(
        sum(1 << _ID[b] for b in VALUES if b[0] != a[0] and possible({a[0]: a[1], b[0]: b[1]})) for a in VALUES
    )


@lru_cache(maxsize=1)
def _opening() -> tuple[Choice, ...]:
    """The choices of `fuzz.opening`."""
    parsed = []
    for row in ROWS.strip().splitlines():
        types, page, kv, group, dim, window, cap, sinks, tier, scale, lse = row.split()
        options = (window, None if cap == "-" else float(cap), sinks == "sinks", tier, scale, lse == "lse")
        numbers = (int(n) if n.isdigit() else n for n in (page, kv, group, dim))
        parsed.append(dict(zip(AXES, (types, *numbers, *options), strict=True)))
    return tuple(parsed)
