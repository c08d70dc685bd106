"""TMA: transaction counts, stages, proxies, groups, and the maps."""

from __future__ import annotations

import numpy as np

from .program import WRONG_DATA, Array, Bug, arrive, expect, init, load, store, wait, words

BOX = ((2, 32), (2, 32))  # 256 bytes: a word for each of 64 threads
SHARED_FENCE = "fence.proxy.async.shared::cta;"


def loaded(issue: str, before: str = "", after: str = wait("%b", 0), shared: str = "%si") -> str:
    """Thread 0 loads a box, and each thread stores its word of it."""
    return f"""
  {init("%b", 1)}
  fence.mbarrier_init.release.cluster;
  bar.sync 0;
  {before}
  @!%lead bra ISSUED;
  {issue}
ISSUED:
  {after}
  ld.shared.u32 %v, [{shared}];
  st.global.u32 [%di], %v;
"""


def stored(before: str, issue: str, after: str) -> str:
    """Each thread puts its word in shared memory, from where thread 0 stores the box."""
    return f"""
  ld.global.u32 %v, [%ai];
  st.shared.u32 [%si], %v;
  {before}
  @!%lead bra DONE;
  {issue}
  {after}
DONE:
"""


STORE = store("%s")
READ, WRITTEN = "cp.async.bulk.wait_group.read 0;", "cp.async.bulk.wait_group 0;"
HEAD = words(lambda a: a[:64])


def two_rounds(free: str, waiting: str) -> str:
    """A stage of two boxes in turn; `free` is what consumers do when they have read, `waiting` the producer."""
    return (
        loaded(expect("%b", 256) + load("%s", "%b"), before=f"{init('%b+8', 2)} bar.sync 0;")
        + f"""
  setp.eq.u32 %p0, %l, 0;
  {free}
  @!%lead bra AGAIN;
  {waiting}
  {expect("%b", 256)}
  {load("%s", "%b", y=2)}
AGAIN:
  {wait("%b", 1)}
  ld.shared.u32 %v, [%si];
  st.global.u32 [%di+256], %v;
"""
    )


FREE = f"bar.warp.sync -1; @%p0 {arrive('%b+8')}"


COPIES, FLAG = 28, 8064  # boxes stored one after the other, and the byte behind them that says so


