"""The environment, read here and nowhere else, when a call asks and never at import."""

from __future__ import annotations

import os
import sys
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
    for name in _POLICY:
        value = os.environ.get(name)
        if value is None:
            continue
        if value not in POLICIES:
            raise ValueError(f"{name}={value!r}: one of {', '.join(POLICIES)} is expected")
        return value
    return None


def cache_dir() -> Path:
    """The folder of the persistent store: `RPA_CACHE_DIR`, else the platform's user cache folder."""
    get = os.environ.get
    if chosen := get("RPA_CACHE_DIR"):
        return Path(os.path.expanduser(chosen))
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():  # a user without a home
        home = Path(tempfile.gettempdir()) / f"rpa-{getattr(os, 'getuid', int)()}"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "rpa"
    if sys.platform == "win32":
        return Path(get("LOCALAPPDATA") or home / "AppData" / "Local") / "rpa" / "Cache"
    named = get("XDG_CACHE_HOME", "")  # its specification has relative paths ignored
    return (Path(named) if os.path.isabs(named) else home / ".cache") / "rpa"
