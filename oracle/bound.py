"""How far any correct kernel may be from the float64 answer: the computed tolerance.

One function per step of the derivation, in its symbols. One row: query q, visible keys j, n of them, head size D,
scale s, cap c, sink a.

    x = s q.k    z = c tanh(x / c)    m = max(z, a)    L = sum e^(z-m) + e^(a-m)    p = e^(z-m) / L    o = sum p v

A kernel that keeps its `Claim` computes each weight as p (1 + r), |r| <= rho. Weight errors enter numerator and
denominator alike, so a common factor cancels:

    o^ - o = (sum_j p_j r_j (v_j - o) - o pi r_t) / (1 + sum p r)          exactly

No order of summation is assumed: every block size, split and reduction tree is covered. The running maxima of an
online softmax telescope, so their roundings sum to u (m - z_j) however many blocks there are.

Three things the short form of the derivation leaves out are kept here, all of them additions to the bound:
the rounding of the *value* operand (`u_in`, beside `u_p`, in step 5); underflow and flushed subnormals
(`eta_in`, `TINY`); and, with quantised pages, one more rounding of each key and of each value, wherever the kernel
applies the scale: to the stored number, to the query or the logit, to the result.

HARD is rigorous. SOFT is its probabilistic form (Ipsen and Zhou; Higham and Mary) and never above it: roundings are
taken as independent and zero-mean, which random data obey and structured data need not.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from oracle.attend import SMALL, Block, Solved, blank, blocks, solve
from oracle.case import Case
from oracle.claim import TINY, Claim
from oracle.claim import default_claim as default_claim
from oracle.claim import underflow_unit as underflow_unit
from oracle.claim import unit_roundoff as unit_roundoff

LAMBDA = 7.5  # of SOFT: an element exceeds it with probability 2 exp(-LAMBDA**2 / 2) = 1.2e-12
HALF = float(np.finfo(np.float16).max)
LARGEST_DELTA = 700.0  # e^700 is still finite, and a row with such an error vacuous
LARGEST = float(np.finfo(np.float32).max)  # beyond it an f32 intermediate may overflow, so nothing is claimed


class Bounds(NamedTuple):
    """The bounds of one block."""

    hard: np.ndarray  # [E, R, G, D]
    soft: np.ndarray  # [E, R, G, D]
    lse: np.ndarray  # [E, R, G]
    vacuous: np.ndarray  # bool [E, R, G]


class Errors(NamedTuple):
    """How far the weights may be off: each is within a factor e^delta, after a common factor e^anchor."""

    delta: np.ndarray  # [E, R, G, N]
    delta_soft: np.ndarray | None  # [E, R, G, N]; None where SOFT is not asked for
    sink: np.ndarray  # [E, R, G]
    anchor: np.ndarray  # [E, R, G]


class Underflow(NamedTuple):
    """What underflow takes from a weight, before dividing by L: all `[E, R, G]`."""

    shared: np.ndarray  # in the denominator too
    own: np.ndarray  # in P.V alone
    flushed: np.ndarray  # of a product in P.V


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """The answer to a case with its bounds, all over the whole output."""

    output: np.ndarray  # f64 [T, Hq, D]
    lse: np.ndarray  # f64 [T, Hq]
    hard: np.ndarray  # f64 [T, Hq, D]; inf where nothing is claimed, 0 where the answer is exact
    soft: np.ndarray  # f64 [T, Hq, D]
    lse_bound: np.ndarray  # f64 [T, Hq]
    vacuous: np.ndarray  # bool [T, Hq]: too ill conditioned for the bound to mean anything


def error_bound(case: Case, claim: Claim) -> np.ndarray:
    """HARD: f64 `[T, Hq, D]`, the largest error of any kernel that keeps the claim; inf where there is none."""
    return analyse(case, claim, soft=False).hard


def soft_bound(case: Case, claim: Claim) -> np.ndarray:
    """SOFT: f64 `[T, Hq, D]`, exceeded on random data with probability 1.2e-12 an element."""
    return analyse(case, claim).soft


def lse_bound(case: Case, claim: Claim) -> np.ndarray:
    """The largest error of a returned log-sum-exp: f64 `[T, Hq]`."""
    return analyse(case, claim, soft=False).lse_bound


def analyse(case: Case, claim: Claim, soft: bool = True) -> Analysis:
    """The answer and all its bounds in one walk over the case; SOFT is HARD where it is not asked for."""
    output, lse = blank(case)
    hard = np.zeros(output.shape)
    softer = np.zeros(output.shape) if soft else hard
    lse_error, vacuous = np.zeros(lse.shape), np.zeros(lse.shape, bool)
    with np.errstate(over="ignore", invalid="ignore"):  # live inf and NaN have an answer too; see verdict
        for block in blocks(case):
            solved = solve(block)
            bounds = bound_block(block, solved, claim, soft)
            block.scatter(solved.output, output)
            block.scatter(solved.lse, lse)
            block.scatter(bounds.hard, hard)
            if soft:
                block.scatter(bounds.soft, softer)
            block.scatter(bounds.lse, lse_error)
            block.scatter(bounds.vacuous, vacuous)
    return Analysis(output, lse, hard, softer, lse_error, vacuous)


def bound_block(block: Block, solved: Solved, claim: Claim, soft: bool = True) -> Bounds:
    """Steps 1 to 8 for one block, HARD and (unless it is not asked for: it costs as much) SOFT side by side."""
    B = np.ceil(block.n / claim.block) + 1
    deltas = [
        weight_error(capped_error(block, solved, dx, claim), solved, B, claim)
        for dx in logit_error(block, solved, claim, soft)
    ]
    sink, common = sink_error(block, solved, B, claim), np.zeros_like(solved.m)
    errors = Errors(deltas[0], deltas[1] if soft else None, sink, common)
    bounds = assemble(block, solved, errors, B, claim)
    if not bounds.vacuous.any():
        return bounds
    heaviest = np.maximum(solved.p.max(axis=-1, initial=0.0), solved.pi)
    better = bounds.vacuous & (heaviest > 0.5)
    if not better.any():
        return bounds
    anchored = assemble(block, solved, anchor(solved, errors), B, claim)
    wide = better[..., None]
    return Bounds(
        np.where(wide, anchored.hard, bounds.hard),
        np.where(wide, anchored.soft, bounds.soft),
        np.where(better, anchored.lse, bounds.lse),
        np.where(better, anchored.vacuous, bounds.vacuous),
    )


def assemble(block: Block, solved: Solved, errors: Errors, B: np.ndarray, claim: Claim) -> Bounds:
    """Steps 4 to 8: what the weights' errors do to the output."""
    n = block.n  # [E, R, 1]
    w = solved.p * np.expm1(errors.delta)
    w_soft = None if errors.delta_soft is None else solved.p * np.expm1(errors.delta_soft)
    rho_sink = np.expm1(errors.sink)
    eta = underflow(claim, errors.anchor)
    lost = eta.shared * n / positive(solved.L)
    shared, shared_soft = shared_error(block, solved, w, w_soft, rho_sink, lost, eta)
    own, own_soft = private_error(block, solved, solved.p + w, n, B, claim, eta, soft=w_soft is not None)
    moved = w.sum(axis=-1) + solved.pi * rho_sink + lost  # how far the denominator may move
    th, th_soft = divide_error(n, B, claim)
    inner = divided(solved, shared + own, moved, th)
    hard = soft = rounded(block, solved, inner, n, claim)
    if w_soft is not None:
        inner_soft = divided(solved, shared_soft + own_soft, moved, th_soft)
        soft = rounded(block, solved, np.minimum(inner_soft, inner), n, claim)
    lse = lse_error(solved, moved, th, claim) + errors.anchor
    return Bounds(hard, soft, lse, (moved > 0.5) & (n > 0))


