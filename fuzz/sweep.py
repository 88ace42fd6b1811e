"""Measure the arithmetic that a backend's claim rests on, on the device at hand: `python -m fuzz.sweep`.

Each function is evaluated inside jit, as a kernel uses it, over float32 numbers dense in their bit patterns, and
compared with float64, whose own error is 2**-29 of what is measured. The dots are measured with probes that make
each kind of accumulator show itself: terms of half a unit beside a large one (round-to-nearest loses them, truncation
loses even terms of almost a unit), cancellation, random data.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpa import device, numerics
from rpa.backends import xla

_NORMAL = float(np.finfo(np.float32).tiny)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Figure:
    """The worst that one probe saw."""

    name: str
    error: float  # relative; for dots relative to the number of terms times the sum of |a b|
    at: str  # where
    underflow: float  # the largest absolute error where the answer is below the normal range
    count: int


@dataclass(frozen=True)
class Function:
    """A float32 function, its float64 reference, and the interval it is used on."""

    name: str
    traced: Callable[..., Any]
    reference: Callable[..., Any]
    low: float
    high: float


FUNCTIONS = (
    Function("exp", jnp.exp, np.exp, -104.0, 0.0),
    Function("exp2", jnp.exp2, np.exp2, -150.0, 0.0),
    Function("tanh", jnp.tanh, np.tanh, -20.0, 20.0),
    Function("log", jnp.log, np.log, 1.0, 3e38),
)
OPERANDS = ("float32", "bfloat16", "float16")


def dense(low: float, high: float, count: int) -> Iterator[np.ndarray]:
    """About `count` float32 numbers of `[low, high]`, evenly spaced in their bit patterns, in equal chunks."""
    halves = [(max(low, 0.0), high)] if high > 0 else []
    halves += [(-min(high, -0.0), -low)] if low < 0 else []
    for small, large in halves:
        first, last = (int(np.float32(x).view(np.int32)) for x in (abs(small), large))
        step = max(1, (last - first) // max(1, count // len(halves)))
        bits = np.arange(first, last + 1, step, dtype=np.int64)
        bits = np.append(bits, last)
        bits = np.pad(bits, (0, -len(bits) % _CHUNK), mode="edge").astype(np.int32)
        sign = 1.0 if large == high else -1.0
        for part in bits.reshape(-1, _CHUNK):
            yield np.float32(sign) * part.view(np.float32)


def function_figure(function: Function, count: int) -> Figure:
    """The worst relative error of a function, and the worst absolute one below the normal range."""
    program = jax.jit(function.traced)
    worst, at, underflow, seen = 0.0, 0.0, 0.0, 0
    for x in dense(function.low, function.high, count):
        got = np.asarray(program(x)).astype(np.float64)
        true = function.reference(x.astype(np.float64))
        normal = np.abs(true) >= _NORMAL
        error = np.abs(got - true)
        relative = np.where(normal, error / np.where(normal, np.abs(true), 1.0), 0.0)
        k = int(np.argmax(relative))
        if relative[k] > worst:
            worst, at = float(relative[k]), float(x[k])
        underflow = max(underflow, float(np.max(np.where(normal, 0.0, error))))
        seen += x.size
    return Figure(function.name, worst, f"x = {at!r}", underflow, seen)


def divide_figure(count: int, seed: int = 0, divide: Callable[..., Any] = jnp.divide) -> Figure:
    """The worst relative error of a quotient, over random significands and exponents a softmax meets."""
    rng = np.random.default_rng(seed)
    program = jax.jit(divide)
    worst, at, seen = 0.0, "", 0
    for _ in range(max(1, count // _CHUNK)):
        a, b = (np.ldexp(rng.uniform(1, 2, _CHUNK), rng.integers(-30, 30, _CHUNK)) for _ in range(2))
        a, b = a.astype(np.float32), b.astype(np.float32)
        true = a.astype(np.float64) / b.astype(np.float64)
        relative = np.abs(np.asarray(program(a, b)).astype(np.float64) / true - 1)
        k = int(np.argmax(relative))
        if relative[k] > worst:
            worst, at = float(relative[k]), f"{a[k]!r} / {b[k]!r}"
        seen += _CHUNK
    return Figure("divide", worst, at, 0.0, seen)


def rounding_figure(dtype: str, seed: int = 0) -> Figure:
    """The conversion of float32 weights in [0, 1] to a dot's dtype."""
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.uniform(1, 2, _CHUNK), rng.integers(-140, 0, _CHUNK)).astype(np.float32)
    x = np.where(np.abs(x) < _NORMAL, 0, x)
    # The program ends with the rounded numbers: XLA drops a conversion that the next one undoes.
    got = np.asarray(jax.jit(lambda x: x.astype(dtype))(x)).astype(np.float32)
    tiny = float(jnp.finfo(dtype).tiny)
    error, true = np.abs(got.astype(np.float64) - x), x.astype(np.float64)
    normal = true >= tiny
    relative = np.where(normal, error / np.where(normal, true, 1.0), 0.0)
    k = int(np.argmax(relative))
    below = float(np.max(np.where(normal, 0.0, error)))
    return Figure(f"round to {dtype}", float(relative[k]), f"x = {float(x[k])!r}", below, _CHUNK)


