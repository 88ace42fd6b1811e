"""The exact stratum: every correct kernel returns these bits, and wrong ones do not."""

import numpy as np
import pytest
from contract_cases import MIXED, build
from model_cases import DTYPES, draw_case, draw_style
from model_kernel import run

from fuzz.targets import load
from oracle import attend
from oracle.exact import exact_case, expected, same_bits
from oracle.poison import guard_pages, large_fill, nan_fill

OPTIONS = {
    "plain": {"softmax_aux": None, "sliding_window": None},
    "window": {"sliding_window": 8},
    "odd window": {"sliding_window": 5},
    "sinks": {"softmax_aux": np.zeros},
    "cap": {"logits_soft_cap": 5.0},
}


def draw_exact(seed: int, dtype: str, **options):
    like = draw_case(seed, dtype, longest=60, **{k: v for k, v in options.items() if k != "softmax_aux"})
    if "softmax_aux" in options:
        like = like.replace(softmax_aux=options["softmax_aux"] and np.zeros(like.num_q_heads))
    return exact_case(seed, like)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_style_of_kernel_returns_the_same_bits(dtype, options):
    for seed in range(8):
        case = draw_exact(seed, dtype, **OPTIONS[options])
        wanted = expected(case)
        for style_seed in range(4):
            style = draw_style(style_seed, case)
            assert same_bits(run(case, style)[0], wanted), f"seed {seed}, {style}"


@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_every_page_dtype_has_exact_cases(kv_dtype):
    for seed in range(10):
        case = draw_exact(seed, "bfloat16", kv_dtype=kv_dtype)
        assert same_bits(run(case, draw_style(seed, case))[0], expected(case))


def test_the_layouts_are_worth_judging():
    cases = [draw_exact(seed, "bfloat16") for seed in range(40)]
    sequences = [sequence for case in cases for sequence in case.sequences()]
    assert max(sequence.num_rows for sequence in sequences) > 4
    assert max(sequence.num_keys for sequence in sequences) >= 32
    assert sum(expected(case).any() for case in cases) > 30
    assert any(sequence.positions[0] < 0 for sequence in sequences)


def test_poison_and_guard_pages_change_no_bit():
    for seed in range(10):
        case = draw_exact(seed, "float16")
        for changed in (nan_fill(case), large_fill(case), guard_pages(nan_fill(case))):
            assert same_bits(run(changed, draw_style(seed, case))[0], expected(case))


@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"sliding_window": 3}, {"compute_dtype": "bfloat16"}])
def test_the_xla_backend_returns_the_bits(options):
    """The contract's own shapes, whose programs its tests compile anyway; every seed is another layout."""
    like = build(*MIXED, **options)
    kernel = load("xla")
    for seed in range(25):
        case = exact_case(seed, like)
        output, _ = kernel.call(*nan_fill(case).arrays, **case.options, return_lse=True)
        assert same_bits(output, expected(case)), f"seed {seed}"


WRONG = {
    "one key too many": lambda case: case.replace(sliding_window=9),
    "one key too few": lambda case: case.replace(sliding_window=7),
    "pages shifted": lambda case: case.replace(kv_pages=np.roll(case.kv_pages, 1, axis=0)),
    "slots shifted": lambda case: case.replace(kv_pages=np.roll(case.kv_pages, 1, axis=1)),
    "kv heads swapped": lambda case: case.replace(kv_pages=np.roll(case.kv_pages, 2, axis=2)),
    "keys for values": lambda case: case.replace(kv_pages=np.roll(case.kv_pages, 1, axis=2)),
    "a sink more": lambda case: case.replace(softmax_aux=np.zeros(case.num_q_heads)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_do_not_return_the_bits(wrong):
    told = 0
    for seed in range(20):
        case = draw_exact(seed, "bfloat16", sliding_window=8, softmax_aux=None)
        told += not same_bits(attend(WRONG[wrong](case))[0].astype(case.queries.dtype), expected(case))
    assert told >= 8


def test_a_case_outside_the_stratum_is_refused():
    with pytest.raises(ValueError, match="not of the exact stratum"):
        expected(draw_case(1, "bfloat16", data="normal"))


def test_same_bits_tells_dtype_shape_and_nan():
    one = np.array([1.0, np.nan, 0.0], np.float32)
    assert same_bits(one, np.array([1.0, np.nan, -0.0], np.float32))
    assert not same_bits(one, one.astype(np.float16))
    assert not same_bits(one, one[:2])
    assert not same_bits(one, np.nextafter(one, 2))
