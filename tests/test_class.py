"""Code written against the seed's class and executor goes on working, on every method of the contract."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_call
from jax.sharding import Mesh, PartitionSpec

from rpa import (
    AutotunePolicy,
    ConfigCache,
    ConfigSelectorChain,
    Executor,
    Invocation,
    Kernel,
    PersistentCache,
    RaggedPageAttentionv2,
    RaggedPageAttentionv2Config,
    Tuner,
    kernel_registry,
    ragged_page_attention_v2,
)

CFG = RaggedPageAttentionv2Config(
    num_kv_pages_per_block=2,
    num_queries_per_block=8,
    num_warps=4,
    num_stages=1,
    platform="xla",
    backend="any",
)


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("RPA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("RPA_AUTOTUNE_POLICY", raising=False)
    monkeypatch.delenv("EJKERNEL_AUTOTUNE_POLICY", raising=False)


def _seed_executor(fallback: str = "heuristics", **changes) -> Executor:
    """As the seed's module makes it."""
    return Executor(
        ConfigSelectorChain(
            cache=ConfigCache(),
            policy=AutotunePolicy(allow_autotune=True, cache_miss_fallback=fallback, validate_backward=False),
            tuner=Tuner(warmup=5, iters=100),
            persistent=PersistentCache("ragged-page-attention"),
            **changes,
        )
    )


def _invocation(**more) -> Invocation:
    return Invocation(op_id="ragged_page_attention_v2", args=(), kwargs={**small_call.arguments(), **more})


def test_the_public_signature_is_the_contracts():
    parameters = inspect.signature(ragged_page_attention_v2).parameters
    assert list(parameters) == [
        "queries", "kv_pages", "context_lens", "block_tables", "query_start_loc", "num_seqs", "softmax_aux",
        "softmax_scale", "logits_soft_cap", "compute_dtype", "optimized", "sliding_window", "mask_value",
        "vmem_limit_bytes", "platform", "cfg", "mesh", "in_specs", "out_specs", "return_lse", "k_scale", "v_scale",
        "validate",
    ]  # fmt: skip
    keyword_only = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keyword_only[0] == "softmax_scale"
    assert len(keyword_only) == 16
    assert parameters["compute_dtype"].default == jnp.bfloat16


def test_run_on_a_config_is_the_public_call_on_it():
    call = small_call.arguments()
    answer = RaggedPageAttentionv2().run(**call, cfg=CFG)
    assert np.array_equal(answer, ragged_page_attention_v2(**call, cfg=CFG))
    windowed = RaggedPageAttentionv2().run(**call, sliding_window=2, platform="xla", cfg=CFG.replace(platform="auto"))
    assert np.array_equal(windowed, ragged_page_attention_v2(**call, sliding_window=2, cfg=CFG))


def test_run_takes_lse_and_works_inside_jit():
    call = small_call.arguments()
    output, lse = jax.jit(lambda kw: RaggedPageAttentionv2().run(**kw, cfg=CFG, return_lse=True))(call)
    assert np.array_equal(output, RaggedPageAttentionv2().run(**call, cfg=CFG))
    assert lse.shape == (6, 4)


def test_the_seeds_orders_of_arguments_are_taken_by_position():
    call, kernel = small_call.arguments(), RaggedPageAttentionv2()
    arrays, sinks = list(call.values()), jnp.ones(4)
    by_name = kernel.run(**call, softmax_scale=0.3, logits_soft_cap=5.0, sliding_window=3, softmax_aux=sinks, cfg=CFG)
    options = (0.3, 5.0, jnp.bfloat16, False, 3, sinks, None, None)
    assert np.array_equal(kernel.run(*arrays, "xla", *options, cfg=CFG), by_name)
    mesh, specs = Mesh(np.array(jax.devices()[:1]), ("tp",)), (*_HEADS, PartitionSpec("tp"))
    out = PartitionSpec(None, "tp", None)
    fn, seven = kernel.create_shard_map_wrapper(*arrays, *options, "xla", CFG, mesh, specs, out, False)
    assert np.array_equal(fn(*seven), by_name)
    for wrong, text in (
        ({}, "run\\(\\) missing a required argument: 'cfg'"),
        ({"cfg": CFG, "queries": arrays[0]}, "multiple values for argument 'queries'"),
        ({"cfg": CFG, "window": 3}, "unexpected keyword argument 'window'"),
    ):
        with pytest.raises(TypeError, match=text):
            kernel.run(*arrays, **wrong)


