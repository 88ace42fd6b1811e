"""`rpa`: the one command. Each subcommand lives in `fuzz/commands/` and imports what it needs when it runs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

import typer

# Before NumPy: the oracle's products are small, and BLAS threads would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

app = typer.Typer(
    name="rpa",
    help="Ragged paged attention that can be trusted: verify, fuzz, benchmark, explain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root() -> None:
    """Keeps every subcommand a subcommand, however many are mounted."""


# (module, attribute, how it is mounted)
_COMMANDS = (
    ("fuzz.commands.verify", "verify", "command"),
    ("fuzz.commands.search", "app", "group:fuzz"),
    ("fuzz.commands.bench", "bench", "command"),
    ("fuzz.commands.config", "explain", "command"),
    ("fuzz.commands.config", "tune", "command"),
    ("fuzz.commands.config", "cache", "group:cache"),
)


def _mount() -> None:
    for module, attribute, how in _COMMANDS:
        if importlib.util.find_spec(module) is None:
            continue
        target = getattr(importlib.import_module(module), attribute)
        if how == "command":
            app.command(attribute)(target)
        else:
            app.add_typer(target, name=how.partition(":")[2])


def main() -> None:
    """Entry point of the `rpa` console script; exit codes are those of the contract."""
    _mount()
    sys.exit(app())


if __name__ == "__main__":
    main()
