"""A sum of FP32 values in an order that no machine chooses: neighbours first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_sum(values: Tensor) -> Tensor:
    """The sum over the last dimension, of any extent but 0, by a binary tree: each addition rounds once.

    Zeros up to a power of two follow the values; then each value is added to its neighbour, each sum to its, and so on.
    """
    extent = values.shape[-1]
    values = F.pad(values, (0, (1 << (extent - 1).bit_length()) - extent))
    while values.shape[-1] > 1:
        values = torch.add(values[..., 0::2], values[..., 1::2])
    return values[..., 0]
