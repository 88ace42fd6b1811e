"""The proofs of the Hopper kernel that need no GPU: its plans against the contract, its kernels in the interpreter.

`python tests/mgpu_proofs.py NAME...` runs proofs by name in a process of its own and fails on the first that does not
hold. A process of its own, because the interpreter runs every warpgroup as a thread that may block, so XLA must be told
before it starts that there are more threads than this machine has cores (`NPROC`), or it waits for itself for ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

if __name__ == "__main__":
    os.environ["NPROC"] = "32"
    os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from contract_cases import Shape, build
from jax.experimental.pallas import mosaic_gpu as plgpu

from oracle import Case, Claim, judge
from oracle.poison import nan_fill
from rpa import layout
from rpa.backends import pallas_gpu
from rpa.backends.pallas_gpu import combine, decode, plan, prefill, tiles
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.signature import Inputs, Signature

DEVICE = Device("gpu", "NVIDIA H100", (9, 0), interpreted=True)
SPLIT = (("ctas", 1), ("least_chunk", 64))  # one CTA, so that each worker runs several items
SMALL = Shape(rows=6, seqs=5, pages_per_seq=24, pages=60, page=8, q_heads=4, kv_heads=2, head_dim=64)
TILED = dataclasses.replace(SMALL, rows=136, seqs=2, q_heads=2, kv_heads=1, head_dim=16)
BOTH = dataclasses.replace(SMALL, rows=40, q_heads=2, kv_heads=1)
BF16 = {"dtype": "bfloat16", "compute_dtype": "bfloat16"}
EDGES = {"sliding_window": 37, "logits_soft_cap": 5.0, "sinks": True}
KERNELS: dict[str, Callable[[], Case]] = {
    "decode": lambda: build((1, 1, 1, 2), (70, 190, 0, 5), SMALL, amplitude=3.0, **BF16),
    "decode_edges": lambda: build((1, 1, 1, 2), (70, 190, 0, 5), SMALL, **EDGES, **BF16),
    "decode_group_8": lambda: build(
        (1, 1), (70, 130), dataclasses.replace(SMALL, q_heads=8, kv_heads=1, page=64, pages_per_seq=3), **BF16
    ),
    "decode_head_256": lambda: build(
        (1,), (70,), dataclasses.replace(SMALL, rows=1, seqs=1, head_dim=256, kv_heads=1), **BF16
    ),
    "prefill": lambda: build((70, 9), (130, 9), TILED, **BF16),
    "prefill_edges": lambda: build((70, 9), (130, 9), TILED, **EDGES, **BF16),
    "prefill_odd_group": lambda: build(
        (130,),
        (131,),
        dataclasses.replace(TILED, q_heads=3),
        first_row=3,
        dtype="float16",
        compute_dtype="float16",
    ),
    "mixed": lambda: build((5, 1, 20, 1), (70, 190, 20, 33), BOTH, **BF16),
    "mixed_edges": lambda: build((5, 1, 20, 1), (70, 190, 20, 33), BOTH, **EDGES, **BF16),
}


# ------------------------------------------------------------------ the kernels, interpreted


def signature_of(case: Case, lse: bool = True) -> Signature:
    tokens, heads, dim = case.queries.shape
    pages, page, combined, _ = case.kv_pages.shape
    sequences, width = case.block_tables.shape
    window, dtype = case.sliding_window, str(case.queries.dtype)
    return Signature(
        num_tokens=tokens, num_q_heads=heads, head_dim=dim, num_pages=pages, page_size=page,
        num_kv_heads=combined // 2, max_seqs=sequences, pages_per_seq=width, q_dtype=dtype, kv_dtype=dtype,
        compute_dtype=dtype, sinks=case.softmax_aux is not None, k_scale=False, v_scale=False, return_lse=lse,
        optimized=False, softmax_scale=float(case.softmax_scale or dim**-0.5), logits_soft_cap=case.logits_soft_cap,
        sliding_window=None if window is None or window >= width * page else window, vmem_limit_bytes=None,
    )  # fmt: skip


def inputs_of(case: Case) -> Inputs:
    arrays = (case.queries, case.kv_pages, case.context_lens, case.block_tables, case.query_start_loc)
    count = jnp.asarray(case.num_seqs, jnp.int32).reshape(1)
    sinks = None if case.softmax_aux is None else jnp.asarray(case.softmax_aux, jnp.float32)
    return Inputs(*(jnp.asarray(a) for a in arrays), count, sinks)


def interpret(case: Case, **changes):
    """(output, lse) of the kernels on CPU, races raised."""
    signature = signature_of(case)
    config = RaggedPageAttentionv2Config(options=SPLIT)
    assert pallas_gpu.supports(signature, DEVICE) is None
    inputs = inputs_of(case)._replace(**changes)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        run = jax.jit(lambda *args: pallas_gpu.run(Inputs(*args), signature, config))
        output, lse = run(*inputs)
        return np.asarray(output), np.asarray(lse)


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
    case_shape = dict(num_tokens=40, num_pages=20, page_size=8, max_seqs=4, pages_per_seq=6)
    rest = {f.name: None for f in dataclasses.fields(Signature)} | {"sliding_window": shape.window}
    ragged = layout.sanitize(inputs, Signature(**rest | case_shape))
    owner, sequence, position = np.zeros(40, int), np.zeros(40, int), np.full(40, -1)
    for s in range(4):
        start, stop, bad = (int(x[s]) for x in (ragged.start, ragged.stop, ragged.bad_stop))
        owner[start:stop], sequence[start:stop] = 1, s
        position[start:stop] = np.maximum(int(ragged.context[s]) - stop + np.arange(start, stop), -1)
        owner[start:bad] = 2
    return owner, sequence, position


def prove_rows() -> None:
    """Decode rows, and the rows that nobody's and invalid sequences' fills cover, are the contract's."""
    find = jax.jit(lambda i, shape: plan.decode_rows(plan.owners(i, shape), 40), static_argnums=1)
    fill = jax.jit(lambda i, shape: plan.fills(plan.owners(i, shape), 40), static_argnums=1)
    for inputs, shape in layouts(42):
        owner, sequence, position = expected(inputs, shape)
        token, at, where, whose = np.asarray(find(inputs, shape))
        assert (token == np.arange(40)).all()
        assert (whose == owner).all(), (whose, owner)
        assert (np.maximum(where, -1) == position).all(), (where, position)
        assert (at == sequence)[owner == 1].all()
        fills = np.asarray(fill(inputs, shape))
        zero, nan = np.zeros(40, bool), np.zeros(40, bool)
        zero[: fills[0]] = zero[fills[1] :] = True
        for start, stop in fills[4:].reshape(-1, 2) if fills[2] else ():
            nan[start:stop] = True
        assert (zero == (owner == 0)).all(), (fills, owner)
        assert (nan == (owner == 2)).all(), (fills, owner)


