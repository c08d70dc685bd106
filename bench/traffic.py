"""Bytes that the fused ops move through global memory, counted on the tests' emulator in the PTX that Triton compiles.

What is counted are sectors of 32 bytes, for each instruction of a warp those that its lanes touch: what it asks of L1.
Nothing is forgiven: a sector that two instructions touch counts twice although a cache would serve the second, and 4
bytes alone count 32. So a ratio near 1 needs no cache's help, and what DRAM moves lies between the least (each input
read once, each result written once) and the count.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastfp8.reference import rmsnorm as reference

from .borrowed import borrow
from .case import Computed, Session, Work
from .fusions import FUSIONS, TWO_PASSES, Fusion, tensors_in
from .rows import Row
from .static import TRITON

# Each side an eighth of 4096 tokens by DeepSeek-V3's hidden size.
TOKENS, SHAPE, TINY = 4096, (512, 896), (128, 256)
# RMSNorm's rows stay whole, for how the tile of a program looks depends on them.
WHOLE_ROWS, WHOLE_ROWS_TINY = (256, 7168), (32, 7168)
SECTOR, BAR, SEED = 32, 1.05, 0
RATIO = "counted over least"
_SCATTERED = "a token's rows are anywhere, and the scale of each is 4 bytes in a sector of 32, which L2 merges"
_TWICE = "FP32 results of a tile do not fit the registers: a second pass computes them again, of inputs L1 may have"
_BACKWARD = tuple(f"swiglu_backward_quantize{kind}" for kind in ("", ", FP8", ", FP8, grouped"))
_NEEDS_RSTD = "the transpose needs what sums over whole rows give, so it reads its input once more"
OPS = FUSIONS | TWO_PASSES
#: Why an op counts more than BAR allows.
EXCESS = {
    "dequantize 128x1": "each warp of a tile reads the scales of all its columns, which L1 has for the others",
    "rmsnorm_quantize, both ways": _NEEDS_RSTD,
    "rmsnorm_quantize, residual, both ways": _NEEDS_RSTD,
    "rmsnorm_quantize_transpose": "each warp of a tile reads the weight of all columns, which L1 has for the others",
    "rmsnorm_backward": "each 32 rows read the weight, and write a row of FP32 that is read once more: L2 has both",
    "permute, FP8": _SCATTERED,
    "permute_quantize": _SCATTERED,
    "unpermute, FP8": _SCATTERED,
    **dict.fromkeys(_BACKWARD, _TWICE),
    "route": "each program reads the bias of all experts, which L2 has",
    "pack_e5m6, per row": "the amax of a row is a pass of its own: L1 or L2 has what the second reads again",
}


def works(tiny: bool) -> list[Work]:
    """``tiny`` has one op in seven."""
    shapes = {name: shape_of(name, tiny) for name in list(OPS)[:: 7 if tiny else 1]}
    return [Computed(name, f"{r}x{c}", functools.partial(_rows, name, r, c)) for name, (r, c) in shapes.items()]


def shape_of(name: str, tiny: bool) -> tuple[int, int]:
    if name.startswith("rmsnorm"):
        return WHOLE_ROWS_TINY if tiny else WHOLE_ROWS
    return TINY if tiny else SHAPE


def _rows(name: str, rows: int, cols: int, _: Session) -> list[Row]:
    fusion = OPS[name](rows, cols)
    least, counted = measured(fusion)
    where, chain = ("traffic", name, f"{rows}x{cols}", TRITON, "emulated"), sum(fusion.chain.values())
    values = {"bytes, least": least, "counted": counted, "in steps": chain, RATIO: counted / least}
    bars = {} if name in EXCESS else {RATIO: BAR}
    note = f"the steps: {', '.join(fusion.chain)}"
    notes = {"in steps": note} | ({RATIO: EXCESS[name]} if name in EXCESS else {})
    return [Row(*where, unit, *(float(v),) * 3, bar=bars.get(unit), note=notes.get(unit)) for unit, v in values.items()]


def measured(fusion: Fusion) -> tuple[float, int]:
    """The least bytes, and those counted. The results are checked bit for bit, where the op writes them."""
    if fusion.module == "rmsnorm":
        with _programs_of_many_rows(fusion.args[0].shape[0]):
            return _measured(fusion)
    return _measured(fusion)


def _measured(fusion: Fusion) -> tuple[float, int]:
    exact, got = (copy.deepcopy(args) for args in (fusion.args, fusion.host_args or fusion.args))
    with _poisoned():
        results = fusion.op(*exact, **fusion.kwargs)
    module = importlib.import_module(f"fastfp8.triton_kernels.{fusion.module}")
    if callable(fusion.host):
        host: Callable[..., Any] = functools.partial(fusion.host, module)
    else:
        host = getattr(module, fusion.host or fusion.op._schema.name.split("::")[1])
    with _poisoned(), _launches(module, tensors_in(got)) as counters:
        found = host(*got, *fusion.kwargs.values())
    # An op that returns nothing has written its arguments.
    compared = (got, exact) if results is None else (found, results)
    for mine, right in zip(*map(tensors_in, compared), strict=True):
        _check_bits(mine, right)
    return fusion.least(results), SECTOR * sum(c.global_sectors for c in counters)


def _check_bits(got: Tensor, exact: Tensor) -> None:
    same = torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (got, exact)))
    assert same, f"{int((got.float() != exact.float()).sum())} of {got.numel()} values are not the reference's"


@contextlib.contextmanager
def _programs_of_many_rows(rows: int) -> Iterator[None]:
    """While it lasts, RMSNorm's programs have as many of ``rows`` rows as they have of TOKENS, each its share.

    Of few rows each program would have few, and read the weight for them.
    """
    kernels = importlib.import_module("fastfp8.triton_kernels.rmsnorm")
    together, programs = reference.rows_together(TOKENS), kernels._PROGRAMS * rows // TOKENS
    with (
        mock.patch.object(kernels, "_PROGRAMS", programs),
        mock.patch.object(kernels, "rows_together", return_value=together),
        mock.patch.object(reference, "rows_together", return_value=together),
    ):
        yield


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """While it lasts, new tensors are full of 0xFF: what neither the op nor the reference writes is equal."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            made = make(*args, **options)
            span = made.as_strided((made.untyped_storage().nbytes() // made.element_size(),), (1,), 0)
            span.view(torch.uint8).fill_(0xFF)
            return made

        return call

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_strided", poisoned(torch.empty_strided)),
    ):
        yield


class _Launcher:
    """Takes a kernel's place: each launch runs at once, and what it did goes to a list."""

    def __init__(self, kernel: Any, run: Callable[..., Any], counters: list[Any]) -> None:
        self._kernel, self._run, self._counters = kernel, run, counters

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._counters.append(self._run(self._kernel, grid, *args, **kwargs))


@contextlib.contextmanager
def _launches(module: ModuleType, memory: list[Tensor]) -> Iterator[list[Any]]:
    """While it lasts, launches of a module's kernels run on the emulator. ``memory``: adamw has its addresses alone."""
    emulated = borrow("triton_launch").Emulated(SEED)
    emulated.memory = tuple(t for t in memory if t.numel())
    counters: list[Any] = []
    with contextlib.ExitStack() as stack:
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                stack.enter_context(mock.patch.object(module, name, _Launcher(value, emulated, counters)))
        yield counters
