"""The readable keys under which configs are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from rpa.signature import Signature


def stem(signature: Signature, platform: str, sharding: str) -> str:
    """The readable key of a call: what changes the best config, in buckets; scales and `num_seqs` do not.

    >>> from rpa.registry import TYPICAL
    >>> stem(TYPICAL, "auto", "none")
    'auto tokens<=8 seqs<=8 pages<=128 heads=32/8 dim=128 page=16 q=bfloat16 kv=bfloat16 compute=bfloat16'
    """
    told = {
        "tokens<": _bucket(signature.num_tokens),
        "seqs<": _bucket(signature.max_seqs),
        "pages<": _bucket(signature.pages_per_seq),
        "heads": f"{signature.num_q_heads}/{signature.num_kv_heads}",
        "dim": signature.head_dim,
        "page": signature.page_size,
        "q": signature.q_dtype,
        "kv": signature.kv_dtype,
        "compute": signature.compute_dtype,
        "window<": signature.sliding_window and _bucket(signature.sliding_window),
        "vmem": signature.vmem_limit_bytes,
        "sharding": None if sharding == "none" else sharding,
    }
    flags = [name for name in ("sinks", "k_scale", "v_scale", "return_lse", "optimized") if getattr(signature, name)]
    flags += ["cap"] if signature.logits_soft_cap is not None else []
    return " ".join([platform, *(f"{name}={value}" for name, value in told.items() if value is not None), *flags])


def stems_of_likes(signature: Signature) -> Iterator[str]:
    """The call's own, then those of as many tokens in pages of other sizes, nearest first: GPU blocks are in tokens."""
    sizes = {signature.page_size, 16, 32, 64, 128, 256}
    for page in sorted(sizes, key=lambda size: abs(math.log(size / signature.page_size))):
        yield stem(replace(signature, page_size=page, pages_per_seq=-(-signature.capacity // page)), "auto", "none")


def _bucket(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()
