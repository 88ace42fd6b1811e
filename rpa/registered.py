"""Kernels as callables: the public registry, kernels that a caller adds, and platform detection."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from rpa import api, numerics, registry
from rpa.config import Backend, Platform, RaggedPageAttentionv2Config
from rpa.device import Device, current
from rpa.program import compiled
from rpa.registry import ALGORITHM, Implementation, Slot, load
from rpa.signature import Inputs, Signature

# What tunes a kernel and does not change its answer: two kernels may differ in these.
_TUNING = ("num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes", "num_warps", "num_stages")
_LATER = ("return_lse", "k_scale", "v_scale")  # not the seed's; a call that needs them is refused without
_FACTS = ("supports", "heuristic", "candidates", "claim")


@dataclass(frozen=True)
class KernelSpec:
    """One registered kernel: a callable that takes the operation's keyword arguments."""

    platform: Platform
    backend: Backend
    algorithm: str
    implementation: Callable[..., Any]
    priority: int = 0
    slot: Slot | None = None  # where a kernel of our operation stands


@functools.cache
def _builtin(slot: Slot) -> KernelSpec:
    """A backend as a callable with the seed's keywords: it runs on exactly these block sizes."""

    @api.taking(
        "queries kv_pages context_lens block_tables query_start_loc num_seqs softmax_scale logits_soft_cap "
        "compute_dtype optimized sliding_window softmax_aux mask_value num_kv_pages_per_block num_queries_per_block "
        "vmem_limit_bytes num_warps num_stages return_lse k_scale v_scale"
    )
    def kernel(**call: Any) -> Any:
        arrays, options = (tuple(map(call.pop, kind._fields)) for kind in (Inputs, api.Options))
        inputs, signature = api.prepare(arrays, options, False)
        device = current(inputs.queries)
        if registry.why_not(slot, signature, device) is not None:
            raise ValueError(registry.refusal(slot.platform, signature, device))
        config = RaggedPageAttentionv2Config(platform=slot.platform, **call)
        output, lse = compiled(load(slot.name), signature, config, device)(inputs)
        return (output, lse) if signature.return_lse else output

    chip = Backend.ANY if len(slot.chips) > 1 else Backend(*slot.chips)
    return KernelSpec(Platform(slot.platform), chip, ALGORITHM, kernel, slot.priority, slot)


