"""The gate of a mixture of experts on the CPU, and the definition of its numerics (DeepSeek-V3 report, 2.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import exp
from .pairwise import pairwise_sum

# What the sum of the selected affinities is raised to, so that their quotients are numbers where all are 0.
LEAST_SUM = 1e-20

# A tensor, because torch computes `number / tensor` as reciprocal and product, which rounds twice.
_ONE = torch.tensor(1.0)


def _affinities(logits: Tensor, score: str) -> Tensor:
    x = logits.float()
    if score == "sigmoid":
        return _ONE / (exp(-x) + 1)
    most = torch.where(x.isnan(), -torch.inf, x).amax(1, keepdim=True)
    numerator = exp(x - most)
    return numerator / pairwise_sum(numerator)[:, None]


def _without_nan(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), -torch.inf, values)


def _best(values: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` largest of each row, descending; the lowest of equal ones first."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _select(biased: Tensor, top_k: int, groups: int, top_groups: int) -> Tensor:
    biased = _without_nan(biased)
    if groups == top_groups:
        return _best(biased, top_k)
    size = biased.shape[1] // groups
    best = biased.view(-1, groups, size).sort(2, descending=True).values
    group_score = best[..., 0]
    for i in range(1, top_k // top_groups):
        group_score = group_score + best[..., i]
    kept = _best(_without_nan(group_score), top_groups).sort(1).values
    experts = (kept[:, :, None] * size + torch.arange(size)).flatten(1)
    return experts.gather(1, _best(biased.gather(1, experts), top_k))


def _sum_of_selected(chosen: Tensor) -> Tensor:
    total = torch.zeros_like(chosen[:, 0])
    for k in range(chosen.shape[1]):
        total = total + chosen[:, k]
    return total


def route(
    logits: Tensor, bias: Tensor, top_k: int, groups: int, top_groups: int, score: str, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.route`; arguments are checked already."""
    logits = logits.detach()
    # Copies, because contiguous() leaves the strides of an empty tensor as they are.
    scores = _affinities(logits, score).clone(memory_format=torch.contiguous_format)
    topk_idx = _select(scores + bias, top_k, groups, top_groups).clone(memory_format=torch.contiguous_format)
    chosen = scores.gather(1, topk_idx)
    total = _sum_of_selected(chosen)
    total = torch.where(total < LEAST_SUM, LEAST_SUM, total)
    topk_weights = chosen / total[:, None] * scale
    load = torch.bincount(topk_idx.flatten(), minlength=logits.shape[1]).int()
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
    grad = torch.zeros_like(scores) if grad_scores is None else grad_scores.clone(memory_format=torch.contiguous_format)
    if grad_weights is not None:
        chosen = scores.gather(1, topk_idx)
        total = _sum_of_selected(chosen)[:, None]
        clamped = total < LEAST_SUM
        total = torch.where(clamped, LEAST_SUM, total)
        scaled = grad_weights * scale
        mean = _sum_of_selected(scaled * (chosen / total))[:, None]
        of_chosen = torch.where(clamped, scaled, scaled - mean) / total
        grad.scatter_add_(1, topk_idx, of_chosen)
    if score == "sigmoid":
        grad = grad * ((1 - scores) * scores)
    else:
        grad = scores * (grad - pairwise_sum(grad * scores)[:, None])
    return grad.to(out_dtype)
