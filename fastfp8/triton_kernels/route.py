"""The gate of a mixture of experts in Triton: a program takes a few tokens from logits to weights.

An affinity is ranked by one 64-bit integer, which orders as the value does and among equal ones as the index falls. So
a maximum names its expert, ties are broken by definition, and what has been taken is given the least integer there is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import ceil_div
from ..reference import route as reference
from .activation import exp
from .pairwise import pairwise_sum

LEAST_SUM = tl.constexpr(reference.LEAST_SUM)
# Below the rank of any value, minus infinity too.
TAKEN = tl.constexpr(-(1 << 63))
INDEX_MASK = tl.constexpr((1 << 31) - 1)
# Affinities that a program holds, and its warps. Untuned.
_TILE, _WARPS = 1024, 4


@triton.jit
def magnitude_flipped(bits):
    """Between the bits of FP32 and integers that order as the values do: its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def rank(values, index, inside):
    """Of FP32 ``values``, NaN as minus infinity; TAKEN where not ``inside``. No sum here is -0, which ranks below 0."""
    values = tl.where(values == values, values, float("-inf"))
    order = magnitude_flipped(values.to(tl.int32, bitcast=True)).to(tl.int64)
    return tl.where(inside, (order << 32) | (index ^ INDEX_MASK).to(tl.int64), TAKEN)


