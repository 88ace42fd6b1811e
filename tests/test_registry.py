"""The registry: built-in and added kernels by platform, chip and priority, and the words of every refusal."""

from __future__ import annotations

import inspect
import itertools
import warnings
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import small_call

from fuzz.models import MODELS
from rpa import (
    Backend,
    ConfigSelectorChain,
    KernelSpec,
    Platform,
    RaggedPageAttentionv2Config,
    cache,
    detect_platform,
    explain,
    kernel_registry,
    ragged_page_attention_v2,
    registry,
    select,
)
from rpa.device import Device
from rpa.signature import Inputs

ALGORITHM = "ragged_page_attention_v2"
_XLA = registry.load("xla")
H200, V6E, CPU = Device("gpu", "NVIDIA H200", (9, 0)), Device("tpu", "TPU v6 lite"), Device("cpu", "cpu")


@pytest.fixture
def add():
    """Registers kernels for the length of one test."""
    added = []

    def register(kernel, *where, algorithm=ALGORITHM, **facts):
        added.append(kernel_registry.register(algorithm, *where, **facts)(kernel))
        return kernel

    yield register
    for kernel in added:
        kernel_registry.unregister(kernel)


def _kernel(value: float):
    """A kernel with the seed's keywords that answers `value`."""

    def kernel(
        queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, softmax_scale=None,
        logits_soft_cap=None, compute_dtype=jnp.bfloat16, optimized=False, sliding_window=None, softmax_aux=None,
        mask_value=None, num_kv_pages_per_block=None, num_queries_per_block=None, vmem_limit_bytes=None,
        num_warps=None, num_stages=None,
    ):  # fmt: skip
        return jnp.full(queries.shape, value, queries.dtype)

    return kernel


def _answer(**options) -> float:
    return float(np.asarray(ragged_page_attention_v2(**small_call.arguments(), **options)).ravel()[0])


# ------------------------------------------------------------------ built-in kernels


def test_every_built_in_kernel_is_listed_as_a_callable_with_the_operations_keywords():
    specs = kernel_registry.list_implementations(ALGORITHM)
    assert {spec.platform for spec in specs} <= set(Platform)
    assert [spec.priority for spec in specs] == [0] * len(specs)
    for spec in specs:
        assert isinstance(spec, KernelSpec)
        names = set(inspect.signature(spec.implementation).parameters)
        assert {"queries", "num_seqs", "softmax_aux", "num_kv_pages_per_block", "num_stages"} <= names
    assert kernel_registry.validate_signatures(ALGORITHM)
    assert kernel_registry.list_algorithms() == [ALGORITHM]


@pytest.mark.parametrize("slot", registry.SLOTS, ids=lambda slot: slot.name)
@pytest.mark.parametrize("device", [CPU, H200, V6E], ids=lambda device: device.platform)
def test_a_built_in_backend_answers_for_every_chip(slot, device):
    try:
        implementation = registry.load(slot.name)
    except ImportError as error:
        pytest.skip(f"{slot.name} is not installed here: {error}")
    assert implementation.name == slot.name
    reason = implementation.supports(registry.TYPICAL, device)
    assert reason is None or (isinstance(reason, str) and reason)
    if device.platform in slot.chips and reason is None:
        configs = (
            implementation.heuristic(registry.TYPICAL, device),
            *implementation.candidates(registry.TYPICAL, device),
        )
        assert all(isinstance(config, RaggedPageAttentionv2Config) for config in configs)
        assert len(configs) <= 64
        assert {"u", "u_p", "block"} <= implementation.claim(registry.TYPICAL, device).keys()


