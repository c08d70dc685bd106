"""``fastfp8.grouped_gemm`` and ``masked_grouped_gemm`` beside DeepGEMM, BF16's grouped product and one a group."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.layout import BLOCK, ceil_div, empty_scale, pad4

from . import device
from .case import Case, Contestant, Subject, Work
from .gemm import backend, check_product
from .peers import contestants_of, deep_gemm_library
from .shapes import EXPERTS, GROUPED_WEIGHTS, Linear

# Groups on a GPU and rows of each on average, as DeepGEMM's tests have them: prefill, then decode with room for more.
CONTIGUOUS = ((4, 8192, 0), (8, 4096, 0), (32, 128, 1))
MASKED = ((6, 1024, 4096, 0), (32, 192, 4096, 1), (32, 20, 4096, 0), (6, 20, 4096, 1))
SPREAD = (0.7, 1.3)  # sizes of groups, over the average


@dataclasses.dataclass(frozen=True)
class Groups:
    """One copy of what a call gets. ``given`` is offsets or, where groups have ``room`` for so many rows, counts.

    ``spans`` are the groups' rows in the flattened a, which the host knows here.
    """

    a: ScaledTensor
    b: ScaledTensor
    given: Tensor
    spans: Sequence[slice]
    room: int | None


Maker = Callable[[Groups], Callable[[], Tensor]]


def sizes(groups: int, average: int) -> list[int]:
    """Not multiples of anything."""
    generator = torch.Generator().manual_seed(groups)
    low, high = SPREAD
    return [int(average * (low + (high - low) * u)) for u in torch.rand(groups, generator=generator).tolist()]


def ours(groups: Groups) -> Callable[[], Tensor]:
    op = fastfp8.grouped_gemm if groups.room is None else fastfp8.masked_grouped_gemm
    return lambda: op(groups.a, groups.b, groups.given)


def deep_gemm(groups: Groups) -> Callable[[], Tensor]:
    """Its contiguous layout has each group begin at a multiple of 128 rows, with -1 for the group of those between.

    Of masked groups it wants the scales matrix by matrix, column-major, and the expected number of rows on the host.
    """
    library = deep_gemm_library()
    a, b, counts = groups.a, groups.b, [span.stop - span.start for span in groups.spans]
    weights = (b.data, b.scale)
    if groups.room is not None:
        scale = torch.empty(b.shape[0], a.scale.shape[2], pad4(groups.room), device=a.data.device).transpose(1, 2)
        activations = (a.data, scale[:, : groups.room].copy_(a.scale))
        expected = ceil_div(sum(counts), len(counts))

        def masked() -> Tensor:
            out = torch.empty(*a.shape[:2], b.shape[1], dtype=torch.bfloat16, device=a.data.device)
            library.m_grouped_fp8_gemm_nt_masked(activations, weights, out, groups.given, expected)
            return out

        return masked
    spans, rows = padded(counts, library)
    data = torch.zeros(rows, a.shape[1], dtype=torch.uint8, device=a.data.device)
    scale = empty_scale(data, (rows, a.scale.shape[1]), a.block).fill_(1.0)
    group_of = torch.full((rows,), -1, dtype=torch.int32, device=a.data.device)
    for group, (target, source) in enumerate(zip(spans, groups.spans, strict=True)):
        data[target], scale[target] = a.data[source].view(torch.uint8), a.scale[source]
        group_of[target] = group
    laid_out = (data.view(torch.float8_e4m3fn), scale)

    def contiguous() -> Tensor:
        out = torch.empty(rows, b.shape[1], dtype=torch.bfloat16, device=data.device)
        library.m_grouped_fp8_gemm_nt_contiguous(laid_out, weights, out, group_of)
        return out

    return contiguous


def padded(counts: Sequence[int], library: Any) -> tuple[list[slice], int]:
    """Where DeepGEMM's contiguous layout has the rows of each group, and how many rows it has in all."""
    alignment, begin, spans = library.get_mk_alignment_for_contiguous_layout(), 0, []
    for count in counts:
        spans.append(slice(begin, begin + count))
        begin += ceil_div(count, alignment) * alignment
    return spans, begin


def one_by_one(groups: Groups) -> Callable[[], Tensor]:
    """What a host that knows the sizes would do: a launch for each group."""
    a, b = groups.a, groups.b
    data, scale = a.data.flatten(0, -2), a.scale.flatten(0, -2) if a.scale.dim() == 3 else a.scale

    def run() -> Tensor:
        out = torch.empty(data.shape[0], b.shape[1], dtype=torch.bfloat16, device=data.device)
        for group, span in enumerate(groups.spans):
            rows = ScaledTensor._trusted(data[span], _aligned(scale[span]), a.block)
            out[span] = fastfp8.gemm(rows, b[group])
        return out

    return run


def _aligned(scale: Tensor) -> Tensor:
    """TMA wants a scale to begin at 16 bytes, which a group that begins anywhere does not."""
    if scale.data_ptr() % 16 == 0:
        return scale
    rows, blocks = scale.shape
    copy = torch.empty(blocks, pad4(rows), dtype=scale.dtype, device=scale.device).t()[:rows]
    return copy.copy_(scale)


