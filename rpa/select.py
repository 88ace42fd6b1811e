"""Which backend and which config a call gets, and why: one loop over the places a config can come from."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from rpa import cache, registry, settings, tune
from rpa.cache import ConfigCache, PersistentCache, Triple
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device, fingerprint
from rpa.keys import stem, stems_of_likes
from rpa.policy import AutotunePolicy, in_force, overrides
from rpa.program import Program
from rpa.registry import Implementation
from rpa.signature import Inputs, Signature
from rpa.tune import Tuner

STORE = "ragged-page-attention"


@dataclass(frozen=True)
class Query:
    """What selection has to know about one call."""

    op: str
    device: str  # the stores' name for the chip
    stem: str  # the readable key, before versions
    heuristic: Callable[[], Any]
    candidates: Callable[[], Sequence[Any]]
    program: Callable[[Any], Callable[..., Any]]  # what a candidate would run
    args: tuple[Any, ...] = ()
    explicit: Any | None = None
    untunable: Callable[[], str | None] = lambda: None  # why this call may not be tuned
    judged: bool = False  # whether its candidates can be wrong by a measure, and so are never timed unjudged
    accelerator: bool = False
    refuse: Callable[[Any], str | None] = lambda config: None  # why a stored config cannot be used here
    complete: Callable[[Any], Any] = lambda config: config  # a shipped config that names no more than a backend
    like: Callable[[], Iterable[str]] = tuple  # stems of like calls whose shipped config serves this one too

    @property
    def key(self) -> str:
        return " ".join([self.stem, *(f"{name}={version}" for name, version in cache.versions().items())])

    @property
    def triple(self) -> Triple:
        return (self.device, self.op, self.key)

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


Lookup = tuple[Any | None, str]  # a config or None, and the reason


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
        self.persistent = persistent
        self.persist_autotune = persist_autotune
        self.on_event = on_event
        self.forbid_reautotune = forbid_reautotune
        self._policy = policy or AutotunePolicy()
        self._failed: set[Triple] = set()
        self._tuning = threading.RLock()

    @property
    def policy(self) -> AutotunePolicy:
        """The policy in force here, `policy_override` included."""
        return in_force(self, self._policy)

    def choose(self, inv: Any, kernel: Any) -> Any:
        """The config of an invocation of a kernel."""
        return self.find(kernel.query(inv)).config

    def find(self, query: Query, *, dry: bool = False) -> Found:
        """Ask every stage in order; with `dry` nothing is tuned.

        Raises:
            RuntimeError: no stage has a config; the text says what each answered.
        """
        stages = (
            ("explicit", self._explicit, "override"),
            ("overlay", self._overlay, "overlay_hit"),
            ("memory", self._memory, "cache_hit"),
            ("persistent", self._persistent, "cache_hit"),
            ("shipped", self._shipped, "cache_hit"),
            ("autotune", self._dry if dry else self._autotune, "autotune_finish"),
            ("heuristic", self._heuristic, "heuristics"),
        )
        trail: list[tuple[str, str]] = []
        for stage, lookup, event in stages:
            config, reason = lookup(query)
            trail.append((stage, reason))
            if config is not None:
                self._announce(event, query, cfg=config, **({"level": stage} if event == "cache_hit" else {}))
                return Found(config, stage, reason, tuple(trail))
        self._announce("error", query, cfg=None, reason="no_config")
        answers = "".join(f"\n  {stage}: {reason}" for stage, reason in trail)
        raise RuntimeError(f"no config for {query.op} {query.stem}:{answers}")

    # Each stage answers with a config or None, and why.

    def _explicit(self, query: Query) -> Lookup:
        return query.explicit, "none was given" if query.explicit is None else "cfg= was given"

    def _overlay(self, query: Query) -> Lookup:
        return self._usable(query, cache.find_overlay(query.triple), "an overlay holds it")

    def _memory(self, query: Query) -> Lookup:
        found = self.cache.get(*query.triple)
        return self._usable(query, found, "it was tuned or put earlier in this process")

    def _persistent(self, query: Query) -> Lookup:
        if self.persistent is None:
            return None, "there is no store"
        found = self.persistent.get(*query.triple)
        return self._usable(query, found, f"{self.persistent.path} holds it")

    def _shipped(self, query: Query) -> Lookup:
        table = cache.shipped(query.device)
        names = (f"{query.op}|{stem}" for stem in (query.stem, *query.like()))
        name = next((name for name in names if name in table), None)
        if name is None:
            return None, f"the tables that ship hold nothing for it on {query.device}"
        entry = table[name]
        found = cache.config_of(entry, f"the table that ships for {query.device}: {name!r}")
        found, reason = self._usable(query, found, f"it ships: {entry.get('note', '')}" if found else "")
        return (None if found is None else query.complete(found)), reason

    def _usable(self, query: Query, found: Any, reason: str) -> Lookup:
        if found is None:
            return None, "nothing there"
        refusal = query.refuse(found)
        return (found, reason) if refusal is None else (None, f"its config cannot be used here: {refusal}")

    def _why_not_tune(self, query: Query) -> str | None:
        policy = self.policy
        default = "autotune" if query.accelerator else "heuristics"
        fallback = policy.cache_miss_fallback or settings.autotune_policy() or default
        if fallback != "autotune" or not policy.allow_autotune:
            return "the policy is heuristics" if query.accelerator else "off accelerators the policy is heuristics"
        if self.forbid_reautotune and query.triple in self._failed:
            return "tuning it failed earlier in this process"
        return query.untunable() or (tune.why_not(self.tuner) if query.judged else None)

    def _dry(self, query: Query) -> Lookup:
        return None, self._why_not_tune(query) or "a call outside jit would tune now"

    def _autotune(self, query: Query) -> Lookup:
        reason = self._why_not_tune(query)
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
        except tune.TuningFailed as error:
            self._failed.add(query.triple)
            warnings.warn(f"tuning {query.stem} found no usable config:\n{error}", RuntimeWarning, stacklevel=2)
            return None, "tuning it failed"
        reason = tune.verdict(self.tuner, best)
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
            self.on_event(name, device=query.device, op_id=query.op, call_key=query.key, **details)


@lru_cache(maxsize=1)
def default_chain() -> ConfigSelectorChain:
    """The selector of the public function, made at its first call."""
    return ConfigSelectorChain(persistent=PersistentCache(STORE))


def moment() -> Any:
    """What a remembered choice of the public function depends on besides the call; None where none may be used.

    Under an overlay or an observer of the events every call is asked anew.
    """
    chain = default_chain()
    if cache.overlays() or chain.on_event:
        return None
    generations = chain.cache.generation, PersistentCache.generation, registry.REGISTERED.generation
    return generations, overrides.get(), settings.environment()


# ------------------------------------------------------------------ our own operation


_IDLE = "this batch is mostly idle"


@dataclass(frozen=True)
class Choice(Found):
    """What was found for a call of our operation, and the backend it is for."""

    implementation: Implementation
    key: Triple

    @property
    def of_this_batch(self) -> bool:
        """Whether another batch of the same shapes might get another config."""
        return any(answer.startswith(_IDLE) for _, answer in self.trail)


def choose(
    signature: Signature,
    device: Device,
    platform: str,
    cfg: RaggedPageAttentionv2Config | None,
    *,
    chain: ConfigSelectorChain | None = None,
    dry: bool = False,
    **more: Any,
) -> Choice:
    """The backend and the config of a validated call; `platform` wins over the config's own.

    Args:
        more: `inputs` and `sharding`, as in `query_of`.

    Raises:
        ValueError: no backend of the platform can take the call.
    """
    if cfg is not None and cfg.backend not in ("any", device.platform):
        raise ValueError(f"cfg.backend={cfg.backend!r}: this call is lowered for {device.platform} ({device.kind})")
    asked = _platform_of(platform, cfg)
    implementation, why = registry.resolve(asked, signature, device)
    query = query_of(signature, device, platform, cfg, **more)
    found = (chain or default_chain()).find(query, dry=dry)
    if found.source not in ("explicit", "heuristic"):  # those two speak of the preferred backend
        implementation, why = registry.resolve(_platform_of(asked, found.config), signature, device)
    reason = f"{found.reason}; {implementation.name}: {why}"
    return Choice(found.config, found.source, reason, found.trail, implementation, query.triple)


def query_of(
    signature: Signature,
    device: Device,
    platform: str,
    cfg: RaggedPageAttentionv2Config | None,
    *,
    inputs: Inputs | None = None,
    sharding: str = "none",
) -> Query:
    """Our operation's call, as selection sees it.

    Args:
        inputs: concrete arrays that a tuner may run on; None where there are none, as inside jit.
        sharding: how the call is spread over a mesh, part of the key.
    """
    platform = _platform_of(platform, cfg)

    def program(config: RaggedPageAttentionv2Config) -> Program:
        implementation, _ = registry.resolve(_platform_of(platform, config), signature, device)
        return Program(implementation, signature, config, device)

    def own_choice(platform: str) -> RaggedPageAttentionv2Config:
        slot = registry.able(platform, signature, device)[0]
        return registry.implementation_of(slot).heuristic(signature, device).replace(platform=slot.platform)

    def complete(config: RaggedPageAttentionv2Config) -> RaggedPageAttentionv2Config:
        bare = config == RaggedPageAttentionv2Config(platform=config.platform)
        return own_choice(config.platform) if bare else config

    def refuse(config: RaggedPageAttentionv2Config) -> str | None:
        if platform not in ("auto", config.platform) and config.platform != "auto":
            return f"it is for platform={config.platform!r}"
        if registry.able(_platform_of(platform, config), signature, device):
            return None
        return f"no kernel of platform={config.platform!r} takes this call"

    return Query(
        op=f"{registry.ALGORITHM}@0",
        device=fingerprint(device),
        stem=stem(signature, platform, sharding),
        heuristic=lambda: own_choice(platform),
        candidates=lambda: candidates(signature, device, platform),
        program=program,
        args=() if inputs is None else (inputs,),
        explicit=cfg,
        untunable=lambda: _untunable(inputs, signature, sharding),
        judged=True,
        accelerator=device.platform in ("gpu", "tpu") and not device.interpreted,
        refuse=refuse,
        complete=complete,
        like=lambda: stems_of_likes(signature),
    )


def _untunable(inputs: Inputs | None, signature: Signature, sharding: str) -> str | None:
    """The reason a call's own arrays are no ground for a decision that later calls inherit."""
    if sharding != "none":
        return "a sharded call is not tuned: all its processes must decide alike"
    if inputs is None:
        return "inside jit there is nothing to time: tables and heuristics decide"
    count = int(np.asarray(inputs.num_seqs).reshape(-1)[0])
    offsets = np.asarray(inputs.query_start_loc)
    contexts = np.asarray(inputs.context_lens)[:count]
    live = int(offsets[count]) - int(offsets[0]) if 0 < count < len(offsets) else 0
    if 2 * live < signature.num_tokens or not contexts.any():
        return f"{_IDLE} ({live} of {signature.num_tokens} rows live) and stands for no other"
    return None


def candidates(signature: Signature, device: Device, platform: str) -> list[RaggedPageAttentionv2Config]:
    """The configs worth timing: every backend's own choice, the preferred one's first, then their variations."""
    choices, variations = [], []
    for slot in registry.able(platform, signature, device):
        implementation = registry.implementation_of(slot)
        choices.append(implementation.heuristic(signature, device).replace(platform=slot.platform))
        others = implementation.candidates(signature, device)
        variations += [config.replace(platform=slot.platform) for config in others]
    return list(dict.fromkeys(choices + variations))


def _platform_of(asked: str, config: Any) -> str:
    return asked if asked != "auto" or config is None else config.platform
