"""Conversions and the types of 16 and 8 bits in CUDA C++, compiled by nvcc: against exact rationals.

Signs of zeros and payloads of NaNs are not looked at here: the tests of single instructions do that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from backends import backend_params
from cuda_programs import THREADS, N, check_exactly, kernels, random_floats, random_integers, run
from exact import BF16, E4M3, E5M2, F16, F32, F64, ROUNDINGS, Format, rounded, square_root

pytestmark = backend_params(["emulator"])[0].marks


# The direction, the source and the result of conversions to integers.
TO_INTEGER: dict[str, tuple[str, str, Format, Any]] = {
    "f32_to_s32_rn": ("floats", "rn", F32, np.int32),
    "f32_to_s32_rz": ("floats", "rz", F32, np.int32),
    "f32_to_s32_ru": ("floats", "ru", F32, np.int32),
    "f32_to_u32_rd": ("floats", "rd", F32, np.uint32),
    "f32_to_s64": ("floats", "rn", F32, np.int64),
    "f64_to_u64": ("floats", "rz", F64, np.uint64),
    "f64_to_s32": ("floats", "ru", F64, np.int32),
    "f16_to_s32": ("halves", "rn", F16, np.int32),
    "f16_to_s16": ("halves", "rz", F16, np.int16),
    "bf16_to_u32": ("halves", "rd", BF16, np.uint32),
}


@pytest.mark.parametrize("name", TO_INTEGER)
def test_float_to_integer(name: str) -> None:
    """Saturating. NaN is 0, or the highest bit alone where source or result has 64 bits (PTX ISA, cvt)."""
    stem, mode, source, dtype = TO_INTEGER[name]
    limits = np.iinfo(dtype)
    wide = source is F64 or limits.bits == 64
    of_nan = (limits.min or 1 << limits.bits - 1) if wide else 0

    def model(x: float) -> int:
        if math.isnan(x):
            return of_nan
        if math.isinf(x):
            return limits.max if x > 0 else limits.min
        return max(limits.min, min(ROUNDINGS[mode](x), limits.max))

    x = random_floats(source, 5, 14 if source is F16 else 66)
    got = run(stem, name, np.full(N, 77, dtype), x)
    np.testing.assert_array_equal(got, np.array([model(v) for v in x.astype(np.float64).tolist()], dtype))


FROM_INTEGER: dict[str, tuple[str, Any, Format, str]] = {
    "s32_to_f32_rn": ("floats", np.int32, F32, "rn"),
    "s32_to_f32_rz": ("floats", np.int32, F32, "rz"),
    "u64_to_f32_ru": ("floats", np.uint64, F32, "ru"),
    "u64_to_f64": ("floats", np.uint64, F64, "rn"),
    "s32_to_f16": ("halves", np.int32, F16, "rn"),
    "s32_to_bf16": ("halves", np.int32, BF16, "rn"),
}


@pytest.mark.parametrize("name", FROM_INTEGER)
def test_integer_to_float(name: str) -> None:
    stem, dtype, target, mode = FROM_INTEGER[name]
    x = random_integers(dtype, 6)
    got = run(stem, name, np.zeros(N, target.dtype), x)
    expected = [rounded(Fraction(int(v)), target, mode) for v in x]
    np.testing.assert_array_equal(got.astype(np.float64), expected)


NARROWING: dict[str, tuple[str, Format, Format, str]] = {
    "f64_to_f32_rn": ("floats", F64, F32, "rn"),
    "f64_to_f32_rz": ("floats", F64, F32, "rz"),
    "f64_to_f32_ru": ("floats", F64, F32, "ru"),
    "f32_to_f16": ("halves", F32, F16, "rn"),
    "f32_to_f16_rz": ("halves", F32, F16, "rz"),
    "f32_to_f16_ru": ("halves", F32, F16, "ru"),
    "f32_to_bf16": ("halves", F32, BF16, "rn"),
    "f32_to_bf16_rz": ("halves", F32, BF16, "rz"),
    "f64_to_f16": ("halves", F64, F16, "rn"),
    "f32_to_e4m3": ("halves", F32, E4M3, "rn"),
    "f32_to_e5m2": ("halves", F32, E5M2, "rn"),
    "f16_to_e4m3": ("halves", F16, E4M3, "rn"),
    "bf16_to_e5m2": ("halves", BF16, E5M2, "rn"),
    "f64_to_e4m3": ("halves", F64, E4M3, "rn"),
    "f16_to_f32": ("halves", F16, F32, "rn"),
    "bf16_to_f32": ("halves", BF16, F32, "rn"),
}


def check_conversion(got: np.ndarray, x: np.ndarray, target: Format, mode: str) -> None:
    """FP8 types saturate, and turn infinities into the largest value too."""
    saturate = target in (E4M3, E5M2)
    for value, result in zip(x.astype(np.float64).tolist(), got.astype(np.float64).tolist(), strict=True):
        if math.isnan(value):
            assert math.isnan(result), f"{value}: {result}"
        elif math.isinf(value):
            assert result == (math.copysign(target.largest, value) if saturate else value), f"{value}: {result}"
        else:
            assert result == rounded(Fraction(value), target, mode, saturate), f"{value!r}: {result!r}"


@pytest.mark.parametrize("name", NARROWING)
def test_float_to_float(name: str) -> None:
    """Values around the target's whole range, so that some overflow and some are subnormal, and ties."""
    stem, source, target, mode = NARROWING[name]
    x = random_floats(source, 7, min(20, -source.lowest)).astype(source.dtype)
    ties = np.arange(64) * 2.0 ** (target.lowest - target.precision)  # of the smallest subnormals
    x[:64] = ties.astype(source.dtype)
    x[64:128] = (1 + np.arange(64) * 2.0**-target.precision).astype(source.dtype)
    check_conversion(run(stem, name, np.zeros(N, target.dtype), x), x, target, mode)


