"""Token rows to the rows of their experts and back, in Triton.

The rows are found by a counting sort in three launches: entries per expert in each block of entries, a scan of these
counts, and the place of each entry among the equals of its block. No atomic decides an order, and nothing waits for the
host. An entry is a (token, k) in row-major order; one without an expert is in the bin behind the last expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..error_word import TOPK_IDX
from ..layout import BLOCK, Block, ceil_div, empty_scale, scale_shape
from ..reference.permute import DOT_LANES
from ..reference.quantize import AMAX_FLOOR
from . import TILES, require_fp8, tile_indices
from .counters import count
from .pairwise import pairwise_sum
from .quantize import FP16_CAPABILITY, finite_magnitude, scale_and_multiplier, to_e4m3

_BLOCK: Block = (1, BLOCK)
# Entries that a program sorts, those that it compares them with at a time, and elements of counts that the scan takes
# at a time. Untuned.
_ENTRIES, _COMPARED, _SCANNED = 512, 16, 4096


@triton.jit
def bins_of(topk_idx, entry, entries, experts):
    given = tl.load(topk_idx + entry, mask=entry < entries, other=-1)
    return tl.where((given >= 0) & (given < experts), given, experts).to(tl.int32)


@triton.jit(do_not_specialize=["entries"])
def count_kernel(
    topk_idx, counts, error, entries, experts, ERROR_BIT: tl.constexpr, ENTRIES: tl.constexpr, BINS: tl.constexpr
):
    """``counts`` [blocks, BINS]."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    bins = bins_of(topk_idx, entry, entries, experts)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), tl.histogram(bins, BINS))
    if error is not None:
        given = tl.load(topk_idx + entry, mask=entry < entries, other=-1)
        bad = (bins == experts) & (given != -1)
        tl.atomic_or(error, ERROR_BIT, mask=tl.sum(bad.to(tl.int32), 0) > 0)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(counts, starts, offsets, blocks, experts, BINS: tl.constexpr, BLOCKS: tl.constexpr):
    """``starts`` [blocks, BINS]: the row of the first entry of each block in each expert. A single program."""
    lane = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)[:, None]
        total += tl.sum(tl.load(counts + block * BINS + lane[None, :], mask=block < blocks, other=0), 0)
    total = tl.where(lane < experts, total, 0)
    ends = tl.cumsum(total, 0)
    tl.store(offsets + lane, ends, mask=lane < experts)
    start = ends - total
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)[:, None]
        of_block = tl.load(counts + block * BINS + lane[None, :], mask=block < blocks, other=0)
        before = tl.cumsum(of_block, 0) - of_block
        tl.store(starts + block * BINS + lane[None, :], start[None, :] + before, mask=block < blocks)
        start += tl.sum(of_block, 0)


