"""SwiGLU and quantisation in Triton: gate and up are read once, the result is written as FP8."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import BLOCK, Block, empty_scale, scale_shape
from ..reference.quantize import AMAX_FLOOR
from . import TILES, require_fp8, tile_indices
from .activation import swiglu
from .counters import count
from .quantize import FP16_CAPABILITY, finite_magnitude, scale_and_multiplier, to_e4m3

_BLOCK: Block = (1, BLOCK)


@triton.jit
def load_scaled(
    data,
    scale,
    row,
    col,
    first_col,
    rows,
    cols,
    row_stride,
    col_stride,
    scale_pitch,
    BLOCK: tl.constexpr,
):
    """FP32 elements ``row`` [R, 1] by ``col`` [1, BLOCK], which begin at ``first_col`` [1, 1].

    Zeros from ``rows`` and from ``cols`` on. With ``scale``, that of (1, BLOCK) blocks, code times scale; the columns
    may lie in two of these blocks.
    """
    inside = (row < rows) & (col < cols)
    values = tl.load(data + row * row_stride + col * col_stride, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        block = first_col // BLOCK
        factor = tl.load(scale + row + block * scale_pitch, mask=(row < rows) & (first_col < cols), other=0.0)
        edge = (block + 1) * BLOCK
        in_two = (row < rows) & (first_col % BLOCK != 0) & (edge < cols)
        after = tl.load(scale + row + (block + 1) * scale_pitch, mask=in_two, other=0.0)
        values *= tl.where(col < edge, factor, after)
    return values


@triton.jit(do_not_specialize=["gate_up_scale_pitch"])
def swiglu_quantize_kernel(
    gate_up,
    gate_up_scale,
    weight,
    data,
    scale,
    counters,
    rows,
    cols,
    row_stride,
    col_stride,
    gate_up_scale_pitch,
    weight_stride,
    scale_col_stride,
    limit,
    floor,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    """``cols`` is F: up begins there. A tile is one block wide."""
    row, col, block_row, block_col = tile_indices(cols, gate_up, TILE_ROWS, TILE_COLS, 1, TILE_COLS)
    inside = (row < rows) & (col < cols)
    first, end, pitch = block_col * TILE_COLS, 2 * tl.cast(cols, tl.int64), gate_up_scale_pitch
    gate = load_scaled(gate_up, gate_up_scale, row, col, first, rows, cols, row_stride, col_stride, pitch, TILE_COLS)
    col_up, first_up = col + cols, first + cols
    up = load_scaled(gate_up, gate_up_scale, row, col_up, first_up, rows, end, row_stride, col_stride, pitch, TILE_COLS)
    factor = None
    if weight is not None:
        factor = tl.load(weight + row * weight_stride, mask=row < rows, other=0.0)
    values = swiglu(gate, up, factor, limit)
    amax = tl.max(finite_magnitude(values), 1, keep_dims=True)
    block_scale, multiplier = scale_and_multiplier(amax, floor, POW2)
    tl.store(data + row * cols + col, to_e4m3(values * multiplier, STICKY), mask=inside)
    count(counters, values, multiplier, inside)
    in_scale = (block_row < rows) & (block_col * TILE_COLS < cols)
    tl.store(scale + block_row + block_col * scale_col_stride, block_scale, mask=in_scale)


def swiglu_quantize(
    gate_up: Tensor,
    weight: Tensor | None,
    limit: float | None,
    pow2: bool,
    eps: float,
    gate_up_scale: Tensor | None = None,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.swiglu_quantize`; arguments are checked already."""
    capability = require_fp8("swiglu_quantize", gate_up.device)
    rows, cols = gate_up.shape[0], gate_up.shape[1] // 2
    data = torch.empty((rows, cols), dtype=torch.float8_e4m3fn, device=gate_up.device)
    scale = empty_scale(gate_up, scale_shape(rows, cols, _BLOCK), _BLOCK)
    if data.numel() == 0:
        return data, scale
    tile = TILES[_BLOCK]
    with torch.cuda.device_of(gate_up):
        swiglu_quantize_kernel[tile.grid(rows, cols)](
            gate_up,
            gate_up_scale,
            weight,
            data,
            scale,
            counters,
            rows,
            cols,
            *gate_up.stride(),
            0 if gate_up_scale is None else gate_up_scale.stride(1),
            0 if weight is None else weight.stride(0),
            scale.stride(1),
            math.inf if limit is None else limit,
            max(eps, AMAX_FLOOR),
            POW2=pow2,
            STICKY=capability == FP16_CAPABILITY,
            TILE_ROWS=tile.rows,
            TILE_COLS=tile.cols,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return data, scale
