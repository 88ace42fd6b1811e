"""Compiles the Hopper kernel for an H200 on a machine without one, and prints what the assembler says of each kernel.

`python tests/mgpu_aot.py [CALL...]`: one JSON line a call, with launches, registers, bytes spilled and shared memory.
In a process of its own: the dump settings and the CUDA toolkit's place must stand before jax starts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    toolkit = Path(next(iter(importlib.util.find_spec("nvidia").submodule_search_locations))) / "cu13"
    os.environ["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={toolkit}"
    os.environ["PATH"] = f"{toolkit / 'bin'}:{os.environ['PATH']}"
    os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_RESOURCES": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from rpa.backends import pallas_gpu
from rpa.config import RaggedPageAttentionv2Config
from rpa.signature import Inputs, Signature

TARGET = Path(__file__).parent / "h200_target.txtpb"
# Tokens, sequences, query heads, kv heads, head size, page, window, cap, sinks; the pages' dtype if not the queries'.
CALLS = {
    "decode": (8, 8, 32, 8, 128, 16, None, None, False),
    "decode_few": (1, 1, 40, 8, 128, 16, None, None, False),  # groups of 5 in 16 columns, wide blocks
    "decode_wide": (64, 64, 28, 4, 128, 16, None, None, False),
    "decode_few_64": (1, 1, 64, 8, 64, 16, None, None, True),
    "prefill": (8192, 1, 32, 8, 128, 128, None, None, False),
    "prefill_several": (2048, 4, 32, 8, 128, 16, None, None, False),
    "prefill_256": (8192, 1, 16, 8, 256, 16, 4096, 50.0, False),
    "decode_window": (64, 64, 64, 8, 64, 16, 128, None, True),
    "prefill_window": (8192, 1, 64, 8, 64, 16, 128, None, True),
    "prefill_odd": (300, 1, 6, 2, 96, 32, None, None, False),  # an odd group, rows that are no whole eights
    "prefill_240": (1000, 1, 4, 2, 240, 8, None, None, True),  # queries' memory holds the padded rows on their way out
    "mixed_group_25": (3000, 128, 25, 1, 128, 16, None, None, False),  # 32 columns
    "mixed_odd": (1001, 130, 6, 2, 128, 16, None, None, False),
    "mixed": (4224, 130, 32, 8, 128, 16, None, None, False),
    "decode_e4m3": (8, 8, 32, 8, 128, 16, None, None, False, "float8_e4m3fn"),
    "prefill_e4m3": (8192, 1, 32, 8, 128, 16, None, None, False, "float8_e4m3fn"),
    "prefill_192_int8": (8192, 1, 16, 8, 192, 16, 4096, 50.0, False, "int8"),
    "mixed_e5m2": (4224, 130, 32, 8, 128, 16, None, None, False, "float8_e5m2"),
    "decode_int8": (64, 64, 64, 8, 64, 16, 128, None, True, "int8"),
}


def signature_of(name: str) -> Signature:
    tokens, sequences, heads, kv_heads, dim, page, window, cap, sinks, *stored = CALLS[name]
    return Signature(
        num_tokens=tokens, num_q_heads=heads, head_dim=dim, num_pages=60_000, page_size=page, num_kv_heads=kv_heads,
        max_seqs=sequences, pages_per_seq=16384 // page, q_dtype="bfloat16",
        kv_dtype=stored[0] if stored else "bfloat16",
        compute_dtype="bfloat16", sinks=sinks, k_scale=bool(stored), v_scale=bool(stored), return_lse=False,
        optimized=False, softmax_scale=dim**-0.5, logits_soft_cap=cap, sliding_window=window, vmem_limit_bytes=None,
    )  # fmt: skip


def arguments(s: Signature, sharding) -> list:
    shapes = [
        ((s.num_tokens, s.num_q_heads, s.head_dim), jnp.bfloat16),
        ((s.num_pages, s.page_size, 2 * s.num_kv_heads, s.head_dim), jnp.dtype(s.kv_dtype)),
        *(((n,), jnp.int32) for n in (s.max_seqs,)),
        ((s.max_seqs, s.pages_per_seq), jnp.int32),
        ((s.max_seqs + 1,), jnp.int32),
        ((1,), jnp.int32),
        ((s.num_q_heads,), jnp.float32) if s.sinks else None,
        *[((s.num_kv_heads,), jnp.float32)] * (2 * s.k_scale),
    ]
    return [None if x is None else jax.ShapeDtypeStruct(x[0], x[1], sharding=sharding) for x in shapes]


def compiled(name: str, sharding) -> dict:
    """Compiles one call; the native code prints to this process's own streams, so those are what is read."""
    s, config = signature_of(name), RaggedPageAttentionv2Config()
    run = jax.jit(lambda *args: pallas_gpu.run(Inputs(*args), s, config)[0])
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        try:
            program = run.lower(*arguments(s, sharding)).compile().as_text()
        finally:
            sys.stdout.flush()
            os.dup2(saved[0], 1), os.dup2(saved[1], 2)
        log.seek(0)
        text = log.read().decode(errors="replace")
    numbers = {
        "registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores",
        "shared": r"smem_scratch_bytes=(\d+)", "serialised": r"(wgmma\S* instructions are serialized)",
    }  # fmt: skip
    found = {key: re.findall(pattern, text) for key, pattern in numbers.items()}
    entry = program[program.index("ENTRY") :].splitlines()
    launches = sum(bool(re.match(r"\s*(ROOT )?%.* (fusion|custom-call|copy|sort|while)\(", line)) for line in entry)
    return {"call": name, "launches": launches} | {
        k: [int(x) if x.isdigit() else x for x in v] for k, v in found.items()
    }


if __name__ == "__main__":
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=TARGET.read_text()
    )
    where = jax.sharding.SingleDeviceSharding(topology.devices[0])
    for call in sys.argv[1:] or CALLS:
        print(json.dumps(compiled(call, where)), flush=True)