def test_the_xla_kernel_got_from_the_registry_is_the_public_functions():
    call = small_call.arguments()
    kernel = kernel_registry.get(ALGORITHM, Platform.XLA)
    cfg = RaggedPageAttentionv2Config(num_queries_per_block=8, num_kv_pages_per_block=2, platform="xla")
    answer = kernel(**call, num_queries_per_block=8, num_kv_pages_per_block=2)
    assert np.array_equal(answer, ragged_page_attention_v2(**call, cfg=cfg))
    with pytest.raises(ValueError, match="sliding_window=0"):
        kernel(**call, sliding_window=0)


def test_a_kernel_got_for_another_chip_says_where_it_runs():
    kernel = kernel_registry.get(ALGORITHM, "triton", "gpu")
    with pytest.raises(ValueError, match=r"triton: it runs on gpu.*lowered for cpu"):
        kernel(**small_call.arguments())


# ------------------------------------------------------------------ added kernels


def test_an_added_kernel_is_reached_by_its_platform(add):
    add(_kernel(7), "cuda", "any")
    assert _answer(platform="cuda") == 7
    assert _answer() != 7  # the built-in kernels come first among equals


def test_the_higher_priority_is_preferred(add):
    add(_kernel(1), "cuda", "any", priority=1)
    add(_kernel(3), "CUDA", "ANY", priority=3)
    add(_kernel(2), "cuda", "any", priority=2)
    assert _answer() == _answer(platform="cuda") == 3
    priorities = [spec.priority for spec in kernel_registry.list_implementations(ALGORITHM)]
    assert priorities == sorted(priorities, reverse=True)
    assert float(np.ravel(kernel_registry.get(ALGORITHM, "cuda")(**small_call.arguments()))[0]) == 3


def test_an_added_kernel_of_a_taken_platform_wins_by_priority_only(add):
    add(_kernel(7), "xla", "cpu", priority=1)
    assert _answer(platform="xla") == 7
    assert explain(**small_call.arguments()).backend.endswith("_kernel.<locals>.kernel")


def test_a_kernel_for_another_chip_is_not_reached(add):
    add(_kernel(7), "cuda", "gpu", priority=9)
    assert _answer() != 7
    with pytest.raises(ValueError, match=r"it runs on gpu, and this call is lowered for cpu"):
        _answer(platform="cuda")


def test_an_option_that_an_added_kernel_does_not_take_is_refused_not_ignored(add):
    add(lambda queries, **kw: queries * 0 + 7, "cuda", "any")  # takes everything

    def plain(queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs):
        return queries * 0 + 5

    add(plain, "cuda", "any", priority=1)
    assert _answer(platform="cuda") == 5
    options = {
        "sliding_window": 2,
        "logits_soft_cap": 5.0,
        "softmax_scale": 0.1,
        "softmax_aux": np.zeros(4, np.float32),
    }
    for name, value in options.items():
        assert _answer(platform="cuda", **{name: value}) == 7
        refusals = explain(**small_call.arguments(), platform="cuda", **{name: value}).refusals
        assert next(reason for kernel, reason in refusals.items() if "plain" in kernel) == f"it takes no {name}"


def test_an_added_kernel_may_say_what_it_supports_and_how_it_is_tuned(add):
    cfg = RaggedPageAttentionv2Config(num_warps=2, platform="cuda")
    add(
        _kernel(7), "cuda", "any", heuristic=lambda signature, device: cfg,
        supports=lambda signature, device: "head size 16 is too small" if signature.head_dim == 16 else None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="head size 16 is too small"):
        _answer(platform="cuda")
    slot = next(slot for slot in registry.exists() if slot.platform == "cuda")
    assert registry.why_not(slot, registry.TYPICAL, CPU) is None
    assert registry.implementation_of(slot).heuristic(registry.TYPICAL, CPU) == cfg


def test_a_kernel_that_returns_lse_is_asked_for_it(add):
    def kernel(queries, return_lse=False, **_):
        return (queries, queries[..., 0]) if return_lse else queries

    add(kernel, "cuda", "any")
    output, lse = ragged_page_attention_v2(**small_call.arguments(), platform="cuda", return_lse=True)
    assert (output.shape, lse.shape) == ((6, 4, 16), (6, 4))


