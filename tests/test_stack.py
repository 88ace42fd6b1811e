"""Cases analysed together have the analyses they have alone: nothing of one reaches another."""

import importlib
from collections.abc import Sequence

import numpy as np
import pytest
from model_kernel import Style, claim, run

from oracle import Analysis, Case, analyse, compare, default_claim
from oracle.bound import analyse_all

PAGE, PAGES, SEQS, HKV, GROUP, D = 4, 9, 4, 2, 3, 20


def drawn(seed: int, lengths: Sequence[tuple[int, int]], quantised: bool = False, **options) -> Case:
    """A case of the one shape of this file: (rows, context) of its sequences, everything else from the seed."""
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, PAGES, (SEQS, 8))
    tables[len(lengths) :] = rng.choice([-1, 2**31 - 1])  # dead, and no page of any case
    contexts = np.array([context for _, context in lengths], int)
    pages = rng.normal(size=(PAGES, PAGE, 2 * HKV, D))
    scales = {"k_scale": float(rng.uniform(0.01, 9)), "v_scale": rng.uniform(0.01, 2, HKV)} if quantised else {}
    return Case(
        rng.normal(size=(12, HKV * GROUP, D)).astype(np.float32),
        np.rint(30 * pages).astype(np.int8) if quantised else pages.astype(np.float32),
        np.pad(contexts, (0, SEQS - len(lengths))),
        tables,
        np.pad(np.cumsum([rows for rows, _ in lengths], dtype=int), (1, SEQS - len(lengths))),
        len(lengths),
        rng.normal(size=HKV * GROUP) if seed % 2 or quantised else np.full(HKV * GROUP, -np.inf),
        **({"logits_soft_cap": 5.0, "sliding_window": 11, "compute_dtype": "bfloat16"} | scales | options),
    )


def same_bits(one: Analysis, other: Analysis) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


RAGGED = ([(1, 30)], [], [(2, 2), (5, 17), (1, 9)], [(3, 1), (0, 4), (9, 32)], [(12, 12)], [(1, 1), (1, 32), (4, 31)])


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
def test_numbers_of_other_cases_change_no_bit(quantised, soft):
    """Of equal lengths, so that padding is the same alone. In float16 the keys' scale is in the bound by itself too."""
    lengths, options = [(1, 30), (5, 17), (0, 3), (2, 32)], {"compute_dtype": "float16"}
    cases = [drawn(seed, lengths, quantised, **options) for seed in range(5)]
    kernel = default_claim(cases[0])
    together = analyse_all(cases, kernel, soft)
    assert all(same_bits(analyse(c, kernel, soft), a) for c, a in zip(cases, together, strict=True))
    assert len({a.hard.tobytes() for a in together}) == len(cases)


def test_large_sequences_are_cut_as_they_are_alone(monkeypatch):
    monkeypatch.setattr(importlib.import_module("oracle.attend"), "SMALL", 0)
    cases = [drawn(seed, lengths, quantised=True) for seed, lengths in enumerate(RAGGED)]
    kernel = default_claim(cases[0])
    for case, together in zip(cases, analyse_all(cases, kernel), strict=True):
        assert same_bits(analyse(case, kernel), together)


def test_padding_to_another_case_s_lengths_changes_no_verdict():
    """Sums may be in another order, so the last bits of 53 may be others; what a person reads is the same."""
    cases = [drawn(seed, lengths) for seed, lengths in enumerate(RAGGED)]
    style = Style(weights="bfloat16")
    kernel = claim(cases[0], style)
    for case, together in zip(cases, analyse_all(cases, kernel), strict=True):
        output, lse = run(case, style)
        broken = output.copy()
        broken[0] += 1
        for answer in (output, broken):
            verdict = compare(case, together, answer, lse)
            assert verdict.text == compare(case, analyse(case, kernel), answer, lse).text
            assert (verdict.status == "pass") == (answer is output)


def test_a_number_that_is_not_finite_stays_in_its_case():
    cases = [drawn(seed, [(1, 30), (5, 17)]) for seed in range(3)]
    pages = np.array(cases[1].kv_pages)
    pages[int(cases[1].block_tables[0, 7]), 0] = np.nan  # a key that is seen, of the shorter sequence or of both
    kernel = default_claim(cases[0])
    before = analyse_all(cases, kernel)
    after = analyse_all([cases[0], cases[1].replace(kv_pages=pages), cases[2]], kernel)
    assert np.isnan(after[1].output).any()
    assert same_bits(before[0], after[0])
    assert same_bits(before[2], after[2])


def test_invalid_metadata_is_its_own_case_s_too():
    good, bad = drawn(0, [(2, 9), (1, 30)]), drawn(1, [(2, 9), (1, 30)])
    bad = bad.replace(context_lens=[99, 30, 0, 0])
    kernel = default_claim(good)
    for case, together in zip((good, bad, good), analyse_all([good, bad, good], kernel), strict=True):
        assert np.isnan(together.output[:2]).all() == (case is bad)
        assert np.array_equal(np.isnan(together.output), np.isnan(analyse(case, kernel).output))


@pytest.mark.parametrize(
    "other",
    [{"logits_soft_cap": 6.0}, {"sliding_window": None}, {"softmax_scale": 1.0}, {"softmax_aux": None},
     {"compute_dtype": None}, {"k_scale": 2.0}, {"queries": np.zeros((13, HKV * GROUP, D), np.float32)}],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_only_cases_of_equal_shapes_and_options_are_walked_as_one(other):
    case = drawn(0, [(2, 9)])
    with pytest.raises(ValueError, match="2 cases of different shapes or options"):
        analyse_all([case, case.replace(**other)], default_claim(case))
