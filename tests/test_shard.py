"""Over a mesh: the bits of one device where nothing is added up across devices, the oracle's bound where it is."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_call
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rpa import explain, ragged_page_attention_v2, registry
from rpa.mesh import Layout, layout_of, local_signature

WORKER = Path(__file__).with_name("mesh_worker.py")
P = PartitionSpec

SCENARIOS: dict[str, dict[str, Any]] = {
    "fewer kv heads than shards": {"mesh": {"tp": 8}, "hkv": 2, "int8": True},
    "all three": {"mesh": {"dp": 2, "tp": 2, "cp": 2}, "options": {"logits_soft_cap": 5.0, "sliding_window": 6}},
    "arrays that lie split": {
        "mesh": {"a": 2, "b": 4}, "explicit": True, "lying": True, "int8": True,
        "specs": [[None, "b"], ["a", None, "b"], [], [], [], [], ["b"]],
    },
    "inside jit, spoiled, sequences": {
        "mesh": {"data": 4}, "jit": True, "explicit": True,
        "spoil": [["context_lens", 1, 10**6], ["block_tables", [4, 0], -7], ["context_lens", 3, -1]],
    },
}  # fmt: skip

SLOW: dict[str, dict[str, Any]] = {
    "heads": {"mesh": {"tp": 4}},
    "sequences": {"mesh": {"data": 8}},
    "heads with scales": {"mesh": {"tp": 2}, "int8": True, "options": {"sliding_window": 5}},
    "sequences and heads": {"mesh": {"data": 4, "model": 2}},
    "pages": {"mesh": {"pages": 4}},
    "pages in bf16": {"mesh": {"cp": 8}, "dtype": "bfloat16", "sinks": False},
    "inside jit, spoiled offsets, all three": {
        "mesh": {"dp": 2, "tp": 2, "cp": 2}, "jit": True, "spoil": [["query_start_loc", 2, 40]],
    },
    **{
        f"arrays that lie split, inside jit, {name}": {
            "mesh": {"a": 2, "b": 4}, "explicit": True, "lying": True, "jit": True, "queries": [1, 5, 0, 7, 1, 3, 2],
            "contexts": [30, 9, 4, 7, 32, 12, 2], "specs": specs,
        }
        for name, specs in {
            "heads by both": [[None, ["a", "b"]], [], [], [], [], [], []],
            "sequences and pages": [[], ["b"], ["a"], ["a"], [], [], []],
        }.items()
    },
    "axes that say how arrays lie": {"mesh": {"dp": 2, "tp": 4}, "explicit": True, "out": [None, "tp", None]},
    "one by eight": {"mesh": {"data": 1, "model": 8}, "hq": 16, "hkv": 8},
    "eight by one": {"mesh": {"x": 8, "y": 1}},
    "names nobody knows": {"mesh": {"x": 2, "y": 4}},
    "pages without a window": {"mesh": {"tp": 2, "cp": 4}, "options": {"logits_soft_cap": 5.0}},
    **{
        f"pages under a window of {window}": {"mesh": {"pages": 4}, "options": {"sliding_window": window}}
        for window in (1, 3, 8, 21)  # within a page, of whole pages, of pages and some slots
    },
    "pages under a window, in bf16": {
        "mesh": {"cp": 8}, "dtype": "bfloat16", "sinks": False, "options": {"sliding_window": 10}, "poison": True,
    },
    "pages of one slot under a window": {
        "mesh": {"pages": 4}, "page": 1, "pps": 32, "pool": 224, "options": {"sliding_window": 7},
    },
    "scaled pages under a window, heads copied": {
        "mesh": {"tp": 4, "cp": 2}, "hkv": 2, "int8": True, "options": {"sliding_window": 9},
    },
    "a window far into one long context": {
        "mesh": {"pages": 8}, "queries": [5], "contexts": [1000], "pps": 256, "pool": 256,
        "options": {"sliding_window": 100},
    },
    "pages under a window, spoiled": {
        "mesh": {"dp": 2, "cp": 4}, "jit": True, "explicit": True, "options": {"sliding_window": 6},
        "spoil": [["block_tables", [4, 6], -7], ["block_tables", [0, 0], 10**6], ["context_lens", 3, -1]],
    },
    "pages by two axes under a window, scaled, heads by a third": {
        "mesh": {"a": 2, "b": 2, "c": 2}, "int8": True, "options": {"sliding_window": 7, "logits_soft_cap": 4.0},
        "specs": [[None, "c", None], [["b", "a"], None, "c", None], [], [], [], [], ["c"]],
    },
    "heads copied by two axes, the inner one first": {
        "mesh": {"a": 2, "b": 4}, "hkv": 2, "int8": True,
        "specs": [[None, ["b", "a"]], [], [], [], [], [], [["b", "a"]]],
    },
    "pages and sequences": {"mesh": {"dp": 2, "pages": 4}, "queries": [1, 1, 1], "contexts": [32, 1, 17]},
    "one long context": {"mesh": {"pages": 8}, "queries": [1], "contexts": [1000], "pps": 256, "pool": 256},
    "a chunk on a long context": {"mesh": {"pages": 8}, "queries": [9], "contexts": [300], "pps": 80, "pool": 80},
    "decode b8 in bf16": {
        "mesh": {"data": 2, "tp": 4}, "queries": [1] * 8, "contexts": [40, 3, 17, 64, 1, 33, 8, 9], "pps": 16,
        "pool": 128, "dtype": "bfloat16", "dim": 64,
    },
    "only sequences, inside jit": {"mesh": {"batch": 8}, "jit": True, "options": {"sliding_window": 3}},
    "axes by specs": {
        "mesh": {"a": 2, "b": 4},
        "specs": [[None, "b", None], ["a", None, "b", None], [], [], [], [], ["b"]],
    },
    "two axes over the heads": {
        "mesh": {"a": 2, "b": 2}, "specs": [[None, ["a", "b"]], [None, None, ["a", "b"]], [], [], [], []],
    },
    **{
        f"random batch {seed}": {
            "mesh": [{"data": 2, "tp": 2, "cp": 2}, {"data": 4, "tp": 2}, {"tp": 2, "cp": 4}][seed % 3],
            "seed": seed,
            "queries": [int(q) for q in np.random.default_rng(seed).integers(0, 12, 7)],
            "contexts": [int(n) for n in np.random.default_rng(seed + 1).integers(0, 33, 7)],
        }
        for seed in range(3)
    },
}  # fmt: skip


# Meshes of all eight devices, so that every process holds a part of each.
ACROSS: dict[str, dict[str, Any]] = {
    "heads": {"mesh": {"tp": 8}, "int8": True},
    **{name: (SCENARIOS | SLOW)[name] for name in ("sequences and heads", "pages in bf16", "all three")},
    "inside jit": {"mesh": {"data": 8}, "jit": True, "dtype": "bfloat16"},
}


# Many small programs are compiled, each for eight devices, and run once: without LLVM's passes in 0.6 of the time.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def _run(scenarios: dict[str, dict[str, Any]], arguments: list[str], **env: str) -> subprocess.Popen:
    path = os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **env}
    process = subprocess.Popen(
        [sys.executable, str(WORKER), *arguments], env=env, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(list(scenarios.values())))
    process.stdin.close()
    process.stdin = None
    return process


def _results(scenarios: dict[str, dict[str, Any]], process: subprocess.Popen) -> dict[str, Any]:
    out, errors = process.communicate(timeout=550)
    lines = [json.loads(line[7:]) for line in out.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(scenarios), errors[-3000:]
    return dict(zip(scenarios, lines, strict=True))


@pytest.fixture(scope="module")
def results():
    return _results(SCENARIOS, _run(SCENARIOS, ["8"], **QUICK))


def _check(name: str, scenario: dict[str, Any], result: dict[str, Any]) -> None:
    assert "error" not in result, result
    assert result["nans"], f"{name}: other rows are NaN than on one device"
    if "spoil" in scenario:
        assert result["some"], f"{name}: nothing was spoiled"
    else:
        assert result["text"].startswith("pass"), f"{name}: {result['text']}"
    if set(scenario["mesh"]) <= {"data", "batch", "dp"}:
        assert result["bits"], f"{name}: not the bits of one device"


@pytest.mark.parametrize("name", SCENARIOS)
def test_eight_devices(name, results):
    _check(name, SCENARIOS[name], results[name])


@pytest.mark.slow
def test_eight_devices_at_length():
    for name, result in _results(SLOW, _run(SLOW, ["8"], **QUICK)).items():
        _check(name, SLOW[name], result)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes(processes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    chosen = ACROSS if processes == 2 else {name: ACROSS[name] for name in ("heads", "all three")}
    started = [_run(chosen, [str(8 // processes), coordinator, str(processes), str(i)]) for i in range(processes)]
    for process in started:
        for name, result in _results(chosen, process).items():
            _check(name, chosen[name], result)


# ------------------------------------------------------------------ layouts and refusals, without devices


def _mesh(**axes: int) -> AbstractMesh:
    return AbstractMesh(tuple(axes.values()), tuple(axes))


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        (_mesh(tp=4), Layout(None, heads=("tp",))),
        (_mesh(x=4), Layout(None, heads=("x",))),
        (_mesh(data=2, model=4), Layout(None, heads=("model",), sequences=("data",))),
        (_mesh(model=4, data=2), Layout(None, heads=("model",), sequences=("data",))),
        (_mesh(x=2, y=4), Layout(None, heads=("y",), sequences=("x",))),
        (_mesh(data=8), Layout(None, sequences=("data",))),
        (_mesh(pages=2, tp=2), Layout(None, heads=("tp",), pages=("pages",))),
        (_mesh(x=2, y=2, z=2), Layout(None, heads=("z",), sequences=("x",), pages=("y",))),
    ],
)
def test_a_mesh_alone_says_what_its_axes_split(mesh, layout):
    assert layout_of(mesh) == replace(layout, mesh=mesh)


HEADS = (P(None, "tp", None), P(None, None, "tp", None), P(), P(), P(), P())


@pytest.mark.parametrize(
    ("specs", "layout"),
    [
        (HEADS, Layout(None, heads=("tp",))),
        ((*HEADS, P("tp")), Layout(None, heads=("tp",))),
        ((*HEADS, None), Layout(None, heads=("tp",))),
        ((P(None, "tp"), P(), None, None, None, None), Layout(None, heads=("tp",))),
        ((P(), P("tp"), P("dp"), P("dp"), P(), P()), Layout(None, sequences=("dp",), pages=("tp",))),
        ((P(None, ("dp", "tp")), P(), P(), P(), P(), P()), Layout(None, heads=("dp", "tp"))),
        ((P(),) * 7, Layout(None)),
    ],
)
def test_specs_say_what_the_axes_split(specs, layout):
    mesh = _mesh(dp=2, tp=2)
    assert layout_of(mesh, specs) == replace(layout, mesh=mesh)


@pytest.mark.parametrize(
    ("specs", "error", "text"),
    [
        (HEADS[:5], ValueError, "seven PartitionSpecs are expected, or six"),
        ("tp", ValueError, "in_specs='tp'"),
        ((P("tp"), *HEADS[1:]), ValueError, "queries is split in dimension 0 by mesh axis 'tp'"),
        ((P(None, None, "tp"), *HEADS[1:]), ValueError, "queries is split in dimension 2"),
        ((P(), *HEADS[1:]), ValueError, "kv_pages is split in dimension 2 by mesh axis 'tp'"),
        ((*HEADS[:4], P("dp"), P()), ValueError, "query_start_loc is split in dimension 0"),
        ((*HEADS, P("dp")), ValueError, "softmax_aux is split in dimension 0"),
        ((P(None, "model"), *HEADS[1:]), ValueError, "queries names axis 'model'; the mesh has dp, tp"),
        ((P(None, None, None, "tp"), *HEADS[1:]), ValueError, "at most 3 entries"),
        ((HEADS[0], P("tp", None, "tp"), *HEADS[2:]), ValueError, "mesh axis 'tp' splits two dimensions"),
        ((P(None, ("tp", "tp")), P(), *HEADS[2:]), ValueError, "mesh axis 'tp' splits two dimensions"),
        (("tp", *HEADS[1:]), TypeError, "queries has 'tp': a PartitionSpec or None"),
    ],
)
def test_specs_that_cannot_be_are_named(specs, error, text):
    with pytest.raises(error) as caught:
        layout_of(_mesh(dp=2, tp=2), specs)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("axes", "changes", "text"),
    [
        ({"tp": 5}, {}, "mesh axis 'tp' of size 5 does not divide the 32 heads of queries"),
        (
            {"tp": 4},
            {"num_q_heads": 30, "num_kv_heads": 6},
            "mesh axis 'tp' of size 4 does not divide the 30 heads",
        ),
        (
            {"tp": 4},
            {"num_q_heads": 36, "num_kv_heads": 6},
            "mesh axis 'tp' of size 4 does not divide the 6 kv heads",
        ),
        ({"pages": 3}, {}, "mesh axis 'pages' of size 3 does not divide the 1024 pages"),
    ],
)
def test_an_axis_that_does_not_divide_is_named(axes, changes, text):
    mesh = _mesh(**axes)
    with pytest.raises(ValueError, match="mesh axis") as caught:
        local_signature(replace(registry.TYPICAL, **changes), layout_of(mesh))
    assert text in str(caught.value)


def test_shares_add_up_to_the_whole():
    mesh = _mesh(dp=2, tp=4, cp=2)
    local = local_signature(registry.TYPICAL, layout_of(mesh))
    assert (local.num_q_heads, local.num_kv_heads, local.num_pages) == (8, 2, 512)
    assert (local.max_seqs, local.return_lse, local.q_dtype) == (local.num_tokens, True, "float32")
    many = _mesh(tp=32)
    local = local_signature(registry.TYPICAL, layout_of(many))
    assert (local.num_q_heads, local.num_kv_heads) == (1, 1)
    with pytest.raises(ValueError, match="'z' has nothing left to split"):
        layout_of(_mesh(x=1, y=1, z=2, w=1))
    assert layout_of(_mesh(x=2, y=1, z=1, w=4)).label == "heads:4,sequences:2"


def test_a_mesh_is_never_ignored():
    call = small_call.arguments()
    with pytest.raises(TypeError, match="mesh='tp'"):
        ragged_page_attention_v2(**call, mesh="tp")
    with pytest.raises(ValueError, match="mesh=None: in_specs and out_specs need the mesh"):
        ragged_page_attention_v2(**call, in_specs=HEADS)
    with pytest.raises(ValueError, match="mesh=None"):
        ragged_page_attention_v2(**call, out_specs=P())
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    with pytest.raises(TypeError, match="out_specs: output has 'tp'"):
        ragged_page_attention_v2(**call, mesh=mesh, out_specs="tp")
    with pytest.raises(ValueError, match="sliding_window=0"):
        ragged_page_attention_v2(**call, mesh=mesh, sliding_window=0)


@pytest.mark.parametrize(
    ("out_specs", "text"),
    [
        (P(None, "model"), "out_specs: output names axis 'model'; the mesh has dp, tp"),
        (P(None, None, None, "tp"), "out_specs: output has .*: at most 3 entries"),
        (P(("dp", "tp")), r"mesh axis \('dp', 'tp'\) of size 4 does not divide the output's dimension of 6"),
        ((P(), P(None, None, "tp")), "out_specs: lse has .*: at most 2 entries"),
        ((P(), P(), P()), "a PartitionSpec, a pair of them or None is expected"),
    ],
)
def test_wishes_for_the_output_that_cannot_be_are_named(out_specs, text):
    with pytest.raises(ValueError, match=text):
        ragged_page_attention_v2(**small_call.arguments(), mesh=_mesh(dp=2, tp=2), out_specs=out_specs)


def test_a_mesh_without_devices_serves_where_they_are_set():
    call, mesh = small_call.arguments(), Mesh(np.array(jax.devices()[:1]), ("tp",))
    with pytest.raises(ValueError, match="it names no devices; give a Mesh"):
        ragged_page_attention_v2(**call, mesh=mesh.abstract_mesh)
    with jax.set_mesh(mesh):
        output = ragged_page_attention_v2(**call, mesh=jax.sharding.get_abstract_mesh())
    assert np.array_equal(output, ragged_page_attention_v2(**call))


@pytest.mark.parametrize("types", [*itertools.product((AxisType.Auto, AxisType.Explicit), repeat=2)], ids=str)
def test_axes_of_either_type_and_of_both_lay_the_arrays_out(types):
    call, mesh = small_call.arguments(), Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("dp", "tp"), axis_types=types)
    over = {"mesh": mesh, "out_specs": P("dp", "tp")}
    plain = ragged_page_attention_v2(**call)
    assert np.array_equal(ragged_page_attention_v2(**call, **over), plain)
    assert np.array_equal(jax.jit(lambda kw: ragged_page_attention_v2(**kw, **over))(call), plain)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_arrays_that_lie_split_need_no_mesh(jit):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    call = small_call.arguments()
    plain = ragged_page_attention_v2(**call)

    def over(**specs):
        laid = {name: jax.device_put(array, NamedSharding(mesh, specs.get(name, P()))) for name, array in call.items()}
        run = jax.jit(lambda kw: ragged_page_attention_v2(**kw)) if jit else lambda kw: ragged_page_attention_v2(**kw)
        return run(laid)

    heads = over(queries=P(None, "tp"), kv_pages=P(None, None, "tp"))
    assert np.array_equal(heads, plain)
    assert jax.typeof(heads).sharding.spec == P(None, "tp", None)
    assert np.array_equal(over(context_lens=P("dp"), block_tables=P("dp")), plain)
    for name, spec, text in (
        ("queries", P("dp"), "queries is split in dimension 0 by mesh axis 'dp', and an axis may split the heads of"),
        ("kv_pages", P(None, None, None, "tp"), "kv_pages is split in dimension 3 by mesh axis 'tp', and an axis may"),
        ("block_tables", P(None, "dp"), "block_tables is split in dimension 1 by mesh axis 'dp', and an axis may"),
    ):
        with pytest.raises(ValueError, match=text):
            over(**{name: spec})


def test_explain_speaks_of_one_devices_share():
    call = small_call.arguments()
    mesh = _mesh(tp=2, pages=4)
    told = explain(**call, mesh=mesh)
    assert "heads=2/1" in told.key[2]
    assert "sharding=heads:2,pages:4" in told.key[2]
    assert "a sharded call is not tuned" in told or "heuristics" in dict(told.trail)["autotune"]
    with pytest.raises(ValueError, match="mesh axis 'tp' of size 3 does not divide the 4 heads"):
        explain(**call, mesh=_mesh(tp=3))
