"""Quantisation to FP8 in blocks, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Block, as_matrices, empty_scale, scale_shape_of
from ..presets import Rules
from ..reference.quantize import AMAX_FLOOR
from . import TILES, require_fp8, tile_indices
from .counters import count
from .presets import OURS, constants, magnitude_bits, scale_and_scaled

# For this one Triton before 3.9 converts FP32 to e4m3 by way of FP16, truncating: 0.28 % of the codes of normal BF16
# data would be wrong (counted on a CPU).
FP16_CAPABILITY = (8, 9)


@triton.jit
def finite_magnitude(values):
    """What counts for amax: the magnitudes, but 0 of an infinity or a NaN."""
    magnitude = tl.abs(values)
    return tl.where(magnitude < float("inf"), magnitude, 0.0)


@triton.jit
def scale_and_multiplier(amax, floor, POW2: tl.constexpr, LARGEST: tl.constexpr = 448.0):
    """The scales that dequantise blocks and the multipliers that quantise them. ``LARGEST`` is that of their codes."""
    # div_rn, because Triton compiles `/` to div.full, which is off by an ulp or two.
    floored = tl.maximum(amax, floor)
    scale = tl.div_rn(floored, LARGEST)
    if POW2:
        # Round up to a power of two: the carry out of a non-zero mantissa increments the exponent field.
        exponent = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        multiplier = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    else:
        multiplier = tl.div_rn(LARGEST, floored)
    return tl.where(amax == 0, 1.0, scale), tl.where(amax == 0, 1.0, multiplier)


@triton.jit
def to_e4m3(values, STICKY: tl.constexpr):
    """The codes of values that are multiplied already."""
    if STICKY:
        # Move what FP16 has no room for into the last bit that it has: rounding that to e4m3 is rounding the whole.
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits & -0x2000) | (((bits & 0x1FFF) + 0x1FFF) & 0x2000)
        values = bits.to(tl.float32, bitcast=True)
    # The hardware's conversion, cvt.rn.satfinite, saturates infinities and makes 0x7F of a NaN. A clamp would eat it.
    return values.to(tl.float8e4nv)


@triton.jit
def block_max(magnitude, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    if BLOCK_COLS > 1:
        magnitude = tl.max(magnitude, 1, keep_dims=True)
    if BLOCK_ROWS > 1:
        magnitude = tl.max(magnitude, 0, keep_dims=True)
    return magnitude


@triton.jit
def quantize_kernel(
    x,
    data,
    scale,
    counters,
    rows,
    cols,
    x_row_stride,
    x_col_stride,
    scale_row_stride,
    scale_col_stride,
    floor,
    largest_multiplier,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    SCALE: tl.constexpr,
    CODES: tl.constexpr,
    ROUNDING: tl.constexpr,
    ONE: tl.constexpr,
    NAN_BLOCK: tl.constexpr,
    FOR_NAN: tl.constexpr,
):
    """By our rules or, of another SCALE, by those of a preset, of which only these have a ``largest_multiplier``."""
    row, col, block_row, block_col = tile_indices(cols, x, TILE_ROWS, TILE_COLS, BLOCK_ROWS, BLOCK_COLS)
    inside = (row < rows) & (col < cols)
    values = tl.load(x + row * x_row_stride + col * x_col_stride, mask=inside, other=0.0).to(tl.float32)

    if SCALE == OURS:
        amax = block_max(finite_magnitude(values), BLOCK_ROWS, BLOCK_COLS)
        block_scale, multiplier = scale_and_multiplier(amax, floor, POW2)
        count(counters, values, multiplier, inside)
        values *= multiplier
    else:
        bits = block_max(magnitude_bits(values, NAN_BLOCK), BLOCK_ROWS, BLOCK_COLS)
        amax = bits.to(tl.float32, bitcast=True)
        block_scale, values = scale_and_scaled(
            values, amax, floor, largest_multiplier, POW2, SCALE, CODES, ROUNDING, ONE, FOR_NAN
        )
    tl.store(data + row * cols + col, to_e4m3(values, STICKY), mask=inside)
    in_scale = (block_row * BLOCK_ROWS < rows) & (block_col * BLOCK_COLS < cols)
    tl.store(scale + block_row * scale_row_stride + block_col * scale_col_stride, block_scale, mask=in_scale)


def quantize(
    x: Tensor,
    block: Block,
    pow2: bool,
    eps: float,
    rules: Rules | None = None,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.quantize`; arguments are checked already."""
    capability = require_fp8("quantize", x.device)
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = empty_scale(x, scale_shape_of(x.shape, block), block)
    if x.numel() == 0:
        return data, scale
    tile = TILES[block]
    with torch.cuda.device_of(x):
        for x_matrix, data_matrix, scale_matrix in as_matrices(block, x, data, scale):
            rows, cols = x_matrix.shape
            quantize_kernel[tile.grid(rows, cols)](
                x_matrix,
                data_matrix,
                scale_matrix,
                counters,
                rows,
                cols,
                *x_matrix.stride(),
                *scale_matrix.stride(),
                max(eps, AMAX_FLOOR) if rules is None else eps,
                torch.finfo(x.dtype).max,
                POW2=pow2,
                STICKY=capability == FP16_CAPABILITY,
                BLOCK_ROWS=block[0],
                BLOCK_COLS=block[1],
                TILE_ROWS=tile.rows,
                TILE_COLS=tile.cols,
                **constants(rules),
                num_warps=tile.num_warps,
                enable_fp_fusion=False,
            )
    return data, scale
