"""wgmma: what it reads, when, and who issues it; and the registers of a warpgroup."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .copies import SHARED_FENCE
from .program import WRONG_DATA, Array, Bug, expect, init, load, wait

M, N, K = 64, 8, 32
TILE = (M + N, K)  # A, then B, of e4m3
BYTES = (M + N) * K
# 32-byte swizzle, groups of 8 rows 256 bytes apart; LBO is ignored.
DESCRIPTOR = 3 << 62 | (256 >> 4) << 32 | 1 << 16
FULL, HALF = (0, 1), (0, 0)


def codes() -> Array:
    """Two tiles of small integers, so that every sum is exact."""
    values = np.random.default_rng(3).integers(-2, 3, (2 * TILE[0], K))
    encoded: Array = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return encoded


def product(a: Array) -> Array:
    values = a.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    sums: Array = (values[:M] @ values[M : M + N].T).reshape(-1).view(np.uint32)
    return sums


MMA = "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f0, %f1, %f2, %f3}, %x0, %x1, %p0, 1, 1;"
COMMIT, DONE = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
FENCE = "wgmma.fence.sync.aligned;"


def multiplied(
    before: str = "", descriptor: str = f"0x{DESCRIPTOR:x}", issue: str = FENCE + MMA + COMMIT, after: str = DONE
) -> str:
    """One tile comes by TMA, one wgmma multiplies it, and each thread stores its four sums."""
    return f"""
  {init("%b", 1)}
  fence.mbarrier_init.release.cluster;
  bar.sync 0;
  @!%lead bra ISSUED;
  {expect("%b", BYTES)}
  {load("%s", "%b")}
ISSUED:
  {wait("%b", 0)}
  {before}
  shr.u32 %r0, %s, 4;
  and.b32 %r0, %r0, 0x3fff;
  cvt.u64.u32 %x0, %r0;
  or.b64 %x0, %x0, {descriptor};
  add.u64 %x1, %x0, {M * K >> 4};
  mov.f32 %f0, 0f00000000;
  mov.f32 %f1, %f0;
  mov.f32 %f2, %f0;
  mov.f32 %f3, %f0;
  setp.ne.u32 %p0, %t, %t;
  {issue}
  {after}
  shl.b32 %r1, %w, 4;
  shr.u32 %r2, %l, 2;
  add.u32 %r1, %r1, %r2;
  and.b32 %r2, %l, 3;
  shl.b32 %r2, %r2, 1;
  mad.lo.u32 %r1, %r1, {N}, %r2;
  mul.wide.u32 %x2, %r1, 4;
  add.u64 %x2, %d, %x2;
  st.global.v2.f32 [%x2], {{%f0, %f1}};
  st.global.v2.f32 [%x2+{8 * N * 4}], {{%f2, %f3}};
"""


def tensor_core(
    mistake: str, body: str, *words: str, swizzle: tuple[int, int] = (32, 32), box: tuple[int, int] = TILE
) -> Bug:
    return Bug(mistake, body, words, product, block=128, data=codes, box=(box, TILE), swizzle=swizzle)


# Each thread adds nothing to a word of the tile, as an epilogue in place would.
TOUCH = "ld.shared.u32 %v, [%si]; bar.sync 0; st.shared.u32 [%si], %v;"
SECOND = f"""
  @!%lead bra REFILLED;
  {expect("%b", BYTES)}
  {load("%s", "%b", y=TILE[0])}
