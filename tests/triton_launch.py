"""Triton kernels without a GPU: launched on the emulator as Triton's driver would, or run by Triton's interpreter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
import triton.language as tl
import triton_matmuls
import triton_programs
from emulator import Counters, Machine, TensorMap
from interpreter import interpreted
from recorder import Recorder
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_SWIZZLE_BYTES = (0, 32, 64, 128)
_FLOATS = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
}


class Run(Protocol):
    """Runs ``kernel[grid](*args, **kwargs)``; compiler options like ``num_warps`` are among the last."""

    def __call__(self, kernel: JITFunction, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Counters | None: ...


def _expanded(descriptor: TensorDescriptor, meta: dict[str, Any] | None) -> list[Any]:
    """What the driver passes for a descriptor: a map where the kernel uses TMA, else a pointer and what a map holds."""
    extents = [*descriptor.shape, *descriptor.strides]
    if meta is None:
        return [descriptor.base, *extents, descriptor.padding == "nan", descriptor.round_f32_to_tf32, *extents]
    fill = math.nan if descriptor.padding == "nan" else 0.0
    return [TensorMap(descriptor.base, meta["block_size"], None, _SWIZZLE_BYTES[meta["swizzle"]], fill), *extents]


class Emulated:
    """On the emulator, from the PTX that Triton compiles for ``capability``, after ``edit`` has changed it.

    ``ptx`` is that of the last run. ``memory`` are tensors that kernels reach by an address within another one.
    """

    memory: tuple[torch.Tensor, ...] = ()

    def __init__(self, seed: int, capability: int = 90, edit: Callable[[str], str] = str) -> None:
        self._machine, self._capability, self._edit = Machine(seed), capability, edit

    def __call__(self, kernel: JITFunction, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Counters:
        recorder = Recorder(kernel)
        recorder[grid](*args, **kwargs)
        compiled = recorder.compile(self._capability)
        metadata, self.ptx = compiled.metadata, self._edit(compiled.asm["ptx"])
        maps = iter(metadata.tensordesc_meta or ())
        values: list[Any] = []
        for value in recorder.runtime_args:
            values += _expanded(value, next(maps, None)) if isinstance(value, TensorDescriptor) else [value]
        # Two areas of scratch memory come last: the kernel's own, and that of a profiler.
        for size in (metadata.global_scratch_size, metadata.profile_scratch_size):
            values.append(_scratch(size * math.prod(grid)) if size else None)
        launchable = self._machine.load(self.ptx)[metadata.name]
        return launchable.launch(grid, _threads(self.ptx), 1, metadata.shared, values, memory=self.memory)


def _scratch(size: int) -> torch.Tensor:
    """At a multiple of 128 bytes, as tensor maps want."""
    room = torch.zeros(size + 128, dtype=torch.uint8)
    return room[-room.data_ptr() % 128 :][:size]


def _threads(ptx: str) -> int:
    """Of a CTA, warps that Triton added for specialised roles included."""
    return int(ptx.partition(".reqntid ")[2].partition("\n")[0].split(",")[0])


def _values(handle: TensorHandle) -> np.ndarray:
    """The interpreter holds the bits of the types that NumPy does not know."""
    data: np.ndarray = handle.data
    known: np.ndarray = data.view(_FLOATS.get(handle.dtype.scalar, data.dtype))
    return known.astype(np.float64)


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: object, imprecise: object
) -> TensorHandle:
    """Exact up to the rounding of doubles, then rounded and added. Triton's own takes the bits of BF16 for integers."""
    return TensorHandle((_values(a) @ _values(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)


class Interpreted:
    """By Triton's interpreter, on NumPy arrays: the kernel as its author meant it."""

    def __call__(self, kernel: JITFunction, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        modules = (triton_matmuls, triton_programs)
        with interpreted(*modules, tl.random), mock.patch.object(InterpreterBuilder, "create_dot", _dot):
            next(m for m in map(vars, modules) if kernel.__name__ in m)[kernel.__name__][grid](*args, **kwargs)


def run_params(seeds: int) -> list[Any]:
    """Pytest parameters that make a ``Run`` when called: the interpreter, and the emulator at several timings."""
    emulated = (pytest.param(functools.partial(Emulated, seed), id=f"seed{seed}") for seed in range(seeds))
    return [pytest.param(Interpreted, id="interpreter"), *emulated]
