"""Moving over from ejkernel, JAX's kernel and vLLM: each line of the README's tables, tested.

A line of JAX's or vLLM's table is tested from both sides: their reference, called in their words, and our function,
called in ours, are judged by the oracle on one case; and without the line they would not agree.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import rpa
from oracle import Case, judge
from rpa import RaggedPageAttentionv2, RaggedPageAttentionv2Config, ragged_page_attention_v2

EJKERNEL, JAX, VLLM = "From ejkernel", "From JAX's", "From vLLM's"
T, HQ, HKV, D, PAGES, PAGE, SEQS = 12, 4, 2, 128, 12, 16, 3


def lines(name: str) -> list[str]:
    """The left cells of the table below `name` in the README."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert f"**{name}" in text, "the README has lost its section on moving over"
    table = text.split(f"**{name}")[1].split("\n\n")[1]
    return [row.split(" | ")[0].strip("| ") for row in table.splitlines()[2:]]


def arrays(seed: int = 0) -> dict:
    """A ragged batch in JAX's words; every page id is legal, as JAX's reference wants it."""
    rng = np.random.default_rng(seed)
    return {
        "q": rng.standard_normal((T, HQ, D), np.float32),
        "kv_pages": rng.standard_normal((PAGES, PAGE, 2 * HKV, D), np.float32),
        "kv_lens": np.array([40, 40, 24], np.int32),
        "page_indices": rng.permutation(PAGES)[:9].reshape(SEQS, 3).astype(np.int32),
        "cu_q_lens": np.array([0, 4, 8, 12], np.int32),
        "num_seqs": np.array([3], np.int32),
    }


HINTS = ("mask_value", "cfg", "vmem_limit_bytes")  # arguments of ours that change no answer


def agree(theirs: np.ndarray, call: dict) -> bool:
    """Whether their answer is right for the case that our words describe; our function must take those words."""
    taken = jax.eval_shape(partial(ragged_page_attention_v2, compute_dtype="float32", platform="xla", **call))
    case = Case(**{name: value for name, value in call.items() if name not in HINTS}, compute_dtype="float32")
    padded = np.zeros(taken.shape, taken.dtype)  # rows past the last sequence are 0
    padded[: len(theirs)] = theirs
    return judge(case, padded).ok


def program(*positional, **call) -> str:
    """What a call computes, as JAX writes it down: two calls with one program return the same bits."""
    return str(jax.make_jaxpr(partial(ragged_page_attention_v2, *positional, platform="xla", **call))())


def ours(call: dict) -> np.ndarray:
    return np.asarray(ragged_page_attention_v2(**call, compute_dtype=jnp.float32, platform="xla"))


# ----------------------------------------------------------------------------------------------------- JAX

JAX_NAMES = {
    "q": "queries",
    "kv_pages": "kv_pages",
    "kv_lens": "context_lens",
    "page_indices": "block_tables",
    "cu_q_lens": "query_start_loc",
    "num_seqs": "num_seqs",
    "sm_scale": "softmax_scale",
    "sliding_window": "sliding_window",
    "soft_cap": "logits_soft_cap",
    "k_scale": "k_scale",
    "v_scale": "v_scale",
    "mask_value": "mask_value",
}
JAX_CHANGES: dict[str, Callable[[dict], object]] = {
    "q": lambda call: call["q"] + 1,
    "kv_pages": lambda call: call["kv_pages"][::-1],
    "kv_lens": lambda call: call["kv_lens"][::-1],
    "page_indices": lambda call: call["page_indices"][::-1],
    "cu_q_lens": lambda call: np.array([0, 4, 4, 8], np.int32),
    "num_seqs": lambda call: np.array([2], np.int32),
    "sm_scale": lambda call: 0.3,
    "sliding_window": lambda call: 6,
    "soft_cap": lambda call: 2.0,
    "k_scale": lambda call: 1.5,
    "v_scale": lambda call: 0.5,
}


def jax_reference(call: dict) -> np.ndarray:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    named = {"queries" if name == "q" else name: value for name, value in call.items()}  # the kernel itself says q
    named = {name: value if np.ndim(value) == 0 else jnp.asarray(value) for name, value in named.items()}
    with jax.default_matmul_precision("highest"):
        return np.asarray(ref_ragged_paged_attention(**named))


def from_jax(call: dict) -> dict:
    return {JAX_NAMES[name]: value for name, value in {"sm_scale": 1.0, **call}.items()}


