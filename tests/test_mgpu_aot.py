"""The Hopper kernel compiled for sm_90a with no GPU: it fits, spills little, and its wgmmas are not serialised."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Bytes of spill stores a kernel may have; the rest may have none.
SPILLED = {
    "prefill": 96,  # what lives across tiles, outside the loop over a tile's whole blocks; as of "prefill_240"
    "prefill_256": 96,
    "prefill_240": 420,
    "prefill_window": 32,
    "mixed": 32,
    "mixed_odd": 100,  # prefill blocks of 128 keys beside a decode role, 7 % faster than of 64
    "mixed_group_25": 32,
}
# Programs a call launches at most: decode's kernel, and one more where its rows are split; others plan before.
LAUNCHES = {"decode": 2, "decode_few": 2, "decode_window": 1, "decode_e4m3": 2, "decode_int8": 1, "prefill": 3,
            "prefill_several": 6, "mixed": 9}  # fmt: skip

pytestmark = [
    pytest.mark.cuda_plugin,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs the `gpu` extra: no jax_cuda13_plugin here",
    ),
]


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    script = str(ROOT / "tests" / "mgpu_aot.py")
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["call"]: line for line in lines}


@pytest.mark.parametrize(
    "call",
    [
        *("decode", "decode_few", "decode_few_64", "decode_wide", "decode_window", "decode_e4m3", "decode_int8"),
        *("mixed", "mixed_e5m2"),
        *("prefill", "prefill_256", "prefill_window", "prefill_e4m3", "prefill_192_int8"),
        *("prefill_odd", "prefill_240", "mixed_odd", "mixed_group_25"),
    ],
)
def test_the_kernel_fits_and_keeps_its_registers(reports, call):
    report = reports[call]
    assert report["registers"], report
    assert max(report["shared"]) <= 227 * 1024
    assert max(report["spilled"]) <= SPILLED.get(call, 0), report
    assert not report["serialised"]


@pytest.mark.parametrize("call", LAUNCHES)
def test_a_call_launches_no_more_than_it_needs(reports, call):
    assert reports[call]["launches"] <= LAUNCHES[call], reports[call]
