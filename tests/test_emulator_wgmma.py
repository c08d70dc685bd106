"""wgmma on the emulator: every type, layout, N and option, against matrix products and models of the tensor core."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from backends import backend_params
from machines import silicon_too
from matrix_model import NAN, decode, encode, near_codes, random_codes, size_of, tiny_codes
from wgmma_cases import (
    COMMIT,
    FENCE,
    FP8,
    ROW_BYTES,
    ROWS,
    SPAN,
    WAIT,
    Case,
    Form,
    accumulator,
    check_exactly,
    places,
    small_case,
)

from fastfp8.reference import tensor_core

pytestmark = backend_params(["emulator"])[0].marks

# (D, A, B)
TYPES = [
    *(("f32", a, b) for a in FP8 for b in FP8),
    ("f16", "e4m3", "e4m3"),
    ("f16", "e5m2", "e4m3"),
    ("f32", "f16", "f16"),
    ("f16", "f16", "f16"),
    ("f32", "bf16", "bf16"),
    ("f32", "tf32", "tf32"),
    *(("s32", a, b) for a in ("s8", "u8") for b in ("s8", "u8")),
]
FLOATS = [types for types in TYPES if types[0] != "s32"]


def ids(value: object) -> str:
    return ".".join(value) if isinstance(value, tuple) and isinstance(value[0], str) else str(value).replace(" ", "")


LAYOUTS = [
    (types, transposed)
    for types in TYPES
    for transposed in ([(0, 0), (0, 1), (1, 0), (1, 1)] if types[1] in ("f16", "bf16") else [(0, 0)])
]


@silicon_too
@pytest.mark.parametrize("mode", SPAN, ids=lambda mode: f"{SPAN[mode]}B")
@pytest.mark.parametrize(("types", "transposed"), LAYOUTS, ids=ids)
def test_layouts(types: tuple[str, str, str], transposed: tuple[int, int], mode: int) -> None:
    """Random integers, so that an element of a wrong place shows, and NaN wherever there is none."""
    for seed in range(3):
        n = (8, 32, 144)[seed] if mode else (24, 48, 128)[seed]
        form = Form(*types, n=n, transposed=transposed)
        check_exactly(small_case(form, (mode, (mode + seed) % 4), seed), seed)


@silicon_too
@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_n(n: int) -> None:
    check_exactly(small_case(Form("f32", "e4m3", "e5m2", n=n), (1, 1), n))
    check_exactly(small_case(Form("f16", "f16", "f16", n=n, transposed=(0, 1)), (1, 1), n))
    integers = Form("s32", "s8", "u8", n=n)
    if n <= 32 or n % 16 == 0:
        check_exactly(small_case(integers, (1, 1), n))
    else:
        with pytest.raises(RuntimeError, match="does not know this shape"):
            small_case(integers, (1, 1), n).run()


@silicon_too
@pytest.mark.parametrize("types", TYPES, ids=ids)
def test_a_from_registers(types: tuple[str, str, str]) -> None:
    for seed, transposed in enumerate([0, 1] if types[1] in ("f16", "bf16") else [0]):
        form = Form(*types, n=40 if types[0] != "s32" else 32, registers=True, transposed=(0, transposed))
        check_exactly(small_case(form, (0, 1), seed))


@silicon_too
@pytest.mark.parametrize("types", FLOATS, ids=ids)
@pytest.mark.parametrize("kind", ["near", "any", "tiny", "special"])
def test_floating_point(kind: str, types: tuple[str, str, str]) -> None:
    """The bits: sums around one, operands of all magnitudes, results that underflow, and infinities and NaN."""
    for seed in range(2):
        form = Form(*types, n=32, registers=bool(seed))
        rng = np.random.default_rng(seed)
        k = ROW_BYTES // size_of(form.a)
        shapes = ((form.a, (ROWS, k)), (form.b, (form.n, k)))
        if kind == "near":
            a, b = (near_codes(t, shape, rng) for t, shape in shapes)
        elif kind == "tiny":
            a, b = (tiny_codes(t, shape, rng, form.d) for t, shape in shapes)
        else:
            a, b = (random_codes(t, shape, rng) for t, shape in shapes)
        c = accumulator(form, rng)
        if kind == "tiny":
            c[::2] = 0
        if kind == "special":
            # In a few rows and columns, lest all of D be NaN.
            wild = (random_codes(t, shape, rng, False) for t, shape in shapes)
            a, b = (np.where(np.arange(len(x))[:, None] % 4 == 1, y, x) for x, y in zip((a, b), wild, strict=True))
            for index, value in enumerate((np.inf, -np.inf, np.nan, -0.0)):
                c[4 * index :: 16, ::3] = encode(form.d, np.array(value))
        Case(form, a, b, c, places(form, (2, 3), rng)).check(sample=2048)


@silicon_too
def test_e4m3_as_the_reference_has_it() -> None:
    """All of D, for products of every code and accumulators as they come about."""
    rng = np.random.default_rng(0)
    form = Form("f32", "e4m3", "e4m3", n=256)
    for seed in range(3):
        a, b = (rng.integers(0, 256, (rows, 32)).astype(np.uint8) for rows in (ROWS, form.n))
        a[seed::2], b[::3] = a[seed::2] & 0xBF, b[::3] & 0xBF  # without NaN
        acc = near_codes("f32", (ROWS, form.n), rng, 12) & 0xFFFFFC00
        got = Case(form, a, b, acc, places(form, (1, 1), rng)).run(seed)
        left, right = (torch.from_numpy(x).view(torch.float8_e4m3fn) for x in (a, b))
        expected = tensor_core.wgmma_k32(left, right, torch.from_numpy(acc.view(np.float32)))
        np.testing.assert_array_equal(got, expected.numpy().view(np.uint32))


@silicon_too
@pytest.mark.parametrize("types", [("s32", "s8", "s8"), ("s32", "u8", "u8"), ("s32", "s8", "u8")], ids=ids)
@pytest.mark.parametrize("saturate", [False, True], ids=["wraps", "satfinite"])
def test_integers(types: tuple[str, str, str], saturate: bool) -> None:
    rng = np.random.default_rng(0)
    form = Form(*types, n=64, saturate=saturate)
    a, b = random_codes(form.a, (ROWS, 32), rng), random_codes(form.b, (form.n, 32), rng)
    c = accumulator(form, rng)
    c[::2] = rng.choice(np.array([0x7FFFFFFF, 0x80000000, 0x7FFFF000, 0x80001000], np.uint32), c[::2].shape)
    Case(form, a, b, c, places(form, (1, 2), rng)).check()


@silicon_too
@pytest.mark.parametrize("types", [("f32", "e4m3", "e5m2"), ("f32", "bf16", "bf16"), ("f16", "f16", "f16")], ids=ids)
@pytest.mark.parametrize("signs", [(-1, 1), (1, -1), (-1, -1)], ids=ids)
def test_negation(signs: tuple[int, int], types: tuple[str, str, str]) -> None:
    check_exactly(small_case(Form(*types, signs=signs), (1, 1), 0))


@silicon_too
@pytest.mark.parametrize(("scale_d", "scale"), [("p", 1), ("p", 0), ("!p", 0), ("!p", 1), ("1", 0), ("0", 1)])
def test_scale_d(scale_d: str, scale: int) -> None:
    """Where it is false, not even a NaN in D counts."""
    case = small_case(Form("f32", "bf16", "bf16", scale_d=scale_d), (1, 1), 0)
    kept = {"p": scale, "!p": 1 - scale}.get(scale_d, 0 if scale_d == "0" else 1)
    if not kept:
        case.c[::2] = NAN["f32"]
    case.scale = scale
    got = decode("f32", case.run())
    expected = decode("bf16", case.a) @ decode("bf16", case.b).T + (decode("f32", case.c) if kept else 0)
    np.testing.assert_array_equal(got, expected)


@silicon_too
@pytest.mark.parametrize("mode", [1, 2])
def test_steps_along_k(mode: int) -> None:
    """The start address may step inside the first line of the swizzle pattern, and a chain needs no fence between."""
    steps = SPAN[mode] // ROW_BYTES
    lines = (FENCE, *["{mma}", "add.s64 %x, %x, 2;", "add.s64 %y, %y, 2;"] * steps, COMMIT, COMMIT)
    form = Form("f32", "e4m3", "e4m3", n=64, steps=(*lines, "wgmma.wait_group.sync.aligned 1000;", WAIT))
    rng = np.random.default_rng(0)
    operands = [near_codes("e4m3", (steps, rows, 32), rng) for rows in (ROWS, form.n)]
    both = places(form, (mode, mode), rng)
    case = Case(form, operands[0][0], operands[1][0], np.zeros((ROWS, form.n), np.uint32), both)
    acc = torch.zeros(ROWS, form.n)
    for step in range(steps):
        for place, operand in zip(both, operands, strict=True):
            case.others.append((replace(place, start=place.start + 32 * step), operand[step]))
        a, b = (torch.from_numpy(operand[step]).view(torch.float8_e4m3fn) for operand in operands)
        acc = tensor_core.wgmma_k32(a, b, acc)
    for seed in range(4):
        np.testing.assert_array_equal(case.run(seed), acc.numpy().view(np.uint32))
