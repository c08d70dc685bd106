"""``fastfp8.grouped_wgrad`` beside DeepGEMM's k-grouped product, BF16's grouped product and a product a group."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.layout import BLOCK, ceil_div

from . import device, grouped
from .case import Case, Contestant, Subject, Work
from .gemm import backend, check_product
from .peers import contestants_of, deep_gemm_library
from .shapes import EXPERTS, Linear

# Groups on a GPU and tokens of each on average, as DeepGEMM's tests have them; then one, a dense layer's gradient.
TOKENS = ((4, 8192, 0), (8, 4096, 0), (16, 2048, 0), (1, 8192, 1))
STORE, ACCUMULATE = "grouped_wgrad, stored", "grouped_wgrad, accumulated"


@dataclasses.dataclass(frozen=True)
class Operands:
    """One copy of what a call gets: gradients [N, T] and inputs [K, T], blocked along the tokens, and the groups' ends.

    ``ends`` are known to the host too, as DeepGEMM asks; each is a multiple of 128.
    """

    grad_t: ScaledTensor
    input_t: ScaledTensor
    offsets: Tensor
    ends: list[int]
    #: FP32 [G, N, K]: what is accumulated into.
    main_grad: Tensor

    @property
    def groups(self) -> list[slice]:
        return [slice(*span) for span in pairwise([0, *self.ends])]


# A way to the gradients: it makes of a copy of the operands the call that is timed, which writes or adds to main_grad
# or returns what it made.
Maker = Callable[[Operands, bool], Callable[[], Tensor]]


def ours(given: Operands, accumulate: bool) -> Callable[[], Tensor]:
    out = given.main_grad if accumulate else None
    operands = given.grad_t, given.input_t, given.offsets
    return lambda: fastfp8.grouped_wgrad(*operands, out=out, accumulate=accumulate)


def deep_gemm(given: Operands, accumulate: bool) -> Callable[[], Tensor]:
    """It adds to FP32 only and wants the sizes on the host; codes of a group together, scales as ours.

    To store it needs zeros to add to: it copies ``c`` into ``d`` before its kernel.
    """
    library = deep_gemm_library()
    sizes = [group.stop - group.start for group in given.groups]
    on_device = torch.tensor(sizes, dtype=torch.int32, device=given.offsets.device)
    operands = [
        (torch.cat([t.data[:, group].reshape(-1) for group in given.groups]), t.scale)
        for t in (given.grad_t, given.input_t)
    ]
    c = given.main_grad if accumulate else torch.zeros_like(given.main_grad)

    def run() -> Tensor:
        out = c if accumulate else torch.empty_like(c)
        library.k_grouped_fp8_gemm_nt_contiguous(*operands, out, sizes, on_device, c=c)
        return out

    return run


def one_by_one(given: Operands, accumulate: bool) -> Callable[[], Tensor]:
    """What a host that knows the sizes would do: a launch for each group."""

    def part(t: ScaledTensor, group: slice) -> ScaledTensor:
        blocks = slice(group.start // BLOCK, group.stop // BLOCK)
        return ScaledTensor._trusted(t.data[:, group], t.scale[:, blocks], t.block)

    parts = [(part(given.grad_t, group), part(given.input_t, group)) for group in given.groups]

    def run() -> Tensor:
        out = given.main_grad if accumulate else torch.empty_like(given.main_grad)
        for index, (grad_t, input_t) in enumerate(parts):
            c = out[index] if accumulate else None
            out[index] = fastfp8.gemm(grad_t, input_t, out_dtype=torch.float32, c=c)
        return out

    return run


def bf16(given: Operands, accumulate: bool) -> Callable[[], Tensor]:
    """torch's grouped product of BF16 operands, whose result is BF16; to accumulate it is added then."""
    grouped_mm = grouped.bf16_grouped_mm()
    grad_t, input_ = fastfp8.dequantize(given.grad_t), fastfp8.dequantize(given.input_t).t()

    def run() -> Tensor:
        out = grouped_mm(grad_t, input_, offs=given.offsets)
        return given.main_grad.add_(out) if accumulate else out

    return run


