"""Counts of what quantisation did to values, in Triton: see :mod:`fastfp8.counters`."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import counters as definition

LANES, FIELDS = tl.constexpr(definition.LANES), tl.constexpr(len(definition.FIELDS))
MOST, UNDERFLOWS = tl.constexpr(definition.MOST), tl.constexpr(definition.UNDERFLOWS)
NORMAL = tl.constexpr(definition.NORMAL)


@triton.jit
def add_count(counters, n):
    tl.atomic_add(counters, n.to(tl.int64), mask=n > 0, sem="relaxed")


@triton.jit
def total(flags):
    return tl.sum(tl.sum(flags, 1), 0)


@triton.jit
def count(counters, values, multiplier, inside):
    """Add the counts of a tile of FP32 ``values`` [ROWS, COLS], of which those ``inside`` [ROWS, COLS] are no padding.

    ``multiplier`` is of a shape that broadcasts. The product is the one that is rounded, so it is computed once. Where
    ``counters`` is None this is no code at all.
    """
    if counters is not None:
        tl.static_assert(values.shape[0] * values.shape[1] <= 1 << 14, "two counts share an int32")
        magnitude = tl.abs(values * multiplier)
        saturated = inside & (magnitude > MOST)
        underflowed = inside & (magnitude <= UNDERFLOWS) & (values != 0)
        subnormal = inside & (magnitude > UNDERFLOWS) & (magnitude < NORMAL)
        finite = inside & (tl.abs(values) < float("inf"))
        small = total(underflowed.to(tl.int32) | (subnormal.to(tl.int32) << 16))
        kept = total(inside.to(tl.int32) | (finite.to(tl.int32) << 16))
        at = counters + (tl.program_id(0) % LANES) * FIELDS
        add_count(at, kept & 0xFFFF)
        add_count(at + 1, total(saturated.to(tl.int32)))
        add_count(at + 2, small & 0xFFFF)
        add_count(at + 3, small >> 16)
        add_count(at + 4, (kept & 0xFFFF) - (kept >> 16))