REFILLED:
"""

BUGS = {
    "sums read before the wait": tensor_core(
        "The accumulators are stored while a group is still in flight: wait_group 1 for 0.",
        multiplied(after="wgmma.wait_group.sync.aligned <<1||0>>;") + DONE,
        WRONG_DATA,
        "in flight",
        "wgmma",
    ),
    "no commit": tensor_core(
        "wait_group without commit_group before: it has no group to wait for.",
        multiplied(issue=FENCE + MMA + f"<<||{COMMIT}>>"),
        WRONG_DATA,
        "in flight",
        "wgmma",
    ),
    "no wgmma.fence": tensor_core(
        "Accumulators zeroed by ordinary moves and no wgmma.fence before the first wgmma.",
        multiplied(issue=f"<<||{FENCE}>>" + MMA + COMMIT),
        "wgmma.fence",
    ),
    "sums changed in flight": tensor_core(
        "An accumulator is scaled between wgmma and the wait.",
        multiplied(issue=FENCE + MMA + COMMIT + "<<mul.f32 %f0, %f0, 0f3f800000;||>>"),
        WRONG_DATA,
        "in flight",
        "wgmma",
    ),
    "operands stored without a proxy fence": tensor_core(
        "An operand written by st.shared and read by wgmma without fence.proxy.async.",
        multiplied(before=TOUCH + f"<<||{SHARED_FENCE}>> bar.sync 0;"),
        "without a fence.proxy.async",
    ),
    "a stage refilled under wgmma": tensor_core(
        "The stage is freed when wgmma is issued, not when it is done (early empty-arrive).",
        multiplied(issue=FENCE + MMA + COMMIT + f"<<||{DONE} bar.sync 0;>>" + SECOND, after=DONE + wait("%b", 1)),
        "still being read",
        "still writes",
        "race",
        WRONG_DATA,
    ),
    "three warps of four": tensor_core(
        "A wgmma that one warp of the warpgroup skips.",
        multiplied(issue="setp.lt.u32 %p1, %w, <<3||4>>; @!%p1 bra LAST;" + FENCE + MMA + COMMIT, after=DONE) + "LAST:",
        "all four warps",
        "warpgroup",
    ),
    "swizzles that differ": tensor_core(
        "The tensor map does not swizzle, the matrix descriptor does.",
        multiplied(),
        WRONG_DATA,
        swizzle=(0, 32),
    ),
    "the wrong stride": tensor_core(
        "SBO of another swizzle: 512 bytes between groups of 8 rows where there are 256 (MatmulTutorial#10).",
        multiplied(descriptor=f"<<0x{DESCRIPTOR + (16 << 32):x}||0x{DESCRIPTOR:x}>>"),
        WRONG_DATA,
        "nobody has written",
    ),
    "LBO and SBO swapped": tensor_core(
        "The two byte offsets of the matrix descriptor in each other's place.",
        multiplied(descriptor=f"<<0x{3 << 62 | 1 << 32 | 16 << 16:x}||0x{DESCRIPTOR:x}>>"),
        "the stride byte offset",
    ),
    "a base offset": tensor_core(
        "A base offset in the descriptor although the tile begins where the pattern does.",
        multiplied(descriptor=f"<<0x{DESCRIPTOR | 1 << 49:x}||0x{DESCRIPTOR:x}>>"),
        "base offset",
    ),
    "descriptors that differ": tensor_core(
        "A descriptor that depends on the warp: a warpgroup has one.",
        multiplied(before="<<mad.lo.u32 %s, %w, 32, %s;||>>"),
        "different wgmma",
        "descriptor",
    ),
    "added to what was never zeroed": tensor_core(
        "scale-d is set for the first slice, and the accumulators hold what they held.",
        multiplied(issue="<<setp.eq.u32 %p0, %t, %t; mov.f32 %f3, %f9;||>>" + FENCE + MMA + COMMIT),
        "uninitialised",
    ),
}

A_FRAGMENT = """
  mov.u32 %r8, 0x38383838;
  mov.u32 %r9, %r8;
  mov.u32 %r10, %r8;
  mov.u32 %r11, %r8;
"""
REGISTER_MMA = MMA.replace("%x0", "{%r8, %r9, %r10, %r11}")
REGISTERS = ".maxntid 384, 1, 1\n.minnctapersm 1"


def ones_product(a: Array) -> Array:
    values = a.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    sums: Array = np.tile(values[M : M + N].sum(1), M).view(np.uint32)
    return sums


def set_registers(group: str, others: str) -> str:
    return f"""
  setp.lt.u32 %p0, %w, 4;
  @%p0 bra PRODUCER;
  {others}
  bra DONE;
PRODUCER:
  {group}
DONE:
  ld.global.u32 %v, [%ai];
  st.global.u32 [%di], %v;
"""


BUGS |= {
    "A registers changed in flight": Bug(
        "A register of the A fragment is reused before the wgmma that reads it is done.",
        multiplied(
            before=A_FRAGMENT,
            issue=FENCE + REGISTER_MMA + COMMIT + "<<mov.u32 %r8, 0;||>>",
            after=DONE + "mov.u32 %r8, 0;",
        ),
        (WRONG_DATA, "in flight", "wgmma"),
        ones_product,
        block=128,
        data=codes,
        box=(TILE, TILE),
        swizzle=(32, 32),
    ),
    "more registers than there are": Bug(
        "setmaxnreg beyond the 64 K registers: 40 x 128 + 248 x 256.",
        set_registers("setmaxnreg.dec.sync.aligned.u32 40;", "setmaxnreg.inc.sync.aligned.u32 <<248||232>>;"),
        ("registers", "setmaxnreg"),
        lambda a: a.reshape(-1)[:384],
        block=384,
        directives=REGISTERS,
    ),
    "registers never given back": Bug(
        "The consumers take registers that the producer does not give back: deadlock.",
        set_registers("<<||setmaxnreg.dec.sync.aligned.u32 40;>>", "setmaxnreg.inc.sync.aligned.u32 232;"),
        ("registers", "setmaxnreg"),
        lambda a: a.reshape(-1)[:384],
        block=384,
        directives=REGISTERS,
    ),
    "setmaxnreg by one warp": Bug(
        "setmaxnreg in the branch of the one warp that loads, not of its whole warpgroup.",
        set_registers(
            "setp.ne.u32 %p1, %w, 0; <<@%p1 bra DONE;||>> setmaxnreg.dec.sync.aligned.u32 40;",
            "setmaxnreg.inc.sync.aligned.u32 232;",
        ),
        ("registers", "setmaxnreg", "warpgroup"),
        lambda a: a.reshape(-1)[:384],
        block=384,
        directives=REGISTERS,
    ),
}
