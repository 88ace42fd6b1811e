"""Our backends as contenders: through their own programs, config by heuristic or table, as a user's call has it."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fuzz.bench.arrays import Batch
from fuzz.bench.run import Contender
from oracle import Claim


def backend(name: str) -> Contender:
    """The backend in slot `name` ("xla", "triton", ...), through its own program, config by heuristic or table."""

    def chosen(batch: Batch) -> tuple:
        from rpa import api, device, registry

        inputs, signature = api.prepare((*batch.arguments(), *_scales(batch)), _static(batch), False)
        return inputs, signature, registry.load(name), device.current(inputs.queries)

    def config(batch: Batch) -> Any:
        from rpa import select

        _, signature, _, device = chosen(batch)
        return select.choose(select.Attention(signature, device, _platform(name))).config

    def prepare(batch: Batch) -> tuple[Callable, list[tuple]]:
        from rpa import api

        _, signature, implementation, device = chosen(batch)
        program = api.compiled(implementation, signature, config(batch), device)
        rotations = [
            api.prepare((*batch.arguments(i), *_scales(batch)), _static(batch), False)[0]
            for i in range(len(batch.tables))
        ]
        return program, [(jax.device_put(inputs),) for inputs in rotations]

    def claim(batch: Batch) -> Claim:
        _, signature, implementation, device = chosen(batch)
        return Claim(**implementation.claim(signature, device))

    def unsupported(batch: Batch) -> str | None:
        from rpa import registry

        _, signature, _, device = chosen(batch)
        return registry.why_not(next(slot for slot in registry.SLOTS if slot.name == name), signature, device)

    def public(batch: Batch) -> Callable[[int], Any]:
        from rpa import ragged_page_attention_v2

        # `num_seqs` as a server keeps it, which is also the program's own form: nothing compiles twice.
        count = np.array([batch.num_seqs], np.int32)
        turns = [batch.arguments(i) for i in range(len(batch.tables))]
        turns = [jax.device_put((*turn[:5], count, turn[6])) for turn in turns]
        options = batch.options | {"platform": _platform(name), "cfg": config(batch)}
        # The session's override of the policy is no part of what a user's warm call pays for.
        bare = contextvars.Context()
        return lambda turn: bare.run(ragged_page_attention_v2, *turns[turn % len(turns)], **options)

    return Contender(name, prepare, claim, unsupported, lambda answer: np.asarray(answer[0]), public=public)


def _platform(name: str) -> str:
    from rpa import registry

    return next(slot.platform for slot in registry.SLOTS if slot.name == name)


def _scales(batch: Batch) -> tuple:
    return batch.options.get("k_scale"), batch.options.get("v_scale")


def _static(batch: Batch) -> tuple:
    o = batch.options
    return (o["softmax_scale"], o["logits_soft_cap"], o["compute_dtype"], False, o["sliding_window"], None, None, False)


def backends_here(platform: str) -> list[Contender]:
    """Every backend of ours whose chip this is."""
    from rpa import registry

    return [backend(slot.name) for slot in registry.exists() if platform in slot.chips]
