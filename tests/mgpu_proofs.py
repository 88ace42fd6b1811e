"""The proofs of the Hopper kernel that need no GPU: its plans against the contract, its kernels in the interpreter.

`python tests/mgpu_proofs.py NAME...` runs proofs by name in a process of its own and fails on the first that does not
hold. A process of its own, because the interpreter runs every warpgroup as a thread that may block, so XLA must be told
before it starts that there are more threads than this machine has cores (`NPROC`), or it waits for itself for ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    os.environ["NPROC"] = "32"
    os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import ptx
from contract_cases import Shape, build
from mgpu_races import watched

from oracle import Case, Claim, judge
from oracle.poison import nan_fill
from rpa import layout
from rpa.backends import pallas_gpu
from rpa.backends.pallas_gpu import combine, decode, decode_work, plan, prefill_work, rows, tiles
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.signature import Inputs, Signature

DEVICE = Device("gpu", "NVIDIA H100", (9, 0), interpreted=True)
# One CTA, so that each worker runs several items.
SPLIT = {"ctas": 1, "least_chunk": 64, "decode_block": 64, "mixed_chunk": 64}
SMALL = Shape(rows=6, seqs=5, pages_per_seq=24, pages=60, page=8, q_heads=4, kv_heads=2, head_dim=64)
TILED = dataclasses.replace(SMALL, rows=136, seqs=2, q_heads=2, kv_heads=1, head_dim=16)
BOTH = dataclasses.replace(SMALL, rows=40, q_heads=2, kv_heads=1)
PACKED = dataclasses.replace(SMALL, rows=136, seqs=2, q_heads=8)
FED = dataclasses.replace(SMALL, rows=136)
BF16 = {"dtype": "bfloat16", "compute_dtype": "bfloat16"}
SCALES = {"k_scale": np.array([0.5, 1.25], np.float32), "v_scale": np.array([2.0, 0.1], np.float32)}
EDGES = {"sliding_window": 37, "logits_soft_cap": 5.0, "sinks": True}


def louder(case: Case) -> Case:
    """The same logits from queries that float16 cannot hold."""
    scale = float(case.softmax_scale or case.queries.shape[2] ** -0.5)
    return case.replace(queries=case.queries * np.asarray(2.0**20, case.queries.dtype), softmax_scale=scale * 2.0**-20)


KERNELS: dict[str, Callable[[], Case]] = {
    "decode": lambda: build((1, 1, 1, 2), (70, 190, 0, 5), SMALL, amplitude=3.0, **BF16),
    "decode_group_8": lambda: build(
        (1, 1), (70, 130), dataclasses.replace(SMALL, q_heads=8, kv_heads=1, page=64, pages_per_seq=3), **BF16
    ),
    "decode_long": lambda: build(  # more blocks than a short row has
        (1, 1), (70, 330), dataclasses.replace(SMALL, q_heads=8, kv_heads=1, page=64, pages_per_seq=6), **BF16
    ),
    "decode_one_split": lambda: build(
        (1, 1, 1), (7, 60, 0), dataclasses.replace(SMALL, q_heads=12, pages_per_seq=8), **EDGES, **BF16
    ),
    "decode_head_256": lambda: build(
        (1,), (70,), dataclasses.replace(SMALL, rows=1, seqs=1, head_dim=256, kv_heads=1), **BF16
    ),
    "decode_fp8": lambda: louder(
        build(
            (1, 1, 1),
            (7, 130, 0),
            dataclasses.replace(SMALL, head_dim=128),
            kv_dtype="float8_e4m3fn",
            **SCALES,
            **EDGES,
            **BF16,
        )
    ),
    "decode_int8": lambda: build(
        (1, 1),
        (190, 33),
        SMALL,
        kv_dtype="int8",
        k_scale=0.01,
        v_scale=np.array([0.05, 0.013], np.float32),
        **BF16,
    ),
    "decode_e5m2": lambda: build(
        (1, 1), (190, 33), SMALL, dtype="float16", kv_dtype="float8_e5m2", compute_dtype="float16", **SCALES
    ),
    "prefill": lambda: build((70, 9), (130, 9), TILED, **BF16),
    # Head sizes whose products run ahead: three warpgroups on a tile, and two.
    "prefill_three": lambda: build(
        (150, 9), (300, 9), dataclasses.replace(SMALL, rows=160, q_heads=2, kv_heads=1, pages_per_seq=40), **BF16
    ),
    "prefill_pair": lambda: build(
        (70, 9), (300, 9), dataclasses.replace(TILED, head_dim=128, page=64, pages_per_seq=6), **BF16
    ),
    "prefill_edges": lambda: build((70, 9), (130, 9), TILED, **EDGES, **BF16),
    "prefill_fp8": lambda: louder(
        build((70, 9), (190, 9), FED, kv_dtype="float8_e4m3fn", sliding_window=128, sinks=True, **SCALES, **BF16)
    ),
    "mixed_int8": lambda: build(
        (5, 1, 20, 1),
        (70, 190, 20, 33),
        FED,
        kv_dtype="int8",
        k_scale=0.01,
        v_scale=0.05,
        logits_soft_cap=5.0,
        **BF16,
    ),
    "prefill_window": lambda: build((70, 9), (190, 9), TILED, sliding_window=128, **BF16),
    # A window so short that a tile's keys are one block, and heads share a warpgroup; nobody's rows before and after.
    "prefill_packed": lambda: build((70, 9), (190, 9), PACKED, sliding_window=100, sinks=True, first_row=3, **BF16),
    "prefill_odd_group": lambda: build(
        (130,),
        (131,),
        dataclasses.replace(TILED, q_heads=3, rows=139),  # rows that no swizzled copy takes
        first_row=3,
        dtype="float16",
        compute_dtype="float16",
    ),
    "mixed_splits": lambda: build((5, 1, 20, 1), (70, 190, 20, 33), BOTH, **BF16),
    "mixed_edges": lambda: build((5, 1, 20, 1), (70, 190, 20, 33), BOTH, **EDGES, **BF16),
}


# ------------------------------------------------------------------ the kernels, interpreted


def signature_of(case: Case, lse: bool = True) -> Signature:
    tokens, heads, dim = case.queries.shape
    pages, page, combined, _ = case.kv_pages.shape
    sequences, width = case.block_tables.shape
    window, dtype, stored = case.sliding_window, str(case.queries.dtype), str(case.kv_pages.dtype)
    return Signature(
        num_tokens=tokens, num_q_heads=heads, head_dim=dim, num_pages=pages, page_size=page,
        num_kv_heads=combined // 2, max_seqs=sequences, pages_per_seq=width, q_dtype=dtype, kv_dtype=stored,
        compute_dtype=dtype, sinks=case.softmax_aux is not None, k_scale=case.k_scale is not None,
        v_scale=case.v_scale is not None, return_lse=lse,
        optimized=False, softmax_scale=float(case.softmax_scale or dim**-0.5), logits_soft_cap=case.logits_soft_cap,
        sliding_window=None if window is None or window >= width * page else window, vmem_limit_bytes=None,
    )  # fmt: skip


def inputs_of(case: Case) -> Inputs:
    arrays = (case.queries, case.kv_pages, case.context_lens, case.block_tables, case.query_start_loc)
    count = jnp.asarray(case.num_seqs, jnp.int32).reshape(1)
    sinks = None if case.softmax_aux is None else jnp.asarray(case.softmax_aux, jnp.float32)
    per_head = jnp.ones(case.kv_pages.shape[2] // 2, jnp.float32)
    scales = (None if x is None else per_head * jnp.asarray(x) for x in (case.k_scale, case.v_scale))
    return Inputs(*(jnp.asarray(a) for a in arrays), count, sinks, *scales)


def interpret(case: Case, **changes):
    """(output, lse) of the kernels on CPU, races raised."""
    signature = signature_of(case)
    options = SPLIT | {"workers": 3 if signature.head_dim <= 128 else 1}
    config = RaggedPageAttentionv2Config(options=tuple(sorted(options.items())))
    assert pallas_gpu.supports(signature, DEVICE) is None
    inputs = inputs_of(case)._replace(**changes)
    with watched() as kernels:
        run = jax.jit(lambda *args: pallas_gpu.run(Inputs(*args), signature, config))
        output, lse = (np.asarray(x) for x in run(*inputs))
    assert kernels, "no kernel was interpreted"
    assert not any(races.races_found for races in kernels), "the interpreter saw a race: it printed where"
    return output, lse


def prove_kernel(name: str) -> None:
    """The kernels' answer to a poisoned case, judged by the oracle."""
    case = nan_fill(KERNELS[name]())
    output, lse = interpret(case)
    verdict = judge(case, output, Claim(**pallas_gpu.claim(signature_of(case), DEVICE)), lse)
    assert verdict.status == "pass", f"{name}: {verdict.text}"


