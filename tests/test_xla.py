"""What is the XLA backend's own: how many programs, how much work, how much memory, which blocks, whose bits."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract_cases import MIXED, Shape, build

from fuzz import sweep
from fuzz.targets import load
from oracle import judge
from oracle.poison import large_fill, nan_fill
from rpa import RaggedPageAttentionv2Config, api, device, numerics, ragged_page_attention_v2
from rpa.backends import xla

# Small blocks, so that small cases have many: 2 pages a block, tiles of 8 and 2 rows.
BLOCKS = RaggedPageAttentionv2Config(
    num_kv_pages_per_block=2,
    num_queries_per_block=8,
    platform="xla",
    options=(("decode_pages", 1), ("short_rows", 2)),
)
LONG = ((21, 1, 3, 0, 1, 5), (60, 64, 33, 9, 5, 5))  # every tile shape, several blocks each
WIDE = Shape(rows=36, seqs=8, pages_per_seq=17, pages=60)


def program(cfg=BLOCKS, **options):
    """The public call, every array traced."""
    return jax.jit(partial(ragged_page_attention_v2, platform="xla", cfg=cfg, return_lse=True, **options))


def arrays(case) -> list:
    return [None if a is None else jnp.asarray(a) for a in case.arrays]


def call(case, cfg=BLOCKS, runs=None):
    """Output and lse as NumPy; `runs` takes a program to share."""
    output, lse = (runs or program(cfg, **case.options))(*arrays(case))
    return np.asarray(output), np.asarray(lse)


def assert_judged(case, output, lse):
    verdict = judge(case, output, load("xla").claim(case), lse)
    assert verdict.status == "pass", verdict.text


def bits(results) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in results]


# ------------------------------------------------------------------ one program, every layout


def test_one_program_serves_every_layout():
    traces = []
    base = build(*LONG, WIDE)

    @jax.jit
    def counted(*a):
        traces.append(a)
        return ragged_page_attention_v2(*a, platform="xla", cfg=BLOCKS, return_lse=True, **base.options)

    layouts = [
        LONG,
        ((36,), (68,)),
        ((1,) * 8, (68, 1, 2, 3, 4, 5, 6, 7)),
        ((), ()),
        ((0, 7), (0, 7)),
        ((9, 9, 9, 9),) * 2,
    ]
    for queries, contexts in layouts:
        case = nan_fill(build(queries, contexts, WIDE))
        assert_judged(case, *call(case, runs=counted))
    assert len(traces) == 1


# ------------------------------------------------------------------ blocks


@pytest.mark.parametrize(
    ("pages", "rows", "short", "decode"),
    [(1, 1, 1, 1), (3, 5, 3, 2), (4, 64, 16, 8), (17, 36, 1, 17), (99, 256, 8, 99)],
)
def test_every_block_size_keeps_the_claim(pages, rows, short, decode):
    options = (("decode_pages", decode), ("short_rows", short))
    cfg = RaggedPageAttentionv2Config(pages, rows, platform="xla", options=options)
    case = nan_fill(build(*LONG, WIDE, sinks=True, sliding_window=19, logits_soft_cap=6.0))
    assert_judged(case, *call(case, cfg))


def test_candidates_lower_to_distinct_programs():
    shape = Shape(rows=512, seqs=8, pages_per_seq=128, pages=300, page=16, q_heads=8, head_dim=64)
    case = build((300, 1), (1500, 2000), shape)
    inputs, signature = prepared(case)
    texts = {
        jax.jit(partial(xla.run, signature=signature, config=cfg)).lower(inputs).as_text()
        for cfg in xla.BACKEND.candidates(signature, device.current())
    }
    assert len(texts) == len(xla.BACKEND.candidates(signature, device.current())) > 3
    assert xla.BACKEND.heuristic(signature, device.current()) in xla.BACKEND.candidates(signature, device.current())


def prepared(case):
    """The backend's own arguments."""
    options = (*(case.options.get(n) for n in ("softmax_scale", "logits_soft_cap", "compute_dtype")), False,
               case.sliding_window, None, None, False)  # fmt: skip
    return api.prepare((*case.arrays, None, None), options, False)


