"""SwiGLU in plain torch: what the fused ops are compared with, and what computes where they do not fit."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor, limit: float | None) -> Tensor:
    """``silu(gate) * up``, gate in the first half of the columns, clamped as :func:`fastfp8.swiglu_quantize` does."""
    gate, up = gate_up.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up
