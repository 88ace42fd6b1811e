"""The kernels by platform and chip: ours, imported when first asked for, and those that callers add."""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from rpa import numerics
from rpa.arguments import Options, prepare, taking
from rpa.config import Backend, Platform, RaggedPageAttentionv2Config
from rpa.device import Device, current
from rpa.program import Implementation, compiled
from rpa.signature import Inputs, Signature

ALGORITHM = "ragged_page_attention_v2"

# What tunes a kernel and does not change its answer: two kernels may differ in these.
_TUNING = ("num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes", "num_warps", "num_stages")
_LATER = ("return_lse", "k_scale", "v_scale")  # not the seed's; a call that needs them is refused without
_FACTS = ("supports", "heuristic", "candidates", "claim")


@dataclass(frozen=True)
class KernelSpec:
    """One kernel: where it runs, and a callable that takes the operation's keyword arguments."""

    platform: Platform
    backend: Backend
    algorithm: str
    implementation: Callable[..., Any]
    priority: int = 0
    name: str = ""
    value: Implementation | None = None  # what selection runs; None where a module holds it

    @property
    def chips(self) -> tuple[str, ...]:
        return ("cpu", "gpu", "tpu") if self.backend is Backend.ANY else (str(self.backend),)


def _built_in(name: str, platform: Platform, backend: Backend) -> KernelSpec:
    """One of our backends, as a callable with the seed's keywords that runs on exactly these block sizes."""

    @taking(
        "queries kv_pages context_lens block_tables query_start_loc num_seqs softmax_scale logits_soft_cap "
        "compute_dtype optimized sliding_window softmax_aux mask_value num_kv_pages_per_block num_queries_per_block "
        "vmem_limit_bytes num_warps num_stages return_lse k_scale v_scale"
    )
    def kernel(**call: Any) -> Any:
        arrays, options = (tuple(map(call.pop, kind._fields)) for kind in (Inputs, Options))
        inputs, signature = prepare(arrays, options, False)
        device = current(inputs.queries)
        if why_not(spec, signature, device) is not None:
            raise ValueError(refusal(platform, signature, device))
        config = RaggedPageAttentionv2Config(platform=platform, **call)
        output, lse = compiled(load(name), signature, config, device)(inputs)
        return (output, lse) if signature.return_lse else output

    spec = KernelSpec(platform, backend, ALGORITHM, kernel, name=name)
    return spec


# The order is the preference of platform="auto" among equal priorities.
SLOTS = (
    _built_in("pallas_tpu", Platform.PALLAS, Backend.TPU),
    _built_in("pallas_gpu", Platform.PALLAS, Backend.GPU),
    _built_in("triton", Platform.TRITON, Backend.GPU),
    _built_in("xla", Platform.XLA, Backend.ANY),
)


@functools.cache
def load(name: str) -> Implementation:
    """The built-in backend called `name`; an `ImportError` says what is not installed."""
    return importlib.import_module(f"rpa.backends.{name}").BACKEND


def implementation_of(spec: KernelSpec) -> Implementation:
    return spec.value or load(spec.name)


# ------------------------------------------------------------------ which kernel takes a call


def exists() -> list[KernelSpec]:
    """Every kernel of our operation, highest priority first."""
    return kernel_registry.list_implementations(ALGORITHM)


def why_not(spec: KernelSpec, signature: Signature, device: Device) -> str | None:
    """The reason a kernel cannot take this call, or None."""
    if device.platform not in spec.chips:
        return f"it runs on {' and '.join(spec.chips)}, and this call is lowered for {device.platform} ({device.kind})"
    try:
        implementation = implementation_of(spec)
    except ImportError as error:
        return f"it is not installed: {error}"
    return implementation.supports(signature, device)


def survey(platform: str, signature: Signature, device: Device) -> Iterator[tuple[KernelSpec, str | None]]:
    """The kernels of a platform as "auto" tries them on a call, each with its reason not to take it.

    On an H200 the Mosaic kernel took 0.76 to 1.05 of the Triton one's time in 50 decode cells (0.95 in the mean) and
    0.51 to 0.77 of it in 28 others (`tests/bench/records/h200.json`).
    """
    for spec in sorted(exists(), key=lambda spec: -spec.priority):
        if platform in ("auto", spec.platform):
            yield spec, why_not(spec, signature, device)


def able(platform: str, signature: Signature, device: Device) -> list[KernelSpec]:
    """The kernels of `platform` that can take the call, in order of preference, one a platform."""
    found: dict[str, KernelSpec] = {}
    for spec, reason in survey(platform, signature, device):
        if reason is None:
            found.setdefault(spec.platform, spec)
    return list(found.values())


def resolve(platform: str, signature: Signature, device: Device) -> tuple[KernelSpec, str]:
    """The kernel for `platform`, and the reason it was taken.

    Raises:
        ValueError: no kernel of that platform can take the call; the text gives every kernel's reason.
    """
    because = ["first backend that takes the call" if platform == "auto" else f"platform={platform!r} was asked for"]
    for spec, reason in survey(platform, signature, device):
        if reason is None:
            return spec, "; not ".join(because)
        if device.platform in spec.chips:  # that a TPU kernel is not for a CPU surprises nobody
            because.append(f"{spec.name}: {reason}")
    raise ValueError(refusal(platform, signature, device))


def refusal(platform: str, signature: Signature, device: Device) -> str:
    """What to say where no kernel of `platform` takes the call: every kernel's reason, and who can."""
    every = list(survey("auto", signature, device))
    told = [f"platform={str(platform)!r} has no kernel for this call on {device.platform} ({device.kind})"]
    told += [f"  {spec.name}: {reason}" for spec, reason in every if reason]
    takers = sorted({f"platform={str(spec.platform)!r}" for spec, reason in every if reason is None})
    return "\n".join([*told, f"Backends that can take it here: {', '.join(takers) or 'none'}"])


