"""Where a campaign keeps what XLA compiled: in one folder for all campaigns of a user on machines of one sort.

A program costs two seconds to compile and a fraction of one to load. Code for one processor may be wrong on another,
and JAX's own key does not hold the number of threads that XLA was told of, so the folder is named after both.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

MOST_BYTES = 128 << 20  # 2,000 programs; JAX drops those that were not used for longest


def kept(out: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that tell JAX where programs are kept: in a folder for all, or in `out` where none can be made.

    What the user says wins: `JAX_COMPILATION_CACHE_DIR` is another folder, and `JAX_ENABLE_COMPILATION_CACHE=false`
    keeps nothing.
    """
    folder = out / "compiled"
    try:
        shared = _cache(environ) / "programs" / sort_of_machine(environ)
        shared.mkdir(parents=True, exist_ok=True)
        folder = shared if os.access(shared, os.W_OK) else folder
    except (OSError, RuntimeError):  # no home, or a disk that is full or read-only: not a reason to judge nothing
        pass
    ours = {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_COMPILATION_CACHE_MAX_SIZE": str(MOST_BYTES),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}  # fmt: skip
    if "JAX_COMPILATION_CACHE_DIR" in environ:  # whose size is the user's too
        del ours["JAX_COMPILATION_CACHE_MAX_SIZE"]
    return {variable: value for variable, value in ours.items() if variable not in environ}


def _cache(environ: Mapping[str, str]) -> Path:
    """As `rpa.settings.cache_dir`, which cannot be asked: with `rpa` comes JAX, which reads these variables then."""
    if chosen := environ.get("RPA_CACHE_DIR"):
        return Path(os.path.expanduser(chosen)).absolute()
    from platformdirs import user_cache_path

    return user_cache_path("rpa", appauthor=False)


def sort_of_machine(environ: Mapping[str, str]) -> str:
    """A word for all that compiled code depends on beside the program: compiler, processor, threads."""
    threads = environ.get("NPROC", os.cpu_count())
    facts = (importlib.metadata.version("jaxlib"), platform.machine(), _processor(), threads)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Its model and what it can do, as the kernel tells; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(facts)}))
