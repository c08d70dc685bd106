"""Barriers of the CTA and of the warp, bounds, alignment, and what was never written."""

from __future__ import annotations

import numpy as np

from .program import WRONG_DATA, Array, Bug, words


def swapped(by: int, count: int = 64) -> Array:
    return np.arange(count) ^ by


# Each thread stores its word and reads that of the thread `by` away; `fence` is what stands between.
def exchange(by: int, between: str) -> str:
    return f"""
  ld.global.u32 %v, [%ai];
  st.shared.u32 [%si], %v;
  {between}
  xor.b32 %r0, %t, {by};
  mad.lo.u32 %r0, %r0, 4, %s;
  ld.shared.u32 %v, [%r0];
  st.global.u32 [%di], %v;
"""


# One warp of each pair takes its barrier and count from %r0 and %r1.
PAIR = """
  ld.global.u32 %v, [%ai];
  st.shared.u32 [%si], %v;
  bar.sync %r0, %r1;
  xor.b32 %r2, %t, 32;
  mad.lo.u32 %r2, %r2, 4, %s;
  ld.shared.u32 %v, [%r2];
  st.global.u32 [%di], %v;
"""

BUGS = {
    "no barrier between warps": Bug(
        "__syncthreads forgotten between writing and reading shared memory.",
        exchange(32, "<<||bar.sync 0;>>"),
        ("race", "uninitialised"),
        words(lambda a: a[swapped(32)]),
    ),
    "no barrier within a warp": Bug(
        "__syncwarp forgotten: lanes of a warp are taken to run in lockstep.",
        exchange(1, "<<||bar.warp.sync -1;>>"),
        ("race",),
        words(lambda a: a[swapped(1)]),
    ),
    "a warp's barrier for the CTA": Bug(
        "__syncwarp where the data comes from another warp.",
        exchange(32, "<<bar.warp.sync -1;||bar.sync 0;>>"),
        ("race", "uninitialised"),
        words(lambda a: a[swapped(32)]),
    ),
    "a fence in place of a barrier": Bug(
        "__threadfence_block orders memory but waits for nobody.",
        exchange(32, "<<membar.cta;||bar.sync 0;>>"),
        ("race", "uninitialised", WRONG_DATA),
        words(lambda a: a[swapped(32)]),
    ),
    "shared memory used again too early": Bug(
        "The second barrier of a loop forgotten: the next round overwrites what slower warps still read.",
        exchange(32, "bar.sync 0;") + "<<||bar.sync 0;>>" + "add.u64 %di, %di, 256;" + exchange(33, "bar.sync 0;"),
        ("race",),
        words(lambda a: np.concatenate([a[swapped(32)], a[swapped(33)]])),
    ),
    "one buffer of two": Bug(
        "Double buffering whose index does not alternate, so that one barrier a round is too few.",
        exchange(32, "bar.sync 0;")
        + "add.u32 %s, %s, <<0||256>>; add.u32 %si, %si, <<0||256>>; add.u64 %di, %di, 256;"
        + exchange(33, "bar.sync 0;"),
        ("race",),
        words(lambda a: np.concatenate([a[swapped(32)], a[swapped(33)]])),
    ),
    "lanes overwrite each other": Bug(
        "All lanes store their own value to one address, which of them wins being undefined.",
        """
  ld.global.u32 %v, [%ai];
  setp.eq.u32 %p0, %l, 0;
  mad.lo.u32 %r0, %w, 4, %s;
  <<||@%p0>> st.shared.u32 [%r0], %v;
  bar.warp.sync -1;
  ld.shared.u32 %v, [%r0];
  st.global.u32 [%di], %v;
""",
        ("race",),
        words(lambda a: a[np.arange(64) // 32 * 32]),
    ),
    "a reduction without its last barrier": Bug(
        "A tree over shared memory that drops __syncthreads once one warp is left, and __syncwarp with it.",
        """
  ld.global.u32 %v, [%ai];
  st.shared.u32 [%si], %v;
  bar.sync 0;
  setp.ge.u32 %p0, %t, 2;
  @%p0 bra DONE;
  ld.shared.u32 %r0, [%si];
  ld.shared.u32 %r1, [%si+8];
  add.u32 %r0, %r0, %r1;
  st.shared.u32 [%si], %r0;
  <<||bar.warp.sync 3;>>
  @!%lead bra DONE;
  ld.shared.u32 %r0, [%si];
  ld.shared.u32 %r1, [%si+4];
  add.u32 %r0, %r0, %r1;
  st.global.u32 [%di], %r0;
DONE:
""",
        ("race",),
        words(lambda a: a[:4].sum(dtype=np.uint32, keepdims=True)),
    ),
    "barrier under a guard": Bug(
        "__syncthreads in a condition that is not the same in all threads of the warp.",
        exchange(32, "setp.lt.u32 %p0, %l, 16; <<@%p0||>> bar.sync 0;"),
        ("guard", "divergent"),
        words(lambda a: a[swapped(32)]),
    ),
    "diverged barriers": Bug(
        "Two branches of one warp wait at different barriers for each other.",
        """
  ld.global.u32 %v, [%ai];
  setp.lt.u32 %p0, %l, 16;
  @%p0 bra LOW;
  bar.sync <<1||0>>;
  bra DONE;
LOW:
  bar.sync 0;
DONE:
  st.global.u32 [%di], %v;
""".replace("@%p0 bra LOW;", "<<@%p0 bra LOW;||>>"),
        ("waits for the lanes", "divergent"),
        words(lambda a: a[:64]),
    ),
    "barrier counts too many": Bug(
        "bar.sync with the threads of the block where only some come: deadlock.",
        "mov.u32 %r0, 1; mov.u32 %r1, <<128||64>>;" + PAIR,
        ("waits for 128 threads",),
        words(lambda a: a[swapped(32)]),
    ),
    "warps disagree on a count": Bug(
        "Producer and consumer give one barrier different counts.",
        "mov.u32 %r0, 1; mov.u32 %r1, 64; setp.eq.u32 %p0, %w, 1; @%p0 mov.u32 %r1, <<96||64>>;" + PAIR,
        ("disagree", "waits for 96 threads"),
        words(lambda a: a[swapped(32)]),
    ),
    "named barriers collide": Bug(
        "Two pairs of warps use one barrier id, as raw ids beside CUTLASS's, which start at 8.",
        "setp.gt.u32 %p0, %w, 1; mov.u32 %r0, 1; @%p0 mov.u32 %r0, <<1||2>>; mov.u32 %r1, 64;" + PAIR,
        ("race", "uninitialised"),
        words(lambda a: a[swapped(32, 128)]),
        block=128,
    ),
    "register never set": Bug(
        "A sum that starts from a register nobody has set.",
        """
  <<||mov.u32 %r0, 0;>>
  ld.global.u32 %v, [%ai];
  add.u32 %r0, %r0, %v;
  st.global.u32 [%di], %r0;
""",
        ("uninitialised",),
        words(lambda a: a[:64]),
    ),
    "shared memory never set": Bug(
        "The last element of a shared array is not filled.",
        """
  ld.global.u32 %v, [%ai];
  setp.lt.u32 %p0, %t, <<63||64>>;
  @%p0 st.shared.u32 [%si], %v;
  bar.sync 0;
  ld.shared.u32 %v, [%si];
  st.global.u32 [%di], %v;
""",
        ("uninitialised",),
        words(lambda a: a[:64]),
    ),
    "load past the end": Bug(
        "An index that is one too large.",
        "ld.global.u32 %v, [%a+<<8192||8188>>]; st.global.u32 [%di], %v;",
        ("out of bounds",),
        words(lambda a: np.repeat(a[-1:], 64)),
    ),
    "store past the end": Bug(
        "A tail without its bound: the last thread stores behind the tensor.",
        """
  ld.global.u32 %v, [%ai];
  setp.lt.u32 %p0, %i, 2047;
  <<||@%p0>> st.global.u32 [%di+4], %v;
  setp.eq.u32 %p0, %i, 0;
  @%p0 st.global.u32 [%di], %v;
""",
        ("out of bounds",),
        words(lambda a: np.concatenate([a[:1], a[:-1]])),
        block=512,
        grid=4,
    ),
    "shared array too small": Bug(
        "A shared array one element shorter than its loop.",
        """
  ld.global.u32 %v, [%ai];
  st.shared.u32 [%si+<<8096||7936>>], %v;
  ld.shared.u32 %v, [%si+<<8096||7936>>];
  st.global.u32 [%di], %v;
""",
        ("out of bounds",),
        words(lambda a: a[:64]),
    ),
    "vector load of a misaligned address": Bug(
        "A pointer to float read as float4 at an offset that is no multiple of 16.",
        """
  @!%lead ret;
  ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%a+<<4||16>>];
  st.global.v4.u32 [%d], {%r0, %r1, %r2, %r3};
""",
        ("misaligned",),
        words(lambda a: a[4:8]),
    ),
    "shuffle from an absent lane": Bug(
        "A shuffle in one branch from a lane that took the other.",
        """
  ld.global.u32 %v, [%ai];
  setp.lt.u32 %p0, %l, 16;
  <<@!%p0 bra OTHER;||>>
  shfl.sync.idx.b32 %r0, %v, 20, 31, <<0xffff||0xffffffff>>;
  @%p0 mov.b32 %v, %r0;
OTHER:
  bar.warp.sync -1;
  st.global.u32 [%di], %v;
""",
        (WRONG_DATA, "lane"),
        words(lambda a: np.where(np.arange(64) % 32 < 16, a[np.arange(64) // 32 * 32 + 20], a[:64])),
    ),
}