def detect_platform(algorithm: str = ALGORITHM, platform: str | None = "auto") -> Platform:
    """The platform a call would take on this machine: the one asked for, or the first whose kernel can run here.

    Raises:
        ValueError: there is no such kernel for JAX's default device; the text lists what there is.
    """
    if platform in (None, "auto") and algorithm.lower() == ALGORITHM:
        return able("auto", TYPICAL, current())[0].platform
    return kernel_registry.find(algorithm, platform).platform


# One decode step of an everyday model, for questions that are asked without a call.
TYPICAL = Signature(
    num_tokens=8, num_q_heads=32, head_dim=128, num_pages=1024, page_size=16, num_kv_heads=8, max_seqs=8,
    pages_per_seq=128, q_dtype="bfloat16", kv_dtype="bfloat16", compute_dtype="bfloat16", sinks=False,
    k_scale=False, v_scale=False, return_lse=False, optimized=False, softmax_scale=128**-0.5,
    logits_soft_cap=None, sliding_window=None, vmem_limit_bytes=None,
)  # fmt: skip


# ------------------------------------------------------------------ the public registry


class KernelRegistry:
    """Kernels by algorithm, platform and chip; the built-in ones are there from the start."""

    def __init__(self) -> None:
        self.specs: tuple[KernelSpec, ...] = SLOTS  # replaced whole, so that a remembered choice can tell it is stale
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
        where = _member(Platform, "platform", platform), _member(Backend, "backend", backend), algorithm.lower()

        def add(kernel: Callable[..., Any]) -> Callable[..., Any]:
            name = f"{kernel.__module__}.{getattr(kernel, '__qualname__', type(kernel).__name__)}"
            value = _as_backend(kernel, name, where[0], facts) if where[2] == ALGORITHM else None
            with self._lock:
                self.specs += (KernelSpec(*where, kernel, priority, name, value),)
            return kernel

        return add

    def unregister(self, kernel: Callable[..., Any]) -> None:
        """Take a registered kernel out again, wherever it stands."""
        with self._lock:
            self.specs = tuple(spec for spec in self.specs if spec.implementation is not kernel)

    def get(self, algorithm: str, platform: str | None = None, backend: str | None = None) -> Callable[..., Any]:
        """The preferred kernel for a platform and a chip; without a backend, for the chip JAX runs on.

        Raises:
            ValueError: none matches; the text lists those there are.
        """
        return self.find(algorithm, platform, backend).implementation

    def find(self, algorithm: str, platform: str | None = None, backend: str | None = None) -> KernelSpec:
        """`get`, with where the kernel stands."""
        wanted = None if platform in (None, "auto") else _member(Platform, "platform", platform)
        chip = Backend.ANY if backend is None else _member(Backend, "backend", backend)
        chip = Backend(current().platform) if chip is Backend.ANY else chip
        specs = self.list_implementations(algorithm)
        for spec in specs:
            if wanted in (None, spec.platform) and spec.backend in (Backend.ANY, chip):
                return spec
        known = ", ".join(f"{spec.platform}/{spec.backend}" for spec in specs) or "none"
        raise ValueError(f"{algorithm=} has no kernel for {platform=} on {chip}; there are: {known}")

    def list_algorithms(self) -> list[str]:
        return sorted({spec.algorithm for spec in self.specs})

    def list_implementations(self, algorithm: str) -> list[KernelSpec]:
        """The kernels of an algorithm, highest priority first."""
        specs = [spec for spec in self.specs if spec.algorithm == algorithm.lower()]
        return sorted(specs, key=lambda spec: -spec.priority)

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


def _as_backend(kernel: Callable[..., Any], name: str, platform: Platform, facts: dict[str, Any]) -> Implementation:
    """A registered callable as a backend; it is handed the parameters it has, and refused what it lacks."""
    parameters = inspect.signature(kernel).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def run(inputs: Inputs, signature: Signature, config: RaggedPageAttentionv2Config) -> tuple[Any, Any]:
        sizes = {size: getattr(config, size) for size in _TUNING if size != "vmem_limit_bytes"}
        options = {option: getattr(signature, option, None) for option in Options._fields}
        offered = inputs._asdict() | options | sizes | {"compute_dtype": jnp.dtype(signature.compute_dtype)}
        result = kernel(**{option: value for option, value in offered.items() if takes_all or option in parameters})
        return result if signature.return_lse else (result, None)

    def supports(signature: Signature, device: Device) -> str | None:
        lacking = [option for option in _used(signature) if not (takes_all or option in parameters)]
        return f"it takes no {lacking[0]}" if lacking else facts.get("supports", lambda *_: None)(signature, device)

    def claim(signature: Signature, device: Device) -> dict[str, Any]:  # operands, scaled query, weights rounded once
        return numerics.claim(signature, device, block=1, u_q=numerics.ROUNDOFF[signature.compute_dtype])

    own = RaggedPageAttentionv2Config(platform=platform)
    defaults = {"heuristic": lambda *_: own, "candidates": lambda *_: (), "claim": claim}
    return Implementation(name, run, **{**defaults, **facts, "supports": supports})


def _used(signature: Signature) -> list[str]:
    """The options whose absence from a kernel's parameters would change the answer."""
    used = {
        "softmax_aux": signature.sinks,
        "logits_soft_cap": signature.logits_soft_cap is not None,
        "sliding_window": signature.sliding_window is not None,
        "softmax_scale": signature.softmax_scale != float(signature.head_dim) ** -0.5,
        **{name: getattr(signature, name) for name in _LATER},
    }
    return [option for option, is_used in used.items() if is_used]


kernel_registry = KernelRegistry()
