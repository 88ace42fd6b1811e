"""Source mutants of the Hopper kernel: each must be caught by a proof that needs no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.mutants import patched

ROOT = Path(__file__).parents[1]
# The proof that shows each bug.
CAUGHT_BY = {
    "tile_position": "tiles", "astray_ignored": "invalid", "split_floor": "items", "listed_split_floor": "items",
    "fill_after": "rows", "owner_overlap": "rows", "overlapping_sequences": "rows", "pages_of_other_rows": "items",
    "lanes_row_before": "lanes", "lanes_prefix": "lanes", "splits_averaged": "combine",
    "last_split_repeated": "combine", "causal_plus1": "prefill", "window_wide": "prefill_window",
    "v_not_sanitised": "prefill_window", "acc_not_rescaled": "decode_group_8", "kv_swapped": "decode_head_256",
    "wait_removed": "decode_e5m2", "group_before": "decode_one_split", "sink_head0": "prefill_edges",
    "stray_page": "stray", "unit_of_next": "items", "released_early": "decode", "fence_removed": "decode_head_256",
    "k_scale_head0": "decode_e5m2", "widened_unfenced": "decode_e5m2",
    "converted_unwaited": "prefill_fp8", "converted_over": "prefill_fp8", "v_scale_last": "prefill_fp8",
    "places_unequal": "places", "unit_forgotten": "decode_fp8",
    "values_of_next": "prefill_pair", "dead_values": "tiles", "heads_dealt_twice": "order",
    "scores_unawaited": "prefill_three",
    "packed_unmasked": "prefill_packed", "packed_keys_of_first": "prefill_packed",
    "head_repeated": "decode_one_split", "pages_of_first_block": "decode_group_8",
    "halved_unfenced": "prefill_fp8", "joined_at_sequence": "mixed_splits",
}  # fmt: skip
FAST = ("split_floor", "lanes_prefix")
RUN = "import runpy, sys; sys.path.insert(0, {tests!r}); runpy.run_path({proofs!r}, run_name='__main__')"


def patches() -> list:
    """Every patch of this kernel; a process each, so all but two are slow."""
    names = [p.id.removeprefix("pallas_gpu_") for p in patched.found().values() if p.kernel == "pallas_gpu"]
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in names]


@pytest.mark.parametrize("name", patches())
def test_a_bug_in_the_source_is_caught(name):
    code = RUN.format(tests=str(ROOT / "tests"), proofs=str(ROOT / "tests" / "mgpu_proofs.py"))
    with patched.applied(patched.found()[f"pallas_gpu_{name}"]) as tree:
        done = patched.run_python(tree, code, CAUGHT_BY[name], timeout=500)
    assert done.returncode != 0, f"{name} passed the proof {CAUGHT_BY[name]!r}"
    assert "holds:" not in done.stdout
    assert "ModuleNotFoundError" not in done.stderr, done.stderr[-2000:]