def prove_invalid() -> None:
    """A bad page id makes its sequence's rows NaN, nobody else's bits change, and nothing outside the pool is read."""
    case = build((70, 9), (130, 9), TILED, **BF16)
    good, _ = interpret(case)
    tables = np.array(case.block_tables)
    tables[0, 2] = 10**9
    bad, lse = interpret(case, block_tables=jnp.asarray(tables))
    assert np.isnan(bad[:70].astype(np.float32)).all(), "rows of the invalid sequence are not NaN"
    assert np.isnan(lse[:70]).all()
    assert bad[70:].tobytes() == good[70:].tobytes(), "another sequence's bits changed"


# ------------------------------------------------------------------ the plans, against the contract


def layouts(count: int):
    """Random metadata, right and wrong: (inputs, shape); 40 rows, 4 sequences, 6 pages of 8 each."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        window = None if seed % 2 else 11
        shape = tiles.Shape(
            tokens=40, q_heads=4, kv_heads=2, head_dim=64, page=8, pages=20, table_width=6, dtype="bfloat16",
            scale=0.1, cap=None, window=window,
        )  # fmt: skip
        offsets = np.sort(random.integers(0, 41, 5))
        context = random.integers(0, 49, 4)
        tables = random.integers(0, 20, (4, 6))
        if seed % 3 == 0:
            offsets = random.integers(-3, 45, 5)
        if seed % 5 == 0:
            tables[random.integers(4), random.integers(6)] = random.choice([-1, 20, 2**31 - 1])
        if seed % 7 == 0:
            context[random.integers(4)] = random.choice([-1, 49, 2**31 - 1])
        ints = [jnp.asarray(x, jnp.int32) for x in (context, tables, offsets, [random.integers(0, 5)])]
        queries = jnp.zeros((40, 4, 64), jnp.bfloat16)
        yield Inputs(queries, jnp.zeros((20, 8, 4, 64), jnp.bfloat16), *ints), shape


def expected(inputs: Inputs, shape: tiles.Shape):
    """Row by row, from `rpa.layout`: owner (1 valid, 2 invalid, 0 nobody), sequence, position."""
    case_shape: dict[str, Any] = dict(num_tokens=40, num_pages=20, page_size=8, max_seqs=4, pages_per_seq=6)
    rest: dict[str, Any] = {f.name: None for f in dataclasses.fields(Signature)} | {"sliding_window": shape.window}
    ragged = layout.sanitize(inputs, Signature(**rest | case_shape))
    owner, sequence, position = np.zeros(40, int), np.zeros(40, int), np.full(40, -1)
    for s in range(4):
        start, stop, bad = (int(x[s]) for x in (ragged.start, ragged.stop, ragged.bad_stop))
        owner[start:stop], sequence[start:stop] = 1, s
        position[start:stop] = np.maximum(int(ragged.context[s]) - stop + np.arange(start, stop), -1)
        owner[start:bad] = 2
    return owner, sequence, position


def metadata(inputs: Inputs) -> rows.Metadata:
    return rows.Metadata(inputs.context_lens, inputs.block_tables, inputs.query_start_loc, inputs.num_seqs)


def astray(inputs: Inputs, shape: tiles.Shape) -> np.ndarray:
    """bool [S]: sequences that `rpa.layout` calls invalid for a page alone."""
    case_shape: dict[str, Any] = dict(num_tokens=40, num_pages=20, page_size=8, max_seqs=4, pages_per_seq=6)
    rest: dict[str, Any] = {f.name: None for f in dataclasses.fields(Signature)} | {"sliding_window": shape.window}
    signature = Signature(**rest | case_shape)
    pages = inputs._replace(block_tables=jnp.clip(inputs.block_tables, 0, 19))
    return np.asarray(layout.sanitize(pages, signature).valid & ~layout.sanitize(inputs, signature).valid)


def prove_rows() -> None:
    """The owner that a warp finds for a row, and the rows that fills cover, are the contract's."""

    def found(inputs, shape):
        return jax.vmap(lambda r: rows.row_at(r, metadata(inputs), shape, False))(jnp.arange(40))

    find = jax.jit(found, static_argnums=1)
    plans = jax.jit(lambda i, shape: plan.row_owners(plan.owners(i, shape), 40), static_argnums=1)
    tiling = prefill_work.Tiling(1, 64, 2, 1)

    def listed(inputs, shape):
        return plan.listed(plan.owners(inputs, shape), shape, tiling)[0].told

    tell = jax.jit(listed, static_argnums=1)
    for inputs, shape in layouts(42):
        owner, sequence, position = expected(inputs, shape)
        planned = np.asarray(plans(inputs, shape))
        assert (planned == owner).all(), (planned, owner)
        row = find(inputs, shape)
        by_page = astray(inputs, shape)[np.asarray(row.sequence)]  # what pages are is looked at later
        told = np.where((np.asarray(row.owner) == 1) & by_page, 2, row.owner)
        assert (told == owner).all(), (told, owner)
        assert (np.asarray(row.position) == position)[owner == 1].all(), (row.position, position)
        assert (np.asarray(row.position) == -1)[np.asarray(row.owner) != 1].all()
        assert (np.asarray(row.sequence) == sequence)[owner == 1].all()
        told = np.asarray(tell(inputs, shape))
        _, (start, stop, after, bad) = prefill_work.told(told, 4)
        zero, nan = np.zeros(40, bool), np.zeros(40, bool)
        zero[: start[0]] = zero[after[0] :] = True
        for s in range(4) if bad[0] else ():
            nan[start[s] : stop[s]] = True
        assert (zero == (owner == 0)).all(), (told, owner)
        assert (nan == (owner == 2)).all(), (told, owner)


