"""Packing to E5M6, unpacking and requantisation to E4M3, in Triton.

A tile is [rows, columns / 8, 8], so that the eight codes of three words lie along its last axis, in one thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import BLOCK, ceil_div, empty_scale, scale_shape
from ..packed_e5m6 import group_of, words_shape
from ..reference.e5m6 import E5M6_MAX
from ..reference.quantize import AMAX_FLOOR
from . import TILES, require_fp8
from .counters import count
from .quantize import FP16_CAPABILITY, finite_magnitude, scale_and_multiplier, to_e4m3

# Rows of a tile of 128 columns, where each 128 of them or each row has its scale. Untuned.
PACK_ROWS, ROW_ROWS, NUM_WARPS = 16, 4, 4
# With 4 a thread of sm_100 spills registers.
REQUANTIZE_WARPS = 8


@triton.jit
def to_codes(values):
    """The codes (uint32) of FP32 values of at most 65024 or infinite, as fastfp8/reference/e5m6.py states them."""
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0xFFFF + ((magnitude >> 17) & 1)) >> 17) - 7168
    # FP32 numbers from 8 to 16 are 2^-20 apart, as subnormal codes are: adding 8 rounds to a code.
    subnormal = (tl.abs(values) + 8.0).to(tl.uint32, bitcast=True) - 0x41000000
    codes = tl.where(magnitude < 0x38800000, subnormal, normal)
    codes = tl.where(magnitude == 0x7F800000, 0x7C0, codes) | ((bits >> 20) & 0x800)
    return tl.where(magnitude > 0x7F800000, 0x7E0, codes)


@triton.jit
def word_of(codes, k, WORD: tl.constexpr):
    """Word ``WORD`` of three: the bits of codes [.., .., 8] that lie in it. ``k`` [1, 1, 8] counts codes."""
    # The last bit of code k is bit 84 - 12 k of the 96, counted from the lowest of the last word.
    up = 84 - 12 * k - 32 * (2 - WORD)
    left = tl.where((up >= 0) & (up < 32), codes << (up & 31), 0)
    right = tl.where((up < 0) & (up > -12), codes >> (-up & 31), 0)
    return tl.sum(left | right, 2)


@triton.jit
def load_tile(x, row, start, rows, cols, x_row_stride, x_col_stride, COLS: tl.constexpr):
    """FP32 values [ROWS, COLS / 8, 8] of the rows ``row`` [ROWS, 1, 1] from column ``start`` on; zeros outside."""
    col = start + tl.arange(0, COLS // 8)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    inside = (row < rows) & (col < cols)
    return tl.load(x + row * x_row_stride + col * x_col_stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def row_amax(values):
    """The amax of each row [ROWS, 1, 1] of a tile [ROWS, COLS / 8, 8]."""
    return tl.max(tl.max(finite_magnitude(values), 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def words_of(words, row, start, rows, words_cols, COLS: tl.constexpr):
    """Where the words [ROWS, COLS / 8, 4] of a tile are, and which of them exist: of each four the first three.

    With the fourth, lanes that lie side by side have words that do: whole sectors, where a load or store of every third
    word would touch them all and take a third of each.
    """
    group, which = start // 8 + tl.arange(0, COLS // 8)[None, :, None], tl.arange(0, 4)[None, None, :]
    at = words + row * words_cols + group * 3 + which
    return at, (row < rows) & (group * 3 < words_cols) & (which < 3)


@triton.jit
def pack_tile(values, words, multiplier, row, start, rows, words_cols, COLS: tl.constexpr):
    """Pack a tile [ROWS, COLS / 8, 8]. ``multiplier`` is [ROWS, 1, 1]."""
    codes, k = to_codes(values * multiplier), tl.arange(0, 8)[None, None, :]
    w0, w1, w2 = word_of(codes, k, 0), word_of(codes, k, 1), word_of(codes, k, 2)
    packed = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w1)), [values.shape[0], COLS // 8, 4])
    at, inside = words_of(words, row, start, rows, words_cols, COLS)
    tl.store(at, packed.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def pack_e5m6_kernel(
    x,
    words,
    scale,
    rows,
    cols,
    x_row_stride,
    x_col_stride,
    scale_pitch,
    words_cols,
    floor,
    LARGEST: tl.constexpr,
    POW2: tl.constexpr,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    across = 1 if PER_ROW else tl.cdiv(cols, COLS)
    tile = tl.program_id(0) // across
    block = (tl.program_id(0) % across).to(tl.int64)
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    values = load_tile(x, row, block * COLS, rows, cols, x_row_stride, x_col_stride, COLS)
    amax = row_amax(values)
    if PER_ROW:
        for start in range(COLS, cols, COLS):
            amax = tl.maximum(amax, row_amax(load_tile(x, row, start, rows, cols, x_row_stride, x_col_stride, COLS)))
    row_scale, multiplier = scale_and_multiplier(amax, floor, POW2, LARGEST)
    tl.store(scale + row + block * scale_pitch, row_scale, mask=row < rows)
    pack_tile(values, words, multiplier, row, block * COLS, rows, words_cols, COLS)
    if PER_ROW:
        for start in range(COLS, cols, COLS):
            values = load_tile(x, row, start, rows, cols, x_row_stride, x_col_stride, COLS)
            pack_tile(values, words, multiplier, row, start, rows, words_cols, COLS)


@triton.jit
def unpack_tile(words, factor, row, start, rows, words_cols, COLS: tl.constexpr):
    """The FP32 values [ROWS, COLS] of the rows ``row`` [ROWS, 1] from column ``start`` on; zeros outside."""
    at, inside = words_of(words, tl.reshape(row, [row.shape[0], 1, 1]), start, rows, words_cols, COLS)
    packed = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    even, odd = tl.split(tl.reshape(packed, [row.shape[0], COLS // 8, 2, 2]))
    w0, w2 = tl.split(even.to(tl.uint64))
    w1, _ = tl.split(odd.to(tl.uint64))
    # 48 bits each, which are four codes.
    high, low = ((w0 << 16) | (w1 >> 16))[:, :, None], (((w1 & 0xFFFF) << 32) | w2)[:, :, None]
    k = tl.arange(0, 8)[None, None, :]
    half = tl.where(k < 4, high, low) >> (36 - 12 * (k % 4)).to(tl.uint64)
    # A code is a float16 without its last four bits.
    codes = ((half & 0xFFF) << 4).to(tl.uint16).to(tl.float16, bitcast=True)
    values = tl.reshape(codes.to(tl.float32), [row.shape[0], COLS])
    return values * factor


@triton.jit
def unpack_e5m6_kernel(
    words,
    scale,
    out,
    rows,
    cols,
    words_cols,
    scale_pitch,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    across = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    start = (tl.program_id(0) % across).to(tl.int64) * COLS
    factor = tl.load(scale + row + (0 if PER_ROW else start // 128) * scale_pitch, mask=row < rows, other=0.0)
    values = unpack_tile(words, factor, row, start, rows, words_cols, COLS)
    col = start + tl.arange(0, COLS)[None, :]
    tl.store(out + row * cols + col, values.to(out.dtype.element_ty), mask=(row < rows) & (col < cols))


@triton.jit
def requantize_e5m6_kernel(
    words,
    scale,
    data,
    data_scale,
    counters,
    rows,
    cols,
    words_cols,
    scale_pitch,
    data_scale_pitch,
    floor,
    PER_ROW: tl.constexpr,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    across = tl.cdiv(cols, COLS)
    block = (tl.program_id(0) // across).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    start = (tl.program_id(0) % across).to(tl.int64) * COLS
    # Each twice, so that they are no fewer than the threads. A load of fewer Triton takes for cheap: it would do it
    # again in the layout in which it stores the scales, and compute all values in that layout too.
    twice = scale + row + (0 if PER_ROW else start // 128) * scale_pitch + 0 * tl.arange(0, 2)[None, :]
    factor, _ = tl.split(tl.load(twice, mask=(row < rows) & (tl.arange(0, 2)[None, :] < 2), other=0.0))
    values = unpack_tile(words, factor[:, None], row, start, rows, words_cols, COLS)
    col = start + tl.arange(0, COLS)[None, :]
    amax = tl.max(finite_magnitude(values), 0, keep_dims=True)
    block_scale, multiplier = scale_and_multiplier(amax, floor, POW2)
    codes, inside = to_e4m3(values * multiplier, STICKY), (row < rows) & (col < cols)
    tl.store(data + row * cols + col, codes, mask=inside)
    count(counters, values, multiplier, inside)
    tl.store(data_scale + block * data_scale_pitch + col, block_scale, mask=col < cols)


def pack_e5m6(x: Tensor, pow2: bool, eps: float, per_row: bool) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.pack_e5m6`; arguments are checked already."""
    rows, cols = x.shape
    words = torch.empty(words_shape(rows, cols), dtype=torch.int32, device=x.device)
    scale = empty_scale(x, scale_shape(rows, cols, group_of(cols, per_row)), (1, BLOCK))
    if x.numel() == 0:
        return words, scale
    tile_rows = ROW_ROWS if per_row else PACK_ROWS
    with torch.cuda.device_of(x):
        pack_e5m6_kernel[(ceil_div(rows, tile_rows) * (1 if per_row else scale.shape[1]),)](
            x,
            words,
            scale,
            rows,
            cols,
            *x.stride(),
            scale.stride(1),
            words.shape[1],
            max(eps, AMAX_FLOOR),
            LARGEST=E5M6_MAX,
            POW2=pow2,
            PER_ROW=per_row,
            ROWS=tile_rows,
            COLS=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return words, scale


def unpack_e5m6(words: Tensor, scale: Tensor, cols: int, per_row: bool, dtype: torch.dtype) -> Tensor:
    """See :func:`fastfp8.unpack_e5m6`; arguments are checked already."""
    rows = words.shape[0]
    out = torch.empty((rows, cols), dtype=dtype, device=words.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(words):
        unpack_e5m6_kernel[(ceil_div(rows, PACK_ROWS) * ceil_div(cols, BLOCK),)](
            words,
            scale,
            out,
            rows,
            cols,
            words.shape[1],
            scale.stride(1),
            PER_ROW=per_row,
            ROWS=PACK_ROWS,
            COLS=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return out


def requantize_e5m6(
    words: Tensor, scale: Tensor, cols: int, per_row: bool, pow2: bool, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.requantize_e5m6`; arguments are checked already."""
    capability = require_fp8("requantize_e5m6", words.device)
    rows = words.shape[0]
    data = torch.empty((rows, cols), dtype=torch.float8_e4m3fn, device=words.device)
    data_scale = empty_scale(words, scale_shape(rows, cols, (BLOCK, 1)), (BLOCK, 1))
    if data.numel() == 0:
        return data, data_scale
    tile = TILES[BLOCK, 1]
    with torch.cuda.device_of(words):
        requantize_e5m6_kernel[tile.grid(rows, cols)](
            words,
            scale,
            data,
            data_scale,
            counters,
            rows,
            cols,
            words.shape[1],
            scale.stride(1),
            data_scale.stride(0),
            AMAX_FLOOR,
            PER_ROW=per_row,
            POW2=pow2,
            STICKY=capability == FP16_CAPABILITY,
            ROWS=tile.rows,
            COLS=tile.cols,
            num_warps=REQUANTIZE_WARPS,
            enable_fp_fusion=False,
        )
    return data, data_scale
