"""Token rows to the rows of their experts, as grouped GEMMs take them, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..counters import check_counters
from ..errors import (
    ArgumentTypeError,
    check_device,
    check_dtype,
    check_tensor,
    check_type,
    check_value,
    message,
    value_error,
)
from ..layout import BLOCK, Block, empty_scale, scale_shape
from ..reference import permute as reference
from ..scaled_tensor import ScaledTensor
from .counted import register
from .dequantize import OUTPUT_DTYPES, check_scaled
from .grouped_gemm import check_error, word_for
from .quantize import INPUT_DTYPES
from .route import MAX_EXPERTS

_MAP, _PERMUTE, _QUANTIZE = "row_map", "permute", "permute_quantize"
_UNPERMUTE, _BACKWARD = "unpermute", "unpermute_backward"
INDEX_DTYPES = (torch.int64, torch.int32)
ROW_BLOCK: Block = (1, BLOCK)


class RowMap(NamedTuple):
    """Where each (token, k) goes and comes from; all on the device. Rows from ``offsets[-1]`` on belong to none."""

    offsets: Tensor
    """int32 [E]: the row at which each expert ends, as :func:`fastfp8.grouped_gemm` takes them."""
    rows: Tensor
    """int32 [T, top_k]: the row of each (token, k), or -1 where it has no expert."""
    slots: Tensor
    """int32 [T * top_k]: its inverse, ``token * top_k + k`` of each row, or -1 from ``offsets[-1]`` on."""


def row_map(topk_idx: Tensor, num_experts: int) -> RowMap:
    """Give each (token, k) a row: rows are grouped by expert, within an expert in the order of tokens, then of k.

    A counting sort whose places do not depend on the order in which a GPU's programs run. Sizes stay on the device: the
    host is not waited for, and CUDA graphs may capture it. Room is for T * top_k rows, all that there could be.

    Args:
        topk_idx: int64 or int32 [T, top_k], contiguous, as :func:`fastfp8.route` returns them: from 0 to below
            ``num_experts``, or -1 for none. Any T, 0 too; top_k at least 1; T * top_k below 2**31.
        num_experts: E, from 1 to 1024.

    Returns:
        A :class:`RowMap`.

    Raises:
        TypeError: ``topk_idx`` is no tensor of such a dtype, or ``num_experts`` no int.
        ValueError: shapes, strides or numbers do not fit. On a CPU also where an index is out of range. On a GPU that
            is taken as -1, and the next :func:`fastfp8.check` raises.
    """
    check_tensor(topk_idx, _MAP, "topk_idx", INDEX_DTYPES)
    if not torch.compiler.is_compiling():
        check_type(num_experts, int, _MAP, "num_experts", "an int")
    return RowMap(*torch.ops.fastfp8.row_map(topk_idx, num_experts, word_for(topk_idx)))


def permute(
    x: Tensor | ScaledTensor, topk_idx: Tensor | RowMap, num_experts: int | None = None
) -> tuple[Tensor | ScaledTensor, RowMap]:
    """Copy each token to the rows that :func:`row_map` gives it: the input of the experts' grouped GEMM.

    Row ``map.rows[t, k]`` of the result is token ``t``. Rows from ``map.offsets[-1]`` on are never written: their
    content is undefined. A dense ``x`` has a gradient: :func:`unpermute` of the result's without weights, so that FP32
    sums over k are rounded once.

    Args:
        x: bfloat16, float16 or float32 [T, H], any strides, or a ScaledTensor in (1, 128) blocks, whose codes and
            scales are moved as they are.
        topk_idx: int64 or int32 [T, top_k] as :func:`row_map` takes it, or the RowMap of an earlier call.
        num_experts: E; None with a RowMap.

    Returns:
        The rows [T * top_k, H], row-major, of the kind of ``x``, and the RowMap.

    Raises:
        TypeError: ``x`` is neither, or a dtype is another.
        ValueError: shapes, blocks, devices or strides do not fit; see :func:`row_map` for indices out of range.
    """
    where = _where(_PERMUTE, topk_idx, num_experts)
    if not isinstance(x, ScaledTensor):
        check_tensor(x, _PERMUTE, "x", INPUT_DTYPES)
        return torch.ops.fastfp8.permute(x, where.rows), where
    return permute_scaled(x, where), where


def permute_scaled(x: ScaledTensor, where: RowMap) -> ScaledTensor:
    """:func:`permute` of a ScaledTensor, which is an op of its own because it has two results."""
    if x.block != ROW_BLOCK:
        raise value_error(_PERMUTE, "x", f"blocks of {ROW_BLOCK}", f"blocks of {x.block}")
    data, scale = torch.ops.fastfp8.permute_scaled(x.data, x.scale, where.rows)
    return ScaledTensor._trusted(data, scale, ROW_BLOCK)


def permute_quantize(
    x: Tensor,
    topk_idx: Tensor | RowMap,
    num_experts: int | None = None,
    *,
    pow2: bool = False,
    eps: float = 0.0,
    counters: Tensor | None = None,
) -> tuple[ScaledTensor, RowMap]:
    """``permute(quantize(x))`` in one pass: each token is read and quantised once, and written top_k times.

    Bit for bit that, and so ``quantize(permute(x))`` too, because a (1, 128) block lies within a row. DeepSeek-V3
    report, sections 3.3.2 and 3.3.3.

    Args:
        x: bfloat16, float16 or float32 [T, H], any strides.
        topk_idx, num_experts: as :func:`permute` takes them.
        pow2, eps, counters: as :func:`fastfp8.quantize` takes them. Each token is counted once.

    Returns:
        A ScaledTensor [T * top_k, H] in (1, 128) blocks and the RowMap. It has no gradient.

    Raises:
        TypeError: a dtype or a Python type is another.
        ValueError: shapes, devices, strides or numbers do not fit; see :func:`row_map` for indices out of range.
    """
    if not torch.compiler.is_compiling():
        check_tensor(x, _QUANTIZE, "x", INPUT_DTYPES)
        check_type(pow2, bool, _QUANTIZE, "pow2", "a bool")
        check_type(eps, (float, int), _QUANTIZE, "eps", "a number")
        check_counters(_QUANTIZE, counters, x, "x")
    where = _where(_QUANTIZE, topk_idx, num_experts)
    op = torch.ops.fastfp8.permute_quantize
    if counters is None:
        data, scale = op.default(x, where.rows, pow2, eps)
    else:
        data, scale = op.counted(x, where.rows, pow2, eps, counters=counters)
    return ScaledTensor._trusted(data, scale, ROW_BLOCK), where


def unpermute(
    y: Tensor | ScaledTensor,
    where: RowMap,
    weights: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Gather the rows of each token and add them up: ``out[t] = sum over k of weights[t, k] * y[where.rows[t, k]]``.

    In FP32 from 0 for ascending k: a product, then a sum, each rounded once (of a ScaledTensor code times scale is a
    product before). One rounding to ``out_dtype`` at the end. A (token, k) without a row adds nothing. There are no
    atomics: bit for bit equal on every backend. DeepSeek-V3 report, sections 2.1.2 and 3.3.3.

    It has gradients with respect to a dense ``y`` and to ``weights``, once differentiable with weights: that of row
    (t, k) is ``weights[t, k] * grad[t]``, and that of a weight the product of the row and ``grad[t]``, summed in FP32
    in an order that ``fastfp8/reference/permute.py`` states. Rows from ``where.offsets[-1]`` on get none: there the
    gradient of ``y`` is not written.

    Args:
        y: bfloat16, float16 or float32 [T * top_k, H], any strides, or a ScaledTensor in (1, 128) blocks.
        where: what :func:`permute` returned.
        weights: float32 [T, top_k], contiguous, or None for 1.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        A row-major tensor [T, H] of ``out_dtype``.

    Raises:
        TypeError: an argument is of another kind or dtype.
        ValueError: shapes, blocks, devices or strides do not fit.
    """
    check_dtype(out_dtype, _UNPERMUTE, "out_dtype", OUTPUT_DTYPES)
    rows = _where(_UNPERMUTE, where, None, "where").rows
    if isinstance(y, ScaledTensor):
        if y.block != ROW_BLOCK:
            raise value_error(_UNPERMUTE, "y", f"blocks of {ROW_BLOCK}", f"blocks of {y.block}")
        data, scale = y.data, y.scale
    else:
        check_tensor(y, _UNPERMUTE, "y", INPUT_DTYPES)
        data, scale = y, None
    if weights is not None:
        check_tensor(weights, _UNPERMUTE, "weights", (torch.float32,))
    out: Tensor = torch.ops.fastfp8.unpermute(data, scale, rows, weights, out_dtype)
    return out


