"""Rounding of exact rationals to floating-point formats in any direction, in integer arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class Format(NamedTuple):
    """A binary floating-point format with subnormals."""

    precision: int  # bits of the significand, the leading one included
    lowest: int  # exponent of the smallest normal number
    largest: float
    dtype: Any


E4M3 = Format(4, -6, 448.0, ml_dtypes.float8_e4m3fn)
E5M2 = Format(3, -14, 57344.0, ml_dtypes.float8_e5m2)
F16 = Format(11, -14, 65504.0, np.float16)
BF16 = Format(8, -126, 255 * 2.0**120, ml_dtypes.bfloat16)
F32 = Format(24, -126, float(np.finfo(np.float32).max), np.float32)
F64 = Format(53, -1022, float(np.finfo(np.float64).max), np.float64)


# To an integer: the nearest, even where two are, toward zero, up, down.
ROUNDINGS: dict[str, Callable[[Any], int]] = {"rn": round, "rz": math.trunc, "ru": math.ceil, "rd": math.floor}


def rounded(value: Fraction, target: Format, mode: str = "rn", finite: bool = False) -> float:
    """``value`` in ``target`` as a double. An overflow is infinite where ``mode`` leads there, unless ``finite``."""
    if not value:
        return 0.0
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, target.lowest) - target.precision + 1)
    result = ROUNDINGS[mode](value / unit) * unit
    if abs(result) > Fraction(target.largest):
        away = {"rn": True, "rz": False, "ru": value > 0, "rd": value < 0}[mode]
        largest = math.inf if away and not finite else target.largest
        return largest if value > 0 else -largest
    return float(result)


def square_root(value: Fraction) -> Fraction:
    """To 400 bits, the last of which is set where there are more: enough to round to any format here."""
    shift = 2 * (400 + value.denominator.bit_length())
    scaled = (value.numerator << shift) // value.denominator
    root = math.isqrt(scaled)
    exact = root * root == scaled and (value.numerator << shift) % value.denominator == 0
    return Fraction(root if exact else root | 1, 1 << shift // 2)
