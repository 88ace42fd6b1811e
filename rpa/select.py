"""Which backend and which config a call of our operation gets, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from rpa import cache, registry, settings, tune
from rpa.cache import PersistentCache
from rpa.chain import Answer, Call, ConfigSelectorChain, Found
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.program import Implementation, Program
from rpa.registry import KernelSpec
from rpa.signature import Inputs, Signature

STORE = "ragged-page-attention"
_IDLE = "this batch is mostly idle"
_MODEL = ("heads", "dim", "q", "kv", "compute", "decode")  # what a shipped config is never taken across


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
    return stores, registry.kernel_registry.specs, chain.policy, settings.environment()


# ------------------------------------------------------------------ a call, and what it gets


@dataclass(frozen=True)
class Attention(Call):
    """A call of our operation, validated; `platform` wins over the config's own.

    Args:
        inputs: concrete arrays that a tuner may run on; None where there are none, as inside jit.
        sharding: how the call is spread over a mesh, part of the key.
    """

    signature: Signature
    device: Device
    platform: str = "auto"
    explicit: RaggedPageAttentionv2Config | None = None
    inputs: Inputs | None = None
    sharding: str = "none"
    op: ClassVar[str] = f"{registry.ALGORITHM}@0"

    @property
    def args(self) -> tuple[Any, ...]:
        return () if self.inputs is None else (self.inputs,)

    @property
    def stem(self) -> str:
        return stem(self.signature, self.platform_for(self.explicit), self.sharding)

    def platform_for(self, config: RaggedPageAttentionv2Config | None) -> str:
        """What the call asks for, by itself or else in a config."""
        return self.platform if self.platform != "auto" or config is None else config.platform

    def kernel_for(self, config: RaggedPageAttentionv2Config | None) -> tuple[KernelSpec, str]:
        """The kernel that a config means here, and why that one; without a config the preferred."""
        return registry.resolve(self.platform_for(config), self.signature, self.device)

    def own(self, spec: KernelSpec) -> RaggedPageAttentionv2Config:
        """A kernel's own choice."""
        config = registry.implementation_of(spec).heuristic(self.signature, self.device)
        return config.replace(platform=spec.platform)

    def heuristic(self) -> RaggedPageAttentionv2Config:
        return self.own(self.kernel_for(self.explicit)[0])

    def candidates(self) -> list[RaggedPageAttentionv2Config]:
        """Every kernel's own choice, the preferred one's first, then their variations."""
        able = registry.able(self.platform_for(self.explicit), self.signature, self.device)
        variations = [
            config.replace(platform=spec.platform)
            for spec in able
            for config in registry.implementation_of(spec).candidates(self.signature, self.device)
        ]
        return list(dict.fromkeys([*map(self.own, able), *variations]))

    def program(self, config: RaggedPageAttentionv2Config) -> Program:
        return Program(registry.implementation_of(self.kernel_for(config)[0]), self.signature, config, self.device)

    def fit(self, config: RaggedPageAttentionv2Config) -> Answer:
        if self.platform not in ("auto", config.platform) and config.platform != "auto":
            return None, f"it is for platform={config.platform!r}"
        if config.backend not in ("any", self.device.platform):
            return None, f"it is for backend={config.backend!r}"
        able = registry.able(self.platform_for(config), self.signature, self.device)
        if not able:
            return None, f"no kernel of platform={config.platform!r} takes this call"
        if config == RaggedPageAttentionv2Config(platform=config.platform):  # names no more than a backend
            return self.own(able[0]), ""
        refusal = self.program(config).refusal()
        if refusal is not None:  # by hand, or by another version of the backend
            cache.warn(f"a stored {config} is ignored: {refusal}")
            return None, refusal
        return config, ""

    def untunable(self, tuner: Any, asked: bool) -> str | None:
        if reason := super().untunable(tuner, asked):
            return reason
        if not asked and cache.shipped(self.device):
            return f"a table ships for {self.device.kind}, so no call waits; RPA_AUTOTUNE_POLICY=autotune would tune"
        if self.sharding != "none":
            return "a sharded call is not tuned: all its processes must decide alike"
        if self.inputs is None:
            return "inside jit there is nothing to time: tables and heuristics decide"
        count = int(np.asarray(self.inputs.num_seqs).reshape(-1)[0])
        offsets = np.asarray(self.inputs.query_start_loc)
        live = int(offsets[count]) - int(offsets[0]) if 0 < count < len(offsets) else 0
        if 2 * live < self.signature.num_tokens or not np.asarray(self.inputs.context_lens)[:count].any():
            return f"{_IDLE} ({live} of {self.signature.num_tokens} rows live) and stands for no other"
        return tune.why_not(tuner)

    def shipped(self) -> Answer:
        """The config that ships for the calls most like this one.

        An entry for as many tokens in pages of another size serves as it is, since GPU blocks are in tokens; one for
        other sizes or options of the same heads and dtypes names the backend, and leaves the block sizes to it.
        """
        table = cache.shipped(self.device)
        if not table:
            return None, "no table ships for this device"
        wanted = _parsed(stem(self.signature, "auto", "none"))
        far, key = min((_distance(wanted, _parsed(key.partition("|")[2])), key) for key in table)
        if far == math.inf:
            return None, f"the table that ships for {self.device.kind} holds nothing like it"
        config = cache.config_of(table[key], f"the table that ships: {key!r}")
        if config is None or far < 1:
            return config, f"it ships: {table[key].get('note', '')}"
        backend = RaggedPageAttentionv2Config(platform=config.platform)
        return backend, f"the nearest that ships is {key.partition('|')[2]}"


