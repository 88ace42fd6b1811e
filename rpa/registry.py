"""The backends: each is a value, found by platform and device, imported when first asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.signature import Inputs, Signature

ALGORITHM = "ragged_page_attention_v2"


@dataclass(frozen=True)
class Implementation:
    """One backend: what it runs, what it cannot, how it is tuned, and how wrong it may be."""

    name: str
    run: Callable[[Inputs, Signature, RaggedPageAttentionv2Config], tuple[Any, Any]]
    supports: Callable[[Signature, Device], str | None]  # the reason it cannot, or None
    heuristic: Callable[[Signature, Device], RaggedPageAttentionv2Config]
    candidates: Callable[[Signature, Device], tuple[RaggedPageAttentionv2Config, ...]]
    claim: Callable[[Signature, Device], dict[str, Any]]  # keyword arguments of oracle.Claim


@dataclass(frozen=True)
class Slot:
    """Where a backend stands: what the caller writes, the chips it runs on, and the module that holds it."""

    name: str
    platform: str
    chips: tuple[str, ...]
    module: str


# The order is the preference of platform="auto".
SLOTS = (
    Slot("pallas_tpu", "pallas", ("tpu",), "rpa.backends.pallas_tpu"),
    Slot("pallas_gpu", "pallas", ("gpu",), "rpa.backends.pallas_gpu"),
    Slot("triton", "triton", ("gpu",), "rpa.backends.triton"),
    Slot("xla", "xla", ("cpu", "gpu", "tpu"), "rpa.backends.xla"),
)


@cache
def load(name: str) -> Implementation:
    """The backend called `name`; an `ImportError` says what is not installed."""
    slot = next(s for s in SLOTS if s.name == name)
    return importlib.import_module(slot.module).BACKEND


def exists() -> list[Slot]:
    """The slots whose module is part of this package."""
    return [slot for slot in SLOTS if importlib.util.find_spec(slot.module) is not None]


def why_not(slot: Slot, signature: Signature, device: Device) -> str | None:
    """The reason `slot` cannot take this call, or None."""
    if device.platform not in slot.chips:
        return f"it runs on {' and '.join(slot.chips)}, and this call is lowered for {device.platform} ({device.kind})"
    try:
        implementation = load(slot.name)
    except ImportError as error:
        return f"it is not installed: {error}"
    return implementation.supports(signature, device)


def resolve(platform: str, signature: Signature, device: Device) -> tuple[Implementation, str]:
    """The backend for `platform`, and the reason it was taken.

    Raises:
        ValueError: no backend of that platform can take the call; the text gives every backend's reason.
    """
    wanted = [slot for slot in exists() if platform in ("auto", slot.platform)]
    reasons = {}
    for slot in wanted:
        reason = why_not(slot, signature, device)
        if reason is None:
            return load(slot.name), _because(platform, slot, reasons)
        reasons[slot.name] = reason
    raise ValueError(_refusal(platform, signature, device, reasons))


def _because(platform: str, slot: Slot, refused: dict[str, str]) -> str:
    if platform != "auto":
        return f"platform={platform!r} was asked for"
    others = "".join(f"; not {name}: {reason}" for name, reason in refused.items())
    return f"first backend that takes the call{others}"


def _refusal(platform: str, signature: Signature, device: Device, reasons: dict[str, str]) -> str:
    text = f"platform={platform!r} has no kernel for this call on {device.platform} ({device.kind})"
    text += "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
    able = [
        slot for slot in exists() if slot.name not in reasons and why_not(slot, signature, device) is None
    ]
    names = ", ".join(sorted({f"platform={slot.platform!r}" for slot in able})) or "none"
    return f"{text}\nBackends that can take it here: {names}"
