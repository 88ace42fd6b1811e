"""The TPU kernel through the real compiler, without a TPU: every shape compiles, and its schedule keeps the budgets.

`bench/records/tpu_aot.json` holds what libtpu said of every shape on every chip: CPU seconds, memory, and the bundles
of the loop over blocks. A bundle is a cycle at least; waits for memory are not in it, so what is derived from bundles
is a static estimate and no measurement. The record's own tests need no libtpu; `-k serving` compiles a serving shape
again for three chips and compares (CI), `--slow` the whole matrix (half an hour of CPU). Write the record with

    python tests/test_tpu_aot.py [CHIP...]          every shape; a later run replaces a chip's rows
    python tests/test_tpu_aot.py --table            the record as a table
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tpu_shapes import KINDS, MATRIX, signature

from rpa.backends.pallas_tpu import chips
from rpa.device import Device

HERE = Path(__file__).parent
RECORD = HERE / "bench" / "records" / "tpu_aot.json"
EMPTY: dict[str, Any] = {"libtpu": "", "chips": {}, "upstream": {}, "serving": {}, "steps": {}}
FOUND: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else EMPTY
ROWS = [(chip, shape) for chip, shapes in MATRIX.items() for shape in shapes]
compiles = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the `tpu` extra"
)

# Bundles for one block of 256 tokens at Llama-3-8B heads, transfers issued included; HBM needs 1119 cycles for it on
# v6e. Pages of 32 and 128 issue fewer transfers for the same block.
LIMITS = {
    "v6e": {"decode": 900, "mixed": 1300},
    "v5e": {"decode": 900, "mixed": 1500},
    "tpu7x": {"decode": 900, "mixed": 1300},
}
LLAMA = ("llama_page16", "llama_page32", "llama_page128")
# A TPU cannot load f16, so XLA reinterprets those pages as int16: a copy of the cache a call.
COPIED = ("f16", "f16_in_f32")
# Serving steps whose cache must stay where it lies, whatever the head size, when XLA may choose its layout.
STEPS = ("llama_page16", "gpt_oss_d64", "d80", "d96", "d192")
# A serving shape must compile within these on a chip: CPU seconds and resident bytes of the whole process.
COMPILE_SECONDS, COMPILE_MIB = 30, 1024


def aot(what: str, chip: str, *shapes: str) -> Iterator[dict[str, Any]]:
    """What `tpu_aot.py` says of each shape, as it says it."""
    command = [sys.executable, str(HERE / "tpu_aot.py"), what, chip, *shapes]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield row(json.loads(line))
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 0, said[-3000:]


def row(fact: dict[str, Any]) -> dict[str, Any]:
    """A row of the record: the block loops by name (ours come in the order of the source), the rest as it came."""
    loops = [{name: loop[name] for name in ("bundles", "spill", "fill")} for loop in fact.pop("loops", [])]
    if "config" not in fact:
        return fact | {"mixed": max(loops, key=lambda loop: loop["bundles"])} if loops else fact
    page = signature(fact["shape"]).page_size
    fact |= {"tokens": fact["config"][0] * page, "rows": fact["config"][1]}
    return fact | dict(zip(("decode", "mixed"), loops[-2:], strict=True)) if loops else fact


def recorded(chip: str, shape: str) -> dict[str, Any]:
    """The record's row, or an assertion that says how to get one."""
    found = FOUND["chips"].get(chip, {}).get(shape)
    assert found is not None, f"{chip} {shape} is not in {RECORD.name}: python tests/test_tpu_aot.py {chip}"
    return found


# ------------------------------------------------------------------ the record: no libtpu needed


def test_the_record_holds_the_whole_matrix():
    assert {chip: set(rows) for chip, rows in FOUND["chips"].items()} == {c: set(s) for c, s in MATRIX.items()}
    assert all(len(MATRIX[chip]) >= 25 for chip in ("v5e", "v6e", "tpu7x"))


