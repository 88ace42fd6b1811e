"""What a failure leaves: a smallest plan, an explanation, and a script that runs alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fuzz.diagnose import diagnose
from fuzz.judge import Judgement, judge_plan, judge_rejections
from fuzz.mutants import score
from fuzz.mutants.catalogue import BY_ID, MUTANTS, model_target
from fuzz.plan import SMALLEST, Plan
from fuzz.repro import LINES, _mostly_alike, leave
from fuzz.shrink import Shrunk, fitted, same_symptom, shrink, size
from fuzz.targets import from_callable

ROOT = Path(__file__).parents[1]
# One of each family, and of each kind of failure.
SAMPLE = ("causal_plus1", "identity", "no_max", "v_scale_ignored", "sink_every_split", "lse_base2", "nondeterministic")

# Wrong only when there is another sequence, or thousands of tokens.
NEEDS_MORE = {"next_len", "row_next", "row0", "table_width_as_seqs", "q_start_off", "last_seq_skipped", "uniform_qlen",
              "empty_seq_prefetch", "int16_pos", "batch_dependent"}  # fmt: skip


@cache
def first_failure(name: str) -> tuple[Plan, Judgement]:
    target = model_target(BY_ID[name])
    for plan in score.drawn(1, 300):
        judgement = judge_plan(plan, target)
        if judgement.bad:
            return plan, judgement
    raise AssertionError(f"{name} lives")


@cache
def smallest(name: str) -> Shrunk:
    plan, judgement = first_failure(name)
    return shrink(plan, model_target(BY_ID[name]), judgement, clock=time.process_time)


def is_small(shrunk: Shrunk) -> bool:
    lengths = shrunk.plan.lengths
    return len(lengths) == 1 and sum(context for _, context in lengths) <= 8


@pytest.mark.parametrize("name", [name for name in SAMPLE if name != "nondeterministic"])
def test_a_failure_shrinks_to_a_line_that_still_fails(name: str) -> None:
    plan, judgement = first_failure(name)
    small = smallest(name)
    assert size(small.plan) <= size(plan)
    assert same_symptom(judge_plan(small.plan, model_target(BY_ID[name])), judgement)
    assert is_small(small) or name in NEEDS_MORE, small.plan
    assert len(small.plan.lengths) <= 2


@pytest.mark.parametrize("name", SAMPLE)
def test_the_diagnosis_names_the_family(name: str) -> None:
    small = smallest(name)
    found = diagnose([small.plan, first_failure(name)[0]], model_target(BY_ID[name]), small.judgement)
    assert found.family == BY_ID[name].group, found


def test_a_kernel_that_returns_nothing_but_zeros_is_told_so() -> None:
    target = from_callable(lambda queries, *others, **options: np.zeros_like(queries), "zeros")
    plan = next(plan for plan in score.drawn(1, 20) if judge_plan(plan, target).bad)
    judgement = judge_plan(plan, target)
    small = shrink(plan, target, judgement)
    found = diagnose([small.plan, plan], target, small.judgement)
    assert str(found).startswith("returns 0 whatever it is given")
    skips = diagnose([small.plan, plan], model_target(BY_ID["last_seq_skipped"]), small.judgement)
    assert skips.family != "zeros"  # of one sequence it leaves nothing but zeros


@pytest.mark.parametrize(
    "name",
    [
        "causal_plus1",
        "v_scale_ignored",
        "v_not_sanitised",
        "dead_rows_garbage",
        "lse_base2",
        "nondeterministic",
        "sink_ignored",
    ],
)
def test_the_reproducer_is_short_runs_alone_and_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    small, target = smallest(name), model_target(BY_ID[name])
    leave(tmp_path, small.plan, target, small.judgement, diagnose([small.plan], target, small.judgement))
    text = (tmp_path / "reproduce.py").read_text()
    assert len(text.splitlines()) <= LINES
    imported = [line for line in text.splitlines() if "import" in line]
    numpy = "import ml_dtypes, numpy as np" if "ml_dtypes." in text else "import numpy as np"
    assert imported == [numpy, f'from fuzz.targets import load; target = load("mutant:{name}").call']
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(tmp_path / "reproduce.py")], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    said = {"causal_plus1": "as if key 1 were seen too", "nondeterministic": "must be 1",
            "v_not_sanitised": "each NaN: got=-1", "sink_ignored": "as if the sink were missing"}  # fmt: skip
    said = said.get(name, "expected=")
    assert said in done.stdout


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8], ids=lambda dtype: np.dtype(dtype).name)
def test_a_large_page_is_told_by_the_few_slots_that_hold_something(dtype) -> None:
    pages = np.full((3, 64, 2, 4), 7 if dtype is np.int8 else np.nan).astype(dtype)
    pages[1, 5], pages[2, 63, 1] = [[1, 2, 3, 4], [-1, 0, 0, 2]], 5
    told = _mostly_alike("kv", pages)
    assert told is not None
    assert len(told) < 200
    names = {"np": np, "ml_dtypes": ml_dtypes}
    exec(told, names)  # as somebody runs the script
    found = np.asarray(names["kv"])
    assert found.dtype == pages.dtype
    assert found.tobytes() == pages.tobytes()
    assert _mostly_alike("kv", np.arange(384, dtype=np.float32).reshape(pages.shape[:3])) is None


def test_a_fitted_plan_keeps_its_lengths_and_loses_the_rest() -> None:
    plan = score.drawn(1, 5)[4]
    tight = fitted(plan)
    assert tight.lengths == plan.lengths
    assert tight.shape.seqs == max(1, len(plan.lengths))
    assert size(tight) <= size(plan)


def test_shrinking_stops_at_its_time_limit() -> None:
    plan, judgement = first_failure("causal_plus1")
    stopped = shrink(plan, model_target(BY_ID["causal_plus1"]), judgement, seconds=0.0)
    assert stopped.plan == plan


def test_an_accepted_illegal_value_is_diagnosed_by_its_kind() -> None:
    target = model_target(BY_ID["accepts_bad"])
    from fuzz.build import build

    found = judge_rejections(build(SMALLEST), target)
    assert len(found) == 7
    assert diagnose([SMALLEST], target, found[0]).family == "selection"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nine_in_ten_failures_shrink_to_one_sequence_of_eight_tokens_and_are_explained() -> None:
    judged = [m for m in MUTANTS if m.id != "accepts_bad"]  # it fails without a case
    small = explained = 0
    for mutant in judged:
        shrunk = smallest(mutant.id)
        found = diagnose([shrunk.plan, first_failure(mutant.id)[0]], model_target(mutant), shrunk.judgement)
        assert shrunk.seconds <= 21, mutant.id  # of this process's CPU
        small += is_small(shrunk)
        explained += found.family == mutant.group
    assert small >= 0.9 * len(judged), small
    assert explained >= 0.8 * len(judged), explained
