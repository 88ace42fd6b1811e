"""What a kernel weighs: its attention weights, read off by giving one slot at a time a value.

The answer is linear in the values. With ones in one slot of one kv head and zeros in all others, the answer of a row
and head is the weight that it gives this slot, whatever kernel it is. Beside the right weights that shows which keys
are read that must not be, which are missing, and where an answer belongs that stands in the wrong place: an
explanation that needs no catalogue of bugs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from fuzz.targets import Target
from oracle import Case, attend
from oracle.case import Sequence

CALLS = 200  # cases of more slots, in pages that somebody owns, are not asked
LIKE, LIKE_F32 = 2.0**-6, 2.0**-9  # weights that differ by less are one weight, but for a rounding
LOUD = 60  # exp of a logit past it is next to nothing, or to infinity
SEEN, FEW = 1e-6, 2e-3  # a weight that is not 0; and one that a kernel of narrow weights may not lose
PATTERN = 7  # the value of element d is -(1 + d % 7), so that elements in each other's place show
NOBODYS = -1  # stands for all pages that no sequence owns, where there are too many to ask


@dataclass(frozen=True)
class Explained:
    """The family that a failure belongs to, and what was seen, in words."""

    family: str
    words: str
    sure: bool = True  # False: bugs of other families show alike


@dataclass(frozen=True)
class Weights:
    """What a target weighs beside what is right; a slot is (page, place in it, kv head)."""

    case: Case
    needed: frozenset[str]  # options without which the target is right
    slots: list[tuple[int, int, int]]
    got: np.ndarray  # f64 [slots, T, Hq, D]: the same for all D, of a right kernel
    right: np.ndarray  # f64 [slots, T, Hq]
    idle: np.ndarray  # f64 [T, Hq, D]: the answer where all values are 0

    @property
    def like(self) -> float:
        """The difference that is none."""
        exact = self.case.queries.dtype == np.float32 == np.dtype(self.case.options["compute_dtype"])
        return LIKE_F32 if exact else LIKE


def measured(case: Case, target: Target, needed: frozenset[str]) -> Weights | None:
    """The weights of a small case whose dead slots are finite, or None: too large, too slow, or it raises."""
    pages, page, combined, _ = case.kv_pages.shape
    heads = range(combined // 2)
    slots = list(itertools.product(range(pages), range(page), heads))
    owned = {int(p) for s in case.sequences() for p in s.pages[s.keys[0] // page : -(-s.keys[1] // page)]}
    if len(slots) > CALLS:
        slots = [slot for slot in slots if slot[0] in owned] + [(NOBODYS, 0, head) for head in heads]
    if len(slots) > CALLS or target.interpreted or not target.deterministic or not case.live_rows:
        return None
    empty = np.array(case.kv_pages)
    empty[:, :, 1::2] = np.zeros((), empty.dtype)
    values = -(1 + np.arange(case.head_dim) % PATTERN)
    others = np.setdiff1d(np.arange(pages), list(owned))
    got, right = [], []
    try:
        idle = target.run(case.replace(kv_pages=empty))[0]
        for at, place, head in slots:
            kv = empty.copy()
            where = (others, slice(None)) if at == NOBODYS else (at, place)
            kv[*where, 2 * head + 1] = values.astype(kv.dtype)
            one = case.replace(kv_pages=kv)
            got.append(target.run(one)[0].astype(np.float64) / values)
            right.append(attend(one)[0][..., 0] / values[0])
    except Exception:  # a kernel that refuses other values has no weights to show
        return None
    return Weights(case, needed, slots, np.array(got), np.array(right), idle.astype(np.float64))


def explain(weights: Weights) -> Explained | None:
    """What is wrong with the row and head whose weights are furthest from the right ones; None where nothing is."""
    w = weights
    if np.isfinite(w.idle).all() and np.abs(w.idle[: w.case.live_rows]).max(initial=0.0) > w.like:
        return Explained("heads", "where all values are 0 the answer is not: something else is read as values")
    off = np.abs(w.got - w.right[..., None]).max(axis=(0, 3))
    off[w.case.live_rows :] = 0
    if off.max(initial=0.0) < SEEN:
        return None
    broken = ~np.isfinite(off)
    row, head = (int(i) for i in np.unravel_index(np.where(broken, np.inf, off).argmax(), off.shape))
    sequence = next((s for s in w.case.sequences() if s.start <= row < s.stop), None)
    if sequence is None:
        return None
    place = f"row {row}, head {head}"
    if broken[row, head]:
        blind = "which sees no key, " if w.right[:, row, head].max() < SEEN else ""
        return Explained("softmax", f"{place}, {blind}is not finite whatever the values are")
    got, right = w.got[:, row, head].mean(axis=1), w.right[:, row, head]
    steps = (_narrow, _silent, _some_dims, _elsewhere, _other_keys, _same_keys)
    found = next(f for step in steps if (f := step(w, sequence, row, head, got, right)))
    kept = w.case.quantised or bool(w.needed)  # by the shrinker, so the bug is theirs
    return Explained(found[0], f"{place} {found[1]}", kept or (found[0] not in VAGUE and "miss" not in found[1]))


VAGUE = ("softmax", "ragged", "dtype")  # what is left when no key is out of place
Found = tuple[str, str] | None  # the family, and words that follow "row 3, head 1"


def _narrow(w: Weights, s: Sequence, row: int, head: int, got: np.ndarray, right: np.ndarray) -> Found:
    other = ((right > SEEN) != (np.abs(got) > SEEN)) & (np.maximum(right, np.abs(got)) > FEW)
    if other.any() or np.abs(w.got[:, row, head] - right[:, None]).max() > w.like:
        return None
    if w.needed:
        return None
    return "dtype", "weighs each key rightly but for its rounding, which is coarser than claimed"


def _silent(w: Weights, s: Sequence, row: int, head: int, got: np.ndarray, right: np.ndarray) -> Found:
    if np.abs(w.got[:, row, head]).max() > SEEN or right.max() < w.like:
        return None
    if w.needed:
        return "sinks and cap", f"weighs nothing, which takes {' and '.join(sorted(w.needed))}"
    level = float(attend(w.case)[1][row, head])
    if abs(level) > LOUD:
        return "softmax", f"weighs nothing, where its logits are about {level:.0f}: exp left nothing"
    if np.abs(w.got[:, row]).max() > SEEN:
        return "heads", "weighs nothing, and other heads do"
    return "ragged", "weighs nothing: it is not computed, or its sum is lost"


def _some_dims(w: Weights, s: Sequence, row: int, head: int, got: np.ndarray, right: np.ndarray) -> Found:
    """Of one head, some elements are right and others are not."""
    wrong = np.abs(w.got[:, row, head] - right[:, None]).max(axis=0) > w.like
    if np.ptp(w.got[:, row, head], axis=1).max() > 5 * w.like and wrong.all():
        return "heads", "has elements in each other's place"
    if wrong.all() or not wrong.any():
        return None
    return "heads", f"is wrong in elements {_few(np.flatnonzero(wrong))} alone"


def _elsewhere(w: Weights, s: Sequence, row: int, head: int, got: np.ndarray, right: np.ndarray) -> Found:
    """The right answer of another row or head."""
    seen = right > SEEN
    even = seen.any() and np.ptp(right[seen]) < 5 * w.like
    if even and got[seen].max() >= w.like:
        return None  # keys of equal weight, or one key alone: rows would be alike by chance
    alike = np.abs(w.right - got[:, None, None]).max(axis=0) < w.like
    alike &= w.right.max(axis=0) > w.like
    if alike[row, head]:
        return None
    for other_row, other in np.argwhere(alike):
        if other_row == row:
            return "heads", f"holds the answer of head {other}"
        if other == head:
            return "ragged", f"holds the answer of row {other_row}"
    return None


def _other_keys(w: Weights, s: Sequence, row: int, head: int, got: np.ndarray, right: np.ndarray) -> Found:
    """Keys that are read and must not be, and keys that are missing."""
    extra = np.flatnonzero((right < SEEN) & (np.abs(got) > SEEN))
    missing = np.flatnonzero((right > FEW) & (np.abs(got) < right / 100))
    if not len(extra) and not len(missing):
        return None
    own, page = head // w.case.group, w.case.page_size
    places = {i: _positions(w, s, i) for i in (*extra, *missing)}
    if len(extra):
        share = f"gives {np.abs(got[extra]).sum():.2g} of its weight to"
        foreign = [i for i in extra if w.slots[i][2] != own]
        if foreign:
            return "heads", f"{share} kv head {w.slots[foreign[0]][2]}; its own is {own}"
        astray = [i for i in extra if not places[i]]
        if astray:
            at, slot, _ = w.slots[astray[0]]
            if right.max() < SEEN:
                return "ragged", "sees no key, and yet weighs some"
            where = "a page" if at == NOBODYS else f"slot {slot} of page {at}"
            return "paging", f"{share} {where}, which is not the sequence's"
        keys = [places[i][0] for i in extra]
        if len(extra) == len(missing) and not ((right > w.like) & (np.abs(got) > w.like)).any():
            return "paging", f"reads {_keys(keys)} where {_keys([places[i][0] for i in missing])} should be"
        return "masking", f"{share} {_keys(keys)}, {_why_unseen(w, s, row, keys)}"
    lost = [places[i][0] for i in missing if places[i]]
    rest = (right > w.like) & (np.abs(got) > w.like)
    ratio = got[rest] / right[rest]
    if rest.sum() > 1 and np.ptp(ratio) > 5 * w.like * ratio.max() and ratio.max() > 1.5 * ratio.min():
        return "paging", f"misses {_keys(lost)}, and others weigh too much: they are read in their place"
    tail = len(lost) > 1 and max(lost) == s.context_len - 1 and min(lost) % page == 0
    return ("tails" if tail else "masking"), f"misses {_keys(lost)} of its {int((right > SEEN).sum())}"


def _same_keys(w: Weights, s: Sequence, row: int, head: int, got: np.ndarray, right: np.ndarray) -> Found:
    """The right keys with wrong weights."""
    ratio = got[right > FEW] / right[right > FEW]
    least = ratio.min(initial=np.inf)
    twice = np.flatnonzero(np.rint(ratio / least) == 2) if least > 0 else []
    if len(twice) and np.abs(ratio / least - np.rint(ratio / least)).max() < 5 * w.like and ratio.max() < 2.5 * least:
        places = [_positions(w, s, i) for i in np.flatnonzero(right > FEW)]
        keys = [places[i][0] for i in twice]
        once = [p for i, p in enumerate(places) if i not in twice]
        if once and all(len(p) > 1 for p in once):
            return "paging", f"counts {_keys(once[0])} once, which lie in one slot"
        return "split-KV", f"counts {_keys(keys)} twice"
    if ratio.size and np.ptp(ratio) < w.like * np.abs(ratio).max():
        words = f"weighs every key {ratio.mean():.3g} times as much as is right"
    else:
        words = "sees the right keys, and their logits are wrong"
    if w.case.quantised:
        return "dtype", words
    if w.needed:
        return "sinks and cap", f"{words}, which takes {' and '.join(sorted(w.needed))}"
    if w.case.group > 1 and w.case.softmax_aux is not None:  # kept for more than one head, which a sink tells apart
        return "heads", words
    return "softmax", words


def _positions(w: Weights, s: Sequence, slot: np.integer) -> list[int]:
    """The keys of a sequence that lie in a slot."""
    at, place, _ = w.slots[slot]
    columns = -(-max(s.context_len, 1) // w.case.page_size)
    return [c * w.case.page_size + place for c in range(columns) if s.pages[c] == at]


def _why_unseen(w: Weights, s: Sequence, row: int, keys: list[int]) -> str:
    position = int(s.positions[row - s.start])
    if max(keys) >= s.context_len:
        return "past the end of the context"
    return "after its own position" if max(keys) > position else "before its window"


def _keys(numbers: list[int]) -> str:
    return f"key{'s' * (len(set(numbers)) > 1)} {_few(numbers)}"


def _few(numbers: object) -> str:
    found = sorted({int(n) for n in numbers})  # type: ignore[attr-defined]
    return ", ".join(map(str, found[:4])) + (", …" if len(found) > 4 else "")
