"""`RaggedPageAttentionv2`: the operation as a class, each method a few lines over the plain functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rpa import api, registry, select, shard
from rpa import validate as rules
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device, current
from rpa.kernel import Invocation, Kernel
from rpa.registered import detect_platform, kernel_registry
from rpa.signature import Inputs, Signature

# The chips whose candidates are asked for where there is none of them.
_STAND_INS = {"gpu": Device("gpu", "NVIDIA H200", (9, 0)), "tpu": Device("tpu", "TPU v6 lite")}
_OPTIONS = {
    "softmax_scale": None,
    "logits_soft_cap": None,
    "compute_dtype": jnp.bfloat16,
    "optimized": False,
    "sliding_window": None,
    "mask_value": None,
    "vmem_limit_bytes": None,
    "return_lse": False,
}


class RaggedPageAttentionv2(Kernel):
    """Ragged paged attention for an `Executor`, or to be run on a config of one's own."""

    op_id = registry.ALGORITHM

    def run(
        self,
        queries: Any,
        kv_pages: Any,
        context_lens: Any,
        block_tables: Any,
        query_start_loc: Any,
        num_seqs: Any,
        platform: str | None = None,
        softmax_scale: float | None = None,
        logits_soft_cap: float | None = None,
        compute_dtype: Any = jnp.bfloat16,
        optimized: bool = False,
        sliding_window: int | None = None,
        softmax_aux: Any = None,
        mask_value: float | None = None,
        vmem_limit_bytes: int | None = None,
        *,
        cfg: RaggedPageAttentionv2Config,
        **more: Any,
    ) -> Any:
        """The public function on exactly this config; `platform` wins over the config's own.

        `more` takes the public function's `return_lse`, `k_scale`, `v_scale` and `validate`.
        """
        return api.ragged_page_attention_v2(
            queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, softmax_aux,
            softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap, compute_dtype=compute_dtype,
            optimized=optimized, sliding_window=sliding_window, mask_value=mask_value,
            vmem_limit_bytes=vmem_limit_bytes, platform=platform, cfg=cfg, **more,
        )  # fmt: skip

    def create_shard_map_wrapper(
        self,
        queries: Any,
        kv_pages: Any,
        context_lens: Any,
        block_tables: Any,
        query_start_loc: Any,
        num_seqs: Any,
        softmax_scale: float | None = None,
        logits_soft_cap: float | None = None,
        compute_dtype: Any = jnp.bfloat16,
        optimized: bool = False,
        sliding_window: int | None = None,
        softmax_aux: Any = None,
        mask_value: float | None = None,
        vmem_limit_bytes: int | None = None,
        platform: str | None = None,
        cfg: RaggedPageAttentionv2Config | None = None,
        mesh: Any = None,
        in_specs: Any = None,
        out_specs: Any = None,
        check_vma: bool = False,
        return_lse: bool = False,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """`(fn, call_args)`: `fn(*call_args)` is the call over the mesh, and `fn` takes the seven arrays."""
        arrays = (queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, softmax_aux,
                  k_scale, v_scale)  # fmt: skip
        options = (softmax_scale, logits_soft_cap, compute_dtype, optimized, sliding_window, mask_value,
                   vmem_limit_bytes, return_lse)  # fmt: skip
        return shard.wrapper(arrays, options, platform, cfg, mesh, in_specs, out_specs, check_vma)

    def get_impl(self, cfg: RaggedPageAttentionv2Config) -> Callable[..., Any]:
        """The kernel a config names, as a callable with the operation's keyword arguments.

        Raises:
            ValueError: there is none for the config's platform and backend.
        """
        platform = detect_platform(registry.ALGORITHM, cfg.platform)
        return kernel_registry.get(registry.ALGORITHM, platform, cfg.backend)

    def query(self, inv: Invocation) -> select.Query:
        call = _call_of(inv)
        traced = any(rules.is_traced(array) for array in call.inputs)
        query = select.query_of(
            call.signature, call.device, call.platform, inv.override_cfg,
            inputs=None if traced else call.inputs, sharding=call.sharding,
        )  # fmt: skip
        chip = call.device.platform
        return replace(
            query,
            heuristic=lambda: self.hook("heuristic_cfg", chip)(inv),
            candidates=lambda: list(self.hook("candidate_cfgs", chip)(inv)),
        )

    def heuristic_cfg(self, inv: Invocation) -> RaggedPageAttentionv2Config:
        """The preferred backend's own choice."""
        call = _call_of(inv)
        return select.query_of(call.signature, call.device, call.platform, None).heuristic()

    def candidate_cfgs(self, inv: Invocation) -> list[RaggedPageAttentionv2Config]:
        """What the backends of the device at hand would have timed."""
        call = _call_of(inv)
        return select.candidates(call.signature, call.device, call.platform)

    def candidate_cfgs_gpu(self, inv: Invocation) -> list[RaggedPageAttentionv2Config]:
        """The same for a GPU: the one at hand, or an H200."""
        return _candidates_for("gpu", inv)

    def candidate_cfgs_tpu(self, inv: Invocation) -> list[RaggedPageAttentionv2Config]:
        """The same for a TPU: the one at hand, or a v6e."""
        return _candidates_for("tpu", inv)

    candidate_cfgs_shard_map_gpu = candidate_cfgs_gpu
    candidate_cfgs_shard_map_tpu = candidate_cfgs_tpu


def _candidates_for(chip: str, inv: Invocation) -> list[RaggedPageAttentionv2Config]:
    call = _call_of(inv)
    device = call.device if call.device.platform == chip else _STAND_INS[chip]
    return select.candidates(call.signature, device, call.platform)


class _Call(NamedTuple):
    """An invocation as selection sees it: over a mesh, one device's share."""

    inputs: Inputs
    signature: Signature
    platform: str
    device: Device
    sharding: str


def _call_of(inv: Invocation) -> _Call:
    """The validated call of an invocation; metadata that it leaves out are those of an idle batch."""
    names = ("queries", "kv_pages", "context_lens", "block_tables", "query_start_loc", "num_seqs")
    given = {**dict(zip(names, inv.args, strict=False)), **inv.kwargs}
    missing = [name for name in ("queries", "kv_pages", "block_tables") if name not in given]
    if missing:
        raise ValueError(f"invocation of {inv.op_id}: {missing[0]} is missing, and no config can be found without it")
    max_seqs = given["block_tables"].shape[0]
    idle = {
        "context_lens": np.zeros(max_seqs, np.int32),
        "query_start_loc": np.zeros(max_seqs + 1, np.int32),
        "num_seqs": max_seqs,
    }
    arrays = tuple(given.get(name, idle.get(name)) for name in (*names, "softmax_aux", "k_scale", "v_scale"))
    options = tuple(given.get(name, default) for name, default in _OPTIONS.items())
    inputs, signature = api.prepare(arrays, options, False)
    cfg = inv.override_cfg
    asked = rules.platform_of(given.get("platform"))
    asked = cfg.platform if asked == "auto" and cfg is not None else asked
    if all(value is None for value in (inv.mesh, inv.in_specs, inv.out_specs)):
        return _Call(inputs, signature, asked, current(inputs.queries), "none")
    local, device, plan = shard.share_of(inputs, signature, inv.mesh, inv.in_specs)
    return _Call(inputs, local, asked, device, plan.label(inv.mesh))
