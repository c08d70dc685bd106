"""Counts, phases and lifetimes of mbarriers."""

from __future__ import annotations

import numpy as np

from .program import Bug, arrive, init, wait, words

NEIGHBOUR = np.arange(64) ^ 32
FENCE = "fence.mbarrier_init.release.cluster;"
READ = """
  xor.b32 %r0, %t, 32;
  mad.lo.u32 %r0, %r0, 4, %s;
  ld.shared.u32 %v, [%r0];
"""


def handover(
    count: int | str = 64, ready: str = "bar.sync 0;", arriving: str = arrive("%b"), waiting: str = wait("%b", 0)
) -> str:
    """Each thread hands its word to the one in the other warp, over one phase of an mbarrier."""
    return f"""
  @%lead mbarrier.init.shared::cta.b64 [%b], {count};
  {FENCE}
  {ready}
  ld.global.u32 %v, [%ai];
  st.shared.u32 [%si], %v;
  {arriving}
  {waiting}
  {READ}
  st.global.u32 [%di], %v;
"""


# Warp 0 fills a ring of one stage twice, warp 1 empties it. {start} is the producer's first parity.
RING = f"""
  {init("%b", 32)}
  {init("%b+8", 32)}
  {FENCE}
  bar.sync 0;
  mov.u32 %r1, 0;
  mad.lo.u32 %r2, %l, 4, %s;
  mul.wide.u32 %x0, %l, 4;
  add.u64 %ai, %a, %x0;
  add.u64 %di, %d, %x0;
  setp.ne.u32 %p0, %w, 0;
TURN:
  @%p0 bra CONSUME;
  PRODUCER
  {wait("%b+8", "%r4")}
  ld.global.u32 %v, [%ai];
  st.shared.u32 [%r2], %v;
  {arrive("%b")}
  bra NEXT;
CONSUME:
  CONSUMER
  {wait("%b", "%r4")}
  ld.shared.u32 %v, [%r2];
  st.global.u32 [%di], %v;
  {arrive("%b+8")}
NEXT:
  add.u64 %ai, %ai, 128;
  add.u64 %di, %di, 128;
  add.u32 %r1, %r1, 1;
  setp.lt.u32 %p1, %r1, 3;
  @%p1 bra TURN;
"""


def ring(producer: str = "xor.b32 %r4, %r1, 1;", consumer: str = "mov.b32 %r4, %r1;") -> str:
    return RING.replace("PRODUCER", producer + "and.b32 %r4, %r4, 1;").replace(
        "CONSUMER", consumer + "and.b32 %r4, %r4, 1;"
    )


TRY = "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%b], 0;"

