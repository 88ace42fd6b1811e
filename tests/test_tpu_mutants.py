"""Every broken copy of the TPU kernel must be caught by what `test_tpu_interpret.py` does.

Each runs in a fresh process on a patched copy of the tree; the first proof that objects ends it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fuzz.mutants import patched

PATCHES = {name: patch for name, patch in patched.found().items() if patch.kernel == "pallas_tpu"}
# Proofs in the order that a mutant meets them: a case of `tpu_proofs.PROOFS` and a transfer mode.
ORDER = (
    ("rich", "on_wait"),
    ("rich", "eager"),
    ("plain", "on_wait"),
    ("plain", "eager"),
    ("wide", "on_wait"),
    ("visible", "eager"),
)
# What the first proof cannot see, and the one that does.
FIRST = {
    "pallas_tpu_sem_shared": ("visible", "eager"),
    "pallas_tpu_table_slice_clamped": ("wide", "on_wait"),
    "pallas_tpu_pages_past_the_end": ("visible", "eager"),
}
CODE = f"""
import json, sys
sys.path.append({str(Path(__file__).parent)!r})
import tpu_proofs
for name, mode in json.loads(sys.argv[1]):
    tpu_proofs.prove(name, mode)
"""


def outcome(root: Path, order) -> tuple[int, str]:
    done = patched.run_python(root, CODE, json.dumps(order), timeout=1500)
    return done.returncode, done.stderr.strip()[-600:]


def test_there_are_mutants_enough():
    assert len(PATCHES) >= 12


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_right_kernel_passes_every_proof():
    code, text = outcome(patched.ROOT, ORDER)
    assert code == 0, text


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", PATCHES)
def test_mutant_is_caught(name):
    first = FIRST.get(name)
    order = [*([first] if first else []), *(proof for proof in ORDER if proof != first)]
    with patched.applied(PATCHES[name]) as root:
        code, text = outcome(root, order)
    assert code == 1, f"every proof passes: {PATCHES[name].line}"
    assert "PatchError" not in text
    assert "SyntaxError" not in text
    assert "NameError" not in text, text
