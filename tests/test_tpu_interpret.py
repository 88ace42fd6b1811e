"""The TPU kernel in the interpreter: the contract's cases in both transfer modes, in memory full of NaN.

The interpreter sees no size limit, tile rule or matrix unit: `test_tpu_aot.py` asks the real compiler for those.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tpu_interpret as tpu
from contract_cases import CASES, MIXED, Shape, build

from oracle import judge
from oracle.poison import large_fill, nan_fill
from rpa import ragged_page_attention_v2
from rpa.backends import pallas_tpu
from rpa.backends.pallas_tpu import chips, operands, transfers

# One program runs them all, so they are the fast share: ragged layouts in both modes, with the race detector.
FAST = (
    "mixed",
    "rows_past_the_last_query",
    "empty_sequence_between",
    "context_shorter_than_queries",
    "full_capacity",
)
# Programs that cover, between them, every path of the kernel: the transfer modes are compared bit by bit on these.
BOTH_MODES = (
    "window_3",
    "table_65_wide_full",
    "page_128",
    "bf16_everything",
    "fp8_e4m3",
    "group_16",
)


def judged(case, output, lse):
    verdict = judge(case, output, tpu.claim_of(case), lse)
    assert verdict.status == "pass", verdict.text


@pytest.mark.parametrize("name", FAST)
def test_on_wait(name):
    case = nan_fill(CASES[name]())
    judged(case, *tpu.run(case))


@pytest.mark.parametrize("name", FAST)
def test_eager_with_the_race_detector(name):
    case = large_fill(CASES[name]())
    judged(case, *tpu.run(case, "eager", detect_races=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_case(name):
    case = nan_fill(CASES[name]())
    judged(case, *tpu.run(case))


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH_MODES)
def test_the_modes_and_what_nobody_sees_change_no_bit(name):
    first = tpu.run(nan_fill(CASES[name]()))
    second = tpu.run(large_fill(CASES[name]()), "eager", detect_races=True)
    assert [a.tobytes() for a in first] == [a.tobytes() for a in second]


# ------------------------------------------------------------------ invariance


@pytest.mark.slow
def test_alone_is_the_same_as_in_a_batch():
    """A sequence's bits do not depend on its neighbours, its place, or how often buffers turned before it."""
    case = nan_fill(build((5, 1, 3, 1), (9, 24, 6, 17)))
    whole, lse = tpu.run(case)
    for s in range(4):
        start, stop = case.query_start_loc[s : s + 2]
        alone = _only(case, s)
        output, alone_lse = tpu.run(alone)
        assert output[start:stop].tobytes() == whole[start:stop].tobytes()
        assert alone_lse[start:stop].tobytes() == lse[start:stop].tobytes()


def _only(case, s: int):
    """The case with sequence `s` alone, its rows where they were."""
    lens, tables, offsets = (
        np.array(case.context_lens),
        np.array(case.block_tables),
        np.array(case.query_start_loc),
    )
    lens[0], tables[0], offsets[:2] = lens[s], tables[s], offsets[s : s + 2]
    return case.replace(context_lens=lens, block_tables=tables, query_start_loc=offsets, num_seqs=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_two_cores_in_any_order_change_no_bit(seed):
    """Tiles dealt to two cores, whose grid axis the interpreter shuffles and runs at once."""
    case = nan_fill(build((5, 1, 3, 0, 2), (9, 24, 6, 5, 7)))
    one = tpu.run(case)
    options = (("cores", 2),)
    cfg = tpu.config_of(case, options=options)
    two = tpu.run(case, cfg=cfg, num_cores_or_threads=2, random_seed=seed)
    assert [a.tobytes() for a in one] == [a.tobytes() for a in two]


@pytest.mark.slow
@pytest.mark.parametrize("buffers", [2, 5])
def test_the_number_of_buffers_changes_no_bit(buffers):
    case = nan_fill(build((5, 1, 3), (9, 24, 21), Shape(page=2, pages_per_seq=12, pages=40)))
    usual = tpu.run(case)
    cfg = tpu.config_of(case, num_stages=buffers)
    assert [a.tobytes() for a in tpu.run(case, cfg=cfg)] == [a.tobytes() for a in usual]


# ------------------------------------------------------------------ work: no page that no row sees is fetched


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}])
def test_only_visible_pages_are_fetched(options, monkeypatch):
    """Every transfer of a page is recorded; dead ids point at a page whose fetch would be seen."""
    case = nan_fill(build((3, 1, 2), (9, 22, 1), **options))
    fetched: list[int] = []
    original = transfers.page_copy

    def recorded(refs, source, slot, page):
        jax.debug.callback(lambda s: fetched.append(int(s)), source)
        return original(refs, source, slot, page)

    monkeypatch.setattr(transfers, "page_copy", recorded)
    jax.clear_caches()
    judged(case, *tpu.run(case))
    jax.effects_barrier()
    expected = sorted(int(p) for s in case.sequences() for p in _visible_pages(case, s))
    assert sorted(fetched) == expected


