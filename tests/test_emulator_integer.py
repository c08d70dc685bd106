"""Integer arithmetic of the emulator, carries among it, against Python's integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
from backends import backend_params
from emulator_lanes import Case, bits_of, check, signed
from machines import silicon_too

pytestmark = backend_params(["emulator"])[0].marks

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
CARRYING = ("u32", "s32", "u64", "s64")
S32_MIN, S32_MAX = -(1 << 31), (1 << 31) - 1


def clamp(value: int) -> int:
    return max(S32_MIN, min(value, S32_MAX))


def quotient(a: int, b: int, bits: int) -> int:
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def by_zero(a: int, b: int) -> bool:
    return b == 0


def remainder(a: int, b: int, bits: int) -> int:
    return -1 if b == 0 else a - b * quotient(a, b, bits)


def halves(f: Callable[[int, int], int], is_signed: bool) -> Callable[..., int]:
    def both(a: int, b: int) -> int:
        parts = [[x >> shift & 0xFFFF for x in (a, b)] for shift in (0, 16)]
        low, high = (f(*(signed(x, 16) if is_signed else x for x in part)) & 0xFFFF for part in parts)
        return low | high << 16

    return both


def wide(kind: str) -> str:
    return kind[0] + str(2 * bits_of(kind))


def low_24(x: int, kind: str) -> int:
    return signed(x & 0xFFFFFF, 24) if kind == "s32" else x & 0xFFFFFF


def of_each(kinds: tuple[str, ...], body: str, count: int, f: Callable[..., int]) -> list[Case]:
    """A case for each type, of ``count`` operands."""
    operands = ", ".join("%" + name for name in "dabc"[: count + 1])
    return [Case(f"{body}.{kind} {operands};", kind, (kind,) * count, f) for kind in kinds]


def with_bits(kinds: tuple[str, ...], body: str, count: int, f: Callable[..., int]) -> list[Case]:
    """As ``of_each``; ``f`` gets the type's bits after the operands."""

    def bound(bits: int) -> Callable[..., int]:
        return lambda *x: f(*x, bits)

    return [case for kind in kinds for case in of_each((kind,), body, count, bound(bits_of(kind)))]


CASES = [
    *of_each(INTEGERS, "add", 2, lambda a, b: a + b),
    *of_each(INTEGERS, "sub", 2, lambda a, b: a - b),
    *of_each(("s32",), "add.sat", 2, lambda a, b: clamp(a + b)),
    *of_each(("s32",), "sub.sat", 2, lambda a, b: clamp(a - b)),
    *of_each(INTEGERS, "mul.lo", 2, lambda a, b: a * b),
    *with_bits(INTEGERS, "mul.hi", 2, lambda a, b, bits: a * b >> bits),
    *of_each(INTEGERS, "mad.lo", 3, lambda a, b, c: a * b + c),
    *with_bits(INTEGERS, "mad.hi", 3, lambda a, b, c, bits: (a * b >> bits) + c),
    *of_each(("s32",), "mad.hi.sat", 3, lambda a, b, c: clamp((a * b >> 32) + c)),
    *of_each(INTEGERS, "sad", 3, lambda a, b, c: c + abs(a - b)),
    *(replace(case, unspecified=by_zero) for case in with_bits(INTEGERS, "div", 2, quotient)),
    *(replace(case, unspecified=by_zero) for case in with_bits(INTEGERS, "rem", 2, remainder)),
    *of_each(("s16", "s32", "s64"), "abs", 1, abs),
    *of_each(("s16", "s32", "s64"), "neg", 1, lambda a: -a),
    *of_each(INTEGERS, "min", 2, min),
    *of_each(INTEGERS, "max", 2, max),
    *of_each(("s32",), "min.relu", 2, lambda a, b: max(min(a, b), 0)),
    *of_each(("s32",), "max.relu", 2, lambda a, b: max(a, b, 0)),
]
for kind in ("u16", "s16", "u32", "s32"):
    CASES += [
        Case(f"mul.wide.{kind} %d, %a, %b;", wide(kind), (kind, kind), lambda a, b: a * b),
        Case(f"mad.wide.{kind} %d, %a, %b, %c;", wide(kind), (kind, kind, wide(kind)), lambda a, b, c: a * b + c),
    ]
