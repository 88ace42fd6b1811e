"""One call over a mesh: heads and sequences split without a sum that would round, pages merged by their LSE.

Heads: every device holds its query heads and the kv heads they read; nothing is exchanged. Sequences: every device
sees all metadata and keeps a contiguous, equally heavy range of sequences, so the static shapes, and with them the
bits, stay those of one device; one sum puts the rows together. Pages: every device attends to the pages it holds,
each row as a sequence of its own over a compacted table, and the parts are weighted by `exp(lse)` (the split-KV
merge of flash decoding, across devices). A window that starts inside a page makes a second such call over slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rpa import device as devices
from rpa import layout, select
from rpa import validate as rules
from rpa.device import Device
from rpa.mesh import Axes, Layout, dims_of, edge_signature, indivisible, layout_of, local_signature
from rpa.program import compiled, nothing_to_do
from rpa.signature import Inputs, Signature


def program(
    inputs: Inputs, signature: Signature, platform: str, cfg: Any, mesh: Any, in_specs: Any, out_specs: Any,
    check_vma: bool,
) -> Any:  # fmt: skip
    """What computes a validated call over the mesh, `Inputs -> (output, lse)`.

    Raises:
        TypeError, ValueError: the mesh, the specs and the shapes do not fit; the text names the axis.
    """
    local, device, plan = share_of(inputs, signature, mesh, in_specs)
    wanted = _out_specs(out_specs, signature, mesh)
    if signature.num_tokens == 0 or signature.max_seqs == 0:
        return lambda inputs: nothing_to_do(signature)
    calls = [select.Attention(local, device, platform, cfg, sharding=plan.label)]
    edge = edge_signature(signature, plan)
    if edge is not None:  # block sizes in pages mean nothing to pages of one slot
        calls.append(select.Attention(edge, device, calls[0].platform_for(cfg), sharding=plan.label))
    choices = zip(calls, map(select.choose, calls), strict=True)
    kernels = tuple(compiled(found.implementation, call.signature, found.config, device) for call, found in choices)
    sharded = _program(signature, plan, kernels, wanted, check_vma)
    return lambda inputs: sharded(_placed(inputs, signature, plan))


def _out_specs(out_specs: Any, signature: Signature, mesh: Any) -> tuple[Any, ...]:
    """The caller's wish for output and LSE, each a PartitionSpec or None."""
    if isinstance(out_specs, PartitionSpec):
        out_specs = out_specs, PartitionSpec(*out_specs[:2])
    elif not isinstance(out_specs, (tuple, list)):
        out_specs = out_specs, out_specs
    if len(out_specs) != 2:
        raise ValueError(f"out_specs={out_specs!r}: a PartitionSpec, a pair of them or None is expected")
    shape = (signature.num_tokens, signature.num_q_heads, signature.head_dim)
    for name, spec, rank in zip(("output", "lse"), out_specs, (3, 2), strict=True):
        for axes, size in zip(dims_of(f"out_specs: {name}", spec, rank, mesh), shape, strict=False):
            if size % (parts := math.prod(mesh.shape[axis] for axis in axes)):
                raise ValueError(indivisible(axes, parts, f"the {name}'s dimension of {size}"))
    return tuple(out_specs) if signature.return_lse else (out_specs[0], None)


def share_of(inputs: Inputs, signature: Signature, mesh: Any, in_specs: Any) -> tuple[Signature, Device, Layout]:
    """The static part of one device's share, the device it is for, and what is split how.

    Raises:
        TypeError, ValueError: the mesh, the specs and the shapes do not fit; the text names the axis.
    """
    plan = layout_of(mesh, in_specs)
    here = devices.describe(mesh.devices.flat[0]) if isinstance(mesh, Mesh) else devices.current(inputs.queries)
    return local_signature(signature, plan), here, plan


@lru_cache(maxsize=256)
def _program(
    signature: Signature, plan: Layout, kernels: tuple[Any, ...], wanted: tuple[Any, Any], check_vma: bool
) -> Any:
    """The jitted call over the mesh; `kernels` are those of a device's share and, where there is one, of the edge."""
    local = local_signature(signature, plan)
    share = replace(signature, num_q_heads=local.num_q_heads, num_kv_heads=local.num_kv_heads)

    def attend(inputs: Inputs) -> Any:
        if plan.shards("pages") == 1:
            return kernels[0](inputs)
        return _merged_pages(inputs, share, local, plan.pages, kernels)

    def body(inputs: Inputs) -> Any:
        inputs = _own_heads(inputs, signature, local, plan)
        return attend(inputs) if plan.shards("sequences") == 1 else _own_sequences(inputs, share, plan, attend)

    heads = plan.heads or None
    natural = PartitionSpec(None, heads, None), PartitionSpec(None, heads) if signature.return_lse else None
    specs = _specs(signature, plan)
    sharded = jax.shard_map(body, mesh=plan.mesh, in_specs=(specs,), out_specs=natural, check_vma=check_vma)

    def over_mesh(inputs: Inputs) -> Any:
        found = sharded(Inputs(*_laid(inputs, specs, plan.mesh, AxisType.Explicit)))
        return tuple(_laid(_laid(found, wanted, plan.mesh, AxisType.Explicit), wanted, plan.mesh, AxisType.Auto))

    return jax.jit(over_mesh)


