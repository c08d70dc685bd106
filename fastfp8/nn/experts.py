"""The experts of a mixture, or one dense SwiGLU layer, in FP8 from the tokens that come to the sums that go.

With w1 [G, 2 F, H] of gate and up, w2 [G, H, F], and G groups of rows by expert:

    forward                                              kept for backward
    rows     [R, H]   = quantise and dispatch x          rows in FP8
    h        [R, F]   = SwiGLU(rows @ w1.T) * weight     gate and up in FP8 (DeepSeek-V3 report, section 3.3.3)
    y        [T, H]   = combine h @ w2.T                 nothing: h is computed again

    backward
    dout     [R, H]   = quantise and dispatch dy
    dh       [R, F]   = dout @ w2
    h.T, d(gate_up), d(gate_up).T, dweight = SwiGLU backward of dh, in one pass
    dw2      [G, H, F]   = dout.T @ h
    dx       [T, H]      = combine d(gate_up) @ w1
    dw1      [G, 2 F, H] = d(gate_up).T @ rows

The weight of routing multiplies h, not the output: its gradient then needs no output of an expert, which would be a
BF16 row to keep or a GEMM to do again. All GEMMs take FP8; combine moves BF16, both ways (section 3.3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import BLOCK, Block
from ..ops.gemm_swiglu_quantize import gemm_swiglu_quantize
from ..ops.grouped_gemm import grouped_gemm
from ..ops.quantize import quantize
from ..ops.requantize_transpose import requantize_transpose
from ..ops.swiglu_backward_quantize import swiglu_backward_quantize
from ..scaled_tensor import ScaledTensor
from . import watched
from .grouped_linear import coarse, wgrad
from .tokens import coding_of
from .weight import FP8Weight, dgrad_weight, save_for_dgrad

_ROW: Block = (1, BLOCK)
_TURNED = "activation, transposed"


def experts(
    x: Tensor, topk_weights: Tensor | None, tokens: Any, gate_up: FP8Weight, down: FP8Weight, limit: float | None
) -> Tensor:
    """bfloat16 [T, H]: what the experts make of ``x``, which ``tokens`` has sent, with all gradients.

    ``gate_up`` and ``down`` have a weight [G, 2 F, H] and [G, H, F], or [2 F, H] and [H, F], and the same recipe.
    """
    trains = torch.is_grad_enabled()  # in forward it is off, and needs_input_grad does not ask for it
    weights = gate_up.weight, down.weight
    y: Tensor = _Experts.apply(x, topk_weights, *weights, tokens, (gate_up, down), limit, trains)  # type: ignore[no-untyped-call]
    return y


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor | None,
        w1: Tensor,
        w2: Tensor,
        tokens: Any,
        modules: tuple[FP8Weight, FP8Weight],
        limit: float | None,
        trains: bool,
    ) -> Tensor:
        needs_grad, recipe = trains and any(ctx.needs_input_grad), modules[0].recipe
        assert recipe is not None
        (w1_8, w1_t), (w2_8, w2_t) = (module._fp8_weight() for module in modules)
        tokens.wait()
        rows, offsets, weight = tokens.rows, tokens.offsets, tokens.weights
        counters = [module.counters or {} for module in modules]
        options: dict[str, Any] = {"weight": weight, "limit": limit, "pow2": recipe.activation.pow2}
        options["counters"] = counters[1].get("activation")
        if needs_grad:
            h, gate_up = gemm_swiglu_quantize(rows, _stacked(w1_8), offsets, **options, return_gate_up=True)
        else:
            h = gemm_swiglu_quantize(rows, _stacked(w1_8), offsets, **options)
        y: Tensor = tokens.sums(grouped_gemm(h, _stacked(w2_8), offsets))
        if needs_grad:
            kept: tuple[Tensor, Tensor | None] = gate_up, None
            if recipe.cached == "e4m3":
                cached = quantize(gate_up, pow2=recipe.activation.pow2)
                kept = cached.data, cached.scale
            of_weights = *save_for_dgrad(w1, w1_8, w1_t), *save_for_dgrad(w2, w2_8, w2_t)
            ctx.save_for_backward(rows.data, rows.scale, *kept, offsets, weight, *of_weights)
            ctx.tokens, ctx.modules, ctx.recipe, ctx.limit, ctx.x_dtype = tokens, modules, recipe, limit, x.dtype
            ctx.has_transposed = w1_t is not None, w2_t is not None
            if any(module.statistics for module in modules):
                watched.forward(modules, (w1_8, w2_8), x, gate_up, h, (offsets, weight, limit))
            tokens.rows = None  # autograd has them, and frees them
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weights, needs_w1, needs_w2 = ctx.needs_input_grad[:4]
        rows_data, rows_scale, gate_up, gate_up_scale, offsets, weight, *of_weights = ctx.saved_tensors
        tokens, (first, second), recipe = ctx.tokens, ctx.modules, ctx.recipe
        square, pow2 = recipe.gradient.block != _ROW, recipe.gradient.pow2
        if gate_up_scale is not None:
            gate_up = ScaledTensor._trusted(gate_up, gate_up_scale, _ROW)

        of_first, of_second = first.counters or {}, second.counters or {}
        dout = tokens.send(dy, coding_of(second, "gradient", weight is not None))
        dout = coarse(dout, offsets, pow2) if square else dout
        w2_t = dgrad_weight(of_weights[2:], recipe, is_transposed=ctx.has_transposed[1])
        dh = grouped_gemm(dout, _stacked(w2_t), offsets)
        counting = of_second.get(_TURNED), of_first.get("gradient"), of_first.get("gradient, transposed")
        of_swiglu = swiglu_backward_quantize(
            *(dh, gate_up, weight, ctx.limit),
            offsets=offsets,
            pow2=pow2,
            counters=None if None in counting else counting,  # type: ignore[arg-type]
        )
        if first.statistics or second.statistics:
            watched.backward(ctx.modules, dy, dh, gate_up, of_swiglu.gate_up, (offsets, weight, ctx.limit))
        del dh, gate_up
        dx = dweights = dw1 = dw2 = None
        if needs_weights:
            dweights = tokens.slots(of_swiglu.weight)
        if needs_w2:
            dout_t, ends = requantize_transpose(dout, offsets, counters=of_second.get("gradient, transposed"))
            dw2 = wgrad(second.weight, dout_t, _quantized(of_swiglu.activation), ends, recipe)
            del dout_t
        d_rows, d_columns = of_swiglu.gate_up, of_swiglu.gate_up_t
        if square:
            d_rows = coarse(d_rows, offsets, pow2)
            d_columns, _ = requantize_transpose(d_rows, offsets)
        if needs_x:
            w1_t = dgrad_weight(of_weights[:2], recipe, is_transposed=ctx.has_transposed[0])
            dx = tokens.sums(grouped_gemm(d_rows, _stacked(w1_t), offsets)).to(ctx.x_dtype)
        if needs_w1:
            rows = ScaledTensor._trusted(rows_data, rows_scale, _ROW)
            rows_t, ends = requantize_transpose(rows, offsets, counters=of_first.get(_TURNED))
            dw1 = wgrad(first.weight, d_columns, rows_t, ends, recipe)
        return dx, dweights, dw1, dw2, None, None, None, None


def _quantized(t: ScaledTensor | Tensor) -> ScaledTensor:
    assert isinstance(t, ScaledTensor)
    return t


def _stacked(w: ScaledTensor) -> ScaledTensor:
    """[G, N, K]; of a single weight [N, K] a view."""
    return w if w.data.dim() == 3 else ScaledTensor._trusted(w.data[None], w.scale[None], w.block)
