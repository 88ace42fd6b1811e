"""Selection: one loop over the places a config can come from, for any operation; and the policy on a miss."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rpa import cache, settings
from rpa.cache import ConfigCache, PersistentCache, Triple
from rpa.device import Device, fingerprint
from rpa.tune import Tuner, TuningFailed

# ------------------------------------------------------------------ the policy


@dataclass(frozen=True)
class AutotunePolicy:
    """What may decide a config when no store holds one.

    `cache_miss_fallback` is `"autotune"`, `"heuristics"` or None: None asks the environment, and without a word
    from it tunes on accelerators only.

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


# What `policy_override` changes here: (chain, fields), the outermost first.
overrides: ContextVar[tuple[tuple[Any, dict[str, Any]], ...]] = ContextVar("rpa_policies", default=())


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
    replace(chain.policy, **changes)  # an unknown field or value is an error here, not at the next call
    token = overrides.set((*overrides.get(), (chain, changes)))
    try:
        yield
    finally:
        overrides.reset(token)


# ------------------------------------------------------------------ the stages


Lookup = tuple[Any | None, str]  # a config or None, and the reason


@dataclass(frozen=True)
class Query:
    """What selection has to know about one call."""

    op: str
    device: Device
    stem: str  # the readable key, before versions
    heuristic: Callable[[], Any]
    candidates: Callable[[], Sequence[Any]]
    program: Callable[[Any], Callable[..., Any]]  # what a candidate would run
    args: tuple[Any, ...] = ()
    shipped: Callable[[], Lookup] = lambda: (None, "nothing ships for it")  # what the package itself knows
    explicit: Any | None = None
    untunable: Callable[[Any], str | None] = lambda tuner: None  # why this tuner may not tune on this call
    # The form in which a stored config can be used here, or None and why it cannot.
    fit: Callable[[Any], tuple[Any | None, str]] = lambda config: (config, "")

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
    """A config, the stage that named it, the reason, and what the stages before it said."""

    config: Any
    source: str  # "explicit", "overlay", "memory", "persistent", "shipped", "autotune" or "heuristic"
    reason: str
    trail: tuple[tuple[str, str], ...]


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
        self,
        cache: ConfigCache | None = None,
        policy: AutotunePolicy | None = None,
        tuner: Any = None,
        persistent: PersistentCache | None = None,
        persist_autotune: bool = True,
        on_event: Callable[..., None] | None = None,
        forbid_reautotune: bool = True,
    ) -> None:
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
        policy = self._policy
        for chain, changes in overrides.get():
            policy = replace(policy, **changes) if chain is self else policy
        return policy

    @policy.setter
    def policy(self, policy: AutotunePolicy) -> None:
        self._policy = policy

    def choose(self, inv: Any, kernel: Any) -> Any:
        """The config of an invocation of a kernel."""
        return self.find(kernel.query(inv)).config

    def find(self, query: Query, *, dry: bool = False) -> Found:
        """Ask every stage in order; with `dry` nothing is tuned.

        Raises:
            RuntimeError: no stage has a config; the text says what each answered.
        """
        stages = {
            "explicit": self._explicit,
            "overlay": self._overlay,
            "memory": self._memory,
            "persistent": self._persistent,
            "shipped": self._shipped,
            "autotune": partial(self._autotune, dry=dry),
            "heuristic": self._heuristic,
        }
        trail: list[tuple[str, str]] = []
        for stage, lookup in stages.items():
            config, reason = lookup(query)
            trail.append((stage, reason))
            if config is not None:
                level = {} if stage in _EVENTS else {"level": stage}
                self._announce(_EVENTS.get(stage, "cache_hit"), query, cfg=config, **level)
                return Found(config, stage, reason, tuple(trail))
        self._announce("error", query, cfg=None, reason="no_config")
        answers = "".join(f"\n  {stage}: {reason}" for stage, reason in trail)
        raise RuntimeError(f"no config for {query.op} {query.stem}:{answers}")

    # Each stage answers with a config or None, and why.

    def _explicit(self, query: Query) -> Lookup:
        return query.explicit, "none was given" if query.explicit is None else "cfg= was given"

    def _overlay(self, query: Query) -> Lookup:
        return _fitting(query, cache.find_overlay(query.triple), "an overlay holds it")

    def _memory(self, query: Query) -> Lookup:
        return _fitting(query, self.cache.get(*query.triple), "it was tuned or put earlier in this process")

    def _persistent(self, query: Query) -> Lookup:
        if self.persistent is None:
            return None, "there is no store"
        return _fitting(query, self.persistent.get(*query.triple), f"{self.persistent.path} holds it")

    def _shipped(self, query: Query) -> Lookup:
        found, reason = query.shipped()
        return _fitting(query, found, reason) if found is not None else (None, reason)

    def _why_not_tune(self, query: Query) -> str | None:
        policy, accelerator = self.policy, query.device.accelerator
        default = "autotune" if accelerator else "heuristics"
        fallback = policy.cache_miss_fallback or settings.autotune_policy() or default
        if fallback != "autotune" or not policy.allow_autotune:
            return "the policy is heuristics" if accelerator else "off accelerators the policy is heuristics"
        if self.forbid_reautotune and query.triple in self._failed:
            return "tuning it failed earlier in this process"
        return query.untunable(self.tuner)

    def _autotune(self, query: Query, dry: bool) -> Lookup:
        reason = self._why_not_tune(query) or ("a call outside jit would tune now" if dry else None)
        if reason is not None:
            return None, reason
        with self._tuning:
            found = self.cache.get(*query.triple)  # another thread may have tuned it while this one waited
            return (found, "another thread tuned it") if found is not None else self._tune(query)

    def _tune(self, query: Query) -> Lookup:
        candidates = query.contenders()
        self._announce("autotune_start", query, candidates=len(candidates))
        try:
            best = self.tuner.autotune(query.program, query.args, {}, candidates)
        except TuningFailed as error:
            self._failed.add(query.triple)
            warnings.warn(f"tuning {query.stem} found no usable config:\n{error}", RuntimeWarning, stacklevel=2)
            return None, "tuning it failed"
        history = getattr(self.tuner, "history", None)  # somebody else's tuner may keep none
        reason = history[-1].reason if history else "tuned just now"
        self.cache.put(*query.triple, best)
        if self.persistent is not None and self.persist_autotune:
            self.persistent.put(*query.triple, best, note=reason)
        return best, reason

    def _heuristic(self, query: Query) -> Lookup:
        if not self.policy.allow_heuristics:
            return None, "the policy allows no heuristics"
        return query.heuristic(), "the backend's own default"

    def _announce(self, name: str, query: Query, **details: Any) -> None:
        if self.on_event is not None:
            device, op, key = query.triple
            self.on_event(name, device=device, op_id=op, call_key=key, **details)


def _fitting(query: Query, found: Any, reason: str) -> Lookup:
    """A stored config in the form that serves the call."""
    if found is None:
        return None, "nothing there"
    config, refusal = query.fit(found)
    return config, reason if config is not None else f"its config cannot be used here: {refusal}"
