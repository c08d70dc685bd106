"""The product of gate and up, SwiGLU and quantisation in Triton: for every GPU that the CUDA C++ kernel does not serve.

A program has the tile of gate and that of up, one block of the result wide. Dense, all rows are one group.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..error_word import SWIGLU_OFFSETS
from ..layout import BLOCK, Block, empty_scale, row_pitch, scale_shape
from ..reference.quantize import AMAX_FLOOR
from . import require_fp8
from .activation import swiglu
from .counters import count
from .gemm import GROUP_M, GemmTile, product, tile_at
from .grouped_gemm import rows_of_tile
from .quantize import FP16_CAPABILITY, finite_magnitude, scale_and_multiplier, to_e4m3

_BLOCK: Block = (1, BLOCK)
# Gate's tile waits in registers while up's is summed: of 128 rows, a thread would spill 176 bytes on sm_90. Untuned.
TILE = GemmTile(64, BLOCK, 8, 4)


@triton.jit(do_not_specialize=["M", "a_scale_k_stride", "scale_col_stride"])
def gemm_swiglu_quantize_kernel(
    a,
    a_scale,
    b,
    b_scale,
    offsets,
    error,
    weight,
    data,
    scale,
    gate_up,
    counters,
    M,
    F,
    K,
    groups,
    a_row_stride,
    b_row_stride,
    a_scale_k_stride,
    weight_stride,
    scale_col_stride,
    limit,
    floor,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
    ERROR_BIT: tl.constexpr,
    GROUPS: tl.constexpr,
    B_BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``offsets`` is None of a dense product, ``gate_up`` and ``counters`` where they are
    not asked for. F is a multiple of TILE_N."""
    tl.static_assert(TILE_N == B_BLOCK, "a tile is one block wide, of scales of b and of the result")
    tiles_n = F // TILE_N
    tile_m, tile_n = tile_at(tl.program_id(0), tl.num_programs(0) // tiles_n, tiles_n, GROUP_M)
    if offsets is not None:
        group, row, end = rows_of_tile(offsets, error, tile_m, M, groups, False, ERROR_BIT, GROUPS, TILE_M)
        if group >= groups:
            return
    else:
        group, row, end = 0, tile_m.to(tl.int64) * TILE_M, M

    m = row + tl.arange(0, TILE_M)
    n = tile_n.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    m_inside, n_inside = m < end, n < F
    inside = m_inside[:, None] & n_inside[None, :]
    a_tile = a + m[:, None] * a_row_stride + k[None, :]
    for half in tl.static_range(2):
        b_row = n + (2 * group + half).to(tl.int64) * F if offsets is not None else n + half * F
        total = product(
            a_tile,
            b + b_row[None, :] * b_row_stride + k[:, None],
            a_scale + m,
            b_scale + b_row // B_BLOCK * tl.cdiv(K, B_BLOCK),
            m_inside,
            n_inside,
            K,
            a_scale_k_stride,
            1,
            TILE_M,
            TILE_N,
            TILE_K,
            1,
        )
        rounded = total.to(tl.bfloat16)
        if gate_up is not None:
            tl.store(gate_up + m[:, None] * (2 * F) + half * F + n[None, :], rounded, mask=inside)
        if half == 0:
            gate = rounded
        else:
            up = rounded

    factor = None
    if weight is not None:
        factor = tl.load(weight + m * weight_stride, mask=m_inside, other=0.0)[:, None]
    values = swiglu(gate.to(tl.float32), up.to(tl.float32), factor, limit)
    amax = tl.max(finite_magnitude(values), 1, keep_dims=True)
    block_scale, multiplier = scale_and_multiplier(amax, floor, POW2)
    count(counters, values, multiplier, inside)
    tl.store(data + m[:, None] * F + n[None, :], to_e4m3(values * multiplier, STICKY), mask=inside)
    tl.store(scale + m[:, None] + tile_n.to(tl.int64) * scale_col_stride, block_scale, mask=m_inside[:, None])


def gemm_swiglu_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor | None,
    error: Tensor | None,
    weight: Tensor | None,
    limit: float | None,
    pow2: bool,
    eps: float,
    return_gate_up: bool,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.gemm_swiglu_quantize`; arguments are checked already."""
    capability = require_fp8("gemm_swiglu_quantize", a.device)
    (rows, k), f = a.shape, b.shape[-2] // 2
    data = torch.empty((rows, f), dtype=torch.float8_e4m3fn, device=a.device)
    scale = empty_scale(a, scale_shape(rows, f, _BLOCK), _BLOCK)
    gate_up = torch.empty((rows if return_gate_up else 0, 2 * f), dtype=torch.bfloat16, device=a.device)
    if data.numel() == 0:
        return data, scale, gate_up
    groups = 1 if offsets is None else b.shape[0]
    # Each group that is not empty may end with a tile of a single row.
    tiles_m = (rows + min(groups, rows) * (TILE.m - 1)) // TILE.m
    with torch.cuda.device_of(a):
        gemm_swiglu_quantize_kernel[(tiles_m * (f // TILE.n),)](
            a,
            a_scale,
            b,
            b_scale,
            offsets,
            None if offsets is None else error,
            weight,
            data,
            scale,
            gate_up if return_gate_up else None,
            counters,
            rows,
            f,
            k,
            groups,
            row_pitch(a),
            row_pitch(b),
            a_scale.stride(-1),
            0 if weight is None else weight.stride(0),
            scale.stride(1),
            math.inf if limit is None else limit,
            max(eps, AMAX_FLOOR),
            POW2=pow2,
            STICKY=capability == FP16_CAPABILITY,
            ERROR_BIT=SWIGLU_OFFSETS,
            GROUPS=triton.next_power_of_2(groups),
            B_BLOCK=BLOCK,
            TILE_M=TILE.m,
            TILE_N=TILE.n,
            TILE_K=BLOCK,
            GROUP_M=GROUP_M,
            num_warps=TILE.num_warps,
            num_stages=TILE.num_stages,
            enable_fp_fusion=False,
        )
    return data, scale, gate_up
