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
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from oracle.attend import SMALL, Block, Solved, blank, blocks, solve
from oracle.case import Case
from oracle.claim import TINY, Claim
from oracle.claim import default_claim as default_claim
from oracle.claim import underflow_unit as underflow_unit
from oracle.claim import unit_roundoff as unit_roundoff
from oracle.weights import LAMBDA, LARGEST, Errors, anchor, gamma, random_in, rooted, weight_errors

HALF = float(np.finfo(np.float16).max)


class Bounds(NamedTuple):
    """The bounds of one block."""

    hard: np.ndarray  # [E, R, G, D]
    soft: np.ndarray  # [E, R, G, D]
    lse: np.ndarray  # [E, R, G]
    vacuous: np.ndarray  # bool [E, R, G]


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
    return analyse_all([case], claim, soft)[0]


def analyse_all(cases: Sequence[Case], claim: Claim, soft: bool = True) -> list[Analysis]:
    """`analyse` of several cases that differ in nothing but their numbers, in one walk over all.

    Block by block NumPy's call overhead is shared. Other padding may give a sum in another order, so a number may
    differ from that of a case alone in its last bits of 53. ValueError where shapes or options differ.
    """
    output, lse = (np.concatenate(parts) for parts in zip(*map(blank, cases), strict=True))
    hard = np.zeros(output.shape)
    softer = np.zeros(output.shape) if soft else hard
    lse_error, vacuous = np.zeros(lse.shape), np.zeros(lse.shape, bool)
    with np.errstate(over="ignore", invalid="ignore"):  # live inf and NaN have an answer too; see verdict
        for block in blocks(*cases):
            solved = solve(block)
            bounds = bound_block(block, solved, claim, soft)
            block.scatter(solved.output, output)
            block.scatter(solved.lse, lse)
            block.scatter(bounds.hard, hard)
            if soft:
                block.scatter(bounds.soft, softer)
            block.scatter(bounds.lse, lse_error)
            block.scatter(bounds.vacuous, vacuous)
    T = cases[0].num_tokens
    rows = [slice(c * T, (c + 1) * T) for c in range(len(cases))]
    return [Analysis(output[r], lse[r], h := hard[r], softer[r] if soft else h, lse_error[r], vacuous[r]) for r in rows]


def bound_block(block: Block, solved: Solved, claim: Claim, soft: bool = True) -> Bounds:
    """Steps 1 to 8 for one block, HARD and (unless it is not asked for: it costs as much) SOFT side by side."""
    B = np.ceil(block.n / claim.block) + 1
    errors = weight_errors(block, solved, B, claim, soft)
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
    n, eta = block.n, underflow(claim, errors.anchor)  # n [E, R, 1]
    w = solved.p * np.expm1(errors.delta)
    w_soft = None if errors.delta_soft is None else solved.p * np.expm1(errors.delta_soft)
    W = w.sum(axis=-1)
    beside = solved.pi * np.expm1(errors.sink) + eta.shared * n / solved.divisor  # of the sink, and by underflow
    moved = W + beside  # how far the denominator may move
    floor = absolute_error(block, solved, W, beside, n + B, claim, eta)
    spread, spread_soft = weighted_spread(block, solved.output, w, w_soft)
    own, own_soft = private_error(block, solved, w, n + B + 1, claim, soft=w_soft is not None)
    th, th_soft = divide_error(n + B + 1, claim, soft=w_soft is not None)
    inner = divided(solved, spread + own + floor, moved, th)
    hard = soft = rounded(block, solved, inner, claim)
    if w_soft is not None:
        random = np.minimum(LAMBDA * spread_soft, spread) + own_soft + floor
        soft = rounded(block, solved, np.minimum(divided(solved, random, moved, th_soft), inner), claim)
    lse = lse_error(solved, moved, th, claim) + errors.anchor
    return Bounds(hard, soft, lse, (moved > 0.5) & (n > 0))


def underflow(claim: Claim, anchor: np.ndarray) -> Underflow:
    """The claim's `eta_p` where it belongs, and flushing of subnormal weights everywhere."""
    factor = np.exp(anchor)
    summed = claim.eta_p if claim.rounded_weights_in_sum else 0.0
    return Underflow(factor * (TINY + summed), factor * (claim.eta_p - summed), factor * TINY)


def absolute_error(block: Block, solved: Solved, W, beside, adds, claim: Claim, eta: Underflow) -> np.ndarray:
    """What the sink's error (step 4) and underflow add to the numerator, in HARD and SOFT alike: `[E, R, G, D]`."""
    _, operands = operand_errors(claim)
    of_values = (eta.shared + (1 + operands) * eta.own) / solved.divisor
    of_sums = (1 + operands) * eta.flushed * adds / solved.divisor + claim.eta_in * (solved.mass + W)
    lost = beside[..., None] * solved.abs_output
    lost += of_values[..., None] * block.value_sum
    lost += of_sums[..., None]
    return lost


