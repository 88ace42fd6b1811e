"""The Triton kernels' own source in the CPU interpreter, over the contract suite, with every address checked."""

from __future__ import annotations

import numpy as np
import pytest
from contract_cases import CASES, MIXED, SMALL, Shape, build

pytest.importorskip("triton", reason="the triton package is a development dependency on Linux x86-64 only")

from fuzz.adapters import triton_interpret as target
from oracle import judge
from oracle.poison import large_fill, nan_fill
from rpa.backends.triton import interpret, tuning

# A few seconds or more each in an interpreter; the rest take under one.
LONG = {"long_decode", "long_chunk", "long_prefill_window", "positions_past_int16", "page_128", "wide_table",
        "table_65_wide_full", "table_100_wide_full", "head_dim_256", "window_far_from_the_start"}  # fmt: skip
# One of each kind in the default run; --slow runs them all.
FAST = {"one_token", "decode", "mixed", "rows_past_the_last_query", "first_row_not_zero", "no_sequence",
        "sequence_without_queries_between", "empty_sequence_first", "context_shorter_than_queries_sinks",
        "shared_prefix", "page_1", "page_3", "group_3_of_5", "head_dim_7", "window_3", "window_sinks",
        "cap_window_sinks", "scale_negative", "bf16_everything", "fp8_e5m2_per_head", "int8_f32"}  # fmt: skip


def verdict(case, config=target.SMALL):
    output, lse = target.run(case, config)
    return judge(case, output, target._claim(case), lse)


def names():
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in CASES]


@pytest.mark.parametrize("name", names())
def test_case(name):
    found = verdict(CASES[name]())
    assert found.ok, found.text


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in LONG])
def test_case_with_the_shipped_tiles(name):
    case = CASES[name]()
    found = verdict(case, tuning.heuristic(target.signature_of(case), target.CHIP))
    assert found.ok, found.text


def broken(what: str):
    """MIXED with one thing wrong in its metadata."""
    case = build(*MIXED)
    offsets, contexts, tables = (np.array(a) for a in (case.query_start_loc, case.context_lens, case.block_tables))
    match what:
        case "negative_context":
            contexts[1] = -3
        case "context_past_capacity":
            contexts[0] = SMALL.pages_per_seq * SMALL.page + 1
        case "page_past_pool":
            tables[1, 2] = SMALL.pages
        case "negative_page":
            tables[2, 0] = -1
        case "offsets_decrease":
            offsets[2] = 3
        case "offset_past_rows":
            offsets[3] = SMALL.rows + 1
        case "huge_offset":
            offsets[1] = 2**31 - 1
        case "negative_offset":
            offsets[0] = -2
    return case.replace(query_start_loc=offsets, context_lens=contexts, block_tables=tables)


BROKEN = ("negative_context", "context_past_capacity", "page_past_pool", "negative_page", "offsets_decrease",
          "offset_past_rows", "huge_offset", "negative_offset")  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_invalid_metadata_reads_nothing_outside_and_spares_the_neighbours(what):
    case = broken(what)
    found = verdict(case)
    assert found.ok, found.text
    assert list(case.invalid_rows()), "the case is not broken"


def test_a_page_outside_the_pool_breaks_every_tile_of_its_sequence():
    """The first tile of a long sequence does not see the bad page, yet its rows are NaN too."""
    case = build((20,), (24,))
    tables = np.array(case.block_tables)
    tables[0, 5] = -7
    found = verdict(case.replace(block_tables=tables))
    assert found.ok, found.text


@pytest.mark.parametrize("name", ["mixed", "window_sinks", "bf16_everything"])
def test_what_no_row_may_see_changes_no_bit(name):
    case = CASES[name]()
    plain, _ = target.run(case, target.SMALL)
    for fill in (nan_fill, large_fill):
        filled, _ = target.run(fill(case), target.SMALL)
        assert filled.tobytes() == plain.tobytes()


def test_a_sequence_alone_has_the_bits_it_has_in_the_batch():
    case = CASES["mixed"]()
    together, _ = target.run(case, target.SMALL)
    for index, (start, stop) in enumerate(zip(case.query_start_loc[:3], case.query_start_loc[1:4], strict=True)):
        alone, offsets = np.zeros_like(case.queries), np.array(case.query_start_loc)
        alone[: stop - start] = case.queries[start:stop]
        offsets[:2] = 0, stop - start
        only = case.replace(
            queries=alone, query_start_loc=offsets, num_seqs=1,
            context_lens=np.roll(case.context_lens, -index), block_tables=np.roll(case.block_tables, -index, axis=0),
        )  # fmt: skip
        output, _ = target.run(only, target.SMALL)
        assert output[: stop - start].tobytes() == together[start:stop].tobytes()


def test_the_number_of_programs_changes_no_bit():
    case = CASES["mixed"]()
    answers = set()
    for programs in (1, 50):
        options = dict(target.SMALL.options) | {"programs": programs}
        output, lse = target.run(case, target.SMALL.replace(options=tuple(options.items())))
        answers.add((output.tobytes(), lse.tobytes()))
    assert len(answers) == 1


def test_every_split_is_merged_in_its_place():
    """A decode of 50 keys in four splits against the same in one: both within the bound, and not the same program."""
    case = build((1,), (50,), Shape(rows=4, seqs=2, page=4, pages_per_seq=24, pages=24))
    answers = [target.run(case, target.SMALL.replace(num_kv_splits=splits)) for splits in (1, 4)]
    for output, lse in answers:
        found = judge(case, output, target._claim(case), lse)
        assert found.ok, found.text
    assert answers[0][0].tobytes() != answers[1][0].tobytes()


def test_the_interpreter_reports_a_load_outside_its_array():
    memory = interpret.Memory({"kv_pages": np.zeros(8, np.float32)})
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    base = memory.arrays["kv_pages"].ctypes.data
    inside = TensorHandle(np.array([base, base + 28], np.uint64), tl.pointer_type(tl.float32))
    outside = TensorHandle(np.array([base, base + 29], np.uint64), tl.pointer_type(tl.float32))
    memory.check(inside, np.ones(2, bool), "load")
    memory.check(outside, np.array([True, False]), "load")
    with pytest.raises(interpret.OutOfBounds, match=r"load outside every array: elements 0\.\.7 of kv_pages"):
        memory.check(outside, np.ones(2, bool), "load")
