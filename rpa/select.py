"""Which backend and which config a call gets, and why."""

from __future__ import annotations

from dataclasses import dataclass

from rpa import registry
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.registry import Implementation
from rpa.signature import Signature


@dataclass(frozen=True)
class Choice:
    """A backend, its config, the stage that named it and the reason."""

    implementation: Implementation
    config: RaggedPageAttentionv2Config
    source: str  # "explicit" | "overlay" | "memory" | "persistent" | "shipped" | "autotune" | "heuristic"
    reason: str


def choose(
    signature: Signature, device: Device, platform: str, cfg: RaggedPageAttentionv2Config | None
) -> Choice:
    """An explicit `cfg`, else the backend's heuristic; `platform` wins over the config's own."""
    if cfg is not None and platform == "auto":
        platform = cfg.platform
    implementation, reason = registry.resolve(platform, signature, device)
    if cfg is not None:
        return Choice(implementation, cfg, "explicit", f"cfg= was given; {reason}")
    return Choice(implementation, implementation.heuristic(signature, device), "heuristic", reason)
