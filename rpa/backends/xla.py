"""The XLA backend: blocked online softmax in while loops whose trip counts are the live work.

A loop walks the live sequences. Each is cut into tiles of query rows, by its own query length only: large tiles first,
a short remainder into small ones, a single row (all of a decode step) into tiles of one. A loop walks the tiles of each
shape; inside it another walks the blocks of pages that the tile's rows see. Nothing is ever as long as a context, and
dead rows, sequences and pages are never visited. The blocks of a tile start at the page its window starts in, so a
sequence's arithmetic depends on nothing but itself.

Floors and where we are (two Xeon cores with AMX, shared with other work, so CPU time; 32/8 heads, D 128, f32):
decode of 8 x 2048 keys reads 134 MB, 14 ms at the 9.5 GB/s one core streams: 34 ms. 8192 x 8192 prefill is 550
GFLOP, 9.2 s at the 60 GFLOP/s a core's dots reach: 10.4 s, with 7 MB of temporaries; bf16 5.2 s.

What was tried and lost (CPU time of a 256-key block of that model, 2 MB in f32, unless said otherwise):
- page gather, then two transposes: 908 us; the transposes inside one gather each for keys and values: 614 us
- a gather by (page, head) pairs: 684 us; unrolled page slices, concatenated: 880 us; a loop of page updates: worse
- scores of a decode row as queries . keys: 125 us; as keys . queries, which packs the small operand: 84 us
- weighted values as values . weights: 1071 us; as weights . values: 30 us
- multiply and reduce instead of a dot: scores 73..134 us, values 29 us; in bf16 slower than the dot
- bf16 operands rounded and then multiplied as f32: 1.2x slower for 4 rows, 4x for 256, since XLA's bf16 dots use AMX
- tiles of 32 or 128 rows instead of 64, blocks of 128 or 512 keys in prefill: within the noise
- all tiles of one shape in a loop, found by running sums over the sequences, whose numbers are then arrays: 10 kernels
  more to compile; 1,000 short sequences of one row took 10.1 ms, now 6.9; one live of 1,000 took 2.6 ms, now 0.2. What
  it had for it: on a GPU each loop's condition asks the host. On an H200 64 rows of 1k keys took 8.7 ms, now 13.5; one
  prefill of 2k 6.9, now 5.8; eight rows of 8k 7.4, now 7.3. There Triton's kernel takes what the XLA backend does
- the barrier behind the mask where there is no cap: no kernel less, and bf16 decode up to a fifth slower
Compilation, 2 s, is a twentieth passes over HLO; then each kernel that no other equals costs 15 ms in MLIR and 20 in
LLVM. So a sequence's and a tile's numbers are one array each, and what the shapes of tiles have in common is written
alike: 51 kernels became 43, a fifth less CPU time. Further:
- sums and maxima in two steps of at most 32 instead of XLA's tree: as many kernels, prefill slower
- the sum of the weights as a dot with ones: the ones are a kernel too
- a table's entries as booleans, shaped so that no dimension passes 32: XLA makes one of them again, and a tree of it
- an allocator that keeps what it was given, or uses huge pages: the same CPU time
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rpa import layout, numerics
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.program import nothing_to_do
from rpa.registry import Implementation
from rpa.signature import Inputs, Signature

_OPTIONS = ("decode_pages", "short_rows")  # pages a block of one-row and short tiles; rows of a short tile
_INVALID = -(2**31)  # the position of an invalid sequence's first row: below every valid one, and none sees a key
_BEFORE = (0, 0, 0, 0, 1, 0)  # the item before a sequence's first; all alike, it would be a kernel and not a constant
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Keys a block, rows a tile, keys a decode block: the candidates beside the heuristic.
_AROUND = (
    (128, 64, 128),
    (512, 64, 512),
    (256, 32, 256),
    (256, 128, 1024),
    (512, 128, 256),
    (1024, 64, 2048),
)


class Tile(NamedTuple):
    """One shape of work."""

    rows: int  # query rows
    pages: int  # pages a block
    spare: int  # a remainder of at most this many rows is left to the smaller tiles


def _fact(facts, place: int):
    """One number of an array; as `facts[place]`, which takes five times as long to trace."""
    return lax.index_in_dim(facts, place, keepdims=False)


class Sequence(NamedTuple):
    """A sequence, and how its rows are dealt out to the tile shapes: one array, that XLA makes by one loop."""

    facts: jax.Array  # int32 [6 + shapes]; the last two are the first of its live table entries, one past the last

    number = property(lambda self: _fact(self.facts, 0))
    taken = property(lambda self: _fact(self.facts, 1))  # the largest offset of it and all before it
    start = property(lambda self: _fact(self.facts, 2))  # its first row in `queries`
    position = property(lambda self: _fact(self.facts, 3))  # of that row, or `_INVALID`: its rows become NaN

    def end(self, kind: int) -> jax.Array:
        """One past the last of its rows that tiles of this shape take, and larger ones before them."""
        return _fact(self.facts, 4 + kind)


class Item(NamedTuple):
    """One tile of a sequence, and the page its next block begins at: one array too."""

    facts: jax.Array  # int32 [6]

    page = property(lambda self: _fact(self.facts, 0))
    stop = property(lambda self: _fact(self.facts, 1))  # one past the last key any row sees
    position = property(lambda self: _fact(self.facts, 2))  # of the first row, may be negative
    first_row = property(lambda self: _fact(self.facts, 3))  # row in `queries` of the tile's first row
    rows = property(lambda self: _fact(self.facts, 4))  # live rows
    end = property(lambda self: _fact(self.facts, 5))  # one past its last row, counted from the sequence's first

    def next(self, pages: int) -> Item:
        return Item(self.facts + jnp.array([pages, 0, 0, 0, 0, 0], jnp.int32))


class Softmax(NamedTuple):
    """Running maximum, sum and weighted values, f32 whatever the dtypes."""

    m: jax.Array  # [Hkv, rows, group]
    l: jax.Array  # [Hkv, rows, group]
    acc: jax.Array  # [Hkv, rows, group, D]


def run(inputs: Inputs, signature: Signature, config: RaggedPageAttentionv2Config) -> tuple[Any, Any]:
    """The whole contract, inside jit: [T, Hq, D] in the queries' dtype and f32 [T, Hq] or None."""
    shapes, never = tiles(signature, config), _never(inputs)
    # Written first and not last: sweeps write live rows only, and so no pass over the whole output follows them.
    output, lse = nothing_to_do(signature)
    carry = _varying(output, never), None if lse is None else _varying(lse, never)

    def more(state) -> jax.Array:
        return state[0].number + 1 < jnp.minimum(inputs.num_seqs[0], signature.max_seqs)

    def body(state):
        last, carry = state
        sequence = _sequence(last, shapes, inputs, signature)
        item = Item(_varying(jnp.array(_BEFORE, jnp.int32), never))
        for kind, tile in enumerate(shapes):
            item, carry = _sweep(tile, kind, sequence, item, inputs, signature, carry)
        return sequence, carry

    before = jnp.array([-1, *[0] * (5 + len(shapes))], jnp.int32)
    return lax.while_loop(more, body, (Sequence(_varying(before, never)), carry))[1]


