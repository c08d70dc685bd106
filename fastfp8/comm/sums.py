"""The arithmetic of combine and of its backward on one rank, bit for bit as ``fastfp8/reference/comm.py`` has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import ceil_div
from ..reference.pairwise import pairwise_sum
from ..reference.permute import DOT_LANES
from ..reference.tensor_core import fma as sure_fma

# Elements worked on at a time: temporaries stay in the cache.
_CHUNK = 1 << 18
# The bits of a double beyond FP32's where it lies half way between two FP32; FP32's smallest normal number.
_TIE, _NORMAL = 1 << 28, 2.0**-126


def _fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """``x * y + z`` of FP32 with one rounding: ``x`` and ``z`` [R, C], contiguous, ``y`` [R, 1].

    In double the product is exact and the sum is rounded to 53 bits, which a second rounding to FP32's 24 does not
    notice, unless that double is a tie or FP32 has fewer bits there. Those few are computed anew.
    """
    total = x.double().mul_(y).add_(z)
    out = total.float()
    unsure = total.view(torch.int64).bitwise_and_(2 * _TIE - 1) == _TIE
    small = out.abs() <= _NORMAL
    if small.any():
        # A sum that is rounded to 0 was exact: of two FP32 so close to each other no bit is beyond a double's.
        unsure |= small & (out != 0)
    at = unsure.view(-1).nonzero()[:, 0]
    if at.numel():
        out.view(-1)[at] = sure_fma(x.view(-1)[at], y[at // x.shape[1], 0], z.view(-1)[at])
    return out


def rank_partials(rows: Tensor, row_of: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """The first sum: over the slots of each copy that have a row here.

    Args:
        rows: bfloat16 [capacity, H].
        row_of: int32 [copies, top_k]: the row of each slot, or -1.
        weights: float32 [capacity], one for each row, or None for 1.
        out: bfloat16 [copies, H], written.
    """
    step = max(1, _CHUNK // out.shape[1])
    for first in range(0, out.shape[0], step):
        chunk = row_of[first : first + step].long()
        acc = torch.zeros((chunk.shape[0], out.shape[1]), device=out.device)
        for of_slot in chunk.unbind(1):
            used = (of_slot >= 0).nonzero()[:, 0]
            at = of_slot[used]
            values = rows[at].float()
            acc[used] = acc[used] + values if weights is None else _fma(values, weights[at, None], acc[used])
        out[first : first + step] = acc


def node_sums(partials: Tensor, token: Tensor, counts: list[int], ranks_per_node: int, out: Tensor) -> None:
    """The second and the third sum, on the rank that sent the tokens.

    A sum from 0 is never -0, so that nodes and ranks without the token, which add nothing or 0, leave its bits alone.

    Args:
        partials: bfloat16 [copies, H], by rank.
        token: int64 [copies]: their tokens; no two of a rank are equal.
        counts: copies of each rank.
        ranks_per_node: of ``counts``.
        out: bfloat16 [T, H], written.
    """
    total = torch.zeros(out.shape, device=out.device)
    of_rank = list(zip(torch.split(token, counts), torch.split(partials, counts), strict=True))
    for first in range(0, len(of_rank), ranks_per_node):
        node_sum = torch.zeros(out.shape, device=out.device)
        for tokens, sums in of_rank[first : first + ranks_per_node]:
            node_sum[tokens] += sums.float()
        total += node_sum.bfloat16().float()
    out.copy_(total)


def row_gradients(
    dys: Tensor, rows: Tensor, copy_of: Tensor, weights: Tensor, grad_rows: Tensor, grad_weights: Tensor
) -> None:
    """The gradients of a weighted combine with respect to each row and its weight.

    Args:
        dys: bfloat16 [copies, H]: the gradient of the token of each copy that came.
        rows: bfloat16 [capacity, H]: what was combined.
        copy_of: int64 [rows in use]: the copy of each row.
        weights: float32 [capacity].
        grad_rows: bfloat16 [capacity, H], written where a row is in use.
        grad_weights: float32 [capacity], the same.
    """
    cols = rows.shape[1]
    step = max(1, _CHUNK // cols)
    for first in range(0, copy_of.numel(), step):
        chunk = slice(first, min(first + step, copy_of.numel()))
        dy = dys[copy_of[chunk]].float()
        grad_rows[chunk] = dy * weights[chunk, None]
        products = F.pad(dy * rows[chunk].float(), (0, -cols % DOT_LANES))
        lanes = torch.zeros((dy.shape[0], DOT_LANES), device=dy.device)
        for part in range(ceil_div(cols, DOT_LANES)):
            lanes += products[:, part * DOT_LANES : (part + 1) * DOT_LANES]
        grad_weights[chunk] = pairwise_sum(lanes)
