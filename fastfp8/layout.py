"""Block shapes and the memory layout of their scales: stated once, used by every op.

A ``block`` (rows, cols) of an [R, C] tensor shares one FP32 scale, so the scale has the shape
[ceil(R / rows), ceil(C / cols)]; blocks at the edges may be ragged. In memory:

========== ======================== ======================================================================
block      scale of an [R, C] data  layout of the scale
========== ======================== ======================================================================
(1, 128)   [R, ceil(C/128)]         column-major, columns padded to 4 floats (16 bytes): stride (1, R4)
(128, 1)   [ceil(R/128), C]         row-major, rows padded to 4 floats: stride (C4, 1)
(128, 128) [ceil(R/128), ceil(C/128)] row-major, contiguous
========== ======================== ======================================================================

The first is what TMA loads (inner extent contiguous, outer stride a multiple of 16 bytes) and what torch's own
block-scaled ``scaled_mm`` takes. The second is its transpose, so transposing a ScaledTensor moves no scale.
Padding floats are never read nor written.

A stack [G, R, C] of G matrices is blocked matrix by matrix, so no block spans two of them:

========== ============================= =================================================================
block      scale of a [G, R, C] stack    layout of the scale
========== ============================= =================================================================
(1, 128)   [G, R, ceil(C/128)]           that of the [G * R, C] tensor: stride (R, 1, G * R rounded up to 4)
(128, 128) [G, ceil(R/128), ceil(C/128)] row-major, contiguous
========== ============================= =================================================================

So a stack in (1, 128) blocks is one tall matrix to a kernel. No op needs a stack in (128, 1) blocks: there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import check_tensor, value_error

BLOCK = 128
Block = tuple[int, int]
BLOCKS: tuple[Block, ...] = ((1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK))


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def pad4(n: int) -> int:
    """n rounded up to 4: the pitch of a column of FP32 scales, in floats."""
    return ceil_div(n, 4) * 4


def pad16(n: int) -> int:
    """n rounded up to 16: the pitch of a row of FP8 codes in bytes, as TMA wants it."""
    return ceil_div(n, 16) * 16


def grouped_tokens(tokens: int, groups: int) -> int:
    """The room that any split of ``tokens`` into ``groups`` finds, each of them padded to a multiple of 128.

    The most that can be needed and no more: every group that has a token may end with a block of a single one.
    """
    filled: int = torch.sym_min(tokens, groups)  # type: ignore[no-untyped-call]
    return (tokens + filled * (BLOCK - 1)) // BLOCK * BLOCK


def as_block(block: object, op: str, argument: str = "block", allowed: tuple[Block, ...] = BLOCKS) -> Block:
    """``block`` as a tuple of two ints, or an error that lists the allowed ones."""
    value = tuple(block) if isinstance(block, (tuple, list)) else ()
    if value not in allowed or not all(isinstance(extent, (int, torch.SymInt)) for extent in value):
        raise value_error(op, argument, " or ".join(map(str, allowed)), block)
    return int(value[0]), int(value[1])


def scale_shape(rows: int, cols: int, block: Block) -> tuple[int, int]:
    return ceil_div(rows, block[0]), ceil_div(cols, block[1])


def scale_shape_of(data_shape: Sequence[int], block: Block) -> tuple[int, ...]:
    """The shape of the scale of data [R, C] or [G, R, C]."""
    return *data_shape[:-2], *scale_shape(data_shape[-2], data_shape[-1], block)


def check_blocked(value: object, op: str, argument: str, dtypes: tuple[torch.dtype, ...], block: Block) -> None:
    """Raise unless ``value`` is a tensor of one of ``dtypes`` that blocks of ``block`` can cover: [R, C] or a stack."""
    check_tensor(value, op, argument, dtypes, dim=(2, 3))
    assert isinstance(value, torch.Tensor)
    if value.dim() == 3 and block == (BLOCK, 1):
        expected = "2 dimensions, because (128, 1) blocks of a stack of matrices are not supported"
        raise value_error(op, argument, expected, f"shape {tuple(value.shape)}")


def scale_strides(shape: Sequence[int], block: Block) -> tuple[int, ...]:
    """The strides that a freshly made scale of ``shape`` has."""
    rows, cols = shape[-2:]
    if len(shape) == 3:
        return (rows, 1, pad4(shape[0] * rows)) if block == (1, BLOCK) else (rows * cols, cols, 1)
    if block == (1, BLOCK):
        return 1, pad4(rows)
    if block == (BLOCK, 1):
        return pad4(cols), 1
    return cols, 1


def empty_scale(like: torch.Tensor, shape: Sequence[int], block: Block) -> torch.Tensor:
    """An uninitialised FP32 scale in the layout of ``block`` on the device of ``like``."""
    return torch.empty_strided(tuple(shape), scale_strides(shape, block), dtype=torch.float32, device=like.device)


def empty_transposed(like: torch.Tensor, features: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised codes [features, tokens] and their scale in (1, 128) blocks on the device of ``like``."""
    data = torch.empty((features, tokens), dtype=torch.float8_e4m3fn, device=like.device)
    block = (1, BLOCK)
    return data, empty_scale(data, scale_shape(features, tokens, block), block)