def prove_tiles() -> None:
    """Prefill tiles hold every row of every sequence they serve once, with its position, most keys first."""

    def listed(inputs, shape, tiling, shortest):
        return plan.prefill_tiles(plan.owners(inputs, shape), shape, tiling, shortest)

    find = jax.jit(listed, static_argnums=(1, 2, 3))
    for shortest in (1, 2):
        for inputs, shape in layouts(30):
            small = dataclasses.replace(shape, window=None)
            tiling = prefill.Tiling(1, 64, 2, 1)
            tiling = tiling._replace(tiles=plan.tile_bound(small, 4, tiling.tokens(small), shortest))
            count, fields = find(inputs, small, tiling, shortest)
            owner, sequence, position = expected(inputs, small)
            lengths = np.bincount(sequence[owner == 1], minlength=4)
            served = (owner == 1) & (lengths[sequence] >= shortest)
            seen, last = np.zeros(40, int), 2**30
            for token8, begin, end, first, s in np.asarray(fields).T[: int(count[0])]:
                for row in range(begin, end):
                    token = token8 * 8 + row
                    seen[token] += 1
                    assert s == sequence[token]
                    assert max(first + row, -1) == position[token]
                assert first + end <= last, "tiles are not in order"
                last = first + end
            assert (seen == served).all(), (seen, served)


