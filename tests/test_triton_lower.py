"""The public function compiles to two launches of our kernels and nothing else, through jax-triton, with no GPU."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from rpa import RaggedPageAttentionv2Config, ragged_page_attention_v2

pytestmark = [
    pytest.mark.cuda_plugin,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs the `gpu` extra: jax-triton and the CUDA plugin",
    ),
]
TARGET = Path(__file__).parent / "h200_target.txtpb"


def instructions(kind: str = "NVIDIA H200", **options) -> list[str]:
    """What XLA runs on the chip for a decode call of two sequences, assembled by its own ptxas: the opcodes."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=TARGET.read_text()
    )
    where = jax.sharding.SingleDeviceSharding(topology.devices[0])
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=axes, abstract_device=device)
    shapes = [((2, 8, 128), jnp.bfloat16), ((64, 16, 4, 128), jnp.bfloat16), ((2,), jnp.int32), ((2, 64), jnp.int32)]
    shapes += [((3,), jnp.int32), ((1,), jnp.int32)]
    specs = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
    call = jax.jit(lambda *arrays: ragged_page_attention_v2(*arrays, platform="triton", **options))
    with jax.sharding.use_abstract_mesh(mesh):
        program = call.trace(*specs).lower(lowering_platforms=("cuda",))
    text = program.compile().as_text() or ""
    found = re.findall(r" = (?:\(.*?\)|\S+) ([\w-]+)\(", text[text.index("ENTRY") :])
    free = ("parameter", "get-tuple-element", "bitcast", "constant", "tuple")
    return [opcode for opcode in found if opcode not in free]


def test_a_decode_is_one_launch_and_one_merge():
    assert instructions() == ["custom-call", "custom-call"]


def test_one_split_is_one_launch():
    config = RaggedPageAttentionv2Config(num_kv_splits=1)
    assert instructions(cfg=config, return_lse=True) == ["custom-call"]