def operand_errors(claim: Claim) -> tuple[float, float]:
    """How far a weight as P.V takes it may be off because it is rounded there alone; and its product with a value."""
    u_p = 0.0 if claim.rounded_weights_in_sum else claim.u_p
    return u_p, (1 + u_p) * (1 + claim.u_in) - 1


def weighted_spread(block: Block, o: np.ndarray, w: np.ndarray, w_soft: np.ndarray | None):
    """Step 4: `sum_j w |v - o|`, what weight errors common to numerator and denominator can do, from above where it
    would cost too much; and `sqrt(sum_j w_soft^2 (v - o)^2)`.

    The array of all |v - o| has one element per row, head, key and dim. Past SMALL both come from matrix
    products: the first by the smaller of the Cauchy-Schwarz and the triangle inequality.
    """
    v, (E, R, G, D) = block.values, o.shape
    N = v.shape[1]
    if w.size * D <= SMALL:
        deviation = o.reshape(-1).repeat(N).reshape(E, R * G, D * N)
        deviation -= np.ascontiguousarray(v.swapaxes(1, 2)).reshape(E, 1, D * N)
        np.abs(deviation, out=deviation)
        deviation = deviation.reshape(E, R, G, D, N)
        first = np.matmul(deviation, w[..., None])[..., 0]
        if w_soft is None:
            return first, first
        deviation *= deviation
        return first, np.sqrt(np.matmul(deviation, (w_soft * w_soft)[..., None])[..., 0])
    W = w.sum(axis=-1, keepdims=True)
    triangle = block.mix(w, block.abs_values) + np.abs(o) * W
    first = np.minimum(np.sqrt(W * second_moment(block, o, w)), triangle)
    return first, first if w_soft is None else np.sqrt(second_moment(block, o, w_soft * w_soft))


def second_moment(block: Block, o: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`sum_j w (v - o)^2` by matrix products, never below it: what float64 cancels is added back."""
    v = block.values
    squares = block.mix(w, v * v)
    lift = o * o * w.sum(axis=-1, keepdims=True)
    slack = 4 * (v.shape[1] + 4) * 2.0**-53 * (squares + lift)
    return np.maximum(squares - 2 * o * block.mix(w, v) + lift, 0) + slack


def private_error(block: Block, solved: Solved, w: np.ndarray, adds, claim: Claim, soft: bool):
    """Step 5: N, errors of the numerator alone: weights and values as rounded for P.V, and its summation."""
    u, (u_p, operands) = claim.u, operand_errors(claim)
    steps = adds + (block.case.v_scale is not None)
    sums = gamma(steps, u) * (1 + operands)
    private = solved.p + w
    magnitude = block.mix(private, block.abs_values)  # sum p (1 + rho) |v|
    hard = (operands + sums)[..., None] * magnitude
    if not soft:
        return hard, hard
    norm = np.sqrt(block.mix(private * private, block.values * block.values))
    sums_soft = np.minimum(rooted(steps, u) + 2 * u, sums)
    u_in = random_in(block.case, claim)
    random = LAMBDA * (u_p + u_in) * norm + (sums_soft + claim.u_in - u_in)[..., None] * magnitude
    return hard, np.minimum(random, hard)


def divide_error(adds: np.ndarray, claim: Claim, soft: bool) -> tuple[np.ndarray, np.ndarray]:
    """Step 6: th, the error of the denominator's sum and of the division."""
    rest = claim.eps_div + 2 * claim.u
    hard = gamma(adds, claim.u) + rest
    return hard, rooted(adds, claim.u) + rest if soft else hard


def divided(solved: Solved, error: np.ndarray, moved: np.ndarray, th: np.ndarray) -> np.ndarray:
    """Step 7: the error of the quotient; inf where the denominator could vanish."""
    left = 1 - moved
    safe = (left > 0) & (th < 1)
    error /= np.where(safe, left, 1.0)[..., None]
    error += (solved.abs_output + error) * np.where(safe, th / (1 - th), 0.0)[..., None]
    if not safe.all():
        error[~safe] = np.inf
    return error


def rounded(block: Block, solved: Solved, e: np.ndarray, claim: Claim) -> np.ndarray:
    """Step 8: the output's own rounding. 0 for a row that sees no key, inf where f32 or the output may overflow."""
    reach = solved.abs_output + e
    unclaimed = reach > largest_of(block.case.queries.dtype)
    unclaimed |= block.value_sum > LARGEST
    unclaimed |= operands_overflow(block)
    reach *= claim.u_o
    reach += e
    reach += claim.eta_o
    reach[unclaimed] = np.inf
    reach[block.n[..., 0] == 0] = 0.0
    return reach


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
    log_sum = np.abs(np.log(solved.divisor))
    reach = np.abs(solved.m) + log_sum
    relative = moved * (1 + th) + th
    safe = relative < 1
    inner = np.where(safe, -np.log1p(-np.where(safe, relative, 0.0)), np.inf)
    e = inner + claim.eps_exp * (1 + log_sum) + 4 * claim.u * reach
    return np.where(solved.L > 0, e + 2.0**-24 * (reach + e), 0.0)
