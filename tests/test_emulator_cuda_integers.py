"""Integers of everyday CUDA C++, compiled by nvcc: every bit against Python's integers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from backends import backend_params
from cuda_programs import N, kernels, random_integers, run
from exact import F32, rounded

pytestmark = backend_params(["emulator"])[0].marks


def signed(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> bits - 1 else value


def quotient(x: int, y: int) -> int:
    """Toward zero, as C++ divides."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def remainder(x: int, y: int) -> int:
    return x - quotient(x, y) * y


def u32(x: int) -> int:
    return x % (1 << 32)


def funnel_left(high: int, low: int, shift: int) -> int:
    return u32(((high << 32 | low) << (shift & 31)) >> 32)


def parts(x: int, width: int, is_signed: bool = False) -> list[int]:
    """Of a 32-bit word, lowest first."""
    found = [x >> at & (1 << width) - 1 for at in range(0, 32, width)]
    return [signed(p, width) for p in found] if is_signed else found


def joined(values: Any, width: int) -> int:
    return sum(v % (1 << width) << width * i for i, v in enumerate(values))


def first_set(x: int) -> int:
    return (x & -x).bit_length()


def each_part(f: Callable[..., int], width: int, is_signed: bool = False) -> Callable[..., int]:
    """``f`` over the parts of two words, and of a third one if it takes as many."""

    def whole(x: int, y: int, z: int) -> int:
        words = [parts(w, width, is_signed) for w in (x, y, z)][: f.__code__.co_argcount]
        return joined(map(f, *words), width)

    return whole


def clamped(x: int, bits: int) -> int:
    return max(-(1 << bits - 1), min(x, (1 << bits - 1) - 1))


def narrow(x: int, y: int, z: int) -> int:
    return signed(x, 8) + y % 256 + signed(z, 16)


def permuted(x: int, y: int, z: int) -> int:
    pool = parts(x, 8) + parts(y, 8)
    return joined((pool[z >> 4 * i & 7] for i in range(4)), 8)


INTEGERS: dict[str, tuple[Any, Callable[[int, int, int], int]]] = {
    "sum_u64": (np.uint64, lambda x, y, z: x + y - z),
    "product_u64": (np.uint64, lambda x, y, z: x * y + z),
    "high_u64": (np.uint64, lambda x, y, z: x * y >> 64),
    "high_s64": (np.int64, lambda x, y, z: x * y >> 64),
    "quotient_u64": (np.uint64, lambda x, y, z: x // (y | 1)),
    "quotient_s64": (np.int64, lambda x, y, z: quotient(x, y | 1)),
    "remainder_s64": (np.int64, lambda x, y, z: remainder(x, y | 1)),
    "by_constant_s64": (np.int64, lambda x, y, z: quotient(x, 1000003) + remainder(y, 10)),
    "shifts_u64": (np.uint64, lambda x, y, z: (x << (y & 63)) ^ (x >> (z & 63))),
    "shift_s64": (np.int64, lambda x, y, z: x >> (y & 63)),
    "minimum_s64": (np.int64, lambda x, y, z: x if x < y else min(y, z)),
    "bits_u64": (np.uint64, lambda x, y, z: x.bit_count() + (64 - y.bit_length() << 8) + (first_set(z) << 16)),
    "reverse_u64": (np.uint64, lambda x, y, z: int(f"{x:064b}"[::-1], 2)),
    "square_u128": (np.uint64, lambda x, y, z: (x * y + z) % 0xFFFFFFFFFFFFFFF1),
    "high_u32": (np.uint32, lambda x, y, z: x * y >> 32),
    "high_s32": (np.int32, lambda x, y, z: (x * y >> 32) + signed(x, 24) * signed(y, 24)),
    "quotient_s32": (np.int32, lambda x, y, z: quotient(x, y | 1) + remainder(x, z | 1)),
    "quotient_u32": (np.uint32, lambda x, y, z: x // (y | 1) + x % (z | 1)),
    "sad_s32": (np.uint32, lambda x, y, z: abs(signed(x, 32) - signed(y, 32)) + z),
    "averages": (np.int32, lambda x, y, z: (x + y >> 1) ^ (y + z + 1 >> 1)),
    "bits_u32": (np.uint32, lambda x, y, z: x.bit_count() + (32 - y.bit_length() << 8) + (first_set(z) << 16)),
    "reverse_u32": (np.uint32, lambda x, y, z: int(f"{x:032b}"[::-1], 2)),
    "funnel": (np.uint32, lambda x, y, z: funnel_left(y, x, z) ^ u32((x << 32 | y) >> min(z, 32))),
    "permute": (np.uint32, permuted),
    "field": (np.uint32, lambda x, y, z: (x >> 7 & 0x3FF) | (y & 0xFF) << 10 | (z & 0xFFF00000)),
    "logic": (np.uint32, lambda x, y, z: (x & y) | (~x & z)),
    "majority": (np.uint32, lambda x, y, z: (x & y) ^ (y & z) ^ (x & z)),
    "dot_s8": (np.int32, lambda x, y, z: sum(map(operator.mul, parts(x, 8, True), parts(y, 8, True))) + z),
    "dot_s16": (np.int32, lambda x, y, z: sum(map(operator.mul, parts(x, 16, True), parts(y, 8, True)[:2])) + z),
    "bytes_sum": (np.uint32, each_part(lambda x, y: x + y, 8)),
    "bytes_maximum": (np.uint32, each_part(lambda x, y: max(x, y), 8)),
    "bytes_difference": (np.uint32, each_part(lambda x, y: abs(x - y), 8)),
    "halves_sum": (np.uint32, each_part(lambda x, y: clamped(x + y, 16), 16, True)),
    "halves_relu": (np.uint32, each_part(lambda x, y, z: max(signed(x + y, 16), z, 0), 16, True)),
    "largest_of_three": (np.int32, lambda x, y, z: max(x, y, z)),
    "narrow": (np.int32, narrow),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    """Every bit, against Python's integers."""
    dtype, model = INTEGERS[name]
    x, y, z = (random_integers(dtype, seed) for seed in range(3))
    got = run("integers", name, np.zeros(N, dtype), x, y, z)
    bits = 8 * x.itemsize
    expected = [model(int(a), int(b), int(c)) % (1 << bits) for a, b, c in zip(x, y, z, strict=True)]
    np.testing.assert_array_equal(got.view(f"u{x.itemsize}"), np.array(expected, f"u{x.itemsize}"))


def test_saxpy() -> None:
    """A grid-stride loop over an odd length; nvcc makes an fma of product and sum."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(1000).astype(np.float32) for _ in range(2))
    a = float(np.float32(1.7))
    expected = [rounded(Fraction(a) * Fraction(float(p)) + Fraction(float(q)), F32) for p, q in zip(x, y, strict=True)]
    kernels("integers")["saxpy"].launch(3, 64, args=[1000, a, x, y])
    np.testing.assert_array_equal(y, np.array(expected, np.float32))