def received(a: Array) -> Array:
    """The box at the front, where it was stored, and the flag."""
    out = np.zeros(FLAG // 4 + 1, np.uint32)
    out[: 64 * (COPIES + 1)] = np.tile(a.reshape(-1)[:64], COPIES + 1)
    out[FLAG // 4] = 1
    return out


BUGS = {
    "no bytes expected": Bug(
        "A plain arrive where arrive.expect_tx belongs: the phase ends before the data has come.",
        loaded(f"<<{arrive('%b')}||{expect('%b', 256)}>>" + load("%s", "%b")),
        ("race", "still writes", "transaction", "bytes", "uninitialised", "in flight"),
        HEAD,
        box=BOX,
    ),
    "too many bytes expected": Bug(
        "The bytes of a box one row larger than the map's: the phase never ends.",
        loaded(expect("%b", "<<384||256>>") + load("%s", "%b")),
        ("128 bytes to come",),
        HEAD,
        box=BOX,
    ),
    "too few bytes expected": Bug(
        "The bytes of one operand where two are loaded: the phase can end early.",
        loaded(
            expect("%b", "<<1024||2048>>") + load("%s", "%b") + load("%r3", "%b", y=8),
            before="add.u32 %r3, %s, 1024;",
            shared="%si+1024",
        ),
        ("race", "still writes", "transaction", "uninitialised", "in flight"),
        words(lambda a: a[256:320]),
        box=((8, 32), (8, 32)),
    ),
    "a box one row too high": Bug(
        "The map's box and the kernel's idea of it differ by a row.",
        loaded(expect("%b", 256) + load("%s", "%b")),
        ("hangs", "race", "still writes", "in flight", "bytes"),
        HEAD,
        box=((3, 32), (2, 32)),
    ),
    "arrive before expect": Bug(
        "The last arrival comes before expect_tx, so that the phase can end without the bytes (flashinfer#4589).",
        loaded(
            f"<<{arrive('%b')}||>> mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%b], 256; {load('%s', '%b')}"
            f" <<||{arrive('%b')}>>"
        ),
        ("race", "still writes", "expect", "hangs", "in flight"),
        HEAD,
        box=BOX,
    ),
    "read before the wait": Bug(
        "The box is read without waiting for its mbarrier.",
        loaded(expect("%b", 256) + load("%s", "%b"), after=f"<<||{wait('%b', 0)}>>")
        + wait("%b", 0),
        ("race", "still writes", "uninitialised"),
        HEAD,
        box=BOX,
    ),
    "only the issuer waits": Bug(
        "The thread that issued the copy waits for it, the others do not.",
        loaded(expect("%b", 256) + load("%s", "%b") + wait("%b", 0), after="<<||bar.sync 0;>>"),
        ("race", "still writes", "uninitialised"),
        HEAD,
        box=BOX,
    ),
    "a stage refilled early": Bug(
        "The producer loads the next box without waiting for the empty barrier.",
        two_rounds(FREE, f"<<||{wait('%b+8', 0)}>>"),
        ("race", "still writes", "hangs"),
        words(lambda a: a[:128]),
        box=BOX,
    ),
    "a stage freed by one lane": Bug(
        "Lane 0 frees the stage for its warp without __syncwarp: other lanes may still read it.",
        two_rounds(FREE.replace("bar.warp.sync -1;", "<<||bar.warp.sync -1;>>"), wait("%b+8", 0)),
        ("race", "still writes"),
        words(lambda a: a[:128]),
        box=BOX,
    ),
    "shared memory for a copy misaligned": Bug(
        "A tensor copy's shared address that is a multiple of 64, not of 128.",
        loaded(expect("%b", 256) + load("%r0", "%b"), before="add.u32 %r0, %s, <<64||128>>;", shared="%si+128"),
        ("128",),
        HEAD,
        box=BOX,
    ),
    "swizzle pattern misaligned": Bug(
        "Shared memory aligned to 128 bytes where the swizzle's pattern of 1024 is taken to begin (NVIDIA/Fuser#4096).",
        loaded(
            expect("%b", 256) + load("%r0", "%b"), before="add.u32 %r0, %s, <<128||1024>>;", shared="%r1"
        ).replace("ld.shared", """shr.u32 %r1, %t, 5;
  shl.b32 %r1, %r1, 4;
  shl.b32 %r2, %t, 2;
  xor.b32 %r1, %r1, %r2;
  add.u32 %r1, %r1, %s;
  add.u32 %r1, %r1, 1024;
  ld.shared"""),
        ("swizzle",),
        HEAD,
        box=BOX,
        swizzle=(128, 128),
    ),
    "a swizzle forgotten": Bug(
        "The map swizzles, and the kernel reads rows as they were.",
        loaded(expect("%b", 256) + load("%s", "%b")),
        (WRONG_DATA,),
        HEAD,
        box=BOX,
        swizzle=(128, 0),
    ),
    "a box beyond shared memory": Bug(
        "The last stage of a ring lies behind the allocation.",
        loaded(expect("%b", 256) + load("%r0", "%b"), before="add.u32 %r0, %s, <<8192||7936>>;", shared="%si+7936"),
        ("out of bounds",),
        HEAD,
        box=BOX,
    ),
    "tensor map misaligned": Bug(
        "A CUtensorMap inside a structure, at a multiple of 16 bytes (cutlass#2905).",
        loaded(expect("%b", 256) + load("%s", "%b"), before="add.u64 %in, %in, <<16||0>>;"),
        ("64",),
        HEAD,
        box=BOX,
    ),
    "no proxy fence before a store": Bug(
        "Shared memory written by ordinary stores and read by TMA without fence.proxy.async.",
        stored(f"<<||{SHARED_FENCE}>> bar.sync 0;", STORE, READ),
        ("without a fence.proxy.async",),
        HEAD,
        box=BOX,
    ),
    "a proxy fence by one writer": Bug(
        "fence.proxy.async by one warp of those that have written.",
        stored(f"setp.eq.u32 %p0, %w, 0; <<@%p0||>> {SHARED_FENCE} bar.sync 0;", STORE, READ),
        ("without a fence.proxy.async",),
        HEAD,
        box=BOX,
    ),
    "a proxy fence behind the barrier": Bug(
        "fence.proxy.async by the storing thread after the barrier: it covers none of the other writers.",
        stored(f"<<||{SHARED_FENCE}>> bar.sync 0;", f"<<{SHARED_FENCE}||>>" + STORE, READ),
        ("without a fence.proxy.async",),
        HEAD,
        box=BOX,
    ),
    "no barrier before a store": Bug(
        "Every writer fences, but nobody waits for them before the copy is issued.",
        stored(f"{SHARED_FENCE} <<||bar.sync 0;>>", STORE, READ),
        ("race", "without a fence.proxy.async", "nobody has written", "still being read"),
        HEAD,
        box=BOX,
    ),
    "staging used again too early": Bug(
        "The staging buffer overwritten before wait_group.read.",
        stored(f"{SHARED_FENCE} bar.sync 0;", STORE + f"<<||{READ}>>", "st.shared.u32 [%si], %v;" + READ),
        ("still being read", "race"),
        HEAD,
        box=BOX,
    ),
    "exit while a copy reads": Bug(
        "The kernel ends without waiting for its last bulk store.",
        stored(f"{SHARED_FENCE} bar.sync 0;", STORE, f"<<||{READ}>>"),
        ("exits",),
        HEAD,
        box=BOX,
    ),
    "copies never committed": Bug(
        "cp.async.bulk.commit_group forgotten: the wait waits for nothing.",
        stored(
            f"{SHARED_FENCE} bar.sync 0;",
            STORE.replace("cp.async.bulk.commit_group;", "<<||cp.async.bulk.commit_group;>>"),
            READ,
        ),
        ("never committed",),
        HEAD,
        box=BOX,
    ),
    "published when only read": Bug(
        "A flag after wait_group.read: the source may be reused, but the data has not arrived.",
        """
  setp.ne.u32 %p0, %c, 0;
  mul.wide.u32 %x0, %t, 4;
  add.u64 %x0, %d, %x0;
  @%p0 bra CONSUMER;
"""
        + stored(
            f"{SHARED_FENCE} bar.sync 0;",
            "".join(store("%s", y=2 + 2 * i) for i in range(COPIES)),
            f"cp.async.bulk.wait_group<<.read||>> 0; st.release.gpu.global.u32 [%d+{FLAG}], 1;" + READ,
        ).replace("DONE", "SENT")
        + f"""
  bra DONE;
CONSUMER:
POLL:
  ld.acquire.gpu.global.u32 %r1, [%d+{FLAG}];
  setp.eq.u32 %p1, %r1, 0;
  @%p1 bra POLL;
  ld.global.u32 %v, [%x0+256];
  st.global.u32 [%x0], %v;
DONE:
""",
        (WRONG_DATA,),
        received,
        grid=2,
        box=BOX,
    ),
    "a load of what was just stored": Bug(
        "Global memory written by ordinary stores and loaded by TMA in one kernel, without fence.proxy.async.",
        "ld.global.u32 %v, [%ai]; st.global.u32 [%di], %v; <<||fence.proxy.async.global;>>"
        + loaded(expect("%b", 256) + load("%s", "%b").replace("%in", "%out")).replace("[%di]", "[%di+256]"),
        ("fence.proxy.async",),
        words(lambda a: np.concatenate([a[:64], a[:64]])),
        box=BOX,
    ),
    "a store at a negative coordinate": Bug(
        "A halo that stores to rows above the tensor: loads may start there, stores may not.",
        stored(f"{SHARED_FENCE} bar.sync 0;", store("%s", y=-1).replace("-1", "<<-1||0>>"), READ),
        ("negative",),
        HEAD,
        box=BOX,
    ),
}  # fmt: skip
