"""The TPU kernel through the real compiler, without a TPU: every shape compiles, and its schedule keeps the budgets.

The figures in `bench/records/tpu_budgets.json` are the compiler's own, one file for one libtpu. They are bundles, not
time: a bundle is a cycle at least, waits for memory are not in it. Rewrite the file with

    python tests/test_tpu_aot.py
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tpu_shapes import KINDS, MATRIX, signature

HERE = Path(__file__).parent
RECORD = HERE / "bench" / "records" / "tpu_budgets.json"
SMALLER = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the `tpu` extra"
)
pytestmark = [pytest.mark.libtpu, SMALLER]

# Bundles for one block of 256 tokens at Llama-3-8B heads, transfers issued included; HBM needs 1119 cycles for it.
LIMITS = {("v6e", "llama_page16"): {"decode": 900, "mixed": 1400}}
# What the schedule is read for. The second of each pair differs from the first in one thing.
BUDGETS = {
    "v6e": ("llama_page16", "llama_page32", "llama_page128", "gpt_oss_d64", "gemma_d256", "fp8_e4m3"),
    "v5e": ("llama_page16", "llama_page32", "fp8_e4m3"),
    "tpu7x": ("llama_page16", "llama_page32", "fp8_e4m3"),
}
# A TPU's vector unit cannot load f16, so XLA reinterprets those caches as int16: a copy of the cache a call.
COPIED = ("f16", "f16_in_f32")
# A serving shape must compile within these on a chip: CPU seconds and resident bytes of the whole process.
COMPILE_SECONDS, COMPILE_MIB = 30, 1024


def aot(what: str, chip: str, *shapes: str) -> dict[str, dict[str, Any]]:
    """What `tpu_aot.py` says of each shape."""
    command = [sys.executable, str(HERE / "tpu_aot.py"), what, chip, *shapes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {fact["shape"]: fact for fact in facts}


def parallel(jobs: list[tuple[str, ...]]) -> list[dict[str, dict[str, Any]]]:
    """Two compilers at a time: one leaves half of a small machine idle."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: aot(*job), jobs))


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict[str, Any]]:
    """Every shape of the matrix, compiled."""
    half = len(MATRIX["v6e"]) // 2
    jobs = [("compile", "v6e", *MATRIX["v6e"][:half]), ("compile", "v6e", *MATRIX["v6e"][half:])]
    jobs += [("compile", chip, *shapes) for chip, shapes in MATRIX.items() if chip != "v6e"]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for job, facts in zip(jobs, parallel(jobs), strict=True):
        found |= {(job[1], shape): fact for shape, fact in facts.items()}
    return found


@pytest.fixture(scope="module")
def schedules() -> dict[str, dict[str, Any]]:
    return measure()


def measure() -> dict[str, dict[str, Any]]:
    """The record: for each chip and shape, decode's and mixed's loop bodies; upstream's beside them."""
    jobs = [("budget", chip, *shapes) for chip, shapes in BUDGETS.items()]
    jobs += [("upstream", chip) for chip in BUDGETS]
    answers = parallel(jobs)
    record: dict[str, dict[str, Any]] = {}
    for (what, chip, *_), facts in zip(jobs, answers, strict=True):
        for shape, fact in facts.items():
            record.setdefault(chip, {})["jax_upstream" if what == "upstream" else shape] = bodies(fact, what)
    return record


def bodies(fact: dict[str, Any], what: str) -> dict[str, Any]:
    """The block loops of a compiled kernel by name; ours come in the order of the source."""
    if what == "upstream":
        return {"mixed": max(fact["loops"], key=lambda loop: loop["bundles"])}
    decode, mixed = fact["loops"][-2:]
    static = signature(fact["shape"])
    return {"tokens": fact["config"][0] * static.page_size, "rows": fact["config"][1], "decode": decode, "mixed": mixed}


# ------------------------------------------------------------------ every shape compiles


