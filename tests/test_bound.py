"""The bound holds (no correct kernel ever leaves it) and is tight (correct kernels come close to it)."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from adversary import worst_output
from model_cases import draw_case, draw_style
from model_kernel import Style, claim, run

import oracle.bound
from oracle import Case, analyse, attend, default_claim, error_bound, judge, soft_bound
from oracle.attend import blocks, solve
from oracle.bound import weighted_spread
from oracle.case import dtype_of

SIXTEEN_BITS = ("bfloat16", "float16")


def sweep(dtype: str, seeds: range, **size: int) -> dict:
    """Judges the model kernel over many drawn cases and styles."""
    found = {"elements": 0, "vacuous": 0, "ratio": 0.0}
    for seed in seeds:
        case = draw_case(seed, dtype, **size)
        style = draw_style(seed, case)
        output, lse = run(case, style)
        verdict = judge(case, output, claim(case, style), lse)
        assert verdict.status in ("pass", "vacuous"), f"seed {seed}, {style}: {verdict.text}"
        found["elements"] += verdict.judged
        found["vacuous"] += verdict.status == "vacuous"
        if verdict.status == "pass":
            found["ratio"] = max(found["ratio"], verdict.ratio)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_correct_kernel_leaves_the_bound_and_some_come_close(dtype):
    found = sweep(dtype, range(60), longest=120)
    assert found["elements"] > 10**5
    assert found["vacuous"] <= 3  # peaky logits rounded to 8 bits: nothing can be said of them
    assert 0.3 < found["ratio"] <= 1 or dtype not in SIXTEEN_BITS


@pytest.mark.slow
def test_ten_million_elements(record_property):
    elements = 0
    for dtype in ("float32", *SIXTEEN_BITS):
        found = sweep(dtype, range(1000, 1540), longest=700, rows=160)
        record_property(dtype, found)
        print(dtype, found)
        elements += found["elements"]
        assert 0.3 < found["ratio"] <= 1 or dtype not in SIXTEEN_BITS
    assert elements >= 10**7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_adversary_stays_within_the_bound_and_reaches_it(dtype):
    """Every rounding against one number: what is missing from a step of the bound shows here first."""
    reached = 0.0
    for seed in range(40):
        case = draw_case(seed, dtype, longest=80, rows=10)
        for kernel in (claim(case, draw_style(seed, case)), default_claim(case)):
            analysis = analyse(case, kernel)
            for direction in (1.0, -1.0):
                error = np.abs(worst_output(case, kernel, direction) - analysis.output[..., 0])
                judged = ~analysis.vacuous & (error > 0)
                ratio = error[judged] / analysis.hard[..., 0][judged]
                assert np.all(ratio <= 1), f"seed {seed}: {ratio.max()} of the bound"
                reached = max(reached, ratio.max(initial=0.0))
    assert reached > 0.9


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_strictly_sequential_sums_over_a_long_context(weights):
    case = long_context(8192, "float32", "bfloat16" if weights == "bfloat16" else "float32")
    style = Style(block=1, sequential=True, weights=weights)
    verdict = judge(case, run(case, style)[0], claim(case, style))
    assert verdict.status == "pass", verdict.text
    assert np.all(soft_bound(case, claim(case, style)) < error_bound(case, claim(case, style)))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_weights_rounded_more_than_claimed_are_caught(dtype):
    """Claims can be audited from outside: float32 weights claimed, 8-bit weights fed to P.V."""
    style = Style(weights=dtype)
    tried = 0
    for seed in range(24):
        case = draw_case(seed, "float32", data="normal", compute_dtype="float32", kv_dtype="float32", longest=60)
        output = run(case, style)[0]
        assert judge(case, output, claim(case, style)).status == "pass"
        if case.sliding_window != 1 and any(sequence.context_len > 1 for sequence in case.sequences()):
            tried += 1  # a row of one key has the weight 1 in any dtype
            assert judge(case, output, claim(case, Style())).status == "fail", f"seed {seed}"
    assert tried >= 8


def test_a_common_factor_of_the_weights_costs_nothing():
    """Constant values: weight errors cancel, so the bound does not see how badly known the logits are."""
    case = long_context(300, "float32", "bfloat16")
    pages = np.array(case.kv_pages)
    pages[:, :, 1::2] = 1
    steep = case.replace(kv_pages=pages, softmax_scale=1.0)
    flat = steep.replace(softmax_scale=2.0**-10)
    kernel = claim(case, Style(scale_query=True))
    varied = case.replace(softmax_scale=1.0)
    assert np.max(error_bound(steep, kernel)) < 2 * np.min(error_bound(flat, kernel))
    assert np.max(error_bound(varied, kernel)) > 4 * np.max(error_bound(steep, kernel))


@pytest.mark.parametrize("seed", [1, 3, 4, 5])
def test_bound_by_matrix_products_is_above_the_exact_one_and_near_it(seed, monkeypatch):
    case = draw_case(seed, "bfloat16", data="normal")
    exact = analyse(case, default_claim(case))
    monkeypatch.setattr(oracle.bound, "SMALL", 0)
    product = analyse(case, default_claim(case))
    assert np.all(product.hard >= exact.hard)
    assert np.all(product.soft >= exact.soft * (1 - 2.0**-40))  # SOFT is the same sum, in another order
    assert np.median(product.hard[exact.hard > 0] / exact.hard[exact.hard > 0]) < 2


def test_spread_of_far_values_by_matrix_products_does_not_cancel_below_the_truth(monkeypatch):
    """All values near 1e6 and 1e-3 apart: squares cancel 18 digits, and what is lost is added back."""
    case = long_context(200, "float32", "float32")
    pages = np.array(case.kv_pages)
    pages[:, :, 1::2] = 1e6 + np.arange(pages.shape[1])[:, None, None] / 16
    block = next(blocks(case.replace(kv_pages=pages)))
    solved = solve(block)
    exact = weighted_spread(block, solved.output, solved.p, solved.p)
    monkeypatch.setattr(oracle.bound, "SMALL", 0)
    product = weighted_spread(block, solved.output, solved.p, solved.p)
    assert all(np.all(b >= a) for a, b in zip(exact, product, strict=True))


def test_a_key_that_wins_by_far_is_known_though_its_logit_is_not():
    """A logit of 1e3 rounded to 8 bits is off by 4, so the sums are; what one key wins they cannot change."""
    case = long_context(40, "float32", "bfloat16")
    queries, pages = np.array(case.queries) * 0 + 1, np.array(case.kv_pages)
    pages[0, 3, 0::2] = 1e3 / 8
    case = case.replace(queries=queries, kv_pages=pages, softmax_scale=1.0)
    kernel = claim(case, Style())
    analysis = analyse(case, kernel)
    assert not analysis.vacuous.any()
    assert np.all(analysis.hard < 2.0**-7 * np.abs(pages[0, 3, 1::2]).max())
    assert judge(case, run(case, Style())[0], kernel).status == "pass"
    tie = case.replace(kv_pages=np.where(np.arange(16)[:, None, None] == 4, pages[:, 3:4], pages))
    assert analyse(tie, kernel).vacuous.all()


def test_soft_is_never_above_hard():
    for seed in range(20):
        case = draw_case(seed, "float16")
        kernel = claim(case, draw_style(seed, case))
        assert np.all(soft_bound(case, kernel) <= error_bound(case, kernel))


@pytest.mark.parametrize("seed", range(12))
def test_leaving_soft_out_changes_no_bit_of_the_rest(seed):
    case = draw_case(seed, ("float32", "bfloat16", "float16")[seed % 3])
    whole, hard_only = (analyse(case, default_claim(case), soft=soft) for soft in (True, False))
    for name in ("output", "lse", "hard", "lse_bound", "vacuous"):
        assert getattr(whole, name).tobytes() == getattr(hard_only, name).tobytes()
    assert hard_only.soft.tobytes() == whole.hard.tobytes()


def test_nothing_is_claimed_where_the_output_may_overflow():
    case = long_context(40, "float16", "float32")
    big = (np.asarray(case.kv_pages, np.float32) * 0 + 65504).astype(np.float16)
    wide = case.replace(kv_pages=big.astype(np.float32) * 2)
    assert np.all(np.isinf(error_bound(wide, default_claim(wide))))
    assert judge(wide, np.full(case.queries.shape, np.inf, np.float16)).status == "vacuous"
    assert judge(wide, np.full(case.queries.shape, np.nan, np.float16)).status == "fail"


def test_nothing_is_claimed_where_an_operand_does_not_fit_float16():
    case = long_context(40, "float32", "float16")
    pages = np.array(case.kv_pages)
    pages[2, 3, 0, 5] = 70000  # one number of one key of kv head 0
    case = case.replace(kv_pages=pages)
    bound = error_bound(case, default_claim(case))
    assert np.all(np.isinf(bound[:, 0]))
    assert np.all(np.isfinite(bound[:, 1]))
    output = attend(case)[0].astype(np.float32)
    output[:, 0] = np.nan  # inf - inf
    assert judge(case, output).status == "vacuous"
    output[:, 1] = np.nan
    assert judge(case, output).status == "fail"


@pytest.mark.parametrize(
    ("queries", "pages", "compute", "u_in", "u_p"),
    [
        ("bfloat16", "bfloat16", None, 0.0, 2.0**-8),
        ("float32", "float32", "bfloat16", 2.0**-8, 2.0**-8),
        ("float32", "float32", None, 0.0, 2.0**-24),
        ("float16", "float16", None, 0.0, 2.0**-11),
        ("bfloat16", "bfloat16", "float32", 0.0, 2.0**-24),
        ("bfloat16", "bfloat16", "float16", 2.0**-11, 2.0**-11),
        ("bfloat16", "int8", None, 2.0**-8, 2.0**-8),
    ],
)
def test_default_claim(queries, pages, compute, u_in, u_p):
    scales = {"k_scale": 0.5, "v_scale": 0.5} if pages == "int8" else {}
    case = long_context(4, queries, compute).replace(kv_pages=np.ones((4, 16, 4, 8), dtype_of(pages)), **scales)
    found = default_claim(case)
    assert (found.u, found.u_in, found.u_q, found.u_p, found.block) == (2.0**-23, u_in, u_p, u_p, 1)
    assert found.eta_p == 2.0**-23
    assert found.u_o == {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[queries]


@pytest.mark.parametrize(("field", "value"), [("u", -1.0), ("eps_exp", float("nan")), ("block", 0)])
def test_a_claim_names_the_field_that_is_wrong(field, value):
    case = long_context(4, "float32", None)
    with pytest.raises(ValueError, match=f"Claim.{field} = "):
        dataclasses.replace(default_claim(case), **{field: value})


def long_context(length: int, dtype: str, compute: str | None) -> Case:
    """One decode row over `length` keys of normal data."""
    rng = np.random.default_rng(length)
    pages = -(-length // 16)
    real = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return Case(
        rng.normal(size=(1, 2, 8)).astype(real),
        rng.normal(size=(pages, 16, 4, 8)).astype(real),
        [length],
        np.arange(pages)[None],
        [0, 1],
        1,
        compute_dtype=compute,
    )
