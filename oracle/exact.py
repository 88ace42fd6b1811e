"""The exact stratum: cases whose answer every correct kernel returns bit for bit, whatever its claim.

Queries live in the even dims and keys in the odd ones, so every logit is exactly 0 (also scaled, capped, in base 2,
or fused); sinks are 0 as well. A row that sees 2**k keys (its sink counted) gives each the weight 2**-k, and a few
small integer values make every partial sum, in any order, exact in every dtype of the contract. What no row sees
holds numbers that would be loud: keys that answer to the queries, and large values.
"""

import numpy as np

from oracle.attend import attend
from oracle.case import Case, Sequence, dtype_of, visible

LARGEST_SUM = 128  # sums of values stay integers of 8 bits, which bfloat16 holds; divided by 2**k it still does
NONZERO = 16  # values other than 0 a sequence, per head and dim: 16 * 8 = LARGEST_SUM
LARGEST_VALUE = 8  # of the integers; 3 bits, which float8_e5m2 holds


def exact_case(seed: int, like: Case) -> Case:
    """A case of the exact stratum with the static shapes, dtypes and options of `like`, its layout drawn anew.

    Scales become powers of two. `like` must have room for a row that sees a power of two of keys, which any has.
    """
    rng = np.random.default_rng(seed)
    context_lens, lengths = _layout(rng, like)
    tables = _tables(rng, like, context_lens)
    sinks = None if like.softmax_aux is None else np.zeros(like.num_q_heads, np.float32)
    case = like.replace(
        context_lens=context_lens,
        block_tables=tables,
        query_start_loc=np.concatenate([[0], np.cumsum(lengths)]),
        num_seqs=len(lengths) - int(rng.integers(0, 2)) * (len(lengths) > 1),
        softmax_aux=sinks,
        k_scale=None if like.k_scale is None else 0.5,
        v_scale=None if like.v_scale is None else 0.25,
    )
    return case.replace(queries=_queries(rng, case), kv_pages=_pages(rng, case))


def expected(case: Case) -> np.ndarray:
    """The bits every correct kernel returns, in the queries' dtype. Raises ValueError when the case is not exact."""
    output = attend(case)[0]
    answer = output.astype(case.queries.dtype)
    if not np.array_equal(answer.astype(np.float64), output):
        raise ValueError("the case is not of the exact stratum: its answer is no number of the output's dtype")
    return answer


def same_bits(got, wanted) -> bool:
    """Whether two outputs agree bit for bit; a NaN agrees with a NaN, and -0 with 0 (both are exactly 0)."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    return got.shape == wanted.shape and got.dtype == wanted.dtype and bool(np.all(_equal(got, wanted)))


def _equal(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return (got == wanted) | (np.isnan(got) & np.isnan(wanted))


def _layout(rng: np.random.Generator, like: Case) -> tuple[np.ndarray, np.ndarray]:
    """Context lengths and query lengths such that every row sees no key or a power of two of them."""
    sees = [position for position in range(like.capacity) if _is_exact(like, position)]
    contexts, lengths = [], []
    room = like.num_tokens
    for _ in range(like.max_seqs):
        if rng.random() < 0.15 or room == 0 or not sees:
            contexts.append(0)
            lengths.append(0)
            continue
        last = int(rng.choice(sees))
        longest = 1
        while longest < room and (last - longest < 0 or _is_exact(like, last - longest)):
            longest += 1
        length = int(rng.integers(1, min(longest, last + 3) + 1))  # at most two rows before position 0
        contexts.append(last + 1)
        lengths.append(length)
        room -= length
    return np.array(contexts, np.int32), np.array(lengths, np.int32)


def _is_exact(like: Case, position: int) -> bool:
    lo, hi = visible(position, position + 1, like.sliding_window)
    count = hi - lo + (like.softmax_aux is not None)
    return count & (count - 1) == 0


def _tables(rng: np.random.Generator, like: Case, context_lens: np.ndarray) -> np.ndarray:
    """Pages in random order; when they run out, later sequences share those of earlier ones."""
    pages = np.concatenate([rng.permutation(like.num_pages) for _ in range(like.max_seqs * like.pages_per_seq + 1)])
    tables, used = np.full((like.max_seqs, like.pages_per_seq), -1), 0
    for s, context in enumerate(context_lens):
        count = -(-int(context) // like.page_size)
        tables[s, :count] = pages[used : used + count]
        used += count
    return tables


def _queries(rng: np.random.Generator, case: Case) -> np.ndarray:
    queries = rng.integers(-4, 5, case.queries.shape)
    queries[..., 1::2] = 0
    return queries.astype(case.queries.dtype)


def _pages(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Loud numbers everywhere, then quiet keys and small values in the slots that some row sees."""
    dtype = dtype_of(case.kv_pages.dtype.name)
    pages = rng.choice([-56, 48, 64], case.kv_pages.shape).astype(dtype)
    live = [live_slots(case, sequence) for sequence in case.sequences()]
    shared = sum(map(len, live)) > len(np.unique(np.concatenate([*live, []])))
    for slots in live:
        shape = (len(slots), case.num_kv_heads, case.head_dim)
        keys = rng.integers(-4, 5, shape)
        keys[..., 0::2] = 0
        values = rng.integers(-LARGEST_VALUE, LARGEST_VALUE + 1, shape)
        values[rng.permutation(len(slots))[NONZERO // (len(live) if shared else 1) :]] = 0
        flat = pages.reshape(-1, *pages.shape[2:])
        flat[slots, 0::2] = keys.astype(dtype)
        flat[slots, 1::2] = values.astype(dtype)
    return pages


def live_slots(case: Case, sequence: Sequence) -> np.ndarray:
    """The slots a sequence's rows see, as indices into the flattened `[P * page]`."""
    positions = np.arange(*sequence.keys)
    return sequence.pages[positions // case.page_size].astype(np.int64) * case.page_size + positions % case.page_size
