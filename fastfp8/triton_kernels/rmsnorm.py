"""RMSNorm with quantisation in Triton, its gradients, and the normalised input once more, transposed.

A program of the forward kernel has whole rows, and of backward one row at a time, that stay in registers between the
sum over a row and its use: each input is read once. Rows longer than ``LONGEST`` are taken in chunks of that many
columns and read twice. The bits are the same, for a chunk is a subtree of the sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import BLOCK, Block, ceil_div, empty_scale, empty_transposed, pad16, scale_shape_of
from ..reference.quantize import AMAX_FLOOR
from ..reference.rmsnorm import reciprocal_rms, rows_together
from . import require_fp8
from .counters import count
from .pairwise import pairwise_sum
from .quantize import FP16_CAPABILITY, finite_magnitude, scale_and_multiplier, to_e4m3
from .quantize_both import grid, store_transposed
from .requantize_transpose import NUM_WARPS

_BLOCK: Block = (1, BLOCK)
# The most columns of a row that registers hold, a power of two from 128 on: 16384 would spill with a residual (seen
# with Triton 3.9).
LONGEST = 8192
# Of a forward tile with shorter rows. A thread has 16 values. Untuned.
_TILE, _VALUES = 4096, 16
# A program walks along so many tiles that there are 256 of them, and 16 at most: it reads the weight once. Untuned.
_PROGRAMS, _MOST_STEPS = 256, 16
# Rows whose scales fill a sector of 32 bytes.
_KEPT = 8
# Of the columns that a program adds up at the end of backward. Untuned.
_SUM_COLS, _SUM_WARPS = 32, 8


class Chunks(NamedTuple):
    """How a row is cut: into how many chunks, and the columns of each, a power of two."""

    number: int
    cols: int

    @property
    def padded(self) -> int:
        return int(triton.next_power_of_2(self.number))


def chunks_of(cols: int) -> Chunks:
    width = min(LONGEST, max(BLOCK, triton.next_power_of_2(cols)))
    return Chunks(ceil_div(cols, width), width)


@triton.jit
def normalized(given, rstd, weight):
    """What is quantised."""
    return given.to(tl.float32) * rstd * weight.to(tl.float32)


@triton.jit
def row_sums(values, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """The sums [ROWS] of ``values`` [ROWS * BLOCKS, WIDTH], where the blocks of a row lie one below the other."""
    return pairwise_sum(tl.reshape(pairwise_sum(values, ROWS * BLOCKS, WIDTH), [ROWS, BLOCKS]), ROWS, BLOCKS)


@triton.jit
def columns(block, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Those of ``block`` [., 1], of which a thread takes ``VECTOR`` at a time: see :func:`.tile_indices`."""
    return tl.max_contiguous(block * WIDTH + tl.arange(0, WIDTH)[None, :], [1, VECTOR])