@pytest.mark.parametrize("short", [1, 2, 3, 16])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 24, 64])
def test_tiles_cover_each_row_of_a_query_once(rows, short):
    _, signature = prepared(build(*LONG, WIDE))
    shapes = xla.tiles(signature, BLOCKS.replace(num_queries_per_block=rows, options={"short_rows": short}))
    assert max(tile.rows for tile in shapes) == min(max(rows, 1), WIDE.rows)
    for length in range(1, WIDE.rows + 1):
        left, taken = length, []
        for tile in shapes:
            spare = left % tile.rows
            share = left if spare > tile.spare else left - spare
            taken += [tile.rows] * -(-share // tile.rows)
            left -= share
        assert left == 0
        assert sum(taken) - length < rows, "more padding than a tile"
        assert taken == [1] if length == 1 else True, "a decode row pays for a larger tile"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"options": {"warp_rows": 2}}, "warp_rows"),
        ({"options": {"short_rows": 0}}, "short_rows"),
        ({"num_kv_splits": 4}, "num_kv_splits"),
    ],
)
def test_a_config_that_xla_cannot_honour_is_refused(changes, named):
    with pytest.raises(ValueError, match=rf"{named}.*xla"):
        call(build(*MIXED), BLOCKS.replace(**changes))


# ------------------------------------------------------------------ work


@pytest.fixture
def visits(monkeypatch):
    """A function of a layout: the (tile rows, pages) of every block that a program visits while it runs."""
    seen, programs = [], {}
    original = xla._load_block

    def counting(tile, *args):
        jax.debug.callback(lambda: seen.append((tile.rows, tile.pages)))
        return original(tile, *args)

    def count(queries, contexts, **options) -> list:
        inputs, signature = prepared(build(queries, contexts, WIDE, **options))
        seen.clear()
        run = programs.setdefault(signature, jax.jit(partial(xla.run, signature=signature, config=BLOCKS)))
        jax.block_until_ready(run(inputs))
        jax.effects_barrier()
        return sorted(seen)

    monkeypatch.setattr(xla, "_load_block", counting)
    return count


def test_work_is_the_live_tokens(visits):
    decode, short, tile = (1, 1), (2, 1), (8, 2)  # rows, pages of 4 keys
    # Decode tokens of 40 keys read 10 blocks each, in tiles of one row, and nothing else runs.
    assert visits((1,) * 6, (40,) * 6) == [decode] * 60
    # Dead sequences, sequences without queries and an empty batch visit nothing.
    assert visits((1, 0, 0), (4, 60, 60)) == [decode]
    assert visits((), ()) == []
    # Keys past the causal edge: 16 rows from position 0 end at keys 8 and 16, blocks of 8.
    assert visits((16,), (16,)) == [tile] * 3
    # A remainder of three rows is a short tile and a row, not another large tile.
    assert visits((3,), (3,)) == [decode, short]
    # Rows without a key cost no block.
    assert visits((3, 1), (0, 4)) == [decode]


def test_keys_before_the_window_cost_nothing(visits):
    # The token at 59 sees keys 52..59: pages 13 and 14 of 4.
    assert visits((1,), (60,), sliding_window=8) == [(1, 1)] * 2
    # Rows 52..59 see keys 45..59; the blocks of 2 pages start at page 11.
    assert visits((8,), (60,), sliding_window=8) == [(8, 2)] * 2


# ------------------------------------------------------------------ memory


def compiled(rows: int, context: int, heads=(32, 8, 128), seqs: int = 1, dtype="float32"):
    """A program of a large model, compiled from shapes alone."""
    q_heads, kv_heads, dim = heads
    pages = context // 16
    shapes = [((rows, q_heads, dim), dtype), ((pages * seqs, 16, 2 * kv_heads, dim), dtype), ((seqs,), "int32"),
              ((seqs, pages), "int32"), ((seqs + 1,), "int32"), ((1,), "int32")]  # fmt: skip
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.jit(partial(ragged_page_attention_v2, compute_dtype=dtype, platform="xla")).lower(*abstract).compile()


def test_memory_of_a_long_prefill_is_a_few_tiles():
    prefill = compiled(8192, 8192)
    output = 8192 * 32 * 128 * 4
    # Less than one copy of the output: the loops update it in place, and no [T, context] array exists.
    assert prefill.memory_analysis().temp_size_in_bytes < output < 2e9
    assert re.search(r"\[(\d+,)*8192,8192[,\]]", prefill.as_text()) is None


