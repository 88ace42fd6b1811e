"""The search inside somebody else's pytest: `pytest --rpa-target module:function`, and fixtures.

Nothing heavy is imported here; a test run that asks for nothing pays nothing. With `--rpa-target`, one test a judge
is added to the run: the computed bound, the exact stratum, memory hygiene, relations, repetition, rejections.
Fixtures: `rpa_target` (the target), `rpa_judge` (judge a `Case` or a plan, and fail the test with the verdict).
"""

from __future__ import annotations

from typing import Any

import pytest

SHAPES = 12  # each is a compilation for a kernel that is compiled
EXAMPLES = 200
# test -> what its plans must be, as changes of the plans drawn
STRATA = {
    "bound": {"check": "plain"},
    "exact": {"data": "exact", "check": "plain"},
    "hygiene": {"check": "second_fill"},
    "relations": {"check": "relation"},
    "repetition": {"check": "repeat"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rpa", "judge a ragged paged attention kernel")
    group.addoption("--rpa-target", metavar="NAME", help="module:function, an rpa backend, or an adapter")
    group.addoption("--rpa-examples", type=int, default=EXAMPLES, metavar="N", help=f"cases a judge ({EXAMPLES})")
    group.addoption("--rpa-seed", type=int, default=0, metavar="N", help="of the stream of cases (0)")


def pytest_report_header(config: pytest.Config) -> str | None:
    name = config.getoption("--rpa-target")
    return f"rpa: judging {name}, {config.getoption('--rpa-examples')} cases a judge" if name else None


@pytest.hookimpl(tryfirst=True)  # so that -k and -m choose among these too
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    name = config.getoption("--rpa-target")
    if not name:
        return
    items += [_Judged.from_parent(session, name=f"rpa[{name}]::{stratum}", stratum=stratum) for stratum in STRATA]
    items.append(_Judged.from_parent(session, name=f"rpa[{name}]::rejections", stratum="rejections"))


class _Judged(pytest.Item):
    """One judge over its share of cases."""

    def __init__(self, *, stratum: str, **rest: Any) -> None:
        super().__init__(**rest)
        self.stratum = stratum

    def runtest(self) -> None:
        target = _target(self.config)
        if self.stratum == "rejections":
            return _rejections(target)
        judged, skipped = 0, {}
        for plan in _plans(self.config):
            judgement = _judge(plan.replace(**STRATA[self.stratum]), target)
            if judgement.bad:
                raise Wrong(_explained(plan.replace(**STRATA[self.stratum]), target, judgement))
            judged += judgement.status == "pass"
            if judgement.status == "skipped":
                skipped[judgement.text] = skipped.get(judgement.text, 0) + 1
        self.add_report_section("call", "rpa", f"{judged} cases verified; not judged: {skipped or 'none'}")
        if not judged:
            raise Wrong(f"nothing was verified; the target's reasons: {skipped}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, Wrong):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, int | None, str]:
        return "rpa", None, self.name


class Wrong(AssertionError):
    """A verdict against the target, with the smallest case and its explanation."""


@pytest.fixture(scope="session")
def rpa_target(request: pytest.FixtureRequest) -> Any:
    """The target named by `--rpa-target`; a test that asks for it is skipped without one."""
    if not request.config.getoption("--rpa-target"):
        pytest.skip("no --rpa-target was given")
    return _target(request.config)


@pytest.fixture
def rpa_judge(rpa_target: Any) -> Any:
    """A function of a `Case` or a plan that fails the test unless the target's answer is right."""

    def judge(value: Any) -> Any:
        from fuzz.judge import judge_case
        from fuzz.plan import Plan

        judgement = _judge(value, rpa_target) if isinstance(value, Plan) else judge_case(value, rpa_target)
        if judgement.bad:
            pytest.fail(judgement.text, pytrace=False)
        if judgement.status == "skipped":
            pytest.skip(judgement.text)
        return judgement

    return judge


def _target(config: pytest.Config) -> Any:
    from fuzz.targets import TargetError, load

    try:
        return load(str(config.getoption("--rpa-target")))
    except TargetError as error:
        raise pytest.UsageError(str(error)) from None


def _plans(config: pytest.Config) -> Any:
    from fuzz.mutants.score import drawn
    from fuzz.stream import first_shapes

    seed = int(config.getoption("--rpa-seed") or 0)
    return drawn(seed, config.getoption("--rpa-examples"), first_shapes(seed, SHAPES))


def _judge(plan: Any, target: Any) -> Any:
    from fuzz.judge import judge_plan

    return judge_plan(plan, target)


def _rejections(target: Any) -> None:
    from fuzz.build import build
    from fuzz.judge import judge_rejections
    from fuzz.plan import SMALLEST

    if not target.validates:
        pytest.skip(f"{target.name} does not declare that it validates its arguments")
    found = judge_rejections(build(SMALLEST), target)
    if found:
        raise Wrong("\n".join(judgement.text for judgement in found))


def _explained(plan: Any, target: Any, judgement: Any) -> str:
    """The failure, shrunk, with its diagnosis and a script."""
    from fuzz.build import build
    from fuzz.diagnose import diagnose
    from fuzz.repro import script
    from fuzz.shrink import shrink

    small = shrink(plan, target, judgement)
    diagnosis = diagnose([small.plan, plan], target, small.judgement)
    text = script(build(small.plan), target, small.judgement, diagnosis)
    return "\n".join([small.judgement.text, str(diagnosis), f"smallest case: {small.plan}", "", text])
