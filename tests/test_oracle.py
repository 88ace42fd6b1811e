"""The oracle judged: attend by a scalar loop and mpmath, the edges by hand, the verdict by broken outputs."""

import importlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from model_cases import DTYPES, draw_case

from oracle import Case, Claim, analyse, attend, compare, default_claim, error_bound, judge, visible
from oracle.poison import dead_metadata, guard_pages, large_fill, live_entries, nan_fill, seen_slots
from oracle.scalar import attend_scalar, mpmath_numbers

# What float64 arithmetic itself may be off by: the bound judges the oracle too.
FLOAT64 = Claim(
    u=2.0**-53,
    u_in=0.0,
    u_q=0.0,
    u_p=0.0,
    u_o=2.0**-53,
    eta_p=0.0,
    eta_o=2.0**-1022,
    eps_exp=2.0**-52,
    eps_tanh=2.0**-51,
    eps_div=2.0**-53,
    block=1,
)


def small_case(**changes) -> Case:
    """Two kv heads, pages of 2: a prefill of 3 rows over 5 keys, a decode row over 4, one dead sequence and row."""
    rng = np.random.default_rng(0)
    case = Case(
        rng.normal(size=(5, 4, 6)).astype(np.float32),
        rng.normal(size=(8, 2, 4, 6)).astype(np.float32),
        [5, 4, 0],
        [[6, 1, 3], [2, 4, -1], [-1, -1, -1]],
        [0, 3, 4, 0],
        2,
    )
    return case.replace(**changes)


@pytest.mark.parametrize("seed", range(12))
def test_attend_agrees_with_mpmath_within_the_bound_of_float64(seed):
    case = draw_case(seed, "float32", longest=10, rows=5)
    output, lse = attend(case)
    exact, exact_lse = attend_scalar(case, mpmath_numbers())
    bounds = analyse(case, FLOAT64)
    assert np.all(np.abs(output - np.array(exact, float)) <= bounds.hard)
    wanted, alive = np.array(exact_lse, float), np.isfinite(lse)
    assert np.array_equal(alive, np.isfinite(wanted))
    assert np.all(np.abs(lse[alive] - wanted[alive]) <= bounds.lse_bound[alive])


@pytest.mark.parametrize("seed", range(30))
def test_attend_agrees_with_the_scalar_loop(seed):
    case = draw_case(seed, "bfloat16", longest=30, rows=8)
    scalar, _ = attend_scalar(case)
    assert np.all(np.abs(attend(case)[0] - np.array(scalar)) <= 2 * error_bound(case, FLOAT64))


@pytest.mark.parametrize("limits", [{"SMALL": 0}, {"SMALL": 0, "MAX_LOGITS": 40}, {"MAX_KEY_ELEMENTS": 1, "SMALL": 0}])
def test_every_way_of_cutting_a_case_gives_the_same_answer(limits, monkeypatch):
    for seed in range(8):
        case = draw_case(seed, "float16", longest=50)
        whole = attend(case)
        with monkeypatch.context() as patch:
            for name, value in limits.items():
                patch.setattr(importlib.import_module("oracle.attend"), name, value)
            cut = attend(case)
        assert np.all(np.abs(whole[0] - cut[0]) <= 2 * error_bound(case, FLOAT64))
        assert np.array_equal(np.isneginf(whole[1]), np.isneginf(cut[1]))


def test_one_row_of_one_key_returns_its_value():
    case = small_case(context_lens=[1, 0, 0], query_start_loc=[0, 1, 1, 1])
    output, lse = attend(case)
    assert np.array_equal(output[0, 0], case.kv_pages[6, 0, 1])
    assert np.array_equal(output[0, 3], case.kv_pages[6, 0, 3])
    logit = case.scale * (case.queries[0, 0].astype(float) @ case.kv_pages[6, 0, 0].astype(float))
    assert abs(lse[0, 0] - logit) <= analyse(case, FLOAT64).lse_bound[0, 0]


@pytest.mark.parametrize("sinks", [None, np.array([1.5, -2.0, 0.0, 7.0], np.float32)])
def test_a_row_that_sees_no_key_is_zero_and_its_lse_the_sink(sinks):
    case = small_case(context_lens=[2, 0, 0], softmax_aux=sinks)  # three rows, two tokens: row 0 stands at -1
    output, lse = attend(case)
    wanted = np.full(4, -np.inf) if sinks is None else sinks
    assert not output[0].any()
    assert not output[3].any()
    assert np.array_equal(lse[0], wanted)
    assert np.array_equal(lse[3], wanted)
    assert output[1].all()