def unpermute_backward(grad: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`unpermute` with respect to ``y`` and ``weights``, which autograd calls.

    Args:
        grad: bfloat16, float16 or float32 [T, H], any strides: the gradient of the result.
        y: bfloat16, float16 or float32 [T * top_k, H], any strides.
        rows: int32 [T, top_k], contiguous: ``RowMap.rows``.
        weights: float32 [T, top_k], contiguous.

    Returns:
        The gradient of ``y``, row-major, in its dtype, not written where no (token, k) has its row; and that of
        ``weights``, float32 [T, top_k], 0 where there is no row.

    Raises:
        TypeError: a dtype is another.
        ValueError: shapes, devices or strides do not fit.
    """
    grad_y, grad_weights = torch.ops.fastfp8.unpermute_backward(grad, y, rows, weights)
    return grad_y, grad_weights


def _where(op: str, given: Tensor | RowMap, num_experts: int | None, name: str = "topk_idx") -> RowMap:
    """The RowMap itself, or that of indices."""
    if isinstance(given, RowMap):
        if num_experts is not None:
            raise value_error(op, "num_experts", "None with a RowMap", num_experts)
        return given
    if name == "where":
        raise ArgumentTypeError(message(op, name, "a fastfp8.RowMap", type(given).__name__))
    if num_experts is None:
        raise ArgumentTypeError(message(op, "num_experts", "an int", None))
    return row_map(given, num_experts)


def _check_map(topk_idx: Tensor, num_experts: int, error: Tensor | None) -> None:
    check_tensor(topk_idx, _MAP, "topk_idx", INDEX_DTYPES)
    if topk_idx.shape[1] < 1:
        raise value_error(_MAP, "topk_idx", "top_k of at least 1", f"shape {tuple(topk_idx.shape)}")
    if topk_idx.numel() >= 2**31:
        raise value_error(_MAP, "topk_idx", "fewer than 2**31 elements", f"shape {tuple(topk_idx.shape)}")
    if not topk_idx.is_contiguous():
        raise value_error(_MAP, "topk_idx", "a contiguous tensor", f"stride {tuple(topk_idx.stride())}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise value_error(_MAP, "num_experts", f"1 to {MAX_EXPERTS}", num_experts)
    check_error(_MAP, error, topk_idx, "topk_idx")


def _check_rows(op: str, rows: Tensor, like: Tensor, like_name: str) -> None:
    check_tensor(rows, op, "rows", (torch.int32,))
    check_device(rows, op, "rows", like, like_name)
    if rows.shape[1] < 1:
        raise value_error(op, "rows", "top_k of at least 1", f"shape {tuple(rows.shape)}")
    if rows.numel() >= 2**31:
        raise value_error(op, "rows", "fewer than 2**31 elements", f"shape {tuple(rows.shape)}")
    if not rows.is_contiguous():
        raise value_error(op, "rows", "a contiguous tensor", f"stride {tuple(rows.stride())}")


def _check_permute(op: str, x: Tensor, rows: Tensor) -> None:
    """Dtype, scale and dimensions of ``x`` are checked already."""
    _check_rows(op, rows, x, "x")
    if rows.shape[0] != x.shape[0]:
        raise value_error(op, "x", f"T = {rows.shape[0]} rows, as 'rows' has", f"shape {tuple(x.shape)}")


def _check_y(op: str, y: Tensor, rows: Tensor, weights: Tensor | None) -> None:
    """Dtype, scale and dimensions of ``y`` are checked already."""
    _check_rows(op, rows, y, "y")
    if y.shape[0] != rows.numel():
        expected = f"T * top_k = {rows.numel()} rows, as 'rows' has elements"
        raise value_error(op, "y", expected, f"shape {tuple(y.shape)}")
    if weights is None:
        return
    check_tensor(weights, op, "weights", (torch.float32,))
    check_device(weights, op, "weights", y, "y")
    if weights.shape != rows.shape:
        expected = f"shape {tuple(rows.shape)}, as 'rows' has"
        raise value_error(op, "weights", expected, f"shape {tuple(weights.shape)}")
    if not weights.is_contiguous():
        raise value_error(op, "weights", "a contiguous tensor", f"stride {tuple(weights.stride())}")


def _check_unpermute(
    y: Tensor, y_scale: Tensor | None, rows: Tensor, weights: Tensor | None, out_dtype: torch.dtype
) -> None:
    check_dtype(out_dtype, _UNPERMUTE, "out_dtype", OUTPUT_DTYPES)
    if y_scale is None:
        check_tensor(y, _UNPERMUTE, "y", INPUT_DTYPES)
    else:
        check_scaled(_UNPERMUTE, "y", y, "y_scale", y_scale, ROW_BLOCK)
    _check_y(_UNPERMUTE, y, rows, weights)


def _check_backward(grad: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> None:
    check_tensor(y, _BACKWARD, "y", INPUT_DTYPES)
    _check_y(_BACKWARD, y, rows, weights)
    check_tensor(grad, _BACKWARD, "grad", INPUT_DTYPES)
    check_device(grad, _BACKWARD, "grad", y, "y")
    shape = (rows.shape[0], y.shape[1])
    if tuple(grad.shape) != shape:
        raise value_error(_BACKWARD, "grad", f"shape {shape}", f"shape {tuple(grad.shape)}")


@torch.library.impl("fastfp8::row_map", "CPU")
def _map_cpu(topk_idx: Tensor, num_experts: int, error: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check_map(topk_idx, num_experts, error)
    return reference.row_map(topk_idx, num_experts)


@torch.library.impl("fastfp8::row_map", "CUDA")
def _map_cuda(topk_idx: Tensor, num_experts: int, error: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from ..triton_kernels.permute import row_map as triton_row_map

    _check_map(topk_idx, num_experts, error)
    return triton_row_map(topk_idx, num_experts, error)


@torch.library.register_fake("fastfp8::row_map")
def _map_fake(topk_idx: Tensor, num_experts: int, error: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check_map(topk_idx, num_experts, error)
    shapes = ((num_experts,), topk_idx.shape, (topk_idx.numel(),))
    offsets, rows, slots = (topk_idx.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return offsets, rows, slots


@torch.library.impl("fastfp8::permute", "CPU")
@torch.no_grad()
def _permute_cpu(x: Tensor, rows: Tensor) -> Tensor:
    check_tensor(x, _PERMUTE, "x", INPUT_DTYPES)
    _check_permute(_PERMUTE, x, rows)
    return reference.permute(x, rows)


@torch.library.impl("fastfp8::permute", "CUDA")
@torch.no_grad()
def _permute_cuda(x: Tensor, rows: Tensor) -> Tensor:
    from ..triton_kernels.permute import permute as triton_permute

    check_tensor(x, _PERMUTE, "x", INPUT_DTYPES)
    _check_permute(_PERMUTE, x, rows)
    return triton_permute(x, rows)


@torch.library.register_fake("fastfp8::permute")
def _permute_fake(x: Tensor, rows: Tensor) -> Tensor:
    check_tensor(x, _PERMUTE, "x", INPUT_DTYPES)
    _check_permute(_PERMUTE, x, rows)
    return x.new_empty((rows.numel(), x.shape[1]))


def _check_permute_scaled(x: Tensor, x_scale: Tensor, rows: Tensor) -> None:
    check_scaled(_PERMUTE, "x", x, "x_scale", x_scale, ROW_BLOCK)
    _check_permute(_PERMUTE, x, rows)


@torch.library.impl("fastfp8::permute_scaled", "CPU")
@torch.no_grad()
def _permute_scaled_cpu(x: Tensor, x_scale: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    _check_permute_scaled(x, x_scale, rows)
    return reference.permute_scaled(x, x_scale, rows)


@torch.library.impl("fastfp8::permute_scaled", "CUDA")
@torch.no_grad()
def _permute_scaled_cuda(x: Tensor, x_scale: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    from ..triton_kernels.permute import permute_scaled as triton_permute_scaled

    _check_permute_scaled(x, x_scale, rows)
    return triton_permute_scaled(x, x_scale, rows)


def _fake_scaled(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    data = x.new_empty((rows.numel(), x.shape[1]), dtype=torch.float8_e4m3fn)
    return data, empty_scale(data, scale_shape(rows.numel(), x.shape[1], ROW_BLOCK), ROW_BLOCK)


@torch.library.register_fake("fastfp8::permute_scaled")
def _permute_scaled_fake(x: Tensor, x_scale: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    _check_permute_scaled(x, x_scale, rows)
    return _fake_scaled(x, rows)


def _check_permute_quantize(x: Tensor, rows: Tensor, eps: float, counters: Tensor | None) -> None:
    check_tensor(x, _QUANTIZE, "x", INPUT_DTYPES)
    check_value(0 <= eps < 2.0**100, _QUANTIZE, "eps", "a number from 0 up to 2**100", eps)
    _check_permute(_QUANTIZE, x, rows)
    check_counters(_QUANTIZE, counters, x, "x")


@register("permute_quantize", "CPU")
def _permute_quantize_cpu(
    x: Tensor, rows: Tensor, pow2: bool = False, eps: float = 0.0, *, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_permute_quantize(x, rows, eps, counters)
    return reference.permute_quantize(x, rows, pow2, eps, counters)


@register("permute_quantize", "CUDA")
def _permute_quantize_cuda(
    x: Tensor, rows: Tensor, pow2: bool = False, eps: float = 0.0, *, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from ..triton_kernels.permute import permute_quantize as triton_permute_quantize

    _check_permute_quantize(x, rows, eps, counters)
    return triton_permute_quantize(x, rows, pow2, eps, counters)


@register("permute_quantize", "fake")
def _permute_quantize_fake(
    x: Tensor, rows: Tensor, pow2: bool = False, eps: float = 0.0, *, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_permute_quantize(x, rows, eps, counters)
    return _fake_scaled(x, rows)


@torch.library.impl("fastfp8::unpermute", "CPU")
@torch.no_grad()
def _unpermute_cpu(
    y: Tensor,
    y_scale: Tensor | None,
    rows: Tensor,
    weights: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    _check_unpermute(y, y_scale, rows, weights, out_dtype)
    return reference.unpermute(y, y_scale, rows, weights, out_dtype)


@torch.library.impl("fastfp8::unpermute", "CUDA")
@torch.no_grad()
def _unpermute_cuda(
    y: Tensor,
    y_scale: Tensor | None,
    rows: Tensor,
    weights: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    from ..triton_kernels.permute import unpermute as triton_unpermute

    _check_unpermute(y, y_scale, rows, weights, out_dtype)
    return triton_unpermute(y, y_scale, rows, weights, out_dtype)


@torch.library.register_fake("fastfp8::unpermute")
def _unpermute_fake(
    y: Tensor,
    y_scale: Tensor | None,
    rows: Tensor,
    weights: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    _check_unpermute(y, y_scale, rows, weights, out_dtype)
    return torch.empty((rows.shape[0], y.shape[1]), dtype=out_dtype, device=y.device)


@torch.library.impl("fastfp8::unpermute_backward", "CPU")
@torch.no_grad()
def _backward_cpu(grad: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    _check_backward(grad, y, rows, weights)
    return reference.unpermute_backward(grad, y, rows, weights)


@torch.library.impl("fastfp8::unpermute_backward", "CUDA")
@torch.no_grad()
def _backward_cuda(grad: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    from ..triton_kernels.permute import unpermute_backward as triton_unpermute_backward

    _check_backward(grad, y, rows, weights)
    return triton_unpermute_backward(grad, y, rows, weights)


@torch.library.register_fake("fastfp8::unpermute_backward")
def _backward_fake(grad: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    _check_backward(grad, y, rows, weights)
    return torch.empty(y.shape, dtype=y.dtype, device=y.device), torch.empty_like(weights)


def _permute_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.x_dtype = inputs[0].dtype


def _permute_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.fastfp8.unpermute(grad, None, *ctx.saved_tensors, None, ctx.x_dtype), None


def _unpermute_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, y_scale, rows, weights, _ = inputs
    # Without weights the gradient needs no y, and so none is kept.
    ctx.save_for_backward(*(None if weights is None else t for t in (y, y_scale)), rows, weights)
    ctx.y_dtype = y.dtype


def _unpermute_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    y, y_scale, rows, weights = ctx.saved_tensors
    if weights is None:
        return torch.ops.fastfp8.permute(grad, rows).to(ctx.y_dtype), None, None, None, None
    if y_scale is not None:
        y = torch.ops.fastfp8.dequantize(y, y_scale, ROW_BLOCK, torch.float32)
    grad_y, grad_weights = torch.ops.fastfp8.unpermute_backward(grad, y, rows, weights)
    return None if y_scale is not None else grad_y, None, None, grad_weights, None


torch.library.register_autograd("fastfp8::permute", _permute_gradient, setup_context=_permute_context)
torch.library.register_autograd("fastfp8::unpermute", _unpermute_gradient, setup_context=_unpermute_context)
