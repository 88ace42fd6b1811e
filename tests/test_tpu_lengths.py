"""Long and foreign lengths through the TPU interpreter, judged by the bound that the oracle computes.

The lengths are those of the tests of JAX's own `ragged_paged_attention` (which allow an error of 0.15 to 0.2), taken
as facts, with its blocks of 8 pages and 64 queries; the values are ours, NaN where nobody looks. All sixteen pass,
no length and no head cut; those timed on 2026-11-22 took 22 to 38 CPU seconds each.
"""

from __future__ import annotations

import numpy as np
import pytest
import tpu_interpret as tpu
from contract_cases import Shape, build

from oracle import judge
from oracle.poison import nan_fill


def drawn(seqs: int) -> list[tuple[int, int]]:
    """Lengths as the upstream tests with random lengths draw them."""
    random = np.random.default_rng(1234)
    queries = random.integers(1, 100, seqs)
    return [(int(q), int(q + more)) for q, more in zip(queries, random.integers(0, 50, seqs), strict=True)]


# (queries, context) a sequence.
DECODE = (18, 129, 597, 122, 64, 322, 463, 181, 1107, 123, 31, 18, 1229, 229, 87, 1328)
PREFILL = (5, 15, 120, 100, 21, 32, 251, 40, 64, 99, 10, 5, 3, 120, 9, 2)
MIXED = (5, 1, 120, 1, 1, 32, 251, 1, 1, 99, 1, 5, 3, 117, 1, 1)
LENGTHS = {
    "basic": [(192, 328), (128, 180), (64, 255)],
    "decode_only": [(1, context) for context in DECODE],
    "prefill_only": list(zip(PREFILL, DECODE, strict=True)),
    "mixed": list(zip(MIXED, DECODE, strict=True)),
    "complex_1": drawn(1),
    "complex_5": drawn(5),
    "complex_16": drawn(16),
}
HEADS = {"complex_1": (8, 1), "complex_5": (4, 4), "complex_16": (16, 2)}  # query and kv heads, as upstream pairs them
OPTIONS = {"complex_5": {"sliding_window": 128}, "complex_16": {"logits_soft_cap": 50.0}}


def case_of(name: str, dtype: str):
    lengths = LENGTHS[name]
    queries, contexts = zip(*lengths, strict=True)
    q_heads, kv_heads = HEADS.get(name, (4, 2))
    pages = sum(-(-context // 16) for context in contexts)
    shape = Shape(
        rows=sum(queries) + 3, seqs=len(lengths) + 1, pages_per_seq=-(-max(contexts) // 16), pages=pages + 2, page=16,
        q_heads=q_heads, kv_heads=kv_heads, head_dim=128,
    )  # fmt: skip
    return nan_fill(build(queries, contexts, shape, dtype=dtype, compute_dtype=dtype, **OPTIONS.get(name, {})))


def judged(case, **changes) -> None:
    cfg = tpu.config_of(case, **changes)
    output, lse = tpu.run(case, cfg=cfg)
    verdict = judge(case, output, tpu.claim_of(case), lse)
    assert verdict.status == "pass", verdict.text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LENGTHS)
def test_upstream_lengths(name, dtype):
    pages = min(8, 1 << (max(context for _, context in LENGTHS[name]) // 16).bit_length() - 1)
    judged(case_of(name, dtype), num_kv_pages_per_block=pages, num_queries_per_block=64)


@pytest.mark.slow
def test_upstream_heads():
    """The lengths of the basic test at its own 32 query and 8 kv heads, in blocks of 256 keys: two pieces each."""
    queries, contexts = zip(*LENGTHS["basic"], strict=True)
    shape = Shape(rows=512, seqs=8, pages_per_seq=21, pages=64, page=16, q_heads=32, kv_heads=8, head_dim=128)
    case = nan_fill(build(queries, contexts, shape, dtype="bfloat16", compute_dtype="bfloat16"))
    judged(case, num_kv_pages_per_block=16, num_queries_per_block=32)


@pytest.mark.slow
def test_context_past_int16_without_a_window():
    """Every key of a context that int16 positions cannot count, one row and several."""
    shape = Shape(4, 2, pages_per_seq=260, pages=270, page=128, head_dim=8)
    judged(nan_fill(build((2, 1), (33000, 40), shape)), num_kv_pages_per_block=2)
