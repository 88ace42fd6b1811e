"""Run the TPU kernel in Pallas's TPU interpreter, and treat what it merely prints as a failure."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import (
    interpret_pallas_call as interpreter,
)  # the race flag has no public home
from jax.experimental.pallas import tpu as pltpu

from fuzz.targets import load, signature_of
from oracle import Case, Claim
from rpa import RaggedPageAttentionv2Config, ragged_page_attention_v2
from rpa.backends.pallas_tpu import chips
from rpa.device import Device

DEVICE = Device("tpu", "TPU v6 lite", interpreted=True)
TARGET = load("pallas_tpu")


_last: list[pltpu.InterpretParams | None] = [None]


class Interpreted(AssertionError):
    """The kernel ran, and the interpreter saw it break a rule."""


def claim_of(case: Case) -> Claim:
    return TARGET.claim(case)


def config_of(case: Case, **changes: Any) -> RaggedPageAttentionv2Config:
    """The heuristic's config for an interpreted case, with changes."""
    return chips.heuristic(signature_of(case), DEVICE).replace(**changes)


def run(
    case: Case,
    mode: str = "on_wait",
    cfg: RaggedPageAttentionv2Config | None = None,
    vmem_limit_bytes: int | None = None,
    **parameters: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Output and lse of a case, in NaN-filled memory.

    Args:
        mode: "on_wait" moves a transfer's bytes when it is waited for, "eager" when it starts.
        parameters: of `pltpu.InterpretParams`.

    Raises:
        Interpreted: a semaphore was not empty at the end, or the race detector found a race.
    """
    said = io.StringIO()
    params = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode=mode, **parameters)
    if params != _last[0]:
        jax.clear_caches()  # a compiled wrapper remembers the parameters of its first call
        _last[0] = params
    try:
        with contextlib.redirect_stdout(said), pltpu.force_tpu_interpret_mode(params):
            output, lse = ragged_page_attention_v2(
                *case.arrays,
                **case.options,
                platform="pallas",
                cfg=cfg,
                return_lse=True,
                vmem_limit_bytes=vmem_limit_bytes,
            )
            output, lse = np.asarray(output), np.asarray(lse)
        raced = parameters.get("detect_races", False) and interpreter.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    if "non-zero count" in said.getvalue():
        raise Interpreted(said.getvalue().strip())
    if raced:
        raise Interpreted(f"a data race: {said.getvalue().strip()}")
    return output, lse
