"""The TPU kernel lowers to Mosaic on a machine with neither TPU nor libtpu."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from tpu_shapes import KINDS

from rpa import ragged_page_attention_v2


def export(chip: str, **options) -> str:
    """The StableHLO of a small call for a chip, through the public function."""
    kind = jax.sharding.AbstractDevice(device_kind=KINDS[chip], num_cores=1, platform="tpu")
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=axes, abstract_device=kind)
    shapes = [((16, 8, 128), jnp.bfloat16), ((64, 16, 4, 128), jnp.bfloat16), ((4,), jnp.int32), ((4, 5), jnp.int32)]
    shapes += [((5,), jnp.int32), ((1,), jnp.int32)]
    specs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    call = jax.jit(lambda *arrays: ragged_page_attention_v2(*arrays, platform="pallas", **options))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.export.export(call, platforms=["tpu"])(*specs).mlir_module()


@pytest.mark.parametrize("chip", ["v6e"])
def test_the_public_function_lowers_to_one_mosaic_call(chip):
    text = export(chip)
    assert text.count("@tpu_custom_call") == 1


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "tpu7x"])
def test_other_chips(chip):
    text = export(chip, sliding_window=20, logits_soft_cap=30.0, return_lse=True)
    assert text.count("@tpu_custom_call") == 1


def test_a_limit_that_nothing_fits_is_an_error_before_lowering():
    with pytest.raises(ValueError, match=r"vmem_limit_bytes is 0\.1 MiB"):
        export("v6e", vmem_limit_bytes=100_000)
