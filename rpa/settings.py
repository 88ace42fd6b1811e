"""The environment, read here and nowhere else, when a call asks and never at import."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

_POLICY = ("RPA_AUTOTUNE_POLICY", "EJKERNEL_AUTOTUNE_POLICY")
_RAW = [os.environ.encodekey(name) for name in (*_POLICY, "RPA_CACHE_DIR")]  # as the dict below `os.environ` has them
POLICIES = ("autotune", "heuristics")


def environment() -> tuple[Any, ...]:
    """The raw values that selection depends on, for comparison on every call: `os.environ.get` takes 2 us a miss."""
    return tuple(map(getattr(os.environ, "_data", os.environ).get, _RAW))


def autotune_policy() -> str | None:
    """What a cache miss does, `"autotune"` or `"heuristics"`; None where the environment says nothing.

    Raises:
        ValueError: a variable holds anything else; the text names it.
    """
    name, value = next(((name, os.environ[name]) for name in _POLICY if name in os.environ), ("", None))
    if value not in (None, *POLICIES):
        raise ValueError(f"{name}={value!r}: one of {', '.join(POLICIES)} is expected")
    return value


def cache_dir() -> Path:
    """The folder of the persistent store: `RPA_CACHE_DIR`, else the platform's user cache folder."""
    if chosen := os.environ.get("RPA_CACHE_DIR"):
        return Path(os.path.expanduser(chosen))
    from platformdirs import user_cache_path  # 60 ms, so not at import

    with contextlib.suppress(RuntimeError):  # without a home it raises, or says "~"
        if (folder := user_cache_path("rpa", appauthor=False)).is_absolute():
            return folder
    return Path(tempfile.gettempdir()) / f"rpa-{getattr(os, 'getuid', int)()}"