def test_kernels_of_another_algorithm_are_kept_apart(add):
    def other(x):
        return x + 1

    add(other, "xla", "any", algorithm="Other")
    assert kernel_registry.list_algorithms() == ["other", ALGORITHM]
    assert kernel_registry.get("OTHER") is other
    assert detect_platform("other") == Platform.XLA
    assert kernel_registry.validate_signatures()


def test_a_kernel_with_the_seeds_parameters_agrees_with_ours(add):
    add(_kernel(7), "cuda", "any", priority=1)
    assert kernel_registry.validate_signatures(ALGORITHM)


def test_differing_signatures_are_named_in_a_warning(add):
    add(lambda queries, window=3: queries, "cuda", "any")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert kernel_registry.validate_signatures(ALGORITHM) is False
    texts = " ".join(str(warning.message) for warning in caught)
    assert "parameter 'window' is positional or keyword window=3, and missing" in texts
    assert "parameter 'kv_pages' is missing" in texts
    assert "num_warps" not in texts  # kernels may differ in what only tunes them


@pytest.mark.parametrize(
    ("where", "facts", "text"),
    [
        (("cudnn", "gpu"), {}, "platform='cudnn': one of triton, pallas, cuda, xla"),
        (("xla", "fpga"), {}, "backend='fpga': one of gpu, tpu, cpu, mps, any"),
        (("xla", "cpu"), {"claims": 1}, "'claims' is unknown"),
    ],
)
def test_what_nobody_knows_cannot_be_registered(where, facts, text):
    with pytest.raises((ValueError, TypeError), match=text):
        kernel_registry.register(ALGORITHM, *where, **facts)


def test_a_missing_kernel_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"platform='cuda'.*there are: .*xla/any"):
        kernel_registry.get(ALGORITHM, "cuda")
    with pytest.raises(ValueError, match="algorithm='nonsense' has no kernel"):
        kernel_registry.get("nonsense")


# ------------------------------------------------------------------ refusals and detection


def test_a_refusal_gives_every_backends_reason_and_who_can_take_the_call():
    with pytest.raises(ValueError, match="platform='cuda' has no kernel") as caught:
        _answer(platform="cuda")
    text = str(caught.value)
    for slot in registry.exists():
        assert f"{slot.name}: " in text or f"platform={str(slot.platform)!r}" in text
    assert "Backends that can take it here: platform='xla'" in text


def test_when_nobody_can_the_refusal_says_none(add):
    with pytest.raises(ValueError, match="can take it here: none"):
        registry.resolve("auto", replace(registry.TYPICAL, head_dim=64), Device("mps", "an Apple chip"))


@pytest.mark.parametrize("platform", [None, "auto"])
def test_detection_takes_what_can_run_on_the_device(platform, monkeypatch):
    assert detect_platform(ALGORITHM, platform) == Platform.XLA
    assert detect_platform() == Platform.XLA
    everyone = {"tpu": "pallas", "gpu": "pallas", "cpu": "xla"}
    takes_all = replace(registry.load("xla"), supports=lambda signature, device: None)
    monkeypatch.setattr(registry, "load", lambda name: takes_all)
    for device in (H200, V6E, CPU):
        monkeypatch.setattr(registry, "current", lambda device=device: device)
        assert detect_platform(ALGORITHM, platform) == everyone[device.platform]

    def without_pallas(name):
        if name == "pallas_gpu":
            raise ModuleNotFoundError("No module named 'jax_cuda13_plugin'")
        return takes_all

    monkeypatch.setattr(registry, "load", without_pallas)
    monkeypatch.setattr(registry, "current", lambda: H200)
    assert detect_platform(ALGORITHM, platform) == Platform.TRITON


