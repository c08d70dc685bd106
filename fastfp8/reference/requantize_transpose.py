"""Requantisation of an FP8 matrix along its other dimension, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BLOCK
from .dequantize import dequantize
from .quantize_both import grouped_transposed, transposed


def requantize_transpose(data: Tensor, scale: Tensor, counters: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.requantize_transpose`; arguments are checked already. Padded to 16 tokens."""
    return transposed(dequantize(data, scale, (1, BLOCK), torch.float32), True, 0.0, counters)


def requantize_grouped_transpose(
    data: Tensor, scale: Tensor, offsets: Tensor, counters: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.requantize_transpose`; arguments are checked already, but for the values of ``offsets``."""
    x = dequantize(data, scale, (1, BLOCK), torch.float32)
    return grouped_transposed("requantize_transpose", x, offsets, True, 0.0, counters)
