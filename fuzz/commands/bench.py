"""`rpa bench`: one command a device. Judged cells, their times beside the machine's ceilings, a record, a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    json: Annotated[Path | None, typer.Option(help="Write the record here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier record: exit 1 on a regression past the noise.")
    ] = None,
    platform: Annotated[
        list[str] | None, typer.Option(help="Only this backend: xla, triton, pallas. May be given again.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Time this kernel: module:function, as `rpa fuzz run` takes it. May repeat."),
    ] = None,
    only: Annotated[str, typer.Option(help="Only cells whose name contains this text, or matches it.")] = "",
    peers: Annotated[bool, typer.Option(help="Also time the peers that are installed.")] = True,
    history: Annotated[list[Path] | None, typer.Option(help="Earlier records for the page's history.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the record at --json.")] = False,
    budget: Annotated[str | None, typer.Option(help="Begin nothing past this: 90s, 10m. --resume goes on.")] = None,
    patience: Annotated[float, typer.Option(help="Seconds of silence after which a kernel is taken to hang.")] = 120.0,
) -> None:
    """Benchmark verified cases on this machine's device, against its measured ceilings.

    A case that the oracle does not pass has no number. Exit codes: 0, 1 a regression or a failed case, 2 usage,
    3 nothing was timed.
    """
    from fuzz.bench import session
    from fuzz.commands.search import _seconds

    options = session.Options(json, html, compare, tuple(platform or ()), tuple(target or ()), only, peers,
                              tuple(history or ()), resume, _seconds(budget), patience)  # fmt: skip
    raise typer.Exit(session.main(options))
