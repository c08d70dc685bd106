"""Quantisation of a matrix and of its transpose from one read, in Triton, and what it shares with requantisation.

A program has a tile of 128 tokens by 128 features, one block along either side, so that the amax of each row and of
each column is its own. Codes go out row by row, and again, turned in shared memory, feature by feature: full lines of
128 bytes both times, and the scales of either output beside each other.

Tokens in groups are the same problem: the tiles of a group begin at its first row, and tile ``i`` of all groups is
block ``i`` of the transpose. How many tiles there are is known on the device alone, so the grid has a program for every
tile that there could be; those without one exit at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..error_word import QUANTIZE_OFFSETS
from ..layout import BLOCK, ceil_div, empty_scale, empty_transposed, grouped_tokens, pad16, scale_shape_of
from ..reference.quantize import AMAX_FLOOR
from . import require_fp8
from .counters import count
from .grouped_gemm import rows_of_groups, tile_of_groups
from .quantize import FP16_CAPABILITY, finite_magnitude, scale_and_multiplier, to_e4m3

# 32 values a thread, of which one of sm_90 has 109 registers: with 64 values it has 204. Not timed yet.
NUM_WARPS = 16


@triton.jit
def tokens_of_tile(
    offsets,
    error,
    ends_t,
    tile,
    T,
    groups,
    ERROR_BIT: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first row of token tile ``tile`` and the row at which its tokens end: not beyond the first if it has none.

    Of groups, also writes the token at which each ends in the transpose.
    """
    if offsets is None:
        first, end = tile.to(tl.int64) * TILE, T
    else:
        starts, ends = rows_of_groups(offsets, error, T, groups, False, ERROR_BIT, GROUPS)
        group, first, end, first_tiles = tile_of_groups(starts, ends, tile, GROUPS, TILE)
        if tl.program_id(0) == 0:
            lane = tl.arange(0, GROUPS)
            tl.store(ends_t + lane, (first_tiles * TILE + ends - starts).to(tl.int32), mask=lane < groups)
        end = tl.where(group < groups, end, first)
    return first, end


@triton.jit
def store_turned(values, data_t, token, col, cols, pitch_t, STICKY: tl.constexpr):
    """Write the codes of multiplied ``values`` [R, C], of columns ``col`` [1, C], turned, as tokens ``token`` [1, R].

    Rows without a token must hold zeros: they are written as far as rows of the transpose, ``pitch_t`` codes, go.
    """
    codes, feature = tl.trans(to_e4m3(values, STICKY)), tl.trans(col)
    tl.store(data_t + feature * pitch_t + token, codes, mask=(feature < cols) & (token < pitch_t))


@triton.jit
def store_transposed(
    values,
    magnitude,
    data_t,
    scale_t,
    tile,
    col,
    cols,
    pitch_t,
    scale_t_pitch,
    floor,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
    TILE: tl.constexpr,
    counters=None,
    inside=None,
    VECTOR: tl.constexpr = 16,
):
    """Quantise a tile [TILE, TILE] along its columns ``col`` [1, TILE] and write it turned, as block ``tile``.

    A thread stores ``VECTOR`` codes at a time; not more than it loads, for Triton would have it load as many.
    """
    block_scale, multiplier = scale_and_multiplier(tl.max(magnitude, 0, keep_dims=True), floor, POW2)
    token = tl.max_contiguous(tile.to(tl.int64) * TILE + tl.arange(0, TILE), VECTOR)[None, :]
    store_turned(values * multiplier, data_t, token, col, cols, pitch_t, STICKY)
    tl.store(scale_t + col + tile.to(tl.int64) * scale_t_pitch, block_scale, mask=col < cols)
    count(counters, values, multiplier, inside)


