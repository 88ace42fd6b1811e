"""The Mosaic TPU kernel: `BACKEND`, what it supports, and how its block sizes are chosen."""

from __future__ import annotations

from typing import Any

from rpa import numerics
from rpa.backends.pallas_tpu import call, plan
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.registry import Implementation
from rpa.signature import Inputs, Signature


def run(inputs: Inputs, signature: Signature, config: RaggedPageAttentionv2Config) -> tuple[Any, Any]:
    return call.attend(inputs, signature, plan.make(signature, config, 1), signature.vmem_limit_bytes)


def supports(signature: Signature, device: Device) -> str | None:
    return None


def heuristic(signature: Signature, device: Device) -> RaggedPageAttentionv2Config:
    pages = plan.power_of_two_below(max(1, min(256 // signature.page_size, signature.pages_per_seq)))
    if device.interpreted:
        pages = max(1, min(pages, plan.power_of_two_below(16 // signature.page_size)))
    return RaggedPageAttentionv2Config(
        num_kv_pages_per_block=pages, num_queries_per_block=16 if device.interpreted else 32, num_stages=3, platform="pallas", backend="tpu", options=(("pair_heads", 1 if signature.num_kv_heads % 2 else 2),)
    )


def candidates(signature: Signature, device: Device) -> tuple[RaggedPageAttentionv2Config, ...]:
    return (heuristic(signature, device),)


def claim(signature: Signature, device: Device) -> dict[str, Any]:
    return numerics.claim(signature, device, block=1)


BACKEND = Implementation("pallas_tpu", run, supports, heuristic, candidates, claim)
