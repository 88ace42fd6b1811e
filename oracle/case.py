"""A case: one call of ragged paged attention as a value, and the one definition of what a row sees.

A `Case` is what the oracle judges, the search shrinks, the benchmark times and the report shows. It may carry
metadata that the contract calls invalid (that has an answer too: NaN); it may not carry options or ranks that
have none.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

QUERY_DTYPES = ("float32", "bfloat16", "float16")
QUANTISED_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")
PAGE_DTYPES = QUERY_DTYPES + QUANTISED_DTYPES
_QUANTISED = tuple(np.dtype(getattr(ml_dtypes, name, name)) for name in QUANTISED_DTYPES)
_FORMAT = 1


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of a name, the narrow floats of ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def dtype_name(dtype: Any) -> str:
    """The name of a dtype given as a string, a NumPy dtype or type, or anything that carries `.dtype`."""
    if isinstance(dtype, str):
        return _named(dtype_of(dtype))
    if isinstance(dtype, (type, np.dtype)):
        return _named(np.dtype(dtype))
    return _named(np.dtype(dtype.dtype))


def visible(position, context_len, window: int | None) -> tuple[Any, Any]:
    """The keys a row at `position` sees, as half-open `[lo, hi)`; empty when `hi <= lo`. Scalars or arrays.

    >>> visible(5, 6, None), visible(5, 6, 2), visible(-1, 3, None)
    ((0, 6), (4, 6), (0, 0))
    """
    if isinstance(position, int):
        hi = min(max(position + 1, 0), max(context_len, 0))
        return 0 if window is None else max(position - (window - 1), 0), hi
    hi = np.minimum(np.maximum(position + 1, 0), np.maximum(context_len, 0))
    lo = np.zeros_like(hi) if window is None else np.maximum(position - (window - 1), 0)
    return lo, hi


class Sequence(NamedTuple):
    """A live, valid sequence that owns at least one query row."""

    index: int
    start: int  # first query row
    stop: int  # one past the last
    context_len: int
    positions: np.ndarray  # [stop - start], may be negative
    pages: np.ndarray  # [pages_per_seq] the table row; entries outside `keys` are dead
    keys: tuple[int, int]  # [lo, hi) union of what its rows see

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        return max(0, self.keys[1] - self.keys[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One call. Shapes and meanings are the contract's; arrays are kept as read-only NumPy views.

    `compute_dtype=None` means the inputs' own dtype. Nothing here imports JAX; its arrays are accepted.
    """

    queries: np.ndarray  # [T, Hq, D]
    kv_pages: np.ndarray  # [P, page, 2 * Hkv, D]
    context_lens: np.ndarray  # i32[S]
    block_tables: np.ndarray  # i32[S, pages_per_seq]
    query_start_loc: np.ndarray  # i32[S + 1]
    num_seqs: int
    softmax_aux: np.ndarray | None = None  # f32[Hq]
    _: dataclasses.KW_ONLY
    softmax_scale: float | None = None
    logits_soft_cap: float | None = None
    sliding_window: int | None = None
    compute_dtype: str | None = None
    k_scale: float | np.ndarray | None = None  # scalar or f32[Hkv]
    v_scale: float | np.ndarray | None = None

    def __post_init__(self):
        put = functools.partial(object.__setattr__, self)
        put("queries", _floats("queries", self.queries, 3, QUERY_DTYPES))
        put("kv_pages", _floats("kv_pages", self.kv_pages, 4, PAGE_DTYPES))
        put("context_lens", _integers("context_lens", self.context_lens, 1))
        put("block_tables", _integers("block_tables", self.block_tables, 2))
        put("query_start_loc", _integers("query_start_loc", self.query_start_loc, 1))
        if type(self.num_seqs) is not int:
            put("num_seqs", int(np.asarray(self.num_seqs).reshape(())))
        if self.softmax_aux is not None:
            put("softmax_aux", _frozen(np.asarray(self.softmax_aux).astype(np.float32)))
        for name in ("k_scale", "v_scale"):
            if getattr(self, name) is not None:
                put(name, _scale(name, getattr(self, name), self.num_kv_heads))
        for name in ("softmax_scale", "logits_soft_cap"):
            if getattr(self, name) is not None:
                put(name, float(getattr(self, name)))
        if self.sliding_window is not None:
            put("sliding_window", int(self.sliding_window))
        if self.compute_dtype is not None:
            put("compute_dtype", dtype_name(self.compute_dtype))
        _check(self)

    @property
    def num_tokens(self) -> int:
        return self.queries.shape[0]

    @property
    def num_q_heads(self) -> int:
        return self.queries.shape[1]

    @property
    def head_dim(self) -> int:
        return self.queries.shape[2]

    @property
    def num_pages(self) -> int:
        return self.kv_pages.shape[0]

    @property
    def page_size(self) -> int:
        return self.kv_pages.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_pages.shape[2] // 2

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def max_seqs(self) -> int:
        return self.context_lens.shape[0]

    @property
    def pages_per_seq(self) -> int:
        return self.block_tables.shape[1]

    @property
    def capacity(self) -> int:
        return self.pages_per_seq * self.page_size

    @property
    def scale(self) -> float:
        """The softmax scale that applies: the given one, or `D ** -0.5`."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def live_seqs(self) -> int:
        return min(max(self.num_seqs, 0), self.max_seqs)

    @property
    def live_rows(self) -> int:
        """`query_start_loc[num_seqs]`, within `[0, T]`: rows at and past it belong to nobody."""
        return int(np.clip(self.query_start_loc[self.live_seqs], 0, self.num_tokens))

    @property
    def quantised(self) -> bool:
        return self.kv_pages.dtype in _QUANTISED

    @property
    def hash(self) -> str:
        """A digest of everything the case holds, dead slots included: 16 hex digits."""
        digest = hashlib.sha256()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            digest.update(field.name.encode())
            if isinstance(value, np.ndarray):
                digest.update(f"{value.dtype.name}{value.shape}".encode())
                digest.update(np.ascontiguousarray(value).tobytes())
            else:
                digest.update(repr(value).encode())
        return digest.hexdigest()[:16]

    @property
    def arrays(self) -> tuple:
        """The seven array arguments, in the order of the call."""
        return (
            self.queries,
            self.kv_pages,
            self.context_lens,
            self.block_tables,
            self.query_start_loc,
            np.array([self.num_seqs], np.int32),
            self.softmax_aux,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the call; the quantisation scales only where the case has them."""
        options = {
            "softmax_scale": self.softmax_scale,
            "logits_soft_cap": self.logits_soft_cap,
            "sliding_window": self.sliding_window,
            "compute_dtype": self.compute_dtype or self.queries.dtype.name,
        }
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return options | {name: value for name, value in scales.items() if value is not None}

    def replace(self, **changes) -> "Case":
        """This case with some fields changed."""
        return dataclasses.replace(self, **changes)

    def sequences(self) -> list[Sequence]:
        """The live, valid sequences that own rows, in order."""
        return self._layout[0]

    def invalid_rows(self) -> list[tuple[int, int, str]]:
        """`(start, stop, reason)` of the rows whose sequence has invalid metadata: their answer is NaN."""
        return self._layout[1]

    def invalid(self, index: int) -> str | None:
        """Why the metadata of live sequence `index` is invalid, or None."""
        context = int(self.context_lens[index])
        *earlier, stop = self.query_start_loc[: index + 2].tolist()
        start, before = earlier[-1], max(0, *earlier)
        if not 0 <= context <= self.capacity:
            return f"context_lens[{index}] = {context} is outside [0, {self.capacity}]"
        if stop < start or start < before or stop > self.num_tokens:
            return f"query_start_loc goes from {start} to {stop} after {before}, with {self.num_tokens} tokens"
        if stop == start:
            return None
        lo, hi = self._keys(context, stop - start)
        pages = self.block_tables[index, lo // self.page_size : -(-hi // self.page_size)]
        if hi > lo and not 0 <= pages.min() <= pages.max() < self.num_pages:
            bad = np.flatnonzero((pages < 0) | (pages >= self.num_pages))
            column = lo // self.page_size + int(bad[0])
            return f"block_tables[{index}, {column}] = {pages[bad[0]]} is outside [0, {self.num_pages})"
        return None

    @functools.cached_property
    def _layout(self) -> tuple[list[Sequence], list[tuple[int, int, str]]]:
        """Each live sequence with the rows that no earlier one owns: valid ones, and invalid ones."""
        valid, invalid, taken = [], [], 0
        offsets = self.query_start_loc.tolist()
        for index in range(self.live_seqs):
            start, stop = max(offsets[index], taken), min(offsets[index + 1], self.num_tokens)
            taken = max(taken, offsets[index], offsets[index + 1])
            if stop <= start:
                continue
            reason = self.invalid(index)
            if reason is None:
                valid.append(self._sequence(index, start, stop))
            else:
                invalid.append((start, stop, f"sequence {index}: {reason}"))
        return valid, invalid

    def _keys(self, context: int, rows: int) -> tuple[int, int]:
        first = max(context - rows, 0)  # rows before position 0 see nothing
        return visible(first, context, self.sliding_window)[0], context

    def _sequence(self, index: int, start: int, stop: int) -> Sequence:
        context = int(self.context_lens[index])
        positions = np.arange(context - (stop - start), context)
        keys = self._keys(context, stop - start)
        return Sequence(index, start, stop, context, positions, self.block_tables[index], keys)

    def save(self, path) -> None:
        """Writes the case to an `.npz` file that needs no pickle; narrow floats travel as their bits."""
        arrays, plain = {}, {"format": _FORMAT, "dtypes": {}}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                plain["dtypes"][field.name] = value.dtype.name
                arrays[field.name] = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
            else:
                plain[field.name] = value
        buffer = io.BytesIO()
        np.savez_compressed(buffer, case=np.array(json.dumps(plain)), **arrays)
        Path(path).write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path) -> "Case":
        """Reads what `save` wrote. Raises ValueError on a file that is not a case."""
        with np.load(path, allow_pickle=False) as data:
            if "case" not in data:
                raise ValueError(f"{path} is not a saved case: it has no entry 'case'")
            plain = json.loads(str(data["case"]))
            if plain.pop("format") != _FORMAT:
                raise ValueError(f"{path} was saved in another format than {_FORMAT}")
            arrays = {name: data[name].view(dtype_of(dtype)) for name, dtype in plain.pop("dtypes").items()}
        return cls(**plain, **arrays)

    def literal(self) -> str:
        """Python source that builds this case; it needs `np`, `ml_dtypes` and `Case`."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            text = array_literal(value) if isinstance(value, np.ndarray) else repr(value)
            lines.append(f"    {field.name}={text},\n")
        return "Case(\n" + "".join(lines) + ")"


def array_literal(array: np.ndarray) -> str:
    """Python source of an array: `np.full` for a constant one, else the shortest digits that give its bits."""
    name = array.dtype.name
    dtype = f"ml_dtypes.{name}" if hasattr(ml_dtypes, name) else f"np.{name}"
    flat = array.reshape(-1)
    if flat.size > 1 and len(np.unique(np.ascontiguousarray(flat).view(f"u{array.dtype.itemsize}"))) == 1:
        return f"np.full({array.shape}, {_number(flat[0])}, {dtype})"
    text = f"np.array({nested_literal(array)}, {dtype})"
    return text if array.size else f"np.zeros({array.shape}, {dtype})"


def nested_literal(array: np.ndarray) -> str:
    """Python source of an array's numbers, without its dtype."""
    if array.ndim == 0:
        return _number(array[()])
    return "[" + ", ".join(map(nested_literal, array)) + "]"


