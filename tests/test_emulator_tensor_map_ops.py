"""Tensor maps that device code makes and changes: tensormap.replace, its fences, and what is caught without them."""

from __future__ import annotations

import random
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from copy_kernels import cluster_sync, dump, expect, init, kernel, run, wait
from emulator import EmulationError, TensorMap

Array = np.ndarray[Any, Any]
LOAD = (
    "@%p0 cp.async.bulk.tensor.{rank}d.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [{map}, {at}], [%r2];\n"
)
CLEAR = (
    "shl.b32 %r20, %r0, 2; add.u32 %r20, %r1, %r20; mov.u32 %r21, 0;\nst.shared.b32 [%r20], %r21;\nbar.warp.sync -1;\n"
)
PUBLISH = (
    "bar.warp.sync -1;\ntensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
    "[%rd0], [%r1], 128;\n"
)
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%rd0], 128;\n"
RELEASE = "fence.proxy.tensormap::generic.release.gpu;\n"


def replace(field: str, value: object, ordinal: int | None = None, space: str = "shared::cta", at: str = "%r1") -> str:
    kind = "b64" if field in ("global_address", "global_stride") else "b32"
    where = "" if ordinal is None else f"{ordinal}, "
    space = f".{space}" if space else ""
    return f"@%p0 tensormap.replace.tile.{field}{space}.b1024.{kind} [{at}], {where}{value};\n"


def aligned(size: int) -> Array:
    """Bytes at a multiple of 128."""
    memory = np.zeros(size + 128, np.uint8)
    offset = -memory.ctypes.data % 128
    return memory[offset : offset + size]


