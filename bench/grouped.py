"""``fastfp8.grouped_gemm`` and ``masked_grouped_gemm`` beside BF16's grouped product and a dense product a group."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.layout import BLOCK, ceil_div

from . import device
from .case import Case, Contestant, Subject, Work
from .gemm import check_product, sm90a
from .shapes import EXPERTS, Linear

# Groups on a GPU and rows of each on average, as DeepGEMM's tests have them: prefill, then decode with room for more.
CONTIGUOUS = ((4, 8192, 0), (8, 4096, 0), (32, 128, 1))
MASKED = ((6, 1024, 4096, 0), (32, 192, 4096, 1))
SPREAD = (0.7, 1.3)  # sizes of groups, over the average


def sizes(groups: int, average: int) -> list[int]:
    """Not multiples of anything."""
    generator = torch.Generator().manual_seed(groups)
    low, high = SPREAD
    return [int(average * (low + (high - low) * u)) for u in torch.rand(groups, generator=generator).tolist()]


def _weights(groups: int, n: int, k: int) -> ScaledTensor:
    return fastfp8.quantize(torch.randn(groups, n, k, device=device.DEVICE, dtype=torch.bfloat16), (BLOCK, BLOCK))


def _check(expected: Tensor, rows: Tensor, got: Any) -> None:
    """Rows of no group are not looked at."""
    check_product(expected, got.flatten(0, -2)[rows])


def traffic(rows: int, groups: int, n: int, k: int) -> int:
    """The fewest bytes: each row and each group's weight read once, BF16 output written once."""
    blocks = ceil_div(k, BLOCK)
    return rows * (k + 4 * blocks + 2 * n) + groups * (n * k + 4 * blocks * ceil_div(n, BLOCK))


def subject(counts: list[int], room: int | None, n: int, k: int) -> Subject:
    """Groups of so many rows; ``room`` is how many rows each has place for, None where they follow each other."""
    groups, rows = len(counts), sum(counts)
    b = _weights(groups, n, k)
    firsts = [sum(counts[:g]) if room is None else g * room for g in range(groups)]
    shape = (rows, k) if room is None else (groups, room, k)
    a = fastfp8.quantize(torch.randn(shape, device=device.DEVICE, dtype=torch.bfloat16))
    ends = [first + count for first, count in zip(firsts, counts, strict=True)] if room is None else counts
    given = torch.tensor(ends, dtype=torch.int32, device=device.DEVICE)
    flat = fastfp8.dequantize(a, torch.float32).flatten(0, -2)
    weights = fastfp8.dequantize(b, torch.float32)
    spans = [slice(first, first + count) for first, count in zip(firsts, counts, strict=True)]
    expected = torch.cat([flat[span] @ weights[g].t() for g, span in enumerate(spans)])
    used = torch.cat([torch.arange(s.start, s.stop, device=device.DEVICE) for s in spans])
    check = functools.partial(_check, expected, used)
    moved = traffic(rows, groups, n, k)
    copies = device.copies_for(moved)
    operands = [(a, b, given)] + [device.elsewhere((a, b, given)) for _ in range(copies - 1)]
    op = fastfp8.grouped_gemm if room is None else fastfp8.masked_grouped_gemm
    ours = Contestant("fastfp8 sm_90a" if sm90a() else "fastfp8 Triton", lambda i: op(*operands[i]), check)
    contestants = [
        ours,
        Contestant("gemm a group", lambda i: _one_by_one(operands[i][0], operands[i][1], spans), check),
    ]
    missing = {}
    if room is not None:
        missing["BF16 grouped_mm"] = "torch has none for masked groups"
    elif not hasattr(F, "grouped_mm"):
        missing["BF16 grouped_mm"] = "torch.nn.functional.grouped_mm came with torch 2.10"
    else:
        wide = [(flat.bfloat16(), weights.bfloat16().transpose(1, 2), ends) for _, _, ends in operands]
        run = functools.partial(_bf16, wide)
        contestants.append(Contestant("BF16 grouped_mm", run, check))
    return Subject(contestants, copies, moved, 2.0 * rows * n * k, "fp8", missing)


def _bf16(operands: list[tuple[Tensor, Tensor, Tensor]], i: int) -> Tensor:
    a, b, ends = operands[i]
    return F.grouped_mm(a, b, offs=ends)


def _one_by_one(a: ScaledTensor, b: ScaledTensor, spans: list[slice]) -> Tensor:
    """What a host that knows the sizes would do: a launch for each group."""
    data, scale = a.data.flatten(0, -2), a.scale.flatten(0, -2) if a.scale.dim() == 3 else a.scale
    out = torch.empty(data.shape[0], b.shape[1], dtype=torch.bfloat16, device=data.device)
    for group, span in enumerate(spans):
        rows = ScaledTensor._trusted(data[span], _aligned(scale[span]), a.block)
        out[span] = fastfp8.gemm(rows, b[group])
    return out


def _aligned(scale: Tensor) -> Tensor:
    """TMA wants a scale to begin at 16 bytes, which a group that begins anywhere does not."""
    if scale.data_ptr() % 16 == 0:
        return scale
    rows, blocks = scale.shape
    copy = torch.empty(blocks, ceil_div(rows, 4) * 4, dtype=scale.dtype, device=scale.device).t()[:rows]
    return copy.copy_(scale)


def case(counts: list[int], room: int | None, weight: Linear, priority: int) -> Case:
    op = "grouped_gemm" if room is None else f"masked_grouped_gemm, room for {room}"
    shape = f"{len(counts)} groups, {sum(counts)} rows x{weight.n}x{weight.k}"
    build = functools.partial(subject, counts, room, weight.n, weight.k)
    return Case("grouped", op, shape, "gpu", build, priority, "us")


def works(tiny: bool) -> list[Work]:
    """The experts of DeepSeek-V3, gate and up first."""
    if tiny:
        weight = Linear("tiny", "expert", 128, 256)
        return [case([5, 0, 70], None, weight, 0), case([5, 0, 7], 8, weight, 0)]
    weights = (EXPERTS[0].gate_up, EXPERTS[0].down)
    found: list[Work] = [case(sizes(g, rows), None, w, p) for g, rows, p in CONTIGUOUS for w in weights]
    return found + [case(sizes(g, rows), room, w, p) for g, rows, room, p in MASKED for w in weights]
