"""What the arithmetic of each device keeps to, measured by `python -m fuzz.sweep`, and the claims built from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rpa.device import Device
from rpa.signature import Signature

# Unit roundoff of a round-to-nearest conversion, and the largest error it makes below the normal range.
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
UNDERFLOW = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25}
# What each stored dtype converts to without error.
_EXACT_IN = {
    "float32": ("float32",),
    "bfloat16": ("float32", "bfloat16"),
    "float16": ("float32", "float16"),
    "float8_e4m3fn": ("float32", "bfloat16", "float16"),
    "float8_e5m2": ("float32", "bfloat16", "float16"),
    "int8": ("float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class Arithmetic:
    """Relative errors of a device's f32 functions as the kernels use them, and of its accumulation."""

    u: float = 2.0**-23
    eps_exp: float = 2.0**-21
    eps_exp2: float = 2.0**-21
    eps_tanh: float = 2.0**-21
    eps_log: float = 2.0**-21
    eps_div: float = 2.0**-21


# What the contract lets an unmeasured device claim.
DEFAULT = Arithmetic()
# By platform and a part of the device kind; the first that fits counts. Beside each figure, in units of 2**-24, the
# worst that `python -m fuzz.sweep` saw.
MEASURED: tuple[tuple[str, str, Arithmetic], ...] = (
    (
        "cpu",
        "",
        Arithmetic(
            u=2.0**-24,  # 0.999: round-to-nearest, f32, bf16 and f16 operands alike
            eps_exp=2.0**-22,  # 1.36
            eps_exp2=2.0**-17,  # 68
            eps_tanh=2.0**-21,  # 4.75
            eps_log=2.0**-22,  # 1.97
            eps_div=2.0**-23,  # 1.00
        ),
    ),
    (
        "gpu",
        "H200",  # of XLA, Triton and Mosaic GPU the worst; Mosaic's tanh has a figure of its own in its claim
        Arithmetic(
            u=2.0**-23,  # 0.99
            eps_exp=2.0**-22,  # 2.45
            eps_exp2=2.0**-17,  # 68, XLA's; the kernels' own counts as exp
            eps_tanh=2.0**-21,  # 4.98
            eps_log=2.0**-22,  # 3.23
            eps_div=2.0**-22,  # 2.60
        ),
    ),
)


def measured(device: Device) -> Arithmetic:
    """The row of `device`; a device nobody swept, or an interpreter, has the default one."""
    if device.interpreted:
        return DEFAULT
    fits = (row for platform, kind, row in MEASURED if platform == device.platform and kind in device.kind)
    return next(fits, DEFAULT)


def operand_roundoff(stored: str, compute: str) -> float:
    """Roundoff of turning a stored value into a dot operand: 0 where every value survives."""
    return 0.0 if compute in _EXACT_IN[stored] else ROUNDOFF[compute]


def claim(signature: Signature, device: Device, block: int, **changes: Any) -> dict[str, Any]:
    """The keyword arguments of `oracle.Claim` for a kernel that scales logits after the dot, in f32.

    Args:
        block: the fewest keys a block holds.
        changes: fields in which a kernel differs.
    """
    arithmetic = measured(device)
    compute = signature.compute_dtype
    operand = max(operand_roundoff(d, compute) for d in (signature.q_dtype, signature.kv_dtype))
    same = {
        "u": arithmetic.u,
        "u_in": operand,
        "u_q": 0.0,
        "u_p": ROUNDOFF[compute],
        "u_o": ROUNDOFF[signature.q_dtype],
        "eta_p": UNDERFLOW[compute],
        "eta_o": UNDERFLOW[signature.q_dtype],
        "eta_in": UNDERFLOW[compute],
        "eps_exp": arithmetic.eps_exp,
        "eps_tanh": arithmetic.eps_tanh,
        "eps_div": arithmetic.eps_div,
        "block": block,
    }
    return same | changes
