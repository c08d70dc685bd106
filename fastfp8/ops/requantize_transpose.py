"""From FP8 in blocks along one dimension to the transpose in FP8, in blocks along the other."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..counters import check_counters
from ..errors import ArgumentTypeError, check_tensor, check_type, message, value_error
from ..layout import BLOCK, Block, empty_transposed, grouped_tokens, pad16
from ..reference import requantize_transpose as reference
from ..scaled_tensor import ScaledTensor
from .counted import register
from .dequantize import check_scaled
from .grouped_gemm import word_for
from .quantize_both import check_offsets, transposed_tensor

_OP = "requantize_transpose"
_BLOCK: Block = (1, BLOCK)


@overload
def requantize_transpose(
    t: ScaledTensor, offsets: None = None, *, pad: bool = False, counters: Tensor | None = None
) -> ScaledTensor: ...


@overload
def requantize_transpose(
    t: ScaledTensor, offsets: Tensor, *, pad: bool = False, counters: Tensor | None = None
) -> tuple[ScaledTensor, Tensor]: ...


def requantize_transpose(
    t: ScaledTensor, offsets: Tensor | None = None, *, pad: bool = False, counters: Tensor | None = None
) -> ScaledTensor | tuple[ScaledTensor, Tensor]:
    """``quantize(dequantize(t).T, pow2=True)`` in one pass from FP8 to FP8: a saved input becomes an operand of Wgrad.

    The dequantised values are taken in FP32. A block of the result has 128 tokens of one column; its scale is the
    smallest power of two not below ``amax / 448``, where ``amax`` is the true one of those values. So where the scales
    of ``t`` are powers of two too (``quantize(..., pow2=True)``), every value comes back but for those that become
    subnormal codes, smaller than 2**-6 times the new scale: these are rounded once more. With other scales all values
    are. DeepSeek-V3 report, sections 3.3.3 and 3.5.

    Args:
        t: activations or gradients [M, K] in (1, 128) blocks; any extents, CPU or CUDA.
        offsets: None, or groups of tokens as in :func:`fastfp8.quantize_grouped_both`: int32 [G] on the device of
            ``t``, the row at which each ends.
        pad: whether the result has zeros up to the next multiple of 16 tokens, as in :func:`fastfp8.quantize_both`.
            Groups are always padded, to 128.
        counters: as of :func:`fastfp8.quantize`, for the dequantised values. Of groups only their rows are counted.

    Returns:
        Without ``offsets`` a ScaledTensor [K, M] in (1, 128) blocks, whose rows are M rounded up to 16 codes apart;
        with ``pad`` [K, M rounded up to 16]. With ``offsets`` a ScaledTensor [K, T'] and ``padded_offsets``, the last
        two results of :func:`fastfp8.quantize_grouped_both`, for which its docstring tells what is undefined.

    Raises:
        TypeError: ``t`` is not a ScaledTensor, ``offsets`` no int32 tensor, or ``pad`` no bool.
        ValueError: ``t`` has other blocks or dimensions, or ``offsets`` another shape, stride or device. Bad offsets as
            in :func:`fastfp8.quantize_grouped_both`.
    """
    if not isinstance(t, ScaledTensor):
        raise ArgumentTypeError(message(_OP, "t", "a fastfp8.ScaledTensor", type(t).__name__))
    if t.block != _BLOCK:
        raise value_error(_OP, "t", f"blocks of {_BLOCK}", f"blocks of {t.block}")
    check_type(pad, bool, _OP, "pad", "a bool")
    check_counters(_OP, counters, t.data, "t")
    op = torch.ops.fastfp8.requantize_transpose
    if offsets is None:
        if counters is None:
            data_t, scale_t = op.default(t.data, t.scale)
        else:
            data_t, scale_t = op.counted(t.data, t.scale, counters=counters)
        return transposed_tensor(data_t, scale_t, None if pad else t.shape[0])
    check_tensor(offsets, _OP, "offsets", (torch.int32,), dim=1)
    arguments = (t.data, t.scale, offsets, word_for(offsets))
    if counters is None:
        data_t, scale_t, ends_t = op.grouped(*arguments)
    else:
        data_t, scale_t, ends_t = op.grouped_counted(*arguments, counters=counters)
    return ScaledTensor._trusted(data_t, scale_t, _BLOCK), ends_t


def _check(data: Tensor, scale: Tensor, counters: Tensor | None) -> None:
    check_scaled(_OP, "data", data, "scale", scale, _BLOCK)
    check_counters(_OP, counters, data, "data")


def _check_grouped(data: Tensor, scale: Tensor, offsets: Tensor, error: Tensor | None, counters: Tensor | None) -> None:
    _check(data, scale, counters)
    check_offsets(_OP, offsets, error, data, "data")


@register("requantize_transpose", "CPU")
@torch.no_grad()
def _cpu(data: Tensor, scale: Tensor, *, counters: Tensor | None = None) -> tuple[Tensor, ...]:
    _check(data, scale, counters)
    return reference.requantize_transpose(data, scale, counters)


@register("requantize_transpose", "CUDA")
@torch.no_grad()
def _cuda(data: Tensor, scale: Tensor, *, counters: Tensor | None = None) -> tuple[Tensor, ...]:
    from ..triton_kernels import requantize_transpose as kernels

    _check(data, scale, counters)
    return kernels.requantize_transpose(data, scale, counters)


@register("requantize_transpose", "fake")
def _fake(data: Tensor, scale: Tensor, *, counters: Tensor | None = None) -> tuple[Tensor, ...]:
    _check(data, scale, counters)
    return empty_transposed(data, data.shape[1], pad16(data.shape[0]))


@register("requantize_transpose.grouped", "CPU")
@torch.no_grad()
def _grouped_cpu(
    data: Tensor, scale: Tensor, offsets: Tensor, error: Tensor | None, *, counters: Tensor | None = None
) -> tuple[Tensor, ...]:
    _check_grouped(data, scale, offsets, error, counters)
    return reference.requantize_grouped_transpose(data, scale, offsets, counters)


@register("requantize_transpose.grouped", "CUDA")
@torch.no_grad()
def _grouped_cuda(
    data: Tensor, scale: Tensor, offsets: Tensor, error: Tensor | None, *, counters: Tensor | None = None
) -> tuple[Tensor, ...]:
    from ..triton_kernels import requantize_transpose as kernels

    _check_grouped(data, scale, offsets, error, counters)
    return kernels.requantize_grouped_transpose(data, scale, offsets, error, counters)


@register("requantize_transpose.grouped", "fake")
def _grouped_fake(
    data: Tensor, scale: Tensor, offsets: Tensor, error: Tensor | None, *, counters: Tensor | None = None
) -> tuple[Tensor, ...]:
    _check_grouped(data, scale, offsets, error, counters)
    tokens = grouped_tokens(data.shape[0], offsets.shape[0])
    return *empty_transposed(data, data.shape[1], tokens), torch.empty_like(offsets)
