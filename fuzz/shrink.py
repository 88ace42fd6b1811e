"""Make a failing plan small: fewest sequences, fewest tokens, plainest options, then plainest data.

Works on plans, not on drawn choices, so it also shrinks what came out of a corpus, a crash or a stateful run. Each
pass proposes simpler plans; one is kept when it fails in the same way. Changes inside the static shape come first,
since a compiled kernel answers those at once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fuzz.judge import Judgement, judge_plan
from fuzz.plan import TABLES, Plan, Shape
from fuzz.targets import Target

SECONDS = 20.0
BLIND = 4  # a row before position 0 is as odd as so many tokens
# Kinds that are one symptom: a wrong number.
_VALUE = frozenset({"bound", "nan", "exact"})


@dataclass(frozen=True)
class Shrunk:
    """The smallest plan found, how it fails, and what finding it took."""

    plan: Plan
    judgement: Judgement
    tried: int
    seconds: float


def same_symptom(a: Judgement, b: Judgement) -> bool:
    """Whether a failure says as much as another of its sort; a wrong output says more than a wrong lse."""
    return a.bad and b.bad and (a.kind == b.kind or (a.kind in _VALUE and b.kind in _VALUE | {"lse"}))


def shrink(
    plan: Plan, target: Target, first: Judgement, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic
) -> Shrunk:
    """The smallest plan near `plan` that fails as `first` did, within a time limit on a clock."""
    began = clock()
    if first.kind.startswith("relation:"):
        plan, first = _told_by_a_number(plan, target, first)
    search = _Search(plan, target, first, lambda: clock() - began > seconds)
    while search.round() and not search.late():
        pass
    return Shrunk(search.plan, search.judgement, len(search.known), clock() - began)


def _told_by_a_number(plan: Plan, target: Target, first: Judgement) -> tuple[Plan, Judgement]:
    """A plan near one that breaks a relation whose own answer is wrong, or the plan itself: a number says more."""
    for relative in _relatives(plan.replace(check="plain")):
        judgement = judge_plan(relative, target)
        if judgement.bad and judgement.kind in _VALUE:
            return relative, judgement
    return plan, first


def _relatives(plan: Plan) -> Iterator[Plan]:
    """What the relations make of a plan, as plans."""
    lengths, shape = plan.lengths, plan.shape
    roomy = _reshape(plan, seqs=max(shape.seqs, len(lengths) + 1))
    for i in range(len(lengths) + 1):
        yield roomy.replace(lengths=(*lengths[:i], (0, 0), *lengths[i:]))
    yield plan.replace(lengths=lengths[::-1])
    yield from (plan.replace(lengths=(length,)) for length in lengths)
    yield from (plan.replace(tables=tables) for tables in TABLES if tables != plan.tables)
    longest = max(lengths, default=(0, 0))
    yield from (plan.replace(lengths=((1, max(0, longest[1] - i)),)) for i in range(longest[0]))
    yield _reshape(plan, window=None if shape.window else shape.capacity)
    if shape.sinks:
        yield _reshape(plan, sinks=False)


class _Search:
    """One descent: the best plan so far and every plan tried."""

    def __init__(self, plan: Plan, target: Target, first: Judgement, late: Callable[[], bool]):
        self.plan, self.target, self.judgement, self.late = plan, target, first, late
        self.known: set[Plan] = {plan}

    def round(self) -> bool:
        """Run every pass to its end once; whether anything got smaller."""
        before = self.plan
        for propose in PASSES:
            while self._first_that_fails(propose):
                pass
        return self.plan != before

    def _first_that_fails(self, propose: Callable[[Plan], Iterable[Plan]]) -> bool:
        for candidate in propose(self.plan):
            if self.late():
                return False
            if candidate in self.known or size(candidate) >= size(self.plan):
                continue
            self.known.add(candidate)
            judgement = judge_plan(candidate, self.target)
            if same_symptom(judgement, self.judgement):
                self.plan, self.judgement = candidate, judgement
                return True
        return False


_DATA_ORDER = ("exact", "normal", "equal", "zero", "spikes", "ladder", "cliff", "offset", "peaky")
_CHECK_ORDER = ("plain", "second_fill", "repeat", "relation")
_TYPE_ORDER = ("f32", "bf16", "f16", "f32_as_bf16", "bf16_as_f32", "int8", "e4m3", "e5m2")


def size(plan: Plan) -> tuple[object, ...]:
    """What smaller means, most important first."""
    s = plan.shape
    return (
        len(plan.lengths),
        sum(c + q + BLIND * max(0, q - c) for q, c in plan.lengths),
        s.q_heads * s.head_dim + 4 * s.group + s.kv_heads,
        (s.window is not None) + (s.cap is not None) + s.sinks + (s.scale is not None) + s.lse,
        s.tokens + s.seqs + s.pages + s.pages_per_seq + s.page + min(s.window or 0, 10**6),
        _TYPE_ORDER.index(s.types),
        _CHECK_ORDER.index(plan.check),
        plan.tables != "identity",
        plan.holes != "minus_one",
        _DATA_ORDER.index(plan.data),
        plan.amplitude != 1.0,
        plan.seed,
    )


# ---------------------------------------------------------------- passes inside the shape


def _fewer_sequences(plan: Plan) -> Iterator[Plan]:
    """Halves first, then each sequence alone, then all but one."""
    n = len(plan.lengths)
    chunk = n // 2
    while chunk:
        for start in range(0, n, chunk):
            yield plan.replace(lengths=plan.lengths[:start] + plan.lengths[start + chunk :])
        chunk //= 2


def _only_one(plan: Plan) -> Iterator[Plan]:
    if len(plan.lengths) > 1:
        yield from (plan.replace(lengths=(length,)) for length in sorted(plan.lengths, key=sum))


def _smaller(value: int) -> list[int]:
    """Numbers below `value`, small ones first, then close ones."""
    steps = {0, 1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 33, 48, value // 2, value - value // 4, value - 8}
    return sorted({v for v in steps | {value - 2, value - 1} if 0 <= v < value})


def _shorter(plan: Plan) -> Iterator[Plan]:
    """Fewer rows and fewer tokens of each sequence, together and apart."""
    for i, (rows, context) in enumerate(plan.lengths):
        changed = [(r, c) for c in _smaller(context) for r in sorted({1, 2, min(rows, c), rows}) if r <= rows]
        changed += [(r, context) for r in _smaller(rows)]
        changed += [(rows, rows)] if context < rows <= plan.shape.capacity else []
        changed += [(r, context - rows + r) for r in _smaller(rows) if context >= rows]
        yield from (plan.replace(lengths=(*plan.lengths[:i], length, *plan.lengths[i + 1 :])) for length in changed)


def _plainer(plan: Plan) -> Iterator[Plan]:
    """One plain word at a time, then plainer data."""
    yield plan.replace(tables="identity", holes="minus_one", check="plain", amplitude=1.0)
    yield plan.replace(check="plain")
    yield plan.replace(tables="identity")
    yield plan.replace(holes="minus_one")
    yield plan.replace(amplitude=1.0)
    yield from (plan.replace(data=data) for data in _DATA_ORDER[: _DATA_ORDER.index(plan.data)])
    yield from (plan.replace(seed=seed) for seed in range(min(plan.seed, 4)))


# ---------------------------------------------------------------- passes over the shape


def fitted(plan: Plan) -> Plan:
    """The plan in the tightest shape that still holds its lengths."""
    shape = plan.shape
    per_seq = max([1, *(-(-c // shape.page) for _, c in plan.lengths)])
    return _reshape(
        plan,
        tokens=max(1, sum(q for q, _ in plan.lengths)),
        seqs=max(1, len(plan.lengths)),
        pages_per_seq=per_seq,
        pages=min(shape.pages, 2 + per_seq * max(1, len(plan.lengths))),
    )


def _reshape(plan: Plan, **changes: object) -> Plan:
    return plan.replace(shape=dataclasses.replace(plan.shape, **changes))


def _proposed(plan: Plan, **changes: object) -> Iterator[Plan]:
    """The reshaped plan in its tightest shape, or nothing where the lengths no longer fit."""
    try:
        yield fitted(_reshape(plan, **changes))
    except ValueError:
        return


def _all_plain(plan: Plan) -> Iterator[Plan]:
    """Everything at once: one compilation when the bug needs no option at all."""
    bare: dict[str, object] = {"kv_heads": 1, "group": 1, "head_dim": 4, "types": "f32"}
    bare |= {"window": None, "cap": None, "sinks": False, "scale": None, "lse": False}
    yield from _proposed(plan, **bare)
    yield from _proposed(plan, **bare, page=min(plan.shape.page, 4))
    for kept in ("window", "sinks", "cap", "group", "kv_heads", "types"):
        yield from _proposed(plan, **{k: v for k, v in bare.items() if k != kept})
    yield fitted(plan)


def _one_option(plan: Plan) -> Iterator[Plan]:
    """One static feature plainer at a time."""
    for name, value in _simpler_options(plan.shape):
        yield from _proposed(plan, **{name: value})
        yield _reshape(plan, **{name: value})


def _simpler_options(shape: Shape) -> Iterator[tuple[str, object]]:
    yield from (("kv_heads", n) for n in range(1, shape.kv_heads))
    yield from (("group", n) for n in range(1, shape.group))
    yield from (("head_dim", n) for n in (1, 2, 4, 8, 33, 40) if n < shape.head_dim)
    yield from ((name, None) for name in ("window", "cap", "scale") if getattr(shape, name) is not None)
    yield from ((name, False) for name in ("sinks", "lse") if getattr(shape, name))
    yield from (("types", t) for t in _TYPE_ORDER[: _TYPE_ORDER.index(shape.types)])
    yield from (("window", w) for w in (1, 2, 3, 4, 5, 8) if shape.window is not None and w < shape.window)


def _known_small(plan: Plan) -> Iterator[Plan]:
    """One sequence of a few tokens, in the last pages or filling its table: what a longer batch often comes down to."""
    if len(plan.lengths) == 1 and plan.lengths[0][1] <= 8:
        return
    for context in (1, 8):
        if context <= plan.shape.capacity:
            yield plan.replace(lengths=((1, context),), tables="reversed", data="normal", amplitude=1.0)
    for page, per_seq in ((1, 5), (1, 8), (4, 2)):
        context = page * per_seq
        shape = {
            "page": page,
            "pages_per_seq": per_seq,
            "pages": per_seq + 2,
            "tokens": max(context, plan.shape.tokens),
        }
        for rows in (context, 1):
            roomy = _reshape(plan.replace(lengths=()), **shape)
            yield from _proposed(roomy.replace(lengths=((rows, context),)))
            yield from _proposed(roomy.replace(lengths=((rows, context),), data="normal", amplitude=1.0))


def _other_pages(plan: Plan) -> Iterator[Plan]:
    """Smaller pages hold the same tokens in more of them; a smaller table and pool."""
    shape = plan.shape
    for page in (1, 2, 3, 4, 8):
        if page < shape.page and page * 2 * shape.pages_per_seq * 64 >= shape.capacity:
            per_seq = -(-shape.capacity // page)
            yield from _proposed(plan, page=page, pages_per_seq=per_seq, pages=shape.pages + per_seq)
    tight = fitted(plan).shape
    for name in ("tokens", "seqs", "pages_per_seq", "pages"):
        if getattr(tight, name) < getattr(shape, name):
            yield _reshape(plan, **{name: getattr(tight, name)})


PASSES: tuple[Callable[[Plan], Iterable[Plan]], ...] = (
    _only_one,
    _fewer_sequences,
    _shorter,
    _known_small,
    _all_plain,
    _one_option,
    _other_pages,
    _plainer,
)
