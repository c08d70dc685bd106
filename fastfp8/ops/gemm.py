"""The dense FP8 GEMM with fine-grained scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, check_device, check_dtype, check_tensor, message, value_error
from ..layout import BLOCK, Block, as_block, is_flat, row_pitch
from ..reference.gemm import gemm as reference_gemm
from ..scaled_tensor import ScaledTensor
from .dequantize import check_scaled

_OP = "gemm"
OUTPUT_DTYPES = (torch.bfloat16, torch.float32)
A_BLOCK: Block = (1, BLOCK)
B_BLOCKS: tuple[Block, ...] = ((BLOCK, BLOCK), (1, BLOCK))
# A row of FP8 codes starts at a multiple of 16 bytes, and so does a row of BF16 output: what TMA asks of a stride.
K_ALIGNMENT, N_ALIGNMENT = 16, 8


def gemm(
    a: ScaledTensor,
    b: ScaledTensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    c: Tensor | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """``a @ b.T + c``, of operands in FP8 with fine-grained scales.

    For each 128-wide block of K in ascending order: ``partial`` is the tensor core's product of the codes from zero,
    and ``acc = fma(scale_a * scale_b, partial, acc)`` in FP32. Where N is small and K is large, K is cut into four or
    eight segments with an ``acc`` of their own, which are added in ascending order: how many depends on N and K alone,
    so that SMs can share a long sum of a few rows. Then ``c`` is added in FP32 and the sum rounded once. The result
    does not depend on M, on the tile or on the number of SMs. On the CPU the product is that of the dequantised
    operands in FP32. DeepSeek-V3 report, section 3.3.2.

    Args:
        a: activations or gradients [M, K] in (1, 128) blocks. K a multiple of 16; any M, 0 too.
        b: weights [N, K] in (128, 128) blocks, or a Wgrad operand in (1, 128) blocks. N a multiple of 8.
        out_dtype: bfloat16 or float32.
        c: bfloat16 or float32 [M, N] to add, row-major; an expanded row (stride 0) will do. None adds nothing.
        num_sms: the most SMs of the GPU to use, at least 1, so that the others are left to a kernel that runs beside
            this one, as communication does. None uses all. It changes no bit, and means nothing on the CPU.

    Returns:
        A row-major tensor [M, N] of ``out_dtype``.

    Raises:
        TypeError: an operand is not a ScaledTensor, or a dtype is another.
        ValueError: shapes, blocks, devices or strides do not fit. Data is row-major, rows a
            multiple of 16 bytes apart.
    """
    for name, operand in (("a", a), ("b", b)):
        if not isinstance(operand, ScaledTensor):
            raise ArgumentTypeError(message(_OP, name, "a fastfp8.ScaledTensor", type(operand).__name__))
    for name, operand, blocks in (("a", a, (A_BLOCK,)), ("b", b, B_BLOCKS)):
        if operand.block not in blocks:
            raise value_error(_OP, name, "blocks of " + " or ".join(map(str, blocks)), f"blocks of {operand.block}")
    check_dtype(out_dtype, _OP, "out_dtype", OUTPUT_DTYPES)
    if c is not None:
        check_tensor(c, _OP, "c", OUTPUT_DTYPES)
    if num_sms is not None and (isinstance(num_sms, bool) or not isinstance(num_sms, int)):
        raise ArgumentTypeError(message(_OP, "num_sms", "None or an integer", type(num_sms).__name__))
    out: Tensor = torch.ops.fastfp8.gemm(a.data, a.scale, b.data, b.scale, b.block, out_dtype, c, num_sms)
    return out


def check_rows(op: str, name: str, data: Tensor) -> None:
    """Row-major, rows apart by a multiple of 16 bytes: what TMA and vector loads ask for.

    Of a stack [G, R, C] the matrices lie one below the other, so that a kernel may see it as one of [G * R, C].
    """
    *matrices, rows, cols = data.shape
    several = rows > 1 or (matrices != [] and matrices[0] > 1)
    contiguous = cols <= 1 or data.stride(-1) == 1
    aligned = not several or cols == 0 or row_pitch(data) * data.element_size() % 16 == 0
    if not (contiguous and aligned):
        expected = "row-major data, rows 16 bytes apart or a multiple"
        raise value_error(op, name, expected, f"stride {tuple(data.stride())}")
    if matrices and not is_flat(data):
        expected = f"matrices one below the other, {rows} rows apart"
        raise value_error(op, name, expected, f"stride {tuple(data.stride())}")


def check_operand(op: str, name: str, data: Tensor) -> None:
    """check_rows, and that no two rows share memory."""
    check_rows(op, name, data)
    *matrices, rows, cols = data.shape
    if (rows > 1 or (matrices != [] and matrices[0] > 1)) and row_pitch(data) < cols:
        raise value_error(op, name, "rows that do not overlap", f"stride {tuple(data.stride())}")


def check_product(
    op: str, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, b_block: Block, *, a_dim: int = 2, b_dim: int = 2
) -> None:
    """Raise unless these are operands of a product that the kernels can read; those of three dimensions are stacks."""
    check_scaled(op, "a", a, "a_scale", a_scale, A_BLOCK, dim=a_dim)
    check_scaled(op, "b", b, "b_scale", b_scale, b_block, dim=b_dim)
    check_device(b, op, "b", a, "a")
    (n, b_k), k = b.shape[-2:], a.shape[-1]
    if b_k != k:
        raise value_error(op, "b", f"K = {k} columns, as 'a' has", f"shape {tuple(b.shape)}")
    if k % K_ALIGNMENT:
        raise value_error(op, "a", f"K a multiple of {K_ALIGNMENT}", f"K = {k}")
    if n % N_ALIGNMENT:
        raise value_error(op, "b", f"N a multiple of {N_ALIGNMENT}", f"N = {n}")
    for name, data in (("a", a), ("b", b)):
        check_operand(op, name, data)


def _check(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_block: Sequence[int],
    out_dtype: torch.dtype,
    c: Tensor | None,
    num_sms: int | None,
) -> Block:
    block = as_block(b_block, _OP, "b_block", B_BLOCKS)
    check_dtype(out_dtype, _OP, "out_dtype", OUTPUT_DTYPES)
    check_product(_OP, a, a_scale, b, b_scale, block)
    m, n = a.shape[0], b.shape[0]
    if c is not None:
        check_tensor(c, _OP, "c", OUTPUT_DTYPES)
        check_device(c, _OP, "c", a, "a")
        if tuple(c.shape) != (m, n):
            raise value_error(_OP, "c", f"shape {(m, n)}", f"shape {tuple(c.shape)}")
        check_rows(_OP, "c", c)
    if num_sms is not None and num_sms < 1:
        raise value_error(_OP, "num_sms", "None or at least 1", str(num_sms))
    return block


@torch.library.impl("fastfp8::gemm", "CPU")
@torch.no_grad()
def _cpu(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_block: Sequence[int] = (BLOCK, BLOCK),
    out_dtype: torch.dtype = torch.bfloat16,
    c: Tensor | None = None,
    num_sms: int | None = None,
) -> Tensor:
    block = _check(a, a_scale, b, b_scale, b_block, out_dtype, c, num_sms)
    return reference_gemm(a, a_scale, b, b_scale, block, out_dtype, c)


@torch.library.impl("fastfp8::_gemm_triton", "CUDA")
@torch.no_grad()
def _triton(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_block: Sequence[int],
    out_dtype: torch.dtype,
    c: Tensor | None,
    num_sms: int | None = None,
) -> Tensor:
    from ..triton_kernels.gemm import gemm as triton_gemm

    return triton_gemm(a, a_scale, b, b_scale, (b_block[0], b_block[1]), out_dtype, c, num_sms)


@torch.library.register_fake("fastfp8::gemm")
def _fake(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_block: Sequence[int] = (BLOCK, BLOCK),
    out_dtype: torch.dtype = torch.bfloat16,
    c: Tensor | None = None,
    num_sms: int | None = None,
) -> Tensor:
    _check(a, a_scale, b, b_scale, b_block, out_dtype, c, num_sms)
    return torch.empty((a.shape[0], b.shape[0]), dtype=out_dtype, device=a.device)
