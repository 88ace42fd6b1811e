"""How a decode step gets faster over a mesh: measured on the devices here, estimated beyond them.

    python -m fuzz.scaling [--small] [--json FILE]

Times are of a chain of steps inside one program, so that the host's part is not in them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oracle import Case, judge, visible
from rpa import ragged_page_attention_v2

_LINK, _LATENCY = 300e9, 15e-6  # NVLink one way in bytes a second, and one small all-reduce: round figures
_NETWORK, _FAR = 40e9, 40e-6  # the same between hosts


@dataclass(frozen=True)
class Step:
    """One decode step: `batch` sequences of `context` tokens."""

    name: str
    batch: int
    context: int
    axis: str  # what the devices split: "heads", "sequences" or "pages"
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page: int = 16

    @property
    def bytes(self) -> int:
        """Keys and values, read once, in bf16."""
        return self.batch * self.context * self.kv_heads * self.dim * 4


STEPS = (
    Step("decode b64 x 8k, heads split", 64, 8192, "heads"),
    Step("decode b64 x 8k, sequences split", 64, 8192, "sequences"),
    Step("decode b1 x 128k, heads split", 1, 131072, "heads"),
    Step("decode b1 x 128k, pages split", 1, 131072, "pages"),
)
SMALL = (
    *(Step(step.name, 4, 256, step.axis, 8, 8, 32) for step in STEPS[:2]),
    Step(STEPS[3].name, 1, 512, "pages", 8, 8, 32),
)


def arrays_of(step: Step, mesh: Mesh) -> tuple[Any, ...]:
    """Random arguments, each where its shard of the call wants it."""
    pages = step.context // step.page
    specs = {"heads": PartitionSpec(None, None, "heads"), "pages": PartitionSpec("pages")}
    spec = specs.get(step.axis, PartitionSpec())
    shape = (step.batch * pages, step.page, 2 * step.kv_heads, step.dim)
    place = NamedSharding(mesh, spec)
    draw = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16), out_shardings=place)
    whole = NamedSharding(mesh, PartitionSpec())
    heads = NamedSharding(mesh, PartitionSpec(None, "heads")) if step.axis == "heads" else whole
    queries = jax.random.normal(jax.random.key(1), (step.batch, step.q_heads, step.dim), jnp.bfloat16)
    tables = np.random.default_rng(0).permutation(shape[0]).astype(np.int32).reshape(step.batch, pages)
    metadata = (np.full(step.batch, step.context, np.int32), tables, np.arange(step.batch + 1, dtype=np.int32),
                np.array([step.batch], np.int32))  # fmt: skip
    return (
        jax.device_put(queries, heads),
        draw(jax.random.key(0)),
        *(jax.device_put(array, whole) for array in metadata),
    )


def measure(step: Step, devices: list[Any], steps: int) -> tuple[float, Any, tuple[Any, ...]]:
    """Seconds of one step on these devices, its output and its arguments."""
    mesh = Mesh(np.array(devices), (step.axis,))
    arguments = arrays_of(step, mesh)

    def call(queries: Any, *rest: Any) -> Any:
        return ragged_page_attention_v2(queries, *rest, mesh=mesh)

    def chain(queries: Any, *rest: Any) -> Any:
        return lax.fori_loop(0, steps, lambda _, q: call(q, *rest), queries)

    program = jax.jit(chain).lower(*arguments).compile()
    output = jax.jit(call)(*arguments)
    samples = []
    for _ in range(7):
        begin = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        samples.append((time.perf_counter() - begin) / steps)
    return min(samples[1:]), output, arguments


def verdict(step: Step, output: Any, arguments: tuple[Any, ...]) -> str:
    """The oracle on the first sequence's row."""
    queries, pages, contexts, tables, _, _ = arguments
    low, high = visible(int(contexts[0]) - 1, int(contexts[0]), None)
    used = np.asarray(tables)[0, low // step.page : -(-high // step.page)]
    case = Case(
        np.asarray(queries[:1]), np.asarray(pages[jnp.asarray(used)]), np.asarray(contexts)[:1],
        np.arange(len(used))[None], np.array([0, 1]), 1, compute_dtype="bfloat16",
    )  # fmt: skip
    return judge(case, np.asarray(output[:1])).status


def estimate(step: Step, one: float, devices: int, hosts: int = 1, extra: float = 0.0) -> float:
    """Seconds on more devices than there are here: the measured step divided, and what comes on top.

    Beyond as many devices as kv heads the rest splits sequences. A model, not a measurement.

    Args:
        extra: seconds by which the largest mesh here missed its share of the step, taken to stay.
    """
    heads = min(devices, step.kv_heads) if step.axis == "heads" else 1
    others = devices // heads
    share = one / (heads * min(others, step.batch if step.axis != "pages" else others))
    if others == 1:
        return share + extra
    link, latency = (_NETWORK, _FAR) if hosts > 1 else (_LINK, _LATENCY)
    answer = step.batch * step.q_heads // heads * step.dim * 4
    exchange = latency * (2 if step.axis == "pages" else 1) + 2 * answer * (others - 1) / others / link
    return share + (max(exchange, extra) if step.axis != "heads" else exchange + extra)


def main() -> None:
    parser = argparse.ArgumentParser(description="How a decode step gets faster over a mesh.")
    parser.add_argument("--small", action="store_true", help="sizes for simulated devices")
    parser.add_argument("--json", help="write the rows here")
    chosen = parser.parse_args()
    rows = []
    chain = 20 if chosen.small else 100  # long enough for the start of a program on all devices to count for little
    for step in SMALL if chosen.small else STEPS:
        one, alone, _ = measure(step, jax.devices()[:1], chain)
        count, extra = 2, 0.0
        while count <= len(jax.devices()):
            seconds, output, arguments = measure(step, jax.devices()[:count], chain)
            judged = verdict(step, output, arguments)
            bits = bool(np.array_equal(np.asarray(output).view(np.uint16), np.asarray(alone).view(np.uint16)))
            rows.append({"step": step.name, "devices": count, "one_us": one * 1e6, "us": seconds * 1e6,
                         "speedup": one / seconds, "efficiency": one / seconds / count, "oracle": judged,
                         "bits_of_one": bits})  # fmt: skip
            times = f"{count} devices {seconds * 1e6:.1f} us, one {one * 1e6:.1f} us"
            gain = f"{one / seconds:.2f}x, efficiency {one / seconds / count:.0%}"
            same = "the bits of one device" if bits else "other bits than one device"
            print(f"{step.name}: {times}, {gain}, oracle: {judged}, {same}", flush=True)
            extra = max(seconds - one / count, 0.0)
            count *= 2
        for devices, hosts in ((4, 1), (8, 1), (64, 8)):
            seconds = estimate(step, one, devices, hosts, extra)
            gain = one / seconds
            rows.append({"step": step.name, "devices": devices, "us": seconds * 1e6, "speedup": gain,
                         "efficiency": gain / devices, "estimate": True})  # fmt: skip
            told = f"{seconds * 1e6:.1f} us, {gain:.2f}x, efficiency {gain / devices:.0%}"
            print(f"  estimate on {devices}: {told}", flush=True)
        if chosen.json:
            with open(chosen.json, "w", encoding="utf-8") as file:
                json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
