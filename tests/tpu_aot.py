"""Compile the TPU kernel with libtpu on a machine without a TPU, in a process of its own.

    python tests/tpu_aot.py compile CHIP SHAPE...      one JSON line a shape: seconds, code and temporary bytes
    python tests/tpu_aot.py budget CHIP SHAPE...       and what the compiler's schedule says: VMEM, each block loop
    python tests/tpu_aot.py upstream CHIP              the same for the kernel JAX ships, at Llama-3-8B heads
    python tests/tpu_aot.py step CHIP SHAPE...         a serving step: does it move the cache, in whose layout

A process of its own because libtpu reads its flags when jax is imported.
"""

from __future__ import annotations

import glob
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v6e-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip
KERNEL = "ragged_paged_attention"
# Columns of the compiler's table of slots a bundle.
SLOTS = ("mxu", "xlu", "valu", "vpop", "eup", "vload", "fill", "vstore", "spill", "salu")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:([A-Z]{2})\s*)?:\s*((?:>\s?)*)")


def main(what: str, chip: str, *shapes: str) -> None:
    os.environ.update(QUIET)
    folder = tempfile.mkdtemp(prefix="rpa-llo-")
    if what in ("budget", "upstream"):
        # Only what is read below: all seventy passes take longer to write than to run.
        wanted = "--xla_jf_dump_llo_pass_label_regex=.*(final_|post-ra).*"
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true {wanted}"
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    try:
        for shape in shapes or ("llama_page16",):
            for path in Path(folder).iterdir():
                path.unlink()
            facts = COMPILERS[what](chip, shape)
            if what in ("budget", "upstream"):
                facts |= {"vmem_bytes": vmem_bytes(folder), "loops": block_loops(folder)}
            print(json.dumps({"chip": chip, "shape": shape, **facts}), flush=True)
    finally:
        shutil.rmtree(folder)


# ------------------------------------------------------------------ compiling


def compile_ours(chip: str, shape: str) -> dict[str, Any]:
    """Compile the backend as the public function would run it there."""
    import jax
    from tpu_shapes import signature

    from rpa import device, registry
    from rpa.backends.pallas_tpu import chips
    from rpa.signature import Inputs

    static = signature(shape)
    backend = registry.load("pallas_tpu")
    specs = argument_specs(static)

    def call(arrays: list[Any]) -> Any:
        return backend.run(Inputs(*arrays), static, config)

    with chip_mesh(chip) as sharding:
        here = device.current()
        refused = backend.supports(static, here)
        if refused:
            return {"refused": refused}
        config = backend.heuristic(static, here)
        specs = [s if s is None else place(s, sharding) for s in specs]
        began = time.process_time()
        lowered = jax.jit(call).lower(specs)
        lower_s = time.process_time() - began
        compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    return {
        "vmem_planned": chips.plan_of(static, here, config).vmem_bytes,
        "config": [config.num_kv_pages_per_block, config.num_queries_per_block, config.num_stages],
        "lower_s": round(lower_s, 1),
        "cpu_s": round(time.process_time() - began, 1),
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "code_bytes": memory.generated_code_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def place(spec: Any, sharding: Any) -> Any:
    """The array on the chip, row-major: for a head size under 128 JAX's default layout would transpose the cache."""
    import jax
    from jax.experimental.layout import Format, Layout

    order = Layout(tuple(range(len(spec.shape))))
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=Format(order, sharding))


def argument_specs(static: Any) -> list[Any]:
    """The fields of `Inputs` as shapes and dtypes, None where there is no array."""
    import jax
    import jax.numpy as jnp

    def spec(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    heads, seqs = static.num_kv_heads, static.max_seqs
    return [
        spec((static.num_tokens, static.num_q_heads, static.head_dim), static.q_dtype),
        spec((static.num_pages, static.page_size, 2 * heads, static.head_dim), static.kv_dtype),
        spec((seqs,), "int32"),
        spec((seqs, static.pages_per_seq), "int32"),
        spec((seqs + 1,), "int32"),
        spec((1,), "int32"),
        spec((static.num_q_heads,), "float32") if static.sinks else None,
        spec((heads,), "float32") if static.k_scale else None,
        spec((heads,), "float32") if static.v_scale else None,
    ]


class chip_mesh:
    """An abstract mesh whose one device is a chip that is not there; yields a sharding onto it."""

    def __init__(self, chip: str) -> None:
        import jax
        from jax.experimental import topologies
        from tpu_shapes import TOPOLOGIES

        self.device = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[0]
        kind = jax.sharding.AbstractDevice(device_kind=self.device.device_kind, num_cores=1, platform="tpu")
        axes = (jax.sharding.AxisType.Auto,)
        self.mesh = jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh((1,), ("x",), axis_types=axes, abstract_device=kind)
        )

    def __enter__(self) -> Any:
        import jax

        self.mesh.__enter__()
        return jax.sharding.SingleDeviceSharding(self.device)

    def __exit__(self, *error: Any) -> None:
        self.mesh.__exit__(*error)


