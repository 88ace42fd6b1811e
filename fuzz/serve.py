"""A continuous-batching server without a model: it turns requests into the steps a kernel would be called for.

Requests are admitted in order of arrival, first come first served, under a token budget; long prompts are
prefilled in chunks, decoding sequences take one row a step, pages come from one pool and go back to it, pages of
equal prompt blocks are shared by reference count, and when the pool is full the sequence admitted last gives
its pages up and starts over. The manner is vLLM's (Kwon et al., SOSP 2023) with the chunked prefill of
Sarathi-Serve (Agrawal et al., OSDI 2024). No arrays here: `fuzz/cache.py` fills the pages.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fuzz.trace import BLOCK_TOKENS, Request


@dataclass(frozen=True)
class Limits:
    """The static shapes of a server: token budget T, sequences S, pool P, table width, page size."""

    tokens: int
    seqs: int
    pages: int
    pages_per_seq: int
    page_size: int

    @property
    def capacity(self) -> int:
        """Tokens one sequence can ever hold."""
        return min(self.pages_per_seq, self.pages) * self.page_size

    @property
    def chunk(self) -> int:
        """Prompt tokens one sequence may take in a step: less than the budget, so that others go on."""
        return max(1, self.tokens * 3 // 4)


@dataclass(frozen=True)
class Scale:
    """How trace tokens become replay tokens, so that a small machine can replay long prompts."""

    prompt: int = 1
    output: int = 1

    def apply(self, request: Request) -> Request:
        """The request at replay size; at least one token each way."""
        return Request(
            request.arrival,
            max(1, round(request.prompt / self.prompt)),
            max(1, round(request.output / self.output)),
            request.blocks,
        )


class Write(NamedTuple):
    """Slots `[lo, hi)` of a page get their keys and values; `content` says which, equal content equal values."""

    page: int
    lo: int
    hi: int
    content: Hashable


@dataclass(frozen=True)
class Span:
    """One sequence's part in a step: tokens `[start, stop)` of it are queries, `pages` hold `[0, stop)`."""

    request: int
    start: int
    stop: int
    prompt: int
    pages: tuple[int, ...]
    resumed: bool  # it was preempted before

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def kind(self) -> str:
        """`decode`: one new token; `prefill`: the whole prompt at once; `chunk`: a part of what is known."""
        if self.start >= self.prompt and self.rows == 1:
            return "decode"
        return "prefill" if self.start == 0 and self.stop >= self.prompt else "chunk"


@dataclass(frozen=True)
class Step:
    """One call of the kernel, as metadata: who runs, which pages were freed before it and written for it."""

    index: int
    clock: float  # ms since the trace began
    spans: tuple[Span, ...]
    freed: tuple[int, ...]
    writes: tuple[Write, ...]
    waiting: int

    @property
    def rows(self) -> int:
        return sum(span.rows for span in self.spans)

    def shared(self) -> int:
        """Pages that more than one table of this step holds."""
        counts = Counter(page for span in self.spans for page in set(span.pages))
        return sum(count > 1 for count in counts.values())


