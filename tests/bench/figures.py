"""The README's figures, written from the records that ship: `python tests/bench/figures.py` puts them in place."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "tests" / "bench" / "records"
_BLOCK = re.compile(r"(<!-- figures:(?P<name>[\w-]+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def cpu() -> str:
    """A line for each cell of `rpa bench` on the CPU of the record."""
    data = json.loads((RECORDS / "cpu.json").read_text())
    limits = data["ceilings"]
    lines = [
        f"{data['date']}, {limits['device']}, jax {data['versions']['jax']}: "
        f"read stream {limits['read'] / 1e9:.1f} GB/s, f32 product {limits['burst']['float32'] / 1e9:.0f} GFLOP/s.",
        "",
        "| cell | ms | of the ceiling | error / bound |",
        "|---|---|---|---|",
    ]
    for r in data["results"]:
        if r["seconds"] is not None and not r["tags"]["families"]:
            fraction = f"{100 * r['floor'] / r['seconds']:.0f} %"
            lines.append(f"| `{r['cell']}` | {r['seconds'] * 1e3:.3g} | {fraction} | {r['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def h200() -> str:
    """The GPU kernels beside the peers: time and its ratio to the best peer of the same run, page 16 and 64."""
    triton = json.loads((RECORDS / "h200_triton_2026-11-22.json").read_text())
    mosaic = json.loads((RECORDS / "h200_mgpu_2026-11-22.json").read_text())
    cells = {(c["cell"], c["page"]): c for c in mosaic["cells"] if not c["options"] and c["ratio"]}
    lines = [
        f"{triton['date']}, one H200, jax {mosaic['versions']['jax']}, triton {mosaic['versions']['triton']}: "
        "time on the device in microseconds; in brackets over the best of FlashAttention-3, FlashInfer (fa2, beside "
        "Triton only) and vLLM in the same run.",
        "",
        "| cell | page | Triton | Mosaic GPU |",
        "|---|---|---|---|",
    ]
    for key, ours in triton["cells"].items():
        name, page = key.rsplit(" p", 1)
        peers = [ours[peer] for peer in ("fa3", "fa3_split", "flashinfer", "vllm") if isinstance(ours.get(peer), float)]
        other = cells.get((name, int(page)))
        if int(page) not in (16, 64) or not peers or other is None:
            continue
        lines.append(
            f"| `{name}` | {page} | {ours['ours']:.4g} ({ours['ours'] / min(peers):.2f}) "
            f"| {other['us']:.4g} ({other['ratio']:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def peers() -> str:
    """Every contender of `rpa bench` on the H200, microseconds; "-" where it cannot, or its answer is not right."""
    record = json.loads((RECORDS / "h200_bench_2026-11-22.json").read_text())
    ours = {"pallas_gpu": "Mosaic GPU", "triton": "Triton"}
    theirs = {"peer:fa3 scheduled": "FA3", "peer:flashinfer fa2": "FlashInfer", "peer:vllm": "vLLM"}
    names = ours | theirs | {"peer:jax paged": "JAX", "peer:ejkernel": "ejkernel"}
    results = [r for run in record["runs"] for r in run["results"]]
    times = {(r["cell"], r["backend"]): r["seconds"] for r in results}
    lines = [
        f"{record['date']}, one H200, microseconds on the device of each contender in the same run, floor first.",
        "",
        f"| cell | floor | {' | '.join(names.values())} |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for cell, floor in {r["cell"]: r["floor"] for r in results}.items():
        row = [times.get((cell, backend)) for backend in names]
        figures = " | ".join("-" if seconds is None else f"{seconds * 1e6:,.{seconds < 1e-4:d}f}" for seconds in row)
        lines.append(f"| `{cell.removesuffix('/bfloat16')}` | {floor * 1e6:,.1f} | {figures} |")
    return "\n".join(lines) + "\n"


FIGURES = {"cpu": cpu, "h200": h200, "peers": peers}


def filled(text: str) -> str:
    """`text` with every figures block written anew from its record."""
    return _BLOCK.sub(lambda block: block[1] + FIGURES[block["name"]]() + block[3], text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    sys.stdout.write(f"wrote the figures of {', '.join(FIGURES)} into {readme.name}\n")
