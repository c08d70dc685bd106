"""Copies of plain ranges on the emulator: cp.async.bulk, cp.reduce.async.bulk and cp.async."""

from __future__ import annotations

import random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from copy_kernels import cluster_sync, dump, expect, fetch, init, kernel, peer, run, wait
from emulator import EmulationError

Array = np.ndarray[Any, Any]
COMMIT = "@%p0 cp.async.bulk.commit_group;\n"
BULK_LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


def some_bytes(count: int, seed: int) -> Any:
    return np.frombuffer(random.Random(seed).randbytes(count), np.uint8).copy()


@pytest.mark.parametrize("space", ["shared::cluster", "shared::cta"])
@pytest.mark.parametrize("nbytes", [16, 272, 4096])
def test_bulk_load(nbytes: int, space: str) -> None:
    x, out = some_bytes(nbytes + 32, nbytes), np.zeros(nbytes, np.uint8)
    text = kernel(
        f"{init()}@%p0 cp.async.bulk.{space}.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        f"[%r1+48], [%rd0+16], {nbytes}, [%r2], %rd0;\n"
        # The bytes may be expected after the copy, as long as the phase is open.
        f"{expect(nbytes)}{wait()}add.u32 %r1, %r1, 48;\n{dump(nbytes, '%rd1')}",
        ["ptr", "ptr"],
    )
    assert run(text, [x, out], seed=nbytes).tma_bytes == nbytes
    np.testing.assert_array_equal(out, x[16 : 16 + nbytes])


def test_bulk_multicast() -> None:
    """CTA 1 loads for CTAs 0, 1 and 3; to CTA 2 nothing comes."""
    x, out, flags = some_bytes(512, 1), np.zeros((4, 512), np.uint8), np.zeros(8, np.uint32)
    text = kernel(
        f"mov.u32 %r10, %cluster_ctarank; setp.eq.u32 %p1, %r10, 1; and.pred %p1, %p1, %p0; mov.u16 %h1, 0xB;\n{init()}"
        f"setp.eq.u32 %p2, %r10, 2;\n@%p2 bra SKIP;\n{expect(512)}SKIP:\n{cluster_sync(4, '%rd2', 'A')}"
        f"@%p1 {BULK_LOAD}.multicast::cluster [%r1], [%rd0], 512, [%r2], %h1;\n"
        f"@%p2 bra OUT;\n{wait()}mul.wide.u32 %rd10, %r10, 512; add.u64 %rd10, %rd1, %rd10;\n"
        f"{dump(512, '%rd10')}OUT: {cluster_sync(4, '%rd2', 'B')}",
        ["ptr", "ptr", "ptr"],
    )
    for seed in range(4):
        flags[:] = 0
        run(text, [x, out, flags], seed=seed, grid=4, cluster=(4, 1, 1))
        for rank in range(4):
            np.testing.assert_array_equal(out[rank], 0 * x if rank == 2 else x)


def send_text(operation: str, end: str) -> str:
    """Each of two CTAs sends 1 KB of its own to the other, behind what lies there for it."""
    return kernel(
        f"mov.u32 %r10, %cluster_ctarank; xor.b32 %r11, %r10, 1; mov.u32 %r20, %r1; mov.u32 %r21, buf;\n{init()}"
        f"mul.wide.u32 %rd10, %r10, 1024; add.u64 %rd11, %rd0, %rd10; add.u64 %rd12, %rd1, %rd10;\n"
        f"{fetch(1024, '%rd11', 'OWN')}add.u32 %r1, %r1, 1024;\n{fetch(1024, '%rd12', 'TARGET')}"
        f"{expect(1024)}{cluster_sync(2, '%rd2', 'A')}"
        f"{peer('%r12', '%r1', '%r11')}{peer('%r13', '%r2', '%r11')}"
        f"@%p0 {operation} [%r12], [%r20], 1024, [%r13];\n{end}{wait()}{dump(1024, '%rd12')}"
        f"{cluster_sync(2, '%rd2', 'B')}",
        ["ptr", "ptr", "ptr"],
    )


SEND = "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"


@pytest.mark.parametrize("seed", range(4))
def test_send(seed: int) -> None:
    own, there = some_bytes(2048, seed).reshape(2, 1024), some_bytes(2048, seed + 100)
    run(send_text(SEND, ""), [own, there, np.zeros(4, np.uint32)], seed=seed, grid=2, cluster=(2, 1, 1))
    np.testing.assert_array_equal(there.reshape(2, 1024), own[::-1])


