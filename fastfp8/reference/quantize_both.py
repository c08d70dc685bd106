"""Quantisation of a matrix and of its transpose on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BLOCK, ceil_div, empty_scale, empty_transposed, grouped_tokens, pad16, scale_shape_of
from .grouped_gemm import rows_of_groups
from .quantize import quantize, quantize_matrix


def _quantize_transposed(
    x: Tensor, data_t: Tensor, scale_t: Tensor, pow2: bool, eps: float, counters: Tensor | None
) -> None:
    """Quantise the transpose of ``x`` [T, K] into the first T columns of ``data_t``; the others become zero."""
    tokens = x.shape[0]
    if x.numel():
        quantize_matrix(x.t(), data_t[:, :tokens], scale_t, (1, BLOCK), pow2, eps, counters=counters)
    data_t.view(torch.uint8)[:, tokens:] = 0


def transposed(x: Tensor, pow2: bool, eps: float, counters: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [K, T rounded up to 16] and scale of the transpose of ``x`` [T, K]."""
    data_t, scale_t = empty_transposed(x, x.shape[1], pad16(x.shape[0]))
    _quantize_transposed(x, data_t, scale_t, pow2, eps, counters)
    return data_t, scale_t


def grouped_transposed(
    op: str, x: Tensor, offsets: Tensor, pow2: bool, eps: float, counters: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scale of the transpose of ``x`` [T, K], each group padded to 128, and where each group ends there.

    Raises ValueError for bad ``offsets`` of ``op``.
    """
    groups = rows_of_groups(op, offsets, x.shape[0])
    data_t, scale_t = empty_transposed(x, x.shape[1], grouped_tokens(x.shape[0], len(groups)))
    ends, first = [], 0
    for rows in groups:
        last = first + ceil_div(rows.stop - rows.start, BLOCK)
        columns = slice(first * BLOCK, last * BLOCK)
        _quantize_transposed(x[rows], data_t[:, columns], scale_t[:, first:last], pow2, eps, counters)
        ends.append(columns.start + rows.stop - rows.start)
        first = last
    return data_t, scale_t, torch.tensor(ends, dtype=torch.int32)


def quantize_both(
    x: Tensor, pow2: bool, eps: float, counters: Tensor | None = None, counters_t: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.quantize_both`; arguments are checked already. The transpose is padded to 16 tokens."""
    return *quantize(x, (1, BLOCK), pow2, eps, counters=counters), *transposed(x, pow2, eps, counters_t)


def quantize_grouped_both(
    x: Tensor,
    offsets: Tensor,
    pow2: bool,
    eps: float,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.quantize_grouped_both`; arguments are checked already, but for the values of ``offsets``."""
    of_groups = grouped_transposed("quantize_grouped_both", x, offsets, pow2, eps, counters_t)
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = empty_scale(x, scale_shape_of(x.shape, (1, BLOCK)), (1, BLOCK))
    taken = slice(0, int(offsets[-1]))
    if x[taken].numel():
        quantize_matrix(x[taken], data[taken], scale[taken], (1, BLOCK), pow2, eps, counters=counters)
    return data, scale, *of_groups
