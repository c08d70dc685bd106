"""Grouped Wgrad in Triton: for every GPU that the CUDA C++ kernel does not serve.

Groups lie along the summed dimension, each in k-blocks of its own, so a tile's bits are those of the dense kernel on
those k-blocks alone, whose walk over K this one shares. Every group has the same tiles of the output, hence the grid
needs no size of any; how many k-blocks a tile has is known on the device alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..error_word import TOKEN_OFFSETS
from ..layout import BLOCK, ceil_div
from . import require_fp8
from .gemm import GROUP_M, product, tile_at, tile_for
from .grouped_gemm import larger


@triton.jit
def tokens_of_group(offsets, error, group, T, groups, ERROR_BIT: tl.constexpr, GROUPS: tl.constexpr):
    """Where ``group`` begins, and the token at which it or the one before it ends, whichever is later.

    Offsets are brought into range here, before any address depends on them, and reported if that was needed.
    """
    lane = tl.arange(0, GROUPS)
    given = tl.load(offsets + lane, mask=lane < groups, other=0)
    # min(T, max(0, the largest so far)).
    ends = tl.associative_scan(tl.minimum(tl.maximum(given, 0), T), 0, larger)
    if error is not None and tl.program_id(0) == 0:
        changed = tl.sum(((ends != given) & (lane < groups)).to(tl.int32), 0)
        tl.atomic_or(error, ERROR_BIT, mask=changed > 0)
    return tl.max(tl.where(lane < group, ends, 0), 0), tl.max(tl.where(lane == group, ends, 0), 0)


@triton.jit(do_not_specialize=["grad_scale_t_stride", "input_scale_t_stride"])
def grouped_wgrad_kernel(
    grad_t,
    grad_t_scale,
    input_t,
    input_t_scale,
    offsets,
    error,
    out,
    N,
    K,
    T,
    groups,
    grad_row_stride,
    input_row_stride,
    grad_scale_t_stride,
    input_scale_t_stride,
    ACCUMULATE: tl.constexpr,
    ERROR_BIT: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_T: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_n, tiles_k = tl.cdiv(N, TILE_N), tl.cdiv(K, TILE_K)
    tiles = tiles_n * tiles_k
    group = tl.program_id(0) // tiles
    tile_n, tile_k = tile_at(tl.program_id(0) % tiles, tiles_n, tiles_k, GROUP_M)
    before, end = tokens_of_group(offsets, error, group, T, groups, ERROR_BIT, GROUPS)
    first_block = tl.cdiv(before, TILE_T).to(tl.int64)
    begin = first_block * TILE_T
    tokens = tl.minimum(tl.cdiv(end, TILE_T) * TILE_T, T) - begin.to(tl.int32)
    if ACCUMULATE and tokens <= 0:
        return

    n = tile_n.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    k = tile_k.to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    t = begin + tl.arange(0, TILE_T)
    n_inside, k_inside = n < N, k < K
    total = product(
        grad_t + n[:, None] * grad_row_stride + t[None, :],
        input_t + k[None, :] * input_row_stride + t[:, None],
        grad_t_scale + n + first_block * grad_scale_t_stride,
        input_t_scale + k + first_block * input_scale_t_stride,
        n_inside,
        k_inside,
        tokens,
        grad_scale_t_stride,
        input_scale_t_stride,
        TILE_N,
        TILE_K,
        TILE_T,
        1,
    )
    inside = n_inside[:, None] & k_inside[None, :]
    to = out + (group.to(tl.int64) * N + n)[:, None] * K + k[None, :]
    if ACCUMULATE:
        total += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


def grouped_wgrad(
    grad_t: Tensor,
    grad_t_scale: Tensor,
    input_t: Tensor,
    input_t_scale: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> None:
    """See :func:`fastfp8.grouped_wgrad`; arguments are checked already."""
    require_fp8("grouped_wgrad", grad_t.device)
    if out.numel() == 0:
        return
    (groups, n, k), tokens = out.shape, grad_t.shape[1]
    tile = tile_for(n)
    with torch.cuda.device_of(grad_t):
        grouped_wgrad_kernel[(groups * ceil_div(n, tile.m) * ceil_div(k, tile.n),)](
            grad_t,
            grad_t_scale,
            input_t,
            input_t_scale,
            offsets,
            error,
            out,
            n,
            k,
            tokens,
            groups,
            grad_t.stride(0),
            input_t.stride(0),
            grad_t_scale.stride(1),
            input_t_scale.stride(1),
            ACCUMULATE=accumulate,
            ERROR_BIT=TOKEN_OFFSETS,
            GROUPS=triton.next_power_of_2(groups),
            TILE_N=tile.m,
            TILE_K=tile.n,
            TILE_T=BLOCK,
            GROUP_M=GROUP_M,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
