"""The test of the tests: every known kernel bug is caught, soon, and a right kernel never is."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from right_kernels import KERNELS as RIGHT

from fuzz.commands.search import app
from fuzz.judge import judge_plan
from fuzz.mutants import patched, score
from fuzz.mutants.catalogue import BY_ID, EQUIVALENT, MUTANTS, model_target
from fuzz.mutants.model import Launch
from fuzz.plan import Plan
from fuzz.targets import from_callable

# Rare by nature: they need a table entry, a split or a length that few cases have.
RARE = {
    "minus_one",
    "int16_pos",
    "batch_dependent",
    "mask_after_max",
    "int32_offset",
    "page_pow2",
    "empty_seq_prefetch",
}

SHORT = tuple(shape for shape in score.first_shapes(8, 24) if shape.capacity < 200)  # quick to judge


def test_the_catalogue_is_large_named_once_and_in_words() -> None:
    names = [mutant.id for mutant in (*MUTANTS, *EQUIVALENT)]
    assert len(names) == len(set(names))
    assert len(MUTANTS) >= 100
    assert all(mutant.line and mutant.group for mutant in MUTANTS)
    assert all(mutant.equivalent for mutant in EQUIVALENT)


@pytest.mark.parametrize("group", sorted({m.group for m in MUTANTS}))
def test_every_common_bug_dies_within_fifty_cases_by_an_answer_not_a_crash(group: str) -> None:
    for mutant in (m for m in MUTANTS if m.group == group and m.id not in RARE):
        # Hypothesis also draws constants out of the modules that happen to be imported: fifty leave room for that.
        found = score.kill(mutant, seed=1, cases=50)
        assert found.killed, f"{mutant.id} lives"
        assert found.kind != "error", f"{mutant.id}: {found.text}"  # a broken model kills nothing


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 3))])
def test_the_whole_score(seed: int) -> None:
    kills = list(score.kill_all(seed))
    alive = [k.id for k in kills if not k.killed]
    assert not alive
    assert max(k.seconds for k in kills) <= score.SECONDS
    cases = [k.cases for k in kills]
    assert statistics.median(cases) <= 5
    assert sum(c <= 50 for c in cases) >= 0.95 * len(cases)


@pytest.mark.parametrize("mutant", EQUIVALENT, ids=lambda m: m.id)
def test_equivalent_mutants_are_not_accused(mutant) -> None:
    assert not score.kill(mutant, seed=0, cases=40).killed


def test_a_right_kernel_of_any_blocking_raises_no_alarm() -> None:
    assert score.false_alarms(seed=2, cases=48, pool=SHORT) == []


@pytest.mark.slow
def test_a_right_kernel_raises_no_alarm_in_two_thousand_cases() -> None:
    assert score.false_alarms(seed=0, cases=2000) == []


def accusations(name: str, count: int, seed: int, pool: tuple = ()) -> list[str]:
    """What the search says against a right kernel that it was not made with."""
    target = from_callable(RIGHT[name], name)
    judged = ((plan, judge_plan(plan, target)) for plan in score.drawn(seed, count, pool))
    return [f"{plan}: {judgement.text}" for plan, judgement in judged if judgement.bad]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_of_unusual_build_is_not_accused(name: str) -> None:
    assert accusations(name, 24, seed=8, pool=SHORT) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_of_unusual_build_is_not_accused_in_two_thousand_cases(name: str) -> None:
    assert accusations(name, 2000, seed=9) == []


def test_the_usual_judges_miss_bugs_that_this_search_catches() -> None:
    ids = ("p_bf16", "v_not_sanitised", "int16_pos")
    judge = next(u for u in score.USUAL if u.layouts == "published")
    found = {name: score.accused_by(judge, BY_ID[name]) for name in ids}
    assert not all(found.values()), found


def test_the_model_is_not_wrong_where_the_switch_has_no_effect() -> None:
    plan = Plan(score.first_shapes(0, 2)[1], ((1, 5),), data="normal")  # no window, no sinks
    assert judge_plan(plan, model_target(BY_ID["window_wide"])).status == "pass"
    assert judge_plan(plan, model_target(BY_ID["sink_ignored"])).status == "pass"


def test_tile_sizes_never_decide_the_answer() -> None:
    from fuzz.mutants.catalogue import right_target

    for plan in score.drawn(4, 8, SHORT):
        for launch in (Launch(1, 1), Launch(64, 256, 4)):
            assert not judge_plan(plan, right_target(launch)).bad


def test_a_stopped_matrix_is_printed_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[str] = []

    def kill_patch(patch: patched.Patch, seed: int) -> score.Kill:
        asked.append(patch.id)
        if patch.id == "xla_kv_swapped" and asked.count(patch.id) == 1:
            raise KeyboardInterrupt
        return score.Kill(patch.id, "patch of xla", patch.line, True, 3, 0.5, "bound", "wrong")

    monkeypatch.setattr(score, "kill_patch", kill_patch)
    monkeypatch.setenv("COLUMNS", "160")
    sources = "xla_causal_plus1|xla_kv_swapped"
    matrix = ("mutants", "--only", "no_such_mutant", "--patches", sources, "--alarms", "0", "--no-usual")
    options = (*matrix, "--out", str(tmp_path))
    assert ended(options) == 4
    told = capsys.readouterr()
    assert "stopped: 1 of 2 mutants were run" in told.out
    assert "xla_causal_plus1" in told.out
    assert json.loads((tmp_path / "kills.json").read_text())["interrupted"]
    assert ended(options) == 0
    assert sorted(asked) == ["xla_causal_plus1", "xla_kv_swapped", "xla_kv_swapped"]
    assert "2 of 2 killed" in capsys.readouterr().out


def ended(arguments: tuple[str, ...]) -> int:
    """The exit status of an `rpa fuzz` command."""
    with pytest.raises(SystemExit) as status:
        app(arguments)
    return int(status.value.code or 0)


# ---------------------------------------------------------------- source patches


def test_every_patch_applies_to_the_sources_as_they_are() -> None:
    for patch in patched.found().values():
        for name, text in patched.changed(patch).items():
            assert text != (patched.ROOT / name).read_text(), patch.id
            compile(text, name, "exec")


def test_a_patch_that_no_longer_applies_is_an_error_that_names_it(tmp_path) -> None:
    path = tmp_path / "xla_stale.patch"
    path.write_text("# it was\n--- a/rpa/api.py\n+++ b/rpa/api.py\n@@ -1 +1 @@\n-no such line anywhere\n+other\n")
    stale = pytest.raises(patched.PatchError, match=r"xla_stale.patch does not apply: 0 places")
    with stale, patched.applied(patched.read(path)):
        pass


@pytest.mark.parametrize(("name", "text", "words"), [
    ("cuda_x.patch", "# x\n", "must be <kernel>_<id>.patch"),
    ("xla_x.patch", "--- a/rpa/api.py\n", "first line must be"),
])  # fmt: skip
def test_a_malformed_patch_is_refused(tmp_path, name: str, text: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(patched.PatchError, match=words):
        patched.read(path)


def test_patches_are_chosen_by_a_word() -> None:
    few, xla = patched.chosen("few"), patched.chosen("xla")
    assert len(xla) >= 12
    assert {p.kernel for p in few} == {"xla", "api", "triton", "pallas_tpu", "pallas_gpu"}
    assert [p.id for p in patched.chosen("xla_causal")] == ["xla_causal_plus1"]
    assert len(patched.chosen("all")) == len(patched.found())
    with pytest.raises(patched.PatchError, match="no patch is called 'nonsense'"):
        patched.chosen("nonsense")


@pytest.mark.slow
@pytest.mark.parametrize("patch", [p for p in patched.found().values() if p.target == "xla"], ids=lambda p: p.id)
def test_every_patch_of_the_xla_backend_is_killed(patch) -> None:
    found = score.kill_patch(patch)
    assert found.killed, f"{patch.id} lives after {found.cases} cases"
