"""Statistics of a quantisation beside the high-precision values, in a further pass: for :func:`numerics.watch`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Block, ceil_div
from .scaled_tensor import ScaledTensor

FIELDS = ("values", "saturated", "underflowed", "subnormal", "nonfinite", "signal", "error", "amax_max", "amax_min")
"""The first five as :mod:`fastfp8.counters` counts them; ``signal`` and ``error``, the energies of the finite values
and of what quantisation changed of them; the largest and the smallest amax of a block, blocks of zeros apart."""
_SUMS = len(FIELDS) - 2


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
    rows, cols = high_precision.shape[-2:]
    x = high_precision.float()
    codes = quantized.data[..., :rows, :cols].float()
    scale = _spread(quantized.scale, quantized.block, rows, cols)
    finite = x.isfinite()
    exact = torch.where(finite, x, 0.0).double()
    error = exact - torch.where(finite, codes.double() * scale.double(), 0.0)
    code = codes.abs()
    sums = (
        torch.ones_like(x, dtype=torch.bool),
        (code == 448) & (x.abs() > 464 * scale),
        (code == 0) & (x != 0),
        (code > 0) & (code < 2.0**-6),
        ~finite,
        exact.square(),
        error.square(),
    )
    statistics[:_SUMS] += torch.stack([s.sum(dtype=torch.float64) for s in sums])
    amax = _block_amax(exact.abs(), quantized.block)
    statistics[-2] = torch.maximum(statistics[-2], amax.amax())
    statistics[-1] = torch.minimum(statistics[-1], torch.where(amax > 0, amax, torch.inf).amin())


def _spread(scale: Tensor, block: Block, rows: int, cols: int) -> Tensor:
    """The scale of each element."""
    return scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :cols]


def _block_amax(magnitudes: Tensor, block: Block) -> Tensor:
    """The largest of each block of [..., R, C]."""
    *lead, rows, cols = magnitudes.shape
    row_blocks, col_blocks = ceil_div(rows, block[0]), ceil_div(cols, block[1])
    whole = F.pad(magnitudes, (0, col_blocks * block[1] - cols, 0, row_blocks * block[0] - rows))
    return whole.view(*lead, row_blocks, block[0], col_blocks, block[1]).amax((-3, -1))
