"""Comparisons and selections of the emulator against Python's."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from backends import backend_params
from emulator_lanes import Case, bits_of, check
from exact_floats import FORMATS
from machines import silicon_too

pytestmark = backend_params(["emulator"])[0].marks

ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
BOOLEAN: dict[str, Callable[[bool, bool], bool]] = {
    "and": lambda x, y: x and y,
    "or": lambda x, y: x or y,
    "xor": lambda x, y: x != y,
}
SCALARS = ("f16", "bf16", "f32", "f64")


def compared(comparison: str, kind: str, a: int, b: int, flush: bool = False) -> bool:
    """Of integers as they are, of floats by their bits."""
    if kind not in FORMATS:
        return ORDERED[UNSIGNED_NAMES.get(comparison, comparison)](a, b)
    form = FORMATS[kind]
    x, y = (form.value(form.flush(v) if flush else v) for v in (a, b))
    if math.isnan(x) or math.isnan(y):
        return comparison == "nan" or (comparison[-1] == "u" and len(comparison) == 3)
    return comparison == "num" or (comparison != "nan" and ORDERED[comparison[:2]](x, y))


INTEGER_FORMS = [
    *product(("eq", "ne"), ("b16", "b32", "b64")),
    *product(ORDERED, ("u16", "s16", "u32", "s32", "u64", "s64")),
    *product(UNSIGNED_NAMES, ("u16", "u32", "u64")),
]
FLOAT_NAMES = [*ORDERED, *(name + "u" for name in ORDERED), "num", "nan"]
FLOAT_FORMS = list(product(FLOAT_NAMES, SCALARS))


@silicon_too
@pytest.mark.parametrize(("comparison", "kind"), [*INTEGER_FORMS, *FLOAT_FORMS])
def test_setp(comparison: str, kind: str) -> None:
    body = f"setp.{comparison}.{kind} p, %a, %b; selp.b32 %d, 1, 0, p;"
    check(Case(body, "b32", (kind, kind), lambda a, b: compared(comparison, kind, a, b)))


@silicon_too
@pytest.mark.parametrize(("comparison", "kind"), list(product(FLOAT_NAMES, ("f16", "f32"))))
def test_setp_flushes(comparison: str, kind: str) -> None:
    body = f"setp.{comparison}.ftz.{kind} p, %a, %b; selp.b32 %d, 1, 0, p;"
    check(Case(body, "b32", (kind, kind), lambda a, b: compared(comparison, kind, a, b, True)))


@silicon_too
@pytest.mark.parametrize("boolean", BOOLEAN)
@pytest.mark.parametrize("negation", ["", "!"])
@pytest.mark.parametrize("destination", ["p|q", "p|_", "_|q", "p"])
@pytest.mark.parametrize(("comparison", "kind"), [("lt", "s32"), ("hs", "u64"), ("ne", "b16"), ("leu", "f32")])
def test_setp_combined(boolean: str, negation: str, destination: str, comparison: str, kind: str) -> None:
    body = f"""
    and.b32 %r1, %c, 1; setp.ne.b32 r, %r1, 0;
    mov.pred p, 0; mov.pred q, 0;
    setp.{comparison}.{boolean}.{kind} {destination}, %a, %b, {negation}r;
    selp.b32 %d, 1, 0, p; selp.b32 %r0, 2, 0, q; or.b32 %d, %d, %r0;"""

    def oracle(a: int, b: int, c: int) -> int:
        t, other = compared(comparison, kind, a, b), (c & 1) != bool(negation)
        p, q = BOOLEAN[boolean](t, other), BOOLEAN[boolean](not t, other)
        return (p if "p" in destination else 0) | (q << 1 if "q" in destination else 0)

    check(Case(body, "b32", (kind, kind, "b32"), oracle))


@silicon_too
def test_setp_gives_the_complement_without_an_operation() -> None:
    body = "setp.lt.s32 p|q, %a, %b; selp.b32 %d, 1, 0, p; @q or.b32 %d, %d, 2;"
    check(Case(body, "b32", ("s32", "s32"), lambda a, b: 1 if a < b else 2))


@silicon_too
@pytest.mark.parametrize("base", ["f16", "bf16"])
@pytest.mark.parametrize("comparison", ["lt", "neu", "nan"])
@pytest.mark.parametrize("boolean", ["", *BOOLEAN])
def test_setp_of_pairs(base: str, comparison: str, boolean: str) -> None:
    combined = f".{boolean}" if boolean else ""
    other = ", r" if boolean else ""
    body = f"""
    and.b32 %r1, %c, 1; setp.ne.b32 r, %r1, 0;
    setp.{comparison}{combined}.{base}x2 p|q, %a, %b{other};
    selp.b32 %d, 1, 0, p; @q or.b32 %d, %d, 2;"""

    def oracle(a: int, b: int, c: int) -> int:
        results = [compared(comparison, base, a >> s & 0xFFFF, b >> s & 0xFFFF) for s in (0, 16)]
        if boolean:
            results = [BOOLEAN[boolean](t, bool(c & 1)) for t in results]
        return results[0] | results[1] << 1

    check(Case(body, "b32", (f"{base}x2", f"{base}x2", "b32"), oracle))


TRUE = {"u16": 0xFFFF, "s16": 0xFFFF, "u32": 0xFFFFFFFF, "s32": 0xFFFFFFFF}
TRUE |= {"f16": 0x3C00, "bf16": 0x3F80, "f32": 0x3F800000}


@silicon_too
@pytest.mark.parametrize(
    ("result", "kind"),
    [
        *product(("u32", "s32", "f32", "f16", "bf16"), ("s16", "u32", "s64", "f32", "f64")),
        *product(("u16", "s16", "u32", "s32", "f16", "bf16"), ("f16",)),
        *product(("u16", "s16", "u32", "s32", "bf16"), ("bf16",)),
    ],
)
def test_set(result: str, kind: str) -> None:
    body = f"and.b32 %r1, %c, 1; setp.ne.b32 r, %r1, 0; set.le.or.{result}.{kind} %d, %a, %b, !r;"
    width = f"b{bits_of(result)}"
    truth = TRUE[result]
    oracle = lambda a, b, c: truth if compared("le", kind, a, b) or not c & 1 else 0  # noqa: E731
    check(Case(body, width, (kind, kind, "b32"), oracle))


@silicon_too
@pytest.mark.parametrize(("base", "ftz"), [("f16", ""), ("f16", ".ftz"), ("bf16", "")])
@pytest.mark.parametrize("result", ["u32", "s32", "same"])
def test_set_of_pairs(base: str, ftz: str, result: str) -> None:
    to = f"{base}x2" if result == "same" else result
    truth = TRUE[base] if result == "same" else 0xFFFF

    def oracle(a: int, b: int) -> int:
        parts = [compared("geu", base, a >> s & 0xFFFF, b >> s & 0xFFFF, bool(ftz)) for s in (0, 16)]
        return (truth if parts[0] else 0) | (truth << 16 if parts[1] else 0)

    check(Case(f"set.geu{ftz}.{to}.{base}x2 %d, %a, %b;", "b32", (f"{base}x2",) * 2, oracle))


@silicon_too
@pytest.mark.parametrize("kind", ["b16", "u32", "f32", "s64", "f64"])
@pytest.mark.parametrize("negation", ["", "!"])
def test_selp(kind: str, negation: str) -> None:
    width = f"b{bits_of(kind)}"
    body = f"and.b32 %r1, %c, 1; setp.ne.b32 p, %r1, 0; selp.{kind} %d, %a, %b, {negation}p;"
    check(Case(body, width, (width, width, "b32"), lambda a, b, c: a if (c & 1) != bool(negation) else b))


@silicon_too
@pytest.mark.parametrize("kind", ["u16", "b32", "f32", "s64"])
@pytest.mark.parametrize("selector", ["s32", "f32", "ftz"])
def test_slct(kind: str, selector: str) -> None:
    width = f"b{bits_of(kind)}"
    form = FORMATS["f32"]

    def oracle(a: int, b: int, c: int) -> int:
        if selector == "s32":
            return a if c >= 0 else b
        return a if form.value(form.flush(c) if selector == "ftz" else c) >= 0 else b

    op, of = ("slct.ftz", "f32") if selector == "ftz" else ("slct", selector)
    check(Case(f"{op}.{kind}.{of} %d, %a, %b, %c;", width, (width, width, of), oracle))


@silicon_too
@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ["finite", "infinite", "number", "notanumber", "normal", "subnormal"])
def test_testp(name: str, kind: str) -> None:
    form = FORMATS[kind]
    least = 2.0 ** (1 - form.bias)

    def oracle(a: int) -> bool:
        x = float(form.value(a))
        return {
            "finite": math.isfinite(x),
            "infinite": math.isinf(x),
            "number": not math.isnan(x),
            "notanumber": math.isnan(x),
            "normal": math.isfinite(x) and abs(x) >= least,
            "subnormal": 0 < abs(x) < least,
        }[name]

    check(Case(f"testp.{name}.{kind} p, %a; selp.b32 %d, 1, 0, p;", "b32", (kind,), oracle))
