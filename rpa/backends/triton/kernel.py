"""The Triton kernels: one launch answers every row, a second merges the splits of short queries.

A sequence is *short* when its queries fit one narrow tile of `SHORT_Q` tokens (decode, speculative decode); its
keys are cut into splits at boundaries that depend on its own length and on static shapes only. Every other
sequence is cut into tiles of `LONG_Q` tokens, whole key range each. A tile packs the query heads that share one kv
head: row r is token r // HEADS, head r % HEADS. Programs walk one list of items (tiles and splits, times head
groups), which each derives from the metadata by prefix sums, so nothing is as long as a context, nothing is unrolled
over sequences or pages, and dead sequences cost nothing.

Metadata is not trusted: a sequence whose offsets or context are invalid gets no keys and NaN rows, page ids are
clamped into the pool before they address anything, and a sequence with a live page id outside the pool gets NaN rows.

Page offsets are 64 bits wide. Weights and logits live in base 2: `exp(x)` is `exp2(x * log2(e))`. Arguments in upper
case are compile-time constants.

Tried on an H200 and left out (us, the kept form first; Llama-8B shapes unless said):
- masking every block instead of edge blocks in a branch: prefill 1 x 8k 1302 -> 1403;
- blocks of 128 keys in prefill 1302 -> 1414 (spills); two programs of 128 registers a multiprocessor, blocks of 64
  keys 1302 -> 1384, of 32 keys 1158 -> 1245 (16 x 2k 1499 -> 1771, mixed 974 -> 1172);
- one item a program in prefill 16 x 2k 1559 -> 1738, since each then surveys the metadata again; 264 programs instead
  of 2112 gain 1.5 % there (1515 -> 1486), and leave nothing to balance a ragged batch with;
- issuing the next block's first product before this block's softmax: Triton then waits for both products and loads
  without pipelining (seen in its IR, not timed); `warp_specialize` changes nothing on sm_90 without tensor
  descriptors, which cannot gather 16-row pages (seen in its IR);
- five stages in decode b64 x 8k 521 -> 750 and blocks of 128 keys 521 -> 604: fewer programs share a multiprocessor;
- a register limit of 168 in decode 497 -> 584;
- a row sum reduced in every block of decode (b8 x 8k, two warps) 75.5 -> 85.4, hence the sum a column;
- 64-row tiles in prefill 1302 -> 1427, but right for batches of decodes and chunks 1189 -> 1165;
- Gemma's prefill with blocks of 32 keys and three stages instead of 64 and two 1344 -> 1445;
- the combine with 2, 4 or 8 warps instead of one (70B TP8 b1 x 32k) 13.4 -> 25.0, 16.5, 19.7;
- 64 or 128 splits of 70B TP8 b1 x 8k instead of 32: 10.7 -> 11.3, 12.2; 16 splits 10.6 -> 13.7.
What paid: a page's number and a key's place in it without a division in the loop (blocks start with a page), prefill
1 x 8k 1302 -> 1158; one factor a row in place of a division and two selections an element at the end.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false
# (Triton types every compile-time value as `constexpr`, and its `range` as a class without an iterator.)

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that no row ever meets inf - inf
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _splits(context, q_len, live, WINDOW, ALIGN, BLOCK, SHORTEST, FINE, LONGEST, SPLITS, ITEMS):
    """First key (a multiple of ALIGN), keys a split (of BLOCK) and splits of a short sequence; scalars or vectors.

    At most SPLITS of them, FINE of SHORTEST keys or any number of four times that; more where one would have more than
    LONGEST keys. ITEMS > 0 (the caller does not ask for batch invariance) also stops at ITEMS over the live sequences.
    """
    low = tl.maximum(context - q_len, 0)
    if WINDOW > 0:
        low = tl.maximum(low - (WINDOW - 1), 0) // ALIGN * ALIGN
    else:
        low = low * 0
    keys = tl.maximum(context - low, 1)
    most = SPLITS
    if ITEMS > 0:
        most = tl.minimum(tl.maximum(ITEMS // tl.maximum(live, 1), 1), SPLITS)
    count = tl.maximum(tl.minimum((keys + SHORTEST - 1) // SHORTEST, FINE), keys // (4 * SHORTEST))
    count = tl.minimum(count, most)
    count = tl.maximum(count, (keys + LONGEST - 1) // LONGEST)
    size = (keys + count - 1) // count
    size = (size + BLOCK - 1) // BLOCK * BLOCK
    return low, size, (keys + size - 1) // size


@triton.jit
def _survey(
    query_start_loc, context_lens, num_seqs, T, S, S_PAD, CAPACITY, WINDOW, SHORT_Q, LONG_Q, HAS_LONG, ALIGN,
    SHORT_N, SHORTEST, FINE, LONGEST, SPLITS, ITEMS,
):  # fmt: skip
    """Inclusive prefix sums of short and of long items, first rows [S_PAD each]; first and last owned row; live count.

    Dead metadata is loaded (all loads leave at once) and then forgotten.
    """
    s = tl.arange(0, S_PAD)
    begin = tl.load(query_start_loc + s, mask=s < S, other=0)
    end = tl.load(query_start_loc + s + 1, mask=s < S, other=0)
    context = tl.load(context_lens + s, mask=s < S, other=0)
    zeroth = tl.load(query_start_loc)
    live = tl.minimum(tl.load(num_seqs), S)
    alive = s < live
    start = tl.minimum(tl.maximum(tl.associative_scan(tl.where(alive, begin, 0), 0, _max), 0), T)
    stop = tl.where(alive, tl.minimum(tl.maximum(end, start), T), start)
    valid = (begin == start) & (end == stop) & (context >= 0) & (context <= CAPACITY) & alive
    rows = stop - start
    q_len = tl.where(valid, rows, 0)
    _, _, splits = _splits(
        tl.where(valid, context, 0), q_len, live, WINDOW, ALIGN, SHORT_N, SHORTEST, FINE, LONGEST, SPLITS, ITEMS
    )
    short = tl.where(rows <= SHORT_Q, tl.where(rows > 0, splits, 0), 0)
    long = tl.where(rows <= SHORT_Q, 0, rows)
    if HAS_LONG:
        short_sums = tl.cumsum(short, 0)
        long_sums = tl.cumsum((long + LONG_Q - 1) // LONG_Q, 0)
    else:
        short_sums = tl.cumsum(short + (long + SHORT_Q - 1) // SHORT_Q, 0)
        long_sums = short_sums
    last = tl.max(tl.where(alive, stop, 0), 0)
    first = tl.minimum(tl.maximum(zeroth, 0), last)
    return short_sums, long_sums, start, first, last, live


@triton.jit
def _find(sums, index, S_PAD):
    """The sequence an item belongs to, and the item's number within it."""
    before = sums <= index
    sequence = tl.sum(before.to(tl.int32), 0)
    return sequence, index - tl.max(tl.where(before, sums, 0), 0)