def _number(value) -> str:
    if not math.isfinite(float(value)):
        return {"nan": "np.nan", "inf": "np.inf", "-inf": "-np.inf"}[str(float(value))]
    text = str(value)
    return text[:-2] if text.endswith(".0") and text != "-0.0" else text


_named = functools.lru_cache(maxsize=64)(lambda dtype: dtype.name)  # NumPy makes the name anew each time


def _frozen(array: np.ndarray) -> np.ndarray:
    array = array.view()  # a view, so that the caller's own array stays writable
    array.setflags(write=False)
    return array


def _floats(name: str, value, rank: int, dtypes: tuple[str, ...]) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype == np.float64:  # Python lists; the contract has no float64
        array = array.astype(np.float32)
    if _named(array.dtype) not in dtypes:
        raise TypeError(f"{name} has dtype {array.dtype.name}; it must be one of {', '.join(dtypes)}")
    if array.ndim != rank:
        raise ValueError(f"{name} has shape {array.shape}; it must have {rank} axes")
    return _frozen(array)


def _integers(name: str, value, rank: int) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} has dtype {array.dtype.name}; it must be an integer dtype")
    if array.ndim != rank:
        raise ValueError(f"{name} has shape {array.shape}; it must have {rank} axes")
    if array.dtype != np.int32 and array.size and not (array.min() >= -(2**31) and array.max() < 2**31):
        raise ValueError(f"{name} holds {array.min()}..{array.max()}, which int32 cannot")
    return _frozen(array.astype(np.int32))