def _laid(arrays: Any, specs: Any, mesh: Any, kind: AxisType) -> list[Any]:
    """Arrays split as their specs say, by mesh axes of one kind: an explicit axis is part of an array's type."""
    named = [axis for axis, its in zip(mesh.axis_names, mesh.axis_types, strict=True) if its == kind]
    put = jax.sharding.reshard if kind == AxisType.Explicit else lax.with_sharding_constraint

    def lay(array: Any, spec: Any) -> Any:
        if array is None or spec is None or not named:
            return array
        dims = dims_of("", spec, array.ndim, mesh)
        kept = PartitionSpec(*(tuple(axis for axis in axes if axis in named) or None for axes in dims))
        return put(array, NamedSharding(mesh, kept))

    return list(map(lay, arrays, specs))


def _specs(signature: Signature, plan: Layout) -> Inputs:
    """How the arrays lie on the mesh; metadata, and kv heads too few to split, lie whole on every device."""
    heads, pages, whole = plan.heads or None, plan.pages or None, PartitionSpec()
    kv = heads if signature.num_kv_heads % plan.shards("heads") == 0 else None
    specs: tuple[Any, ...] = (
        PartitionSpec(None, heads, None), PartitionSpec(pages, None, kv, None), whole, whole, whole, whole,
        PartitionSpec(heads) if signature.sinks else None,
        PartitionSpec(kv) if signature.k_scale else None,
        PartitionSpec(kv) if signature.v_scale else None,
    )  # fmt: skip
    return Inputs(*specs)


def _placed(inputs: Inputs, signature: Signature, plan: Layout) -> Inputs:
    """Concrete arrays where the program wants them; a traced call leaves that to the compiler."""
    if any(rules.is_traced(array) for array in inputs):
        return inputs
    if not isinstance(plan.mesh, Mesh):
        if jax.sharding.get_abstract_mesh() != plan.mesh:
            raise ValueError(f"mesh={plan.mesh}: it names no devices; give a Mesh, or call inside `jax.set_mesh`")
        return inputs
    return Inputs(*(_put(array, spec, plan.mesh) for array, spec in zip(inputs, _specs(signature, plan), strict=True)))


def _put(array: Any, spec: Any, mesh: Mesh) -> Any:
    if array is None:
        return None
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() > 1 and getattr(array, "is_fully_addressable", True):
        host = np.asarray(array)  # every process holds the same values, as it must
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index], dtype=host.dtype)
    return jax.device_put(array, sharding)


def _own_heads(inputs: Inputs, signature: Signature, local: Signature, plan: Layout) -> Inputs:
    """Where kv heads lie whole on every device, take the one that this device's query heads read."""
    if signature.num_kv_heads % plan.shards("heads") == 0:
        return inputs
    head = lax.axis_index(plan.heads) * local.num_q_heads // signature.group
    pages = lax.dynamic_slice_in_dim(inputs.kv_pages, 2 * head, 2, axis=2)

    def one(scale: Any) -> Any:
        return None if scale is None else lax.dynamic_slice_in_dim(scale, head, 1)

    return inputs._replace(kv_pages=pages, k_scale=one(inputs.k_scale), v_scale=one(inputs.v_scale))


# ------------------------------------------------------------------ sequences


def _own_sequences(inputs: Inputs, signature: Signature, plan: Layout, attend: Callable[[Inputs], Any]) -> Any:
    """Attend to a contiguous range of sequences whose cost is about one device's share, and put all rows together."""
    axes, shards, row = plan.sequences, plan.shards("sequences"), jnp.arange(signature.num_tokens)
    ragged = layout.sanitize(inputs, signature)
    offsets = clean_offsets(inputs, signature)
    queries = offsets[1:] - offsets[:-1]
    # Reading the context is the cost of decode, scoring every row against it that of prefill.
    cost = jnp.where(queries > 0, ragged.context * (1 + queries / 64) + queries, 0).astype(jnp.float32)
    before = jnp.cumsum(cost) - cost / 2
    owner = (before * (shards / jnp.maximum(jnp.sum(cost), 1))).astype(jnp.int32)
    mine = (jnp.clip(owner, 0, shards - 1) == lax.axis_index(axes)) & (queries > 0)
    high = jnp.max(jnp.where(mine, offsets[1:], 0))
    low = jnp.minimum(jnp.min(jnp.where(mine, offsets[:-1], signature.num_tokens)), high)
    output, lse = attend(
        inputs._replace(
            context_lens=jnp.where(ragged.valid, inputs.context_lens, -1),  # NaN rows stay NaN rows
            query_start_loc=jnp.clip(offsets, low, high),  # the others have no rows
        )
    )
    own = (row >= low) & (row < high)
    output = lax.psum(jnp.where(own[:, None, None], output, 0), axes)  # adding zeros changes no value
    if lse is None:
        return output, None
    lse = lax.psum(jnp.where(own[:, None], lse, 0), axes)
    return output, jnp.where(((row >= offsets[0]) & (row < offsets[-1]))[:, None], lse, -jnp.inf)


