"""A model of a real kernel in NumPy float32: blocked, online softmax, optional split-KV, rounded operands.

It exists to try the bound from the kernel's side: a `Style` is one way a correct kernel may be built, and `claim`
is what a kernel of that style would declare.
"""

import dataclasses

import numpy as np

from oracle import Case, Claim
from oracle.bound import underflow_unit, unit_roundoff
from oracle.case import Sequence, dtype_of, visible

F = np.float32
LOG2E, LN2 = F(np.log2(np.e)), F(np.log(2))


@dataclasses.dataclass(frozen=True)
class Style:
    """One correct way to build the kernel."""

    block: int = 16
    splits: int = 1
    reverse: bool = False  # blocks from the last to the first
    base2: bool = False  # exp2 of logits times log2(e)
    sequential: bool = False  # strictly sequential float32 sums, the worst natural order
    scale_query: bool = False  # the scale goes into the query, which is then rounded
    weights: str = "float32"  # dtype of the weights fed to P.V
    rounded_weights_in_sum: bool = False
    sink_first: bool = False  # the sink starts the running maximum, else it joins at the end
    scales_on_operands: bool = False  # quantisation scales meet k and v, else the logit and the result


def operand_dtype(case: Case) -> str:
    return case.compute_dtype or case.queries.dtype.name


def claim(case: Case, style: Style) -> Claim:
    """What a kernel of this style declares for this case."""
    dots, out = operand_dtype(case), case.queries.dtype.name
    stored = {case.queries.dtype.name, case.kv_pages.dtype.name}
    rounds = not stored <= {dots, "float8_e4m3fn", "float8_e5m2", "int8"} or (
        style.scales_on_operands and (case.k_scale is not None or case.v_scale is not None)
    )
    weights = style.weights != "float32"
    return Claim(
        u=2.0**-24,
        u_in=unit_roundoff(dots) if rounds and dots != "float32" else 0.0,
        u_q=unit_roundoff(dots) if style.scale_query else 0.0,
        u_p=unit_roundoff(style.weights) if weights else 0.0,
        u_o=unit_roundoff(out),
        eta_p=underflow_unit(style.weights),
        eta_o=underflow_unit(out),
        eps_exp=2.0**-21,  # NumPy promises 2.52 ulp
        eps_tanh=2.0**-21,
        eps_div=2.0**-24,
        block=style.block,
        rounded_weights_in_sum=style.rounded_weights_in_sum and weights,
        eta_in=underflow_unit(dots),
    )


def run(case: Case, style: Style) -> tuple[np.ndarray, np.ndarray]:
    """Output in the queries' dtype and lse in float32, as the styled kernel computes them."""
    output = np.zeros(case.queries.shape, case.queries.dtype)
    lse = np.full(case.queries.shape[:2], -np.inf, F)
    for sequence in case.sequences():
        for kv_head in range(case.num_kv_heads):
            heads = slice(kv_head * case.group, (kv_head + 1) * case.group)
            rows = slice(sequence.start, sequence.stop)
            out, log_sum = _head(case, style, sequence, kv_head, case.queries[rows, heads])
            output[rows, heads] = out.astype(case.queries.dtype)
            lse[rows, heads] = log_sum
    return output, lse