def compile_step(chip: str, shape: str) -> dict[str, Any]:
    """What a server compiles: new tokens are written into pages that it donates, then attended to.

    The layout of the pages is XLA's own choice ("auto", by `Layout.AUTO`) or the one JAX gives such a shape
    ("default"); `held_bytes` is the cache in that layout, padding included, `copies` are those of the whole cache.
    """
    import jax
    from jax.experimental.layout import Format, Layout
    from tpu_shapes import signature

    from rpa import device, registry
    from rpa.signature import Inputs

    static = signature(shape)
    backend = registry.load("pallas_tpu")
    queries, pages, *metadata = argument_specs(static)
    tokens = jax.ShapeDtypeStruct((static.num_tokens, *pages.shape[2:]), pages.dtype)
    places = jax.ShapeDtypeStruct((static.num_tokens,), "int32")
    facts: dict[str, Any] = {"cache_bytes": pages.size * pages.dtype.itemsize}

    def step(pages: Any, tokens: Any, page: Any, slot: Any, queries: Any, metadata: Any) -> Any:
        pages = pages.at[page, slot].set(tokens)
        return backend.run(Inputs(queries, pages, *metadata), static, config), pages

    with chip_mesh(chip) as here:
        config = backend.heuristic(static, device.current())
        for name, kept in (("auto", Format(Layout.AUTO, here)), ("default", here)):
            shardings = {"in_shardings": (kept, here, here, here, here, here), "out_shardings": (here, kept)}
            jitted = jax.jit(step, donate_argnums=0, **shardings)
            compiled = jitted.lower(pages, tokens, places, places, queries, metadata).compile()
            memory: Any = compiled.memory_analysis()
            text: Any = compiled.as_text()
            copies = re.findall(rf"= \w+\[{','.join(map(str, pages.shape))}\]\S* copy\(", text)
            facts[name] = {
                "order": compiled.input_formats[0][0].layout.major_to_minor,
                "held_bytes": memory.alias_size_in_bytes,
                "temp_bytes": memory.temp_size_in_bytes,
                "copies": len(copies),
            }
    return facts


def compile_upstream(chip: str, _: str) -> dict[str, Any]:
    """Compile the kernel that ships with JAX at the same heads, pages and block."""
    import functools

    import jax
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
    from tpu_shapes import signature

    static = signature("llama_page16")
    call = functools.partial(ragged_paged_attention, num_kv_pages_per_block=16, num_queries_per_block=32)
    with chip_mesh(chip) as sharding:
        specs = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in argument_specs(static)[:6]]
        jax.jit(call).lower(*specs).compile()
    return {}


COMPILERS = {"compile": compile_ours, "budget": compile_ours, "upstream": compile_upstream, "step": compile_step}

# ------------------------------------------------------------------ reading the schedule


def vmem_bytes(folder: str) -> int:
    """VMEM that the compiled kernel takes: scratch buffers, operands, spills."""
    (path,) = glob.glob(f"{folder}/*{KERNEL}*-[0-9][0-9]-post-ra.txt")
    sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", Path(path).read_text())
    return sum(int(size, 16) for size in sizes)


def block_loops(folder: str) -> list[dict[str, int]]:
    """Bundles and slots of each loop body that does matrix work, innermost counted apart, in program order.

    A bundle is a cycle at least. Predicated code counts as if it ran; waits for transfers do not count at all.
    """
    named = (p for p in glob.glob(f"{folder}/*{KERNEL}*-final_bundles.txt") if "schedule-analysis" not in p)
    (bundles,) = named
    (slots,) = glob.glob(f"{folder}/*{KERNEL}*-final_hlo-static-per-bundle-utilization.txt")
    rows = [_BUNDLE.match(line) for line in Path(bundles).read_text().splitlines()]
    places = [(int(m[1], 16), m[2], m[3].count(">")) for m in rows if m]
    lines = Path(slots).read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("MXU"))
    used = [list(map(int, line.split())) for line in lines[head + 3 :] if line.strip()]
    loops: dict[int, dict[str, int]] = {}
    start = {0: 0}
    for (address, tag, depth), counts in zip(places, used, strict=True):
        if tag == "LB":
            start[depth] = address
        body = loops.setdefault(start.get(depth, 0), {"bundles": 0, **dict.fromkeys(SLOTS, 0)})
        body["bundles"] += 1
        for name, count in zip(SLOTS, counts, strict=False):
            body[name] += count
    return [loops[address] for address in sorted(loops) if loops[address]["mxu"]]


if __name__ == "__main__":
    main(*sys.argv[1:])