@triton.jit
def value_of(ranks):
    return magnitude_flipped((ranks >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(ranks):
    return (ranks & INDEX_MASK) ^ INDEX_MASK


@triton.jit
def affinity(x, most, total, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        return tl.div_rn(exp(x - most), total)
    return tl.div_rn(1.0, exp(-x) + 1.0)


@triton.jit
def softmax_parts(logits, experts, in_tokens, col_stride, TILE: tl.constexpr, EXPERTS: tl.constexpr):
    """The largest logit of each token and the sum of the exponentials; ``logits`` are pointers [TILE, 1]."""
    expert = tl.arange(0, EXPERTS)[None, :]
    inside = in_tokens & (expert < experts)
    x = tl.load(logits + expert.to(tl.int64) * col_stride, mask=inside, other=float("-inf")).to(tl.float32)
    most = tl.max(tl.where(x == x, x, float("-inf")), 1, keep_dims=True)
    total = pairwise_sum(tl.where(expert < experts, exp(x - most), 0.0), TILE, EXPERTS)
    return tl.reshape(most, [TILE, 1, 1]), tl.reshape(total, [TILE, 1, 1])


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits,
    bias,
    topk_idx,
    topk_weights,
    scores,
    load,
    tokens,
    experts,
    groups,
    top_k,
    top_groups,
    row_stride,
    col_stride,
    scale,
    SOFTMAX: tl.constexpr,
    LIMITED: tl.constexpr,
    TILE: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Tiles [TILE, GROUPS, SIZE] of affinities: experts in their groups, each padded to a power of two."""
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    in_tokens = token < tokens
    most, total = 0.0, 1.0
    if SOFTMAX:
        first = logits + token[:, None] * row_stride
        most, total = softmax_parts(first, experts, in_tokens[:, None], col_stride, TILE, EXPERTS)

    size = experts // groups
    group = tl.arange(0, GROUPS)[None, :]
    within = tl.arange(0, SIZE)[None, None, :]
    expert = group[:, :, None] * size + within
    in_experts = (group[:, :, None] < groups) & (within < size)
    inside = in_tokens[:, None, None] & in_experts
    at = token[:, None, None]
    x = tl.load(logits + at * row_stride + expert.to(tl.int64) * col_stride, mask=inside, other=0.0).to(tl.float32)
    s = affinity(x, most, total, SOFTMAX)
    tl.store(scores + at * experts + expert, s, mask=inside)
    ranks = rank(s + tl.load(bias + expert, mask=in_experts, other=0.0), expert, in_experts)

    if LIMITED:
        left = ranks
        group_score = tl.zeros([TILE, GROUPS], tl.float32)
        for _ in range(top_k // top_groups):
            best = tl.max(left, 2)
            group_score += value_of(best)
            left = tl.where(left == best[:, :, None], TAKEN, left)
        group_rank = rank(group_score, group, group < groups)
        for _ in range(top_groups):
            group_rank = tl.where(group_rank == tl.max(group_rank, 1, keep_dims=True), TAKEN, group_rank)
        ranks = tl.where(group_rank[:, :, None] == TAKEN, ranks, TAKEN)

    ranks = tl.reshape(ranks, [TILE, GROUPS * SIZE])
    s = tl.reshape(s, [TILE, GROUPS * SIZE])
    k_lane = tl.arange(0, TOP_K)[None, :]
    chosen_idx = tl.zeros([TILE, TOP_K], tl.int64)
    chosen = tl.zeros([TILE, TOP_K], tl.float32)
    chosen_sum = tl.zeros([TILE, 1], tl.float32)
    taken = tl.zeros([TILE, GROUPS * SIZE], tl.int32)
    for k in range(top_k):
        best = tl.max(ranks, 1, keep_dims=True)
        mine = ranks == best
        of_mine = tl.sum(tl.where(mine, s, 0.0), 1, keep_dims=True)  # one is not 0
        chosen_idx = tl.where(k_lane == k, index_of(best), chosen_idx)
        chosen = tl.where(k_lane == k, of_mine, chosen)
        chosen_sum += of_mine
        taken += mine.to(tl.int32)
        ranks = tl.where(mine, TAKEN, ranks)

    weights = tl.div_rn(chosen, tl.where(chosen_sum < LEAST_SUM, LEAST_SUM, chosen_sum)) * scale
    out = token[:, None] * top_k + k_lane
    in_out = in_tokens[:, None] & (k_lane < top_k)
    tl.store(topk_idx + out, chosen_idx, mask=in_out)
    tl.store(topk_weights + out, weights, mask=in_out)
    # Sums of integers do not depend on the order in which programs come here.
    count = tl.sum(tl.where(in_tokens[:, None], taken, 0), 0)
    tl.atomic_add(load + tl.reshape(expert, [GROUPS * SIZE]), count, mask=count > 0)


@triton.jit(do_not_specialize=["tokens"])
def route_backward_kernel(
    grad_weights,
    grad_scores,
    topk_idx,
    scores,
    out,
    tokens,
    experts,
    top_k,
    weights_row_stride,
    weights_col_stride,
    scores_row_stride,
    scores_col_stride,
    scale,
    SOFTMAX: tl.constexpr,
    TILE: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The strides are those of the two gradients, each of which may be None."""
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    in_tokens = token < tokens
    expert = tl.arange(0, EXPERTS)[None, :]
    inside = in_tokens & (expert < experts)
    at = token * experts + expert
    s = tl.load(scores + at, mask=inside, other=0.0)
    grad = tl.zeros([TILE, EXPERTS], tl.float32)
    if grad_scores is not None:
        at_scores = token * scores_row_stride + expert.to(tl.int64) * scores_col_stride
        grad = tl.load(grad_scores + at_scores, mask=inside, other=0.0)
    if grad_weights is not None:
        chosen_sum = tl.zeros([TILE, 1], tl.float32)
        for k in range(top_k):
            idx = tl.load(topk_idx + token * top_k + k, mask=in_tokens, other=0)
            chosen_sum += tl.load(scores + token * experts + idx, mask=in_tokens, other=0.0)
        clamped = chosen_sum < LEAST_SUM
        chosen_sum = tl.where(clamped, LEAST_SUM, chosen_sum)
        mean = tl.zeros([TILE, 1], tl.float32)
        for k in range(top_k):
            idx = tl.load(topk_idx + token * top_k + k, mask=in_tokens, other=0)
            chosen = tl.load(scores + token * experts + idx, mask=in_tokens, other=0.0)
            at_weights = token * weights_row_stride + k * weights_col_stride
            given = tl.load(grad_weights + at_weights, mask=in_tokens, other=0.0)
            mean += given * scale * tl.div_rn(chosen, chosen_sum)
        for k in range(top_k):
            idx = tl.load(topk_idx + token * top_k + k, mask=in_tokens, other=0)
            at_weights = token * weights_row_stride + k * weights_col_stride
            scaled = tl.load(grad_weights + at_weights, mask=in_tokens, other=0.0) * scale
            of_chosen = tl.div_rn(tl.where(clamped, scaled, scaled - mean), chosen_sum)
            grad = tl.where(expert == idx, grad + of_chosen, grad)
    if SOFTMAX:
        inner = pairwise_sum(tl.where(inside, grad * s, 0.0), TILE, EXPERTS)
        grad = s * (grad - inner[:, None])
    else:
        grad = grad * ((1.0 - s) * s)
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=inside)


def route(
    logits: Tensor, bias: Tensor, top_k: int, groups: int, top_groups: int, score: str, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.route`; arguments are checked already."""
    tokens, experts = logits.shape
    topk_idx = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    topk_weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    scores = torch.empty((tokens, experts), dtype=torch.float32, device=logits.device)
    load = torch.zeros(experts, dtype=torch.int32, device=logits.device)
    if tokens == 0:
        return topk_idx, topk_weights, scores, load
    lanes = [triton.next_power_of_2(n) for n in (groups, experts // groups)]
    tile = max(1, _TILE // (lanes[0] * lanes[1]))
    with torch.cuda.device_of(logits):
        route_kernel[(ceil_div(tokens, tile),)](
            logits,
            bias,
            topk_idx,
            topk_weights,
            scores,
            load,
            tokens,
            experts,
            groups,
            top_k,
            top_groups,
            *logits.stride(),
            scale,
            SOFTMAX=score == "softmax",
            LIMITED=top_groups < groups,
            TILE=tile,
            EXPERTS=triton.next_power_of_2(experts),
            GROUPS=lanes[0],
            SIZE=lanes[1],
            TOP_K=triton.next_power_of_2(top_k),
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return topk_idx, topk_weights, scores, load


def route_backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    topk_idx: Tensor,
    scores: Tensor,
    score: str,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """See :func:`fastfp8.ops.route.route_backward`; arguments are checked already."""
    tokens, experts = scores.shape
    out = torch.empty((tokens, experts), dtype=out_dtype, device=scores.device)
    if tokens == 0:
        return out
    lanes = triton.next_power_of_2(experts)
    tile = max(1, _TILE // lanes)
    with torch.cuda.device_of(scores):
        route_backward_kernel[(ceil_div(tokens, tile),)](
            grad_weights,
            grad_scores,
            topk_idx,
            scores,
            out,
            tokens,
            experts,
            topk_idx.shape[1],
            *((0, 0) if grad_weights is None else grad_weights.stride()),
            *((0, 0) if grad_scores is None else grad_scores.stride()),
            scale,
            SOFTMAX=score == "softmax",
            TILE=tile,
            EXPERTS=lanes,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return out
