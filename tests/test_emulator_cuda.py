"""Everyday CUDA C++, compiled by nvcc: control flow, memory, warps, clusters and asynchronous copies.

All sums are of integers, or of floats whose sums are exact, so that every comparison is exact. Each test runs at the
timing of several seeds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from backends import backend_params
from cuda_programs import ptx

pytestmark = backend_params(["emulator"])[0].marks

SEEDS = range(3)
Load = Callable[[str], Any]


@pytest.fixture(params=SEEDS, ids=lambda seed: f"seed{seed}")
def load(request: pytest.FixtureRequest) -> Load:
    """The kernels of a program, on a machine whose timing is that of the test's seed."""
    from emulator import Machine

    return lambda stem: Machine(request.param).load(ptx(stem))


def integers(seed: int, low: int, high: int, size: int, dtype: Any = np.int32) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, size).astype(dtype)


# Control flow


def test_jump_table(load: Load) -> None:
    """A dense switch in a loop, with a case that falls through: nvcc makes brx.idx of it."""
    assert "brx.idx" in ptx("control")
    x = integers(0, -2, 11, 64 * 4).reshape(64, 4)
    out = np.zeros(64, np.uint32)
    load("control")["jump_table"].launch(1, 64, args=[x, out])
    for i, steps in enumerate(x.tolist()):
        v, stored = i, 0
        for step in steps:
            v, stored = one_step(step, i, v, stored)
        assert out[i] == (stored + v) % (1 << 32)


