"""Hopper's FP8 tensor core bit by bit: the oracle of bits for the CUDA GEMM and for the emulator.

The model of ``wgmma.m64nNk32.f32.e4m3.e4m3`` is MMA-Sim's (arXiv 2511.10909), whose authors report bitwise agreement
with hardware: 13 fraction bits, aligned to the largest exponent, truncated toward zero. DeepSeek (DeepGEMM issue 50)
describes a shift that fills with the sign, which floors. The two differ for negative terms, and silicon has confirmed
neither here. Integers do the work, so no rounding of the host takes part; where floating point is used, the comment
beside it says why it is exact. A host that flushes subnormals (``torch.set_flush_denormal``) is not supported.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..errors import check_value
from ..layout import BLOCK, Block, ceil_div

# K of one instruction, and the fraction bits that its aligned terms and its result keep.
STEP, FRACTION_BITS = 32, 13
# What the hardware writes for every NaN (PTX ISA: the canonical NaN of each type).
FP32_NAN, BF16_NAN = 0x7FFFFFFF, 0x7FFF

_FP32_FRACTION = 23
# A product of two e4m3 significands counts 64ths.
_PRODUCT_FRACTION = 6
# So low that a zero term never sets the maximum; and the maximum of zeros alone still has its power of two in FP64.
_ZERO_EXPONENT = -1000
# Outputs worked on at a time: each temporary holds 32 integers an output and stays in the cache (1 MiB).
_TILE_M, _TILE_N = 64, 128


class _Terms(NamedTuple):
    """e4m3 codes in parts, int32 but for ``nan``: value = sign * magnitude / 8 * 2**exponent. A NaN has magnitude 0."""

    magnitude: Tensor
    exponent: Tensor
    sign: Tensor
    nan: Tensor

    def along_k(self, first: int) -> _Terms:
        return _Terms(*(part[first : first + STEP] for part in self))


def _decode(codes: Tensor) -> _Terms:
    byte = codes.view(torch.uint8).to(torch.int32)
    field, mantissa, nan = (byte >> 3) & 15, byte & 7, (byte & 127) == 127
    magnitude = torch.where(field > 0, mantissa + 8, mantissa).masked_fill_(nan, 0)
    # A subnormal keeps the exponent -6 and a significand below 1, as the hardware does.
    exponent = (field.clamp_(min=1) - 7).masked_fill_(magnitude == 0, _ZERO_EXPONENT)
    return _Terms(magnitude, exponent, 1 - ((byte >> 7) << 1), nan)


def _fused_sum(a: _Terms, b: _Terms, acc: Tensor) -> Tensor:
    """The 33-term sum for parts of shape [32, M] and [32, N] and FP32 acc [M, N]."""
    bits = acc.view(torch.int32)
    field, magnitude = (bits >> _FP32_FRACTION) & 255, bits & ((1 << _FP32_FRACTION) - 1)
    magnitude = torch.where(field > 0, magnitude + (1 << _FP32_FRACTION), magnitude)
    acc_exponent = torch.where(magnitude > 0, field.clamp(min=1) - 127, _ZERO_EXPONENT)

    exponent = a.exponent[:, :, None] + b.exponent[:, None, :]
    largest = torch.maximum(exponent.amax(0), acc_exponent)

    # Each magnitude in units of 2**(largest - 13); a shift right truncates toward zero. At most 225 << 7, so that 32 of
    # them and the accumulator stay below 2**20. Beyond 31 torch leaves a shift undefined.
    terms = (a.magnitude << (FRACTION_BITS - _PRODUCT_FRACTION))[:, :, None] * b.magnitude[:, None, :]
    terms >>= torch.sub(largest, exponent, out=exponent).clamp_(max=31)
    terms *= a.sign[:, :, None]
    terms *= b.sign[:, None, :]
    shift = (_FP32_FRACTION - FRACTION_BITS + largest - acc_exponent).clamp_(max=31)
    aligned = magnitude >> shift
    total = terms.sum(0, dtype=torch.int32) + torch.where(bits < 0, -aligned, aligned)

    # An integer below 2**24 is exact in FP32, and clearing low bits of its fraction truncates toward zero. The power of
    # two is exact in FP64 and so is the product: 14 bits, a multiple of 2**-139, which FP32 holds, subnormal or not. An
    # infinity counts as 2**128, no product reaches its last place, and it becomes infinite again here.
    truncated = total.float().view(torch.int32) & ~((1 << (_FP32_FRACTION - FRACTION_BITS)) - 1)
    power = ((largest.long() - FRACTION_BITS + 1023) << 52).view(torch.float64)
    out = (truncated.view(torch.float32).double() * power).float()
    nan = a.nan.any(0)[:, None] | b.nan.any(0)[None, :] | acc.isnan()
    out.view(torch.int32).masked_fill_(nan, FP32_NAN)
    return out


def wgmma_k32(a_codes: Tensor, b_codes: Tensor, acc: Tensor) -> Tensor:
    """One tensor-core step: ``acc + a_codes @ b_codes.T`` as ``wgmma.m64nNk32.f32.e4m3.e4m3`` computes its elements.

    The 32 products and the accumulator are the 33 terms of one sum. A product is (significand * significand, in [1, 4)
    for normal codes and never renormalised) * 2**(exponent + exponent); it cannot overflow, and e4m3 has no infinity.
    All terms are aligned to the largest exponent of a term that is not zero, truncated toward zero to 13 fraction bits
    and summed exactly; the sum is truncated toward zero to 13 bits of mantissa. A sum of zero is +0 always.

    A NaN among the 32 codes of either row or in ``acc`` gives the canonical NaN, 0x7FFFFFFF. An infinite ``acc``, which
    no chain from zero can reach, stays what it is.

    Args:
        a_codes: float8_e4m3fn [M, 32].
        b_codes: float8_e4m3fn [N, 32].
        acc: float32 [M, N]; not modified. Bits beyond the 13th of its fraction take no part.

    Returns:
        float32 [M, N] with the low 10 bits clear. Source: MMA-Sim, see the module's docstring.
    """
    return _fused_sum(_decode(a_codes.t()), _decode(b_codes.t()), acc)


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """``x * y + z`` of float32 tensors with one rounding, to nearest even, subnormals kept: the hardware's FFMA.

    torch has no such operation: how often ``addcmul`` rounds is not promised. The product of two FP32 is exact in FP64.
    Their sum with ``z`` is rounded to odd in FP64: the last of its 53 bits tells whether anything lies beyond, so that
    rounding to FP32 sees on which side of a tie the exact sum is (Boldo and Melquiond 2008; subnormal results too).
    """
    product, addend = x.double() * y.double(), z.double()
    total = product + addend
    # Knuth's two-sum: `error` is exactly what `total` misses. NaN where total is infinite.
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    inexact = total.isfinite() & (error != 0)
    bits = total.view(torch.int64)
    # An odd last bit stays; an even one becomes the odd neighbour on the side where the exact sum lies.
    outward = (error > 0) == (total > 0)
    odd = torch.where(outward, bits + 1, bits - 1)
    return torch.where(inexact & (bits & 1 == 0), odd, bits).view(torch.float64).float()


def _check_interval(k: int, promote_every: int | None, a_scale: Tensor, b_scale: Tensor) -> int:
    """The promotion interval in elements. Raises unless each interval lies under a single scale of each row."""
    name, argument = "tensor_core.gemm", "promote_every"
    legal = promote_every is None or (promote_every > 0 and promote_every % STEP == 0)
    check_value(legal, name, argument, f"None or a positive multiple of {STEP}", promote_every)
    interval = max(k, STEP) if promote_every is None else promote_every
    for first in range(0, k, interval):
        blocks = slice(first // BLOCK, ceil_div(min(first + interval, k), BLOCK))
        for scale in (a_scale[:, blocks], b_scale[:, blocks]):
            constant = scale.shape[1] == 1 or bool((scale == scale[:, :1]).all())
            expected = "an interval in which each row has a single scale, since scales are applied when it ends"
            check_value(constant, name, argument, expected, promote_every)
    return interval


def _round(acc: Tensor, out_dtype: torch.dtype) -> Tensor:
    """One rounding to nearest even, with the hardware's NaN."""
    out = acc.to(out_dtype)
    if out_dtype == torch.bfloat16:
        out.view(torch.int16).masked_fill_(acc.isnan(), BF16_NAN)
    else:
        out.view(torch.int32).masked_fill_(acc.isnan(), FP32_NAN)
    return out


def gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_block: Block,
    out_dtype: torch.dtype,
    c: Tensor | None,
    *,
    promote_every: int | None = BLOCK,
    one_segment: bool = False,
) -> Tensor:
    """:func:`fastfp8.gemm` with the bits of the sm_90a kernel; the arguments that they share are checked already.

    For each interval of K in ascending order: ``partial`` is the chain of k32 steps from zero, and
    ``acc = fma(scale_a * scale_b, partial, acc)`` in FP32, from zero; the product of the scales is one FP32
    multiplication. Where N and K make several segments of K, each has an ``acc`` of its own, and these are added in
    ascending order. Then ``c`` is added in FP32, and the sum rounded once to ``out_dtype``. Every NaN is the canonical
    one, 0x7FFFFFFF or 0x7FFF. DeepSeek-V3 report, section 3.3.2, in the order of DeepGEMM's operations.

    Args:
        a: float8_e4m3fn [M, K] with float32 a_scale [M, ceil(K/128)].
        b: float8_e4m3fn [N, K] with float32 b_scale [ceil(N/b_block[0]), ceil(K/128)].
        b_block: (128, 128) or (1, 128).
        out_dtype: bfloat16 or float32.
        c: bfloat16 or float32 [M, N], or None.
        promote_every: elements of K between promotions, a multiple of 32. The contract is 128, other values are for
            experiments, in which all of K is one segment. None promotes only at the end: all of K is one chain.
        one_segment: take all of K as one segment whatever N and K are, as :func:`fastfp8.gemm_swiglu_quantize` does.

    Raises:
        ValueError: ``promote_every`` is not such a number, or a row's scales differ within an interval.
    """
    (m, k), n = a.shape, b.shape[0]
    if b_block[0] != 1:
        b_scale = b_scale.repeat_interleave(b_block[0], 0)[:n]
    interval = _check_interval(k, promote_every, a_scale, b_scale)
    segments = [0, k]
    if promote_every == BLOCK and k and not one_segment:
        segments = [min(BLOCK * block, k) for block in _C.gemm_segments(n, k, b_block)]
    acc = torch.zeros((m, n), dtype=torch.float32, device=a.device)
    # Zero codes up to a whole step stand for those up to the end of the block: a step of zeros changes no accumulator.
    tail = (0, 0, 0, -k % STEP)
    for row in range(0, m, _TILE_M):
        rows = slice(row, row + _TILE_M)
        left = _decode(F.pad(a[rows].view(torch.uint8).t(), tail))
        for col in range(0, n, _TILE_N):
            cols = slice(col, col + _TILE_N)
            right = _decode(F.pad(b[cols].view(torch.uint8).t(), tail))
            sums = []
            for begin, end in pairwise(segments):
                tile = torch.zeros_like(acc[rows, cols])
                for first in range(begin, end, interval):
                    partial = torch.zeros_like(tile)
                    for step in range(first, min(first + interval, end), STEP):
                        partial = _fused_sum(left.along_k(step), right.along_k(step), partial)
                    scale = a_scale[rows, first // BLOCK, None] * b_scale[cols, first // BLOCK]
                    tile = fma(scale, partial, tile)
                sums.append(tile)
            acc[rows, cols] = functools.reduce(torch.add, sums)
    if c is not None:
        acc += c
    return _round(acc, out_dtype)
