"""Which kernels a call runs and with which tile shapes: static shapes and the config decide, never the batch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from rpa.backends.pallas_gpu import decode, plan, prefill_work
from rpa.backends.pallas_gpu.tiles import Shape, piece
from rpa.config import RaggedPageAttentionv2Config
from rpa.signature import Signature

SMS = 132  # of an H100 or H200 SXM; on fewer, the CTAs of the persistent grids queue, on more some SMs idle
SMEM = 227 * 1024
RESERVED = 6 * 1024  # barriers and the reductions' scratch
NARROW = ("float8_e4m3fn", "float8_e5m2", "int8")  # pages that are converted on their way into a product
LONG = 64  # mean query length from which every sequence takes the prefill role
OPTIONS = (
    "ahead", "apart", "consumer_registers", "ctas", "decode_block", "decode_stages", "fetch", "fresh", "least_chunk",
    "mixed_block", "mixed_chunk", "mixed_queries", "mixed_registers", "mixed_stages", "more", "near", "packed",
    "peek", "prefill_block", "prefill_raw", "prefill_stages", "producer_registers", "queries", "teams", "turns", "wgs",
    "workers",
)  # fmt: skip


class Program(NamedTuple):
    """The kernels of one signature; at least one of the two."""

    decode: decode.Tiling | None
    prefill: prefill_work.Tiling | None
    fused: bool = False  # both in one launch


def shape_of(signature: Signature) -> Shape:
    return Shape(
        tokens=signature.num_tokens,
        q_heads=signature.num_q_heads,
        kv_heads=signature.num_kv_heads,
        head_dim=signature.head_dim,
        page=signature.page_size,
        pages=max(signature.num_pages, 1),
        table_width=signature.pages_per_seq,
        dtype=signature.q_dtype,
        scale=signature.softmax_scale,
        cap=signature.logits_soft_cap,
        window=signature.sliding_window,
        stored=signature.kv_dtype if signature.kv_dtype in NARROW else "",
    )


def program(signature: Signature, config: RaggedPageAttentionv2Config, interpreted: bool) -> Program:
    """Tile shapes from static shapes and the config alone, so that a row's bits depend on nothing else.

    Raises:
        ValueError: an option that this kernel does not know.
    """
    for name, value in config.options:
        if name not in OPTIONS:
            raise ValueError(f"cfg.options {name!r}={value}: the Mosaic GPU backend knows {', '.join(OPTIONS)}")
    shape = shape_of(signature)
    tokens, sequences = signature.num_tokens, signature.max_seqs
    ctas = config.option("ctas", 2 if interpreted else SMS)
    if shape.head_dim % 64:  # decode's second product has the head size as its rows, which wgmma takes by 64
        return Program(None, prefill_tiling(shape, sequences, config, ctas, 1, interpreted))
    if tokens <= 4 * sequences:
        return Program(decode_tiling(shape, tokens, config, ctas)._replace(lanes=not interpreted), None)
    if tokens >= LONG * sequences:
        return Program(None, prefill_tiling(shape, sequences, config, ctas, 1, interpreted))
    return mixed_program(shape, sequences, config, ctas, interpreted)


def decode_tiling(shape: Shape, rows: int, config: RaggedPageAttentionv2Config, ctas: int) -> decode.Tiling:
    """One worker where little is to be done, several where much is; each choice is one that was measured on an H200."""
    items, span = rows * shape.kv_heads, span_of(shape, config.option("decode_block", 64))
    each, wide = -(-items // ctas), shape.columns > 8  # of which three workers have room for one slot each
    # So little that time is latency: wide blocks by one worker, and short splits. One row of 1k, 8 kv heads: 7.1 us,
    # 9.0 with splits of 256 keys in blocks of 64; eight rows 14.2, 15.4 by three workers. By three workers in splits of
    # 512, heads 40/8 took 16.6 instead of 6.7, of 8k 20.8 for 15.2; 28/4, 5 rows of 3000, 21.2 for 15.7; head size 64,
    # 64/8, 9.5 for 5.3.
    little = items <= ctas and span > 512 and items * span <= 1 << 17
    few = little and shape.head_dim in (64, 128) and shape.columns <= 16 and not shape.stored
    # Short rows for every SM, or rows past counting, are best not split, unless that leaves SMs idle. 64 rows of 1k:
    # 67.7 us, 76.4 in halves; 256 of 8k: 1929, 2060 in splits; 64 of 8k on pages of 16: 480, 484 in three splits; of
    # one kv head 256 of 8k: 243, 245 in three. Heads 40/8: 64 rows of 1k 67.2 and 77.4 in halves, 64 of 8k 483 and 494
    # in three splits; 28/4: 32 of 3000 53.4 and 56.1 in three, 96 of 1500 75.9 by three workers and 77.1 by two.
    usual_shape = shape.head_dim == 128 and shape.columns <= 16 and not shape.stored and span > 512
    short = usual_shape and not few and span <= 2048 and 8 * items >= 7 * ctas
    many = usual_shape and (items > ctas or wide) and 10 * items >= 9 * each * ctas
    usual = usual_workers(shape, span, each)
    if few:
        usual = 1
    elif short or many:
        usual = each if short and each in ((2, 3) if wide else (1, 2, 3, 4)) else 2
    block, workers = config.option("decode_block", 128 if few else 64), config.option("workers", usual)
    if few:
        chunk = split(span, items, ctas, block, config, few=True)
    elif (short or many) and not config.num_kv_splits:
        chunk = -(-span // block) * block
    else:
        chunk = split(span, items, workers * ctas, block, config)
    splits = -(-span // chunk)
    if "ctas" not in dict(config.options):
        ctas = even(items * splits, workers, ctas)
    one = decode.Tiling(rows, block, 1, chunk, splits, workers, ctas, joint=not shape.stored)
    most = 8
    if chunk >= span and chunk <= 4 * block and span <= 16 * piece(shape.page, block):
        one, most = one._replace(short=True), max(2, chunk // block)
    several = range(config.option("decode_stages", most), 0, -1)
    fits = (n for n in several if decode_memory(shape, one._replace(stages=n)) <= SMEM)
    stages = next(fits, 0)
    if not stages:
        asked = f"cfg.options 'workers'={workers}, 'decode_block'={block}"
        raise ValueError(f"{asked}: no room in shared memory for a block of head_dim={shape.head_dim} each")
    return one._replace(stages=stages)


def usual_workers(shape: Shape, span: int, each: int) -> int:
    """Warpgroups a CTA with `each` items: a fourth is worth 6 % at head size 64 on long rows.

    Measured: 256 rows of a window of 128 keys 22.6 us by two, 23.7 by three, 23.4 by four, and 64 rows 9.1, 9.3, 9.9;
    64 rows of 8k on int8 431 by two and 522 by three, on e4m3 390 and 358; heads 28/4, 16 rows of 8k 70.0 and 71.7,
    40/8, 24 rows of 5k 125 and 121.
    """
    if shape.head_dim > 128:
        return 1
    if shape.window is not None and span <= 1024:
        return min(each, 2)
    if shape.head_dim * shape.columns > 3072 or shape.stored == "int8":  # large groups: two accumulators need registers
        return 2
    if shape.head_dim == 128 and shape.columns == 16 and not shape.stored and each == 1:
        return 2
    return 4 if shape.head_dim <= 64 and not shape.stored else 3


def even(items: int, workers: int, ctas: int) -> int:
    """CTAs that leave all workers as many items, where that idles few.

    By 128 and by 132 on an H200: 64 rows of 8k 470 us and 481, of 32k 1857 and 1897; 8 rows of 32k 240 and 244.
    """
    each = max(1, -(-items // (workers * ctas)))
    fewer = -(-items // (workers * each))
    return fewer if 16 * fewer >= 15 * ctas else ctas


def split(
    span: int, items: int, workers: int, block: int, config: RaggedPageAttentionv2Config, few: bool = False
) -> int:
    """Keys a split: as many splits as leave the fewest keys to the busiest worker, and few to join.

    Args:
        few: one worker an SM is plenty; splits are short, each begins at the price of 100 keys and is joined for 4.
    """
    most = min(64, max(1, span // config.option("least_chunk", 128 if few else 512)))
    several = [min(config.num_kv_splits, 64)] if config.num_kv_splits else range(1, most + 1)

    def chunk(splits: int) -> int:
        return -(-span // (splits * block)) * block

    def cost(splits: int) -> int:
        real = -(-span // chunk(splits))
        join = 32 * real if not few else 120 + 4 * real if real > 1 else 0
        return -(-real * items // workers) * (chunk(splits) + 100 * few) + join

    return chunk(min(several, key=cost))


def span_of(shape: Shape, block: int) -> int:
    """Keys that a decode row may see."""
    return shape.capacity if shape.window is None else min(shape.capacity, shape.window + piece(shape.page, block) - 1)


def decode_memory(shape: Shape, tiling: decode.Tiling) -> int:
    """Bytes of shared memory of a CTA's decode workers."""
    return footprint(decode.scratch_types(shape, tiling))


