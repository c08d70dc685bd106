"""Conversions and moves of the emulator against rationals and ml_dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise, product

import ml_dtypes
import numpy as np
import pytest
from backends import backend_params
from emulator_lanes import Case, bits_of, check, execute, operands, signed
from exact_floats import FORMATS, round_to_integer
from machines import silicon_too

pytestmark = backend_params(["emulator"])[0].marks

INTEGERS = tuple(f"{base}{bits}" for bits in (8, 16, 32, 64) for base in "us")
FLOATS = ("f16", "bf16", "f32", "f64")
FLOAT_ROUNDINGS = ("rn", "rz", "rm", "rp")
INTEGER_ROUNDINGS = ("rni", "rzi", "rmi", "rpi")


def bounds(kind: str) -> tuple[int, int]:
    bits = bits_of(kind)
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def clamp(value: int, kind: str) -> int:
    low, high = bounds(kind)
    return max(low, min(value, high))


def any_nan(kind: str) -> Callable[[int], int]:
    """Of FP64 the ISA leaves open which NaN."""
    form = FORMATS[kind]
    if kind != "f64":
        return lambda code: code
    return lambda code: form.nan if code & form.nan > form.infinity else code


def integer_of(x: int, kind: str) -> int:
    bits = bits_of(kind)
    x &= (1 << bits) - 1
    return signed(x, bits) if kind[0] == "s" else x


@silicon_too
@pytest.mark.parametrize(("to", "of"), list(product(INTEGERS, INTEGERS)))
def test_integer_to_integer(to: str, of: str) -> None:
    # 64-bit registers on either side: the source's upper bits are ignored, the result is extended by its sign.
    def cut(x: int) -> int:
        return integer_of(integer_of(x, of), to)

    check(Case(f"cvt.{to}.{of} %d, %a;", "b64", ("b64",), cut))
    if clamp(bounds(of)[0], to) == bounds(of)[0] and clamp(bounds(of)[1], to) == bounds(of)[1]:
        return  # where .sat is illegal
    check(Case(f"cvt.sat.{to}.{of} %d, %a;", "b64", ("b64",), lambda x: clamp(integer_of(x, of), to)))


def float_to_integer(to: str, of: str, rounding: str, flush: bool) -> Callable[[int], int]:
    form = FORMATS[of]

    def oracle(code: int) -> int:
        value = form.value(form.flush(code) if flush else code)
        if isinstance(value, float):
            if math.isnan(value):
                return 0 if of != "f64" and bits_of(to) < 64 else integer_of(1 << (bits_of(to) - 1), to)
            if value == 0:
                return 0
            return bounds(to)[value > 0]
        magnitude = round_to_integer(abs(value), rounding, value < 0)
        return clamp(-magnitude if value < 0 else magnitude, to)

    return oracle


@silicon_too
@pytest.mark.parametrize("rounding", INTEGER_ROUNDINGS)
@pytest.mark.parametrize(("to", "of"), [x for x in product(INTEGERS, FLOATS) if x[1] != "bf16" or x[0][1:] != "8"])
def test_float_to_integer(to: str, of: str, rounding: str) -> None:
    register = f"b{max(bits_of(to), 16)}"
    mask = (1 << bits_of(register)) - 1
    # Around the ends of the result's range, too.
    ends = [FORMATS[of].code(Fraction(end) + Fraction(offset, 2)) for end in bounds(to) for offset in range(-5, 6)]
    columns = [np.concatenate([operands((of,), 512)[0], np.array(ends, np.uint64).astype(f"u{bits_of(of) // 8}")])]
    for modifiers in ("", ".ftz", ".sat", ".ftz.sat"):
        if ("ftz" in modifiers and of != "f32") or (modifiers and (of == "bf16" or rounding == "rzi")):
            continue
        oracle = float_to_integer(to, of, rounding, "ftz" in modifiers)
        body = f"cvt.{rounding}{modifiers}.{to}.{of} %d, %a;"
        check(Case(body, register, (of,), lambda x, f=oracle: f(x) & mask), columns)


def saturated(code: int, kind: str) -> int:
    form = FORMATS[kind]
    if code >> (form.bits - 1) or code > form.infinity:
        return 0
    return min(code, form.bias << form.fraction)


@silicon_too
@pytest.mark.parametrize("rounding", FLOAT_ROUNDINGS)
@pytest.mark.parametrize(("to", "of"), [x for x in product(FLOATS, INTEGERS) if x[0] != "bf16" or x[1][1:] != "8"])
def test_integer_to_float(to: str, of: str, rounding: str) -> None:
    form = FORMATS[to]
    register = f"b{max(bits_of(of), 16)}"
    # Ties, and numbers next to them.
    rng = np.random.default_rng(1)
    ties = (rng.integers(1, 1 << 12, 256) << rng.integers(0, 50, 256)) + rng.integers(-1, 2, 256)
    column = np.concatenate([operands((register,), 512)[0], ties.astype(f"u{bits_of(register) // 8}")])

    def oracle(x: int) -> int:
        value = integer_of(x, of)
        return form.code(Fraction(value), rounding) if value else 0

    check(Case(f"cvt.{rounding}.{to}.{of} %d, %a;", f"b{form.bits}", (register,), oracle), (column,))
    if to != "bf16":
        body = f"cvt.{rounding}.sat.{to}.{of} %d, %a;"
        check(Case(body, f"b{form.bits}", (register,), lambda x: saturated(oracle(x), to)), (column,))


def float_to_float(to: str, of: str, rounding: str, modifiers: str) -> Callable[[int], int]:
    target, source = FORMATS[to], FORMATS[of]

    def oracle(code: int) -> int:
        if "ftz" in modifiers and of == "f32":
            code = source.flush(code)
        value = source.value(code)
        if rounding.endswith("i") and isinstance(value, Fraction):
            negative = value < 0
            magnitude = round_to_integer(abs(value), rounding, negative)
            value = Fraction(-magnitude if negative else magnitude) if magnitude else -0.0 if negative else 0.0
        result = target.code(value, rounding or "rn", "satfinite" in modifiers)
        if "ftz" in modifiers and to == "f32":
            result = target.flush(result)
        if "relu" in modifiers and result >> (target.bits - 1):
            return 0
        return saturated(result, to) if ".sat" in modifiers.replace("satfinite", "") else result

    return oracle


def with_ties(column: np.ndarray, to: str, of: str) -> np.ndarray:
    """Adds numbers in the middle between two of ``to``."""
    lost = FORMATS[of].fraction - FORMATS[to].fraction
    if lost <= 0:
        return column
    ties = (column.astype(np.uint64) >> np.uint64(lost) << np.uint64(lost)) | np.uint64(1 << (lost - 1))
    return np.concatenate([column, ties.astype(column.dtype)])


def scalar_forms() -> list[tuple[str, str, str, str]]:
    """(to, from, rounding, modifiers)"""
    result: list[tuple[str, str, str, str]] = []
    ftz_sat = ("", ".ftz", ".sat", ".ftz.sat")
    relu_finite = (".relu", ".satfinite", ".relu.satfinite", ".satfinite.relu")
    for r in FLOAT_ROUNDINGS:
        result += [("f16", "f32", r, m) for m in ftz_sat]
        result += [("f32", "f64", r, m) for m in ftz_sat]
        result += [("f16", "f64", r, m) for m in ("", ".sat")]
        result += [("bf16", "f32", r, m) for m in ("", ".ftz")]
        result += [("bf16", "f64", r, ""), ("bf16", "f16", r, ""), ("f16", "bf16", r, "")]
    for r in ("rn", "rz"):
        result += [(to, "f32", r, m) for to, m in product(("f16", "bf16"), relu_finite)]
    result += [(to, of, "", m) for (to, of), m in product((("f32", "f16"), ("f64", "f32"), ("f32", "f32")), ftz_sat)]
    result += [("f64", "f16", "", m) for m in ("", ".sat")]
    result += [("f32", "bf16", "", ""), ("f32", "bf16", "", ".ftz"), ("f64", "bf16", "", ""), ("f32", "bf16", "rn", "")]
    for r in ("", *INTEGER_ROUNDINGS):
        result += [(kind, kind, r, m) for kind, m in product(("f16", "f64"), ("", ".sat"))]
        result += [("f32", "f32", r, m) for m in ftz_sat if r]
        result += [("bf16", "bf16", r, "")] if r else []
    return result


@silicon_too
@pytest.mark.parametrize(("to", "of", "rounding", "modifiers"), scalar_forms())
def test_float_to_float(to: str, of: str, rounding: str, modifiers: str) -> None:
    body = f"cvt{'.' if rounding else ''}{rounding}{modifiers}.{to}.{of} %d, %a;"
    case = Case(body, f"b{bits_of(to)}", (of,), float_to_float(to, of, rounding, modifiers))
    check(case, (with_ties(operands((of,), 700, seed=2)[0], to, of),), any_nan(to))


@silicon_too
@pytest.mark.parametrize(
    ("rounding", "modifiers"), [*product(("rn", "rz"), ("", ".relu")), *product(["rna"], ["", ".satfinite"])]
)
def test_tf32(rounding: str, modifiers: str) -> None:
    inner = float_to_float("tf32", "f32", rounding, modifiers)

    def oracle(code: int) -> int:
        result = inner(code)
        return 0x7FFFFFFF if result == FORMATS["tf32"].nan else result << 13

    column = with_ties(operands(("f32",), 2048)[0], "tf32", "f32")
    check(Case(f"cvt.{rounding}{modifiers}.tf32.f32 %d, %a;", "b32", ("f32",), oracle), (column,))


@silicon_too
@pytest.mark.parametrize("to", ["f16", "bf16"])
@pytest.mark.parametrize("rounding", ["rn", "rz"])
@pytest.mark.parametrize("modifiers", ["", ".relu", ".satfinite", ".relu.satfinite"])
def test_pairs_of_halves(to: str, rounding: str, modifiers: str) -> None:
    one = float_to_float(to, "f32", rounding, modifiers)
    body = f"cvt.{rounding}{modifiers}.{to}x2.f32 %d, %a, %b;"
    check(Case(body, "b32", ("f32", "f32"), lambda a, b: one(a) << 16 | one(b)))


FP8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


@silicon_too
@pytest.mark.parametrize("to", FP8)
@pytest.mark.parametrize("modifiers", [".satfinite", ".satfinite.relu", ".relu.satfinite"])
def test_pairs_of_fp8(to: str, modifiers: str) -> None:
    one = float_to_float(to, "f32", "rn", modifiers)
    body = f"cvt.rn{modifiers}.{to}x2.f32 %d, %a, %b;"
    # Around every number of the format, and every middle between two.
    form = FORMATS[to]
    numbers = [form.value(code) for code in range(form.largest + 1)]
    near = [
        float(x) * (1 + sign * 2.0**-20)
        for pair in pairwise(numbers)
        for x in (pair[1], (Fraction(pair[0]) + Fraction(pair[1])) / 2)
        for sign in (-1, 0, 1)
    ]
    column = np.concatenate([np.array([*near, *(-x for x in near)], np.float32).view(np.uint32), operands(("f32",))[0]])
    check(Case(body, "b16", ("f32", "f32"), lambda a, b: one(a) << 8 | one(b)), (column, column[::-1].copy()))
    halves = float_to_float(to, "f16", "rn", modifiers)
    codes = np.arange(0, 1 << 16, 37 if "relu" in modifiers else 1, dtype=np.uint32)
    expected = np.array([halves(code) for code in codes.tolist()], np.uint16)
    got = execute(f"cvt.rn{modifiers}.{to}x2.f16x2 %d, %a;", (codes | codes[::-1] << np.uint32(16),), 16)
    assert np.array_equal(got, expected[::-1] << np.uint16(8) | expected)


@silicon_too
@pytest.mark.parametrize("to", FP8)
def test_fp8_as_ml_dtypes_rounds(to: str) -> None:
    x = np.random.default_rng(0).standard_normal(1 << 14).astype(np.float32) * np.float32(8)
    got = execute(f"cvt.rn.satfinite.{to}x2.f32 %d, %a, %a;", (x.view(np.uint32),), 16)
    assert np.array_equal((got & 0xFF).astype(np.uint8), x.astype(FP8[to]).view(np.uint8))


@silicon_too
@pytest.mark.parametrize("of", FP8)
@pytest.mark.parametrize("modifiers", ["", ".relu"])
def test_every_pair_of_fp8_to_halves(of: str, modifiers: str) -> None:
    codes = np.arange(1 << 16, dtype=np.uint16)
    values = np.arange(256, dtype=np.uint8).view(FP8[of]).astype(np.float16)
    halves = np.where(np.isnan(values), np.uint16(0x7FFF), values.view(np.uint16)).astype(np.uint32)
    if modifiers:
        halves[(halves >> 15) != 0] = 0
    got = execute(f"cvt.rn{modifiers}.f16x2.{of}x2 %d, %a;", (codes,), 32)
    assert np.array_equal(got, halves[codes >> 8] << np.uint32(16) | halves[codes & 255])


@silicon_too
@pytest.mark.parametrize("kind", ["u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2"])
def test_cvt_pack(kind: str) -> None:
    bits = int(kind[1:])
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)

    def pair(a: int, b: int) -> int:
        parts = [max(low, min(x, high)) & (1 << bits) - 1 for x in (a, b)]
        return parts[0] << bits | parts[1]

    if bits == 16:
        check(Case(f"cvt.pack.sat.{kind}.s32 %d, %a, %b;", "b32", ("s32", "s32"), pair))
        return
    body = f"cvt.pack.sat.{kind}.s32.b32 %d, %a, %b, %c;"
    columns = operands(("s32", "s32", "b32"))
    small = (columns[0] % np.uint32(1 << (bits + 1))) - np.uint32(1 << bits)  # most are near the range
    oracle = lambda a, b, c: pair(a, b) | c << 2 * bits  # noqa: E731
    check(Case(body, "b32", ("s32", "s32", "b32"), oracle), columns)
    check(Case(body, "b32", ("s32", "s32", "b32"), oracle), (small, columns[1], columns[2]))


@silicon_too
def test_cvt_reads_constants_and_special_registers() -> None:
    lanes = np.arange(256, dtype=np.uint32)
    got = execute("cvt.u64.u32 %d, %tid.x; add.s64 %d, %d, 5;", (lanes,), 64)
    assert np.array_equal(got, lanes % 128 + 5)
    assert execute("cvt.rn.f32.s32 %d, -3;", (lanes,), 32).view(np.float32).tolist() == [-3.0] * 256
    assert execute("cvt.rzi.s32.f32 %d, 2.75;", (lanes,), 32).tolist() == [2] * 256


MOVES = {
    "mov.b32 {%h0, %h1}, %a; mov.b32 %d, {%h1, %h0};": ("b32", "b32", lambda a: a >> 16 | a << 16),
    "mov.b64 {%r0, %r1}, %a; mov.b64 %d, {%r1, %r0};": ("b64", "b64", lambda a: a >> 32 | a << 32),
    "mov.b64 {%h0, %h1, %h2, %h3}, %a; mov.b64 %d, {%h3, %h1, %h2, %h0};": (
        "b64",
        "b64",
        lambda a: a >> 48 | a & 0xFFFF0000 | a & 0xFFFF00000000 | (a & 0xFFFF) << 48,
    ),
    "mov.b32 {_, %h1}, %a; mov.b32 %d, {%h1, 7};": ("b32", "b32", lambda a: a >> 16 | 7 << 16),
    "{ .reg .b8 %z<4>; mov.b32 {%z0, %z1, %z2, %z3}, %a; mov.b32 %d, {%z3, %z2, %z1, %z0}; }": (
        "b32",
        "b32",
        lambda a: int.from_bytes(a.to_bytes(4, "little"), "big"),
    ),
    "{ .reg .b8 %z<2>; mov.b16 {%z0, %z1}, %a; mov.b16 %d, {%z1, %z0}; }": (
        "b16",
        "b16",
        lambda a: (a >> 8 | a << 8) & 0xFFFF,
    ),
    "mov.u16 %d, %a;": ("b16", "b16", lambda a: a),
    "mov.f64 %d, %a;": ("b64", "b64", lambda a: a),
    "mov.b32 %d, 0f3FC00000;": ("b32", "b32", lambda a: 0x3FC00000),
    "mov.f32 %d, -1.5;": ("b32", "b32", lambda a: 0xBFC00000),
    "mov.u32 %d, -1;": ("b32", "b32", lambda a: 0xFFFFFFFF),
    "mov.b64 %d, 0d3FF8000000000000;": ("b64", "b64", lambda a: 0x3FF8000000000000),
    "mov.u32 %d, %laneid;": ("b32", "b32", None),
}


@silicon_too
@pytest.mark.parametrize("body", MOVES)
def test_mov(body: str) -> None:
    result, of, oracle = MOVES[body]
    if oracle is None:
        lanes = iter(range(1 << 20))
        oracle = lambda a: next(lanes) % 32  # noqa: E731
    check(Case(body, result, (of,), oracle))
