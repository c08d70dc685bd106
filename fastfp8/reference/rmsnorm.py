"""RMSNorm with quantisation on the CPU, and the definition of its numerics (Zhang and Sennrich, arXiv 1910.07467).

All is FP32, each operation rounded once, in this order, for a row ``x`` of K elements:

    rstd = 1 / sqrt(sum(x * x) / K + eps)
    y = x * rstd * weight                                   what is quantised; products from left to right

and backward, for the gradient ``g`` of y:

    n = x * rstd
    mean = sum(g * weight * n) / K
    dx = (g * weight - n * mean) * rstd                     plus residual_grad, if there is one
    dweight = sum over rows of g * n

A sum over a row is that of :func:`.pairwise.pairwise_sum` plus 0, so that none is a negative zero. That over rows:
``rows_together(M)`` consecutive rows are added one after the other from 0 on, and then these sums pairwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BLOCK, Block, ceil_div, empty_scale, scale_shape_of
from .pairwise import pairwise_sum
from .quantize import quantize_rows
from .quantize_both import transposed

_BLOCK: Block = (1, BLOCK)
# Elements worked on at a time: temporaries stay in the cache.
_CHUNK = 1 << 17


def rows_together(rows: int) -> int:
    """How many rows' gradients of the weight a program adds up: a function of the number of rows alone.

    For programs to fill a GPU there should be 128, and more only with 32 rows each, for each writes a sum. There are at
    most 512 sums.
    """
    return max(1, ceil_div(rows, 512), min(32, ceil_div(rows, 128)))


def reciprocal_rms(sums: Tensor, cols: int, eps: float) -> Tensor:
    """``rstd`` of rows from the sums of their squares; of rows without columns that of zeros."""
    # Tensors, because torch computes `number / tensor` as reciprocal and product, which rounds twice. And the root by
    # way of double precision, because torch's FP32 root is an ulp off for a fifth of all values (seen in 2.13).
    mean = sums / torch.tensor(float(max(cols, 1)))
    return torch.tensor(1.0) / (mean + eps).double().sqrt().float()


def add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    """What is normalised: ``x``, or the sum in FP32, rounded to the dtype of ``residual``."""
    return x if residual is None else (x.float() + residual.float()).to(residual.dtype)


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
    rows, cols = x.shape
    data, rstd = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(rows)
    scale = empty_scale(x, scale_shape_of(x.shape, _BLOCK), _BLOCK)
    given = torch.empty((0, cols), dtype=x.dtype) if residual is None else torch.empty(x.shape, dtype=residual.dtype)
    step, factor = max(1, _CHUNK // max(1, cols)), weight.float()
    for first in range(0, rows, step):
        chunk = slice(first, first + step)
        h = add_residual(x[chunk], None if residual is None else residual[chunk])
        if residual is not None:
            given[chunk] = h
        values = h.float()
        rstd[chunk] = reciprocal_rms(pairwise_sum(values * values), cols, eps)
        if cols:
            y = values * rstd[chunk, None] * factor
            quantize_rows(y, data[chunk], scale[chunk], _BLOCK, pow2, amax_floor, counters)
    return data, scale, rstd, given


def rmsnorm_quantize_transpose(
    x: Tensor, weight: Tensor, rstd: Tensor, pow2: bool, amax_floor: float, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.rmsnorm_quantize_transpose`; arguments are checked already. Padded to 16 tokens."""
    return transposed(x.float() * rstd[:, None] * weight.float(), pow2, amax_floor, counters)


def rmsnorm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.rmsnorm_backward`; arguments are checked already."""
    rows, cols = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype)
    if x.numel() == 0:
        return dx, torch.zeros(cols)
    together, factor = rows_together(rows), weight.float()
    sums = torch.zeros((ceil_div(rows, together), cols))
    for i in range(together):
        of_each = slice(i, None, together)  # row i of those that are added up, for each sum
        g, r = grad[of_each].float(), rstd[of_each, None]
        normed = x[of_each].float() * r
        weighted = g * factor
        mean = (pairwise_sum(weighted * normed) + 0.0) / torch.tensor(float(cols))
        out = (weighted - normed * mean[:, None]) * r
        dx[of_each] = out if residual_grad is None else out + residual_grad[of_each].float()
        sums[: len(g)] += g * normed
    return dx, pairwise_sum(sums.t())
