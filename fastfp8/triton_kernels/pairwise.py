"""The sum of ``reference/pairwise.py`` in Triton, whose own sums go by the layout that a tile happens to have."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pairwise_sum(values, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The sums [ROWS] over the columns of FP32 ``values`` [ROWS, COLS]; COLS is a power of two."""
    # A sum over an extent of two is one addition, in whichever order.
    for halves in tl.static_range(COLS.bit_length() - 1):
        values = tl.sum(tl.reshape(values, [ROWS, COLS >> (halves + 1), 2]), 2)
    return tl.reshape(values, [ROWS])
