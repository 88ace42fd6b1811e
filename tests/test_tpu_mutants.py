"""Every broken copy of the TPU kernel must be caught by what `test_tpu_interpret.py` does.

Each runs in a fresh process on a patched copy of the tree; the first proof that objects ends it. Which one that is
lies in `bench/records/tpu_mutants.json`, so that a run starts with it; CI takes the mutants that die fastest. Write it
(about 10 minutes of CPU) with

    python tests/test_tpu_mutants.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fuzz.mutants import patched

RECORD = Path(__file__).parent / "bench" / "records" / "tpu_mutants.json"
PATCHES = {name: patch for name, patch in patched.found().items() if patch.kernel == "pallas_tpu"}
# Proofs in the order that a mutant meets them: a case of `tpu_proofs.PROOFS` and a transfer mode.
ORDER = (
    ("rich", "on_wait"),
    ("rich", "eager"),
    ("full", "on_wait"),
    ("wide", "on_wait"),
    ("visible", "eager"),
    ("pieces", "on_wait"),
    ("plain", "on_wait"),
    ("plain", "eager"),
    ("narrow", "on_wait"),
)
CAUGHT: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())["caught"] if RECORD.exists() else {}
# A wait for a transfer that nobody started never returns, on a TPU as here: wall seconds for the mutants known to hang,
# and for the others, whose proofs take a minute at most and may share the machine with anything.
PATIENCE, MUCH_PATIENCE, HANGS = 300, 1500, "waits for a transfer that nobody started"
# The mutants that CI runs: those that die fastest by the record, some 9 CPU seconds each on an idle machine.
CI_SHARE = 24
CODE = f"""
import json, sys
sys.path.append({str(Path(__file__).parent)!r})
import tpu_proofs
for name, mode in json.loads(sys.argv[1]):
    print(json.dumps([name, mode]), flush=True)
    tpu_proofs.prove(name, mode)
"""


def outcome(root: Path, order, patience: int = MUCH_PATIENCE) -> tuple[int, list[str], str, float]:
    """Exit status, the last proof begun, the end of what was said, and CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = patched.run_python(root, CODE, json.dumps(order), timeout=patience)
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        begun = [line for line in (said.decode() if isinstance(said, bytes) else said).splitlines() if line[:1] == "["]
        return 1, json.loads(begun[-1]) if begun else [], HANGS, float(patience)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    begun = [line for line in done.stdout.splitlines() if line.startswith("[")]
    return done.returncode, json.loads(begun[-1]) if begun else [], done.stderr.strip()[-600:], seconds


def order_of(name: str) -> list[tuple[str, ...]]:
    """The proof that the record names first, then the others."""
    known = CAUGHT.get(name)
    first = tuple(known["by"]) if known else None
    return [*([first] if first else []), *(proof for proof in ORDER if proof != first)]


def quickest() -> list[str]:
    """The mutants that die fastest: CI's share."""
    known = [name for name in PATCHES if name in CAUGHT]  # in one order, so that ties fall alike in every process
    return sorted(known, key=lambda name: CAUGHT[name]["cpu_s"])[:CI_SHARE]


def hangs(name: str) -> bool:
    """Whether the record says that a mutant never ends."""
    return name in CAUGHT and CAUGHT[name]["says"] == HANGS


def check(name: str) -> dict[str, Any]:
    """Run a mutant until a proof objects; which one, and after how many CPU seconds."""
    with patched.applied(PATCHES[name]) as root:
        code, proof, text, seconds = outcome(root, order_of(name), PATIENCE if hangs(name) else MUCH_PATIENCE)
    assert code == 1, f"every proof passes: {PATCHES[name].line}"
    for word in ("PatchError", "SyntaxError", "NameError", "ImportError"):
        assert word not in text, text
    said = [line for line in text.splitlines() if not line.startswith(("For simplicity, JAX", "-----"))]
    return {"by": proof, "cpu_s": round(seconds, 1), "says": said[-1][:160]}


def test_the_record_holds_every_mutant():
    assert set(CAUGHT) == set(PATCHES)
    assert len(PATCHES) >= 12


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_right_kernel_passes_every_proof():
    code, proof, text, _ = outcome(patched.ROOT, ORDER)
    assert code == 0, f"{proof}: {text}"


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", [pytest.param(n, id=f"{'ci' if n in quickest() else 'hand'}-{n}") for n in PATCHES])
def test_mutant_is_caught(name):
    # Running out of patience catches only a mutant which is known to hang: on an overloaded machine any proof may.
    assert check(name)["says"] != HANGS or hangs(name), f"no proof objected within {MUCH_PATIENCE} s"


def main(*names: str) -> None:
    """Write the record, a mutant at a time: of those named, or of all."""
    for name in names or PATCHES:
        try:
            CAUGHT[name] = check(name)
            print(name, CAUGHT[name], flush=True)
        except AssertionError as error:
            CAUGHT.pop(name, None)
            print(name, "NOT CAUGHT", error, flush=True)
        rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(CAUGHT[n])}" for n in sorted(CAUGHT) if n in PATCHES)
        RECORD.write_text(f'{{\n "caught": {{\n{rows}\n }}\n}}\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