def test_a_sender_stays_until_its_peer_has_the_data() -> None:
    text = send_text(SEND, "setp.eq.u32 %p1, %r10, 0;\n@%p1 ret;\n")
    text = text.replace(f"@%p0 {SEND}", f"setp.eq.u32 %p1, %r10, 0; and.pred %p1, %p1, %p0;\n@%p1 {SEND}")
    for seed in range(4):
        args = [np.zeros(2048, np.uint8), np.zeros(2048, np.uint8), np.zeros(4, np.uint32)]
        with pytest.raises(EmulationError, match="the CTA exits while copies from its shared memory"):
            run(text, args, seed=seed, grid=2, cluster=(2, 1, 1))


SHARED_REDUCTIONS: dict[str, tuple[Any, Any]] = {
    "add.u32": (np.uint32, lambda a, b: a + b),
    "add.s32": (np.int32, lambda a, b: a + b),
    "add.u64": (np.uint64, lambda a, b: a + b),
    "min.u32": (np.uint32, np.minimum),
    "max.s32": (np.int32, np.maximum),
    "inc.u32": (np.uint32, lambda a, b: np.where(a >= b, 0, a + 1).astype(np.uint32)),
    "dec.u32": (np.uint32, lambda a, b: np.where((a == 0) | (a > b), b, a - 1).astype(np.uint32)),
    "and.b32": (np.uint32, np.bitwise_and),
    "or.b32": (np.uint32, np.bitwise_or),
    "xor.b32": (np.uint32, np.bitwise_xor),
}


@pytest.mark.parametrize("name", SHARED_REDUCTIONS)
def test_reduce_into_shared_memory(name: str) -> None:
    dtype, f = SHARED_REDUCTIONS[name]
    own, there = some_bytes(2048, 5).reshape(2, 1024), some_bytes(2048, 6).reshape(2, 1024)
    expected = f(there.view(dtype), own[::-1].copy().view(dtype)).view(np.uint8)
    text = send_text(f"cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{name}", "")
    run(text, [own, there, np.zeros(4, np.uint32)], grid=2, cluster=(2, 1, 1))
    np.testing.assert_array_equal(there, expected)


def store_text(operation: str, nbytes: int = 512, size: str = "512") -> str:
    return kernel(
        f"{fetch(nbytes, '%rd0')}@%p0 {operation} [%rd1], [%r1], {size};\n{COMMIT}@%p0 cp.async.bulk.wait_group 0;\n",
        ["ptr", "ptr"],
    )


BULK_STORE = "cp.async.bulk.global.shared::cta.bulk_group"


def test_bulk_store() -> None:
    x, out = some_bytes(512, 3), np.zeros(1024, np.uint8)
    assert run(store_text(BULK_STORE), [x, out[256:768]], memory=[out]).tma_bytes == 512
    np.testing.assert_array_equal(out, np.pad(x, 256))
    assert run(store_text(BULK_STORE, size="0"), [x, out]).tma_bytes == 0


