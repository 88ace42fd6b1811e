"""The cache machine: a right kernel lives through it, and bookkeeping bugs of a kernel do not."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fuzz.machine import machine_for
from fuzz.mutants.catalogue import right_target, target_of
from fuzz.mutants.model import Launch
from fuzz.targets import load

STEPS = settings(
    max_examples=12,
    stateful_step_count=15,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


@pytest.mark.parametrize(("launch", "window"), [(Launch(3, 5, 2), 6), (Launch(1, 1), None)])
def test_a_right_kernel_survives_the_life_of_a_cache(launch: Launch, window: int | None) -> None:
    run_state_machine_as_test(machine_for(right_target(launch), window), settings=STEPS)


@pytest.mark.parametrize("name", ["row_next", "identity", "klen_page_rounded", "window_narrow", "empty_seq_prefetch"])
def test_a_bookkeeping_bug_does_not(name: str) -> None:
    with pytest.raises(AssertionError, match="beyond HARD"):
        run_state_machine_as_test(machine_for(target_of(name), 6), settings=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 6])
def test_the_xla_backend_survives_the_life_of_a_cache(window: int | None) -> None:
    run_state_machine_as_test(
        machine_for(load("xla"), window), settings=settings(STEPS, max_examples=60, stateful_step_count=40)
    )
