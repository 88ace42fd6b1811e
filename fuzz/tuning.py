"""`rpa tune` without its terminal: benchmark cells as tuning runs, and their winners as entries of a store."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fuzz.bench import arrays
from fuzz.bench.cells import Cell
from fuzz.verifier import verify
from rpa import Tuner, api, cache, select
from rpa.device import current
from rpa.tune import Report, TuningFailed

_STATIC = ("softmax_scale", "logits_soft_cap", "compute_dtype", "optimized", "sliding_window", "mask_value",
           "vmem_limit_bytes", "return_lse")  # fmt: skip


def query_of(cell: Cell, platform: str) -> select.Query:
    """The cell's call on real arrays, as selection sees it."""
    import jax

    batch = arrays.make(cell, 0)
    options: dict[str, Any] = {"optimized": False, "return_lse": False, **batch.options}
    values = tuple(jax.device_put(value) for value in batch.arguments()[:6])
    scales = (options.get("k_scale"), options.get("v_scale"))
    static = tuple(options.get(name) for name in _STATIC)
    inputs, signature = api.prepare((*values, batch.sinks, *scales), static, False)
    return select.query_of(signature, current(), platform, None, inputs=inputs)


def each(
    cells: Sequence[Cell], platform: str, iters: int, end: float
) -> Iterator[tuple[Cell, select.Query, Report | str]]:
    """Tune every cell until `end` (monotonic seconds); cells that share a key are tuned once, the first of them.

    Gives cell, query and the report, or why there is none.
    """
    keys = set()
    for i, cell in enumerate(cells):
        left = end - time.monotonic()
        if left <= 0:
            return
        query = query_of(cell, platform)
        if query.triple in keys:
            continue
        keys.add(query.triple)
        tuner = Tuner(warmup=2, iters=iters, verify=verify, budget=max(left / (len(cells) - i), 5.0))
        yield cell, query, _report(query, tuner)


def _report(query: select.Query, tuner: Tuner) -> Report | str:
    first = query.heuristic()
    candidates = [first, *(config for config in query.candidates() if config != first)]
    try:
        tuner.autotune(query.program, query.args, {}, candidates)
    except TuningFailed as error:
        return f"no usable config\n{error}"
    return tuner.history[-1]


def summary(report: Report) -> str:
    """The outcome in a line, and a line for each candidate that was wrong or failed."""
    counts = ", ".join(f"{count} {status}" for status, count in report.counts().items())
    troubles = "".join(
        f"\n    {trial.status}: {trial.config}: {trial.detail[:300]}"
        for trial in report.trials
        if trial.status in ("wrong", "failed")
    )
    return f"{report.reason} ({counts}){troubles}"


def store(found: Sequence[tuple[select.Query, Report]], table: Path | None) -> Path:
    """Put the winners into the user's store, or into a table as the package ships it; says where they are."""
    if table is None:
        own: Any = select.default_chain().persistent
        own.merge({"|".join(query.triple): _entry(report) for query, report in found})
        return own.path
    old = cache.parse(table.read_text(encoding="utf-8")) if table.exists() else {}
    new = {f"{query.op}|{query.stem}": _entry(report) for query, report in found}
    table.write_text(cache.render({**old, **new}), encoding="utf-8")
    return table


def _entry(report: Report) -> dict[str, Any]:
    fields = {name: value for name, value in report.winner.to_dict().items() if value not in (None, {})}
    return {"config": fields, "note": report.reason, "versions": cache.versions()}
