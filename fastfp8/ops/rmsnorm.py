"""RMSNorm with the quantisation of its result to FP8, its gradients, and the same once more for Wgrad."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..counters import check_counters
from ..errors import check_device, check_tensor, check_type, check_value, value_error
from ..layout import BLOCK, Block, empty_scale, empty_transposed, pad16, scale_shape_of
from ..reference import rmsnorm as reference
from ..scaled_tensor import ScaledTensor
from .counted import register
from .quantize import INPUT_DTYPES
from .quantize_both import transposed_tensor

_FORWARD, _AGAIN, _BACKWARD = "rmsnorm_quantize", "rmsnorm_quantize_transpose", "rmsnorm_backward"
_BLOCK: Block = (1, BLOCK)


class Normalized(NamedTuple):
    """What :func:`rmsnorm_quantize` returns."""

    quantized: ScaledTensor
    """[M, K] in (1, 128) blocks, an operand of Fprop."""
    rstd: Tensor
    """float32 [M]: 1 / sqrt(mean of the squares + eps) of each row, for backward."""
    residual: Tensor | None
    """[M, K], ``x + residual`` in the dtype of ``residual``: what was normalised. None without ``residual``."""
    transposed: ScaledTensor | None
    """[K, M] in (1, 128) blocks along the tokens, an operand of Wgrad. None unless asked for."""


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    transpose: bool = False,
    pad: bool = False,
    pow2: bool = False,
    amax_floor: float = 0.0,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> Normalized:
    """``x / sqrt(mean(x * x) + eps) * weight`` of each row, quantised as :func:`fastfp8.quantize` does FP32.

    With ``residual`` it is ``x + residual``, added in FP32 and rounded to the dtype of ``residual``, that is
    normalised: the pre-norm of a transformer in one pass. Sum of squares, root and products are FP32 operations in an
    order that ``fastfp8/reference/rmsnorm.py`` states, so that the bits are the same on every backend and for any M. On
    a GPU each input is read once for K up to 8192, and twice beyond; ``transpose`` reads what is normalised once more.
    A NaN spoils its row, and an infinity, or a sum of squares beyond FP32, makes the row's other values 0; no other row
    sees them. DeepSeek-V3 report, sections 3.2 (RMSNorm is computed again in backward, see
    :func:`rmsnorm_quantize_transpose`) and 3.3.2.

    Args:
        x: bfloat16, float16 or float32 [M, K]; any extents and strides, CPU or CUDA.
        weight: bfloat16, float16 or float32 [K], contiguous.
        eps: what is added to the mean of the squares; from 2**-100 to 2**100, becomes FP32.
        residual: bfloat16, float16 or float32 [M, K], any strides, or None.
        transpose: whether to quantise the transpose of the result too.
        pad: as of :func:`fastfp8.quantize_both`, for the transpose.
        pow2: as of :func:`fastfp8.quantize`.
        amax_floor: the ``eps`` of :func:`fastfp8.quantize`: a floor of a block's amax.
        counters: as of :func:`fastfp8.quantize`, of the normalised values: what became of them in ``quantized``.
        counters_t: the same of ``transposed``.

    Returns:
        A :class:`Normalized`, which begins (quantized, rstd). It has no gradient: see :func:`rmsnorm_backward`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, strides or devices do not fit, a number is out of range, or ``pad`` or ``counters_t``
            comes without ``transpose``.
    """
    if not torch.compiler.is_compiling():  # there the fake implementation checks: Dynamo cannot trace all of it
        check_type(eps, (float, int), _FORWARD, "eps", "a number")
        _check_options(_FORWARD, pow2, amax_floor)
        for name, value in (("transpose", transpose), ("pad", pad)):
            check_type(value, bool, _FORWARD, name, "a bool")
        _check(x, weight, eps, residual, amax_floor, counters)
        check_counters(_FORWARD, counters_t, x, "x", "counters_t")
    if pad and not transpose:
        raise value_error(_FORWARD, "pad", "False without 'transpose'", pad)
    if counters_t is not None and not transpose:
        raise value_error(_FORWARD, "counters_t", "None without 'transpose'", "a tensor")
    op, arguments = torch.ops.fastfp8.rmsnorm_quantize, (x, weight, eps, residual, pow2, amax_floor)
    found = op.default(*arguments) if counters is None else op.counted(*arguments, counters=counters)
    data, scale, rstd, summed = found
    given = x if residual is None else summed
    turned = None
    if transpose:
        turned = rmsnorm_quantize_transpose(
            given, weight, rstd, pad=pad, pow2=pow2, amax_floor=amax_floor, counters=counters_t
        )
    return Normalized(ScaledTensor._trusted(data, scale, _BLOCK), rstd, None if residual is None else summed, turned)


def rmsnorm_quantize_transpose(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    pad: bool = False,
    pow2: bool = False,
    amax_floor: float = 0.0,
    counters: Tensor | None = None,
) -> ScaledTensor:
    """The normalised input computed again and quantised along the tokens, for Wgrad: the row-wise one is not written.

    Bit for bit the ``transposed`` of :func:`rmsnorm_quantize`, from one read of what forward kept in any case: the
    normalised values need not be. DeepSeek-V3 report, sections 3.2 and 3.3.2.

    Args:
        x: bfloat16, float16 or float32 [M, K], any strides: what was normalised.
        weight: as of :func:`rmsnorm_quantize`.
        rstd: float32 [M], contiguous, as it returned them.
        pad: as of :func:`fastfp8.quantize_both`.
        pow2, amax_floor, counters: as of :func:`rmsnorm_quantize`.

    Returns:
        ScaledTensor [K, M] in (1, 128) blocks, whose rows are M rounded up to 16 codes apart; with ``pad``
        [K, M rounded up to 16].

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, strides or devices do not fit, or ``amax_floor`` is out of range.
    """
    if not torch.compiler.is_compiling():
        _check_options(_AGAIN, pow2, amax_floor)
        check_type(pad, bool, _AGAIN, "pad", "a bool")
        _check_again(x, weight, rstd, amax_floor, counters)
    op, arguments = torch.ops.fastfp8.rmsnorm_quantize_transpose, (x, weight, rstd, pow2, amax_floor)
    data_t, scale_t = op.default(*arguments) if counters is None else op.counted(*arguments, counters=counters)
    return transposed_tensor(data_t, scale_t, None if pad else x.shape[0])


def rmsnorm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of RMSNorm with respect to its input and its weight, from one read of each argument.

    With ``n = x * rstd``: ``dx = (grad * weight - n * mean(grad * weight * n)) * rstd``, and ``dweight`` is the sum of
    ``grad * n`` over the rows. All sums have an order that ``fastfp8/reference/rmsnorm.py`` states: bit for bit equal
    on every backend and in every run. On a GPU, rows longer than 8192 are read twice.

    Args:
        grad: bfloat16, float16 or float32 [M, K], any strides: the gradient of the normalised values, before they were
            quantised.
        x: bfloat16, float16 or float32 [M, K], any strides: what was normalised.
        weight: as of :func:`rmsnorm_quantize`.
        rstd: float32 [M], contiguous, as it returned them.
        residual_grad: bfloat16, float16 or float32 [M, K], any strides, or None: is added to ``dx`` before that is
            rounded. With the gradient of the new residual, ``dx`` is that of ``x`` and of ``residual`` before.

    Returns:
        ``dx``, row-major [M, K] in the dtype of ``x``, and ``dweight``, float32 [K].

    Raises:
        TypeError: an argument has another dtype.
        ValueError: shapes, strides or devices do not fit.
    """
    if not torch.compiler.is_compiling():
        _check_backward(grad, x, weight, rstd, residual_grad)
    dx, dweight = torch.ops.fastfp8.rmsnorm_backward(grad, x, weight, rstd, residual_grad)
    return dx, dweight