def test_auto_takes_the_kernels_in_the_order_of_the_slots(monkeypatch):
    monkeypatch.setattr(registry, "load", lambda name: replace(_XLA, name=name, supports=lambda *_: None))
    assert [spec.name for spec in registry.able("auto", registry.TYPICAL, H200)] == ["pallas_gpu", "triton", "xla"]
    assert registry.resolve("auto", registry.TYPICAL, V6E)[0].name == "pallas_tpu"
    assert registry.resolve("auto", registry.TYPICAL, CPU)[0].name == "xla"


def test_the_table_that_ships_decides_where_it_knows(monkeypatch):
    decode = replace(registry.TYPICAL, num_tokens=64, max_seqs=64, pages_per_seq=512)
    choice = _told({select.stem(decode, "auto", "none"): {"platform": "triton"}}, decode, monkeypatch)
    assert (choice.source, choice.implementation.name, choice.config.platform) == ("shipped", "triton", "triton")
    assert "42 us" in choice.reason
    assert choice.config == _XLA.heuristic(decode, H200).replace(platform="triton")  # the table names no more than it
    assert _chosen(decode, H200, "triton", None).config == choice.config
    assert _chosen(decode, H200, "auto", None, sharding="heads:4").config == choice.config
    assert _chosen(decode, H200, "xla", None).source == "heuristic"


def _chosen(*call, **more) -> select.Choice:
    return select.choose(select.Attention(*call, **more))


def test_a_chip_without_a_table_is_served_by_heuristics():
    assert _chosen(registry.TYPICAL, Device("gpu", "NVIDIA A100", (8, 0)), "xla", None).source == "heuristic"


