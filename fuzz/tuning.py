"""`rpa tune` without its terminal: benchmark cells as tuning runs, and their winners as entries of a store."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.bench.cells import Cell, cells_for, decode, prefill
from fuzz.models import MODELS

_CACHE_BYTES = 64 << 20  # no GPU's last-level cache is larger by much: batches rotate past it
_EXCLUSIVE: Any = nullcontext()  # a lock, in processes that share one device


@dataclass(frozen=True)
class Outcome:
    """What became of one cell: words, and entries by key for the user's store and for a table, if there is a winner."""

    cell: str
    text: str
    stored: dict[str, Any] = field(default_factory=dict)
    shipped: dict[str, Any] = field(default_factory=dict)


def distinct(cells: Sequence[Cell]) -> list[Cell]:
    """The first cell of each key, in order: what serves one serves all."""
    first: dict[tuple, Cell] = {}
    for cell in cells:
        first.setdefault(_likeness(cell), cell)
    return list(first.values())


def cells_to_tune(platform: str) -> list[Cell]:
    """The benchmarks' cells, most valuable first, and on a GPU a decode and a prefill of each preset they leave out."""
    cells = cells_for(platform)
    covered = {(cell.model.name, cell.layer.name) for cell in cells}
    presets = {(model.name, layer.name) for model in MODELS.values() if model.name != "tiny" for layer in model.layers}
    for preset in sorted(presets - covered) if platform == "gpu" else ():
        cells += [decode(*preset, 64, 8192), prefill(*preset, 1, 8192)]
    return cells


def each(cells: Sequence[Cell], platform: str, iters: int, end: float, workers: int = 1) -> Iterator[Outcome]:
    """Tune every cell until `end` (`time.monotonic()`), in the order in which they get done.

    Several workers compile and judge side by side and take turns on the device.
    """
    jobs = [(cell, platform, iters, end, max(1, -(-(len(cells) - i) // workers))) for i, cell in enumerate(cells)]
    if workers == 1:
        yield from map(_tune, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _share, (context.Lock(),)) as pool:
        try:
            for done in as_completed([pool.submit(_tune, job) for job in jobs]):
                yield done.result()
        except BaseException:  # an interrupt is not to wait for every cell
            pool.shutdown(cancel_futures=True)
            raise


def _share(lock: Any) -> None:
    """Make a worker: it takes turns by `lock`, and does not outlive a run that was killed."""
    global _EXCLUSIVE
    _EXCLUSIVE = lock
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _likeness(cell: Cell) -> tuple:
    """What decides a cell's key, without making its arrays."""
    pages = -(-max(cell.contexts) // cell.page_size)
    sizes = (sum(cell.queries), len(cell.queries), -(-pages // 8) * 8)
    return cell.model.name, cell.layer.name, cell.page_size, *((size - 1).bit_length() for size in sizes)


def _tune(job: tuple[Cell, str, int, float, int]) -> Outcome:
    """Judge and time one cell's candidates, on its part of the time that is left."""
    from fuzz.verifier import verify
    from rpa import RaggedPageAttentionv2Config, Tuner
    from rpa.tune import TuningFailed

    cell, platform, iters, end, waiting = job
    begin = time.monotonic()
    left = end - begin
    if left <= 0:
        return Outcome(cell.name, "no time was left")
    call, turns = call_of(cell, platform)
    tuner = Tuner(
        2, iters, verify=verify, budget=max(left / waiting, 5.0), turns=turns, exclusive=lambda: _EXCLUSIVE
    )  # fmt: skip
    try:
        winner = tuner.autotune(call.program, call.args, {}, call.contenders())
    except TuningFailed as error:
        return Outcome(cell.name, f"no usable config\n{error}")
    report = tuner.history[-1]
    told = summary(report, time.monotonic() - begin)
    if not report.decided:  # stored, it would keep later runs from looking further
        return Outcome(cell.name, f"undecided: too little time to compare; {told}")
    note = f"{report.reason}; {_by_backend(report)} ({cell.name})"
    stored = {"|".join(call.triple): _entry(winner, note)}
    # What a backend would choose by itself ships as its name alone, and so follows the backend as it gets better.
    own, _ = call.fit(RaggedPageAttentionv2Config(platform=winner.platform))
    shipped = RaggedPageAttentionv2Config(platform=winner.platform) if winner == own else winner
    return Outcome(cell.name, told, stored, {f"{call.op}|{call.stem}": _entry(shipped, note)})


def call_of(cell: Cell, platform: str) -> tuple[Any, list[tuple]]:
    """The cell's call on real arrays as selection sees it, and the arguments to time in turn."""
    import jax

    from fuzz.bench import arrays
    from rpa import api, select
    from rpa.device import current

    batch = arrays.make(cell, _CACHE_BYTES if current().platform == "gpu" else 0)
    options = batch.options
    scales = (options.pop("k_scale", None), options.pop("v_scale", None))
    given = (*map(jax.device_put, batch.arguments()[:6]), batch.sinks, *scales)
    inputs, signature = api.prepare(given, api.Options(**options), False)
    turns = [(inputs._replace(block_tables=jax.device_put(table)),) for table in batch.tables]
    return select.Attention(signature, current(), platform, inputs=turns[0][0]), turns


def summary(report: Any, seconds: float) -> str:
    """The outcome and what it cost in a line, and a line for each candidate that was wrong or failed."""
    counts = ", ".join(f"{count} {status}" for status, count in report.counts().items())
    troubles = "".join(
        f"\n    {trial.status}: {trial.config}: {trial.detail[:300]}"
        for trial in report.trials
        if trial.status in ("wrong", "failed")
    )
    return f"{report.reason}; {_by_backend(report)} ({counts}) in {seconds:.0f} s{troubles}"


def _by_backend(report: Any) -> str:
    """The best time of each backend that was timed."""
    best: dict[str, float] = {}
    for trial in report.trials:
        if trial.status == "timed" and trial.seconds:
            best[trial.config.platform] = min(trial.median, best.get(trial.config.platform, float("inf")))
    return ", ".join(f"{platform} {seconds * 1e6:.1f} us" for platform, seconds in best.items())


def store(done: Outcome, table: Path | None) -> Path | None:
    """Put a winner into the user's store, or into a table as the package ships it; where it is, None if nowhere."""
    from rpa import PersistentCache, select

    own: Any = select.default_chain().persistent if table is None else PersistentCache("table", table)
    return own.path if own.merge(done.stored if table is None else done.shipped) else None


def _entry(config: Any, note: str) -> dict[str, Any]:
    from rpa import cache

    fields = {name: value for name, value in config.to_dict().items() if value not in (None, {}, "any")}
    return {"config": fields, "note": note, "versions": cache.versions()}
