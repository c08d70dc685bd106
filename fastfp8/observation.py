"""Statistics of a quantisation beside the high-precision values, in a further pass: for :func:`numerics.watch`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .counters import Counted
from .layout import Block, ceil_div
from .scaled_tensor import ScaledTensor

FIELDS = ("values", "saturated", "underflowed", "subnormal", "nonfinite", "signal", "error", "amax_max", "amax_min")
"""The first five as :mod:`fastfp8.counters` counts them; ``signal`` and ``error``, the energies of the finite values
and of what quantisation changed of them; the largest and the smallest amax of a block, blocks of zeros apart."""
_SUMS = len(FIELDS) - 2


class Watched(Counted):
    """A module whose quantisations can be counted, and looked at in steps that are watched."""

    statistics: dict[str, Tensor] | None = None
    """What :func:`observe` adds to, by role, in a step that is watched; None in others."""

    def _observe(self, role: str, high_precision: Tensor, quantized: ScaledTensor | None) -> None:
        """In a step that is watched, tell what quantisation made of ``high_precision``; in others do nothing."""
        if self.statistics is not None:
            observe(self.statistics.get(role), high_precision, quantized)


def new_statistics(device: torch.device | str) -> Tensor:
    """float64 [9] on ``device``: nothing observed yet."""
    statistics = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)
    statistics[-1] = torch.inf
    return statistics


@torch.no_grad()
def observe(statistics: Tensor | None, high_precision: Tensor, quantized: ScaledTensor | None) -> None:
    """Add what became of ``high_precision`` [..., R, C] in ``quantized``, which may be padded, to ``statistics``.

    Nothing waits for the device. Either may be None: then nothing is done.
    """
    if statistics is None or quantized is None or high_precision.numel() == 0:
        return
    block = quantized.block
    rows, cols = high_precision.shape[-2:]
    x = _in_blocks(high_precision.float(), block)
    codes = _in_blocks(quantized.data[..., :rows, :cols].float(), block)
    scale = quantized.scale[..., : x.shape[-4], : x.shape[-2]][..., :, None, :, None]
    finite = x.isfinite()
    exact = torch.where(finite, x, 0.0)
    error = torch.where(finite, x - codes * scale, 0.0)
    code, magnitude = codes.abs_(), exact.abs()
    sums = (
        (code == 448) & (x.abs() > 464 * scale),
        (code == 0) & (x != 0),
        (code > 0) & (code < 2.0**-6),
        ~finite,
        exact.square_(),
        error.square_(),
    )
    values = torch.full((), high_precision.numel(), dtype=torch.float64, device=x.device)
    statistics[:_SUMS] += torch.stack([values, *(s.sum(dtype=torch.float64) for s in sums)])
    amax = magnitude.amax((-3, -1))
    statistics[-2] = torch.maximum(statistics[-2], amax.amax())
    statistics[-1] = torch.minimum(statistics[-1], torch.where(amax > 0, amax, torch.inf).amin())


def _in_blocks(t: Tensor, block: Block) -> Tensor:
    """``t`` [..., R, C] as [..., blocks of rows, rows of one, blocks of columns, columns of one], ended by zeros."""
    *lead, rows, cols = t.shape
    row_blocks, col_blocks = ceil_div(rows, block[0]), ceil_div(cols, block[1])
    extra = (0, col_blocks * block[1] - cols, 0, row_blocks * block[0] - rows)
    whole = F.pad(t, extra) if any(extra) else t
    return whole.reshape(*lead, row_blocks, block[0], col_blocks, block[1])