@pytest.mark.parametrize("name", JAX_CHANGES)
def test_a_line_of_jaxs_table(name):
    call = arrays() | {"sm_scale": 0.1}
    if name in ("k_scale", "v_scale"):
        call["kv_pages"] = (call["kv_pages"] * 8).astype(ml_dtypes.float8_e4m3fn)
        call |= {"k_scale": 0.125, "v_scale": 0.125}
    changed = call | {name: JAX_CHANGES[name](call)}
    theirs = jax_reference(changed)
    assert agree(theirs, from_jax(changed))
    assert not agree(theirs, from_jax(call)), "the line would not be missed"


def test_jaxs_default_scale_is_one():
    theirs = jax_reference(arrays())
    assert agree(theirs, from_jax(arrays()))
    assert not agree(theirs, from_jax(arrays()) | {"softmax_scale": None})


def test_jaxs_kernel_says_q_where_its_reference_says_queries():
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    taken = set(inspect.signature(ragged_paged_attention).parameters)
    assert set(JAX_NAMES) <= taken
    assert taken - set(JAX_NAMES) == {"num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes"}


def test_both_answer_jaxs_call():
    call = arrays() | {"sm_scale": 0.1}
    assert agree(jax_reference(call), from_jax(call))
    assert agree(ours(from_jax(call)), from_jax(call))


@pytest.mark.parametrize(
    "hint", [{"mask_value": -1e30}, {"vmem_limit_bytes": 64 << 20}], ids=lambda hint: next(iter(hint))
)
def test_jaxs_hints_are_taken_and_change_no_bit(hint):
    call = from_jax(arrays() | {"sm_scale": 0.1})
    assert program(**call) == program(**call, **hint)


def test_jaxs_block_sizes_are_fields_of_the_config():
    call = from_jax(arrays() | {"sm_scale": 0.1})
    config = RaggedPageAttentionv2Config(num_kv_pages_per_block=1, num_queries_per_block=4, platform="xla")
    assert "explicit" in str(rpa.explain(**call, cfg=config))
    assert agree(ours(call | {"cfg": config}), call)


def test_every_line_of_jaxs_table_is_tested():
    tested = {
        *(f"`{name}`" for name in {*JAX_CHANGES, "mask_value", "vmem_limit_bytes"} - {"sm_scale"}),
        "`sm_scale`, 1.0 by default",
        "`num_kv_pages_per_block`, `num_queries_per_block`",
    }
    assert set(lines(JAX)) == tested


# ---------------------------------------------------------------------------------------------------- vLLM


def vllm_reference(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal, window_size, block_table,
    softcap, k_descale=1.0, v_descale=1.0, sinks=None,
):  # fmt: skip
    """vLLM's operation in float64, from what its arguments mean."""
    assert causal
    group = q.shape[1] // k.shape[2]
    for s, n in enumerate(seqused_k):
        rows = slice(cu_seqlens_q[s], cu_seqlens_q[s + 1])
        keys, values = (x[block_table[s]].reshape(-1, *x.shape[2:])[:n].astype(np.float64) for x in (k, v))
        keys, values = (np.repeat(x, group, axis=1) for x in (keys * k_descale, values * v_descale))
        logits = softmax_scale * np.einsum("qhd,khd->hqk", q[rows].astype(np.float64), keys)
        logits = softcap * np.tanh(logits / softcap) if softcap > 0 else logits
        behind = np.arange(n - (rows.stop - rows.start), n)[:, None] - np.arange(n)
        logits[:, (behind < 0) | ((window_size[0] >= 0) & (behind > window_size[0]))] = -np.inf
        extra = 0.0 if sinks is None else np.exp(np.asarray(sinks, np.float64))[:, None, None]
        weights = np.exp(logits)
        out[rows] = np.einsum("hqk,khd->qhd", weights / (weights.sum(-1, keepdims=True) + extra), values)


