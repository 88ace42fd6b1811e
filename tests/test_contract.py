"""Every backend that runs on this machine against everything the contract says, judged by the oracle.

Backends that only an interpreter or a compiler reaches here run the same cases in their own files.
"""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract_cases import CASES, MIXED, SLOW, SMALL, Shape, build

from fuzz.targets import load
from oracle import Claim, judge
from oracle.poison import large_fill, nan_fill
from rpa import device, ragged_page_attention_v2, registry


def backends_here() -> list[str]:
    """The backends whose chip this machine has."""
    chip = device.current().platform
    return [slot.name for slot in registry.exists() if chip in slot.chips]


@pytest.fixture(params=backends_here())
def backend(request) -> str:
    return request.param


def platform_of(backend: str) -> str:
    return next(slot.platform for slot in registry.SLOTS if slot.name == backend)


def call(backend: str, case, **more):
    """The public function on the case's arrays; output and lse as NumPy."""
    output, lse = ragged_page_attention_v2(
        *case.arrays, **case.options, platform=platform_of(backend), return_lse=True, **more
    )
    return np.asarray(output), np.asarray(lse)


def claim_of(backend: str, case) -> Claim:
    return load(backend).claim(case)


def skip_unsupported(backend: str, case) -> None:
    reason = load(backend).supports(case)
    if reason:
        pytest.skip(f"{backend} declares: {reason}")


SHAPES = (  # the first that a backend takes; both hold 24 tokens a sequence
    (SMALL, {}),
    (Shape(pages_per_seq=3, page=8, head_dim=64), {"dtype": "bfloat16", "compute_dtype": "bfloat16"}),
)


def fitting(backend: str, queries: tuple[int, ...], contexts: tuple[int, ...], **options):
    """A small case of these lengths at a shape that the backend takes."""
    cases = (build(queries, contexts, shape, **(dtypes | options)) for shape, dtypes in SHAPES)
    return next(case for case in cases if load(backend).supports(case) is None)


def bits(array) -> bytes:
    return np.asarray(array).tobytes()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_case(backend, name):
    """Within the computed bound, output and lse; and whatever lies where no row looks changes no bit."""
    case = CASES[name]()
    skip_unsupported(backend, case)
    output, lse = call(backend, nan_fill(case))
    verdict = judge(case, output, claim_of(backend, case), lse)
    assert verdict.status == "pass", verdict.text
    again, lse_again = call(backend, large_fill(case))
    assert bits(output) == bits(again), "the contents of slots that no row sees changed the output"
    assert bits(lse) == bits(lse_again), "the contents of slots that no row sees changed the lse"


# ------------------------------------------------------------------ edges answered exactly


def test_rows_of_nobody_are_zero_and_minus_inf(backend):
    case = fitting(backend, (2, 3), (7, 3), first_row=4)
    output, lse = call(backend, nan_fill(case))
    nobody = np.r_[0:4, 9 : case.num_tokens]
    assert bits(output[nobody]) == bytes(output[nobody].nbytes)  # +0, not -0
    assert np.isneginf(lse[nobody]).all()


@pytest.mark.parametrize("sinks", [False, True])
def test_row_that_sees_no_key(backend, sinks):
    case = fitting(backend, (6, 3), (2, 0), sinks=sinks)
    output, lse = call(backend, nan_fill(case))
    blind = np.r_[0:4, 6:9]
    expected = np.broadcast_to(case.softmax_aux if sinks else np.float32(-np.inf), (7, case.num_q_heads))
    assert not output[blind].any()
    assert bits(lse[blind]) == bits(expected)


def test_window_as_long_as_the_context_is_no_window(backend):
    case = fitting(backend, (5, 1, 3), (9, 20, 6))
    whole = call(backend, case)
    for window in (20, 24, 10**9):
        windowed = call(backend, case.replace(sliding_window=window))
        assert [bits(a) for a in windowed] == [bits(a) for a in whole], f"sliding_window={window}"


def test_mask_value_and_limits_change_no_bit(backend):
    case = fitting(backend, *MIXED)
    plain = call(backend, case)
    for option in ({"mask_value": -1e30}, {"mask_value": -3e38, "vmem_limit_bytes": 64 << 20}):
        assert [bits(a) for a in call(backend, case, **option)] == [bits(a) for a in plain], option


# ------------------------------------------------------------------ metadata on the device: invalid sequences are NaN