def _head(case: Case, style: Style, sequence: Sequence, kv_head: int, queries: np.ndarray):
    R, G, D = queries.shape
    q, x_scale = _queries(case, style, queries.astype(F).reshape(R * G, D))
    mask = np.repeat(_mask(case, sequence), G, axis=0)  # [R * G, context]
    sinks = None
    if case.softmax_aux is not None:
        sinks = np.tile(case.softmax_aux[kv_head * G : (kv_head + 1) * G], R) * (LOG2E if style.base2 else F(1))
    first = sequence.keys[0] // style.block
    starts = np.arange(first, -(-sequence.context_len // style.block)) * style.block
    starts = starts[::-1] if style.reverse else starts
    parts = []
    for split, chunk in enumerate(np.array_split(starts, style.splits)):
        state = _start(R * G, D, sinks if style.sink_first and split == 0 else None)
        for start in chunk:
            k, v = _block(case, style, sequence, kv_head, int(start))
            state = _fold(case, style, state, q, k, v, x_scale(kv_head), mask[:, start : start + style.block])
        parts.append(state)
    m, l, acc = _combine(style, parts)
    if sinks is not None and not style.sink_first:
        m, l, acc = _combine(style, [(m, l, acc), (sinks, np.ones(R * G, F), np.zeros((R * G, D), F))])
    return _finish(case, style, kv_head, m, l, acc, (R, G, D))


def _queries(case: Case, style: Style, q: np.ndarray):
    """The query operand, and what is left to multiply the logit by."""
    dots = dtype_of(operand_dtype(case))
    scale = F(case.scale)
    k_scale = np.broadcast_to(np.asarray(1.0 if case.k_scale is None else case.k_scale, F), case.num_kv_heads)
    rest = np.ones(case.num_kv_heads, F) if style.scales_on_operands else k_scale
    if style.scale_query:
        return (q * scale).astype(dots).astype(F), lambda head: rest[head]
    return q.astype(dots).astype(F), lambda head: scale * rest[head]


def _mask(case: Case, sequence: Sequence) -> np.ndarray:
    lo, hi = visible(sequence.positions, sequence.context_len, case.sliding_window)
    index = np.arange(sequence.context_len)
    return (index >= lo[:, None]) & (index < hi[:, None])


def _block(case: Case, style: Style, sequence: Sequence, kv_head: int, start: int):
    """Key and value operands of one block, with zeros where the first rows' window has not begun."""
    index = np.arange(start, min(start + style.block, sequence.context_len))
    live = index >= sequence.keys[0]
    pages = sequence.pages[np.where(live, index, sequence.keys[0]) // case.page_size]
    slots = case.kv_pages[pages, index % case.page_size]
    dots = dtype_of(operand_dtype(case))
    operands = []
    for combined, scale in ((2 * kv_head, case.k_scale), (2 * kv_head + 1, case.v_scale)):
        x = np.where(live[:, None], slots[:, combined].astype(F), F(0))
        if scale is not None and style.scales_on_operands:
            x = x * F(scale[kv_head] if isinstance(scale, np.ndarray) else scale)
        operands.append(x.astype(dots).astype(F))
    return operands


def _product(style: Style, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if not style.sequential:
        return a @ b
    return np.add.accumulate(a[:, :, None] * b[None], axis=1, dtype=F)[:, -1]


def _exp(style: Style, x: np.ndarray) -> np.ndarray:
    return np.exp2(x) if style.base2 else np.exp(x)


def _start(rows: int, dim: int, sinks: np.ndarray | None):
    m = np.full(rows, -np.inf, F) if sinks is None else sinks.astype(F)
    return m, np.where(np.isneginf(m), F(0), F(1)), np.zeros((rows, dim), F)


def _fold(case: Case, style: Style, state, q, k, v, scale, mask):
    """One block into the running maximum, sum and accumulator."""
    m, l, acc = state
    x = _product(style, q, np.ascontiguousarray(k.T)) * scale
    if case.logits_soft_cap is not None:
        x = F(case.logits_soft_cap) * np.tanh(x / F(case.logits_soft_cap))
    if style.base2:
        x = x * LOG2E
    top = np.maximum(m, np.max(x, axis=1, initial=-np.inf, where=mask)).astype(F)
    shift = np.where(np.isneginf(top), F(0), top)
    alpha = _exp(style, m - shift)
    p = np.where(mask, _exp(style, np.where(mask, x - shift[:, None], F(0))), F(0))
    p_dot = p.astype(dtype_of(style.weights)).astype(F)
    summed = p_dot if style.rounded_weights_in_sum else p
    total = np.add.accumulate(summed, axis=1)[:, -1] if style.sequential else summed.sum(axis=1)
    return top, l * alpha + total, acc * alpha[:, None] + _product(style, p_dot, v)


def _combine(style: Style, parts):
    """Partial softmaxes into one, in order."""
    m = np.max([part[0] for part in parts], axis=0)
    shift = np.where(np.isneginf(m), F(0), m)
    factors = [_exp(style, part[0] - shift) for part in parts]
    l = sum((part[1] * f for part, f in zip(parts, factors, strict=True)), F(0))
    acc = sum((part[2] * f[:, None] for part, f in zip(parts, factors, strict=True)), F(0))
    return m, l, acc


def _finish(case: Case, style: Style, kv_head: int, m, l, acc, shape):
    R, G, D = shape
    out = np.divide(acc, l[:, None], out=np.zeros_like(acc), where=l[:, None] > 0)
    if case.v_scale is not None and not style.scales_on_operands:
        out = out * F(case.v_scale[kv_head] if isinstance(case.v_scale, np.ndarray) else case.v_scale)
    log = np.log2 if style.base2 else np.log
    lse = m + log(l, out=np.zeros_like(l), where=l > 0)
    return out.reshape(R, G, D), (lse * LN2 if style.base2 else lse).reshape(R, G)
