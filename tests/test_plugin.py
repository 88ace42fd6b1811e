"""The pytest plugin, as somebody else's repository uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = """
from fuzz.mutants.catalogue import target_of
from fuzz.mutants.model import Launch, attention

def right(*arrays, **options):
    return attention(Launch(3, 5), *arrays, **options)

def wrong(*arrays, **options):
    return target_of("window_wide").call(*arrays, **options)

def closed(*arrays, **options):
    return right(*arrays, **options)

closed.supports = lambda case: "not on this machine"
"""
OWN_TEST = """
from fuzz.plan import SMALLEST
from fuzz.build import build

def test_one_case(rpa_judge):
    assert rpa_judge(build(SMALLEST)).status == "pass"

def test_another(rpa_target):
    assert rpa_target.name
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(KERNELS)
    return tmp_path


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_a_right_kernel_passes_every_judge_without_a_test_of_its_own(folder: Path) -> None:
    done = run_pytest(folder, "--rpa-target", "own:right", "--rpa-examples", "8")
    assert done.returncode == 0, done.stdout
    assert "rpa: judging own:right, 8 cases a judge" in done.stdout
    assert "5 passed, 1 skipped" in done.stdout
    assert "does not declare that it validates" in done.stdout


def test_a_wrong_kernel_fails_with_its_smallest_case_and_a_script(folder: Path) -> None:
    done = run_pytest(folder, "--rpa-target", "own:wrong", "--rpa-examples", "10", "-k", "bound")
    assert done.returncode == 1, done.stdout
    assert "behaves like window_wide: masking" in done.stdout
    assert "smallest case: f32" in done.stdout
    assert "from own import wrong as target" in done.stdout


@pytest.mark.slow
def test_the_fixtures_judge_cases_in_the_users_own_tests(folder: Path) -> None:
    (folder / "test_own.py").write_text(OWN_TEST)
    done = run_pytest(folder, "test_own.py", "--rpa-target", "own:right", "-k", "test_one_case or test_another")
    assert "2 passed" in done.stdout, done.stdout
    without = run_pytest(folder, "test_own.py")
    assert "2 skipped" in without.stdout
    assert "no --rpa-target was given" in without.stdout


def test_a_target_that_takes_nothing_is_no_pass(folder: Path) -> None:
    done = run_pytest(folder, "--rpa-target", "own:closed", "--rpa-examples", "3", "-k", "bound")
    assert done.returncode == 1
    assert "nothing was verified" in done.stdout
    assert "not on this machine" in done.stdout


def test_the_plugin_imports_nothing_heavy() -> None:
    heavy = "('jax', 'numpy', 'hypothesis', 'oracle')"
    code = f"import sys, fuzz.pytest_plugin; print([m for m in {heavy} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
