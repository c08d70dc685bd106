"""What Hopper's tensor cores compute, one element at a time in integers of any size: the oracle of wgmma and mma.sync.

Written from the PTX ISA and MMA-Sim's description (arXiv 2511.10909), and from nothing in the emulator: values here,
bit fields there.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

DTYPES: dict[str, Any] = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "f32": np.float32,
    "s8": np.int8,
    "u8": np.uint8,
}
# Of a normal number; a subnormal keeps it.
LEAST_EXPONENT = {"e4m3": -6, "e5m2": -14, "f16": -14, "bf16": -126, "tf32": -126, "f32": -126}
NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF}
CODES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def size_of(kind: str) -> int:
    return int(np.dtype(DTYPES[kind]).itemsize)


def encode(kind: str, values: Array) -> Array:
    """The bits of representable ``values``."""
    return values.astype(DTYPES[kind]).view(CODES[size_of(kind)])


def decode(kind: str, codes: Array) -> Array:
    """The values of codes as FP64, which holds them all."""
    seen: Array = codes & np.uint32(0xFFFFE000) if kind == "tf32" else codes
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        values: Array = seen.view(DTYPES[kind]).astype(np.float64, casting="safe")
    return values


def random_codes(kind: str, shape: tuple[int, ...], rng: np.random.Generator, finite: bool = True) -> Array:
    """Any bit patterns, subnormals among them; without ``finite`` infinities and NaN too."""
    codes = rng.integers(0, 1 << 8 * size_of(kind), shape, dtype=np.uint64).astype(CODES[size_of(kind)])
    if kind in LEAST_EXPONENT and finite:
        # Clears the sign and the top of the exponent, and gives back the sign.
        zeroed = codes & ~codes.dtype.type(1 << 8 * size_of(kind) - 2)
        codes = np.where(np.isfinite(decode(kind, codes)), codes, zeroed)
    return codes


def small_codes(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Integers of at most 4 in magnitude: their sums are exact however they are made."""
    return encode(kind, rng.integers(0 if kind == "u8" else -4, 5, shape))


def near_codes(kind: str, shape: tuple[int, ...], rng: np.random.Generator, spread: int = 3) -> Array:
    """Numbers around 1, of which many share in each sum."""
    return encode(kind, rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread + 1, shape))


def tiny_codes(kind: str, shape: tuple[int, ...], rng: np.random.Generator, result: str) -> Array:
    """Numbers whose products lie about the least subnormal of ``result``, as far as they reach."""
    least = LEAST_EXPONENT[result] - (23 if result == "f32" else 10)
    return encode(kind, rng.standard_normal(shape) * 2.0 ** (least // 2 + rng.integers(-1, 2, shape)))


def _parts(kind: str, value: float) -> tuple[int, int, int]:
    """(n, e, exponent) with value = n * 2**e and the exponent that its format gives it. Not of zero."""
    fraction, exponent = math.frexp(value)
    return int(math.ldexp(fraction, 24)), exponent - 24, max(exponent - 1, LEAST_EXPONENT[kind])


def _rounded(total: int, unit: int, dtype: str, bits: int) -> int:
    """The code of total * 2**unit: f16 to nearest even, f32 cut to ``bits`` of fraction and its own."""
    if not total:
        return 0
    top = max(abs(total).bit_length() - 1 + unit, LEAST_EXPONENT[dtype])
    last = top - (10 if dtype == "f16" else min(bits, 23))
    exact = Fraction(total) * Fraction(2) ** (unit - last)
    kept = round(exact) if dtype == "f16" else math.trunc(exact)
    limit = 2.0**16 if dtype == "f16" else 2.0**128
    value = Fraction(kept) * Fraction(2) ** last
    number = math.copysign(math.inf, kept) if abs(value) >= limit else float(value)
    return int(encode(dtype, np.array(number))) if kept else 0


def fused(a: Array, b: Array, c: int, kinds: tuple[str, str, str], bits: int, negate: bool = False) -> int:
    """The code of one element of D: ``a`` and ``b`` are codes along K, ``c`` is the accumulator's; kinds (a, b, d)."""
    x, y = decode(kinds[0], a).tolist(), decode(kinds[1], b).tolist()
    z = float(decode(kinds[2], np.array(c, CODES[size_of(kinds[2])])))
    if not all(map(math.isfinite, [*x, *y, z])):
        total = z if not math.isfinite(z) else 0.0
        for p, q in zip(x, y, strict=True):
            total += -p * q if negate else p * q
        return NAN[kinds[2]] if math.isnan(total) else int(encode(kinds[2], np.array(total)))
    terms = [_parts(kinds[2], z)] if z else []
    for p, q in zip(x, y, strict=True):
        if p and q:
            (n, e, exponent), (m, f, other) = _parts(kinds[0], p), _parts(kinds[1], q)
            terms.append((-n * m if negate else n * m, e + f, exponent + other))
    if not terms:
        return 0
    unit = max(exponent for _, _, exponent in terms) - bits
    total_int = 0
    for n, e, _ in terms:
        aligned = abs(n) << e - unit if e >= unit else abs(n) >> unit - e
        total_int += aligned if n > 0 else -aligned
    return _rounded(total_int, unit, kinds[2], bits)


def integer(a: Array, b: Array, c: Array, kinds: tuple[str, str], saturate: bool) -> Array:
    """D of whole matrices: A [M, K], B [N, K] and C [M, N] as codes."""
    total: Array = decode(kinds[0], a) @ decode(kinds[1], b).T + c.view(np.int32).astype(np.float64)
    if saturate:
        total = np.clip(total, -(2**31), 2**31 - 1)
    return (total.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)


def assert_fused(
    got: Array,
    a: Array,
    b: Array,
    c: Array,
    kinds: tuple[str, str, str],
    bits: int,
    negate: bool = False,
    sample: int = 600,
) -> None:
    """Compare D with the model in ``sample`` random elements, or in all if they are no more."""
    rows, columns = got.shape
    chosen = np.random.default_rng(0).permutation(rows * columns)[:sample]
    for index in chosen.tolist():
        i, j = divmod(index, columns)
        expected = fused(a[i], b[j], int(c[i, j]), kinds, bits, negate)
        assert int(got[i, j]) == expected, f"D[{i}, {j}] is {int(got[i, j]):#x}, the model's is {expected:#x}"
