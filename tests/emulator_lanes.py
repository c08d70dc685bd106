"""Runs a few PTX instructions on many operands, a thread for each, and compares with a model of one thread."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from machines import machine, on_silicon

BLOCK = 128
COUNT = 1536
PTX = """.version 8.6
.target sm_90a
.address_size 64
.visible .entry kernel({parameters}) {{
  .reg .pred p, q, r;
  .reg .b16 %h<8>;
  .reg .b32 %r<8>, %i, %t;
  .reg .b64 %l<8>, %o, %x;
  {declarations}
  mov.u32 %i, %ctaid.x;
  mov.u32 %t, %tid.x;
  mad.lo.s32 %i, %i, 128, %t;
  {loads}
{body}
  {store}
  ret;
}}
"""
NAMES = "abce"  # registers of the operands: %a, %b, %c, %e; the result is %d
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
# Bits of the exponent and the fraction.
FLOATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52), "e4m3": (4, 3), "e5m2": (5, 2)}


def kernel_text(body: str, inputs: Sequence[int], result: int) -> str:
    """PTX of a kernel that loads operands of so many bits, runs ``body``, and stores the result."""
    slots = [*zip(NAMES, inputs, strict=False), ("d", result)]
    at = "ld.param.u64 %x, [p_{0}]; mul.wide.u32 %o, %i, {1}; add.s64 %x, %x, %o;"
    return PTX.format(
        parameters=", ".join(f".param .u64 p_{name}" for name, _ in slots),
        declarations=" ".join(f".reg .b{bits} %{name};" for name, bits in slots),
        loads=" ".join(at.format(name, bits // 8) + f" ld.global.b{bits} %{name}, [%x];" for name, bits in slots[:-1]),
        body=body,
        store=at.format("d", result // 8) + f" st.global.b{result} [%x], %d;",
    )


def execute(body: str, inputs: Sequence[np.ndarray], result: int) -> np.ndarray:
    """The results of ``body``, of ``result`` bits, for each row of the columns ``inputs``."""
    count = len(inputs[0])
    blocks = -(-count // BLOCK)
    columns = [np.resize(column, blocks * BLOCK) for column in inputs]
    out = np.full(blocks * BLOCK, 0xDEADBEEFDEADBEEF & (1 << result) - 1, UNSIGNED[result])
    text = kernel_text(body, [8 * column.itemsize for column in columns], result)
    machine().load(text)["kernel"].launch((blocks, 1, 1), (BLOCK, 1, 1), args=[*columns, out])
    return out[:count]


def bits_of(kind: str) -> int:
    """Of a type as PTX names it, and of ``amount``: 32 bits that say how far or how many."""
    if kind == "amount":
        return 32
    base, _, pair = kind.partition("x2")
    element = sum(FLOATS[base]) + 1 if base in FLOATS else int(base[1:])
    return element * (2 if kind != base or pair else 1)


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _corners(kind: str) -> list[int]:
    if kind == "amount":
        return [*range(70), 127, 128, 254, 255, 256, 257, 1 << 31, (1 << 32) - 1]
    bits = bits_of(kind)
    if kind in FLOATS:
        fraction = FLOATS[kind][1]
        infinity, one = ((1 << FLOATS[kind][0]) - 1) << fraction, ((1 << (FLOATS[kind][0] - 1)) - 1) << fraction
        quiet = infinity | 1 << (fraction - 1)
        # Zero, the ends of the subnormal and the normal numbers, around 1, infinity, NaNs.
        positive = [0, 1, (1 << fraction) - 1, 1 << fraction, one - 1, one, one + 1, one | 1 << (fraction - 1)]
        positive += [infinity - 1, infinity, infinity | 1, quiet, quiet | 1]
        return [x | sign for x in positive for sign in (0, 1 << (bits - 1))]
    top = 1 << (bits - 1)
    return [0, 1, 2, 3, 7, 0x55, 0xAA, top - 1, top, top + 1, 2 * top - 2, 2 * top - 1]


def operands(kinds: Sequence[str], count: int = COUNT, seed: int = 0) -> list[np.ndarray]:
    """Columns of corners, of any bits, of floats of ordinary size, and of what nearly equals the column before.

    Two columns begin with every pair of corners.
    """
    rng = np.random.default_rng(seed)
    columns: list[np.ndarray] = []
    for kind in kinds:
        bits = bits_of(kind)
        base = kind.removesuffix("x2")
        if base != kind:
            low, high = operands([base, base], count, int(rng.integers(1 << 30)))
            columns.append(low.astype(UNSIGNED[bits]) | high.astype(UNSIGNED[bits]) << UNSIGNED[bits](bits // 2))
            continue
        values = rng.integers(0, 1 << 64, count, dtype=np.uint64, endpoint=False) >> np.uint64(64 - bits)
        if kind in FLOATS:
            exponent, fraction = FLOATS[kind]
            middle = (1 << (exponent - 1)) - 1
            near = rng.integers(max(middle - 12, 0), min(middle + 12, (1 << exponent) - 2), count).astype(np.uint64)
            field = np.uint64(((1 << exponent) - 1) << fraction)
            values = np.where(rng.random(count) < 0.5, (values & ~field) | near << np.uint64(fraction), values)
        corners = np.array(_corners(kind), np.uint64)
        corner_share = 0.9 if kind == "amount" else 0.35
        values = np.where(rng.random(count) < corner_share, rng.choice(corners, count), values)
        if columns and columns[-1].itemsize * 8 == bits:
            nearby = columns[-1].astype(np.uint64) ^ rng.choice(np.array([0, 1, 2, 1 << (bits - 1)], np.uint64), count)
            values = np.where(rng.random(count) < 0.15, nearby, values)
        columns.append(values.astype(UNSIGNED[bits]))
    if len(kinds) == 2 and not any(kind.endswith("x2") for kind in kinds):
        pairs = np.array(list(itertools.product(*map(_corners, kinds))), np.uint64)[:count]
        for column, corners in zip(columns, pairs.T, strict=True):
            column[: len(pairs)] = corners.astype(column.dtype)
    return columns


@dataclass(frozen=True)
class Case:
    """``oracle`` gives the result's bits from the operands: integers by their sign, all else as bits.

    Where the operands are ``unspecified`` the PTX ISA leaves the result open, and only the emulator is held to it.
    """

    body: str
    result: str
    inputs: tuple[str, ...]
    oracle: Callable[..., int]
    unspecified: Callable[..., bool] = lambda *operands: False


def check(case: Case, columns: Sequence[np.ndarray] | None = None, same: Callable[[int], int] = lambda x: x) -> None:
    """Run ``case`` and compare bit for bit, after ``same`` has been put on either side."""
    columns = operands(case.inputs) if columns is None else columns
    bits = bits_of(case.result)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    got = execute(case.body, columns, bits).tolist()
    for row, found in zip(rows, got, strict=True):
        plain = [signed(x, bits_of(k)) if k[0] == "s" else x for x, k in zip(row, case.inputs, strict=True)]
        expected = case.oracle(*plain) & (1 << bits) - 1
        shown = f"{case.body}\n  of {[hex(x) for x in row]}: got {found:#x}, expected {expected:#x}"
        assert same(found) == same(expected) or (on_silicon() and case.unspecified(*plain)), shown
