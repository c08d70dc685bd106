"""GEMMs of many groups of rows, each with a weight of its own: one launch, sizes on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..error_word import error_word
from ..errors import ArgumentTypeError, check_device, check_dtype, check_tensor, message, value_error
from ..layout import BLOCK, Block
from ..reference import grouped_gemm as reference
from ..scaled_tensor import ScaledTensor
from .gemm import A_BLOCK, OUTPUT_DTYPES, check_product

_GROUPED, _MASKED = "grouped_gemm", "masked_grouped_gemm"
B_BLOCK: Block = (BLOCK, BLOCK)


def grouped_gemm(
    a: ScaledTensor, b: ScaledTensor, offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``a[rows of g] @ b[g].T`` for each group ``g`` of rows of ``a``: the experts of a mixture, in one launch.

    Group ``g`` is rows ``offsets[g - 1]`` (0 for the first) to ``offsets[g]``, as in ``torch._grouped_mm``. A group may
    start at any row and have any number of rows, none too. Each row of the result has the bits that
    :func:`fastfp8.gemm` gives it: ``gemm(a[rows], b[g])``, segments of K included. DeepSeek-V3 report, sections 3.3.2
    and 3.4.

    Rows from ``offsets[-1]`` on belong to no group. Neither codes nor scales there take part, and those rows of the
    result are never written: their content is undefined.

    Args:
        a: activations or gradients [T, K] in (1, 128) blocks. K a multiple of 16; any T, 0 too.
        b: weights [G, N, K] in (128, 128) blocks, one matrix a group, at least one and, on sm_90, at most 1024. N a
            multiple of 8.
        offsets: int32 [G] on the device of ``a``: the row at which each group ends, ascending from 0 to at most T. They
            are read by the kernel, never by the host, so that CUDA graphs may capture the call.
        out_dtype: bfloat16 or float32.

    Returns:
        A row-major tensor [T, N] of ``out_dtype``.

    Raises:
        TypeError: an operand is not a ScaledTensor, or a dtype is another.
        ValueError: shapes, blocks, devices or strides do not fit. Data is row-major, rows a multiple of 16 bytes apart,
            the matrices of ``b`` one below the other. On a CPU also offsets that decrease, are negative or exceed T.
            On a GPU each of these is taken as ``min(T, max(0, largest offset so far))``, and the next
            :func:`fastfp8.check` raises.
    """
    _check_scaled_tensors(_GROUPED, a, b, out_dtype)
    check_tensor(offsets, _GROUPED, "offsets", (torch.int32,), dim=1)
    word = word_for(offsets)
    out: Tensor = torch.ops.fastfp8.grouped_gemm(a.data, a.scale, b.data, b.scale, offsets, word, out_dtype)
    return out