def load(rank: int, at: str, nbytes: int, to: str, tensor_map: str = "%rd0") -> str:
    return (
        f"add.u32 %r3, %r1, 1024;\n{init()}{expect(nbytes)}{LOAD.format(rank=rank, map=tensor_map, at=at)}{wait()}"
        f"mov.u32 %r1, %r3;\n{dump(nbytes, to)}"
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_map_built_from_zeros(seed: int) -> None:
    x = np.arange(5 * 12 * 32).astype(ml_dtypes.bfloat16).reshape(5, 12, 32)
    build = replace("global_address", "%rd1") + replace("rank", 2)
    for i, (box, extent, step) in enumerate([(16, 32, 1), (8, 12, 2), (4, 5, 3)]):
        build += replace("box_dim", box, i) + replace("global_dim", extent, i) + replace("element_stride", step, i)
    build += replace("global_stride", 64, 0) + replace("global_stride", 64 * 12, 1)
    build += replace("elemtype", 10) + replace("swizzle_mode", 0) + replace("interleave_layout", 0)
    build += replace("fill_mode", 1)
    text = kernel(
        CLEAR + build + PUBLISH + ACQUIRE + load(3, "{24, 7, -1}", 2 * 4 * 16 * 2, "%rd2"), ["ptr", "ptr", "ptr"]
    )
    out = np.zeros((2, 4, 16), np.uint16)
    run(text, [aligned(128), x, out], seed=seed)
    expected = np.full((2, 4, 16), 0x7FFF, np.uint16)
    # Rows -1 and 2, then 7, 9, 11 and 13.
    expected[1, :3, :8] = x[2, [7, 9, 11], 24:].view(np.uint16)
    np.testing.assert_array_equal(out, expected)


def copied_map(x: Array, box: tuple[int, ...], swizzle: int = 0) -> Array:
    """A map in global memory."""
    memory = aligned(128)
    memory[:] = np.frombuffer(TensorMap(x, box, swizzle=swizzle).data, np.uint8)
    return memory


@pytest.mark.parametrize("space", ["global", ""])
def test_a_map_changed_in_global_memory(space: str) -> None:
    x, y = np.arange(512, dtype=np.uint8), np.arange(512, dtype=np.uint8)[::-1].copy()
    change = replace("global_address", "%rd1", space=space, at="%rd0")
    out = np.zeros(256, np.uint8)
    text = kernel(change + RELEASE + ACQUIRE + load(1, "{16}", 256, "%rd2"), ["ptr", "ptr", "ptr"])
    for seed in range(3):
        run(text, [copied_map(x, (256,)), y, out], seed=seed, memory=[x])
        np.testing.assert_array_equal(out, y[16:272])


@pytest.mark.parametrize("space", ["global", "const"])
def test_a_map_that_nobody_changes(space: str) -> None:
    """It needs no fence."""
    x, out = np.arange(512).astype(np.uint8), np.zeros(256, np.uint8)
    data = TensorMap(x, (256,), swizzle=0).data
    text = kernel(
        "mov.b64 %rd5, here;\n" + f"cvta.{space}.u64 %rd5, %rd5;\n" + load(1, "{32}", 256, "%rd0", "%rd5"), ["ptr"]
    )
    variable = f".{space} .align 128 .b8 here[128] = {{{', '.join(map(str, data))}}};\n"
    run(text.replace(".visible", variable + ".visible"), [out], memory=[x])
    np.testing.assert_array_equal(out, x[32:288])


CHANGE = replace("global_dim", 400, 0, space="global", at="%rd0")
STALE = {
    "no fence": (CHANGE, "no fence.proxy.tensormap::generic.release"),
    "no acquire": (CHANGE + RELEASE, "no fence.proxy.tensormap::generic.acquire"),
    "no release": (CHANGE + "fence.acq_rel.gpu;\n" + ACQUIRE, "no fence.proxy.tensormap::generic.release"),
    "release before the change": (
        RELEASE + CHANGE + "fence.acq_rel.gpu;\n" + ACQUIRE,
        "no fence.proxy.tensormap::generic.release",
    ),
    "acquire before the change": (ACQUIRE + CHANGE + RELEASE, "no fence.proxy.tensormap::generic.acquire"),
    "changed again": (
        CHANGE + RELEASE + ACQUIRE + CHANGE.replace("400", "401") + RELEASE,
        "no fence.proxy.tensormap::generic.acquire",
    ),
    "a plain store": ("@%p0 st.global.b64 [%rd0+40], %rd1;\n" + RELEASE, "no fence.proxy.tensormap::generic.acquire"),
}


@pytest.mark.parametrize("name", STALE)
def test_a_stale_map(name: str) -> None:
    change, text = STALE[name]
    x = np.zeros(512, np.uint8)
    body = change + "bar.sync 0;\n" + load(1, "{0}", 256, "%rd1")
    for seed in range(3):
        with pytest.raises(EmulationError, match=f"stale tensor map: {text}"):
            run(kernel(body, ["ptr", "ptr"]), [copied_map(x, (256,)), np.zeros(512, np.uint8)], seed=seed, memory=[x])


def test_each_cta_acquires_for_itself() -> None:
    x, y = np.zeros(512, np.uint8), np.arange(512).astype(np.uint8)
    text = kernel(
        "mov.u32 %r10, %ctaid.x; setp.eq.u32 %p1, %r10, 0;\n@!%p1 bra BEHIND;\n"
        + replace("global_address", "%rd1", space="global", at="%rd0")
        + RELEASE
        + f"BEHIND:\n{cluster_sync(2, '%rd3', 'A')}mul.wide.u32 %rd10, %r10, 256; add.u64 %rd10, %rd2, %rd10;\n{{}}"
        + load(1, "{0}", 256, "%rd10"),
        ["ptr", "ptr", "ptr", "ptr"],
    )
    for seed in range(3):
        for acquire in (ACQUIRE, "@%p1 " + ACQUIRE):
            out = np.zeros((2, 256), np.uint8)
            args = [copied_map(x, (256,)), y, out, np.zeros(4, np.uint32)]
            launch: dict[str, Any] = {"seed": seed, "grid": 2, "cluster": (2, 1, 1), "memory": [x]}
            if acquire == ACQUIRE:
                run(text.replace("{}", acquire), args, **launch)
                np.testing.assert_array_equal(out, [y[:256]] * 2)
            else:
                with pytest.raises(EmulationError, match=r"stale tensor map: no .*acquire"):
                    run(text.replace("{}", acquire), args, **launch)


def test_a_map_in_use_stays() -> None:
    x = np.zeros(512, np.uint8)
    change = replace("global_dim", 300, 0, space="global", at="%rd0")
    body = init() + expect(256) + "mov.u32 %r3, %r1;\n" + LOAD.format(rank=1, map="%rd0", at="{0}")
    with pytest.raises(EmulationError, match="it changes a tensor map that a copy in flight uses"):
        run(kernel(body + change + wait(), ["ptr"]), [copied_map(x, (256,))], memory=[x])
    run(kernel(body + wait() + "bar.sync 0;\n" + change, ["ptr"]), [copied_map(x, (256,))], memory=[x])


BAD_VALUES = {
    "rank": (replace("rank", 5), "rank of 5: expected 0 to 4"),
    "box of 0": (replace("box_dim", 0, 1), "box_dim of 0: expected 1 to 256"),
    "box of 257": (replace("box_dim", 257, 0), "box_dim of 257"),
    "no elements": (replace("global_dim", 0, 0), "global_dim of 0: expected 1 to 4294967295"),
    "stride in units of 16": (replace("global_stride", 24, 0), "global_stride of 24: .* in steps of 16"),
    "far stride": (replace("global_stride", 1 << 40, 3), "global_stride of 1099511627776"),
    "element stride": (replace("element_stride", 9, 4), "element_stride of 9: expected 1 to 8"),
    "address": (replace("global_address", 8), "global_address of 8: .* in steps of 16"),
    "element type": (replace("elemtype", 13), "elemtype of 13: expected 0 to 12"),
    "swizzle": (replace("swizzle_mode", 4), "swizzle_mode of 4: expected 0 to 3"),
    "fill": (replace("fill_mode", 2), "fill_mode of 2: expected 0 to 1"),
    "misaligned": (replace("rank", 1, at="%r1+16"), "misaligned"),
    "beyond shared memory": (replace("rank", 1, at="%r1+0x10040"), "out of bounds"),
    "half of it beyond": (replace("rank", 1, at="%r1+0x10000"), "out of bounds"),
    "not cleared": (replace("rank", 1, at="%r1+128"), "the tensor map's memory has not been written"),
    "in local memory": ("mov.b64 %rd5, 0x8200000000000000;\n" + replace("rank", 1, space="", at="%rd5"), "out of bo"),
    "fence elsewhere": (ACQUIRE.replace("%rd0", "%rd0+32"), "multiple of 64"),
    "copy to a multiple of 64": (PUBLISH.replace("[%rd0]", "[%rd0+64]"), "between multiples of 128"),
    "copy by a lane": ("@%p0 " + PUBLISH.splitlines()[1], "divergent"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values(name: str) -> None:
    body, text = BAD_VALUES[name]
    with pytest.raises(EmulationError, match=text):
        run(kernel(CLEAR + body, ["ptr"]), [aligned(256)])


UNKNOWN = [
    replace("box_dim", 1, 5),
    replace("global_stride", 16, 4),
    replace("box_dim", 1, -1),
    replace("box_dim", 1).replace("box_dim", "swizzle_atomicity"),
    replace("elemtype", "%r3"),
    replace("rank", 1).replace("b32", "b64"),
    replace("rank", 1).replace(".tile", ".im2col"),
    PUBLISH.splitlines()[1].replace("128", "64"),
    PUBLISH.splitlines()[1].replace(".release", ""),
    ACQUIRE.replace("128", "64"),
    ACQUIRE.replace(".gpu", ""),
    RELEASE.replace("release", "acq_rel"),
    "prefetch.local.tensormap [%rd0];",
]


@pytest.mark.parametrize("line", UNKNOWN)
def test_unknown(line: str) -> None:
    with pytest.raises(EmulationError, match=r"line \d+: the emulator does not know this"):
        run(kernel(line, ["ptr"]), [aligned(128)])


# Offsets in the emulator's encoding.
RANK, TYPE, INTERLEAVE, SWIZZLE, FILL, BOX, STRIDE, STEP = 75, 76, 77, 78, 79, 60, 8, 70
INVALID = {
    "tensorRank: expected 1 to 5, got 6": {RANK: 5},
    "tensorDataType": {TYPE: 13},
    "elements of type .tf32 are not emulated": {TYPE: 11},
    "elements of type .f32.ftz are not emulated": {TYPE: 8},
    "interleave": {INTERLEAVE: 1},
    "swizzle: expected 0 to 3, got 4": {SWIZZLE: 4},
    "oobFill: expected 0 or 1": {FILL: 2},
    "oobFill: expected zeros, with elements of type .u8": {FILL: 1},
    "globalAddress": {0: 8},
    r"boxDim\[1\]: expected 1 to 256 elements, got 257": {BOX + 3: 1, BOX + 2: 0},
    r"boxDim\[0\]: expected a multiple of 16 bytes, got 8": {BOX: 7},
    r"boxDim\[0\]: expected at most the swizzle's 32 bytes, got 64": {SWIZZLE: 1, BOX: 63},
    "rows of exactly the swizzle's 128 bytes, this one of 64": {SWIZZLE: 3, BOX: 63},
    r"globalStrides\[0\]: expected a multiple of 16": {STRIDE: 8},
    r"elementStrides\[1\]: expected 1 to 8, got 9": {STEP + 1: 8},
}


@pytest.mark.parametrize("text", INVALID)
def test_a_map_is_checked_where_it_is_used(text: str) -> None:
    data = bytearray(TensorMap(np.zeros((8, 128), np.uint8), (8, 128), swizzle=0).data)
    for offset, value in INVALID[text].items():
        data[offset] = value
    body = load(2, "{0, 0}", 1024, "%rd1")
    with pytest.raises(EmulationError, match=f"(tensor map: |swizzled box has ){text}"):
        run(kernel(body, ["map", "ptr"]), [bytes(data), np.zeros(1024, np.uint8)])


def test_any_bytes_are_an_error_at_worst() -> None:
    rng = random.Random(0)
    x, out = np.zeros((8, 128), np.uint8), np.zeros(1024, np.uint8)
    good = TensorMap(x, (8, 128), swizzle=0).data
    text = kernel(load(2, "{0, 0}", 1024, "%rd1"), ["map", "ptr"])
    failures = 0
    for i in range(150):
        data = bytearray(good if i % 2 else rng.randbytes(128))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(80)] = rng.choice([0, 1, 16, 127, 255, rng.randrange(256)])
        try:
            run(text, [bytes(data), out], seed=i, memory=[x])
        except EmulationError:
            failures += 1
    assert 100 < failures < 150


def test_the_offsets_of_this_file() -> None:
    data = TensorMap(np.zeros((8, 128), np.float32), (8, 32), (2, 1), swizzle=128).data
    assert struct.unpack_from("<H", data, BOX) == (31,)
    assert (data[RANK], data[TYPE], data[SWIZZLE], data[STEP + 1]) == (1, 7, 3, 1)
    assert struct.unpack_from("<Q", data, STRIDE) == (512,)
