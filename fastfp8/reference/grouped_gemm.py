"""Grouped GEMMs on the CPU: the GEMM of each group in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import value_error
from ..layout import BLOCK
from .gemm import gemm


def rows_of_groups(op: str, offsets: Tensor, rows: int) -> list[slice]:
    """The rows of each group that ``offsets`` ends. Raises ValueError unless they ascend from 0 to at most ``rows``."""
    ends = offsets.tolist()
    found = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    for group, taken in enumerate(found):
        if not taken.start <= taken.stop <= rows:
            expected = f"ends that ascend from 0 to at most T = {rows}"
            raise value_error(op, "offsets", expected, f"{taken.stop} after {taken.start} for group {group}")
    return found


def grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    *,
    op: str = "grouped_gemm",
) -> Tensor:
    """See :func:`fastfp8.grouped_gemm`; arguments are checked already, but for the values of ``offsets``.

    ``op`` is whose argument ``offsets`` is.
    """
    groups = rows_of_groups(op, offsets, a.shape[0])
    out = torch.empty((a.shape[0], b.shape[1]), dtype=out_dtype)
    for group, rows in enumerate(groups):
        if rows.start < rows.stop:
            out[rows] = gemm(a[rows], a_scale[rows], b[group], b_scale[group], (BLOCK, BLOCK), out_dtype, None)
    return out


def masked_grouped_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """See :func:`fastfp8.masked_grouped_gemm`; arguments are checked already, but for the values of ``counts``."""
    groups, rows = a.shape[:2]
    filled = counts.tolist()
    for group, count in enumerate(filled):
        if not 0 <= count <= rows:
            expected = f"counts from 0 to M = {rows}"
            raise value_error("masked_grouped_gemm", "counts", expected, f"{count} for group {group}")
    out = torch.empty((groups, rows, b.shape[1]), dtype=out_dtype)
    for group, count in enumerate(filled):
        if count:
            left, left_scale = a[group, :count], a_scale[group, :count]
            out[group, :count] = gemm(left, left_scale, b[group], b_scale[group], (BLOCK, BLOCK), out_dtype, None)
    return out
