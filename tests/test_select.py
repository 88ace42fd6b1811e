"""Selection: the order of its stages, what each may store, what a key holds, and what warm calls remember."""

from __future__ import annotations

import re
import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_call
from jax.sharding import Mesh

import rpa
from rpa import (
    AutotunePolicy,
    ConfigCache,
    ConfigSelectorChain,
    PersistentCache,
    RaggedPageAttentionv2Config,
    Tuner,
    explain,
    kernel_registry,
    overlay_cache,
    policy_override,
    ragged_page_attention_v2,
    registry,
    select,
)
from rpa import validate as rules
from rpa.chain import Call
from rpa.device import Device
from rpa.select import stem
from rpa.tune import TuningFailed

STAGES = ("explicit", "overlay", "memory", "persistent", "shipped", "autotune", "heuristic")
CFGS = {stage: RaggedPageAttentionv2Config(num_queries_per_block=8 * (i + 1)) for i, stage in enumerate(STAGES)}


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("RPA_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("RPA_AUTOTUNE_POLICY", raising=False)
    monkeypatch.delenv("EJKERNEL_AUTOTUNE_POLICY", raising=False)
    yield
    select.default_chain().cache.clear()


class FakeTuner:
    """As the seed's tuners look from outside; remembers that it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, 0

    def autotune(self, make_fn, args, kwargs, candidates):
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


GPU = Device("gpu", "chip")


@dataclass(frozen=True)
class _Call(Call):
    """A call of some operation."""

    device: Device = GPU
    explicit: object = None
    known: tuple = (None, "nothing ships for it")
    unfit: object = None
    op, stem, args = "op@0", "tokens<=8", ()

    def heuristic(self):
        return CFGS["heuristic"]

    def shipped(self):
        return self.known

    def program(self, config):
        return lambda: config

    def fit(self, config):
        return (None, "too wide") if config == self.unfit else (config, "")


def _chain(tmp_path, tuner=None, **changes) -> ConfigSelectorChain:
    store = PersistentCache("op", tmp_path / "op.json")
    return ConfigSelectorChain(ConfigCache(), tuner=tuner or FakeTuner(CFGS["autotune"]), persistent=store, **changes)


@pytest.mark.parametrize("first", STAGES)
def test_the_first_stage_that_knows_decides(first, tmp_path):
    events = []
    chain = _chain(tmp_path, on_event=lambda name, **details: events.append((name, details.get("level"))))
    call = _Call()
    has = STAGES[STAGES.index(first) :]  # this stage and all later ones hold a config
    if "explicit" in has:
        call = replace(call, explicit=CFGS["explicit"])
    if "memory" in has:
        chain.cache.put(*call.triple, CFGS["memory"])
    if "persistent" in has:
        assert chain.persistent is not None
        chain.persistent.put(*call.triple, CFGS["persistent"])
    if "shipped" in has:
        call = replace(call, known=(CFGS["shipped"], "measured"))
    if "autotune" not in has:
        chain = _chain(tmp_path, policy=AutotunePolicy(allow_autotune=False), on_event=chain.on_event)
    with overlay_cache({call.triple: CFGS["overlay"]} if "overlay" in has else {}):
        found = chain.find(call)
    assert (found.source, found.config) == (first, CFGS[first])
    assert [stage for stage, _ in found.trail] == list(STAGES[: STAGES.index(first) + 1])
    expected = {
        "explicit": [("override", None)],
        "overlay": [("overlay_hit", None)],
        "memory": [("cache_hit", "memory")],
        "persistent": [("cache_hit", "persistent")],
        "shipped": [("cache_hit", "shipped")],
        "autotune": [("autotune_start", None), ("autotune_finish", None)],
        "heuristic": [("heuristics", None)],
    }
    assert events == expected[first]


def test_when_nobody_knows_the_error_says_what_each_stage_answered(tmp_path):
    events = []
    policy = AutotunePolicy(allow_autotune=False, allow_heuristics=False)
    chain = _chain(tmp_path, policy=policy, on_event=lambda name, **_: events.append(name))
    with pytest.raises(RuntimeError, match="the policy allows no heuristics") as caught:
        chain.find(_Call())
    assert all(stage in str(caught.value) for stage in STAGES)
    assert events == ["error"]


def test_only_a_tuned_config_is_kept(tmp_path):
    chain = _chain(tmp_path)
    store = chain.persistent
    assert store is not None
    chain.find(_Call(explicit=CFGS["explicit"]))
    with policy_override(chain, cache_miss_fallback="heuristics"):
        chain.find(_Call())
    assert (chain.cache.size(), store.path.exists()) == (0, False)
    chain.find(_Call())
    assert chain.cache.get(*_Call().triple) == store.get(*_Call().triple) == CFGS["autotune"]
    assert chain.find(_Call()).source == "memory"
    assert _chain(tmp_path).find(_Call()).source == "persistent"  # the next process
    assert chain.find(_Call(explicit=CFGS["explicit"])).config == CFGS["explicit"]


def test_persisting_can_be_switched_off(tmp_path):
    chain = _chain(tmp_path, persist_autotune=False)
    assert chain.find(_Call()).source == "autotune"
    assert not (tmp_path / "op.json").exists()


def test_a_stored_config_that_cannot_be_used_here_is_passed_over(tmp_path):
    chain = _chain(tmp_path)
    chain.cache.put(*_Call().triple, CFGS["memory"])
    found = chain.find(_Call(unfit=CFGS["memory"]))
    assert found.source == "autotune"
    assert ("memory", "its config cannot be used here: too wide") in found.trail


@pytest.mark.parametrize(
    "wrong",
    [{"num_kv_splits": 3}, {"options": {"tma": 1}}, {"options": {"short_rows": 0}}, {"backend": "gpu"},
     {"platform": "triton"}, {"platform": "cuda"}],
    ids=str,
)  # fmt: skip
def test_a_stored_config_that_its_backend_refuses_is_a_miss_and_no_error(wrong):
    call, store = small_call.arguments(), PersistentCache(select.STORE)
    plain = ragged_page_attention_v2(**call)
    store.put(*explain(**call).key, RaggedPageAttentionv2Config.from_dict({"platform": "xla", **wrong}))
    traced_in_vain = set(wrong) & {"num_kv_splits", "options"}
    with pytest.warns(RuntimeWarning, match="is ignored: ValueError: cfg") if traced_in_vain else nullcontext():
        assert np.array_equal(ragged_page_attention_v2(**call), plain)
        told = explain(**call)
    assert told.source == "heuristic"
    assert dict(told.trail)["persistent"].startswith("its config cannot be used here: ")


def test_a_stored_config_is_tried_by_the_trace_that_the_call_needs_anyway(monkeypatch):
    traced, xla = [], registry.load("xla")
    counting = replace(xla, run=lambda *call: traced.append(call[2]) or xla.run(*call))
    monkeypatch.setattr(registry, "load", lambda name: counting)
    call, cfg = small_call.arguments(), RaggedPageAttentionv2Config(num_queries_per_block=32, platform="xla")
    PersistentCache(select.STORE).put(*explain(**call).key, cfg)
    ragged_page_attention_v2(**call)
    assert traced == [cfg]


def test_failed_tuning_is_shown_falls_to_the_heuristic_and_is_not_repeated(tmp_path):
    tuner = FakeTuner(TuningFailed("  cfg 1: failed: out of luck"))
    chain = _chain(tmp_path, tuner=tuner)
    with pytest.warns(RuntimeWarning, match="out of luck"):
        assert chain.find(_Call()).source == "heuristic"
    assert chain.find(_Call()).source == "heuristic"
    assert (tuner.asked, chain.cache.size()) == (1, 0)


def test_threads_that_miss_at_once_tune_once(tmp_path):
    tuner = FakeTuner(CFGS["autotune"])
    chain = _chain(tmp_path, tuner=tuner)
    threads = [threading.Thread(target=chain.find, args=(_Call(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tuner.asked == 1


# ------------------------------------------------------------------ the policy


@pytest.mark.parametrize(
    ("variables", "accelerator", "source"),
    [
        ({}, True, "autotune"),
        ({}, False, "heuristic"),
        ({"RPA_AUTOTUNE_POLICY": "autotune"}, False, "autotune"),
        ({"RPA_AUTOTUNE_POLICY": "heuristics"}, True, "heuristic"),
        ({"EJKERNEL_AUTOTUNE_POLICY": "heuristics"}, True, "heuristic"),
        ({"EJKERNEL_AUTOTUNE_POLICY": "autotune"}, False, "autotune"),
        ({"RPA_AUTOTUNE_POLICY": "heuristics", "EJKERNEL_AUTOTUNE_POLICY": "autotune"}, True, "heuristic"),
    ],
)
def test_the_environment_decides_a_miss_where_the_policy_leaves_it(
    variables, accelerator, source, tmp_path, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    device = replace(GPU, interpreted=not accelerator)
    assert _chain(tmp_path).find(_Call(device=device)).source == source


@pytest.mark.parametrize("name", ["RPA_AUTOTUNE_POLICY", "EJKERNEL_AUTOTUNE_POLICY"])
def test_a_policy_nobody_knows_is_an_error_even_for_a_warm_call(name, monkeypatch):
    call = small_call.arguments()
    ragged_page_attention_v2(**call)
    monkeypatch.setenv(name, "bogus")
    with pytest.raises(ValueError, match=f"{name}='bogus': one of autotune, heuristics"):
        ragged_page_attention_v2(**call)


def test_a_policy_is_checked_when_made():
    with pytest.raises(ValueError, match="cache_miss_fallback='sometimes'"):
        AutotunePolicy(cache_miss_fallback="sometimes")
    with pytest.raises(ValueError, match="validate_backward=True"):
        AutotunePolicy(validate_backward=True)


def test_an_override_of_the_policy_ends_with_its_block_and_stays_in_its_thread(tmp_path):
    chain, seen = _chain(tmp_path), []
    with policy_override(chain, allow_autotune=False):
        assert chain.policy.allow_autotune is False
        thread = threading.Thread(target=lambda: seen.append(chain.policy.allow_autotune))
        thread.start()
        thread.join()
    assert (seen, chain.policy.allow_autotune) == ([True], True)
    with pytest.raises(TypeError, match="nonsense"), policy_override(chain, nonsense=1):
        pass


def test_heuristics_do_not_drop_an_explicit_config(monkeypatch):
    monkeypatch.setenv("RPA_AUTOTUNE_POLICY", "heuristics")
    cfg = RaggedPageAttentionv2Config(num_queries_per_block=8, platform="xla")
    told = explain(**small_call.arguments(), cfg=cfg)
    assert (told.config, told.source) == (cfg, "explicit")


# ------------------------------------------------------------------ inside jit, and idle batches


def test_inside_jit_nothing_is_tuned(monkeypatch):
    chain, tuner = select.default_chain(), FakeTuner(RuntimeError("tuned on tracers"))
    monkeypatch.setattr(chain, "tuner", tuner)
    monkeypatch.setenv("RPA_AUTOTUNE_POLICY", "autotune")
    call = small_call.arguments()
    jax.jit(lambda queries: ragged_page_attention_v2(**{**call, "queries": queries})).lower(call["queries"])
    assert tuner.asked == 0
    with pytest.raises(RuntimeError, match="tuned on tracers"):  # the same call outside would have asked
        ragged_page_attention_v2(**call)


def test_inside_jit_a_stored_config_is_used():
    call = small_call.arguments()
    triple = explain(**call).key
    cfg = RaggedPageAttentionv2Config(num_queries_per_block=4, num_kv_pages_per_block=2, platform="xla")
    select.default_chain().cache.put(*triple, cfg)
    text = jax.jit(lambda kw: ragged_page_attention_v2(**kw)).lower(call).as_text()
    assert re.search(r"rpa_v2__xla__queries4_pages2\b", text)


@pytest.mark.parametrize("changes", [{"num_seqs": 0}, {"num_seqs": 1}, {"context_lens": np.zeros(3, np.int32)}])
def test_an_idle_batch_is_not_tuned_on(changes, monkeypatch):
    monkeypatch.setenv("RPA_AUTOTUNE_POLICY", "autotune")
    monkeypatch.setattr(select.default_chain(), "tuner", FakeTuner(RuntimeError("tuned on nothing")))
    call = {**small_call.arguments(), "query_start_loc": np.array([0, 1, 4, 6], np.int32), **changes}
    call["context_lens"] = np.asarray(call["context_lens"])
    assert dict(explain(**call).trail)["autotune"].startswith("this batch is mostly idle")


def test_without_a_verifier_nothing_is_tuned_and_explain_says_so(monkeypatch):
    monkeypatch.setenv("RPA_AUTOTUNE_POLICY", "autotune")
    monkeypatch.setattr(select.default_chain(), "tuner", Tuner())
    monkeypatch.setattr(select.tune, "installed_verifier", lambda: None)
    told = explain(**small_call.arguments())
    assert told.source == "heuristic"
    assert "no verifier is installed" in told


# ------------------------------------------------------------------ keys


def test_a_key_leaves_out_what_does_not_change_the_best_config():
    base = registry.TYPICAL
    for change in (
        {"softmax_scale": 0.3},
        {"num_pages": 7},
        {"num_tokens": 5},
        {"max_seqs": 6},
        {"pages_per_seq": 65},
    ):
        assert stem(replace(base, **change), "auto", "none") == stem(base, "auto", "none"), change
    capped = replace(base, logits_soft_cap=50.0)
    assert stem(capped, "auto", "none") == stem(replace(capped, logits_soft_cap=30.0), "auto", "none")


def test_a_key_holds_what_may_change_the_best_config():
    base = registry.TYPICAL
    changes = (
        {"q_dtype": "float32"}, {"kv_dtype": "int8"}, {"compute_dtype": "float32"}, {"num_q_heads": 64},
        {"num_kv_heads": 4}, {"head_dim": 64}, {"page_size": 32}, {"num_tokens": 9}, {"max_seqs": 9},
        {"pages_per_seq": 129}, {"sinks": True}, {"k_scale": True}, {"v_scale": True}, {"return_lse": True},
        {"optimized": True}, {"logits_soft_cap": 50.0}, {"sliding_window": 128}, {"vmem_limit_bytes": 1 << 20},
    )  # fmt: skip
    stems = [stem(base, "auto", "none"), stem(base, "xla", "none"), stem(base, "auto", "heads:4")]
    stems += [stem(replace(base, **change), "auto", "none") for change in changes]
    assert len(set(stems)) == len(stems)


def test_a_key_names_device_and_versions():
    device, op, key = explain(**small_call.arguments()).key
    assert device.startswith("cpu ")
    assert op == "ragged_page_attention_v2@0"
    assert f"jax={jax.__version__}" in key
    assert "heads=4/2" in key


# ------------------------------------------------------------------ explain


def test_explain_names_backend_blocks_source_and_reason_without_running_anything(monkeypatch):
    monkeypatch.setattr(rpa.api, "compiled", None)
    told = explain(**small_call.arguments(), platform="xla")
    for part in (
        "xla",
        f"num_queries_per_block={told.config.num_queries_per_block}",
        "heuristic",
        told.reason,
    ):
        assert part in told
    assert set(told.refusals) == {slot.name for slot in registry.exists()}
    assert told.refusals["xla"] is None


def test_explain_takes_shapes_and_raises_what_the_call_would():
    call = small_call.arguments()
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in call.items()}
    assert explain(**shapes).key == explain(**call).key
    with pytest.raises(ValueError, match="sliding_window=0"):
        explain(**call, sliding_window=0)


def test_a_backend_that_the_config_cannot_have_is_an_error():
    with pytest.raises(ValueError, match=r"cfg.backend='gpu': this call is lowered for cpu"):
        ragged_page_attention_v2(**small_call.arguments(), cfg=RaggedPageAttentionv2Config(backend="gpu"))


def test_fingerprints_tell_chips_apart():
    chips = [Device("gpu", "NVIDIA H200", (9, 0)), Device("tpu", "TPU v6 lite"), Device("cpu", "cpu"),
             Device("tpu", "TPU v6 lite", interpreted=True)]  # fmt: skip
    assert len({rpa.device.fingerprint(chip) for chip in chips}) == len(chips)


# ------------------------------------------------------------------ warm calls


def _sevens(queries, **_):
    return queries * 0 + 7


def test_a_warm_call_notices_what_its_choice_hung_on():
    call = small_call.arguments()
    plain = np.asarray(ragged_page_attention_v2(**call))
    kernel_registry.register("ragged_page_attention_v2", "cuda", "any", priority=1)(_sevens)
    try:
        assert (np.asarray(ragged_page_attention_v2(**call)) == 7).all()
    finally:
        kernel_registry.unregister(_sevens)
    assert np.array_equal(ragged_page_attention_v2(**call), plain)
    kernel_registry.register("ragged_page_attention_v2", "cuda", "any")(_sevens)
    try:
        triple = explain(**call).key
        with overlay_cache({triple: RaggedPageAttentionv2Config(platform="cuda")}):
            assert (np.asarray(ragged_page_attention_v2(**call)) == 7).all()
        assert np.array_equal(ragged_page_attention_v2(**call), plain)
        select.default_chain().cache.put(*triple, RaggedPageAttentionv2Config(platform="cuda"))
        assert (np.asarray(ragged_page_attention_v2(**call)) == 7).all()
    finally:
        kernel_registry.unregister(_sevens)
    assert np.array_equal(ragged_page_attention_v2(**call), plain)


@pytest.mark.parametrize("form", [int, lambda n: np.array([n]), lambda n: jnp.array([n]), jnp.array])
def test_the_second_call_meets_the_program_that_the_first_compiled(form):
    traces = []

    def counted(queries, **_):
        traces.append(queries.shape)
        return queries

    kernel_registry.register("ragged_page_attention_v2", "cuda", "any", priority=1)(counted)
    call = small_call.arguments()
    call["num_seqs"] = form(int(np.ravel(call["num_seqs"])[0]))
    try:
        ragged_page_attention_v2(**call)
        first = len(traces)
        ragged_page_attention_v2(**call)
    finally:
        kernel_registry.unregister(counted)
    assert first == len(traces) > 0


def test_a_warm_call_heeds_overlays_overrides_and_observers(monkeypatch):
    call = small_call.arguments()
    kernel_registry.register("ragged_page_attention_v2", "cuda", "any")(_sevens)
    try:
        for _ in range(2):
            plain = np.asarray(ragged_page_attention_v2(**call))
        assert (plain != 7).any()
        for overlay in ({explain(**call).key: RaggedPageAttentionv2Config(platform="cuda")}, {}):
            with overlay_cache(overlay):
                assert (np.asarray(ragged_page_attention_v2(**call)) == 7).all() == bool(overlay)
    finally:
        kernel_registry.unregister(_sevens)
    ragged_page_attention_v2(**call)
    with policy_override(allow_heuristics=False), pytest.raises(RuntimeError, match="allows no heuristics"):
        ragged_page_attention_v2(**call)
    with policy_override(allow_autotune=False):
        ragged_page_attention_v2(**call)
        with monkeypatch.context() as patch:
            patch.setattr(select, "choose", None)  # a call under the same override is warm
            ragged_page_attention_v2(**call)
    events = []
    monkeypatch.setattr(select.default_chain(), "on_event", lambda name, **_: events.append(name))
    ragged_page_attention_v2(**call)
    assert events == ["heuristics"]


def test_what_an_idle_batch_got_is_not_remembered_for_others(monkeypatch):
    monkeypatch.setenv("RPA_AUTOTUNE_POLICY", "autotune")
    tuner = FakeTuner(RaggedPageAttentionv2Config(num_queries_per_block=8, platform="xla"))
    monkeypatch.setattr(select.default_chain(), "tuner", tuner)
    call = {name: np.asarray(array) for name, array in small_call.arguments().items()}
    for count in (0, 3, 3):
        ragged_page_attention_v2(**{**call, "num_seqs": np.array([count], np.int32)})
    assert tuner.asked == 1


@pytest.mark.parametrize("few", [512, 0])
def test_a_warm_call_still_checks_host_metadata_and_options(few, monkeypatch):
    monkeypatch.setattr(rules, "_FEW", few)  # few entries are looked at one by one
    call = {**small_call.arguments(), "context_lens": np.array([13, 9, 4], np.int32), "num_seqs": 3}
    call["block_tables"] = np.asarray(call["block_tables"])
    call["query_start_loc"] = np.asarray(call["query_start_loc"])
    good = ragged_page_attention_v2(**call, optimized=False)
    assert np.array_equal(ragged_page_attention_v2(**call, optimized=False), good)
    dead = call["block_tables"].copy()
    dead[2, 1:] = -1  # dead entries may hold anything
    assert np.array_equal(ragged_page_attention_v2(**{**call, "block_tables": dead}), good)
    bad = {
        "context_lens": (np.array([13, 99, 4], np.int32), r"context_lens\[1\]=99"),
        "query_start_loc": (np.array([0, 4, 1, 6], np.int32), r"query_start_loc\[2\]=1"),
        "block_tables": (np.full((3, 4), 77, np.int32), r"block_tables\[0, 0\]=77"),
        "num_seqs": (4, "num_seqs=4"),
    }
    counted = {**call, "num_seqs": np.array([3], np.int32)}
    ragged_page_attention_v2(**counted)
    for count in (4, -1):
        with pytest.raises(ValueError, match=f"num_seqs={count}"):
            ragged_page_attention_v2(**{**counted, "num_seqs": np.array([count], np.int32)})
    for name, (value, text) in bad.items():
        with pytest.raises(ValueError, match=text):
            ragged_page_attention_v2(**{**call, name: value})
    with pytest.raises(TypeError, match="optimized=0"):
        ragged_page_attention_v2(**call, optimized=0)


@pytest.mark.parametrize("few", [512, 0])
@pytest.mark.parametrize("window", [None, 5])
def test_a_warm_call_takes_any_dead_table_entry_and_no_live_one(window, few, monkeypatch):
    """Each entry in turn is no page id: a call that was seen before says of each what the first call says."""
    monkeypatch.setattr(rules, "_FEW", few)
    call: dict[str, Any] = {name: np.asarray(array) for name, array in small_call.arguments().items()}
    call |= {"query_start_loc": np.array([0, 1, 1, 6], np.int32), "sliding_window": window}
    good = np.asarray(ragged_page_attention_v2(**call))
    # lengths 1, 0 and 5 on contexts 13, 9 and 4: pages of 4
    live = {(0, 0), (0, 1), (0, 2), (0, 3), (2, 0)} if window is None else {(0, 2), (0, 3), (2, 0)}
    for entry in np.ndindex(call["block_tables"].shape):
        for garbage in (-1, 16, 2**31 - 1):
            tables = call["block_tables"].copy()
            tables[entry] = garbage
            if entry in live:
                with pytest.raises(ValueError, match=rf"block_tables\[{entry[0]}, {entry[1]}\]={garbage}"):
                    ragged_page_attention_v2(**{**call, "block_tables": tables})
            else:
                assert np.array_equal(ragged_page_attention_v2(**{**call, "block_tables": tables}), good)


def test_a_warm_call_takes_sinks_and_scales_from_the_host(monkeypatch):
    sinks, scales = np.linspace(-1, 1, 4, dtype=np.float32), np.array([0.5, 2], np.float32)
    call: dict[str, Any] = {**small_call.arguments(), "softmax_aux": sinks, "k_scale": scales, "v_scale": scales}
    put = {**call, "softmax_aux": jnp.asarray(sinks), "k_scale": jnp.asarray(scales), "v_scale": jnp.asarray(scales)}
    plain = np.asarray(ragged_page_attention_v2(**put))
    assert np.array_equal(ragged_page_attention_v2(**call), plain)
    with monkeypatch.context() as patch:
        patch.setattr(select, "choose", None)  # warm
        assert np.array_equal(ragged_page_attention_v2(**call), plain)
        doubled = ragged_page_attention_v2(**{**call, "v_scale": 2 * scales})
        assert np.array_equal(doubled, 2 * plain)
        for name in ("k_scale", "v_scale"):
            with pytest.raises(ValueError, match=f"{name}=.*finite"):
                ragged_page_attention_v2(**{**call, name: np.array([1, np.inf], np.float32)})


def test_forms_of_the_same_count_give_the_same_bits():
    call = small_call.arguments()
    answers = [
        np.asarray(ragged_page_attention_v2(**{**call, "num_seqs": form}))
        for form in (3, np.int64(3), np.array([3]), np.array(3), jnp.int32(3), jnp.array([3]))
        for _ in range(2)  # cold, then warm
    ]
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


def test_metadata_on_the_host_or_the_device_give_the_same_bits():
    call = small_call.arguments()
    names = ("context_lens", "block_tables", "query_start_loc", "num_seqs")
    host = {name: np.asarray(call[name]) for name in names}
    plain = np.asarray(ragged_page_attention_v2(**call))
    some = {name: host[name] for name in names[:2]}
    wide = {name: array.astype(np.int64) for name, array in host.items()}
    for forms in (host, some, wide, {**host, "num_seqs": 3}):
        for _ in range(2):  # cold, then warm
            assert np.array_equal(ragged_page_attention_v2(**{**call, **forms}), plain)


@pytest.mark.parametrize("over", [{}, {"mesh": Mesh(np.array(jax.devices()[:1]), ("tp",))}], ids=["alone", "mesh"])
def test_a_warm_call_selects_nothing(over, monkeypatch):
    call = small_call.arguments()
    first = ragged_page_attention_v2(**call, **over)
    monkeypatch.setattr(select, "choose", None)
    assert np.array_equal(ragged_page_attention_v2(**call, **over), first)


def test_the_lowered_text_carries_backend_and_config():
    call = small_call.arguments()
    cfg = RaggedPageAttentionv2Config(num_queries_per_block=8, platform="xla")
    text = jax.jit(lambda kw: ragged_page_attention_v2(**kw, cfg=cfg)).lower(call).as_text()
    assert "rpa_v2__xla__queries8" in text
