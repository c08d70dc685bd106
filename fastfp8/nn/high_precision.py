"""The dense layers without FP8: what a Recipe of None means, with an RMSNorm that is computed again in backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.rmsnorm import rmsnorm_backward


class HighPrecisionFunction(torch.autograd.Function):
    """y = x @ weight.T + bias in ``dtype``, or rmsnorm(x) * norm_weight in place of x.

    With a norm only ``x`` and the reciprocal root of its mean square are saved (DeepSeek-V3 report, section 3.2). The
    gradient of the weight is added to ``main_grad``, float32, if there is one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        eps: float,
        main_grad: Tensor | None,
    ) -> Tensor:
        rstd = None
        if norm_weight is not None:
            rstd = (x.float().square().mean(1) + eps).rsqrt()
        with torch.autocast(x.device.type, enabled=False):
            n = _input(x, norm_weight, rstd, dtype)
            y = F.linear(n, weight.to(dtype), None if bias is None else bias.to(dtype))
        ctx.save_for_backward(x, norm_weight, weight, rstd)
        ctx.dtype, ctx.main_grad, ctx.bias_dtype = dtype, main_grad, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_norm, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        x, norm_weight, weight, rstd = ctx.saved_tensors
        dx = dnorm = dw = db = None
        if needs_bias:
            db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        if needs_x or needs_norm:
            dx = dy @ weight.to(ctx.dtype)
            if norm_weight is None:
                dx = dx.to(x.dtype)
            else:
                dx, dnorm = rmsnorm_backward(dx, x, norm_weight, rstd)
                dnorm = dnorm.to(norm_weight.dtype)
        if needs_weight:
            dw = dy.t() @ _input(x, norm_weight, rstd, ctx.dtype)
            if ctx.main_grad is None:
                dw = dw.to(weight.dtype)
            else:
                ctx.main_grad.add_(dw)
                dw = None
        return dx if needs_x else None, dnorm if needs_norm else None, dw, db, None, None, None


def _input(x: Tensor, norm_weight: Tensor | None, rstd: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is multiplied by the weight."""
    if norm_weight is None or rstd is None:
        return x.to(dtype)
    return (x.float() * rstd[:, None] * norm_weight.float()).to(dtype)
