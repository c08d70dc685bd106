"""Dequantisation in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Block, as_matrices
from . import TILES, require_fp8, tile_indices


@triton.jit
def dequantize_kernel(
    data,
    scale,
    add,
    out,
    rows,
    cols,
    data_row_stride,
    data_col_stride,
    scale_row_stride,
    scale_col_stride,
    add_row_stride,
    add_col_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    row, col, block_row, block_col = tile_indices(cols, out, TILE_ROWS, TILE_COLS, BLOCK_ROWS, BLOCK_COLS)
    inside = (row < rows) & (col < cols)
    codes = tl.load(data + row * data_row_stride + col * data_col_stride, mask=inside, other=0.0)
    in_scale = (block_row * BLOCK_ROWS < rows) & (block_col * BLOCK_COLS < cols)
    factor = tl.load(scale + block_row * scale_row_stride + block_col * scale_col_stride, mask=in_scale, other=0.0)
    values = codes.to(tl.float32) * factor
    if add is not None:
        values += tl.load(add + row * add_row_stride + col * add_col_stride, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * cols + col, values.to(out.dtype.element_ty), mask=inside)


def dequantize(data: Tensor, scale: Tensor, block: Block, dtype: torch.dtype, add: Tensor | None = None) -> Tensor:
    """See :func:`fastfp8.dequantize`; arguments are checked already."""
    require_fp8("dequantize", data.device)
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    if data.numel() == 0:
        return out
    tile = TILES[block]
    added = () if add is None else (add,)
    with torch.cuda.device_of(data):
        for data_matrix, out_matrix, *rest, scale_matrix in as_matrices(block, data, out, *added, scale):
            rows, cols = data_matrix.shape
            add_matrix = rest[0] if rest else None
            dequantize_kernel[tile.grid(rows, cols)](
                data_matrix,
                scale_matrix,
                add_matrix,
                out_matrix,
                rows,
                cols,
                *data_matrix.stride(),
                *scale_matrix.stride(),
                *((0, 0) if add_matrix is None else add_matrix.stride()),
                BLOCK_ROWS=block[0],
                BLOCK_COLS=block[1],
                TILE_ROWS=tile.rows,
                TILE_COLS=tile.cols,
                num_warps=tile.num_warps,
                enable_fp_fusion=False,
            )
    return out