class Pool:
    """Pages with reference counts; a page filled with prompt blocks can be found by its key and shared."""

    def __init__(self, pages: int, seed: int = 0) -> None:
        order = np.random.default_rng([seed, 0x9001]).permutation(pages)
        self.free: deque[int] = deque(map(int, order))
        self.references = [0] * pages
        self._page_of: dict[Hashable, int] = {}
        self._key_of: dict[int, Hashable] = {}

    def allocate(self) -> int:
        """A page nobody owns, now owned once."""
        page = self.free.popleft()
        self.references[page] = 1
        return page

    def share(self, key: Hashable) -> int | None:
        """The page published under `key`, owned once more, or None."""
        page = self._page_of.get(key)
        if page is not None:
            self.references[page] += 1
        return page

    def publish(self, key: Hashable, page: int) -> None:
        """Let others find a page that is now full; the first of equal pages stays the one to be found."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, page: int) -> bool:
        """Drop one reference; True when that was the last and the page is free again."""
        self.references[page] -= 1
        if self.references[page]:
            return False
        self._page_of.pop(self._key_of.pop(page, None), None)
        self.free.append(page)
        return True


@dataclass
class _Sequence:
    id: int
    prompt: int
    output: int
    blocks: tuple[int, ...]
    computed: int = 0
    generated: int = 0
    resumed: bool = False
    pages: list[int] = field(default_factory=list)

    @property
    def known(self) -> int:
        return self.prompt + self.generated


class Scheduler:
    """Requests in, steps out. Deterministic: the same requests, limits and seed give the same steps.

    Args:
        requests: in order of arrival, in trace tokens.
        limits: static shapes; `scale` brings lengths down to them.
        step_ms: trace time that passes with every step.

    Requests longer than `limits.capacity` are counted in `skipped` and never admitted.
    """

    def __init__(
        self, requests: Iterable[Request], limits: Limits, scale: Scale, step_ms: float, seed: int = 0
    ) -> None:
        self.limits, self.scale, self.step_ms = limits, scale, step_ms
        self.pool = Pool(limits.pages, seed)
        self.running: list[_Sequence] = []
        self.waiting: deque[_Sequence] = deque()
        self.counts: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self._requests = iter(requests)
        self._next: Request | None = next(self._requests, None)
        self._arrived = self._steps = 0
        self._clock = 0.0
        self._freed: list[int] = []
        self._writes: list[Write] = []

    def steps(self) -> Iterator[Step]:
        """Every step until the last request is done."""
        while (step := self.step()) is not None:
            yield step

    def step(self) -> Step | None:
        """Schedule one step, or None when no request is left."""
        self._arrive()
        if not self.running and not self.waiting:
            return None
        spans = self._schedule()
        step = Step(self._steps, self._clock, tuple(spans), tuple(self._freed), tuple(self._writes), len(self.waiting))
        self._freed, self._writes = [], []
        self._steps += 1
        self._clock += self.step_ms
        self._complete(spans)
        return step

    def _arrive(self) -> None:
        """Queue what has arrived, as far as it may soon run; when idle, let time pass until something has."""
        while self._next is not None and len(self.waiting) < self.limits.seqs:
            idle = not self.running and not self.waiting
            if self._next.arrival > self._clock and not idle:
                return
            self._clock = max(self._clock, self._next.arrival)
            request = self.scale.apply(self._next)
            if request.prompt + request.output > self.limits.capacity:
                self.skipped[f"request longer than {self.limits.capacity} replay tokens"] += 1
            else:
                self.waiting.append(_Sequence(self._arrived, request.prompt, request.output, request.blocks))
            self._arrived += 1
            self._next = next(self._requests, None)

    def _schedule(self) -> list[Span]:
        """Running sequences first, oldest first; then as many waiting ones as budget, slots and pages allow."""
        budget, spans = self.limits.tokens, []
        preempted = self.counts["preempted"]
        turn = 0
        while turn < len(self.running) and budget:
            sequence = self.running[turn]
            rows = min(sequence.known - sequence.computed, budget, self.limits.chunk)
            while not self._grow(sequence, rows):
                if self._preempt() is sequence:
                    break
            else:
                spans.append(self._span(sequence, rows))
                budget -= rows
                turn += 1
        while self.waiting and budget and len(self.running) < self.limits.seqs:
            if self.counts["preempted"] > preempted:
                break  # what was just given up would be taken again
            rows = self._admit(self.waiting[0], budget)
            if not rows:
                self.counts["waited for pages"] += 1
                break
            spans.append(self._span(self.running[-1], rows))
            budget -= rows
        return spans

    def _admit(self, sequence: _Sequence, budget: int) -> int:
        """Start the first waiting sequence on the pages others share with it; its rows, 0 if pages lack."""
        self._share(sequence)
        rows = min(sequence.known - sequence.computed, budget, self.limits.chunk)
        if not self._grow(sequence, rows):
            self._drop(sequence)
            return 0
        self.running.append(self.waiting.popleft())
        self.counts["admitted"] += 1
        return rows

    def _share(self, sequence: _Sequence) -> None:
        """Take every leading page that is already computed, but leave one token to query with."""
        for i in range((sequence.known - 1) // self.limits.page_size):
            key = self._key(sequence, i)
            page = None if key is None else self.pool.share(key)
            if page is None:
                break
            sequence.pages.append(page)
            self.counts["shared pages"] += 1
        sequence.computed = len(sequence.pages) * self.limits.page_size

    def _key(self, sequence: _Sequence, i: int) -> tuple[int, int] | None:
        """What page `i` holds, if it is full of prompt whose blocks the trace identifies."""
        end = (i + 1) * self.limits.page_size
        block = (end * self.scale.prompt - 1) // BLOCK_TOKENS
        if end > sequence.prompt or block >= len(sequence.blocks):
            return None
        return (i, sequence.blocks[block])

    def _grow(self, sequence: _Sequence, rows: int) -> bool:
        """Own the pages for `rows` more tokens; all of them or none."""
        need = -(-(sequence.computed + rows) // self.limits.page_size) - len(sequence.pages)
        if need > len(self.pool.free):
            return False
        sequence.pages += [self.pool.allocate() for _ in range(need)]
        return True

    def _preempt(self) -> _Sequence:
        """Take the pages of the sequence admitted last; it waits first in line and computes them again."""
        victim = self.running.pop()
        self._drop(victim)
        victim.resumed = True
        self.waiting.appendleft(victim)
        self.counts["preempted"] += 1
        return victim

    def _drop(self, sequence: _Sequence) -> None:
        self._freed += [page for page in sequence.pages if self.pool.release(page)]
        sequence.pages, sequence.computed = [], 0

    def _span(self, sequence: _Sequence, rows: int) -> Span:
        start, stop = sequence.computed, sequence.computed + rows
        size = self.limits.page_size
        for i in range(start // size, -(-stop // size)):
            content = self._key(sequence, i)
            lo, hi = max(start - i * size, 0), min(stop - i * size, size)
            content = ("own", sequence.id, i) if content is None else ("block", *content)
            self._writes.append(Write(sequence.pages[i], lo, hi, content))
        return Span(sequence.id, start, stop, sequence.prompt, tuple(sequence.pages), sequence.resumed)

    def _complete(self, spans: list[Span]) -> None:
        """The step has run: publish full prompt pages, hand out new tokens, free what is done."""
        by_id = {sequence.id: sequence for sequence in self.running}
        for span in spans:
            sequence = by_id[span.request]
            for i in range(span.start // self.limits.page_size, span.stop // self.limits.page_size):
                if (key := self._key(sequence, i)) is not None:
                    self.pool.publish(key, sequence.pages[i])
            sequence.computed = span.stop
            if sequence.computed == sequence.known:
                sequence.generated += 1
            if sequence.generated == sequence.output:
                self.running.remove(sequence)
                self._drop(sequence)
                self.counts["finished"] += 1
