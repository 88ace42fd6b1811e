"""The Hopper kernel proved without a GPU: its plans, and its kernels in the interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mgpu_proofs import KERNELS, PROOFS

ROOT = Path(__file__).parents[1]
INTERPRETED = (*KERNELS, "invalid", "stray", "combine")
PLANS = [name for name in PROOFS if name not in INTERPRETED]
FAST = ["decode"]


def prove(*names: str) -> None:
    """Runs proofs in a process of their own, see `mgpu_proofs`."""
    command = [sys.executable, str(ROOT / "tests" / "mgpu_proofs.py"), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("name", PLANS)
def test_what_is_planned_is_what_the_contract_asks(name):
    PROOFS[name]()


def test_a_poisoned_decode_batch_is_right_in_the_interpreter():
    prove(*FAST)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["decode", "prefill", "mixed"])
def test_every_role_is_right_on_poisoned_batches_in_the_interpreter(role):
    prove(*(name for name in KERNELS if name.startswith(role) and name not in FAST))


@pytest.mark.slow
def test_an_invalid_sequence_is_nan_and_harms_nobody():
    prove("invalid", "stray", "combine")
