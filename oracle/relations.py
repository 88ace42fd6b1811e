"""Metamorphic relations: what a change of the input must do to the output, with no knowledge of the answer.

A relation takes a case and a seed and returns an `Expectation` (the changed case, and what its output must be, given
the output of the original), or None where it does not apply. `check` compares. Most are bitwise; those that change
the order of summation allow each side its own error bound.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import ml_dtypes
import numpy as np

from oracle import poison
from oracle.attend import attend
from oracle.bound import error_bound
from oracle.case import Case, Sequence, dtype_of, visible
from oracle.claim import Claim
from oracle.exact import live_slots

EVERYTHING = np.ones((1, 1, 1), bool)
Promise = Literal["determinism", "batch invariance", "bound"]
Mask = np.ndarray | Callable[[], np.ndarray]  # a function where it costs a solution, which is seldom asked for


@dataclasses.dataclass(frozen=True, eq=False)
class Expectation:
    """What the changed case must return, given what the original returned."""

    case: Case
    predict: Callable[[np.ndarray], np.ndarray]  # output of the original -> output of the changed case
    about: Mask  # bool, broadcastable to the changed output: the elements the prediction is about
    within: Literal["bits", "bound", "both bounds"] = "bits"  # bound: HARD of the changed case; both: of each
    moved: Mask | None = None  # bool [T, Hq]: pairs, among those it is not about, whose output must differ from it
    least: float = 0.0  # outputs of the original below this are not judged

    @property
    def judged(self) -> np.ndarray:
        """The elements the prediction is about."""
        return self.about() if callable(self.about) else self.about


@dataclasses.dataclass(frozen=True)
class Relation:
    name: str
    promise: Promise  # what a kernel must have promised for the relation to hold
    apply: Callable[[Case, int], Expectation | None]


def check(
    expectation: Expectation,
    original: Case,
    before: np.ndarray,
    after: np.ndarray,
    claim: Callable[[Case], Claim],
) -> str | None:
    """Why two outputs break the relation, or None. `claim` is asked only where the bits differ and may."""
    before, after = np.asarray(before), np.asarray(after)
    wanted = expectation.predict(before)
    if after.shape != wanted.shape or after.dtype != wanted.dtype:
        return f"output is {after.dtype}{after.shape}; it must be {wanted.dtype}{wanted.shape}"
    got, want = after.astype(np.float64), wanted.astype(np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    if expectation.within != "bits" and not same.all():
        limit = error_bound(expectation.case, claim(expectation.case))
        if expectation.within == "both bounds":
            limit = limit + expectation.predict(error_bound(original, claim(original)))
        with np.errstate(invalid="ignore"):
            same |= np.abs(got - want) <= limit
    broken = ~same
    if broken.any():
        broken &= expectation.judged & ~(np.abs(want) < 2 * expectation.least)
    if broken.any():
        place = tuple(np.argwhere(broken)[0].tolist())
        return f"{int(broken.sum())} elements differ, first at {place}: got {got[place]:.9g}, must be {want[place]:.9g}"
    if expectation.moved is not None:
        still = (got == want).all(axis=-1) & ~expectation.judged.all(axis=-1)
        if still.any():
            still &= expectation.moved() if callable(expectation.moved) else expectation.moved
        if still.any():
            return f"row and head {tuple(np.argwhere(still)[0].tolist())} did not move"
    return None


def repeat(case: Case, seed: int) -> Expectation:
    """The same call gives the same bits."""
    return _same(case, case)


def page_permutation(case: Case, seed: int) -> Expectation:
    """Physical page numbers mean nothing."""
    order = np.random.default_rng(seed).permutation(case.num_pages)  # new page i holds old page order[i]
    place = np.argsort(order)
    legal = (case.block_tables >= 0) & (case.block_tables < case.num_pages)
    tables = np.where(legal, place[np.where(legal, case.block_tables, 0)], case.block_tables)
    return _same(case, case.replace(kv_pages=case.kv_pages[order], block_tables=tables))


def page_copy(case: Case, seed: int) -> Expectation | None:
    """A page of one sequence copied to an unused one, as copy-on-write does: nothing changes."""
    live = poison.live_entries(case)
    unused = np.setdiff1d(np.arange(case.num_pages), case.block_tables[live])
    if not live.any() or not unused.size:
        return None
    entries = np.argwhere(live)
    entry = tuple(entries[np.random.default_rng(seed).integers(len(entries))])
    pages, tables = np.array(case.kv_pages), np.array(case.block_tables)
    pages[unused[0]] = pages[tables[entry]]
    tables[entry] = unused[0]
    return _same(case, case.replace(kv_pages=pages, block_tables=tables))


def unowned_contents(case: Case, seed: int) -> Expectation:
    """NaN, then large numbers, in what nobody may see: not a bit changes."""
    return _same(case, poison.nan_fill(case) if seed % 2 else poison.large_fill(case))


def sequence_permutation(case: Case, seed: int) -> Expectation | None:
    """Sequences may stand in any order."""
    sequences = case.sequences()
    if len(sequences) < 2:
        return None
    return _rearranged(case, [sequences[i] for i in np.random.default_rng(seed).permutation(len(sequences))])


def alone(case: Case, seed: int) -> Expectation | None:
    """A sequence alone in the batch gets the bits it gets in company."""
    sequences = case.sequences()
    if not sequences:
        return None
    return _rearranged(case, [sequences[np.random.default_rng(seed).integers(len(sequences))]])


def dead_sequences(case: Case, seed: int) -> Expectation | None:
    """The last live sequence becomes a dead one, metadata left in place: its neighbours keep their bits."""
    if case.live_seqs < 1 or case.invalid_rows():
        return None
    judged = np.zeros((case.num_tokens, 1, 1), bool)
    judged[: int(case.query_start_loc[case.live_seqs - 1])] = True
    changed = case.replace(num_seqs=case.live_seqs - 1)
    return Expectation(changed, lambda output: output, judged)


def empty_sequence(case: Case, seed: int) -> Expectation | None:
    """A sequence with no queries between two others is skipped; the last metadata row must be free for it."""
    if case.live_seqs == case.max_seqs or case.invalid_rows():
        return None
    at = int(np.random.default_rng(seed).integers(case.live_seqs + 1))
    stay = case.max_seqs - 1
    changed = case.replace(
        context_lens=np.insert(case.context_lens[:stay], at, 0),
        block_tables=np.insert(case.block_tables[:stay], at, -1, axis=0),
        query_start_loc=np.insert(case.query_start_loc[: stay + 1], at, case.query_start_loc[at]),
        num_seqs=case.live_seqs + 1,
    )
    return _same(case, changed)


def wide_window(case: Case, seed: int) -> Expectation | None:
    """A window at least as long as every context is no window."""
    longest = max((sequence.context_len for sequence in case.sequences()), default=1)
    if case.sliding_window is None:
        return _same(case, case.replace(sliding_window=case.capacity + seed % 2))
    if case.sliding_window >= longest:
        return _same(case, case.replace(sliding_window=None))
    return None


def no_sink(case: Case, seed: int) -> Expectation | None:
    """A sink of -inf is no sink."""
    if case.softmax_aux is None:
        return _same(case, case.replace(softmax_aux=np.full(case.num_q_heads, -np.inf, np.float32)))
    return _same(case, case.replace(softmax_aux=None)) if np.isneginf(case.softmax_aux).all() else None


def values_doubled(case: Case, seed: int) -> Expectation | None:
    """Twice the values, twice the output, bit for bit: no rounding knows the difference.

    But below the normal range it does: an answer of 0 by cancellation may come out as a subnormal, and products that
    are flushed to 0 may be normal when doubled. They add up to at most `keys` of the least normal number, which moves
    a rounding once in 2**12 answers that are as small as `least`, and rarer the larger they are.
    """
    pages = np.array(case.kv_pages)
    finite = np.isfinite(pages[:, :, 1::2].astype(np.float32))
    doubled = pages[:, :, 1::2].astype(np.float64) * 2
    pages[:, :, 1::2] = doubled.astype(pages.dtype)
    if np.any((pages[:, :, 1::2].astype(np.float64) != doubled) & finite):  # int8 and fp8 overflow
        return None
    out = dtype_of(case.queries.dtype.name)
    largest, smallest = float(ml_dtypes.finfo(out).max), float(ml_dtypes.finfo(out).tiny)
    keys = max((sequence.context_len for sequence in case.sequences()), default=0)
    flushed = keys * float(np.finfo(np.float32).tiny)
    least = 4 * max(smallest, 2**12 * flushed / float(ml_dtypes.finfo(out).eps))

    def predict(output: np.ndarray) -> np.ndarray:
        """Where doubling is exact; elsewhere whatever the kernel returns is right."""
        return (output.astype(np.float64) * 2).clip(-largest, largest).astype(output.dtype)

    def safe() -> np.ndarray:
        answer = np.abs(attend(case)[0])
        return ~((answer > 0) & (answer < least)) & ~(answer > largest / 4)

    return Expectation(case.replace(kv_pages=pages), predict, safe, least=least)


def head_permutation(case: Case, seed: int) -> Expectation | None:
    """Kv heads may stand in any order if their query heads, sinks and scales go with them."""
    if case.num_kv_heads < 2:
        return None
    order = np.random.default_rng(seed).permutation(case.num_kv_heads)
    heads = (order[:, None] * case.group + np.arange(case.group)).reshape(-1)
    combined = (order[:, None] * 2 + np.arange(2)).reshape(-1)
    changed = case.replace(
        queries=case.queries[:, heads],
        kv_pages=case.kv_pages[:, :, combined],
        softmax_aux=None if case.softmax_aux is None else case.softmax_aux[heads],
        k_scale=case.k_scale[order] if isinstance(case.k_scale, np.ndarray) else case.k_scale,
        v_scale=case.v_scale[order] if isinstance(case.v_scale, np.ndarray) else case.v_scale,
    )
    return Expectation(changed, lambda output: output[:, heads], EVERYTHING)


def chunked(case: Case, seed: int) -> Expectation | None:
    """A prefill cut in two is the whole prefill, within both bounds: its first part sees a shorter context."""
    longest = max(case.sequences(), key=lambda sequence: sequence.num_rows, default=None)
    if longest is None or longest.num_rows < 2:
        return None
    cut = int(np.random.default_rng(seed).integers(1, longest.num_rows))
    return _split(case, longest, [cut])


def token_by_token(case: Case, seed: int) -> Expectation | None:
    """A prefill decoded one token at a time is the prefill, within both bounds."""
    longest = max(case.sequences(), key=lambda sequence: sequence.num_rows, default=None)
    if longest is None or longest.num_rows < 2:
        return None
    return _split(case, longest, list(range(1, longest.num_rows)))


def unit_values(case: Case, seed: int) -> Expectation | None:
    """Values of 1 give 1: the weights of a softmax without sinks sum to 1. The bound of constant values is tight."""
    if case.softmax_aux is not None:
        return None
    pages = np.array(case.kv_pages)
    pages[:, :, 1::2] = 1
    sees = np.zeros((case.num_tokens, 1, 1))
    for sequence in case.sequences():
        sees[sequence.start : sequence.stop, 0, 0] = sequence.positions >= 0
    scale = None if case.v_scale is None else np.ones(case.num_kv_heads, np.float32)
    changed = case.replace(kv_pages=pages, v_scale=scale)  # kept where there is one: None is another program

    def ones(output: np.ndarray) -> np.ndarray:
        return np.broadcast_to(sees, output.shape).astype(output.dtype)

    return Expectation(changed, ones, EVERYTHING, within="bound")


def tracer(case: Case, seed: int) -> Expectation | None:
    """64 added to one live value moves the rows that see it and no bit of any other."""
    sequences = [sequence for sequence in case.sequences() if sequence.num_keys]
    if not sequences or case.quantised:
        return None
    rng = np.random.default_rng(seed)
    sequence = sequences[rng.integers(len(sequences))]
    slot, kv_head = int(rng.choice(live_slots(case, sequence))), int(rng.integers(case.num_kv_heads))
    pages = np.array(case.kv_pages)
    value = pages.reshape(-1, *pages.shape[2:])[slot, 2 * kv_head + 1]
    value[...] = (value.astype(np.float32) + 64).astype(value.dtype)
    changed = case.replace(kv_pages=pages)
    heads = slice(kv_head * case.group, (kv_head + 1) * case.group)
    seen = np.zeros((case.num_tokens, case.num_q_heads), bool)
    for other in case.sequences():
        for row in _rows_that_see(case, other, slot):
            seen[row, heads] = True

    def moved() -> np.ndarray:
        return seen & (np.abs(attend(changed)[0] - attend(case)[0]).max(axis=-1) > 1)

    return Expectation(changed, lambda output: output, ~seen[..., None], moved=moved)


_PROMISES: dict[Promise, tuple[Callable[[Case, int], Expectation | None], ...]] = {
    "determinism": (repeat,),
    "batch invariance": (
        page_permutation,
        page_copy,
        unowned_contents,
        sequence_permutation,
        alone,
        dead_sequences,
        empty_sequence,
        wide_window,
        no_sink,
        values_doubled,
        head_permutation,
        tracer,
    ),
    "bound": (chunked, token_by_token, unit_values),
}
RELATIONS = tuple(Relation(f.__name__, promise, f) for promise, fs in _PROMISES.items() for f in fs)


def _same(case: Case, changed: Case) -> Expectation:
    return Expectation(changed, lambda output: output, EVERYTHING)


def _rearranged(case: Case, sequences: list[Sequence]) -> Expectation:
    """These sequences in this order from row 0 on, every static shape kept; all else dead."""
    rows = np.concatenate([np.arange(s.start, s.stop) for s in sequences])
    index = [s.index for s in sequences]
    dead = case.max_seqs - len(index)
    lengths = [s.num_rows for s in sequences]
    queries = np.zeros_like(case.queries)
    queries[: len(rows)] = case.queries[rows]
    changed = case.replace(
        queries=queries,
        context_lens=np.concatenate([case.context_lens[index], np.zeros(dead, np.int32)]),
        block_tables=np.concatenate([case.block_tables[index], np.full((dead, case.pages_per_seq), -1, np.int32)]),
        query_start_loc=np.concatenate([[0], np.cumsum(lengths), np.zeros(dead, np.int64)]),
        num_seqs=len(index),
    )

    def predict(output: np.ndarray) -> np.ndarray:
        moved = np.zeros_like(output)
        moved[: len(rows)] = output[rows]
        return moved

    return Expectation(changed, predict, EVERYTHING)


def _split(case: Case, sequence: Sequence, cuts: list[int]) -> Expectation:
    """One sequence as several that share its pages, each with the context its last row has."""
    at = sequence.index
    ends = [*cuts, sequence.num_rows]
    contexts = [max(0, sequence.context_len - sequence.num_rows + end) for end in ends]
    changed = case.replace(
        context_lens=np.concatenate([case.context_lens[:at], contexts, case.context_lens[at + 1 :]]),
        block_tables=np.insert(case.block_tables, [at] * len(cuts), case.block_tables[at], axis=0),
        query_start_loc=np.insert(case.query_start_loc, [at + 1] * len(cuts), [sequence.start + cut for cut in cuts]),
        num_seqs=case.num_seqs + len(cuts),
    )
    return Expectation(changed, lambda output: output, EVERYTHING, within="both bounds")


def _rows_that_see(case: Case, sequence: Sequence, slot: int) -> np.ndarray:
    """Output rows of the sequence that see a physical slot, which its table may hold more than once."""
    positions = np.arange(*sequence.keys)[live_slots(case, sequence) == slot]
    lo, hi = visible(sequence.positions, sequence.context_len, case.sliding_window)
    sees = (positions >= lo[:, None]) & (positions < hi[:, None])
    return sequence.start + np.flatnonzero(sees.any(axis=1))
