"""Which device a call is lowered for."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from platform import machine
from typing import Any

import jax
from jax._src import config as _jax_config
from jax.core import Tracer


@dataclass(frozen=True)
class Device:
    """The chip a program is lowered for; an interpreter counts as the chip it plays."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # JAX's device_kind: "NVIDIA H200", "TPU v6 lite", "cpu"
    capability: tuple[int, int] | None = None  # compute capability, NVIDIA only
    interpreted: bool = False

    @property
    def accelerator(self) -> bool:
        """Whether tuning on it is worth its time."""
        return self.platform in ("gpu", "tpu") and not self.interpreted


# An ahead-of-time target knows its name and no more.
_CAPABILITY = {
    r"A100|A30": (8, 0),
    r"A10|A40|RTX A": (8, 6),
    r"L4|L40|RTX 40|Ada": (8, 9),
    r"H100|H200|H20|GH200": (9, 0),
    r"B100|B200|GB200": (10, 0),
    r"B300|GB300": (10, 3),
    r"RTX 50|RTX PRO 6000": (12, 0),
}


def _capability(kind: str, declared: Any) -> tuple[int, int] | None:
    if declared is not None and re.fullmatch(r"\d+\.\d+", str(declared)):
        major, minor = str(declared).split(".")
        return int(major), int(minor)
    return next((cc for pattern, cc in _CAPABILITY.items() if re.search(pattern, kind)), None)


@lru_cache(maxsize=256)
def describe(device: Any) -> Device:
    """A `Device` for a `jax.Device` or a `jax.sharding.AbstractDevice`."""
    platform = str({"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform))
    capability = None
    if platform == "gpu":
        capability = _capability(device.device_kind, getattr(device, "compute_capability", None))
    return Device(platform, device.device_kind, capability)


def fingerprint(device: Device) -> str:
    """The name under which configs for a chip are stored; CPUs differ by their architecture and cores."""
    if device.interpreted:
        return f"interpreted {device.platform}"
    if device.platform == "cpu":
        return f"cpu {machine()} x{os.cpu_count()}"
    return device.kind


def _interpreter() -> str | None:
    """The chip a Pallas interpreter context plays, if one is active."""
    # Pallas keeps both interpreters' parameters in this one context variable; it has no public reader.
    params = _jax_config.pallas_tpu_interpret_mode_context_manager.value
    if params is None:
        return None
    return "gpu" if "GPU" in type(params).__name__ else "tpu"


def current(array: Any = None) -> Device:
    """The device a call on `array` is lowered for.

    An active interpreter decides first, then an abstract mesh that names a device, then where a concrete
    array lives, then JAX's default device.
    """
    played = _interpreter()
    if played == "tpu":
        return Device("tpu", "TPU v6 lite", interpreted=True)
    if played == "gpu":
        return Device("gpu", "NVIDIA H100", (9, 0), interpreted=True)
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return describe(abstract)
    if isinstance(array, jax.Array) and not isinstance(array, Tracer):
        return describe(next(iter(array.devices())))
    default = jax.config.jax_default_device
    if default is not None:
        return describe(jax.local_devices(backend=default)[0] if isinstance(default, str) else default)
    return _default_device()


@lru_cache(maxsize=1)
def _default_device() -> Device:
    return describe(jax.devices()[0])
