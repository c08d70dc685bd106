"""Single instructions of the emulator against NumPy and ml_dtypes, over random and awkward operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from backends import backend_params

pytestmark = backend_params(["emulator"])[0].marks

N = 4096
PTX = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd) {{
  .reg .pred p, q;
  .reg .b16 %h<8>;
  .reg .b32 %a, %b, %c, %d, %i, %t;
  .reg .b64 %x, %y, %o, %l;
  mov.u32 %i, %ctaid.x;
  mov.u32 %t, %tid.x;
  mad.lo.s32 %i, %i, 128, %t;
  mul.wide.u32 %o, %i, 4;
  ld.param.u64 %x, [pa];
  add.s64 %y, %x, %o;
  ld.global.b32 %a, [%y];
  ld.param.u64 %x, [pb];
  add.s64 %y, %x, %o;
  ld.global.b32 %b, [%y];
  ld.param.u64 %x, [pc];
  add.s64 %y, %x, %o;
  ld.global.b32 %c, [%y];
  {body}
  ld.param.u64 %x, [pd];
  add.s64 %y, %x, %o;
  st.global.b32 [%y], %d;
  ret;
}}
"""


def run(body: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    from emulator import Machine

    d = np.full(N, 0xDEADBEEF, np.uint32)
    kernel = Machine().load(PTX.format(body=body))["kernel"]
    kernel.launch((N // 128, 1, 1), (128, 1, 1), (1, 1, 1), 0, [a, b, c, d])
    return d


def random_bits(seed: int) -> np.ndarray:
    """Of all magnitudes, with the corners of integers and floats among them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, N, dtype=np.uint64).astype(np.uint32)
    corners = [0, 1, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00800000]
    bits[: 16 * len(corners)] = rng.permutation(np.repeat(np.uint32(corners), 16))
    return bits


def ordinary_floats(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(N) * 2.0 ** rng.integers(-12, 12, N)).astype(np.float32)
    x[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -448.0, 464.0]
    return rng.permutation(x).view(np.uint32)


def s(x: np.ndarray) -> np.ndarray:
    return x.view(np.int32).astype(np.int64)


def u(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint64)


def low(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)


def extract(a: int, first: int, count: int, sign: bool) -> int:
    """bfe as the PTX ISA writes it, bit by bit."""
    fill = a >> min(first + count - 1, 31) & 1 if sign and count else 0
    return sum((a >> first + i & 1 if i < count and first + i < 32 else fill) << i for i in range(32))


def each(f: Callable[..., int]) -> Callable[..., np.ndarray]:
    return lambda *columns: np.array([f(*map(int, row)) for row in zip(*columns, strict=True)], np.uint32)


def permuted(a: int, b: int, selectors: int) -> int:
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picks = [selectors >> 4 * i & 15 for i in range(4)]
    return int.from_bytes(bytes((0xFF * (pool[p & 7] >> 7)) if p & 8 else pool[p & 7] for p in picks), "little")


INTEGER: dict[str, tuple[str, Callable[..., Any]]] = {
    "add": ("add.s32 %d, %a, %b;", lambda a, b, c: low(s(a) + s(b))),
    "sub": ("sub.s32 %d, %a, %b;", lambda a, b, c: low(s(a) - s(b))),
    "mul.lo": ("mul.lo.s32 %d, %a, %b;", lambda a, b, c: low(u(a) * u(b))),
    "mul.hi.u32": ("mul.hi.u32 %d, %a, %b;", lambda a, b, c: (u(a) * u(b) >> np.uint64(32)).astype(np.uint32)),
    "mul.hi.s32": ("mul.hi.s32 %d, %a, %b;", lambda a, b, c: low(s(a) * s(b) >> 32)),
    "mad.lo": ("mad.lo.s32 %d, %a, %b, %c;", lambda a, b, c: low(u(a) * u(b) + u(c))),
    "mul.wide": (
        "mul.wide.s32 %l, %a, %b; shr.u64 %l, %l, 16; cvt.u32.u64 %d, %l;",
        lambda a, b, c: ((s(a) * s(b)).view(np.uint64) >> np.uint64(16)).astype(np.uint32),
    ),
    "min.s32": ("min.s32 %d, %a, %b;", lambda a, b, c: low(np.minimum(s(a), s(b)))),
    "max.u32": ("max.u32 %d, %a, %b;", lambda a, b, c: np.maximum(a, b)),
    "shl": ("shl.b32 %d, %a, %b;", each(lambda a, b, c: 0 if b > 31 else a << b & 0xFFFFFFFF)),
    "shr.u32": ("shr.u32 %d, %a, %b;", each(lambda a, b, c: 0 if b > 31 else a >> b)),
    "shr.s32": ("shr.s32 %d, %a, %b;", lambda a, b, c: low(s(a) >> np.minimum(u(b), 31).astype(np.int64))),
    "bfe.u32": ("bfe.u32 %d, %a, %b, %c;", each(lambda a, b, c: extract(a, b & 255, c & 255, False))),
    "bfe.s32": ("bfe.s32 %d, %a, %b, %c;", each(lambda a, b, c: extract(a, b & 255, c & 255, True))),
    "prmt": ("prmt.b32 %d, %a, %b, %c;", each(permuted)),
    "setp.lt.s32": ("setp.lt.s32 p, %a, %b; selp.b32 %d, 1, 0, p;", lambda a, b, c: s(a) < s(b)),
    "setp.ge.u32": ("setp.ge.u32 p, %a, %b; selp.b32 %d, 1, 0, p;", lambda a, b, c: a >= b),
    "guard": ("mov.b32 %d, %a; setp.eq.s32 p, %a, %b; @!p mov.b32 %d, %c;", lambda a, b, c: np.where(a == b, a, c)),
    "pack": ("mov.b32 {%h0, %h1}, %a; mov.b32 %d, {%h1, %h0};", lambda a, b, c: a >> 16 | a << np.uint32(16)),
}


def f(x: np.ndarray) -> np.ndarray:
    return x.view(np.float32)


def canonical(x: np.ndarray) -> np.ndarray:
    """FP32 bits, with the NaN of the hardware."""
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), x.astype(np.float32).view(np.uint32))


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """With one rounding: 64 bits of significand hold the exact sum of most of these operands, and NumPy has them."""
    wide = np.longdouble
    return canonical((f(a).astype(wide) * f(b).astype(wide) + f(c).astype(wide)).astype(np.float32))


def narrow(x: np.ndarray, dtype: Any, nan: int) -> np.ndarray:
    bits = x.astype(dtype).view(np.uint16 if np.dtype(dtype).itemsize == 2 else np.uint8)
    return np.where(np.isnan(x), nan, bits).astype(np.uint32)


def e4m3(x: np.ndarray) -> np.ndarray:
    return narrow(np.clip(x, -448, 448), ml_dtypes.float8_e4m3fn, 0x7F)


def smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    x, y = f(a), f(b)
    zeros = np.where(np.signbit(x), x, y)
    return canonical(np.where((x == 0) & (y == 0), zeros, np.fmin(x, y)))


FLOAT: dict[str, tuple[str, Callable[..., Any]]] = {
    "add": ("add.rn.f32 %d, %a, %b;", lambda a, b, c: canonical(f(a) + f(b))),
    "mul": ("mul.f32 %d, %a, %b;", lambda a, b, c: canonical(f(a) * f(b))),
    "div": ("div.rn.f32 %d, %a, %b;", lambda a, b, c: canonical(f(a) / f(b))),
    "fma": ("fma.rn.f32 %d, %a, %b, %c;", fused),
    "min": ("min.f32 %d, %a, %b;", lambda a, b, c: smaller(a, b)),
    "abs": ("abs.f32 %d, %a;", lambda a, b, c: a & np.uint32(0x7FFFFFFF)),
    "setp.ne": ("setp.ne.f32 p, %a, %b; selp.b32 %d, 1, 0, p;", lambda a, b, c: (f(a) < f(b)) | (f(a) > f(b))),
    "setp.neu": ("setp.neu.f32 p, %a, %b; selp.b32 %d, 1, 0, p;", lambda a, b, c: f(a) != f(b)),
    "setp.geu": ("setp.geu.f32 p, %a, %b; selp.b32 %d, 1, 0, p;", lambda a, b, c: ~(f(a) < f(b))),
    "e4m3x2": (
        "cvt.rn.satfinite.e4m3x2.f32 %h0, %a, %b; cvt.u32.u16 %d, %h0;",
        lambda a, b, c: e4m3(f(a)) << 8 | e4m3(f(b)),
    ),
    "bf16x2": (
        "cvt.rn.bf16x2.f32 %d, %a, %b;",
        lambda a, b, c: narrow(f(a), ml_dtypes.bfloat16, 0x7FFF) << 16 | narrow(f(b), ml_dtypes.bfloat16, 0x7FFF),
    ),
    "f16x2": (
        "cvt.rn.f16x2.f32 %d, %a, %b;",
        lambda a, b, c: narrow(f(a), np.float16, 0x7FFF) << 16 | narrow(f(b), np.float16, 0x7FFF),
    ),
}


def check(body: str, expected: np.ndarray, operands: tuple[np.ndarray, ...]) -> None:
    got = run(body, *operands)
    wrong = np.flatnonzero(got != expected.astype(np.uint32))
    first = [hex(int(x[wrong[0]])) for x in (*operands, got, expected)] if wrong.size else []
    assert not wrong.size, f"{wrong.size} of {N} differ, first a, b, c, got, expected: {first}"


@pytest.mark.parametrize("name", INTEGER)
def test_integer(name: str) -> None:
    body, oracle = INTEGER[name]
    operands = tuple(random_bits(seed) for seed in range(3))
    if name in ("shl", "shr.u32", "shr.s32", "bfe.u32", "bfe.s32"):
        operands = (operands[0], operands[1] % 70, operands[2] % 70)
    if name == "guard":
        operands = (operands[0], np.where(np.arange(N) % 3 == 0, operands[0], operands[1]), operands[2])
    check(body, oracle(*operands), operands)


@pytest.mark.parametrize("name", FLOAT)
def test_float(name: str) -> None:
    body, oracle = FLOAT[name]
    operands = tuple(ordinary_floats(seed) for seed in range(3))
    if name.startswith("setp"):
        operands = (operands[0], np.where(np.arange(N) % 2, operands[0], operands[1]), operands[2])
    with np.errstate(all="ignore"):
        check(body, oracle(*operands), operands)


def test_every_code_of_e4m3_to_f16() -> None:
    a = (np.arange(N) % 256).astype(np.uint32) | ((np.arange(N) // 256 * 17) % 256).astype(np.uint32) << np.uint32(8)
    halves = [(a >> np.uint32(shift) & 255).astype(np.uint8).view(ml_dtypes.float8_e4m3fn) for shift in (0, 8)]
    expected = [narrow(h.astype(np.float32), np.float16, 0x7FFF) for h in halves]
    body = "cvt.u16.u32 %h0, %a; cvt.rn.f16x2.e4m3x2 %d, %h0;"
    check(body, expected[1] << np.uint32(16) | expected[0], (a, a, a))


@pytest.mark.parametrize(
    ("body", "source"),
    [
        ("shfl.sync.bfly.b32 %d, %a, 5, 31, -1;", lambda lane: lane ^ 5),
        ("shfl.sync.idx.b32 %d, %a, 7, 31, -1;", lambda lane: lane * 0 + 7),
        ("shfl.sync.up.b32 %d, %a, 3, 0, -1;", lambda lane: np.where(lane < 3, lane, lane - 3)),
        ("shfl.sync.down.b32 %d, %a, 3, 31, -1;", lambda lane: np.where(lane > 28, lane, lane + 3)),
        ("shfl.sync.bfly.b32 %d, %a, 3, 0x181f, -1;", lambda lane: lane ^ 3),  # segments of 8
    ],
)
def test_shuffle(body: str, source: Callable[[np.ndarray], np.ndarray]) -> None:
    a = random_bits(0)
    lanes = np.arange(N)
    check(body, a[lanes // 32 * 32 + source(lanes % 32)], (a, a, a))


@pytest.mark.parametrize(
    "body",
    [
        "fma.rz.f32 %d, %a, %b, %c;",
        "add.s32.wide %d, %a, %b;",
        "frobnicate.b32 %d, %a;",
        "cvt.rn.e4m3x2.f32 %h0, %a, %b;",
    ],
)
def test_what_is_unknown_is_named_with_its_line(body: str) -> None:
    from emulator import EmulationError, Machine

    line = PTX[: PTX.index("{body}")].count("\n") + 1
    with pytest.raises(EmulationError, match=rf"line {line}: .*{body.split()[0]}"):
        Machine().load(PTX.format(body=body))