def prove_tiles() -> None:
    """Prefill tiles hold every row of every sequence they serve once, with its position."""

    def listed(inputs, shape, tiling, shortest):
        decoding = None if shortest == 1 else decode.Tiling(4, 64, 2, 64, 1, 1, 1, singles=True)
        return plan.listed(plan.owners(inputs, shape), shape, tiling, decoding)[0]

    find = jax.jit(listed, static_argnums=(1, 2, 3))
    for shortest in (1, 2):
        for inputs, shape in layouts(30):
            small = dataclasses.replace(shape, window=None)
            tiling = prefill_work.Tiling(1, 64, 2, 1)
            tiling = tiling._replace(tiles=plan.tile_bound(small, 4, tiling.tokens(small), shortest))
            told, fields = find(inputs, small, tiling, shortest)
            owner, sequence, position = expected(inputs, small)
            lengths = np.bincount(sequence[owner == 1], minlength=4)
            served = (owner == 1) & (lengths[sequence] >= shortest)
            seen = np.zeros(40, int)
            for token8, begin, end, first, s, dirty in fields_of(fields, tiling).T[: int(told[3])]:
                for row in range(begin, end):
                    token = token8 * 8 + row
                    seen[token] += 1
                    assert s == sequence[token]
                    assert max(first + row, -1) == position[token]
                # Slots past the context lie in the last page that is loaded.
                assert dirty == (-(-(first + end) // 8) * 8 > int(inputs.context_lens[s]))
            assert (seen == served).all(), (seen, served)


def fields_of(flat, tiling: prefill_work.Tiling) -> np.ndarray:
    """i32 [6, tiles], field by field, from the end of a list."""
    return np.asarray(flat)[-6 * tiling.tiles :].reshape(6, -1)


def owners_of(lengths, contexts) -> plan.Owners:
    """Valid sequences of so many query rows, one after the other."""
    stop, one = np.cumsum(lengths), np.ones(len(lengths), bool)
    return plan.Owners(*map(jnp.asarray, (stop - lengths, stop, contexts, one, one, stop[-1])))


def prove_order() -> None:
    """Every tile is dealt once for each pair of heads; those near one another share keys, and CTAs are even."""
    for seed in range(12):
        random = np.random.default_rng(seed)
        count, heads = int(random.integers(1, 9)), int(random.choice([1, 2, 6, 8]))
        lengths = random.integers(1, 3000, count)
        contexts = lengths + random.integers(0, 30000, count) * (seed % 3 > 0)
        shape = tiles.Shape(
            tokens=int(lengths.sum()), q_heads=4 * heads, kv_heads=heads, head_dim=128, page=16, pages=9,
            table_width=3000, dtype="bfloat16", scale=0.1, cap=None, window=None,
        )  # fmt: skip
        tiling = prefill_work.Tiling(plan.tile_bound(shape, count, 64, 1), 128, 2, 13)
        told, fields = (np.asarray(x) for x in plan.listed(owners_of(lengths, contexts), shape, tiling)[0])
        fields = fields_of(fields, tiling)
        total, pairs = int(told[count - 1]), 2 * heads
        deal = prefill_work.dealt(jnp.asarray(told[: count + 2]))
        place = jax.vmap(functools.partial(prefill_work.place_of, deal=deal, shape=shape, tiling=tiling))
        tile, pair = (np.asarray(x) for x in place(jnp.arange(total * pairs)))
        assert len(set(zip(tile.tolist(), pair.tolist(), strict=True))) == total * pairs
        assert tile.max() < total
        assert pair.max() < pairs
        keys = (fields[3] + fields[2])[tile]
        dealt = [[], *([] for _ in range(12))]
        for i, k in enumerate(keys):
            turn, at = divmod(i, 13)
            dealt[at if turn % 2 == 0 else 12 - at].append(k)
        loads = [sum(x) for x in dealt]
        assert max(loads) <= 1.1 * np.mean(loads) + keys.max(), (seed, loads)
        at_once = int(told[count])
        assert (np.diff(pair // at_once) >= 0).all(), "a group of heads comes twice"
        assert at_once == 2 or contexts.max() * at_once // 2 * 512 <= tiling.near << 20, "a group has no room"


def prove_lanes() -> None:
    """The search as the GPU's lanes run it is the search as the interpreter runs it, for metadata right and wrong."""
    text, find = rows.lanes_text(), jax.jit(rows.search)
    for seed in range(60):
        random = np.random.default_rng(seed)
        sequences = int(random.choice([1, 2, 31, 40, 127, 128, 129, 300]))
        tokens = int(random.integers(1, 400))
        loc = np.sort(random.integers(0, tokens + 1, sequences + 1))
        if seed % 3 == 0:
            loc = np.minimum(np.arange(sequences + 1) + random.integers(0, 2), tokens)
        if seed % 4 == 1:
            loc[random.integers(0, sequences + 1, 2)] = random.choice([-3, tokens + 9, 2**31 - 1, -(2**31)], 2)
        if seed % 4 == 3:
            loc = random.integers(-3, tokens + 5, sequences + 1)
        loc, context = loc.astype(np.int32), random.integers(-5, 2**31 - 1, sequences, dtype=np.int32)
        count = int(random.integers(0, sequences + 1)) if seed % 5 == 0 else sequences
        memory = {1 << 20: loc, 1 << 40: context}
        for row in {0, tokens - 1, *(int(x) for x in random.integers(0, tokens, 5))}:
            want = [int(x) for x in find(jnp.int32(row), jnp.int32(count), jnp.asarray(loc), jnp.asarray(context))]
            inputs = {"$5": row, "$6": count, "$7": sequences, "$8": 1 << 20, "$9": 1 << 40}
            after = ptx.run(text, inputs, memory)
            got = [after[f"${n}"] for n in range(5)]
            assert all((x == x[0]).all() for x in got), "the lanes do not agree"
            assert [int(x[0]) for x in got] == want, (
                seed,
                sequences,
                row,
                count,
                [int(x[0]) for x in got],
                want,
            )


def prove_items() -> None:
    """Decode's items cover every key a row sees once; the split that looks at the other pages finds a bad one."""
    for singles in (False, True):
        count = 4 if singles else 40
        tiling = decode.Tiling(count, 64, 2, 16, 4, 1, 1, singles=singles, lanes=False)

        def items(inputs, shape, tiling=tiling):
            units = None
            if tiling.singles:
                tiles_of = prefill_work.Tiling(9, 64, 2, 1)
                _, found = plan.listed(plan.owners(inputs, shape), shape, tiles_of, tiling)
                units = decode.Listed(found.listed, found.through)
            one = functools.partial(decode_work.item_at, meta=metadata(inputs), units=units, shape=shape, tiling=tiling)
            listed = tiling.units if units is None else units.through[-1]
            return jax.vmap(one)(jnp.arange(tiling.units * shape.kv_heads)), listed

        find = jax.jit(items, static_argnums=1)
        for seed, (inputs, shape) in enumerate(layouts(24)):
            if seed % 2:  # the page of a last key, which a sequence's earlier rows may not see
                column = np.clip(np.asarray(inputs.context_lens) - 1, 0, 47) // 8
                inputs = inputs._replace(block_tables=inputs.block_tables.at[seed % 4, column[seed % 4]].set(-1))
            owner, sequence, position = expected(inputs, shape)
            lengths = np.bincount(sequence[owner == 1], minlength=4)
            items_, listed = find(inputs, shape)
            item = SimpleNamespace(**{k: np.asarray(v) for k, v in items_._asdict().items()})
            if singles:
                item.post = item.post & (np.arange(len(item.index)) < int(listed) * 2)
            covered, splits = np.zeros((2, 40, 64), int), np.zeros((2, 40), int)
            bad = np.zeros((2, 40), bool)
            for i in np.flatnonzero(item.post):
                head, token = i % 2, item.token[i]
                begin, stop = max(item.start[i], item.low[i]), item.stop[i]
                covered[head, token, begin : max(stop, begin)] += 1
                assert (item.blocks[i] > 0) == (stop > item.start[i])
                splits[head, token] += 1
                pages = np.asarray(inputs.block_tables)[item.sequence[i], item.start[i] // 8 : -(-stop // 8)]
                bad[head, token] |= item.owner[i] == 2 or item.stray[i] or ((pages < 0) | (pages >= 20)).any()
            for token in range(40):
                mine = owner[token] == 1 and (lengths[sequence[token]] == 1 or not singles)
                low = 0 if shape.window is None else max(position[token] - shape.window + 1, 0)
                want = np.zeros(64, int)
                want[low : position[token] + 1] = mine
                if mine or (not singles and owner[token] == 0):
                    assert (covered[:, token] == want).all(), (token, covered[0, token])
                if not singles:
                    assert (bad[:, token] == (owner[token] == 2)).all(), (token, owner[token])


def prove_places() -> None:
    """Where one buffer is a tile's output by either way out, no warpgroup's place overlaps another's in the other.

    The interpreter gives each way memory of its own, so what the GPU shares is looked at here.
    """
    for d in range(16, 257, 16):
        shape = tiles.Shape(64, 3, 1, d, 8, 20, 6, "float16", 0.1, None, None)
        for memory in (prefill_work.SPARE, prefill_work.SHARED):
            scratch = prefill_work.scratch_types(shape, prefill_work.Tiling(1, 64, 2, 1, memory=memory))
            union: Any = scratch.q if memory == prefill_work.SHARED else scratch.out
            assert len({int(np.prod(ref.shape[1:])) for ref in union.refs}) == 1, (d, [r.shape for r in union.refs])
            whole, padded = (ref.shape[1] for ref in union.refs)
            assert whole % 8 == 0, "a swizzle repeats every eight rows"
            assert min(whole, padded) >= prefill_work.M


def prove_combine() -> None:
    """Splits of exact numbers join exactly; what dead items hold does not matter; nobody's rows are 0, bad ones NaN."""
    random = np.random.default_rng(0)
    shape = tiles.Shape(4, 4, 2, 64, 8, 20, 6, "bfloat16", 0.1, None, None)
    tiling = decode.Tiling(4, 64, 2, 16, 20, 1, 1)  # more splits than are loaded together
    live = np.asarray([20, 1, 0, 2], np.int32)
    acc = random.integers(-2, 2, (20, 4, 2, 64, 8)).astype(np.float32)
    m = np.zeros((20, 4, 2, 8), np.float32)
    m[1, ..., 1::2] = -300.0  # weights are exactly 1, and 0 here
    for aux in (None, jnp.zeros(8)):
        l = np.ones((20, 4, 2, 8), np.float32)  # all totals are powers of two, so that quotients are exact
        l[2, ..., 0::2] += 12 - (aux is not None)
        l[2, ..., 1::2] += 13 - (aux is not None)
        l[0, 3] = np.nan
        for split, row in ((c, r) for r in range(4) for c in range(live[r], 20)):
            acc[split, row] = m[split, row] = l[split, row] = np.nan
        parts = decode.Outputs(
            acc=acc.reshape(-1, 64, 8), m=m.reshape(-1, 8), l=l.reshape(-1, 8), live=jnp.asarray(live)
        )
        parts = decode.Outputs(*(None if x is None else jnp.asarray(x) for x in parts))
        with watched() as kernels:
            run = jax.jit(lambda parts, aux: combine.combine(parts, aux, shape, tiling, True))
            out, lse = (np.asarray(x, np.float32) for x in run(parts, aux))
        assert [races.races_found for races in kernels] == [False]
        for row in (0, 1):
            for head in range(4):
                h, g = divmod(head, 2)
                column = 2 * h + g  # of the eight heads that both groups load
                weight = (m[: live[row], row, h, column] == 0).astype(np.float32)
                total = (weight * l[: live[row], row, h, column]).sum() + np.float32(aux is not None)
                want = (weight[:, None] * acc[: live[row], row, h, :, column]).sum(0) / total
                assert (out[row, head] == want).all(), (row, head, out[row, head], want)
        assert (out[2] == 0).all()
        assert (lse[2] == -np.inf).all()
        assert np.isnan(out[3]).all()
        assert np.isnan(lse[3]).all()


def prove_stray() -> None:
    """A bad page makes a decode row NaN whichever split meets it, and changes nobody else's bits."""
    for name in ("decode_group_8", "decode_long"):  # pages looked up with the row, and on the way
        case = KERNELS[name]()
        good, _ = interpret(case)
        tables = np.array(case.block_tables)
        tables[1, 1] = -1  # the second sequence's row; its keys reach page 2
        bad, lse = interpret(case, block_tables=jnp.asarray(tables))
        assert np.isnan(bad[1].astype(np.float32)).all(), "the row of the invalid sequence is not NaN"
        assert np.isnan(lse[1]).all()
        others = [0, *range(2, len(good))]
        assert bad[others].tobytes() == good[others].tobytes(), "another row's bits changed"


PROOFS: dict[str, Callable[[], None]] = {
    "rows": prove_rows,
    "tiles": prove_tiles,
    "order": prove_order,
    "items": prove_items,
    "lanes": prove_lanes,
    "places": prove_places,
    "combine": prove_combine,
    "stray": prove_stray,
    "invalid": prove_invalid,
    **{name: (lambda name=name: prove_kernel(name)) for name in KERNELS},
}

if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        PROOFS[wanted]()
        print("holds:", wanted, flush=True)
