"""Triton kernels: same names as in ``fastfp8/ops``, for every GPU from sm_89 on. What they share is here.

Nothing imports this package before an op is called on a GPU, so a torch without Triton is fine until then.

Every launch says ``enable_fp_fusion=False``: the contract of numerics names each rounding, and Triton up to 3.9 would
contract a product and a sum into an fma by default.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..layout import BLOCK, Block, ceil_div

# Triton knows float8_e4m3fn from this compute capability on. Below it, compilation fails with a traceback.
FP8_CAPABILITY = (8, 9)


class Tile(NamedTuple):
    """What one program of a blockwise kernel works on. Along a side that the block spans, exactly one block."""

    rows: int
    cols: int
    num_warps: int

    def grid(self, rows: int, cols: int) -> tuple[int]:
        return (ceil_div(rows, self.rows) * ceil_div(cols, self.cols),)


# A thread loads 16 bytes of BF16 two, four or eight times. Untuned.
TILES: dict[Block, Tile] = {
    (1, BLOCK): Tile(16, BLOCK, 4),
    (BLOCK, 1): Tile(BLOCK, 64, 4),
    (BLOCK, BLOCK): Tile(BLOCK, BLOCK, 8),
}


def require_fp8(op: str, device: torch.device) -> tuple[int, int] | None:
    """The compute capability of ``device``, None of a CPU. Raises RuntimeError where Triton cannot compile ``op``."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        major, minor = capability
        raise RuntimeError(
            f"fastfp8.{op}: {device} has compute capability {major}.{minor}, and FP8 needs 8.9 or newer (sm_89: Ada, "
            "Hopper, Blackwell). The CPU implementation serves this call: pass tensors on the CPU"
        )
    return capability


@triton.jit
def tile_indices(
    cols,
    x,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """This program's rows [TILE_ROWS, 1] and columns [1, TILE_COLS] of elements, then those of its blocks.

    64 bits wide, because an element's offset may need them. A thread takes 16 bytes of ``x`` at a time, which points to
    the widest elements that are read or written.
    """
    tl.static_assert(BLOCK_ROWS == 1 or BLOCK_ROWS == TILE_ROWS, "a tile holds one block along its spanned side")
    tl.static_assert(BLOCK_COLS == 1 or BLOCK_COLS == TILE_COLS, "a tile holds one block along its spanned side")
    tiles_across = tl.cdiv(cols, TILE_COLS)
    tile_row = (tl.program_id(0) // tiles_across).to(tl.int64)
    tile_col = (tl.program_id(0) % tiles_across).to(tl.int64)
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    # Left alone, Triton gives a thread 16 bytes of the narrowest elements: to store 16 codes it would load 16 BF16, 32
    # bytes by two instructions, each of which touches every sector and takes half of it. This must stand where the
    # values are computed, for a hint on a function's argument is lost.
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    col = tl.max_contiguous(tile_col * TILE_COLS + tl.arange(0, TILE_COLS), VECTOR)
    block_row = tile_row * (TILE_ROWS // BLOCK_ROWS) + tl.arange(0, TILE_ROWS // BLOCK_ROWS)
    block_col = tile_col * (TILE_COLS // BLOCK_COLS) + tl.arange(0, TILE_COLS // BLOCK_COLS)
    return row[:, None], col[None, :], block_row[:, None], block_col[None, :]
