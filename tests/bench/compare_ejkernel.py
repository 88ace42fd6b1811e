"""Our XLA backend beside another package's: ejkernel's XLA path, in its own environment, on the same arrays.

Not a test. Each side runs in its own process, rounds alternate, the minimum of all rounds counts, and no case of
ours has a number unless the oracle passes its output.

    python tests/bench/compare_ejkernel.py --other /path/to/other/environment/bin/python --json record.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# The other environment runs this file too, as a worker: nothing but NumPy and JAX may be imported up here.
MODELS = {"8b": (32, 8, 128), "small": (8, 2, 64)}  # query heads, kv heads, head size
LAYOUTS = {  # (query length, context) of each sequence
    "decode": [(1, 2048)] * 8,
    "decode_uneven": [(1, n) for n in (2048, 17, 900, 1500, 64, 3, 1200, 300)],
    "chunked_prefill": [(512, 512), (512, 1024), (256, 1536)],
    "mixed": [(1, 1800), (1, 700), (1, 2048), (256, 512), (1, 150), (128, 128), (1, 1024), (5, 1000)],
}
DTYPES = {"f32": ("float32", "float32"), "f32_bf16": ("float32", "bfloat16"), "bf16": ("bfloat16", "bfloat16")}
PAGE = 16


def names() -> list[str]:
    """Every case: layout, model, and dtypes of the arrays and of the dots."""
    return [f"{layout}-{model}-{dtype}" for layout in LAYOUTS for model in MODELS for dtype in DTYPES]


def arrays(name: str) -> dict:
    """The inputs of a case, float32 before their rounding to the case's dtype; the same for both sides."""
    layout, model, _ = name.split("-")
    sequences = LAYOUTS[layout]
    q_heads, kv_heads, dim = MODELS[model]
    rng = np.random.default_rng(7)
    counts = [-(-context // PAGE) for _, context in sequences]
    order = rng.permutation(sum(counts)).astype(np.int32)
    tables = np.zeros((len(sequences), max(counts)), np.int32)
    for s, count in enumerate(counts):
        tables[s, :count] = order[sum(counts[:s]) :][:count]
    return {
        "queries": rng.standard_normal((sum(q for q, _ in sequences), q_heads, dim), np.float32),
        "kv_pages": rng.standard_normal((sum(counts), PAGE, 2 * kv_heads, dim), np.float32),
        "context_lens": np.array([c for _, c in sequences], np.int32),
        "block_tables": tables,
        "query_start_loc": np.cumsum([0] + [q for q, _ in sequences]).astype(np.int32),
        "num_seqs": np.array([len(sequences)], np.int32),
    }


def worker(side: str, cases: list[str], repeats: int, folder: str) -> None:
    """Time each case in this process; print one JSON line a case, leave its output in `folder`."""
    import jax

    for name in cases:
        stored, compute = DTYPES[name.split("-")[2]]
        data = {k: jax.numpy.asarray(v) for k, v in arrays(name).items()}
        data["queries"], data["kv_pages"] = data["queries"].astype(stored), data["kv_pages"].astype(stored)
        begin = time.perf_counter()
        program = jax.jit(_function(side, compute)).lower(*data.values()).compile()
        compile_s = time.perf_counter() - begin
        result = program(*data.values()).block_until_ready()
        np.save(Path(folder, f"{side}-{name}.npy"), np.asarray(result.astype("float32")))
        wall, cpu = [], []
        for _ in range(repeats):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            program(*data.values()).block_until_ready()
            wall.append(time.perf_counter() - begin)
            cpu.append(time.process_time() - begin_cpu)
        temporaries = program.memory_analysis().temp_size_in_bytes
        row = {"case": name, "ms": min(wall) * 1e3, "cpu_ms": min(cpu) * 1e3, "compile_s": compile_s}
        row["temp_bytes"] = temporaries
        print(json.dumps(row), flush=True)


def _function(side: str, compute: str):
    if side == "rpa":
        from rpa import ragged_page_attention_v2

        return lambda *a: ragged_page_attention_v2(*a, compute_dtype=compute, platform="xla")
    from ejkernel.kernels._xla.ragged_page_attention_v2 import ragged_page_attention_v2

    return lambda *a: ragged_page_attention_v2(*a, compute_dtype=compute)


def _run_side(side: str, interpreter: str, cases: list[str], repeats: int, folder: str) -> dict[str, dict]:
    command = [interpreter, __file__, "--worker", side, "--repeats", str(repeats), "--folder", folder, *cases]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


def judged(name: str, side: str, folder: str) -> str:
    """The oracle's word on a side's output: its status and worst ratio."""
    from oracle import Case, judge

    stored, compute = DTYPES[name.split("-")[2]]
    import ml_dtypes

    dtype = np.dtype(stored) if stored == "float32" else ml_dtypes.bfloat16
    data = arrays(name)
    data["queries"], data["kv_pages"] = data["queries"].astype(dtype), data["kv_pages"].astype(dtype)
    case = Case(**data, compute_dtype=compute)
    output = np.load(Path(folder, f"{side}-{name}.npy")).astype(dtype)
    verdict = judge(case, output, _claim(case))
    return f"{verdict.status} {verdict.ratio:.2f}"


def _claim(case):
    import jax

    from oracle import Claim
    from rpa import api, device, registry

    options = (None, None, case.compute_dtype, False, None, None, None, False)
    inputs = (case.queries, case.kv_pages, case.context_lens, case.block_tables, case.query_start_loc, case.num_seqs)
    _, signature = api.prepare((*map(jax.numpy.asarray, inputs), None, None, None), options, False)
    return Claim(**registry.load("xla").claim(signature, device.current()))


def compare(cases: list[str], other: str | None, rounds: int, repeats: int) -> list[dict]:
    """Rows of both sides' best times, judged."""
    sides = {"rpa": sys.executable} | ({"ejkernel": other} if other else {})
    best: dict[str, dict[str, dict]] = {side: {} for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for side, interpreter in sides.items():
                for name, row in _run_side(side, interpreter, cases, repeats, folder).items():
                    known = best[side].setdefault(name, row)
                    known |= {key: min(known[key], row[key]) for key in ("ms", "cpu_ms", "compile_s")}
        rows = []
        for name in cases:
            row = {"case": name}
            for side in sides:
                row[side] = best[side][name] | {"oracle": judged(name, side, folder)}
            rows.append(row)
    return rows


def _report(rows: list[dict]) -> dict:
    """Print each case with its ratios, wall time and CPU time; the second is the steadier on a shared machine."""
    ratios = []
    for row in rows:
        ours, theirs = row["rpa"], row.get("ejkernel")
        if not ours["oracle"].startswith("pass"):
            print(f"{row['case']:32} no number: {ours['oracle']}")
            continue
        text = f"{row['case']:32} {ours['ms']:9.2f} ms ({ours['oracle']})"
        if theirs:
            ratios.append((theirs["ms"] / ours["ms"], theirs["cpu_ms"] / ours["cpu_ms"]))
            text += f" {theirs['ms']:9.2f} ms ({theirs['oracle']})  x{ratios[-1][0]:.2f}, CPU time x{ratios[-1][1]:.2f}"
        print(text)
    summary = {}
    for name, values in zip(("wall", "cpu"), zip(*ratios, strict=True), strict=False):
        mean = math.exp(sum(map(math.log, values)) / len(values))
        summary[name] = {"geometric_mean": mean, "least": min(values)}
        print(f"{name}: geometric mean x{mean:.2f}, least x{min(values):.2f}, {len(values)} of {len(rows)} cases")
    return summary


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "cases", nargs="*", help="all cases when none is named; a part of a name takes all that hold it"
    )
    parser.add_argument("--other", help="the Python of an environment with ejkernel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.cases, options.repeats, options.folder)
        return 0
    cases = [n for n in names() if not options.cases or any(part in n for part in options.cases)]
    rows = compare(cases, options.other, options.rounds, options.repeats)
    summary = _report(rows)
    if options.json:
        record = {"date": str(datetime.date.today()), "machine": _machine(), "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps(record | summary | {"rows": rows}, indent=1) + "\n")
    return 0 if all(row["rpa"]["oracle"].startswith("pass") for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
