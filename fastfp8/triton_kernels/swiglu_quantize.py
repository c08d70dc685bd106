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
from .quantize import FP16_CAPABILITY, finite_magnitude, scale_and_multiplier, to_e4m3

_BLOCK: Block = (1, BLOCK)


@triton.jit
def swiglu_quantize_kernel(
    gate_up,
    weight,
    data,
    scale,
    rows,
    cols,
    row_stride,
    col_stride,
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
    row, col, block_row, block_col = tile_indices(cols, TILE_ROWS, TILE_COLS, 1, TILE_COLS)
    inside = (row < rows) & (col < cols)
    gate = tl.load(gate_up + row * row_stride + col * col_stride, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + (col + cols) * col_stride, mask=inside, other=0.0).to(tl.float32)
    factor = None
    if weight is not None:
        factor = tl.load(weight + row * weight_stride, mask=row < rows, other=0.0)
    values = swiglu(gate, up, factor, limit)
    amax = tl.max(finite_magnitude(values), 1, keep_dims=True)
    block_scale, multiplier = scale_and_multiplier(amax, floor, POW2)
    tl.store(data + row * cols + col, to_e4m3(values * multiplier, STICKY), mask=inside)
    in_scale = (block_row < rows) & (block_col * TILE_COLS < cols)
    tl.store(scale + block_row + block_col * scale_col_stride, block_scale, mask=in_scale)


def swiglu_quantize(
    gate_up: Tensor, weight: Tensor | None, limit: float | None, pow2: bool, eps: float
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
            weight,
            data,
            scale,
            rows,
            cols,
            *gate_up.stride(),
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
