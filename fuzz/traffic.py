"""From a server's step to a `Case`: the page writer, the queries, and garbage in everything that is dead.

Pages start as NaN and become NaN again when they are freed, as the cache of a real server is never clean; only what
the page writer wrote is finite. Contents are functions of what a page means (its prompt block, or its request) and
of the seed, so a replay is repeatable, shared pages agree, and a preempted sequence computes the same bits again.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable

import numpy as np

from fuzz.models import Layer, Model
from fuzz.serve import Limits, Span, Step
from oracle import Case, visible
from oracle.case import dtype_of
from oracle.poison import large_fill, nan_fill

# Logit spread, in standard deviations: flat, usual, and sharp enough to reach a cap or overflow a naive exp. Rounded
# operands lose a sharp row's meaning sooner: its bound would be vacuous.
_AMPLITUDES = {"float32": (0.5, 2.0, 6.0)}
_ROUNDED_AMPLITUDES = (0.5, 1.5, 3.0)
SPIKE = 8.0
_QUANTISED = {"int8": (16.0, 127.0), "float8_e4m3fn": (16.0, 448.0), "float8_e5m2": (16.0, 57344.0)}


class PagedCache:
    """The KV pages of one dtype on the host, [P, page, 2 * Hkv, D]."""

    def __init__(self, model: Model, layer: Layer, limits: Limits, seed: int) -> None:
        self.model, self.seed = model, seed
        self.dtype = dtype_of(layer.pages_dtype)
        shape = (limits.pages, limits.page_size, 2 * model.num_kv_heads, model.head_dim)
        self.dead = np.array(-128 if self.dtype == np.int8 else np.nan).astype(self.dtype)
        self.pages = np.full(shape, self.dead, self.dtype)
        self.scales: tuple[np.ndarray, float] | None = None
        if layer.quantised:  # one form of each kind that the operation takes: by head, and for all
            reach, top = _QUANTISED[layer.pages_dtype]
            by_head = 1 + 0.25 * np.arange(model.num_kv_heads, dtype=np.float32)
            self.scales = (reach / top * by_head).astype(np.float32), reach / top

    def apply(self, step: Step) -> None:
        """Forget what was freed before the step, then write its new keys and values."""
        self.pages[list(step.freed)] = self.dead
        for page, lo, hi, content in step.writes:
            self.pages[page, lo:hi] = self._stored(self._content(content))[lo:hi]

    def _content(self, meaning: Hashable) -> np.ndarray:
        """f32 [page, 2 * Hkv, D], with spikes where kernels are off by one: in the first and the last slot."""
        _, size, heads, dim = self.pages.shape
        rng = np.random.default_rng([self.seed, zlib.crc32(repr(meaning).encode())])
        content = rng.standard_normal((size, heads, dim), np.float32)
        edges, channels = [0, size - 1], rng.integers(dim, size=2)
        content[edges, :, channels] += SPIKE * rng.choice(np.array([-1, 1], np.float32), (2, heads))
        return content

    def _stored(self, content: np.ndarray) -> np.ndarray:
        if self.scales is None:
            return content.astype(self.dtype)
        k_scale, v_scale = self.scales
        top = _QUANTISED[self.dtype.name][1]
        stored = content.copy()
        stored[:, 0::2] /= k_scale[:, None]
        stored[:, 1::2] /= v_scale
        if self.dtype == np.int8:
            stored = np.rint(stored)
        return np.clip(stored, -top, top).astype(self.dtype)


def case_of(step: Step, layer: Layer, cache: PagedCache, limits: Limits) -> Case:
    """The call that a server makes in this step for one layer.

    Rows of nobody, dead metadata rows and dead table entries hold garbage: entries past the context, and before
    the window of a layer that has one, where a server may have given the pages back already.
    """
    rng = np.random.default_rng([cache.seed, step.index, zlib.crc32(layer.name.encode())])
    count = len(step.spans)
    contexts = _garbage(rng, (limits.seqs,), limits)
    starts = _garbage(rng, (limits.seqs + 1,), limits)
    tables = _garbage(rng, (limits.seqs, limits.pages_per_seq), limits)
    starts[: count + 1] = np.cumsum([0, *(span.rows for span in step.spans)])
    for s, span in enumerate(step.spans):
        contexts[s] = span.stop
        first = _first_column(span, layer, limits)
        tables[s, first : len(span.pages)] = span.pages[first:]
    k_scale, v_scale = cache.scales or (None, None)
    sinks = rng.normal(0, 3, cache.model.num_q_heads).astype(np.float32) if layer.sinks else None
    return Case(
        _queries(step, layer, cache.model, limits, rng), cache.pages, contexts, tables, starts, count, sinks,
        softmax_scale=cache.model.softmax_scale, logits_soft_cap=layer.logits_soft_cap,
        sliding_window=layer.sliding_window, compute_dtype=layer.compute_dtype, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def twice(case: Case) -> tuple[Case, Case]:
    """The case with NaN and with large finite values in all that no row sees: one answer, to the bit.

    The first keeps the server's own dead metadata, in which page ids of other sequences are left; the second has the
    oracle's, all of it outside the pool.
    """
    kept = {name: getattr(case, name) for name in ("context_lens", "block_tables", "query_start_loc")}
    return nan_fill(case).replace(**kept), large_fill(case)


def _first_column(span: Span, layer: Layer, limits: Limits) -> int:
    """The first table entry that some row of the span sees a key of."""
    return visible(span.start, span.stop, layer.sliding_window)[0] // limits.page_size


def _queries(step: Step, layer: Layer, model: Model, limits: Limits, rng: np.random.Generator) -> np.ndarray:
    queries = np.full((limits.tokens, model.num_q_heads, model.head_dim), np.nan, np.float32)
    amplitudes = _AMPLITUDES.get(layer.compute_dtype, _ROUNDED_AMPLITUDES)
    row = 0
    for span in step.spans:
        noise = rng.standard_normal((span.rows, model.num_q_heads, model.head_dim), np.float32)
        scale = model.softmax_scale or model.head_dim**-0.5
        queries[row : row + span.rows] = noise * (rng.choice(amplitudes) / (scale * model.head_dim**0.5))
        row += span.rows
    return queries.astype(dtype_of(layer.dtype))


def _garbage(rng: np.random.Generator, shape: tuple[int, ...], limits: Limits) -> np.ndarray:
    """i32: values that crash or mislead whoever reads them, page ids of others among them."""
    traps = np.array([-1, 2**31 - 1, -(2**31), limits.pages, *range(8)], np.int64)
    return rng.choice(traps, shape).astype(np.int32)
