"""What exchanges values between lanes, and what the loader refuses as ptxas does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from backends import backend_params
from emulator_lanes import COUNT, execute, kernel_text, operands
from machines import silicon_too

pytestmark = backend_params(["emulator"])[0].marks


@silicon_too
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
    a = operands(("b32",))[0]
    lanes = np.arange(COUNT)
    assert np.array_equal(execute(body, (a,), 32), a[lanes // 32 * 32 + source(lanes % 32)])


# Registers: %h of 16 bits, %r of 32, %l of 64, %f an .f32, %g an .f64, p, q, r predicates.
REFUSED = """
prefetch.shared.L1 [%l1];
prefetch.global.L3 [%l1];
add.b32 %r0, %r1, %r2;
add.u8 %h0, %h1, %h2;
add.s32 %r0, %r1, %l2;
add.s32 %r0, %h1, %r2;
add.s32 %f0, %r1, %r2;
add.s32 %r0, %r1, 0f3F800000;
add.s32 %r0, %r1, -%r2;
add.s32 %r0, %tid.x, %r1;
add.s32 _, %r0, %r1;
add.s32 5, %r0, %r1;
add.s32 %r0, %r1;
add.s32 %r0, %r1, %r2, %r3;
add.s32.wide %r0, %r1, %r2;
add.sat.u32 %r0, %r1, %r2;
add.sat.s64 %l0, %l1, %l2;
add.cc.s16 %h0, %h1, %h2;
add.cc.sat.s32 %r0, %r1, %r2;
add.f32 %f0, %f1, 1;
add.f32 %f0, %f1, %g2;
add.rna.f32 %f0, %f1, %f2;
add.ftz.f64 %g0, %g1, %g2;
add.sat.f64 %g0, %g1, %g2;
add.ftz.bf16 %h0, %h1, %h2;
add.sat.bf16x2 %r0, %r1, %r2;
add.rz.f16 %h0, %h1, %h2;
add.f16 %h0, %h1, 1.0;
add.f32x2 %l0, %l1, %l2;
sub.u16x2 %r0, %r1, %r2;
mul.s32 %r0, %r1, %r2;
mul.wide.u64 %l0, %l1, %l2;
mul.lo.f32 %f0, %f1, %f2;
mad.f32 %f0, %f1, %f2, %f3;
mad.lo.sat.s32 %r0, %r1, %r2, %r3;
mad.rn.f16 %h0, %h1, %h2, %h3;
mad.wide.cc.u32 %l0, %r1, %r2, %l3;
mul24.s32 %r0, %r1, %r2;
mul24.lo.s64 %l0, %l1, %l2;
fma.f32 %f0, %f1, %f2, %f3;
fma.rn.relu.f32 %f0, %f1, %f2, %f3;
fma.rn.sat.relu.f16 %h0, %h1, %h2, %h3;
fma.rn.f32.f16 %f0, %h1, %h2, %f3;
div.f32 %f0, %f1, %f2;
div.approx.f64 %g0, %g1, %g2;
div.rn.sat.f32 %f0, %f1, %f2;
div.rn.f16 %h0, %h1, %h2;
rem.f32 %f0, %f1, %f2;
rcp.f32 %f0, %f1;
rcp.approx.f64 %g0, %g1;
sqrt.approx.ftz.f64 %g0, %g1;
rsqrt.f32 %f0, %f1;
ex2.f32 %f0, %f1;
ex2.approx.ftz.f16 %h0, %h1;
ex2.approx.bf16 %h0, %h1;
lg2.approx.f16 %h0, %h1;
sin.approx.f64 %g0, %g1;
tanh.approx.ftz.f32 %f0, %f1;
abs.u32 %r0, %r1;
abs.ftz.bf16 %h0, %h1;
neg.u64 %l0, %l1;
min.relu.u32 %r0, %r1, %r2;
min.u16x2.relu %r0, %r1, %r2;
min.relu.s32.relu %r0, %r1, %r2;
min.NaN.f64 %g0, %g1, %g2;
min.ftz.bf16 %h0, %h1, %h2;
min.abs.f32 %f0, %f1, %f2;
max.xorsign.f32 %f0, %f1, %f2;
copysign.f16 %h0, %h1, %h2;
and.u32 %r0, %r1, %r2;
not.s32 %r0, %r1;
cnot.pred p, q;
shl.u32 %r0, %r1, %r2;
shl.b32 %r0, %r1, %h2;
shr.b32 %r0, %r1, 0f3F800000;
shf.l.b32 %r0, %r1, %r2, %r3;
shf.l.wrap.b64 %l0, %l1, %l2, %r3;
lop3.b32 %r0, %r1, %r2, %r3, %r4;
lop3.b64 %l0, %l1, %l2, %l3, 1;
lop3.xor.b32 %r0|p, %r1, %r2, %r3, 1, q;
lop3.and.b32 %r0, %r1, %r2, %r3, 1, q;
prmt.b32.xx %r0, %r1, %r2, %r3;
prmt.b64 %l0, %l1, %l2, %r3;
popc.u32 %r0, %r1;
popc.b64 %l0, %l1;
bfind.b32 %r0, %r1;
bfe.b32 %r0, %r1, 0, 1;
bfi.u32 %r0, %r1, %r2, 0, 1;
bmsk.b32 %r0, %r1, %r2;
szext.clamp.b32 %r0, %r1, %r2;
fns.u32 %r0, %r1, %r2, %r3;
dp4a.s32 %r0, %r1, %r2, %r3;
dp2a.s32.s32 %r0, %r1, %r2, %r3;
setp.lt.b32 p, %r1, %r2;
setp.lo.s32 p, %r1, %r2;
setp.hi.f32 p, %f1, %f2;
setp.num.s32 p, %r1, %r2;
setp.ltu.u32 p, %r1, %r2;
setp.eq.pred p, q, r;
setp.eq.ftz.f64 p, %g1, %g2;
setp.eq.ftz.s32 p, %r1, %r2;
setp.eq.ftz.bf16 p, %h1, %h2;
setp.eq.nand.s32 p, %r1, %r2, q;
setp.eq.and.s32 p, %r1, %r2;
setp.eq.s32 p, %r1, %r2, q;
setp.eq.s32 _|_, %r1, %r2;
setp.eq.s32 %r0, %r1, %r2;
setp.eq.f16 p|q, %h1, %h2;
setp.s32 p, %r1, %r2;
setp.eq p, %r1, %r2;
setp;
set.lt.u64.s32 %l0, %r1, %r2;
set.lt.f32.f16 %f0, %h1, %h2;
set.lt.ftz.bf16.f32 %h0, %f1, %f2;
selp.pred p, q, r, p;
selp.f16 %h0, %h1, %h2, p;
selp.b32 %r0, %r1, %r2, %r3;
slct.b32.u32 %r0, %r1, %r2, %r3;
slct.ftz.b32.s32 %r0, %r1, %r2, %r3;
testp.finite.f16 p, %h1;
testp.odd.f32 p, %f1;
cvt.s32.f32 %r0, %f1;
cvt.rn.s32.f32 %r0, %f1;
cvt.f32.s32 %f0, %r1;
cvt.rni.f32.s32 %f0, %r1;
cvt.rn.s32.u32 %r0, %r1;
cvt.sat.s32.s16 %r0, %h1;
cvt.sat.u32.u32 %r0, %r1;
cvt.ftz.s32.s16 %r0, %h1;
cvt.f32.f64 %f0, %g1;
cvt.rn.f64.f32 %g0, %f1;
cvt.rn.ftz.f16.f64 %h0, %g1;
cvt.rn.sat.bf16.f32 %h0, %f1;
cvt.rm.relu.f16.f32 %h0, %f1;
cvt.rn.relu.f32.f64 %f0, %g1;
cvt.rn.relu.sat.f16.f32 %h0, %f1;
cvt.rzi.s8.bf16 %h0, %h1;
cvt.rna.f32.f64 %f0, %g1;
cvt.rm.tf32.f32 %r0, %f1;
cvt.rna.relu.tf32.f32 %r0, %f1;
cvt.rna.tf32.f32 %f0, %f1;
cvt.rna.tf32.f64 %r0, %g1;
cvt.rn.f32.tf32 %f0, %r1;
cvt.rn.e4m3x2.f32 %h0, %f1, %f2;
cvt.satfinite.e4m3x2.f32 %h0, %f1, %f2;
cvt.rz.satfinite.e4m3x2.f32 %h0, %f1, %f2;
cvt.rn.satfinite.e4m3x2.f32 %r0, %f1, %f2;
cvt.rn.satfinite.e4m3x2.bf16x2 %h0, %r1;
cvt.rn.bf16x2.e4m3x2 %r0, %h1;
cvt.rn.satfinite.f16x2.e4m3x2 %r0, %h1;
cvt.rn.satfinite.e4m3x4.f32 %r0, %f1, %f2;
cvt.rn.bf16x2.f32 %r0, %f1;
cvt.rn.bf16.f32 %r0, %f1;
cvt.rn.ftz.f16x2.f32 %r0, %f1, %f2;
cvt.rm.f16x2.f32 %r0, %f1, %f2;
cvt.rn.f16.f32 %f0, %f1;
cvt.u32.u64 %r0, %r1;
cvt.pack.u16.s32 %r0, %r1, %r2;
cvt.pack.sat.u32.s32 %r0, %r1, %r2;
cvt.pack.sat.u8.s32 %r0, %r1, %r2;
mov.b8 %h0, %h1;
mov.f16 %h0, %h1;
mov.u32 %f0, %r1;
mov.f32 %f0, 1;
mov.b32 %r0, 0d3FF0000000000000;
mov.f32 %f0, %tid.x;
mov.u32 {%h0, %h1}, %r0;
mov.b32 %r0, {%r1, %h1};
mov.b32 {_, _}, %r0;
mov.b64 %l0, {%r0};
mov.b64 %l0, {%r0, %r1, %r2};
mov.b64 %l0, {};
mov.pred p, %r0;
frobnicate.b32 %r0, %r1;
"""
DECLARATIONS = ".reg .f32 %f<4>; .reg .f64 %g<4>;"


# What ptxas folds them to: 16 times the fraction, less 1, in bits 52 to 55.
POLICIES = {
    "createpolicy.fractional.L2::evict_first.b64 %x;": 0x12F0 << 48,
    "createpolicy.fractional.L2::evict_last.b64 %x, 1.0;": 0x14F0 << 48,
    "createpolicy.fractional.L2::evict_normal.b64 %x, 0f3F800000;": 0x16F0 << 48,
    "createpolicy.fractional.L2::evict_unchanged.b64 %x, 0.5;": 0x1070 << 48,
}


@pytest.mark.parametrize("text", POLICIES)
def test_cache_policies(text: str) -> None:
    from emulator import Machine

    out = np.zeros(1, np.uint64)
    head = ".version 8.4\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 p) { .reg .b64 %x, %y;\n"
    hints = "prefetch.global.L2 [%y]; ld.global.L2::cache_hint.b64 %y, [%y], %x;"
    body = f"ld.param.u64 %y, [p]; {text} st.global.b64 [%y], %x; {hints} ret; }}"
    Machine().load(head + body)["k"].launch(args=[out])
    assert hex(out[0]) == hex(POLICIES[text])


@pytest.mark.parametrize("text", REFUSED.strip().splitlines())
def test_what_ptxas_refuses_is_refused_with_its_line(text: str) -> None:
    from emulator import EmulationError, Machine

    ptx = kernel_text(f"{DECLARATIONS}\n{text}", [32], 32)
    line = ptx[: ptx.index(text)].count("\n") + 1
    with pytest.raises(EmulationError, match=f"line {line}: "):
        Machine().load(ptx)
