"""GEMM on the CPU: the accuracy oracle. The oracle of bits is :mod:`fastfp8.reference.tensor_core`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BLOCK, Block
from .dequantize import dequantize


def gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_block: Block,
    out_dtype: torch.dtype,
    c: Tensor | None,
) -> Tensor:
    """See :func:`fastfp8.gemm`; arguments are checked already. The FP32 product of the dequantised operands."""
    left = dequantize(a, a_scale, (1, BLOCK), torch.float32)
    right = dequantize(b, b_scale, b_block, torch.float32)
    with torch.autocast("cpu", enabled=False):  # which would make it a BF16 product
        out = left @ right.t()
    if c is not None:
        out += c
    return out.to(out_dtype)
