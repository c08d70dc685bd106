"""The backward of SwiGLU with the quantisation of its results, in Triton: tiles and groups of :mod:`.quantize_both`.

A program has 128 tokens by 128 features of gate, of up and of the gradient. FP32 values of all results are more than
there are registers, so it goes over the tile twice, some tokens at a time: what is quantised by row is written the
first time, which also finds the amax of each column, and what is transposed the second time. A tile is 64 KiB with FP8
gates, else 96 KiB: that the second time finds it in the multiprocessor's L1 cache is meant and not measured. Kept in
registers instead, inputs would be read once, but then nothing is a loop: for sm_90 that is 240 KB of code, three times
as much and more than a tile, with 251 registers a thread for BF16 gates and 240 bytes of stack for FP8 ones. What a row
adds to the gradient of its weight is one number a tile, which a second kernel sums in ascending order: no atomic adds.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..error_word import SWIGLU_BACKWARD_OFFSETS
from ..layout import BLOCK, Block, ceil_div, empty_scale, empty_transposed, grouped_tokens, pad16, scale_shape_of
from ..reference.quantize import AMAX_FLOOR
from . import require_fp8
from .activation import swiglu_backward
from .counters import count
from .pairwise import pairwise_sum
from .quantize import FP16_CAPABILITY, finite_magnitude, scale_and_multiplier, to_e4m3
from .quantize_both import grid, store_turned, tokens_of_tile
from .swiglu_quantize import load_scaled

_OP = "swiglu_backward_quantize"
_BLOCK: Block = (1, BLOCK)
# 16 values of a tensor a thread at a time. Untuned.
CHUNK, NUM_WARPS = 32, 8
# Rows that a program of the sum over tiles takes.
_SUMMED = 256


@triton.jit
def load_and_derive(
    grad,
    gate_up,
    gate_up_scale,
    weight,
    row,
    end,
    col,
    first_col,
    cols,
    grad_row_stride,
    grad_col_stride,
    row_stride,
    col_stride,
    gate_up_scale_pitch,
    weight_stride,
    limit,
    TILE: tl.constexpr,
):
    """swiglu_backward of rows [R, 1] and columns [1, TILE] of a tile. All are zero of rows from ``end`` on."""
    given = tl.load(grad + row * grad_row_stride + col * grad_col_stride, mask=row < end, other=0.0).to(tl.float32)
    both = 2 * cols.to(tl.int64)
    gate = load_scaled(
        gate_up, gate_up_scale, row, col, first_col, end, both, row_stride, col_stride, gate_up_scale_pitch, TILE
    )
    col, first_col = col + cols, first_col + cols
    up = load_scaled(
        gate_up, gate_up_scale, row, col, first_col, end, both, row_stride, col_stride, gate_up_scale_pitch, TILE
    )
    factor = None
    if weight is not None:
        factor = tl.load(weight + row * weight_stride, mask=row < end, other=0.0)
    return swiglu_backward(given, gate, up, factor, limit)


@triton.jit
def store_rows(values, data, scale, counters, row, end, col, cols, k_block, scale_pitch, floor, POW2, STICKY):
    """Quantise by row; the columns are block ``k_block``."""
    block_scale, multiplier = scale_and_multiplier(tl.max(finite_magnitude(values), 1, keep_dims=True), floor, POW2)
    tl.store(data + row * cols + col, to_e4m3(values * multiplier, STICKY), mask=row < end)
    tl.store(scale + row + k_block * scale_pitch, block_scale, mask=row < end)
    count(counters, values, multiplier, (row < end) & (col < cols))


@triton.jit
def store_column_scales(magnitude, scale_t, col, tile, scale_t_pitch, floor, POW2):
    """Those of block ``tile`` of the transpose, whose multipliers [1, C] are returned."""
    block_scale, multiplier = scale_and_multiplier(tl.max(magnitude, 0, keep_dims=True), floor, POW2)
    tl.store(scale_t + col + tile.to(tl.int64) * scale_t_pitch, block_scale)
    return multiplier


@triton.jit(do_not_specialize=["T", "gate_up_scale_pitch", "scale_pitch", "scale_t_pitch", "activation_scale_pitch"])
def swiglu_backward_quantize_kernel(
    grad,
    gate_up,
    gate_up_scale,
    weight,
    activation,
    activation_scale,
    data,
    scale,
    data_t,
    scale_t,
    sums,
    offsets,
    error,
    ends_t,
    activation_counters,
    counters,
    counters_t,
    T,
    cols,
    groups,
    grad_row_stride,
    grad_col_stride,
    row_stride,
    col_stride,
    gate_up_scale_pitch,
    weight_stride,
    activation_scale_pitch,
    scale_pitch,
    pitch_t,
    scale_t_pitch,
    limit,
    floor,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
    ERROR_BIT: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``cols`` is F, a multiple of TILE. ``activation`` is dense if it has no scale."""
    across = tl.maximum(cols // TILE, 1)
    tile, k_block = tl.program_id(0) // across, (tl.program_id(0) % across).to(tl.int64)
    first, end = tokens_of_tile(offsets, error, ends_t, tile, T, groups, ERROR_BIT, GROUPS, TILE)
    if (first >= end) | (k_block * TILE >= cols):
        return
    first_col, both = k_block * TILE + tl.arange(0, 1)[None, :], 2 * cols.to(tl.int64)
    # 16 bytes of the widest elements a thread, see tile_indices.
    GRAD: tl.constexpr = grad.dtype.element_ty.primitive_bitwidth
    VECTOR: tl.constexpr = 128 // max(GRAD, gate_up.dtype.element_ty.primitive_bitwidth)
    col = tl.max_contiguous(k_block * TILE + tl.arange(0, TILE), VECTOR)[None, :]
    lane = tl.arange(0, CHUNK)
    col_up, up_block = col + cols, k_block + cols // TILE
    of_value = tl.zeros([CHUNK, TILE], tl.float32)
    of_gate, of_up = of_value, of_value
    for part in range(0, TILE, CHUNK):
        row = (first + part + lane)[:, None]
        value, products, grad_gate, grad_up = load_and_derive(
            grad,
            gate_up,
            gate_up_scale,
            weight,
            row,
            end,
            col,
            first_col,
            cols,
            grad_row_stride,
            grad_col_stride,
            row_stride,
            col_stride,
            gate_up_scale_pitch,
            weight_stride,
            limit,
            TILE,
        )
        if weight is not None:
            of_rows = tl.reshape(pairwise_sum(products, CHUNK, TILE), [CHUNK, 1])
            tl.store(sums + k_block * T + row, of_rows, mask=row < end)
        if activation_scale is None:
            tl.store(activation + row * cols + col, value.to(activation.dtype.element_ty), mask=row < end)
        else:
            of_value = tl.maximum(of_value, finite_magnitude(value))
        store_rows(grad_gate, data, scale, counters, row, end, col, both, k_block, scale_pitch, floor, POW2, STICKY)
        store_rows(grad_up, data, scale, counters, row, end, col_up, both, up_block, scale_pitch, floor, POW2, STICKY)
        of_gate = tl.maximum(of_gate, finite_magnitude(grad_gate))
        of_up = tl.maximum(of_up, finite_magnitude(grad_up))

    if activation_scale is not None:
        for_value = store_column_scales(of_value, activation_scale, col, tile, activation_scale_pitch, floor, POW2)
    for_gate = store_column_scales(of_gate, scale_t, col, tile, scale_t_pitch, floor, POW2)
    for_up = store_column_scales(of_up, scale_t, col_up, tile, scale_t_pitch, floor, POW2)
    for part in range(0, TILE, CHUNK):
        row = (first + part + lane)[:, None]
        inside = (row < end) & (col < cols)
        value, _, grad_gate, grad_up = load_and_derive(
            grad,
            gate_up,
            gate_up_scale,
            weight,
            row,
            end,
            col,
            first_col,
            cols,
            grad_row_stride,
            grad_col_stride,
            row_stride,
            col_stride,
            gate_up_scale_pitch,
            weight_stride,
            limit,
            TILE,
        )
        token = (tile.to(tl.int64) * TILE + part + lane)[None, :]
        if activation_scale is not None:
            store_turned(value * for_value, activation, token, col, cols, pitch_t, STICKY)
            count(activation_counters, value, for_value, inside)
        store_turned(grad_gate * for_gate, data_t, token, col, both, pitch_t, STICKY)
        store_turned(grad_up * for_up, data_t, token, col_up, both, pitch_t, STICKY)
        count(counters_t, grad_gate, for_gate, inside)
        count(counters_t, grad_up, for_up, inside)


@triton.jit(do_not_specialize=["T"])
def sum_tiles_kernel(sums, out, offsets, T, tiles, groups, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Add up ``sums`` [tiles, T] in ascending order from 0, of the rows that are in a group."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    end = T
    if offsets is not None:
        lane = tl.arange(0, GROUPS)
        ends = tl.load(offsets + lane, mask=lane < groups, other=0)
        end = tl.max(tl.minimum(tl.maximum(ends, 0), T), 0)
    inside = row < end
    total = tl.zeros([ROWS], tl.float32)
    place = sums + row
    for _ in range(tiles):
        total += tl.load(place, mask=inside, other=0.0)
        place += T
    tl.store(out + row, total, mask=inside)


def swiglu_backward_quantize(
    grad: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    weight: Tensor | None,
    limit: float | None,
    offsets: Tensor | None,
    error: Tensor | None,
    pow2: bool,
    eps: float,
    dense_activation: bool,
    activation_counters: Tensor | None = None,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See :func:`fastfp8.swiglu_backward_quantize`; arguments are checked already."""
    capability, device = require_fp8(_OP, grad.device), grad.device
    (tokens, features), tiles = grad.shape, grad.shape[1] // BLOCK
    groups = 0 if offsets is None else offsets.shape[0]
    room = pad16(tokens) if offsets is None else grouped_tokens(tokens, groups)
    activation: Tensor
    activation_scale: Tensor | None = None
    if dense_activation:
        activation = torch.empty(grad.shape, dtype=torch.bfloat16, device=device)
    else:
        activation, activation_scale = empty_transposed(grad, features, room)
    data = torch.empty((tokens, 2 * features), dtype=torch.float8_e4m3fn, device=device)
    scale = empty_scale(data, scale_shape_of(data.shape, _BLOCK), _BLOCK)
    data_t, scale_t = empty_transposed(grad, 2 * features, room)
    weighted = 0 if weight is None else tokens
    grad_weight = torch.empty(weighted, dtype=torch.float32, device=device)
    sums = torch.empty((tiles, weighted), dtype=torch.float32, device=device)
    ends_t = torch.empty(groups, dtype=torch.int32, device=device)
    lanes = triton.next_power_of_2(max(1, groups))
    with torch.cuda.device_of(grad):
        if grad.numel() or groups:
            swiglu_backward_quantize_kernel[grid(room, features)](
                grad,
                gate_up,
                gate_up_scale,
                weight,
                activation,
                activation_scale,
                data,
                scale,
                data_t,
                scale_t,
                sums,
                offsets,
                error,
                ends_t,
                activation_counters,
                counters,
                counters_t,
                tokens,
                features,
                groups,
                *grad.stride(),
                *gate_up.stride(),
                0 if gate_up_scale is None else gate_up_scale.stride(1),
                0 if weight is None else weight.stride(0),
                0 if activation_scale is None else activation_scale.stride(1),
                scale.stride(1),
                room,
                scale_t.stride(1),
                math.inf if limit is None else limit,
                max(eps, AMAX_FLOOR),
                POW2=pow2,
                STICKY=capability == FP16_CAPABILITY,
                ERROR_BIT=SWIGLU_BACKWARD_OFFSETS,
                GROUPS=lanes,
                TILE=BLOCK,
                CHUNK=CHUNK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
        if weighted:
            sum_tiles_kernel[(ceil_div(tokens, _SUMMED),)](
                sums,
                grad_weight,
                offsets,
                tokens,
                tiles,
                groups,
                GROUPS=lanes,
                ROWS=_SUMMED,
                num_warps=4,
                enable_fp_fusion=False,
            )
    if activation_scale is None:
        activation_scale = torch.empty(0, device=device)
    return activation, activation_scale, data, scale, data_t, scale_t, grad_weight, ends_t