def test_memory_of_a_long_decode_does_not_know_the_context():
    short, long = (compiled(1, n).memory_analysis().temp_size_in_bytes for n in (4096, 131072))
    table = 4 * 131072 // 16
    assert long <= short + 4 * table < 2e9


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fn", "int8", "float16"])
def test_no_pass_over_a_whole_pool(dtype):
    """XLA has no gather of 8-bit floats, and converted every page of the pool, live or not, before the first loop."""
    pages = 1013
    pool = jax.ShapeDtypeStruct((pages, 4, 2, 8), dtype)
    sizes = ((3, 1, 8), "float32"), ((2,), "int32"), ((2, 5), "int32"), ((3,), "int32"), ((1,), "int32")
    queries, *metadata = (jax.ShapeDtypeStruct(*size) for size in sizes)
    scales = {} if dtype == "float16" else {"k_scale": 1.0, "v_scale": 1.0}
    text = program(RaggedPageAttentionv2Config(platform="xla"), **scales).lower(queries, pool, *metadata).compile()
    whole = re.compile(rf"= \w+\[(\d+,)*{pages}[,\]]")
    alone = [part for part in text.as_text().split("\n\n") if not part.startswith(("%fused", "%wrapped"))]
    made = [line for part in alone for line in part.splitlines() if whole.search(line)]
    assert made  # the pool itself, at least
    assert {re.search(r"\} ([\w-]+)\(", line)[1] for line in made} <= {"parameter", "get-tuple-element", "bitcast"}


# ------------------------------------------------------------------ whose bits


def test_a_sequence_keeps_its_bits_wherever_it_stands():
    queries, contexts = LONG
    case = build(queries, contexts, WIDE, compute_dtype="bfloat16")
    runs = program(**case.options)
    together = call(case, runs=runs)
    starts = np.cumsum([0, *queries])
    for s, length in enumerate(queries):
        for shift in (0, 36 - length):  # at the first row, and against the end of the queries
            alone = moved(case, s, starts[s], length, shift)
            output, lse = call(alone, runs=runs)
            assert bits((output[shift : shift + length], lse[shift : shift + length])) == bits(
                x[starts[s] : starts[s + 1]] for x in together
            )


def moved(case, s: int, start: int, length: int, shift: int):
    """Sequence `s` alone, its rows at `shift`, in the same static shapes."""
    q = np.zeros_like(case.queries)
    q[shift : shift + length] = case.queries[start : start + length]
    offsets = np.full_like(case.query_start_loc, -7)
    offsets[:2] = shift, shift + length
    lens, tables = np.array(case.context_lens), np.array(case.block_tables)
    lens[0], tables[0] = case.context_lens[s], case.block_tables[s]
    return case.replace(queries=q, query_start_loc=offsets, context_lens=lens, block_tables=tables, num_seqs=1)


def test_page_ids_and_unread_slots_change_no_bit():
    case = build(*LONG, WIDE, sliding_window=13)
    runs = program(**case.options)
    expected = bits(call(case, runs=runs))
    assert bits(call(nan_fill(case), runs=runs)) == expected
    assert bits(call(large_fill(case), runs=runs)) == expected
    order = np.random.default_rng(3).permutation(WIDE.pages).astype(np.int32)
    pages = np.empty_like(case.kv_pages)
    pages[order] = case.kv_pages
    tables = np.array(case.block_tables)
    inside = (tables >= 0) & (tables < WIDE.pages)
    tables[inside] = order[tables[inside]]
    assert bits(call(case.replace(kv_pages=pages, block_tables=tables), runs=runs)) == expected


def test_options_that_say_nothing_change_no_bit():
    case = build(*LONG, WIDE, compute_dtype="bfloat16")
    expected = bits(call(case))
    longest = max(LONG[1])
    silent = np.full(WIDE.q_heads, -np.inf, np.float32)
    assert bits(call(case.replace(sliding_window=longest, softmax_aux=silent))) == expected


def test_an_invalid_sequence_is_nan_and_its_neighbours_keep_their_bits():
    case = build(*LONG, WIDE)
    runs = program(**case.options)
    output, lse = call(case, runs=runs)
    starts = np.cumsum([0, *LONG[0]])
    tables, lens = np.array(case.block_tables), np.array(case.context_lens)
    tables[0, 3], lens[2] = 2**31 - 1, WIDE.pages_per_seq * WIDE.page + 1
    bad_output, bad_lse = call(case.replace(block_tables=tables, context_lens=lens), runs=runs)
    wrong = np.zeros(WIDE.rows, bool)
    for s in (0, 2):
        wrong[starts[s] : starts[s + 1]] = True
    assert np.isnan(bad_output[wrong]).all()
    assert np.isnan(bad_lse[wrong]).all()
    assert bits((bad_output[~wrong], bad_lse[~wrong])) == bits((output[~wrong], lse[~wrong]))


