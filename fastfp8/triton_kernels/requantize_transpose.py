"""Requantisation of an FP8 matrix along its other dimension, in Triton: tiles and groups of :mod:`.quantize_both`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..error_word import REQUANTIZE_OFFSETS
from ..layout import BLOCK, empty_transposed, grouped_tokens, pad16
from ..reference.quantize import AMAX_FLOOR
from . import require_fp8
from .quantize import FP16_CAPABILITY, finite_magnitude
from .quantize_both import grid, store_transposed, tokens_of_tile

# 64 values a thread. Untuned.
NUM_WARPS = 8


@triton.jit(do_not_specialize=["T", "scale_pitch", "scale_t_pitch"])
def requantize_transpose_kernel(
    data,
    scale,
    data_t,
    scale_t,
    counters,
    offsets,
    error,
    ends_t,
    T,
    cols,
    groups,
    data_row_stride,
    data_col_stride,
    scale_pitch,
    pitch_t,
    scale_t_pitch,
    FLOOR: tl.constexpr,
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
    col = k_block * TILE + tl.arange(0, TILE)[None, :]
    inside = (row < end) & (col < cols)
    codes = tl.load(data + row * data_row_stride + col * data_col_stride, mask=inside, other=0.0)
    factor = tl.load(scale + row + k_block * scale_pitch, mask=row < end, other=0.0)
    values = codes.to(tl.float32) * factor
    magnitude = finite_magnitude(values)
    to = (data_t, scale_t, tile, col, cols, pitch_t, scale_t_pitch)
    store_transposed(values, magnitude, *to, FLOOR, True, STICKY, TILE, counters, inside)


def requantize_transpose(data: Tensor, scale: Tensor, counters: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.requantize_transpose`; arguments are checked already. Padded to 16 tokens."""
    capability = require_fp8("requantize_transpose", data.device)
    out = empty_transposed(data, data.shape[1], pad16(data.shape[0]))
    if data.numel():
        _launch(data, scale, out, counters, (None, None, None), capability)
    return out


def requantize_grouped_transpose(
    data: Tensor, scale: Tensor, offsets: Tensor, error: Tensor | None, counters: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.requantize_transpose`; arguments are checked already."""
    capability = require_fp8("requantize_transpose", data.device)
    out = empty_transposed(data, data.shape[1], grouped_tokens(data.shape[0], offsets.shape[0]))
    ends_t = torch.empty_like(offsets)
    _launch(data, scale, out, counters, (offsets, error, ends_t), capability)
    return *out, ends_t


def _launch(
    data: Tensor,
    scale: Tensor,
    out: tuple[Tensor, Tensor],
    counters: Tensor | None,
    groups: tuple[Tensor | None, Tensor | None, Tensor | None],
    capability: tuple[int, int] | None,
) -> None:
    """``groups`` are offsets, error word and the ends of groups in the transpose."""
    data_t, scale_t = out
    num_groups = 0 if groups[0] is None else groups[0].shape[0]
    features, tokens = data_t.shape
    with torch.cuda.device_of(data):
        requantize_transpose_kernel[grid(tokens, features)](
            data,
            scale,
            *out,
            counters,
            *groups,
            data.shape[0],
            features,
            num_groups,
            *data.stride(),
            scale.stride(1),
            tokens,
            scale_t.stride(1),
            FLOOR=AMAX_FLOOR,
            STICKY=capability == FP16_CAPABILITY,
            ERROR_BIT=REQUANTIZE_OFFSETS,
            GROUPS=triton.next_power_of_2(max(1, num_groups)),
            TILE=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
