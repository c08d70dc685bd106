"""Grouped Wgrad on the CPU: the GEMM of each group in turn."""

from __future__ import annotations

from torch import Tensor

from ..errors import value_error
from ..layout import BLOCK, ceil_div
from .gemm import gemm


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
    tokens, ends = grad_t.shape[1], offsets.tolist()
    starts = [0, *ends[:-1]]
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not start <= end <= tokens:
            expected = f"ends that ascend from 0 to at most T = {tokens}"
            raise value_error("grouped_wgrad", "offsets", expected, f"{end} after {start} for group {group}")
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        # Whole blocks, as the kernels read them: what pads the last one is zero.
        first, last = ceil_div(start, BLOCK), ceil_div(end, BLOCK)
        if first < last:
            blocks, columns = slice(first, last), slice(first * BLOCK, last * BLOCK)
            left, right = (grad_t[:, columns], grad_t_scale[:, blocks]), (input_t[:, columns], input_t_scale[:, blocks])
            out[group] = gemm(*left, *right, (1, BLOCK), out.dtype, out[group] if accumulate else None)
        elif not accumulate:
            out[group] = 0