def test_one_page_may_stand_in_many_tables():
    case = build(*LONG, WIDE)
    tables = np.array(case.block_tables)
    tables[1, :16] = tables[0, :8].repeat(2)  # shared with another sequence, and twice in one table
    case = case.replace(block_tables=tables)
    assert_judged(case, *call(case))


# ------------------------------------------------------------------ programs


def test_float32_dots_ask_for_full_precision():
    """A GPU or a TPU would else take tf32 or bf16 passes; a CPU cannot show it, the program does."""
    for dtype, wanted in (("float32", "HIGHEST"), ("bfloat16", "DEFAULT")):
        inputs, signature = prepared(build(*MIXED, compute_dtype=dtype))
        lowered = jax.jit(partial(xla.run, signature=signature, config=BLOCKS)).lower(inputs).as_text()
        dots = re.findall(r"dot_general.*precision = \[(\w+), (\w+)\].*-> tensor<[\dx]*x(\w+)>", lowered)
        assert dots, "the program has no dots to look at"
        assert set(dots) == {(wanted, wanted, "f32")}


def test_loops_run_inside_shard_map_with_its_checks():
    spec, heads = jax.sharding.PartitionSpec, jax.sharding.PartitionSpec(None, "heads")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("heads",))
    case = build(*MIXED)
    sharded = jax.shard_map(
        lambda *a: ragged_page_attention_v2(*a, platform="xla", cfg=BLOCKS, return_lse=True, **case.options),
        mesh=mesh,
        in_specs=(heads, spec(None, None, "heads"), *[spec()] * 4),
        out_specs=heads,
    )
    output, lse = jax.jit(sharded)(*arrays(case)[:6])
    assert_judged(case, np.asarray(output), np.asarray(lse))


@pytest.mark.slow
def test_a_pool_of_more_than_two_to_the_31_elements():
    shape = Shape(rows=4, seqs=2, pages_per_seq=4, pages=8, page=16, head_dim=128)
    case = build((3, 1), (40, 64), shape, kv_dtype="int8", k_scale=0.05, v_scale=0.05)
    element = 16 * 4 * 128
    far = 2**31 // element + 3
    pages = np.zeros((far + 8, 16, 4, 128), np.int8)
    pages[-8:] = case.kv_pages
    tables = np.array(case.block_tables)
    tables[(tables >= 0) & (tables < 8)] += far
    moved_far = case.replace(kv_pages=pages, block_tables=tables)
    assert bits(call(moved_far)) == bits(call(case))


# ------------------------------------------------------------------ the claim


def broken_figures(figures) -> list[str]:
    row = numerics.measured(device.current())
    return [why for figure in figures if (why := sweep.broken(figure, row))]


def test_the_device_keeps_the_functions_its_claim_rests_on():
    figures = [sweep.function_figure(function, 1 << 20) for function in sweep.FUNCTIONS]
    figures += [sweep.divide_figure(1 << 20), sweep.rounding_figure("bfloat16"), sweep.rounding_figure("float16")]
    assert not broken_figures(figures)


@pytest.mark.parametrize("dtype", sweep.OPERANDS)
def test_the_device_keeps_the_accumulation_its_claim_rests_on(dtype):
    assert not broken_figures([sweep.dot_figure(dtype, 128, 4, (2, 2)), sweep.dot_figure(dtype, 256, 4, (2, 1))])


def test_a_sweep_sees_an_accumulator_that_is_too_short(monkeypatch):
    def lossy(a, b, contract, compute_dtype):
        terms = jnp.moveaxis(a, contract[0], -1)[:, :, None] * jnp.moveaxis(b, contract[1], -1)[:, None]
        return jnp.sum(terms.astype(jnp.bfloat16), axis=-1, dtype=jnp.bfloat16).astype(jnp.float32)

    monkeypatch.setattr(xla, "dot", lossy)
    assert broken_figures([sweep.dot_figure("bfloat16", 16, 1, (2, 2))])
