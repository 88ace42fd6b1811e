"""A kernel whose every rounding goes against one number of the output: the worst that a claim allows.

Natural roundings partly cancel, so they cannot show that a bound is too low in one of its steps. Here each step of
the computation is perturbed in float64 by all that the claim grants it, with the sign that moves the first dim of
each row furthest.
"""

import numpy as np

from oracle import Case, Claim, attend
from oracle.attend import Block, Solved, blocks, solve
from oracle.bound import gamma


def worst_output(case: Case, claim: Claim, direction: float) -> np.ndarray:
    """The first dim of every row as far up (`direction` 1) or down (-1) as the claim allows: `[T, Hq]`."""
    worst = attend(case)[0][..., 0].copy()
    for block in blocks(case):
        block.scatter(_worst(block, solve(block), claim, direction), worst)
    return worst


def _worst(block: Block, solved: Solved, claim: Claim, direction: float) -> np.ndarray:
    v, o = block.values[:, None, None, :, 0], solved.output[..., 0]
    toward = direction * np.sign(v - o[..., None])  # the way each weight should err
    n = block.n
    B = np.ceil(n / claim.block) + 1
    w = _weights(block, solved, claim, toward, (B + 1)[..., None])
    sink = np.exp(block.sinks - solved.m - direction * np.sign(o) * (B + 2) * (claim.eps_exp + claim.u))
    if claim.rounded_weights_in_sum:
        w = w * (1 + toward * claim.u_p)
    total = w.sum(axis=-1) + sink
    operands = (1 + claim.u_in) * (1 if claim.rounded_weights_in_sum else 1 + claim.u_p)
    up = direction * np.sign(v) > 0
    factor = operands * (1 + gamma(n + B + 1, claim.u))[..., None]
    numerator = (w * v * np.where(up, factor, 2 - factor)).sum(axis=-1)
    against = direction * np.sign(numerator)
    total = total * (1 - against * gamma(n + B + 1, claim.u))
    quotient = numerator / np.where(total > 0, total, 1.0) * (1 + against * claim.eps_div)
    return quotient * (1 + against * claim.u_o)


def _weights(block: Block, solved: Solved, claim: Claim, toward: np.ndarray, times: np.ndarray) -> np.ndarray:
    """exp(z - m) with every error of the logit, the cap, the argument and the exponential to one side."""
    case, u = block.case, claim.u
    products = block.score(np.abs(block.queries), np.abs(block.keys)) * abs(case.scale)
    each = (1 + gamma(case.head_dim + 2, u)) * (1 + claim.u_q) * (1 + claim.u_in) ** 2 - 1
    x = solved.x + toward * each * products
    z = x
    if case.logits_soft_cap is not None:
        z = case.logits_soft_cap * np.tanh(x * (1 + toward * np.sign(x) * u) / case.logits_soft_cap)
        z = z * (1 + toward * np.sign(z) * claim.eps_tanh)
    argument = z - solved.m[..., None]
    argument = argument + toward * u * np.abs(argument)
    w = np.exp(argument + toward * times * np.log1p(claim.eps_exp))
    return np.where(block.mask, w, 0.0)