VLLM_PLAIN = {
    "softmax_scale": 0.1,
    "causal": True,
    "window_size": (-1, -1),
    "softcap": 0,
    "max_seqlen_q": 4,
    "max_seqlen_k": 40,
}
VLLM_CHANGES: dict[str, tuple[str, Callable[[dict], object]]] = {
    "`q`": ("q", lambda call: call["q"] + 1),
    "`cu_seqlens_q`": ("cu_seqlens_q", lambda call: np.array([0, 3, 6, 12], np.int32)),
    "`seqused_k`": ("seqused_k", lambda call: call["seqused_k"] + 3),
    "`block_table`": ("block_table", lambda call: call["block_table"][::-1]),
    "`softmax_scale`": ("softmax_scale", lambda call: 0.3),
    "`window_size=(W - 1, 0)`, `(-1, -1)` for none": ("window_size", lambda call: (5, 0)),
    "`softcap`, 0 for none": ("softcap", lambda call: 2.0),
    "`sinks`": ("sinks", lambda call: np.array([1.0, -1.0, 3.0, 0.0], np.float32)),
    "`k_descale`": ("k_descale", lambda call: 1.5),
    "`v_descale`": ("v_descale", lambda call: 0.5),
}


def vllm_call(seed: int = 0) -> dict:
    jax_call = arrays(seed)
    return VLLM_PLAIN | {
        "q": jax_call["q"],
        "k": jax_call["kv_pages"][:, :, 0::2],
        "v": jax_call["kv_pages"][:, :, 1::2],
        "cu_seqlens_q": jax_call["cu_q_lens"],
        "seqused_k": jax_call["kv_lens"],
        "block_table": jax_call["page_indices"],
    }


def from_vllm(call: dict) -> dict:
    blocks, block, heads, dim = call["k"].shape
    left = call["window_size"][0]
    return {
        "queries": call["q"],
        "kv_pages": np.stack([call["k"], call["v"]], axis=3).reshape(blocks, block, 2 * heads, dim),
        "context_lens": call["seqused_k"],
        "block_tables": call["block_table"],
        "query_start_loc": call["cu_seqlens_q"],
        "num_seqs": len(call["seqused_k"]),
        "softmax_aux": call.get("sinks"),
        "softmax_scale": call["softmax_scale"],
        "sliding_window": None if left < 0 else left + 1,
        "logits_soft_cap": call["softcap"] or None,
        "k_scale": call.get("k_descale"),
        "v_scale": call.get("v_descale"),
    }


def vllm_answer(call: dict) -> np.ndarray:
    out = np.zeros_like(call["q"])
    vllm_reference(out=out, **call)
    return out


@pytest.mark.parametrize("line", VLLM_CHANGES)
def test_a_line_of_vllms_table(line):
    name, change = VLLM_CHANGES[line]
    call = vllm_call()
    if name in ("k_descale", "v_descale"):
        call |= {which: (call[which] * 8).astype(ml_dtypes.float8_e4m3fn) for which in "kv"}
        call |= {"k_descale": 0.125, "v_descale": 0.125}
    changed = call | {name: change(call)}
    assert agree(vllm_answer(changed), from_vllm(changed))
    assert not agree(vllm_answer(changed), from_vllm(call)), "the line would not be missed"


def test_vllms_separate_caches_interleave():
    call = vllm_call()
    assert agree(vllm_answer(call), from_vllm(call))
    blockwise = np.concatenate([call["k"], call["v"]], axis=2)
    assert not agree(vllm_answer(call), from_vllm(call) | {"kv_pages": blockwise})


def test_vllms_batch_is_as_long_as_its_lengths():
    call = vllm_call()
    fewer = call | {"seqused_k": call["seqused_k"][:2], "cu_seqlens_q": call["cu_seqlens_q"][:3]}
    fewer["block_table"] = call["block_table"][:2]
    assert from_vllm(fewer)["num_seqs"] == 2
    assert agree(vllm_answer(fewer), from_vllm(fewer))


def test_every_line_of_vllms_table_is_tested():
    others = {
        "`k`, `v`, each `[blocks, block, Hkv, D]`",
        "the length of `seqused_k`",
        "`out`",
        "`causal=True`, `max_seqlen_q`, `max_seqlen_k`",
    }
    assert set(lines(VLLM)) == {*VLLM_CHANGES, *others}


# ------------------------------------------------------------------------------------------------ ejkernel

POSITIONS = [
    "queries",
    "kv_pages",
    "context_lens",
    "block_tables",
    "query_start_loc",
    "num_seqs",
    "softmax_aux",
]
OPTIONS = {
    "softmax_scale": None, "logits_soft_cap": None, "compute_dtype": jnp.bfloat16, "optimized": False,
    "sliding_window": None, "mask_value": None, "vmem_limit_bytes": None, "platform": None, "cfg": None, "mesh": None,
    "in_specs": None, "out_specs": None,
}  # fmt: skip
METHODS = ["create_shard_map_wrapper", "get_impl", "run", "heuristic_cfg", "candidate_cfgs", "candidate_cfgs_gpu",
           "candidate_cfgs_tpu", "candidate_cfgs_shard_map_gpu", "candidate_cfgs_shard_map_tpu"]  # fmt: skip