def test_rows_of_nobody_are_zero_and_their_lse_minus_infinity():
    case = small_case(softmax_aux=np.ones(4), query_start_loc=[1, 2, 4, 0])
    output, lse = attend(case)
    for row in (0, 4):
        assert not output[row].any()
        assert np.all(np.isneginf(lse[row]))


@pytest.mark.parametrize("num_seqs", [0, -1])
def test_no_live_sequence(num_seqs):
    output, lse = attend(small_case(num_seqs=num_seqs))
    assert not output.any()
    assert np.all(np.isneginf(lse))


def test_no_tokens():
    case = small_case(queries=np.zeros((0, 4, 6), np.float32), query_start_loc=[0, 0, 0, 0])
    assert attend(case)[0].shape == (0, 4, 6)
    assert judge(case, np.zeros((0, 4, 6), np.float32)).status == "pass"


@pytest.mark.parametrize(
    ("changes", "bad_rows", "reason"),
    [
        ({"context_lens": [-1, 4, 0]}, [0, 1, 2], r"context_lens\[0\] = -1 is outside \[0, 6\]"),
        ({"context_lens": [5, 7, 0]}, [3], r"context_lens\[1\] = 7 is outside \[0, 6\]"),
        ({"block_tables": [[6, 8, 3], [2, 4, -1], [-1] * 3]}, [0, 1, 2], r"block_tables\[0, 1\] = 8"),
        ({"block_tables": [[6, 1, 3], [2, -1, -1], [-1] * 3]}, [3], r"block_tables\[1, 1\] = -1"),
        ({"query_start_loc": [0, 3, 9, 0]}, [3, 4], "goes from 3 to 9"),
        ({"query_start_loc": [0, 3, 2, 0]}, [], None),
        ({"query_start_loc": [0, 3, 2, 5], "num_seqs": 3}, [3, 4], "goes from 2 to 5 after 3"),
        ({"query_start_loc": [-2, 3, 4, 0]}, [0, 1, 2], "goes from -2 to 3"),
    ],
)
def test_invalid_metadata_makes_nan_of_that_sequence_only(changes, bad_rows, reason):
    good, bad = small_case(), small_case(**changes)
    output, lse = attend(bad)
    assert np.flatnonzero(np.isnan(output).all(axis=(1, 2))).tolist() == bad_rows
    assert np.flatnonzero(np.isnan(lse).all(axis=1)).tolist() == bad_rows
    kept = [row for row in range(3 if changes.get("query_start_loc") else 4) if row not in bad_rows]
    assert np.array_equal(output[kept], attend(good)[0][kept])
    assert judge(bad, output.astype(np.float32)).status == "pass"
    assert judge(bad, np.nan_to_num(output).astype(np.float32)).status == ("fail" if bad_rows else "pass")
    if reason:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(judge(bad, np.nan_to_num(output).astype(np.float32)).text)


def test_a_bad_entry_before_the_window_is_dead():
    windowed = {"sliding_window": 2, "context_lens": [5, 4, 0], "query_start_loc": [0, 1, 2, 0]}
    case = small_case(block_tables=[[99, 1, 3], [-5, 4, -1], [-1] * 3], **windowed)
    assert np.array_equal(attend(case)[0], attend(small_case(**windowed))[0])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"])
def test_what_no_row_may_see_changes_nothing(kv_dtype, seed):
    case = draw_case(seed, "float32", kv_dtype=kv_dtype, longest=40)
    wanted = attend(case)
    for changed in (nan_fill(case), large_fill(case), guard_pages(nan_fill(case)), dead_metadata(case)):
        assert all(np.array_equal(a, b) for a, b in zip(attend(changed), wanted, strict=True))


def test_poison_is_really_there():
    case = nan_fill(small_case())
    assert np.isnan(case.kv_pages[~seen_slots(case)]).all()
    assert (~seen_slots(case)).sum() == 16 - 5 - 4
    assert np.isnan(case.queries[4]).all()
    assert live_entries(case).sum() == 3 + 2
    assert not set(case.block_tables[~live_entries(case)].tolist()) & set(range(8))
    assert case.context_lens[2] == -1
    assert len(guard_pages(case).kv_pages) == 17
    large = large_fill(small_case()).kv_pages[~seen_slots(case)]
    assert np.all(np.abs(large) == 2.0**15)


def test_poison_leaves_no_bit_of_the_callers_arrays_changed():
    case = small_case()
    before = case.hash
    nan_fill(case)
    large_fill(case)
    assert case.hash == before