def underflow(claim: Claim, anchor: np.ndarray) -> Underflow:
    """The claim's `eta_p` where it belongs, and flushing of subnormal weights everywhere."""
    factor = np.exp(anchor)
    summed = claim.eta_p if claim.rounded_weights_in_sum else 0.0
    return Underflow(factor * (TINY + summed), factor * (claim.eta_p - summed), factor * TINY)


def anchor(solved: Solved, errors: Errors) -> Errors:
    """The weights' errors relative to that of the heaviest weight, which a common factor takes away.

    With one weight above 1/2 this leaves the denominator known where the plain form does not: a key that wins by
    far has an error of its own, large if its logit is, and no influence on what it wins.
    """
    top = solved.p.argmax(axis=-1)[..., None]
    at_key = np.take_along_axis(solved.p, top, axis=-1)[..., 0] >= solved.pi
    own = np.where(at_key, np.take_along_axis(errors.delta, top, axis=-1)[..., 0], errors.sink)
    delta_soft = errors.delta if errors.delta_soft is None else errors.delta_soft
    own_soft = np.where(at_key, np.take_along_axis(delta_soft, top, axis=-1)[..., 0], errors.sink)
    sink = np.where(at_key, np.minimum(errors.sink + own, LARGEST_DELTA), 0.0)

    def relative(delta: np.ndarray, own: np.ndarray) -> np.ndarray:
        delta = np.minimum(delta + own[..., None], LARGEST_DELTA)
        kept = np.where(at_key[..., None], 0.0, np.take_along_axis(delta, top, axis=-1))
        np.put_along_axis(delta, top, kept, axis=-1)
        return delta

    softer = None if errors.delta_soft is None else relative(errors.delta_soft, own_soft)
    return Errors(relative(errors.delta, own), softer, sink, own)


