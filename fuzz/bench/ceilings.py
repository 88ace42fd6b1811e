"""What this machine can do at most: the read stream, and the matrix product in a burst and sustained."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fuzz.bench import clock


@dataclass(frozen=True)
class Ceilings:
    """Measured ceilings of one device; every fraction in a record is of these."""

    device: str
    cache_bytes: int
    read: float  # bytes/s
    burst: dict[str, float]  # FLOP/s of a matrix product, by dtype of the operands
    sustained: dict[str, float]

    def floor(self, bytes_moved: int, flops: int, dtype: str) -> float:
        """Seconds no kernel can beat: the larger of the two floors."""
        return max(bytes_moved / self.read, flops / self.burst[dtype])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure() -> Ceilings:
    """Measure JAX's default device; takes a few seconds."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measure_cpu()
    read = _read()
    burst = {dtype: _matmul(dtype, rest=0.2) for dtype in ("bfloat16", "float16")}
    burst["float32"] = _matmul("float32", rest=0.2)
    sustained = {dtype: _matmul(dtype, rest=0.0, rounds=60) for dtype in ("bfloat16", "float32")}
    return Ceilings(device.device_kind, 60 << 20, read, burst, sustained)


# ------------------------------------------------------------------ CPU


def _measure_cpu() -> Ceilings:
    rates = {"float32": _cpu_matmul("float32"), "bfloat16": _cpu_matmul("bfloat16")}
    # bf16 products may run in f32 arithmetic as well: the ceiling is the better of the two.
    rates["bfloat16"] = max(rates.values())
    rates["float16"] = rates["float32"]
    return Ceilings(_cpu_name(), _cpu_cache(), _cpu_read(), rates, rates)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line for line in lines if line.startswith("model name"))
        return f"{model.partition(':')[2].strip()} x{os.cpu_count()}"
    except (OSError, StopIteration):
        return f"cpu x{os.cpu_count()}"


def _cpu_cache() -> int:
    """Bytes of the last-level cache this process may count on: at most 64 MiB, since a cloud's cores share more."""
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as text:
            return min(64 << 20, int(text.read().strip().rstrip("K")) << 10)
    except (OSError, ValueError):
        return 32 << 20


def _cpu_read() -> float:
    """Every core sums its share of an array far larger than the cache (NumPy lets the interpreter lock go)."""
    cores = len(os.sched_getaffinity(0))
    parts = [np.ones(256 << 20 >> 3, np.int64) for _ in range(cores)]
    best = np.inf
    for _ in range(6):
        threads = [threading.Thread(target=part.max) for part in parts]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - begin)
    return sum(part.nbytes for part in parts) / best


def _cpu_matmul(dtype: str, n: int = 2048) -> float:
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (n, n), "float32").astype(dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    return 2 * n**3 / min(clock.walls(product, [(x, x)], budget=1.0))


# ------------------------------------------------------------------ accelerators


def _timed(function: Any, arguments: list[tuple], rest: float = 0.0, rounds: int = 9) -> float:
    """Seconds of one call: kernel time on a GPU; on a TPU the wall clock, its programs are long enough for that."""
    import jax

    if jax.devices()[0].platform == "gpu":
        return clock.kernels(function, arguments, rest=rest, rounds=rounds).seconds
    return clock.wall(function, arguments).seconds


def _read(gigabytes: int = 4) -> float:
    import jax
    import jax.numpy as jnp

    x = jnp.ones((gigabytes << 30) // 4, jnp.float32)
    return x.nbytes / _timed(jax.jit(jnp.max), [(x,)])


def _matmul(dtype: str, rest: float, rounds: int = 9, n: int = 8192) -> float:
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (n, n), "float32").astype(dtype)
    highest = "highest" if dtype == "float32" else None
    product = jax.jit(lambda a: jnp.dot(a, a, precision=highest))
    return 2 * n**3 / _timed(product, [(x,)], rest, rounds)