def _check_options(op: str, pow2: object, amax_floor: object) -> None:
    check_type(pow2, bool, op, "pow2", "a bool")
    check_type(amax_floor, (float, int), op, "amax_floor", "a number")


def _check_vector(op: str, name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], extent: int, x: Tensor) -> None:
    check_tensor(value, op, name, dtypes, dim=1)
    if value.shape[0] != extent:
        of = "column" if name == "weight" else "row"
        raise value_error(op, name, f"shape {(extent,)}, one for each {of} of 'x'", f"shape {tuple(value.shape)}")
    if not value.is_contiguous():
        raise value_error(op, name, "a contiguous tensor", f"stride {tuple(value.stride())}")
    check_device(value, op, name, x, "x")


def _check_like(op: str, name: str, value: Tensor | None, x: Tensor) -> None:
    if value is None:
        return
    check_tensor(value, op, name, INPUT_DTYPES)
    if value.shape != x.shape:
        raise value_error(op, name, f"shape {tuple(x.shape)}, that of 'x'", f"shape {tuple(value.shape)}")
    check_device(value, op, name, x, "x")


def _check_input(op: str, x: Tensor, weight: Tensor) -> None:
    check_tensor(x, op, "x", INPUT_DTYPES)
    _check_vector(op, "weight", weight, INPUT_DTYPES, x.shape[1], x)


