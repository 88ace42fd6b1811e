"""Random cases and styles for the tests of the oracle: every option, seven kinds of data, from one seed each."""

import ml_dtypes
import numpy as np
from model_kernel import Style

from oracle import Case

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int8": np.int8,
}
DATA = ("normal", "spike", "ladder", "equal_keys", "offset_values", "peaky", "zero_query")


def draw_case(seed: int, dtype: str, *, longest: int = 200, rows: int = 40, data: str | None = None, **options) -> Case:
    """A case whose queries have the dtype; `options` override what is drawn."""
    rng = np.random.default_rng(seed)
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    Hkv, group, D, page = pick(1, 2, 3), pick(1, 2, 4), pick(1, 3, 16, 64, 128), pick(1, 4, 16)
    S = int(rng.integers(1, 5))
    lengths = np.array([pick(0, 1, 1, 2, int(rng.integers(1, rows))) for _ in range(S)])
    contexts = np.array(
        [int(pick(n, n + rng.integers(0, longest), n + rng.integers(0, longest), max(0, n - 1))) for n in lengths]
    )
    pages_per_seq = int(max(1, -(-contexts.max() // page) + rng.integers(0, 3)))
    used = -(-contexts // page)
    P = int(used.sum()) + 2
    order, tables, first = rng.permutation(P), np.full((S, pages_per_seq), -1), 0
    for s in range(S):
        tables[s, : used[s]] = order[first : first + used[s]]
        first += used[s]
    dead = int(rng.integers(0, 2))  # metadata rows past num_seqs
    kv_dtype = str(options.pop("kv_dtype", pick(dtype, dtype, "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")))
    queries, pages = _data(
        rng, data or str(pick(*DATA)), (int(lengths.sum()) + 1, Hkv * group, D), (P, page, 2 * Hkv, D)
    )
    scales: dict = {"k_scale": None, "v_scale": None}
    if kv_dtype in ("int8", "float8_e4m3fn", "float8_e5m2"):
        pages = np.clip(pages * 8, -120, 120)
        scales = {"k_scale": 0.11, "v_scale": rng.uniform(0.05, 0.2, Hkv).astype(np.float32)}
    choices = dict(
        softmax_aux=pick(None, rng.normal(0, 2, Hkv * group).astype(np.float32)),
        sliding_window=pick(None, None, 1, 3, 17, 64),
        logits_soft_cap=pick(None, None, 30.0, 5.0, 1.1),
        softmax_scale=pick(None, None, 0.37),
        compute_dtype=pick(None, "float32", "bfloat16"),
    )
    return Case(
        queries.astype(DTYPES[dtype]),
        pages.astype(DTYPES[kv_dtype]),
        np.pad(contexts, (0, dead)),
        np.pad(tables, ((0, dead), (0, 0))),
        np.pad(np.cumsum(lengths), (1, dead)),
        S,
        **(choices | scales | options),
    )


def draw_style(seed: int, case: Case) -> Style:
    """One correct way to build the kernel for the case."""
    rng = np.random.default_rng(seed + 10**6)
    flag = lambda: bool(rng.integers(2))  # noqa: E731
    return Style(
        block=int(rng.choice([1, 4, 16, 64, 512])),
        splits=int(rng.choice([1, 1, 3])),
        reverse=flag(),
        base2=flag(),
        sequential=rng.random() < 0.15,
        scale_query=flag(),
        weights=str(rng.choice(["float32", case.compute_dtype or case.queries.dtype.name])),
        rounded_weights_in_sum=flag(),
        sink_first=flag(),
        scales_on_operands=flag(),
    )


def _data(rng: np.random.Generator, kind: str, q_shape: tuple, kv_shape: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Queries and pages of one of the kinds of `DATA`, in float64."""
    amplitude = float(rng.choice([0.1, 0.5, 1.0, 2.0]))
    q, kv = rng.normal(size=q_shape), rng.normal(size=kv_shape)
    keys, values = kv[:, :, 0::2], kv[:, :, 1::2]
    if kind == "spike":
        kv[rng.random(kv_shape[:2]) < 0.1] *= 8
    elif kind == "ladder":
        keys[...] = np.linspace(-1, 1, kv_shape[3])
        keys *= rng.permutation(kv_shape[0] * kv_shape[1]).reshape(kv_shape[:2])[..., None, None] / 16
    elif kind == "equal_keys":
        keys[...] = keys[0, 0]
    elif kind == "offset_values":
        values += 50
    elif kind == "peaky":
        q *= 4
    elif kind == "zero_query":
        q[...] = 0
    return q * amplitude, kv
