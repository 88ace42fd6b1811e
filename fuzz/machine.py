"""A KV cache that lives: append, chunk, decode, fork, free, recycle, evict; after each step the oracle on the history.

The machine keeps the logical history of every sequence (its keys and values as numbers) beside the paged cache a
server would keep. Each step runs the target on the paged cache; the oracle judges the same call on a second cache,
laid out anew from the logical histories, so that a mistake in the bookkeeping here cannot hide one in the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fuzz.judge import same_bits
from fuzz.targets import Target
from oracle import Case
from oracle.bound import analyse
from oracle.verdict import compare

PAGES, PAGE, PER_SEQ, SEQS, TOKENS = 24, 4, 8, 4, 10
KV_HEADS, GROUP, HEAD_DIM = 2, 2, 8


@dataclass
class Stream:
    """One sequence: its history, and the pages that hold it."""

    keys: np.ndarray  # f32 [n, Hkv, D]
    values: np.ndarray
    pages: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


class CacheMachine(RuleBasedStateMachine):
    """Drive a target through the life of a cache; subclasses set `target`. `window` is fixed for a machine's life."""

    target: Target
    window: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[Stream] = []
        self.cache = np.full((PAGES, PAGE, 2 * KV_HEADS, HEAD_DIM), np.nan, np.float32)
        self.owners = np.zeros(PAGES, int)  # how many streams hold each page
        self.pending: list[int] = []  # query rows of each stream in the next call
        self.chance = np.random.default_rng(0)
        self.failure: str | None = None

    @initialize(seed=st.integers(0, 99))  # larger ones would depend on what is imported, see `fuzz.strategies`
    def begin(self, seed: int) -> None:
        self.chance = np.random.default_rng(seed)

    # -- pages

    def _free_page(self) -> int | None:
        free = np.flatnonzero(self.owners == 0)
        return int(self.chance.choice(free)) if len(free) else None

    def _writable(self, stream: Stream, column: int) -> bool:
        """Give a stream a page of its own at a column, copying a shared one first; False when the pool is full."""
        if column < len(stream.pages) and self.owners[stream.pages[column]] == 1:
            return True
        page = self._free_page()
        if page is None:
            return False
        self.owners[page] = 1
        if column < len(stream.pages):
            shared = stream.pages[column]
            self.cache[page] = self.cache[shared]
            self.owners[shared] -= 1
            stream.pages[column] = page
        else:
            self.cache[page] = np.nan  # a recycled page holds nothing worth reading
            stream.pages.append(page)
        return True

    def _append(self, stream: Stream, count: int) -> int:
        """Add up to `count` tokens to a stream and its pages; how many found room."""
        for done in range(count):
            position = len(stream)
            if position >= PER_SEQ * PAGE or not self._writable(stream, position // PAGE):
                return done
            k, v = (self.chance.standard_normal((KV_HEADS, HEAD_DIM), np.float32) for _ in range(2))
            stream.keys = np.concatenate([stream.keys, k[None]])
            stream.values = np.concatenate([stream.values, v[None]])
            slot = self.cache[stream.pages[position // PAGE], position % PAGE]
            slot[0::2], slot[1::2] = k, v
        return count

    def _release(self, stream: Stream) -> None:
        for page in stream.pages:
            self.owners[page] -= 1
            if self.owners[page] == 0:
                self.cache[page] = np.nan

    # -- what a server does

    @precondition(lambda self: len(self.streams) < SEQS)
    @rule(tokens=st.integers(1, 9))
    def prefill(self, tokens: int) -> None:
        """A new request, its whole prompt at once."""
        empty = np.zeros((0, KV_HEADS, HEAD_DIM), np.float32)
        self.streams.append(Stream(empty, empty.copy()))
        self._step({len(self.streams) - 1: tokens})

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, SEQS - 1), tokens=st.integers(2, 6))
    def chunk(self, which: int, tokens: int) -> None:
        """More of a prompt, in a chunk."""
        self._step({which % len(self.streams): tokens})

    @precondition(lambda self: self.streams)
    @rule(skip=st.integers(0, SEQS))
    def decode(self, skip: int) -> None:
        """One token for every stream but one."""
        self._step({i: 1 for i in range(len(self.streams)) if i != skip})

    @precondition(lambda self: 0 < len(self.streams) < SEQS)
    @rule(which=st.integers(0, SEQS - 1))
    def fork(self, which: int) -> None:
        """A beam: a second stream on the same pages, copied when one of them writes."""
        parent = self.streams[which % len(self.streams)]
        child = Stream(parent.keys.copy(), parent.values.copy(), list(parent.pages))
        self.owners[child.pages] += 1
        self.streams.append(child)
        self._step({len(self.streams) - 1: 1})

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, SEQS - 1))
    def free(self, which: int) -> None:
        """A request ends; its pages go back to the pool."""
        self._release(self.streams.pop(which % len(self.streams)))
        self._step({})

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, SEQS - 1))
    def evict(self, which: int) -> None:
        """A request is preempted: its pages are lost, and later filled again elsewhere from its history."""
        stream = self.streams[which % len(self.streams)]
        self._release(stream)
        keys, values, stream.pages = stream.keys, stream.values, []
        for position in range(len(keys)):
            if not self._writable(stream, position // PAGE):
                self.streams.remove(stream)
                self._release(stream)
                return
            slot = self.cache[stream.pages[position // PAGE], position % PAGE]
            slot[0::2], slot[1::2] = keys[position], values[position]
        self._step({which % len(self.streams): 1})

    # -- the call, and its judgement

    def _step(self, tokens: dict[int, int]) -> None:
        """Append, then call the target with one query row for each token that found room."""
        room, rows = TOKENS, []
        for i, stream in enumerate(self.streams):
            done = self._append(stream, min(tokens.get(i, 0), room))
            rows.append(min(done, len(stream)))
            room -= rows[-1]
        self.failure = self._judged(rows)

    @invariant()
    def right(self) -> None:
        assert self.failure is None, self.failure

    def _judged(self, rows: list[int]) -> str | None:
        case = self._case(rows, self.cache, [stream.pages for stream in self.streams])
        if self.target.gap(case) is not None:
            return None
        output, _ = self.target.run(case)
        history, tables = self._from_history()
        truth = self._case(rows, history, tables).replace(queries=case.queries)
        verdict = compare(truth, analyse(truth, self.target.claim(truth)), output)
        if verdict.status in ("fail", "suspect"):
            return verdict.text
        again, _ = self.target.run(truth)
        if self.target.batch_invariant and not same_bits(output, again):
            return "the same history on other pages gives other bits"
        return None

    def _from_history(self) -> tuple[np.ndarray, list[list[int]]]:
        """A cache laid out anew: each stream on pages of its own, in order."""
        pages = np.full((SEQS * PER_SEQ, PAGE, 2 * KV_HEADS, HEAD_DIM), np.nan, np.float32)
        tables = []
        for i, stream in enumerate(self.streams):
            own = pages[i * PER_SEQ : (i + 1) * PER_SEQ].reshape(-1, 2 * KV_HEADS, HEAD_DIM)
            own[: len(stream), 0::2], own[: len(stream), 1::2] = stream.keys, stream.values
            tables.append(list(range(i * PER_SEQ, i * PER_SEQ + -(-len(stream) // PAGE))))
        return pages, tables

    def _case(self, rows: list[int], cache: np.ndarray, pages: list[list[int]]) -> Case:
        """The call on a cache; dead metadata and rows hold garbage."""
        tables = np.full((SEQS, PER_SEQ), -1, np.int32)
        for i, own in enumerate(pages):
            tables[i, : len(own)] = own
        starts = np.full(SEQS + 1, 2**31 - 1, np.int32)
        starts[: len(rows) + 1] = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        contexts = np.full(SEQS, -1, np.int32)
        contexts[: len(rows)] = [len(stream) for stream in self.streams]
        queries = np.full((TOKENS, KV_HEADS * GROUP, HEAD_DIM), np.nan, np.float32)
        queries[: sum(rows)] = self.chance.standard_normal((sum(rows), KV_HEADS * GROUP, HEAD_DIM))
        return Case(queries, np.array(cache), contexts, tables, starts, len(rows), sliding_window=self.window,
                    compute_dtype="float32")  # fmt: skip


def machine_for(target: Target, window: int | None = None) -> type[CacheMachine]:
    """A machine that judges a target, for `hypothesis.stateful.run_state_machine_as_test`."""
    return type("CacheMachineOf", (CacheMachine,), {"target": target, "window": window})
