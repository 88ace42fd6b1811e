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
    choice = select.choose(call, dry=True)
    refusals = {spec.name: reason for spec, reason in registry.survey("auto", call.signature, call.device)}
    fields = {field: value for field, value in choice.config.to_dict().items() if value not in (None, {})}
    text = Explanation(
        f"backend  {choice.implementation.name} on {call.device.platform} ({call.device.kind})\n"
        f"config   {', '.join(f'{field}={value}' for field, value in fields.items())}\n"
        f"source   {choice.source}\nreason   {choice.reason}\nkey      {choice.key[2]}\n"
        + _listed("stages", dict(choice.trail))
        + _listed("backends", {name: reason or "can take this call" for name, reason in refusals.items()}).rstrip()
    )
    text.backend, text.config, text.source = choice.implementation.name, choice.config, choice.source
    text.reason, text.key, text.trail, text.refusals = choice.reason, choice.key, choice.trail, refusals
    return text


def _listed(title: str, answers: dict[str, str]) -> str:
    return "".join([f"{title}\n", *(f"  {name:<11}{answer}\n" for name, answer in answers.items())])


def _stand_in(value: Any) -> Any:
    """Zeros that take no memory, where only a shape and a dtype are known."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return value
