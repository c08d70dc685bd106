"""From FP8 in blocks back to a dense tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, check_device, check_dtype, check_tensor, message, value_error
from ..layout import Block, as_block, check_blocked, has_scale_layout, scale_layout_name, scale_shape_of
from ..reference.dequantize import dequantize as reference_dequantize
from ..scaled_tensor import ScaledTensor

_OP = "dequantize"
OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dequantize(t: ScaledTensor, dtype: torch.dtype = torch.bfloat16, *, add: Tensor | None = None) -> Tensor:
    """``t.data * t.scale``: the product in FP32, rounded once to ``dtype``. Bit for bit equal on every backend.

    With ``add``, a residual, it is ``t.data * t.scale + add``: the product and then the sum, each rounded to FP32, then
    rounded once to ``dtype``. It has no gradient.

    On a GPU a stack is one launch where its matrices lie one below the other and, of (128, 128) blocks, R is a multiple
    of 128; else it is one launch a matrix.

    Args:
        t: a ScaledTensor [R, C] or [G, R, C] of any block.
        dtype: bfloat16, float16 or float32.
        add: bfloat16, float16 or float32 in the shape of ``t``, any strides, on its device, or None.

    Returns:
        A row-major tensor of ``dtype`` in the shape of ``t`` on its device.

    Raises:
        TypeError: ``t`` is not a ScaledTensor, ``add`` no tensor of such a dtype, or ``dtype`` is another.
        ValueError: ``add`` has another shape or device.
    """
    if not isinstance(t, ScaledTensor):
        raise ArgumentTypeError(message(_OP, "t", "a fastfp8.ScaledTensor", type(t).__name__))
    check_dtype(dtype, _OP, "dtype", OUTPUT_DTYPES)
    if add is not None:
        _check_add(t.data, add)
    out: Tensor = torch.ops.fastfp8.dequantize(t.data, t.scale, t.block, dtype, add)
    return out


def check_scaled(
    op: str, name: str, data: Tensor, scale_name: str, scale: Tensor, block: Block, dim: int | None = 2
) -> None:
    """Raise unless arguments ``name`` and ``scale_name`` of ``op`` make a ScaledTensor of ``block``.

    It has ``dim`` dimensions; None lets through all that ``block`` allows.
    """
    if dim is None:
        check_blocked(data, op, name, (torch.float8_e4m3fn,), block)
    else:
        check_tensor(data, op, name, (torch.float8_e4m3fn,), dim)
    check_tensor(scale, op, scale_name, (torch.float32,), data.dim())
    check_device(scale, op, scale_name, data, name)
    shape, got = scale_shape_of(data.shape, block), tuple(scale.shape)
    if got != shape:
        raise value_error(op, scale_name, f"shape {shape}, one scale for each {block} block", f"shape {got}")
    if not has_scale_layout(scale, block):
        raise value_error(op, scale_name, scale_layout_name(block, scale.dim()), f"stride {tuple(scale.stride())}")


def _check_add(data: Tensor, add: Tensor) -> None:
    check_tensor(add, _OP, "add", OUTPUT_DTYPES, dim=data.dim())
    if add.shape != data.shape:
        raise value_error(_OP, "add", f"shape {tuple(data.shape)}, that of the codes", f"shape {tuple(add.shape)}")
    check_device(add, _OP, "add", data, "data")


def _check(data: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype, add: Tensor | None) -> Block:
    checked = as_block(block, _OP)
    check_dtype(dtype, _OP, "dtype", OUTPUT_DTYPES)
    check_scaled(_OP, "data", data, "scale", scale, checked, dim=None)
    if add is not None:
        _check_add(data, add)
    return checked


@torch.library.impl("fastfp8::dequantize", "CPU")
@torch.no_grad()
def _cpu(
    data: Tensor,
    scale: Tensor,
    block: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    add: Tensor | None = None,
) -> Tensor:
    return reference_dequantize(data, scale, _check(data, scale, block, dtype, add), dtype, add)


@torch.library.impl("fastfp8::dequantize", "CUDA")
@torch.no_grad()
def _cuda(
    data: Tensor,
    scale: Tensor,
    block: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    add: Tensor | None = None,
) -> Tensor:
    from ..triton_kernels.dequantize import dequantize as triton_dequantize

    return triton_dequantize(data, scale, _check(data, scale, block, dtype, add), dtype, add)


@torch.library.register_fake("fastfp8::dequantize")
def _fake(
    data: Tensor,
    scale: Tensor,
    block: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    add: Tensor | None = None,
) -> Tensor:
    _check(data, scale, block, dtype, add)
    return torch.empty(data.shape, dtype=dtype, device=data.device)
