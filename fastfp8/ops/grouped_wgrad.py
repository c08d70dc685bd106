"""The weight gradients of many groups of tokens: one launch, groups along the summed dimension, sizes on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, check_device, check_dtype, check_tensor, message, value_error
from ..layout import BLOCK, Block
from ..reference.grouped_wgrad import grouped_wgrad as reference_grouped_wgrad
from ..scaled_tensor import ScaledTensor
from .dequantize import check_scaled
from .gemm import K_ALIGNMENT, N_ALIGNMENT, OUTPUT_DTYPES, check_operand
from .grouped_gemm import check_error, word_for

_OP = "grouped_wgrad"
OPERAND_BLOCK: Block = (1, BLOCK)


def grouped_wgrad(
    grad_t: ScaledTensor,
    input_t: ScaledTensor,
    offsets: Tensor,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``grad_t[:, tokens of g] @ input_t[:, tokens of g].T`` for each group ``g``: Wgrad of a grouped linear layer.

    Group ``g`` is tokens ``begin`` to ``offsets[g]``, where ``begin`` is 0 for the first group and for the others
    ``offsets[g - 1]`` rounded up to a multiple of 128, so that no block of 128 tokens has two groups. Codes from
    ``offsets[g]`` to the end of its block take part and must be zero, as a quantiser that pads with zeros leaves them.
    Blocks that hold no token of any group are never read. A group is empty where ``offsets[g] <= begin``. Dense Wgrad
    is one group, with ``offsets`` = [T].

    The bits are those of ``gemm(grad_t[:, blocks of g], input_t[:, blocks of g])``, see :func:`fastfp8.gemm`: one
    promotion for each block of 128 tokens in ascending order, a single segment. With ``accumulate`` they are those with
    ``c = out[g]``: ``out`` is added in FP32 at the end, before the one rounding. DeepSeek-V3 report, sections 3.3.2 and
    3.5.

    Args:
        grad_t: gradient of the layer's output, transposed: [N, T] in (1, 128) blocks. T a multiple of 16; 0 too.
        input_t: the layer's input, transposed: [K, T] in (1, 128) blocks. K a multiple of 8.
        offsets: int32 [G] on the device of ``grad_t``: the token at which each group ends, ascending from 0 to at most
            T. G is at least 1 and, on a GPU, at most 1024. They are read by the kernel, never by the host, so that CUDA
            graphs may capture the call.
        out: contiguous float32 or bfloat16 [G, N, K] to write; on a GPU it starts at a multiple of 16 bytes. None makes
            one.
        accumulate: add to ``out``, as to a ``main_grad``. The matrix of an empty group stays as it is, bit for bit.
            Otherwise ``out`` is overwritten and never read, and the matrix of an empty group is zero.
        out_dtype: float32 or bfloat16. None is that of ``out`` if there is one, else float32. It cannot differ from
            that of ``out``.

    Returns:
        ``out``, or a new contiguous tensor [G, N, K] of ``out_dtype``.

    Raises:
        TypeError: an operand is not a ScaledTensor, ``accumulate`` is no bool, or a dtype is another.
        ValueError: shapes, blocks, devices or strides do not fit, or there is nothing to accumulate to. Codes are
            row-major, rows a multiple of 16 bytes apart. On a CPU also offsets that decrease, are negative or exceed T.
            On a GPU each of these is taken as ``min(T, max(0, largest offset so far))``, and the next
            :func:`fastfp8.check` raises.
    """
    for name, operand in (("grad_t", grad_t), ("input_t", input_t)):
        if not isinstance(operand, ScaledTensor):
            raise ArgumentTypeError(message(_OP, name, "a fastfp8.ScaledTensor", type(operand).__name__))
        if operand.block != OPERAND_BLOCK:
            raise value_error(_OP, name, f"blocks of {OPERAND_BLOCK}", f"blocks of {operand.block}")
    if not isinstance(accumulate, bool):
        raise ArgumentTypeError(message(_OP, "accumulate", "a bool", type(accumulate).__name__))
    if out_dtype is not None:
        check_dtype(out_dtype, _OP, "out_dtype", OUTPUT_DTYPES)
    check_tensor(offsets, _OP, "offsets", (torch.int32,), dim=1)
    operands = (grad_t.data, grad_t.scale, input_t.data, input_t.scale, offsets, word_for(offsets))
    if out is None:
        if accumulate:
            raise value_error(_OP, "out", "a tensor to accumulate to", None)
        made: Tensor = torch.ops.fastfp8.grouped_wgrad.default(*operands, out_dtype or torch.float32)
        return made
    check_tensor(out, _OP, "out", OUTPUT_DTYPES, dim=3)
    if out_dtype not in (None, out.dtype):
        raise ArgumentTypeError(message(_OP, "out_dtype", f"{out.dtype}, that of 'out', or None", out_dtype))
    torch.ops.fastfp8.grouped_wgrad.out(*operands, accumulate, out=out)
    return out


