"""Flags, scopes and fences between CTAs and devices."""

from __future__ import annotations

import numpy as np

from .program import WRONG_DATA, Array, Bug

DATA, FLAG = 256, 1024  # bytes into the output; whoever runs as %c = 1 copies DATA to its front once FLAG is set


def message(write: str, read: str) -> str:
    # The sender stays busy for a while: its end would make all it has stored visible.
    return f"""
  setp.ne.u32 %p0, %c, 0;
  @%p0 bra CONSUMER;
  ld.global.u32 %v, [%ai];
  mad.lo.u32 %r0, %t, 4, 0;
  cvt.u64.u32 %x0, %r0;
  add.u64 %x0, %d, %x0;
  {write}
  mov.u32 %r2, 300;
BUSY:
  sub.u32 %r2, %r2, 1;
  setp.ne.u32 %p1, %r2, 0;
  @%p1 bra BUSY;
  bra DONE;
CONSUMER:
  mad.lo.u32 %r0, %t, 4, 0;
  cvt.u64.u32 %x0, %r0;
  add.u64 %x0, %d, %x0;
  {read}
  ld.global.u32 %v, [%x0+{DATA}];
  st.global.u32 [%x0], %v;
DONE:
"""


def received(a: Array) -> Array:
    """The message at the front, where it was sent, and the flag."""
    out = np.full(FLAG // 4 + 1, 0, np.uint32)
    out[:32] = a.reshape(-1)[:32]
    out[DATA // 4 : DATA // 4 + 32] = a.reshape(-1)[:32]
    out[FLAG // 4] = 1
    return out


SEND = f"st.global.u32 [%x0+{DATA}], %v;"


def publish(store: str) -> str:
    return f"{SEND} bar.sync 0; @%lead {store}.u32 [%d+{FLAG}], 1;"


def poll(load: str) -> str:
    return f"POLL: {load}.u32 %r1, [%d+{FLAG}]; setp.eq.u32 %p1, %r1, 0; @%p1 bra POLL;"


ACQUIRE, RELEASE = "ld.acquire.gpu.global", "st.release.gpu.global"

BUGS = {
    "flag without a release": Bug(
        "A flag stored relaxed: the data may become visible after it.",
        message(publish("st.<<relaxed||release>>.gpu.global"), poll(ACQUIRE)),
        (WRONG_DATA,),
        received,
        block=32,
        grid=2,
    ),
    "flag without an acquire": Bug(
        "A flag polled relaxed: later loads may return what was there before.",
        message(publish(RELEASE), poll("ld.<<relaxed||acquire>>.gpu.global")),
        (WRONG_DATA,),
        received,
        block=32,
        grid=2,
    ),
    "flag polled by a plain load": Bug(
        "A flag polled by an ordinary load, neither volatile nor atomic.",
        message(publish(RELEASE), poll("<<ld.global||ld.acquire.gpu.global>>")),
        (WRONG_DATA,),
        received,
        block=32,
        grid=2,
    ),
    "relaxed poll without a fence": Bug(
        "while (volatile flag) without the __threadfence behind it.",
        message(publish(RELEASE), poll("ld.relaxed.gpu.global") + "<<||fence.acq_rel.gpu;>>"),
        (WRONG_DATA,),
        received,
        block=32,
        grid=2,
    ),
    "release at the scope of the CTA": Bug(
        "__threadfence_block where the reader is another CTA.",
        message(publish("st.release.<<cta||gpu>>.global"), poll(ACQUIRE)),
        (WRONG_DATA,),
        received,
        block=32,
        grid=2,
    ),
    "flag of one thread for the data of all": Bug(
        "No barrier between the stores of all threads and the flag that one of them releases.",
        message(
            f"{SEND} <<||bar.sync 0;>> @%lead {RELEASE}.u32 [%d+{FLAG}], 1;",
            poll(ACQUIRE),
        ),
        (WRONG_DATA,),
        received,
        block=32,
        grid=2,
    ),
    "gpu scope towards another device": Bug(
        "A release at .gpu scope for a reader at the other end of NVLink, which needs .sys.",
        message(publish("st.release.<<gpu||sys>>.global"), poll("ld.acquire.<<gpu||sys>>.global")),
        (WRONG_DATA, "hangs"),
        received,
        block=32,
        devices=2,
    ),
    "read-only loads of changing data": Bug(
        "__ldg of what the kernel itself writes.",
        "ld.global.u32 %v, [%ai]; st.global.u32 [%di], %v; ld.global<<.nc||>>.u32 %v, [%di]; st.global.u32 [%di], %v;",
        ("ld.global.nc",),
        lambda a: a.reshape(-1)[:64],
    ),
    "counter without an atomic": Bug(
        "CTAs add to a counter by load and store: updates get lost.",
        """
  @!%lead ret;
  <<ld.relaxed.gpu.global.u32 %r0, [%d]; add.u32 %r0, %r0, 1; st.relaxed.gpu.global.u32 [%d], %r0;
  ||red.relaxed.gpu.global.add.u32 [%d], 1;>>
""",
        (WRONG_DATA,),
        lambda a: np.array([16], np.uint32),
        grid=16,
    ),
    "locks in two orders": Bug(
        "Two CTAs take two locks in opposite orders: deadlock.",
        f"""
  @!%lead ret;
  mul.lo.u32 %r0, %c, <<4||0>>;
  cvt.u64.u32 %x0, %r0;
  add.u64 %x0, %d, %x0;
  xor.b32 %r0, %r0, 4;
  cvt.u64.u32 %x1, %r0;
  add.u64 %x1, %d, %x1;
FIRST:
  atom.acquire.gpu.global.cas.b32 %r1, [%x0+{DATA}], 0, 1;
  setp.ne.u32 %p0, %r1, 0;
  @%p0 bra FIRST;
SECOND:
  atom.acquire.gpu.global.cas.b32 %r1, [%x1+{DATA}], 0, 1;
  setp.ne.u32 %p0, %r1, 0;
  @%p0 bra SECOND;
  ld.global.u32 %r2, [%d];
  add.u32 %r2, %r2, 1;
  st.global.u32 [%d], %r2;
  st.release.gpu.global.u32 [%x1+{DATA}], 0;
  st.release.gpu.global.u32 [%x0+{DATA}], 0;
""",
        ("hangs",),
        lambda a: np.array([2], np.uint32),
        grid=2,
    ),
    "shared lock without fences": Bug(
        "A spin lock of relaxed atomics in shared memory, which orders nothing that it guards.",
        """
  @%lead st.shared.u32 [%s], 0;
  @%lead st.shared.u32 [%s+4], 0;
  bar.sync 0;
  setp.ne.u32 %p0, %l, 0;
  @%p0 bra DONE;
LOCK:
  atom.<<relaxed||acquire>>.cta.shared.cas.b32 %r0, [%s], 0, 1;
  setp.ne.u32 %p0, %r0, 0;
  @%p0 bra LOCK;
  ld.shared.u32 %r1, [%s+4];
  add.u32 %r1, %r1, 1;
  st.shared.u32 [%s+4], %r1;
  atom.<<relaxed||release>>.cta.shared.exch.b32 %r0, [%s], 0;
DONE:
  bar.sync 0;
  @!%lead ret;
  ld.shared.u32 %r1, [%s+4];
  st.global.u32 [%d], %r1;
""",
        ("race",),
        lambda a: np.array([4], np.uint32),
        block=128,
    ),
    "reading a histogram without a barrier": Bug(
        "Bins of shared memory read while other warps still add to them.",
        """
  st.shared.u32 [%si], 0;
  bar.sync 0;
  and.b32 %r0, %l, 7;
  mad.lo.u32 %r0, %r0, 4, %s;
  red.shared.add.u32 [%r0], 1;
  <<||bar.sync 0;>>
  ld.shared.u32 %v, [%r0];
  st.global.u32 [%di], %v;
""",
        ("race",),
        lambda a: np.full(64, 8, np.uint32),
    ),
}
