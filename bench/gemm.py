"""``fastfp8.gemm`` beside cuBLASLt's block-scaled product, DeepGEMM, Triton and BF16, on shapes of real models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastfp8
from fastfp8 import _C
from fastfp8.layout import BLOCK, Block, ceil_div

from . import device
from .case import Case, Contestant, Subject, Work
from .peers import GEMM_PEERS, contestants
from .shapes import DEEPSEEK_V3, GLM_45, QWEN3_235B, Linear
from .static import describe, problem

# Against FP32 on the dequantised operands: BF16's rounding of the output alone gives 1e-6.
WORST_DIFFERENCE = 1e-5
# Decode, a small and a large batch, a training step; then the extremes.
TOKENS = ((64, 0), (4096, 0), (128, 1), (1024, 1), (1, 2), (16384, 2))
WEIGHT: Block = (BLOCK, BLOCK)
ROW: Block = (1, BLOCK)


def difference(got: Tensor, expected: Tensor) -> float:
    """1 - 2 x.y / (x.x + y.y) in FP64: 0 for equal tensors, NaN where one has a NaN."""
    x, y = got.double(), expected.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def check_product(expected: Tensor, got: Any) -> None:
    apart = difference(got, expected)
    # Written so that NaN fails.
    assert apart <= WORST_DIFFERENCE, f"differs from the FP32 product by {apart:.2g}, more than {WORST_DIFFERENCE:g}"


def traffic(m: int, n: int, k: int, b_block: Block, out_dtype: torch.dtype) -> int:
    """The fewest bytes: operands and scales read once, the output written once."""
    scales = ceil_div(k, BLOCK) * (m + ceil_div(n, b_block[0]))
    return m * k + n * k + 4 * scales + m * n * out_dtype.itemsize


def config_of(m: int, n: int, k: int, b_block: Block, out_dtype: torch.dtype) -> str:
    """What select.cpp chooses, as the op does."""
    sms = torch.cuda.get_device_properties().multi_processor_count
    return describe(_C.gemm_select(problem(m, n, k, b_block, str(out_dtype).removeprefix("torch."), sms)))


def subject(m: int, n: int, k: int, b_block: Block, out_dtype: torch.dtype) -> Subject:
    """Ours and the peers on copies of one pair of random operands."""
    x = torch.randn(m, k, device=device.DEVICE, dtype=torch.bfloat16)
    w = torch.randn(n, k, device=device.DEVICE, dtype=torch.bfloat16)
    a, b = fastfp8.quantize(x), fastfp8.quantize(w, b_block)
    expected = fastfp8.dequantize(a, torch.float32) @ fastfp8.dequantize(b, torch.float32).t()
    moved = traffic(m, n, k, b_block, out_dtype)
    copies = device.copies_for(moved)
    operands = [(a, b)] + [device.elsewhere((a, b)) for _ in range(copies - 1)]
    check = functools.partial(check_product, expected)
    ours = Contestant(
        "fastfp8 sm_90a" if sm90a() else "fastfp8",
        lambda i: fastfp8.gemm(*operands[i], out_dtype=out_dtype),
        check,
        config=config_of(m, n, k, b_block, out_dtype) if sm90a() else None,
    )
    # Where Triton is all there is, it is the op itself and no peer of its own.
    makers = {name: maker for name, maker in GEMM_PEERS.items() if sm90a() or name != "fastfp8 Triton"}
    peers, missing = contestants(makers, operands, out_dtype, check)
    return Subject([ours, *peers], copies, moved, 2.0 * m * n * k, "fp8", missing)


def sm90a() -> bool:
    return not _C.gemm_sm90_unusable_reason(torch.cuda.current_device())


def case(
    shape: tuple[int, int, int], priority: int, b_block: Block = WEIGHT, out_dtype: torch.dtype = torch.bfloat16
) -> Case:
    op = f"gemm 1x128 by {b_block[0]}x{b_block[1]}, {str(out_dtype).removeprefix('torch.')}"
    build: Callable[[], Subject] = functools.partial(subject, *shape, b_block, out_dtype)
    return Case("gemm", op, "x".join(map(str, shape)), "gpu", build, priority, "us")


def works(tiny: bool) -> list[Work]:
    """Shapes are M x N x K. DeepSeek-V3 first; then the gradient of its weights, and other models' layers."""
    if tiny:
        return [case((64, 128, 256), 0), case((64, 128, 256), 1, ROW, torch.float32)]

    def forward(weights: Sequence[Linear], later: int) -> list[Work]:
        return [case((m, w.n, w.k), priority + later) for m, priority in TOKENS for w in weights]

    # The gradient of a weight [N, K] over 4096 tokens is N x K, summed over the tokens; both operands come by row.
    gradients = [case((w.n, w.k, 4096), 1, ROW, torch.float32) for w in DEEPSEEK_V3]
    return [*forward(DEEPSEEK_V3, 0), *gradients, *forward((*GLM_45, *QWEN3_235B), 3)]
