"""A claim: what a kernel declares about its arithmetic, in the symbols of the bound, and what is assumed of one
that declares nothing."""

import dataclasses
import math

from oracle.case import Case

TINY = 2.0**-126  # smallest normal float32: what flushing to zero can take from an intermediate
_UNIT = {
    "float32": 2.0**-24,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
    "float8_e4m3fn": 2.0**-4,
    "float8_e5m2": 2.0**-3,
}
_UNDERFLOW = {"float16": 2.0**-25, "float8_e4m3fn": 2.0**-10, "float8_e5m2": 2.0**-17}
# Dtypes whose every number another dtype holds exactly.
_EXACT_IN = {
    "float32": ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8"),
    "bfloat16": ("float8_e4m3fn", "float8_e5m2", "int8"),
    "float16": ("float8_e4m3fn", "float8_e5m2", "int8"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What a kernel declares about its arithmetic. All are relative roundoffs but the three `eta`, which are absolute.

    Raises ValueError when a field is negative or not finite, or `block` is below 1.
    """

    u: float  # accumulation: 2**-24, or 2**-23 where the matrix unit truncates
    u_in: float  # dot operands (q, k and v): 0 when the stored dtype is what the dots take
    u_q: float  # the scaled query
    u_p: float  # the weights fed to P.V
    u_o: float  # the output
    eta_p: float  # underflow of the weights
    eta_o: float  # underflow of the output
    eps_exp: float  # of the exponential itself; that of a rounded argument is in step 3
    eps_tanh: float
    eps_div: float
    block: int  # the smallest number of keys between two rescalings
    rounded_weights_in_sum: bool = False  # the denominator sums the weights as rounded for P.V
    eta_in: float = TINY  # underflow of dot operands; float16 operands: 2**-25

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Claim.{field.name} = {value}; it must be finite and >= 0")
        if self.block < 1:
            raise ValueError(f"Claim.block = {self.block}; it must be at least 1")


def unit_roundoff(dtype: str) -> float:
    """Half the gap between 1 and the next number of a dtype."""
    return _UNIT[dtype]


def underflow_unit(dtype: str) -> float:
    """The most that rounding to a dtype loses near zero; float32 and bfloat16 may be flushed."""
    return _UNDERFLOW.get(dtype, TINY)


def default_claim(case: Case) -> Claim:
    """The claim of a kernel that declares none: everything rounded to the dots' dtype, sums in float32.

    Its weights may be off by a rounding of 1 too, not only of their own size: a merge that blends two answers by w and
    1 - w (as a ring of devices does) loses so much.
    """
    stored = [case.queries.dtype.name] + ([] if case.quantised else [case.kv_pages.dtype.name])
    dots = case.compute_dtype or max(stored, key=unit_roundoff)
    u_dot = unit_roundoff(dots)
    scaled = case.k_scale is not None or case.v_scale is not None
    exact = not scaled and all(name in (dots, *_EXACT_IN[dots]) for name in [*stored, case.kv_pages.dtype.name])
    return Claim(
        u=2.0**-23,
        u_in=0.0 if exact else u_dot,
        u_q=u_dot,
        u_p=u_dot,
        u_o=unit_roundoff(case.queries.dtype.name),
        eta_p=max(underflow_unit(dots), 2.0**-23),
        eta_o=underflow_unit(case.queries.dtype.name),
        eps_exp=2.0**-21,
        eps_tanh=2.0**-21,
        eps_div=2.0**-21,
        block=1,
        eta_in=underflow_unit(dots),
    )
