"""Grouped Wgrad on the CPU: the GEMM of each group in turn."""

from __future__ import annotations

from torch import Tensor

from ..layout import BLOCK, ceil_div
from .gemm import gemm
from .grouped_gemm import rows_of_groups


def grouped_wgrad(
    grad_t: Tensor,
    grad_t_scale: Tensor,
    input_t: Tensor,
    input_t_scale: Tensor,
    offsets: Tensor,
    out: Tensor,
    accumulate: bool,
) -> None:
    """See :func:`fastfp8.grouped_wgrad`; arguments are checked already, but for the values of ``offsets``."""
    groups = rows_of_groups("grouped_wgrad", offsets, grad_t.shape[1])
    for group, taken in enumerate(groups):
        # Whole blocks, as the kernels read them: what pads the last one is zero.
        first, last = ceil_div(taken.start, BLOCK), ceil_div(taken.stop, BLOCK)
        if first < last:
            blocks, columns = slice(first, last), slice(first * BLOCK, last * BLOCK)
            left, right = (grad_t[:, columns], grad_t_scale[:, blocks]), (input_t[:, columns], input_t_scale[:, blocks])
            out[group] = gemm(*left, *right, (1, BLOCK), out.dtype, out[group] if accumulate else None)
        elif not accumulate:
            out[group] = 0
