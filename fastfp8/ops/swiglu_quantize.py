"""SwiGLU with the quantisation of its result to FP8, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..counters import check_counters
from ..errors import check_device, check_tensor, check_type, check_value, value_error
from ..layout import BLOCK, Block, empty_scale, scale_shape
from ..reference.swiglu_quantize import swiglu_quantize as reference_swiglu_quantize
from ..scaled_tensor import ScaledTensor
from .counted import register
from .dequantize import check_scaled
from .quantize import INPUT_DTYPES, check_eps
from .quantize import check_options as check_quantize_options

_OP = "swiglu_quantize"
ROW_BLOCK: Block = (1, BLOCK)


def swiglu_quantize(
    gate_up: Tensor | ScaledTensor,
    weight: Tensor | None = None,
    limit: float | None = None,
    *,
    pow2: bool = False,
    eps: float = 0.0,
    counters: Tensor | None = None,
) -> ScaledTensor:
    """``silu(gate) * up * weight`` of each row, quantised as :func:`fastfp8.quantize` does FP32 in (1, 128) blocks.

    ``silu(g) = g / (1 + exp(-g))``, in FP32 with one rounding for each operation, then the products from left to right.
    The exponential is one of our own, within 1 ulp and bit for bit equal on every backend
    (``fastfp8/reference/activation.py``); silu is -0 below -88.37 and for -infinity. A NaN stays in its own place.
    DeepSeek-V3 report, section 3.3.3: the input of SwiGLU is kept for backward in FP8, its output computed again.

    Args:
        gate_up: bfloat16, float16 or float32 [M, 2 F], gate in the first F columns; any M and F, any strides. Or a
            ScaledTensor [M, 2 F] in (1, 128) blocks, what backward kept: its values are code times scale in FP32.
        weight: float32 [M], what each row is multiplied by (the weight that routing gives a token), or None.
        limit: clamps ``gate`` to at most ``limit`` and ``up`` to between ``-limit`` and ``limit`` first, as gpt-oss,
            DeepSeek-V4 and TileKernels do; positive, or None for no clamp. It becomes FP32.
        pow2: as of :func:`fastfp8.quantize`; so are ``eps`` and ``counters``.

    Returns:
        ScaledTensor [M, F] in (1, 128) blocks.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices do not fit, or a number is out of range.
    """
    values, values_scale = parts_of(_OP, gate_up)
    if not torch.compiler.is_compiling():  # there the fake implementation checks: Dynamo cannot trace all of it
        check_options(_OP, limit, pow2, eps)
        _check(values, weight, limit, eps, values_scale, counters)
    op, arguments = torch.ops.fastfp8.swiglu_quantize, (values, weight, limit, pow2, eps, values_scale)
    if counters is None:
        data, scale = op.default(*arguments)
    else:
        data, scale = op.counted(*arguments, counters=counters)
    return ScaledTensor._trusted(data, scale, ROW_BLOCK)


def check_options(op: str, limit: object, pow2: object, eps: object) -> None:
    """Raise unless the options have the types that the schemas of ``op`` ask for."""
    if limit is not None:
        check_type(limit, (float, int), op, "limit", "a number or None")
    check_quantize_options(op, pow2, eps)


def parts_of(op: str, gate_up: Tensor | ScaledTensor) -> tuple[Tensor, Tensor | None]:
    """The data and scale of a ScaledTensor in (1, 128) blocks, or what else it is and None."""
    if not isinstance(gate_up, ScaledTensor):
        return gate_up, None
    if gate_up.block != ROW_BLOCK:
        raise value_error(op, "gate_up", f"blocks of {ROW_BLOCK}", f"blocks of {gate_up.block}")
    return gate_up.data, gate_up.scale


def check_gate_up(op: str, gate_up: Tensor, gate_up_scale: Tensor | None) -> None:
    """Raise unless ``gate_up``, with a scale if it is FP8, can be gate and up of as many columns."""
    if gate_up_scale is None:
        check_tensor(gate_up, op, "gate_up", INPUT_DTYPES)
    else:
        check_scaled(op, "gate_up", gate_up, "gate_up_scale", gate_up_scale, ROW_BLOCK)
    if gate_up.shape[1] % 2:
        raise value_error(op, "gate_up", "an even number of columns: gate, then up", f"shape {tuple(gate_up.shape)}")


def check_swiglu(
    op: str,
    weight: Tensor | None,
    limit: float | None,
    eps: float,
    rows: int,
    like: Tensor,
    like_name: str = "gate_up",
) -> None:
    """Raise unless these go with ``rows`` rows of argument ``like_name`` of ``op``, which is ``like``."""
    if weight is not None:
        check_tensor(weight, op, "weight", (torch.float32,), dim=1)
        if weight.shape[0] != rows:
            raise value_error(op, "weight", f"shape {(rows,)}, one for each row", f"shape {tuple(weight.shape)}")
        check_device(weight, op, "weight", like, like_name)
    if limit is not None:
        check_value(2.0**-100 <= limit <= 2.0**100, op, "limit", "a positive number from 2**-100 to 2**100", limit)
    check_eps(op, eps)


def _check(
    gate_up: Tensor,
    weight: Tensor | None,
    limit: float | None,
    eps: float,
    gate_up_scale: Tensor | None,
    counters: Tensor | None,
) -> None:
    check_gate_up(_OP, gate_up, gate_up_scale)
    check_swiglu(_OP, weight, limit, eps, gate_up.shape[0], gate_up)
    check_counters(_OP, counters, gate_up, "gate_up")


@register("swiglu_quantize", "CPU")
@torch.no_grad()
def _cpu(
    gate_up: Tensor,
    weight: Tensor | None = None,
    limit: float | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    gate_up_scale: Tensor | None = None,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(gate_up, weight, limit, eps, gate_up_scale, counters)
    return reference_swiglu_quantize(gate_up, weight, limit, pow2, eps, gate_up_scale, counters)


@register("swiglu_quantize", "CUDA")
@torch.no_grad()
def _cuda(
    gate_up: Tensor,
    weight: Tensor | None = None,
    limit: float | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    gate_up_scale: Tensor | None = None,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from ..triton_kernels.swiglu_quantize import swiglu_quantize as triton_swiglu_quantize

    _check(gate_up, weight, limit, eps, gate_up_scale, counters)
    return triton_swiglu_quantize(gate_up, weight, limit, pow2, eps, gate_up_scale, counters)


@register("swiglu_quantize", "fake")
def _fake(
    gate_up: Tensor,
    weight: Tensor | None = None,
    limit: float | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    gate_up_scale: Tensor | None = None,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(gate_up, weight, limit, eps, gate_up_scale, counters)
    rows, f = gate_up.shape[0], gate_up.shape[1] // 2
    data = gate_up.new_empty((rows, f), dtype=torch.float8_e4m3fn)
    return data, empty_scale(gate_up, scale_shape(rows, f, ROW_BLOCK), ROW_BLOCK)
