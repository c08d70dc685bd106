"""IEEE 754 arithmetic in rationals: any binary format, rounded in any direction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

Special = float  # an infinity, a NaN or a zero, which has a sign
Value = Fraction | Special


@dataclass(frozen=True)
class Format:
    exponent: int  # bits
    fraction: int  # bits
    finite_only: bool = False  # E4M3: no infinity, and one NaN

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.fraction

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.fraction

    @property
    def largest(self) -> int:
        return (1 << (self.bits - 1)) - 2 if self.finite_only else self.infinity - 1

    @property
    def nan(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def value(self, code: int) -> Value:
        sign = -1 if code >> (self.bits - 1) else 1
        magnitude = code & self.nan
        if magnitude > (self.largest if self.finite_only else self.infinity):
            return math.nan
        if magnitude == self.infinity and not self.finite_only:
            return sign * math.inf
        if magnitude == 0:
            return math.copysign(0.0, sign)
        field, fraction = magnitude >> self.fraction, magnitude & (1 << self.fraction) - 1
        significand = fraction + (1 << self.fraction if field else 0)
        return sign * significand * Fraction(2) ** (max(field, 1) - self.bias - self.fraction)

    def code(self, value: Value, rounding: str = "rn", saturate: bool = False) -> int:
        """The bits of ``value``; with ``saturate`` what lies beyond the largest number becomes that number."""
        negative = math.copysign(1, value) < 0 if isinstance(value, float) else value < 0
        sign = negative << (self.bits - 1)
        if isinstance(value, float):
            if math.isnan(value):
                return self.nan
            return sign | (0 if value == 0 else self.largest if saturate else self.infinity)
        magnitude = abs(value)
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        exponent -= magnitude < Fraction(2) ** exponent
        exponent = max(exponent, 1 - self.bias)
        ulp = Fraction(2) ** (exponent - self.fraction)
        steps = round_to_integer(magnitude / ulp, rounding, negative)
        rounded = steps * ulp
        if rounded > abs(Fraction(self.value(self.largest))):
            towards_zero = rounding == "rz" or rounding == ("rp" if negative else "rm")
            return sign | (self.largest if saturate or towards_zero else self.infinity)
        if steps >= 2 << self.fraction:
            steps, exponent = steps // 2, exponent + 1
        return sign | (steps if steps < 1 << self.fraction else steps + (exponent + self.bias - 1 << self.fraction))

    def flush(self, code: int) -> int:
        """Zero of the same sign for a subnormal number."""
        magnitude = code & self.nan
        return code & 1 << (self.bits - 1) if magnitude < 1 << self.fraction else code


FORMATS = {
    "f16": Format(5, 10),
    "bf16": Format(8, 7),
    "tf32": Format(8, 10),
    "f32": Format(8, 23),
    "f64": Format(11, 52),
    "e4m3": Format(4, 3, finite_only=True),
    "e5m2": Format(5, 2),
}


def round_to_integer(magnitude: Fraction, rounding: str, negative: bool) -> int:
    """``magnitude``, of a number of the sign ``negative``; rna is to nearest with ties away from zero."""
    low = math.floor(magnitude)
    rest = magnitude - low
    if rounding[:2] == "rn":
        half = Fraction(1, 2)
        return low + (rest > half or (rest == half and (rounding == "rna" or low % 2 == 1)))
    away = rounding[:2] == ("rm" if negative else "rp")
    return low + (away and rest > 0)


def _special(value: Value) -> bool:
    return isinstance(value, float)


def _stand_in(value: Value) -> float:
    """A float that does as ``value`` does where something else is an infinity or a NaN."""
    return value if isinstance(value, float) else -1.0 if value < 0 else 1.0


def add(a: Value, b: Value, rounding: str) -> Value:
    if any(_special(x) and x != 0 for x in (a, b)):
        return _stand_in(a) + _stand_in(b)
    total = Fraction(a) + Fraction(b)
    if total:
        return total
    if a == 0 and math.copysign(1, a) == math.copysign(1, b):
        return a
    return -0.0 if rounding == "rm" else 0.0


def multiply(a: Value, b: Value) -> Value:
    if _special(a) or _special(b):
        return _stand_in(a) * _stand_in(b)
    return Fraction(a) * Fraction(b)


def divide(a: Value, b: Value) -> Value:
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else _stand_in(a) * math.copysign(math.inf, b)
    if _special(a) or _special(b):
        return _stand_in(a) / _stand_in(b)
    return Fraction(a) / Fraction(b)


def square_root(a: Value) -> Value:
    """Of an irrational root, a rational on the right side of all numbers of up to 120 bits."""
    if _special(a) or a < 0:
        return a if a == 0 else math.nan if math.isnan(a) or a < 0 else math.inf
    scale = 1 << 1400
    root = math.isqrt(int(Fraction(a) * scale * scale))
    exact = Fraction(root * root, scale * scale) == a
    return Fraction(2 * root + (not exact), 2 * scale)
