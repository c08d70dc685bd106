"""E5M6 on the CPU, and the definition of its numerics (DeepSeek-V3 report, section 3.3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import BLOCK, empty_scale, scale_shape
from ..packed_e5m6 import VALUES, WORDS, group_of, words_shape
from .quantize import AMAX_FLOOR, quantize, scale_and_multiplier

E5M6_MAX = 65024.0
INFINITY_CODE, NAN_CODE = 0x7C0, 0x7E0
_MIN_NORMAL = 2.0**-14
# FP32 numbers from 8 to 16 are 2^-20 apart, as subnormal codes are: adding 8 rounds to a code.
_SUBNORMAL_ROUNDER = 8.0
_WORD = 0xFFFFFFFF


def to_codes(x: Tensor) -> Tensor:
    """The codes (int32) of FP32 values up to 65024 or infinite, rounded once, to nearest even. NaN loses its sign."""
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # 17 bits of mantissa go; the exponent's bias falls from 127 to 15.
    normal = (magnitude + 0xFFFF + (magnitude >> 17 & 1) >> 17) - (112 << 6)
    rounder = torch.tensor(_SUBNORMAL_ROUNDER)
    subnormal = (x.abs() + rounder).view(torch.int32) - rounder.view(torch.int32)
    codes = torch.where(magnitude < torch.tensor(_MIN_NORMAL).view(torch.int32), subnormal, normal)
    codes = torch.where(x.isinf(), INFINITY_CODE, codes) | (bits >> 20 & 0x800)
    return torch.where(x.isnan(), NAN_CODE, codes)


def from_codes(codes: Tensor) -> Tensor:
    """The FP32 values of codes: they are FP16 numbers without their last four bits."""
    return (codes << 4).to(torch.int16).view(torch.float16).float()


def to_words(codes: Tensor) -> Tensor:
    """Codes [R, C], C a multiple of 8, as words (int32) [R, C / 8 * 3]."""
    c = codes.long().view(len(codes), codes.shape[1] // VALUES, VALUES).unbind(2)
    words = (
        c[0] << 20 | c[1] << 8 | c[2] >> 4,
        c[2] << 28 | c[3] << 16 | c[4] << 4 | c[5] >> 8,
        c[5] << 24 | c[6] << 12 | c[7],
    )
    return torch.stack([w & _WORD for w in words], 2).flatten(1).to(torch.uint32).view(torch.int32)


def from_words(words: Tensor) -> Tensor:
    """The inverse of to_words."""
    w = (words.long() & _WORD).view(len(words), words.shape[1] // WORDS, WORDS).unbind(2)
    halves = w[0] << 16 | w[1] >> 16, (w[1] & 0xFFFF) << 32 | w[2]  # 48 bits each, which are four codes
    codes = [part >> shift & 0xFFF for part in halves for shift in (36, 24, 12, 0)]
    return torch.stack(codes, 2).flatten(1).int()


def pack_e5m6(x: Tensor, pow2: bool, eps: float, per_row: bool) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.pack_e5m6`; arguments are checked already."""
    rows, cols = x.shape
    group = group_of(cols, per_row)
    scale = empty_scale(x, scale_shape(rows, cols, group), (1, BLOCK))
    if not x.numel():
        return torch.zeros(words_shape(rows, cols), dtype=torch.int32), scale
    x = F.pad(x.detach().float(), (0, scale.shape[1] * group[1] - cols)).reshape(*scale.shape, group[1])
    amax = torch.where(x.isfinite(), x.abs(), 0.0).amax(2)
    group_scale, multiplier = scale_and_multiplier(amax.clamp(min=max(eps, AMAX_FLOOR)), pow2, E5M6_MAX)
    group_scale[amax == 0] = multiplier[amax == 0] = 1.0
    scale.copy_(group_scale)
    codes = to_codes(x * multiplier[:, :, None]).flatten(1)[:, :cols]
    return to_words(F.pad(codes, (0, -cols % VALUES))), scale


def unpack_e5m6(words: Tensor, scale: Tensor, cols: int, per_row: bool, dtype: torch.dtype) -> Tensor:
    """See :func:`fastfp8.unpack_e5m6`; arguments are checked already."""
    values = from_codes(from_words(words)[:, :cols])
    factors = scale.expand(-1, cols) if per_row else scale.repeat_interleave(BLOCK, 1)[:, :cols]
    return (values * factors).to(dtype)


def requantize_e5m6(
    words: Tensor, scale: Tensor, cols: int, per_row: bool, pow2: bool, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfp8.requantize_e5m6`; arguments are checked already."""
    values = unpack_e5m6(words, scale, cols, per_row, torch.float32)
    return quantize(values, (BLOCK, 1), pow2, 0.0, counters=counters)