@triton.jit(do_not_specialize=["entries"])
def place_kernel(
    topk_idx,
    starts,
    offsets,
    rows,
    slots,
    entries,
    experts,
    ENTRIES: tl.constexpr,
    COMPARED: tl.constexpr,
    BINS: tl.constexpr,
):
    first = tl.program_id(0) * ENTRIES
    entry = first + tl.arange(0, ENTRIES)
    bins = bins_of(topk_idx, entry, entries, experts)
    rank = tl.zeros([ENTRIES], tl.int32)
    for other in range(0, ENTRIES, COMPARED):
        other_entry = first + other + tl.arange(0, COMPARED)
        other_bins = bins_of(topk_idx, other_entry, entries, experts)
        before = (other_bins[None, :] == bins[:, None]) & (other_entry[None, :] < entry[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    used = bins < experts  # of entries, for the lanes behind them have no expert
    row = tl.load(starts + tl.program_id(0) * BINS + bins) + rank
    tl.store(rows + entry, tl.where(used, row, -1), mask=entry < entries)
    tl.store(slots + row, entry, mask=used)
    filled = tl.load(offsets + experts - 1)
    tl.store(slots + entry, tl.full([ENTRIES], -1, tl.int32), mask=(entry >= filled) & (entry < entries))


@triton.jit
def entries_of(at, token, tokens, top_k, other, TOP_K: tl.constexpr):
    """What tokens [TILE_ROWS, 1] have for each k [TILE_ROWS, TOP_K], read once, in whole sectors."""
    k = tl.arange(0, TOP_K)[None, :]
    return tl.load(at + token * top_k + k, mask=(token < tokens) & (k < top_k), other=other)


@triton.jit
def entry(entries, k, TOP_K: tl.constexpr):
    """Column ``k`` of ``entries`` [TILE_ROWS, TOP_K], bit for bit."""
    bits = entries.to(tl.int32, bitcast=True)
    column = tl.sum(tl.where(tl.arange(0, TOP_K)[None, :] == k, bits, 0), 1, keep_dims=True)
    return column.to(entries.dtype, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "x_scale_stride", "out_scale_stride"])
def permute_kernel(
    x,
    x_scale,
    rows,
    out,
    out_scale,
    counters,
    tokens,
    cols,
    top_k,
    x_row_stride,
    x_col_stride,
    x_scale_stride,
    out_scale_stride,
    floor,
    QUANTIZE: tl.constexpr,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    """Each element is read once and written to every row of its token. Scales are made, moved, or there are none."""
    token, col, _, block_col = tile_indices(cols, x, TILE_ROWS, TILE_COLS, 1, TILE_COLS)
    inside = (token < tokens) & (col < cols)
    values = tl.load(x + token * x_row_stride + col * x_col_stride, mask=inside, other=0)
    if QUANTIZE:
        values = values.to(tl.float32)
        amax = tl.max(finite_magnitude(values), 1, keep_dims=True)
        scale, multiplier = scale_and_multiplier(amax, floor, POW2)
        count(counters, values, multiplier, inside)
        values = to_e4m3(values * multiplier, STICKY)
    elif x_scale is not None:
        scale = tl.load(x_scale + token + block_col * x_scale_stride, mask=token < tokens, other=0.0)
    to = entries_of(rows, token, tokens, top_k, -1, TOP_K)
    for k in range(top_k):
        row = entry(to, k, TOP_K).to(tl.int64)
        used = (row >= 0) & (row < tokens * top_k)
        tl.store(out + row * cols + col, values, mask=used & (col < cols))
        if out_scale is not None:
            tl.store(out_scale + row + block_col * out_scale_stride, scale, mask=used)


@triton.jit(do_not_specialize=["tokens", "y_scale_stride"])
def unpermute_kernel(
    y,
    y_scale,
    rows,
    weights,
    out,
    tokens,
    cols,
    top_k,
    y_row_stride,
    y_col_stride,
    y_scale_stride,
    TOP_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    token, col, _, block_col = tile_indices(cols, out, TILE_ROWS, TILE_COLS, 1, TILE_COLS)
    inside = (token < tokens) & (col < cols)
    total = tl.zeros([TILE_ROWS, TILE_COLS], tl.float32)
    at = entries_of(rows, token, tokens, top_k, -1, TOP_K)
    if weights is not None:
        factors = entries_of(weights, token, tokens, top_k, 0.0, TOP_K)
    for k in range(top_k):
        row = entry(at, k, TOP_K).to(tl.int64)
        used = (row >= 0) & (row < tokens * top_k)
        values = tl.load(y + row * y_row_stride + col * y_col_stride, mask=used & inside, other=0.0).to(tl.float32)
        if y_scale is not None:
            values *= tl.load(y_scale + row + block_col * y_scale_stride, mask=used, other=0.0)
        if weights is not None:
            values *= entry(factors, k, TOP_K)
        total = tl.where(used, total + values, total)
    tl.store(out + token * cols + col, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def unpermute_backward_kernel(
    grad,
    y,
    rows,
    weights,
    grad_y,
    grad_weights,
    tokens,
    cols,
    top_k,
    grad_row_stride,
    grad_col_stride,
    y_row_stride,
    y_col_stride,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program a token: it reads the token's gradient once for all of its rows."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, TOP_K)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    in_top_k = k < top_k
    row = tl.load(rows + token * top_k + k, mask=in_top_k, other=-1).to(tl.int64)
    used = (row >= 0) & (row < tokens * top_k)
    weight = tl.load(weights + token * top_k + k, mask=in_top_k, other=0.0)
    total = tl.zeros([TOP_K, LANES], tl.float32)
    for first in range(0, cols, LANES):
        col = (first + lane).to(tl.int64)
        inside = used & (col < cols)
        given = tl.load(grad + token * grad_row_stride + col * grad_col_stride, mask=col < cols, other=0.0)
        given = given.to(tl.float32)
        value = tl.load(y + row * y_row_stride + col * y_col_stride, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_y + row * cols + col, (given * weight).to(grad_y.dtype.element_ty), mask=inside)
        total += tl.where(inside, given * value, 0.0)
    sums = tl.reshape(pairwise_sum(total, TOP_K, LANES), [TOP_K, 1])
    tl.store(grad_weights + token * top_k + k, sums, mask=in_top_k)


def row_map(topk_idx: Tensor, num_experts: int, error: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.row_map`; arguments are checked already."""
    entries, device = topk_idx.numel(), topk_idx.device
    rows = torch.empty(topk_idx.shape, dtype=torch.int32, device=device)
    slots = torch.empty(entries, dtype=torch.int32, device=device)
    if entries == 0:
        return torch.zeros(num_experts, dtype=torch.int32, device=device), rows, slots
    offsets = torch.empty(num_experts, dtype=torch.int32, device=device)
    bins, blocks = triton.next_power_of_2(num_experts + 1), ceil_div(entries, _ENTRIES)
    counts, starts = (torch.empty((blocks, bins), dtype=torch.int32, device=device) for _ in range(2))
    options = {"BINS": bins, "enable_fp_fusion": False}
    sort = {"ENTRIES": _ENTRIES, "num_warps": 4, **options}
    with torch.cuda.device_of(topk_idx):
        count_kernel[(blocks,)](topk_idx, counts, error, entries, num_experts, ERROR_BIT=TOPK_IDX, **sort)
        scanned = max(1, _SCANNED // bins)
        scan_kernel[(1,)](counts, starts, offsets, blocks, num_experts, BLOCKS=scanned, num_warps=8, **options)
        arguments = (topk_idx, starts, offsets, rows, slots, entries, num_experts)
        place_kernel[(blocks,)](*arguments, COMPARED=_COMPARED, **sort)
    return offsets, rows, slots


def _permute(
    x: Tensor,
    x_scale: Tensor | None,
    rows: Tensor,
    out: Tensor,
    out_scale: Tensor | None,
    quantize: tuple[bool, float, bool] | None = None,
    counters: Tensor | None = None,
) -> None:
    """``quantize`` is pow2, eps, and whether the conversion needs a sticky bit."""
    tokens, cols = x.shape
    if out.numel() == 0:
        return
    tile = TILES[_BLOCK]
    pow2, eps, sticky = quantize or (False, 0.0, False)
    with torch.cuda.device_of(x):
        permute_kernel[tile.grid(tokens, cols)](
            x,
            x_scale,
            rows,
            out,
            out_scale,
            counters,
            tokens,
            cols,
            rows.shape[1],
            *x.stride(),
            0 if x_scale is None else x_scale.stride(1),
            0 if out_scale is None else out_scale.stride(1),
            max(eps, AMAX_FLOOR),
            QUANTIZE=quantize is not None,
            POW2=pow2,
            STICKY=sticky,
            TOP_K=triton.next_power_of_2(rows.shape[1]),
            TILE_ROWS=tile.rows,
            TILE_COLS=tile.cols,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )


def permute(x: Tensor, rows: Tensor) -> Tensor:
    """See :func:`fastfp8.permute`; arguments are checked already."""
    out = torch.empty((rows.numel(), x.shape[1]), dtype=x.dtype, device=x.device)
    _permute(x, None, rows, out, None)
    return out


def _empty_scaled(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    shape = (rows.numel(), x.shape[1])
    data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    return data, empty_scale(data, scale_shape(*shape, _BLOCK), _BLOCK)


def permute_scaled(x: Tensor, x_scale: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.permute`; arguments are checked already."""
    data, scale = _empty_scaled(x, rows)
    _permute(x.view(torch.uint8), x_scale, rows, data.view(torch.uint8), scale)
    return data, scale


def permute_quantize(
    x: Tensor, rows: Tensor, pow2: bool, eps: float, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.permute_quantize`; arguments are checked already."""
    capability = require_fp8("permute_quantize", x.device)
    data, scale = _empty_scaled(x, rows)
    _permute(x, None, rows, data, scale, (pow2, eps, capability == FP16_CAPABILITY), counters)
    return data, scale


def unpermute(
    y: Tensor, y_scale: Tensor | None, rows: Tensor, weights: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """See :func:`fastfp8.unpermute`; arguments are checked already."""
    if y_scale is not None:
        require_fp8("unpermute", y.device)
    (tokens, top_k), cols = rows.shape, y.shape[1]
    out = torch.empty((tokens, cols), dtype=out_dtype, device=y.device)
    if out.numel() == 0:
        return out
    tile = TILES[_BLOCK]
    with torch.cuda.device_of(y):
        unpermute_kernel[tile.grid(tokens, cols)](
            y,
            y_scale,
            rows,
            weights,
            out,
            tokens,
            cols,
            top_k,
            *y.stride(),
            0 if y_scale is None else y_scale.stride(1),
            TOP_K=triton.next_power_of_2(top_k),
            TILE_ROWS=tile.rows,
            TILE_COLS=tile.cols,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return out


def unpermute_backward(grad: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.ops.permute.unpermute_backward`; arguments are checked already."""
    (tokens, top_k), cols = rows.shape, y.shape[1]
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    grad_weights = torch.empty((tokens, top_k), dtype=torch.float32, device=y.device)
    if tokens == 0:
        return grad_y, grad_weights
    with torch.cuda.device_of(y):
        unpermute_backward_kernel[(tokens,)](
            grad,
            y,
            rows,
            weights,
            grad_y,
            grad_weights,
            tokens,
            cols,
            top_k,
            *grad.stride(),
            *y.stride(),
            TOP_K=triton.next_power_of_2(top_k),
            LANES=DOT_LANES,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return grad_y, grad_weights
