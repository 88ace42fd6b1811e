"""Waivers: findings that are known, with a reason, a link and a date on which they stop to count.

A file in TOML:

    [[waiver]]
    target = "ejkernel"
    kind = "nan"                      # of the failure; "" for any
    when = { window = "few" }         # features of the plan, all of which must hold
    reason = "NaN in slots before the window"
    link = "https://…"
    expires = 2027-01-31
    crash = false                     # true: cases with these features are never launched

A waived failure is counted apart. A waiver that no longer excuses anything, though its cases were judged, fails the
campaign: the bug is gone, or the waiver never matched. So does one that has expired.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.coverage import AXES, features
from fuzz.plan import Plan

_FIELDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("target", "kind", "reason", "link"), (str, "text")),
    "when": (dict, 'a table of features, as { window = "few" }'),
    "expires": (datetime.date, "a date, as 2027-01-31"),
    "crash": (bool, "true or false"),
}
_NEEDED = ("target", "reason", "link", "expires")


class WaiverError(ValueError):
    """A waiver without reason, link or date, with a field nobody knows, or with a value that its field cannot have."""


@dataclass
class Waiver:
    """One excuse, and how often it was used."""

    target: str
    reason: str
    link: str
    expires: datetime.date
    kind: str = ""
    when: dict[str, Any] = field(default_factory=dict)
    crash: bool = False
    judged: int = 0  # cases its features apply to
    used: int = 0

    def applies(self, plan: Plan) -> bool:
        """Whether the plan has every feature the waiver names."""
        return set(self.when.items()) <= features(plan)

    def __str__(self) -> str:
        where = ", ".join(f"{k}={v}" for k, v in self.when.items()) or "any case"
        return f"{self.target}: {self.kind or 'any failure'} with {where} ({self.reason}; {self.link})"


def read(path: Path) -> list[Waiver]:
    """The waivers in a file.

    Raises:
        WaiverError: naming the entry, the field and the rule.
    """
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:  # TOML, or no text at all
        raise WaiverError(f"{path}: {error}") from error
    entries = found.pop("waiver", [])
    if found or not isinstance(entries, list):
        raise WaiverError(
            f"{path}: {next(iter(found), '[waiver]')!r} is nothing a ledger holds; write [[waiver]] entries"
        )
    return [_waiver(i, entry) for i, entry in enumerate(entries, 1)]


def _waiver(number: int, entry: Any) -> Waiver:
    if not isinstance(entry, dict):
        raise WaiverError(f"waiver {number}: {entry!r} is no table; write a [[waiver]] entry")
    unknown = sorted(set(entry) - set(_FIELDS))
    missing = [name for name in _NEEDED if not entry.get(name)]
    if unknown or missing:
        what = f"has no {missing[0]}" if missing else f"has a field {unknown[0]!r} that nobody knows"
        raise WaiverError(f"waiver {number} {what}; needed: {', '.join(_NEEDED)}")
    for name, value in entry.items():
        kind, words = _FIELDS[name]
        if type(value) is not kind:  # a datetime is a date too, and compares with none
            raise WaiverError(f"waiver {number}: {name}={value!r} must be {words}")
    for axis, value in entry.get("when", {}).items():
        if axis not in AXES:
            raise WaiverError(f"waiver {number}: when.{axis}={value!r} is no feature; known: {', '.join(AXES)}")
        if value not in AXES[axis]:
            known = ", ".join(repr(v) for v in AXES[axis])
            raise WaiverError(f"waiver {number}: when.{axis}={value!r} is no feature; known of {axis}: {known}")
    return Waiver(**entry)


class Ledger:
    """The waivers of one target during a campaign."""

    def __init__(self, waivers: Iterable[Waiver], target: str, today: datetime.date):
        mine = [w for w in waivers if w.target == target]
        self.expired = [w for w in mine if w.expires < today]
        self.active = [w for w in mine if w.expires >= today]

    def forbids(self, plan: Plan) -> Waiver | None:
        """The crash-class waiver under which a plan is never launched."""
        return next((w for w in self.active if w.crash and w.applies(plan)), None)

    def excuses(self, plan: Plan, failed: bool, kind: str) -> Waiver | None:
        """Count a judged plan; the waiver that excuses its failure, if one does."""
        excuse = None
        for waiver in self.active:
            if waiver.crash or not waiver.applies(plan):
                continue
            waiver.judged += 1
            if failed and excuse is None and waiver.kind in ("", kind):
                waiver.used += 1
                excuse = waiver
        return excuse

    def complaints(self) -> list[str]:
        """What is wrong with the ledger itself at the end."""
        stale = [f"unexpectedly passes, remove it: {w}" for w in self.active if not w.crash and w.judged and not w.used]
        return [f"expired on {w.expires}: {w}" for w in self.expired] + stale