def one_step(step: int, i: int, v: int, stored: int) -> tuple[int, int]:
    """What the case ``step`` makes of ``v`` and of what is stored."""
    if step == 2:
        while v > 100:
            v //= 2
    if step == 5:
        for k in range(i % 5):
            v = v * v + k
    special = {2: (v, stored), 5: (v, stored), 1: (~v, stored + 1), 3: (v, stored ^ v), 6: (0, v)}
    values = {0: v * 3 + stored, 4: v.bit_count() + (v << 3), 7: v + 7 ^ 0x55, 8: v ^ 0x55}
    v, stored = special.get(step, (values.get(step, v // 3 + 1), stored))
    return v % (1 << 32), stored % (1 << 32)


PAIR = np.dtype([("first", "i4"), ("second", "i8"), ("third", "f4", 3)], align=True)


def test_structures_through_a_call(load: Load) -> None:
    """A structure as kernel parameter, as argument and as result of a function that is not inlined."""
    start = np.zeros(1, PAIR)
    start["first"], start["second"], start["third"] = 5, 1 << 33 | 7, [1.5, 2.5, 3.5]
    by = integers(1, 0, 9, 32)
    out = np.zeros(32, PAIR)
    load("control")["structs"].launch(1, 32, args=[start.tobytes(), by, out.view(np.uint8)])
    np.testing.assert_array_equal(out["first"], 7 + by)
    np.testing.assert_array_equal(out["second"], (5 + np.arange(32, dtype=np.int64)) << 32)
    np.testing.assert_array_equal(out["third"], np.array([1.5, 2.5, 3.5])[(np.arange(3) + by[:, None]) % 3])


def test_recursion(load: Load) -> None:
    """Each lane at its own depth of the stack."""
    m = integers(2, 0, 3, 32, np.uint32)
    out = np.zeros(32, np.uint32)
    load("control")["recursion"].launch(1, 32, args=[m, out])
    n = np.arange(32) % 4
    np.testing.assert_array_equal(out, np.choose(m, [n + 1, n + 2, 2 * n + 3]))  # Ackermann's function


def test_function_pointers(load: Load) -> None:
    """Lanes of one warp call different functions."""
    which, x = integers(3, 0, 3, 64), integers(4, -9, 9, 64).astype(np.float32)
    out = np.zeros(64, np.float32)
    load("control")["function_pointers"].launch(1, 64, args=[which, x, out])
    np.testing.assert_array_equal(out, np.choose(which, [2 * x, x * x, -x]))


def test_virtual_functions(load: Load) -> None:
    which = integers(5, 0, 2, 64)
    out = np.zeros(64, np.int32)
    load("control")["virtual_functions"].launch(1, 64, args=[which, out])
    np.testing.assert_array_equal(out, np.where(which, 3 * np.arange(64), 4 * (np.arange(64) + 100)))


def test_local_array(load: Load) -> None:
    """Local memory at an index of each lane's own."""
    assert ".local" in ptx("control")
    order = np.random.default_rng(6).permutation(16).astype(np.int32)
    x = integers(7, 0, 1000, 16)
    out = np.zeros(48, np.uint32)
    load("control")["local_array"].launch(1, 48, args=[order, x, out])
    for i, result in enumerate(out):
        values = [k * 100 + i for k in range(16)]
        for k in range(16):
            values[order[(k + i) % 16]] += int(x[k])
        total = 0
        for k in order:
            total = (total * 31 + values[k]) % (1 << 32)
        assert result == total


def test_divergence(load: Load) -> None:
    """Lanes leave a loop at different times, then vote together."""
    rounds, met = np.zeros(32, np.int32), np.zeros(32, np.uint32)
    load("control")["divergence"].launch(1, 32, args=[rounds, met])
    expected = []
    for i in range(32):
        n, count = i * 2654435761 % (1 << 32) % 97 + 1, 0
        while n != 1:
            n, count = 3 * n + 1 if n & 1 else n // 2, count + 1
        expected.append(count)
    np.testing.assert_array_equal(rounds, expected)
    np.testing.assert_array_equal(met, [sum((c & 1) << i for i, c in enumerate(expected))] * 32)


def test_lanes_wait_for_lanes(load: Load) -> None:
    """Both sides of a branch spin for the other one: a scheduler that finishes one side first would hang."""
    out = np.zeros(32, np.int32)
    load("control")["lanes_wait_for_lanes"].launch(1, 32, args=[out])
    np.testing.assert_array_equal(out, 3)


# Blocks and warps


def test_transpose(load: Load) -> None:
    """Through padded shared memory, with ragged tiles: no bank conflicts."""
    rows, cols = 45, 70
    x = np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)
    out = np.zeros((cols, rows), np.float32)
    counters = load("blocks")["transpose"].launch((3, 2), (32, 8), args=[x, out, rows, cols])
    np.testing.assert_array_equal(out, x.T)
    assert counters.shared_bank_conflicts == 0


def test_block_sum(load: Load) -> None:
    """Shuffles within warps, shared memory between them."""
    x = integers(1, -1000, 1000, 3000)
    out = np.zeros(3, np.int32)
    load("blocks")["block_sum"].launch(3, 192, args=[x, out, len(x)])
    padded = np.pad(x, (0, -len(x) % 576)).reshape(-1, 3, 192)
    np.testing.assert_array_equal(out, padded.sum((0, 2)))


def test_dynamic_beside_static_shared_memory(load: Load) -> None:
    x = np.arange(128.0)
    out = np.zeros(128)
    load("blocks")["reverse"].launch(1, 128, shared_bytes=1024, args=[x, out])
    np.testing.assert_array_equal(out, x[::-1])


def test_warp_questions(load: Load) -> None:
    """Votes, matches, reductions and shuffles of a whole warp, then of its odd lanes."""
    v = integers(2, 0, 16, 32)
    out = np.full((18, 32), 0xDEADBEEF, np.uint32)
    load("blocks")["warp_questions"].launch(1, 32, args=[v, out])
    lanes = np.arange(32)

    def ballot(flags: Any) -> int:
        return sum(int(f) << i for i, f in enumerate(flags))

    def word(x: Any) -> Any:
        return np.asarray(x).astype(np.int64) % (1 << 32)

    expected = [
        ballot(v & 1),
        (v == 7).any(),
        (v >= 0).all(),
        [ballot(v == w) for w in v],
        0xFFFFFFFF,
        1,
        v.sum(),
        (v - 8).min(),
        word(v - 8).max(),
        np.bitwise_and.reduce(v | 2),
        np.bitwise_or.reduce(v),
        np.bitwise_xor.reduce(v),
        v[lanes // 8 * 8 + lanes * 5 % 8],
        np.where(lanes % 16 >= 3, v[lanes - 3], v),
        np.where(lanes % 4 < 2, v[(lanes + 2) % 32], v),
        np.where(lanes % 2, ballot((v & 2) * (lanes % 2) // 2), 0),
        1,
        np.where(lanes % 2, 2 * v[lanes ^ 2], 0),
    ]
    for question, (got, wanted) in enumerate(zip(out, expected, strict=True)):
        np.testing.assert_array_equal(got, np.broadcast_to(word(wanted), 32), f"question {question}")


def test_barriers_that_count(load: Load) -> None:
    x = integers(3, 0, 50, 96)
    out = np.zeros((3, 96), np.int32)
    load("blocks")["barrier_counts"].launch(1, 96, args=[x, out])
    assert (out[0] == (x & 1).sum()).all()
    assert ((out[1] != 0) == (x < 100).all()).all()
    assert ((out[2] != 0) == (x == 3).any()).all()


def test_indices(load: Load) -> None:
    """All three dimensions of grid and block; the last warp of a block is not full."""
    grid, block = (3, 2, 2), (5, 3, 3)
    out = np.zeros((12, 45, 4), np.uint32)
    load("blocks")["indices"].launch(grid, block, args=[out])

    def packed(x: int, y: int, z: int) -> int:
        return x << 16 | y << 8 | z

    def places(extents: tuple[int, int, int]) -> list[int]:
        nx, ny, nz = extents
        return [packed(x, y, z) for z in range(nz) for y in range(ny) for x in range(nx)]

    np.testing.assert_array_equal(out[..., 0], np.broadcast_to(np.array(places(grid))[:, None], (12, 45)))
    np.testing.assert_array_equal(out[..., 1], np.broadcast_to(np.array(places(block)), (12, 45)))
    assert (out[..., 2] == packed(*grid)).all()
    assert (out[..., 3] == packed(*block)).all()


# Variables of the module


TABLE = np.pad(np.array([3, 1, 4, 1, 5, 9, 2, 6], np.float32), (0, 248))


def test_constants(load: Load) -> None:
    index = integers(0, 0, 12, 64)
    out = np.zeros(64, np.float32)
    load("globals")["read_constants"].launch(1, 64, args=[index, out])
    weights = np.array([0.5, -1.25, 3.0, 1e-3], np.float32)
    np.testing.assert_array_equal(out, weights[index % 4] * TABLE[index])


def test_globals_live_as_long_as_the_module(load: Load) -> None:
    """Initial values, a pointer into another variable, zeros elsewhere; the second launch finds what the first left."""
    kernel = load("globals")["count_up"]
    for launch in range(2):
        out = np.zeros(11, np.int32)
        kernel.launch(1, 32, args=[out])
        np.testing.assert_array_equal(out[:8], [10, 20, 30 + 32 * (launch + 1), 0, 0, 0, 0, 0])
        np.testing.assert_array_equal(out[8:], 1)


def test_pointers_between_globals(load: Load) -> None:
    out = np.zeros(2, np.int32)
    load("globals")["follow"].launch(1, 2, args=[out])
    np.testing.assert_array_equal(out, [71113, 513])


def test_strings(load: Load) -> None:
    out = np.zeros(18, np.uint8)
    load("globals")["letters"].launch(1, 3, args=[out])
    assert out.tobytes() == b"warp\0\0block\0grid\0\0"


def test_structure_parameter(load: Load) -> None:
    source = np.arange(32, dtype=np.float32)
    out = np.zeros(32, np.float32)
    packed = struct.pack("<b7xd3h2xQ", 7, 0.5, 10, -20, 30, source.ctypes.data)
    load("globals")["settings"].launch(1, 32, args=[packed, out], memory=[source])
    np.testing.assert_array_equal(out, source / 2 + np.array([10, -20, 30])[np.arange(32) % 3] + 7)


# Clusters


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_histogram_over_a_cluster(load: Load, cluster: int) -> None:
    """Atomics on the shared memory of other blocks."""
    bins = 64
    x = integers(cluster, 0, bins, 700)
    out = np.zeros(bins, np.int32)
    kernel = load("clusters")["histogram"]
    kernel.launch(4, 64, cluster, 4 * bins // cluster, [x, len(x), bins, out])
    np.testing.assert_array_equal(out, np.bincount(x, minlength=bins))


def test_ring_of_a_cluster(load: Load) -> None:
    """Reads of a neighbour's shared memory, and whose memory an address is in."""
    out = np.zeros((2, 8), np.int32)
    load("clusters")["ring"].launch(8, 32, 4, args=[out])
    blocks = np.arange(8)
    np.testing.assert_array_equal(out[0], 100 + blocks // 4 * 4 + (blocks + 1) % 4)
    np.testing.assert_array_equal(out[1], 3)


def test_cooperative_groups(load: Load) -> None:
    """Tiles of 8 lanes; a group of whatever lanes come together, which the hardware may split."""
    x = integers(8, 0, 100, 64)
    out = np.zeros((2, 64), np.int32)
    load("clusters")["groups"].launch(1, 64, args=[x, out])
    np.testing.assert_array_equal(out[0], np.repeat(x.reshape(8, 8).sum(1), 8))
    thirds = (x % 3 == 0).reshape(2, 32)
    for group, inside in zip(out[1].reshape(2, 32), thirds, strict=True):
        assert (group[~inside] == 0).all()
        assert ((group[inside] >= 1) & (group[inside] <= inside.sum())).all()


# Asynchronous copies


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_pipeline(load: Load, stages: int) -> None:
    """cp.async of 16 bytes in two stages; each thread reads what another one has copied."""
    x = integers(stages, -1000, 1000, stages * 64 * 4).reshape(stages, 64, 4)
    out = np.zeros(64, np.int32)
    load("async")["pipeline"].launch(1, 64, args=[x, out, stages])
    np.testing.assert_array_equal(out, (x[:, ::-1] @ np.array([1, 2, 3, 4])).sum(0))


def test_narrow_copies(load: Load) -> None:
    """cp.async of 4 and 8 bytes, and of 16 of which four are zeros."""
    x = integers(1, 1, 1000, 96)
    out = np.zeros((3, 32), np.int32)
    load("async")["narrow_copies"].launch(1, 32, args=[x, out])
    expected = x.reshape(3, 32).copy()
    expected[2, 3::4] = 0
    np.testing.assert_array_equal(out, expected[:, ::-1])


def test_group_copy(load: Load) -> None:
    x = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    out = np.zeros(256, np.float32)
    load("async")["group_copy"].launch(1, 64, args=[x, out])
    np.testing.assert_array_equal(out, x[::-1])


def test_barrier_copy(load: Load) -> None:
    """cuda::memcpy_async on a cuda::barrier: a bulk copy on sm_90."""
    assert "cp.async.bulk" in ptx("async")
    x = integers(2, -100, 100, 4 * 128).reshape(4, 128)
    out = np.zeros(128, np.int32)
    load("async")["barrier_copy"].launch(1, 128, args=[x, out, 4])
    np.testing.assert_array_equal(out, np.array([27, 9, 3, 1]) @ x[:, ::-1])


def test_hand_over(load: Load) -> None:
    """Two cuda::barriers between the producing and the consuming warp."""
    out = np.zeros(32, np.int32)
    load("async")["hand_over"].launch(1, 64, args=[out, 5])
    np.testing.assert_array_equal(out, 1000 + 5 * np.arange(32)[::-1])


# Reports


def test_assert_says_where(load: Load) -> None:
    """A device assertion ends the launch with expression, file, line, function, block and thread."""
    from emulator import EmulationError

    kernel = load("reports")["check_positive"]
    kernel.launch(1, 64, args=[np.ones(64, np.int32)])
    x = np.ones(64, np.int32)
    x[37] = 0
    with pytest.raises(EmulationError) as caught:
        kernel.launch(1, 64, args=[x])
    for words in ("x[threadIdx.x] > 0", "every element", "reports.cu", "check_positive"):
        assert words in str(caught.value)


def test_trap(load: Load) -> None:
    from emulator import EmulationError

    kernel = load("reports")["trap_on_zero"]
    kernel.launch(1, 32, args=[np.ones(32, np.int32)])
    with pytest.raises(EmulationError, match="trap"):
        kernel.launch(1, 32, args=[np.zeros(32, np.int32)])


def test_printf(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """The conversions of printf, with a string from global memory."""
    x, name = integers(0, 1, 9, 4), np.frombuffer(b"bytes\0", np.uint8).copy()
    load("reports")["print"].launch(1, 4, args=[x, name])
    assert capsys.readouterr().out == f"bytes: {x[2]} of 4, {x[2] / 4:5.2f} z% -5 0xff\n"


def test_printf_of_each_thread(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each, in any order; printf returns the number of its arguments."""
    returned = np.zeros(40, np.int32)
    load("reports")["print_each"].launch(1, 40, args=[returned])
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(f"thread {i}" for i in range(40))
    np.testing.assert_array_equal(returned, 1)


def test_clocks_advance(load: Load) -> None:
    """Both cycle counters; the global timer may stand still so long, but never goes back."""
    out = np.zeros(3, np.int64)
    load("reports")["clocks"].launch(1, 1, args=[out])
    assert (out[:2] > 0).all()
    assert out[2] >= 0
