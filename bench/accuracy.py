"""Error of the FP8 product against the interval of promotion, by the model of Hopper's tensor core. Needs no GPU.

DeepSeek-V3's report (arXiv 2412.19437, section 3.3.2) finds that 128 elements of K are the shortest interval worth
having and that sums which are never promoted err by percents. The gates of a GEMM hold at 128 and fail without.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from fastfp8.layout import BLOCK, ceil_div
from fastfp8.reference import tensor_core

from .case import Computed, Session, Work
from .rows import Row

SIZE, K = 48, 4096
LEAST = tensor_core.STEP
NORMAL, POSITIVE = "standard normal", "uniform, 0 to 1"
MOST, RMS, DIFF, BIAS = "largest error / rms", "rms error / rms", "calc_diff", "bias"
# What a product promoted every 128 must stay below. On positive data the bias that is left makes calc_diff 1.6e-7.
GATES = {
    NORMAL: {MOST: 2e-3, DIFF: 5e-8},
    POSITIVE: {MOST: 2e-3, DIFF: 3e-7},
}
NOTE = (
    "codes under a single scale, which a sum over several blocks needs; errors are against exact sums of their products"
)


@dataclasses.dataclass(frozen=True)
class Operands:
    """Codes [size, k] of a and b, and their product in FP64, which is exact."""

    a: Tensor
    b: Tensor
    exact: Tensor

    @staticmethod
    @functools.cache
    def random(data: str, size: int, k: int) -> Operands:
        generator = torch.Generator().manual_seed(0)
        make = torch.randn if data == NORMAL else torch.rand
        # The largest value at 448, as quantisation puts it.
        a, b = (x * (448 / x.abs().max()) for x in make(2, size, k, generator=generator).unbind())
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        return Operands(a, b, a.double() @ b.double().t())

    def product(self, interval: int) -> Tensor:
        """By the model, promoted every ``interval`` elements of K."""
        size, k = self.a.shape
        ones = torch.ones(size, ceil_div(k, BLOCK))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # many small steps, in which threads beside other work wait for each other
        try:
            operands = (self.a, ones, self.b, ones, (1, BLOCK))
            return tensor_core.gemm(*operands, torch.float32, None, promote_every=interval)
        finally:
            torch.set_num_threads(threads)


def measures(got: Tensor, exact: Tensor) -> dict[str, float]:
    """By unit. ``calc_diff`` is DeepGEMM's, 1 - 2 x.y / (x.x + y.y), from the difference, which keeps its digits."""
    error = got.double() - exact
    rms = exact.square().mean().sqrt()
    return {
        MOST: float(error.abs().max() / rms),
        RMS: float(error.square().mean().sqrt() / rms),
        DIFF: float(error.square().sum() / (got.double().square() + exact.square()).sum()),
        BIAS: float(error.mean().abs() / exact.abs().mean()),
    }


def intervals(k: int) -> list[int]:
    """The doublings of one instruction's K, to all of it."""
    return [LEAST << i for i in range((k // LEAST).bit_length())]


def name_of(interval: int, size: int, k: int) -> str:
    """The plot of the errors (plots.py) reads the last word."""
    return f"{size}x{size}x{k}, promoted every {interval}"


def works(tiny: bool) -> list[Work]:
    size, k = (16, 512) if tiny else (SIZE, K)
    return [
        Computed(f"gemm, {data}", name_of(interval, size, k), functools.partial(_rows, data, interval, size, k))
        for data in GATES
        for interval in intervals(k)
    ]


def _rows(data: str, interval: int, size: int, k: int, _: Session) -> list[Row]:
    operands = Operands.random(data, size, k)
    found = measures(operands.product(interval), operands.exact)
    if data == NORMAL:
        del found[BIAS]  # where signs are mixed, the truncation's cancels
    where = ("accuracy", f"gemm, {data}", name_of(interval, size, k), "fastfp8", "modelled")
    rows = [Row(*where, unit, *(value,) * 3, note=NOTE) for unit, value in found.items()]
    # Only what the kernels do is gated: the other intervals are there to be looked at.
    gates = GATES[data] if interval == BLOCK else {}
    return [dataclasses.replace(row, bar=gates.get(row.unit)) for row in rows]