def _check(
    grad_t: Tensor,
    grad_t_scale: Tensor,
    input_t: Tensor,
    input_t_scale: Tensor,
    offsets: Tensor,
    error: Tensor | None,
) -> tuple[int, int, int]:
    """The shape [G, N, K] of the output."""
    check_scaled(_OP, "grad_t", grad_t, "grad_t_scale", grad_t_scale, OPERAND_BLOCK)
    check_scaled(_OP, "input_t", input_t, "input_t_scale", input_t_scale, OPERAND_BLOCK)
    check_tensor(offsets, _OP, "offsets", (torch.int32,), dim=1)
    check_device(input_t, _OP, "input_t", grad_t, "grad_t")
    check_device(offsets, _OP, "offsets", grad_t, "grad_t")
    (n, tokens), (k, input_tokens), groups = grad_t.shape, input_t.shape, offsets.shape[0]
    if groups < 1:
        raise value_error(_OP, "offsets", "at least one group", f"shape {tuple(offsets.shape)}")
    if groups > 1 and offsets.stride(0) != 1:
        raise value_error(_OP, "offsets", "a contiguous tensor", f"stride {tuple(offsets.stride())}")
    if input_tokens != tokens:
        raise value_error(_OP, "input_t", f"T = {tokens} columns, as 'grad_t' has", f"shape {tuple(input_t.shape)}")
    if tokens % K_ALIGNMENT:
        raise value_error(_OP, "grad_t", f"T a multiple of {K_ALIGNMENT}", f"T = {tokens}")
    if k % N_ALIGNMENT:
        raise value_error(_OP, "input_t", f"K a multiple of {N_ALIGNMENT}", f"K = {k}")
    for name, data in (("grad_t", grad_t), ("input_t", input_t)):
        check_operand(_OP, name, data)
    check_error(_OP, error, grad_t, "grad_t")
    return groups, n, k


def _check_out(shape: tuple[int, int, int], out: Tensor, grad_t: Tensor) -> None:
    check_tensor(out, _OP, "out", OUTPUT_DTYPES, dim=3)
    check_device(out, _OP, "out", grad_t, "grad_t")
    if tuple(out.shape) != shape:
        raise value_error(_OP, "out", f"shape {shape}", f"shape {tuple(out.shape)}")
    if not out.is_contiguous():
        raise value_error(_OP, "out", "a contiguous tensor", f"stride {tuple(out.stride())}")


@torch.library.impl("fastfp8::grouped_wgrad", "CPU")
@torch.no_grad()
def _cpu(
    grad_t: Tensor,
    grad_t_scale: Tensor,
    input_t: Tensor,
    input_t_scale: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    out: Tensor = _fake(grad_t, grad_t_scale, input_t, input_t_scale, offsets, error, out_dtype)
    reference_grouped_wgrad(grad_t, grad_t_scale, input_t, input_t_scale, offsets, out, False)
    return out


@torch.library.impl("fastfp8::grouped_wgrad.out", "CPU")
@torch.no_grad()
def _cpu_out(
    grad_t: Tensor,
    grad_t_scale: Tensor,
    input_t: Tensor,
    input_t_scale: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    accumulate: bool = False,
    *,
    out: Tensor,
) -> None:
    _check_out(_check(grad_t, grad_t_scale, input_t, input_t_scale, offsets, error), out, grad_t)
    reference_grouped_wgrad(grad_t, grad_t_scale, input_t, input_t_scale, offsets, out, accumulate)


@torch.library.impl("fastfp8::_grouped_wgrad_triton", "CUDA")
@torch.no_grad()
def _triton(
    grad_t: Tensor,
    grad_t_scale: Tensor,
    input_t: Tensor,
    input_t_scale: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> None:
    from ..triton_kernels.grouped_wgrad import grouped_wgrad as triton_grouped_wgrad

    triton_grouped_wgrad(grad_t, grad_t_scale, input_t, input_t_scale, offsets, error, out, accumulate)


@torch.library.register_fake("fastfp8::grouped_wgrad")
def _fake(
    grad_t: Tensor,
    grad_t_scale: Tensor,
    input_t: Tensor,
    input_t_scale: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    check_dtype(out_dtype, _OP, "out_dtype", OUTPUT_DTYPES)
    shape = _check(grad_t, grad_t_scale, input_t, input_t_scale, offsets, error)
    return torch.empty(shape, dtype=out_dtype, device=grad_t.device)


@torch.library.register_fake("fastfp8::grouped_wgrad.out")
def _fake_out(
    grad_t: Tensor,
    grad_t_scale: Tensor,
    input_t: Tensor,
    input_t_scale: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    accumulate: bool = False,
    *,
    out: Tensor,
) -> None:
    _check_out(_check(grad_t, grad_t_scale, input_t, input_t_scale, offsets, error), out, grad_t)
