"""Every rule about a call's arguments, checked before anything is compiled, and every message."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rpa.config import PLATFORMS
from rpa.signature import Inputs, Signature

FLOATS = ("float32", "bfloat16", "float16")
QUANTISED = ("float8_e4m3fn", "float8_e5m2", "int8")
INT32_MAX = 2**31 - 1


def is_traced(value: Any) -> bool:
    return isinstance(value, Tracer)


def is_host(value: Any) -> bool:
    """Whether the values can be read without waiting for a device."""
    return value is not None and not isinstance(value, jax.Array)


# ------------------------------------------------------------------ scalars


def number(name: str, value: Any, rule: str) -> float:
    """A static real scalar as a float: Python, NumPy or a concrete 0-d array."""
    scalar = _scalar(name, value, rule)
    if isinstance(scalar, (bool, np.bool_)) or not np.issubdtype(np.asarray(scalar).dtype, np.number):
        raise TypeError(f"{name}={value!r}: {rule}")
    if np.iscomplexobj(scalar):
        raise TypeError(f"{name}={value!r}: {rule}")
    return float(scalar)


def _scalar(name: str, value: Any, rule: str) -> Any:
    if is_traced(value):
        raise TypeError(f"{name} is traced: {rule}, known when the call is compiled")
    if isinstance(value, (bool, int, float, np.generic)):
        return value
    if isinstance(value, (np.ndarray, jax.Array)) and value.ndim == 0:
        # bfloat16 and its kind are no np.number; float32 holds all of them.
        host = np.asarray(value)
        return host.astype(np.float32)[()] if host.dtype.kind == "V" else host[()]
    raise TypeError(f"{name}={value!r}: {rule}")


def scale_of(value: Any, head_dim: int) -> float:
    """`softmax_scale`, by default `head_dim ** -0.5`."""
    if value is None:
        return float(head_dim) ** -0.5
    scale = number("softmax_scale", value, "a finite number is expected")
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale={scale}: it must be finite")
    return scale


def cap_of(value: Any) -> float | None:
    if value is None:
        return None
    cap = number("logits_soft_cap", value, "a positive finite number or None is expected")
    if not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"logits_soft_cap={cap}: it must be positive and finite; None leaves the logits uncapped")
    return cap


def window_of(value: Any) -> int | None:
    return _positive_int("sliding_window", value, "None attends to the whole context")


def limit_of(value: Any) -> int | None:
    return _positive_int("vmem_limit_bytes", value, "None leaves the limit to the backend")


def _positive_int(name: str, value: Any, none_means: str) -> int | None:
    if value is None:
        return None
    rule = "a positive int or None is expected"
    scalar = _scalar(name, value, rule)
    if isinstance(scalar, (bool, np.bool_)) or not isinstance(scalar, (int, np.integer)):
        raise TypeError(f"{name}={value!r}: {rule}")
    if scalar <= 0:
        raise ValueError(f"{name}={int(scalar)}: it must be positive; {none_means}")
    return int(scalar)


def check_mask_value(value: Any) -> None:
    if value is None:
        return
    mask = number("mask_value", value, "a finite number, at most -1e30, or None is expected")
    if not math.isfinite(mask) or mask > -1e30:
        raise ValueError(f"mask_value={mask}: it must be finite and at most -1e30 (masked keys weigh 0 whatever it is)")


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r}: True or False is expected")
    return bool(value)


def platform_of(value: Any) -> str:
    if value is None:
        return "auto"
    rule = f"one of {', '.join(PLATFORMS)} or None is expected"
    if not isinstance(value, str):
        raise TypeError(f"platform={value!r}: {rule}")
    text = str(getattr(value, "value", value)).lower()  # a Platform member is a str whose value is the name
    if text not in PLATFORMS:
        raise ValueError(f"platform={value!r}: {rule}")
    return text


def compute_dtype_of(value: Any, queries_dtype: str) -> str:
    """The dtype the dots' operands are rounded to; None means the queries' own."""
    if value is None:
        return queries_dtype
    try:
        name = jnp.dtype(value).name
    except TypeError:
        raise TypeError(f"compute_dtype={value!r}: one of {', '.join(FLOATS)} is expected") from None
    if name not in FLOATS:
        raise TypeError(f"compute_dtype={name}: one of {', '.join(FLOATS)} is expected")
    return name


# ------------------------------------------------------------------ arrays


def _array(name: str, value: Any) -> Any:
    """`value` if it is an array, else a NumPy array of it."""
    if isinstance(value, (jax.Array, np.ndarray)):
        return value
    if value is None:
        raise TypeError(f"{name}=None: an array is expected")
    try:
        array = np.asarray(value)
    except ValueError:
        raise TypeError(f"{name}: a rectangular array is expected") from None
    if array.dtype == object:
        raise TypeError(f"{name}={value!r}: an array of numbers is expected")
    return array


def float_array(name: str, value: Any, ndim: int, axes: str, dtypes: tuple[str, ...]) -> Any:
    array = _array(name, value)
    if array.dtype.name not in dtypes:
        raise TypeError(f"{name} has dtype {array.dtype.name}: one of {', '.join(dtypes)} is expected")
    _check_rank(name, array, ndim, axes)
    return array


def int_array(name: str, value: Any, ndim: int, axes: str) -> Any:
    """Integer metadata as int32; a host value that does not fit is an error."""
    array = _array(name, value)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} has dtype {array.dtype.name}: int32 is expected")
    _check_rank(name, array, ndim, axes)
    if array.dtype == np.int32:
        return array
    if is_host(array) and array.size and not -INT32_MAX - 1 <= int(array.min()) <= int(array.max()) <= INT32_MAX:
        raise ValueError(f"{name} holds {int(array.max())}: its values must fit int32")
    return as_int32(array)


def as_int32(array: Any) -> Any:
    """Integers as int32; a device value that does not fit saturates, so that it stays invalid."""
    if array.dtype == np.int32:
        return array
    if isinstance(array, jax.Array):
        info = jnp.iinfo(array.dtype)
        array = jnp.clip(array, max(info.min, -INT32_MAX - 1), min(info.max, INT32_MAX))
    return array.astype(np.int32)


def _check_rank(name: str, array: Any, ndim: int, axes: str) -> None:
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(array.shape)}: {axes} is expected")


def head_scales(name: str, value: Any, num_kv_heads: int) -> Any:
    """A float or a `[Hkv]` array as float32 `[Hkv]`."""
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_, str)):
        raise TypeError(f"{name}={value!r}: a number or an array [Hkv] is expected")
    array = _array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating) and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} has dtype {array.dtype.name}: a float is expected")
    if array.shape not in ((), (num_kv_heads,)):
        raise ValueError(f"{name} has shape {tuple(array.shape)}: a number or [Hkv] = [{num_kv_heads}] is expected")
    if not is_traced(array):
        bad = ~np.isfinite(np.asarray(array, np.float32)) if is_host(value) else np.False_
        if bad.any():
            raise ValueError(f"{name}={value!r}: it must be finite")
    return _broadcast(array, num_kv_heads)


def _broadcast(array: Any, length: int) -> Any:
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(np.broadcast_to(array.astype(np.float32), (length,)))
    return jnp.broadcast_to(array.astype(jnp.float32), (length,))


def sinks_of(value: Any, num_q_heads: int) -> Any:
    if value is None:
        return None
    array = _array("softmax_aux", value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"softmax_aux has dtype {array.dtype.name}: a float is expected")
    if array.shape != (num_q_heads,):
        raise ValueError(f"softmax_aux has shape {tuple(array.shape)}: [Hq] = [{num_q_heads}] is expected")
    return array if array.dtype == np.float32 else array.astype(np.float32)


def count_of(value: Any, max_seqs: int) -> Any:
    """`num_seqs` as int32 [1]."""
    if isinstance(value, (bool, np.bool_, float, np.floating, str)):
        raise TypeError(f"num_seqs={value!r}: an int, a scalar array or an array [1] is expected")
    if isinstance(value, (int, np.integer)):
        if not 0 <= value <= max_seqs:
            raise ValueError(_count_message(int(value), max_seqs))
        return np.full(1, value, np.int32)
    array = _array("num_seqs", value)
    if array.shape not in ((), (1,)):
        raise ValueError(f"num_seqs has shape {tuple(array.shape)}: an int, a scalar array or an array [1] is expected")
    array = int_array("num_seqs", array.reshape(1), 1, "[1]")
    if is_host(array) and not 0 <= int(array[0]) <= max_seqs:
        raise ValueError(_count_message(int(array[0]), max_seqs))
    return array


def _count_message(count: int, max_seqs: int) -> str:
    return f"num_seqs={count}: it must lie in 0..{max_seqs}, the rows of context_lens"


def check_shapes(queries: Any, kv_pages: Any, context_lens: Any, block_tables: Any, query_start_loc: Any) -> None:
    """The rules that tie the arrays' shapes to each other."""
    _, num_q_heads, head_dim = queries.shape
    num_pages, page_size, combined, kv_dim = kv_pages.shape
    if head_dim < 1 or num_q_heads < 1:
        raise ValueError(f"queries has shape {tuple(queries.shape)}: at least one head and one dimension are expected")
    if page_size < 1 or num_pages < 1:
        raise ValueError(f"kv_pages has shape {tuple(kv_pages.shape)}: at least one page of one slot is expected")
    if combined % 2 or combined < 2:
        raise ValueError(f"kv_pages has {combined} combined heads: 2 * Hkv is expected, key and value interleaved")
    if kv_dim != head_dim:
        raise ValueError(f"kv_pages has head size {kv_dim}: {head_dim} is expected, as in queries")
    if num_q_heads % (combined // 2):
        raise ValueError(f"queries has {num_q_heads} heads: a multiple of the {combined // 2} kv heads is expected")
    max_seqs = context_lens.shape[0]
    if block_tables.shape[0] != max_seqs:
        raise ValueError(f"block_tables has {block_tables.shape[0]} rows: {max_seqs} are expected, as in context_lens")
    if block_tables.shape[1] < 1:
        raise ValueError(
            f"block_tables has shape {tuple(block_tables.shape)}: at least one page a sequence is expected"
        )
    if query_start_loc.shape[0] != max_seqs + 1:
        raise ValueError(
            f"query_start_loc has {query_start_loc.shape[0]} entries: [S + 1] = [{max_seqs + 1}] is expected"
        )


# ------------------------------------------------------------------ the values of the metadata


def check_metadata(inputs: Inputs, signature: Signature, everything: bool) -> None:
    """Check the values of host metadata; with `everything`, of device arrays too.

    Raises:
        ValueError: naming argument, sequence and value.
    """
    arrays = {name: getattr(inputs, name) for name in ("num_seqs", "context_lens", "query_start_loc", "block_tables")}
    if everything:
        traced = [name for name, array in arrays.items() if is_traced(array)]
        if traced:
            raise ValueError(f"validate=True: {traced[0]} is traced, and values are known only outside jit")
    known = {name: np.asarray(array) for name, array in arrays.items() if everything or is_host(array)}
    if "num_seqs" not in known:
        return
    count = int(known["num_seqs"][0])
    if not 0 <= count <= signature.max_seqs:
        raise ValueError(_count_message(count, signature.max_seqs))
    if "context_lens" in known:
        _check_contexts(known["context_lens"][:count], signature)
    if "query_start_loc" in known:
        _check_offsets(known["query_start_loc"][: count + 1], signature)
    if len(known) == 4 and count:
        _check_tables(known, count, signature)


def plainly_right(inputs: Inputs, signature: Signature) -> bool:
    """Whether a quick look already shows the host metadata to be valid; False asks for `check_metadata`."""
    if not isinstance(inputs.num_seqs, np.ndarray):
        return not is_host(inputs.num_seqs)  # what is unknown on the host is the kernel's to check
    live = int(inputs.num_seqs[0])
    if not 0 < live <= signature.max_seqs:
        return False
    rows = zip(inputs[2:5], (live, live, live + 1), strict=True)
    known: list[Any] = [array[:count] if isinstance(array, np.ndarray) else None for array, count in rows]
    context, tables, offsets = known
    if context is not None and offsets is not None and tables is not None and tables.size <= _FEW:
        return _each_right(context.tolist(), offsets.tolist(), tables.tolist(), signature)
    if context is not None and _some(_no_length(context, signature)):
        return False
    if offsets is not None and (offsets[0] < 0 or offsets[-1] > signature.num_tokens):
        return False
    if offsets is not None and _some(offsets[1:] < offsets[:-1]):
        return False
    if tables is None or not _some(wrong := _no_page(tables, signature)):
        return True
    return context is not None and offsets is not None and not _some(wrong & _read(context, offsets, signature))


_FEW = 512  # entries of a table that are looked at in less time than NumPy's calls take


def _each_right(contexts: list[int], offsets: list[int], tables: list[list[int]], signature: Signature) -> bool:
    page, window = signature.page_size, signature.sliding_window or signature.capacity
    for context, start, stop, row in zip(contexts, offsets[:-1], offsets[1:], tables, strict=True):
        if not 0 <= context <= signature.capacity or stop < start:
            return False
        low = max(max(context - (stop - start), 0) - window + 1, 0) // page
        read = row[low : -(-context // page)] if stop > start else []
        if read and not 0 <= min(read) <= max(read) < signature.num_pages:
            return False
    return offsets[0] >= 0 and offsets[-1] <= signature.num_tokens


def _some(mask: np.ndarray) -> bool:
    return bool(np.count_nonzero(mask))  # a fifth of the time of `any`


def _no_length(context: np.ndarray, signature: Signature) -> np.ndarray:
    return (context < 0) | (context > signature.capacity)


def _no_page(tables: np.ndarray, signature: Signature) -> np.ndarray:
    """Which entries of int32 tables are no page id: bool of their shape."""
    return tables.view(np.uint32) >= signature.num_pages  # a negative one is large then


def _read(context: np.ndarray, offsets: np.ndarray, signature: Signature) -> np.ndarray:
    """The table entries that some row reads, of sequences with valid contexts and offsets: bool [n, pages_per_seq]."""
    queries = offsets[1:] - offsets[:-1]
    stop = -(-context // signature.page_size) * (queries > 0)
    column = np.arange(signature.pages_per_seq)
    read = column < stop[:, None]
    if signature.sliding_window is not None:
        first = np.maximum(context - queries, 0)  # rows before position 0 see nothing
        low = np.maximum(first - (min(signature.sliding_window, INT32_MAX) - 1), 0)
        read &= column >= (low // signature.page_size)[:, None]
    return read


def _first(bad: np.ndarray) -> int | None:
    return int(bad.argmax()) if bad.any() else None


def _check_contexts(context: np.ndarray, signature: Signature) -> None:
    s = _first(_no_length(context, signature))
    if s is None:
        return
    rule = f"0..{signature.capacity} (pages_per_seq * page_size = {signature.pages_per_seq} * {signature.page_size})"
    raise ValueError(f"context_lens[{s}]={context[s]}: sequence {s} must hold a length in {rule}")


def _check_offsets(offsets: np.ndarray, signature: Signature) -> None:
    total = signature.num_tokens
    s = _first((offsets < 0) | (offsets > total))
    if s is not None:
        owner = max(s - 1, 0)
        raise ValueError(
            f"query_start_loc[{s}]={offsets[s]}: an offset of sequence {owner} must lie in 0..{total}, the query rows"
        )
    s = _first(offsets[1:] < offsets[:-1])
    if s is not None:
        raise ValueError(
            f"query_start_loc[{s + 1}]={offsets[s + 1]}: the end of sequence {s} lies before its start {offsets[s]}; "
            "offsets must not decrease"
        )


def _check_tables(known: dict[str, np.ndarray], count: int, signature: Signature) -> None:
    tables = known["block_tables"][:count]
    read = _read(known["context_lens"][:count], known["query_start_loc"][: count + 1], signature)
    bad = _no_page(tables, signature) & read
    if bad.any():
        s, column = (int(i[0]) for i in np.nonzero(bad))
        raise ValueError(
            f"block_tables[{s}, {column}]={tables[s, column]}: sequence {s} reads this page, "
            f"and page ids lie in 0..{signature.num_pages - 1}"
        )
