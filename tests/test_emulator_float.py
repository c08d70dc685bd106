"""Floating-point arithmetic of the emulator: rounded operations against rationals, approximations within the bounds of
the PTX ISA."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from backends import backend_params
from emulator_lanes import Case, bits_of, check, execute, operands
from exact_floats import FORMATS, Value, add, divide, multiply, square_root
from machines import silicon_too

pytestmark = backend_params(["emulator"])[0].marks

ROUNDINGS = ("rn", "rz", "rm", "rp")


def negated(x: Value) -> Value:
    return -x


OPERATIONS: dict[str, tuple[int, Callable[..., Value]]] = {
    "add": (2, add),
    "sub": (2, lambda a, b, rounding: add(a, negated(b), rounding)),
    "mul": (2, lambda a, b, rounding: multiply(a, b)),
    "fma": (3, lambda a, b, c, rounding: add(multiply(a, b), c, rounding)),
    "mad": (3, lambda a, b, c, rounding: add(multiply(a, b), c, rounding)),
    "div": (2, lambda a, b, rounding: divide(a, b)),
    "rcp": (1, lambda a, rounding: divide(Fraction(1), a)),
    "sqrt": (1, lambda a, rounding: square_root(a)),
}


def model(operation: str, kind: str, rounding: str, modifiers: str) -> Callable[..., int]:
    """One element: bits to bits."""
    form = FORMATS[kind]
    apply = OPERATIONS[operation][1]
    one = form.bias << form.fraction

    def oracle(*codes: int) -> int:
        if "ftz" in modifiers:
            codes = tuple(form.flush(x) for x in codes)
        result = form.code(apply(*(form.value(x) for x in codes), rounding), rounding)
        if "ftz" in modifiers:
            result = form.flush(result)
        is_nan, is_negative = result == form.nan, bool(result >> (form.bits - 1))
        if "sat" in modifiers:
            return 0 if is_nan or is_negative else min(result, one)
        return 0 if "relu" in modifiers and is_negative and not is_nan else result

    return oracle


def in_pairs(oracle: Callable[..., int]) -> Callable[..., int]:
    return lambda *codes: oracle(*(x & 0xFFFF for x in codes)) | oracle(*(x >> 16 for x in codes)) << 16


def any_nan_of_f64(code: int) -> int:
    """The ISA leaves open which NaN comes of a double operation."""
    return FORMATS["f64"].nan if code & (1 << 63) - 1 > FORMATS["f64"].infinity else code


def forms() -> list[tuple[str, str, str]]:
    """(operation, modifiers, type) of all that is rounded."""
    ftz_sat = ("", ".ftz", ".sat", ".ftz.sat")
    result = []
    for operation in ("add", "sub", "mul", "fma", "mad"):
        optional = ("",) if operation in ("add", "sub", "mul") else ()
        result += [(operation, f".{r}{m}", "f32") for r, m in product(ROUNDINGS, ftz_sat)]
        result += [(operation, f".{r}", "f64") for r in ROUNDINGS]
        result += [(operation, m, kind) for m, kind in product(optional, ("f16", "f16x2", "bf16", "bf16x2", "f64"))]
        if operation == "mad":
            continue
        result += [(operation, f".rn{m}", kind) for m, kind in product(ftz_sat, ("f16", "f16x2"))]
        result += [(operation, ".rn", kind) for kind in ("bf16", "bf16x2")]
    result += [("fma", m, kind) for m, kind in product((".rn.relu", ".rn.ftz.relu"), ("f16", "f16x2"))]
    result += [("fma", ".rn.relu", kind) for kind in ("bf16", "bf16x2")]
    for operation in ("div", "rcp", "sqrt"):
        result += [(operation, f".{r}{m}", "f32") for r, m in product(ROUNDINGS, ("", ".ftz"))]
        result += [(operation, f".{r}", "f64") for r in ROUNDINGS]
    return result


@silicon_too
@pytest.mark.parametrize(("operation", "modifiers", "kind"), forms(), ids=lambda x: x)
def test_rounded(operation: str, modifiers: str, kind: str) -> None:
    count = OPERATIONS[operation][0]
    base = kind.removesuffix("x2")
    oracle = model(operation, base, next((r for r in ROUNDINGS if r in modifiers), "rn"), modifiers)
    registers = ", ".join("%" + name for name in "dabc"[: count + 1])
    case = Case(
        f"{operation}{modifiers}.{kind} {registers};",
        f"b{bits_of(kind)}",
        (kind,) * count,
        oracle if base == kind else in_pairs(oracle),
    )
    check(case, same=any_nan_of_f64 if kind == "f64" else lambda x: x)


def nearly_cancelling(kind: str, count: int = 2048) -> list[np.ndarray]:
    """Factors and an addend that nearly undoes their product, or lies at the far end of what an FMA must keep."""
    form = FORMATS[kind]
    a, b, noise = operands((kind,) * 3, count, seed=5)
    rng = np.random.default_rng(6)
    addends = []
    for x, y, z in zip(a.tolist(), b.tolist(), noise.tolist(), strict=True):
        undone = form.code(negated(multiply(form.value(x), form.value(y)))) + int(rng.integers(-2, 3))
        far = z & ~form.nan | int(rng.integers(0, 4))
        addends.append((undone if rng.random() < 0.6 else far) & 2 * form.nan + 1)
    return [a, b, np.array(addends, a.dtype)]


@silicon_too
@pytest.mark.parametrize("rounding", ["rm", "rp"])
def test_root_of_f64_that_is_nearly_a_number(rounding: str) -> None:
    # One root in a thousand has only zeros in the bits that the emulator keeps beyond the result.
    case = Case(f"sqrt.{rounding}.f64 %d, %a;", "b64", ("f64",), model("sqrt", "f64", rounding, ""))
    check(case, operands(("f64",), 16384), any_nan_of_f64)


@silicon_too
@pytest.mark.parametrize(("kind", "rounding"), [("f16", "rn"), ("bf16", "rn"), *product(("f32", "f64"), ROUNDINGS)])
def test_fma_that_cancels(kind: str, rounding: str) -> None:
    oracle = model("fma", kind, rounding, "")
    case = Case(f"fma.{rounding}.{kind} %d, %a, %b, %c;", f"b{bits_of(kind)}", (kind,) * 3, oracle)
    check(case, nearly_cancelling(kind), any_nan_of_f64 if kind == "f64" else lambda x: x)


def test_f64_keeps_the_payload_of_a_nan() -> None:
    a = np.array([0x7FF8000000000123, 0x7FF0000000000456, 0x3FF0000000000000], np.uint64)
    b = np.array([0x3FF0000000000000, 0x7FF8000000000789, 0xFFF8000000000ABC], np.uint64)
    for body in ("add.f64 %d, %a, %b;", "mul.rp.f64 %d, %a, %b;"):
        expected = iter([0x7FF8000000000123, 0x7FF8000000000456, 0xFFF8000000000ABC])
        check(Case(body, "b64", ("f64", "f64"), lambda a, b, e=expected: next(e)), (a, b))


def extremum(kind: str, high: bool, modifiers: str) -> Callable[[int, int], int]:
    """As the ISA writes it, with -0 below +0."""
    form = FORMATS[kind]
    sign = form.nan + 1

    def is_nan(x: int) -> bool:
        return x & form.nan > form.infinity

    def key(x: int) -> tuple[Value, int]:
        return form.value(x), 0 if x & sign else 1

    def oracle(a: int, b: int) -> int:
        signs = (a ^ b) & sign
        if "ftz" in modifiers:
            a, b = (x if is_nan(x) else form.flush(x) for x in (a, b))
        if (is_nan(a) and is_nan(b)) or ("NaN" in modifiers and (is_nan(a) or is_nan(b))):
            return form.nan
        if "abs" in modifiers:
            a, b = a & form.nan, b & form.nan
        numbers = [x for x in (a, b) if not is_nan(x)]
        picked = (max if high else min)(numbers, key=key)
        return picked | signs if "abs" in modifiers else picked

    return oracle


def extremum_forms() -> list[tuple[str, str]]:
    modifiers = ["".join(m) for m in product(("", ".ftz"), ("", ".NaN"), ("", ".xorsign.abs"))]
    result = [(m, kind) for m, kind in product(modifiers, ("f16", "f16x2", "f32"))]
    result += [(m, kind) for m, kind in product(modifiers[:4], ("bf16", "bf16x2"))]
    return [*result, ("", "f64")]


@silicon_too
@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize(("modifiers", "kind"), extremum_forms())
def test_extremum(name: str, modifiers: str, kind: str) -> None:
    base = kind.removesuffix("x2")
    oracle = extremum(base, name == "max", modifiers)
    body = f"{name}{modifiers}.{kind} %d, %a, %b;"
    case = Case(body, f"b{bits_of(kind)}", (kind, kind), oracle if base == kind else in_pairs(oracle))
    check(case, same=any_nan_of_f64 if kind == "f64" else lambda x: x)


@silicon_too
@pytest.mark.parametrize(
    ("modifiers", "kind"),
    [*product(("", ".ftz"), ("f16", "f16x2", "f32")), *product(("",), ("bf16", "bf16x2", "f64"))],
)
@pytest.mark.parametrize("name", ["abs", "neg"])
def test_sign(name: str, modifiers: str, kind: str) -> None:
    base = kind.removesuffix("x2")
    form = FORMATS[base]

    def oracle(a: int) -> int:
        if a & form.nan > form.infinity:
            return a & form.nan if name == "abs" and kind != "f64" else a if name == "abs" else a ^ form.nan + 1
        a = form.flush(a) if modifiers else a
        return a & form.nan if name == "abs" else a ^ (form.nan + 1)

    def of_nan(a: int) -> bool:
        return any((a >> shift & form.nan) > form.infinity for shift in range(0, bits_of(kind), form.bits))

    body = f"{name}{modifiers}.{kind} %d, %a;"
    check(Case(body, f"b{bits_of(kind)}", (kind,), oracle if base == kind else in_pairs(oracle), of_nan))


@silicon_too
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_copysign(kind: str) -> None:
    form = FORMATS[kind]
    oracle = lambda a, b: a & (form.nan + 1) | b & form.nan  # noqa: E731
    check(Case(f"copysign.{kind} %d, %a, %b;", f"b{bits_of(kind)}", (kind, kind), oracle))


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.uint32)


SUBNORMAL = 2.0**-140
SPECIAL = (-math.inf, -SUBNORMAL, -0.0, 0.0, SUBNORMAL, math.inf, math.nan)
NAN = math.nan
# The tables of the ISA, for subnormal inputs with .ftz.
TABLES: dict[str, tuple[float, ...]] = {
    "rcp": (-0.0, -math.inf, -math.inf, math.inf, math.inf, 0.0, NAN),
    "sqrt": (NAN, -0.0, -0.0, 0.0, 0.0, math.inf, NAN),
    "rsqrt": (NAN, -math.inf, -math.inf, math.inf, math.inf, 0.0, NAN),
    "sin": (NAN, -0.0, -0.0, 0.0, 0.0, NAN, NAN),
    "cos": (NAN, 1.0, 1.0, 1.0, 1.0, NAN, NAN),
    "lg2": (NAN, -math.inf, -math.inf, -math.inf, -math.inf, math.inf, NAN),
    "ex2": (0.0, 1.0, 1.0, 1.0, 1.0, math.inf, NAN),
}


def expect_bits(body: str, inputs: tuple[np.ndarray, ...], expected: np.ndarray) -> None:
    got = execute(body, inputs, 8 * expected.itemsize)
    assert got.tolist() == expected.tolist(), f"{body}: got {[hex(x) for x in got.tolist()]}"


def canonical(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), values.view(np.uint32))


@silicon_too
@pytest.mark.parametrize("name", TABLES)
def test_special_values_of_approximations(name: str) -> None:
    expected = canonical(np.array(TABLES[name], np.float32))
    expect_bits(f"{name}.approx.ftz.f32 %d, %a;", (floats(*SPECIAL),), expected)


@silicon_too
def test_special_values_of_tanh() -> None:
    expected = canonical(np.array((-1.0, -SUBNORMAL, -0.0, 0.0, SUBNORMAL, 1.0, NAN), np.float32))
    expect_bits("tanh.approx.f32 %d, %a;", (floats(*SPECIAL),), expected)


def test_subnormal_numbers_of_approximations() -> None:
    tiny = 2.0**-130
    expect_bits("rcp.approx.f32 %d, %a;", (floats(2.0**127, 2.0**-127),), floats(2.0**-127, 2.0**127))
    expect_bits("rcp.approx.ftz.f32 %d, %a;", (floats(2.0**127, -(2.0**127)),), floats(0.0, -0.0))
    expect_bits("ex2.approx.f32 %d, %a;", (floats(-130.0, 128.0),), floats(tiny, math.inf))
    expect_bits("ex2.approx.ftz.f32 %d, %a;", (floats(-130.0, -126.0),), floats(0.0, 2.0**-126))
    expect_bits("lg2.approx.f32 %d, %a;", (floats(tiny),), floats(-130.0))
    expect_bits("rsqrt.approx.f32 %d, %a;", (floats(tiny),), floats(2.0**65))
    expect_bits("sqrt.approx.f32 %d, %a;", (floats(tiny),), floats(2.0**-65))


# Functions, the range of the operand, and bounds of the ISA: relative, absolute.
APPROXIMATIONS: dict[str, tuple[Callable[..., np.ndarray], tuple[float, float], float, float]] = {
    "rcp": (lambda x: 1 / x, (1e-30, 1e30), 2**-23, 0),
    "sqrt": (np.sqrt, (1e-30, 1e30), 2**-22.5, 0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), (1e-30, 1e30), 2**-22.9, 0),
    "sin": (np.sin, (2.0**-20, math.pi), 0, 2**-20.5),
    "cos": (np.cos, (2.0**-20, math.pi), 0, 2**-20.5),
    "lg2": (np.log2, (1e-30, 1e30), 2**-22, 2**-22),
    "ex2": (np.exp2, (2.0**-20, 126), 2**-22, 0),
    "tanh": (np.tanh, (2.0**-20, 20), 2**-11, 0),
}


@silicon_too
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximation(name: str) -> None:
    function, (low, high), relative, absolute = APPROXIMATIONS[name]
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(math.log(low), math.log(high), 4096)).astype(np.float32)
    if name in ("rcp", "sin", "cos", "ex2", "tanh"):
        x *= rng.choice(np.array([-1, 1], np.float32), x.size)
    got = execute(f"{name}.approx.f32 %d, %a;", (x.view(np.uint32),), 32).view(np.float32).astype(np.float64)
    exact = function(x.astype(np.float64))
    assert np.all(np.abs(got - exact) <= relative * np.abs(exact) + absolute)


@silicon_too
@pytest.mark.parametrize(
    ("name", "modifiers", "kind", "bound"),
    [
        ("ex2", "", "f16", 2**-9.9),
        ("ex2", ".ftz", "bf16", 2**-7),
        ("tanh", "", "f16", 2**-10.987),
        ("tanh", "", "bf16", 2**-8),
    ],
)
def test_every_half_of_approximations(name: str, modifiers: str, kind: str, bound: float) -> None:
    form = FORMATS[kind]
    codes = np.arange(1 << 16, dtype=np.uint16)
    got = execute(f"{name}.approx{modifiers}.{kind} %d, %a;", (codes,), 16)
    pairs = codes.astype(np.uint32) | codes[::-1].astype(np.uint32) << np.uint32(16)
    both = execute(f"{name}.approx{modifiers}.{kind}x2 %d, %a;", (pairs,), 32)
    assert np.array_equal(both, got.astype(np.uint32) | got[::-1].astype(np.uint32) << np.uint32(16))
    x = np.array([float(form.value(form.flush(c) if modifiers else c)) for c in range(1 << 16)])
    with np.errstate(over="ignore"):
        exact = np.exp2(x) if name == "ex2" else np.tanh(x)
    values = np.array([float(form.value(c)) for c in got.tolist()])
    assert np.array_equal(np.isnan(values), np.isnan(x))
    assert np.all(got[np.isnan(x)] == form.nan)
    step = 0.0 if modifiers else 2.0 ** (1 - form.bias - form.fraction)  # of subnormal numbers, which .ftz has none of
    least = 2.0 ** (1 - form.bias)
    ordinary = np.isfinite(x) & (np.abs(exact) < 2.0**form.bias) & ((exact >= least) | (step > 0) | (name == "tanh"))
    values, exact, x = values[ordinary], exact[ordinary], x[ordinary]
    assert np.all(np.abs(values - exact) <= bound * np.abs(exact) + step)
    if modifiers:
        assert np.all(values[exact < least * 0.99] == 0)


DIVIDENDS = (1.5, -3.0, 0.0, math.inf, -math.inf, math.nan)


def test_div_approx_loses_large_divisors() -> None:
    b = np.array([2.0**127] * 6, np.float32)
    expected = canonical(np.array([0.0, -0.0, 0.0, NAN, NAN, NAN], np.float32))
    expect_bits("div.approx.f32 %d, %a, %b;", (floats(*DIVIDENDS), b.view(np.uint32)), expected)
    full = canonical(np.array([1.5 * 2.0**-127, -3 * 2.0**-127, 0.0, math.inf, -math.inf, NAN], np.float32))
    expect_bits("div.full.f32 %d, %a, %b;", (floats(*DIVIDENDS), b.view(np.uint32)), full)
    by_zero = canonical(np.array([math.inf, -math.inf, NAN, math.inf, -math.inf, NAN], np.float32))
    expect_bits("div.approx.f32 %d, %a, %b;", (floats(*DIVIDENDS), floats(*[0.0] * 6)), by_zero)
    expect_bits("div.full.ftz.f32 %d, %a, %b;", (floats(*DIVIDENDS), floats(*[2.0**-130] * 6)), by_zero)


@silicon_too
@pytest.mark.parametrize("name", ["approx", "full", "approx.ftz", "full.ftz"])
def test_div_within_two_ulps(name: str) -> None:
    a, b = (x.view(np.float32) for x in operands(("f32", "f32"), 4096, seed=9))
    ordinary = (np.abs(a) < 1e18) & (np.abs(a) > 1e-18) & (np.abs(b) < 1e18) & (np.abs(b) > 1e-18)
    a, b = a[ordinary], b[ordinary]
    assert a.size > 1000
    columns = (a.view(np.uint32), b.view(np.uint32))
    got = execute(f"div.{name}.f32 %d, %a, %b;", columns, 32).view(np.float32).astype(np.float64)
    exact = a.astype(np.float64) / b.astype(np.float64)
    assert np.all(np.abs(got - exact) <= 2 * np.spacing(np.abs(exact).astype(np.float32)))


@silicon_too
@pytest.mark.parametrize("name", ["rcp", "rsqrt"])
def test_f64_approximations_have_an_upper_word(name: str) -> None:
    special = np.array([-math.inf, -1e-310, -0.0, 0.0, 1e-310, math.inf, NAN, 1e308])
    got = execute(f"{name}.approx.ftz.f64 %d, %a;", (special.view(np.uint64),), 64)
    table = np.array([*TABLES[name], 1.0])
    expected = np.where(np.isnan(table), np.uint64(0x7FFFFFFF00000000), table.view(np.uint64))
    assert got[:7].tolist() == expected[:7].tolist()
    assert got[7] == 0 or name == "rsqrt"  # a subnormal reciprocal
    x = np.abs(np.random.default_rng(0).standard_normal(4096)) + 1e-3
    result = execute(f"{name}.approx.ftz.f64 %d, %a;", (x.view(np.uint64),), 64)
    assert not np.any(result & np.uint64(0xFFFFFFFF))
    exact = 1 / x if name == "rcp" else 1 / np.sqrt(x)
    assert np.all(np.abs(result.view(np.float64) - exact) <= 2.0**-19 * exact)


@silicon_too
def test_rsqrt_f64() -> None:
    x = np.abs(np.random.default_rng(0).standard_normal(4096))
    got = execute("rsqrt.approx.f64 %d, %a;", (x.view(np.uint64),), 64).view(np.float64)
    assert np.allclose(got, 1 / np.sqrt(x), rtol=1e-15, atol=0)


@silicon_too
def test_float_constants_take_the_type_of_the_instruction() -> None:
    a = floats(1.0, -2.0)
    expect_bits("add.f32 %d, %a, 0f3E800000;", (a,), floats(1.25, -1.75))
    expect_bits("add.f32 %d, %a, 0.1;", (a,), floats(np.float32(1) + np.float32(0.1), np.float32(-2) + np.float32(0.1)))
    expect_bits("mul.f32 %d, %a, 0d4008000000000000;", (a,), floats(3.0, -6.0))
    doubles = np.array([1.0, -2.0]).view(np.uint64)
    expect_bits("add.f64 %d, %a, 0f3E800000;", (doubles,), np.array([1.25, -1.75]).view(np.uint64))
