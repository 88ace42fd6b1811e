"""The README's figures, written from the records that ship.

`python tests/bench/figures.py NEW.json ...` puts new records of `rpa bench` in their places and writes the README from
all that ship; without a file it only writes. A test fails where the two drift apart.
"""

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


def tpu() -> str:
    """What the compiler's schedule says of one KV block in decode, and of the memory that it keeps busy."""
    record = json.loads((RECORDS / "tpu_aot.json").read_text())
    lines = [
        f"Static estimates, no measured times: bundles of libtpu {record['libtpu']}'s own schedule for a block of 256 "
        "tokens at Llama-3-8B heads, page 16, beside the cycles in which HBM delivers it.",
        "",
        "| chip | decode | mixed, 32 queries | JAX's own kernel | HBM cycles | of the bandwidth in decode |",
        "|---|---|---|---|---|---|",
    ]
    for chip in ("v5e", "v6e", "tpu7x"):
        ours, theirs = record["chips"][chip]["llama_page16"], record["upstream"][chip]["mixed"]["bundles"]
        lines.append(
            f"| {chip} | {ours['decode']['bundles']} | {ours['mixed']['bundles']} | {theirs} | {ours['hbm_cycles']} "
            f"| {100 * ours['static_bandwidth_use']:.0f} % |"
        )
    lines += ["", "Decode at page 32 by dtype of the pages, bundles / HBM cycles; the larger one bounds the time:", ""]
    lines += ["| chip | bfloat16 | float8_e4m3fn | int8 |", "|---|---|---|---|"]
    for chip in ("v5e", "v6e", "tpu7x"):
        rows = (record["chips"][chip][shape] for shape in ("llama_page32", "fp8_e4m3", "int8"))
        lines.append(f"| {chip} | " + " | ".join(f"{r['decode']['bundles']} / {r['hbm_cycles']}" for r in rows) + " |")
    return "\n".join(lines) + "\n"


def h200() -> str:
    """Every contender of `rpa bench` on the H200, microseconds; "-" where it cannot, or its answer is not right."""
    record = json.loads((RECORDS / "h200.json").read_text())
    date, results = record["date"], record["results"]
    times = {(r["cell"], r["backend"]): r["seconds"] for r in results if r["seconds"] is not None}
    floors = {r["cell"]: r["floor"] for r in results}
    timed = {backend for _, backend in times}
    peers = {name: ways for name, ways in _PEERS.items() if timed & set(ways)}
    lines = [
        f"{date}, one H200: microseconds on the device, every contender judged and timed in one run; in brackets ours "
        'over the best peer, "-" where one cannot or is not right.',
        "",
        f"| cell | floor | {' | '.join((*_OURS, *peers))} |",
        "|---|" + "---|" * (len(_OURS) + len(peers) + 1),
    ]
    small = [cell for cell in floors if "/p16/" in cell]
    for cell, floor in floors.items():
        if cell in small or _at(16, cell) not in small:
            theirs = " | ".join(_us(_least(times, cell, names)) for names in peers.values())
            lines.append(f"| `{_short(cell)}` | {floor * 1e6:,.1f} | {_ours(times, cell)} | {theirs} |")
    if pages := [size for size in (32, 64, 128, 256) if any(_at(size, cell) in floors for cell in small)]:
        heads = " | ".join(f"{name}, page {size}" for size in pages for name in _OURS)
        lines += ["", f"| cell | {heads} |", "|---|" + "---|" * (len(pages) * len(_OURS))]
        for cell in small:
            others = [_at(size, cell) for size in pages]
            if any(other in floors for other in others):
                told = " | ".join(_ours(times, other) for other in others)
                lines.append(f"| `{_short(cell).replace('/p16', '')}` | {told} |")
    return "\n".join(lines) + "\n"


def _short(cell: str) -> str:
    return cell.removesuffix("/bfloat16")


def _at(size: int, cell: str) -> str:
    """The same cell at another page size."""
    return re.sub(r"/p\d+/", f"/p{size}/", cell)


def _ours(times: dict[tuple[str, str], float], cell: str) -> str:
    """Our kernels' cells of one row: the time, and its ratio to the best peer."""
    best = min((t for names in _PEERS.values() if (t := _least(times, cell, names)) is not None), default=None)
    ours = [_least(times, cell, (name,)) for name in _OURS.values()]
    return " | ".join(_us(t) + (f" ({t / best:.2f})" if t and best else "") for t in ours)


_OURS = {"Mosaic GPU": "pallas_gpu", "Triton": "triton"}
# A peer's best way counts: one call or two, scheduled ahead or not, with tensor cores or without.
_PEERS = {
    "FA3": ("peer:fa3", "peer:fa3 scheduled", "peer:fa3 two calls"),
    "FlashInfer": ("peer:flashinfer fa2", "peer:flashinfer decode"),
    "vLLM": ("peer:vllm",),
    "JAX": ("peer:jax paged",),
    "ejkernel": ("peer:ejkernel",),
}


def _least(times: dict[tuple[str, str], float], cell: str, names: tuple[str, ...]) -> float | None:
    return min((times[cell, name] for name in names if (cell, name) in times), default=None)


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.{seconds < 1e-4:d}f}"


FIGURES = {"cpu": cpu, "h200": h200, "tpu": tpu}


def filled(text: str) -> str:
    """`text` with every figures block written anew from its record."""
    return _BLOCK.sub(lambda block: block[1] + FIGURES[block["name"]]() + block[3], text)


def ship(path: Path) -> Path:
    """Put what `rpa bench --json` wrote in the place of its device's record.

    Raises:
        RecordError: it is no record, has no number, or is of a device that the README has no place for.
    """
    from fuzz.bench import record

    found = record.load(path)
    if not found.passed:
        raise record.RecordError(f"{path}: no line of it has a number")
    device = found.ceilings.device
    name = "cpu" if "x" in device.split()[-1] else device.split()[-1].lower()
    if name not in ("cpu", "h200"):
        raise record.RecordError(f"{path}: a record of {device}; the README has figures of a CPU and of an H200")
    place = RECORDS / f"{name}.json"
    place.write_text(found.to_json())
    return place


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        sys.stdout.write(f"{argument} ships as {ship(Path(argument)).relative_to(ROOT)}\n")
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    sys.stdout.write(f"wrote the figures of {', '.join(FIGURES)} into {readme.name}\n")
