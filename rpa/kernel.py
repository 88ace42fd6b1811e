"""Operations as objects: the shape in which code written against the seed expects them, over plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from rpa import select
from rpa.chain import Call
from rpa.device import current
from rpa.validate import is_traced


@dataclass(frozen=True)
class Invocation[Config, Output]:
    """One call of a kernel: its arguments, and how it is to be run."""

    op_id: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_axes: Mapping[str, int] | None = None
    override_cfg: Any | None = None
    stamp: bool = True
    method: str | None = None
    mesh: Any | None = None
    in_specs: Any | None = None
    out_specs: Any | None = None
    check_vma: bool = False

    @property
    def given(self) -> dict[Any, Any]:
        """Every argument, by its position or name."""
        return {**dict(enumerate(self.args)), **self.kwargs}

    @property
    def call_key(self) -> str:
        """The readable key: shapes and dtypes of arrays, values of what is no array and no float."""
        named = {str(name): value for name, value in self.given.items()}
        parts = [f"{name}={shown}" for name, value in sorted(named.items()) if (shown := _shown(value))]
        return " ".join([*parts, *([f"batch={dict(self.batch_axes)}"] if self.batch_axes else [])])

    def make_key(self, key_builder: Callable[[Invocation], str] | None = None) -> str:
        """The key that `key_builder` gives, or `call_key`."""
        return self.call_key if key_builder is None else key_builder(self)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _shown(value: Any) -> str:
    if _is_array(value):
        return f"{np.dtype(value.dtype).name}{list(value.shape)}".replace(" ", "")
    if value is None or isinstance(value, float) or callable(value):
        return ""  # a float is a value, like a scale; the best config does not hang on it
    return str(value)


class Kernel[Config, Output]:
    """An operation with configs: subclasses give `run` and `heuristic_cfg`, and may give more.

    `candidate_cfgs`, `run` and `heuristic_cfg` may have a variant for a chip, `candidate_cfgs_gpu` and so on, which
    then wins there. There is no backward pass.
    """

    op_id: str = ""
    version: str = "0"
    key_builder: Callable[[Invocation], str] | None = None

    def __init__(self, op_id: str | None = None) -> None:
        self.op_id = op_id or self.op_id or f"{type(self).__module__}.{type(self).__name__}"

    def prepare(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Change arguments before anything else sees them."""
        return args, kwargs

    def run(self, *args: Any, cfg: Any, **kwargs: Any) -> Any:
        """Compute on exactly this config."""
        raise NotImplementedError(f"{type(self).__name__} gives no run")

    def heuristic_cfg(self, inv: Invocation) -> Any:
        """A config that is right for every call."""
        raise NotImplementedError(f"{type(self).__name__} gives no heuristic_cfg")

    def candidate_cfgs(self, inv: Invocation) -> Iterable[Any]:
        """The configs worth timing."""
        return [self.heuristic_cfg(inv)]

    def create_shard_map_wrapper(self, *args: Any, **kwargs: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A function to run over a mesh, and the arguments to call it with."""
        raise NotImplementedError(f"{type(self).__name__} gives no create_shard_map_wrapper")

    def hook(self, name: str, chip: str) -> Callable[..., Any]:
        """The method of this name for a chip, or the general one."""
        return getattr(self, f"{name}_{chip}", None) or getattr(self, name)

    def call(self, inv: Invocation) -> Call:
        """An invocation as selection sees it."""
        return _Call(self, inv)


class _Call(Call):
    """A call of any kernel: its hooks name the configs, its arrays are what a tuner runs on."""

    def __init__(self, kernel: Kernel, inv: Invocation) -> None:
        self.kernel, self.inv, self.explicit = kernel, inv, inv.override_cfg
        self.arrays = {name: value for name, value in inv.given.items() if _is_array(value)}
        self.args = tuple(self.arrays.values())
        self.device = current(next((value for value in self.args if isinstance(value, jax.Array)), None))
        self.op, self.stem = f"{kernel.op_id}@{kernel.version}", inv.make_key(kernel.key_builder)

    def heuristic(self) -> Any:
        return self.kernel.hook("heuristic_cfg", self.device.platform)(self.inv)

    def candidates(self) -> list[Any]:
        return list(self.kernel.hook("candidate_cfgs", self.device.platform)(self.inv))

    def program(self, config: Any) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            full = self.inv.given | dict(zip(self.arrays, values, strict=True))
            args = [full.pop(i) for i in range(len(self.inv.args))]
            return self.kernel.hook("run", self.device.platform)(*args, cfg=config, **full)

        return run

    def untunable(self, tuner: Any, asked: bool) -> str | None:
        traced = any(map(is_traced, self.args))
        return "inside jit there is nothing to time: heuristics decide" if traced else super().untunable(tuner, asked)


class Executor[Config, Output]:
    """Selects a config for a kernel's call and runs it.

    Args:
        chooser: anything with `choose(invocation, kernel)`, as `ConfigSelectorChain` has.
        stamp_prefix: begins the scope under which the kernel stands in the lowered text's locations.
    """

    def __init__(self, chooser: Any = None, stamp_prefix: str = "rpa") -> None:
        self.chooser = chooser if chooser is not None else select.default_chain()
        self.stamp_prefix = stamp_prefix

    def __call__(
        self, kernel: Kernel, *args: Any, stamp: bool = True, method: str | None = None, mesh: Any | None = None,
        in_specs: Any | None = None, out_specs: Any | None = None, check_vma: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Run `kernel` on these arguments; with a mesh (or `method="shard_map"`), over it."""
        if method not in (None, "shard_map"):
            raise ValueError(f"method={method!r}: 'shard_map' or None is expected")
        over = {"mesh": mesh, "in_specs": in_specs, "out_specs": out_specs, "check_vma": check_vma}
        inv = _invocation(kernel, args, kwargs, stamp=stamp, method=method, **over)
        chosen = self.chooser.choose(inv, kernel)
        if method == "shard_map" or any(value is not None for value in (mesh, in_specs, out_specs)):
            fn, call_args, *callback = kernel.create_shard_map_wrapper(*inv.args, cfg=chosen, **over, **inv.kwargs)
            output = fn(*call_args)
            return callback[0](output) if callback else output
        scope = jax.named_scope(f"{self.stamp_prefix}#{kernel.op_id}@{kernel.version}") if stamp else nullcontext()
        with scope:
            return kernel.hook("run", current().platform)(*inv.args, cfg=chosen, **inv.kwargs)

    def choose_config(self, kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
        """The config a call would run on."""
        return self.chooser.choose(_invocation(kernel, args, kwargs), kernel)

    def compile(self, kernel: Kernel, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """A jitted function of the kernel's arrays on the config that these examples select."""
        chosen = self.choose_config(kernel, *args, **kwargs)
        fixed = {name: value for name, value in kwargs.items() if not _is_array(value) and name not in _OVERRIDES}
        return jax.jit(lambda *arrays, **named: self(kernel, *arrays, cfg=chosen, **{**fixed, **named}))


_OVERRIDES = ("_cfg", "cfg")  # the seed's name for the caller's own config, and ours


def _invocation(kernel: Kernel, args: Any, kwargs: dict[str, Any], **how: Any) -> Invocation:
    own = next((kwargs[name] for name in _OVERRIDES if kwargs.get(name) is not None), None)
    plain = {name: value for name, value in kwargs.items() if name not in _OVERRIDES}
    args, plain = kernel.prepare(*args, **plain)
    return Invocation(kernel.op_id, args, plain, override_cfg=own, **how)
