"""The Triton kernels compiled ahead of time for four chips, with registers, spills and shared memory in a budget.

`python tests/test_triton_aot.py` writes the budget anew, from the installed triton.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton package is a development dependency on Linux x86-64 only")

import triton

from rpa.backends.triton import aot, plan, tuning
from rpa.device import Device
from rpa.signature import Signature

RECORD = Path(__file__).parent / "bench" / "records" / "triton_aot.json"
CHIPS = {
    "sm_80": Device("gpu", "NVIDIA A100", (8, 0)), "sm_90": Device("gpu", "NVIDIA H200", (9, 0)),
    "sm_100": Device("gpu", "NVIDIA B200", (10, 0)), "gfx942": Device("gpu", "AMD Instinct MI300X"),
}  # fmt: skip
# What the hardware gives one program: bytes of shared memory.
LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def call(tokens, heads, kv_heads, dim, seqs, *, window=None, cap=None, sinks=False, dtype="bfloat16"):
    return Signature(
        num_tokens=tokens, num_q_heads=heads, head_dim=dim, num_pages=50_000, page_size=16, num_kv_heads=kv_heads,
        max_seqs=seqs, pages_per_seq=512, q_dtype=dtype, kv_dtype=dtype, compute_dtype=dtype, sinks=sinks,
        k_scale=False, v_scale=False, return_lse=False, optimized=False, softmax_scale=dim**-0.5,
        logits_soft_cap=cap, sliding_window=window, vmem_limit_bytes=None,
    )  # fmt: skip


CALLS = {
    "decode": call(8, 32, 8, 128, 8),
    "mixed": call(4224, 32, 8, 128, 130),
    "window_sinks": call(8192, 64, 8, 64, 1, window=128, sinks=True),
    "cap_d256": call(8192, 16, 8, 256, 1, window=4096, cap=50.0),
    "float32": call(64, 8, 2, 128, 64, dtype="float32"),
}
FAST = {("decode", "sm_90")}


def compiled(name: str, chip: str) -> dict[str, aot.Resources]:
    return aot.compile_call(CALLS[name], tuning.heuristic(CALLS[name], CHIPS[chip]), chip)


def pairs() -> list:
    every = [(name, chip) for name in CALLS for chip in CHIPS]
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in FAST)) for pair in every]


@pytest.mark.parametrize(("name", "chip"), pairs())
def test_machine_code_stays_within_its_budget(name, chip):
    record = json.loads(RECORD.read_text())
    for kernel, found in compiled(name, chip).items():
        assert found.shared <= LIMIT[chip]
        if record["triton"] == triton.__version__:  # registers are the compiler's, so a budget holds for one version
            budget = aot.Resources(**record["calls"][name][chip][kernel])
            assert found.registers <= budget.registers
            assert found.spilled <= budget.spilled
            assert found.shared <= budget.shared


@pytest.mark.slow
def test_long_tiles_use_the_matrix_unit_of_their_chip():
    """Hopper's own matrix instructions and asynchronous copies, not the ones of the chips before."""
    from rpa.backends.triton.kernel import attend_kernel

    signature = CALLS["window_sinks"]
    launch = plan.make(signature, tuning.heuristic(signature, CHIPS["sm_90"])).attend
    ptx = aot.compile_launch(attend_kernel, launch, signature, "sm_90").asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.cg.shared.global" in ptx


def record() -> None:
    """Write the budget."""
    calls = {
        name: {chip: {k: dataclasses.asdict(r) for k, r in compiled(name, chip).items()} for chip in CHIPS}
        for name in CALLS
    }
    RECORD.write_text(json.dumps({"triton": triton.__version__, "calls": calls}, indent=1) + "\n")


if __name__ == "__main__":
    record()
