"""A backend as a value, and the compiled program of one, a signature and a config."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.signature import Inputs, Signature
from rpa.validate import as_int32

_SHORT = {
    "num_queries_per_block": "queries",
    "num_kv_pages_per_block": "pages",
    "num_warps": "warps",
    "num_stages": "stages",
    "num_kv_splits": "splits",
}


@dataclass(frozen=True)
class Implementation:
    """One backend: what it runs, what it cannot, how it is tuned, and how wrong it may be."""

    name: str
    run: Callable[[Inputs, Signature, RaggedPageAttentionv2Config], tuple[Any, Any]]
    supports: Callable[[Signature, Device], str | None]  # the reason it cannot, or None
    heuristic: Callable[[Signature, Device], RaggedPageAttentionv2Config]
    candidates: Callable[[Signature, Device], tuple[RaggedPageAttentionv2Config, ...]]
    claim: Callable[[Signature, Device], dict[str, Any]]  # keyword arguments of oracle.Claim


def label(implementation: Implementation, config: Any) -> str:
    """The program's name, which says backend and config; it stands in the lowered text and in every profile.

    >>> from rpa.registry import load
    >>> label(load("xla"), RaggedPageAttentionv2Config(num_queries_per_block=64))
    'rpa_v2__xla__queries64'
    """
    parts = [f"{short}{getattr(config, name)}" for name, short in _SHORT.items() if getattr(config, name, None)]
    parts += [f"{name}{value}" for name, value in getattr(config, "options", ())]
    return re.sub(r"\W", "_", "__".join(["rpa_v2", implementation.name, "_".join(parts) or "default"]))


@lru_cache(maxsize=4096)
def compiled(
    implementation: Implementation, signature: Signature, config: RaggedPageAttentionv2Config, device: Device
) -> Any:
    """The jitted program; `device` is in the key because a program is lowered for one chip or interpreter."""

    def ragged_page_attention(inputs: Inputs) -> Any:
        return implementation.run(_in_form(inputs, signature), signature, config)

    ragged_page_attention.__name__ = ragged_page_attention.__qualname__ = label(implementation, config)
    return jax.jit(ragged_page_attention)


def _in_form(inputs: Inputs, signature: Signature) -> Inputs:
    """Device arrays in the dtypes and shapes that backends expect; for those that are so already, nothing."""

    def floats(array: Any, heads: int) -> Any:
        return None if array is None else jnp.broadcast_to(array.astype(jnp.float32), (heads,))

    return Inputs(
        inputs.queries,
        inputs.kv_pages,
        as_int32(inputs.context_lens),
        as_int32(inputs.block_tables),
        as_int32(inputs.query_start_loc),
        as_int32(inputs.num_seqs).reshape(1),
        floats(inputs.softmax_aux, signature.num_q_heads),
        floats(inputs.k_scale, signature.num_kv_heads),
        floats(inputs.v_scale, signature.num_kv_heads),
    )


def _shapes(signature: Signature) -> Inputs:
    """The inputs of a call, without values."""
    sized, whole, real = jax.ShapeDtypeStruct, jnp.int32, jnp.float32
    heads, kv_heads, seqs = signature.num_q_heads, signature.num_kv_heads, signature.max_seqs
    pages = (signature.num_pages, signature.page_size, 2 * kv_heads, signature.head_dim)
    shapes: tuple[Any, ...] = (
        sized((signature.num_tokens, heads, signature.head_dim), signature.q_dtype),
        sized(pages, signature.kv_dtype),
        sized((seqs,), whole),
        sized((seqs, signature.pages_per_seq), whole),
        sized((seqs + 1,), whole),
        sized((1,), whole),
        sized((heads,), real) if signature.sinks else None,
        sized((kv_heads,), real) if signature.k_scale else None,
        sized((kv_heads,), real) if signature.v_scale else None,
    )
    return Inputs(*shapes)


def nothing_to_do(signature: Signature) -> tuple[Any, Any]:
    """The answer where there is no row or no sequence: every row is nobody's."""
    shape = (signature.num_tokens, signature.num_q_heads)
    output = jnp.zeros((*shape, signature.head_dim), signature.q_dtype)
    return output, jnp.full(shape, -jnp.inf, jnp.float32) if signature.return_lse else None


@dataclass(frozen=True)
class Program:
    """One candidate of a tuning run: callable on `Inputs`, and able to say what it promises."""

    implementation: Implementation
    signature: Signature
    config: RaggedPageAttentionv2Config
    device: Device

    def __call__(self, inputs: Inputs) -> Any:
        return self.jitted(inputs)

    @property
    def jitted(self) -> Any:
        return compiled(self.implementation, self.signature, self.config, self.device)

    def refusal(self) -> str | None:
        """Why it cannot be traced, if so; a call that follows finds the trace made."""
        try:
            self.jitted.eval_shape(_shapes(self.signature))
        except Exception as error:  # whatever a backend makes of a config that was never meant for it
            return f"{type(error).__name__}: {error}"
        return None

    @property
    def label(self) -> str:
        return label(self.implementation, self.config)

    def claim(self) -> dict[str, Any]:
        """The keyword arguments of `oracle.Claim` that this program's output must keep to."""
        return self.implementation.claim(self.signature, self.device)
