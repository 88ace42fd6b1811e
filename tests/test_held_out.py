"""The search against wrong kernels that it was not made with: each is found soon and made small."""

from __future__ import annotations

import time
from functools import cache

import pytest
from wrong_kernels import BUGS, LONG, UNSTEADY, Bug, broken

from fuzz.judge import Judgement, judge_plan
from fuzz.mutants import score
from fuzz.plan import Plan
from fuzz.shrink import shrink
from fuzz.targets import Target, from_callable


@cache
def found(name: str) -> tuple[Target, Plan, Judgement, int]:
    target = from_callable(broken(BUGS[name]), name)
    for count, plan in enumerate(score.drawn(1, 300), 1):
        judgement = judge_plan(plan, target)
        if judgement.bad:
            return target, plan, judgement, count
    raise AssertionError(f"{name} lives")


def test_without_a_bug_the_kernel_is_right() -> None:
    target = from_callable(broken(Bug), "right")
    assert not [plan for plan in score.drawn(1, 60) if judge_plan(plan, target).bad]


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_of_another_kind_dies_within_a_hundred_cases(name: str) -> None:
    judgement, count = found(name)[2:]
    assert count <= 100
    assert judgement.kind != "error", judgement.text  # a hook that raises proves nothing
    assert (judgement.kind == "determinism") == (name in UNSTEADY), judgement.text


@pytest.mark.parametrize("name", [name for name in BUGS if name not in LONG])
def test_its_case_shrinks_to_one_short_sequence(name: str) -> None:
    target, plan, judgement, _ = found(name)
    small = shrink(plan, target, judgement, seconds=5.0, clock=time.process_time)
    assert len(small.plan.lengths) == 1, small.plan
    assert small.plan.lengths[0][1] <= (8 if name not in UNSTEADY else 16), small.plan
