"""`explain`: what a call would get, and why, without running or tuning anything."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import numpy as np

from rpa import api, registry, select
from rpa.config import RaggedPageAttentionv2Config


class Explanation(str):
    """A text for people, with what it was made of as attributes."""

    backend: str
    config: RaggedPageAttentionv2Config
    source: str
    reason: str
    key: tuple[str, str, str]  # for overlay_cache and the stores
    trail: tuple[tuple[str, str], ...]  # every stage asked, and its answer
    refusals: dict[str, str | None]  # every backend's reason not to take the call


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """What `ragged_page_attention_v2` would do with these very arguments, and why.

    Nothing is run, tuned or stored. Arrays may be `jax.ShapeDtypeStruct`s where only their shapes are known.

    Raises:
        TypeError, ValueError: as the call itself would.
    """
    given = inspect.signature(api.ragged_page_attention_v2).bind(*args, **kwargs).arguments
    call = api.call_of({name: _stand_in(value) for name, value in given.items()})
    choice, device = select.choose(call, dry=True), call.device
    refusals = {spec.name: reason for spec, reason in registry.survey("auto", call.signature, device)}
    backend, fields = choice.implementation.name, choice.config.to_dict().items()
    lines = [
        f"backend  {backend} on {device.platform} ({device.kind})",
        f"config   {', '.join(f'{field}={value}' for field, value in fields if value not in (None, {}))}",
        f"source   {choice.source}",
        f"reason   {choice.reason}",
        f"key      {choice.key[2]}",
        "stages",
        *(f"  {stage:<11}{answer}" for stage, answer in choice.trail),
        "backends",
        *(f"  {name:<11}{reason or 'can take this call'}" for name, reason in refusals.items()),
    ]
    text = Explanation("\n".join(lines))
    vars(text).update(vars(choice), backend=backend, refusals=refusals)
    return text


def _stand_in(value: Any) -> Any:
    """Zeros that take no memory, where only a shape and a dtype are known."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return value
