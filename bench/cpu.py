"""The CPU ops beside what torch takes for as much arithmetic or memory, the cost of a call and of the import."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.layout import BLOCK, BLOCKS, Block

from . import host
from .case import Case, Computed, Contestant, Session, Subject, Telemetry, Work, turns
from .foreign import ForeignLoad
from .imports import measure as measure_imports
from .rows import Row

# Bars, each with room for a busy machine. The first two are ratios to the peer, the others are not: what a call and the
# import cost is felt as such.
GEMM_RATIO = 3.0
QUANTIZE_RATIO = 12.0
CALL_US = 60.0
IMPORT_S = 0.3

# Of the standard library: as long an import as ours, and one that reads as many files.
IMPORT_PEER = "asyncio"
CALLS = 500  # that make one sample of an op's call


def works(tiny: bool) -> list[Work]:
    """``tiny`` has no bars on times."""
    size = 64 if tiny else 2048
    rows, cols = (8, 256) if tiny else (4096, 7168)
    square, wide = f"{size}x{size}x{size}", f"{rows}x{cols}"

    def case(op: str, shape: str, build: Callable[[], Subject], priority: int, **more: Any) -> Case:
        made = Case("cpu", op, shape, "cpu", build, priority, **more)
        return dataclasses.replace(made, bar=None) if tiny else made

    gemm, call = functools.partial(_gemm, size), {"unit": "us", "bar": CALL_US, "bar_on": "median"}
    found: list[Work] = [
        case("gemm", square, gemm, 0, bar=GEMM_RATIO),
        case("torch.ops.fastfp8.quantize", "1x128", _call, 0, **call),
        Import(case("import fastfp8, beyond torch", "", _imports, 1, unit="s", bar=IMPORT_S, bar_on="median")),
        Computed("Triton modules it imports", "", _triton_rows, 2),
        *host.works(tiny),
    ]
    for block in BLOCKS:
        quantize, priority = functools.partial(_quantize, rows, cols, block), 0 if block == (1, BLOCK) else 1
        found.append(case(f"quantize {block[0]}x{block[1]}", wide, quantize, priority, bar=QUANTIZE_RATIO))
    return [*found, case("dequantize 1x128", wide, functools.partial(_dequantize, rows, cols), 2)]


def _gemm(size: int) -> Subject:
    left, right = torch.randn(size, size), torch.randn(size, size)
    a, b = fastfp8.quantize(left), fastfp8.quantize(right, (BLOCK, BLOCK))

    def check(out: Tensor) -> None:
        exact = fastfp8.dequantize(a, torch.float32) @ fastfp8.dequantize(b, torch.float32).T
        error = (out.float() - exact).norm() / exact.norm()
        assert error < 2**-8, f"off by {error:.2g} of the norm"

    ours = Contestant("fastfp8", lambda _: fastfp8.gemm(a, b), check)
    return Subject([ours, Contestant("torch.mm float32", lambda _: left @ right)], flops=2.0 * size**3)


@functools.cache
def _activations(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols).bfloat16()


def _cast(x: Tensor, dtype: torch.dtype) -> Contestant:
    """Into memory that is there: fresh pages, which an allocation may need or not, are worth 4x (measured)."""
    out = torch.empty_like(x, dtype=dtype)
    return Contestant(f"cast to {str(dtype).removeprefix('torch.')}", lambda _: out.copy_(x))


def _quantize(rows: int, cols: int, block: Block) -> Subject:
    x = _activations(rows, cols)
    check = functools.partial(_check_quantized, x)
    ours = Contestant("fastfp8", lambda _: fastfp8.quantize(x, block), check)
    return Subject([ours, _cast(x, torch.float8_e4m3fn)])


def _check_quantized(x: Tensor, got: ScaledTensor) -> None:
    """Rounding to 3 bits of mantissa, and below the least normal number to a multiple of 2^-9 of the scale."""
    error = (fastfp8.dequantize(got, torch.float32) - x.float()).abs()
    bound = x.float().abs() / 16 + got.scale.max() * 2.0**-10
    assert (error <= bound * 1.001).all(), "codes and scales do not give the input back"


def _dequantize(rows: int, cols: int) -> Subject:
    x = _activations(rows, cols)
    t = fastfp8.quantize(x)

    def check(out: Tensor) -> None:
        exact = t.data.float() * t.scale.repeat_interleave(BLOCK, 1)[:, :cols]
        assert torch.equal(out, exact.bfloat16()), "not the product of code and scale"

    ours = Contestant("fastfp8", lambda _: fastfp8.dequantize(t), check)
    return Subject([ours, _cast(t.data, torch.bfloat16)])


def _call() -> Subject:
    """On so small a tensor that the time is what it takes to get to the arithmetic and back."""
    x = torch.randn(1, BLOCK)

    def plain(_: int) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(1, keepdim=True) / 448.0
        return (x / scale).to(torch.float8_e4m3fn), scale

    def check(out: tuple[Tensor, Tensor]) -> None:
        _check_quantized(x, ScaledTensor(out[0], out[1], (1, BLOCK)))

    ours = Contestant("fastfp8", lambda _: torch.ops.fastfp8.quantize(x), check, CALLS)
    return Subject([ours, Contestant("the same in five torch ops", plain, check, CALLS)])


def _imports() -> Subject:
    names = ("fastfp8", IMPORT_PEER)
    return Subject([Contestant(name, lambda _, name=name: importlib.import_module(name)) for name in names])  # type: ignore[misc]


class ImportTimer:
    """Imports the modules that contestants are named after, in fresh processes. The first round is not counted."""

    def __init__(self) -> None:
        self.telemetry: Telemetry | None = ForeignLoad()

    def time(self, subject: Subject, rounds: int) -> list[list[float]]:
        names = [c.backend for c in subject.contestants]
        orders = [[names[i] for i in order] for order in turns(len(names), rounds + 1)]
        assert self.telemetry
        self.telemetry.sample()
        taken = [{one["module"]: one["seconds"] for one in found} for found in measure_imports(orders)[1:]]
        self.telemetry.sample()
        return [[found[name] for found in taken] for name in names]


@dataclasses.dataclass(frozen=True)
class Import:
    """A case with a timer of its own."""

    case: Case
    op = property(lambda self: self.case.op)
    shape = property(lambda self: self.case.shape)
    priority = property(lambda self: self.case.priority)

    def measure(self, session: Session) -> list[Row]:
        return self.case.measure(dataclasses.replace(session, timers={"cpu": ImportTimer()}))


def _triton_rows(_: Session) -> list[Row]:
    count = float(measure_imports([["fastfp8"]])[0][0]["triton"])
    where = ("cpu", "Triton modules it imports", "", "fastfp8", "cpu", "modules")
    return [Row(*where, count, count, count, bar=0.0)]
