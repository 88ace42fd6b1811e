"""What only an accelerator can show, for each backend it has, at the shapes that serving uses.

`JAX_PLATFORMS=cuda pytest --slow tests/test_device.py tests/test_contract.py`, on a GPU; elsewhere one line a chip says
that it was skipped. Kernels written for a chip take no pages of 4 or heads of 16, so the contract suite's cases
say little about them: here its edges return at shapes that they do take.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract_cases import Shape, build
from test_contract import alone, backends_here, bits, call, claim_of, device_arrays, jitted, skip_unsupported

import rpa
from oracle import judge
from oracle.poison import large_fill, nan_fill
from rpa import device

CHIP = device.current().platform
BF16 = {"dtype": "bfloat16", "compute_dtype": "bfloat16"}
SERVING = Shape(rows=416, seqs=12, pages_per_seq=80, pages=700, page=16, q_heads=8, kv_heads=2, head_dim=128)
RAGGED = ((1, 1, 130, 0, 1, 200, 7, 1, 0, 64, 1), (1, 1280, 130, 90, 777, 900, 1000, 33, 0, 64, 0))


def backends() -> list[Any]:
    """This accelerator's backends; on a CPU one name a chip, to be skipped."""
    if CHIP == "cpu":
        return [pytest.param(chip, marks=getattr(pytest.mark, chip)) for chip in ("gpu", "tpu")]
    return [pytest.param(name, marks=getattr(pytest.mark, CHIP)) for name in backends_here()]


@pytest.fixture(params=backends())
def backend(request) -> str:
    return request.param