@triton.jit
def _peek(table, first, last, CHUNK):
    """The first CHUNK entries of table[first:last], asked for early and looked at late."""
    entry = first + tl.arange(0, CHUNK)
    return tl.load(table + entry, mask=entry < last, other=0)


@triton.jit
def _any_bad_page(peeked, table, first, last, P, CHUNK):
    """1 when an entry of table[first:last] lies outside the pool; an empty range has none."""
    bad = ((peeked < 0) | (peeked >= P)) & (first + tl.arange(0, CHUNK) < last)
    for at in tl.range(first + CHUNK, last, CHUNK, num_stages=1):
        page = _peek(table, at, last, CHUNK)
        bad = bad | (page < 0) | ((page >= P) & (at + tl.arange(0, CHUNK) < last))
    return tl.max(bad.to(tl.int32), 0)


@triton.jit
def _tanh(y):
    """tanh to a few ulp everywhere: an odd polynomial near 0, where 1 - 2 / (1 + e^2y) would cancel."""
    square = y * y
    small = y + y * square * (-0.333332986 + square * (0.133319244 + square * (-0.0537838303 + square * (
        0.0207959656 + square * -0.00589515083))))  # fmt: skip
    large = 1.0 - 2.0 / (1.0 + tl.math.exp2(y * (2.0 * LOG2E)))
    return tl.where(tl.abs(y) < 0.6, small, large)


