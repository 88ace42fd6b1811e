"""Measure the Triton kernel's own arithmetic on the GPU at hand: `python -m fuzz.adapters.triton_sweep`.

`fuzz.sweep` measures what XLA makes of a function; this runs Triton's `exp2`, the kernel's tanh, `log2`, the quotient
and the dots (both kinds of matrix instruction) with the same probes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import triton
import triton.language as tl

from fuzz import sweep
from rpa import device, numerics
from rpa.backends.triton import kernel, launch

_tanh = kernel._tanh
_COUNT = 1 << 24
_BLOCK = 1024


@triton.jit
def unary(x, y, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    """y = f(x), [n] f32 each."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)
    if WHICH == 0:
        value = tl.math.exp2(value)
    elif WHICH == 1:
        value = _tanh(value)
    else:
        value = 1.0 + tl.math.log2(value)
    tl.store(y + i, value)


@triton.jit
def quotient(a, b, y, BLOCK: tl.constexpr):
    """y = a * (1 / b) as the kernel divides, [n] f32 each."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(a + i) * (1.0 / tl.load(b + i)))


@triton.jit
def product(a, b, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """y [M, N] f32 = a [M, K] times the transpose of b [N, K]."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + n[:, None] * K + k[None, :])
    sums = tl.dot(left, tl.trans(right), input_precision="ieee")
    tl.store(y + m[:, None] * N + n[None, :], sums)


def _call(body: Any, shape: tuple[int, ...], programs: int, warps: int = 4, **arguments: Any) -> jax.Array:
    return launch.jax_triton().triton_call(
        kernel=body, out_type=jax.ShapeDtypeStruct(shape, np.float32), grid=(programs,), num_warps=warps,
        backend_options={"enable_fp_fusion": True}, **arguments,
    )  # fmt: skip


def _unary(which: int) -> Any:
    return lambda x: _call(unary, x.shape, x.size // _BLOCK, x=x, WHICH=which, BLOCK=_BLOCK)


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    return _call(quotient, a.shape, a.size // _BLOCK, a=a, b=b, BLOCK=_BLOCK)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: str) -> jax.Array:
    """[1, M, K] and [1, N, K] to [M, N]; 64 rows and more take Hopper's instruction for a group of warps."""
    del contract, dtype  # the arrays say both
    (_, rows, terms), columns = a.shape, b.shape[1]
    return _call(product, (rows, columns), 1, a=a[0], b=b[0], M=rows, N=columns, K=terms)


FUNCTIONS = (
    sweep.Function("exp by exp2", _unary(0), np.exp2, -150.0, 0.0),
    sweep.Function("tanh", _unary(1), np.tanh, -20.0, 20.0),
    # Near 1 the hardware's logarithm is right to 2**-22 absolutely, which is all that an lse asks of it.
    sweep.Function("log", _unary(2), lambda x: 1.0 + np.log2(x), 1.0, 3e38),
)


def figures() -> Iterator[sweep.Figure]:
    """Every figure of the current device."""
    for function in FUNCTIONS:
        yield sweep.function_figure(function, _COUNT)
    yield sweep.divide_figure(_COUNT, divide=divide)
    for dtype in sweep.OPERANDS:
        for terms in (16, 64, 128):
            for rows in (16, 64):
                yield sweep.dot_figure(dtype, terms, rows, (2, 2), dot=dot)


def main() -> int:
    """Print a table; exit 1 when a figure breaks what this device claims."""
    here = device.current()
    return sweep.tell(figures(), numerics.measured(here), f"{here.kind}, triton {triton.__version__}")


if __name__ == "__main__":
    sys.exit(main())