BAD = {
    "page_past_the_pool": {"block_tables": (1, 0, SMALL.pages)},
    "page_negative": {"block_tables": (1, 1, -1)},
    "page_huge": {"block_tables": (1, 1, 2**31 - 1)},
    "context_negative": {"context_lens": (1, -1)},
    "context_past_the_table": {"context_lens": (1, SMALL.pages_per_seq * SMALL.page + 1)},
    "context_huge": {"context_lens": (1, 2**31 - 1)},
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_traced_metadata_is_contained(backend, name):
    """The bad sequence's rows are NaN; every other sequence keeps its bits."""
    good = fitting(backend, (5, 4, 3), (9, 11, 6), sinks=True)
    bad = _damaged(good, BAD[name])
    program = jitted(backend, good)
    clean, clean_lse = program(*device_arrays(good))
    output, lse = (np.asarray(a) for a in program(*device_arrays(bad)))
    assert np.isnan(output[5:9]).all()
    assert np.isnan(lse[5:9]).all()
    others = np.r_[0:5, 9 : good.num_tokens]
    assert bits(output[others]) == bits(np.asarray(clean)[others])
    assert bits(lse[others]) == bits(np.asarray(clean_lse)[others])


OFFSETS = {  # offsets -> (rows that keep their bits, rows that are NaN)
    "decreasing": ([0, 5, 3, 12], np.r_[0:5], np.r_[5:12]),
    "past_the_rows": ([0, 5, 9, 25], np.r_[0:9], np.r_[9:24]),
    "negative": ([-1, 5, 9, 12], np.r_[5:12], np.r_[0:5]),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_invalid_traced_offsets_are_contained(backend, name):
    good = fitting(backend, (5, 4, 3), (9, 11, 6))
    offsets, kept, lost = OFFSETS[name]
    changed = np.array(good.query_start_loc)
    changed[:4] = offsets
    program = jitted(backend, good)
    clean, _ = program(*device_arrays(good))
    output, lse = (np.asarray(a) for a in program(*device_arrays(good.replace(query_start_loc=changed))))
    assert bits(output[kept]) == bits(np.asarray(clean)[kept])
    assert np.isnan(output[lost]).all()
    assert np.isnan(lse[lost]).all()


def _damaged(case, change):
    (field, (*where, value)), *_ = change.items()
    array = np.array(getattr(case, field))
    array[tuple(where)] = value
    return case.replace(**{field: array})


def device_arrays(case) -> list:
    return [None if array is None else jnp.asarray(array) for array in case.arrays]


def jitted(backend: str, case):
    """The call with every array traced; one jitted function for each set of options, so that programs are shared."""
    return _jitted(platform_of(backend), tuple(sorted(case.options.items())))


@cache
def _jitted(platform: str, options: tuple):
    return jax.jit(partial(ragged_page_attention_v2, **dict(options), platform=platform, return_lse=True))


# ------------------------------------------------------------------ guarantees

LAYOUTS = [((5, 1, 3), (9, 24, 6)), ((24,), (24,)), ((1, 1, 1, 1, 1), (3, 24, 8, 1, 17)), ((0, 2), (0, 20)), ((), ())]


def test_one_compilation_serves_every_layout(backend):
    options = fitting(backend, *MIXED).options | {"platform": platform_of(backend), "return_lse": True}
    program = jax.jit(partial(ragged_page_attention_v2, **options))
    for queries, contexts in LAYOUTS:
        case = fitting(backend, queries, contexts)
        output, lse = program(*device_arrays(nan_fill(case)))
        verdict = judge(case, np.asarray(output), claim_of(backend, case), np.asarray(lse))
        assert verdict.status == "pass", verdict.text
    assert program._cache_size() == 1


def test_jit_and_eager_give_the_same_bits(backend):
    case = fitting(backend, *MIXED, sinks=True)
    eager = call(backend, case)
    traced = jitted(backend, case)(*device_arrays(case))
    assert [bits(a) for a in traced] == [bits(a) for a in eager]


def test_runs_inside_scan(backend):
    """A decoder scans its layers: the call must work with every array a tracer of the loop."""
    case = fitting(backend, *MIXED)
    kv = jnp.stack([jnp.asarray(case.kv_pages), jnp.asarray(case.kv_pages)[:, :, ::-1]])
    attend = jitted(backend, case)
    rest = tuple(map(jnp.asarray, case.arrays[2:6]))
    scanned = jax.lax.scan(lambda q, pages: (q, attend(q, pages, *rest)[0]), jnp.asarray(case.queries), kv)[1]
    for layer in range(2):
        alone = attend(jnp.asarray(case.queries), kv[layer], *rest)[0]
        assert bits(scanned[layer]) == bits(alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariance(backend, dtype):
    """A sequence alone, last, or among others, on other pages: the same bits."""
    shape = Shape(rows=40, pages_per_seq=12, pages=64)
    case = build((17, 1, 5, 9), (40, 33, 7, 48), shape, dtype=dtype, compute_dtype=dtype, sinks=True)
    skip_unsupported(backend, case)
    output, lse = call(backend, case)
    for s in range(case.num_seqs):
        got, got_lse = call(backend, alone(case, s))
        start, stop = case.query_start_loc[s : s + 2]
        assert bits(got[: stop - start]) == bits(output[start:stop]), f"sequence {s}"
        assert bits(got_lse[: stop - start]) == bits(lse[start:stop]), f"sequence {s}"


def alone(case, s: int):
    """Sequence `s` by itself in the same static shapes, its pages moved elsewhere in the pool."""
    start, stop = case.query_start_loc[s : s + 2]
    queries = np.zeros_like(case.queries)
    queries[: stop - start] = case.queries[start:stop]
    offsets, lens, tables = (np.zeros_like(a) for a in (case.query_start_loc, case.context_lens, case.block_tables))
    offsets[1], lens[0] = stop - start, case.context_lens[s]
    move = np.random.default_rng(s).permutation(case.num_pages)
    pages = np.empty_like(case.kv_pages)
    pages[move] = case.kv_pages
    used = -(-lens[0] // case.page_size)
    tables[0, :used] = move[case.block_tables[s, :used]]
    arrays = {"queries": queries, "kv_pages": pages, "query_start_loc": offsets, "context_lens": lens}
    return case.replace(**arrays, block_tables=tables, num_seqs=1)


def test_run_to_run(backend):
    case = build((17, 1, 5), (40, 33, 7), Shape(pages_per_seq=12, pages=64), dtype="bfloat16", compute_dtype="bfloat16")
    skip_unsupported(backend, case)
    first = [bits(a) for a in call(backend, case)]
    assert all([bits(a) for a in call(backend, case)] == first for _ in range(20))


def test_optimized_stays_within_the_bound(backend):
    case = fitting(backend, *MIXED, sinks=True)
    output, lse = call(backend, nan_fill(case), optimized=True)
    verdict = judge(case, output, claim_of(backend, case), lse)
    assert verdict.status == "pass", verdict.text
