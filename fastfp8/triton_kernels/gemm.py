"""The dense FP8 GEMM with fine-grained scales, in Triton: for every GPU that the CUDA C++ kernel does not serve.

A row's bits do not depend on M, because nothing that decides them does: the tile along K is always 128, products are
promoted once a k-block in ascending order, the segments of K are those of the CUDA kernel, and every tile of the table
below reaches the same tensor-core instruction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _C
from ..layout import BLOCK, Block, ceil_div
from . import require_fp8

# Row tiles that share their columns of b in the L2 cache.
GROUP_M = 8


class GemmTile(NamedTuple):
    """A tile of the output, and how its kernel is compiled."""

    m: int
    n: int
    num_warps: int
    num_stages: int


# Below 64 rows, sm_90 would get mma.sync of FP16 in place of wgmma, whose accumulator has other bits. Three stages of
# the large tile fit the 99 KiB of shared memory that sm_89 and sm_120 have. Untuned.
SMALL_M_TILE = GemmTile(64, 64, 4, 4)
LARGE_M_TILE = GemmTile(128, 128, 8, 3)


def tile_for(m: int) -> GemmTile:
    return SMALL_M_TILE if m <= 64 else LARGE_M_TILE


@triton.jit
def tile_at(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The tile (row, column) of a program: GROUP_M rows of tiles at a time, column after column."""
    group_tiles = GROUP_M * tiles_n
    first_m = program // group_tiles * GROUP_M
    group_rows = tl.minimum(tiles_m - first_m, GROUP_M)
    in_group = program % group_tiles
    return first_m + in_group % group_rows, in_group // group_rows


@triton.jit
def product(
    a_tile,
    b_tile,
    a_factor,
    b_factor,
    m_inside,
    n_inside,
    K,
    a_scale_k_stride,
    b_scale_k_stride,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """A tile [TILE_M, TILE_N] of the product in FP32: all of K, as every kernel here must walk it for equal bits.

    Args:
        a_tile: pointers to the first k-block of codes, [TILE_M, TILE_K]; b_tile likewise, [TILE_K, TILE_N].
        a_factor: pointers to the scales of that k-block, [TILE_M]; b_factor likewise, [TILE_N].
        m_inside: which rows to read, [TILE_M]; n_inside likewise, [TILE_N]. The others are never read.
        SEGMENTS: how many sums of their own, added in ascending order, K is cut into.
    """
    k = tl.arange(0, TILE_K)
    blocks = tl.cdiv(K, TILE_K)
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for segment in range(SEGMENTS):
        acc = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k_block in range(blocks * segment // SEGMENTS, blocks * (segment + 1) // SEGMENTS):
            k_inside = k < K - k_block * TILE_K
            a_codes = tl.load(a_tile, mask=m_inside[:, None] & k_inside[None, :], other=0.0)
            b_codes = tl.load(b_tile, mask=n_inside[None, :] & k_inside[:, None], other=0.0)
            a_factors = tl.load(a_factor, mask=m_inside, other=0.0)
            b_factors = tl.load(b_factor, mask=n_inside, other=0.0)
            acc = tl.fma(a_factors[:, None] * b_factors[None, :], tl.dot(a_codes, b_codes), acc)
            a_tile += TILE_K
            b_tile += TILE_K
            a_factor += a_scale_k_stride
            b_factor += b_scale_k_stride
        total = tl.where(segment == 0, acc, total + acc)
    return total


@triton.jit(do_not_specialize=["M", "a_scale_k_stride"])
def gemm_kernel(
    a,
    a_scale,
    b,
    b_scale,
    c,
    out,
    M,
    N,
    K,
    a_row_stride,
    b_row_stride,
    c_row_stride,
    a_scale_m_stride,
    a_scale_k_stride,
    b_scale_n_stride,
    b_scale_k_stride,
    B_BLOCK_ROWS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    # One tile, or where there are fewer programs than tiles every so manieth.
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_at(tile, tiles_m, tiles_n, GROUP_M)
        m = tile_m.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
        n = tile_n.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
        k = tl.arange(0, TILE_K)
        m_inside, n_inside = m < M, n < N
        a_tile = a + m[:, None] * a_row_stride + k[None, :]
        b_tile = b + n[None, :] * b_row_stride + k[:, None]
        a_factor = a_scale + m * a_scale_m_stride
        b_factor = b_scale + n // B_BLOCK_ROWS * b_scale_n_stride

        total = product(
            a_tile,
            b_tile,
            a_factor,
            b_factor,
            m_inside,
            n_inside,
            K,
            a_scale_k_stride,
            b_scale_k_stride,
            TILE_M,
            TILE_N,
            TILE_K,
            SEGMENTS,
        )
        inside = m_inside[:, None] & n_inside[None, :]
        if c is not None:
            total += tl.load(c + m[:, None] * c_row_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=inside)


def gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_block: Block,
    out_dtype: torch.dtype,
    c: Tensor | None,
    num_sms: int | None = None,
) -> Tensor:
    """See :func:`fastfp8.gemm`; arguments are checked already."""
    require_fp8("gemm", a.device)
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    tile = tile_for(m)
    tiles = ceil_div(m, tile.m) * ceil_div(n, tile.n)
    with torch.cuda.device_of(a):
        gemm_kernel[(tiles if num_sms is None else min(tiles, num_sms),)](
            a,
            a_scale,
            b,
            b_scale,
            c,
            out,
            m,
            n,
            k,
            a.stride(0),
            b.stride(0),
            0 if c is None else c.stride(0),
            *a_scale.stride(),
            *b_scale.stride(),
            B_BLOCK_ROWS=b_block[0],
            TILE_M=tile.m,
            TILE_N=tile.n,
            TILE_K=BLOCK,
            GROUP_M=GROUP_M,
            SEGMENTS=len(_C.gemm_segments(n, k, b_block)) - 1,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
    return out