def ejkernel_call() -> dict:
    return from_jax(arrays() | {"sm_scale": 0.1})


def test_ejkernels_names_order_and_defaults():
    parameters = inspect.signature(ragged_page_attention_v2).parameters
    assert list(parameters)[:7] == POSITIONS
    assert {name: parameters[name].default for name in OPTIONS} == OPTIONS
    assert parameters["softmax_aux"].default is None
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OPTIONS)


def test_arrays_by_position_or_by_name():
    call = ejkernel_call()
    seven = [call[name] for name in POSITIONS[:6]]
    assert program(*seven, softmax_scale=0.1) == program(**call)
    assert program(*seven, softmax_scale=0.2) != program(**call)


@pytest.mark.parametrize("number", [2, np.float32(2), np.array(2), np.int64(2)], ids=lambda n: type(n).__name__)
def test_scalars_of_any_kind(number):
    call = ejkernel_call()
    plain = program(**call | {"softmax_scale": 2.0, "logits_soft_cap": 2.0})
    assert program(**call | {"softmax_scale": number, "logits_soft_cap": number}) == plain
    assert program(**call | {"softmax_scale": number, "logits_soft_cap": 3.0}) != plain


def test_a_window_keeps_its_own_number_of_keys():
    """All values 0 but that of one key: a row sees it exactly when it is among its last `window` ones."""
    window = 17
    call = ejkernel_call() | {"sliding_window": window, "queries": np.zeros((T, HQ, D), np.float32)}
    pages = np.zeros((PAGES, PAGE, 2 * HKV, D), np.float32)
    key = 20  # the row at 36 sees it, the one at 37 no more
    pages[call["block_tables"][0, key // PAGE], key % PAGE, 1::2] = 1
    output = np.asarray(ragged_page_attention_v2(**call | {"kv_pages": pages}))
    positions = np.arange(36, 40)  # of sequence 0's four rows
    np.testing.assert_array_equal(output[:4, 0, 0] != 0, (positions >= key) & (positions < key + window))


def test_sinks_and_num_seqs_are_never_ignored():
    call = ejkernel_call() | {"softmax_aux": np.array([1.0, -1.0, 3.0, 0.0], np.float32), "num_seqs": 2}
    output = ours(call)
    assert agree(output, call)
    assert not agree(output, call | {"softmax_aux": None})
    assert not output[8:].any()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"EJKERNEL_AUTOTUNE_POLICY": "nonsense"}, "EJKERNEL_AUTOTUNE_POLICY"),
        ({"EJKERNEL_AUTOTUNE_POLICY": "nonsense", "RPA_AUTOTUNE_POLICY": "sometimes"}, "RPA_AUTOTUNE_POLICY"),
    ],
)
def test_the_policys_variable_is_read_and_ours_wins(monkeypatch, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    call = partial(ragged_page_attention_v2, **ejkernel_call() | {"softmax_scale": 0.1 + len(variables)})
    with pytest.raises(ValueError, match=f"^{named}="):
        jax.eval_shape(call)
    monkeypatch.setenv(named, "heuristics")
    assert jax.eval_shape(call).shape == (T, HQ, D)


def test_the_classes_have_the_same_methods_and_fields():
    assert all(callable(getattr(RaggedPageAttentionv2, name)) for name in METHODS)
    fields = {"num_kv_pages_per_block": 2, "num_queries_per_block": 8, "num_warps": 4, "num_stages": 1}
    config = RaggedPageAttentionv2Config(**fields, platform="xla", backend="any")
    assert RaggedPageAttentionv2Config.from_json(config.to_json()) == config
    assert fields.items() <= config.to_dict().items()
    with pytest.raises(AttributeError):
        config.num_warps = 8  # pyright: ignore[reportAttributeAccessIssue]


def test_every_line_of_ejkernels_table_is_tested():
    told = " ".join(lines(EJKERNEL))
    for name in (
        "position",
        "softmax_scale",
        "sliding_window",
        "softmax_aux",
        "num_seqs",
        "EJKERNEL_AUTOTUNE_POLICY",
    ):
        assert re.search(name, told), name
    assert len(lines(EJKERNEL)) == 7
