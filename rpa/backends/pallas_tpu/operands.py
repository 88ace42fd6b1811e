"""Dot operands: one head's keys and values out of the rows of words, and the roundings a TPU has no instruction for."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa.backends.pallas_tpu.plan import Plan
from rpa.backends.pallas_tpu.transfers import Refs

# Where a head's row lies beside the other one, and which half of a word is whose.
KEYS, VALUES = 0, 1


def load(refs: Refs, plan: Plan, head: int, which: int, first: int = 0, count: int | None = None):
    """KEYS or VALUES of one head as a dot operand: [count, dim], of the tokens from `first` on; all without a count."""
    row = head if plan.paired else 2 * head + which
    at = pl.ds(first * plan.word_pitch + row, plan.keys if count is None else count, stride=plan.word_pitch)
    parts = [refs.words[lane, at] for lane in range(plan.lane_tiles)]
    words = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    if not plan.paired:
        return _stored(words, plan)
    if plan.kv_dtype == "float16":
        value = half(words >> 16 if which else words & 0xFFFF)
        return value if plan.f32_dots else value.astype(jnp.bfloat16)
    if plan.f32_dots:
        bits = words & jnp.uint32(0xFFFF0000) if which else words << 16
        return _stored(lax.bitcast_convert_type(bits, jnp.float32), plan)
    bits = words >> 16 if which else words
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


def _stored(value, plan: Plan):
    """Pages whose values a float16 operand may not hold are rounded; the others are exact in it."""
    return rounded(value, plan) if plan.kv_dtype in ("float32", "bfloat16") else value


def rounded(value, plan: Plan):
    """An f32 value as a dot operand: rounded to the compute dtype. Float16 has no matrix unit and stays in f32."""
    if plan.dots == "bfloat16":
        return value.astype(jnp.bfloat16)
    return round_half(value) if plan.dots == "float16" else value


def round_half(value):
    """The nearest IEEE half, ties to even, as f32: a TPU has no f16 arithmetic."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    # 13 bits of the significand go; a carry out of it moves the exponent, which is right.
    near = (magnitude + 0xFFF + ((magnitude >> 13) & 1)) & ~0x1FFF
    normal = jnp.where(near >= 0x47800000, jnp.inf, lax.bitcast_convert_type(near, jnp.float32))  # from 65536 on
    tiny = lax.round(jnp.abs(value) * 2.0**24, lax.RoundingMethod.TO_NEAREST_EVEN) * 2.0**-24
    size = jnp.where(magnitude < 0x38800000, tiny, normal)  # 2**-14, the least normal half
    return jnp.where(magnitude > 0x7F800000, value, jnp.where(bits < 0, -size, size))


def half(bits):
    """f32 of IEEE half bits, subnormals, inf and NaN included: a TPU has no f16 arithmetic."""
    bits = bits.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    # The exponent moves by 112 places; done in floating point it must not meet an f32 subnormal.
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    tiny = magnitude.astype(jnp.float32) * 2.0**-24
    wide = lax.bitcast_convert_type((magnitude << 13) | 0x7F800000, jnp.float32)
    value = jnp.where(magnitude < 0x400, tiny, jnp.where(magnitude >= 0x7C00, wide, normal))
    return jnp.where(bits >= 0x8000, -value, value)


def from_e4m3(stored):
    """e4m3fn bytes [rows, columns], rows a multiple of 4, as bf16 sixteenths of their values.

    TPUs before the 7th convert e4m3 with an exponent bias of 11, not 7, hence the sixteenths. Three of its 256 codes
    mean something else: 0x80 is NaN, not -0; 0x7F and 0xFF are 30, not NaN. They are exchanged four bytes at a time.
    Bundles for 64 tokens of 16 rows on v6e and v5e: 153 and 211; with the three codes compared and selected after the
    conversion 152 and 306; with Mosaic's own conversion 263 and 323; with no care for the three codes 71 and 129.
    """
    word = pltpu.bitcast(stored, jnp.uint32)
    size = word & 0x7F7F7F7F
    nan = ((size + 0x01010101) >> 7) & 0x01010101  # 1 in a byte of 0x7F, which it makes 0x80
    sign = (word ^ size) & (size + 0x7F7F7F7F)  # of what is not zero
    return pltpu.bitcast(sign | (size + nan), jnp.float8_e4m3b11fnuz).astype(jnp.bfloat16)


def dot(a, b, contract: tuple[int, int], plan: Plan):
    """a . b over the named axes, accumulated in f32; f32 operands are not cut to bf16 passes."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if plan.f32_dots else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