def has_scale_layout(scale: torch.Tensor, block: Block) -> bool:
    """Whether the strides of ``scale`` are those of ``block``; the stride of an extent of 1 or 0 does not matter."""
    if scale.numel() == 0:
        return True
    if scale.dim() == 3:
        return _has_stack_layout(scale, block)
    inner, outer = (0, 1) if block == (1, BLOCK) else (1, 0)
    if scale.shape[inner] > 1 and scale.stride(inner) != 1:
        return False
    if scale.shape[outer] <= 1:
        return True
    pitch = scale.stride(outer)
    if block == (BLOCK, BLOCK):
        return bool(pitch == scale.shape[inner])
    return bool(pitch % 4 == 0 and pitch >= scale.shape[inner])


def _has_stack_layout(scale: torch.Tensor, block: Block) -> bool:
    """has_scale_layout of a scale with three dimensions, none of them 0."""
    matrices, rows, blocks = scale.shape
    if block == (BLOCK, BLOCK):
        return scale.is_contiguous()
    if matrices > 1 and scale.stride(0) != rows:
        return False
    if rows > 1 and scale.stride(1) != 1:
        return False
    return blocks <= 1 or bool(scale.stride(2) % 4 == 0 and scale.stride(2) >= matrices * rows)


def scale_layout_name(block: Block, dim: int = 2) -> str:
    """How an error message describes the layout of ``block``'s scale of ``dim`` dimensions."""
    if dim == 3 and block == (1, BLOCK):
        return "stride (the number of rows, 1, a multiple of 4 not below the number of rows of all matrices)"
    return {
        (1, BLOCK): "stride (1, a multiple of 4 not below the number of rows)",
        (BLOCK, 1): "stride (a multiple of 4 not below the number of columns, 1)",
        (BLOCK, BLOCK): "a contiguous tensor",
    }[block]


def is_flat(stack: torch.Tensor) -> bool:
    """Whether the matrices of a [G, R, C] tensor lie one below the other, as the rows of one of [G * R, C] would."""
    matrices, rows, cols = stack.shape
    if matrices <= 1 or rows <= 1 or cols == 0:
        return True
    return bool(stack.stride(0) == rows * stack.stride(1))


def row_pitch(data: torch.Tensor) -> int:
    """Elements from row to row of a matrix or of a flat stack."""
    pitch: int = data.stride(0) if data.shape[-2] <= 1 else data.stride(-2)  # int() would make a symbol a constant
    return pitch


def as_matrices(block: Block, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Views [R, C] that make up what a blockwise op has to do on ``tensors``: x, data (and more) and scale, that last.

    Two-dimensional tensors are that already. A stack is one tall matrix where no block would span two of its matrices
    and strides allow the view; elsewhere each matrix is a problem, and a launch, of its own.
    """
    stack = tensors[0]
    if stack.dim() == 2:
        return [tensors]
    if stack.shape[1] % block[0] == 0 and all(is_flat(t) for t in tensors):
        return [tuple(t.flatten(0, 1) for t in tensors)]
    return [tuple(t[matrix] for t in tensors) for matrix in range(stack.shape[0])]
