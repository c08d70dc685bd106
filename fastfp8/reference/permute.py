"""Token rows to the rows of their experts and back, on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import value_error
from ..layout import BLOCK, Block, ceil_div, empty_scale, scale_shape
from .pairwise import pairwise_sum
from .quantize import quantize

_BLOCK: Block = (1, BLOCK)
# Columns whose products are added into as many running sums for the gradient of a weight.
DOT_LANES = 256


def row_map(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.row_map`; arguments are checked already, but for the values of ``topk_idx``."""
    experts = topk_idx.flatten().long()
    bad = (experts < -1) | (experts >= num_experts)
    if bad.any():
        token, k = divmod(int(bad.nonzero()[0]), topk_idx.shape[1])
        expected = f"experts from 0 to below num_experts = {num_experts}, or -1"
        raise value_error("row_map", "topk_idx", expected, f"{int(topk_idx[token, k])} for token {token}")
    used = int((experts >= 0).sum())
    order = torch.where(experts < 0, num_experts, experts).sort(dim=0, stable=True).indices
    offsets = torch.bincount(experts[experts >= 0], minlength=num_experts).cumsum(0).int()
    slots = order.int()
    slots[used:] = -1
    rows = torch.full(topk_idx.shape, -1, dtype=torch.int32)
    rows.view(-1)[order[:used]] = torch.arange(used, dtype=torch.int32)
    return offsets, rows, slots


def _places(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each k in ascending order the tokens that have a row there, and these rows."""
    places = []
    for k in range(rows.shape[1]):
        of_k = rows[:, k].long()
        tokens = ((of_k >= 0) & (of_k < rows.numel())).nonzero()[:, 0]
        places.append((tokens, of_k[tokens]))
    return places


def permute(x: Tensor, rows: Tensor) -> Tensor:
    """See :func:`fastfp8.permute`; arguments are checked already."""
    out = torch.empty((rows.numel(), x.shape[1]), dtype=x.dtype)
    for tokens, to in _places(rows):
        out[to] = x[tokens]
    return out


def permute_scaled(x: Tensor, x_scale: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.permute`; arguments are checked already."""
    data = permute(x.view(torch.uint8), rows).view(torch.float8_e4m3fn)
    scale = empty_scale(data, scale_shape(data.shape[0], data.shape[1], _BLOCK), _BLOCK)
    for tokens, to in _places(rows):
        scale[to] = x_scale[tokens]
    return data, scale


def permute_quantize(
    x: Tensor, rows: Tensor, pow2: bool, eps: float, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.permute_quantize`; arguments are checked already."""
    return permute_scaled(*quantize(x, _BLOCK, pow2, eps, counters=counters), rows)


def unpermute(
    y: Tensor, y_scale: Tensor | None, rows: Tensor, weights: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """See :func:`fastfp8.unpermute`; arguments are checked already."""
    cols = y.shape[1]
    total = torch.zeros((rows.shape[0], cols))
    for k, (tokens, at) in enumerate(_places(rows)):
        values = y[at].float()
        if y_scale is not None:
            values *= y_scale[at].repeat_interleave(BLOCK, 1)[:, :cols]
        if weights is not None:
            values *= weights[tokens, k, None]
        total[tokens] += values
    return total.to(out_dtype)


def unpermute_backward(grad: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.ops.permute.unpermute_backward`; arguments are checked already."""
    grad_y, grad_weights = torch.empty(y.shape, dtype=y.dtype), torch.zeros(rows.shape)
    cols = y.shape[1]
    for k, (tokens, at) in enumerate(_places(rows)):
        given = grad[tokens].float()
        grad_y[at] = (given * weights[tokens, k, None]).to(y.dtype)
        products = F.pad(given * y[at].float(), (0, -cols % DOT_LANES))
        lanes = torch.zeros((len(tokens), DOT_LANES))
        for part in range(ceil_div(cols, DOT_LANES)):
            lanes += products[:, part * DOT_LANES : (part + 1) * DOT_LANES]
        grad_weights[tokens, k] = pairwise_sum(lanes)
    return grad_y, grad_weights
