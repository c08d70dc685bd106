"""The dense FP8 layers: three GEMMs, Fprop, Dgrad and Wgrad, with or without an RMSNorm before.

With gemm(a, b) = a @ b.T, M tokens, K in_features, N out_features, and each operand in FP8:

    Fprop  y  [M, N] = gemm(x 1x128, w 128x128) + bias
    Dgrad  dx [M, K] = gemm(dy 1x128, w.T 128x128)                   w.T is exact: its blocks are square
    Wgrad  dw [N, K] = gemm(dy.T 1x128, x.T 1x128), both along M     x.T: what was kept of x, re-tiled to 128x1

Both operands made of dy come from one read of it. With an RMSNorm, x above is its result, which is never kept: x.T is
computed again from the norm's input and a number a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ArgumentTypeError, check_device, check_dtype, check_value, message
from ..observation import observe
from ..ops.gemm import A_BLOCK
from ..ops.quantize import INPUT_DTYPES, quantize
from ..ops.rmsnorm import rmsnorm_backward, rmsnorm_quantize, rmsnorm_quantize_transpose
from ..recipe import Recipe
from ..scaled_tensor import ScaledTensor
from .high_precision import HighPrecisionFunction
from .operands import SQUARE, input_along_tokens, keep_input, quantize_gradient
from .products import accumulate, crop, main_grad_of, pad, product
from .weight import FP8Weight, dgrad_weight, save_for_dgrad


@dataclass(frozen=True)
class Call:
    """What a call of the Function is given beside tensors with gradients.

    Attributes:
        out_features: N; the FP8 weight may have more rows.
        out_dtype: of y.
        cache: in what x is kept: see :class:`fastfp8.Recipe`. With an RMSNorm nothing of it is.
        eps: of the RMSNorm.
        main_grad: what dw is added to, float32 [N, K], instead of being returned; or None.
        trains: whether grad mode is on: within a Function it never is, and ``needs_input_grad`` does not tell.
        counters, statistics: by role; empty where nothing is counted or watched.
    """

    recipe: Recipe
    out_features: int
    out_dtype: torch.dtype
    cache: str
    eps: float
    main_grad: Tensor | None
    trains: bool
    counters: dict[str, Tensor]
    statistics: dict[str, Tensor]


class FP8Function(torch.autograd.Function):
    """y = x @ weight.T + bias, or rmsnorm(x) * norm_weight in place of x.

    The value of ``weight`` comes as ``w8`` [N16, K16], data and scale, and ``w8_t``, its transpose, or None. ``weight``
    itself, None if it is frozen, routes its gradient and is saved for Dgrad where there is no ``w8_t``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        w8: tuple[Tensor, Tensor],
        w8_t: tuple[Tensor, Tensor] | None,
        call: Call,
    ) -> Tensor:
        needs_x, needs_norm, needs_weight = (call.trains and needed for needed in ctx.needs_input_grad[:3])
        recipe, counters = call.recipe, call.counters
        of_weight = ScaledTensor._trusted(*w8, SQUARE)
        pow2, counting = recipe.activation.pow2, counters.get("activation")
        kept: tuple[Tensor, ...] = ()
        if norm_weight is None:
            x8 = quantize(pad(x, rows=False, cols=True), A_BLOCK, pow2=pow2, counters=counting)
            if needs_weight:
                kept = keep_input(x, x8, call.cache)
        else:
            normalized = rmsnorm_quantize(x, norm_weight, call.eps, pow2=pow2, counters=counting)
            x8 = normalized.quantized
            if needs_x or needs_norm or needs_weight:
                kept = (x, norm_weight, normalized.rstd)
        c = None
        if bias is not None:
            c = bias.float() if bias.dtype == torch.float16 else bias
            c = F.pad(c, (0, of_weight.shape[0] - call.out_features)).expand(x.shape[0], of_weight.shape[0])
        y = crop(product(x8, of_weight, call.out_dtype, c, recipe=recipe), x.shape[0], call.out_features)

        dgrad: tuple[Tensor | None, Tensor | None] = (None, None)
        if needs_x or needs_norm:
            turned = None if w8_t is None else ScaledTensor._trusted(*w8_t, SQUARE)
            dgrad = save_for_dgrad(weight if needs_weight else None, of_weight, turned)
        ctx.save_for_backward(*dgrad, *kept)
        ctx.call, ctx.shape, ctx.turned = call, (*x.shape, call.out_features), w8_t is not None
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, norm_weight, weight, bias))
        if call.statistics:
            _observe_forward(ctx, x, norm_weight, weight, x8, of_weight, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_norm, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        call: Call = ctx.call
        saved_weight, saved_scale, *saved_input = ctx.saved_tensors  # once: a checkpoint unpacks it only once
        kept = tuple(saved_input)
        m, k, n = ctx.shape
        x_dtype, norm_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = dnorm = dw = db = None
        if needs_bias:
            db = dy.sum(0, dtype=torch.float32).to(bias_dtype)
        by_row = needs_x or needs_norm
        dy8, dy8_t = quantize_gradient(
            dy, call.recipe, by_row=by_row, along_tokens=needs_weight, counters=call.counters
        )
        if call.statistics:
            observe(call.statistics.get("gradient"), dy, dy8)
            observe(call.statistics.get("gradient, transposed"), dy.t(), dy8_t)
        if dy8 is not None:
            w8_t = dgrad_weight((saved_weight, saved_scale), call.recipe, is_transposed=ctx.turned)
            dx = crop(product(dy8, w8_t, x_dtype, recipe=call.recipe), m, k)
            if norm_dtype is not None:
                dx, dnorm = rmsnorm_backward(dx, *kept)
                dnorm = dnorm.to(norm_dtype)
        if dy8_t is not None:
            dw = _weight_gradient(ctx, dy8_t, kept, n, k, weight_dtype)
        return dx if needs_x else None, dnorm if needs_norm else None, dw, db, None, None, None


def _along_tokens(call: Call, kept: tuple[Tensor, ...], features: int, normed: bool, counting: bool) -> ScaledTensor:
    """The input of the GEMM [K16, M16] for Wgrad, from what forward kept."""
    counters = call.counters.get("activation, transposed") if counting else None
    if normed:
        pow2 = call.recipe.activation.pow2
        return rmsnorm_quantize_transpose(*kept, pad=True, pow2=pow2, counters=counters)
    return input_along_tokens(kept, call.cache, features, call.recipe, counters)


def _weight_gradient(
    ctx: Any, dy8_t: ScaledTensor, kept: tuple[Tensor, ...], n: int, k: int, dtype: torch.dtype
) -> Tensor | None:
    """dw [N, K], or None where it was added to ``main_grad``."""
    call: Call = ctx.call
    if ctx.shape[0] == 0:  # no tokens: nothing to add
        return dy8_t.scale.new_zeros((n, k), dtype=dtype) if call.main_grad is None else None
    x8_t = _along_tokens(call, kept, k, ctx.dtypes[1] is not None, counting=True)
    if call.main_grad is not None:
        accumulate(call.main_grad, dy8_t, x8_t, recipe=call.recipe)
        return None
    return crop(product(dy8_t, x8_t, dtype, recipe=call.recipe), n, k)


def _observe_forward(
    ctx: Any,
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor | None,
    x8: ScaledTensor,
    w8: ScaledTensor,
    kept: tuple[Tensor, ...],
) -> None:
    """Statistics of a step that is watched; those of Wgrad's operand here, because backward has no ``x`` any more."""
    call: Call = ctx.call
    if norm_weight is not None:
        x = F.rms_norm(x.float(), x.shape[1:], norm_weight.float(), call.eps)
    observe(call.statistics.get("activation"), x, x8)
    if weight is not None:
        observe(call.statistics.get("weight"), weight, w8)
    if call.trains and ctx.needs_input_grad[2] and x.shape[0]:
        x8_t = _along_tokens(call, kept, x.shape[1], norm_weight is not None, counting=False)
        observe(call.statistics.get("activation, transposed"), x.t(), x8_t)


def check_input(op: str, x: object, features: int, weight: Tensor) -> None:
    """Raise unless ``x`` is an input [..., features] of a layer with ``weight``."""
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(message(op, "input", "a torch.Tensor", type(x).__name__))
    check_dtype(x.dtype, op, "input", INPUT_DTYPES)
    fits = x.dim() >= 1 and x.shape[-1] == features
    check_value(fits, op, "input", f"a last dimension of {features}", f"shape {tuple(x.shape)}")
    check_device(x, op, "input", weight, "weight")


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in on such a device; None where it is off."""
    # torch.amp.is_autocast_available would say it of meta too, but Dynamo of torch 2.11 cannot trace it.
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


def call_dense(
    op: str,
    module: FP8Weight,
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    eps: float = 0.0,
) -> Tensor:
    """``x`` [..., K], checked already, through the layer ``module`` by its recipe: [..., out_features]."""
    lead, recipe = x.shape[:-1], module.recipe
    out_dtype = _autocast_dtype(x.device.type) or x.dtype
    main_grad = None if weight is None else main_grad_of(op, weight)
    flat = x.reshape(math.prod(lead), x.shape[-1])
    y: Tensor
    if recipe is None:
        assert weight is not None
        if norm_weight is None and main_grad is None:
            return F.linear(x.to(out_dtype), weight.to(out_dtype), None if bias is None else bias.to(out_dtype))
        arguments = (flat, norm_weight, weight, bias, out_dtype, eps, main_grad)
        y = HighPrecisionFunction.apply(*arguments)  # type: ignore[no-untyped-call]
        return y.reshape(*lead, out_features)
    w8, w8_t = module._fp8_weight()
    call = Call(
        recipe,
        out_features,
        out_dtype,
        module.cache,
        eps,
        main_grad,
        trains=torch.is_grad_enabled(),
        counters=module.counters or {},
        statistics=module.statistics or {},
    )
    y = FP8Function.apply(  # type: ignore[no-untyped-call]
        flat,
        norm_weight,
        weight,
        bias,
        (w8.data, w8.scale),
        None if w8_t is None else (w8_t.data, w8_t.scale),
        call,
    )
    return y.reshape(*lead, out_features)