def gamma(k, u: float) -> Any:
    """Higham's gamma: k roundings of size u compound to at most this; inf when k u >= 1."""
    left = 1 - k * u
    if isinstance(left, float):
        return (1 - left) / left if left > 0 else np.inf
    return np.where(left > 0, (1 - left) / positive(left), np.inf)


def rooted(k, u: float):
    """`gamma` for SOFT: sqrt(k) roundings, but all k where the unit truncates, for truncation has a bias."""
    if u > 2.0**-24:
        return gamma(k, u)
    return np.minimum(LAMBDA * np.sqrt(k) * u, gamma(k, u))


def random_in(case: Case, claim: Claim) -> float:
    """The part of `u_in` that SOFT may take as random: not that of quantised pages, where equal numbers abound."""
    return 0.0 if case.quantised else claim.u_in


def logit_error(block: Block, solved: Solved, claim: Claim, soft: bool = True):
    """Step 1: dx, the error of a scaled logit; then its soft form, if that is asked for."""
    case, D = block.case, block.case.head_dim
    s, u = abs(case.scale), claim.u
    steps = D + 2 + (case.k_scale is not None)
    q, k = np.abs(block.queries), np.abs(block.keys)
    factor = (1 + gamma(steps, u)) * (1 + claim.u_q) * (1 + claim.u_in) ** 2 - 1
    base = 2 * u * np.abs(solved.x) + operand_underflow(block, q, k, claim)
    magnitude = block.score(q, k)
    if magnitude.max(initial=0.0) > LARGEST:
        base = np.where(magnitude > LARGEST, np.inf, base)
    magnitude *= s
    hard = magnitude * factor + base
    if not soft:
        return (hard,)
    q *= q
    norm = np.sqrt(block.score(q, k * k))
    norm *= (rooted(steps, u) + LAMBDA * (claim.u_q + 2 * random_in(case, claim))) * s
    norm += base
    if case.quantised:
        norm += 2 * claim.u_in * magnitude
    return hard, np.minimum(norm, hard)


def operand_underflow(block: Block, q: np.ndarray, k: np.ndarray, claim: Claim) -> np.ndarray:
    """What underflow of operands and products adds to step 1, whether s and k_scale meet q, k or q.k."""
    s = abs(block.case.scale)
    ks = np.ones(1) if block.case.k_scale is None else np.abs(np.atleast_1d(block.case.k_scale))
    on_k = max(s, 1.0, 1 / max(float(ks.min()), TINY))
    lost = s * q.sum(axis=-1)[..., None] + on_k * k.sum(axis=-1)[:, None, None, :]
    lost *= claim.eta_in
    lost += (block.case.head_dim + 2) * TINY * max(1.0, s) * max(1.0, float(ks.max()))
    return lost


def capped_error(block: Block, solved: Solved, dx: np.ndarray, claim: Claim) -> np.ndarray:
    """Step 2: dz, the error of a logit after the cap; the slope of tanh is taken where it is steepest."""
    c = block.case.logits_soft_cap
    if c is None:
        return dx
    x = np.abs(solved.x)
    dx = dx + 2 * claim.u * x
    slope = np.maximum(x - dx, 0)  # where it is steepest
    slope *= -2 / c
    np.exp(slope, out=slope)  # 1 / cosh(y)**2 is 4 t / (1 + t)**2 with t = exp(-2 y): exp is ten times as fast as cosh
    slope *= 4 / (1 + slope) ** 2
    dx *= slope
    dx += (claim.eps_tanh + 2 * claim.u) * np.abs(solved.z)
    dx += c * TINY
    return dx


