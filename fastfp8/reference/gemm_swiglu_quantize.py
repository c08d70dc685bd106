"""The product of gate and up, SwiGLU and quantisation on the CPU: the ops that it fuses, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BLOCK, empty_scale, scale_shape
from .gemm import gemm
from .grouped_gemm import grouped_gemm
from .swiglu_quantize import swiglu_quantize_into


def gemm_swiglu_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor | None,
    weight: Tensor | None,
    limit: float | None,
    pow2: bool,
    eps: float,
    return_gate_up: bool,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfp8.gemm_swiglu_quantize`; arguments are checked already, but for the values of ``offsets``."""
    rows, n = a.shape[0], b.shape[-2]
    if offsets is None:
        gate_up, used = gemm(a, a_scale, b, b_scale, (BLOCK, BLOCK), torch.bfloat16, None), rows
    else:
        gate_up = grouped_gemm(a, a_scale, b, b_scale, offsets, torch.bfloat16, op="gemm_swiglu_quantize")
        used = int(offsets[-1])
    data = torch.empty((rows, n // 2), dtype=torch.float8_e4m3fn)
    scale = empty_scale(a, scale_shape(rows, n // 2, (1, BLOCK)), (1, BLOCK))
    used_weight = None if weight is None else weight[:used]
    outputs = data[:used], scale[:used]
    swiglu_quantize_into(*outputs, gate_up[:used], used_weight, limit, pow2, eps, counters=counters)
    return data, scale, gate_up if return_gate_up else gate_up.new_empty((0, n))
