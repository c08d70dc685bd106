"""Atomics, locks and flags in CUDA C++, compiled by nvcc: between threads, blocks and grids, at several timings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from backends import backend_params
from cuda_programs import ptx

pytestmark = backend_params(["emulator"])[0].marks

SEEDS = range(4)
Load = Callable[[], Any]


@pytest.fixture(params=SEEDS, ids=lambda seed: f"seed{seed}")
def load(request: pytest.FixtureRequest) -> Load:
    from emulator import Machine

    return lambda: Machine(request.param).load(ptx("atomics"))


def applied(start: list[int], values: np.ndarray, bits: int) -> list[int]:
    """What add, sub, min, max, and, or, xor in any order make of the words: each commutes with itself."""
    add, sub, low, high, both, either, odd = start
    whole = (1 << bits) - 1
    factor = 0x9E3779B1 if bits == 32 else 0x9E3779B97F4A7C15
    for v in map(int, values):
        add, sub = add + v & whole, sub - v & whole
        low, high = min(low, v), max(high, v)
        both, either, odd = both & ~(1 << v % bits), either | 1 << v % bits, odd ^ v * factor & whole
    return [add, sub, low, high, both, either, odd]


def wrapped_up(start: int, count: int, limit: int) -> int:
    for _ in range(count):
        start = 0 if start >= limit else start + 1
    return start


def wrapped_down(start: int, count: int, limit: int) -> int:
    for _ in range(count):
        start = limit if start == 0 or start > limit else start - 1
    return start


def test_every_operation_of_u32(load: Load) -> None:
    """In global and in shared memory; inc and dec wrap."""
    start = [5, 6, 1 << 31, 7, 0xFFFFFFFF, 0, 0x12345678]
    words = np.array([*start, 3, 4] * 2, np.uint32)
    load()["atomics_u32"].launch(1, 96, args=[words])
    expected = applied(start, np.arange(96), 32) + [wrapped_up(3, 96, 6), wrapped_down(4, 96, 10)]
    np.testing.assert_array_equal(words, expected * 2)


def test_operations_of_s32(load: Load) -> None:
    words = np.array([50, -50, 0], np.int32)
    load()["atomics_s32"].launch(2, 64, args=[words])
    np.testing.assert_array_equal(words, [-100, 27, np.arange(-100, 28).sum()])


def test_operations_of_u64(load: Load) -> None:
    start = [1, 1 << 63, 2, (1 << 64) - 1, 0, 3]
    words = np.array([*start, 0], np.uint64)
    load()["atomics_u64"].launch(2, 64, args=[words])
    values = np.arange(128, dtype=np.uint64) + np.uint64(1 << 40)
    add, _, low, high, both, either, odd = applied([start[0], 0, *start[1:]], values, 64)
    np.testing.assert_array_equal(words[:6], np.array([add, low, high, both, either, odd], np.uint64))
    assert words[6] in values


def test_old_values(load: Load) -> None:
    """Every ticket is handed out once; a chain of exchanges loses nothing."""
    counter, slot = np.zeros(1, np.uint32), np.full(1, 999, np.uint32)
    tickets, swapped = np.zeros(192, np.uint32), np.zeros(192, np.uint32)
    load()["old_values"].launch(3, 64, args=[counter, slot, tickets, swapped])
    np.testing.assert_array_equal(np.sort(tickets), np.arange(192))
    assert sorted([*swapped, *slot]) == [*range(192), 999]


def test_sums_of_floats(load: Load) -> None:
    """float, double, half, bfloat16 and pairs of them; small integers and halves, so that any order is exact."""
    import ml_dtypes

    f, d = np.zeros(2, np.float32), np.zeros(2, np.float64)
    h, b = np.zeros(2, np.float16), np.zeros(2, ml_dtypes.bfloat16)
    h1, b1 = np.zeros(2, np.float16), np.zeros(2, ml_dtypes.bfloat16)
    load()["atomics_float"].launch(2, 64, args=[f, d, h, b, h1, b1])
    np.testing.assert_array_equal(f, [192, 192])
    np.testing.assert_array_equal(d, [256, 48])
    np.testing.assert_array_equal(h, np.array([192, -192]))
    np.testing.assert_array_equal(b.astype(np.float32), [128, 64])
    np.testing.assert_array_equal(h1, np.array([64, 0]))
    np.testing.assert_array_equal(b1.astype(np.float32), [128, 0])


def test_maximum_by_compare_and_swap(load: Load) -> None:
    x = np.random.default_rng(0).uniform(0, 1, 192).astype(np.float32)
    highest = np.zeros(1, np.float32)
    load()["cas_maximum"].launch(3, 64, args=[x, highest])
    assert highest[0] == x.max()


def test_compare_and_swap_of_16_and_64_bits(load: Load) -> None:
    """16 bits beside another value, which must stay."""
    halves, words = np.array([7, 1234], np.uint16), np.array([5, 6], np.uint64)
    load()["cas_widths"].launch(2, 8, args=[halves, words])
    np.testing.assert_array_equal(halves, [7 + 16 * 3, 1234])
    np.testing.assert_array_equal(words, np.array([5 + (16 << 33), 6], np.uint64))


def test_ticket_lock(load: Load) -> None:
    """Plain reads and writes under a lock between blocks: no update is lost."""
    lock, total, order = np.zeros(2, np.uint32), np.zeros(1, np.int32), np.full(8, -1, np.int32)
    load()["ticket_lock"].launch(8, 32, args=[lock, total, order])
    assert total[0] == 255
    np.testing.assert_array_equal(np.sort(order), np.arange(8))
    np.testing.assert_array_equal(lock, 8)


def test_flag_between_blocks(load: Load) -> None:
    """What was written before the fence and the flag is there for whoever has seen the flag."""
    data, ready, out = np.zeros(64, np.int32), np.zeros(1, np.int32), np.zeros((2, 64), np.int32)
    load()["flag"].launch(3, 64, args=[data, ready, out])
    np.testing.assert_array_equal(out, np.broadcast_to(np.arange(64)[::-1] ** 2 + 1, (2, 64)))


def test_ping_pong(load: Load) -> None:
    """cuda::atomic_ref with acquire and release hands plain data to and fro."""
    data, turn = np.zeros(1, np.int32), np.zeros(1, np.int32)
    load()["ping_pong"].launch(2, 32, args=[data, turn, 5])
    expected = 0
    for _ in range(5):
        expected = (expected * 3 + 1) * 3 + 2
    assert data[0] == expected


def test_memory_orders(load: Load) -> None:
    """Every order and scope that C++ knows. The scope of a block holds only within one."""
    words = np.zeros(4, np.uint32)
    load()["memory_orders"].launch(1, 64, args=[words])
    np.testing.assert_array_equal(words, [64, 64, 64, 128])


def test_last_block(load: Load) -> None:
    """The block that finishes last sees the partial sums of all."""
    x = np.random.default_rng(1).integers(-100, 100, 40 * 32).astype(np.int32)
    partial, finished, out = np.zeros(40, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.int32)
    load()["last_block"].launch(40, 32, args=[x, partial, finished, out])
    assert out[0] == x.sum()
    assert finished[0] == 0
