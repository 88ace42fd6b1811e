"""The judge of the oracle: attention as one plain loop over rows, heads and keys, one number at a time.

It shares nothing with `attend` but the case. With mpmath (a development dependency, imported only here) it works to
any number of digits. Only for small cases.
"""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from oracle.case import Case

FLOAT64 = SimpleNamespace(number=float, exp=math.exp, log=math.log, tanh=math.tanh)


def mpmath_numbers(digits: int = 40) -> Any:
    """Numbers of mpmath, as the second argument of `attend_scalar`."""
    import mpmath

    context: Any = mpmath.MPContext()
    context.dps = digits
    return SimpleNamespace(number=context.mpf, exp=context.exp, log=context.log, tanh=context.tanh)


def attend_scalar(case: Case, numbers: Any = FLOAT64) -> tuple[list, list]:
    """Output `[T][Hq][D]` and lse `[T][Hq]` as nested lists of numbers. Metadata must be valid."""
    zero = numbers.number(0)
    output = [[[zero] * case.head_dim for _ in range(case.num_q_heads)] for _ in range(case.num_tokens)]
    lse = [[-math.inf] * case.num_q_heads for _ in range(case.num_tokens)]
    for s in range(int(case.num_seqs)):
        start, stop = int(case.query_start_loc[s]), int(case.query_start_loc[s + 1])
        for row in range(start, stop):
            position = int(case.context_lens[s]) - (stop - start) + (row - start)
            for head in range(case.num_q_heads):
                output[row][head], lse[row][head] = _row(case, s, row, position, head, numbers)
    return output, lse


def _row(case: Case, s: int, row: int, position: int, head: int, numbers: Any):
    kv_head = head // (case.num_q_heads // case.num_kv_heads)
    query = [numbers.number(float(x)) for x in case.queries[row, head]]
    logits, values = [], []
    for j in range(position + 1):
        if case.sliding_window is not None and j < position - case.sliding_window + 1:
            continue
        page = int(case.block_tables[s, j // case.page_size])
        slot = case.kv_pages[page, j % case.page_size]
        key = [numbers.number(float(x)) * _scale(case.k_scale, kv_head) for x in slot[2 * kv_head]]
        logit = numbers.number(case.scale) * sum(a * b for a, b in zip(query, key, strict=True))
        if case.logits_soft_cap is not None:
            logit = case.logits_soft_cap * numbers.tanh(logit / case.logits_soft_cap)
        logits.append(logit)
        values.append([numbers.number(float(x)) * _scale(case.v_scale, kv_head) for x in slot[2 * kv_head + 1]])
    if case.softmax_aux is not None:
        logits.append(numbers.number(float(case.softmax_aux[head])))
        values.append([numbers.number(0)] * case.head_dim)
    top = max(logits, default=-math.inf)
    if top == -math.inf:
        return [numbers.number(0)] * case.head_dim, -math.inf
    weights = [numbers.exp(logit - top) for logit in logits]
    total = sum(weights)
    mixed = [sum(w * v[d] for w, v in zip(weights, values, strict=True)) / total for d in range(case.head_dim)]
    return mixed, top + numbers.log(total)


def _scale(scale, kv_head: int) -> float:
    if scale is None:
        return 1.0
    return float(scale[kv_head]) if isinstance(scale, np.ndarray) else scale
