"""Packing to E5M6, 12 bits a value, unpacking, and requantisation to FP8."""

from __future__ import annotations

import torch
from torch import Tensor

from ..counters import check_counters
from ..errors import ArgumentTypeError, check_dtype, check_tensor, check_type, message, value_error
from ..layout import BLOCK, empty_scale, has_scale_layout, scale_layout_name, scale_shape
from ..packed_e5m6 import PackedE5M6, check_packed, group_of, words_shape
from ..reference.e5m6 import pack_e5m6 as reference_pack_e5m6
from ..reference.e5m6 import requantize_e5m6 as reference_requantize_e5m6
from ..reference.e5m6 import unpack_e5m6 as reference_unpack_e5m6
from ..scaled_tensor import ScaledTensor
from .counted import register
from .quantize import INPUT_DTYPES, check_eps, check_options

OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pack_e5m6(x: Tensor, *, pow2: bool = True, eps: float = 0.0, per_row: bool = False) -> PackedE5M6:
    """Pack ``x`` [R, C] to E5M6: 12 bits a value (sign, 5 of exponent, 6 of mantissa), one FP32 scale a 1x128 group.

    For what FP8 is too coarse to keep: the input of the Linear after attention (DeepSeek-V3 report, section 3.3.3).
    Per group ``amax`` is the largest finite absolute value, floored at ``max(eps, 2**-110)``; ``scale = amax / 65024``
    (IEEE division); a code is ``x * (65024 / amax)`` in FP32, rounded once to nearest even, subnormal codes too. Zeros
    alone have scale 1. An infinity stays one and a NaN stays one (code 0x7E0), in its own place, and neither touches
    the scale. Bit for bit equal on every backend.

    Args:
        x: bfloat16, float16 or float32 [R, C], any extents and strides, CPU or CUDA.
        pow2: round each scale up to a power of two, as the report does; the multiplier is then its exact inverse.
        eps: a floor of amax, in units of ``x``.
        per_row: one scale for each row. With ``eps=1e-4`` words and scales are where TileKernels has them, and so are
            the codes but for values that are subnormal in E5M6, which it does not round to nearest.

    Returns:
        PackedE5M6 of the shape of ``x``; how eight values lie in three words is stated there.

    Raises:
        TypeError: ``x`` is not a tensor of such a dtype, ``pow2`` or ``per_row`` is no bool, or ``eps`` no number.
        ValueError: ``x`` has other dimensions, or ``eps`` is negative or not finite.
    """
    op = "pack_e5m6"
    if not torch.compiler.is_compiling():
        check_options(op, pow2, eps)
        check_type(per_row, bool, op, "per_row", "a bool")
        _check_pack(x, eps)
    words, scale = torch.ops.fastfp8.pack_e5m6(x, pow2, eps, per_row)
    return PackedE5M6._trusted(words, scale, x.shape, per_row)


