"""A Linear for each expert, in one launch: rows of tokens in groups, each times its own weight.

With R rows in G groups, K in_features and N out_features, all operands in FP8:

    Fprop  y  [R, N]    = grouped_gemm(x 1x128, w 128x128)
    Dgrad  dx [R, K]    = grouped_gemm(dy 1x128, w.T 128x128)
    Wgrad  dw [G, N, K] = grouped_wgrad(dy.T 1x128, x.T 1x128), both along the tokens of a group, which pads with zeros
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import check_dtype, check_tensor, check_type, check_value
from ..layout import BLOCK, Block
from ..observation import observe
from ..ops.dequantize import dequantize
from ..ops.gemm import K_ALIGNMENT
from ..ops.grouped_gemm import grouped_gemm
from ..ops.grouped_wgrad import grouped_wgrad
from ..ops.quantize import quantize
from ..ops.quantize_both import quantize_grouped_both
from ..ops.requantize_transpose import requantize_transpose
from ..recipe import Recipe
from ..scaled_tensor import ScaledTensor
from . import unpromoted, watched
from .operands import SQUARE
from .products import main_grad_of
from .weight import FP8Weight, dgrad_weight, save_for_dgrad

_OP = "nn.GroupedLinear"
_ROW: Block = (1, BLOCK)
PARAM_DTYPES = (torch.float32, torch.bfloat16)


class GroupedLinear(FP8Weight, torch.nn.Module):
    """``y[rows of g] = x[rows of g] @ weight[g].T`` in FP8, forward and backward: the experts of a mixture.

    Args:
        num_groups, in_features, out_features: G, K and N; K and N multiples of 16.
        device, dtype: of the weight, the master: float32 or bfloat16.
        recipe: see :class:`fastfp8.Recipe`; None computes in bfloat16, by torch's grouped product.

    ``forward`` takes ``x`` [R, K] of bfloat16 or float32 and ``offsets``, int32 [G] on its device: the row at which
    each group ends (see :func:`fastfp8.grouped_gemm`). Rows from ``offsets[-1]`` on take no part, and what they have in
    the result and in gradients is undefined. It returns [R, N] of the dtype of ``x``, bfloat16 under autocast.

    The input is kept for backward in FP8 alone; between FP32 scales it is re-tiled to power-of-two ones. A
    ``weight.main_grad``, float32 [G, N, K], is added to in place of ``weight.grad``. DeepSeek-V3 report, sections 3.3.1
    to 3.3.3.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape or a device does not fit.
    """

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recipe: Recipe | None = Recipe(),  # noqa: B008  (immutable)
    ) -> None:
        super().__init__()
        for name, value in (("num_groups", num_groups), ("in_features", in_features), ("out_features", out_features)):
            check_type(value, int, _OP, name, "an int")
            check_value(value > 0, _OP, name, "a positive number", value)
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            check_value(value % K_ALIGNMENT == 0, _OP, name, f"a multiple of {K_ALIGNMENT}", value)
        self.weight = torch.nn.Parameter(torch.empty(num_groups, out_features, in_features, device=device, dtype=dtype))
        check_dtype(self.weight.dtype, _OP, "dtype", PARAM_DTYPES)
        self.set_recipe(recipe)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As those of as many torch.nn.Linear."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        torch.nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        check_tensor(x, _OP, "x", PARAM_DTYPES)
        check_value(x.shape[1] == self.weight.shape[2], _OP, "x", f"[R, {self.weight.shape[2]}]", tuple(x.shape))
        check_tensor(offsets, _OP, "offsets", (torch.int32,), dim=1)
        out_dtype = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else x.dtype
        y: Tensor
        if self.recipe is None:
            main_grad = main_grad_of(_OP, self.weight)
            y = _DenseFunction.apply(x.bfloat16(), self.weight, offsets, main_grad)  # type: ignore[no-untyped-call]
            return y.to(out_dtype)
        w8, w8_t = self._fp8_weight()
        # save_for_dgrad wants the weight itself, by which autograd notices that it changed.
        y = _GroupedFunction.apply(x, self.weight, offsets, w8, w8_t, out_dtype, self)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        groups, out_features, in_features = self.weight.shape
        precision = "bf16" if self.recipe is None else "fp8"
        return f"num_groups={groups}, in_features={in_features}, out_features={out_features}, {precision}"


class _DenseFunction(torch.autograd.Function):
    """torch's grouped product in BF16, with the gradient of the weight in its ``main_grad`` if there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, main_grad: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.main_grad = main_grad
        return F.grouped_mm(x, weight.bfloat16().mT, offs=offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dy, dx, dw = dy.contiguous(), None, None
        if needs_x:
            dx = F.grouped_mm(dy, weight.bfloat16(), offs=offsets)
        if needs_weight:
            dw = F.grouped_mm(dy.t(), x, offs=offsets)
            if ctx.main_grad is None:
                dw = dw.to(weight.dtype)
            else:
                ctx.main_grad.add_(dw)
                dw = None
        return dx, dw, None, None


class _GroupedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        w8: ScaledTensor,
        w8_t: ScaledTensor | None,
        out_dtype: torch.dtype,
        module: GroupedLinear,
    ) -> Tensor:
        recipe, counters = module.recipe, module.counters or {}
        assert recipe is not None
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        rows = quantize(x, pow2=recipe.activation.pow2, counters=counters.get("activation"))
        ctx.save_for_backward(
            *((rows.data, rows.scale) if needs_weight else (None, None)),
            *(save_for_dgrad(weight, w8, w8_t) if needs_x else (None, None)),
            offsets,
        )
        ctx.has_transposed, ctx.module, ctx.recipe, ctx.x_dtype = w8_t is not None, module, recipe, x.dtype
        ctx.counters = counters
        if module.statistics:
            observe(module.statistics.get("weight"), weight, w8)
            watched.rows(module.statistics.get("activation"), x, rows, offsets)
        return grouped_product(rows, w8, offsets, out_dtype, recipe)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        data, scale, *weight, offsets = ctx.saved_tensors
        recipe, counters = ctx.recipe, ctx.counters
        pow2, of_rows, of_tokens = recipe.gradient.pow2, *map(counters.get, ("gradient", "gradient, transposed"))
        if recipe.gradient.block == _ROW:
            counting = None if of_rows is None or of_tokens is None else (of_rows, of_tokens)
            dy8, dy8_t, ends = quantize_grouped_both(dy, offsets, pow2=pow2, counters=counting)
        else:
            dy8 = coarse(dy, offsets, pow2)
            dy8_t, ends = requantize_transpose(dy8, offsets)
        if ctx.module.statistics:
            watched.rows(ctx.module.statistics.get("gradient"), dy, dy8, offsets)
        dx = dw = None
        if needs_x:
            out_dtype = torch.bfloat16 if ctx.x_dtype == torch.bfloat16 else torch.float32
            w8_t = dgrad_weight(weight, recipe, is_transposed=ctx.has_transposed)
            dx = grouped_product(dy8, w8_t, offsets, out_dtype, recipe)
        if needs_weight:
            x8 = ScaledTensor._trusted(data, scale, _ROW)
            x8_t, _ = requantize_transpose(x8, offsets, counters=counters.get("activation, transposed"))
            dw = wgrad(ctx.module.weight, dy8_t, x8_t, ends, recipe)
        return dx, dw, None, None, None, None, None