def _never(inputs: Inputs):
    """Inside `shard_map` a traced False that varies over every mesh axis that some input does; elsewhere None."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return None
    corners = [a[(slice(0, 1),) * a.ndim].reshape(()) for a in inputs if a is not None]
    return jnp.any(jnp.stack([corner.astype(jnp.float32) for corner in corners]) > jnp.inf)


def _varying(x, never):
    """`x` as a loop may carry it inside `shard_map`, where a carry may not begin to vary half-way."""
    return x if never is None else jnp.where(never, jnp.zeros_like(x), x)


def tiles(signature: Signature, config: RaggedPageAttentionv2Config) -> tuple[Tile, ...]:
    """The tile shapes of a program, largest first; one that no sequence of this call can fill is left out."""
    _check(config)
    usual = _blocks(signature)
    rows = config.num_queries_per_block or usual.rows
    pages = config.num_kv_pages_per_block or usual.pages
    short = min(config.option("short_rows", min(usual.short_rows, max(rows // 2, 1))), rows)
    few = config.option("decode_pages", usual.decode_pages)
    found, most = [], signature.num_tokens  # rows that the tiles so far may leave over
    for tile in (Tile(rows, pages, min(2 * short, rows - 1)), Tile(short, few, min(1, short - 1)), Tile(1, few, 0)):
        if tile.spare < min(most, tile.rows):
            fitted = Tile(min(tile.rows, most), min(tile.pages, signature.pages_per_seq), tile.spare)
            found.append(fitted)
            most = tile.spare
    return tuple(found)


def _check(config: RaggedPageAttentionv2Config) -> None:
    """Refuse what would be ignored."""
    for name, value in config.options:
        if name not in _OPTIONS:
            raise ValueError(f"cfg.options {name!r}: the xla backend knows {' and '.join(_OPTIONS)}")
        if value < 1:
            raise ValueError(f"cfg.options {name!r}={value}: the xla backend needs a positive number")
    if (config.num_kv_splits or 1) > 1:
        raise ValueError(
            f"cfg.num_kv_splits={config.num_kv_splits}: the xla backend does not split a sequence's keys; triton does"
        )


def _sequence(last: Sequence, shapes: tuple[Tile, ...], inputs: Inputs, signature: Signature) -> Sequence:
    """The sequence after `last`."""
    number = last.number + 1
    begin, end = _at(inputs.query_start_loc, number), _at(inputs.query_start_loc, number + 1)
    context, table = _at(inputs.context_lens, number), _at(inputs.block_tables, number)
    taken = jnp.maximum(last.taken, begin)
    start, stop, valid = layout.owned(begin, end, taken, context, signature)
    rows = stop - start
    entries = layout.live_entries(start, stop, context, signature)
    position = jnp.where(valid, context - rows, _INVALID)
    # A barrier: else XLA works them out again wherever one is looked at.
    facts = lax.optimization_barrier(jnp.stack([number, taken, start, position, *_ends(shapes, rows), *entries]))
    column = jnp.arange(signature.pages_per_seq)
    live = jnp.where((column >= _fact(facts, -2)) & (column < _fact(facts, -1)), table, 0)
    # Both at once: a reduction of one array longer than 32 is a tree of kernels for XLA.
    least, most = lax.reduce((live, live), (jnp.int32(0), jnp.int32(0)), _least_and_most, (0,))
    lost = (least < 0) | (most >= signature.num_pages)
    is_position = jnp.array([place == 3 for place in range(facts.size)])
    return Sequence(lax.optimization_barrier(jnp.where(lost & is_position, _INVALID, facts)))


def _least_and_most(a, b):
    return jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])


def _at(array, index):
    """One entry, by an index that is never negative."""
    return lax.dynamic_index_in_dim(array, index, keepdims=False, allow_negative_indices=False)


def _ends(shapes: tuple[Tile, ...], rows) -> list[jax.Array]:
    """Deal the rows of a sequence out to the tile shapes: where those of each end."""
    left, ends = rows, []
    for tile in shapes:
        spare = lax.rem(left, tile.rows)
        left = jnp.where(spare > tile.spare, 0, spare)  # a tile more, for what the smaller ones are not given
        ends.append(rows - left)
    return ends


def _sweep(tile: Tile, kind: int, sequence: Sequence, item: Item, inputs: Inputs, signature: Signature, carry):
    """Run every tile of one shape that a sequence has, and store its rows; `item` is the last one of larger tiles."""

    def more(state) -> jax.Array:
        return state[0].end < sequence.end(kind)

    def body(state):
        item, carry = state
        item = _item(tile, kind, item.end, sequence, signature)
        softmax = _attend(tile, item, sequence, inputs, signature)
        return item, _store(tile, item, carry, _close(softmax, item, inputs, signature))

    return lax.while_loop(more, body, (item, carry))


def _item(tile: Tile, kind: int, row, sequence: Sequence, signature: Signature) -> Item:
    """The tile that begins at a row of the sequence."""
    rows = jnp.minimum(tile.rows, sequence.end(kind) - row)
    position = sequence.position + row
    low, _ = layout.visible(position, None, signature.sliding_window)
    page = lax.div(low, signature.page_size)
    facts = jnp.stack([page, position + rows, position, sequence.start + row, rows, row + rows])
    return Item(lax.optimization_barrier(facts))


def _attend(tile: Tile, item: Item, sequence: Sequence, inputs: Inputs, signature: Signature) -> Softmax:
    """Fold every block of pages that some row of the tile sees."""
    heads, group, dim = signature.num_kv_heads, signature.group, signature.head_dim
    block = tile.pages * signature.page_size
    queries = _load_queries(tile, item, inputs, signature)

    def more(state) -> jax.Array:
        at, _ = state
        return at.page * signature.page_size < at.stop

    def body(state):
        at, softmax = state
        position = at.position + jnp.arange(tile.rows)
        low, high = layout.visible(position, None, signature.sliding_window)  # of a row past the tile's last: anything
        low = jnp.broadcast_to(low, position.shape)
        key = at.page * signature.page_size + jnp.arange(block)
        first, _ = layout.visible(at.position, None, signature.sliding_window)
        readable = (key >= first) & (key < at.stop)  # [block]; other slots may hold anything
        keys, values = _load_block(tile, at, sequence, readable, inputs, signature)
        seen = (key >= low[:, None]) & (key < high[:, None])  # [rows, block]
        z = _logits(queries, keys, inputs, signature).reshape(heads, tile.rows, group, block)
        return at.next(tile.pages), _fold(softmax, z, seen[:, None], values, signature)

    shape, never = (heads, tile.rows, group), _never(inputs)
    start = Softmax(m=_sinks(inputs, shape), l=jnp.ones(shape), acc=jnp.zeros((*shape, dim)))
    start = Softmax(*(_varying(x, never) for x in start))
    return lax.while_loop(more, body, (item, start))[1]


def _sinks(inputs: Inputs, shape: tuple[int, ...]):
    """The first maximum, [Hkv, rows, group], which weighs 1: the sink, or -inf, of which a key seen leaves 0."""
    if inputs.softmax_aux is None:
        return jnp.full(shape, -jnp.inf)
    return jnp.broadcast_to(inputs.softmax_aux.reshape(shape[0], 1, shape[2]), shape)


def _load_queries(tile: Tile, item: Item, inputs: Inputs, signature: Signature):
    """[Hkv, rows * group, D] operands; a row past the last query repeats it and is never stored."""
    row = jnp.minimum(item.first_row + jnp.arange(tile.rows), signature.num_tokens - 1)
    q = inputs.queries[row].reshape(tile.rows, signature.num_kv_heads, signature.group, signature.head_dim)
    q = q.transpose(1, 0, 2, 3).reshape(signature.num_kv_heads, -1, signature.head_dim)
    return _operand(q, signature)


def _load_block(tile: Tile, item: Item, sequence: Sequence, readable, inputs: Inputs, signature: Signature):
    """Keys and values of one block, [Hkv, block, D] each; values in slots nobody may read become 0."""
    column = jnp.minimum(item.page + jnp.arange(tile.pages), signature.pages_per_seq - 1)
    ids = inputs.block_tables.at[sequence.number, column].get(mode="promise_in_bounds", wrap_negative_indices=False)
    ids = jnp.clip(ids, 0, signature.num_pages - 1)
    keys = _gather(inputs.kv_pages, ids, 0, signature)
    values = _gather(inputs.kv_pages, ids, signature.head_dim, signature)
    values = jnp.where(readable[None, :, None], _operand(values, signature), 0)
    return _operand(keys, signature), values


def _gather(kv_pages, ids, offset: int, signature: Signature):
    """[Hkv, pages * page, D] of the keys (offset 0) or values (offset D), in one pass over the pages."""
    heads, dim, page = signature.num_kv_heads, signature.head_dim, signature.page_size
    pairs = kv_pages.reshape(-1, page, heads, 2 * dim)  # a kv head's key and value side by side
    if pairs.dtype.itemsize == 1:  # else XLA converts the whole pool to 16 bits before the loop
        pairs, ids = lax.optimization_barrier((pairs, ids))
    at = jnp.stack([ids, jnp.full_like(ids, offset)], axis=-1)
    numbers = lax.GatherDimensionNumbers(offset_dims=(1, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0, 3))
    # Indexed by page id: a flattened element offset would not fit 32 bits in a large pool.
    found = lax.gather(pairs, at, numbers, (1, page, heads, dim), mode="promise_in_bounds")
    return found.transpose(2, 0, 1, 3).reshape(heads, -1, dim)


def _operand(x, signature: Signature):
    """A dot operand in compute_dtype."""
    return x.astype(signature.compute_dtype)


def dot(a, b, contract: tuple[int, int], compute_dtype: str):
    """Batched over axis 0, accumulated in f32; `contract` names an axis of each operand."""
    exact = compute_dtype != "bfloat16"  # f32 must not be cut to tf32 or bf16 passes
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _logits(queries, keys, inputs: Inputs, signature: Signature):
    """Scaled, capped logits, f32 [Hkv, rows * group, block]; the scale is applied after the dot, in f32."""
    scale = jnp.float32(signature.softmax_scale)
    if inputs.k_scale is not None:
        scale = (scale * inputs.k_scale)[:, None, None]
    # Keys first where there are few rows: the operand that the dot packs is then the small one.
    if queries.shape[1] <= 32:
        x = dot(keys, queries, (2, 2), signature.compute_dtype).transpose(0, 2, 1) * scale
    else:
        x = dot(queries, keys, (2, 2), signature.compute_dtype) * scale
    cap = signature.logits_soft_cap
    return x if cap is None else cap * jnp.tanh(x / cap)


def _fold(state: Softmax, z, seen, values, signature: Signature) -> Softmax:
    """One step of the online softmax; z [Hkv, rows, group, block], seen broadcastable to it."""
    z = jnp.where(seen, z, -jnp.inf)
    if signature.logits_soft_cap is not None:
        z = lax.optimization_barrier(z)  # masked once, in the tanh's kernel and not in those after it
    m = jnp.maximum(state.m, jnp.max(z, axis=-1))
    base = jnp.where(m == -jnp.inf, 0.0, m)  # nothing seen yet: exp(-inf - 0) is 0, -inf - -inf is not
    p = jnp.exp(z - base[..., None])
    keep = jnp.exp(state.m - base)
    heads, rows, group, block = z.shape
    weights = _operand(p.reshape(heads, rows * group, block), signature)
    update = dot(weights, values, (2, 1), signature.compute_dtype).reshape(state.acc.shape)
    return Softmax(m=m, l=state.l * keep + jnp.sum(p, axis=-1), acc=state.acc * keep[..., None] + update)


def _close(state: Softmax, item: Item, inputs: Inputs, signature: Signature):
    """Divide, and put heads back beside each other: f32 [rows, Hq, D] and [rows, Hq]."""
    l = jnp.where(state.l > 0, state.l, 1.0)  # 0 where masked keys have outweighed a sink of -inf
    out = state.acc / l[..., None]
    if inputs.v_scale is not None:
        out = out * inputs.v_scale[:, None, None, None]
    lse = state.m + jnp.log(l)
    out, lse = (jnp.where(item.position < -signature.num_tokens, jnp.nan, x) for x in (out, lse))
    rows = out.shape[1]
    out = out.transpose(1, 0, 2, 3).reshape(rows, signature.num_q_heads, signature.head_dim)
    return out, lse.transpose(1, 0, 2).reshape(rows, signature.num_q_heads)


def _store(tile: Tile, item: Item, carry, result):
    """Write the tile's live rows in place; the slice may not pass the last row, so it slides back over others'."""
    at = jnp.minimum(item.first_row, carry[0].shape[0] - tile.rows)
    row = at - item.first_row + jnp.arange(tile.rows)  # of the tile
    mine = (row >= 0) & (row < item.rows)
    stored = []
    for whole, part in zip(carry, result, strict=True):
        if whole is None:  # nobody asked for the lse
            stored.append(None)
            continue
        shape = (tile.rows,) + (1,) * (part.ndim - 1)
        fresh = part[jnp.clip(row, 0, tile.rows - 1)].astype(whole.dtype)
        old = lax.dynamic_slice_in_dim(whole, at, tile.rows)
        new = jnp.where(mine.reshape(shape), fresh, old)
        stored.append(lax.dynamic_update_slice_in_dim(whole, new, at, 0))
    return tuple(stored)


def _supports(signature: Signature, device: Device) -> str | None:
    return None  # the contract, whole, on every chip


class _Blocks(NamedTuple):
    pages: int
    rows: int
    short_rows: int
    decode_pages: int

    def config(self) -> RaggedPageAttentionv2Config:
        options = (("decode_pages", self.decode_pages), ("short_rows", self.short_rows))
        return RaggedPageAttentionv2Config(self.pages, self.rows, platform="xla", options=options)


def _blocks(signature: Signature) -> _Blocks:
    """Decode blocks of about 1 MiB of keys and values, tiles of about 2 MiB of logits: a core's cache holds them."""
    key_bytes = 2 * signature.num_kv_heads * signature.head_dim * _BYTES[signature.compute_dtype]
    rows = _power_of_two((1 << 21) // (4 * 256 * signature.num_q_heads), 16, 128)
    decode = _power_of_two((1 << 20) // key_bytes, 128, 512)
    return _Blocks(_pages(256, signature), rows, min(16, rows // 2), _pages(decode, signature))


def _heuristic(signature: Signature, device: Device) -> RaggedPageAttentionv2Config:
    return _blocks(signature).config()


def _power_of_two(wanted: int, least: int, most: int) -> int:
    """The power of two at or below `wanted`, within bounds."""
    return min(max(1 << max(wanted, 1).bit_length() - 1, least), most)


def _pages(keys: int, signature: Signature) -> int:
    return max(1, min(keys // signature.page_size, signature.pages_per_seq))


def _candidates(signature: Signature, device: Device) -> tuple[RaggedPageAttentionv2Config, ...]:
    """Configs around the heuristic whose programs differ."""
    usual = _blocks(signature).config()
    found = {tiles(signature, usual): usual}
    for keys, rows, decode in _AROUND:
        config = _Blocks(_pages(keys, signature), rows, min(16, rows // 2), _pages(decode, signature)).config()
        found.setdefault(tiles(signature, config), config)
    return tuple(found.values())


def _claim(signature: Signature, device: Device) -> dict[str, Any]:
    return numerics.claim(signature, device, block=signature.page_size)


BACKEND = Implementation(
    name="xla",
    run=run,
    supports=_supports,
    heuristic=_heuristic,
    candidates=_candidates,
    claim=_claim,
)
