"""What a row sees and which rows a sequence owns: the contract's arithmetic, and its traced form."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpa.signature import Inputs, Signature


def visible(position, context_len, window: int | None):
    """The keys a row sees, as a half-open interval `[lo, hi)`; empty when `hi <= lo`.

    Args:
        position: the row's position in its sequence, `context_len - q_len + i`; may be negative.
        context_len: tokens in the cache, the row's own included.
        window: keys kept, the row's own included; `None` keeps all.

    >>> visible(5, 8, None), visible(5, 8, 2)
    ((0, 6), (4, 6))
    """
    lo = 0 if window is None else position - window + 1
    return lo * (lo > 0), position + 1  # clips at 0 for ints, NumPy and traced values alike


class Ragged(NamedTuple):
    """Metadata a kernel can trust: dead and invalid sequences own no rows and no keys, page ids lie in the pool."""

    start: jax.Array  # int32 [S], first query row
    stop: jax.Array  # int32 [S], one past the last; == start where dead or invalid
    context: jax.Array  # int32 [S], 0 where dead or invalid
    tables: jax.Array  # int32 [S, pages_per_seq], clamped into [0, P)
    valid: jax.Array  # bool [S], False for invalid live sequences, True for dead ones
    bad_stop: jax.Array  # int32 [S], one past the last row of an invalid sequence; == start elsewhere


def sanitize(inputs: Inputs, signature: Signature) -> Ragged:
    """Turn traced metadata into `Ragged`, so that nothing outside `kv_pages` is ever addressed.

    A live sequence is invalid when its context is negative or past the table's capacity, when its offsets
    decrease, pass the last query row or start before an earlier offset's maximum, or when a page that some of its
    rows see lies outside the pool. It then owns the rows that no earlier offset claimed, and they become NaN.
    """
    count = jnp.clip(inputs.num_seqs[0], 0, signature.max_seqs)
    live = jnp.arange(signature.max_seqs) < count
    begin = jnp.where(live, inputs.query_start_loc[:-1], 0)
    end = jnp.where(live, inputs.query_start_loc[1:], 0)
    context = jnp.where(live, inputs.context_lens, 0)
    tables = inputs.block_tables
    start, stop, valid = owned(begin, end, running_max(begin), context, signature)
    first, last = live_entries(start, stop, context, signature)
    outside = (tables < 0) | (tables >= signature.num_pages)
    column = jnp.arange(signature.pages_per_seq)
    valid &= ~jnp.any(outside & (column >= first[:, None]) & (column < last[:, None]), axis=1)
    valid |= ~live
    runs = live & valid
    return Ragged(
        start=start,
        stop=jnp.where(runs, stop, start),
        context=jnp.where(runs, context, 0),
        tables=jnp.clip(tables, 0, signature.num_pages - 1),
        valid=valid,
        bad_stop=jnp.where(live & ~valid, stop, start),
    )


def owned(begin, end, taken, context, signature: Signature):
    """The rows of live sequences, one or many of them, and whether their numbers are valid.

    Args:
        begin, end: a sequence's offsets; context: its length.
        taken: the largest of its first offset and all before it. Rows below are taken: garbage offsets cannot make two
            sequences write one row.

    Returns:
        The first row, one past the last, and a bool.
    """
    total = signature.num_tokens
    start = jnp.clip(taken, 0, total)
    stop = jnp.clip(end, start, total)
    valid = (begin == start) & (end >= begin) & (end <= total) & (context >= 0) & (context <= signature.capacity)
    return start, stop, valid


def live_entries(start, stop, context, signature: Signature):
    """The first entry of a table whose page holds a key that some row of the sequence sees, and one past the last."""
    first = jnp.maximum(context - (stop - start), 0)  # the first row's position
    low = first * 0 if signature.sliding_window is None else jnp.maximum(first - signature.sliding_window + 1, 0)
    seen = (stop > start) & (context > 0)
    last = jnp.where(seen, jax.lax.div(context - 1, signature.page_size) + 1, 0)
    return jax.lax.div(low, signature.page_size), last


def unowned(signature: Signature, ragged: Ragged):
    """What rows hold that no sequence writes: 0 and -inf, NaN where the sequence is invalid.

    Returns:
        [T, Hq, D] in the queries' dtype, and float32 [T, Hq].
    """
    shape = (signature.num_tokens, signature.num_q_heads)
    bad = _covered(ragged.start, ragged.bad_stop, signature.num_tokens)[:, None]
    output = jnp.zeros((*shape, signature.head_dim), signature.q_dtype)
    return jnp.where(bad[:, :, None], jnp.nan, output), jnp.where(bad, jnp.nan, jnp.full(shape, -jnp.inf))


def finish(output, lse, signature: Signature, ragged: Ragged):
    """Give the rows that no sequence owns their 0 and -inf, and the rows of invalid sequences their NaN.

    Args:
        output: [T, Hq, D]; lse: float32 [T, Hq] or None.
    """
    owned = _covered(ragged.start, ragged.stop, signature.num_tokens)[:, None]
    output_else, lse_else = unowned(signature, ragged)
    output = jnp.where(owned[:, :, None], output, output_else)
    return output, None if lse is None else jnp.where(owned, lse, lse_else)


def _covered(start, stop, rows: int):
    """bool [rows]: inside one of the half-open intervals, which do not overlap."""
    row = jnp.arange(rows)[:, None]
    return jnp.any((row >= start) & (row < stop), axis=1)


SHORT = 1024  # numbers whose running maximum is one reduction of their square: XLA makes many loops of another


def running_max(numbers):
    """int32 [n] of which the first is not negative -> [n]: the largest of each and all before it."""
    if numbers.shape[0] > SHORT:
        return jax.lax.cummax(numbers)
    index = jnp.arange(numbers.shape[0])
    return jnp.max(jnp.where(index <= index[:, None], numbers, 0), axis=1)
