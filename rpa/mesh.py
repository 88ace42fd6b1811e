"""What a mesh splits: from axis names or PartitionSpecs to a layout, and one device's share of a call."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from rpa.signature import Inputs, Signature
from rpa.validate import is_traced

Axes = tuple[str, ...]  # the mesh axes that split one dimension, outermost first

# What a mesh axis is called decides what it splits when no specs are given.
_NAMES = {
    "heads": ("heads", "head", "tp", "tensor", "model", "mp"),
    "sequences": ("sequences", "sequence", "seq", "dp", "data", "batch"),
    "pages": ("pages", "page", "cp", "context", "kv"),
}
_RULE = (
    "an axis may split the heads of queries (kv_pages and softmax_aux alike), the sequences of context_lens "
    "(block_tables alike) or the pages of kv_pages"
)
_ARGUMENTS = ("queries", "kv_pages", "context_lens", "block_tables", "query_start_loc", "num_seqs", "softmax_aux")


@dataclass(frozen=True)
class Layout:
    """Which axes of a mesh split what; an empty tuple splits nothing."""

    mesh: Any
    heads: Axes = ()
    sequences: Axes = ()
    pages: Axes = ()

    def shards(self, what: str) -> int:
        """Into how many parts heads, sequences or pages are split."""
        return math.prod(self.mesh.shape[axis] for axis in getattr(self, what))

    @property
    def label(self) -> str:
        """The layout as part of a key: `heads:4,pages:2`."""
        return ",".join(f"{what}:{size}" for what in _NAMES if (size := self.shards(what)) > 1) or "none"


def layout_of(mesh: Any, in_specs: Any = None) -> Layout:
    """What each axis splits: as the specs say, else as its name says, else by its place (last heads, first sequences).

    Raises:
        TypeError, ValueError: naming the mesh, the spec or the axis that cannot be used.
    """
    if mesh is None:
        raise ValueError("mesh=None: in_specs and out_specs need the mesh that they speak of")
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"mesh={mesh!r}: a jax.sharding.Mesh or None is expected")
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
    idle = next((axis for axis in nameless if mesh.shape[axis] > 1), None)
    if idle is not None:
        raise ValueError(f"mesh axis {idle!r} has nothing left to split: give in_specs")
    return Layout(mesh, **roles)


def explicit(inputs: Inputs) -> tuple[Any, tuple[Any, ...]] | None:
    """The mesh and the specs of arrays whose types say how they lie (JAX's explicit axes); None where none is split."""
    lies: list[Any] = [
        array.aval.sharding if isinstance(array, jax.Array) else None for array in inputs[: len(_ARGUMENTS)]
    ]
    first = next((i for i, sharding in enumerate(lies) if sharding is not None and any(sharding.spec)), None)
    if first is None:
        return None
    array: Any = inputs[first]
    mesh = (lies[first] if is_traced(array) else array.sharding).mesh  # a traced array names no devices
    return mesh, tuple(sharding and sharding.spec for sharding in lies)


def _from_specs(mesh: Any, in_specs: Any) -> Layout:
    if not isinstance(in_specs, (tuple, list)) or len(in_specs) not in (6, 7):
        raise ValueError(f"in_specs={in_specs!r}: seven PartitionSpecs are expected, or six without sinks")
    specs = dict(zip(_ARGUMENTS, in_specs, strict=False))
    ranks = (3, 4, 1, 2, 1, 1, 1)
    split = {name: dims_of(name, spec, rank, mesh) for (name, spec), rank in zip(specs.items(), ranks, strict=False)}
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
                raise ValueError(f"{name} is split in dimension {dim} by mesh axis {_shown(axes)}, and {_RULE}")
    used = (*heads, *sequences, *pages)
    twice = next((axis for axis in used if used.count(axis) > 1), None)
    if twice is not None:
        raise ValueError(f"mesh axis {twice!r} splits two dimensions, and an axis can split one")
    return Layout(mesh, heads, sequences, pages)


def dims_of(name: str, spec: Any, rank: int, mesh: Any) -> tuple[Axes, ...]:
    """The axes of each dimension of a spec; `name` says in errors whose it is."""
    if spec is None:
        return ((),) * rank
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"{name} has {spec!r}: a PartitionSpec or None is expected")
    if len(spec) > rank:
        raise ValueError(f"{name} has {spec}: at most {rank} entries are expected")
    dims = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in spec]
    for axis in (axis for dim in dims for axis in dim):
        if axis not in mesh.axis_names:
            raise ValueError(f"{name} names axis {axis!r}; the mesh has {', '.join(mesh.axis_names)}")
    return (*dims, *((),) * (rank - len(dims)))


def _shown(axes: Axes) -> str:
    return repr(axes[0]) if len(axes) == 1 else repr(axes)


# ------------------------------------------------------------------ what one device computes


def local_signature(signature: Signature, plan: Layout) -> Signature:
    """The static part of one device's share; with pages split, of its attention to the pages that it holds.

    That is a call in which each row is a sequence of its own, without a window since its table starts where the window
    does, and whose answer stays in f32 until the devices' parts are merged.

    Raises:
        ValueError: an axis does not divide what it splits; the text names it.
    """
    shards, holders = plan.shards("heads"), plan.shards("pages")
    q_heads, kv_heads, page = signature.num_q_heads, signature.num_kv_heads, signature.page_size
    if q_heads % shards:
        raise ValueError(indivisible(plan.heads, shards, f"the {q_heads} heads of queries"))
    if kv_heads % shards and shards % kv_heads:
        raise ValueError(indivisible(plan.heads, shards, f"the {kv_heads} kv heads, nor do they divide it"))
    if signature.num_pages % holders:
        raise ValueError(indivisible(plan.pages, holders, f"the {signature.num_pages} pages of kv_pages"))
    local = replace(signature, num_q_heads=q_heads // shards, num_kv_heads=max(kv_heads // shards, 1))
    if holders == 1:
        return local
    most = signature.pages_per_seq if (window := signature.sliding_window) is None else -(-window // page)
    return replace(
        local, num_pages=local.num_pages // holders, pages_per_seq=min(local.pages_per_seq, most),
        max_seqs=local.num_tokens, q_dtype="float32", sinks=False, return_lse=True, sliding_window=None,
    )  # fmt: skip


def edge_signature(signature: Signature, plan: Layout) -> Signature | None:
    """The second call where pages are split under a window: over the slots of the page in which a row's window starts.

    A window may start inside a page, which a table of whole pages cannot say; the slots after that are pages of one.
    """
    if plan.shards("pages") == 1 or signature.sliding_window is None or signature.page_size == 1:
        return None
    local, page = local_signature(signature, plan), signature.page_size
    return replace(local, num_pages=local.num_pages * page, page_size=1, pages_per_seq=page - 1)


def indivisible(axes: Axes, size: int, what: str) -> str:
    return f"mesh axis {_shown(axes)} of size {size} does not divide {what}"
