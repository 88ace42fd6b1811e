"""Which backend and which config a call of our operation gets, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from rpa import cache, registry, settings, tune
from rpa.cache import PersistentCache, Triple
from rpa.chain import ConfigSelectorChain, Found, Lookup, Query
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device, fingerprint
from rpa.program import Program
from rpa.registry import Implementation
from rpa.signature import Inputs, Signature

STORE = "ragged-page-attention"
_IDLE = "this batch is mostly idle"


@lru_cache(maxsize=1)
def default_chain() -> ConfigSelectorChain:
    """The selector of the public function, made at its first call."""
    return ConfigSelectorChain(persistent=PersistentCache(STORE))


def moment() -> Any:
    """What a remembered choice of the public function depends on besides the call; None where none may be used.

    Under an overlay or an observer of the events every call is asked anew.
    """
    chain = default_chain()
    if cache.overlays.get() or chain.on_event:
        return None
    stores = chain.cache.generation, PersistentCache.generation
    return stores, registry.added, chain.policy, settings.environment()


# ------------------------------------------------------------------ the choice


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
    signature: Signature, device: Device, platform: str, cfg: RaggedPageAttentionv2Config | None, *,
    dry: bool = False, **more: Any,
) -> Choice:  # fmt: skip
    """The backend and the config of a validated call; `platform` wins over the config's own.

    Args:
        more: `inputs` and `sharding`, as in `query_of`.

    Raises:
        ValueError: no backend of the platform can take the call.
    """
    if cfg is not None and cfg.backend not in ("any", device.platform) and platform != "xla":  # which runs anywhere
        raise ValueError(f"cfg.backend={cfg.backend!r}: this call is lowered for {device.platform} ({device.kind})")
    asked = platform_of(platform, cfg)
    implementation, why = registry.resolve(asked, signature, device)
    query = query_of(signature, device, platform, cfg, **more)
    found = default_chain().find(query, dry=dry)
    if found.source not in ("explicit", "heuristic"):  # those two speak of the preferred backend
        implementation, why = registry.resolve(platform_of(asked, found.config), signature, device)
    reason = f"{found.reason}; {implementation.name}: {why}"
    return Choice(found.config, found.source, reason, found.trail, implementation, query.triple)


def query_of(
    signature: Signature, device: Device, platform: str, cfg: RaggedPageAttentionv2Config | None, *,
    inputs: Inputs | None = None, sharding: str = "none",
) -> Query:  # fmt: skip
    """Our operation's call, as the chain sees it.

    Args:
        inputs: concrete arrays that a tuner may run on; None where there are none, as inside jit.
        sharding: how the call is spread over a mesh, part of the key.
    """
    platform = platform_of(platform, cfg)

    def own_choice(slot: registry.Slot) -> RaggedPageAttentionv2Config:
        return registry.implementation_of(slot).heuristic(signature, device).replace(platform=slot.platform)

    def candidates() -> list[RaggedPageAttentionv2Config]:
        """Every backend's own choice, the preferred one's first, then their variations."""
        slots = registry.able(platform, signature, device)
        variations = [
            config.replace(platform=slot.platform)
            for slot in slots
            for config in registry.implementation_of(slot).candidates(signature, device)
        ]
        return list(dict.fromkeys([*map(own_choice, slots), *variations]))

    def program(config: RaggedPageAttentionv2Config) -> Program:
        implementation, _ = registry.resolve(platform_of(platform, config), signature, device)
        return Program(implementation, signature, config, device)

    def fit(config: RaggedPageAttentionv2Config) -> tuple[RaggedPageAttentionv2Config | None, str]:
        if platform not in ("auto", config.platform) and config.platform != "auto":
            return None, f"it is for platform={config.platform!r}"
        if config.backend not in ("any", device.platform):
            return None, f"it is for backend={config.backend!r}"
        slots = registry.able(platform_of(platform, config), signature, device)
        if not slots:
            return None, f"no kernel of platform={config.platform!r} takes this call"
        if config == RaggedPageAttentionv2Config(platform=config.platform):  # names no more than a backend
            return own_choice(slots[0]), ""
        refusal = program(config).refusal()
        if refusal is not None:  # by hand, or by another version of the backend
            cache.warn(f"a stored {config} is ignored: {refusal}")
        return (config, "") if refusal is None else (None, refusal)

    return Query(
        op=f"{registry.ALGORITHM}@0",
        device=device,
        stem=stem(signature, platform, sharding),
        shipped=lambda: _nearest(cache.shipped(fingerprint(device)), stem(signature, "auto", "none")),
        heuristic=lambda: own_choice(registry.able(platform, signature, device)[0]),
        candidates=candidates,
        program=program,
        args=() if inputs is None else (inputs,),
        explicit=cfg,
        untunable=lambda tuner: _untunable(inputs, signature, sharding) or tune.why_not(tuner),
        fit=fit,
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


def platform_of(asked: str, config: Any) -> str:
    """The platform that a call asks for, by itself or else in its config."""
    return asked if asked != "auto" or config is None else config.platform


# ------------------------------------------------------------------ the readable keys


def stem(signature: Signature, platform: str, sharding: str) -> str:
    """The readable key of a call: what changes the best config, in buckets; scales and `num_seqs` do not.

    >>> stem(registry.TYPICAL, "auto", "none")
    'auto tokens<=8 seqs<=8 pages<=128 heads=32/8 dim=128 page=16 q=bfloat16 kv=bfloat16 compute=bfloat16'
    """
    told = {
        "tokens<": _bucket(signature.num_tokens),
        "seqs<": _bucket(signature.max_seqs),
        "pages<": _bucket(signature.pages_per_seq),
        "heads": f"{signature.num_q_heads}/{signature.num_kv_heads}",
        "dim": signature.head_dim,
        "page": signature.page_size,
        "q": signature.q_dtype,
        "kv": signature.kv_dtype,
        "compute": signature.compute_dtype,
        "window<": signature.sliding_window and _bucket(signature.sliding_window),
        "vmem": signature.vmem_limit_bytes,
        "sharding": None if sharding == "none" else sharding,
    }
    flags = [name for name in ("sinks", "k_scale", "v_scale", "return_lse", "optimized") if getattr(signature, name)]
    flags += ["cap"] if signature.logits_soft_cap is not None else []
    return " ".join([platform, *(f"{name}={value}" for name, value in told.items() if value is not None), *flags])


def _nearest(table: Mapping[str, Any], stem: str) -> Lookup:
    """The config that ships for the calls most like this one, and the reason.

    An entry for as many tokens in pages of another size serves as it is, since GPU blocks are in tokens; one for other
    sizes or options of the same heads and dtypes names the backend, and leaves the block sizes to it.
    """
    far, key = min(((_distance(stem, key.partition("|")[2]), key) for key in table), default=(math.inf, ""))
    if far == math.inf:
        return None, "the tables that ship hold nothing like it for this device"
    config = cache.config_of(table[key], f"the table that ships: {key!r}")
    if config is None or far < 1:
        return config, f"it ships: {table[key].get('note', '')}"
    return RaggedPageAttentionv2Config(platform=config.platform), f"the nearest that ships is {key.partition('|')[2]}"


def _distance(one: str, other: str) -> float:
    """How far apart two calls stand: doublings of their sizes, eight for an option, infinite for other heads."""
    (sizes, model, options), (other_sizes, other_model, other_options) = _parsed(one), _parsed(other)
    if model != other_model:
        return math.inf
    # A page's size is worth less than anything else, as long as the table holds no more tokens in all.
    doublings = (abs(size - other_sizes[name]) / (64 if name == "page" else 1) for name, size in sizes.items())
    return sum(doublings) + 8 * len(options ^ other_options)


@lru_cache(maxsize=4096)
def _parsed(stem: str) -> tuple[dict[str, float], frozenset[str], frozenset[str]]:
    """What a key tells: sizes as powers of two, what makes a model (and whether it decodes), and options."""
    sizes: dict[str, float] = {"window<": 20.0}  # where there is none, one of a million tokens
    model, options = set(), set()
    for word in stem.split():
        name, _, value = word.partition("=")
        if name in ("tokens<", "seqs<", "pages<", "page", "window<"):
            sizes[name] = math.log2(int(value))
        else:
            (model if name in ("heads", "dim", "q", "kv", "compute") else options).add(word)
    sizes["pages<"] += sizes["page"]  # from pages to tokens
    model |= {"decode"} if sizes["tokens<"] <= sizes["seqs<"] else set()
    return sizes, frozenset(model), frozenset(options)


def _bucket(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()