def test_the_seeds_generic_names_can_be_subscripted():
    class Mine(Kernel[RaggedPageAttentionv2Config, jax.Array]):
        op_id = "mine"

    assert Mine().op_id == "mine"
    assert Executor[RaggedPageAttentionv2Config, jax.Array]().chooser is not None
    assert Invocation[RaggedPageAttentionv2Config, jax.Array]("mine").args == ()


def test_the_platform_argument_wins_over_the_configs():
    with pytest.raises(ValueError, match="platform='cuda' has no kernel"):
        RaggedPageAttentionv2().run(**small_call.arguments(), platform="cuda", cfg=CFG)


def test_xla_asked_for_runs_anywhere_as_in_the_seed():
    call, cfg = small_call.arguments(), CFG.replace(platform="triton", backend="gpu")
    answer = RaggedPageAttentionv2().run(**call, platform="xla", cfg=cfg)
    assert np.array_equal(answer, RaggedPageAttentionv2().run(**call, cfg=CFG))
    with pytest.raises(ValueError, match=r"cfg\.backend='gpu': this call is lowered for cpu"):
        RaggedPageAttentionv2().run(**call, cfg=cfg)


def test_a_selectors_policy_can_be_replaced():
    executor, call = _seed_executor(), small_call.arguments()
    executor.chooser.policy = AutotunePolicy(allow_heuristics=False, cache_miss_fallback="heuristics")
    with pytest.raises(RuntimeError, match="the policy allows no heuristics"):
        executor(RaggedPageAttentionv2(), **call)


def test_get_impl_gives_the_registered_kernel():
    implementation = RaggedPageAttentionv2().get_impl(CFG)
    assert implementation is kernel_registry.get("ragged_page_attention_v2", "xla", "any")
    call = small_call.arguments()
    answer = implementation(**call, num_kv_pages_per_block=2, num_queries_per_block=8, num_warps=4, num_stages=1)
    assert np.array_equal(answer, RaggedPageAttentionv2().run(**call, cfg=CFG))
    with pytest.raises(ValueError, match="cuda"):
        RaggedPageAttentionv2().get_impl(CFG.replace(platform="cuda"))


@pytest.mark.parametrize(
    "method",
    ["candidate_cfgs", "candidate_cfgs_gpu", "candidate_cfgs_tpu", "candidate_cfgs_shard_map_gpu",
     "candidate_cfgs_shard_map_tpu"],
)  # fmt: skip
def test_candidates_are_distinct_configs_that_name_their_platform(method):
    candidates = getattr(RaggedPageAttentionv2(), method)(_invocation())
    assert candidates
    assert len(set(candidates)) == len(candidates)
    assert all(isinstance(cfg, RaggedPageAttentionv2Config) and cfg.platform != "auto" for cfg in candidates)


def test_the_seeds_thin_invocations_suffice_for_candidates():
    call = small_call.arguments()
    thin = {name: call[name] for name in ("queries", "kv_pages", "block_tables")}
    inv = Invocation(op_id="ragged_page_attention_v2", args=(), kwargs=thin)
    assert RaggedPageAttentionv2().candidate_cfgs(inv) == RaggedPageAttentionv2().candidate_cfgs(_invocation())
    with pytest.raises(ValueError, match="queries is missing"):
        RaggedPageAttentionv2().heuristic_cfg(Invocation("ragged_page_attention_v2", (), {}))


def test_the_heuristic_is_a_right_config():
    call = small_call.arguments()
    cfg = RaggedPageAttentionv2().heuristic_cfg(_invocation())
    assert np.array_equal(RaggedPageAttentionv2().run(**call, cfg=cfg), ragged_page_attention_v2(**call))


def test_the_seeds_executor_runs_selects_and_compiles():
    executor, kernel, call = _seed_executor(), RaggedPageAttentionv2(), small_call.arguments()
    plain = ragged_page_attention_v2(**call)
    assert np.array_equal(executor(kernel, **call), plain)
    assert np.array_equal(executor(kernel, **call, _cfg=CFG), ragged_page_attention_v2(**call, cfg=CFG))
    assert executor.choose_config(kernel, **call, _cfg=CFG) == CFG
    assert executor.choose_config(kernel, **call) == kernel.heuristic_cfg(_invocation())
    assert np.array_equal(executor.compile(kernel, **call)(**call), plain)