BUGS = {
    "use before the initialisation": Bug(
        "No __syncthreads between mbarrier.init by one thread and its use by others (NVIDIA/Fuser#1552).",
        handover(ready="<<||bar.sync 0;>>"),
        ("no initialised mbarrier", "race"),
        words(lambda a: a[NEIGHBOUR]),
    ),
    "never initialised": Bug(
        "Fewer barriers initialised than there are stages (NVIDIA/Fuser#5862).",
        init("<<%b+8||%b+16>>", 64) + handover().replace("[%b]", "[%b+16]").replace(init("%b+16", 64), ""),
        ("no initialised mbarrier",),
        words(lambda a: a[NEIGHBOUR]),
    ),
    "fewer arrivals than expected": Bug(
        "Initialised for every thread, but only one lane of each warp arrives.",
        handover(
            "<<64||2>>", arriving=f"bar.warp.sync -1; setp.eq.u32 %p0, %l, 0; @%p0 {arrive('%b')} bar.warp.sync -1;"
        ),
        ("mbarrier at shared offset",),
        words(lambda a: a[NEIGHBOUR]),
    ),
    "more arrivals than expected": Bug(
        "Initialised for fewer arrivals than there are, so that the phase ends before all have written.",
        handover("<<33||64>>"),
        ("race",),
        words(lambda a: a[NEIGHBOUR]),
    ),
    "one arrival counts for too many": Bug(
        "An arrival for a whole warp by each of its lanes.",
        handover(32, arriving="mbarrier.arrive.shared::cta.b64 _, [%b]<<, 32||>>;").replace(
            "@%lead mbarrier.init.shared::cta.b64 [%b], 32;", "@%lead mbarrier.init.shared::cta.b64 [%b], <<63||64>>;"
        ),
        ("more arrivals",),
        words(lambda a: a[NEIGHBOUR]),
    ),
    "the wrong parity": Bug(
        "A consumer that begins with parity 1, which a fresh barrier lets pass at once.",
        handover(waiting=wait("%b", "<<1||0>>")),
        ("race", "uninitialised"),
        words(lambda a: a[NEIGHBOUR]),
    ),
    "the producer's first parity": Bug(
        "A producer that begins with parity 0 waits for a stage that nobody has ever filled.",
        ring(producer="xor.b32 %r4, %r1, <<0||1>>;"),
        ("mbarrier at shared offset",),
        words(lambda a: a[:96]),
    ),
    "parity not flipped": Bug(
        "The consumer does not flip its parity when the ring wraps.",
        ring(consumer="mov.b32 %r4, <<0||%r1>>;"),
        ("race", "hangs"),
        words(lambda a: a[:96]),
    ),
    "a stage that is never freed": Bug(
        "The consumer forgets its arrival at the empty barrier in all turns but the first.",
        ring().replace(arrive("%b+8"), "setp.eq.u32 %p2, %r1, 0; <<@%p2||>> " + arrive("%b+8")),
        ("mbarrier at shared offset",),
        words(lambda a: a[:96]),
    ),
    "a stage that is freed early": Bug(
        "The consumer arrives at the empty barrier before it has read the stage.",
        ring()
        .replace("ld.shared.u32 %v, [%r2];", f"<<{arrive('%b+8')}||>> ld.shared.u32 %v, [%r2];")
        .replace("%v;\n  " + arrive("%b+8") + "\nNEXT", "%v;\n  <<||" + arrive("%b+8") + ">>\nNEXT"),
        ("race",),
        words(lambda a: a[:96]),
    ),
    "try_wait without a loop": Bug(
        "mbarrier.try_wait taken to block until the phase is over (FlashGPU-Sim#16).",
        handover(waiting=f"AGAIN: {TRY} <<||@!%p1 bra AGAIN;>>"),
        ("race", "uninitialised"),
        words(lambda a: a[NEIGHBOUR]),
    ),
    "one lane waits for all": Bug(
        "Lane 0 waits at the mbarrier and no __syncwarp tells the other lanes.",
        handover(waiting="setp.ne.u32 %p0, %l, 0; @%p0 bra ON;" + wait("%b", 0) + "ON: <<||bar.warp.sync -1;>>"),
        ("race", "uninitialised"),
        words(lambda a: a[NEIGHBOUR]),
    ),
    "one lane arrives for all": Bug(
        "Lane 0 arrives for its warp, and no __syncwarp puts the stores of the other lanes before that.",
        handover(2, arriving="<<||bar.warp.sync -1;>> setp.eq.u32 %p0, %l, 0; @%p0 " + arrive("%b")),
        ("race",),
        words(lambda a: a[NEIGHBOUR]),
    ),
    "initialised twice": Bug(
        "mbarrier.init over a barrier that is alive, where a kernel begins its next tile.",
        handover() + f"bar.sync 0; <<||@%lead mbarrier.inval.shared::cta.b64 [%b]; bar.sync 0;>> {init('%b', 64)}",
        ("in use",),
        words(lambda a: a[NEIGHBOUR]),
    ),
    "used after its end": Bug(
        "mbarrier.inval before the last thread has used the barrier.",
        handover(waiting=wait("%b", 0) + "bar.sync 0; <<@%lead mbarrier.inval.shared::cta.b64 [%b]; bar.sync 0;||>>"
                 + wait("%b", 0)),
        ("no initialised mbarrier",),
        words(lambda a: a[NEIGHBOUR]),
    ),
}  # fmt: skip
