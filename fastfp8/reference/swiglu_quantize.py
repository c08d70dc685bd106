"""SwiGLU and quantisation on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BLOCK, Block, empty_scale, scale_shape
from .activation import swiglu
from .dequantize import dequantize
from .quantize import quantize_rows

_BLOCK: Block = (1, BLOCK)
# Elements of the result worked on at a time: temporaries stay in the cache.
_CHUNK = 1 << 17


def rows_of(gate_up: Tensor, gate_up_scale: Tensor | None, rows: slice) -> Tensor:
    """Rows of gate and up as they are, or of FP8 in (1, 128) blocks dequantised to float32."""
    part = gate_up[rows]
    return part if gate_up_scale is None else dequantize(part, gate_up_scale[rows], _BLOCK, torch.float32)


def swiglu_quantize_into(
    data: Tensor,
    scale: Tensor,
    gate_up: Tensor,
    weight: Tensor | None,
    limit: float | None,
    pow2: bool,
    eps: float,
    gate_up_scale: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    """swiglu_quantize of ``gate_up`` [R, 2 F] into ``data`` [R, F] and ``scale`` [R, ceil(F / 128)]."""
    rows, f = data.shape
    if data.numel() == 0:
        return
    step = max(1, _CHUNK // f)
    for first in range(0, rows, step):
        chunk = slice(first, first + step)
        part = rows_of(gate_up, gate_up_scale, chunk)
        h = swiglu(part[:, :f], part[:, f:], None if weight is None else weight[chunk], limit)
        quantize_rows(h, data[chunk], scale[chunk], _BLOCK, pow2, eps, counters=counters)


def swiglu_quantize(
    gate_up: Tensor,
    weight: Tensor | None,
    limit: float | None,
    pow2: bool,
    eps: float,
    gate_up_scale: Tensor | None = None,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.swiglu_quantize`; arguments are checked already."""
    rows, f = gate_up.shape[0], gate_up.shape[1] // 2
    data = torch.empty((rows, f), dtype=torch.float8_e4m3fn)
    scale = empty_scale(gate_up, scale_shape(rows, f, _BLOCK), _BLOCK)
    swiglu_quantize_into(data, scale, gate_up, weight, limit, pow2, eps, gate_up_scale, counters)
    return data, scale
