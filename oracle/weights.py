"""Steps 1 to 3 of the bound: how far the softmax weights of any correct kernel may be off.

The derivation and its symbols stand in `oracle.bound`. Arrays of one number for each row, head and key are most of
what a bound costs, so these functions work in place on what they are given or have made.
"""

from typing import Any, NamedTuple

import numpy as np

from oracle.attend import Block, Solved
from oracle.case import Case
from oracle.claim import TINY, Claim

LAMBDA = 7.5  # of SOFT: an element exceeds it with probability 2 exp(-LAMBDA**2 / 2) = 1.2e-12
LARGEST_DELTA = 700.0  # e^700 is still finite, and a row with such an error vacuous
LARGEST = float(np.finfo(np.float32).max)  # beyond it an f32 intermediate may overflow, so nothing is claimed


class Errors(NamedTuple):
    """How far the weights may be off: each is within a factor e^delta, after a common factor e^anchor."""

    delta: np.ndarray  # [E, R, G, N]
    delta_soft: np.ndarray | None  # [E, R, G, N]; None where SOFT is not asked for
    sink: np.ndarray  # [E, R, G]
    anchor: np.ndarray  # [E, R, G], or [] where it is 0


def weight_errors(block: Block, solved: Solved, B: np.ndarray, claim: Claim, soft: bool) -> Errors:
    """Steps 1 to 3, HARD and SOFT side by side."""

    def after(dx: np.ndarray) -> np.ndarray:
        return weight_error(capped_error(block, solved, dx, claim), solved, B, claim)

    dx, dx_soft = logit_error(block, solved, claim, soft)
    delta_soft = None if dx_soft is None else after(dx_soft)
    return Errors(after(dx), delta_soft, sink_error(block, solved, B, claim), np.zeros(()))


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
    with np.errstate(divide="ignore"):
        return (1 - left) / np.maximum(left, 0.0)


def rooted(k, u: float):
    """`gamma` for SOFT: sqrt(k) roundings, but all k where the unit truncates, for truncation has a bias."""
    if u > 2.0**-24:
        return gamma(k, u)
    return np.minimum(LAMBDA * np.sqrt(k) * u, gamma(k, u))


def random_in(case: Case, claim: Claim) -> float:
    """The part of `u_in` that SOFT may take as random: not that of quantised pages, where equal numbers abound."""
    return 0.0 if case.quantised else claim.u_in


def logit_error(block: Block, solved: Solved, claim: Claim, soft: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Step 1: dx, the error of a scaled logit; and its soft form, if that is asked for."""
    case, D = block.case, block.case.head_dim
    s, u = abs(case.scale), claim.u
    steps = D + 2 + (case.k_scale is not None)
    q, k = np.abs(block.queries), np.abs(block.keys)
    factor = (1 + gamma(steps, u)) * (1 + claim.u_q) * (1 + claim.u_in) ** 2 - 1
    base = operand_underflow(block, q, k, claim)
    base += 2 * u * np.abs(solved.x)
    magnitude = block.score(q, k)
    if magnitude.max(initial=0.0) > LARGEST:
        base[magnitude > LARGEST] = np.inf
    norm = None
    if soft:
        norm = np.sqrt(block.score(q * q, k * k))
        norm *= (rooted(steps, u) + LAMBDA * (claim.u_q + 2 * random_in(case, claim))) * s
        norm += base
        if case.quantised:
            norm += 2 * claim.u_in * s * magnitude
    magnitude *= s * factor
    magnitude += base
    return magnitude, None if norm is None else np.minimum(norm, magnitude, out=norm)


def operand_underflow(block: Block, q: np.ndarray, k: np.ndarray, claim: Claim) -> np.ndarray:
    """What underflow of operands and products adds to step 1, whether s and k_scale meet q, k or q.k."""
    s, ks = abs(block.case.scale), block.k_scale
    on_k = np.maximum(max(s, 1.0), 1 / np.maximum(ks, TINY))
    products = (block.case.head_dim + 2) * TINY * max(1.0, s) * np.maximum(1.0, ks)
    of_query = claim.eta_in * s * q.sum(axis=-1) + products
    return of_query[..., None] + claim.eta_in * on_k[..., None] * k.sum(axis=-1)[:, None, None, :]


def capped_error(block: Block, solved: Solved, dx: np.ndarray, claim: Claim) -> np.ndarray:
    """Step 2: dz, the error of a logit after the cap; the slope of tanh is taken where it is steepest."""
    c = block.case.logits_soft_cap
    if c is None:
        return dx
    slope = np.abs(solved.x)
    dx += 2 * claim.u * slope
    slope -= dx
    np.maximum(slope, 0, out=slope)  # where it is steepest
    slope *= -2 / c
    np.exp(slope, out=slope)  # 1 / cosh(y)**2 is 4 t / (1 + t)**2 with t = exp(-2 y): exp is ten times as fast as cosh
    dx *= slope
    slope += 1
    slope *= slope
    dx /= slope
    dx *= 4
    own = np.abs(solved.z)
    own *= claim.eps_tanh + 2 * claim.u
    own += c * TINY
    dx += own
    return dx


def weight_error(dz: np.ndarray, solved: Solved, B: np.ndarray, claim: Claim) -> np.ndarray:
    """Step 3: delta; a weight is within a factor e^delta of the true one."""
    u, m = claim.u, solved.m
    of_row = u * (m + 2 * np.abs(m)) + (B + 1) * (claim.eps_exp + u)
    if claim.rounded_weights_in_sum:
        of_row = of_row - np.log1p(-claim.u_p)
    rising = u * solved.z
    dz += np.maximum(rising, -3 * rising)  # u (2 |z| - z)
    dz += of_row[..., None]
    return np.minimum(dz, LARGEST_DELTA, out=dz)


def sink_error(block: Block, solved: Solved, B: np.ndarray, claim: Claim) -> np.ndarray:
    """Step 3 for the sink; 0 where there is none."""
    if block.case.softmax_aux is None:
        return np.zeros_like(solved.m)
    u, a, m = claim.u, block.sinks, solved.m
    none = np.isneginf(a)
    a = np.where(none, 0.0, a)
    delta = u * (np.abs(m - a) + 2 * np.abs(a) + 2 * np.abs(m)) + (B + 2) * (claim.eps_exp + u)
    return np.where(none, 0.0, np.minimum(delta, LARGEST_DELTA))
