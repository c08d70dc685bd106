"""mma.sync on the emulator, every form that ptxas takes for sm_90a, against matrix products and the model's oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from backends import backend_params
from machines import machine, silicon_too
from matrix_model import (
    NAN,
    Array,
    assert_fused,
    decode,
    encode,
    fused,
    integer,
    near_codes,
    random_codes,
    size_of,
    small_codes,
    tiny_codes,
)

pytestmark = backend_params(["emulator"])[0].marks

FP8 = ("e4m3", "e5m2")
INTEGERS = [("s32", a, b, k) for a in ("s8", "u8") for b in ("s8", "u8") for k in (16, 32)]
# (D, A, B, K)
HALVES = [
    *(("f32", "f16", "f16", k) for k in (8, 16)),
    *(("f16", "f16", "f16", k) for k in (8, 16)),
    *(("f32", "bf16", "bf16", k) for k in (8, 16)),
    *(("f32", "tf32", "tf32", k) for k in (4, 8)),
]
FP8_FORMS = [(d, a, b, k) for d in ("f32", "f16") for a in FP8 for b in FP8 for k in (16, 32)]
ROWS, COLUMNS, LANES = 16, 8, 32


@dataclass(frozen=True)
class Form:
    """One mma.sync; in ``body``, {mma} stands for it, with C in the registers of D."""

    d: str
    a: str
    b: str
    k: int
    saturate: bool = False
    body: str = "{mma}"

    @property
    def counts(self) -> tuple[int, int, int]:
        """Registers of A, B and D."""
        width = self.k * size_of(self.a) // 16
        return 2 * width, width, 2 if self.d == "f16" else 4

    def ptx(self) -> str:
        vectors = [
            "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"
            for name, count in zip("abd", self.counts, strict=True)
        ]
        sat = ".satfinite" if self.saturate else ""
        kinds = f"{self.d}.{self.a}.{self.b}.{self.d}"
        registers = f"{vectors[2]}, {vectors[0]}, {vectors[1]}, {vectors[2]}"
        mma = f"mma.sync.aligned.m16n8k{self.k}.row.col{sat}.{kinds} {registers};"
        loads = "\n  ".join(
            f"ld.global.b32 %{name}{i}, [%p{name}+{4 * i}];"
            for name, count in zip("abd", self.counts, strict=True)
            for i in range(count)
        )
        addresses = "\n  ".join(
            f"mul.wide.u32 %o, %t, {4 * count}; ld.param.u64 %p{name}, [p{name}]; add.s64 %p{name}, %p{name}, %o;"
            for name, count in zip("abd", self.counts, strict=True)
        )
        stores = "\n  ".join(f"st.global.b32 [%pd+{4 * i}], %d{i};" for i in range(self.counts[2]))
        return f"""