def footprint(scratch: Any) -> int:
    """Bytes of shared memory that a tree of scratch takes: every ref starts at a multiple of 1024."""
    leaves = jax.tree.leaves(scratch, is_leaf=lambda x: isinstance(x, (plgpu.Barrier, plgpu.RefUnion)))
    barriers = sum(8 * int(np.prod(x.num_barriers)) for x in leaves if isinstance(x, plgpu.Barrier))
    refs = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves if not isinstance(x, plgpu.Barrier)]
    return barriers + sum(-(-size // 1024) * 1024 for size in refs)


def prefill_tiling(
    shape: Shape,
    sequences: int,
    config: RaggedPageAttentionv2Config,
    ctas: int,
    shortest: int,
    interpreted: bool,
    wgs: int | None = None,
) -> prefill_work.Tiling:
    narrow = shape.head_dim > 128 or (shape.window is not None and shape.window <= 512)
    size = jnp.dtype(shape.dtype).itemsize * shape.head_dim
    if shape.stored:
        return converting_tiling(shape, sequences, config, ctas, shortest, interpreted)
    packed = config.option("packed", packing(shape)) if wgs is None else 0
    if packed:
        return packed_tiling(shape, sequences, config, ctas, shortest, interpreted, packed)
    # Several sequences' tiles at work share few keys: 12 MiB, 845 us against 851 by 24 for 4 x 512 on 16k, pages of 16;
    # one sequence's are best dealt from the longest on. Mixed calls were timed with 24.
    near = 24 if wgs else 12 if sequences > 1 else 0
    # At small head sizes the softmax is most of the work: three warpgroups on a tile fill each other's bubbles, and in
    # a window, where a third of what three see is nobody's, two pairs.
    three = shape.head_dim == 64 and shape.window is None
    three = three and config.option("teams", 1) == config.option("ahead", 1) == 1
    wgs = wgs or config.option("wgs", 3 if three else 2)
    teams = config.option("teams", 2 if shape.head_dim <= 64 and not interpreted and wgs == 2 else 1)
    block = config.option("prefill_block", 64 if narrow or teams == 2 else 128)
    ahead = bool(config.option("ahead", int(teams == 1 and shape.head_dim in (64, 128))))
    if wgs not in (2, 3) or (wgs == 3 and (teams > 1 or not ahead)):
        raise ValueError(f"cfg.options 'wgs'={wgs}: 2, or 3 in one team that multiplies ahead")
    small = piece(shape.page, block) < 64
    # All that the CTA is given at its start must be shared out, no more: 168 a thread of three warpgroups, 128 of four.
    consumer, producer = (160, 32) if wgs == 3 else (112, 32) if teams == 2 else (232, 40) if ahead else (240, 24)
    stages = config.num_stages or config.option("prefill_stages", (4, 3)[teams - 1] if 64 * size <= 8192 else 2)
    more = config.option("more", 0)
    room, ring = (SMEM - (RESERVED if teams > 1 else 2048)) // teams, (2 * stages + more) * block * size
    tile = wgs * prefill_work.place_rows(shape.head_dim)[0] * size  # queries or outputs of one tile
    # With pages of 16 and long tiles a second place for queries was no gain: 925 us against 852 for 1 x 8k.
    early = teams == 2 or not small
    queries = config.option("queries", 2 if early and ring + 2 * tile <= room else 1)
    memory = prefill_work.APART if interpreted else prefill_work.SPARE
    if ring + (queries + 1) * tile > room:
        memory = prefill_work.SHARED
    tiling = prefill_work.Tiling(
        1, block, stages, ctas, fresh=interpreted or bool(config.option("fresh", 0)), staged=interpreted,
        turns=bool(config.option("turns", int(ahead or teams == 1 or not narrow))),
        ahead=ahead, memory=memory,
        registers=(config.option("consumer_registers", consumer), config.option("producer_registers", producer)),
        teams=teams, queries=queries, wgs=wgs, more=more,
        near=config.option("near", near if shape.window is None else 0),
        apart=bool(config.option("apart", int(ahead and small))),
        fetch=bool(config.option("fetch", int(ahead or teams == 2))),
        # Pages of 16: 835 us against 845 with it, 4 x 512 on 16k; of 128: 808 against 795.
        peek=bool(config.option("peek", int(ahead and not small))),
    )  # fmt: skip
    return tiling._replace(tiles=plan.tile_bound(shape, sequences, tiling.tokens(shape), shortest))


WIDEST = 160  # keys whose scores three warpgroups have registers for


def packing(shape: Shape) -> int:
    """Heads that share a warpgroup where a window is so short that all keys its rows see are one product; else 0.

    The more heads, the fewer tokens, and the fewer keys that only some of the rows see.
    """
    return next((n for n in (4, 2, 1) if packs(shape, n)), 0)


def packs(shape: Shape, heads: int) -> bool:
    """Whether `heads` heads can share a warpgroup that sees all its keys at once."""
    short = shape.window is not None and shape.head_dim == 64 and heads in (1, 2, 4) and shape.group % heads == 0
    return short and packed_span(shape, heads) <= WIDEST


def packed_span(shape: Shape, heads: int) -> int:
    """Keys that the rows of a warpgroup may see, `heads` heads sharing it, from a multiple of `ALIGN` on."""
    assert shape.window is not None, "without a window a row sees every key"
    return -(-(prefill_work.M // heads + shape.window - 1 + prefill_work.ALIGN - 1) // 32) * 32


def packed_tiling(
    shape: Shape, sequences: int, config: RaggedPageAttentionv2Config, ctas: int, shortest: int, interpreted: bool,
    heads: int,
) -> prefill_work.Tiling:  # fmt: skip
    """Prefill in a short window: three warpgroups on neighbouring tokens of the same heads, a block for all of them.

    gpt-oss, 8k tokens in a window of 128: 71 us, 97 in an online softmax over blocks of 64 keys.
    """
    if not packs(shape, heads):
        rule = f"1, 2 or 4 heads of a group, of size 64, whose rows see {WIDEST} keys at most"
        raise ValueError(f"cfg.options 'packed'={heads}: {rule}")
    wgs = 3
    block = packed_span(shape, heads) + (wgs - 1) * prefill_work.M // heads
    size = jnp.dtype(shape.dtype).itemsize * shape.head_dim
    tile = wgs * prefill_work.M * size
    queries = config.option("queries", 2)
    most = (SMEM - 4096 - (queries + 1) * tile) // (2 * block * size)
    tiling = prefill_work.Tiling(
        1, block, config.num_stages or config.option("prefill_stages", min(2, most)), ctas, fresh=interpreted,
        staged=interpreted, turns=False, memory=prefill_work.APART if interpreted else prefill_work.SPARE,
        registers=(config.option("consumer_registers", 160), config.option("producer_registers", 32)),
        queries=queries, wgs=wgs, packed=heads, peek=bool(config.option("peek", 0)),
        apart=bool(config.option("apart", 0)),
    )  # fmt: skip
    return tiling._replace(tiles=plan.tile_bound(shape, sequences, tiling.tokens(shape), shortest))


def converting_tiling(
    shape: Shape, sequences: int, config: RaggedPageAttentionv2Config, ctas: int, shortest: int, interpreted: bool
) -> prefill_work.Tiling:
    """Prefill on pages of 8 bits: a ring of what is stored, and a smaller one of what is multiplied."""
    block, size = config.option("prefill_block", 64), jnp.dtype(shape.dtype).itemsize * shape.head_dim
    slot, tile = 2 * block * size, 2 * prefill_work.M * size
    raw = config.option("prefill_raw", 2)
    # Registers as in a mixed call: 72 are left to the warpgroup that converts.
    registers = (config.option("consumer_registers", 208), config.option("producer_registers", 24))
    room = SMEM - RESERVED - raw * slot // 2
    stages = config.num_stages or config.option("prefill_stages", 2 if 2 * slot + tile <= room else 1)
    queries = config.option("queries", 2 if stages * slot + 3 * tile <= room else 1)
    memory = prefill_work.APART if interpreted else prefill_work.SPARE
    if stages * slot + (queries + 1) * tile > room:
        memory = prefill_work.SHARED
    tiling = prefill_work.Tiling(
        1, block, stages, ctas, fresh=interpreted or bool(config.option("fresh", 0)), staged=interpreted,
        turns=bool(config.option("turns", 1)), memory=memory, registers=registers, queries=queries, raw=raw,
    )  # fmt: skip
    return tiling._replace(tiles=plan.tile_bound(shape, sequences, tiling.tokens(shape), shortest))


def mixed_program(
    shape: Shape, sequences: int, config: RaggedPageAttentionv2Config, ctas: int, interpreted: bool
) -> Program:
    """Both roles in one CTA: smaller prefill blocks, one decode worker, registers split between them.

    Head sizes past 192 do not leave room for both rings, nor large groups or a warpgroup that converts pages leave
    registers: there the two kernels run one after the other.
    """
    apart = shape.head_dim > 192 or shape.columns > 16 or shape.stored
    fused = None if apart else fused_program(shape, sequences, config, ctas, interpreted)
    if fused is not None:
        return fused
    whole = prefill_tiling(shape, sequences, config, ctas, 2, interpreted)
    singles = decode_tiling(shape, sequences, config, ctas)
    return Program(singles._replace(singles=True, lanes=not interpreted), whole)


def fused_program(
    shape: Shape, sequences: int, config: RaggedPageAttentionv2Config, ctas: int, interpreted: bool
) -> Program | None:
    """One launch of both roles, or None where decode's ring has no room."""
    # Few kv heads ask little of the bandwidth, and their longest rows decide: wide blocks of prefill, one slot for
    # decode, finer splits. 164.4 us, 179.6 otherwise, with one kv head; 751 and 680 with 8.
    few = sequences * shape.kv_heads <= 2 * ctas and shape.head_dim <= 128 and not interpreted
    block = config.option("mixed_block", 128 if few else 64)
    tiling = prefill_tiling(shape, sequences, config, ctas, 2, interpreted, wgs=2)
    ahead = bool(config.option("ahead", int(shape.head_dim in (64, 128) and not few)))
    loads = {name: bool(config.option(name, 1)) for name in ("apart", "fetch", "peek")}
    tiling = tiling._replace(
        ahead=ahead, **loads,
        block=block, stages=config.option("mixed_stages", 3 if shape.head_dim <= 128 and block == 64 else 2),
        memory=prefill_work.APART if interpreted else prefill_work.SHARED, teams=1,
        queries=config.option("mixed_queries", 1), turns=bool(config.option("turns", 1)),
        registers=(config.option("mixed_registers", 208), config.option("producer_registers", 24)),
    )  # fmt: skip
    span = span_of(shape, 64)
    chunk = max(config.option("mixed_chunk", 1024 if few else 2048), -(-span // (64 * 64)) * 64)
    splits = -(-span // chunk)
    decoding = decode.Tiling(sequences, 64, 8, chunk, splits, 1, ctas, singles=True, lanes=not interpreted)
    free = SMEM - footprint(prefill_work.scratch_types(shape, tiling))
    fits = (n for n in range(8, 0, -1) if decode_memory(shape, decoding._replace(stages=n)) <= free)
    stages = next(fits, 0)
    # With one slot the next keys come while this block's values are at work: 157 us with one kv head, 167 joint.
    decoding = decoding._replace(stages=stages, joint=stages > 1)
    return Program(decoding, tiling, fused=True) if stages else None