def _visible_pages(case, sequence) -> np.ndarray:
    lo, hi = sequence.keys
    return sequence.pages[lo // case.page_size : -(-hi // case.page_size)]


# ------------------------------------------------------------------ conversions the kernel does by hand


def test_half_bits_become_the_same_numbers():
    """Every f16 bit pattern, subnormals and infinities included, against NumPy."""
    bits = np.arange(2**16, dtype=np.uint16)
    got = np.asarray(operands.half(jax.numpy.asarray(bits.astype(np.uint32))))
    expected = bits.view(np.float16).astype(np.float32)
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    assert same.all(), bits[~same][:5]


def test_every_e4m3_code_becomes_its_sixteenths():
    """All 256, in every byte of a word beside every other code: the sign of zero may go, NaN may not."""
    codes = np.arange(256, dtype=np.uint8)
    pairs = np.stack(np.meshgrid(codes, codes), axis=-1).reshape(-1, 2)
    bits = np.concatenate([pairs, pairs[::-1]], axis=1).T  # four rows: a column is a word
    stored = bits.view(jax.numpy.float8_e4m3fn)
    got = np.asarray(jax.jit(operands.from_e4m3)(stored)).astype(np.float32)
    np.testing.assert_array_equal(got * np.float32(16), stored.astype(np.float32))  # -0 == 0, NaN == NaN


def test_rounding_to_half_is_the_nearest_even():
    """Values around every half, their midpoints and neighbours, overflow, subnormals and NaN, against NumPy."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    others = [65519.99, 65520, 1e6, np.inf, np.nan, 2.0**-25, 2.0**-26, 1e-30]
    exact = np.concatenate([halves, middles, others], dtype=np.float32)
    low, high = (np.nextafter(exact, np.float32(way)) for way in (0, 1e30))
    values = np.concatenate([exact, low, high])
    values = np.concatenate([values, -values])
    got = np.asarray(jax.jit(operands.round_half)(values))
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    assert same.all(), values[~same][:5]


# ------------------------------------------------------------------ what it refuses


def test_bad_block_sizes_are_refused():
    case = build(*MIXED)
    for change, words in (
        ({"num_queries_per_block": 24}, "multiples of 16"),
        ({"num_kv_pages_per_block": 3}, "powers of two"),
        ({"num_stages": 1}, "two buffers"),
        ({"options": (("tile", 3),)}, "tile"),
    ):
        with pytest.raises(ValueError, match=words):
            tpu.run(case, cfg=tpu.config_of(case, **change))


def test_a_limit_that_nothing_fits_is_named():
    with pytest.raises(ValueError, match=r"vmem_limit_bytes is 0\.1 MiB"):
        tpu.run(build(*MIXED).replace(), vmem_limit_bytes=100_000)


def test_blocks_that_no_limit_holds_are_named():
    """An explicit config is not shrunk: it fits or is refused."""
    case = build(*MIXED)
    cfg = tpu.config_of(case, num_queries_per_block=1 << 14)
    with pytest.raises(ValueError, match=r"16384 query rows.* MiB of VMEM, and what v6e can spare is"):
        tpu.run(case, cfg=cfg)


def test_a_limit_past_the_chip_is_the_chips():
    """Blocks are cut to what a v4 has, not to what the caller thinks it has; explicit ones are refused by its name."""
    case = build(*MIXED, Shape(page=128, q_heads=128, kv_heads=16, head_dim=256), dtype="bfloat16")
    static = dataclasses.replace(tpu.signature_of(case), vmem_limit_bytes=1 << 30)
    device = dataclasses.replace(tpu.DEVICE, kind="TPU v4", interpreted=False)
    reason = pallas_tpu.BACKEND.supports(static, device)
    assert reason is not None
    assert "what v4 can spare is 14.4 MiB" in reason


@pytest.mark.parametrize("kind", sorted(set(chips.CHIPS)))
def test_every_shape_that_is_promised_has_blocks_that_fit(kind):
    """Head sizes, heads, groups and pages of bf16 and fp8 caches; what a v4 cannot hold is refused by name."""
    device = dataclasses.replace(tpu.DEVICE, kind=kind, interpreted=False)
    usual = tpu.signature_of(build(*MIXED, dtype="bfloat16", compute_dtype="bfloat16"))
    sizes = itertools.product((64, 80, 96, 128, 192, 256), (1, 2, 3, 4, 5, 8, 16), (1, 3, 8, 16), (1, 16, 48, 256))
    for head_dim, heads, group, page in sizes:
        for kv_dtype in ("bfloat16", "float8_e4m3fn"):
            static = dataclasses.replace(
                usual, head_dim=head_dim, num_kv_heads=heads, num_q_heads=heads * group, page_size=page,
                pages_per_seq=4096 // page, num_tokens=512, kv_dtype=kv_dtype,
            )  # fmt: skip
            reason = pallas_tpu.BACKEND.supports(static, device)
            assert reason is None or (kind == "TPU v4" and "what v4 can spare is 14.4 MiB" in reason), reason


@pytest.mark.parametrize("kind", ["TPU v2", "TPU v3"])
def test_chips_that_are_too_old_are_refused(kind):
    device = dataclasses.replace(tpu.DEVICE, kind=kind, interpreted=False)
    reason = pallas_tpu.BACKEND.supports(tpu.signature_of(build(*MIXED)), device)
    assert reason is not None
    assert kind in reason


def test_without_a_tpu_or_its_interpreter_it_is_refused():
    case = build(*MIXED)
    with pytest.raises(ValueError, match="pallas_tpu"):
        ragged_page_attention_v2(*case.arrays, **case.options, platform="pallas")