@pytest.mark.parametrize(("chip", "shape"), ROWS)
def test_recorded_shape_keeps_its_limits(chip, shape):
    """It compiled in time, was planned within its VMEM, and copies no cache (f16 apart)."""
    fact, static = recorded(chip, shape), signature(shape)
    assert "refused" not in fact, fact
    assert fact["cpu_s"] < COMPILE_SECONDS
    device = Device("tpu", KINDS[chip])
    assert fact["vmem_planned"] <= chips.vmem_limit(static, device)  # what the compiler was told to keep to
    assert fact["vmem_bytes"] <= chips.of(device).vmem
    cache = static.num_pages * static.page_size * 2 * static.num_kv_heads * static.head_dim
    if shape not in COPIED:
        assert fact["temp_bytes"] < max(cache // 4, 1 << 22), fact


def test_a_limit_of_the_caller_is_kept():
    """Of VMEM: smaller blocks, and the compiled kernel's allocations within it."""
    fact = recorded("v6e", "llama_in_6_mib")
    assert fact["vmem_planned"] <= 6 << 20
    assert fact["vmem_bytes"] <= 6 << 20 < recorded("v6e", "llama_page16")["vmem_bytes"]


@pytest.mark.parametrize("shape", LLAMA)
@pytest.mark.parametrize("chip", LIMITS)
def test_recorded_budget(chip, shape):
    """Decode and mixed within their limits, decode without a spill, both below JAX's own kernel."""
    ours, upstream = recorded(chip, shape), FOUND["upstream"][chip]
    for path, limit in LIMITS[chip].items():
        assert ours[path]["bundles"] <= limit
        assert ours[path]["bundles"] < upstream["mixed"]["bundles"]
    assert ours["tokens"] == 256
    assert ours["decode"]["spill"] == ours["decode"]["fill"] == 0


@pytest.mark.parametrize(
    ("chip", "shape"),
    [(chip, shape) for chip, shape in ROWS if shape in ("fp8_e4m3", "fp8_e5m2", "int8") and chip in LIMITS],
)
def test_narrow_pages_cost_fewer_bundles_than_they_save_in_bytes(chip, shape):
    """Half the bytes of a block; the conversion must not eat the cycles that HBM no longer needs."""
    wide, narrow = recorded(chip, "llama_page32"), recorded(chip, shape)
    saved = hbm_cycles(chip, "llama_page32", wide["tokens"]) - hbm_cycles(chip, shape, narrow["tokens"])
    assert narrow["tokens"] == wide["tokens"]
    assert narrow["decode"]["bundles"] - wide["decode"]["bundles"] <= saved


@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_recorded_serving_shape_compiled_within_its_limits(chip):
    """In a process of its own, as a server would meet it."""
    fact = FOUND["serving"][chip]
    assert fact["cpu_s"] < COMPILE_SECONDS
    assert fact["rss_mib"] < COMPILE_MIB


@pytest.mark.parametrize("shape", STEPS)
def test_recorded_serving_step_moves_no_cache(shape):
    """With `Layout.AUTO`; JAX's usual layout of a head size that is no multiple of 128 costs two copies a step."""
    fact = FOUND["steps"][shape]
    static = signature(shape)
    moves_no_cache(fact["auto"], fact["cache_bytes"])
    assert fact["auto"]["held_bytes"] == static.num_pages * static.page_size * chips.token_bytes(static)
    assert (fact["default"]["copies"] > 0) == (static.head_dim % 128 > 0)


def moves_no_cache(step: dict[str, Any], cache_bytes: int) -> None:
    assert step["copies"] == 0
    assert step["temp_bytes"] < cache_bytes // 4


# ------------------------------------------------------------------ the compiler, again


@pytest.mark.libtpu
@compiles
@pytest.mark.parametrize("chip", ["v6e", "v5e", "tpu7x"])
def test_serving_shape_still_has_its_schedule(chip):
    """The compiler is deterministic: another figure means that the kernel changed, or libtpu did."""
    shapes = ("llama_page16",) if chip == "tpu7x" else ("llama_page16", "fp8_e4m3")  # converted by hand
    for fact in aot("budget", chip, *shapes):
        same_schedule(chip, fact)


@pytest.mark.libtpu
@compiles
def test_serving_shape_compiles_within_its_limits():
    (fact,) = aot("compile", "v6e", "llama_page16")
    assert fact["cpu_s"] < COMPILE_SECONDS
    assert fact["rss_mib"] < COMPILE_MIB


@pytest.mark.libtpu
@compiles
def test_serving_upstream_beside_ours():
    """JAX's own kernel, compiled in the same run."""
    (fact,) = aot("upstream", "v6e")
    assert fact["mixed"]["bundles"] > recorded("v6e", "llama_page16")["mixed"]["bundles"]


@pytest.mark.libtpu
@compiles
def test_serving_step_moves_no_cache():
    (fact,) = aot("step", "v6e", "gpt_oss_d64")
    moves_no_cache(fact["auto"], fact["cache_bytes"])


@pytest.mark.slow
@pytest.mark.libtpu
@compiles
@pytest.mark.parametrize("chip", MATRIX)
def test_whole_matrix_still_has_its_schedule(chip):
    for fact in aot("budget", chip, *MATRIX[chip]):
        same_schedule(chip, fact)


def same_schedule(chip: str, fact: dict[str, Any]) -> None:
    """The recorded bundles, where libtpu is the recorded one; the limits in any case."""
    ours = recorded(chip, fact["shape"])
    if FOUND["libtpu"] == importlib.metadata.version("libtpu"):
        for field in ("config", "vmem_bytes", "decode", "mixed"):
            assert fact[field] == ours[field], (fact["shape"], field)
    for path, limit in LIMITS.get(chip, {}).items():
        assert fact["shape"] not in LLAMA or fact[path]["bundles"] <= limit


# ------------------------------------------------------------------ what the record says


def hbm_cycles(chip: str, shape: str, tokens: int) -> float:
    """Core cycles in which HBM delivers a block, from the published bandwidth and the derived clock."""
    part = chips.CHIPS[KINDS[chip]]
    return tokens * chips.token_bytes(signature(shape)) / part.bandwidth * part.clock


def table() -> str:
    """Predicted share of HBM bandwidth in decode, a static estimate: cycles HBM needs over bundles, at most 1.

    One sequence's blocks only: what starts and ends a sequence is not in it, nor is any wait.
    """
    lines = [
        "| chip | shape | tokens a block | decode bundles | mixed bundles | HBM cycles | bandwidth use in decode |",
        "|---|---|---|---|---|---|---|",
    ]
    for chip, shape in ROWS:
        fact = recorded(chip, shape)
        decode, cycles, use = fact["decode"]["bundles"], fact["hbm_cycles"], fact["static_bandwidth_use"]
        mixed = fact["mixed"]["bundles"]
        lines.append(f"| {chip} | {shape} | {fact['tokens']} | {decode} | {mixed} | {cycles} | {use:.0%} |")
    return "\n".join(lines)


def keep(section: str, chip: str, fact: dict[str, Any]) -> None:
    """Put a row into the record and write it: a long run that is cut short has kept what it had."""
    FOUND["libtpu"] = importlib.metadata.version("libtpu")
    fact.pop("chip", None)
    shape = fact.pop("shape")
    if section == "chips":
        if "decode" in fact:
            cycles = hbm_cycles(chip, shape, fact["tokens"])
            use = round(min(1.0, cycles / fact["decode"]["bundles"]), 3)
            fact |= {"hbm_cycles": round(cycles), "static_bandwidth_use": use}
        fact.pop("rss_mib")  # of a process that compiled many; `serving` has it
        FOUND["chips"].setdefault(chip, {})[shape] = fact
    else:
        FOUND.setdefault(section, {})[shape if section == "steps" else chip] = fact
    FOUND["chips"] = {c: {s: rows[s] for s in MATRIX[c] if s in rows} for c, rows in FOUND["chips"].items()}
    RECORD.write_text(written())


def written() -> str:
    """The record as JSON, a row a line."""
    sections = []
    for name, section in FOUND.items():
        if name == "libtpu":
            sections.append(f' "libtpu": {json.dumps(section)}')
            continue
        rows = []
        for chip, facts in section.items():
            if name == "chips":
                lines = ",\n".join(f"   {json.dumps(shape)}: {json.dumps(fact)}" for shape, fact in facts.items())
                rows.append(f"  {json.dumps(chip)}: {{\n{lines}\n  }}")
            else:
                rows.append(f"  {json.dumps(chip)}: {json.dumps(facts)}")
        sections.append(f" {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def main(*wanted: str) -> None:
    if wanted == ("--table",):
        print(table())
        return
    for chip in wanted or MATRIX:
        if chip in LIMITS:
            for section, what in (("serving", "compile"), ("upstream", "upstream")):
                for fact in aot(what, chip, "llama_page16"):
                    keep(section, chip, fact)
        for fact in aot("step", chip, *STEPS) if chip == "v6e" else ():
            keep("steps", chip, fact)
        for fact in aot("budget", chip, *MATRIX[chip]):
            print(chip, fact["shape"], fact.get("decode"), fact.get("mixed"), flush=True)
            keep("chips", chip, fact)


if __name__ == "__main__":
    main(*sys.argv[1:])
