"""The products of FP8 layers, and the padding that lets operands of any size be multiplied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentTypeError, message, value_error
from ..layout import pad16
from ..ops.gemm import gemm
from ..ops.grouped_wgrad import grouped_wgrad
from ..recipe import Recipe
from ..scaled_tensor import ScaledTensor
from . import unpromoted


def padded(size: int) -> int:
    """``size`` rounded up to a multiple of 16, one at least: each extent is the K of one of the three GEMMs."""
    return pad16(size) if size else 16


def pad(x: Tensor, *, rows: bool, cols: bool) -> Tensor:
    """``x`` [..., R, C] with zeros up to :func:`padded` rows and columns. They change neither an amax nor a product."""
    extra_rows, extra_cols = (
        padded(size) - size if wanted else 0 for size, wanted in zip(x.shape[-2:], (rows, cols), strict=True)
    )
    return F.pad(x, (0, extra_cols, 0, extra_rows)) if extra_rows or extra_cols else x


def crop(t: Tensor, rows: int, cols: int) -> Tensor:
    """The first ``rows`` and ``cols`` of ``t``, contiguous: ``t`` itself or a copy where columns go."""
    # No op here may return its own input, as contiguous() and a slice of all do: where such a result leaves the forward
    # of an autograd.Function, torch.compile in 2.11 gives gradients of zero, silently.
    if t.shape[1] != cols:
        t = t[:, :cols].clone(memory_format=torch.contiguous_format)
    return t if t.shape[0] == rows else t[:rows]


def product(
    a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype, c: Tensor | None = None, *, recipe: Recipe
) -> Tensor:
    """``a @ b.T + c`` as :func:`fastfp8.gemm`, in float16 too, and with the accumulation of ``recipe``.

    Raises:
        ValueError: the recipe promotes nothing, and the operands are not on a CPU.
    """
    computed = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    unpromotes = recipe.promotion is None
    out = unpromoted.gemm(a, b, computed, c) if unpromotes else gemm(a, b, out_dtype=computed, c=c)
    return out if out.dtype == out_dtype else out.to(out_dtype)


def accumulate(main_grad: Tensor, grad_t: ScaledTensor, input_t: ScaledTensor, *, recipe: Recipe) -> None:
    """Add Wgrad, ``grad_t @ input_t.T``, to ``main_grad`` in FP32; what is beyond its rows and columns is padding.

    Args:
        main_grad: float32 [N, K].
        grad_t: [at least N, T] in (1, 128) blocks, T a multiple of 16.
        input_t: [at least K, T] in (1, 128) blocks.
    """
    (rows, tokens), cols = grad_t.shape, input_t.shape[0]
    fits = main_grad.shape == (rows, cols) and main_grad.is_contiguous()
    # Dynamo cannot trace an offset; there a misaligned main_grad is the error of the op.
    fits = fits and (torch.compiler.is_compiling() or main_grad.storage_offset() % 4 == 0)
    if fits and recipe.promotion is not None:  # in the kernel: nothing is read or written but main_grad
        ends = torch.full((1,), tokens, dtype=torch.int32, device=main_grad.device)
        grouped_wgrad(grad_t, input_t, ends, out=main_grad[None], accumulate=True)
    else:
        dw = product(grad_t, input_t, torch.float32, recipe=recipe)
        main_grad.add_(dw[: main_grad.shape[0], : main_grad.shape[1]])


def main_grad_of(op: str, weight: Tensor) -> Tensor | None:
    """What backward is to accumulate the gradient of ``weight`` into; None where that is ``weight.grad``.

    Raises:
        TypeError: ``weight.main_grad`` is no float32 tensor.
        ValueError: it has another shape or device.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return None
    if not isinstance(main_grad, Tensor) or main_grad.dtype != torch.float32:
        got = getattr(main_grad, "dtype", type(main_grad).__name__)
        raise ArgumentTypeError(message(op, "weight.main_grad", "a torch.float32 tensor or None", got))
    if main_grad.shape != weight.shape or main_grad.device != weight.device:
        expected = f"shape {tuple(weight.shape)} on {weight.device}, as the weight"
        raise value_error(op, "weight.main_grad", expected, f"{tuple(main_grad.shape)} on {main_grad.device}")
    return main_grad