.version 9.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 pa, .param .u64 pb, .param .u64 pd) {{
  .reg .pred p;
  .reg .b32 %a<4>, %b<2>, %d<4>, %t;
  .reg .b64 %pa, %pb, %pd, %o;
  mov.u32 %t, %tid.x;
  {addresses}
  {loads}
  {self.body.replace("{mma}", mma)}
  {stores}
  ret;
}}
"""

    def run(self, a: Array, b: Array, c: Array, lanes: int = LANES) -> Array:
        """D as codes from A [16, K], B [8, K] and C [16, 8] as codes, by the fragment tables of the PTX ISA."""
        lane = np.arange(LANES)
        group, quad = lane // 4, lane % 4
        left, right = (x.view(np.uint32) for x in (a, b))
        # A register holds neighbours along K: two of 16 bits, four of 8.
        a_words = [left[group + 8 * (r % 2), quad + 4 * (r // 2)] for r in range(self.counts[0])]
        b_words = [right[group, quad + 4 * r] for r in range(self.counts[1])]
        i = np.arange(4)
        rows, columns = group[:, None] + 8 * (i // 2), 2 * quad[:, None] + i % 2
        d = np.ascontiguousarray(c[rows, columns]).view(np.uint32).copy()
        arguments = [np.stack(a_words, 1).copy(), np.stack(b_words, 1).copy(), d]
        machine().load(self.ptx())["kernel"].launch((1, 1, 1), (lanes, 1, 1), args=arguments)
        out = np.zeros_like(c)
        out[rows, columns] = d.view(c.dtype)
        return out


def ids(value: object) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value)


@silicon_too
@pytest.mark.parametrize("kinds", HALVES + FP8_FORMS + INTEGERS, ids=ids)
def test_small_integers(kinds: tuple[str, str, str, int]) -> None:
    """Sums that are exact however they are made: fragments and shapes."""
    for seed in range(3):
        rng, form = np.random.default_rng(seed), Form(*kinds)
        a, b = small_codes(form.a, (ROWS, form.k), rng), small_codes(form.b, (COLUMNS, form.k), rng)
        c = rng.integers(-50, 50, (ROWS, COLUMNS))
        got = form.run(a, b, c.astype(np.int32).view(np.uint32) if form.d == "s32" else encode(form.d, c))
        values = got.view(np.int32) if form.d == "s32" else decode(form.d, got)
        np.testing.assert_array_equal(values, decode(form.a, a) @ decode(form.b, b).T + c)


def operands(form: Form, kind: str, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    shapes = ((form.a, (ROWS, form.k)), (form.b, (COLUMNS, form.k)), (form.d, (ROWS, COLUMNS)))
    if kind == "near":
        a, b, c = (near_codes(t, shape, rng) for t, shape in shapes)
    elif kind == "tiny":
        a, b = (tiny_codes(t, shape, rng, form.d) for t, shape in shapes[:2])
        c = np.zeros_like(random_codes(*shapes[2], rng))
    else:
        a, b, c = (random_codes(t, shape, rng) for t, shape in shapes)
    if kind == "special":
        wild = [random_codes(t, shape, rng, False) for t, shape in shapes[:2]]
        a[::5], b[::3] = wild[0][::5], wild[1][::3]
        c[1::5] = encode(form.d, rng.choice(np.array([np.inf, -np.inf, np.nan, -0.0, 0.0]), c[1::5].shape))
    elif kind == "any":
        c = np.where(rng.integers(0, 2, c.shape) == 1, near_codes(form.d, c.shape, rng), c)
    return a, b, c


@silicon_too
@pytest.mark.parametrize("kind", ["near", "any", "tiny", "special"])
@pytest.mark.parametrize("kinds", HALVES, ids=ids)
def test_floating_point(kinds: tuple[str, str, str, int], kind: str) -> None:
    for seed in range(6):
        form = Form(*kinds)
        a, b, c = operands(form, kind, np.random.default_rng(seed))
        assert_fused(form.run(a, b, c), a, b, c, (form.a, form.b, form.d), 25)


@silicon_too
@pytest.mark.parametrize("kind", ["near", "any", "tiny", "special"])
@pytest.mark.parametrize("kinds", FP8_FORMS, ids=ids)
def test_fp8(kinds: tuple[str, str, str, int], kind: str) -> None:
    """As ptxas makes it: f16 products of the lower bytes of each register, then of the upper ones, and C at the end."""
    for seed in range(4):
        form = Form(*kinds)
        a, b, c = operands(form, kind, np.random.default_rng(seed))
        got = form.run(a, b, c)
        halves = []
        for name, codes in ((form.a, a), (form.b, b)):
            wide = encode("f16", decode(name, codes)).reshape(len(codes), -1, 2, 2)
            halves.append([wide[:, :, upper].reshape(len(codes), -1) for upper in (0, 1)])
        dtype = np.float16 if form.d == "f16" else np.float32
        for i in range(ROWS):
            for j in range(COLUMNS):
                part = 0
                for left, right in zip(*halves, strict=True):
                    part = fused(left[i], right[j], part, ("f16", "f16", form.d), 25)
                terms = np.array([part, c[i, j]]).astype(c.dtype).view(dtype)
                with np.errstate(all="ignore"):
                    total = terms[0] + terms[1]
                expected = NAN[form.d] if np.isnan(total) else int(total.view(c.dtype))
                assert int(got[i, j]) == expected, f"D[{i}, {j}] is {int(got[i, j]):#x}, expected {expected:#x}"


@silicon_too
@pytest.mark.parametrize("kinds", INTEGERS, ids=ids)
@pytest.mark.parametrize("saturate", [False, True], ids=["wraps", "satfinite"])
def test_integers(kinds: tuple[str, str, str, int], saturate: bool) -> None:
    rng, form = np.random.default_rng(0), Form(*kinds, saturate=saturate)
    a, b = random_codes(form.a, (ROWS, form.k), rng), random_codes(form.b, (COLUMNS, form.k), rng)
    c = rng.integers(0, 1 << 32, (ROWS, COLUMNS), dtype=np.uint64).astype(np.uint32)
    c[::2] = rng.choice(np.array([0x7FFFFFFF, 0x80000000, 0x7FFFF000, 0x80001000], np.uint32), c[::2].shape)
    np.testing.assert_array_equal(form.run(a, b, c), integer(a, b, c, (form.a, form.b), saturate))


SOURCES = "{%a0, %a1, %a2, %a3}, {%b0, %b1}"


@silicon_too
def test_immediates_and_sinks() -> None:
    """C may be of literals, and elements of D may go nowhere."""
    rng = np.random.default_rng(0)
    a, b = small_codes("f16", (ROWS, 16), rng), small_codes("f16", (COLUMNS, 16), rng)
    c = encode("f32", np.full((ROWS, COLUMNS), 7.0))
    threes = "{0f40400000, 0f40400000, 0f40400000, 0f40400000}"
    body = f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%d0, _, %d2, %d3}}, {SOURCES}, {threes};"
    got = decode("f32", Form("f32", "f16", "f16", 16, body=body).run(a, b, c))
    kept = (np.arange(ROWS)[:, None] < 8) & (np.arange(COLUMNS) % 2 == 1)
    np.testing.assert_array_equal(got, np.where(kept, 7.0, decode("f16", a) @ decode("f16", b).T + 3))


D = "{%d0, %d1, %d2, %d3}"
UNKNOWN = [
    ("layout", "m16n8k16.row.row.f32.f16.f16.f32", f"{D}, {SOURCES}, {D}"),
    ("shape", "m8n8k4.row.col.f32.f16.f16.f32", f"{D}, {SOURCES}, {D}"),
    ("shape", "m16n8k64.row.col.s32.s8.s8.s32", f"{D}, {SOURCES}, {D}"),
    ("combination of types", "m16n8k16.row.col.f16.bf16.bf16.f16", f"{D}, {SOURCES}, {D}"),
    ("combination of types", "m16n8k16.row.col.f32.f16.bf16.f32", f"{D}, {SOURCES}, {D}"),
    ("combination of types", "m16n8k16.row.col.f32.f16.f16.f16", f"{D}, {SOURCES}, {D}"),
    ("combination of types", "m16n8k16.row.col.satfinite.f32.f16.f16.f32", f"{D}, {SOURCES}, {D}"),
    ("modifier .relu", "m16n8k16.row.col.f32.f16.f16.f32.relu", f"{D}, {SOURCES}, {D}"),
    ("operand 1, which is a vector of 4", "m16n8k16.row.col.f32.f16.f16.f32", f"{D}, {{%a0, %a1}}, {{%b0, %b1}}, {D}"),
    ("operand 2, which is a vector of 1", "m16n8k8.row.col.f32.f16.f16.f32", f"{D}, {{%a0, %a1}}, %b0, {D}"),
    ("number of operands", "m16n8k16.row.col.f32.f16.f16.f32", f"{D}, {SOURCES}"),
]


@pytest.mark.parametrize(("what", "modifiers", "operands"), UNKNOWN)
def test_unknown_forms_are_refused(what: str, modifiers: str, operands: str) -> None:
    from emulator import EmulationError, Machine

    text = Form("f32", "f16", "f16", 16, body=f"mma.sync.aligned.{modifiers} {operands};").ptx()
    with pytest.raises(EmulationError, match=rf"does not know this {what}"):
        Machine().load(text)


def test_all_lanes_must_take_part() -> None:
    from emulator import EmulationError

    a, b, c = (np.zeros((rows, width), np.uint16) for rows, width in ((ROWS, 16), (COLUMNS, 16), (ROWS, COLUMNS)))
    guarded = Form("f16", "f16", "f16", 16, body="setp.lt.u32 p, %t, 20;\n  @p {mma}")
    with pytest.raises(EmulationError, match="divergent"):
        guarded.run(a, b, c)
    with pytest.raises(EmulationError, match="all lanes of a warp"):
        Form("f16", "f16", "f16", 16).run(a, b, c, lanes=24)
