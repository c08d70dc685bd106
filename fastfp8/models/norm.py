"""RMSNorm that keeps its input only (DeepSeek-V3 report, section 3.2.3: all RMSNorms are computed again)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.rmsnorm import rmsnorm_backward


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        hidden = x.shape[-1]
        dx, dweight = rmsnorm_backward(dy.reshape(-1, hidden), x.reshape(-1, hidden), weight, scale.view(-1))
        return dx.view(x.shape), dweight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x**2) + eps) * weight`` in FP32, rounded once to the dtype of ``x`` [..., hidden].

    Args:
        hidden: of the last dimension.
        eps: added to the mean square.
        device, dtype: of ``weight``.
    """

    def __init__(
        self,
        hidden: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Function.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
