"""Quantisation to FP8 in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import check_type, check_value
from ..layout import BLOCK, Block, as_block, check_blocked, empty_scale, scale_shape_of
from ..reference.quantize import quantize as reference_quantize
from ..scaled_tensor import ScaledTensor

_OP = "quantize"
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize(x: Tensor, block: Sequence[int] = (1, BLOCK), *, pow2: bool = False, eps: float = 0.0) -> ScaledTensor:
    """Quantise ``x`` [R, C], or a stack [G, R, C] matrix by matrix, to float8_e4m3fn with one FP32 scale a block.

    Per block: ``amax`` is the largest finite absolute value; ``scale = amax / 448`` (IEEE division); a code is
    ``x * (448 / amax)`` in FP32, rounded to nearest even and saturated. ``amax`` is floored at ``max(eps, 2**-110)``. A
    block of zeros has scale 1. An infinity saturates to +-448, a NaN stays a NaN (code 0x7F) in its own place, and
    neither touches the scale. Bit for bit equal on every backend. DeepSeek-V3 report, section 3.3.2. On a GPU a stack
    is one launch where its matrices lie one below the other and, of (128, 128) blocks, R is a multiple of 128; else it
    is one launch a matrix.

    Args:
        x: bfloat16, float16 or float32 [R, C] or, not in (128, 1) blocks, [G, R, C]; any extents (edge blocks are
            ragged, and none spans two matrices), any strides, CPU or CUDA.
        block: (1, 128) for activations and gradients, (128, 1) for Wgrad operands, (128, 128) for weights.
        pow2: round each scale up to a power of two; the multiplier is then its exact inverse.
        eps: a floor of amax, in units of ``x``: 1e-4 gives the codes of TileKernels.

    Returns:
        ScaledTensor of ``data`` in the shape of ``x``, row-major, and ``scale`` [ceil(R / block[0]),
        ceil(C / block[1])], of a stack [G, ...]; its layout is in :mod:`fastfp8.layout`.

    Raises:
        TypeError: ``x`` is not a tensor of such a dtype, ``pow2`` is no bool, or ``eps`` no number.
        ValueError: ``x`` has other dimensions, the block is another, or ``eps`` is negative or not finite.
    """
    checked = as_block(block, _OP)
    if not torch.compiler.is_compiling():  # there the fake implementation checks: Dynamo cannot trace all of it
        check_options(_OP, pow2, eps)
        _check(x, checked, eps)
    data, scale = torch.ops.fastfp8.quantize(x, checked, pow2, eps)
    return ScaledTensor._trusted(data, scale, checked)


def check_options(op: str, pow2: object, eps: object) -> None:
    """Raise unless ``pow2`` is a bool and ``eps`` a number."""
    check_type(pow2, bool, op, "pow2", "a bool")
    check_type(eps, (float, int), op, "eps", "a number")


def check_eps(op: str, eps: float) -> None:
    check_value(0 <= eps < 2.0**100, op, "eps", "a number from 0 up to 2**100", eps)


def _check(x: Tensor, block: Sequence[int], eps: float) -> Block:
    checked = as_block(block, _OP)
    check_blocked(x, _OP, "x", INPUT_DTYPES, checked)
    check_eps(_OP, eps)
    return checked


@torch.library.impl("fastfp8::quantize", "CPU")
def _cpu(x: Tensor, block: Sequence[int] = (1, BLOCK), pow2: bool = False, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    return reference_quantize(x, _check(x, block, eps), pow2, eps)


@torch.library.impl("fastfp8::quantize", "CUDA")
def _cuda(x: Tensor, block: Sequence[int] = (1, BLOCK), pow2: bool = False, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    from ..triton_kernels.quantize import quantize as triton_quantize

    return triton_quantize(x, _check(x, block, eps), pow2, eps)


@torch.library.register_fake("fastfp8::quantize")
def _fake(x: Tensor, block: Sequence[int] = (1, BLOCK), pow2: bool = False, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    checked = _check(x, block, eps)
    data = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return data, empty_scale(x, scale_shape_of(x.shape, checked), checked)
