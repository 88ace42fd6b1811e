"""The comparison with another package gives no number to a case that the oracle fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

_SPEC = importlib.util.spec_from_file_location("compare", Path(__file__).parent / "bench" / "compare_ejkernel.py")
compare = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(compare)

NAME = "decode_uneven-small-bf16"


def row(ours: str) -> dict:
    side = {"ms": 2.0, "cpu_ms": 2.0, "oracle": ours}
    return {"case": NAME, "rpa": side, "ejkernel": side | {"ms": 8.0, "cpu_ms": 4.0}}


def test_a_wrong_answer_has_no_number(capsys):
    assert compare._report([row("fail 3.20")]) == {}
    assert "no number: fail 3.20" in capsys.readouterr().out
    summary = compare._report([row("pass 0.40"), row("fail 3.20")])
    assert summary["wall"]["geometric_mean"] == pytest.approx(4.0)
    assert summary["cpu"]["least"] == pytest.approx(2.0)


def test_each_side_is_judged_by_the_oracle(tmp_path):
    compare.worker("rpa", [NAME], 1, str(tmp_path))
    assert compare.judged(NAME, "rpa", str(tmp_path)).startswith("pass")
    path = tmp_path / f"rpa-{NAME}.npy"
    np.save(path, np.load(path) * 1.5)
    assert compare.judged(NAME, "rpa", str(tmp_path)).startswith("fail")


def test_both_sides_get_the_same_arrays():
    first, second = compare.arrays(NAME), compare.arrays(NAME)
    assert all(np.array_equal(first[key], second[key]) for key in first)
