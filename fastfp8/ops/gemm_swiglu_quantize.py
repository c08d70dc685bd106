"""The first half of a gated MLP in one kernel: the product of gate and up, SwiGLU, and quantisation to FP8."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..counters import check_counters
from ..errors import ArgumentTypeError, check_tensor, check_type, message, value_error
from ..layout import BLOCK, empty_scale, scale_shape
from ..reference.gemm_swiglu_quantize import gemm_swiglu_quantize as reference_gemm_swiglu_quantize
from ..scaled_tensor import ScaledTensor
from .counted import register, tell
from .gemm import A_BLOCK, check_product
from .grouped_gemm import B_BLOCK, check_error, check_groups, word_for
from .swiglu_quantize import ROW_BLOCK, check_options, check_swiglu

_OP = "gemm_swiglu_quantize"


@overload
def gemm_swiglu_quantize(
    a: ScaledTensor,
    b: ScaledTensor,
    offsets: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    limit: float | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    return_gate_up: Literal[False] = False,
    counters: Tensor | None = None,
) -> ScaledTensor: ...


@overload
def gemm_swiglu_quantize(
    a: ScaledTensor,
    b: ScaledTensor,
    offsets: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    limit: float | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    return_gate_up: Literal[True],
    counters: Tensor | None = None,
) -> tuple[ScaledTensor, Tensor]: ...


def gemm_swiglu_quantize(
    a: ScaledTensor,
    b: ScaledTensor,
    offsets: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    limit: float | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    return_gate_up: bool = False,
    counters: Tensor | None = None,
) -> ScaledTensor | tuple[ScaledTensor, Tensor]:
    """``swiglu_quantize(a @ b.T, weight, limit)``, dense or in groups of rows: neither gate nor up goes to memory.

    ``gate_up = a @ b.T`` is rounded to bfloat16 before SwiGLU, so that what ``return_gate_up`` gives for backward is
    what was used. It is the product of :func:`fastfp8.gemm`, or of :func:`fastfp8.grouped_gemm` where there are
    ``offsets``, with all of K in one segment: bit for bit the same where those have one segment too. They have more
    where N = 2 F is at most 2112 and K above 1920 (``csrc/gemm/config.h``); there sums differ in the last bit of
    FP32, of which rounding to bfloat16 leaves little. The rest is bit for bit :func:`fastfp8.swiglu_quantize`.
    DeepSeek-V3 report, sections 3.3.2 and 3.3.3.

    Args:
        a: activations [T, K] in (1, 128) blocks. K a multiple of 16; any T, 0 too.
        b: weights [2 F, K] in (128, 128) blocks, the rows of gate before those of up, as two weights one below the
            other are. F a multiple of 128. With ``offsets``, [G, 2 F, K], one matrix a group.
        offsets: None, or int32 [G], the row at which each group ends, as of :func:`fastfp8.grouped_gemm`.
        weight: float32 [T], what each row is multiplied by, or None.
        limit: as of :func:`fastfp8.swiglu_quantize`; so are ``pow2`` and ``eps``.
        return_gate_up: return gate and up too.
        counters: as of :func:`fastfp8.quantize`, for the result. Of groups only their rows are counted.

    Returns:
        ScaledTensor [T, F] in (1, 128) blocks, which the next product takes as it is; with ``return_gate_up``, that and
        a row-major bfloat16 [T, 2 F]. Of rows from ``offsets[-1]`` on, nothing takes part and nothing is written: their
        codes, scales, gate and up are undefined.

    Raises:
        TypeError: an operand is not a ScaledTensor, or an argument has another type or dtype.
        ValueError: shapes, blocks, devices or strides do not fit, or a number is out of range. On a CPU also bad
            offsets; on a GPU these are brought into range, and the next :func:`fastfp8.check` raises.
    """
    for name, operand, block in (("a", a, A_BLOCK), ("b", b, B_BLOCK)):
        if not isinstance(operand, ScaledTensor):
            raise ArgumentTypeError(message(_OP, name, "a fastfp8.ScaledTensor", type(operand).__name__))
        if operand.block != block:
            raise value_error(_OP, name, f"blocks of {block}", f"blocks of {operand.block}")
    if offsets is not None:
        check_tensor(offsets, _OP, "offsets", (torch.int32,), dim=1)
    if weight is not None:
        check_tensor(weight, _OP, "weight", (torch.float32,), dim=1)
    check_options(_OP, limit, pow2, eps)
    check_type(return_gate_up, bool, _OP, "return_gate_up", "a bool")
    if not torch.compiler.is_compiling():  # there the fake implementation checks
        check_counters(_OP, counters, a.data, "a")
    # Without offsets nothing reports, but torch.compile wants the word (fastfp8/error_word.py).
    operands = (a.data, a.scale, b.data, b.scale, offsets, word_for(a.data))
    op, arguments = torch.ops.fastfp8.gemm_swiglu_quantize, (*operands, weight, limit, pow2, eps, return_gate_up)
    if counters is None:
        data, scale, gate_up = op.default(*arguments)
    else:
        data, scale, gate_up = op.counted(*arguments, counters=counters)
        if counters.is_cuda and not torch.compiler.is_compiling():
            tell([counters])  # as the C++ of the CUDA op cannot
    quantized = ScaledTensor._trusted(data, scale, ROW_BLOCK)
    return (quantized, gate_up) if return_gate_up else quantized


def _check(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor | None,
    error: Tensor | None,
    weight: Tensor | None,
    limit: float | None,
    eps: float,
    counters: Tensor | None,
) -> None:
    if offsets is None:
        check_product(_OP, a, a_scale, b, b_scale, B_BLOCK)
        check_error(_OP, error, a, "a")
    else:
        check_groups(_OP, a, a_scale, b, b_scale, "offsets", offsets, error)
    if b.shape[-2] % (2 * BLOCK):
        expected = f"2 F rows, F a multiple of {BLOCK}"
        raise value_error(_OP, "b", expected, f"shape {tuple(b.shape)}")
    check_swiglu(_OP, weight, limit, eps, a.shape[0], a, "a")
    check_counters(_OP, counters, a, "a")


@register(_OP, "CPU")
@torch.no_grad()
def _cpu(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor | None = None,
    error: Tensor | None = None,
    weight: Tensor | None = None,
    limit: float | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    return_gate_up: bool = False,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(a, a_scale, b, b_scale, offsets, error, weight, limit, eps, counters)
    operands = (a, a_scale, b, b_scale, offsets)
    return reference_gemm_swiglu_quantize(*operands, weight, limit, pow2, eps, return_gate_up, counters)


@torch.library.impl("fastfp8::_gemm_swiglu_quantize_triton", "CUDA")
@torch.no_grad()
def _triton(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor | None,
    error: Tensor | None,
    weight: Tensor | None,
    limit: float | None,
    pow2: bool,
    eps: float,
    return_gate_up: bool,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..triton_kernels.gemm_swiglu_quantize import gemm_swiglu_quantize as triton_gemm_swiglu_quantize

    operands = (a, a_scale, b, b_scale, offsets, error)
    return triton_gemm_swiglu_quantize(*operands, weight, limit, pow2, eps, return_gate_up, counters)


@register(_OP, "fake")
def _fake(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor | None = None,
    error: Tensor | None = None,
    weight: Tensor | None = None,
    limit: float | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    return_gate_up: bool = False,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(a, a_scale, b, b_scale, offsets, error, weight, limit, eps, counters)
    rows, n = a.shape[0], b.shape[-2]
    data = a.new_empty((rows, n // 2), dtype=torch.float8_e4m3fn)
    scale = empty_scale(a, scale_shape(rows, n // 2, ROW_BLOCK), ROW_BLOCK)
    return data, scale, a.new_empty((rows if return_gate_up else 0, n), dtype=torch.bfloat16)
