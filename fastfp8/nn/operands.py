"""The FP8 operands of a layer's three GEMMs, and what is kept of its input for backward, by Recipe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import BLOCK, Block, empty_scale, scale_shape
from ..ops.dequantize import dequantize
from ..ops.e5m6 import pack_e5m6, requantize_e5m6
from ..ops.gemm import A_BLOCK
from ..ops.quantize import quantize
from ..ops.quantize_both import quantize_both
from ..ops.requantize_transpose import requantize_transpose
from ..packed_e5m6 import PackedE5M6
from ..recipe import Recipe
from ..scaled_tensor import ScaledTensor
from .products import pad, padded

SQUARE: Block = (BLOCK, BLOCK)


def keep_input(x: Tensor, x8: ScaledTensor, cache: str) -> tuple[Tensor, ...]:
    """What backward needs of an input ``x`` [M, K], of which Fprop takes ``x8`` [M, K16], as ``cache`` says.

    K16 is K rounded up to a multiple of 16.
    """
    if cache == "e4m3":
        return x8.data, x8.scale
    if cache == "e5m6":  # its scales are powers of two in any case: DeepSeek-V3 report, section 3.3.3
        packed = pack_e5m6(pad(x, rows=False, cols=True), pow2=True)
        return packed.words, packed.scale
    return (x,)


def input_along_tokens(
    kept: tuple[Tensor, ...], cache: str, features: int, recipe: Recipe, counters: Tensor | None = None
) -> ScaledTensor:
    """The operand of Wgrad [K16, M16] in (1, 128) blocks, from what :func:`keep_input` kept."""
    pow2 = recipe.activation.pow2
    if cache == "e5m6":
        words, scale = kept
        packed = PackedE5M6._trusted(words, scale, (words.shape[0], padded(features)), per_row=False)
        return _turned(requantize_e5m6(packed, pow2=pow2, counters=counters))
    if cache == "e4m3":
        x8 = ScaledTensor._trusted(kept[0], kept[1], A_BLOCK)
        if pow2:
            return requantize_transpose(x8, pad=True, counters=counters)
        # requantize_transpose rounds to powers of two; between FP32 scales the values are rounded once more.
        return quantize(pad(dequantize(x8, torch.float32), rows=True, cols=False).t(), A_BLOCK, counters=counters)
    return quantize(pad(kept[0], rows=True, cols=True).t(), A_BLOCK, pow2=pow2, counters=counters)


def _turned(t: ScaledTensor) -> ScaledTensor:
    """[C, R16] in (1, 128) blocks, of ``t`` [R, C] in (128, 1) blocks."""
    data = pad(t.data.view(torch.uint8), rows=True, cols=False).t().contiguous()
    return ScaledTensor._trusted(data.view(torch.float8_e4m3fn), t.scale.t(), A_BLOCK)


def quantize_gradient(
    dy: Tensor, recipe: Recipe, *, by_row: bool, along_tokens: bool, counters: dict[str, Tensor]
) -> tuple[ScaledTensor | None, ScaledTensor | None]:
    """``dy`` [M, N] for Dgrad, [M, N16], and for Wgrad, [N16, M16], both in (1, 128) blocks; None what is not wanted.

    Both come from one read of ``dy``.
    """
    pow2 = recipe.gradient.pow2
    of_rows, of_tokens = counters.get("gradient"), counters.get("gradient, transposed")
    if recipe.gradient.block == SQUARE:
        square = quantize(pad(dy, rows=True, cols=True), SQUARE, pow2=pow2, counters=of_rows)
        return _as_rows(square) if by_row else None, _as_rows(square.t().contiguous()) if along_tokens else None
    dy = pad(dy, rows=False, cols=True)
    if by_row and along_tokens:
        counting = None if of_rows is None or of_tokens is None else (of_rows, of_tokens)
        return quantize_both(dy, pow2=pow2, pad=True, counters=counting)
    if along_tokens:
        return None, quantize(pad(dy, rows=True, cols=False).t(), A_BLOCK, pow2=pow2, counters=of_tokens)
    return (quantize(dy, A_BLOCK, pow2=pow2, counters=of_rows) if by_row else None), None


def _as_rows(t: ScaledTensor) -> ScaledTensor:
    """The same values in (1, 128) blocks: the scale of a block repeated for each of its rows."""
    scale = empty_scale(t.data, scale_shape(t.shape[0], t.shape[1], A_BLOCK), A_BLOCK)
    scale.copy_(t.scale.repeat_interleave(BLOCK, 0)[: t.shape[0]])
    return ScaledTensor._trusted(t.data, scale, A_BLOCK)


def add_columns(t: ScaledTensor, cols: int) -> ScaledTensor:
    """``t`` [R, C] in (1, 128) blocks with codes of zero up to ``cols`` columns, no more than its last block has."""
    extra = cols - t.shape[1]
    data = F.pad(t.data.view(torch.uint8), (0, extra)).view(torch.float8_e4m3fn) if extra else t.data
    return ScaledTensor._trusted(data, t.scale, t.block)
