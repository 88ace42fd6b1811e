"""The kernels on a CPU: Triton's interpreter over NumPy arrays, with checked memory and honest roundings.

Triton's interpreter executes a kernel's own source op by op, but takes PyTorch tensors, truncates where a GPU rounds
to nearest even, and reads whatever an address points to. This module feeds it NumPy arrays, replaces its
conversions and dots, and checks every address: a load or store outside its own array, or a load of output bytes that
nothing stored, is an error. Kernels run from source, so a patched copy (a mutant) runs the same way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter as ti

from rpa.backends.triton import plan as planning
from rpa.config import RaggedPageAttentionv2Config
from rpa.signature import Signature

SOURCE = Path(__file__).with_name("kernel.py")
TYPES = {
    "float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16, "int32": tl.int32, "int8": tl.int8,
    "float8_e4m3fn": tl.float8e4nv, "float8_e5m2": tl.float8e5,
}  # fmt: skip
_NARROW = {
    tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn, tl.float8e5: ml_dtypes.float8_e5m2,
}  # fmt: skip
_POISON = {"float32": np.nan, "float16": np.nan, "bfloat16": np.nan}


class OutOfBounds(RuntimeError):
    """A kernel addressed memory outside the array its pointer belongs to."""


@cache
def load(source: Path = SOURCE) -> types.ModuleType:
    """The kernels of a source file, as plain functions of the interpreter."""
    name = f"{__package__}.interpreted_{abs(hash(str(source)))}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    before, knobs.runtime.interpret = knobs.runtime.interpret, True
    try:
        spec.loader.exec_module(module)
    finally:
        knobs.runtime.interpret = before
    for key, value in list(vars(module).items()):
        if isinstance(value, ti.InterpretedFunction):
            function = value.rewrite()
            function.fn = function  # what the interpreter's scans ask of a combining function
            setattr(module, key, function)
    return module


@cache
def _library() -> dict[str, Any]:
    """Triton's own jitted functions (tl.zeros, tl.cumsum, ...) as functions of the interpreter."""
    names = [n for n in dir(tl) if isinstance(getattr(tl, n), triton.JITFunction)]
    return {n: ti.InterpretedFunction(getattr(tl, n).fn).rewrite() for n in names}


class Memory:
    """The arrays of one launch: where they lie, and which bytes of the outputs were written."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.begin = np.array([a.ctypes.data for a in arrays.values()], np.int64)
        self.end = self.begin + np.array([a.nbytes for a in arrays.values()], np.int64)

    def check(self, handle: Any, mask: np.ndarray, what: str) -> None:
        """Every address that the mask lets through lies inside one array."""
        at = np.broadcast_to(handle.data, np.broadcast_shapes(handle.data.shape, mask.shape))
        at = at[np.broadcast_to(mask, at.shape)].astype(np.int64)
        if at.size == 0:
            return
        width = max(1, handle.get_element_ty().primitive_bitwidth // 8)
        home = np.flatnonzero((self.begin <= at.flat[0]) & (at.flat[0] < self.end))
        if home.size == 0 or at.min() < self.begin[home[0]] or at.max() + width > self.end[home[0]]:
            raise OutOfBounds(f"{what} outside every array: {self._nearest(at)}")

    def _nearest(self, at: np.ndarray) -> str:
        name, array = min(self.arrays.items(), key=lambda kv: abs(kv[1].ctypes.data - int(at.flat[0])))
        first = (int(at.min()) - array.ctypes.data) // array.itemsize
        last = (int(at.max()) - array.ctypes.data) // array.itemsize
        return f"elements {first}..{last} of {name}, which has {array.size}"


def _numpy(handle: Any) -> np.ndarray:
    """A handle's values; narrow floats as ml_dtypes arrays."""
    narrow = _NARROW.get(handle.dtype.scalar)
    return handle.data if narrow is None else handle.data.view(narrow)


def _handle(values: np.ndarray, dtype: Any) -> Any:
    """Values rounded to nearest even into a Triton dtype."""
    scalar = dtype.scalar
    narrow = _NARROW.get(scalar)
    if narrow is None:
        return ti.TensorHandle(values.astype(ti._get_np_dtype(scalar)), scalar)
    bits = values.astype(np.float32).astype(narrow)
    return ti.TensorHandle(bits.view(ti._get_np_dtype(scalar)), scalar)