def _check_floor(op: str, amax_floor: float) -> None:
    check_value(0 <= amax_floor < 2.0**100, op, "amax_floor", "a number from 0 up to 2**100", amax_floor)


def _check(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, amax_floor: float, counters: Tensor | None
) -> None:
    _check_input(_FORWARD, x, weight)
    check_value(2.0**-100 <= eps <= 2.0**100, _FORWARD, "eps", "a positive number from 2**-100 to 2**100", eps)
    _check_like(_FORWARD, "residual", residual, x)
    _check_floor(_FORWARD, amax_floor)
    check_counters(_FORWARD, counters, x, "x")


def _check_again(x: Tensor, weight: Tensor, rstd: Tensor, amax_floor: float, counters: Tensor | None) -> None:
    _check_input(_AGAIN, x, weight)
    _check_vector(_AGAIN, "rstd", rstd, (torch.float32,), x.shape[0], x)
    _check_floor(_AGAIN, amax_floor)
    check_counters(_AGAIN, counters, x, "x")


def _check_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None) -> None:
    _check_input(_BACKWARD, x, weight)
    _check_vector(_BACKWARD, "rstd", rstd, (torch.float32,), x.shape[0], x)
    check_tensor(grad, _BACKWARD, "grad", INPUT_DTYPES)
    _check_like(_BACKWARD, "grad", grad, x)
    _check_like(_BACKWARD, "residual_grad", residual_grad, x)


@register("rmsnorm_quantize", "CPU")
@torch.no_grad()
def _cpu(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    pow2: bool = False,
    amax_floor: float = 0.0,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check(x, weight, eps, residual, amax_floor, counters)
    return reference.rmsnorm_quantize(x, weight, eps, residual, pow2, amax_floor, counters)


@register("rmsnorm_quantize", "CUDA")
@torch.no_grad()
def _cuda(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    pow2: bool = False,
    amax_floor: float = 0.0,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, ...]:
    from ..triton_kernels import rmsnorm as kernels

    _check(x, weight, eps, residual, amax_floor, counters)
    return kernels.rmsnorm_quantize(x, weight, eps, residual, pow2, amax_floor, counters)


@register("rmsnorm_quantize", "fake")
def _fake(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    pow2: bool = False,
    amax_floor: float = 0.0,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check(x, weight, eps, residual, amax_floor, counters)
    data = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = empty_scale(x, scale_shape_of(x.shape, _BLOCK), _BLOCK)
    summed = x.new_empty((0, x.shape[1])) if residual is None else residual.new_empty(x.shape)
    return data, scale, x.new_empty(x.shape[0], dtype=torch.float32), summed


@register("rmsnorm_quantize_transpose", "CPU")
@torch.no_grad()
def _again_cpu(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    pow2: bool = False,
    amax_floor: float = 0.0,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_again(x, weight, rstd, amax_floor, counters)
    return reference.rmsnorm_quantize_transpose(x, weight, rstd, pow2, amax_floor, counters)


@register("rmsnorm_quantize_transpose", "CUDA")
@torch.no_grad()
def _again_cuda(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    pow2: bool = False,
    amax_floor: float = 0.0,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from ..triton_kernels import rmsnorm as kernels

    _check_again(x, weight, rstd, amax_floor, counters)
    return kernels.rmsnorm_quantize_transpose(x, weight, rstd, pow2, amax_floor, counters)


@register("rmsnorm_quantize_transpose", "fake")
def _again_fake(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    pow2: bool = False,
    amax_floor: float = 0.0,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_again(x, weight, rstd, amax_floor, counters)
    return empty_transposed(x, x.shape[1], pad16(x.shape[0]))


@torch.library.impl("fastfp8::rmsnorm_backward", "CPU")
@torch.no_grad()
def _backward_cpu(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_backward(grad, x, weight, rstd, residual_grad)
    return reference.rmsnorm_backward(grad, x, weight, rstd, residual_grad)


@torch.library.impl("fastfp8::rmsnorm_backward", "CUDA")
@torch.no_grad()
def _backward_cuda(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from ..triton_kernels import rmsnorm as kernels

    _check_backward(grad, x, weight, rstd, residual_grad)
    return kernels.rmsnorm_backward(grad, x, weight, rstd, residual_grad)


@torch.library.register_fake("fastfp8::rmsnorm_backward")
def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_backward(grad, x, weight, rstd, residual_grad)
    return x.new_empty(x.shape), x.new_empty(x.shape[1], dtype=torch.float32)
