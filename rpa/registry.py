"""The backends: each is a value, found by platform and device, imported when first asked for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
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
    priority: int = 0
    value: Implementation | None = None  # a registered kernel has no module


# The order is the preference of platform="auto" among equal priorities, but for `in_order`.
SLOTS = (
    Slot("pallas_tpu", "pallas", ("tpu",), "rpa.backends.pallas_tpu"),
    Slot("pallas_gpu", "pallas", ("gpu",), "rpa.backends.pallas_gpu"),
    Slot("triton", "triton", ("gpu",), "rpa.backends.triton"),
    Slot("xla", "xla", ("cpu", "gpu", "tpu"), "rpa.backends.xla"),
)


# The kernels that callers registered. `rpa.registered` replaces the tuple whole, so that a remembered choice can tell
# that it is stale.
added: tuple[Slot, ...] = ()


@functools.cache
def load(name: str) -> Implementation:
    """The built-in backend called `name`; an `ImportError` says what is not installed."""
    slot = next(s for s in SLOTS if s.name == name)
    return importlib.import_module(slot.module).BACKEND


def implementation_of(slot: Slot) -> Implementation:
    return slot.value or load(slot.name)


def exists() -> list[Slot]:
    """Every slot, the registered ones included, highest priority first."""
    return sorted((*SLOTS, *added), key=lambda slot: -slot.priority)


# ------------------------------------------------------------------ which backend takes a call


def why_not(slot: Slot, signature: Signature, device: Device) -> str | None:
    """The reason `slot` cannot take this call, or None."""
    if device.platform not in slot.chips:
        return f"it runs on {' and '.join(slot.chips)}, and this call is lowered for {device.platform} ({device.kind})"
    try:
        implementation = implementation_of(slot)
    except ImportError as error:
        return f"it is not installed: {error}"
    return implementation.supports(signature, device)


def refusals(signature: Signature, device: Device) -> dict[str, str | None]:
    """Every backend's reason not to take the call, None for those that can."""
    return {slot.name: why_not(slot, signature, device) for slot in exists()}


def in_order(signature: Signature, device: Device) -> list[Slot]:
    """The slots as `platform="auto"` tries them on a call of these static shapes.

    With no more rows than sequences a batch decodes. On an H200 Triton's kernel then took 0.61 to 1.02 of the Mosaic
    one's time in 12 cells (less in 11), 1.4 times its time in a prefill, and its earlier version 1.26 to 2.1 times in
    7 prefill and mixed cells (`tests/bench/records/h200_*.json`).
    """
    decodes = device.platform == "gpu" and signature.num_tokens <= signature.max_seqs
    return sorted(exists(), key=lambda slot: (-slot.priority, decodes and slot.name != "triton"))


def able(platform: str, signature: Signature, device: Device) -> list[Slot]:
    """The slots of `platform` that can take the call, in order of preference, one a platform."""
    found: dict[str, Slot] = {}
    for slot in in_order(signature, device):
        wanted = platform in ("auto", slot.platform) and slot.platform not in found
        if wanted and why_not(slot, signature, device) is None:
            found[slot.platform] = slot
    return list(found.values())


def resolve(platform: str, signature: Signature, device: Device) -> tuple[Implementation, str]:
    """The backend for `platform`, and the reason it was taken.

    Raises:
        ValueError: no backend of that platform can take the call; the text gives every backend's reason.
    """
    because = ["first backend that takes the call" if platform == "auto" else f"platform={platform!r} was asked for"]
    for slot in in_order(signature, device):
        if platform not in ("auto", slot.platform):
            continue
        reason = why_not(slot, signature, device)
        if reason is None:
            return implementation_of(slot), "; not ".join(because)
        if device.platform in slot.chips:  # that a TPU kernel is not for a CPU surprises nobody
            because.append(f"{slot.name}: {reason}")
    raise ValueError(refusal(platform, signature, device))


def refusal(platform: str, signature: Signature, device: Device) -> str:
    """What to say where no kernel of `platform` takes the call: every backend's reason, and who can."""
    reasons = refusals(signature, device)
    told = [f"platform={platform!r} has no kernel for this call on {device.platform} ({device.kind})"]
    told += [f"  {name}: {reason}" for name, reason in reasons.items() if reason]
    takers = sorted({f"platform={slot.platform!r}" for slot in exists() if reasons[slot.name] is None})
    return "\n".join([*told, f"Backends that can take it here: {', '.join(takers) or 'none'}"])


# One decode step of an everyday model, for questions that are asked without a call.
TYPICAL = Signature(
    num_tokens=8, num_q_heads=32, head_dim=128, num_pages=1024, page_size=16, num_kv_heads=8, max_seqs=8,
    pages_per_seq=128, q_dtype="bfloat16", kv_dtype="bfloat16", compute_dtype="bfloat16", sinks=False,
    k_scale=False, v_scale=False, return_lse=False, optimized=False, softmax_scale=128**-0.5,
    logits_soft_cap=None, sliding_window=None, vmem_limit_bytes=None,
)  # fmt: skip