REDUCTIONS: dict[str, tuple[Any, Any]] = {
    "add.u32": (np.uint32, lambda a, b: a + b),
    "add.u64": (np.uint64, lambda a, b: a + b),
    "add.f32": (np.float32, lambda a, b: a + b),
    "add.f64": (np.float64, lambda a, b: a + b),
    "add.noftz.f16": (np.float16, lambda a, b: a + b),
    "add.noftz.bf16": (ml_dtypes.bfloat16, lambda a, b: a + b),
    "min.s64": (np.int64, np.minimum),
    "max.u64": (np.uint64, np.maximum),
    "min.bf16": (ml_dtypes.bfloat16, np.minimum),
    "max.f16": (np.float16, np.maximum),
    "xor.b64": (np.uint64, np.bitwise_xor),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_bulk_reduce(name: str) -> None:
    """Numbers only; tests of tensor copies have what is awkward."""
    dtype, f = REDUCTIONS[name]
    rng = np.random.default_rng(7)
    a, b = (rng.integers(-1000, 1000, 512 // np.dtype(dtype).itemsize) for _ in range(2))
    if np.dtype(dtype).kind not in "iu":
        a, b = a / 64, b / 7
    target, values = a.astype(dtype), b.astype(dtype)
    expected = f(target, values)
    run(store_text(f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{name}"), [values.view(np.uint8), target])
    np.testing.assert_array_equal(target.view(np.uint8), expected.view(np.uint8))


def test_bulk_prefetch() -> None:
    x = np.zeros(64, np.uint8)
    run(kernel("cp.async.bulk.prefetch.L2.global [%rd0], 64;", ["ptr"]), [x])
    with pytest.raises(EmulationError, match="out of bounds"):
        run(kernel("cp.async.bulk.prefetch.L2.global [%rd0], 80;", ["ptr"]), [x])


WRONG_BULK = {
    "size": (f"{BULK_LOAD} [%r1], [%rd0], 24, [%r2];", "a size of 24 bytes is no multiple of 16"),
    "shared address": (f"{BULK_LOAD} [%r1+8], [%rd0], 16, [%r2];", "the shared address is no multiple of 16"),
    "global address": (f"{BULK_LOAD} [%r1], [%rd0+8], 16, [%r2];", "the global address is no multiple of 16"),
    "mbarrier": (f"{BULK_LOAD} [%r1], [%rd0], 16, [%r2+4];", "the mbarrier's address is no multiple of 8"),
    "beyond global memory": (f"{BULK_LOAD} [%r1], [%rd0], 1040, [%r2];", "out of bounds: read of 1040 bytes"),
    "beyond shared memory": (f"{BULK_LOAD} [%r1+65024], [%rd0], 1024, [%r2];", "out of bounds: 1024 bytes at shared"),
    "not in global memory": (
        f"cvt.u64.u32 %rd5, %r1; cvta.shared.u64 %rd5, %rd5; {BULK_LOAD} [%r1], [%rd5], 16, [%r2];",
        "the address is not in global memory",
    ),
    "peer's source": ("or.b32 %r1, %r1, 0x1000000; " + BULK_STORE + " [%rd0], [%r1], 16;", "is of rank 1 in a cluster"),
    "store of what nobody wrote": (
        f"{BULK_STORE} [%rd0], [%r1], 16;\ncp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;",
        "which nobody has written",
    ),
}


@pytest.mark.parametrize("name", WRONG_BULK)
def test_wrong_bulk_copy(name: str) -> None:
    body, text = WRONG_BULK[name]
    with pytest.raises(EmulationError, match=text):
        run(kernel(init() + body, ["ptr"]), [np.zeros(1024, np.uint8)], threads=1)


ASYNC = "cp.async.{how}.shared.global{hints} [%r10], [%rd10], {size}{more};\n"


def async_text(size: int, wait_text: str, how: str = "ca", more: str = "", hints: str = "", before: str = "") -> str:
    """Each thread copies ``size`` bytes; %r11 is where they begin."""
    return kernel(
        f"mul.lo.u32 %r11, %r0, {size}; add.u32 %r10, %r1, %r11; cvt.u64.u32 %rd10, %r11; add.u64 %rd10, %rd0, %rd10;\n"
        f"{before}{ASYNC.format(how=how, hints=hints, size=size, more=more)}{wait_text}bar.sync 0;\n"
        f"{dump(64 * size, '%rd1')}",
        ["ptr", "ptr"],
    )


WAIT_ALL, WAIT_GROUP = "cp.async.wait_all;\n", "cp.async.commit_group;\ncp.async.wait_group 0;\n"


@pytest.mark.parametrize("wait_text", [WAIT_ALL, WAIT_GROUP], ids=["all", "group"])
@pytest.mark.parametrize(
    ("how", "size", "hints", "more"),
    [
        ("ca", 4, "", ""),
        ("ca", 8, ".L2::128B", ""),
        ("ca", 16, ".L2::cache_hint.L2::256B", ", %rd0"),
        ("cg", 16, "", ""),
        ("cg", 16, ".L2::cache_hint", ", 16, %rd0"),
    ],
)
def test_async(how: str, size: int, hints: str, more: str, wait_text: str) -> None:
    x, out = some_bytes(64 * size, size), np.zeros(64 * size, np.uint8)
    for seed in range(3):
        run(async_text(size, wait_text, how, more, hints), [x, out], seed=seed, threads=64)
        np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_async_zero_fill(size: int) -> None:
    """A source of 0 to ``size`` bytes, by the thread; what is not copied need not exist."""
    x, out = some_bytes(64 * size, size), np.zeros((64, size), np.uint8)
    expected = x.reshape(64, size).copy()
    for thread in range(64):
        expected[thread, thread % (size + 1) :] = 0
    run(async_text(size, WAIT_ALL, more=", %r12", before=f"rem.u32 %r12, %r0, {size + 1};\n"), [x, out], threads=64)
    np.testing.assert_array_equal(out, expected)
    ignored = expected.copy()
    ignored[:] = x.reshape(64, size)
    ignored[::2] = 0
    text = async_text(size, WAIT_ALL, more=", %p1", before="and.b32 %r12, %r0, 1; setp.eq.u32 %p1, %r12, 0;\n")
    run(text, [x, out], threads=64)
    np.testing.assert_array_equal(out, ignored)
    far = async_text(size, WAIT_ALL, more=", 0", before="add.u64 %rd10, %rd10, 0x100000;\n")
    run(far, [x, out], threads=64)
    assert not out.any()


@pytest.mark.parametrize("kind", ["", ".noinc"])
@pytest.mark.parametrize("seed", range(3))
def test_async_arrival(kind: str, seed: int) -> None:
    """Without .noinc the arrival makes up for itself, so that each thread arrives once more."""
    more = "" if kind else "mbarrier.arrive.shared::cta.b64 _, [%r2];\n"
    text = async_text(4, f"cp.async.mbarrier.arrive{kind}.shared::cta.b64 [%r2];\n{more}{wait()}", before=init(64))
    x, out = some_bytes(256, seed), np.zeros(256, np.uint8)
    run(text, [x, out], seed=seed, threads=64)
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("seed", range(8))
def test_an_arrival_waits_for_all_copies_before_it(seed: int) -> None:
    """Those of thread 0, which go with many others that nobody has waited for when it reads its own."""
    offsets = range(0, 8192, 512)
    copies = "".join(
        f"cp.async.cg.shared.global [%r10+{at}], [%rd10+{at}], 16;\n"
        + ("cp.async.commit_group;\n" if at % 1024 else "")
        for at in offsets
    )
    reads = "".join(
        f"@%p0 ld.shared.b32 %r42, [%r1+{at}];\n@%p0 st.global.b32 [%rd1+{at // 128}], %r42;\n" for at in offsets
    )
    text = kernel(
        "shl.b32 %r11, %r0, 4; add.u32 %r10, %r1, %r11; cvt.u64.u32 %rd10, %r11; add.u64 %rd10, %rd0, %rd10;\n"
        f"{init()}{copies}@%p0 cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r2];\n{wait()}{reads}{WAIT_ALL}",
        ["ptr", "ptr"],
    )
    x, out = some_bytes(8192, seed), np.zeros(64, np.uint8)
    run(text, [x, out], seed=seed)
    np.testing.assert_array_equal(out.reshape(16, 4), x.reshape(16, 512)[:, :4])


def test_an_arrival_by_hand_waits_for_no_copy() -> None:
    text = async_text(4, f"mbarrier.arrive.shared::cta.b64 _, [%r2];\n{wait()}", before=init(64))
    with pytest.raises(EmulationError, match="in which a copy in flight still writes"):
        run(text, [np.zeros(256, np.uint8), np.zeros(256, np.uint8)], threads=64)


def test_async_groups() -> None:
    """The wait leaves the newest group in flight."""
    body = (
        "cp.async.ca.shared.global [%r1], [%rd0], 4;\ncp.async.commit_group;\n"
        "cp.async.ca.shared.global [%r1+4], [%rd0+4], 4;\ncp.async.commit_group;\ncp.async.wait_group 1;\n"
        "ld.shared.b32 %r10, [%r1{at}];\nst.global.b32 [%rd0+8], %r10;\ncp.async.wait_all;"
    )
    for seed in range(4):
        x = np.array([5, 6, 0], np.int32)
        run(kernel(body.replace("{at}", ""), ["ptr"]), [x], seed=seed, threads=1)
        assert x[2] == 5
        with pytest.raises(EmulationError, match="in which a copy in flight still writes"):
            run(kernel(body.replace("{at}", "+4"), ["ptr"]), [x], seed=seed, threads=1)


def test_async_is_not_the_async_proxy() -> None:
    """What cp.async wrote needs a proxy fence behind the wait before a bulk copy reads it."""
    body = (
        "cp.async.cg.shared.global [%r1], [%rd0], 16;\ncp.async.wait_all;\n{fence}\n"
        f"{BULK_STORE} [%rd1], [%r1], 16;\ncp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;"
    )
    x, out = some_bytes(16, 1), np.zeros(16, np.uint8)
    run(kernel(body.replace("{fence}", "fence.proxy.async.shared::cta;"), ["ptr", "ptr"]), [x, out], threads=1)
    np.testing.assert_array_equal(out, x)
    with pytest.raises(EmulationError, match=r"without a fence\.proxy\.async"):
        run(kernel(body.replace("{fence}", ""), ["ptr", "ptr"]), [x, out], threads=1)


WRONG_ASYNC = {
    "source too large": ("cp.async.ca.shared.global [%r1], [%rd0], 4, 5;", "a source of 5 bytes for 4 to copy"),
    "source address": ("cp.async.ca.shared.global [%r1], [%rd0+4], 8;", "the source is no multiple of 8"),
    "shared address": ("cp.async.ca.shared.global [%r1+4], [%rd0], 8;", "misaligned"),
    "beyond global memory": ("cp.async.ca.shared.global [%r1], [%rd0+64], 4;", "out of bounds"),
    "beyond shared memory": ("cp.async.ca.shared.global [%r1+0x20000], [%rd0], 4;", "out of bounds"),
    "two copies": (
        "cp.async.ca.shared.global [%r1], [%rd0], 8;\ncp.async.ca.shared.global [%r1+4], [%rd0], 4;",
        "two copies in flight write the same",
    ),
    "read long after, without a wait": (
        "cp.async.ca.shared.global [%r1], [%rd0], 8;\nmov.u32 %r30, 0;\nSPIN: add.u32 %r30, %r30, 1;\n"
        "setp.lt.u32 %p4, %r30, 2000;\n@%p4 bra SPIN;\nld.shared.b32 %r10, [%r1];",
        "in which a copy in flight still writes",
    ),
    "exit": ("cp.async.ca.shared.global [%r1], [%rd0], 8;\ncp.async.commit_group;", "exits while copies into its"),
    "no mbarrier": ("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r2];\nbar.sync 0;" * 40, "no initialised mbar"),
    "overwritten": ("cp.async.ca.shared.global [%r1], [%rd0], 4;\nst.shared.b32 [%r1], %r0;", "still writes"),
}


@pytest.mark.parametrize("name", WRONG_ASYNC)
def test_wrong_async_copy(name: str) -> None:
    body, text = WRONG_ASYNC[name]
    with pytest.raises(EmulationError, match=text):
        run(kernel(body, ["ptr"]), [np.zeros(64, np.uint8)], threads=1)


UNKNOWN = [
    "cp.async.cg.shared.global [%r1], [%rd0], 8;",
    "cp.async.ca.shared.global [%r1], [%rd0], 12;",
    "cp.async.ca.shared.global [%r1], [%rd0], %r3;",
    "cp.async.ca.shared::cluster.global [%r1], [%rd0], 4;",
    "cp.async.wait_group %r1;",
    "cp.async.wait_all 0;",
    "cp.async.mbarrier.arrive.noinc.shared::cta.b32 [%r1];",
    "cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%rd0], [%r1], 16, %h1;",
    "cp.async.bulk.global.global.bulk_group [%rd0], [%rd0], 16;",
    "cp.async.bulk.shared::cta.shared::cta.mbarrier::complete_tx::bytes [%r1], [%r1], 16, [%r2];",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.min.f32 [%rd0], [%r1], 16;",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%rd0], [%r1], 16;",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.min.noftz.f16 [%rd0], [%r1], 16;",
    "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.and.b64 [%r1], [%r1], 16, [%r2];",
    "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.max.s64 [%r1], [%r1], 16, [%r2];",
]


@pytest.mark.parametrize("line", UNKNOWN)
def test_unknown(line: str) -> None:
    with pytest.raises(EmulationError, match=r"line \d+: the emulator does not know this .*cp\."):
        run(kernel(line, ["ptr"]), [np.zeros(64, np.uint8)])
