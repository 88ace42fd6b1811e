"""`rpa explain`, `rpa tune` and `rpa cache`: which config a call gets and why, finding better ones, the store."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer

from fuzz.commands.duration import seconds

USAGE = 2
_Platform = Annotated[str, typer.Option(help="auto, xla, triton, pallas or cuda.")]


def _fail(text: str) -> typer.Exit:
    print(f"error: {text}", file=sys.stderr)
    return typer.Exit(USAGE)


@contextmanager
def _told_plainly() -> Iterator[None]:
    """What the store warns of, without the place in the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


# ------------------------------------------------------------------ explain


def explain(
    model: Annotated[str, typer.Option(help="tiny, llama3-8b, gemma2, gpt-oss ...")] = "llama3-8b",
    layer: Annotated[str | None, typer.Option(help="One kind of the model's layers. Default: all.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Query rows of the batch.")] = 8,
    seqs: Annotated[int, typer.Option(min=1, help="Rows of the block table.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens a sequence can hold.")] = 8192,
    page: Annotated[int, typer.Option(min=1, help="Tokens a page.")] = 16,
    platform: _Platform = "auto",
) -> None:
    """Say which backend and config a call of these shapes gets on this machine, and why."""
    from fuzz.models import model_named

    try:
        preset = model_named(model)
        layers = [entry for entry in preset.layers if layer in (None, entry.name)]
        if not layers:
            raise ValueError(f"{model} has no layer {layer!r}; there are {', '.join(x.name for x in preset.layers)}")
        for entry in layers:
            print(f"{model} {entry.name}: {tokens} rows, {seqs} sequences, pages of {page}")
            print(_explained(preset, entry, tokens, seqs, context, page, platform), end="\n\n")
    except (ValueError, TypeError) as error:
        raise _fail(str(error)) from None