def test_a_row_is_not_touched_by_a_nan_that_only_its_neighbour_sees():
    case = small_case()
    pages = np.array(case.kv_pages)
    pages[3, 0] = np.nan  # key 4 of sequence 0: its last row alone sees it
    output, _ = attend(case.replace(kv_pages=pages))
    assert np.array_equal(output[:2], attend(case)[0][:2])
    assert np.isnan(output[2]).all()


def test_scales_of_quantised_pages():
    base = draw_case(5, "float32", kv_dtype="int8", longest=20)
    k, v = np.float32(0.11), np.linspace(0.1, 0.3, base.num_kv_heads, dtype=np.float32)
    case = base.replace(k_scale=float(k), v_scale=v)
    pages = case.kv_pages.astype(np.float64)
    pages[:, :, 0::2] *= float(k)
    pages[:, :, 1::2] *= v.astype(np.float64)[:, None]
    plain = case.replace(kv_pages=pages.astype(np.float32), k_scale=None, v_scale=None)
    # The float32 copy rounds each number once, which a claim of u_in says.
    assert np.all(np.abs(attend(case)[0] - attend(plain)[0]) <= error_bound(plain, default_claim(plain)))


@pytest.mark.parametrize(
    ("position", "context", "window", "wanted"),
    [(5, 6, None, (0, 6)), (5, 6, 2, (4, 6)), (0, 6, 1, (0, 1)), (-1, 3, None, (0, 0)), (-1, 3, 2, (0, 0))],
)
def test_visible(position, context, window, wanted):
    assert visible(position, context, window) == wanted
    lo, hi = visible(np.array([position]), context, window)
    assert (int(lo[0]), int(hi[0])) == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_case_survives_saving_and_its_own_source(dtype, tmp_path):
    case = draw_case(2, "bfloat16", kv_dtype=dtype, longest=3, rows=3)
    pages = np.array(case.kv_pages)
    if dtype not in ("int8",):
        pages[0, 0, 0, 0] = np.nan
    case = case.replace(kv_pages=pages)
    case.save(tmp_path / "case.npz")
    assert Case.load(tmp_path / "case.npz").hash == case.hash
    names = {"np": np, "ml_dtypes": ml_dtypes, "Case": Case}
    assert eval(case.literal(), names).hash == case.hash


def test_a_file_that_is_no_case(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(1))
    with pytest.raises(ValueError, match="no entry 'case'"):
        Case.load(tmp_path / "other.npz")


def test_the_hash_sees_every_field():
    case = small_case()
    changes = [{"num_seqs": 1}, {"sliding_window": 3}, {"softmax_scale": 0.5}, {"compute_dtype": "float32"}]
    changes += [{"queries": case.queries + 1}, {"k_scale": 1.0}, {"softmax_aux": np.zeros(4)}]
    assert len({case.hash, *(case.replace(**change).hash for change in changes)}) == len(changes) + 1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"queries": np.zeros((5, 4), np.float32)}, ValueError, "queries has shape"),
        ({"queries": np.zeros((5, 4, 6), np.int32)}, TypeError, "queries has dtype int32"),
        ({"queries": np.zeros((5, 3, 6), np.float32)}, ValueError, "3 query heads are no multiple of 2"),
        ({"kv_pages": np.zeros((8, 2, 3, 6), np.float32)}, ValueError, "3 combined heads"),
        ({"context_lens": [1.0, 2.0, 3.0]}, TypeError, "context_lens has dtype"),
        ({"context_lens": [2**31, 0, 0]}, ValueError, "int32 cannot"),
        ({"query_start_loc": [0, 1]}, ValueError, "must have S, S and S"),
        ({"softmax_aux": np.zeros(2)}, ValueError, "softmax_aux has shape"),
        ({"softmax_aux": [0.0, np.nan, 0.0, 0.0]}, ValueError, "a sink must be finite, or -inf"),
        ({"sliding_window": 0}, ValueError, "sliding_window = 0"),
        ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap = -1"),
        ({"logits_soft_cap": float("nan")}, ValueError, "logits_soft_cap = nan"),
        ({"softmax_scale": float("inf")}, ValueError, "softmax_scale = inf"),
        ({"k_scale": np.ones(3)}, ValueError, "k_scale"),
    ],
)
def test_a_case_without_an_answer_is_refused(changes, error, words):
    with pytest.raises(error, match=words):
        small_case(**changes)


