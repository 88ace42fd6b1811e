"""What a config becomes before any kernel is compiled: needs neither triton nor a GPU."""

from __future__ import annotations

import dataclasses

import pytest

from rpa.backends.triton import BACKEND, plan, tuning
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.signature import Signature

H200 = Device("gpu", "NVIDIA H200", (9, 0))
CHIPS = (
    H200, Device("gpu", "NVIDIA A100", (8, 0)), Device("gpu", "NVIDIA L4", (8, 9)),
    Device("gpu", "NVIDIA B200", (10, 0)), Device("gpu", "AMD Instinct MI300X"),
)  # fmt: skip


def signature(**changes) -> Signature:
    base = Signature(
        num_tokens=8, num_q_heads=32, head_dim=128, num_pages=4096, page_size=16, num_kv_heads=8, max_seqs=8,
        pages_per_seq=512, q_dtype="bfloat16", kv_dtype="bfloat16", compute_dtype="bfloat16", sinks=False,
        k_scale=False, v_scale=False, return_lse=False, optimized=False, softmax_scale=0.1, logits_soft_cap=None,
        sliding_window=None, vmem_limit_bytes=None,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


DECODE, PREFILL = signature(), signature(num_tokens=4096)
SIGNATURES = {
    "decode": DECODE, "prefill": PREFILL, "d64": signature(head_dim=64), "d512": signature(num_tokens=64, head_dim=512),
    "window": signature(num_tokens=999, head_dim=64, sliding_window=128), "d1": signature(head_dim=1),
    "float32": signature(num_tokens=99, q_dtype="float32", kv_dtype="float32", compute_dtype="float32"),
    "mqa_128": signature(num_q_heads=128, num_kv_heads=1), "group_7": signature(num_q_heads=56),
    "one_token": signature(num_tokens=1, max_seqs=1, pages_per_seq=1),
    "page_1": signature(page_size=1, pages_per_seq=9),
}  # fmt: skip


def made(call: Signature, **config) -> plan.Plan:
    return plan.make(call, tuning.complete(call, RaggedPageAttentionv2Config(**config), H200))


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.kind)
@pytest.mark.parametrize("name", SIGNATURES)
def test_the_heuristic_fits_every_chip_and_covers_every_item(name, chip):
    call = SIGNATURES[name]
    config = tuning.heuristic(call, chip)
    launch = plan.make(call, config).attend
    c = launch.constants
    size = 4 if call.compute_dtype == "float32" else 2
    stages = 2 * launch.num_stages * max(c["SHORT_N"], c["LONG_N"] * c["HAS_LONG"]) * c["D_PAD"] * size
    assert stages <= tuning._shared(chip)
    assert 1 <= launch.grid[0] == c["PROGRAMS"]
    assert c["SHORT_Q"] * c["HEADS"] <= c["SHORT_M"]
    assert c["HEAD_GROUPS"] * c["HEADS"] >= call.num_q_heads
    assert hash(config) == hash(tuning.heuristic(call, chip))


@pytest.mark.parametrize(
    ("field", "constant", "value", "expected"),
    [
        ("num_queries_per_block", "LONG_M", 8, 32),  # 8 tokens of 4 heads
        ("num_kv_pages_per_block", "LONG_N", 2, 32),
        ("num_kv_pages_per_block", "SHORT_N", 8, 128),
        ("num_kv_splits", "SPLITS", 3, 3),
    ],
)
def test_every_field_of_a_config_reaches_the_kernel(field, constant, value, expected):
    assert made(PREFILL, **{field: value}).attend.constants[constant] == expected


def test_warps_and_stages_reach_the_launch():
    launch = made(PREFILL, num_warps=2, num_stages=4).attend
    assert (launch.num_warps, launch.num_stages, launch.constants["LONG_STAGES"]) == (2, 4, 4)


def test_an_unknown_option_is_an_error_that_names_the_known_ones():
    config = RaggedPageAttentionv2Config(options=(("blokc", 3),))
    with pytest.raises(ValueError, match=r"'blokc' is unknown to the triton backend; it knows long_m, long_n"):
        plan.make(DECODE, config)


def test_splits_depend_on_static_shapes_until_the_caller_lets_the_batch_decide():
    assert made(DECODE).attend.constants["ITEMS"] == 0
    assert made(signature(max_seqs=256, num_tokens=256)).attend.constants["SPLITS"] == 1
    free = made(signature(max_seqs=256, num_tokens=256, optimized=True)).attend.constants
    assert free["SPLITS"] > 1
    assert free["ITEMS"] >= 1


def test_a_window_of_one_block_needs_no_second_launch():
    assert made(signature(head_dim=64, sliding_window=128)).combine is None
    assert made(DECODE).combine is not None


@pytest.mark.parametrize(("page", "first"), [(16, 16), (64, 64), (128, 64), (96, 1), (24, 1)])
def test_blocks_start_with_a_page_where_pages_and_blocks_divide(page, first):
    assert made(signature(page_size=page)).attend.constants["ALIGN"] == first


@pytest.mark.parametrize(
    ("call", "chip", "words"),
    [
        (DECODE, Device("cpu", "cpu"), "it runs on GPUs, not on cpu"),
        (DECODE, dataclasses.replace(H200, interpreted=True), "Pallas interpreter"),
        (DECODE, Device("gpu", "Tesla T4", (7, 5)), "8.0, and Tesla T4 has 7.5"),
        (signature(head_dim=513), H200, "head_dim = 513 is more than 512"),
        (signature(kv_dtype="float8_e4m3fn"), Device("gpu", "NVIDIA A100", (8, 0)), "float8_e4m3fn needs"),
    ],
)
def test_what_it_cannot_take_it_says(call, chip, words, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if triton and jax_triton were there
    reason = BACKEND.supports(call, chip)
    assert reason is not None
    assert words in reason
    assert BACKEND.supports(DECODE, H200) is None


def test_candidates_start_with_the_heuristic_and_differ():
    found = BACKEND.candidates(DECODE, H200)
    assert found[0] == BACKEND.heuristic(DECODE, H200)
    assert len(set(found)) == len(found) > 5
    assert len({repr(plan.make(DECODE, config)) for config in found}) == len(found)


@pytest.mark.parametrize(("chip", "expected"), [((8, 0), 87), ((9, 0), 87), ((10, 0), 87), ((10, 3), 90), (None, None)])
def test_the_ptx_is_of_a_version_that_older_assemblers_read(chip, expected):
    launch = made(signature(num_tokens=9000, head_dim=64)).attend
    options = plan.compiler_options(launch, chip)
    assert options.get("ptx_version") == expected
    assert ("maxnreg" in options) == (chip is not None)
