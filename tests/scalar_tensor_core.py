"""Hopper's tensor core, an element at a time in exact rational arithmetic: what tests hold the integer model against.

Written from reference/gemm.md, section 4, and from nothing in fastfp8: rationals here, aligned integers there.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

FRACTION = Fraction(1, 2**13)


def e4m3_parts(code: int) -> tuple[Fraction, int] | None:
    """(signed significand, exponent) of a code; None for a NaN."""
    field, mantissa = divmod(code % 128, 8)
    if code % 128 == 127:
        return None
    significand = Fraction(mantissa, 8) + (1 if field else 0)
    return (-significand if code >= 128 else significand), max(field, 1) - 7


def fp32_parts(value: float) -> tuple[Fraction, int]:
    """(signed significand below 2, exponent) of a finite FP32 number; subnormals at the exponent -126."""
    exponent = max(math.frexp(value)[1] - 1, -126) if value else -126
    return Fraction(value) / Fraction(2) ** exponent, exponent


def toward_zero(value: Fraction, unit: Fraction) -> Fraction:
    return math.trunc(value / unit) * unit


def binade(value: Fraction) -> int:
    """The exponent e with 2**e <= abs(value) < 2**(e + 1); 0 for zero."""
    if not value:
        return 0
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    return exponent if abs(value) >= Fraction(2) ** exponent else exponent - 1


def scalar_k32(a: list[int], b: list[int], acc: float) -> float:
    """NaN for NaN; the exact FP32 value otherwise."""
    pairs = [(e4m3_parts(x), e4m3_parts(y)) for x, y in zip(a, b, strict=True)]
    if math.isnan(acc) or any(part is None for pair in pairs for part in pair):
        return math.nan
    terms = [(x[0] * y[0], x[1] + y[1]) for x, y in pairs] + [fp32_parts(acc)]
    terms = [term for term in terms if term[0]]
    if not terms:
        return 0.0
    top = max(exponent for _, exponent in terms)
    total = sum(toward_zero(s * Fraction(2) ** (e - top), FRACTION) for s, e in terms) * Fraction(2) ** top
    if not total:
        return 0.0
    return float(toward_zero(total, FRACTION * Fraction(2) ** max(binade(total), -126)))


def round_fp32(value: Fraction) -> float:
    """``value`` rounded to the nearest FP32 number, ties to even; infinity beyond its range."""
    unit = Fraction(2) ** max(binade(value) - 23, -149)
    rounded = round(value / unit) * unit  # round() of a Fraction takes ties to even
    return math.copysign(math.inf, value) if abs(rounded) >= 2**128 else float(rounded)


def scalar_gemm(
    a: list[list[int]],
    a_scale: list[list[float]],
    b: list[list[int]],
    b_scale: list[list[float]],
    every: int = 128,
    c: list[list[float]] | None = None,
) -> list[float]:
    """The contract of design.md, section 4, an element at a time. b_scale has a row for each row of b."""
    k = len(a[0])
    out = []
    for i, j in itertools.product(range(len(a)), range(len(b))):
        acc = 0.0
        for first in range(0, k, every):
            partial = 0.0
            for step in range(first, min(first + every, k), 32):
                x, y = ((row[step : step + 32] + [0] * 32)[:32] for row in (a[i], b[j]))
                partial = scalar_k32(x, y, partial)
            scale = round_fp32(Fraction(a_scale[i][first // 128]) * Fraction(b_scale[j][first // 128]))
            acc = round_fp32(Fraction(scale) * Fraction(partial) + Fraction(acc))
        out.append(round_fp32(Fraction(acc) + Fraction(c[i][j])) if c else acc)
    return out