for name, kind in product(("add", "min", "max", "min.relu", "max.relu"), ("u16x2", "s16x2")):
    if "relu" in name and kind == "u16x2":
        continue
    function: dict[str, Callable[[int, int], int]] = {
        "add": lambda a, b: a + b,
        "min": min,
        "max": max,
        "min.relu": lambda a, b: max(min(a, b), 0),
        "max.relu": lambda a, b: max(a, b, 0),
    }
    oracle = halves(function[name], kind[0] == "s")
    CASES.append(Case(f"{name}.{kind} %d, %a, %b;", "b32", ("b32", "b32"), oracle))
    if "relu" in name:  # as the headers of CUDA write it
        CASES.append(Case(f"{name[:3]}.{kind}.relu %d, %a, %b;", "b32", ("b32", "b32"), oracle))
for kind in ("u32", "s32"):
    lows = [
        (part, lambda a, b, kind=kind, shift=shift: low_24(a, kind) * low_24(b, kind) >> shift)
        for part, shift in (("lo", 0), ("hi", 16))
    ]
    for part, f in lows:
        CASES.append(Case(f"mul24.{part}.{kind} %d, %a, %b;", kind, (kind, kind), f))
        CASES.append(Case(f"mad24.{part}.{kind} %d, %a, %b, %c;", kind, (kind,) * 3, lambda a, b, c, f=f: f(a, b) + c))
CASES.append(
    Case(
        "mad24.hi.sat.s32 %d, %a, %b, %c;",
        "s32",
        ("s32",) * 3,
        lambda a, b, c: clamp(signed((low_24(a, "s32") * low_24(b, "s32") >> 16) & 0xFFFFFFFF, 32) + c),
    )
)


def dot(a: int, b: int, c: int, count: int, a_kind: str, b_kind: str, first: int = 0) -> int:
    width = 32 // count
    for i in range(count):
        x, y = a >> width * i & (1 << width) - 1, b >> 8 * (first + i) & 0xFF
        c += (signed(x, width) if a_kind == "s32" else x) * (signed(y, 8) if b_kind == "s32" else y)
    return c


for a_kind, b_kind in product(("u32", "s32"), repeat=2):
    for name, count, first in (("dp4a", 4, 0), ("dp2a.lo", 2, 0), ("dp2a.hi", 2, 2)):
        CASES.append(
            Case(
                f"{name}.{a_kind}.{b_kind} %d, %a, %b, %c;",
                "b32",
                ("b32",) * 3,
                lambda a, b, c, n=count, x=a_kind, y=b_kind, first=first: dot(a, b, c, n, x, y, first),
            )
        )


@silicon_too
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.body.split()[0])
def test_result(case: Case) -> None:
    check(case)


def carry_case(body: str, kind: str, f: Callable[[int, int, int, int], tuple[int, int]]) -> Case:
    """``body`` sets %d and the flag; the flag goes into bit 0 of the result, after a 1 for every lane was set."""
    bits = bits_of(kind)

    def oracle(a: int, b: int, c: int) -> int:
        value, carry = f(a, b, c, bits)
        return (value ^ carry << (bits - 1)) & (1 << bits) - 1

    unsigned, register = kind.replace("s", "u"), {32: "%r", 64: "%l"}[bits]
    flag = f"addc.{unsigned} {register}0, 0, 0; shl.b{bits} {register}0, {register}0, {bits - 1};"
    return Case(f"{body} {flag} xor.b{bits} %d, %d, {register}0;", kind, (f"b{bits}",) * 3, oracle)


