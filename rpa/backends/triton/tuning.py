"""Which config a call runs with: rules read off sweeps on an H200 (tests/bench/records), from static shapes alone."""

from __future__ import annotations

from itertools import product

from rpa.backends.triton import plan
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.signature import Signature

# Bytes of shared memory a program may take: 227 KiB on sm_90 and sm_100, 163 on sm_80, 99 on consumer chips, 64 on AMD.
SHARED = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
SHARED_NVIDIA, SHARED_AMD = 99 << 10, 64 << 10


def heuristic(signature: Signature, device: Device) -> RaggedPageAttentionv2Config:
    """The config for a call, from its static shapes and the chip."""
    has_long = signature.num_tokens > signature.max_seqs
    options, warps, stages, registers = _long(signature) if has_long else _short(signature)
    if registers and _vendor(device) == "nvidia":
        options = options | {"max_registers": registers}
    stages = _fitting(signature, options, stages, _shared(device))
    return RaggedPageAttentionv2Config(
        num_warps=warps, num_stages=stages, platform="triton", options=tuple(options.items())
    )


def _short(signature: Signature) -> tuple[dict[str, int], int, int, int]:
    """Decode: options, warps, stages, register limit (0: none)."""
    base = {"longest": _longest(signature), "programs": 24 * plan.MULTIPROCESSORS}
    if signature.max_seqs * signature.num_kv_heads <= 8:  # too few for the chip: up to 128 splits of a long context
        base["shortest"] = 64
    if signature.compute_dtype == "float32":
        return base | {"short_n": 32, "long_n": 32}, 4, 2, 0
    if signature.head_dim <= 64:
        window = signature.sliding_window
        if window is not None and window <= 512:  # items of a microsecond: few programs that walk many
            few = base | {"programs": 4 * plan.MULTIPROCESSORS}
            if signature.max_seqs >= 32:
                return few | {"short_n": 32, "long_n": 32}, 1, 4, 0
            return few | {"short_n": 64, "long_n": 64}, 2, 4, 0
        return base | {"short_n": 64, "long_n": 64}, 2, 4, 0
    if signature.head_dim <= 128:
        return base | {"short_n": 64, "long_n": 64}, 4, 3, 0
    return base | {"short_n": 32, "long_n": 32}, 4, 3, 0


def _longest(signature: Signature) -> int:
    """Keys a split may have in decode: two programs share a multiprocessor, and the last wave should be full."""
    pairs = signature.max_seqs * signature.num_kv_heads
    return 16384 if pairs < 256 and signature.head_dim > 64 else 8192


def _long(signature: Signature) -> tuple[dict[str, int], int, int, int]:
    """Prefill, chunks and mixed batches: options, warps, stages, register limit."""
    base = {"longest": 2048, "programs": 16 * plan.MULTIPROCESSORS}
    if signature.compute_dtype == "float32":
        return base | {"long_m": 32, "long_n": 32, "short_n": 32}, 4, 2, 0
    if signature.head_dim <= 64:
        if signature.sliding_window is not None and signature.sliding_window <= 1024:
            return base | {"long_m": 64, "long_n": 32, "short_n": 32}, 4, 2, 128
        return base | {"long_m": 128, "long_n": 64, "short_n": 64}, 8, 2, 128
    if signature.head_dim <= 128:
        # Few rows a sequence on average: decodes among chunks. Two small programs share a multiprocessor, so that
        # one's loads run beside the other's matrix work.
        if signature.num_tokens < 128 * signature.max_seqs:
            small = {"long_m": 64, "long_n": 64, "short_n": 64, "programs": 64 * plan.MULTIPROCESSORS}
            return base | small, 4, 3, 0
        return base | {"long_m": 128, "long_n": 64, "short_n": 64}, 8, 3, 0
    if signature.head_dim <= 256:
        return base | {"long_m": 128, "long_n": 64, "short_n": 32}, 8, 2, 0
    return base | {"long_m": 64, "long_n": 32, "short_n": 32}, 8, 2, 0


def _vendor(device: Device) -> str:
    return "amd" if "AMD" in device.kind or "Instinct" in device.kind else "nvidia"


def _shared(device: Device) -> int:
    if _vendor(device) == "amd":
        return SHARED_AMD
    return SHARED_NVIDIA if device.capability is None else SHARED.get(device.capability, SHARED_NVIDIA)


def _fitting(signature: Signature, options: dict[str, int], stages: int, limit: int) -> int:
    """As many pipeline stages as shared memory holds; shrinks `options` where even two do not fit."""
    while True:
        widest = max(options.get("long_n", 0), options["short_n"])
        dim = plan.pow2(signature.head_dim)
        size = 4 if "float32" in (signature.compute_dtype, signature.kv_dtype) else 2
        queries = options.get("long_m", 16) * dim * size
        fits = (limit - queries - 4096) // (2 * widest * dim * size)
        if fits >= 2 or widest <= 16:
            return max(min(stages, fits), 1)
        for name in ("long_n", "short_n"):
            options[name] = max(options.get(name, 16) // 2, 16)
        options["long_m"] = max(options.get("long_m", 16) // 2, 16)


def candidates(signature: Signature, device: Device) -> tuple[RaggedPageAttentionv2Config, ...]:
    """What autotuning tries: the heuristic's own config, other cuts of the work into its tiles, then other tiles."""
    first = heuristic(signature, device)
    changes: list[dict[str, int]] = [{"programs": waves * plan.MULTIPROCESSORS} for waves in (4, 16, 24, 64)]
    changes += [{"longest": keys} for keys in (2048, 8192, 16384)]
    tried = [(change, first.num_warps, first.num_stages) for change in changes]
    if signature.num_tokens > signature.max_seqs:
        tiles = [{"long_m": m, "long_n": n, "short_n": min(n, 64)} for m in (64, 128) for n in (32, 64, 128)]
        tried += product(tiles, (4, 8), (2, 3))
    else:
        tried += product([{"short_n": n, "long_n": n} for n in (32, 64, 128)], (2, 4, 8), (2, 3, 4))
    found = {repr(plan.make(signature, first)): first}
    for change, warps, stages in tried:
        options = dict(first.options) | change
        if _fitting(signature, dict(options), stages or 1, _shared(device)) == stages:
            config = first.replace(num_warps=warps, num_stages=stages, options=tuple(options.items()))
            found.setdefault(repr(plan.make(signature, config)), config)
    return tuple(found.values())


def complete(signature: Signature, config: RaggedPageAttentionv2Config, device: Device) -> RaggedPageAttentionv2Config:
    """`config` with what it leaves open filled in by the heuristic."""
    base = heuristic(signature, device)
    defaults = dict(base.options)
    if config.num_kv_pages_per_block is not None:
        defaults = {k: v for k, v in defaults.items() if k not in ("short_n", "long_n")}
    if config.num_queries_per_block is not None:
        defaults.pop("long_m", None)
    return config.replace(
        num_warps=config.num_warps or base.num_warps,
        num_stages=config.num_stages or base.num_stages,
        options=tuple((defaults | dict(config.options)).items()),
    )
