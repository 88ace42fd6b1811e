"""The Mosaic TPU kernel as a backend.

Read `plan` (what is compiled), `tiles` (the work list), `transfers` (what moves, and who asks), `kernel` (the loops),
`operands` (what the dots get), `call` (arrays in and out) and `chips` (block sizes, and what does not fit).

Two things can cost a copy of the whole cache a call, made by XLA and not here:

- A head size that is no multiple of 128, in JAX's usual layout: the pages lie innermost, the elements of one a pool
  apart, and no transfer can fetch it (a page of 128 tokens lies in one piece, but transposed). Rows of 128 lanes,
  padded, are read where they lie, and XLA chooses them when it may: `Format(Layout.AUTO, sharding)`
  (`jax.experimental.layout`) among the jit's in_shardings and out_shardings. Then a step that writes and reads a cache
  of D 64, 80, 96 or 192 copies nothing; otherwise it copies the cache twice (`tests/bench/records/tpu_aot.json`,
  steps). The padding costs HBM: twice the bytes for D 64.
- float16 pages. Mosaic takes no f16 argument, and XLA's `bitcast_convert_type` writes what it returns, even from f32
  to u32: the cache is read and written once a call, and held twice. Keep such a cache in bf16.
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