def _probes(terms: int, dtype: str, rng) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Pairs of vectors `[terms]` whose dot product shows how an accumulator rounds."""
    ones = np.ones(terms)
    almost = 1 - float(jnp.finfo(dtype).eps)  # largest factor below 1
    for exponent in (-23, -24, -25):
        for factor in (1.0, almost, 1.0 + float(jnp.finfo(dtype).eps)):
            # The small term is split over both vectors so that float16 can hold it.
            half = exponent // 2
            a, b = ones * 2.0**half, ones * 2.0 ** (exponent - half) * factor
            for place in (0, terms // 2, terms - 1):
                big_a, big_b = a.copy(), b.copy()
                big_a[place] = big_b[place] = 1.0
                yield f"1 at {place} among {factor:.6g} * 2**{exponent}", big_a, big_b
                yield (
                    f"1 at {place} among -{factor:.6g} * 2**{exponent}",
                    big_a,
                    np.where(big_b == 1, 1, -big_b),
                )
    if dtype == "float16":  # f32 and bf16 may flush what lies below their normal range, f16 may not
        yield "subnormal f16 operands", ones * 2.0**-20, ones
    for kind in range(12):
        a, b = rng.standard_normal(terms), rng.standard_normal(terms)
        if kind % 3 == 1:
            b = np.abs(b) * np.sign(a)  # all terms of one sign
        if kind % 3 == 2 and terms > 1:
            a[terms // 2 :], b[terms // 2 :] = a[: terms - terms // 2], -b[: terms - terms // 2]  # cancels
        yield f"random {kind}", a, b


def dot_figure(
    dtype: str,
    terms: int,
    rows: int,
    contract: tuple[int, int],
    seed: int = 0,
    dot: Callable[..., Any] | None = None,
) -> Figure:
    """The roundoff of one dot as the kernel calls it: error / (terms * sum |a b|), over all probes.

    Each probe fills a row of `a`; the probed vector fills every column of `b`, so vector lanes and edges are all seen.
    """
    rng = np.random.default_rng(seed)
    program = jax.jit(lambda a, b: (dot or xla.dot)(a, b, contract, dtype))
    worst, at, seen = 0.0, "", 0
    for name, x, y in _probes(terms, dtype, rng):
        x, y = (v.astype(jnp.dtype(dtype)) for v in (x, y))
        a, b = np.tile(x, (1, rows, 1)), np.tile(y, (1, 128, 1))
        true = float(np.dot(x.astype(np.float64), y.astype(np.float64)))
        size = float(np.dot(np.abs(x.astype(np.float64)), np.abs(y.astype(np.float64))))
        if contract == (2, 1):
            b = np.ascontiguousarray(b.transpose(0, 2, 1))
        error = float(np.max(np.abs(np.asarray(program(a, b)).astype(np.float64) - true)))
        seen += rows * 128
        if error / (terms * size) > worst:
            worst, at = error / (terms * size), name
    return Figure(f"dot {dtype} {terms} terms, {rows} rows", worst, at, 0.0, seen)


def dots() -> Iterator[tuple[str, int, int, tuple[int, int]]]:
    """The dots a sweep measures: every operand dtype, tile heights of decode and prefill, both contractions."""
    for dtype in OPERANDS:
        for terms in (1, 2, 3, 16, 64, 128, 256, 1000):
            for rows in (1, 4, 256):
                yield dtype, terms, rows, (2, 2) if terms <= 256 else (2, 1)


def sweep(count: int) -> Iterator[Figure]:
    """Every figure of the current device; `count` numbers a function."""
    for function in FUNCTIONS:
        yield function_figure(function, count)
    yield divide_figure(count)
    for dtype in ("bfloat16", "float16"):
        yield rounding_figure(dtype)
    for probe in dots():
        yield dot_figure(*probe)


def broken(figure: Figure, arithmetic: numerics.Arithmetic) -> str | None:
    """Why a figure breaks the device's row in `rpa.numerics`, or None."""
    kind = figure.name.split()[0]
    limits = {"exp": arithmetic.eps_exp, "exp2": arithmetic.eps_exp2, "tanh": arithmetic.eps_tanh,
              "log": arithmetic.eps_log, "divide": arithmetic.eps_div, "dot": arithmetic.u}  # fmt: skip
    if kind == "round":
        dtype = figure.name.split()[-1]
        limit, below = numerics.ROUNDOFF[dtype], numerics.UNDERFLOW[dtype]
    else:
        limit, below = limits[kind], _NORMAL
    if figure.error > limit:
        return f"{figure.name}: {figure.error / 2**-24:.3f} * 2**-24 at {figure.at}, claimed {limit / 2**-24:.3f}"
    if figure.underflow > below:
        return f"{figure.name}: loses {figure.underflow:g} below the normal range, claimed {below:g}"
    return None


def tell(figures: Iterable[Figure], arithmetic: numerics.Arithmetic, where: str) -> int:
    """Print figures as they come, then how many break a claim; the exit code of a sweep."""
    count = 0
    for figure in figures:
        why = broken(figure, arithmetic)
        count += why is not None
        unit = figure.error / 2**-24
        print(f"{figure.name:32} {unit:9.3f} * 2**-24  {figure.at}{'   BROKEN' if why else ''}", flush=True)
        if why:
            print(f"  {why}")
    print(f"{where}: {count} figures outside the claim")
    return 1 if count else 0


def main(arguments: list[str] | None = None) -> int:
    """Print a table (or JSON) of all figures; exit 1 when one breaks what this device claims."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=1 << 24, help="numbers a function; 2**32 is every float32")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    here = device.current()
    arithmetic = numerics.measured(here)
    if not options.json:
        return tell(sweep(options.count), arithmetic, f"{here.platform} ({here.kind})")
    rows = list(sweep(options.count))
    failures = [why for figure in rows if (why := broken(figure, arithmetic))]
    print(json.dumps({"device": asdict(here), "figures": list(map(asdict, rows)), "broken": failures}, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
