"""The Mosaic TPU kernel as a backend.

Read `plan` (what is compiled), `tiles` (the work list), `transfers` (what moves, and who asks), `kernel` (the loops),
`operands` (what the dots get), `call` (arrays in and out) and `chips` (block sizes, and what does not fit).

Two things cost a copy of the whole cache a call, made by XLA and not here, and that many bytes more of HBM:
float16 pages, which a TPU cannot load and which travel as int16 (read and written once: 4 * P * page * 2 * Hkv * D
bytes); and a head size that is no multiple of 128 in JAX's default layout, which puts the pages innermost (as much,
and the copy's rows are padded to 128 lanes). A cache kept row-major is read where it lies, lanes padded:
`jax.experimental.layout.Format(Layout((0, 1, 2, 3)), sharding)`.
"""

from __future__ import annotations

from typing import Any

from rpa import device as devices
from rpa import numerics
from rpa.backends.pallas_tpu import call, chips
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.registry import Implementation
from rpa.signature import Inputs, Signature


def run(inputs: Inputs, signature: Signature, config: RaggedPageAttentionv2Config) -> tuple[Any, Any]:
    """The whole contract, inside jit: [T, Hq, D] in the queries' dtype and f32 [T, Hq] or None."""
    device = devices.current(inputs.queries)
    plan = chips.plan_of(signature, device, config)
    return call.attend(inputs, signature, plan, chips.vmem_granted(signature, device, plan))


def supports(signature: Signature, device: Device) -> str | None:
    """Why this chip cannot take the call, or None."""
    return chips.refusal(signature, device)


def claim(signature: Signature, device: Device) -> dict[str, Any]:
    """The default claim; blocks lie on a fixed grid. The smallest a config can ask for is one page, and the mixed path
    folds a block in pieces of 128 keys, of which the last may be short: no fewer than 64 each in the mean."""
    return numerics.claim(signature, device, block=min(signature.page_size, 64))


BACKEND = Implementation("pallas_tpu", run, supports, chips.heuristic, chips.candidates, claim)
