"""What the Hopper kernel refuses, in words that say what to do, and what its tile shapes depend on."""

from __future__ import annotations

import dataclasses

import pytest

from rpa.backends import pallas_gpu
from rpa.backends.pallas_gpu.prefill_work import scratch_types
from rpa.backends.pallas_gpu.program import SMEM, decode_memory, footprint, program, shape_of
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.signature import Signature

H200 = Device("gpu", "NVIDIA H200", (9, 0))
CALL = Signature(
    num_tokens=64, num_q_heads=32, head_dim=128, num_pages=1000, page_size=16, num_kv_heads=8, max_seqs=64,
    pages_per_seq=512, q_dtype="bfloat16", kv_dtype="bfloat16", compute_dtype="bfloat16", sinks=False, k_scale=False,
    v_scale=False, return_lse=False, optimized=False, softmax_scale=128**-0.5, logits_soft_cap=None,
    sliding_window=None, vmem_limit_bytes=None,
)  # fmt: skip
REFUSED = [
    ({"kv_dtype": "float8_e4m3fn", "head_dim": 256, "num_tokens": 257}, "257 query rows of 64 sequences"),
    ({"kv_dtype": "int8", "head_dim": 80}, "head_dim=80 with pages of int8"),
    ({"kv_dtype": "int8", "q_dtype": "float32", "compute_dtype": "float32"}, "queries of float32"),
    ({"q_dtype": "float32", "kv_dtype": "float32", "compute_dtype": "float32"}, "kv_pages of float32"),
    ({"q_dtype": "float16"}, "queries of float16 on pages of bfloat16"),
    ({"compute_dtype": "float32"}, "compute_dtype=float32"),
    ({"k_scale": True}, "k_scale"),
    ({"head_dim": 100}, "head_dim=100"),
    ({"head_dim": 512}, "head_dim=512"),
    ({"page_size": 4}, "page size 4"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_refusal_names_the_argument_and_its_value(changes, reason):
    assert reason in (pallas_gpu.supports(dataclasses.replace(CALL, **changes), H200) or "")


def test_another_capability_is_told_which_backend_serves_it():
    assert "platform='triton'" in (pallas_gpu.supports(CALL, Device("gpu", "NVIDIA A100", (8, 0))) or "")


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pages_of_eight_bits_are_taken_with_scales(dim, stored, dtype):
    call = dataclasses.replace(
        CALL, head_dim=dim, q_dtype=dtype, kv_dtype=stored, compute_dtype=dtype, k_scale=True, v_scale=True
    )
    assert pallas_gpu.supports(call, H200) is None


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("page", [8, 16, 48, 256])
def test_the_shapes_it_is_for_are_taken(dim, dtype, page):
    call = dataclasses.replace(CALL, head_dim=dim, page_size=page, q_dtype=dtype, kv_dtype=dtype, compute_dtype=dtype)
    assert pallas_gpu.supports(call, H200) is None


@pytest.mark.parametrize("tokens", [1, 64, 300, 1024, 8192])
@pytest.mark.parametrize("dim", [16, 64, 96, 128, 192, 240, 256])
@pytest.mark.parametrize("window", [None, 128, 4096])
def test_every_ring_fits_shared_memory(tokens, dim, window):
    """Every group and dtype of pages, by what Mosaic gives each piece of scratch; the AOT test sees it do so."""
    for heads, kv_heads in ((1, 1), (3, 1), (32, 8), (40, 8), (25, 1), (64, 1)):
        for stored in ("bfloat16", "float8_e4m3fn", "int8"):
            call = dataclasses.replace(
                CALL, num_tokens=tokens, head_dim=dim, sliding_window=window, num_q_heads=heads, num_kv_heads=kv_heads,
                kv_dtype=stored,
            )  # fmt: skip
            if pallas_gpu.supports(call, H200) is None:
                assert shared_memory(call) <= SMEM, (heads, kv_heads, stored)


def shared_memory(call) -> int:
    """Bytes of the largest kernel of a call."""
    todo, shape = program(call, RaggedPageAttentionv2Config(), interpreted=False), shape_of(call)
    prefill = decode = 0
    if todo.prefill is not None:
        prefill = todo.prefill.teams * footprint(scratch_types(shape, todo.prefill))
    if todo.decode is not None:
        assert todo.decode.stages >= 1
        assert todo.decode.chunk % todo.decode.block == 0
        assert todo.decode.splits <= 64
        decode = decode_memory(shape, todo.decode)
    return prefill + decode if todo.fused else max(prefill, decode)


def test_tile_shapes_depend_on_static_shapes_and_config_alone():
    config = RaggedPageAttentionv2Config(options=(("workers", 2),))
    assert program(CALL, config, False) == program(CALL, config, False)
    assert program(CALL, config, False).decode.workers == 2
    assert program(CALL, RaggedPageAttentionv2Config(num_kv_splits=4), False).decode.splits == 4
    long = dataclasses.replace(CALL, num_tokens=8192, max_seqs=1)
    assert program(long, RaggedPageAttentionv2Config(num_stages=3), False).prefill.stages == 3


def test_an_option_it_would_ignore_is_refused():
    with pytest.raises(ValueError, match=r"warp_rows.*=2.*Mosaic GPU.*workers"):
        program(CALL, RaggedPageAttentionv2Config(options=(("warp_rows", 2),)), False)


def test_heads_share_a_warpgroup_only_where_it_sees_all_their_keys():
    local = dataclasses.replace(CALL, num_tokens=8192, max_seqs=1, head_dim=64, sliding_window=128)
    assert program(local, RaggedPageAttentionv2Config(), False).prefill.packed == 4
    assert program(local, RaggedPageAttentionv2Config(options=(("packed", 0),)), False).prefill.packed == 0
    with pytest.raises(ValueError, match=r"'packed'=1: .*160 keys"):
        program(local, RaggedPageAttentionv2Config(options=(("packed", 1),)), False)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_what_shared_memory_cannot_hold_is_refused_and_never_tuned(dim):
    call = dataclasses.replace(CALL, head_dim=dim)
    for config in pallas_gpu.candidates(call, H200):
        assert program(call, config, False).decode.stages >= 1
    with pytest.raises(ValueError, match=rf"'workers'=4, 'decode_block'=512: no room.*{dim}"):
        program(call, RaggedPageAttentionv2Config(options=(("decode_block", 512), ("workers", 4))), False)