def _explained(model: Any, layer: Any, tokens: int, seqs: int, context: int, page: int, platform: str) -> str:
    import jax
    import numpy as np

    import rpa

    pages = -(-context // page)
    shape = (seqs * pages, page, 2 * model.num_kv_heads, model.head_dim)
    scales = {"k_scale": 1.0, "v_scale": 1.0} if layer.quantised else {}
    return rpa.explain(
        jax.ShapeDtypeStruct((tokens, model.num_q_heads, model.head_dim), layer.dtype),
        jax.ShapeDtypeStruct(shape, layer.pages_dtype),
        np.zeros(seqs, np.int32),
        jax.ShapeDtypeStruct((seqs, pages), "int32"),
        np.zeros(seqs + 1, np.int32),
        0,  # so that no table, however long, is looked through
        np.zeros(model.num_q_heads, np.float32) if layer.sinks else None,
        softmax_scale=model.softmax_scale,
        logits_soft_cap=layer.logits_soft_cap,
        sliding_window=layer.sliding_window,
        compute_dtype=layer.compute_dtype,
        platform=platform,
        **scales,
    )


# ------------------------------------------------------------------ tune


def tune(
    budget: Annotated[str, typer.Option(help="Stop after so long: 90s, 10m or 1h30m.")] = "10m",
    only: Annotated[
        list[str] | None, typer.Option(help="Only cells whose name contains this text, or matches it.")
    ] = None,
    platform: _Platform = "auto",
    iters: Annotated[int, typer.Option(min=1, help="Timed calls a candidate.")] = 50,
    workers: Annotated[int, typer.Option(min=1, help="Processes that compile and judge; they time in turn.")] = 1,
    table: Annotated[
        Path | None, typer.Option(help="Write a table as the package ships it, rather than the user's store.")
    ] = None,
) -> None:
    """Find the fastest right config of every benchmark cell on this machine's device, and store it.

    Every candidate is judged by the oracle before it is timed, and every winner is stored at once. Exit codes: 0, or 2
    where nothing could be tuned or stored.
    """
    try:
        limit = seconds(budget)
    except ValueError as error:
        raise _fail(str(error)) from None
    if table is not None and (table.is_dir() or not table.parent.is_dir()):
        raise _fail(f"--table {table}: a file in an existing folder is expected")
    end = time.monotonic() + limit
    if workers > 1:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the workers share the device's memory
    try:
        with _told_plainly():
            count = _tune_cells(end, only or [], platform, iters, workers, table)
    except ValueError as error:
        raise _fail(str(error)) from None
    if not count:
        raise _fail(f"nothing was tuned within --budget {budget}")


def _tune_cells(end: float, only: list[str], platform: str, iters: int, workers: int, table: Path | None) -> int:
    """Tune, store and tell, cell by cell; how many were stored."""
    from rich.console import Console
    from rich.progress import Progress

    from fuzz import tuning
    from fuzz.bench.cells import named
    from rpa.device import current
    from rpa.validate import platform_of

    platform_of(platform)
    cells = tuning.distinct(reduce(named, only, tuning.cells_to_tune(current().platform)))
    console, count, path = Console(), 0, tuning.store(tuning.Outcome("", ""), table)
    if path is None:  # said now rather than after the first winner
        raise typer.Exit(USAGE)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("tuning", total=len(cells))
        for done in tuning.each(cells, platform, iters, end, workers):
            if done.stored:
                if tuning.store(done, table) is None:
                    raise typer.Exit(USAGE)
                count += 1
            console.print(f"{done.cell}: {done.text}", highlight=False, markup=False, soft_wrap=True)
            progress.update(task, description=done.cell, advance=1)
    if count:
        print(f"{count} configs in {path}")
    return count


# ------------------------------------------------------------------ cache

cache = typer.Typer(no_args_is_help=True)
_File = Annotated[Path, typer.Argument(help="A store's JSON.")]


def _store() -> Any:
    from rpa.select import default_chain

    return default_chain().persistent


@cache.callback()
def _cache(context: typer.Context) -> None:
    """The store of tuned configs: show, clear, export, import."""
    context.with_resource(_told_plainly())


@cache.command()
def show() -> None:
    """List what is stored for this user, and where."""
    store = _store()
    entries = store.entries()
    print(f"{store.path}: {len(entries)} configs")
    for key, entry in sorted(entries.items()):
        config = entry.get("config") if isinstance(entry, dict) else entry
        shown = {name: value for name, value in config.items() if value} if isinstance(config, dict) else config
        print(f"  {key}\n    {shown}  {entry.get('note', '') if isinstance(entry, dict) else ''}")


@cache.command()
def clear() -> None:
    """Forget every stored config."""
    store = _store()
    count = len(store.entries())
    if store.path.exists() and not store.merge({}, replace=True):
        raise typer.Exit(USAGE)
    print(f"{store.path}: {count} configs forgotten")


@cache.command()
def export(file: _File) -> None:
    """Write the store to a file that `rpa cache import` reads elsewhere."""
    from rpa.cache import render

    entries = _store().entries()
    try:
        file.write_text(render(entries), encoding="utf-8")
    except OSError as error:
        raise _fail(f"{file}: {error.strerror}") from None
    print(f"{len(entries)} configs in {file}")


@cache.command("import")
def import_(file: _File) -> None:
    """Add the configs of an exported file to the store; those of the same key win over what is there."""
    from rpa import RaggedPageAttentionv2Config
    from rpa.cache import read

    try:
        entries = read(file)
        for key, entry in entries.items():
            if key.count("|") < 2 or not isinstance(entry, dict):
                raise ValueError(f"{key!r} is no entry of a store")
            RaggedPageAttentionv2Config.from_dict(entry.get("config", {}))
    except (OSError, ValueError, TypeError) as error:
        raise _fail(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    if not _store().merge(entries):
        raise typer.Exit(USAGE)
    print(f"{len(entries)} configs in {_store().path}")
