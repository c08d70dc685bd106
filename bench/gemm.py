"""``fastfp8.gemm`` beside cuBLASLt's block-scaled product, DeepGEMM, Triton and BF16, on shapes of real models."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastfp8
from fastfp8 import _C
from fastfp8.layout import BLOCK, Block, ceil_div

from . import device
from .case import Case, Computed, Contestant, Session, Subject, Unavailable, Work
from .goals import HOST_OP, HOST_US
from .peers import GEMM_PEERS, contestants
from .rows import Row, spread
from .shapes import DEEPSEEK_V3, DENSE_TOKENS, GLM_45, QWEN3_235B
from .static import describe, problem

# Against FP32 on the dequantised operands: BF16's rounding of the output alone gives 1e-6.
WORST_DIFFERENCE = 1e-5
# Decode and a training step first, then a small and a large batch and the extremes.
EARLY = {64: 0, 4096: 0, 1: 1, 128: 1, 1024: 1, 8192: 1}
OTHERS_TOKENS = (64, 128, 1024, 4096)  # of other models than the table's
HOST_SHAPE, HOST_CALLS = (64, 576, 7168), 500  # fewer calls than the GPU's queue holds
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
        backend(),
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


def backend() -> str:
    return "fastfp8 sm_90a" if sm90a() else "fastfp8"


def case(
    shape: tuple[int, int, int], priority: int, b_block: Block = WEIGHT, out_dtype: torch.dtype = torch.bfloat16
) -> Case:
    op = f"gemm 1x128 by {b_block[0]}x{b_block[1]}, {str(out_dtype).removeprefix('torch.')}"
    build: Callable[[], Subject] = functools.partial(subject, *shape, b_block, out_dtype)
    return Case("gemm", op, "x".join(map(str, shape)), "gpu", build, priority, "us")


def host_cost(shape: tuple[int, int, int], session: Session) -> list[Row]:
    """Seconds of a call until it returns, the launch made: the GPU's queue never fills, nothing waits for it."""
    if "gpu" not in session.timers:
        raise Unavailable("there is no GPU to measure on")
    m, n, k = shape
    calls = 2 if session.tiny else HOST_CALLS
    a = fastfp8.quantize(torch.randn(m, k, device=device.DEVICE))
    b = fastfp8.quantize(torch.randn(n, k, device=device.DEVICE), WEIGHT)
    operands = (a.data, a.scale, b.data, b.scale, WEIGHT, torch.bfloat16, None)
    samples = []
    for _ in range(session.samples + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            torch.ops.fastfp8.gemm(*operands)
        samples.append((time.perf_counter() - start) / calls * 1e6)
    lower, median, upper = spread(samples[1:])
    where = ("gemm", HOST_OP, "x".join(map(str, shape)), backend(), "gpu", "us")
    return [Row(*where, median, lower, upper, session.samples, bar=HOST_US if sm90a() and not session.tiny else None)]


def works(tiny: bool) -> list[Work]:
    """Shapes are M x N x K: the table of DeepSeek-V3's, the gradients of its weights, then other models' layers."""
    size = (1, 128, 128) if tiny else HOST_SHAPE
    host = Computed(HOST_OP, "x".join(map(str, size)), functools.partial(host_cost, size))
    if tiny:
        return [case((64, 128, 256), 0), case((64, 128, 256), 1, ROW, torch.float32), host]
    table = [case((m, w.n, w.k), EARLY.get(m, 2)) for m in DENSE_TOKENS for w in DEEPSEEK_V3]
    # The gradient of a weight [N, K] over 4096 tokens is N x K, summed over the tokens; both operands come by row.
    gradients = [case((w.n, w.k, 4096), 1, ROW, torch.float32) for w in DEEPSEEK_V3]
    others = [case((m, w.n, w.k), 3) for m in OTHERS_TOKENS for w in (*GLM_45, *QWEN3_235B)]
    return [host, *table, *gradients, *others]
