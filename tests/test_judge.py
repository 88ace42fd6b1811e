"""Plans judged together are judged as each is alone, and nothing of a target runs before its own case does."""

import dataclasses
from itertools import groupby

import pytest

from fuzz import judge
from fuzz.judge import judge_plan, judge_plans
from fuzz.mutants import score
from fuzz.mutants.catalogue import BY_ID, model_target, right_target
from fuzz.mutants.model import Launch
from fuzz.plan import Plan
from fuzz.strategies import LITTER, MATES
from fuzz.targets import Target
from oracle import Case, Claim, default_claim


def litters() -> list[list[Plan]]:
    """The plans of one draw, those of one shape together."""
    key = lambda plan: str(plan.shape)  # noqa: E731
    return [list(plans) for _, plans in groupby(sorted(score.drawn(3, LITTER), key=key), key=key)]


@pytest.mark.parametrize("mutant", [None, "window_wide", "sink_ignored"])
def test_a_person_reads_of_each_what_is_read_of_it_alone(mutant):
    target = model_target(BY_ID[mutant]) if mutant else right_target(Launch())
    together = [judgement for plans in litters() for judgement in judge_plans(plans, target)]
    alone = [judge_plan(plan, target) for plans in litters() for plan in plans]
    assert [(j.status, j.kind, j.text) for j in together] == [(j.status, j.kind, j.text) for j in alone]
    assert any(j.bad for j in alone) == (mutant is not None)


def claims_of(case: Case) -> Claim:
    """Another claim for each context length of the first sequence."""
    return dataclasses.replace(default_claim(case), eps_exp=2.0**-21 * (1 + int(case.context_lens[0]) % 3))


def test_a_case_of_another_claim_is_analysed_by_its_own(monkeypatch):
    target = dataclasses.replace(right_target(Launch()), claim=claims_of)
    walks = []
    for name in ("analyse", "analyse_all"):
        monkeypatch.setattr(judge, name, _logged(getattr(judge, name), walks))
    for plans in litters():
        for plan, judgement in zip(plans, judge_plans(plans, target), strict=True):
            assert judgement.text == judge_plan(plan, target).text
    assert max(walks) > 1
    assert walks.count(0) > 0  # some alone, since their claim is not that of the first


def _logged(walk, walks: list[int]):
    def logged(cases, *rest, **options):
        walks.append(len(cases) if isinstance(cases, list) else 0)
        return walk(cases, *rest, **options)

    return logged


def test_of_each_case_the_target_is_called_first_then_its_claim_and_of_no_later_case_anything():
    plans = max(litters(), key=len)[:MATES]
    right = right_target(Launch())
    order: list[tuple[str, bytes]] = []

    def call(*arrays, **options):
        order.append(("call", arrays[0].tobytes()))
        return right.call(*arrays, **options)

    def claim(case: Case) -> Claim:
        order.append(("claim", case.queries.tobytes()))
        return right.claim(case)

    target: Target = dataclasses.replace(right, call=call, claim=claim)
    assert len(plans) == MATES
    for plan, _ in zip(plans, judge_plans(plans, target), strict=True):
        mine = judge.build(plan).queries.tobytes()
        assert order[:2] == [("call", mine), ("claim", mine)]
        assert {queries for what, queries in order if what == "claim"} == {mine}
        order.clear()