def grouped_product(
    a: ScaledTensor, b: ScaledTensor, offsets: Tensor, out_dtype: torch.dtype, recipe: Recipe
) -> Tensor:
    """``grouped_gemm`` with the accumulation of ``recipe``."""
    if recipe.promotion is not None:
        return grouped_gemm(a, b, offsets, out_dtype=out_dtype)
    out = torch.empty((a.shape[0], b.shape[1]), dtype=out_dtype)
    for group, (begin, end) in enumerate(_bounds(offsets)):
        rows = ScaledTensor(a.data[begin:end], a.scale[begin:end], _ROW)
        out[begin:end] = unpromoted.gemm(rows, b[group], out_dtype, None)
    return out


def wgrad(
    weight: Tensor, grad_t: ScaledTensor, input_t: ScaledTensor, offsets: Tensor, recipe: Recipe
) -> Tensor | None:
    """The gradient of ``weight``, [G, N, K] or [N, K] of one group; None where it was added to its ``main_grad``."""
    main_grad = main_grad_of(_OP, weight)
    if recipe.promotion is None:
        dw = _unpromoted_wgrad(grad_t, input_t, offsets).view(weight.shape)
        if main_grad is None:
            return dw.to(weight.dtype)
        main_grad.add_(dw)
        return None
    if main_grad is None:
        return grouped_wgrad(grad_t, input_t, offsets, out_dtype=weight.dtype).view(weight.shape)
    stack = main_grad if main_grad.dim() == 3 else main_grad[None]
    grouped_wgrad(grad_t, input_t, offsets, out=stack, accumulate=True)
    return None


def _unpromoted_wgrad(grad_t: ScaledTensor, input_t: ScaledTensor, offsets: Tensor) -> Tensor:
    out = torch.zeros((offsets.shape[0], grad_t.shape[0], input_t.shape[0]))
    for group, (begin, end) in enumerate(_bounds(offsets)):
        first = -(-begin // BLOCK)  # each group begins at a block of its own
        if first * BLOCK < end:
            parts = []
            for t in (grad_t, input_t):
                blocks = slice(first, -(-end // BLOCK))
                columns = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
                parts.append(ScaledTensor(t.data[:, columns], t.scale[:, blocks], _ROW))
            out[group] = unpromoted.gemm(parts[0], parts[1], torch.float32, None)
    return out


def _bounds(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def coarse(t: Tensor | ScaledTensor, offsets: Tensor, pow2: bool) -> ScaledTensor:
    """``t`` [R, K] with one scale for each 128 x 128, whoever's rows they are: the experiment of appendix B.2."""
    dense = dequantize(t) if isinstance(t, ScaledTensor) else t.float()
    inside = torch.arange(t.shape[0], device=t.device)[:, None] < offsets[-1]
    square = quantize(torch.where(inside, dense, 0.0), SQUARE, pow2=pow2)
    return ScaledTensor(square.data, square.scale.repeat_interleave(BLOCK, 0)[: t.shape[0]], _ROW)
