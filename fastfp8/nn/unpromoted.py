"""GEMM without promotion: what the tensor core's accumulator of 14 bits does to training, an experiment on the CPU.

The operands get one power-of-two scale a row, because scales can only be applied where accumulation ends. Of operands
whose block scales are powers of two this changes the exponents alone: only what becomes subnormal or zero is rounded,
as in FP8 with one scale a row. torch.compile cannot trace the model of the tensor core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import check_value
from ..layout import BLOCK, Block, ceil_div, empty_scale
from ..reference import tensor_core
from ..reference.quantize import AMAX_FLOOR, E4M3_MAX, scale_and_multiplier
from ..scaled_tensor import ScaledTensor

_BLOCK: Block = (1, BLOCK)


def one_scale_a_row(t: ScaledTensor) -> ScaledTensor:
    """``t`` [R, C] in any blocks as one in (1, 128) blocks, all of a row with the same scale, a power of two."""
    rows, cols = t.shape
    x = t.dequantize()
    amax = x.nan_to_num(nan=0.0).abs().amax(1) if cols else torch.zeros(rows)
    scale, multiplier = scale_and_multiplier(amax.clamp(min=AMAX_FLOOR), pow2=True)
    codes = (x * multiplier[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    repeated = empty_scale(codes, (rows, ceil_div(cols, BLOCK)), _BLOCK).copy_(scale[:, None])
    return ScaledTensor._trusted(codes, repeated, _BLOCK)


@torch.no_grad()
def gemm(a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype, c: Tensor | None) -> Tensor:
    """``a @ b.T + c`` as :func:`fastfp8.gemm`, all of K summed in the tensor core's own accumulator: slow.

    Raises:
        ValueError: the operands are not on a CPU.
    """
    on_cpu = a.device.type == "cpu"
    check_value(on_cpu, "nn", "recipe", "promotion=128: None is a model that runs on a CPU only", f"None on {a.device}")
    left, right = one_scale_a_row(a), one_scale_a_row(b)
    arguments = (left.data, left.scale, right.data, right.scale, _BLOCK, out_dtype, c)
    return tensor_core.gemm(*arguments, promote_every=None)
