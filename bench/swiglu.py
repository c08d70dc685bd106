"""``fastfp8.gemm_swiglu_quantize`` beside the same in steps: the product, SwiGLU, quantisation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.layout import BLOCK, ceil_div

from . import device
from .case import Case, Contestant, Subject, Work
from .gemm import backend, difference
from .grouped import sizes
from .peers import contestants_of
from .shapes import DEEPSEEK_V3, EXPERTS, Linear

# Of the dequantised result from SwiGLU in FP32: rounding to e4m3 alone gives about 7e-4.
WORST_DIFFERENCE = 2e-3
# Groups and rows of each on average: prefill, then decode. No group: one weight for all rows.
GROUPS = ((4, 8192, 0), (8, 4096, 1), (32, 128, 1))
TOKENS = ((4096, 0), (128, 1))
SHARED = next(weight for weight in DEEPSEEK_V3 if weight.layer == "shared expert gate and up")

Operands = tuple[ScaledTensor, ScaledTensor, Tensor | None]
Maker = Callable[[ScaledTensor, ScaledTensor, Tensor | None], Callable[[], ScaledTensor]]


def ours(a: ScaledTensor, b: ScaledTensor, offsets: Tensor | None) -> Callable[[], ScaledTensor]:
    return lambda: fastfp8.gemm_swiglu_quantize(a, b, offsets)


def product(a: ScaledTensor, b: ScaledTensor, offsets: Tensor | None) -> Tensor:
    """BF16 gate and up, one beside the other."""
    return fastfp8.gemm(a, b) if offsets is None else fastfp8.grouped_gemm(a, b, offsets)


def in_torch(a: ScaledTensor, b: ScaledTensor, offsets: Tensor | None) -> Callable[[], ScaledTensor]:
    """Product, two ops of torch, quantisation: four kernels."""

    def run() -> ScaledTensor:
        gate, up = product(a, b, offsets).chunk(2, 1)
        return fastfp8.quantize(F.silu(gate) * up)

    return run


def in_two(a: ScaledTensor, b: ScaledTensor, offsets: Tensor | None) -> Callable[[], ScaledTensor]:
    return lambda: fastfp8.swiglu_quantize(product(a, b, offsets))


PEERS: dict[str, Maker] = {"product, silu, multiply, quantize": in_torch, "product, swiglu_quantize": in_two}


def traffic(rows: int, groups: int, n: int, k: int) -> int:
    """The fewest bytes: rows and weights read once, codes and scales of half as many columns written once."""
    blocks, inner = ceil_div(k, BLOCK), n // 2
    return rows * (k + 4 * blocks + inner + 4 * inner // BLOCK) + groups * (n * k + 4 * blocks * ceil_div(n, BLOCK))


def check_values(expected: Tensor, got: Any) -> None:
    apart = difference(fastfp8.dequantize(got, torch.float32), expected)
    # Written so that NaN fails.
    assert apart <= WORST_DIFFERENCE, f"differs from SwiGLU in FP32 by {apart:.2g}, more than {WORST_DIFFERENCE:g}"


def subject(counts: list[int], n: int, k: int, grouped: bool) -> Subject:
    """All rows belong to a group, or, where it is not ``grouped``, to the one weight."""
    rows = sum(counts)
    a = fastfp8.quantize(torch.randn(rows, k, device=device.DEVICE, dtype=torch.bfloat16))
    # So that gate and up are of unit size, as a trained layer's are about.
    weight = torch.randn(len(counts), n, k, device=device.DEVICE, dtype=torch.bfloat16) * k**-0.5
    b = fastfp8.quantize(weight if grouped else weight[0], (BLOCK, BLOCK))
    ends = torch.tensor(counts, device=device.DEVICE).cumsum(0).int() if grouped else None
    given: Operands = (a, b, ends)
    moved = traffic(rows, len(counts), n, k)
    copies = [given] + [device.elsewhere(given) for _ in range(device.copies_for(moved) - 1)]
    check = functools.partial(check_values, _expected(given, counts))
    calls = [ours(*copy) for copy in copies]
    peers, missing = contestants_of(
        {name: [functools.partial(maker, *copy) for copy in copies] for name, maker in PEERS.items()}
    )
    found = [Contestant(backend(), lambda i: calls[i]()), *peers]
    checked = [dataclasses.replace(contestant, check=check) for contestant in found]
    return Subject(checked, len(copies), moved, 2.0 * rows * n * k, "fp8", missing)


def _expected(given: Operands, counts: list[int]) -> Tensor:
    """In FP32 throughout."""
    a, b = (fastfp8.dequantize(t, torch.float32) for t in given[:2])
    parts = [rows @ weight.t() for rows, weight in zip(torch.split(a, counts), b if b.dim() == 3 else [b], strict=True)]
    gate, up = torch.cat(parts).chunk(2, 1)
    return F.silu(gate) * up


def case(counts: list[int], weight: Linear, grouped: bool, priority: int) -> Case:
    shape = f"{sum(counts)} rows x{weight.n}x{weight.k}"
    if grouped:
        shape = f"{len(counts)} groups, {shape}"
    build = functools.partial(subject, counts, weight.n, weight.k, grouped)
    return Case("swiglu", "gemm_swiglu_quantize", shape, "gpu", build, priority, "us")


def works(tiny: bool) -> list[Work]:
    """DeepSeek-V3's routed experts and its shared one: gate and up, so twice as many columns as come out."""
    if tiny:
        weight = Linear("tiny", "gate and up", 256, 256)
        return [case([5, 0, 70], weight, True, 0), case([64], weight, False, 0)]
    grouped: list[Work] = [case(sizes(g, rows), EXPERTS[0].gate_up, True, p) for g, rows, p in GROUPS]
    return grouped + [case([rows], SHARED, False, p) for rows, p in TOKENS]
