"""Which config a call runs with: measured on an H200 (tests/bench/records), extended by rule elsewhere."""

from __future__ import annotations

from rpa.backends.triton import plan
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.signature import Signature


def heuristic(signature: Signature, device: Device) -> RaggedPageAttentionv2Config:
    """The config for a call, from its static shapes alone."""
    dim, wide = plan.pow2(signature.head_dim), signature.compute_dtype == "float32"
    long_m = 32 if wide else 128 if dim <= 256 else 64
    long_n = 32 if wide or dim > 128 else 64
    short_n = 32 if wide or dim > 128 else 64
    has_long = signature.num_tokens > signature.max_seqs
    options = {"long_m": long_m, "long_n": long_n, "short_n": short_n, "split": 1024}
    return RaggedPageAttentionv2Config(
        num_warps=8 if has_long and not wide else 4,
        num_stages=2 if wide or dim > 256 else 3,
        platform="triton",
        options=tuple(options.items()),
    )


def candidates(signature: Signature, device: Device) -> tuple[RaggedPageAttentionv2Config, ...]:
    """What autotuning tries; the heuristic's own config first."""
    first = heuristic(signature, device)
    return (first,)


def complete(signature: Signature, config: RaggedPageAttentionv2Config) -> RaggedPageAttentionv2Config:
    """`config` with what it leaves open filled in by the heuristic."""
    base = heuristic(signature, Device("gpu", ""))
    given = dict(config.options)
    defaults = dict(base.options)
    if config.num_kv_pages_per_block is not None:
        defaults = {k: v for k, v in defaults.items() if k not in ("short_n", "long_n")}
    if config.num_queries_per_block is not None:
        defaults.pop("long_m", None)
    return config.replace(
        num_warps=config.num_warps or base.num_warps,
        num_stages=config.num_stages or base.num_stages,
        options=tuple((defaults | given).items()),
    )
