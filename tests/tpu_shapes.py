"""Shapes the TPU kernel is compiled for ahead of time: serving models, and what others refuse."""

from __future__ import annotations

from typing import Any

from rpa.signature import Signature

# What JAX calls each chip, and the smallest topology that has one.
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}

# Differences from Llama-3-8B heads on pages of 16.
SHAPES: dict[str, dict[str, Any]] = {
    "llama_page16": {},
    "llama_page32": {"page_size": 32, "pages_per_seq": 256},
    "llama_page128": {"page_size": 128, "pages_per_seq": 64},
    "llama_131072_tokens": {"pages_per_seq": 8192, "max_seqs": 256, "num_tokens": 2048},
    "llama_in_6_mib": {"vmem_limit_bytes": 6 << 20},
    "llama_lse_sinks": {"return_lse": True, "sinks": True},
    "page1": {"page_size": 1, "pages_per_seq": 2048},
    "page8": {"page_size": 8},
    "page48": {"page_size": 48},
    "page256": {"page_size": 256, "pages_per_seq": 32},
    "gpt_oss_d64": {"num_q_heads": 64, "head_dim": 64, "sinks": True, "sliding_window": 128},
    "d80": {"head_dim": 80},
    "d96": {"head_dim": 96},
    "d192": {"head_dim": 192, "num_kv_heads": 4},
    "gemma_d256": {
        "num_q_heads": 16, "head_dim": 256, "page_size": 32, "logits_soft_cap": 50.0, "sliding_window": 4096,
    },
    "mqa_16": {"num_q_heads": 16, "num_kv_heads": 1},
    "qwen_28_2": {"num_q_heads": 28, "num_kv_heads": 2},
    "heads_9_3": {"num_q_heads": 9, "num_kv_heads": 3},
    "heads_15_5": {"num_q_heads": 15, "num_kv_heads": 5},
    "heads_32_16": {"num_kv_heads": 16},
    "mha_16": {"num_q_heads": 16, "num_kv_heads": 16},
    "f32": {"q_dtype": "float32", "kv_dtype": "float32", "compute_dtype": "float32"},
    "f32_in_bf16": {"q_dtype": "float32", "kv_dtype": "float32"},
    "bf16_in_f32": {"compute_dtype": "float32"},
    "f16": {"q_dtype": "float16", "kv_dtype": "float16"},
    "f16_in_f32": {"q_dtype": "float16", "kv_dtype": "float16", "compute_dtype": "float32"},
    "f32_in_f16": {"q_dtype": "float32", "kv_dtype": "float32", "compute_dtype": "float16"},
    "fp8_e4m3": {"kv_dtype": "float8_e4m3fn", "k_scale": True, "v_scale": True, "page_size": 32},
    "fp8_e5m2": {"kv_dtype": "float8_e5m2", "k_scale": True, "v_scale": True, "page_size": 32},
    "int8": {"kv_dtype": "int8", "k_scale": True, "v_scale": True, "page_size": 32},
    "fp8_heads_9_3": {
        "kv_dtype": "float8_e4m3fn", "k_scale": True, "v_scale": True, "num_q_heads": 9, "num_kv_heads": 3,
    },
    "tiny": {
        "num_tokens": 8, "max_seqs": 4, "pages_per_seq": 3, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "page_size": 4,
    },
}  # fmt: skip
# What each chip compiles in the long run; v6e takes all of them, two more all but those like another.
_LIKE_ANOTHER = {"llama_in_6_mib", "page8", "d80", "mha_16", "heads_15_5", "bf16_in_f32", "fp8_e5m2"}
_MOST = tuple(shape for shape in SHAPES if shape not in _LIKE_ANOTHER)
MATRIX: dict[str, tuple[str, ...]] = {
    "v6e": tuple(SHAPES),
    "v5e": _MOST,
    "tpu7x": _MOST,
    "v5p": ("llama_page16", "gpt_oss_d64", "fp8_e4m3", "d80"),
    "v4": ("llama_page16", "gpt_oss_d64", "fp8_e4m3", "heads_15_5"),
}


def signature(name: str, **changes: Any) -> Signature:
    """The static part of a call of one of the shapes."""
    values: dict[str, Any] = {
        "num_tokens": 512, "num_q_heads": 32, "head_dim": 128, "num_pages": 4096, "page_size": 16, "num_kv_heads": 8,
        "max_seqs": 64, "pages_per_seq": 512, "q_dtype": "bfloat16", "kv_dtype": "bfloat16",
        "compute_dtype": "bfloat16", "sinks": False, "k_scale": False, "v_scale": False, "return_lse": False,
        "optimized": False, "logits_soft_cap": None, "sliding_window": None, "vmem_limit_bytes": None,
    }  # fmt: skip
    values |= SHAPES[name] | changes
    return Signature(**values, softmax_scale=values["head_dim"] ** -0.5)
