"""The shared shape list under pytest-benchmark: judged in the same run, and only then timed.

`pytest tests/bench --benchmark-only` times every cell of this machine's device on every backend it has; a plain
`pytest` runs the smallest cell once, so that the harness itself cannot rot. `rpa bench` adds ceilings, peers and pages.
"""

from __future__ import annotations

from functools import cache

import jax
import pytest

from fuzz.bench import arrays, cells, ours, run

CHIP = jax.devices()[0].platform.replace("cuda", "gpu")
SMALLEST = min(cells.cells_for(CHIP), key=lambda cell: cell.flops).name


@cache
def batch_of(name: str) -> arrays.Batch:
    cell = next(cell for cell in cells.cells_for(CHIP) if cell.name == name)
    return arrays.make(cell, cache_bytes=0)


@pytest.mark.parametrize("backend", [contender.name for contender in ours.backends_here(CHIP)])
@pytest.mark.parametrize("cell", [cell.name for cell in cells.cells_for(CHIP)])
def test_cell(cell: str, backend: str, benchmark, request) -> None:
    if cell != SMALLEST and not request.config.getoption("--benchmark-only"):
        pytest.skip("timed on request: --benchmark-only")
    contender, batch = ours.backend(backend), batch_of(cell)
    reason = contender.unsupported(batch)
    if reason:
        pytest.skip(f"{backend} declares: {reason}")
    function, arguments = contender.prepare(batch)
    status, text, ratio = run.verdict(batch, contender.output(function(*arguments[0])), contender.claim(batch))
    assert status == "pass", text  # no number without a verdict
    benchmark.extra_info.update(ratio=ratio, bytes=batch.cell.bytes, flops=batch.cell.flops)
    benchmark(lambda: jax.block_until_ready(function(*arguments[0])))