def serving(head_dim: int = 128, page: int = 16, kv_heads: int = 2, group: int = 4, **options) -> Any:
    """Decodes, chunks, whole prompts and empty sequences, some beyond a table's middle, at one geometry."""
    width = -(-1280 // page)
    shape = Shape(416, 12, width, 9 * width, page, kv_heads * group, kv_heads, head_dim)
    return build(*RAGGED, shape, **(BF16 | options))


EDGES = {"sliding_window": 100, "logits_soft_cap": 30.0, "sinks": True}
SCALES = {"k_scale": 0.5, "v_scale": 1.7}
CASES = {
    **{f"head_dim_{dim}": {"head_dim": dim} for dim in (64, 80, 96, 128, 192, 256)},
    **{f"head_dim_{dim}_edges": {"head_dim": dim} | EDGES for dim in (64, 80, 96, 128, 192, 256)},
    **{f"page_{page}": {"page": page} for page in (8, 32, 64, 128, 256)},
    **{f"group_{group}": {"group": group} for group in (1, 3, 8, 16)},
    "kv_heads_1": {"kv_heads": 1, "group": 8},
    "kv_heads_5": {"kv_heads": 5, "group": 7},
    "window": {"sliding_window": 128, "head_dim": 64},
    "window_1": {"sliding_window": 1},
    "sinks": {"sinks": True, "head_dim": 64},
    "cap": {"logits_soft_cap": 50.0, "head_dim": 256},
    "float16": {"dtype": "float16", "compute_dtype": "float16"} | EDGES,
    "float32": {"dtype": "float32", "compute_dtype": "float32"},
    "e4m3": {"kv_dtype": "float8_e4m3fn"} | SCALES,
    "e5m2": {"kv_dtype": "float8_e5m2"} | SCALES | EDGES,
    "int8": {"kv_dtype": "int8", "k_scale": 0.01, "v_scale": 0.02},
}


@pytest.mark.parametrize("name", CASES)
def test_case(backend, name):
    """Within the computed bound, output and lse; what lies where no row looks changes no bit, nor does a repetition."""
    case = serving(**CASES[name])
    skip_unsupported(backend, case)
    program = jitted(backend, case)
    output, lse = (np.asarray(a) for a in program(*device_arrays(nan_fill(case))))
    verdict = judge(case, output, claim_of(backend, case), lse)
    assert verdict.status == "pass", verdict.text
    filled = program(*device_arrays(large_fill(case)))
    assert [bits(a) for a in filled] == [bits(output), bits(lse)], "slots that no row sees changed the answer"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_batch_invariance(backend, head_dim):
    """A sequence alone, on other pages: the bits that it has among others; and twenty runs agree."""
    case = serving(head_dim, **EDGES)
    skip_unsupported(backend, case)
    output, lse = call(backend, case)
    for s in np.flatnonzero(np.diff(case.query_start_loc[: case.num_seqs + 1])):
        start, stop = case.query_start_loc[s : s + 2]
        got, got_lse = call(backend, alone(case, s))
        assert bits(got[: stop - start]) == bits(output[start:stop]), f"sequence {s}"
        assert bits(got_lse[: stop - start]) == bits(lse[start:stop]), f"sequence {s}"
    assert all([bits(a) for a in call(backend, case)] == [bits(output), bits(lse)] for _ in range(20))


BAD = {
    "page_past_the_pool": ("block_tables", (1, 3), 10**9),
    "page_negative": ("block_tables", (1, 70), -1),
    "context_negative": ("context_lens", (1,), -1),
    "context_huge": ("context_lens", (1,), 2**31 - 1),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_metadata_is_contained(backend, name):
    """The bad sequence's rows are NaN; every other sequence keeps its bits."""
    good = serving()
    skip_unsupported(backend, good)
    field, where, value = BAD[name]
    array = np.array(getattr(good, field))
    array[where] = value
    program = jitted(backend, good)
    clean = [np.asarray(a) for a in program(*device_arrays(good))]
    got = [np.asarray(a) for a in program(*device_arrays(good.replace(**{field: array})))]
    row = good.query_start_loc[1]
    for before, after in zip(clean, got, strict=True):
        assert np.isnan(after[row].astype(np.float32)).all()
        assert bits(np.delete(after, row, 0)) == bits(np.delete(before, row, 0))


@pytest.mark.slow
def test_pool_past_2_31_elements(backend):
    """Pages whose first element lies past 2**31 are read where they are: everything before them is NaN."""
    small = build((1, 70, 1), (333, 400, 16), SERVING, **BF16)
    skip_unsupported(backend, small)
    page = int(np.prod(small.kv_pages.shape[1:]))
    below = 2**31 // page + 1
    output, lse = call(backend, small)
    pool = jnp.concatenate(
        [jnp.full((below, *small.kv_pages.shape[1:]), jnp.nan, jnp.bfloat16), jnp.asarray(small.kv_pages)]
    )
    tables = np.where(small.block_tables < small.num_pages, small.block_tables + below, small.block_tables)
    arrays = device_arrays(small)
    arrays[1], arrays[3] = pool, jnp.asarray(tables.astype(np.int32))
    far = jitted(backend, small)(*arrays)
    assert [bits(a) for a in far] == [bits(output), bits(lse)]


# ------------------------------------------------------------------ the device itself

SWEEPS = {"gpu": ("fuzz.sweep", "fuzz.adapters.triton_sweep", "fuzz.adapters.mosaic_sweep"), "tpu": ("fuzz.sweep",)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "module"),
    [
        pytest.param(chip, m, marks=getattr(pytest.mark, chip), id=f"{chip}-{m}")
        for chip in SWEEPS
        for m in SWEEPS[chip]
    ],
)
def test_arithmetic_is_as_claimed(chip, module):
    """Every figure of the device's own exp2, tanh, log, quotient, dots and roundings lies within its row."""
    del chip
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


SANITIZED = """
import sys
sys.path.insert(0, sys.argv[1])
from contract_cases import Shape, build
from test_device import BF16, serving
from test_contract import call
split = build((1, 1, 1), (333, 900, 16), Shape(4, 4, 64, 200, 16, 8, 2, 128), **BF16)
for case in (split, serving(head_dim=64, sliding_window=100, sinks=True), serving()):
    call(sys.argv[2], case)
print("answered")
"""

# Only our kernels are instrumented: with all of XLA's, memcheck crashes in a mixed batch, and others do not end.
OUR_KERNELS = {"pallas_gpu": "kns=rpa_", "triton": "kns=_kernel"}
# One fault a tool must see in them, or its silence says nothing: (file, line, faulty line).
PLANTED = {
    ("pallas_gpu", "memcheck"): ("combine.py", "* tiling.rows + row) *", "* tiling.rows + row + (1 << 20)) *"),
    ("pallas_gpu", "racecheck"): (  # a reduction across warps whose barrier does nothing
        "tiles.py",
        "        return x.reduce(",
        """        from jax.experimental.mosaic.gpu import utils
        utils.warpgroup_barrier = lambda: None
        return x.reduce(""",
    ),
    ("triton", "memcheck"): ("kernel.py", "tl.store(lse + at, tl.where", "tl.store(lse + (1 << 28) + at, tl.where"),
}


def sanitized(backend: str, tool: str, root: Path) -> subprocess.CompletedProcess[str]:
    """The package under `root` run by one of compute-sanitizer's tools; each array has an allocation of its own."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        pytest.skip("compute-sanitizer is not installed")
    own = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "RPA_AUTOTUNE_POLICY": "heuristics"}
    path = [str(root), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    own["PYTHONPATH"] = os.pathsep.join(path)
    # initcheck has to see every writer of what a kernel reads.
    ours = [] if tool == "initcheck" else ["--kernel-name", OUR_KERNELS[backend]]
    run = [sys.executable, "-P", "-c", SANITIZED, str(Path(__file__).parent), backend]
    command = [found, "--tool", tool, *ours, "--error-exitcode", "9", *run]
    return subprocess.run(command, capture_output=True, text=True, timeout=550, check=False, env=os.environ | own)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_sanitizer(backend, tool):
    """compute-sanitizer finds nothing."""
    if backend not in OUR_KERNELS:
        pytest.skip(f"{backend} has no kernels of ours")
    if (backend, tool) == ("pallas_gpu", "initcheck"):
        pytest.skip("initcheck does not see TMA's stores: it calls every row of a right answer uninitialised")
    done = sanitized(backend, tool, Path(__file__).parent.parent)
    assert "answered" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_sees(backend, tool, tmp_path):
    """The same tool, with the same filter, reports a fault planted in the kernel."""
    if (backend, tool) not in PLANTED:
        pytest.skip(f"no fault for {tool} can be planted in {backend}: it has no kernels, or no barriers, of its own")
    name, right, wrong = PLANTED[backend, tool]
    shutil.copytree(Path(rpa.__file__).parent, tmp_path / "rpa", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "rpa" / "backends" / backend / name
    assert source.read_text().count(right) == 1, f"{name} no longer has {right!r} in one place"
    source.write_text(source.read_text().replace(right, wrong))
    done = sanitized(backend, tool, tmp_path)
    assert re.search(r"(ERROR|RACECHECK) SUMMARY: [1-9]", done.stdout), done.stdout[-4000:] + done.stderr[-2000:]


def test_call_needs_no_host(backend):
    """Metadata on the device is enough: nothing is read back while a program is traced or run."""
    case = serving()
    skip_unsupported(backend, case)
    with jax.transfer_guard_device_to_host("disallow"):
        answer = jitted(backend, case)(*device_arrays(case))
        jax.block_until_ready(answer)
