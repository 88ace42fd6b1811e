"""`RaggedPageAttentionv2`: the operation as a class, each method a few lines over the plain functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rpa import api, registry
from rpa.arguments import Options, taking
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.kernel import Invocation, Kernel
from rpa.mesh import layout_of
from rpa.select import Attention
from rpa.signature import Inputs

# The chips whose candidates are asked for where there is none of them.
_STAND_INS = {"gpu": Device("gpu", "NVIDIA H200", (9, 0)), "tpu": Device("tpu", "TPU v6 lite")}

# The seed's order of arguments, which is not the public function's.
_ARRAYS = "self queries kv_pages context_lens block_tables query_start_loc num_seqs "
_STATIC = (
    "softmax_scale logits_soft_cap compute_dtype optimized sliding_window softmax_aux mask_value vmem_limit_bytes "
)
_MORE = "return_lse k_scale v_scale"


class RaggedPageAttentionv2(Kernel):
    """Ragged paged attention for an `Executor`, or to be run on a config of one's own."""

    op_id = registry.ALGORITHM

    @taking(_ARRAYS + "platform " + _STATIC, "cfg validate " + _MORE, cfg=inspect.Parameter.empty)
    def run(self, **call: Any) -> Any:
        """The public function on exactly this config; `platform` wins over the config's own."""
        return api.ragged_page_attention_v2(**call)

    @taking(_ARRAYS + _STATIC + "platform cfg mesh in_specs out_specs check_vma " + _MORE, check_vma=False)
    def create_shard_map_wrapper(self, **call: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """`(fn, call_args)`: `fn(*call_args)` is the call over the mesh, and `fn` takes the seven arrays."""
        arrays = Inputs(*map(call.pop, Inputs._fields))
        options = Options(*map(call.pop, Options._fields))
        layout_of(call["mesh"], call["in_specs"])  # what is wrong with them is said now
        *seven, k_scale, v_scale = arrays

        def sharded(*given: Any) -> Any:
            return api.call(Inputs(*given, k_scale=k_scale, v_scale=v_scale), options, **call)

        return sharded, tuple(seven)

    def get_impl(self, cfg: RaggedPageAttentionv2Config) -> Callable[..., Any]:
        """The kernel a config names, as a callable with the operation's keyword arguments.

        Raises:
            ValueError: there is none for the config's platform and backend.
        """
        platform = registry.detect_platform(registry.ALGORITHM, cfg.platform)
        return registry.kernel_registry.get(registry.ALGORITHM, platform, cfg.backend)

    def call(self, inv: Invocation) -> Attention:
        return _Call(**vars(_call_of(inv)), kernel=self, inv=inv)

    def heuristic_cfg(self, inv: Invocation) -> RaggedPageAttentionv2Config:
        """The preferred backend's own choice."""
        return _call_of(inv).heuristic()

    def candidate_cfgs(self, inv: Invocation, chip: str | None = None) -> list[RaggedPageAttentionv2Config]:
        """What the backends of the device at hand would have timed, or those of a stand-in for a chip that is not."""
        call = _call_of(inv)
        return (call if chip in (None, call.device.platform) else replace(call, device=_STAND_INS[chip])).candidates()

    def candidate_cfgs_gpu(self, inv: Invocation) -> list[RaggedPageAttentionv2Config]:
        """The same for a GPU: the one at hand, or an H200."""
        return RaggedPageAttentionv2.candidate_cfgs(self, inv, "gpu")

    def candidate_cfgs_tpu(self, inv: Invocation) -> list[RaggedPageAttentionv2Config]:
        """The same for a TPU: the one at hand, or a v6e."""
        return RaggedPageAttentionv2.candidate_cfgs(self, inv, "tpu")

    candidate_cfgs_shard_map_gpu = candidate_cfgs_gpu
    candidate_cfgs_shard_map_tpu = candidate_cfgs_tpu


@dataclass(frozen=True)
class _Call(Attention):
    """A call whose configs the class names, or a subclass of it."""

    kernel: Any = None
    inv: Any = None

    def heuristic(self) -> Any:
        return self.kernel.hook("heuristic_cfg", self.device.platform)(self.inv)

    def candidates(self) -> list[Any]:
        return list(self.kernel.hook("candidate_cfgs", self.device.platform)(self.inv))


def _call_of(inv: Invocation) -> Attention:
    """An invocation as selection sees it; metadata that it leaves out are those of an idle batch."""
    run = inspect.signature(RaggedPageAttentionv2.run)
    given = run.bind_partial(None, *inv.args, **inv.kwargs).arguments
    missing = [name for name in ("queries", "kv_pages", "block_tables") if name not in given]
    if missing:
        raise ValueError(f"invocation of {inv.op_id}: {missing[0]} is missing, and no config can be found without it")
    max_seqs = given["block_tables"].shape[0]
    idle = {
        "context_lens": np.zeros(max_seqs, np.int32),
        "query_start_loc": np.zeros(max_seqs + 1, np.int32),
        "num_seqs": max_seqs,
    }
    over = {"mesh": inv.mesh, "in_specs": inv.in_specs, "out_specs": inv.out_specs, "cfg": inv.override_cfg}
    return api.call_of({**idle, **given, **over})
