"""A call's arguments: what the caller gives becomes `Inputs` and a `Signature`, and every rule is checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import jax.numpy as jnp

from rpa import validate as rules
from rpa.signature import Inputs, Signature


class Options(NamedTuple):
    """What a call says besides its arrays, and what it means unsaid."""

    softmax_scale: Any = None
    logits_soft_cap: Any = None
    compute_dtype: Any = jnp.bfloat16
    optimized: Any = False
    sliding_window: Any = None
    mask_value: Any = None
    vmem_limit_bytes: Any = None
    return_lse: Any = False


def prepare(arrays: tuple, options: tuple, check_values: Any) -> tuple[Inputs, Signature]:
    """Validate a call and split it into its arrays and its static part; the tuples are `Inputs` and `Options`."""
    given = Inputs(*arrays)
    queries = rules.float_array("queries", given.queries, 3, "[T, Hq, D]", rules.FLOATS)
    kv_dtypes = rules.FLOATS + rules.QUANTISED
    kv_pages = rules.float_array("kv_pages", given.kv_pages, 4, "[P, page, 2 * Hkv, D]", kv_dtypes)
    context_lens = rules.int_array("context_lens", given.context_lens, 1, "[S]")
    block_tables = rules.int_array("block_tables", given.block_tables, 2, "[S, pages_per_seq]")
    query_start_loc = rules.int_array("query_start_loc", given.query_start_loc, 1, "[S + 1]")
    rules.check_shapes(queries, kv_pages, context_lens, block_tables, query_start_loc)
    num_kv_heads = kv_pages.shape[2] // 2
    inputs = Inputs(
        queries, kv_pages, context_lens, block_tables, query_start_loc,
        rules.count_of(given.num_seqs, context_lens.shape[0]),
        rules.sinks_of(given.softmax_aux, queries.shape[1]),
        rules.head_scales("k_scale", given.k_scale, num_kv_heads),
        rules.head_scales("v_scale", given.v_scale, num_kv_heads),
    )  # fmt: skip
    signature = _signature(inputs, Options(*options))
    rules.check_metadata(inputs, signature, rules.flag("validate", check_values))
    return inputs, signature


def _signature(inputs: Inputs, options: Options) -> Signature:
    rules.check_mask_value(options.mask_value)
    num_tokens, num_q_heads, head_dim = inputs.queries.shape
    num_pages, page_size, combined, _ = inputs.kv_pages.shape
    max_seqs, pages_per_seq = inputs.block_tables.shape
    window = rules.window_of(options.sliding_window)
    if window is not None and window >= pages_per_seq * page_size:
        window = None  # no context is longer, so these are the bits of no window
    q_dtype = inputs.queries.dtype.name
    return Signature(
        num_tokens, num_q_heads, head_dim, num_pages, page_size, combined // 2, max_seqs, pages_per_seq,
        q_dtype=q_dtype,
        kv_dtype=inputs.kv_pages.dtype.name,
        compute_dtype=rules.compute_dtype_of(options.compute_dtype, q_dtype),
        sinks=inputs.softmax_aux is not None,
        k_scale=inputs.k_scale is not None,
        v_scale=inputs.v_scale is not None,
        return_lse=rules.flag("return_lse", options.return_lse),
        optimized=rules.flag("optimized", options.optimized),
        softmax_scale=rules.scale_of(options.softmax_scale, head_dim),
        logits_soft_cap=rules.cap_of(options.logits_soft_cap),
        sliding_window=window,
        vmem_limit_bytes=rules.limit_of(options.vmem_limit_bytes),
    )  # fmt: skip


def taking(positional: str, keyword: str = "", **defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: a function of keyword arguments gets these parameters, in this order, with the public defaults.

    Args:
        positional, keyword: names; those of the second may only be given by name.
        defaults: where they differ from the public function's.
    """
    required = dict.fromkeys(("self", *Inputs._fields[:6]), inspect.Parameter.empty)
    known = {**required, **Options._field_defaults, "validate": False, **defaults}  # any other is None
    kinds = ((positional, inspect.Parameter.POSITIONAL_OR_KEYWORD), (keyword, inspect.Parameter.KEYWORD_ONLY))
    signature = inspect.Signature(
        [inspect.Parameter(name, kind, default=known.get(name)) for names, kind in kinds for name in names.split()]
    )

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(body)
        def function(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{body.__name__}() {error}") from None
            bound.apply_defaults()
            return body(**bound.arguments)

        function.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        return function

    return decorate
