"""Metamorphic relations inside the search: one relation a case, chosen by the plan's seed."""

from __future__ import annotations

import dataclasses

import numpy as np

from fuzz.build import build
from fuzz.plan import Plan, Shape
from fuzz.targets import Target, Unsupported
from oracle import Case
from oracle.relations import RELATIONS, Expectation, Relation
from oracle.relations import check as broken

# These change what a compiled kernel is compiled for, so only the few shapes of so many rows are asked.
RECOMPILED_ROWS = 49
_RECOMPILE = frozenset({"wide_window", "no_sink"})
# Judged by `second_fill` and `repeat` already.
_ELSEWHERE = frozenset({"repeat", "unowned_contents"})
# Twice as often: what only these two find.
_DOUBLED = frozenset({"alone", "dead_sequences"})
USED = tuple(r for r in RELATIONS if r.name not in _ELSEWHERE) + tuple(r for r in RELATIONS if r.name in _DOUBLED)


def check(plan: Plan, case: Case, target: Target, output: np.ndarray) -> tuple[str, str] | None:
    """(kind, text) when the target breaks the relation that the plan's seed picks; None when it keeps it."""
    picked = pick(plan, case)
    if picked is None:
        return None
    relation, expectation = picked
    if relation.promise == "batch invariance" and not target.batch_invariant:
        # Promised by the contract's default mode; a kernel that does not promise it still has to be right twice.
        expectation = dataclasses.replace(expectation, within="both bounds")
    try:
        after, _ = target.run(expectation.case)
    except Unsupported:
        return None
    text = broken(expectation, case, output, after, target.claim)
    return None if text is None else (f"relation:{relation.name}", f"{relation.name}: {text}")


def pick(plan: Plan, case: Case) -> tuple[Relation, Expectation] | None:
    """The first relation, from a place that the seed decides, that applies without a new static shape."""
    for turn in range(len(USED)):
        relation = USED[(plan.seed + turn) % len(USED)]
        if relation.name in _RECOMPILE and plan.shape.tokens != RECOMPILED_ROWS:
            continue
        expectation = relation.apply(case, plan.seed)
        if expectation is not None and (fitting := _same_shape(expectation, case)) is not None:
            return relation, fitting
    return None


def recompiled(shape: Shape) -> list[Case]:
    """What cases become under the relations that need another program, if their shape is asked for them.

    Without the window that all contexts of a case fit in, which is rare.
    """
    if shape.tokens != RECOMPILED_ROWS:
        return []
    case = build(Plan(shape, ((1, shape.capacity),)))
    found = (relation.apply(case, 0) for relation in RELATIONS if relation.name in _RECOMPILE)
    return [expectation.case for expectation in found if expectation is not None]


def _same_shape(expectation: Expectation, case: Case) -> Expectation | None:
    """The expectation with surplus dead rows cut away, or None where the metadata grew past the original's."""
    changed = expectation.case
    surplus = changed.max_seqs - case.max_seqs
    if surplus <= 0:
        return expectation
    if changed.max_seqs - changed.live_seqs < surplus:
        return None
    kept = case.max_seqs
    trimmed = changed.replace(
        context_lens=changed.context_lens[:kept],
        block_tables=changed.block_tables[:kept],
        query_start_loc=changed.query_start_loc[: kept + 1],
    )
    return dataclasses.replace(expectation, case=trimmed)