def prove_units() -> None:
    """The splits of decode rows cover every key a row sees once, live lists and full ones alike."""
    tiling = decode.Tiling(40, 64, 2, 16, 4, 1, 1)

    def both(inputs, shape):
        rows = plan.decode_rows(plan.owners(inputs, shape), 40)
        return rows, (plan.units_of_rows(rows, shape, tiling), plan.live_units(rows, shape, tiling))

    find = jax.jit(both, static_argnums=1)
    for inputs, shape in layouts(16):
        rows, several = find(inputs, shape)
        rows = np.asarray(rows)
        for units in several:
            fields, covered = np.asarray(units.fields), np.zeros((40, 64), int)
            for token, _, position, split, _ in fields.T[: fields[4, 0]]:
                low = 0 if shape.window is None else max(position - shape.window + 1, 0)
                start = low // 8 * 8 + split * 16
                covered[token, max(start, low) : max(min(position + 1, start + 16), 0)] += 1
                if units.first is not None:
                    assert fields[3, int(units.first[token]) + split] == split
            for token in range(40):
                position = int(rows[2, token])
                low = 0 if shape.window is None else max(position - shape.window + 1, 0)
                want = np.zeros(64, int)
                want[low : position + 1] = 1
                assert (covered[token] == want).all(), (token, position, covered[token])


def prove_combine() -> None:
    """Splits of exact numbers join exactly; what dead units hold does not matter; nobody's rows are 0, bad ones NaN."""
    random = np.random.default_rng(0)
    shape = tiles.Shape(4, 4, 2, 64, 8, 20, 6, "bfloat16", 0.1, None, None)
    tiling = decode.Tiling(4, 64, 2, 16, 3, 1, 1)
    rows = jnp.asarray([[0, 1, 2, 3], [0, 1, 2, 3], [40, 9, -1, -1], [1, 1, 0, 2]], jnp.int32)
    acc = random.integers(-8, 8, (3, 4, 2, 64, 8)).astype(np.float32)
    m = np.zeros((3, 4, 2, 8), np.float32)
    m[1, :, :, 1] = -300.0  # weights are exactly 1, and 0 here
    for aux in (None, jnp.zeros(4)):
        l = np.ones((3, 4, 2, 8), np.float32)  # all totals are powers of two, so that quotients are exact
        l[2, ..., 0] += aux is None
        l[2, ..., 1] += aux is not None
        for split, row in ((1, 1), (2, 1), *((c, r) for c in range(3) for r in (2, 3))):
            acc[split, row] = m[split, row] = l[split, row] = np.nan
        units = plan.units_of_rows(rows, shape, tiling)
        flat = (acc.reshape(-1, 64, 8), m.reshape(-1, 8), l.reshape(-1, 8))
        out, lse = combine.combine([jnp.asarray(x) for x in flat], rows, units, aux, shape, tiling)
        out, lse = np.asarray(out), np.asarray(lse)
        for row, live in ((0, 3), (1, 1)):
            for head in range(4):
                h, g = divmod(head, 2)
                weight = (m[:live, row, h, g] == 0).astype(np.float32)
                total = (weight * l[:live, row, h, g]).sum() + np.float32(aux is not None)
                want = (weight[:, None] * acc[:live, row, h, :, g]).sum(0) / total
                assert (out[row, head] == want).all(), (row, head, out[row, head], want)
        assert (out[2] == 0).all()
        assert (lse[2] == -np.inf).all()
        assert np.isnan(out[3]).all()
        assert np.isnan(lse[3]).all()


PROOFS: dict[str, Callable[[], None]] = {
    "rows": prove_rows,
    "tiles": prove_tiles,
    "units": prove_units,
    "combine": prove_combine,
    "invalid": prove_invalid,
    **{name: (lambda name=name: prove_kernel(name)) for name in KERNELS},
}

if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        PROOFS[wanted]()
        print("holds:", wanted, flush=True)