@triton.jit
def load_input(
    x,
    residual,
    row,
    block,
    end,
    cols,
    x_row_stride,
    x_col_stride,
    residual_row_stride,
    residual_col_stride,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """What is normalised: ``x``, or its sum with ``residual``, in the dtype of that; each block as below."""
    col = columns(block, WIDTH, VECTOR)
    inside = (row < end) & (col < cols)
    far = col.to(tl.int64)  # because an element's offset may need 64 bits
    given = tl.load(x + row * x_row_stride + far * x_col_stride, mask=inside, other=0.0)
    if residual is not None:
        at = residual + row * residual_row_stride + far * residual_col_stride
        added = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if given.dtype == tl.bfloat16 and residual.dtype.element_ty == tl.float16:
            # By its bits: of a conversion LLVM would make a sum in float16, where 70000 - 10000 is infinite.
            wide = (given.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            wide = given.to(tl.float32)
        given = (wide + added).to(residual.dtype.element_ty)
    return given


@triton.jit
def store_normalized(
    given,
    factor,
    gain,
    data,
    summed,
    row,
    block,
    end,
    cols,
    floor,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    counters=None,
):
    """Normalise and quantise blocks, each at its ``row`` and its ``block`` of columns, [., 1]. Returns their scales."""
    col = columns(block, WIDTH, VECTOR)
    inside = (row < end) & (col < cols)
    if summed is not None:
        tl.store(summed + row * cols + col, given, mask=inside)
    values = normalized(given, factor, gain)
    block_scale, multiplier = scale_and_multiplier(tl.max(finite_magnitude(values), 1, keep_dims=True), floor, POW2)
    count(counters, values, multiplier, inside)
    tl.store(data + row * cols + col, to_e4m3(values * multiplier, STICKY), mask=inside)
    return block_scale


@triton.jit
def store_scale(scale, block_scale, row, block, end, cols, scale_pitch, WIDTH: tl.constexpr):
    in_scale = (row < end) & (block * WIDTH < cols)
    tl.store(scale + row + block.to(tl.int64) * scale_pitch, block_scale, mask=in_scale)


@triton.jit
def store_rstd(rstd, sums, first, end, length, eps, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """From sums [ROWS]. Returns what each block of these rows is multiplied by, [ROWS * BLOCKS, 1]."""
    found = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(sums, length) + eps))
    row = first + tl.arange(0, ROWS)
    tl.store(rstd + row, found, mask=row < end)
    return tl.reshape(tl.broadcast_to(tl.reshape(found, [ROWS, 1]), [ROWS, BLOCKS]), [ROWS * BLOCKS, 1])


@triton.jit(do_not_specialize=["rows", "steps", "scale_pitch"])
def rmsnorm_quantize_kernel(
    x,
    residual,
    weight,
    data,
    scale,
    rstd,
    summed,
    counters,
    rows,
    cols,
    steps,
    length,
    eps,
    x_row_stride,
    x_col_stride,
    residual_row_stride,
    residual_col_stride,
    scale_pitch,
    floor,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    KEPT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program has ``steps`` tiles of ROWS x BLOCKS blocks, those of a row one below the other in a tile.

    ``length`` is ``cols`` as a float. The scales of KEPT tiles, of one row if there are several, are written together,
    for those of a row lie far from each other.
    """
    tl.static_assert(KEPT == 1 or ROWS == 1, "scales are kept for tiles of one row")
    lane = tl.arange(0, ROWS * BLOCKS)[:, None]
    row_of_tile, block = lane // BLOCKS, lane % BLOCKS
    lanes = tl.arange(0, WIDTH)[None, :]
    start = tl.program_id(0).to(tl.int64) * steps * ROWS
    end = tl.minimum(start + steps * ROWS, rows)
    strides = (x_row_stride, x_col_stride, residual_row_stride, residual_col_stride)
    if CHUNKS == 1:
        gain = tl.load(weight + block * WIDTH + lanes, mask=block * WIDTH + lanes < cols, other=0.0)
        given = load_input(x, residual, start + row_of_tile, block, end, cols, *strides, WIDTH, VECTOR)
        kept, place = tl.zeros([ROWS * BLOCKS, KEPT], tl.float32), tl.arange(0, KEPT)[None, :]
        for step in range(steps):
            first = start + step * ROWS
            row = first + row_of_tile
            # Under way while this tile is summed.
            following = load_input(x, residual, row + ROWS, block, end, cols, *strides, WIDTH, VECTOR)
            sums = row_sums(given.to(tl.float32) * given.to(tl.float32), ROWS, BLOCKS, WIDTH)
            factor = store_rstd(rstd, sums, first, end, length, eps, ROWS, BLOCKS)
            found = store_normalized(
                given, factor, gain, data, summed, row, block, end, cols, floor, POW2, STICKY, WIDTH, VECTOR, counters
            )
            kept = tl.where(place == step % KEPT, found, kept)
            if (step % KEPT == KEPT - 1) | (step == steps - 1):
                rows_kept = row - step % KEPT + place
                store_scale(scale, kept, rows_kept, block, tl.minimum(first + ROWS, end), cols, scale_pitch, WIDTH)
            given = following
    else:
        for step in range(steps):
            first = start + step * ROWS
            row = first + row_of_tile
            parts = tl.zeros([ROWS, PARTS], tl.float32)
            for chunk in range(CHUNKS):
                values = load_input(x, residual, row, chunk * BLOCKS + block, end, cols, *strides, WIDTH, VECTOR)
                squares = values.to(tl.float32) * values.to(tl.float32)
                part = tl.reshape(row_sums(squares, ROWS, BLOCKS, WIDTH), [ROWS, 1])
                parts = tl.where(tl.arange(0, PARTS)[None, :] == chunk, part, parts)
            factor = store_rstd(rstd, pairwise_sum(parts, ROWS, PARTS), first, end, length, eps, ROWS, BLOCKS)
            for chunk in range(CHUNKS):
                at = chunk * BLOCKS + block
                values = load_input(x, residual, row, at, end, cols, *strides, WIDTH, VECTOR)
                gain = tl.load(weight + at * WIDTH + lanes, mask=at * WIDTH + lanes < cols, other=0.0)
                found = store_normalized(
                    values, factor, gain, data, summed, row, at, end, cols, floor, POW2, STICKY, WIDTH, VECTOR, counters
                )
                store_scale(scale, found, row, at, end, cols, scale_pitch, WIDTH)


@triton.jit(do_not_specialize=["T", "scale_t_pitch"])
def rmsnorm_quantize_transpose_kernel(
    x,
    weight,
    rstd,
    data_t,
    scale_t,
    counters,
    T,
    cols,
    x_row_stride,
    x_col_stride,
    pitch_t,
    scale_t_pitch,
    floor,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
    TILE: tl.constexpr,
):
    """Tiles as those of :mod:`.quantize_both`."""
    across = tl.cdiv(cols, TILE)
    tile, k_block = tl.program_id(0) // across, (tl.program_id(0) % across).to(tl.int64)
    row = tile.to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # see tile_indices
    col = tl.max_contiguous(k_block * TILE + tl.arange(0, TILE), VECTOR)[None, :]
    inside = (row < T) & (col < cols)
    given = tl.load(x + row * x_row_stride + col * x_col_stride, mask=inside, other=0.0)
    factor = tl.load(rstd + row, mask=row < T, other=0.0)
    values = normalized(given, factor, tl.load(weight + col, mask=col < cols, other=0.0))
    values = tl.where(inside, values, 0.0)  # a weight may be infinite
    to = (data_t, scale_t, tile, col, cols, pitch_t, scale_t_pitch)
    store_transposed(values, finite_magnitude(values), *to, floor, POW2, STICKY, TILE, counters, inside, VECTOR)


@triton.jit
def load_gradient(grad, x, row, col, end, cols, grad_row_stride, grad_col_stride, x_row_stride, x_col_stride):
    inside, far = (row < end) & (col < cols), col.to(tl.int64)
    g = tl.load(grad + row * grad_row_stride + far * grad_col_stride, mask=inside, other=0.0)
    return g, tl.load(x + row * x_row_stride + far * x_col_stride, mask=inside, other=0.0)


@triton.jit
def store_gradient(dx, residual_grad, weighted, normed, mean, rstd, row, col, cols, row_stride, col_stride):
    """The strides are those of ``residual_grad``."""
    out = (weighted - normed * mean) * rstd
    if residual_grad is not None:
        at = residual_grad + row * row_stride + col.to(tl.int64) * col_stride
        out += tl.load(at, mask=col < cols, other=0.0).to(tl.float32)
    tl.store(dx + row * cols + col, out.to(dx.dtype.element_ty), mask=col < cols)


@triton.jit(do_not_specialize=["rows", "together"])
def rmsnorm_backward_kernel(
    grad,
    x,
    weight,
    rstd,
    residual_grad,
    dx,
    sums,
    rows,
    cols,
    together,
    length,
    grad_row_stride,
    grad_col_stride,
    x_row_stride,
    x_col_stride,
    residual_row_stride,
    residual_col_stride,
    COLS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A program has ``together`` rows, one after the other, and adds up what they give of the weight's gradient."""
    first = tl.program_id(0).to(tl.int64) * together
    end = tl.minimum(first + together, rows)
    lane, zero = tl.arange(0, COLS)[None, :], tl.zeros([1, 1], tl.int64)
    strides = (grad_row_stride, grad_col_stride, x_row_stride, x_col_stride)
    residual_strides = (residual_row_stride, residual_col_stride)
    sums += tl.program_id(0).to(tl.int64) * cols
    if CHUNKS == 1:
        # One dimension less: left among the others, Triton would have a thread take 32 bytes of FP32 at a time, by two
        # instructions, each of which touches every sector and takes half of it.
        flat = tl.arange(0, COLS)
        factor = tl.reshape(tl.load(weight + flat, mask=flat < cols, other=0.0), [1, COLS])
        total = tl.zeros([1, COLS], tl.float32)
        g, given = load_gradient(grad, x, first + zero, lane, end, cols, *strides)
        for i in range((end - first).to(tl.int32)):
            row = first + i + zero
            # Under way while this row is summed.
            next_g, next_given = load_gradient(grad, x, row + 1, lane, end, cols, *strides)
            r = tl.load(rstd + row)
            normed, weighted = given.to(tl.float32) * r, g.to(tl.float32) * factor.to(tl.float32)
            total += g.to(tl.float32) * normed
            mean = tl.div_rn(tl.reshape(pairwise_sum(weighted * normed, 1, COLS) + 0.0, [1, 1]), length)
            store_gradient(dx, residual_grad, weighted, normed, mean, r, row, lane, cols, *residual_strides)
            g, given = next_g, next_given
        tl.store(sums + flat, tl.reshape(total, [COLS]), mask=flat < cols)
    else:
        for i in range((end - first).to(tl.int32)):
            row = first + i + zero
            r = tl.load(rstd + row)
            parts = tl.zeros([1, PARTS], tl.float32)
            for chunk in range(CHUNKS):
                col = chunk * COLS + lane
                g, given = load_gradient(grad, x, row, col, end, cols, *strides)
                factor = tl.load(weight + col, mask=col < cols, other=0.0)
                products = g.to(tl.float32) * factor.to(tl.float32) * (given.to(tl.float32) * r)
                part = tl.reshape(pairwise_sum(products, 1, COLS), [1, 1])
                parts = tl.where(tl.arange(0, PARTS)[None, :] == chunk, part, parts)
            mean = tl.div_rn(tl.reshape(pairwise_sum(parts, 1, PARTS) + 0.0, [1, 1]), length)
            for chunk in range(CHUNKS):
                col = chunk * COLS + lane
                g, given = load_gradient(grad, x, row, col, end, cols, *strides)
                factor = tl.load(weight + col, mask=col < cols, other=0.0)
                normed, weighted = given.to(tl.float32) * r, g.to(tl.float32) * factor.to(tl.float32)
                store_gradient(dx, residual_grad, weighted, normed, mean, r, row, col, cols, *residual_strides)
                # The sums of so many columns are kept in memory.
                before = tl.load(sums + col, mask=(col < cols) & (row > first), other=0.0)
                tl.store(sums + col, before + g.to(tl.float32) * normed, mask=col < cols)


@triton.jit(do_not_specialize=["parts"])
def sum_rows_kernel(sums, out, parts, cols, PARTS: tl.constexpr, COLS: tl.constexpr):
    """``out`` [cols]: the pairwise sums over the rows of ``sums`` [parts, cols]."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[:, None]
    part = tl.arange(0, PARTS)[None, :]
    values = tl.load(sums + part.to(tl.int64) * cols + col, mask=(part < parts) & (col < cols), other=0.0)
    tl.store(out + col, tl.reshape(pairwise_sum(values, COLS, PARTS), [COLS, 1]), mask=col < cols)


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    pow2: bool,
    amax_floor: float,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.rmsnorm_quantize`; arguments are checked already. Without ``residual`` the last has no row."""
    capability = require_fp8("rmsnorm_quantize", x.device)
    rows, cols = x.shape
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = empty_scale(x, scale_shape_of(x.shape, _BLOCK), _BLOCK)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    like = x if residual is None else residual
    given = torch.empty((0 if residual is None else rows, cols), dtype=like.dtype, device=x.device)
    if x.numel() == 0:
        return data, scale, rstd.fill_(reciprocal_rms(torch.zeros(()), cols, eps).item()), given
    chunks = chunks_of(cols)
    tile_rows = max(1, _TILE // chunks.cols)
    steps = max(1, min(_MOST_STEPS, rows // (tile_rows * _PROGRAMS)))
    with torch.cuda.device_of(x):
        rmsnorm_quantize_kernel[(ceil_div(rows, tile_rows * steps),)](
            x,
            residual,
            weight,
            data,
            scale,
            rstd,
            None if residual is None else given,
            counters,
            rows,
            cols,
            steps,
            float(cols),
            eps,
            *x.stride(),
            *((0, 0) if residual is None else residual.stride()),
            scale.stride(1),
            max(amax_floor, AMAX_FLOOR),
            POW2=pow2,
            STICKY=capability == FP16_CAPABILITY,
            ROWS=tile_rows,
            BLOCKS=chunks.cols // BLOCK,
            WIDTH=BLOCK,
            CHUNKS=chunks.number,
            PARTS=chunks.padded,
            KEPT=1 if tile_rows > 1 or steps == 1 else _KEPT,
            VECTOR=16 // max(x.element_size(), like.element_size()),
            num_warps=tile_rows * chunks.cols // _VALUES // 32,
            enable_fp_fusion=False,
        )
    return data, scale, rstd, given


def rmsnorm_quantize_transpose(
    x: Tensor, weight: Tensor, rstd: Tensor, pow2: bool, amax_floor: float, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.rmsnorm_quantize_transpose`; arguments are checked already. Padded to 16 tokens."""
    capability = require_fp8("rmsnorm_quantize_transpose", x.device)
    data_t, scale_t = empty_transposed(x, x.shape[1], pad16(x.shape[0]))
    if x.numel() == 0:
        return data_t, scale_t
    features, tokens = data_t.shape
    with torch.cuda.device_of(x):
        rmsnorm_quantize_transpose_kernel[grid(tokens, features)](
            x,
            weight,
            rstd,
            data_t,
            scale_t,
            counters,
            x.shape[0],
            features,
            *x.stride(),
            tokens,
            scale_t.stride(1),
            max(amax_floor, AMAX_FLOOR),
            POW2=pow2,
            STICKY=capability == FP16_CAPABILITY,
            TILE=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return data_t, scale_t


def rmsnorm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.rmsnorm_backward`; arguments are checked already."""
    rows, cols = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros(cols, dtype=torch.float32, device=x.device)
    chunks, together = chunks_of(cols), rows_together(rows)
    parts = ceil_div(rows, together)
    sums = torch.empty((parts, cols), dtype=torch.float32, device=x.device)
    dweight = torch.empty(cols, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        rmsnorm_backward_kernel[(parts,)](
            grad,
            x,
            weight,
            rstd,
            residual_grad,
            dx,
            sums,
            rows,
            cols,
            together,
            float(cols),
            *grad.stride(),
            *x.stride(),
            *((0, 0) if residual_grad is None else residual_grad.stride()),
            COLS=chunks.cols,
            CHUNKS=chunks.number,
            PARTS=chunks.padded,
            num_warps=max(1, chunks.cols // _VALUES // 32),
            enable_fp_fusion=False,
        )
        sum_rows_kernel[(ceil_div(cols, _SUM_COLS),)](
            sums,
            dweight,
            parts,
            cols,
            PARTS=triton.next_power_of_2(parts),
            COLS=_SUM_COLS,
            num_warps=_SUM_WARPS,
            enable_fp_fusion=False,
        )
    return dx, dweight