def test_the_executor_stamps_the_lowered_text():
    executor, call = _seed_executor(), small_call.arguments()
    lowered = jax.jit(lambda kw: executor(RaggedPageAttentionv2(), **kw, _cfg=CFG)).lower(call)
    assert "rpa#ragged_page_attention_v2@0" in lowered.as_text(debug_info=True)
    assert "rpa_v2__xla__queries8_pages2" in lowered.as_text()


def test_a_subclass_decides_its_own_configs():
    class Mine(RaggedPageAttentionv2):
        def heuristic_cfg(self, inv):
            return CFG

    assert _seed_executor().choose_config(Mine(), **small_call.arguments()) == CFG


def test_the_executor_tells_its_events():
    events = []
    executor = _seed_executor(on_event=lambda name, **details: events.append((name, details["op_id"])))
    executor(RaggedPageAttentionv2(), **small_call.arguments())
    executor(RaggedPageAttentionv2(), **small_call.arguments(), _cfg=CFG)
    assert events == [
        ("heuristics", "ragged_page_attention_v2@0"),
        ("override", "ragged_page_attention_v2@0"),
    ]


def test_an_unknown_method_is_an_error():
    with pytest.raises(ValueError, match="method='pmap'"):
        _seed_executor()(RaggedPageAttentionv2(), **small_call.arguments(), method="pmap")


# ------------------------------------------------------------------ over a mesh of one device (more: test_shard.py)

_HEADS = (PartitionSpec(None, "tp", None), PartitionSpec(None, None, "tp", None), *[PartitionSpec()] * 4)


@pytest.mark.parametrize("specs", [_HEADS, (*_HEADS, PartitionSpec("tp")), None], ids=["six", "seven", "default"])
def test_the_wrapper_gives_a_function_and_its_seven_arguments(specs):
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    call = small_call.arguments()
    out = None if specs is None else PartitionSpec(None, "tp", None)
    fn, call_args = RaggedPageAttentionv2().create_shard_map_wrapper(
        **call, cfg=CFG, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
    )
    assert len(call_args) == 7
    plain = RaggedPageAttentionv2().run(**call, cfg=CFG)
    assert np.array_equal((jax.jit(fn) if specs and len(specs) == 7 else fn)(*call_args), plain)
    via = _seed_executor()(RaggedPageAttentionv2(), **call, _cfg=CFG, method="shard_map", mesh=mesh, in_specs=specs)
    assert np.array_equal(via, plain)


# ------------------------------------------------------------------ kernels of one's own


class Scale(Kernel):
    """y = factor * x, on a config that says how to add it up."""

    op_id = "scale"

    def run(self, x, *, factor=1.0, cfg):
        return sum([x * factor] * cfg["parts"]) / cfg["parts"]

    def heuristic_cfg(self, inv):
        return {"parts": 1}

    def candidate_cfgs(self, inv):
        return [{"parts": 1}, {"parts": 2}]


def test_any_kernel_can_be_tuned_remembered_and_run():
    events = []
    chain = ConfigSelectorChain(
        ConfigCache(), AutotunePolicy(cache_miss_fallback="autotune"), Tuner(warmup=0, iters=4),
        on_event=lambda name, **_: events.append(name),
    )  # fmt: skip
    executor, x = Executor(chain), jnp.arange(4.0)
    assert np.array_equal(executor(Scale(), x, factor=3.0), 3 * x)
    assert np.array_equal(executor(Scale(), x, factor=5.0), 5 * x)  # a scale is no part of the key
    assert events == ["autotune_start", "autotune_finish", "cache_hit"]
    assert np.array_equal(executor.compile(Scale(), x, factor=2.0)(x), 2 * x)
    assert np.array_equal(jax.jit(lambda x: executor(Scale(), x, factor=2.0))(x), 2 * x)


def test_a_key_is_readable_and_ignores_floats():
    inv = Invocation("scale", (jnp.zeros((2, 3)),), {"factor": 0.5, "axis": 1})
    assert inv.call_key == "0=float32[2,3] axis=1"
    assert inv.make_key(lambda inv: "mine") == "mine"
    assert Invocation("scale", (jnp.zeros(2),), {}, batch_axes={"x": 0}).call_key.endswith("batch={'x': 0}")


def test_a_kernel_says_what_it_lacks():
    for call in (
        lambda k: k.run(cfg=None),
        lambda k: k.heuristic_cfg(None),
        lambda k: k.create_shard_map_wrapper(),
    ):
        with pytest.raises(NotImplementedError, match="Kernel gives no"):
            call(Kernel("bare"))
    assert Kernel().op_id.endswith("Kernel")
