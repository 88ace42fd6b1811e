"""Source mutants of the Triton kernel: each must be caught by the interpreter and the oracle on a named case."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from contract_cases import CASES, MIXED, Shape, build

pytest.importorskip("triton", reason="the triton package is a development dependency on Linux x86-64 only")

from fuzz.adapters import triton_interpret as target
from fuzz.mutants import patched
from oracle import judge
from oracle.poison import nan_fill
from rpa.backends.triton import interpret

KERNEL = "rpa/backends/triton/kernel.py"


def _bad_page(entry: int):
    """A long sequence whose last page is outside the pool."""
    case = build((20,), (24,))
    tables = np.array(case.block_tables)
    tables[0, 5] = entry
    return case.replace(block_tables=tables)


def _overlapping():
    case = build(*MIXED)
    offsets = np.array(case.query_start_loc)
    offsets[2] = 3
    return case.replace(query_start_loc=offsets)


def _splits(queries=(1, 2), **more):
    return build(queries, (90, 61), Shape(page=4, pages_per_seq=24, pages=48), **more)


KILLERS = {
    "mixed": CASES["mixed"],
    "poisoned": lambda: nan_fill(CASES["mixed"]()),
    "prefill": CASES["prefill"],
    "chunk": lambda: build((9,), (22,)),
    "full": CASES["full_capacity"],
    "window": CASES["window_3"],
    "window_long": lambda: build((20,), (24,), sliding_window=5),
    "sinks": CASES["sinks"],
    "cap": CASES["cap"],
    "loud": CASES["large_logits"],
    "quantised": CASES["int8_per_head"],
    "clear": CASES["rows_past_the_last_query"],
    "overlap": _overlapping,
    "bad_page": lambda: _bad_page(10**9),
    "splits": _splits,
    "splits_of_short_queries": lambda: build((2, 3), (90, 61), Shape(rows=48, page=4, pages_per_seq=24, pages=48)),
}
# What shows each bug; anything not listed shows on `mixed`.
KILLED_BY = {
    "triton_causal_plus1": "chunk", "triton_window_wide": "window_long", "triton_window_narrow": "window",
    "triton_window_no_token_mask": "window_long", "triton_col_off": "full", "triton_stale_page": "full",
    "triton_no_clamp": "bad_page", "triton_bad_page_ignored": "bad_page", "triton_bad_page_own_tile": "bad_page",
    "triton_rows_taken_twice": "overlap", "triton_uncleared": "clear", "triton_no_max": "loud",
    "triton_acc_not_rescaled": "loud", "triton_l_not_rescaled": "splits", "triton_cap_no_outer": "cap",
    "triton_v_not_sanitised": "poisoned", "triton_sink_kvhead": "sinks", "triton_sink_ignored": "sinks",
    "triton_acc_f16": "full", "triton_kv_tail_floor": "full", "triton_split_gap": "splits",
    "triton_split_overlap": "splits", "triton_no_lse": "splits", "triton_split_slot": "splits_of_short_queries",
    "triton_v_scale_missing": "quantised", "triton_edge_interior": "prefill",
}  # fmt: skip
FAST = (
    "triton_causal_strict",
    "triton_kv_swapped",
    "triton_sink_ignored",
    "triton_split_gap",
    "triton_no_clamp",
)


FEW_SPLITS = target.SMALL.replace(num_kv_splits=2)  # several blocks of keys in each


def patches() -> list:
    found = [name for name in patched.found() if name.startswith("triton_")]
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in found]


def mutated(name: str, folder: Path) -> Path:
    """The kernel's source with one patch applied, in a file of its own."""
    patch = patched.found()[name]
    hunks = patched.parse(patch.path)[KERNEL]
    source = folder / f"{name}.py"
    source.write_text(patched._patched(interpret.SOURCE.read_text(), hunks, name))
    return source


def complaint(case, **options) -> str | None:
    """What is wrong with the answer to a case, or None; an error while running is wrong too."""
    for config in (target.SMALL, FEW_SPLITS):
        try:
            output, lse = target.run(case, config, **options)
        except (interpret.OutOfBounds, ZeroDivisionError) as error:
            return str(error)
        found = judge(case, output, target._claim(case), lse)
        if not found.ok:
            return found.text
    return None


@pytest.mark.parametrize("name", patches())
def test_a_bug_in_the_source_is_caught(name, tmp_path):
    case = KILLERS[KILLED_BY.get(name, "mixed")]()
    assert complaint(case, source=mutated(name, tmp_path)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLERS)
def test_the_source_itself_is_right_where_the_bugs_show(name):
    assert complaint(KILLERS[name]()) is None


def test_every_patch_has_a_case_that_shows_it():
    known = {name for name in patched.found() if name.startswith("triton_")}
    assert set(KILLED_BY) <= known
    assert set(KILLED_BY.values()) <= set(KILLERS)
