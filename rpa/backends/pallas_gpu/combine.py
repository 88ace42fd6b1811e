"""Joins the splits of decode rows: one fused XLA loop, since each output element reads a handful of numbers."""

from __future__ import annotations

import jax.numpy as jnp

from rpa.backends.pallas_gpu import decode, plan
from rpa.backends.pallas_gpu.tiles import FLOOR, LOG2E, Shape


def combine(partials, rows, sinks, shape: Shape, tiling: decode.Tiling):
    """(output f32 [R, Hq, D], lse f32 [R, Hq]) of the decode rows; 0 and -inf, or the sink, where nothing is seen.

    Args:
        partials: acc [items, D, N], m and l [items, N]; items of no keys hold garbage.
    """
    n, h, d = tiling.columns(shape), shape.kv_heads, shape.head_dim
    acc, m, l = partials
    acc = acc.reshape(tiling.splits, tiling.rows, h, d, n)
    m, l = (x.reshape(tiling.splits, tiling.rows, h, n) for x in (m, l))
    live = plan.live_splits(rows, shape, tiling)[:, :, None, None]
    parts = range(tiling.splits)
    top = jnp.full((tiling.rows, h, n), FLOOR, jnp.float32)
    if sinks is not None:
        padded = jnp.pad(sinks.reshape(h, shape.group), ((0, 0), (0, n - shape.group))) * LOG2E
        top = jnp.maximum(top, padded)
    for c in parts:
        top = jnp.maximum(top, jnp.where(live[c], m[c], FLOOR))
    total = jnp.zeros_like(top) if sinks is None else jnp.exp2(padded - top)
    out = jnp.zeros((tiling.rows, h, d, n), jnp.float32)
    for c in parts:
        weight = jnp.where(live[c], jnp.exp2(m[c] - top), 0.0)
        total += jnp.where(live[c], weight * l[c], 0.0)
        out += jnp.where(live[c][..., None], weight[:, :, None] * acc[c], 0.0)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out = jnp.where(seen[:, :, None], out / total[:, :, None], 0.0)
    lse = jnp.where(seen, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
    heads = (tiling.rows, shape.q_heads)
    return out[..., : shape.group].swapaxes(2, 3).reshape(*heads, d), lse[..., : shape.group].reshape(heads)
