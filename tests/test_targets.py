"""Anything callable is a target; what it declares is believed, what it does is watched."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fuzz.build import build
from fuzz.diagnose import diagnose
from fuzz.judge import judge_case, judge_plan
from fuzz.mutants.model import Launch, attention
from fuzz.plan import SMALLEST, Plan, Shape
from fuzz.strategies import expand
from fuzz.stream import first_shapes
from fuzz.targets import TargetError, from_callable, load
from oracle.bound import default_claim

PLAN = expand(first_shapes(0, 1)[0], "spikes", "mixed", "plain", 3, 7)
QUANTISED = Plan(Shape(1, 1, 3, 1, 4, 1, 1, 4, "int8"), ((1, 3),))


def right(queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, softmax_aux=None, *,
          softmax_scale, logits_soft_cap, sliding_window, compute_dtype):  # fmt: skip
    return attention(Launch(3, 5), queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs,
                     softmax_aux, softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap,
                     sliding_window=sliding_window, compute_dtype=compute_dtype)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody", "unknown: give module:function"),
        ("no.such.module:f", "No module named"),
        ("math:no_such", "no attribute"),
        ("math:pi", "float, not a function"),
        ("mutant:no_such", "no_such"),
    ],
)
def test_a_target_that_cannot_be_loaded_says_what_was_looked_for(name: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        load(name)


def test_a_function_of_the_working_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "own_kernel.py").write_text("def f(*arrays, **options):\n    return arrays[0]\n")
    code = "from fuzz.targets import load; print(load('own_kernel:f').name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "own_kernel:f"


def test_a_target_that_declares_nothing_gets_the_default_claim_and_no_promises() -> None:
    target = from_callable(right, "right")
    case = build(PLAN)
    assert target.claim(case) == default_claim(case)
    assert not target.batch_invariant
    assert not target.validates
    assert judge_plan(PLAN, target).status == "pass"


def test_a_missing_keyword_is_a_counted_gap_not_a_failure() -> None:
    judgement = judge_plan(QUANTISED, from_callable(right, "right"))
    assert (judgement.status, judgement.text) == ("skipped", "it takes no k_scale")


def test_a_declared_gap_and_a_refusal_are_skips_with_their_reason() -> None:
    def picky(*arrays, **options):
        raise NotImplementedError("no sinks today")

    assert judge_plan(PLAN, from_callable(picky, "picky")).text == "no sinks today"
    picky.supports = lambda case: "closed"
    assert judge_plan(PLAN, from_callable(picky, "picky")).text == "closed"


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (lambda q: 1 / 0, "error", "ZeroDivisionError at test_targets.py"),
        (lambda q: q[:, :1], "form", "shape"),
        (lambda q: q.astype(np.float64), "form", "dtype"),
        (lambda q: np.full_like(q, np.nan), "nan", "got nan"),
    ],
)
def test_a_wrong_answer_of_any_sort_is_a_failure(answer, kind: str, words: str) -> None:
    judgement = judge_plan(PLAN, from_callable(lambda *arrays, **options: answer(arrays[0]), "wrong"))
    assert (judgement.status, judgement.kind) == ("fail", kind)
    assert words in judgement.text


def test_a_kernel_that_writes_into_its_arguments_is_caught() -> None:
    def scribbler(*arrays, **options):
        output = right(*arrays, **options)
        arrays[2][0] += 1
        return output

    judgement = judge_plan(PLAN, from_callable(scribbler, "scribbler"))
    assert judgement.kind == "input"
    assert "context_lens" in judgement.text


def test_a_backend_that_another_one_answers_for_is_caught() -> None:
    def f(*arrays, **options):
        return right(*arrays, **options)

    f.expects, f.ran = "mine", lambda case: "theirs"
    judgement = judge_plan(PLAN, from_callable(f, "f"))
    assert judgement.kind == "backend"
    assert "theirs answered" in judgement.text


def test_a_jax_function_may_ask_for_jax_arrays() -> None:
    import jax

    def f(*arrays, **options):
        assert isinstance(arrays[0], jax.Array)
        return right(*arrays, **options)

    f.jax_arrays = True
    assert judge_plan(PLAN, from_callable(f, "f")).status == "pass"


def test_our_xla_backend_is_right_and_declares_its_claim() -> None:
    target = load("xla")
    case = build(SMALLEST)
    assert target.claim(case) is not None
    assert judge_case(case, target).status == "pass"
    assert target.ran is not None
    assert target.ran(case) == "xla"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise ZeroDivisionError('at import')", "ZeroDivisionError at broken.py:1: at import"),
        ("import sys; sys.exit(7)", "SystemExit at broken.py:1: 7"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("f = 3", "is of type int, not a function"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_in_a_line(
    source: str, told: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(TargetError, match=told):
        load("broken:f")


@pytest.mark.parametrize(
    ("answer", "kind", "told"),
    [
        (lambda q: None, "error", "returned a NoneType, which is no array of numbers"),
        (lambda q: "hello", "error", "returned a str"),
        (lambda q: sys.exit(3), "error", "SystemExit"),
    ],
)
def test_what_is_no_answer_is_a_failure_that_says_so(answer, kind: str, told: str) -> None:
    target = from_callable(lambda queries, *rest, **options: answer(queries), "odd")
    judgement = judge_plan(SMALLEST, target)
    assert (judgement.status, judgement.kind) == ("fail", kind)
    assert re.search(told, judgement.text), judgement.text
    assert diagnose([SMALLEST], target, judgement).family == kind


def test_a_shape_is_one_compilation_whatever_its_cases_hold() -> None:
    """A campaign's budget of compilations counts shapes."""
    import jax.monitoring

    compiled = []

    def listen(event: str, seconds: float, /, **rest) -> None:
        compiled.extend([event] * event.endswith("backend_compile_duration"))

    target = load("xla").asking(True)
    shape = Shape(5, 2, 7, 2, 3, 1, 5, 6, "int8", sinks=True, lse=True)  # of sizes that nothing else has
    jax.monitoring.register_event_duration_secs_listener(listen)
    for seed, check in enumerate(("plain", "second_fill", "repeat")):
        assert judge_plan(Plan(shape, ((3, 5), (1, 2)), seed=seed, check=check), target).status == "pass"
    assert len(compiled) == 1, compiled