def _dot(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    """Products and sums in f32, as the matrix units do."""
    product = np.matmul(_numpy(a).astype(np.float32), _numpy(b).astype(np.float32))
    return ti.TensorHandle(product + d.data, d.dtype.scalar)


@contextlib.contextmanager
def _patched(memory: Memory) -> Iterator[None]:
    """The interpreter with checked memory and rounding conversions."""
    builder = ti.InterpreterBuilder
    raw_load, raw_store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self, ptrs, mask, other, *rest):
        memory.check(ptrs, mask.data, "load")
        return raw_load(self, ptrs, mask, other, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        memory.check(ptrs, mask.data, "store")
        return raw_store(self, ptrs, value, mask, *rest)

    def convert(self, src, dst_type, *rest):
        return _handle(_numpy(src), dst_type)

    changes = {"create_masked_load": checked_load, "create_masked_store": checked_store, "create_dot": _dot}
    changes |= {name: convert for name in ("create_fp_to_fp", "create_fp_trunc", "create_fp_ext", "create_si_to_fp")}
    before = {name: getattr(builder, name) for name in changes}
    library = _library()
    originals = {name: getattr(tl, name) for name in library}
    for name, value in changes.items():
        setattr(builder, name, value)
    for name, value in library.items():
        setattr(tl, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(builder, name, value)
        for name, value in originals.items():
            setattr(tl, name, value)


def execute(function: Any, launch: planning.Launch, arrays: dict[str, np.ndarray]) -> None:
    """Run a launch program by program; arrays are written in place."""
    arguments: dict[str, Any] = {name: value for name, value in launch.constants.items()}
    if "COMPUTE" in arguments:
        arguments["COMPUTE"] = TYPES[arguments["COMPUTE"]]
    for name, array in arrays.items():
        kind = tl.pointer_type(TYPES[array.dtype.name])
        arguments[name] = tl.tensor(ti.TensorHandle(np.array([array.ctypes.data], np.uint64), kind), kind)
    grid = (*launch.grid, 1, 1)[:3]
    with _patched(Memory(arrays)), np.errstate(all="ignore"):
        scopes = [ti._patch_lang(function), ti._patch_lang(_library()["zeros"])]
        # Triton 3.6 turns one-element arrays into ints as NumPy no longer does.
        scopes[-1].set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.reshape(())))
        try:
            ti.interpreter_builder.set_grid_dim(*grid)
            for index in np.ndindex(*grid):
                ti.interpreter_builder.set_grid_idx(*index)
                function(**arguments)
        finally:
            for scope in reversed(scopes):
                scope.restore()


def run(
    inputs: dict[str, np.ndarray],
    signature: Signature,
    config: RaggedPageAttentionv2Config,
    source: Path = SOURCE,
) -> tuple[np.ndarray, np.ndarray]:
    """Output [T, Hq, D] and lse [T, Hq] of one call, as the GPU launches would make them.

    `inputs` has the names of `rpa.signature.Inputs`, with NumPy arrays; outputs and scratch start as NaN.
    """
    from rpa.backends.triton.launch import bind, scratch

    module = load(source)
    plan = planning.make(signature, config)
    outputs = {name: np.full(shape, np.nan, dtype) for name, (shape, dtype) in scratch(signature, plan).items()}
    arrays = bind(inputs, outputs)
    attend = ("queries", "kv_pages", "context_lens", "block_tables", "query_start_loc", "num_seqs", "sinks", "k_scale",
              "v_scale", "output", "lse", "part_acc", "part_ml")  # fmt: skip
    execute(module.attend_kernel, plan.attend, {name: arrays[name] for name in attend})
    if plan.combine:
        combine = ("part_acc", "part_ml", "context_lens", "query_start_loc", "num_seqs", "sinks", "v_scale",
                   "output", "lse")  # fmt: skip
        execute(module.combine_kernel, plan.combine, {name: arrays[name] for name in combine})
    return arrays["output"], arrays["lse"]
