"""What a mesh splits: from axis names or PartitionSpecs to a layout, and one device's share of a call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from rpa.signature import Signature

Axes = tuple[str, ...]  # the mesh axes that split one dimension, outermost first

# What a mesh axis is called decides what it splits when no specs are given.
_NAMES = {
    "heads": ("heads", "head", "tp", "tensor", "model", "mp"),
    "sequences": ("sequences", "sequence", "seq", "dp", "data", "batch"),
    "pages": ("pages", "page", "cp", "context", "kv"),
}
_ARGUMENTS = (
    "queries",
    "kv_pages",
    "context_lens",
    "block_tables",
    "query_start_loc",
    "num_seqs",
    "softmax_aux",
)


@dataclass(frozen=True)
class Layout:
    """Which mesh axes split what; an empty tuple splits nothing."""

    heads: Axes = ()
    sequences: Axes = ()
    pages: Axes = ()

    def label(self, mesh: Any) -> str:
        """The layout as part of a key: `heads:4,pages:2`."""
        parts = {name: size_of(mesh, getattr(self, name)) for name in _NAMES}
        return ",".join(f"{name}:{size}" for name, size in parts.items() if size > 1) or "none"


def layout_of(mesh: Any, in_specs: Any = None) -> Layout:
    """What each axis splits: as the specs say, else as its name says, else by its place (last heads, first sequences).

    Raises:
        TypeError, ValueError: naming the spec or the axis that cannot be used.
    """
    if in_specs is not None:
        return _from_specs(mesh, in_specs)
    roles: dict[str, Axes] = {}
    nameless = []
    for axis in mesh.axis_names:
        role = next((role for role, names in _NAMES.items() if axis in names), None)
        if role is None or role in roles:
            nameless.append(axis)
        else:
            roles[role] = (axis,)
    for role, place in (("heads", -1), ("sequences", 0), ("pages", 0)):
        if nameless and role not in roles:
            roles[role] = (nameless.pop(place),)
    if nameless:
        raise ValueError(f"mesh axis {nameless[0]!r} has nothing left to split: give in_specs")
    return Layout(**roles)


def _from_specs(mesh: Any, in_specs: Any) -> Layout:
    if not isinstance(in_specs, (tuple, list)) or len(in_specs) not in (6, 7):
        raise ValueError(f"in_specs={in_specs!r}: seven PartitionSpecs are expected, or six without sinks")
    specs = dict(zip(_ARGUMENTS, in_specs, strict=False))
    ranks = (3, 4, 1, 2, 1, 1, 1)
    split = {name: _dims(name, spec, rank, mesh) for (name, spec), rank in zip(specs.items(), ranks, strict=False)}
    heads, pages, sequences = split["queries"][1], split["kv_pages"][0], split["context_lens"][0]
    allowed = {
        "queries": ((), heads, ()),
        "kv_pages": (pages, (), heads, ()),
        "context_lens": (sequences,),
        "block_tables": (sequences, ()),
        "query_start_loc": ((),),
        "num_seqs": ((),),
        "softmax_aux": (heads,),
    }
    for name, dims in split.items():
        for dim, (axes, may) in enumerate(zip(dims, allowed[name], strict=True)):
            if axes not in ((), may):
                raise ValueError(_no_split(name, dim, axes))
    used = (*heads, *sequences, *pages)
    twice = next((axis for axis in used if used.count(axis) > 1), None)
    if twice is not None:
        raise ValueError(f"in_specs: mesh axis {twice!r} splits two dimensions, and an axis can split one")
    return Layout(heads, sequences, pages)


def _no_split(name: str, dim: int, axes: Axes) -> str:
    can = (
        "an axis may split the heads of queries (kv_pages and softmax_aux alike), the sequences of context_lens "
        "(block_tables alike) or the pages of kv_pages"
    )
    return f"in_specs: {name} is split in dimension {dim} by mesh axis {_shown(axes)}, and {can}"


def _dims(name: str, spec: Any, rank: int, mesh: Any) -> tuple[Axes, ...]:
    """The axes of each dimension of a spec."""
    if spec is None:
        return ((),) * rank
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"in_specs: {name} has {spec!r}: a PartitionSpec or None is expected")
    if len(spec) > rank:
        raise ValueError(f"in_specs: {name} has {spec}: at most {rank} entries are expected")
    dims = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in spec]
    for axis in (axis for dim in dims for axis in dim):
        if axis not in mesh.axis_names:
            raise ValueError(f"in_specs: {name} names axis {axis!r}; the mesh has {', '.join(mesh.axis_names)}")
    return (*dims, *((),) * (rank - len(dims)))


def check_mesh(mesh: Any) -> None:
    if mesh is None:
        raise ValueError("mesh=None: in_specs and out_specs need the mesh that they speak of")
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"mesh={mesh!r}: a jax.sharding.Mesh or None is expected")


def size_of(mesh: Any, axes: Axes) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes], dtype=np.int64))


def _shown(axes: Axes) -> str:
    return repr(axes[0]) if len(axes) == 1 else repr(axes)


# ------------------------------------------------------------------ what one device computes


def local_signature(signature: Signature, plan: Layout, mesh: Any) -> Signature:
    """The static part of one device's share.

    Raises:
        ValueError: an axis does not divide what it splits; the text names it.
    """
    shards = size_of(mesh, plan.heads)
    q_heads, kv_heads = signature.num_q_heads, signature.num_kv_heads
    if q_heads % shards:
        raise ValueError(_indivisible(plan.heads, shards, f"the {q_heads} heads of queries"))
    if kv_heads % shards and shards % kv_heads:
        raise ValueError(_indivisible(plan.heads, shards, f"the {kv_heads} kv heads, nor do they divide it"))
    local = replace(signature, num_q_heads=q_heads // shards, num_kv_heads=max(kv_heads // shards, 1))
    holders = size_of(mesh, plan.pages)
    if signature.num_pages % holders:
        raise ValueError(_indivisible(plan.pages, holders, f"the {signature.num_pages} pages of kv_pages"))
    return local if holders == 1 else _row_signature(local, holders)


def _row_signature(local: Signature, holders: int) -> Signature:
    """The call that attends to one device's pages: each row its own sequence, the parts in f32 until merged."""
    if local.sliding_window is not None:
        raise ValueError(
            f"sliding_window={local.sliding_window}: pages cannot be split over a mesh axis under a window, which "
            "may start inside a page; split heads or sequences instead"
        )
    return replace(
        local, num_pages=local.num_pages // holders, max_seqs=local.num_tokens, q_dtype="float32", sinks=False,
        return_lse=True,
    )  # fmt: skip


def _indivisible(axes: Axes, size: int, what: str) -> str:
    return f"mesh axis {_shown(axes)} of size {size} does not divide {what}"