def unpack_e5m6(packed: PackedE5M6, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``code * scale`` as a dense tensor: the product is rounded to FP32 and then to ``dtype``, to nearest even.

    Args:
        packed: a PackedE5M6 [R, C].
        dtype: bfloat16, float16 or float32.

    Returns:
        Contiguous [R, C] of ``dtype`` on the device of ``packed``.

    Raises:
        TypeError: ``packed`` is no PackedE5M6, or ``dtype`` is another.
    """
    op = "unpack_e5m6"
    _check_is_packed(op, packed)
    check_dtype(dtype, op, "dtype", OUTPUT_DTYPES)
    out: Tensor = torch.ops.fastfp8.unpack_e5m6(packed.words, packed.scale, packed.shape[1], packed.per_row, dtype)
    return out


def requantize_e5m6(packed: PackedE5M6, *, pow2: bool = True, counters: Tensor | None = None) -> ScaledTensor:
    """``quantize(unpack_e5m6(packed, float32), (128, 1), pow2=pow2)`` in one pass: the re-tiling for Wgrad in backward.

    DeepSeek-V3 report, section 3.3.3. Bit for bit that composition: see :func:`fastfp8.quantize`.

    Args:
        packed: a PackedE5M6 [R, C].
        pow2: round the scales of the result up to powers of two.
        counters: as of :func:`fastfp8.quantize`.

    Returns:
        ScaledTensor [R, C] in (128, 1) blocks.

    Raises:
        TypeError: ``packed`` is no PackedE5M6, ``pow2`` no bool, or ``counters`` no int64 tensor.
        ValueError: ``counters`` have another shape, stride or device.
    """
    op = "requantize_e5m6"
    _check_is_packed(op, packed)
    check_type(pow2, bool, op, "pow2", "a bool")
    if not torch.compiler.is_compiling():  # there the fake implementation checks
        check_counters(op, counters, packed.words, "packed")
    arguments = (packed.words, packed.scale, packed.shape[1], packed.per_row, pow2)
    if counters is None:
        data, scale = torch.ops.fastfp8.requantize_e5m6.default(*arguments)
    else:
        data, scale = torch.ops.fastfp8.requantize_e5m6.counted(*arguments, counters=counters)
    return ScaledTensor._trusted(data, scale, (BLOCK, 1))


def _check_is_packed(op: str, packed: object) -> None:
    if not isinstance(packed, PackedE5M6):
        raise ArgumentTypeError(message(op, "packed", "a fastfp8.PackedE5M6", type(packed).__name__))


def _check_pack(x: Tensor, eps: float) -> None:
    check_tensor(x, "pack_e5m6", "x", INPUT_DTYPES)
    check_eps("pack_e5m6", eps)


def _check_words(op: str, words: Tensor, scale: Tensor, cols: int, per_row: bool) -> None:
    check_packed(op, words, scale, cols, per_row)
    if not has_scale_layout(scale, (1, BLOCK)):
        raise value_error(op, "scale", scale_layout_name((1, BLOCK)), f"stride {tuple(scale.stride())}")


def _check_requantize(words: Tensor, scale: Tensor, cols: int, per_row: bool, counters: Tensor | None) -> None:
    _check_words("requantize_e5m6", words, scale, cols, per_row)
    check_counters("requantize_e5m6", counters, words, "words")


@torch.library.impl("fastfp8::pack_e5m6", "CPU")
@torch.no_grad()
def _pack_cpu(x: Tensor, pow2: bool = True, eps: float = 0.0, per_row: bool = False) -> tuple[Tensor, Tensor]:
    _check_pack(x, eps)
    return reference_pack_e5m6(x, pow2, eps, per_row)


@torch.library.impl("fastfp8::pack_e5m6", "CUDA")
@torch.no_grad()
def _pack_cuda(x: Tensor, pow2: bool = True, eps: float = 0.0, per_row: bool = False) -> tuple[Tensor, Tensor]:
    from ..triton_kernels.e5m6 import pack_e5m6 as triton_pack_e5m6

    _check_pack(x, eps)
    return triton_pack_e5m6(x, pow2, eps, per_row)


@torch.library.register_fake("fastfp8::pack_e5m6")
def _pack_fake(x: Tensor, pow2: bool = True, eps: float = 0.0, per_row: bool = False) -> tuple[Tensor, Tensor]:
    _check_pack(x, eps)
    rows, cols = x.shape
    words = x.new_empty(words_shape(rows, cols), dtype=torch.int32)
    return words, empty_scale(x, scale_shape(rows, cols, group_of(cols, per_row)), (1, BLOCK))


@torch.library.impl("fastfp8::unpack_e5m6", "CPU")
@torch.no_grad()
def _unpack_cpu(
    words: Tensor, scale: Tensor, cols: int, per_row: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    check_dtype(dtype, "unpack_e5m6", "dtype", OUTPUT_DTYPES)
    _check_words("unpack_e5m6", words, scale, cols, per_row)
    return reference_unpack_e5m6(words, scale, cols, per_row, dtype)


@torch.library.impl("fastfp8::unpack_e5m6", "CUDA")
@torch.no_grad()
def _unpack_cuda(
    words: Tensor, scale: Tensor, cols: int, per_row: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    from ..triton_kernels.e5m6 import unpack_e5m6 as triton_unpack_e5m6

    check_dtype(dtype, "unpack_e5m6", "dtype", OUTPUT_DTYPES)
    _check_words("unpack_e5m6", words, scale, cols, per_row)
    return triton_unpack_e5m6(words, scale, cols, per_row, dtype)


@torch.library.register_fake("fastfp8::unpack_e5m6")
def _unpack_fake(
    words: Tensor, scale: Tensor, cols: int, per_row: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    check_dtype(dtype, "unpack_e5m6", "dtype", OUTPUT_DTYPES)
    _check_words("unpack_e5m6", words, scale, cols, per_row)
    return words.new_empty((words.shape[0], cols), dtype=dtype)


@register("requantize_e5m6", "CPU")
@torch.no_grad()
def _requantize_cpu(
    words: Tensor,
    scale: Tensor,
    cols: int,
    per_row: bool = False,
    pow2: bool = True,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_requantize(words, scale, cols, per_row, counters)
    return reference_requantize_e5m6(words, scale, cols, per_row, pow2, counters)


@register("requantize_e5m6", "CUDA")
@torch.no_grad()
def _requantize_cuda(
    words: Tensor,
    scale: Tensor,
    cols: int,
    per_row: bool = False,
    pow2: bool = True,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from ..triton_kernels.e5m6 import requantize_e5m6 as triton_requantize_e5m6

    _check_requantize(words, scale, cols, per_row, counters)
    return triton_requantize_e5m6(words, scale, cols, per_row, pow2, counters)


@register("requantize_e5m6", "fake")
def _requantize_fake(
    words: Tensor,
    scale: Tensor,
    cols: int,
    per_row: bool = False,
    pow2: bool = True,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_requantize(words, scale, cols, per_row, counters)
    data = words.new_empty((words.shape[0], cols), dtype=torch.float8_e4m3fn)
    return data, empty_scale(words, scale_shape(words.shape[0], cols, (BLOCK, 1)), (BLOCK, 1))
