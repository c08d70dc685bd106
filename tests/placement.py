"""Copies of tensors on a GPU or at an aligned address, with the strides that they had."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfp8 import ScaledTensor


def on_gpu(t: Tensor) -> Tensor:
    """A copy on the GPU with the strides of ``t``, which ``Tensor.cuda`` keeps for dense tensors only."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)


def scaled_on_gpu(t: ScaledTensor) -> ScaledTensor:
    return ScaledTensor._trusted(on_gpu(t.data), on_gpu(t.scale), t.block)


def aligned(t: Tensor) -> Tensor:
    """``t``, or a copy with its strides and all that lies between its elements where it is not 16-byte aligned."""
    if t.data_ptr() % 16 == 0 or t.numel() == 0:
        return t
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((span,), (1,)).clone().as_strided(t.shape, t.stride(), 0)
