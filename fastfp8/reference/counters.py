"""Counts of what quantisation did to values, on the CPU: see :mod:`fastfp8.counters`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..counters import MOST, NORMAL, UNDERFLOWS


def count(counters: Tensor | None, x: Tensor, products: Tensor, values: int) -> None:
    """Add the counts of FP32 ``x`` and of its ``products`` with the multipliers, ``values`` of them no padding."""
    if counters is None:
        return
    magnitude = products.abs()
    found = (
        magnitude > MOST,
        (magnitude <= UNDERFLOWS) & (x != 0),
        (magnitude > UNDERFLOWS) & (magnitude < NORMAL),
        ~x.isfinite(),
    )
    counters[0] += torch.tensor([values, *(int(which.sum()) for which in found)])
