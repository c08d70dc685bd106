"""Logic, shifts, bit fields and permutations of the emulator against models that go bit by bit."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from backends import backend_params
from emulator_lanes import Case, bits_of, check, operands
from machines import silicon_too

pytestmark = backend_params(["emulator"])[0].marks

ALL = (1 << 32) - 1


def bit(x: int, i: int) -> int:
    return x >> i & 1


def from_bits(bits: list[int]) -> int:
    return sum(b << i for i, b in enumerate(bits))


def shift_right(a: int, by: int, bits: int, is_signed: bool) -> int:
    sign = bit(a, bits - 1) if is_signed else 0
    return from_bits([bit(a, i + by) if i + by < bits else sign for i in range(bits)])


def funnel(a: int, b: int, c: int, right: bool, clamp: bool) -> int:
    by = min(c, 32) if clamp else c % 32
    both = b << 32 | a
    return both >> by & ALL if right else both << by >> 32 & ALL


def extract(a: int, b: int, c: int, bits: int, is_signed: bool) -> int:
    first, count = b & 255, c & 255
    fill = bit(a, min(first + count - 1, bits - 1)) if is_signed and count else 0
    return from_bits([bit(a, first + i) if i < count and first + i < bits else fill for i in range(bits)])


def insert(a: int, b: int, c: int, d: int, bits: int) -> int:
    first, count = c & 255, d & 255
    return from_bits([bit(a, i - first) if first <= i < first + count else bit(b, i) for i in range(bits)])


def find(a: int, bits: int, is_signed: bool, shift_amount: bool) -> int:
    sign = bit(a, bits - 1) if is_signed else 0
    for i in reversed(range(bits)):
        if bit(a, i) != sign:
            return bits - 1 - i if shift_amount else i
    return ALL


def permuted(a: int, b: int, selectors: int) -> int:
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picks = [selectors >> 4 * i & 15 for i in range(4)]
    return int.from_bytes(bytes((0xFF * (pool[p & 7] >> 7)) if p & 8 else pool[p & 7] for p in picks), "little")


# The table of the PTX ISA, byte 3 to byte 0 of the result, for c = 0 to 3.
PERMUTATIONS = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


def mask_of(first: int, count: int, clamp: bool) -> int:
    first, count = (min(first, 32), min(count, 32)) if clamp else (first % 32, count % 32)
    return from_bits([first <= i < first + count for i in range(32)])


def extend(a: int, count: int, is_signed: bool, clamp: bool) -> int:
    count = min(count, 32) if clamp else count % 32
    sign = bit(a, count - 1) if is_signed and count else 0
    return from_bits([bit(a, i) if i < count else sign for i in range(32)])


def nth(mask: int, base: int, offset: int) -> int:
    base %= 32
    if offset == 0:
        return base if bit(mask, base) else ALL
    path = range(base, 32) if offset > 0 else range(base, -1, -1)
    ones = [i for i in path if bit(mask, i)]
    return ones[abs(offset) - 1] if abs(offset) <= len(ones) else ALL


CASES: list[Case] = []
for kind in ("b16", "b32", "b64"):
    width = bits_of(kind)
    two, one = (kind, kind), (kind,)
    CASES += [
        Case(f"and.{kind} %d, %a, %b;", kind, two, lambda a, b: a & b),
        Case(f"or.{kind} %d, %a, %b;", kind, two, lambda a, b: a | b),
        Case(f"xor.{kind} %d, %a, %b;", kind, two, lambda a, b: a ^ b),
        Case(f"not.{kind} %d, %a;", kind, one, lambda a: ~a),
        Case(f"cnot.{kind} %d, %a;", kind, one, lambda a: int(a == 0)),
        Case(f"shl.{kind} %d, %a, %b;", kind, (kind, "amount"), lambda a, by, n=width: a << by if by < n else 0),
    ]
for base, width in product("bus", (16, 32, 64)):
    kind = f"{base}{width}"
    f = lambda a, by, n=width, s=base == "s": shift_right(a, min(by, n), n, s)  # noqa: E731
    CASES.append(Case(f"shr.{kind} %d, %a, %b;", kind, (f"b{width}", "amount"), f))
for kind in ("b32", "b64"):
    width = bits_of(kind)
    CASES += [
        Case(f"popc.{kind} %d, %a;", "u32", (kind,), lambda a: a.bit_count()),
        Case(f"clz.{kind} %d, %a;", "u32", (kind,), lambda a, n=width: n - a.bit_length()),
        Case(f"brev.{kind} %d, %a;", kind, (kind,), lambda a, n=width: int(f"{a:0{n}b}"[::-1], 2)),
        Case(
            f"bfi.{kind} %d, %a, %b, %c, %e;",
            kind,
            (kind, kind, "amount", "amount"),
            lambda a, b, c, d, n=width: insert(a, b, c, d, n),
        ),
    ]
for base, width in product("us", (32, 64)):
    kind = f"{base}{width}"
    plain = f"b{width}"
    CASES += [
        Case(
            f"bfe.{kind} %d, %a, %b, %c;",
            kind,
            (plain, "amount", "amount"),
            lambda a, b, c, n=width, s=base == "s": extract(a, b, c, n, s),
        ),
        Case(f"bfind.{kind} %d, %a;", "u32", (plain,), lambda a, n=width, s=base == "s": find(a, n, s, False)),
        Case(f"bfind.shiftamt.{kind} %d, %a;", "u32", (plain,), lambda a, n=width, s=base == "s": find(a, n, s, True)),
    ]
for direction, mode in product("lr", ("clamp", "wrap")):
    CASES.append(
        Case(
            f"shf.{direction}.{mode}.b32 %d, %a, %b, %c;",
            "b32",
            ("b32", "b32", "amount"),
            lambda a, b, c, right=direction == "r", clamp=mode == "clamp": funnel(a, b, c, right, clamp),
        )
    )
for mode in ("clamp", "wrap"):
    CASES.append(
        Case(
            f"bmsk.{mode}.b32 %d, %a, %b;",
            "b32",
            ("amount", "amount"),
            lambda a, b, clamp=mode == "clamp": mask_of(a, b, clamp),
        )
    )
    CASES += [
        Case(
            f"szext.{mode}.{kind} %d, %a, %b;",
            "b32",
            ("b32", "amount"),
            lambda a, b, s=kind == "s32", clamp=mode == "clamp": extend(a, b, s, clamp),
        )
        for kind in ("u32", "s32")
    ]
CASES.append(Case("prmt.b32 %d, %a, %b, %c;", "b32", ("b32",) * 3, permuted))
for mode, table in PERMUTATIONS.items():
    CASES.append(
        Case(
            f"prmt.b32.{mode} %d, %a, %b, %c;",
            "b32",
            ("b32",) * 3,
            lambda a, b, c, table=table: permuted(a, b, table[c & 3]),
        )
    )
# Bits of %b for the base, and a small number of either sign for the offset.
CASES.append(
    Case(
        "and.b32 %r0, %b, 31; bfe.s32 %r1, %c, 0, 6; fns.b32 %d, %a, %r0, %r1;",
        "b32",
        ("b32",) * 3,
        lambda a, b, c: nth(a, b, (c & 63) - (c & 32) * 2),
    )
)


@silicon_too
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.body.split(" %d")[0])
def test_result(case: Case) -> None:
    check(case)


@silicon_too
def test_every_table_of_lop3() -> None:
    # Three masks in which all eight rows of the table appear; the result is then the table itself.
    body = "\n".join(
        f"lop3.b32 %r0, %a, %b, %c, {table}; setp.eq.b32 p, %i, {table}; @p mov.b32 %d, %r0;" for table in range(256)
    )
    a, b, c = (np.full(256, x, np.uint32) for x in (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA))
    expected = iter(range(256))
    check(Case(body, "b32", ("b32",) * 3, lambda a, b, c: next(expected) * 0x01010101), (a, b, c))


@silicon_too
@pytest.mark.parametrize("operation", ["and", "or"])
@pytest.mark.parametrize("destination", ["%r0|p", "_|p"])
@pytest.mark.parametrize("negation", ["", "!"])
def test_lop3_with_a_predicate(operation: str, destination: str, negation: str) -> None:
    body = f"""
    setp.ne.b32 q, %c, 0;
    mov.b32 %r0, 0;
    lop3.{operation}.b32 {destination}, %a, %b, 0, 0xc0, {negation}q;
    selp.b32 %d, 0x10000, 0, p;
    and.b32 %r0, %r0, 0xffff;
    or.b32 %d, %d, %r0;"""

    def oracle(a: int, b: int, c: int) -> int:
        q = (c != 0) != bool(negation)
        p = (a & b != 0 and q) if operation == "and" else (a & b != 0 or q)
        return p << 16 | (a & b & 0xFFFF if destination[0] == "%" else 0)

    a, b, c = operands(("b32",) * 3)
    c = c & np.uint32(1)
    check(Case(body, "b32", ("b32",) * 3, oracle), (a & np.uint32(0x30003), b, c))


@silicon_too
def test_predicate_logic() -> None:
    # Each result in a bit of its own.
    body = """
    setp.ne.b32 p, %a, 0; setp.ne.b32 q, %b, 0;
    mov.b32 %d, 0;
    and.pred r, p, q;   @r or.b32 %d, %d, 1;
    or.pred r, p, !q;   @r or.b32 %d, %d, 2;
    xor.pred r, !p, q;  @r or.b32 %d, %d, 4;
    not.pred r, p;      @r or.b32 %d, %d, 8;
    mov.pred r, !q;     @r or.b32 %d, %d, 16;
    mov.pred r, 1;      @r or.b32 %d, %d, 32;
    and.pred r, p, 0;   @r or.b32 %d, %d, 64;
    @!p or.b32 %d, %d, 128;"""

    def oracle(a: int, b: int) -> int:
        p, q = a != 0, b != 0
        return from_bits([p and q, p or not q, (not p) != q, not p, not q, True, False, not p])

    a, b = (column & np.uint32(1) for column in operands(("b32", "b32")))
    check(Case(body, "b32", ("b32", "b32"), oracle), (a, b))


def test_fns_needs_a_base_below_32() -> None:
    from emulator import EmulationError

    column = np.zeros(128, np.uint32)
    column[77] = 32
    with pytest.raises(EmulationError, match="the base of fns must be below 32"):
        check(Case("fns.b32 %d, %a, %a, 1;", "b32", ("b32",), lambda a: 0), (column,))