def test_one_serving_shape_compiles_within_its_limits():
    fact = aot("compile", "v6e", "llama_page16")["llama_page16"]
    assert fact["cpu_s"] < COMPILE_SECONDS
    assert fact["rss_mib"] < COMPILE_MIB


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "shape"), [(chip, shape) for chip, shapes in MATRIX.items() for shape in shapes])
def test_shape_compiles(compiled, chip, shape):
    """And without a copy of the cache (f16 apart): what XLA allocates besides is a fraction of it."""
    fact = compiled[chip, shape]
    assert "refused" not in fact, fact
    static = signature(shape)
    cache = static.num_pages * static.page_size * 2 * static.num_kv_heads * static.head_dim
    if shape not in COPIED:
        assert fact["temp_bytes"] < max(cache // 4, 1 << 22), fact
    assert fact["cpu_s"] < COMPILE_SECONDS


# ------------------------------------------------------------------ instruction budgets


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "shape"), [(chip, shape) for chip, shapes in BUDGETS.items() for shape in shapes])
def test_schedule_is_the_recorded_one(schedules, chip, shape):
    """The compiler is deterministic: another figure means the kernel changed, or libtpu did."""
    record = json.loads(RECORD.read_text())
    ours = schedules[chip][shape]
    assert ours["decode"]["spill"] == ours["decode"]["fill"] == 0, ours
    recorded = record["chips"].get(chip, {}).get(shape)
    if recorded is None:
        pytest.skip(f"{chip} {shape}: no record yet, python tests/test_tpu_aot.py writes it")
    if record["libtpu"] == importlib.metadata.version("libtpu"):
        assert ours == recorded


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "shape"), LIMITS)
def test_budget(schedules, chip, shape, capsys):
    ours, upstream = schedules[chip][shape], schedules[chip]["jax_upstream"]
    for path, limit in LIMITS[chip, shape].items():
        assert ours[path]["bundles"] <= limit
    with capsys.disabled():
        print(f"\n{chip} {shape}: decode {ours['decode']['bundles']}, mixed {ours['mixed']['bundles']} bundles; "
              f"JAX's own kernel {upstream['mixed']['bundles']}")  # fmt: skip
    assert ours["mixed"]["bundles"] < upstream["mixed"]["bundles"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", BUDGETS)
def test_fp8_costs_fewer_bundles_than_it_saves_in_bytes(schedules, chip):
    """Half the bytes of a block; the conversion must not eat the cycles that HBM no longer needs."""
    wide, narrow = schedules[chip]["llama_page32"], schedules[chip]["fp8_e4m3"]
    saved = hbm_cycles(chip, "llama_page32", wide["tokens"]) - hbm_cycles(chip, "fp8_e4m3", narrow["tokens"])
    assert narrow["tokens"] == wide["tokens"]
    assert narrow["decode"]["bundles"] - wide["decode"]["bundles"] <= saved


def hbm_cycles(chip: str, shape: str, tokens: int) -> float:
    """Core cycles in which HBM delivers a block, from the published bandwidth and the derived clock."""
    from rpa.backends.pallas_tpu import chips

    part = chips.CHIPS[KINDS[chip]]
    return tokens * chips.token_bytes(signature(shape)) / part.bandwidth * part.clock


def table(record: dict[str, dict[str, Any]]) -> str:
    """Predicted share of HBM bandwidth in decode, a static estimate: cycles HBM needs over bundles, at most 1."""
    lines = [
        "| chip | shape | tokens | decode bundles | HBM cycles | bandwidth use (static estimate) |",
        "|---|---|---|---|---|---|",
    ]
    for chip, shapes in record.items():
        for shape, body in shapes.items():
            if shape == "jax_upstream":
                continue
            cycles, bundles = hbm_cycles(chip, shape, body["tokens"]), body["decode"]["bundles"]
            use = min(1.0, cycles / bundles)
            lines.append(f"| {chip} | {shape} | {body['tokens']} | {bundles} | {cycles:.0f} | {use:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    measured = measure()
    text = json.dumps({"libtpu": importlib.metadata.version("libtpu"), "chips": measured}, indent=1)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(text + "\n")
    print(table(measured))