def _scale(name: str, value, num_kv_heads: int) -> float | np.ndarray:
    array = np.asarray(value).astype(np.float32)  # kernels hold it in f32, so the case does
    if array.shape not in ((), (1,), (num_kv_heads,)) or not np.isfinite(array).all():
        raise ValueError(f"{name} = {value}; it must be finite, a scalar or of shape [{num_kv_heads}]")
    return _frozen(array) if array.shape == (num_kv_heads,) and array.ndim else float(array.reshape(()))


def _check(case: Case) -> None:
    """The rules without which a case has no answer."""
    (_, heads, head_dim), (_, page, combined, kv_dim) = case.queries.shape, case.kv_pages.shape
    sequences = case.context_lens.shape[0]
    if combined % 2 or combined == 0:
        raise ValueError(f"kv_pages has {combined} combined heads; it must have a key and a value for each")
    if heads % (combined // 2):
        raise ValueError(f"{heads} query heads are no multiple of {combined // 2} kv heads")
    if kv_dim != head_dim or head_dim < 1 or page < 1:
        raise ValueError(f"kv_pages has shape {case.kv_pages.shape} for queries of shape {case.queries.shape}")
    if case.block_tables.shape[0] != sequences or case.query_start_loc.shape[0] != sequences + 1:
        raise ValueError(
            f"context_lens, block_tables and query_start_loc have {sequences}, {case.block_tables.shape[0]} and "
            f"{case.query_start_loc.shape[0]} rows; they must have S, S and S + 1"
        )
    if case.softmax_aux is not None and case.softmax_aux.shape != (heads,):
        raise ValueError(f"softmax_aux has shape {case.softmax_aux.shape}; it must be [{heads}]")
    if case.softmax_aux is not None and not (case.softmax_aux < np.inf).all():
        raise ValueError(f"softmax_aux = {case.softmax_aux}; a sink must be finite, or -inf for none")
    if not math.isfinite(case.scale):
        raise ValueError(f"softmax_scale = {case.softmax_scale} must be finite")
    if case.logits_soft_cap is not None and not 0 < case.logits_soft_cap < math.inf:
        raise ValueError(f"logits_soft_cap = {case.logits_soft_cap} must be finite and > 0")
    if case.sliding_window is not None and case.sliding_window < 1:
        raise ValueError(f"sliding_window = {case.sliding_window} must be >= 1")
