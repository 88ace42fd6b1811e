"""The public function lowers to two launches of our kernels, through jax-triton, on a machine with no GPU."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from rpa import RaggedPageAttentionv2Config, ragged_page_attention_v2

pytestmark = [
    pytest.mark.cuda_plugin,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs the `gpu` extra: jax-triton and the CUDA plugin",
    ),
]


def lowered(kind: str = "NVIDIA H200", **options) -> str:
    """The StableHLO of a decode call of two sequences."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=axes, abstract_device=device)
    shapes = [((2, 8, 128), jnp.bfloat16), ((64, 16, 4, 128), jnp.bfloat16), ((2,), jnp.int32), ((2, 64), jnp.int32)]
    shapes += [((3,), jnp.int32), ((1,), jnp.int32)]
    specs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    call = jax.jit(lambda *arrays: ragged_page_attention_v2(*arrays, platform="triton", **options))
    check = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.export.export(call, platforms=["cuda"], disabled_checks=[check])(*specs).mlir_module()


def test_a_decode_is_one_launch_and_one_merge():
    assert lowered().count("stablehlo.custom_call @triton_kernel_call_ffi") == 2


def test_one_split_is_one_launch():
    config = RaggedPageAttentionv2Config(num_kv_splits=1)
    assert lowered(cfg=config, return_lse=True).count("stablehlo.custom_call @triton_kernel_call_ffi") == 1