def weight_error(dz: np.ndarray, solved: Solved, B: np.ndarray, claim: Claim) -> np.ndarray:
    """Step 3: delta; a weight is within a factor e^delta of the true one."""
    u, z, m = claim.u, solved.z, solved.m[..., None]
    delta = np.abs(z)
    delta *= 2
    delta -= z
    delta += m + 2 * np.abs(m)
    delta *= u
    delta += dz
    delta += ((B + 1) * (claim.eps_exp + u))[..., None]
    if claim.rounded_weights_in_sum:
        delta -= np.log1p(-claim.u_p)
    return np.minimum(delta, LARGEST_DELTA, out=delta)


def sink_error(block: Block, solved: Solved, B: np.ndarray, claim: Claim) -> np.ndarray:
    """Step 3 for the sink; 0 where there is none."""
    u, a, m = claim.u, block.sinks, solved.m
    none = np.isneginf(a)
    a = np.where(none, 0.0, a)
    delta = u * (np.abs(m - a) + 2 * np.abs(a) + 2 * np.abs(m)) + (B + 2) * (claim.eps_exp + u)
    return np.where(none, 0.0, np.minimum(delta, LARGEST_DELTA))


def shared_error(block: Block, solved: Solved, w, w_soft, rho_sink, lost, eta: Underflow):
    """Step 4: C, what weight errors common to numerator and denominator can do; also their underflow."""
    spread, spread_soft = weighted_spread(block, solved.output, w, w_soft)
    floor = (solved.pi * rho_sink + lost)[..., None] * np.abs(solved.output)
    floor += (eta.shared / positive(solved.L))[..., None] * block.value_sum
    hard = spread + floor
    return hard, hard if spread_soft is None else np.minimum(LAMBDA * spread_soft, spread) + floor


def weighted_spread(block: Block, o: np.ndarray, w: np.ndarray, w_soft: np.ndarray | None):
    """`sum_j w |v - o|` and `sqrt(sum_j w_soft^2 (v - o)^2)`, the first from above where it would cost too much.

    The array of all |v - o| has one element per row, head, key and dim. Past SMALL both come from matrix
    products: the first by the smaller of the Cauchy-Schwarz and the triangle inequality.
    """
    v = block.values
    if w.size * v.shape[-1] <= SMALL:
        deviation = v[:, None, None] - o[..., None, :]  # [E, R, G, N, D]
        np.abs(deviation, out=deviation)
        first = np.matmul(w[..., None, :], deviation)[..., 0, :]
        if w_soft is None:
            return first, None
        deviation *= deviation
        return first, np.sqrt(np.matmul((w_soft * w_soft)[..., None, :], deviation)[..., 0, :])
    W = w.sum(axis=-1, keepdims=True)
    triangle = block.mix(w, block.abs_values) + np.abs(o) * W
    first = np.minimum(np.sqrt(W * second_moment(block, o, w)), triangle)
    return first, None if w_soft is None else np.sqrt(second_moment(block, o, w_soft * w_soft))


