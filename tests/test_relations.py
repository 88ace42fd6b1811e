"""The metamorphic relations: no correct kernel is accused, and each relation accuses a kernel made for it."""

import numpy as np
import pytest
from model_cases import draw_case, draw_style
from model_kernel import claim, run

from oracle import Case, attend
from oracle.bound import default_claim
from oracle.relations import RELATIONS, check

BY_NAME = {relation.name: relation for relation in RELATIONS}


@pytest.mark.parametrize("name", BY_NAME)
def test_no_correct_kernel_is_accused(name):
    applied = 0
    for seed in range(16):
        case = draw_case(seed, ("float32", "bfloat16", "float16")[seed % 3], longest=50, rows=12)
        style = draw_style(seed, case)
        expectation = BY_NAME[name].apply(case, seed)
        if expectation is None:
            continue
        applied += 1
        before, after = run(case, style)[0], run(expectation.case, style)[0]
        complaint = check(expectation, case, before, after, lambda changed, style=style: claim(changed, style))
        assert complaint is None, f"seed {seed}: {complaint}"
    assert applied >= 3


def plain(case: Case) -> np.ndarray:
    return attend(case)[0].astype(case.queries.dtype)


def identity_table(case: Case) -> np.ndarray:
    return plain(
        case.replace(block_tables=np.arange(case.block_tables.size).reshape(case.block_tables.shape) % case.num_pages)
    )


def first_sequence_for_all(case: Case) -> np.ndarray:
    return plain(case.replace(block_tables=np.repeat(case.block_tables[:1] % case.num_pages, case.max_seqs, axis=0)))


def counts_sequences(case: Case) -> np.ndarray:
    return plain(case) * case.queries.dtype.type(1 + case.num_seqs)


def window_eighth(case: Case) -> np.ndarray:
    return plain(case.replace(sliding_window=case.sliding_window and max(1, case.sliding_window // 8)))


def sink_of_zero(case: Case) -> np.ndarray:
    return plain(case if case.softmax_aux is None else case.replace(softmax_aux=np.zeros(case.num_q_heads)))


def squared(case: Case) -> np.ndarray:
    return plain(case) ** 2


def first_head_for_all(case: Case) -> np.ndarray:
    return plain(case.replace(kv_pages=np.tile(case.kv_pages[:, :, :2], (1, 1, case.num_kv_heads, 1))))


def no_context_offset(case: Case) -> np.ndarray:
    lengths = np.diff(case.query_start_loc[: case.live_seqs + 1])
    return plain(
        case.replace(context_lens=np.pad(lengths, (0, case.max_seqs - case.live_seqs)).clip(max=case.context_lens))
    )


def one_percent_more(case: Case) -> np.ndarray:
    return plain(case) * case.queries.dtype.type(1.01)


def leaks_every_page(case: Case) -> np.ndarray:
    return plain(case) + case.kv_pages.sum(dtype=case.queries.dtype)


def blind(case: Case) -> np.ndarray:
    return np.array(case.queries)


def unlike_itself():
    calls = iter(range(10**6))
    return lambda case: plain(case) + case.queries.dtype.type(next(calls) % 2)


ACCUSED = [
    ("repeat", unlike_itself()),
    ("page_permutation", identity_table),
    ("page_copy", identity_table),
    ("unowned_contents", leaks_every_page),
    ("sequence_permutation", first_sequence_for_all),
    ("alone", counts_sequences),
    ("dead_sequences", counts_sequences),
    ("empty_sequence", counts_sequences),
    ("wide_window", window_eighth),
    ("no_sink", sink_of_zero),
    ("values_doubled", squared),
    ("head_permutation", first_head_for_all),
    ("tracer", leaks_every_page),
    ("tracer", blind),
    ("chunked", no_context_offset),
    ("token_by_token", no_context_offset),
    ("unit_values", one_percent_more),
]


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("name", "kernel"), ACCUSED)
def test_each_relation_accuses_a_kernel_made_for_it(name, kernel):
    accused = applied = 0
    for seed in range(24):
        case = draw_case(
            seed, "float32", kv_dtype="float32", data="normal", compute_dtype="float32", longest=30, rows=9
        )
        expectation = BY_NAME[name].apply(case, seed)
        if expectation is None:
            continue
        applied += 1
        complaint = check(expectation, case, kernel(case), kernel(expectation.case), lambda c: claim(c, STYLE))
        accused += complaint is not None
    assert applied >= 3
    assert accused >= applied / 3


STYLE = draw_style(0, draw_case(0, "float32", compute_dtype="float32"))


def test_every_relation_is_tried_from_both_sides():
    assert {name for name, _ in ACCUSED} == set(BY_NAME)


def test_the_comparison_tells_shape_and_place():
    case = draw_case(1, "float32", kv_dtype="float32")
    expectation = BY_NAME["repeat"].apply(case, 0)
    output = plain(case)
    assert "must be" in check(expectation, case, output, output[:, :1], lambda c: claim(c, STYLE))
    wrong = np.array(output)
    wrong[0, 0, 0] += 1
    assert check(expectation, case, output, wrong, lambda c: claim(c, STYLE)).startswith(
        "1 elements differ, first at (0, 0, 0)"
    )


def test_doubled_values_ask_nothing_of_subnormal_outputs() -> None:
    """Seen on an H200: +1 and -1 cancel to 0, a kernel's rounding leaves 2.6e-5, and in f16 that does not double."""
    pages = np.zeros((1, 2, 2, 1), np.float16)
    pages[0, :, 1, 0] = 1, -1
    metadata = np.array([2]), np.array([[0]]), np.array([0, 1])
    case = Case(np.zeros((1, 1, 1), np.float16), pages, *metadata, 1)
    expectation = BY_NAME["values_doubled"].apply(case, 0)
    assert expectation is not None
    before, after = np.full((1, 1, 1), 2.557e-5, np.float16), np.full((1, 1, 1), 5.12e-5, np.float16)
    assert after != 2 * before
    assert check(expectation, case, before, after, default_claim) is None
    loud = np.full((1, 1, 1), 0.5, np.float16)
    assert check(expectation, case, loud, loud, default_claim) is not None
