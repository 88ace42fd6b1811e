"""From a signature and a config to the numbers of two launches: grids, compile-time constants, scratch shapes.

Nothing here imports Triton: the JAX launcher, the CPU interpreter, ahead-of-time compilation and the benchmarks all
run the same plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rpa.config import RaggedPageAttentionv2Config
from rpa.signature import Signature

MULTIPROCESSORS = 132  # an H100 or H200; others are close enough for a grid that walks a list of items
ITEMS = 256  # splits times kv heads that fill the multiprocessors of one chip, twice over
MOST_SPLITS = 128
MOST_HEADS = 64  # query heads packed into a tile; a larger group takes several
OPTIONS = (
    "long_m", "long_n", "short_n", "short_stages", "shortest", "fine", "longest", "early", "programs",
    "combine_warps", "max_registers",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its grid, its compile-time constants and its compiler options."""

    grid: tuple[int, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a call launches. `combine` is None when no sequence can have two splits."""

    attend: Launch
    combine: Launch | None
    slots: int  # rows of short sequences that may have splits
    max_splits: int

    @property
    def rows(self) -> int:
        """Leading axis of the scratch arrays; 1 where they are not used."""
        return self.slots if self.combine else 1


def compiler_options(launch: Launch, capability: tuple[int, int] | None) -> dict[str, Any]:
    """Options beside warps and stages; `capability` is None off NVIDIA."""
    options: dict[str, Any] = {"enable_fp_fusion": True}  # aloud: triton 3.9 warns of the default, 3.10 changes it
    if capability is not None:
        # XLA assembles what Triton writes, with an assembler of its own that may be older than Triton's.
        options["ptx_version"] = 87 if capability < (10, 3) else 90
        if launch.max_registers is not None:
            options["maxnreg"] = launch.max_registers
    return options


def pow2(n: int) -> int:
    """The smallest power of two that is at least n.

    >>> [pow2(n) for n in (1, 3, 16, 80)]
    [1, 4, 16, 128]
    """
    return 1 << max(n - 1, 0).bit_length()


def make(signature: Signature, config: RaggedPageAttentionv2Config) -> Plan:
    """The plan of a call; every size is static, so one plan serves every layout of the signature.

    Raises:
        ValueError: an option that this kernel does not know.
    """
    unknown = sorted(set(dict(config.options)) - set(OPTIONS))
    if unknown:
        raise ValueError(
            f"config option {unknown[0]!r} is unknown to the triton backend; it knows {', '.join(OPTIONS)}"
        )
    shape = _shape(signature)
    tiles = _tiles(signature, config)
    split = _splitting(signature, config, tiles)
    options = _options(signature)
    has_splits = split["MAX_SPLITS"] > 1
    bound = _bound(signature, tiles, split)
    programs = min(bound, config.option("programs", 16 * MULTIPROCESSORS))
    attend = Launch(
        grid=(programs,),
        constants=shape | options | tiles | split | {
            "EARLY": config.option("early", 50), "CLEAR": 4096, "PROGRAMS": programs,
            "HAS_K_SCALE": signature.k_scale, "FUSED": _fused(signature),
            "SCALE": signature.softmax_scale, "CAP": signature.logits_soft_cap or 0.0,
            "COMPUTE": signature.compute_dtype, "P": signature.num_pages,
        },
        num_warps=config.num_warps or 4,
        num_stages=config.num_stages or 3,
        max_registers=config.option("max_registers", 0) or None,
    )  # fmt: skip
    combine = _combine(signature, config, shape | options, tiles, split) if has_splits else None
    slots = min(signature.num_tokens, signature.max_seqs * tiles["SHORT_Q"])
    return Plan(attend, combine, slots, split["MAX_SPLITS"])


def _shape(signature: Signature) -> dict[str, Any]:
    return {
        "T": signature.num_tokens, "HQ": signature.num_q_heads, "HKV": signature.num_kv_heads,
        "D": signature.head_dim, "D_PAD": max(16, pow2(signature.head_dim)),
        "PAGE": signature.page_size, "S": signature.max_seqs, "S_PAD": pow2(signature.max_seqs),
        "PAGES_PER_SEQ": signature.pages_per_seq, "WINDOW": signature.sliding_window or 0,
    }  # fmt: skip


def _options(signature: Signature) -> dict[str, Any]:
    return {"HAS_SINKS": signature.sinks, "HAS_V_SCALE": signature.v_scale, "WRITE_LSE": signature.return_lse}


def _fused(signature: Signature) -> bool:
    """A plain positive scale can be applied inside the exponent; with a negative one the maximum would turn."""
    return signature.logits_soft_cap is None and not signature.k_scale and signature.softmax_scale > 0


def _tiles(signature: Signature, config: RaggedPageAttentionv2Config) -> dict[str, Any]:
    """Tile shapes. A program without long tiles serves at most one query a sequence on average."""
    heads = min(signature.group, MOST_HEADS)
    short_m = max(16, pow2(heads))
    long_m = config.option("long_m", 0)
    if not long_m:
        long_m = pow2(config.num_queries_per_block * heads) if config.num_queries_per_block else 128
    long_m = max(long_m, short_m)
    pages = config.num_kv_pages_per_block
    block = max(16, pow2(pages * signature.page_size)) if pages else 64
    short_n, long_n = config.option("short_n", block), config.option("long_n", block)
    stages = config.num_stages or 3
    return {
        "HEADS": heads, "HEAD_GROUPS": signature.num_kv_heads * math.ceil(signature.group / heads),
        "SHORT_M": short_m, "SHORT_Q": short_m // heads, "SHORT_N": short_n,
        "SHORT_STAGES": config.option("short_stages", stages), "ALIGN": _alignment(signature.page_size, short_n),
        "HAS_LONG": signature.num_tokens > signature.max_seqs,
        "LONG_M": long_m, "LONG_Q": long_m // heads, "LONG_N": long_n, "LONG_STAGES": stages,
        "LONG_ALIGN": _alignment(signature.page_size, long_n),
    }  # fmt: skip


def _alignment(page: int, block: int) -> int:
    """What the first key of a tile is a multiple of, so that blocks lie in one page or consist of whole pages.

    >>> [_alignment(page, 64) for page in (16, 64, 128, 24)]
    [16, 64, 64, 1]
    """
    return min(page, block) if max(page, block) % min(page, block) == 0 else 1


def _splitting(signature: Signature, config: RaggedPageAttentionv2Config, tiles: dict[str, Any]) -> dict[str, Any]:
    """How the keys of short sequences are cut; from static shapes, unless the caller lets the batch decide."""
    keys = signature.capacity
    if signature.sliding_window is not None:
        keys = min(keys, signature.sliding_window + tiles["SHORT_Q"] + tiles["ALIGN"])
    shortest = max(config.option("shortest", 128), tiles["SHORT_N"])
    longest = max(config.option("longest", 8192), shortest)
    wanted = ITEMS * (1 if signature.head_dim > 64 else 2) // tiles["HEAD_GROUPS"]
    limit = config.num_kv_splits or MOST_SPLITS
    splits = limit
    if config.num_kv_splits is None and not signature.optimized:
        splits = max(1, min(limit, wanted // signature.max_seqs))
    fine = config.option("fine", 32)
    wished = max(min(math.ceil(keys / shortest), fine), keys // (4 * shortest))
    most = max(min(splits, wished), math.ceil(keys / longest))
    if keys <= 2 * shortest:  # a window, say: two splits would cost a launch and save nothing
        longest, splits, most = max(longest, 2 * shortest), 1, 1
    return {
        "SHORTEST": shortest, "FINE": fine, "LONGEST": longest, "SPLITS": splits, "MAX_SPLITS": most,
        "ITEMS": max(1, wanted) if signature.optimized and config.num_kv_splits is None else 0,
        "ROW_SLOTS": signature.num_tokens <= signature.max_seqs * tiles["SHORT_Q"],
    }  # fmt: skip


def _bound(signature: Signature, tiles: dict[str, Any], split: dict[str, Any]) -> int:
    """At least one program, at most one for each item that any layout of this signature could have."""
    rows, seqs = signature.num_tokens, signature.max_seqs
    short = seqs * split["MAX_SPLITS"]
    long = rows // (tiles["LONG_Q"] if tiles["HAS_LONG"] else tiles["SHORT_Q"]) + seqs
    clear = math.ceil(rows * signature.num_q_heads * signature.head_dim / 4096)
    return max(1, max((short + (long if tiles["HAS_LONG"] else 0)) * tiles["HEAD_GROUPS"], clear))


def _combine(signature, config, shared: dict[str, Any], tiles: dict[str, Any], split: dict[str, Any]) -> Launch:
    """One program a sequence and head, of one warp, so that no sum crosses warps; as many splits at once as fit."""
    keep = {name: tiles[name] for name in ("SHORT_Q", "SHORT_N", "ALIGN")}
    chunk = max(1, min(pow2(split["MAX_SPLITS"]), 4096 // shared["D_PAD"]))
    return Launch(
        grid=(signature.max_seqs, signature.num_q_heads),
        constants=shared | keep | split | {"CHUNK": chunk},
        num_warps=config.option("combine_warps", 1),
        num_stages=1,
    )