def bf16(groups: Groups) -> Callable[[], Tensor]:
    """What the FP8 product replaces: twice the bytes and half the rate."""
    device.require(groups.room is None, "torch has none for masked groups")
    grouped_mm = bf16_grouped_mm()
    left, right = fastfp8.dequantize(groups.a), fastfp8.dequantize(groups.b).transpose(1, 2)
    return lambda: grouped_mm(left, right, offs=groups.given)


def bf16_grouped_mm() -> Callable[..., Tensor]:
    device.require(hasattr(F, "grouped_mm"), "torch.nn.functional.grouped_mm came with torch 2.10")
    return F.grouped_mm


PEERS: dict[str, Maker] = {"DeepGEMM": deep_gemm, "gemm a group": one_by_one, "BF16 grouped_mm": bf16}


def traffic(rows: int, groups: int, n: int, k: int) -> int:
    """The fewest bytes: each row and each group's weight read once, BF16 output written once."""
    blocks = ceil_div(k, BLOCK)
    return rows * (k + 4 * blocks + 2 * n) + groups * (n * k + 4 * blocks * ceil_div(n, BLOCK))


def subject(counts: list[int], room: int | None, n: int, k: int) -> Subject:
    """Groups of so many rows; ``room`` is how many rows each has place for, None where they follow each other."""
    groups, rows = len(counts), sum(counts)
    weights = torch.randn(groups, n, k, device=device.DEVICE, dtype=torch.bfloat16)
    b = fastfp8.quantize(weights, (BLOCK, BLOCK))
    firsts = [sum(counts[:g]) if room is None else g * room for g in range(groups)]
    spans = [slice(first, first + count) for first, count in zip(firsts, counts, strict=True)]
    shape = (rows, k) if room is None else (groups, room, k)
    a = fastfp8.quantize(torch.randn(shape, device=device.DEVICE, dtype=torch.bfloat16))
    ends = [span.stop for span in spans] if room is None else counts
    given = torch.tensor(ends, dtype=torch.int32, device=device.DEVICE)
    expected = _expected(a, b, spans)
    moved = traffic(rows, groups, n, k)
    copies = [Groups(a, b, given, spans, room)]
    for _ in range(device.copies_for(moved) - 1):
        there_a, there_b, there_given = device.elsewhere((a, b, given))
        copies.append(Groups(there_a, there_b, there_given, spans, room))
    calls = [ours(copy) for copy in copies]
    own = Contestant(backend(), lambda i: calls[i]())
    peers, missing = contestants_of(
        {name: [functools.partial(maker, copy) for copy in copies] for name, maker in PEERS.items()}
    )
    checked = []
    for contestant in (own, *peers):
        elsewhere = contestant.backend == "DeepGEMM" and room is None
        where = padded(counts, deep_gemm_library())[0] if elsewhere else spans
        checked.append(dataclasses.replace(contestant, check=functools.partial(_check, expected, where)))
    return Subject(checked, len(copies), moved, 2.0 * rows * n * k, "fp8", missing)


def _expected(a: ScaledTensor, b: ScaledTensor, spans: Sequence[slice]) -> Tensor:
    """In FP32, the groups' rows alone."""
    flat, weights = fastfp8.dequantize(a, torch.float32).flatten(0, -2), fastfp8.dequantize(b, torch.float32)
    return torch.cat([flat[span] @ weights[g].t() for g, span in enumerate(spans)])


def _check(expected: Tensor, spans: Sequence[slice], got: Any) -> None:
    """Rows of no group are not looked at."""
    flat = got.flatten(0, -2)
    check_product(expected, torch.cat([flat[span] for span in spans]))


def case(counts: list[int], room: int | None, weight: Linear, priority: int) -> Case:
    op = "grouped_gemm" if room is None else f"masked_grouped_gemm, room for {room}"
    shape = f"{len(counts)} groups, {sum(counts)} rows x{weight.n}x{weight.k}"
    build = functools.partial(subject, counts, room, weight.n, weight.k)
    return Case("grouped", op, shape, "gpu", build, priority, "us")


def works(tiny: bool) -> list[Work]:
    """The experts of DeepSeek-V3, gate and up first; then the weights of DeepGEMM's tests."""
    if tiny:
        weight = Linear("tiny", "expert", 128, 256)
        return [case([5, 0, 70], None, weight, 0), case([5, 0, 7], 8, weight, 0)]
    weights = [(EXPERTS[0].gate_up, 0), (EXPERTS[0].down, 0), *((weight, 2) for weight in GROUPED_WEIGHTS)]
    found: list[Work] = [case(sizes(g, rows), None, w, p + later) for g, rows, p in CONTIGUOUS for w, later in weights]
    return found + [case(sizes(g, rows), room, w, p + later) for g, rows, room, p in MASKED for w, later in weights]