@dataclass(frozen=True)
class Choice(Found):
    """What was found for a call of our operation, and the backend it is for."""

    implementation: Implementation

    @property
    def of_this_batch(self) -> bool:
        """Whether another batch of the same shapes might get another config."""
        return any(answer.startswith(_IDLE) for _, answer in self.trail)


def choose(call: Attention, *, dry: bool = False) -> Choice:
    """The backend and the config of a call; with `dry` nothing is tuned.

    Raises:
        ValueError: no backend of the platform can take the call.
    """
    cfg, chip = call.explicit, call.device.platform
    if cfg is not None and cfg.backend not in ("any", chip) and call.platform != "xla":  # which runs anywhere
        raise ValueError(f"cfg.backend={cfg.backend!r}: this call is lowered for {chip} ({call.device.kind})")
    found = default_chain().find(call, dry=dry)
    # A heuristic is the preferred kernel's own; any other config may name one.
    spec, why = call.kernel_for(cfg if found.source == "heuristic" else found.config)
    reason = f"{found.reason}; {spec.name}: {why}"
    return Choice(**{**vars(found), "reason": reason}, implementation=registry.implementation_of(spec))


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


def _bucket(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def _distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How far apart two keys stand: doublings of their sizes, eight for an option, infinite for another model."""
    far = 0.0
    for name in one.keys() | other.keys():
        mine, its = one.get(name), other.get(name)
        if isinstance(mine, float) and isinstance(its, float):
            far += abs(mine - its) / (64 if name == "page" else 1)  # the same tokens in other pages are the nearest
        elif mine != its:
            far += math.inf if name in _MODEL else 8
    return far


@lru_cache(maxsize=4096)
def _parsed(stem: str) -> dict[str, Any]:
    """What a key tells by name, sizes as powers of two."""
    told: dict[str, Any] = {"window<": 20.0}  # where there is none, one of a million tokens
    for word in stem.split():
        name, _, value = word.partition("=")
        told[name] = math.log2(int(value)) if name.endswith("<") or name == "page" else value
    told["pages<"] += told["page"]  # from pages to tokens
    told["decode"] = told["tokens<"] <= told["seqs<"]
    return told
