"""The judge of a tuning run, offered to `rpa` as the entry point `rpa.verifier`: the oracle on a sample of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from oracle import Case, Claim, visible
from oracle.bound import Analysis, analyse
from oracle.verdict import compare

_WORK = 3e8  # multiplications the oracle may spend on one candidate, a second or two
_ROWS = 24


def verify(program: Any, args: tuple[Any, ...], output: Any) -> str | None:
    """Why a candidate's output is wrong, or None.

    By the contract a row at position p is the decode row of the same table with p + 1 keys, so a sample of rows, the
    first and last of sequences among them, is judged without reading the rest of the cache.

    Args:
        program: what ran; its `signature` says the options, its `claim()` what it promises.
        args: the one `Inputs` it ran on.
        output: the pair (output, lse or None) it gave.
    """
    (inputs,) = args
    signature = program.signature
    answer, lse = output
    rows, case, analysis = _analysed(inputs, signature, Claim(**program.claim()))
    if case is not None and analysis is not None:
        part = np.asarray(answer[rows])
        verdict = compare(case, analysis, part, None if lse is None else np.asarray(lse[rows]))
        if verdict.status == "fail":
            return f"{len(rows)} rows judged by the oracle: {verdict.text}"
    stop = int(np.asarray(inputs.query_start_loc)[int(np.asarray(inputs.num_seqs)[0])])
    if stop < signature.num_tokens and np.asarray(answer[stop:]).astype(np.float32).any():
        return f"rows {stop} and on belong to nobody and are not 0"
    return None


_last: dict[Any, Any] = {}  # one tuning run's rows and case, and an analysis a claim: its candidates share them


def _analysed(inputs: Any, signature: Any, claim: Claim) -> tuple[np.ndarray, Case | None, Analysis | None]:
    if _last.get("inputs") is not inputs:
        _last.clear()
        _last.update(inputs=inputs, sample=sample(inputs, signature))
    rows, case = _last["sample"]
    if case is not None and claim not in _last:
        _last[claim] = analyse(case, claim)
    return rows, case, _last.get(claim)


def sample(inputs: Any, signature: Any) -> tuple[np.ndarray, Case | None]:
    """Rows of a call, and the case in which each is a decode step of its own; no case where no row is live."""
    count = int(np.asarray(inputs.num_seqs)[0])
    offsets = np.asarray(inputs.query_start_loc)[: count + 1]
    contexts = np.asarray(inputs.context_lens)[:count]
    tables = np.asarray(inputs.block_tables)[:count]
    rows = _rows(offsets, contexts, signature)
    if not len(rows):
        return rows, None
    sequence = np.searchsorted(offsets, rows, side="right") - 1
    position = contexts[sequence] - offsets[sequence + 1] + rows
    pages, table = [], np.zeros((len(rows), signature.pages_per_seq), np.int32)
    for i, (s, p) in enumerate(zip(sequence, position, strict=True)):
        low, high = visible(int(p), int(p) + 1, signature.sliding_window)
        first, last = low // signature.page_size, -(-high // signature.page_size)
        table[i, first:last] = len(pages) + np.arange(last - first)
        pages += list(tables[s, first:last])
    case = Case(
        np.asarray(inputs.queries[rows]),
        np.asarray(inputs.kv_pages[np.asarray(pages or [0])]),
        np.maximum(position + 1, 0),
        table,
        np.arange(len(rows) + 1),
        len(rows),
        None if inputs.softmax_aux is None else np.asarray(inputs.softmax_aux),
        softmax_scale=signature.softmax_scale,
        logits_soft_cap=signature.logits_soft_cap,
        sliding_window=signature.sliding_window,
        compute_dtype=signature.compute_dtype,
        k_scale=None if inputs.k_scale is None else np.asarray(inputs.k_scale),
        v_scale=None if inputs.v_scale is None else np.asarray(inputs.v_scale),
    )
    return rows, case


def _rows(offsets: np.ndarray, contexts: np.ndarray, signature: Any) -> np.ndarray:
    """First and last rows of sequences and some at random, as many as the oracle's work allows, at least one."""
    random = np.random.default_rng(0)
    live = offsets[1:] > offsets[:-1]
    if not live.any():
        return np.zeros(0, np.int64)
    edges = np.unique(np.concatenate([offsets[:-1][live], offsets[1:][live] - 1]))
    anywhere = random.permutation(np.arange(offsets[0], offsets[-1]))[:_ROWS]
    order = np.concatenate([random.permutation(edges)[: _ROWS // 2], anywhere])
    sequence = np.searchsorted(offsets, order, side="right") - 1
    work = contexts[sequence] * float(signature.num_q_heads * signature.head_dim)
    fits = np.cumsum(work) <= _WORK
    fits[0] = True
    return np.unique(order[fits])
