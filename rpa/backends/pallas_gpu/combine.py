"""Joins the splits of decode rows: one fused XLA loop, since each output element reads a handful of numbers."""

from __future__ import annotations

import jax.numpy as jnp

from rpa.backends.pallas_gpu import decode, plan
from rpa.backends.pallas_gpu.tiles import FLOOR, LOG2E, Shape


def combine(partials, rows, units: plan.Units, sinks, shape: Shape, tiling: decode.Tiling):
    """(output f32 [R, Hq, D], lse f32 [R, Hq]) of the decode rows, those of nobody and of invalid sequences included.

    Args:
        partials: acc [items, D, N], m and l [items, N]; items of no keys hold garbage.
    """
    n, h, d = tiling.columns(shape), shape.kv_heads, shape.head_dim
    acc, m, l = partials
    acc = acc.reshape(tiling.units, h, d, n).swapaxes(2, 3)
    m, l = m.reshape(-1, h, n), l.reshape(-1, h, n)
    parts = range(tiling.splits)
    live = [units.splits[:, None, None] > c for c in parts]
    if units.first is None:
        acc, m, l = ([x[c * tiling.rows : (c + 1) * tiling.rows] for c in parts] for x in (acc, m, l))
    else:
        where = [jnp.minimum(units.first + c, tiling.units - 1) for c in parts]
        acc, m, l = ([x[w] for w in where] for x in (acc, m, l))
    top = jnp.full((tiling.rows, h, n), FLOOR, jnp.float32)
    if sinks is not None:
        padded = jnp.pad(sinks.reshape(h, shape.group), ((0, 0), (0, n - shape.group))) * LOG2E
        top = jnp.maximum(top, padded)
    for c in parts:
        top = jnp.maximum(top, jnp.where(live[c], m[c], FLOOR))
    total = jnp.zeros_like(top) if sinks is None else jnp.exp2(padded - top)
    out = jnp.zeros((tiling.rows, h, n, d), jnp.float32)
    for c in parts:
        weight = jnp.where(live[c], jnp.exp2(m[c] - top), 0.0)
        total += jnp.where(live[c], weight * l[c], 0.0)
        out += jnp.where(live[c][..., None], weight[..., None] * acc[c], 0.0)
    owner = rows[3][:, None, None]
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out = jnp.where((seen & (owner == 1))[..., None], out / total[..., None], 0.0)
    out = jnp.where((owner == 2)[..., None], jnp.nan, out)
    lse = jnp.where(seen & (owner == 1), (top + jnp.log2(total)) / LOG2E, -jnp.inf)
    lse = jnp.where(owner == 2, jnp.nan, lse)
    heads = (tiling.rows, shape.q_heads)
    return out[:, :, : shape.group].reshape(*heads, d), lse[..., : shape.group].reshape(heads)