def test_the_answer_itself_passes():
    case = small_case(softmax_aux=np.ones(4))
    output, lse = attend(case)
    verdict = judge(case, output.astype(np.float32), default_claim(case), lse.astype(np.float32))
    assert (verdict.status, verdict.judged) == ("pass", output.size)
    assert 0 < verdict.ratio < 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda o: o.astype(np.float16), "output has dtype float16; it must be float32"),
        (lambda o: o[:4], r"output has shape \(4, 4, 6\); it must be \(5, 4, 6\)"),
        (
            lambda o: put(o, (1, 2, 3), np.nan),
            ".sequence 0, its row 1 at position 3 of 5., head 2, dim 3: got nan",
        ),
        (
            lambda o: put(o, (3, 0, 5), np.inf),
            ".sequence 1, its row 0 at position 3 of 4., head 0, dim 5: got inf",
        ),
        (lambda o: put(o, (4, 1, 0), 1e-38), "row 4 .a row that no sequence owns., head 1, dim 0"),
        (lambda o: put(o, (2, 1, 1), o[2, 1, 1] + 1), "1 of 120 elements beyond HARD"),
    ],
)
def test_a_spoiled_output_fails_and_says_where(spoil, words):
    case = small_case()
    verdict = judge(case, spoil(attend(case)[0].astype(np.float32)))
    assert verdict.status == "fail"
    assert verdict.ratio > 1
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(verdict.text)


@pytest.mark.parametrize(
    ("seen_as", "key"),
    [
        ({"sliding_window": 4}, "as if key 1 were seen too"),
        ({"sliding_window": 2}, "as if key 2 were missing"),
    ],
)
def test_the_verdict_names_the_key(seen_as, key):
    case = small_case(sliding_window=3, query_start_loc=[0, 1, 1, 0])
    case = nan_fill(case) if "missing" in key else case
    wrong = attend(small_case(query_start_loc=[0, 1, 1, 0], **seen_as))[0].astype(np.float32)
    verdict = judge(case, wrong)
    assert (verdict.status, verdict.sequence, verdict.position, verdict.key) == ("fail", 0, 4, key)


def test_the_verdict_names_a_lost_sink():
    case = small_case(softmax_aux=np.array([0.5, 1, 0, 2], np.float32))
    verdict = judge(case, attend(small_case())[0].astype(np.float32))
    assert (verdict.status, verdict.key) == ("fail", "as if the sink were missing")


def test_a_wrong_lse_fails():
    case = small_case()
    output, lse = attend(case)
    for place, value in [((0, 0), lse[0, 0] + 1e-3), ((4, 1), 0.0), ((2, 2), np.nan)]:
        verdict = judge(case, output.astype(np.float32), None, put(lse.astype(np.float32), place, value))
        assert verdict.status == "fail"
        assert "1 of 20 lse values beyond their bound" in verdict.text
    assert judge(case, output.astype(np.float32), None, lse).text == "lse has dtype float64; it must be float32"


def test_what_cannot_be_judged_is_vacuous_but_not_nan():
    case = small_case(softmax_scale=1e9)
    output = attend(case)[0].astype(np.float32)
    verdict = judge(case, output)
    assert (verdict.status, verdict.vacuous_rows > 0) == ("vacuous", True)
    assert judge(case, put(output, (0, 0, 0), np.nan)).status == "fail"


def test_soft_is_for_random_data():
    rng = np.random.default_rng(0)
    case = small_case(
        queries=np.zeros((1, 4, 6), np.float32),
        kv_pages=rng.normal(size=(256, 2, 4, 6)).astype(np.float32),
        context_lens=[512],
        block_tables=np.arange(256)[None],
        query_start_loc=[0, 1],
        num_seqs=1,
        compute_dtype="bfloat16",
    )
    analysis = analyse(case, default_claim(case))
    between = (analysis.output + (analysis.soft + analysis.hard) / 2).astype(np.float32)
    assert compare(case, analysis, between).status == "suspect"
    assert compare(case, analysis, between, structured=True).status == "pass"
    # A page read twice has its roundings twice: they are not independent.
    tables = case.block_tables.copy()
    tables[0, 7] = tables[0, 100]
    twice = case.replace(block_tables=tables)
    analysis = analyse(twice, default_claim(twice))
    between = (analysis.output + (analysis.soft + analysis.hard) / 2).astype(np.float32)
    assert compare(twice, analysis, between).status == "pass"


def test_cases_are_frozen_and_leave_their_arrays_alone():
    queries = np.zeros((5, 4, 6), np.float32)
    case = small_case(queries=queries)
    with pytest.raises(ValueError, match="read-only"):
        case.queries[0] = 1
    queries[0] = 1  # the caller's array is still the caller's


def test_the_oracle_imports_neither_jax_nor_rpa():
    program = (
        "import sys, oracle, oracle.scalar, oracle.exact, oracle.poison, oracle.relations; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'jax', 'jaxlib', 'rpa', 'fuzz', 'mpmath'}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def put(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    changed = np.array(array)
    changed[place] = value
    return changed
