"""What must be rejected, and with which words: the argument, its value, the rule, the sequence."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpa import RaggedPageAttentionv2Config, ragged_page_attention_v2
from rpa import validate as rules
from rpa.signature import Inputs, Signature

NAN, INF = float("nan"), float("inf")


def arguments(**changes):
    """A legal call: two sequences, (2 of 3) and (1 of 6) tokens, page 4."""
    legal = {
        "queries": np.ones((4, 4, 8), np.float32),
        "kv_pages": np.ones((5, 4, 4, 8), np.float32),
        "context_lens": np.array([3, 6, 99], np.int32),
        "block_tables": np.array([[4, -1], [0, 2], [-7, 99]], np.int32),
        "query_start_loc": np.array([0, 2, 3, -5], np.int32),
        "num_seqs": 2,
    }
    return legal | changes


ILLEGAL = [
    # ranks, shapes, dtypes
    ({"queries": np.ones((4, 8), np.float32)}, ValueError, ["queries", "(4, 8)", "[T, Hq, D]"]),
    ({"queries": np.ones((4, 4, 8), np.int32)}, TypeError, ["queries", "int32", "bfloat16"]),
    ({"queries": np.ones((4, 4, 8), np.float64)}, TypeError, ["queries", "float64"]),
    ({"queries": None}, TypeError, ["queries"]),
    ({"queries": np.ones((4, 3, 8), np.float32)}, ValueError, ["3 heads", "2 kv heads"]),
    ({"kv_pages": np.ones((5, 4, 3, 8), np.float32)}, ValueError, ["kv_pages", "3 combined heads"]),
    ({"kv_pages": np.ones((5, 4, 4, 9), np.float32)}, ValueError, ["kv_pages", "9", "8"]),
    ({"kv_pages": np.ones((5, 4, 32), np.float32)}, ValueError, ["kv_pages", "(5, 4, 32)"]),
    ({"kv_pages": np.ones((5, 4, 4, 8), np.uint8)}, TypeError, ["kv_pages", "uint8", "int8"]),
    ({"kv_pages": np.ones((0, 4, 4, 8), np.float32)}, ValueError, ["kv_pages", "at least one page"]),
    ({"context_lens": np.ones((3, 1), np.int32)}, ValueError, ["context_lens", "(3, 1)", "[S]"]),
    ({"context_lens": np.ones(3, np.float32)}, TypeError, ["context_lens", "float32", "int32"]),
    ({"block_tables": np.zeros((2, 2), np.int32)}, ValueError, ["block_tables", "2 rows", "3"]),
    ({"block_tables": np.zeros((3, 0), np.int32)}, ValueError, ["block_tables", "(3, 0)"]),
    ({"block_tables": [[0], [0, 1], [2]]}, TypeError, ["block_tables", "rectangular"]),
    ({"query_start_loc": np.zeros(3, np.int32)}, ValueError, ["query_start_loc", "3 entries", "[4]"]),
    ({"context_lens": np.array([3, 2**40, 0])}, ValueError, ["context_lens", "int32"]),
    ({"num_seqs": 4}, ValueError, ["num_seqs=4", "0..3"]),
    ({"num_seqs": -1}, ValueError, ["num_seqs=-1"]),
    ({"num_seqs": np.array([1, 2], np.int32)}, ValueError, ["num_seqs", "(2,)"]),
    ({"num_seqs": 2.0}, TypeError, ["num_seqs=2.0"]),
    ({"num_seqs": True}, TypeError, ["num_seqs=True"]),
    ({"softmax_aux": np.ones(3, np.float32)}, ValueError, ["softmax_aux", "(3,)", "[4]"]),
    ({"softmax_aux": np.ones(4, np.int32)}, TypeError, ["softmax_aux", "int32"]),
    # options
    ({"softmax_scale": NAN}, ValueError, ["softmax_scale=nan", "finite"]),
    ({"softmax_scale": np.float32(INF)}, ValueError, ["softmax_scale=inf", "finite"]),
    ({"softmax_scale": "1"}, TypeError, ["softmax_scale='1'"]),
    ({"softmax_scale": True}, TypeError, ["softmax_scale=True"]),
    ({"softmax_scale": 1j}, TypeError, ["softmax_scale"]),
    ({"softmax_scale": np.ones(2)}, TypeError, ["softmax_scale"]),
    ({"logits_soft_cap": 0}, ValueError, ["logits_soft_cap=0", "positive"]),
    ({"logits_soft_cap": -5.0}, ValueError, ["logits_soft_cap=-5", "positive"]),
    ({"logits_soft_cap": NAN}, ValueError, ["logits_soft_cap=nan"]),
    ({"logits_soft_cap": jnp.float32(0)}, ValueError, ["logits_soft_cap=0"]),
    ({"sliding_window": 0}, ValueError, ["sliding_window=0", "positive"]),
    ({"sliding_window": np.int64(-3)}, ValueError, ["sliding_window=-3"]),
    ({"sliding_window": 4.0}, TypeError, ["sliding_window=4.0", "int"]),
    ({"sliding_window": (4, 0)}, TypeError, ["sliding_window=(4, 0)"]),
    ({"sliding_window": True}, TypeError, ["sliding_window=True"]),
    ({"mask_value": 0.0}, ValueError, ["mask_value=0", "-1e30"]),
    ({"mask_value": -INF}, ValueError, ["mask_value=-inf", "finite"]),
    ({"mask_value": NAN}, ValueError, ["mask_value=nan"]),
    ({"vmem_limit_bytes": 0}, ValueError, ["vmem_limit_bytes=0"]),
    ({"vmem_limit_bytes": 1e6}, TypeError, ["vmem_limit_bytes=1000000.0"]),
    ({"compute_dtype": np.float64}, TypeError, ["compute_dtype=float64", "bfloat16"]),
    ({"compute_dtype": jnp.int8}, TypeError, ["compute_dtype=int8"]),
    ({"compute_dtype": "half past ten"}, TypeError, ["compute_dtype='half past ten'"]),
    ({"optimized": 1}, TypeError, ["optimized=1"]),
    ({"return_lse": "yes"}, TypeError, ["return_lse='yes'"]),
    ({"validate": None}, TypeError, ["validate=None"]),
    ({"k_scale": NAN}, ValueError, ["k_scale", "finite"]),
    ({"v_scale": np.array([1.0, INF], np.float32)}, ValueError, ["v_scale", "finite"]),
    ({"k_scale": np.ones(3, np.float32)}, ValueError, ["k_scale", "(3,)", "[2]"]),
    ({"v_scale": "1"}, TypeError, ["v_scale='1'"]),
    ({"platform": "tritn"}, ValueError, ["platform='tritn'", "triton", "xla"]),
    ({"platform": 3}, TypeError, ["platform=3"]),
    ({"platform": "cuda"}, ValueError, ["platform='cuda'", "platform='xla'"]),
    ({"cfg": {"num_warps": 4}}, TypeError, ["cfg", "RaggedPageAttentionv2Config"]),
    # host metadata: the values
    ({"context_lens": np.array([3, 9, 0], np.int32)}, ValueError, ["context_lens[1]=9", "sequence 1", "0..8"]),
    ({"context_lens": np.array([-1, 6, 0], np.int32)}, ValueError, ["context_lens[0]=-1", "sequence 0"]),
    ({"query_start_loc": np.array([0, 3, 2, 0], np.int32)}, ValueError, ["query_start_loc[2]=2", "sequence 1", "3"]),
    ({"query_start_loc": np.array([0, 2, 5, 0], np.int32)}, ValueError, ["query_start_loc[2]=5", "0..4"]),
    ({"query_start_loc": np.array([-1, 2, 3, 0], np.int32)}, ValueError, ["query_start_loc[0]=-1", "sequence 0"]),
    ({"block_tables": np.array([[4, 0], [0, 5], [0, 0]], np.int32)}, ValueError,
     ["block_tables[1, 1]=5", "sequence 1", "0..4"]),
    ({"block_tables": np.array([[-1, 0], [0, 2], [0, 0]], np.int32)}, ValueError, ["block_tables[0, 0]=-1"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), ILLEGAL, ids=lambda value: str(value)[:50])
def test_illegal_argument_is_named(changes, error, words):
    with pytest.raises(error) as caught:
        ragged_page_attention_v2(**arguments(**changes))
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


DEVICE_ONLY = [entry for entry in ILLEGAL if set(entry[0]) <= {"context_lens", "query_start_loc", "block_tables"}
               and entry[1] is ValueError and "[" in entry[2][0]]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), DEVICE_ONLY, ids=lambda value: str(value)[:50])
def test_device_metadata_is_checked_on_request(changes, error, words):
    on_device = {name: jnp.asarray(value) for name, value in arguments(**changes).items()}
    with pytest.raises(error, match=words[0].replace("[", r"\[").replace("]", r"\]")):
        ragged_page_attention_v2(**on_device, validate=True)
    ragged_page_attention_v2(**on_device)  # unasked, the values are not waited for


LEGAL = [
    {"softmax_scale": 1},
    {"softmax_scale": np.float32(0.5)},
    {"softmax_scale": jnp.float32(0.5)},
    {"softmax_scale": jnp.bfloat16(0.5)},
    {"logits_soft_cap": 5},
    {"logits_soft_cap": np.array(5.0)},
    {"sliding_window": np.int32(3)},
    {"sliding_window": jnp.int32(3)},
    {"mask_value": -1e30},
    {"mask_value": -3e38},
    {"vmem_limit_bytes": 1 << 20},
    {"optimized": np.True_},
    {"num_seqs": np.int64(2)},
    {"num_seqs": np.array(2, np.int32)},
    {"num_seqs": np.array([2], np.int32)},
    {"num_seqs": jnp.array([2], jnp.int32)},
    {"context_lens": [3, 6, 0]},
    {"compute_dtype": "float32"},
    {"compute_dtype": jnp.float16},
    {"platform": "XLA"},
    {"cfg": RaggedPageAttentionv2Config()},
    {"k_scale": 2, "v_scale": np.float32(0.5)},
    {"k_scale": jnp.ones(2)},
]


@pytest.mark.parametrize("changes", LEGAL, ids=str)
def test_legal_argument_is_taken(changes):
    output = ragged_page_attention_v2(**arguments(**changes))
    assert output.shape == (4, 4, 8)
    assert output.dtype == np.float32
    assert np.isfinite(np.asarray(output)).all()


@pytest.mark.parametrize("name", ["softmax_scale", "logits_soft_cap", "sliding_window"])
def test_traced_option_is_refused(name):
    call = jax.jit(lambda value: ragged_page_attention_v2(**arguments(**{name: value})))
    with pytest.raises(TypeError, match=f"{name} is traced"):
        call(3)


def test_validate_inside_jit_is_refused():
    call = jax.jit(lambda lens: ragged_page_attention_v2(**arguments(context_lens=lens), validate=True))
    with pytest.raises(ValueError, match=r"validate=True: context_lens is traced"):
        call(np.array([3, 6, 0], np.int32))


def test_values_a_row_never_sees_are_not_checked():
    """Dead metadata rows and table entries may hold anything: `arguments()` is full of such garbage."""
    ragged_page_attention_v2(**arguments(), validate=True)
    entries = np.array([[4, -1], [-1, 2], [-7, 99]], np.int32)  # page 0 of sequence 1 lies before its window
    ragged_page_attention_v2(**arguments(block_tables=entries), sliding_window=2)


def test_nothing_to_do():
    """No rows and no sequences are answers, not errors."""
    assert ragged_page_attention_v2(**arguments(queries=np.ones((0, 4, 8), np.float32), num_seqs=0)).shape == (0, 4, 8)
    empty = {"context_lens": np.zeros(0, np.int32), "block_tables": np.zeros((0, 2), np.int32),
             "query_start_loc": np.zeros(1, np.int32), "num_seqs": 0}  # fmt: skip
    output, lse = ragged_page_attention_v2(**arguments(**empty), return_lse=True)
    assert not np.asarray(output).any()
    assert np.isneginf(np.asarray(lse)).all()


@pytest.mark.parametrize("few", [512, 0])
def test_the_quick_look_at_metadata_agrees_with_the_thorough_one(few, monkeypatch):
    """Both against the contract's words, a row and a key at a time, on random metadata of which half is wrong."""
    monkeypatch.setattr(rules, "_FEW", few)
    chance, found = np.random.default_rng(0), []
    for _ in range(1500):
        tokens, page, pages, seqs, columns = (int(chance.integers(1, top)) for top in (12, 5, 8, 5, 6))
        window = [None, int(chance.integers(1, page * columns + 1))][int(chance.integers(2))]
        window = None if window == page * columns else window
        signature = Signature(
            tokens, 2, 8, pages, page, 1, seqs, columns, "float32", "float32", "float32", sinks=False, k_scale=False,
            v_scale=False, return_lse=False, optimized=False, softmax_scale=1.0, logits_soft_cap=None,
            sliding_window=window, vmem_limit_bytes=None,
        )  # fmt: skip
        context = chance.integers(0, page * columns + 1, seqs, np.int32)
        offsets = np.sort(chance.integers(0, tokens + 1, seqs + 1, np.int32))
        tables = chance.integers(0, pages, (seqs, columns), np.int32)
        wrong = chance.random(tables.shape) < chance.choice([0, 0.2])
        tables[wrong] = chance.choice([-1, pages, 2**31 - 1, -(2**31)], wrong.sum())
        if chance.random() < 0.2:
            (context if chance.random() < 0.5 else offsets)[-1] = chance.choice([-1, 2**31 - 1])
        if chance.random() < 0.1:
            chance.shuffle(offsets)
        live = int(chance.integers(1, seqs + 1))
        count = np.array([live], np.int32)
        arrays: list[Any] = [None, None, context, tables, offsets, count]
        inputs = Inputs(*arrays)
        right = _legal(context[:live], offsets[: live + 1], tables, signature)
        found.append(right)
        assert rules.plainly_right(inputs, signature) == right
        words = "must (hold a length|lie) in|offsets must not decrease|reads this page"
        with nullcontext() if right else pytest.raises(ValueError, match=words):
            rules.check_metadata(inputs, signature, False)
    assert 300 < sum(found) < 1200


def _legal(context: np.ndarray, offsets: np.ndarray, tables: np.ndarray, signature: Signature) -> bool:
    starts = [0, *offsets.tolist(), signature.num_tokens]
    if any(later < earlier for earlier, later in pairwise(starts)):
        return False
    if any(not 0 <= length <= signature.capacity for length in context.tolist()):
        return False
    pages = [
        tables[s, key // signature.page_size]
        for s, (start, stop) in enumerate(pairwise(offsets.tolist()))
        for position in range(int(context[s]) - (stop - start), int(context[s]))
        for key in range(max(0, position - (signature.sliding_window or position + 1) + 1), position + 1)
    ]
    return all(0 <= page < signature.num_pages for page in pages)
