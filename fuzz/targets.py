"""The seam between the search and whatever it judges: one kernel, by name, with what it claims and supports."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import metadata
from typing import Any

import numpy as np

from fuzz.errors import origin
from oracle import Case, Claim
from oracle.bound import default_claim
from oracle.case import dtype_name

ENTRY_POINTS = "rpa.targets"
_NAMES = ("queries", "kv_pages", "context_lens", "block_tables", "query_start_loc", "num_seqs", "softmax_aux")
# name of the target -> (the `platform` argument, the implementation that must answer)
BACKENDS = {
    "xla": ("xla", "xla"),
    "triton": ("triton", "triton"),
    "pallas": ("pallas", None),
    "pallas_tpu": ("pallas", "pallas_tpu"),
    "pallas_gpu": ("pallas", "pallas_gpu"),
}
ADAPTERS = {
    "model": "fuzz.mutants.model:kernel",
    "ejkernel": "fuzz.adapters.ejkernel:attention",
    "ejkernel_finite": "fuzz.adapters.ejkernel:finite",
    "jax_upstream": "fuzz.adapters.jax_upstream:attention",
    "jax_reference": "fuzz.adapters.jax_upstream:reference",
    "tpu_inference": "fuzz.adapters.tpu_inference:attention",
    "vllm": "fuzz.adapters.vllm:attention",
    "triton_interpret": "fuzz.adapters.triton_interpret:attention",
}


class TargetError(ValueError):
    """A target that cannot be loaded; the message says what was looked for and how to name one."""


class Unsupported(Exception):
    """A gap that the target declares for one case; counted, never a failure and never a pass."""


class InputChanged(AssertionError):
    """The kernel wrote into one of its arguments."""


class WrongBackend(AssertionError):
    """Another backend than the one asked for answered."""


@dataclass(frozen=True)
class Target:
    """A kernel under judgement.

    `call` has the signature of `ragged_page_attention_v2`; `claim` and `supports` are functions of the case.
    `finite_slots` declares a gap: what lies in slots that no row may see has to be finite. `batch_invariant` and
    `deterministic` are what the kernel promises about its bits; `validates` says that it
    rejects illegal arguments as the contract demands; `returns_lse` that `return_lse=True` makes it return a pair.
    `ran` names the backend that answered a case, or is None where the question has no meaning.
    """

    name: str
    call: Callable[..., Any]
    claim: Callable[[Case], Claim]
    supports: Callable[[Case], str | None]
    batch_invariant: bool = False
    deterministic: bool = True
    validates: bool = False
    ran: Callable[[Case], str] | None = None
    expects: str | None = None
    jax_arrays: bool = False
    finite_slots: bool = False
    accepts: frozenset[str] = field(default_factory=frozenset)
    returns_lse: bool = False
    asks_lse: bool = False
    interpreted: bool = False  # seconds a call: it is given small shapes, and repeated once only

    def asking(self, lse: bool) -> Target:
        """This target, asked for the lse with every output, where that is wanted and it can."""
        return dataclasses.replace(self, asks_lse=True) if lse and self.returns_lse else self

    def gap(self, case: Case) -> str | None:
        """Why the target cannot take a case, by its own declaration or its signature; None if it can."""
        scales = {"k_scale": case.k_scale, "v_scale": case.v_scale}
        missing = [name for name in scales if scales[name] is not None and name not in self.accepts]
        return f"it takes no {missing[0]}" if missing else self.supports(case)

    def run(self, case: Case) -> tuple[np.ndarray, np.ndarray | None]:
        """The kernel's answer as NumPy arrays: output [T, Hq, D], and lse [T, Hq] where it returns one.

        Raises:
            Unsupported: the kernel (or its signature) says that it has no such option.
            WrongBackend: another backend answered.
        """
        gap = self.gap(case)
        if gap is not None:
            raise Unsupported(gap)
        options = {**case.options, **({"return_lse": True} if self.asks_lse else {})}
        given = case.arrays
        arrays = lent = [None if a is None else np.array(a) for a in given]
        if self.jax_arrays:
            import jax

            arrays = [None if a is None else jax.device_put(a) for a in lent]
        try:
            answer = self.call(*arrays, **options)
        except NotImplementedError as refusal:
            raise Unsupported(str(refusal) or "it raised NotImplementedError") from refusal
        if self.ran is not None and self.expects is not None:
            ran = self.ran(case)
            if ran != self.expects:
                raise WrongBackend(f"{self.name} was asked for {self.expects}, but {ran} answered")
        result = _as_numpy(answer)
        for name, before, after in zip(_NAMES, given, lent, strict=True):
            if after is not None and not _same_memory(before, after):
                raise InputChanged(f"{self.name} wrote into its argument {name}")
        return result


def _same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same bits, whatever shape a kernel gave its own; a NaN is the same as itself."""
    if a.nbytes <= 4096 or (a.shape, a.dtype) != (b.shape, b.dtype):
        return a.tobytes() == b.tobytes()
    return not np.count_nonzero(a.view(f"u{a.itemsize}") != b.view(f"u{a.itemsize}"))


