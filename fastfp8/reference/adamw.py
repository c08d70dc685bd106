"""AdamW on the CPU, and the definition of its numerics (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

All is FP32, each operation rounded once, in this order:

    p = p * decay                                           decay = 1 - lr * weight_decay
    m = m * beta1 + g * (1 - beta1)
    v = v * beta2 + (g * g) * (1 - beta2)
    p = p - (m / (sqrt(v) * root + eps)) * rate             root = 1 / sqrt(1 - beta2**step)
                                                            rate = lr / (1 - beta1**step)

The factors are computed in double precision and rounded to FP32. ``p`` is updated with ``m`` and ``v`` before these are
rounded to the type that they are kept in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import BLOCK
from .quantize import quantize

# Elements worked on at a time, so that temporaries stay in the cache; a multiple of the four that share a counter.
_CHUNK = 1 << 18
_WORD = 0xFFFFFFFF


class Factors(NamedTuple):
    """The scalars of a step, in the order in which the kernel takes them."""

    decay: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    root: float
    eps: float
    rate: float


def factors(step: int, lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> Factors:
    beta1, beta2 = betas
    root = 1 / math.sqrt(1 - beta2**step)
    return Factors(1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, root, eps, lr / (1 - beta1**step))


def philox(counter: tuple[Tensor, Tensor, int, int], seed: int) -> list[Tensor]:
    """Four random words for each counter: Philox-4x32-10 (Salmon et al., Parallel random numbers, SC 2011).

    Words are the low 32 bits of int64.
    """
    c0, c1 = counter[0], counter[1]
    c2, c3 = (torch.full_like(c0, c) for c in counter[2:])
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # A product that overflows int64 still has the right 64 bits.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (second >> 32 & _WORD) ^ c1 ^ key0, (first >> 32 & _WORD) ^ c3 ^ key1
        c1, c3 = second & _WORD, first & _WORD
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    return [c0, c1, c2, c3]


def random_words(first: int, count: int, step: int, index: int, seed: int) -> Tensor:
    """The word of each of ``count`` elements from ``first`` on, a multiple of 4, of parameter ``index`` in a step.

    Element e has word ``e % 4`` of the counter (e // 4, its high half, step, index). Bits 0 to 15 are for the first
    moment, 16 to 31 for the second.
    """
    group = torch.arange(first // 4, (first + count + 3) // 4, dtype=torch.int64)
    words = philox((group & _WORD, group >> 32, step & _WORD, index & _WORD), seed)
    return torch.stack(words, 1).flatten()[:count]


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """FP32 ``x`` as BF16: upwards in magnitude if the 16 bits that go and 16 random ``bits`` carry. A NaN stays one."""
    rounded = (x.view(torch.int32).long() + bits & _WORD) >> 16
    rounded[x.isnan()] = 0x7FC0
    return rounded.to(torch.uint16).view(torch.bfloat16)


def _update(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, f: Factors, words: Tensor | None
) -> None:
    """One step of flat tensors, in place."""
    g, m, v = grad.float(), exp_avg.float(), exp_avg_sq.float()
    m = m * f.beta1 + g * f.rest1
    v = v * f.beta2 + (g * g) * f.rest2
    # By way of double precision, because torch's FP32 root is an ulp off for a fifth of all values (seen in 2.13).
    update = m / (v.double().sqrt().float() * f.root + f.eps) * f.rate
    master.copy_(master * f.decay - update)
    if words is not None:
        m, v = round_stochastically(m, words & 0xFFFF), round_stochastically(v, words >> 16)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    fp8: list[Tensor],
    counters: list[Tensor],
    indices: list[int],
    step: int,
    f: Factors,
    stochastic_rounding: bool,
    seed: int,
) -> None:
    """See :func:`fastfp8.ops.adamw.adamw`; arguments are checked already."""
    masters = masters or params
    for i, tensors in enumerate(zip(masters, grads, exp_avgs, exp_avg_sqs, strict=True)):
        flat = [t.view(-1) for t in tensors]
        random = stochastic_rounding and tensors[2].dtype == torch.bfloat16
        for first in range(0, flat[0].numel(), _CHUNK):
            parts = [t[first : first + _CHUNK] for t in flat]
            words = random_words(first, parts[0].numel(), step, indices[i], seed) if random else None
            _update(parts[0], parts[1], parts[2], parts[3], f, words)
        if masters is not params:
            params[i].copy_(masters[i])
        if fp8:
            data, scale, data_t, scale_t = fp8[4 * i : 4 * i + 4]
            made = quantize(masters[i], (BLOCK, BLOCK), False, 0.0, counters=counters[i] if counters else None)
            for out, value in zip((data, scale, data_t, scale_t), (*made, *(t.mT for t in made)), strict=True):
                out.copy_(value)
