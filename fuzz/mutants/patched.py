"""Mutants as source patches of the real kernels: applied to a copy of the tree, run in a fresh process.

A patch lies in `fuzz/mutants/patches/<kernel>_<id>.patch`: first line `# what it does`, then a unified diff with paths
from the top of the checkout (`a/rpa/backends/xla.py`), as `git diff` writes it. `<kernel>` is a backend's name (`xla`,
`triton`, `pallas_tpu`, `pallas_gpu`) or `api` for what lies before the kernels (judged on `xla`). A fresh process,
because a switched source under an old jit cache would not run at all; the patched copy is imported in place of the
package by its position on `sys.path`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent / "patches"
ROOT = Path(__file__).parents[2]
KERNELS = ("xla", "triton", "pallas_tpu", "pallas_gpu", "api")
# Of each kernel that only an interpreter runs without its chip, a few that die soon: what `--patches few` tries.
FEW = ("triton_kv_swapped", "triton_causal_plus1", "triton_cap_no_outer", "pallas_tpu_kv_swapped",
       "pallas_tpu_causal_plus1", "pallas_gpu_kv_swapped")  # fmt: skip
PROOF_SECONDS = 900.0  # a proof of a kernel that hangs waits for minutes
_COPIED = ("rpa", "oracle", "fuzz")


class PatchError(ValueError):
    """A patch that is malformed, or that no longer applies; the message names the file."""


@dataclass(frozen=True)
class Patch:
    """One patch file: the kernel it breaks, its id, and what it does in a line."""

    id: str  # the file's stem
    kernel: str
    line: str
    path: Path

    @property
    def target(self) -> str:
        """The target that judges it."""
        return "xla" if self.kernel == "api" else self.kernel


@lru_cache(maxsize=1)
def found() -> dict[str, Patch]:
    """Every patch in the folder, by id.

    Raises:
        PatchError: a file whose name or first line is not of the format.
    """
    return {path.stem: read(path) for path in sorted(FOLDER.glob("*.patch"))}


def chosen(which: str | None) -> list[Patch]:
    """The patches that a word stands for: `few`, `all`, a kernel's name, or a regular expression on their ids.

    Raises:
        PatchError: nothing is called so.
    """
    if which is None:
        return []
    everything = found().values()
    if which == "all":
        return list(everything)
    if which == "few":
        return [patch for patch in everything if patch.target == "xla" or patch.id in FEW]
    picked = [patch for patch in everything if which == patch.kernel]
    picked = picked or [patch for patch in everything if re.search(which, patch.id)]
    if not picked:
        raise PatchError(f"no patch is called {which!r}: few, all, {', '.join(KERNELS)}, or part of an id")
    return picked


def read(path: Path) -> Patch:
    """The patch in a file."""
    kernel = next((k for k in KERNELS if path.stem.startswith(f"{k}_")), None)
    if kernel is None:
        raise PatchError(f"{path.name}: the name must be <kernel>_<id>.patch, kernel one of {', '.join(KERNELS)}")
    first = path.read_text().splitlines()[:1]
    if not first or not first[0].startswith("# "):
        raise PatchError(f"{path.name}: the first line must be '# what it does'")
    return Patch(path.stem, kernel, first[0].removeprefix("# "), path)


def version() -> str:
    """A name for the sources as they are: what was found out about others is out of date."""
    digest = hashlib.sha256()
    for package in _COPIED:
        for path in sorted([*(ROOT / package).rglob("*.py"), *(ROOT / package).rglob("*.patch")]):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def applied(patch: Patch) -> Iterator[Path]:
    """A folder that holds a copy of the packages with the patch applied; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rpa-mutant-") as name:
        root = Path(name)
        for package in _COPIED:
            shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
        for source, text in changed(patch).items():
            (root / source).write_text(text)
        yield root


def changed(patch: Patch) -> dict[str, str]:
    """The files that a patch changes, by path from the top of the checkout, as they read with it."""
    texts = {}
    for name, hunks in parse(patch.path).items():
        if not (ROOT / name).is_file():
            raise PatchError(f"{patch.path.name}: there is no file {name}")
        texts[name] = _patched((ROOT / name).read_text(), hunks, patch.path.name)
    return texts


def parse(path: Path) -> dict[str, list[tuple[str, str]]]:
    """The hunks of a unified diff by file: the old lines and the new ones, each as one text."""
    files: dict[str, list[tuple[list[str], list[str]]]] = {}
    hunks: list[tuple[list[str], list[str]]] = []
    for line in path.read_text().splitlines():
        if line.startswith("+++ "):
            hunks = files.setdefault(line[4:].split("\t")[0].removeprefix("b/"), [])
        elif line.startswith("@@"):
            hunks.append(([], []))
        elif hunks and line[:1] in (" ", "-", "+", "") and not line.startswith("--- "):
            for lines, signs in zip(hunks[-1], (" -", " +"), strict=True):
                if (line[:1] or " ") in signs:
                    lines.append(line[1:])
    if not files:
        raise PatchError(f"{path.name}: no unified diff in it")
    return {name: [("\n".join(old), "\n".join(new)) for old, new in hunks] for name, hunks in files.items()}


def _patched(source: str, hunks: list[tuple[str, str]], name: str) -> str:
    """Every hunk in its one place. By its text, not its line number: code above it may have moved."""
    for old, new in hunks:
        if source.count(old) != 1:
            raise PatchError(f"{name} does not apply: {source.count(old)} places match\n{old}")
        source = source.replace(old, new)
    return source


# The tests that prove each kernel's patches, one a patch: they go with a checkout, not with an installed package.
PROOFS = {"triton": "tests/test_triton_mutants.py", "pallas_tpu": "tests/test_tpu_mutants.py",
          "pallas_gpu": "tests/test_mgpu_mutants.py"}  # fmt: skip


def proof_of(patch: Patch) -> str | None:
    """The test that is to catch a patch, as pytest names it; None where there is none."""
    path = PROOFS.get(patch.kernel)
    if path is None or not (ROOT / path).is_file():
        return None
    names = (patch.id, patch.id.removeprefix(f"{patch.kernel}_"))
    return next((test for test in _tests(path) if test.rstrip("]").split("[")[-1].split("-")[-1] in names), None)


@cache
def _tests(path: str) -> list[str]:
    """The names of a file's tests."""
    done = _pytest("--collect-only", path)
    return [line for line in done.stdout.splitlines() if line.startswith(f"{path}::")]


def proved(test: str) -> tuple[bool, str]:
    """Whether a proof catches its patch (its test passes), and the end of what pytest says."""
    try:
        done = _pytest(test)
    except subprocess.TimeoutExpired:
        return False, f"no verdict in {PROOF_SECONDS} s"
    return done.returncode == 0, (done.stdout.strip().splitlines() or ["no word"])[-1]


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    return _run([sys.executable, "-m", "pytest", "-q", "-n", "0", "--slow", *arguments], ROOT, None, PROOF_SECONDS)


def run_python(root: Path, code: str, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process that imports the packages from `root`."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
    return _run([sys.executable, "-c", code, *arguments], root, environment, timeout)


_running: set[subprocess.Popen[str]] = set()


def _run(
    command: list[str], folder: Path, environment: dict[str, str] | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, but `stop` ends it too, from whichever thread it was begun."""
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        _running.add(child)
        try:
            out, err = child.communicate(timeout=timeout)
        except BaseException:
            _end(child)
            raise
        finally:
            _running.discard(child)
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def stop() -> None:
    """End every process that is judging a patch."""
    for child in list(_running):
        _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    """Kill a process with those it has begun: a proof runs the kernel in one of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