def _as_numpy(answer: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Force the answer into fresh NumPy arrays, so that nothing lazy or shared is judged."""
    output, lse = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
    arrays = np.array(output), None if lse is None else np.array(lse)
    if any(array is not None and array.dtype.kind not in "fiubV" for array in arrays):  # V: bfloat16 and its like
        raise TypeError(f"the target returned a {type(answer).__name__}, which is no array of numbers")
    return arrays


def _declared(value: Any, default: Callable[[Case], Any]) -> Callable[[Case], Any]:
    """A function of the case, whether the target declared a value, a function, or nothing."""
    if value is None:
        return default
    return value if callable(value) else lambda case: value


# ---------------------------------------------------------------- loading


def load(name: str) -> Target:
    """The target called `name`.

    A name is one of our backends (`xla`, `triton`, `pallas`, ...), an adapter in the box, `mutant:ID`, an entry
    point of the group `rpa.targets`, or `module:function` (the working folder is searched too).

    Raises:
        TargetError: nothing of that name, or it does not import.
    """
    if name in BACKENDS:
        return _backend(name)
    if name.startswith("mutant:"):
        from fuzz.mutants.catalogue import target_of

        return target_of(name.removeprefix("mutant:"))
    found = {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINTS)}
    if name in found:
        return from_callable(found[name].load(), name)
    path = ADAPTERS.get(name, name)
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        known = ", ".join([*BACKENDS, *ADAPTERS, *found])
        raise TargetError(f"target {name!r} is unknown: give module:function, mutant:ID, or one of {known}")
    return from_callable(_import(name, module, attribute), name)


def _import(name: str, module: str, attribute: str) -> Callable[..., Any]:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise TargetError(f"target {name!r} cannot be loaded: {origin(error)}") from error
    if not callable(found):
        raise TargetError(f"target {name!r} is of type {type(found).__name__}, not a function")
    return found


def from_callable(function: Any, name: str) -> Target:
    """A target from anything callable; its attributes `claim`, `supports`, … are its declarations."""
    if isinstance(function, Target):
        return function
    return Target(
        name=name,
        call=function,
        claim=_declared(getattr(function, "claim", None), default_claim),
        supports=_declared(getattr(function, "supports", None), lambda case: None),
        batch_invariant=bool(getattr(function, "batch_invariant", False)),
        deterministic=bool(getattr(function, "deterministic", True)),
        validates=bool(getattr(function, "validates", False)),
        ran=getattr(function, "ran", None),
        expects=getattr(function, "expects", None),
        jax_arrays=bool(getattr(function, "jax_arrays", False)),
        finite_slots=bool(getattr(function, "finite_slots", False)),
        accepts=_accepted(function),
        returns_lse=_returns_lse(function),
        interpreted=bool(getattr(function, "interpreted", False)),
    )


def _accepted(function: Any) -> frozenset[str]:
    """The keyword names a function takes; all of the contract's where it has `**kwargs` or no signature."""
    everything = frozenset({"k_scale", "v_scale", "return_lse", "validate", "optimized"})
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return everything
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return everything
    return frozenset(p.name for p in parameters) & everything


def _returns_lse(function: Any) -> bool:
    """Whether a function declares an lse: by attribute, or by naming the parameter. `**kwargs` promise nothing."""
    try:
        named = "return_lse" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        named = False
    return bool(getattr(function, "returns_lse", named))


# ---------------------------------------------------------------- our own backends


def _backend(name: str) -> Target:
    """One of rpa's backends behind the public function, with the claim it makes for each signature."""
    platform, expected = BACKENDS[name]
    if name == "pallas_gpu" and "jax" not in sys.modules:
        # Its interpreter runs every warpgroup as a thread that may block: XLA must be told of more threads than the
        # machine has cores before it starts, or it waits for itself for ever. Without effect on a GPU.
        os.environ.setdefault("NPROC", "32")

    def call(*arrays: Any, **options: Any) -> Any:
        from rpa import ragged_page_attention_v2

        with _context(name):
            return ragged_page_attention_v2(*arrays, platform=platform, **options)

    @cache
    def slot() -> Any:
        from rpa import registry

        wanted = expected or _pallas_here()
        return next(slot for slot in registry.SLOTS if slot.name == wanted)

    def static(case: Case) -> tuple[Any, Any]:
        return signature_of(case), _device(name)

    def supports(case: Case) -> str | None:
        return _cannot_interpret(name) or _refusal(slot(), *static(case))

    return Target(name, call, lambda case: _claimed(slot().name, *static(case)), supports, batch_invariant=True,
                  validates=True, ran=lambda case: _chosen(*static(case), platform), returns_lse=True,
                  expects=expected or _pallas_here(), accepts=_accepted(lambda **everything: None),
                  interpreted=name.startswith("pallas") and _on_cpu())  # fmt: skip


@lru_cache(maxsize=4096)
def _refusal(slot: Any, signature: Any, device: Any) -> str | None:
    from rpa import registry

    return registry.why_not(slot, signature, device)


@lru_cache(maxsize=4096)
def _claimed(backend: str, signature: Any, device: Any) -> Claim:
    from rpa import registry

    return Claim(**registry.load(backend).claim(signature, device))


@lru_cache(maxsize=4096)
def _chosen(signature: Any, device: Any, platform: str) -> str:
    from rpa import select

    return select.choose(select.Attention(signature, device, platform)).implementation.name


@contextmanager
def _untuned(name: str) -> Iterator[None]:
    from rpa import policy_override

    with policy_override(cache_miss_fallback="heuristics"), _interpreter(name):
        yield


def _context(name: str) -> Any:
    """What must surround a call: an interpreter where the backend needs one here, and no tuning of every new shape."""
    if not _on_cpu():
        from rpa import settings

        if settings.autotune_policy() is None:
            return _untuned(name)
    return _interpreter(name)


@cache
def _on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def _interpreter(name: str) -> Any:
    if not _on_cpu():
        return nullcontext()
    if name in ("pallas", "pallas_tpu"):
        from jax.experimental.pallas import tpu as pltpu

        return pltpu.force_tpu_interpret_mode()
    if name == "pallas_gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())
    return nullcontext()


@cache
def _cannot_interpret(name: str) -> str | None:
    """Why a GPU backend cannot be interpreted in this process, or None; what it needs is said."""
    if not _on_cpu():
        return None
    if name == "triton":
        return "there is no GPU; the target triton_interpret runs these kernels on CPU"
    if name == "pallas_gpu" and "NPROC" not in os.environ:
        return "there is no GPU, and its interpreter needs NPROC=32 in the environment before JAX is imported"
    return None


@cache
def _device(name: str) -> Any:
    from rpa import device

    with _interpreter(name):
        return device.current()


def _pallas_here() -> str:
    import jax

    return "pallas_gpu" if jax.default_backend() == "gpu" else "pallas_tpu"


@lru_cache(maxsize=8)
def signature_of(case: Case) -> Any:
    """The static `rpa.signature.Signature` of a call with this case."""
    return _signature(_static(case))


def _static(case: Case) -> tuple[Any, ...]:
    (pages, page, combined, _), (seqs, columns) = case.kv_pages.shape, case.block_tables.shape
    q_dtype, window = dtype_name(case.queries), case.sliding_window
    return (*case.queries.shape, pages, page, combined // 2, seqs, columns, q_dtype, dtype_name(case.kv_pages),
            case.compute_dtype or q_dtype, case.softmax_aux is not None, case.k_scale is not None,
            case.v_scale is not None, case.scale, case.logits_soft_cap,
            None if (window or 0) >= columns * page else window)  # fmt: skip


@lru_cache(maxsize=1024)
def _signature(static: tuple[Any, ...]) -> Any:
    from rpa.signature import Signature

    *shape, scale, cap, window = static
    return Signature(*shape, return_lse=False, optimized=False, softmax_scale=scale, logits_soft_cap=cap,
                     sliding_window=window, vmem_limit_bytes=None)  # fmt: skip


def available() -> Iterable[tuple[str, str | None]]:
    """Every named target with the reason it cannot be judged here, or None."""
    from fuzz.plan import SMALLEST

    for name in [*BACKENDS, *ADAPTERS, *(e.name for e in metadata.entry_points(group=ENTRY_POINTS))]:
        yield name, _reason(name, SMALLEST)


def _reason(name: str, plan: Any) -> str | None:
    from fuzz.build import build

    try:
        return load(name).gap(build(plan))
    except (TargetError, ImportError) as error:
        return str(error)
