"""Measure the Hopper kernel's own arithmetic on the GPU at hand: `python -m fuzz.adapters.mosaic_sweep`.

Mosaic GPU turns `exp2`, `tanh` and `log2` into the hardware's approximations here; `fuzz.sweep` measures XLA's. The
dots are the matrix instruction that `fuzz.adapters.triton_sweep` measures with tiles of 64 rows.
"""

# Pallas refs are typed for its own use, not for callers.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fuzz import sweep
from rpa import device, numerics
from rpa.backends import pallas_gpu

_COUNT = 1 << 24
_BLOCK = 1024
_CTAS = 128


def elementwise(function: Callable[..., Any]) -> Callable[..., jax.Array]:
    """`function` of f32 `[n]` arrays, `n` a multiple of 1,024, evaluated by Mosaic GPU as the kernel is compiled."""

    def body(*refs: Any) -> None:
        *inputs, output = refs
        blocks = output.shape[0] // _BLOCK

        @pl.loop(0, pl.cdiv(blocks, _CTAS))
        def _(step):
            start = jnp.minimum(step * _CTAS + lax.axis_index("cta"), blocks - 1) * _BLOCK
            part = pl.ds(start, _BLOCK)
            layout = plgpu.Layout.WG_STRIDED((_BLOCK,), vec_size=4)
            output[part] = function(*(plgpu.load(x.at[part], layout=layout, optimized=False) for x in inputs))

    def call(*arrays: jax.Array) -> jax.Array:
        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32),
            grid=(_CTAS,),
            grid_names=("cta",),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name="rpa_sweep",
        )(*arrays)

    return call


FUNCTIONS = (
    sweep.Function("exp by exp2", elementwise(jnp.exp2), np.exp2, -150.0, 0.0),
    sweep.Function("tanh", elementwise(jnp.tanh), np.tanh, -20.0, 20.0),
    # Near 1 the hardware's logarithm is right to 2**-22 absolutely, which is all that an lse asks of it.
    sweep.Function("log", elementwise(lambda x: jnp.log2(x) + 1.0), lambda x: np.log2(x) + 1.0, 1.0, 3e38),
)


def figures() -> Iterator[sweep.Figure]:
    """Every figure of the current device."""
    for function in FUNCTIONS:
        yield sweep.function_figure(function, _COUNT)
    yield sweep.divide_figure(_COUNT, divide=elementwise(lambda a, b: a * (1.0 / b)))


def main() -> int:
    """Print a table; exit 1 when a figure breaks what this device claims."""
    here = device.current()
    claimed = replace(numerics.measured(here), eps_tanh=pallas_gpu.EPS_TANH)
    return sweep.tell(figures(), claimed, f"{here.kind}, jax {jax.__version__}")


if __name__ == "__main__":
    sys.exit(main())
