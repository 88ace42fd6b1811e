"""The Triton backend: one source for every GPU, launched through jax-triton.

`plan` turns a signature and a config into launches, `kernel` holds the kernels, `launch` runs them inside jit,
`interpret` runs them on a CPU, `tuning` knows the configs.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from rpa import device, numerics
from rpa.backends.triton import tuning
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.registry import Implementation
from rpa.signature import Inputs, Signature

MOST_DIM = 512


def _run(inputs: Inputs, signature: Signature, config: RaggedPageAttentionv2Config) -> tuple[Any, Any]:
    from rpa.backends.triton import launch

    return launch.run(inputs, signature, tuning.complete(signature, config, device.current(inputs.queries)))


def _supports(signature: Signature, chip: Device) -> str | None:
    if chip.platform != "gpu":
        return f"it runs on GPUs, not on {chip.platform}"
    if chip.interpreted:
        return "it does not run inside a Pallas interpreter"
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} is not installed (pip install 'rpa[gpu]')"
    if chip.capability is not None and chip.capability < (8, 0):
        return f"it needs compute capability 8.0, and {chip.kind} has {'.'.join(map(str, chip.capability))}"
    if signature.head_dim > MOST_DIM:
        return f"head_dim = {signature.head_dim} is more than {MOST_DIM}"
    if signature.kv_dtype == "float8_e4m3fn" and chip.capability is not None and chip.capability < (8, 9):
        return f"float8_e4m3fn needs compute capability 8.9, and {chip.kind} has {'.'.join(map(str, chip.capability))}"
    return None


def _claim(signature: Signature, chip: Device) -> dict[str, Any]:
    return numerics.claim(signature, chip, block=16)  # the fewest keys a dot takes, whatever the config


BACKEND = Implementation(
    name="triton",
    run=_run,
    supports=_supports,
    heuristic=tuning.heuristic,
    candidates=tuning.candidates,
    claim=_claim,
)