@pytest.mark.parametrize(
    ("name", "target", "width"), [("f32x2_to_e4m3x2", E4M3, 2), ("f32x4_to_e5m2x4", E5M2, 4)], ids=["x2", "x4"]
)
def test_vectors_to_fp8(name: str, target: Format, width: int) -> None:
    """The order of elements in a register, too."""
    x = np.concatenate([random_floats(F32, seed, 12) for seed in range(width)])
    got = np.zeros(N * width, target.dtype)
    kernels("halves")[name].launch(N // THREADS, THREADS, args=[x, got])
    check_conversion(got, x, target, "rn")


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("e4m3_to_f32", E4M3, F32),
        ("e5m2_to_f16", E5M2, F16),
        ("e4m3_to_bf16", E4M3, BF16),
        ("e4m3x2_to_f16x2", E4M3, F16),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_fp8_to_float(name: str, source: Format, target: Format) -> None:
    """All 256 codes."""
    x = np.arange(256, dtype=np.uint8).view(source.dtype)
    got = np.zeros(256, target.dtype)
    threads = 256 // (2 if "x2" in name else 1)
    kernels("halves")[name].launch(1, threads, args=[x, got])
    np.testing.assert_array_equal(got.astype(np.float64), x.astype(np.float64))


# Arithmetic


def relu(x: Fraction) -> Fraction:
    return max(x, Fraction(0))


def unit(x: Fraction) -> Fraction:
    return max(Fraction(0), min(x, Fraction(1)))


ARITHMETIC: dict[str, tuple[Format, Callable[[Fraction, Fraction, Fraction], Fraction]]] = {
    "f16_add": (F16, lambda x, y, z: x + y),
    "f16_sub": (F16, lambda x, y, z: x - y),
    "f16_mul": (F16, lambda x, y, z: x * y),
    "f16_fma": (F16, lambda x, y, z: x * y + z),
    "f16_fma_sat": (F16, lambda x, y, z: unit(x * y + z)),
    "f16_fma_relu": (F16, lambda x, y, z: relu(x * y + z)),
    "f16_divide": (F16, lambda x, y, z: x / y),
    "f16_minimum": (F16, lambda x, y, z: min(x, y)),
    "f16_maximum_nan": (F16, lambda x, y, z: max(x, y)),
    "f16_magnitude": (F16, lambda x, y, z: abs(x)),
    "f16_sqrt": (F16, lambda x, y, z: square_root(abs(x))),
    "f16_select": (F16, lambda x, y, z: x if x < y else y if y >= z else z),
    "f16x2_fma": (F16, lambda x, y, z: x * y + z),
    "f16x2_add_sat": (F16, lambda x, y, z: unit(x + y)),
    "f16x2_maximum": (F16, lambda x, y, z: max(x, min(y, z))),
    "f16x2_less": (F16, lambda x, y, z: Fraction(int(x < y))),
    "bf16_add": (BF16, lambda x, y, z: x + y),
    "bf16_mul": (BF16, lambda x, y, z: x * y),
    "bf16_fma": (BF16, lambda x, y, z: x * y + z),
    "bf16_divide": (BF16, lambda x, y, z: x / y),
    "bf16_maximum": (BF16, lambda x, y, z: max(x, y)),
    "bf16_minimum_nan": (BF16, lambda x, y, z: min(x, y)),
    "bf16x2_fma": (BF16, lambda x, y, z: x * y + z),
    "bf16x2_fma_relu": (BF16, lambda x, y, z: relu(x * y + z)),
    "bf16x2_magnitude": (BF16, lambda x, y, z: abs(x)),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name: str) -> None:
    """One rounding of the exact result; both halves of the packed types."""
    target, exact = ARITHMETIC[name]
    spread = 12 if target is F16 else 60
    inputs = [random_floats(target, seed, spread) for seed in range(3)]
    got = np.zeros(N, target.dtype)
    kernels("halves")[name].launch(N // THREADS, THREADS // (2 if "x2" in name else 1), args=[*inputs, got])
    check_exactly(got, target, inputs, exact)


@pytest.mark.parametrize(("name", "number"), [("f16_minimum", True), ("f16_maximum_nan", False)])
def test_nan_of_minimum_and_maximum(name: str, number: bool) -> None:
    """The ordinary ones return the operand that is a number, those with _nan return NaN."""
    x = np.full(N, np.nan, np.float16)
    y = np.full(N, 2, np.float16)
    assert np.isnan(run("halves", name, np.zeros(N, np.float16), x, y, y)).all() == (not number)
    assert np.isnan(run("halves", name, np.zeros(N, np.float16), y, x, y)).all() == (not number)


def test_exp2_of_f16() -> None:
    x = np.linspace(-16, 15.9, N).astype(np.float16)
    got = run("halves", "f16_exp2", np.zeros(N, np.float16), x, x, x)
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(got - exact) <= 1.5 * np.spacing(exact.astype(np.float16)).astype(np.float64)).all()


def test_halves_of_a_pair() -> None:
    """The high half of x, then the low half of y."""
    x, y = np.arange(2 * N, dtype=np.uint16), np.arange(2 * N, 4 * N, dtype=np.uint16)
    got = np.zeros(2 * N, np.uint16)
    kernels("halves")["f16x2_swap"].launch(N // THREADS, THREADS, args=[x, y, y, got])
    np.testing.assert_array_equal(got[0::2], x[1::2])
    np.testing.assert_array_equal(got[1::2], y[0::2])
