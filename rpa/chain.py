"""Selection: one loop over the places a config can come from, for any operation; and the policy on a miss."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

from rpa import cache, settings
from rpa.cache import ConfigCache, PersistentCache, Triple
from rpa.device import Device, fingerprint
from rpa.tune import Tuner, TuningFailed

Answer = tuple[Any | None, str]  # a config or None, and the reason


@dataclass(frozen=True)
class AutotunePolicy:
    """What may decide a config when no store holds one.

    `cache_miss_fallback` is `"autotune"`, `"heuristics"` or None: None asks the environment, and without a word
    from it tunes on accelerators for which no table ships.

    Raises:
        ValueError: naming the field, its value and the rule.
    """

    allow_autotune: bool = True
    allow_heuristics: bool = True
    cache_miss_fallback: str | None = None
    validate_backward: bool = False

    def __post_init__(self) -> None:
        if self.cache_miss_fallback not in (None, *settings.POLICIES):
            expected = f"one of {', '.join(settings.POLICIES)} or None is expected"
            raise ValueError(f"cache_miss_fallback={self.cache_miss_fallback!r}: {expected}")
        if self.validate_backward:
            raise ValueError("validate_backward=True: the operation has no backward pass to validate")


class Call(Protocol):
    """What selection has to know about one call; each operation has a kind of its own."""

    op: str
    device: Device
    stem: str  # the readable key, before versions
    explicit: Any  # the caller's own config, or None
    args: tuple[Any, ...]  # what a tuner runs a candidate on

    def heuristic(self) -> Any:
        """A config that is right."""

    def candidates(self) -> list[Any]:
        """The configs worth timing."""
        return []

    def program(self, config: Any) -> Callable[..., Any]:
        """What a config makes of `args`."""
        raise NotImplementedError

    def shipped(self) -> Answer:
        """What the package itself knows."""
        return None, "nothing ships for it"

    def fit(self, config: Any) -> Answer:
        """The form in which a stored config can be used here, or None and why it cannot."""
        return config, ""

    def untunable(self, tuner: Any, asked: bool) -> str | None:
        """Why this call is not tuned on, if so; `asked` says that somebody wants it, beyond the default."""
        return None if asked or self.device.accelerator else "off accelerators the policy is heuristics"

    @property
    def triple(self) -> Triple:
        """The key of every store: device, operation, and the stem with the versions a tuned config depends on."""
        versions = (f"{name}={version}" for name, version in cache.versions().items())
        return fingerprint(self.device), self.op, " ".join([self.stem, *versions])

    def contenders(self) -> list[Any]:
        """What a tuner tries, the heuristic first: it is the one to beat."""
        first = self.heuristic()
        return [first, *(config for config in self.candidates() if config != first)]


@dataclass(frozen=True)
class Found:
    """A config, the stage that named it, the reason, and what every stage up to it answered."""

    config: Any
    source: str  # "explicit", "overlay", "memory", "persistent", "shipped", "autotune" or "heuristic"
    reason: str
    trail: tuple[tuple[str, str], ...]
    key: Triple  # for overlays and stores


_EVENTS = {"explicit": "override", "overlay": "overlay_hit", "autotune": "autotune_finish", "heuristic": "heuristics"}


class ConfigSelectorChain:
    """Explicit > overlay > memory > persistent > shipped > autotune > heuristic > error.

    An explicit config and a heuristic one are never stored; only a tuned one is.

    Args:
        on_event: called as `on_event(name, device=, op_id=, call_key=, ...)` with `override`, `overlay_hit`,
            `cache_hit` (and `level`), `autotune_start`, `autotune_finish`, `heuristics`, `error`.
        forbid_reautotune: a key whose tuning failed is not tuned again in this process.
    """

    def __init__(
        self, cache: ConfigCache | None = None, policy: AutotunePolicy | None = None, tuner: Any = None,
        persistent: PersistentCache | None = None, persist_autotune: bool = True,
        on_event: Callable[..., None] | None = None, forbid_reautotune: bool = True,
    ) -> None:  # fmt: skip
        self.cache = ConfigCache() if cache is None else cache
        self.tuner = Tuner() if tuner is None else tuner
        self.persistent, self.persist_autotune = persistent, persist_autotune
        self.on_event, self.forbid_reautotune = on_event, forbid_reautotune
        self._policy = policy or AutotunePolicy()
        self._failed: set[Triple] = set()
        self._tuning = threading.RLock()

    @property
    def policy(self) -> AutotunePolicy:
        """The policy in force here, `policy_override` included."""
        return overrides.get().get(self, self._policy)

    @policy.setter
    def policy(self, policy: AutotunePolicy) -> None:
        self._policy = policy

    def choose(self, inv: Any, kernel: Any) -> Any:
        """The config of an invocation of a kernel."""
        return self.find(kernel.call(inv)).config

    def find(self, call: Call, *, dry: bool = False) -> Found:
        """Ask every stage in order; with `dry` nothing is tuned.

        Raises:
            RuntimeError: no stage has a config; the text says what each answered.
        """
        triple, trail = call.triple, []
        stages = (
            ("explicit", lambda: (call.explicit, "none was given" if call.explicit is None else "cfg= was given")),
            ("overlay", lambda: _fit(call, cache.find_overlay(triple), "an overlay holds it")),
            ("memory", lambda: _fit(call, self.cache.get(*triple), "it was tuned or put earlier in this process")),
            ("persistent", lambda: self._stored(call, triple)),
            ("shipped", lambda: _fit(call, *call.shipped(), None)),
            ("autotune", lambda: self._autotune(call, triple, dry)),
            ("heuristic", lambda: self._heuristic(call)),
        )
        for stage, lookup in stages:
            config, reason = lookup()
            trail.append((stage, reason))
            if config is not None:
                level = {} if stage in _EVENTS else {"level": stage}
                self._announce(_EVENTS.get(stage, "cache_hit"), triple, cfg=config, **level)
                return Found(config, stage, reason, tuple(trail), triple)
        self._announce("error", triple, cfg=None, reason="no_config")
        answers = "".join(f"\n  {stage}: {reason}" for stage, reason in trail)
        raise RuntimeError(f"no config for {call.op} {call.stem}:{answers}")

    def _stored(self, call: Call, triple: Triple) -> Answer:
        if self.persistent is None:
            return None, "there is no store"
        return _fit(call, self.persistent.get(*triple), f"{self.persistent.path} holds it")

    def _heuristic(self, call: Call) -> Answer:
        if not self.policy.allow_heuristics:
            return None, "the policy allows no heuristics"
        return call.heuristic(), "the backend's own default"

    def _autotune(self, call: Call, triple: Triple, dry: bool) -> Answer:
        asked = self.policy.cache_miss_fallback or settings.autotune_policy()
        if asked == "heuristics" or not self.policy.allow_autotune:
            return None, "the policy is heuristics"
        if self.forbid_reautotune and triple in self._failed:
            return None, "tuning it failed earlier in this process"
        if reason := call.untunable(self.tuner, asked is not None):
            return None, reason
        if dry:
            return None, "a call outside jit would tune now"
        with self._tuning:
            found = self.cache.get(*triple)  # another thread may have tuned it while this one waited
            return (found, "another thread tuned it") if found is not None else self._tune(call, triple)

    def _tune(self, call: Call, triple: Triple) -> Answer:
        candidates = call.contenders()
        self._announce("autotune_start", triple, candidates=len(candidates))
        try:
            best = self.tuner.autotune(call.program, call.args, {}, candidates)
        except TuningFailed as error:
            self._failed.add(triple)
            warnings.warn(f"tuning {call.stem} found no usable config:\n{error}", RuntimeWarning, stacklevel=2)
            return None, "tuning it failed"
        history = getattr(self.tuner, "history", None)  # somebody else's tuner may keep none
        reason = history[-1].reason if history else "tuned just now"
        self.cache.put(*triple, best)
        if self.persistent is not None and self.persist_autotune:
            self.persistent.put(*triple, best, note=reason)
        return best, reason

    def _announce(self, name: str, triple: Triple, **details: Any) -> None:
        if self.on_event is not None:
            device, op, key = triple
            self.on_event(name, device=device, op_id=op, call_key=key, **details)


def _fit(call: Call, stored: Any, reason: str, miss: str | None = "nothing there") -> Answer:
    """A stored config in the form that serves the call."""
    if stored is None:
        return None, miss or reason
    config, refusal = call.fit(stored)
    return config, reason if config is not None else f"its config cannot be used here: {refusal}"


# The policies that `policy_override` has put in force here, by chain.
overrides: ContextVar[Mapping[Any, AutotunePolicy]] = ContextVar("rpa_policies", default=MappingProxyType({}))


@contextlib.contextmanager
def policy_override(selector: Any = None, /, **changes: Any) -> Iterator[None]:
    """Within the block, and this thread or task only, change fields of a selector's policy.

    Args:
        selector: a `ConfigSelectorChain`, an `Executor` that holds one, or None for the public function's own.
        changes: fields of `AutotunePolicy`.
    """
    if selector is None:
        from rpa.select import default_chain

        selector = default_chain()
    chain = getattr(selector, "chooser", selector)
    token = overrides.set({**overrides.get(), chain: replace(chain.policy, **changes)})
    try:
        yield
    finally:
        overrides.reset(token)
