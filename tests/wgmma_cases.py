"""One wgmma in a kernel, with its operands in shared memory or registers as the PTX ISA lays them out.

The layouts here are its tables, element by element, and know nothing of the emulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from machines import machine
from matrix_model import (
    Array,
    assert_fused,
    decode,
    encode,
    integer,
    near_codes,
    random_codes,
    size_of,
    small_codes,
)

ROWS, ROW_BYTES, THREADS = 64, 32, 128
# Bytes swizzled as one in each mode of a descriptor.
SPAN = {0: 16, 1: 128, 2: 64, 3: 32}
FP8 = ("e4m3", "e5m2")
FENCE, COMMIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned 0;"


@dataclass(frozen=True)
class Form:
    """One wgmma, and how the kernel around it goes about it."""

    d: str
    a: str
    b: str
    n: int = 24
    registers: bool = False  # A comes from registers
    scale_d: str = "p"
    signs: tuple[int, int] = (1, 1)
    transposed: tuple[int, int] = (0, 0)
    saturate: bool = False
    block: int = THREADS
    # What the kernel does with it. {mma} is the instruction; D is in %d0 and so on, A in %a0 to %a3 or at %x, B at %y.
    steps: tuple[str, ...] = (FENCE, "{mma}", COMMIT, WAIT)
    proxy_fence: bool = True

    @property
    def half(self) -> bool:
        return self.d == "f16"

    @property
    def words(self) -> int:
        """Registers of D."""
        return self.n // 4 if self.half else self.n // 2

    @property
    def bits(self) -> int:
        """That an aligned term keeps."""
        return 13 if self.a in FP8 else 25

    def instruction(self) -> str:
        shape = f"m64n{self.n}k{ROW_BYTES // size_of(self.a)}"
        d = ", ".join(f"%d{i}" for i in range(self.words))
        a = "{%a0, %a1, %a2, %a3}" if self.registers else "%x"
        operands = [f"{{{d}}}", a, "%y", self.scale_d]
        if self.d != "s32":
            operands += [str(sign) for sign in self.signs]
        if self.a in ("f16", "bf16"):
            operands += [str(t) for t in self.transposed[self.registers :]]
        sat = ".satfinite" if self.saturate else ""
        return f"wgmma.mma_async.sync.aligned.{shape}{sat}.{self.d}.{self.a}.{self.b} {', '.join(operands)};"

    def ptx(self) -> str:
        """A kernel that fills shared memory and registers, runs the steps, and stores D."""
        steps = "\n  ".join(self.steps).replace("{mma}", self.instruction())
        loads = [f"ld.global.b32 %d{i}, [%pd+{4 * i}];" for i in range(self.words)]
        loads += [f"ld.global.b32 %a{i}, [%pa+{4 * i}];" for i in range(4)]
        stores = [f"st.global.b32 [%pd+{4 * i}], %d{i};" for i in range(self.words)]
        return f"""
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry kernel(.param .u64 image, .param .u32 bytes, .param .u64 da, .param .u64 db, .param .u64 pa,
                       .param .u64 pd, .param .u32 scale) {{
  .reg .pred p, more;
  .reg .b32 %d<{self.words}>, %a<4>, %t, %i, %n, %s, %to, %v<4>, %u<4>;
  .reg .b64 %x, %y, %pa, %pd, %g, %o, %base;
  mov.u32 %t, %tid.x;
  ld.param.u32 %n, [bytes];
  ld.param.u64 %g, [image];
  mov.u32 %s, smem;
  shl.b32 %i, %t, 4;
COPY:
  setp.ge.u32 more, %i, %n;
  @more bra DONE;
  cvt.u64.u32 %o, %i;
  add.s64 %o, %g, %o;
  ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%o];
  add.s32 %to, %s, %i;
  st.shared.v4.b32 [%to], {{%v0, %v1, %v2, %v3}};
  add.s32 %i, %i, {16 * self.block};
  bra COPY;
DONE:
  {"fence.proxy.async.shared::cta;" if self.proxy_fence else ""}
  bar.sync 0;
  ld.param.u64 %x, [da];
  ld.param.u64 %y, [db];
  shr.u32 %s, %s, 4;
  cvt.u64.u32 %base, %s;
  add.s64 %x, %x, %base;
  add.s64 %y, %y, %base;
  ld.param.u32 %i, [scale];
  setp.ne.s32 p, %i, 0;
  ld.param.u64 %pa, [pa];
  mul.wide.u32 %o, %t, 16;
  add.s64 %pa, %pa, %o;
  ld.param.u64 %pd, [pd];
  mul.wide.u32 %o, %t, {4 * self.words};
  add.s64 %pd, %pd, %o;
  {chr(10).join(loads)}
  {steps}
  {chr(10).join(stores)}
  ret;
}}
"""


@dataclass
class Place:
    """Where an operand of ``rows`` rows of M or N lies in shared memory; the offsets in bytes."""

    mode: int
    rows: int
    transposed: bool = False
    start: int = 0
    leading: int = 0
    stride: int = 0
    extra: int = 0  # bits of the descriptor that are set besides

    def descriptor(self) -> int:
        fields = self.start >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | self.mode << 62
        return fields | self.extra

    def offsets(self) -> Array:
        """Of each byte of each row along K, after the PTX ISA's canonical layouts: [rows][32]."""
        span, row, byte = SPAN[self.mode], np.arange(self.rows)[:, None], np.arange(ROW_BYTES)
        if self.transposed:
            k, half, across = byte // 2, byte % 2, span // 2  # `across`: elements of M or N side by side
            # Without swizzle, the two offsets have each other's meaning.
            repeat, octet = (self.stride, self.leading) if self.mode == 0 else (self.leading, self.stride)
            linear = 2 * (row % across) + row // across * repeat + span * (k % 8) + k // 8 * octet + half
        elif self.mode == 0:
            linear = 16 * (row % 8) + row // 8 * self.stride + byte // 16 * self.leading + byte % 16
        else:
            linear = span * (row % 8) + row // 8 * self.stride + byte
        linear = linear + self.start
        # The 16-byte chunk c of line r of 128 bytes changes places with chunk c ^ r, in groups as wide as the span.
        swizzled: Array = (linear // 16 ^ linear // 128 % (span // 16)) * 16 + linear % 16
        return swizzled


def dense(mode: int, rows: int, transposed: bool, start: int, rng: np.random.Generator) -> Place:
    """A layout with room to spare between its parts, and rubbish in the offset that does not count."""
    span = SPAN[mode]
    place = Place(mode, rows, transposed, start)
    gap = int(rng.integers(1, 3))
    if mode == 0 and rng.integers(0, 2):
        place.leading, place.stride = 128, 256 * gap
    elif mode == 0:
        place.leading, place.stride = 128 * 40, 128 + 16 * (gap - 1)
    elif not transposed:
        place.leading, place.stride = 16 * int(rng.integers(0, 1 << 14)), 8 * span * gap
    else:
        place.stride, place.leading = 8 * span * gap, 8 * span * gap * 2
    return place


@dataclass
class Case:
    """Operands [64][K] and [N][K] and the accumulator [64][N] as codes, with the places of the operands."""

    form: Form
    a: Array
    b: Array
    c: Array
    places: tuple[Place, Place]
    scale: int = 1
    # What else lies in shared memory.
    others: list[tuple[Place, Array]] = field(default_factory=list)

    def run(self, seed: int = 0) -> Array:
        form = self.form
        image = np.full(1 << 17, 0xFF, np.uint8)
        used = 16
        contents = list(zip(self.places, (self.a, self.b), strict=True))[form.registers :]
        for place, codes in contents + self.others:
            offsets = place.offsets()
            image[offsets] = np.ascontiguousarray(codes).view(np.uint8)
            used = max(used, int(offsets.max()) // 1024 * 1024 + 1024)
        image = image[:used].copy()
        t = np.arange(THREADS)
        row, quad = 16 * (t // 32) + t % 32 // 4, t % 4
        words = self.a.view(np.uint32)
        fragments = np.stack([words[row + 8 * (r & 1), 4 * (r >> 1) + quad] for r in range(4)], 1).copy()
        v = np.arange(form.n // 2)
        rows = row[:, None] + 8 * (v >> 1 & 1)
        columns = 8 * (v >> 2) + 2 * quad[:, None] + (v & 1)
        held = np.ascontiguousarray(self.c[rows, columns])
        d = held.view(np.uint32).copy()
        kernel = machine(seed).load(form.ptx())["kernel"]
        descriptors = [place.descriptor() for place in self.places]
        arguments = [image, image.size, *descriptors, fragments, d, self.scale]
        kernel.launch((1, 1, 1), (form.block, 1, 1), (1, 1, 1), image.size, arguments)
        out = np.zeros_like(self.c)
        out[rows, columns] = d.view(self.c.dtype)
        return out

    def check(self, seed: int = 0, sample: int = 600) -> None:
        form, got = self.form, self.run(seed)
        c = self.c if self.scale else np.zeros_like(self.c)
        if form.d == "s32":
            np.testing.assert_array_equal(got, integer(self.a, self.b, c, (form.a, form.b), form.saturate))
        else:
            negate = form.signs[0] * form.signs[1] < 0
            assert_fused(got, self.a, self.b, c, (form.a, form.b, form.d), form.bits, negate, sample)


def places(form: Form, modes: tuple[int, int], rng: np.random.Generator) -> tuple[Place, Place]:
    t = form.transposed
    return dense(modes[0], ROWS, bool(t[0]), 0, rng), dense(modes[1], form.n, bool(t[1]), 1 << 15, rng)


def accumulator(form: Form, rng: np.random.Generator) -> Array:
    """Of sums' own size, with zeros and any bits at all among them."""
    shape = (ROWS, form.n)
    if form.d == "s32":
        return rng.integers(0, 1 << 32, shape, dtype=np.uint64).astype(np.uint32)
    c = near_codes(form.d, shape, rng, 6)
    pick = rng.integers(0, 8, shape)
    return np.where(pick == 0, 0, np.where(pick == 1, random_codes(form.d, shape, rng), c)).astype(c.dtype)


def small_case(form: Form, modes: tuple[int, int], seed: int) -> Case:
    """Operands whose sums are exact integers."""
    rng = np.random.default_rng(seed)
    k = ROW_BYTES // size_of(form.a)
    c = rng.integers(-50, 50, (ROWS, form.n))
    codes = c.astype(np.int32).view(np.uint32) if form.d == "s32" else encode(form.d, c)
    a, b = small_codes(form.a, (ROWS, k), rng), small_codes(form.b, (form.n, k), rng)
    return Case(form, a, b, codes, places(form, modes, rng))


def check_exactly(case: Case, seed: int = 0) -> None:
    """All of D against a matrix product."""
    form = case.form
    got = case.run(seed)
    values = got.view(np.int32).astype(np.float64) if form.d == "s32" else decode(form.d, got)
    c = case.c.view(np.int32).astype(np.float64) if form.d == "s32" else decode(form.d, case.c)
    sign = form.signs[0] * form.signs[1]
    expected = sign * (decode(form.a, case.a) @ decode(form.b, case.b).T) + c * case.scale
    np.testing.assert_array_equal(values, expected)
