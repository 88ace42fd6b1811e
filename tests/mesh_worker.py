"""Runs calls over meshes in a process of its own, and says for each how it compares with one device and the oracle.

    python tests/mesh_worker.py DEVICES [COORDINATOR PROCESSES ID] < scenarios.json

One JSON line a scenario: `bits` (equal to one device's), `text` (the oracle's verdict, "pass ..." when right) or
`error`. The number of devices must be known before JAX starts, hence the process. DEVICES says how many a CPU plays;
0 takes the GPUs there are, and leaves out the scenarios that need more of them.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

if sys.argv[1] != "0":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={sys.argv[1]}"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oracle import Case, Claim, judge
from oracle.poison import nan_fill
from rpa import api, ragged_page_attention_v2, registry
from rpa.device import current
from rpa.mesh import layout_of, local_signature

OPTIONS = ("softmax_scale", "logits_soft_cap", "compute_dtype", "optimized", "sliding_window", "mask_value",
           "vmem_limit_bytes", "return_lse")  # fmt: skip


def make(scenario: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arrays and options of a scenario: a ragged batch with an idle sequence, a row nobody owns and dead metadata."""
    random = np.random.default_rng(scenario.get("seed", 0))
    hq, hkv, dim, page, pps, pool = (
        scenario.get(name, default)
        for name, default in {"hq": 8, "hkv": 4, "dim": 16, "page": 4, "pps": 8, "pool": 64}.items()
    )
    queries, contexts = (
        scenario.get("queries", [1, 5, 0, 7, 1, 3]),
        scenario.get("contexts", [30, 9, 4, 7, 32, 12]),
    )
    dtype = jnp.dtype(scenario.get("dtype", "float32"))
    offsets = np.concatenate([[0], np.cumsum(queries), [99]]).astype(np.int32)
    kv = random.normal(size=(pool, page, 2 * hkv, dim))
    options: dict[str, Any] = {"compute_dtype": dtype, **scenario.get("options", {})}
    if scenario.get("int8"):
        kv = np.clip(kv * 40, -127, 127).astype(np.int8)
        options |= {"k_scale": random.uniform(0.01, 0.03, hkv).astype(np.float32), "v_scale": 0.02}
    else:
        kv = kv.astype(dtype)
    count = len(queries)
    tables = random.permutation(np.resize(np.arange(pool), (count + 1) * pps)).reshape(count + 1, pps)
    arrays = (
        random.normal(size=(int(offsets[count]) + 2, hq, dim)).astype(dtype), kv,
        np.array([*contexts, -5], np.int32), tables.astype(np.int32), offsets, count,
        random.normal(size=hq).astype(np.float32) if scenario.get("sinks", True) else None,
    )  # fmt: skip
    return arrays, options


def answer(scenario: dict[str, Any], arrays: tuple, options: dict[str, Any], **mesh: Any) -> tuple[Any, Any]:
    """Output and LSE, eagerly or inside jit, on metadata that the scenario may spoil (inside jit only)."""
    arrays = tuple(None if array is None else array for array in arrays)
    if not scenario.get("jit"):
        return ragged_page_attention_v2(*arrays, return_lse=True, **options, **mesh)
    changed = list(arrays)
    for name, place, value in scenario.get("spoil", ()):
        at = {"context_lens": 2, "block_tables": 3, "query_start_loc": 4}[name]
        changed[at] = changed[at].copy()
        changed[at][tuple(place) if isinstance(place, list) else place] = value
    return jax.jit(lambda *arrays: ragged_page_attention_v2(*arrays, return_lse=True, **options, **mesh))(*changed)


def claim_for(arrays: tuple, options: dict[str, Any], mesh: Mesh, specs: Any) -> Claim:
    """What the backend claims for one device's share; merging pages by LSE is a few roundings in f32 more."""
    full = (*arrays, options.get("k_scale"), options.get("v_scale"))
    statics = tuple(options.get(name, False if name in ("optimized", "return_lse") else None) for name in OPTIONS)
    _, signature = api.prepare(full, statics, False)
    plan = layout_of(mesh, specs)
    local = local_signature(signature, plan)
    implementation = registry.implementation_of(registry.resolve("auto", local, current())[0])
    claim = implementation.claim(signature if not plan.pages else local, current())
    output = implementation.claim(signature, current())
    return Claim(**{**claim, "u_o": output["u_o"], "eta_o": output["eta_o"]})


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    arrays, options = make(scenario)
    shape = scenario["mesh"]
    sizes = tuple(shape.values())
    types = (AxisType.Explicit if scenario.get("explicit") else AxisType.Auto,) * len(sizes)
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), tuple(shape), axis_types=types)
    if scenario.get("poison"):  # what no row sees may hold anything
        clean = Case(*arrays, **{**options, "compute_dtype": jnp.dtype(options["compute_dtype"]).name})
        arrays = (arrays[0], nan_fill(clean).kv_pages, *arrays[2:])
    specs = scenario.get("specs")
    specs = specs and tuple(PartitionSpec(*spec) for spec in specs)
    try:
        out = PartitionSpec(*scenario["out"]) if "out" in scenario else None
        if scenario.get("lying"):  # the arrays' own types say how they lie, and no mesh is given
            got = answer(scenario, tuple(map(lambda a, s: lay(a, mesh, s), arrays, specs)), options)
        else:
            got = answer(scenario, arrays, options, mesh=mesh, in_specs=specs, out_specs=out)
    except (ValueError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    got = tuple(whole(array) for array in got)
    with jax.default_device(jax.local_devices()[0]):
        one = tuple(np.asarray(array) for array in answer(scenario, arrays, options))
    bits = all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(got, one, strict=True))
    nans = bool(np.array_equal(np.isnan(got[0].astype(np.float32)), np.isnan(one[0].astype(np.float32))))
    if scenario.get("spoil"):
        return {"bits": bits, "nans": nans, "some": bool(np.isnan(got[0].astype(np.float32)).any())}
    case = Case(*arrays, **{**options, "compute_dtype": jnp.dtype(options["compute_dtype"]).name})
    verdict = judge(case, got[0], claim_for(arrays, options, mesh, specs), got[1])
    return {"bits": bits, "nans": nans, "text": f"{verdict.status} {verdict.text}", "ratio": verdict.ratio}


def lay(array: Any, mesh: Mesh, spec: Any) -> Any:
    return jax.device_put(array, NamedSharding(mesh, spec)) if isinstance(array, np.ndarray) else array


def whole(array: jax.Array) -> np.ndarray:
    """The whole of an array, each part from a device of this process; the test asserts that it holds them all."""
    found = np.zeros(array.shape, array.dtype)
    seen = np.zeros(array.shape, bool)
    for shard in array.addressable_shards:
        found[shard.index], seen[shard.index] = np.asarray(shard.data), True
    if not seen.all():  # the rest lies with another process
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return found


def main() -> None:
    if len(sys.argv) > 2:
        jax.distributed.initialize(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    for scenario in json.load(sys.stdin):
        if sys.argv[1] == "0" and np.prod(list(scenario["mesh"].values())) > jax.device_count():
            continue
        print("RESULT " + json.dumps(run(scenario)), flush=True)


if __name__ == "__main__":
    main()
