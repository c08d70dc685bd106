"""Grouped GEMMs in Triton, one kernel for both ops: for every GPU that the CUDA C++ kernel does not serve.

A masked stack [G, M, K] is one tall matrix to the kernel, of which only some rows are in a group: the first of each M.
A row's bits are those of the dense kernel, whose walk over K this one shares. How many rows each group has is known
on the device alone, so the grid has a program for every tile that there could be; those without one exit at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _C
from ..error_word import COUNTS, OFFSETS
from ..layout import BLOCK, ceil_div, row_pitch
from . import require_fp8
from .gemm import GROUP_M, GemmTile, product, tile_at, tile_for


@triton.jit
def larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def rows_of_groups(sizes, error, M, groups, MASKED: tl.constexpr, ERROR_BIT: tl.constexpr, GROUPS: tl.constexpr):
    """Lane by lane the first row of each group and the row at which it ends. Lanes past the last group hold any rows.

    Offsets and counts are brought into range here, before any address depends on them, and reported if that was needed.
    """
    lane = tl.arange(0, GROUPS)
    given = tl.load(sizes + lane, mask=lane < groups, other=0)
    limited = tl.minimum(tl.maximum(given, 0), M)
    if MASKED:
        used = limited
        starts = lane.to(tl.int64) * M
        ends = starts + used
    else:
        # min(T, max(0, the largest so far)): of what is given, and of what comes before it.
        used = tl.associative_scan(limited, 0, larger)
        before = tl.load(sizes + lane - 1, mask=(lane > 0) & (lane < groups), other=0)
        starts = tl.associative_scan(tl.minimum(tl.maximum(before, 0), M), 0, larger).to(tl.int64)
        ends = used.to(tl.int64)
    if error is not None and tl.program_id(0) == 0:
        changed = tl.sum(((used != given) & (lane < groups)).to(tl.int32), 0)
        tl.atomic_or(error, ERROR_BIT, mask=changed > 0)
    return starts, ends


@triton.jit
def tile_of_groups(starts, ends, tile, GROUPS: tl.constexpr, TILE_M: tl.constexpr):
    """The group of row tile ``tile``, its first row, the row at which its group ends, and the first tile of each group.

    If there is no such tile, the group is none of those that there are: it may be that of a lane past the last.
    """
    lane = tl.arange(0, GROUPS)
    tiles = (ends - starts + TILE_M - 1) // TILE_M
    tiles_before = tl.cumsum(tiles, 0) - tiles
    group = tl.sum((tiles_before + tiles <= tile).to(tl.int32), 0)
    mine = lane == group
    row = tl.sum(tl.where(mine, starts + (tile - tiles_before) * TILE_M, 0), 0)
    return group, row, tl.sum(tl.where(mine, ends, 0), 0), tiles_before


@triton.jit
def rows_of_tile(
    sizes,
    error,
    tile,
    M,
    groups,
    MASKED: tl.constexpr,
    ERROR_BIT: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """The group of row tile ``tile``, its first row and the row at which its group ends, of sizes as they are given."""
    starts, ends = rows_of_groups(sizes, error, M, groups, MASKED, ERROR_BIT, GROUPS)
    group, row, end, _ = tile_of_groups(starts, ends, tile, GROUPS, TILE_M)
    return group, row, end


@triton.jit(do_not_specialize=["M", "a_scale_k_stride"])
def grouped_gemm_kernel(
    a,
    a_scale,
    b,
    b_scale,
    sizes,
    error,
    out,
    M,
    N,
    K,
    groups,
    a_row_stride,
    b_row_stride,
    a_scale_k_stride,
    MASKED: tl.constexpr,
    ERROR_BIT: tl.constexpr,
    GROUPS: tl.constexpr,
    B_BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """M is T of offsets, and the rows that each group has room for of counts (MASKED)."""
    tiles_n = tl.cdiv(N, TILE_N)
    tile_m, tile_n = tile_at(tl.program_id(0), tl.num_programs(0) // tiles_n, tiles_n, GROUP_M)
    group, row, end = rows_of_tile(sizes, error, tile_m, M, groups, MASKED, ERROR_BIT, GROUPS, TILE_M)
    if group >= groups:
        return

    m = row + tl.arange(0, TILE_M)
    n = tile_n.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    m_inside, n_inside = m < end, n < N
    b_row = group.to(tl.int64) * N + n
    b_scale_row = group.to(tl.int64) * tl.cdiv(N, B_BLOCK) + n // B_BLOCK
    total = product(
        a + m[:, None] * a_row_stride + k[None, :],
        b + b_row[None, :] * b_row_stride + k[:, None],
        a_scale + m,
        b_scale + b_scale_row * tl.cdiv(K, B_BLOCK),
        m_inside,
        n_inside,
        K,
        a_scale_k_stride,
        1,
        TILE_M,
        TILE_N,
        TILE_K,
        SEGMENTS,
    )
    inside = m_inside[:, None] & n_inside[None, :]
    tl.store(out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=inside)


def grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """See :func:`fastfp8.grouped_gemm`; arguments are checked already."""
    require_fp8("grouped_gemm", a.device)
    rows, groups = a.shape[0], b.shape[0]
    out = torch.empty((rows, b.shape[1]), dtype=out_dtype, device=a.device)
    tile = tile_for(ceil_div(rows, groups))
    # Each group that is not empty may end with a tile of a single row.
    tiles_m = (rows + min(groups, rows) * (tile.m - 1)) // tile.m
    _launch(a, a_scale, b, b_scale, offsets, error, out, tile, tiles_m, masked=False)
    return out


def masked_grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    counts: Tensor,
    error: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """See :func:`fastfp8.masked_grouped_gemm`; arguments are checked already."""
    require_fp8("masked_grouped_gemm", a.device)
    groups, rows = a.shape[:2]
    out = torch.empty((groups, rows, b.shape[1]), dtype=out_dtype, device=a.device)
    tile = tile_for(rows)
    _launch(a, a_scale, b, b_scale, counts, error, out, tile, groups * ceil_div(rows, tile.m), masked=True)
    return out


def _launch(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    sizes: Tensor,
    error: Tensor | None,
    out: Tensor,
    tile: GemmTile,
    tiles_m: int,
    *,
    masked: bool,
) -> None:
    """A program for each of ``tiles_m`` rows of tiles and each column of them."""
    if out.numel() == 0:
        return
    groups, n, k = b.shape
    with torch.cuda.device_of(a):
        grouped_gemm_kernel[(tiles_m * ceil_div(n, tile.n),)](
            a,
            a_scale,
            b,
            b_scale,
            sizes,
            error,
            out,
            a.shape[-2],
            n,
            k,
            groups,
            row_pitch(a),
            row_pitch(b),
            a_scale.stride(-1),
            MASKED=masked,
            ERROR_BIT=COUNTS if masked else OFFSETS,
            GROUPS=triton.next_power_of_2(groups),
            B_BLOCK=BLOCK,
            TILE_M=tile.m,
            TILE_N=tile.n,
            TILE_K=BLOCK,
            GROUP_M=GROUP_M,
            SEGMENTS=len(_C.gemm_segments(n, k, (BLOCK, BLOCK))) - 1,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