@pytest.mark.parametrize(
    "model",
    [{"kv_dtype": "float8_e4m3fn", "k_scale": True, "v_scale": True}, {"kv_dtype": "int8", "k_scale": True},
     {"q_dtype": "float16", "kv_dtype": "float16"}, {"q_dtype": "float32", "kv_dtype": "float32"},
     {"num_q_heads": 40, "num_kv_heads": 10}, {"head_dim": 80}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    ("device", "word", "source"),
    [(H200, None, "heuristic"), (H200, "autotune", "autotune"), (replace(H200, kind="NVIDIA H100"), None, "autotune")],
    ids=["H200", "H200 asked to tune", "a chip without a table"],
)
def test_a_model_that_no_table_holds_waits_for_no_tuning_where_a_table_ships(model, device, word, source, monkeypatch):
    class Asked:
        def autotune(self, make_fn, args, kwargs, candidates):
            return candidates[0]

    monkeypatch.setattr(registry, "load", _able)
    chain = ConfigSelectorChain(tuner=Asked())
    monkeypatch.setattr(select, "default_chain", lambda: chain)
    monkeypatch.delenv("EJKERNEL_AUTOTUNE_POLICY", raising=False)
    monkeypatch.delenv("RPA_AUTOTUNE_POLICY", raising=False)
    if word:
        monkeypatch.setenv("RPA_AUTOTUNE_POLICY", word)
    signature = replace(registry.TYPICAL, **model)
    live = Inputs(*map(np.asarray, (0, 0, [9] * 8, 0, range(9), [8])))  # pyright: ignore[reportArgumentType]
    choice = _chosen(signature, device, inputs=live)
    assert choice.source == source
    assert choice.config == _XLA.heuristic(signature, device).replace(platform="pallas")
    told = dict(choice.trail)
    table = device.kind == "NVIDIA H200"
    nothing = (
        "the table that ships for NVIDIA H200 holds nothing like it" if table else "no table ships for this device"
    )
    assert told["shipped"] == nothing
    if source == "heuristic":
        assert told["autotune"] == (
            "a table ships for NVIDIA H200, so no call waits; RPA_AUTOTUNE_POLICY=autotune would tune"
        )


def _able(name: str) -> registry.Implementation:
    """A stand-in for a backend, which takes every call and config."""
    return replace(_XLA, name=name, supports=lambda *_: None, run=lambda inputs, *_: (inputs.queries, None))


def _told(table: dict[str, dict], signature, monkeypatch) -> select.Choice:
    monkeypatch.setattr(registry, "load", _able)
    entries = {f"{ALGORITHM}@0|{key}": {"config": config, "note": "42 us"} for key, config in table.items()}
    monkeypatch.setattr(cache, "shipped", lambda device: entries)
    return _chosen(signature, H200, "auto", None)


def test_the_nearest_entry_that_ships_serves_calls_of_other_sizes_by_its_backend_alone(monkeypatch):
    decode = replace(registry.TYPICAL, num_tokens=64, max_seqs=64, pages_per_seq=512)
    prefill = replace(decode, num_tokens=4096)
    table = {
        select.stem(decode, "auto", "none"): {"platform": "pallas", "num_queries_per_block": 32},
        select.stem(replace(decode, max_seqs=256, num_tokens=256), "auto", "none"): {"platform": "xla"},
        select.stem(prefill, "auto", "none"): {"platform": "triton", "num_queries_per_block": 64},
    }
    own = _told(table, decode, monkeypatch)
    assert (own.config.platform, own.config.num_queries_per_block, own.reason[:17]) == (
        "pallas",
        32,
        "it ships: 42 us; ",
    )
    paged = replace(decode, page_size=64, pages_per_seq=128)  # as many tokens
    assert _told(table, paged, monkeypatch).config == own.config
    for other, platform in (
        (replace(decode, num_tokens=32, max_seqs=32), "pallas"),
        (replace(decode, num_tokens=200, max_seqs=200, pages_per_seq=64), "xla"),
        (replace(decode, num_tokens=2048, pages_per_seq=8), "triton"),  # no decode
        (replace(decode, sinks=True, return_lse=True, sliding_window=128, logits_soft_cap=5.0), "pallas"),
    ):
        near = _told(table, other, monkeypatch)
        assert near.config == _XLA.heuristic(other, H200).replace(platform=platform)
        assert (near.source, near.reason[:24]) == ("shipped", "the nearest that ships i")
    for other in (
        replace(decode, head_dim=64),
        replace(decode, kv_dtype="int8"),
        replace(decode, q_dtype="float32"),
        replace(decode, num_kv_heads=4),
    ):
        assert _told(table, other, monkeypatch).source == "heuristic"
    assert _told({}, decode, monkeypatch).source == "heuristic"


@pytest.mark.parametrize(
    "layer", [(m, entry) for m in MODELS.values() for entry in m.layers if m.name != "tiny"],
    ids=lambda layer: f"{layer[0].name}.{layer[1].name}",
)  # fmt: skip
def test_a_first_call_on_an_h200_is_served_by_what_ships(layer, monkeypatch):
    monkeypatch.setattr(registry, "load", _able)
    model, kind = layer
    for (seqs, page), (rows, tokens) in itertools.product(
        itertools.product((1, 48, 256), (16, 64, 256)), itertools.product((1, 2048), (8192, 131072))
    ):
        call = replace(
            registry.TYPICAL, num_tokens=seqs * rows, num_q_heads=model.num_q_heads, head_dim=model.head_dim,
            page_size=page, num_kv_heads=model.num_kv_heads, max_seqs=seqs, pages_per_seq=tokens // page,
            sinks=kind.sinks, logits_soft_cap=kind.logits_soft_cap, sliding_window=kind.sliding_window,
        )  # fmt: skip
        assert _chosen(call, H200, "auto", None).source == "shipped"


def test_detection_of_a_platform_without_kernel_is_an_error():
    with pytest.raises(ValueError, match=r"platform=.*cuda.*there are"):
        detect_platform(ALGORITHM, "cuda")
    with pytest.raises(ValueError, match="platform='tilelang'"):
        detect_platform(ALGORITHM, "tilelang")
    assert Backend("any") is Backend.ANY