def masked_grouped_gemm(
    a: ScaledTensor, b: ScaledTensor, counts: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``a[g, :counts[g]] @ b[g].T`` for each group ``g``: for decoding, where shapes must not change between calls.

    Each group has room for M rows, of which the first ``counts[g]`` are filled. Each row of the result has the bits
    that :func:`fastfp8.gemm` gives it: ``gemm(a[g], b[g])``. DeepSeek-V3 report, sections 3.3.2 and 3.4.2.

    Neither codes nor scales of the other rows take part, and those rows of the result are never written: their content
    is undefined.

    Args:
        a: activations [G, M, K] in (1, 128) blocks. K a multiple of 16; any M, 0 too.
        b: weights [G, N, K] in (128, 128) blocks, at least one matrix and, on sm_90, at most 1024. N a multiple of 8.
        counts: int32 [G] on the device of ``a``: the rows that each group has, from 0 to M. They are read by the
            kernel, never by the host, so that CUDA graphs may capture the call.
        out_dtype: bfloat16 or float32.

    Returns:
        A row-major tensor [G, M, N] of ``out_dtype``.

    Raises:
        TypeError: an operand is not a ScaledTensor, or a dtype is another.
        ValueError: shapes, blocks, devices or strides do not fit. Data is row-major, rows a multiple of 16 bytes apart,
            the matrices of ``a`` and of ``b`` one below the other. On a CPU also counts below 0 or above M. On a GPU
            these are taken as 0 or M, and the next :func:`fastfp8.check` raises.
    """
    _check_scaled_tensors(_MASKED, a, b, out_dtype)
    check_tensor(counts, _MASKED, "counts", (torch.int32,), dim=1)
    word = word_for(counts)
    out: Tensor = torch.ops.fastfp8.masked_grouped_gemm(a.data, a.scale, b.data, b.scale, counts, word, out_dtype)
    return out


def word_for(tensor: Tensor) -> Tensor | None:
    """The error word of the device of an argument: none with a fake tensor, which meets no real one."""
    return error_word(tensor.device) if type(tensor) is Tensor else None


def check_error(op: str, error: Tensor | None, like: Tensor, like_name: str) -> None:
    """Raise unless ``error`` can be an error word on the device of argument ``like_name``."""
    if error is None:
        return
    check_tensor(error, op, "error", (torch.int32,), dim=1)
    check_device(error, op, "error", like, like_name)
    if tuple(error.shape) != (1,):
        raise value_error(op, "error", "shape (1,)", f"shape {tuple(error.shape)}")


def _check_scaled_tensors(op: str, a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype) -> None:
    for name, operand, block in (("a", a, A_BLOCK), ("b", b, B_BLOCK)):
        if not isinstance(operand, ScaledTensor):
            raise ArgumentTypeError(message(op, name, "a fastfp8.ScaledTensor", type(operand).__name__))
        if operand.block != block:
            raise value_error(op, name, f"blocks of {block}", f"blocks of {operand.block}")
    check_dtype(out_dtype, op, "out_dtype", OUTPUT_DTYPES)


def check_groups(
    op: str,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    sizes_name: str,
    sizes: Tensor,
    error: Tensor | None,
    *,
    masked: bool = False,
) -> None:
    """Raise unless these are operands of a grouped product, masked or with offsets."""
    check_product(op, a, a_scale, b, b_scale, B_BLOCK, a_dim=3 if masked else 2, b_dim=3)
    check_tensor(sizes, op, sizes_name, (torch.int32,), dim=1)
    check_device(sizes, op, sizes_name, a, "a")
    groups = b.shape[0]
    if groups < 1:
        raise value_error(op, "b", "at least one group", f"shape {tuple(b.shape)}")
    if masked and a.shape[0] != groups:
        raise value_error(op, "a", f"{groups} groups, as 'b' has", f"shape {tuple(a.shape)}")
    if tuple(sizes.shape) != (groups,):
        raise value_error(
            op, sizes_name, f"shape {(groups,)}, one for each group of 'b'", f"shape {tuple(sizes.shape)}"
        )
    if groups > 1 and sizes.stride(0) != 1:
        raise value_error(op, sizes_name, "a contiguous tensor", f"stride {tuple(sizes.stride())}")
    check_error(op, error, a, "a")


def _check(
    op: str,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    sizes: Tensor,
    error: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    masked = op == _MASKED
    check_dtype(out_dtype, op, "out_dtype", OUTPUT_DTYPES)
    sizes_name = "counts" if masked else "offsets"
    check_groups(op, a, a_scale, b, b_scale, sizes_name, sizes, error, masked=masked)


def _register(op: str) -> None:
    """The CPU, Triton and fake implementations of an op: the two differ in the shape of ``a`` and in what sizes say."""

    @torch.library.impl(f"fastfp8::{op}", "CPU")
    @torch.no_grad()
    def cpu(
        a: Tensor,
        a_scale: Tensor,
        b: Tensor,
        b_scale: Tensor,
        sizes: Tensor,
        error: Tensor | None,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        _check(op, a, a_scale, b, b_scale, sizes, error, out_dtype)
        out: Tensor = getattr(reference, op)(a, a_scale, b, b_scale, sizes, out_dtype)
        return out

    @torch.library.impl(f"fastfp8::_{op}_triton", "CUDA")
    @torch.no_grad()
    def triton(
        a: Tensor,
        a_scale: Tensor,
        b: Tensor,
        b_scale: Tensor,
        sizes: Tensor,
        error: Tensor | None,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        from ..triton_kernels import grouped_gemm as kernels

        out: Tensor = getattr(kernels, op)(a, a_scale, b, b_scale, sizes, error, out_dtype)
        return out

    @torch.library.register_fake(f"fastfp8::{op}")
    def fake(
        a: Tensor,
        a_scale: Tensor,
        b: Tensor,
        b_scale: Tensor,
        sizes: Tensor,
        error: Tensor | None,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        _check(op, a, a_scale, b, b_scale, sizes, error, out_dtype)
        return torch.empty((*a.shape[:-1], b.shape[1]), dtype=out_dtype, device=a.device)


for _op in (_GROUPED, _MASKED):
    _register(_op)
