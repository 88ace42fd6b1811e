"""What the model kernel reads: queries, sinks, and blocks of keys and values through tables, scales and a buffer."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from fuzz.mutants.call import F32, Call


def load_queries(call: Call, rows: np.ndarray) -> np.ndarray:
    """[Hkv, rows * group, D], scaled and rounded to the operand dtype."""
    heads, group = call.kv_heads, call.group
    q = call.queries[rows].astype(F32)
    head_dim = q.shape[2]
    if call.has("mod_map"):  # query head h reads kv head h % Hkv
        q = q.reshape(len(rows), group, heads, head_dim).transpose(0, 2, 1, 3)
    q = q.reshape(len(rows), heads, group, head_dim).transpose(1, 0, 2, 3).reshape(heads, -1, head_dim)
    if call.has("head_dim_truncated") and head_dim > 32:
        q = np.where(np.arange(head_dim) < head_dim // 32 * 32, q, 0)
    scale = call.scale
    if call.has("scale_missing"):
        scale = 1.0
    if call.has("scale_twice"):
        scale *= scale
    if call.has("scale_padded_dim"):
        scale = (1 << max(0, head_dim - 1).bit_length()) ** -0.5
    if call.has("log2e_missing"):
        scale *= 0.6931472
    if call.has("scale_after_cap") or call.has("cap_before_scale"):
        scale = 1.0
    q = call.round(q * F32(scale))
    return rounded(q, ml_dtypes.bfloat16) if call.has("q_bf16") else q


def load_block(
    call: Call, s: int, keys: np.ndarray, first: int, context: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """[Hkv, block_k, D] keys and values; slots outside [first, context) hold zeros, whatever memory holds there."""
    page, slot = _address(call, s, keys, context)
    k = call.keys[page, slot].astype(F32).transpose(1, 0, 2)
    v = call.values[page, slot].astype(F32).transpose(1, 0, 2)
    if call.has("head0"):
        k, v = (np.broadcast_to(x[:1], x.shape) for x in (k, v))
    k, v = _dequantise(call, k, v)
    inside = ((keys >= first) & (keys < context))[None, :, None]
    if not (call.has("k_additive_mask") or call.has("klen_missing")):
        k = np.where(inside, k, 0)
    if not (call.has("v_not_sanitised") or call.has("klen_missing")):
        v = np.where(inside | _dereferenced(call, s, keys), v, 0)
    return _through_buffer(call, call.round(k), call.round(v), step)


def _dereferenced(call: Call, s: int, keys: np.ndarray) -> np.ndarray:
    """The keys past the context that bug `minus_one` reads through a padding entry of the table."""
    column = np.minimum(keys // call.page, call.tables.shape[1] - 1)
    return ((call.tables[s, column] < 0) & call.has("minus_one"))[None, :, None]


def _address(call: Call, s: int, keys: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Physical page and slot of logical keys; those past the context are read from page 0."""
    column, slot = keys // call.page, keys % call.page
    width = call.tables.shape[1]
    if call.has("slice_clamp") and width >= 4:  # four entries at a time; the last slice starts earlier to fit
        chunk = column // 4 * 4
        column = np.minimum(chunk, width - 4) + column - chunk
    if call.has("col_off"):
        column = column + 1
    row = min(s + 1, call.num_seqs - 1) if call.has("row_next") else s
    if call.has("row0"):
        row = 0
    if call.has("table_width_as_seqs"):
        flat = call.tables.reshape(-1)
        page = flat[np.minimum(row * max(1, len(call.tables)) + column, flat.size - 1)]
    else:
        page = call.tables[row, np.minimum(column, width - 1)]
    if call.has("identity"):
        page = s * width + column
    if call.has("slot_roll"):
        slot = (slot + 1) % call.page
    if call.has("page_pow2"):
        slot = keys & ((1 << (call.page - 1).bit_length()) - 1)
        slot = np.minimum(slot, call.page - 1)
    if call.has("int32_offset"):  # the wrap of a 32-bit element offset, at a size that fits a test
        page = page % max(1, (1 << 10) // call.page)
    if not (call.has("klen_missing") or call.has("minus_one")):
        page = np.where(keys < context, page, 0)
    return np.clip(page, -1 if call.has("minus_one") else 0, len(call.keys) - 1), slot


def _dequantise(call: Call, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    k_scale, v_scale = call.k_scale, call.v_scale
    if call.has("kv_scale_swapped"):
        k_scale, v_scale = v_scale, k_scale
    if k_scale is not None and not call.has("k_scale_ignored"):
        k = k * (k_scale[:1] if call.has("kv_scale_head0") else k_scale)[:, None, None]
    if v_scale is not None and not call.has("v_scale_ignored"):
        v = v * (v_scale[:1] if call.has("kv_scale_head0") else v_scale)[:, None, None]
    return k, v


def _through_buffer(call: Call, k: np.ndarray, v: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The double buffer: without a bug what is read is what was just loaded."""
    old_k, old_v = call.buffer.get("k", np.zeros_like(k)), call.buffer.get("v", np.zeros_like(v))
    old_k = old_k if old_k.shape == k.shape else np.zeros_like(k)
    old_v = old_v if old_v.shape == v.shape else np.zeros_like(v)
    call.buffer["k"], call.buffer["v"] = k, v
    half = k.shape[1] // 2
    if call.has("stale_k") and step:
        return old_k, v
    if call.has("stale_v") and step:
        return k, old_v
    if call.has("wait_removed") and step:  # the copy has not arrived in full
        return np.concatenate([k[:, :half], old_k[:, half:]], 1), np.concatenate([v[:, :half], old_v[:, half:]], 1)
    if call.has("wrong_slot") and step % 2:
        return old_k, old_v
    if call.has("sem_shared") and step:  # the wait for V was satisfied by the copy of K
        return k, np.concatenate([v[:, :half], old_v[:, half:]], 1)
    if call.has("empty_seq_prefetch") and call.buffer.pop("skip", None) is not None:
        return old_k, old_v
    return k, v


def sink_rows(call: Call, rows: int) -> np.ndarray | None:
    """[Hkv, rows * group, 1]: each row's own sink logit."""
    if call.sinks is None or call.has("sink_ignored"):
        return None
    if call.has("sink_dropped_if_window") and call.window is not None:
        return None
    sinks = call.sinks
    if call.has("sink_scaled"):
        sinks = sinks * F32(call.scale)
    if call.has("sink_capped") and call.cap is not None:
        sinks = F32(call.cap) * np.tanh(sinks / F32(call.cap))
    if call.has("sink_head0"):
        sinks = np.full_like(sinks, sinks[0])
    if call.has("sink_kvhead"):
        sinks = np.repeat(sinks[: call.kv_heads], call.group)
    if call.has("mod_map"):
        sinks = sinks.reshape(call.group, call.kv_heads).T
    per_group = sinks.reshape(call.kv_heads, 1, call.group)
    return np.broadcast_to(per_group, (call.kv_heads, rows // call.group, call.group)).reshape(call.kv_heads, rows, 1)


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """To a dtype and back."""
    return x.astype(dtype).astype(F32)