@triton.jit(do_not_specialize=["T", "scale_pitch", "scale_t_pitch"])
def quantize_both_kernel(
    x,
    data,
    scale,
    data_t,
    scale_t,
    counters,
    counters_t,
    offsets,
    error,
    ends_t,
    T,
    cols,
    groups,
    x_row_stride,
    x_col_stride,
    scale_pitch,
    pitch_t,
    scale_t_pitch,
    floor,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
    ERROR_BIT: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):
    across = tl.maximum(tl.cdiv(cols, TILE), 1)
    tile, k_block = tl.program_id(0) // across, (tl.program_id(0) % across).to(tl.int64)
    first, end = tokens_of_tile(offsets, error, ends_t, tile, T, groups, ERROR_BIT, GROUPS, TILE)
    if (first >= end) | (k_block * TILE >= cols):
        return
    row = first + tl.arange(0, TILE)[:, None]
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # see tile_indices
    col = tl.max_contiguous(k_block * TILE + tl.arange(0, TILE), VECTOR)[None, :]
    inside = (row < end) & (col < cols)
    values = tl.load(x + row * x_row_stride + col * x_col_stride, mask=inside, other=0.0).to(tl.float32)
    magnitude = finite_magnitude(values)

    block_scale, multiplier = scale_and_multiplier(tl.max(magnitude, 1, keep_dims=True), floor, POW2)
    tl.store(data + row * cols + col, to_e4m3(values * multiplier, STICKY), mask=inside)
    tl.store(scale + row + k_block * scale_pitch, block_scale, mask=row < end)
    count(counters, values, multiplier, inside)
    to = (data_t, scale_t, tile, col, cols, pitch_t, scale_t_pitch)
    store_transposed(values, magnitude, *to, floor, POW2, STICKY, TILE, counters_t, inside, VECTOR)


def quantize_both(
    x: Tensor, pow2: bool, eps: float, counters: Tensor | None = None, counters_t: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.quantize_both`; arguments are checked already. The transpose is padded to 16 tokens."""
    capability = require_fp8("quantize_both", x.device)
    out = _outputs(x, pad16(x.shape[0]))
    if x.numel():
        _launch(x, out, (counters, counters_t), (None, None, None), capability, pow2, eps)
    return out


def quantize_grouped_both(
    x: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    pow2: bool,
    eps: float,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.quantize_grouped_both`; arguments are checked already."""
    capability = require_fp8("quantize_grouped_both", x.device)
    out = _outputs(x, grouped_tokens(x.shape[0], offsets.shape[0]))
    ends_t = torch.empty_like(offsets)
    _launch(x, out, (counters, counters_t), (offsets, error, ends_t), capability, pow2, eps)
    return *out, ends_t


def _outputs(x: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = empty_scale(x, scale_shape_of(x.shape, (1, BLOCK)), (1, BLOCK))
    return data, scale, *empty_transposed(x, x.shape[1], tokens)


def grid(tokens: int, features: int) -> tuple[int]:
    """A program for each tile of the transpose, and one for the ends of groups where there is none."""
    return (max(1, ceil_div(tokens, BLOCK)) * max(1, ceil_div(features, BLOCK)),)


def _launch(
    x: Tensor,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    counters: tuple[Tensor | None, Tensor | None],
    groups: tuple[Tensor | None, Tensor | None, Tensor | None],
    capability: tuple[int, int] | None,
    pow2: bool,
    eps: float,
) -> None:
    """``groups`` are offsets, error word and the ends of groups in the transpose."""
    _, scale, data_t, scale_t = out
    num_groups = 0 if groups[0] is None else groups[0].shape[0]
    features, tokens = data_t.shape
    with torch.cuda.device_of(x):
        quantize_both_kernel[grid(tokens, features)](
            x,
            *out,
            *counters,
            *groups,
            x.shape[0],
            features,
            num_groups,
            *x.stride(),
            scale.stride(1),
            tokens,
            scale_t.stride(1),
            max(eps, AMAX_FLOOR),
            POW2=pow2,
            STICKY=capability == FP16_CAPABILITY,
            ERROR_BIT=QUANTIZE_OFFSETS,
            GROUPS=triton.next_power_of_2(max(1, num_groups)),
            TILE=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
