"""Floating point of everyday CUDA C++, compiled by nvcc: against exact rationals, or within the documented bounds.

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
from cuda_programs import N, check_exactly, random_floats, run
from exact import F32, F64, Format, rounded, square_root

pytestmark = backend_params(["emulator"])[0].marks


def root(x: Fraction) -> Fraction:
    if x < 0:
        raise ValueError
    return square_root(x)


def divided(x: Fraction, y: Fraction, z: Fraction) -> Fraction:
    return x / y


EXACT: dict[str, tuple[str, Callable[..., Fraction]]] = {
    "fma_f32": ("rn", lambda x, y, z: x * y + z),
    "divide_f32": ("rn", divided),
    "sqrt_f32": ("rn", lambda x, y, z: root(x)),
    "fmod_f32": ("rn", lambda x, y, z: x - math.trunc(x / y) * y),
    "remainder_f32": ("rn", lambda x, y, z: x - round(x / y) * y),
    "fdim_f32": ("rn", lambda x, y, z: max(x - y, Fraction(0))),
    "rint_f32": ("rn", lambda x, y, z: Fraction(round(x))),
    "round_f32": ("rn", lambda x, y, z: math.floor(abs(x) + Fraction(1, 2)) * Fraction(1 if x > 0 else -1)),
    "trunc_f32": ("rn", lambda x, y, z: Fraction(math.trunc(x))),
    "floor_f32": ("rn", lambda x, y, z: Fraction(math.floor(x))),
    "ceil_f32": ("rn", lambda x, y, z: Fraction(math.ceil(x))),
    "minimum_f32": ("rn", lambda x, y, z: min(x, y)),
    "maximum_f32": ("rn", lambda x, y, z: max(abs(x), -y)),
    "saturate": ("rn", lambda x, y, z: max(Fraction(0), min(x, Fraction(1)))),
    "scalbn_f32": ("rn", lambda x, y, z: x * Fraction(2) ** max(-300, min(300, math.trunc(y)))),
    "add_rn": ("rn", lambda x, y, z: x + y),
    "add_rz": ("rz", lambda x, y, z: x + y),
    "add_ru": ("ru", lambda x, y, z: x + y),
    "add_rd": ("rd", lambda x, y, z: x + y),
    "mul_rn": ("rn", lambda x, y, z: x * y),
    "mul_rz": ("rz", lambda x, y, z: x * y),
    "mul_ru": ("ru", lambda x, y, z: x * y),
    "mul_rd": ("rd", lambda x, y, z: x * y),
    "fma_rz": ("rz", lambda x, y, z: x * y + z),
    "fma_ru": ("ru", lambda x, y, z: x * y + z),
    "fma_rd": ("rd", lambda x, y, z: x * y + z),
    "div_rz": ("rz", divided),
    "div_ru": ("ru", divided),
    "div_rd": ("rd", divided),
    "sqrt_rz": ("rz", lambda x, y, z: root(x)),
    "sqrt_ru": ("ru", lambda x, y, z: root(x)),
    "sqrt_rd": ("rd", lambda x, y, z: root(x)),
    "reciprocal_rn": ("rn", lambda x, y, z: 1 / x),
    "reciprocal_ru": ("ru", lambda x, y, z: 1 / x),
    "add_ru_f64": ("ru", lambda x, y, z: x + y),
    "mul_rz_f64": ("rz", lambda x, y, z: x * y),
    "fma_rd_f64": ("rd", lambda x, y, z: x * y + z),
    "sqrt_f64": ("rn", lambda x, y, z: root(x)),
    "fmod_f64": ("rn", lambda x, y, z: x - math.trunc(x / y) * y),
    "floor_f64": ("rn", lambda x, y, z: Fraction(math.floor(x))),
    "minimum_f64": ("rn", lambda x, y, z: min(x, y)),
}


@pytest.mark.parametrize("name", EXACT)
def test_correctly_rounded(name: str) -> None:
    """What CUDA promises to round correctly, in all four directions, with subnormals and overflow."""
    mode, exact = EXACT[name]
    target = F64 if name.endswith("f64") else F32
    inputs = [random_floats(target, seed, 70) for seed in range(3)]
    check_exactly(run("floats", name, np.zeros(N, target.dtype), *inputs), target, inputs, exact, mode)


def test_f64_chain() -> None:
    """x * y + z - x / y: an fma, a division and a difference, each rounded."""
    inputs = [random_floats(F64, seed, 20) for seed in range(3)]
    got = run("floats", "arithmetic_f64", np.zeros(N), *inputs)

    def step(value: Fraction) -> Fraction:
        result = rounded(value, F64)
        if math.isinf(result):
            raise ValueError
        return Fraction(result)

    check_exactly(got, F64, inputs, lambda x, y, z: step(x * y + z) - step(x / y))


@pytest.mark.parametrize("name", ["copysign_f32", "nextafter_f32"])
def test_bits_of_floats(name: str) -> None:
    x, y, z = (random_floats(F32, seed, 10) for seed in range(3))
    got = run("floats", name, np.zeros(N, np.float32), x, y, z)
    expected = {"copysign_f32": np.copysign, "nextafter_f32": np.nextafter}[name](x, y)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32))


# Floating point, within bounds


def over(f: Callable[[float], float]) -> Callable[..., np.ndarray]:
    return lambda x, y: np.vectorize(f, otypes=[np.float64])(x)


# (model, bound in ulp of the result, lowest and highest x). Bounds: CUDA C++ programming guide, mathematical functions;
# half an ulp is added because its figures are distances from the rounded result, and these from the exact one.
BOUNDED: dict[str, tuple[Callable[..., Any], float, float, float]] = {
    "exp_f32": (lambda x, y: np.exp(x), 2, -105, 90),
    "exp2_f32": (lambda x, y: np.exp2(x), 2, -150, 129),
    "exp10_f32": (lambda x, y: np.power(10.0, x), 2, -45, 39),
    "expm1_f32": (lambda x, y: np.expm1(x), 1, -30, 89),
    "log_f32": (lambda x, y: np.log(x), 1, 0, math.inf),
    "log2_f32": (lambda x, y: np.log2(x), 1, 0, math.inf),
    "log10_f32": (lambda x, y: np.log10(x), 2, 0, math.inf),
    "log1p_f32": (lambda x, y: np.log1p(x), 1, -1, math.inf),
    "sin_f32": (lambda x, y: np.sin(x), 2, -1e6, 1e6),
    "cos_f32": (lambda x, y: np.cos(x), 2, -1e6, 1e6),
    "tan_f32": (lambda x, y: np.tan(x), 4, -1e6, 1e6),
    "atan2_f32": (np.arctan2, 3, -math.inf, math.inf),
    "asin_f32": (lambda x, y: np.arcsin(x), 4, -1, 1),
    "sinh_f32": (lambda x, y: np.sinh(x), 3, -90, 90),
    "tanh_f32": (lambda x, y: np.tanh(x), 2, -math.inf, math.inf),
    "pow_f32": (np.power, 4, 0, math.inf),
    "erf_f32": (over(math.erf), 2, -math.inf, math.inf),
    "lgamma_f32": (over(math.lgamma), 6, 0.01, 1e30),
    "cbrt_f32": (lambda x, y: np.cbrt(x), 1, -math.inf, math.inf),
    "hypot_f32": (np.hypot, 3, -math.inf, math.inf),
    "rsqrt_f32": (lambda x, y: 1 / np.sqrt(x), 2, 0, math.inf),
    "fast_exp": (lambda x, y: np.exp(x), 2 + 1.173 * 80, -80, 80),
    "fast_divide": (np.divide, 2, -math.inf, math.inf),
    "fast_tanh": (lambda x, y: np.tanh(x), 2.0**13, -math.inf, math.inf),
    "exp_f64": (lambda x, y: np.exp(x), 1, -700, 700),
    "log_f64": (lambda x, y: np.log(x), 1, 0, math.inf),
    "sin_f64": (lambda x, y: np.sin(x), 2, -1e6, 1e6),
    "pow_f64": (np.power, 2, 0, math.inf),
    "rsqrt_f64": (lambda x, y: 1 / np.sqrt(x), 1, 0, math.inf),
}
# Those with an absolute bound where the result crosses zero: (model, bound, lowest, highest x).
ABSOLUTE: dict[str, tuple[Callable[..., Any], float, float, float]] = {
    "fast_log": (np.log, 2.0**-21.41, 0.5, 2),
    "fast_log2": (np.log2, 2.0**-22, 0.5, 2),
    "fast_sin": (np.sin, 2.0**-21.41, -math.pi, math.pi),
    "fast_cos": (np.cos, 2.0**-21.19, -math.pi, math.pi),
}


def in_range(target: Format, seed: int, low: float, high: float) -> np.ndarray:
    """Half spread by magnitude, with NaN among them and corners as far as they are in range, half evenly."""
    x = random_floats(target, seed, 30).astype(np.float64)
    even = np.random.default_rng(seed).uniform(max(low, -100), min(high, 100), N)
    taken = ((x >= low) & (x <= high)) | np.isnan(x)
    taken[::2] = False
    return np.where(taken, x, even).astype(target.dtype)


@pytest.mark.parametrize("name", BOUNDED)
def test_within_ulps(name: str) -> None:
    """numpy in a wider type is the truth: its own error is thousands of times below the bound."""
    model, ulps, low, high = BOUNDED[name]
    target, wide = (F64, np.longdouble) if name.endswith("f64") else (F32, np.float64)
    x, y = in_range(target, 1, low, high), random_floats(target, 2, 3)
    got = run("floats", name, np.zeros(N, target.dtype), x, y, y)
    with np.errstate(all="ignore"):
        exact = np.asarray(model(x.astype(wide), y.astype(wide)), wide)
        nearest: np.ndarray = exact.astype(target.dtype)
    if name == "fast_divide":  # promised for divisors from 2^-126 to 2^126 only
        usual = (np.abs(y) >= 2.0**-126) & (np.abs(y) <= 2.0**126) & np.isfinite(x)
        got, exact, nearest = got[usual], exact[usual], nearest[usual]
    special = ~np.isfinite(nearest) | ~np.isfinite(exact)
    same = (got[special] == nearest[special]) | (np.isnan(got[special]) & np.isnan(nearest[special]))
    # A result at the very edge of overflow may go either way.
    edge = np.isfinite(exact[special])
    assert (same | edge).all(), f"{x[special][~same]}: {got[special][~same]} instead of {nearest[special][~same]}"
    step = np.spacing(np.minimum(np.abs(nearest[~special]), target.largest / 2).astype(target.dtype))
    error = np.abs(got[~special].astype(wide) - exact[~special]) / step
    worst = int(np.argmax(error))
    assert error[worst] <= ulps + 0.5, f"{float(error[worst]):.2f} ulp at x = {x[~special][worst]!r}"
    assert len(error) > N // 3


@pytest.mark.parametrize("name", ABSOLUTE)
def test_within_absolute_bounds(name: str) -> None:
    """The fast functions near their zeros; the bounds are those of the programming guide."""
    model, bound, low, high = ABSOLUTE[name]
    x = np.linspace(low, high, N).astype(np.float32)
    x = x[(x >= low) & (x <= high)]
    x = np.pad(x, (0, N - len(x)), constant_values=1)
    got = run("floats", name, np.zeros(N, np.float32), x, x, x)
    assert np.max(np.abs(got - model(x.astype(np.float64)))) <= bound


def test_fast_pow() -> None:
    """__powf is exp2(y * log2(x)): the error of the logarithm and of the product, times y, and that of the power."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0.1, 10, N).astype(np.float32), rng.uniform(-8, 8, N).astype(np.float32)
    got = run("floats", "fast_pow", np.zeros(N, np.float32), x, y, y)
    exact = np.power(x.astype(np.float64), y)
    exponent = np.abs(y * np.log2(x.astype(np.float64)))
    relative = math.log(2) * (np.abs(y) * 2.0**-21 + exponent * 2.0**-22) + 2.0**-21
    assert (np.abs(got / exact - 1) <= relative).all()


def test_classes() -> None:
    x = random_floats(F32, 9, 100)
    got = run("floats", "f32_classes", np.zeros(N, np.int32), x)
    expected = np.isnan(x) * 17 + 2 * np.isinf(x) + 4 * np.isfinite(x) + 8 * np.signbit(x)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(got[number], expected[number])
    np.testing.assert_array_equal(got[~number] & ~8, 17)