def carry_cases(kind: str) -> list[Case]:
    bits = bits_of(kind)
    mask = (1 << bits) - 1
    is_signed = kind[0] == "s"
    register = {32: "%r", 64: "%l"}[bits]
    # The flag is 1 where %c is odd.
    odd = f"shl.b{bits} {register}1, %c, {bits - 1}; add.cc.u{bits} {register}2, {register}1, {register}1;"

    def part(a: int, b: int, high: bool) -> int:
        x = signed(a, bits) * signed(b, bits) if is_signed else a * b
        return (x >> bits if high else x) & mask

    def total(value: int) -> tuple[int, int]:
        return value & mask, value >> bits & 1

    # A subtraction adds the complement: it carries where it does not borrow, and takes a 0 for a borrow.
    def difference(value: int) -> tuple[int, int]:
        return value & mask, int(value >= 0)

    return [
        carry_case(f"add.cc.{kind} %d, %a, %b;", kind, lambda a, b, c, _: total(a + b)),
        carry_case(f"{odd} addc.cc.{kind} %d, %a, %b;", kind, lambda a, b, c, _: total(a + b + c % 2)),
        carry_case(f"{odd} addc.{kind} %d, %a, %b;", kind, lambda a, b, c, _: (a + b + c % 2, c % 2)),
        carry_case(f"sub.cc.{kind} %d, %a, %b;", kind, lambda a, b, c, _: difference(a - b)),
        carry_case(f"{odd} subc.cc.{kind} %d, %a, %b;", kind, lambda a, b, c, _: difference(a - b - 1 + c % 2)),
        carry_case(f"{odd} subc.{kind} %d, %a, %b;", kind, lambda a, b, c, _: (a - b - 1 + c % 2, c % 2)),
        carry_case(f"mad.lo.cc.{kind} %d, %a, %b, %c;", kind, lambda a, b, c, _: total(part(a, b, False) + c)),
        carry_case(f"mad.hi.cc.{kind} %d, %a, %b, %c;", kind, lambda a, b, c, _: total(part(a, b, True) + c)),
        carry_case(
            f"{odd} madc.lo.cc.{kind} %d, %a, %b, %c;", kind, lambda a, b, c, _: total(part(a, b, False) + c + c % 2)
        ),
        carry_case(
            f"{odd} madc.hi.cc.{kind} %d, %a, %b, %c;", kind, lambda a, b, c, _: total(part(a, b, True) + c + c % 2)
        ),
        carry_case(
            f"{odd} madc.hi.{kind} %d, %a, %b, %c;", kind, lambda a, b, c, _: (part(a, b, True) + c + c % 2, c % 2)
        ),
    ]


@silicon_too
@pytest.mark.parametrize("kind", CARRYING)
@pytest.mark.parametrize("index", range(11))
def test_carry(kind: str, index: int) -> None:
    check(carry_cases(kind)[index])


@silicon_too
def test_carry_is_of_the_lanes_that_execute() -> None:
    # Even lanes set the flag, then odd ones clear theirs.
    body = """
    and.b32 %r0, %a, 1; setp.eq.b32 p, %r0, 0;
    add.cc.u32 %r1, -1, 1;
    @!p add.cc.u32 %r1, 0, 0;
    addc.u32 %d, 0, 0;"""
    check(Case(body, "u32", ("u32",), lambda a: 1 - a % 2))


@silicon_too
def test_sum_of_128_bits() -> None:
    body = """
    add.cc.u64 %l0, %a, %b; addc.cc.u64 %l1, %a, %c; addc.u64 %l2, 0, 0;
    xor.b64 %d, %l0, %l1; add.u64 %d, %d, %l2;"""

    def oracle(a: int, b: int, c: int) -> int:
        total = (a | a << 64) + (b | c << 64)
        mask = (1 << 64) - 1
        return (total & mask ^ total >> 64 & mask) + (total >> 128)

    check(Case(body, "u64", ("u64",) * 3, oracle))
