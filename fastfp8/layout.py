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
"""

from __future__ import annotations

import torch

from .errors import value_error

BLOCK = 128
Block = tuple[int, int]
BLOCKS: tuple[Block, ...] = ((1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK))


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def pad4(n: int) -> int:
    """n rounded up to 4: the pitch of a column of FP32 scales, in floats."""
    return ceil_div(n, 4) * 4


def as_block(block: object, op: str, argument: str = "block", allowed: tuple[Block, ...] = BLOCKS) -> Block:
    """``block`` as a tuple of two ints, or an error that lists the allowed ones."""
    value = tuple(block) if isinstance(block, (tuple, list)) else ()
    if value not in allowed or not all(isinstance(extent, (int, torch.SymInt)) for extent in value):
        raise value_error(op, argument, " or ".join(map(str, allowed)), block)
    return int(value[0]), int(value[1])


def scale_shape(rows: int, cols: int, block: Block) -> tuple[int, int]:
    return ceil_div(rows, block[0]), ceil_div(cols, block[1])


def scale_strides(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """The strides that a freshly made scale of ``shape`` has."""
    rows, cols = shape
    if block == (1, BLOCK):
        return 1, pad4(rows)
    if block == (BLOCK, 1):
        return pad4(cols), 1
    return cols, 1


def empty_scale(like: torch.Tensor, shape: tuple[int, int], block: Block) -> torch.Tensor:
    """An uninitialised FP32 scale in the layout of ``block`` on the device of ``like``."""
    return torch.empty_strided(shape, scale_strides(shape, block), dtype=torch.float32, device=like.device)


def has_scale_layout(scale: torch.Tensor, block: Block) -> bool:
    """Whether the strides of ``scale`` are those of ``block``; the stride of an extent of 1 or 0 does not matter."""
    inner, outer = (0, 1) if block == (1, BLOCK) else (1, 0)
    if scale.numel() == 0:
        return True
    if scale.shape[inner] > 1 and scale.stride(inner) != 1:
        return False
    if scale.shape[outer] <= 1:
        return True
    pitch = scale.stride(outer)
    if block == (BLOCK, BLOCK):
        return bool(pitch == scale.shape[inner])
    return bool(pitch % 4 == 0 and pitch >= scale.shape[inner])


def scale_layout_name(block: Block) -> str:
    """How an error message describes the layout of ``block``'s scale."""
    return {
        (1, BLOCK): "stride (1, a multiple of 4 not below the number of rows)",
        (BLOCK, 1): "stride (a multiple of 4 not below the number of columns, 1)",
        (BLOCK, BLOCK): "a contiguous tensor",
    }[block]