PEERS: dict[str, Maker] = {"DeepGEMM": deep_gemm, "gemm a group": one_by_one, "BF16 grouped_mm": bf16}


def sizes(groups: int, average: int) -> list[int]:
    """Multiples of 128, around the average as in DeepGEMM's tests."""
    return [ceil_div(size, BLOCK) * BLOCK for size in grouped.sizes(groups, average)]


def traffic(tokens: int, groups: int, n: int, k: int, accumulate: bool) -> int:
    """The fewest bytes: operands and scales read once, FP32 written once and, to accumulate, read."""
    return (n + k) * (tokens + 4 * tokens // BLOCK) + groups * n * k * (8 if accumulate else 4)


def subject(counts: list[int], n: int, k: int, accumulate: bool) -> Subject:
    tokens = sum(counts)
    grad_t, input_t = (
        fastfp8.quantize(torch.randn(rows, tokens, device=device.DEVICE, dtype=torch.bfloat16)) for rows in (n, k)
    )
    ends = torch.tensor(counts).cumsum(0).tolist()
    offsets = torch.tensor(ends, dtype=torch.int32, device=device.DEVICE)
    copies = [Operands(grad_t, input_t, offsets, ends, torch.zeros(len(counts), n, k, device=device.DEVICE))]
    left, right = fastfp8.dequantize(grad_t, torch.float32), fastfp8.dequantize(input_t, torch.float32)
    expected = torch.stack([left[:, group] @ right[:, group].t() for group in copies[0].groups])
    moved = traffic(tokens, len(counts), n, k, accumulate)
    for _ in range(device.copies_for(moved) - 1):
        left_, right_, offsets_, main_grad = device.elsewhere((grad_t, input_t, offsets, copies[0].main_grad))
        copies.append(Operands(left_, right_, offsets_, ends, main_grad))
    calls = [ours(copy, accumulate) for copy in copies]
    peers, missing = contestants_of(
        {name: [functools.partial(maker, copy, accumulate) for copy in copies] for name, maker in PEERS.items()}
    )
    check = functools.partial(check_product, expected)
    checked = [
        _checked(contestant, copies, check, accumulate)
        for contestant in (Contestant(backend(), lambda i: calls[i]()), *peers)
    ]
    return Subject(checked, len(copies), moved, 2.0 * tokens * n * k, "fp8", missing)


def _checked(
    contestant: Contestant, copies: list[Operands], check: Callable[[Any], None], accumulate: bool
) -> Contestant:
    """What accumulates is checked here, once for each copy, from zeros: repeated, its sums are no products."""
    if not accumulate:
        return dataclasses.replace(contestant, check=check)
    for index, given in enumerate(copies):
        given.main_grad.zero_()
        contestant.run(index)
        try:
            check(given.main_grad)
        except AssertionError as error:
            raise AssertionError(f"{contestant.backend}: {error}") from error
        given.main_grad.zero_()

    def run(i: int) -> None:  # gives the timer nothing to fill with NaN
        contestant.run(i)

    return dataclasses.replace(contestant, run=run)


def case(counts: list[int], weight: Linear, accumulate: bool, priority: int) -> Case:
    op = ACCUMULATE if accumulate else STORE
    shape = f"{len(counts)} groups, {sum(counts)} tokens, {weight.n}x{weight.k}"
    build = functools.partial(subject, counts, weight.n, weight.k, accumulate)
    return Case("wgrad", op, shape, "gpu", build, priority, "us")


def works(tiny: bool) -> list[Work]:
    """The experts of DeepSeek-V3, gate and up first: [N, K] of each group, summed over its tokens."""
    if tiny:
        return [case([128, 0, 256], Linear("tiny", "expert", 64, 128), accumulate, 0) for accumulate in (False, True)]
    weights = (EXPERTS[0].gate_up, EXPERTS[0].down)
    return [
        case(sizes(groups, tokens), weight, accumulate, priority)
        for groups, tokens, priority in TOKENS
        for weight in weights
        for accumulate in (False, True)
    ]
