"""The Triton kernels in the CPU interpreter, as a target: `fuzz.adapters.triton_interpret:attention`.

Two shapes of launch: `attention` runs tiles so small that a small case has many blocks and splits, `as_shipped` the
config a GPU would run. Addresses are checked: a stray load or store is an error, not a wrong answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fuzz.targets import signature_of
from oracle import Case, Claim
from rpa import numerics
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device

CHIP = Device("gpu", "NVIDIA H200", (9, 0))  # the arithmetic that the interpreter imitates
SMALL = RaggedPageAttentionv2Config(
    platform="triton",
    num_warps=4,
    num_stages=2,
    options=(("long_m", 16), ("long_n", 16), ("programs", 3), ("short_n", 16), ("shortest", 16)),
)


def run(case: Case, config: RaggedPageAttentionv2Config, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Output and lse of one case under one config; `options` go to the interpreter (`source` for a patched kernel)."""
    from dataclasses import replace

    from rpa.backends.triton import interpret

    heads = (case.num_kv_heads,)
    scale = {n: None if s is None else np.array(np.broadcast_to(np.float32(s), heads)) for n, s in
             (("k_scale", case.k_scale), ("v_scale", case.v_scale))}  # fmt: skip
    names = (
        "queries",
        "kv_pages",
        "context_lens",
        "block_tables",
        "query_start_loc",
        "num_seqs",
        "softmax_aux",
    )
    inputs: dict = {n: None if a is None else np.array(a) for n, a in zip(names, case.arrays, strict=True)} | scale
    return interpret.run(inputs, replace(signature_of(case), return_lse=True), config, **options)


def _case(arrays: tuple, options: dict[str, Any]) -> Case:
    queries, pages, contexts, tables, offsets, num_seqs, sinks = arrays
    live = int(np.asarray(num_seqs).reshape(-1)[0])
    return Case(queries, pages, contexts, tables, offsets, live, sinks, **options)


def _claim(case: Case) -> Claim:
    return Claim(**numerics.claim(signature_of(case), CHIP, block=8))


def _supports(case: Case) -> str | None:
    import importlib.util

    return None if importlib.util.find_spec("triton") else "triton is not installed"


def attention(*arrays: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The call of the contract on NumPy arrays, under `SMALL`."""
    return run(_case(arrays, options), SMALL)


def as_shipped(*arrays: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The call of the contract on NumPy arrays, under the config of an H200."""
    from rpa.backends.triton import tuning

    case = _case(arrays, options)
    return run(case, tuning.heuristic(signature_of(case), CHIP))


for _target in (attention, as_shipped):
    _target.claim, _target.supports = _claim, _supports  # type: ignore[attr-defined]
    _target.batch_invariant = _target.interpreted = True  # type: ignore[attr-defined]
