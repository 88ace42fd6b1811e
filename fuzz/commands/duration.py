"""How every command reads the time that it may take."""

from __future__ import annotations

import re

_NUMBER = r"(\d+(?:\.\d+)?) *"
_TIME = re.compile(rf"(?:{_NUMBER}h *)?(?:{_NUMBER}m *)?(?:{_NUMBER}s)?")


def seconds(text: str) -> float:
    """Of `90`, `90s`, `10m` or `1h30m`.

    Raises:
        ValueError: it is no time above 0.
    """
    given = text.strip()
    match = _TIME.fullmatch(f"{given}s" if given.replace(".", "", 1).isdigit() else given)
    found = sum(float(n) * unit for n, unit in zip(match.groups("0"), (3600, 60, 1), strict=True)) if match else 0
    if not found:
        raise ValueError(f"--budget {text!r} is no time above 0; write 90s, 10m or 1h30m")
    return found