def clean_offsets(inputs: Inputs, signature: Signature) -> jax.Array:
    """int32 [S + 1], never decreasing, within the rows: sequence s owns `[o[s], o[s + 1])`, dead ones nothing."""
    live = jnp.arange(signature.max_seqs + 1) <= jnp.clip(inputs.num_seqs[0], 0, signature.max_seqs)
    offsets = jnp.where(live, inputs.query_start_loc, 0)
    return jnp.clip(lax.cummax(offsets), 0, signature.num_tokens)


# ------------------------------------------------------------------ pages


def _merged_pages(inputs: Inputs, share: Signature, local: Signature, axes: Axes, kernels: Any) -> tuple[Any, Any]:
    """Attend to this device's pages, and weigh the parts of all devices by their LSE."""
    ragged = layout.sanitize(inputs, share)
    calls = _rows_over_local_pages(inputs, ragged, share, local, lax.axis_index(axes) * local.num_pages)
    found = [kernel(call) for kernel, call in zip(kernels, calls, strict=False)]  # without a window there is no edge
    parts, lses = (jnp.stack(arrays) for arrays in zip(*found, strict=True))  # f32 [calls, T, Hq, D], [calls, T, Hq]
    sinks = -jnp.inf if inputs.softmax_aux is None else inputs.softmax_aux
    top = jnp.maximum(lax.pmax(jnp.max(lses, axis=0), axes), sinks)
    top = jnp.where(jnp.isfinite(top), top, 0)
    weight = jnp.exp(lses - top)[..., None]
    sums = jnp.sum(jnp.concatenate([weight * parts, weight], axis=-1), axis=0)
    sums = lax.psum(sums, axes)  # one exchange for both
    total = sums[..., -1] + jnp.exp(sinks - top)
    output = sums[..., :-1] / jnp.where(total > 0, total, 1)[..., None]
    lse = (top + jnp.log(total)) if share.return_lse else None
    return layout.finish(output.astype(share.q_dtype), lse, share, ragged)


def _rows_over_local_pages(
    inputs: Inputs, ragged: layout.Ragged, share: Signature, local: Signature, base: Any
) -> Iterator[Inputs]:
    """Each query row as a sequence of one query over the keys that this device holds, in their order.

    The first call is over whole pages, the second over the slots of the page inside which the row's window starts
    (`mesh.edge_signature`). Positions are global; only what ends up in the tables is this device's.
    """
    page, tables = share.page_size, inputs.block_tables
    here = (tables >= base) & (tables < base + local.num_pages)  # [S, pages_per_seq]
    before = jnp.cumsum(here, axis=1) - here  # pages of this device before each logical page
    place = jnp.where(here, before, share.pages_per_seq)  # past the end: dropped
    compact = jnp.zeros_like(tables).at[jnp.arange(share.max_seqs)[:, None], place].set(tables - base, mode="drop")
    offsets = clean_offsets(inputs, share)
    row = jnp.arange(share.num_tokens)
    sequence = jnp.clip(jnp.searchsorted(offsets[1:], row, side="right"), 0, share.max_seqs - 1)
    position = ragged.context[sequence] - ragged.stop[sequence] + row
    sees = (row >= ragged.start[sequence]) & (row < ragged.stop[sequence]) & (position >= 0)
    low, high = layout.visible(jnp.maximum(position, 0), None, share.sliding_window)
    first, last = -(-low // page), (high - 1) // page  # the window's first whole page, and its last
    own = inputs._replace(
        queries=inputs.queries.astype(local.q_dtype), softmax_aux=None,
        query_start_loc=jnp.arange(share.num_tokens + 1, dtype=jnp.int32),
        num_seqs=jnp.full(1, share.num_tokens, jnp.int32),
    )  # fmt: skip

    skipped = before[sequence, jnp.minimum(first, share.pages_per_seq - 1)]
    keys = (before[sequence, last] - skipped) * page + jnp.where(here[sequence, last], (high - 1) % page + 1, 0)
    columns = skipped[:, None] + jnp.arange(local.pages_per_seq)
    yield own._replace(
        context_lens=jnp.where(sees & (first <= last), keys, 0).astype(jnp.int32),
        block_tables=compact[sequence[:, None], jnp.minimum(columns, share.pages_per_seq - 1)],
    )
    keys = jnp.where(here[sequence, low // page], jnp.minimum(first * page, high) - low, 0)
    slots = (tables[sequence, low // page] - base) * page + low % page
    yield own._replace(
        kv_pages=inputs.kv_pages.reshape(-1, 1, *inputs.kv_pages.shape[2:]),
        context_lens=jnp.where(sees, keys, 0).astype(jnp.int32),
        block_tables=slots[:, None] + jnp.arange(max(page - 1, 1)),
    )