@triton.jit
def _logits(scores, scale, CAP):
    """Base-2 logits of raw scores."""
    if CAP > 0:
        return _tanh(scores * scale) * (CAP * LOG2E)
    return scores * scale


@triton.jit
def _fold(scores, v, acc, m, l, scale, hi, lo, keys, edge, CAP, FUSED, WINDOW, SHORT):
    """One step of the online softmax. FUSED: a plain positive scale, applied inside the exponent's multiply-add.

    SHORT tiles mask every block, and keep a sum for every column, which spares them a reduction across warps a step.
    """
    if FUSED:
        x = scores
    else:
        x = _logits(scores, scale, CAP)
    if SHORT:
        x = _mask(x, hi, lo, keys, WINDOW)
    else:
        if edge:
            x = _mask(x, hi, lo, keys, WINDOW)
    top = tl.max(x, 1)
    if FUSED:
        top = top * scale
    new = tl.maximum(m, top)
    if FUSED:
        p = tl.math.exp2(x * scale - new[:, None])
    else:
        p = tl.math.exp2(x - new[:, None])
    keep = tl.math.exp2(m - new)
    if SHORT:
        l = l * keep[:, None] + p
    else:
        l = l * keep + tl.sum(p, 1)
    acc = acc * keep[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new, l


@triton.jit
def _mask(x, hi, lo, keys, WINDOW):
    seen = keys[None, :] < hi[:, None]
    if WINDOW > 0:
        seen = seen & (keys[None, :] >= lo[:, None])
    return tl.where(seen, x, float("-inf"))


@triton.jit
def _page_ids(table, first, end, PAGE, BLOCK_N):
    """The pages of BLOCK_N keys from `first` to `end`: one id where a block lies in one page, else [BLOCK_N]."""
    n = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        page = tl.load(table + first // PAGE, mask=first < end, other=0)
    elif BLOCK_N % PAGE == 0:  # blocks start with a page, so that this division leaves the loop
        page = tl.load(table + first // PAGE + n // PAGE, mask=first + n < end, other=0)
    else:
        page = tl.load(table + (first + n) // PAGE, mask=first + n < end, other=0)
    return page


@triton.jit
def _attend(
    queries, kv_pages, table, token, head, row_ok, kv_head, position, first_key, first_position, last_position,
    begin, end, scale, HQ, HKV, D, D_PAD, PAGE, P, WINDOW, CAP, FUSED, COMPUTE, BLOCK_M, BLOCK_N, SHORT,
    STAGES,
):  # fmt: skip
    """Fold the keys [begin, end) of one sequence into a tile of rows.

    token, head, row_ok, position: [BLOCK_M]. first_key: keys below it are seen by no row. first_position and
    last_position: the tile's smallest and largest. Returns acc [BLOCK_M, D_PAD], m and l [BLOCK_M], all f32 in base 2,
    and 1 when a page id that was needed lies outside the pool.
    """
    n = tl.arange(0, BLOCK_N)
    LAST: tl.constexpr = P - 1 if P > 0 else 0
    page = _page_ids(table, begin, end, PAGE, BLOCK_N)
    bad = (page != page).to(tl.int32)
    if P == 0:
        bad += tl.where(begin < end, 1, 0)
    d = tl.arange(0, D_PAD)
    row = (token.to(tl.int64) * HQ + head) * D
    q = tl.load(queries + row[:, None] + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0).to(COMPUTE)
    hi = position + 1
    lo = position - (WINDOW - 1)
    open_lo = last_position - (WINDOW - 1)  # keys from here up to open_hi are seen by every row
    open_hi = first_position + 1
    STRIDE: tl.constexpr = 2 * HKV * D  # elements between two slots of a page
    keys_base = kv_pages + kv_head * (2 * D)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M, BLOCK_N] if SHORT else [BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for block in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        keys = block + n
        # The next block's page ids are fetched one block ahead: they address the next loads.
        inside = tl.minimum(tl.maximum(page, 0), LAST)
        bad = bad | (page != inside).to(tl.int32)
        page = _page_ids(table, block + BLOCK_N, end, PAGE, BLOCK_N)
        if BLOCK_N % PAGE == 0:
            slot = inside.to(tl.int64) * (PAGE * STRIDE) + (n % PAGE) * STRIDE
        else:
            slot = inside.to(tl.int64) * (PAGE * STRIDE) + (keys % PAGE) * STRIDE
        readable = keys < end
        if WINDOW > 0:
            readable = readable & (keys >= first_key)
        at = keys_base + slot[:, None] + d[None, :]
        ok = readable[:, None] & (d < D)[None, :]
        k = tl.load(at, mask=ok, other=0.0).to(COMPUTE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        v = tl.load(at + D, mask=ok, other=0.0).to(COMPUTE)
        edge = block + BLOCK_N > open_hi
        if WINDOW > 0:
            edge = edge | (block < open_lo)
        acc, m, l = _fold(scores, v, acc, m, l, scale, hi, lo, keys, edge, CAP, FUSED, WINDOW, SHORT)
    if SHORT:
        l = tl.sum(l, 1)
    if PAGE % BLOCK_N != 0:
        bad = tl.max(bad, 0)
    return acc, m, l, bad


@triton.jit
def _close(
    acc, m, l, bad, token, head, row_ok, output, lse, sinks, v_scale, HQ, HKV, D, D_PAD, HAS_SINKS, HAS_V_SCALE,
    WRITE_LSE,
):  # fmt: skip
    """Add the sinks, divide and store; rows without keys become 0, rows of a bad sequence NaN."""
    seen = l != 0  # a NaN is seen
    total = l
    keep = 1.0
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=row_ok, other=0.0)
        top = tl.maximum(m, sink * LOG2E)
        keep = tl.math.exp2(m - top)
        total = l * keep + tl.math.exp2(sink * LOG2E - top)
        m = top
    share = tl.where(seen, keep / tl.where(seen, total, 1.0), 0.0)
    out = acc * tl.where(bad > 0, float("nan"), share)[:, None]
    if HAS_V_SCALE:
        out = out * tl.load(v_scale + head // (HQ // HKV), mask=row_ok, other=0.0)[:, None]
    d = tl.arange(0, D_PAD)
    at = token.to(tl.int64) * HQ + head
    tl.store(
        output + (at * D)[:, None] + d[None, :],
        out.to(output.dtype.element_ty),
        mask=row_ok[:, None] & (d < D)[None, :],
    )
    if WRITE_LSE:
        value = (m + tl.math.log2(tl.where(seen, total, 1.0))) * LN2
        if HAS_SINKS:
            value = tl.where(seen, value, sink)
        else:
            value = tl.where(seen, value, float("-inf"))
        tl.store(lse + at, tl.where(bad > 0, float("nan"), value), mask=row_ok)


@triton.jit
def _clear(item, first, last, output, lse, T, HQ, D, CLEAR, WRITE_LSE):
    """Give CLEAR elements of the rows outside [first, last) their 0, and their -inf."""
    i = item.to(tl.int64) * CLEAR + tl.arange(0, CLEAR)  # elements of the rows that nobody owns, in order
    i = tl.where(i < first.to(tl.int64) * (HQ * D), i, i + (last - first).to(tl.int64) * (HQ * D))
    inside = i < T * HQ * D
    tl.store(output + i, tl.zeros([CLEAR], output.dtype.element_ty), mask=inside)
    if WRITE_LSE:
        tl.store(lse + i // D, tl.full([CLEAR], float("-inf"), tl.float32), mask=inside & (i % D == 0))


@triton.jit
def attend_kernel(
    queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, sinks, k_scale, v_scale,
    output, lse, part_acc, part_ml,
    T: tl.constexpr, HQ: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr,
    HKV: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, PAGES_PER_SEQ: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr, WRITE_LSE: tl.constexpr,
    COMPUTE: tl.constexpr, FUSED: tl.constexpr,
    HEADS: tl.constexpr, HEAD_GROUPS: tl.constexpr,
    SHORT_M: tl.constexpr, SHORT_Q: tl.constexpr, SHORT_STAGES: tl.constexpr,
    HAS_LONG: tl.constexpr, LONG_M: tl.constexpr, LONG_Q: tl.constexpr, LONG_N: tl.constexpr,
    LONG_STAGES: tl.constexpr, LONG_ALIGN: tl.constexpr,
    ALIGN: tl.constexpr, SHORT_N: tl.constexpr, SHORTEST: tl.constexpr, FINE: tl.constexpr, LONGEST: tl.constexpr,
    SPLITS: tl.constexpr, ITEMS: tl.constexpr, MAX_SPLITS: tl.constexpr, ROW_SLOTS: tl.constexpr,
    EARLY: tl.constexpr, CLEAR: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Answer every row: items pid, pid + PROGRAMS, ... of the list of short and long tiles and rows to clear.

    queries, output [T, HQ, D]; kv_pages [P, PAGE, 2 * HKV, D]; lse [T, HQ]; part_acc [slots, HQ, MAX_SPLITS, D] and
    part_ml [slots, HQ, MAX_SPLITS, 2] (maximum, sum) hold the splits of short sequences; not written for one split.
    """
    short_sums, long_sums, starts, first_row, last_row, live = _survey(
        query_start_loc, context_lens, num_seqs, T, S, S_PAD, PAGES_PER_SEQ * PAGE, WINDOW,
        SHORT_Q, LONG_Q, HAS_LONG, ALIGN, SHORT_N, SHORTEST, FINE, LONGEST, SPLITS, ITEMS,
    )  # fmt: skip
    shorts = tl.max(short_sums, 0)
    longs = shorts * 0
    if HAS_LONG:
        longs = tl.max(long_sums, 0)
    tiles = (shorts + longs) * HEAD_GROUPS
    unowned = (T - (last_row - first_row)).to(tl.int64) * (HQ * D)
    items = tiles + ((unowned + CLEAR - 1) // CLEAR).to(tl.int32)
    # Short items are spread among the long ones, so that a multiprocessor holds both kinds: loads beside matrix work.
    # Long ones start in the first EARLY percent, since a long tile that starts last would finish alone.
    spread = longs + (shorts * EARLY) // 100
    for item in tl.range(tl.program_id(0), items, PROGRAMS):
        if item >= tiles:
            _clear(item - tiles, first_row, last_row, output, lse, T, HQ, D, CLEAR, WRITE_LSE)
        else:
            index = item // HEAD_GROUPS
            group = item % HEAD_GROUPS
            kv_head = group // (HEAD_GROUPS // HKV)
            first_head = kv_head * (HQ // HKV) + group % (HEAD_GROUPS // HKV) * HEADS
            is_short = True
            short_index = index
            long_index = index * 0
            if HAS_LONG:
                before = index.to(tl.int64) * (spread - longs) // tl.maximum(spread, 1)
                after = (index.to(tl.int64) + 1) * (spread - longs) // tl.maximum(spread, 1)
                is_short = (after > before) | (index >= spread)
                short_index = tl.where(index >= spread, index - longs, before.to(tl.int32))
                long_index = index - short_index
            if is_short:
                _short_item(
                    short_sums, short_index, starts, live, kv_head, first_head,
                    queries, kv_pages, context_lens, block_tables, query_start_loc, sinks, k_scale, v_scale,
                    output, lse, part_acc, part_ml,
                    T, HQ, D, D_PAD, P, PAGE, HKV, S_PAD, PAGES_PER_SEQ, SCALE, CAP, WINDOW,
                    HAS_SINKS, HAS_K_SCALE, HAS_V_SCALE, WRITE_LSE, COMPUTE, FUSED, HEADS,
                    SHORT_M, SHORT_Q, SHORT_STAGES, ALIGN, SHORT_N, SHORTEST, FINE, LONGEST,
                    SPLITS, ITEMS, MAX_SPLITS, ROW_SLOTS,
                )  # fmt: skip
            else:
                if HAS_LONG:
                    _long_item(
                        long_sums, long_index, starts, kv_head, first_head,
                        queries, kv_pages, context_lens, block_tables, query_start_loc, sinks, k_scale, v_scale,
                        output, lse,
                        T, HQ, D, D_PAD, P, PAGE, HKV, S_PAD, PAGES_PER_SEQ, SCALE, CAP, WINDOW,
                        HAS_SINKS, HAS_K_SCALE, HAS_V_SCALE, WRITE_LSE, COMPUTE, FUSED, HEADS,
                        LONG_M, LONG_Q, LONG_N, LONG_STAGES, LONG_ALIGN,
                    )  # fmt: skip


@triton.jit
def _sequence(sequence, start, context_lens, query_start_loc, T, CAPACITY):
    """One past its last row, its query length, its context, and 1 when its metadata is invalid (no queries then)."""
    begin = tl.load(query_start_loc + sequence)
    end = tl.load(query_start_loc + sequence + 1)
    context = tl.load(context_lens + sequence)
    stop = tl.minimum(tl.maximum(end, start), T)
    bad = ((begin != start) | (end != stop) | (context < 0) | (context > CAPACITY)).to(tl.int32)
    good = 1 - bad
    return stop, (stop - start) * good, context * good, bad


@triton.jit
def _scaled(kv_head, k_scale, SCALE, CAP, HAS_K_SCALE):
    """What a raw score is multiplied by: into base 2, or into units of the cap."""
    if CAP > 0:
        factor = tl.full([], SCALE / CAP, tl.float32)
    else:
        factor = tl.full([], SCALE * LOG2E, tl.float32)
    if HAS_K_SCALE:
        factor = factor * tl.load(k_scale + kv_head)
    return factor


@triton.jit
def _rows(first_token, stop, first_head, kv_head, M, Q, HEADS, GROUP):
    """Token, head and liveness of a tile's rows, [M] each."""
    r = tl.arange(0, M)
    token = first_token + r // HEADS
    head = first_head + r % HEADS
    ok = (token < stop) & (r < Q * HEADS) & (head < (kv_head + 1) * GROUP)
    return token, head, ok


@triton.jit
def _short_item(
    sums, index, starts, live, kv_head, first_head, queries, kv_pages, context_lens, block_tables, query_start_loc,
    sinks, k_scale, v_scale, output, lse, part_acc, part_ml, T, HQ, D, D_PAD, P, PAGE, HKV, S_PAD, PAGES_PER_SEQ,
    SCALE, CAP, WINDOW, HAS_SINKS, HAS_K_SCALE, HAS_V_SCALE, WRITE_LSE, COMPUTE, FUSED, HEADS, M, Q, STAGES, ALIGN,
    SHORT_N, SHORTEST, FINE, LONGEST, SPLITS, ITEMS, MAX_SPLITS, ROW_SLOTS,
):  # fmt: skip
    """One split of a short sequence, or one narrow tile of a long one in a program without long tiles."""
    sequence, number = _find(sums, index, S_PAD)
    start = tl.sum(tl.where(tl.arange(0, S_PAD) == sequence, starts, 0), 0)
    stop, q_len, context, bad = _sequence(sequence, start, context_lens, query_start_loc, T, PAGES_PER_SEQ * PAGE)
    low, size, splits = _splits(context, q_len, live, WINDOW, ALIGN, SHORT_N, SHORTEST, FINE, LONGEST, SPLITS, ITEMS)
    table = block_tables + sequence.to(tl.int64) * PAGES_PER_SEQ
    whole = stop - start > Q  # several tiles, hence one split
    splits = tl.where(whole | (bad > 0), 1, splits)
    tile = tl.where(whole, number, 0)
    begin = low + tl.where(whole, 0, number * size)
    end = tl.where(splits > 1, tl.minimum(begin + size, context), context)
    first_token = start + tile * Q
    token, head, row_ok = _rows(first_token, stop, first_head, kv_head, M, Q, HEADS, HQ // HKV)
    first_position = context - q_len + tile * Q
    last_position = tl.minimum(first_position + Q, context) - 1
    first_key = low
    if WINDOW > 0:
        first_key = tl.maximum(tl.maximum(context - q_len, 0) - (WINDOW - 1), 0)
    if whole:
        # Other tiles of the sequence see pages that this one does not, and all must agree.
        first_page, last_page = first_key // PAGE, (context + PAGE - 1) // PAGE
        peeked = _peek(table, first_page, last_page, 128)
        bad = bad | _any_bad_page(peeked, table, first_page, last_page, P, 128)
        end = tl.minimum(end, tl.maximum(last_position + 1, 0))
        if WINDOW > 0:
            first_key = tl.maximum(first_position - (WINDOW - 1), 0)
            begin = first_key // ALIGN * ALIGN
    acc, m, l, bad_page = _attend(
        queries, kv_pages, table, token, head, row_ok, kv_head, first_position + tl.arange(0, M) // HEADS,
        first_key, first_position, last_position, begin, end,
        _scaled(kv_head, k_scale, SCALE, CAP, HAS_K_SCALE),
        HQ, HKV, D, D_PAD, PAGE, P, WINDOW, CAP, FUSED, COMPUTE, M, SHORT_N, True, STAGES,
    )  # fmt: skip
    bad = bad | bad_page
    if splits == 1:
        _close(
            acc, m, l, bad, token, head, row_ok, output, lse, sinks, v_scale,
            HQ, HKV, D, D_PAD, HAS_SINKS, HAS_V_SCALE, WRITE_LSE,
        )  # fmt: skip
    else:
        if MAX_SPLITS > 1:
            slot = _slot(token, start, sequence, Q, ROW_SLOTS)
            at = (slot * HQ + head) * MAX_SPLITS + number
            d = tl.arange(0, D_PAD)
            l = tl.where(bad > 0, float("nan"), l)
            tl.store(part_acc + (at * D)[:, None] + d[None, :], acc, mask=row_ok[:, None] & (d < D)[None, :])
            tl.store(part_ml + 2 * at, m, mask=row_ok)
            tl.store(part_ml + 2 * at + 1, l, mask=row_ok)


@triton.jit
def _long_item(
    sums, index, starts, kv_head, first_head, queries, kv_pages, context_lens, block_tables, query_start_loc, sinks,
    k_scale, v_scale, output, lse, T, HQ, D, D_PAD, P, PAGE, HKV, S_PAD, PAGES_PER_SEQ, SCALE, CAP, WINDOW,
    HAS_SINKS, HAS_K_SCALE, HAS_V_SCALE, WRITE_LSE, COMPUTE, FUSED, HEADS, M, Q, N, STAGES, ALIGN,
):  # fmt: skip
    """One tile of Q tokens with every key it sees; the last tiles of a sequence, which see most, come first."""
    sequence, number = _find(sums, index, S_PAD)
    start = tl.sum(tl.where(tl.arange(0, S_PAD) == sequence, starts, 0), 0)
    stop, q_len, context, bad = _sequence(sequence, start, context_lens, query_start_loc, T, PAGES_PER_SEQ * PAGE)
    tile = (stop - start + Q - 1) // Q - 1 - number
    table = block_tables + sequence.to(tl.int64) * PAGES_PER_SEQ
    first_token = start + tile * Q
    token, head, row_ok = _rows(first_token, stop, first_head, kv_head, M, Q, HEADS, HQ // HKV)
    first_position = context - q_len + tile * Q
    last_position = tl.minimum(first_position + Q, context) - 1
    first_key = start * 0
    begin = first_key
    seen = first_key
    if WINDOW > 0:
        seen = tl.maximum(tl.maximum(context - q_len, 0) - (WINDOW - 1), 0)
        first_key = tl.maximum(first_position - (WINDOW - 1), 0)
        begin = first_key // ALIGN * ALIGN
    end = tl.maximum(last_position + 1, 0)
    first_page, last_page = seen // PAGE, (context + PAGE - 1) // PAGE
    peeked = _peek(table, first_page, last_page, 256)
    acc, m, l, _ = _attend(
        queries, kv_pages, table, token, head, row_ok, kv_head, first_position + tl.arange(0, M) // HEADS,
        first_key, first_position, last_position, begin, end,
        _scaled(kv_head, k_scale, SCALE, CAP, HAS_K_SCALE),
        HQ, HKV, D, D_PAD, PAGE, P, WINDOW, CAP, FUSED, COMPUTE, M, N, False, STAGES,
    )  # fmt: skip
    bad = bad | _any_bad_page(peeked, table, first_page, last_page, P, 256)
    _close(
        acc, m, l, bad, token, head, row_ok, output, lse, sinks, v_scale,
        HQ, HKV, D, D_PAD, HAS_SINKS, HAS_V_SCALE, WRITE_LSE,
    )  # fmt: skip


@triton.jit
def _slot(token, start, sequence, SHORT_Q, ROW_SLOTS):
    """Where a row of a short sequence keeps its splits: its own row, or a place in its sequence's SHORT_Q."""
    if ROW_SLOTS:
        return token.to(tl.int64)
    return sequence.to(tl.int64) * SHORT_Q + (token - start)


@triton.jit
def combine_kernel(
    part_acc, part_ml, context_lens, query_start_loc, num_seqs, sinks, v_scale, output, lse,
    T: tl.constexpr, HQ: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    HKV: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, PAGES_PER_SEQ: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_V_SCALE: tl.constexpr, WRITE_LSE: tl.constexpr, SHORT_Q: tl.constexpr,
    ALIGN: tl.constexpr, SHORT_N: tl.constexpr, SHORTEST: tl.constexpr, FINE: tl.constexpr, LONGEST: tl.constexpr,
    SPLITS: tl.constexpr, ITEMS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    ROW_SLOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one head of one short sequence, in the order of their keys.

    Rows of one split are in `output` and `lse` already, which are updated in place.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1) + tl.zeros([1], tl.int32)
    s = tl.arange(0, S_PAD)
    begins = tl.load(query_start_loc + s, mask=s <= sequence, other=0)
    begin = tl.load(query_start_loc + sequence)
    end = tl.load(query_start_loc + sequence + 1)
    context = tl.load(context_lens + sequence)
    live = tl.minimum(tl.load(num_seqs), S)
    start = tl.minimum(tl.maximum(tl.max(begins, 0), 0), T)
    q_len = end - begin
    good = (sequence < live) & (begin == start) & (end >= begin) & (end <= T)
    good = good & (context >= 0) & (context <= PAGES_PER_SEQ * PAGE) & (q_len <= SHORT_Q)
    context = tl.where(good, context, 0)
    _, _, splits = _splits(context, q_len, live, WINDOW, ALIGN, SHORT_N, SHORTEST, FINE, LONGEST, SPLITS, ITEMS)
    if good & (splits > 1):
        for local in tl.range(0, q_len, num_stages=1):
            token = start + local + tl.zeros([1], tl.int32)
            at = (_slot(token, start, sequence, SHORT_Q, ROW_SLOTS) * HQ + head) * MAX_SPLITS
            acc, m, l = _merge(part_acc, part_ml, at, splits, D, D_PAD, CHUNK)
            _close(
                acc, m, l, 0, token, head, head >= 0, output, lse, sinks, v_scale,
                HQ, HKV, D, D_PAD, HAS_SINKS, HAS_V_SCALE, WRITE_LSE,
            )  # fmt: skip


@triton.jit
def _merge(part_acc, part_ml, at, splits, D, D_PAD, CHUNK):
    """acc [1, D_PAD], m and l [1] of all splits of the row whose first split is number at[0]; loads leave together."""
    d = tl.arange(0, D_PAD)
    top = tl.full([], LOWEST, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([D_PAD], tl.float32)
    for chunk in tl.range(0, splits, CHUNK, num_stages=1):
        split = chunk + tl.arange(0, CHUNK)
        m = tl.load(part_ml + 2 * (at + split), mask=split < splits, other=LOWEST)
        l = tl.load(part_ml + 2 * (at + split) + 1, mask=split < splits, other=0.0)
        inside = (split < splits)[:, None] & (d < D)[None, :]
        part = tl.load(part_acc + ((at + split) * D)[:, None] + d[None, :], mask=inside, other=0.0)
        new = tl.maximum(top, tl.max(m, 0))
        weight = tl.math.exp2(m - new)
        keep = tl.math.exp2(top - new)
        total = total * keep + tl.sum(l * weight, 0)
        acc = acc * keep + tl.sum(part * weight[:, None], 0)
        top = new
    one = tl.zeros([1], tl.float32)
    return acc[None, :], top + one, total + one