class KernelRegistry:
    """Kernels by algorithm, platform and chip; the built-in ones are there from the start."""

    def __init__(self) -> None:
        self._added: list[KernelSpec] = []
        self._lock = threading.Lock()

    def register(
        self, algorithm: str, platform: str, backend: str, priority: int = 0, **facts: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A decorator that adds a kernel; under our operation's name, calls of that platform can then reach it.

        Args:
            platform, backend: a `Platform` and a `Backend`, or their names in any case.
            priority: higher is preferred; among equals the built-in kernels, then the order of registration.
            facts: `supports`, `heuristic`, `candidates`, `claim`, as in `Implementation`, where the kernel has them.

        Raises:
            ValueError, TypeError: an unknown platform, backend or fact; the text lists the known ones.
        """
        unknown = sorted(set(facts) - set(_FACTS))
        if unknown:
            raise TypeError(f"register: {unknown[0]!r} is unknown; one of {', '.join(_FACTS)} is expected")
        where = _member(Platform, "platform", platform), _member(Backend, "backend", backend)
        name = algorithm.lower()

        def add(kernel: Callable[..., Any]) -> Callable[..., Any]:
            slot = _slot_of(kernel, *where, priority, facts) if name == ALGORITHM else None
            self._replace(lambda specs: [*specs, KernelSpec(*where, name, kernel, priority, slot)])
            return kernel

        return add

    def unregister(self, kernel: Callable[..., Any]) -> None:
        """Take a registered kernel out again, wherever it stands."""
        self._replace(lambda specs: [spec for spec in specs if spec.implementation is not kernel])

    def _replace(self, change: Callable[[list[KernelSpec]], list[KernelSpec]]) -> None:
        with self._lock:
            self._added = change(self._added)
            registry.added = tuple(spec.slot for spec in self._added if spec.slot is not None)

    def get(self, algorithm: str, platform: str | None = None, backend: str | None = None) -> Callable[..., Any]:
        """The preferred kernel for a platform and a chip; without a backend, for the chip JAX runs on.

        Raises:
            ValueError: none matches; the text lists those there are.
        """
        specs = self.list_implementations(algorithm)
        wanted = None if platform in (None, "auto") else _member(Platform, "platform", platform)
        chip = Backend.ANY if backend is None else _member(Backend, "backend", backend)
        chip = Backend(current().platform) if chip is Backend.ANY else chip
        for spec in specs:
            if wanted in (None, spec.platform) and spec.backend in (Backend.ANY, chip):
                return spec.implementation
        known = ", ".join(f"{spec.platform}/{spec.backend}" for spec in specs) or "none"
        raise ValueError(f"{algorithm=} has no kernel for {platform=} on {chip}; there are: {known}")

    def list_algorithms(self) -> list[str]:
        return sorted({ALGORITHM, *(spec.algorithm for spec in self._added)})

    def list_implementations(self, algorithm: str) -> list[KernelSpec]:
        """The kernels of an algorithm, highest priority first."""
        specs = (*map(_builtin, registry.SLOTS), *self._added)
        return sorted((spec for spec in specs if spec.algorithm == algorithm.lower()), key=lambda spec: -spec.priority)

    def validate_signatures(self, algorithm: str | None = None, verbose: bool = False) -> bool:
        """Whether an algorithm's kernels (all algorithms' without a name) agree in names, kinds and defaults.

        Tuning parameters may differ, and what the seed's kernels do not know may be missing. A difference is a
        warning that names the kernel and the parameter.
        """
        if algorithm is None:
            return all([self.validate_signatures(name, verbose) for name in self.list_algorithms()])
        specs = self.list_implementations(algorithm)
        differences = [text for spec in specs[1:] for text in _differences(specs[0], spec)]
        for text in differences:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        if verbose:
            print(f"{algorithm}: {len(specs)} kernels, {len(differences)} differences")
        return not differences


def _member(enum: Any, name: str, value: Any) -> Any:
    if isinstance(value, str) and value.lower() in list(enum):
        return enum(value.lower())
    raise ValueError(f"{name}={value!r}: one of {', '.join(enum)} is expected")


def _differences(first: KernelSpec, other: KernelSpec) -> list[str]:
    ours, theirs = (
        {p.name: f"{p.kind.description} {p}" for p in inspect.signature(spec.implementation).parameters.values()}
        for spec in (first, other)
    )
    where = f"{other.algorithm} on {other.platform}/{other.backend}"
    return [
        f"{where}: parameter {name!r} is {theirs.get(name, 'missing')}, and {ours.get(name, 'missing')} in "
        f"{first.platform}/{first.backend}"
        for name in {**ours, **theirs}
        if name not in _TUNING and ours.get(name) != theirs.get(name)
        if not (name in _LATER and None in (ours.get(name), theirs.get(name)))
    ]


# ------------------------------------------------------------------ a registered callable as a backend


def _slot_of(
    kernel: Callable[..., Any], platform: Platform, backend: Backend, priority: int, facts: dict[str, Any]
) -> Slot:
    name = f"{kernel.__module__}.{getattr(kernel, '__qualname__', type(kernel).__name__)}"
    parameters = inspect.signature(kernel).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def run(inputs: Inputs, signature: Signature, config: RaggedPageAttentionv2Config) -> tuple[Any, Any]:
        offered = _keywords(inputs, signature, config)
        result = kernel(**{option: value for option, value in offered.items() if takes_all or option in parameters})
        return result if signature.return_lse else (result, None)

    def supports(signature: Signature, device: Device) -> str | None:
        lacking = [option for option in _used(signature) if not (takes_all or option in parameters)]
        return f"it takes no {lacking[0]}" if lacking else facts.get("supports", lambda *_: None)(signature, device)

    defaults = {
        "heuristic": lambda signature, device: RaggedPageAttentionv2Config(platform=platform),
        "candidates": lambda signature, device: (),
        "claim": _default_claim,
    }
    value = Implementation(name, run, **{**defaults, **facts, "supports": supports})
    chips = ("cpu", "gpu", "tpu", "mps") if backend is Backend.ANY else (str(backend),)
    return Slot(name, str(platform), chips, kernel.__module__, priority, value)


def _default_claim(signature: Signature, device: Device) -> dict[str, Any]:
    """What is held against a kernel that claims nothing: operands, scaled query and weights rounded once."""
    return numerics.claim(signature, device, block=1, u_q=numerics.ROUNDOFF[signature.compute_dtype])


def _keywords(inputs: Inputs, signature: Signature, config: RaggedPageAttentionv2Config) -> dict[str, Any]:
    """A validated call as keyword arguments again."""
    sizes = {name: getattr(config, name) for name in _TUNING if name != "vmem_limit_bytes"}
    options = {name: getattr(signature, name, None) for name in api.Options._fields}
    return inputs._asdict() | options | sizes | {"compute_dtype": jnp.dtype(signature.compute_dtype)}


def _used(signature: Signature) -> list[str]:
    """The options whose absence from a kernel's parameters would change the answer."""
    used = {
        "softmax_aux": signature.sinks,
        "logits_soft_cap": signature.logits_soft_cap is not None,
        "sliding_window": signature.sliding_window is not None,
        "softmax_scale": signature.softmax_scale != float(signature.head_dim) ** -0.5,
        **{name: getattr(signature, name) for name in ("k_scale", "v_scale", "return_lse")},
    }
    return [option for option, is_used in used.items() if is_used]


# ------------------------------------------------------------------ detection


def detect_platform(algorithm: str = ALGORITHM, platform: str | None = "auto") -> Platform:
    """The platform a call would take on this machine: the one asked for, or the first whose kernel can run here.

    Raises:
        ValueError: there is no such kernel for JAX's default device; the text lists what there is.
    """
    if platform not in (None, "auto"):
        kernel_registry.get(algorithm, platform)
        return Platform(str(platform).lower())
    device = current()
    if algorithm.lower() == ALGORITHM:
        return Platform(registry.able("auto", registry.TYPICAL, device)[0].platform)
    kernel = kernel_registry.get(algorithm, backend=device.platform)
    return next(s.platform for s in kernel_registry.list_implementations(algorithm) if s.implementation is kernel)


kernel_registry = KernelRegistry()