def second_moment(block: Block, o: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`sum_j w (v - o)^2` by matrix products, never below it: what float64 cancels is added back."""
    v = block.values
    squares = block.mix(w, v * v)
    lift = o * o * w.sum(axis=-1, keepdims=True)
    slack = 4 * (v.shape[1] + 4) * 2.0**-53 * (squares + lift)
    return np.maximum(squares - 2 * o * block.mix(w, v) + lift, 0) + slack


def private_error(block: Block, solved: Solved, private, n, B, claim: Claim, eta: Underflow, soft: bool = True):
    """Step 5: N, errors of the numerator alone: weights and values as rounded for P.V, and its summation."""
    u = claim.u
    u_p = 0.0 if claim.rounded_weights_in_sum else claim.u_p
    steps = n + B + 1 + (block.case.v_scale is not None)
    operands = (1 + u_p) * (1 + claim.u_in) - 1
    sums = gamma(steps, u) * (1 + operands)
    magnitude = block.mix(private, block.abs_values)  # sum p (1 + rho) |v|
    lost = (eta.own[..., None] * block.value_sum + (eta.flushed * (n + B))[..., None]) / positive(solved.L)[..., None]
    lost = (1 + operands) * lost + claim.eta_in * private.sum(axis=-1, keepdims=True)
    hard = (operands + sums)[..., None] * magnitude + lost
    if not soft:
        return hard, hard
    norm = np.sqrt(block.mix(private * private, block.values * block.values))
    sums_soft = np.minimum(rooted(steps, u) + 2 * u, sums)
    u_in = random_in(block.case, claim)
    random = LAMBDA * (u_p + u_in) * norm + (sums_soft + claim.u_in - u_in)[..., None] * magnitude + lost
    return hard, np.minimum(random, hard)


def divide_error(n: np.ndarray, B: np.ndarray, claim: Claim) -> tuple[np.ndarray, np.ndarray]:
    """Step 6: th, the error of the denominator's sum and of the division."""
    rest = claim.eps_div + 2 * claim.u
    return gamma(n + B + 1, claim.u) + rest, rooted(n + B + 1, claim.u) + rest


def divided(solved: Solved, error: np.ndarray, moved: np.ndarray, th: np.ndarray) -> np.ndarray:
    """Step 7: the error of the quotient; inf where the denominator could vanish."""
    left = 1 - moved
    safe = (left > 0) & (th < 1)
    e = error / np.where(safe, left, 1.0)[..., None]
    e += (np.abs(solved.output) + e) * np.where(safe, th / np.where(th < 1, 1 - th, 1.0), 0.0)[..., None]
    return np.where(safe[..., None], e, np.inf)


def rounded(block: Block, solved: Solved, e: np.ndarray, n: np.ndarray, claim: Claim) -> np.ndarray:
    """Step 8: the output's own rounding. 0 for a row that sees no key, inf where f32 or the output may overflow."""
    largest = largest_of(block.case.queries.dtype)
    reach = np.abs(solved.output) + e
    result = e + claim.u_o * reach + claim.eta_o
    unclaimed = (reach > largest) | (block.value_sum > LARGEST) | operands_overflow(block)
    result = np.where(unclaimed, np.inf, result)
    return np.where((n > 0)[..., None], result, 0.0)


@functools.cache
def largest_of(dtype: np.dtype) -> float:
    """The largest finite number of a float dtype."""
    return float(ml_dtypes.finfo(dtype).max)


def operands_overflow(block: Block) -> np.ndarray:
    """Where rounding an operand to the dots' dtype may give inf: bool `[E, 1, 1, 1]`. Only float16 is that narrow."""
    case, s = block.case, abs(block.case.scale)
    none = np.zeros((1, 1, 1, 1), bool)
    if (case.compute_dtype or case.queries.dtype.name) != "float16":
        return none
    stored_so = case.queries.dtype == case.kv_pages.dtype == np.float16
    if stored_so and case.k_scale is None and case.v_scale is None and s <= 1:
        return none
    largest = [np.abs(x).max(axis=tuple(range(1, x.ndim)), initial=0.0) for x in (block.keys, block.values)]
    queries = np.abs(block.queries).max(axis=(1, 2, 3), initial=0.0) * max(1.0, s)
    return (np.max([*largest, queries], axis=0) > HALF)[:, None, None, None]


def lse_error(solved: Solved, moved: np.ndarray, th: np.ndarray, claim: Claim) -> np.ndarray:
    """The error of m + log(sum): the sum's, the logarithm's (as good as the exponential's), and four roundings."""
    log_sum = np.abs(np.log(positive(solved.L)))
    relative = moved * (1 + th) + th
    safe = relative < 1
    inner = np.where(safe, -np.log1p(-np.where(safe, relative, 0.0)), np.inf)
    e = inner + claim.eps_exp * (1 + log_sum) + 4 * claim.u * (np.abs(solved.m) + log_sum)
    return np.where(solved.L > 0, e + 2.0**-24 * (np.abs(solved.m) + log_sum + e), 0.0)


def positive(L: np.ndarray) -> np.ndarray:
    """The denominator, 1 where it is 0: a row that sees nothing has no error to divide."""
    return np.where(L > 0, L, 1.0)
