"""Runs our Triton kernels on CPU tensors in Triton's interpreter, with the arithmetic of the hardware.

Triton means one to set TRITON_INTERPRET before any kernel is decorated, which would take compilation away from the rest
of the process. Here a kernel stays what it is, and is swapped for an interpreted twin while :func:`interpreted` lasts;
so are the functions of ``tl.standard`` (``tl.max``, ``tl.cdiv``), which are kernels too: call them as functions, for
their twins as methods of a tensor (``x.max()``) are not there.

Four things are corrected, in ``_CORRECTIONS`` alone; ``tests/test_interpreter.py`` shows that the casts still need it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction, mangle_type

# The first use of this imports triton.experimental, which insists that the functions of tl.standard are no twins yet.
mangle_type(0)

E4M3_MAX, E4M3_NAN = 448.0, 0x7F

_NUMPY_TYPES = {
    tl.float32: np.float32,
    tl.float16: np.float16,
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
}


def convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: object) -> np.ndarray:
    """The bits of ``data`` in ``target``, rounded to nearest even; to e4m3 as cvt.rn.satfinite does.

    Triton's own truncates FP32 to BF16, loses the carry of a rounding and the ties to even on the way to e4m3, and
    reads the e4m3 NaN as 480.
    """
    unsigned = np.dtype(f"uint{target.primitive_bitwidth}")
    values = np.ascontiguousarray(data).view(_NUMPY_TYPES[source]).astype(np.float32)
    if target != tl.float8e4nv:
        return values.astype(_NUMPY_TYPES[target]).view(unsigned)
    # ml_dtypes makes a NaN of what is above 464. np.clip hands a NaN on.
    codes = np.clip(values, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn).view(unsigned)
    return np.where(np.isnan(values), np.uint8(E4M3_NAN), codes)


def fma_f32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x * y + z`` of FP32 rounded once. Triton's own rounds twice before 3.9."""
    product, addend = x.astype(np.float64) * y, z.astype(np.float64)  # the product is exact
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    # Round to odd: where the sum is inexact, make its last bit sticky, so that rounding to FP32 sees no false tie.
    even = (total.view(np.int64) & 1) == 0
    sticky = np.isfinite(total) & (error != 0) & even
    total = np.where(sticky, np.nextafter(total, np.copysign(np.inf, error)), total)
    return total.astype(np.float32)


def _create_fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    assert z.dtype.scalar == tl.float32, f"no corrected fma of {z.dtype}"
    return TensorHandle(fma_f32(*np.broadcast_arrays(x.data, y.data, z.data)), tl.float32)


def _create_dot(
    self: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    d: TensorHandle,
    precision: object,
    imprecise_acc: object,
) -> TensorHandle:
    """The product of e4m3 codes exactly, then ``d`` added in FP32. Triton's own sums in FP32, in the BLAS's order.

    Exact, because a product of two codes is a multiple of 2^-18 below 2^18: 128 of them fit the 53 bits of a double.
    """
    assert a.dtype.scalar == b.dtype.scalar == tl.float8e4nv, f"no corrected dot of {a.dtype} and {b.dtype}"
    assert a.data.shape[1] <= 1 << 17
    left, right = (h.data.view(ml_dtypes.float8_e4m3fn).astype(np.float64) for h in (a, b))
    return TensorHandle((left @ right).astype(np.float32) + d.data, tl.float32)


def _index(value: tl.tensor) -> int:
    """For ``range(n)`` with n a value of the kernel: Triton 3.6 passes int() an array that NumPy 2.4 refuses."""
    return int(value.handle.data.item())


_CORRECTIONS = (
    (triton_interpreter, "_convert_float", convert_float),
    (InterpreterBuilder, "create_fma", _create_fma),
    (InterpreterBuilder, "create_dot", _create_dot),
    (tl.tensor, "__index__", _index),
)


class _Bounds:
    """The addresses of the elements of the tensors that a launch got; every access must stay within them."""

    def __init__(self, memory: Iterable[Any]) -> None:
        self._ranges: list[tuple[int, int]] = []
        for tensor in memory:
            self._add(tensor)
        self._convert = triton_interpreter._implicit_cvt
        self._load, self._store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def _add(self, tensor: Any) -> None:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            self._ranges.append((tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size()))

    def patches(self) -> tuple[tuple[Any, str, Any], ...]:
        def convert(arg: Any) -> Any:
            if hasattr(arg, "data_ptr"):
                self._add(arg)
            return self._convert(arg)

        def load(builder: InterpreterBuilder, ptrs: TensorHandle, mask: TensorHandle, *args: Any, **kwargs: Any) -> Any:
            self._check("load", ptrs, mask)
            return self._load(builder, ptrs, mask, *args, **kwargs)

        def store(builder: InterpreterBuilder, ptrs: TensorHandle, value: Any, mask: TensorHandle, *args: Any) -> Any:
            self._check("store", ptrs, mask)
            return self._store(builder, ptrs, value, mask, *args)

        return (
            (triton_interpreter, "_implicit_cvt", convert),
            (InterpreterBuilder, "create_masked_load", load),
            (InterpreterBuilder, "create_masked_store", store),
        )

    def _check(self, access: str, ptrs: TensorHandle, mask: TensorHandle) -> None:
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        inside = np.zeros(addresses.shape, bool)
        for first, last in self._ranges:
            inside |= (addresses >= first) & (addresses <= last)
        assert inside.all(), f"{(~inside).sum()} of {inside.size} addresses of a {access} lie outside every tensor"


@functools.cache
def _twin(fn: Callable[..., Any]) -> InterpretedFunction:
    return InterpretedFunction(fn)


@contextmanager
def _interpreted_language() -> Iterator[None]:
    """Triton's own patches of ``tl``, for the whole time instead of once a launch.

    Triton takes back those of a launch but not those of a call from kernel to kernel, after which nothing compiles.
    """
    both = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    scope = triton_interpreter._patch_lang(both)
    try:
        nothing = SimpleNamespace(restore=lambda: None)
        with mock.patch.object(triton_interpreter, "_patch_lang", return_value=nothing):
            yield
    finally:
        scope.restore()


@contextmanager
def interpreted(*modules: ModuleType, corrected: bool = True, memory: Iterable[Any] = ()) -> Iterator[None]:
    """While it lasts, the Triton kernels of fastfp8 and of ``modules`` run in the interpreter, on CPU tensors.

    An access outside the tensors of a launch and of ``memory`` is an error. ``corrected=False`` leaves Triton's
    arithmetic as it is.
    """
    ours = [m for name, m in sys.modules.items() if name.split(".")[:2] == ["fastfp8", "triton_kernels"]]
    with ExitStack() as stack:
        for module in (*ours, *modules, tl, tl.standard):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    stack.enter_context(mock.patch.object(module, name, _twin(value.fn)))
        stack.enter_context(_interpreted_language())
        for owner, name, value in (*_Bounds(memory).patches(), *(_CORRECTIONS if corrected else ())):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(np.errstate(all="ignore"))  # a kernel's overflow or NaN is no event
        yield
