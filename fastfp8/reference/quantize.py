"""Quantisation on the CPU, and the definition of its numerics (DeepSeek-V3 report, section 3.3.2)."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Block, as_matrices, empty_scale, scale_shape_of
from ..presets import Rules
from .counters import count

E4M3_MAX = 448.0
# Floor of a block's amax: below it 448 / amax would leave FP32's normal range, and hardware may flush what is not.
AMAX_FLOOR = 2.0**-110
NAN_CODE = 0x7F
# Of presets.Rules.nan_code.
NAN_CODES = {"nan": NAN_CODE, "lowest": 0xFE, "largest": 0x7E}
INFINITY_BITS = 0x7F800000
# What a scale is floored at before it is rounded to a power of two, by presets.VLLM.
POW2_FLOOR = 1e-10
# Elements worked on at a time: temporaries stay in the cache, which is worth 2x on 4096x7168 (measured on 2 cores).
_CHUNK = 1 << 19


def scale_and_multiplier(floored: Tensor, pow2: bool, largest: float = E4M3_MAX) -> tuple[Tensor, Tensor]:
    """The scale that dequantises a block and the multiplier that quantises it, from its floored amax (FP32).

    ``largest`` is the largest finite value of the codes' type.
    """
    # A tensor, because torch computes `number / tensor` as reciprocal and product, which rounds twice.
    most = torch.tensor(largest)
    scale = floored / most
    if not pow2:
        return scale, most / floored
    # Round up to a power of two: the carry out of a non-zero mantissa increments the exponent field.
    exponent = (scale.view(torch.int32) + 0x7FFFFF) >> 23
    return (exponent << 23).view(torch.float32), ((254 - exponent) << 23).view(torch.float32)


def quantize_rows(
    x: Tensor, data: Tensor, scale: Tensor, block: Block, pow2: bool, eps: float, counters: Tensor | None = None
) -> None:
    """Quantise ``x`` [R, C] into ``data`` and ``scale``."""
    rows, cols = x.shape
    row_blocks, col_blocks = scale.shape
    ragged = (rows, cols) != (row_blocks * block[0], col_blocks * block[1])
    if ragged:
        x = F.pad(x, (0, col_blocks * block[1] - cols, 0, row_blocks * block[0] - rows))
    # A transpose is copied as a matrix, which is 4 times as fast as in the shape of blocks (measured).
    x = x.float().contiguous().view(row_blocks, block[0], col_blocks, block[1])
    amax = x.abs().amax((1, 3))
    least, most = (v.item() for v in torch.aminmax(amax))  # NaN if any element is
    finite = math.isfinite(most)
    if not finite:
        amax = torch.where(x.isfinite(), x.abs(), 0.0).amax((1, 3))
    floor = max(eps, AMAX_FLOOR)
    ordinary = finite and least >= floor  # what nearly all data is: no block needs a floor, nothing saturates
    block_scale, multiplier = scale_and_multiplier(amax if ordinary else amax.clamp(min=floor), pow2)
    if not ordinary:
        block_scale[amax == 0] = multiplier[amax == 0] = 1.0
    scale.copy_(block_scale)
    codes = x * multiplier[:, None, :, None]
    count(counters, x, codes, rows * cols)
    if not ragged and ordinary:
        data.view(x.shape).copy_(codes)
        return
    codes = codes.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    # torch keeps or drops the sign of a NaN by code path; the hardware's conversion writes 0x7F.
    codes.view(torch.uint8)[x.isnan()] = NAN_CODE
    data.copy_(codes.view(row_blocks * block[0], col_blocks * block[1])[:rows, :cols])


def quantize_rows_as(
    rules: Rules, x: Tensor, data: Tensor, scale: Tensor, block: Block, pow2: bool, eps: float
) -> None:
    """quantize_rows by the rules of another project, which ``eps`` is the floor of amax of."""
    rows, cols = x.shape
    row_blocks, col_blocks = scale.shape
    largest_multiplier = torch.finfo(x.dtype).max
    x = F.pad(x, (0, col_blocks * block[1] - cols, 0, row_blocks * block[0] - rows))
    x = x.float().reshape(row_blocks, block[0], col_blocks, block[1])
    amax = torch.where(x.isnan(), 0.0, x.abs()).amax((1, 3)).clamp(min=eps)
    if rules.nan_block == "nan":
        amax[x.isnan().any(3).any(1)] = math.nan
    block_scale, divisor, multiplier = _scales_as(rules, amax, pow2, largest_multiplier)
    scale.copy_(block_scale)
    values = x * multiplier[:, None, :, None] if divisor is None else x / divisor[:, None, :, None]
    codes = values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[values.isnan()] = NAN_CODES[rules.nan_code]
    data.copy_(codes.view(row_blocks * block[0], col_blocks * block[1])[:rows, :cols])


def _scales_as(
    rules: Rules, amax: Tensor, pow2: bool, largest_multiplier: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The scale of blocks, what their values are divided by or None, and what they are multiplied by if it is."""
    most, one = torch.tensor(E4M3_MAX), torch.tensor(1.0)
    ordinary = (amax > 0) & amax.isfinite() | torch.tensor(rules.extremes != "one")
    if rules.scale == "inverse":
        multiplier = most / amax
        multiplier = torch.where(multiplier.isinf(), largest_multiplier, multiplier)
        if pow2:
            multiplier = (multiplier.view(torch.int32) & INFINITY_BITS).view(torch.float32)
        multiplier = torch.where(ordinary, multiplier, one)
        return one / multiplier, None, multiplier
    scale = amax / most if rules.scale == "divide" else amax * (one / most)
    multiplier = most / amax
    if pow2:
        if rules.pow2 == "up_floored":
            scale = scale.clamp(min=POW2_FLOOR)
        bits = scale.view(torch.int32) & 0x7FFFFFFF
        exponent = (bits >> 23) + (bits & 0x7FFFFF != 0).int()
        if rules.pow2 == "up_finite":
            exponent = exponent.clamp(1, 254)
        scale, multiplier = (exponent << 23).view(torch.float32), ((254 - exponent) << 23).view(torch.float32)
    scale, multiplier = torch.where(ordinary, scale, one), torch.where(ordinary, multiplier, one)
    if rules.codes == "inverse":
        multiplier = one / scale
    return scale, scale if rules.codes == "divide" else None, multiplier


def quantize_matrix(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    block: Block,
    pow2: bool,
    eps: float,
    rules: Rules | None = None,
    counters: Tensor | None = None,
) -> None:
    """Quantise ``x`` [R, C], not empty, into ``data`` and ``scale``, a chunk at a time."""
    ours = functools.partial(quantize_rows, counters=counters)
    of_rows = ours if rules is None else functools.partial(quantize_rows_as, rules)
    rows, cols = x.shape
    step = max(1, _CHUNK // (cols * block[0]))
    if rows <= step * block[0]:
        of_rows(x, data, scale, block, pow2, eps)
        return
    for first in range(0, scale.shape[0], step):
        chunk = slice(first * block[0], (first + step) * block[0])
        of_rows(x[chunk], data[chunk], scale[first : first + step], block, pow2, eps)


def quantize(
    x: Tensor,
    block: Block,
    pow2: bool,
    eps: float,
    rules: Rules | None = None,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.quantize`; arguments are checked already."""
    if x.requires_grad:
        x = x.detach()
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = empty_scale(x, scale_shape_of(x.shape, block), block)
    if x.numel():
        for x_matrix, data_matrix, scale_matrix in as_matrices(block, x, data, scale):
            quantize_matrix(x_matrix, data_matrix, scale_matrix, block, pow2, eps, rules, counters)
    return data, scale
