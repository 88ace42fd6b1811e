"""What the README says runs, and its figures are those of the records that ship."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[-1][:40])
def test_snippet_runs(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_figures_are_the_records():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "tests" / "bench" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    assert figures.filled(README) == README, "run python tests/bench/figures.py"
    assert "<!-- figures:" in README


def test_commands_exist():
    """Every `rpa` command that the README and the guide show is one."""
    from typer.main import get_command

    from fuzz import cli

    cli._mount()
    root = get_command(cli.app)
    shown = re.findall(r"uv run rpa (\w+)(?: (\w+))?", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert shown
    for name, sub in shown:
        assert name in root.commands, name
        if hasattr(root.commands[name], "commands"):
            assert sub in root.commands[name].commands, f"{name} {sub}"


def test_top_level_holds_four_folders():
    tracked = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    assert tracked - {"dist", "build"} == {"rpa", "oracle", "fuzz", "tests"}


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("rpa", "oracle", "fuzz")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
    assert result.attempted
    assert not result.failed
