"""Scales and codes by the rules of other projects (``fastfp8/presets.py``), for the Triton kernel of ``quantize``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..presets import Rules
from ..reference import quantize as reference

# Numbers instead of the words of Rules, for those become part of the names of compiled functions.
OURS, DIVIDE, MULTIPLY, INVERSE = (tl.constexpr(number) for number in range(4))
UP_FINITE, UP_FLOORED = tl.constexpr(1), tl.constexpr(2)
INFINITY_BITS, POW2_FLOOR = tl.constexpr(reference.INFINITY_BITS), tl.constexpr(reference.POW2_FLOOR)


def constants(rules: Rules | None) -> dict[str, Any]:
    """The constants of the kernel of ``quantize`` that stand for ``rules``, or for our own."""
    kinds = {"divide": DIVIDE.value, "multiply": MULTIPLY.value, "inverse": INVERSE.value}
    found = {"SCALE": OURS.value, "CODES": OURS.value, "ROUNDING": 0, "FOR_NAN": 0.0, "ONE": False, "NAN_BLOCK": False}
    if rules is None:
        return found
    roundings = {"up_finite": UP_FINITE.value, "up_floored": UP_FLOORED.value}
    return {
        "SCALE": kinds[rules.scale],
        "CODES": kinds[rules.codes],
        "ROUNDING": roundings.get(rules.pow2, 0),
        "ONE": rules.extremes == "one",
        "NAN_BLOCK": rules.nan_block == "nan",
        "FOR_NAN": {"nan": 0.0, "lowest": -448.0, "largest": 448.0}[rules.nan_code],
    }


@triton.jit
def magnitude_bits(values, NAN_BLOCK: tl.constexpr):
    """What amax is the largest of, as the bits of FP32: they are in the order of the magnitudes, NaN above infinity."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits if NAN_BLOCK else tl.where(bits > INFINITY_BITS, 0, bits)


@triton.jit
def scale_and_scaled(
    values,
    amax,
    floor,
    largest_multiplier,
    POW2: tl.constexpr,
    SCALE: tl.constexpr,
    CODES: tl.constexpr,
    ROUNDING: tl.constexpr,
    ONE: tl.constexpr,
    FOR_NAN: tl.constexpr,
):
    """The scales of blocks of that ``amax``, and their ``values`` to be rounded to codes."""
    amax = tl.where(amax < floor, floor, amax)  # a NaN stays
    ordinary = (amax > 0) & (amax < float("inf"))
    multiplier = tl.div_rn(448.0, amax)
    if SCALE == INVERSE:
        multiplier = tl.where(multiplier == float("inf"), largest_multiplier, multiplier)
        if POW2:
            multiplier = (multiplier.to(tl.int32, bitcast=True) & INFINITY_BITS).to(tl.float32, bitcast=True)
        if ONE:
            multiplier = tl.where(ordinary, multiplier, 1.0)
        scale = tl.div_rn(1.0, multiplier)
    else:
        scale = tl.div_rn(amax, 448.0) if SCALE == DIVIDE else amax * (1.0 / 448.0)
        if POW2:
            if ROUNDING == UP_FLOORED:
                scale = tl.maximum(scale, POW2_FLOOR)
            bits = scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
            if ROUNDING == UP_FINITE:
                exponent = tl.minimum(tl.maximum(exponent, 1), 254)
            scale = (exponent << 23).to(tl.float32, bitcast=True)
            multiplier = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        if ONE:
            scale, multiplier = tl.where(ordinary, scale, 1.0), tl.where(ordinary, multiplier, 1.0)
    if CODES == DIVIDE:
        values = tl.div_rn(values, tl.broadcast_to(scale, values.shape))
    elif CODES == INVERSE:
        values *= tl.div_rn(1.0, scale)
    else:
        values *= multiplier
    if FOR_NAN != 0:
        values = tl.where(values == values, values, FOR_NAN)
    return scale, values
