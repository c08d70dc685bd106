"""The backends that one test body runs over: the CPU reference, kernels interpreted or emulated, a GPU.

Each takes and returns CPU tensors. ``backend_params()`` makes pytest parameters of them, with a reason where one cannot
run here.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple, Protocol
from unittest import mock

import numpy as np
import pytest
import torch
from placement import aligned, on_gpu, scaled_on_gpu
from swiglu_backends import CudaSwiGlu, CudaTritonSwiGlu, EmulatedSwiGlu, InterpretedSwiGlu
from torch import Tensor

import fastfp8
from fastfp8 import _C, ScaledTensor
from fastfp8.backends import KERNELS, built_kernels
from fastfp8.error_word import error_word
from fastfp8.layout import BLOCK, Block, has_scale_layout
from fastfp8.presets import Preset, Rules


class Backend(Protocol):
    """The public functions of fastfp8, with its signatures."""

    def quantize(self, x: Tensor, block: Block = (1, BLOCK), **options: Any) -> ScaledTensor: ...

    def dequantize(self, t: ScaledTensor, dtype: torch.dtype = torch.bfloat16, *, add: Tensor | None = None) -> Tensor:
        """With the residual ``add``."""

    def swiglu_quantize(
        self,
        gate_up: Tensor | ScaledTensor,
        weight: Tensor | None = None,
        limit: float | None = None,
        **options: Any,
    ) -> ScaledTensor: ...

    def gemm(
        self,
        a: ScaledTensor,
        b: ScaledTensor,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        c: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Tensor: ...

    def grouped_gemm(
        self, a: ScaledTensor, b: ScaledTensor, offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor: ...

    def masked_grouped_gemm(
        self, a: ScaledTensor, b: ScaledTensor, counts: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor: ...

    def gemm_swiglu_quantize(
        self, a: ScaledTensor, b: ScaledTensor, offsets: Tensor | None = None, **options: Any
    ) -> tuple[ScaledTensor, Tensor]:
        """With gate and up, always."""

    def grouped_wgrad(
        self,
        grad_t: ScaledTensor,
        input_t: ScaledTensor,
        offsets: Tensor,
        *,
        out: Tensor | None = None,
        accumulate: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor: ...


class Reference:
    """The ops on CPU tensors."""

    quantize = staticmethod(fastfp8.quantize)
    dequantize = staticmethod(fastfp8.dequantize)
    swiglu_quantize = staticmethod(fastfp8.swiglu_quantize)
    gemm_swiglu_quantize = staticmethod(functools.partial(fastfp8.gemm_swiglu_quantize, return_gate_up=True))
    gemm = staticmethod(fastfp8.gemm)
    grouped_gemm = staticmethod(fastfp8.grouped_gemm)
    masked_grouped_gemm = staticmethod(fastfp8.masked_grouped_gemm)
    grouped_wgrad = staticmethod(fastfp8.grouped_wgrad)


def _wgrad_out(grad_t: ScaledTensor, input_t: ScaledTensor, offsets: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    """What grouped_wgrad makes where it is given no ``out``, full of NaN, so that what is not written shows."""
    shape = (offsets.shape[0], grad_t.shape[0], input_t.shape[0])
    return torch.empty(shape, dtype=out_dtype or torch.float32).fill_(float("nan"))


def _quantize_options(
    pow2: bool = False, eps: float = 0.0, preset: Preset | None = None
) -> tuple[bool, float, Rules | None]:
    """As the host function of the kernel takes them."""
    return (pow2, eps, None) if preset is None else (pow2, preset.eps, preset.rules)


class TritonInterpreter(InterpretedSwiGlu):
    """The Triton kernels and their host functions on CPU tensors, after the checks that the ops make.

    ``error`` is the error word that grouped GEMMs get.
    """

    def __init__(self) -> None:
        from interpreter import interpreted

        from fastfp8.triton_kernels import dequantize, gemm, grouped_gemm, grouped_wgrad, quantize

        self._quantize, self._dequantize, self._gemm = quantize.quantize, dequantize.dequantize, gemm.gemm
        self._grouped, self._wgrad = grouped_gemm, grouped_wgrad.grouped_wgrad
        self._interpreted = interpreted
        self.error = torch.zeros(1, dtype=torch.int32)

    def quantize(self, x: Tensor, block: Block = (1, BLOCK), **options: Any) -> ScaledTensor:
        with self._interpreted():
            return ScaledTensor._trusted(*self._quantize(x, block, *_quantize_options(**options)), block)

    def dequantize(self, t: ScaledTensor, dtype: torch.dtype = torch.bfloat16, *, add: Tensor | None = None) -> Tensor:
        with self._interpreted():
            return self._dequantize(t.data, t.scale, t.block, dtype, add)

    def gemm(
        self,
        a: ScaledTensor,
        b: ScaledTensor,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        c: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Tensor:
        with self._interpreted():
            return self._gemm(a.data, a.scale, b.data, b.scale, b.block, out_dtype, c, num_sms)

    def grouped_gemm(
        self, a: ScaledTensor, b: ScaledTensor, offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        with self._interpreted():
            return self._grouped.grouped_gemm(a.data, a.scale, b.data, b.scale, offsets, self.error, out_dtype)

    def masked_grouped_gemm(
        self, a: ScaledTensor, b: ScaledTensor, counts: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        with self._interpreted():
            return self._grouped.masked_grouped_gemm(a.data, a.scale, b.data, b.scale, counts, self.error, out_dtype)

    def grouped_wgrad(
        self,
        grad_t: ScaledTensor,
        input_t: ScaledTensor,
        offsets: Tensor,
        *,
        out: Tensor | None = None,
        accumulate: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        out = _wgrad_out(grad_t, input_t, offsets, out_dtype) if out is None else out
        operands = (grad_t.data, grad_t.scale, input_t.data, input_t.scale, offsets)
        with self._interpreted():
            self._wgrad(*operands, self.error, out, accumulate)
        return out


class Cuda(CudaSwiGlu):
    """The ops on a GPU."""

    def quantize(self, x: Tensor, block: Block = (1, BLOCK), **options: Any) -> ScaledTensor:
        t = fastfp8.quantize(on_gpu(x), block, **options)
        assert has_scale_layout(t.scale, block)  # here, because the copy to the CPU would mend it
        return t.to("cpu")

    def dequantize(self, t: ScaledTensor, dtype: torch.dtype = torch.bfloat16, *, add: Tensor | None = None) -> Tensor:
        return fastfp8.dequantize(scaled_on_gpu(t), dtype, add=None if add is None else on_gpu(add)).cpu()

    def gemm(
        self,
        a: ScaledTensor,
        b: ScaledTensor,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        c: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Tensor:
        c = None if c is None else on_gpu(c)
        return fastfp8.gemm(scaled_on_gpu(a), scaled_on_gpu(b), out_dtype=out_dtype, c=c, num_sms=num_sms).cpu()

    def grouped_gemm(
        self, a: ScaledTensor, b: ScaledTensor, offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        operands = scaled_on_gpu(a), scaled_on_gpu(b), on_gpu(offsets)
        return fastfp8.grouped_gemm(*operands, out_dtype=out_dtype).cpu()

    def masked_grouped_gemm(
        self, a: ScaledTensor, b: ScaledTensor, counts: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        operands = scaled_on_gpu(a), scaled_on_gpu(b), on_gpu(counts)
        return fastfp8.masked_grouped_gemm(*operands, out_dtype=out_dtype).cpu()

    def grouped_wgrad(
        self,
        grad_t: ScaledTensor,
        input_t: ScaledTensor,
        offsets: Tensor,
        *,
        out: Tensor | None = None,
        accumulate: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        operands = scaled_on_gpu(grad_t), scaled_on_gpu(input_t), on_gpu(offsets)
        if out is None:
            return fastfp8.grouped_wgrad(*operands, accumulate=accumulate, out_dtype=out_dtype).cpu()
        return out.copy_(fastfp8.grouped_wgrad(*operands, out=on_gpu(out), accumulate=accumulate))


class CudaTriton(CudaTritonSwiGlu, Cuda):
    """As Cuda, but GEMMs in Triton where Hopper would take the sm_90a kernel."""

    def gemm(
        self,
        a: ScaledTensor,
        b: ScaledTensor,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        c: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Tensor:
        left, right = scaled_on_gpu(a), scaled_on_gpu(b)
        c = None if c is None else on_gpu(c)
        operands = (left.data, left.scale, right.data, right.scale, right.block)
        return torch.ops.fastfp8._gemm_triton(*operands, out_dtype, c, num_sms).cpu()

    def grouped_gemm(
        self, a: ScaledTensor, b: ScaledTensor, offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        left, right = scaled_on_gpu(a), scaled_on_gpu(b)
        operands = (left.data, left.scale, right.data, right.scale, on_gpu(offsets), error_word(left.device))
        return torch.ops.fastfp8._grouped_gemm_triton(*operands, out_dtype).cpu()

    def masked_grouped_gemm(
        self, a: ScaledTensor, b: ScaledTensor, counts: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        left, right = scaled_on_gpu(a), scaled_on_gpu(b)
        operands = (left.data, left.scale, right.data, right.scale, on_gpu(counts), error_word(left.device))
        return torch.ops.fastfp8._masked_grouped_gemm_triton(*operands, out_dtype).cpu()

    def grouped_wgrad(
        self,
        grad_t: ScaledTensor,
        input_t: ScaledTensor,
        offsets: Tensor,
        *,
        out: Tensor | None = None,
        accumulate: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        out = _wgrad_out(grad_t, input_t, offsets, out_dtype) if out is None else out
        left, right, written = scaled_on_gpu(grad_t), scaled_on_gpu(input_t), on_gpu(out)
        operands = (left.data, left.scale, right.data, right.scale, on_gpu(offsets), error_word(left.device))
        torch.ops.fastfp8._grouped_wgrad_triton(*operands, written, accumulate)
        return out.copy_(written)


def _view(t: Tensor) -> _C.TensorView:
    """As the planners see it: on device 0, which the emulator plays."""
    dtype = str(t.dtype).removeprefix("torch.")
    return _C.TensorView(dtype, list(t.shape), list(t.stride()), 0, t.data_ptr())


class Emulator(EmulatedSwiGlu):
    """The CUDA kernel of gemm, and the Triton ones of all else, from their PTX on the emulator of ``tests/emulator``.

    Args:
        num_sms: so few by default that a CTA walks several tiles.
        seed: of the timing of the first launch; the following ones differ.
        config: as "64x128" or "128x128 pair"; None is what the planner selects.

    ``counters`` are those of the last launch, and ``error`` is the error word that grouped GEMMs get.
    """

    counters: Any = None

    def __init__(self, num_sms: int = 3, seed: int = 0, config: str | None = None) -> None:
        import emulator

        self._num_sms, self._config = num_sms, config
        self._machine, self._run_plan = emulator.Machine(seed), emulator.run_plan
        self.error = torch.zeros(1, dtype=torch.int32)

    def quantize(self, x: Tensor, block: Block = (1, BLOCK), **options: Any) -> ScaledTensor:
        from fastfp8.triton_kernels import quantize as module

        host = functools.partial(module.quantize, x, block, *_quantize_options(**options))
        return ScaledTensor._trusted(*self._run_triton(module, "quantize_kernel", host), block)

    def dequantize(self, t: ScaledTensor, dtype: torch.dtype = torch.bfloat16, *, add: Tensor | None = None) -> Tensor:
        from fastfp8.triton_kernels import dequantize as module

        host = functools.partial(module.dequantize, t.data, t.scale, t.block, dtype, add)
        return self._run_triton(module, "dequantize_kernel", host)

    def _run_triton(self, module: ModuleType, name: str, host: Callable[[], Any]) -> Any:
        """What ``host`` returns, after the PTX that Triton compiles for sm_90 has run in place of its launch."""
        from recorder import Recorder

        recorder = Recorder(getattr(module, name))
        with mock.patch.object(module, name, recorder):
            out = host()
        assert recorder.launches <= 1, "only the last of several launches would run"
        if not recorder.launches:
            return out
        # What the host function made; one that writes where it is told to returns None.
        for written in () if out is None else out if isinstance(out, tuple) else (out,):
            span = written.as_strided((written.untyped_storage().nbytes() // written.element_size(),), (1,), 0)
            span.view(torch.uint8).fill_(0xFF)  # NaN, so that what is not written shows
        compiled = recorder.compile(90)
        kernel = self._machine.load(compiled.asm["ptx"])[name]
        # Triton adds pointers to two scratch areas, which these kernels do not use.
        args = [*recorder.runtime_args, None, None]
        block = (32 * recorder.kwargs["num_warps"], 1, 1)
        self.counters = kernel.launch((*recorder.grid, 1, 1)[:3], block, (1, 1, 1), compiled.metadata.shared, args)
        return out

    def grouped_gemm(
        self, a: ScaledTensor, b: ScaledTensor, offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        return self._run_grouped("grouped_gemm", a, b, offsets, out_dtype)

    def masked_grouped_gemm(
        self, a: ScaledTensor, b: ScaledTensor, counts: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        return self._run_grouped("masked_grouped_gemm", a, b, counts, out_dtype)

    def _run_grouped(self, op: str, a: ScaledTensor, b: ScaledTensor, sizes: Tensor, out_dtype: torch.dtype) -> Tensor:
        from recorder import NO_PROXY_FENCE

        from fastfp8.triton_kernels import grouped_gemm as module

        if NO_PROXY_FENCE:
            pytest.skip(NO_PROXY_FENCE)
        tensors = [aligned(t) for t in (a.data, a.scale, b.data, b.scale, sizes)]
        host = functools.partial(getattr(module, op), *tensors, self.error, out_dtype)
        return self._run_triton(module, "grouped_gemm_kernel", host)

    def grouped_wgrad(
        self,
        grad_t: ScaledTensor,
        input_t: ScaledTensor,
        offsets: Tensor,
        *,
        out: Tensor | None = None,
        accumulate: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        from recorder import NO_PROXY_FENCE

        from fastfp8.triton_kernels import grouped_wgrad as module

        if NO_PROXY_FENCE:
            pytest.skip(NO_PROXY_FENCE)
        out = _wgrad_out(grad_t, input_t, offsets, out_dtype) if out is None else out
        tensors = [aligned(t) for t in (grad_t.data, grad_t.scale, input_t.data, input_t.scale, offsets)]
        host = functools.partial(module.grouped_wgrad, *tensors, self.error, out, accumulate)
        self._run_triton(module, "grouped_wgrad_kernel", host)
        return out

    def gemm(
        self,
        a: ScaledTensor,
        b: ScaledTensor,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        c: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Tensor:
        """As csrc/bindings/gemm_op.cpp."""
        if num_sms is not None:
            return Emulator(min(num_sms, self._num_sms), config=self._config).gemm(a, b, out_dtype=out_dtype, c=c)
        out = torch.full((a.shape[0], b.shape[0]), float("nan"), dtype=out_dtype)
        if out.numel() and not a.shape[1]:
            self._problem(a, b, out_dtype, c)
            return out.zero_() if c is None else out.copy_(c)
        self.gemm_into(out, a, b, c)
        return out

    def _problem(self, a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype, c: Tensor | None) -> _C.GemmProblem:
        views = [_view(t) for t in (a.data, a.scale, b.data, b.scale)]
        dtype = str(out_dtype).removeprefix("torch.")
        return _C.GemmProblem(*views, b.block, dtype, None if c is None else _view(c), self._num_sms)

    def gemm_into(self, out: Tensor, a: ScaledTensor, b: ScaledTensor, c: Tensor | None = None) -> Any:
        """Writes a contiguous ``out``. Returns the launch's counters, or None where there is nothing to launch."""
        a, b = (ScaledTensor._trusted(aligned(t.data), aligned(t.scale), t.block) for t in (a, b))
        c = None if c is None else aligned(c)
        problem = self._problem(a, b, out.dtype, c)
        if not out.numel():
            return None
        config = _C.gemm_select(problem)
        if self._config is not None:
            config = next(c for c, _ in _C.gemm_candidates(problem) if c.name == self._config)
        tensors = {"a": a.data, "a_scale": a.scale, "b": b.data, "b_scale": b.scale, "out": out, "c": c}
        self.counters = self._run_plan(_C.gemm_plan(problem, config), tensors, self._machine)
        return self.counters


def _no_emulator() -> str | None:
    if not built_kernels():
        return f"no kernels were built: {KERNELS} has no build.json"
    if shutil.which("g++") is None:
        return "the emulator is compiled with g++, which is not installed"
    return None if importlib.util.find_spec("pybind11") else "the emulator's bindings need pybind11"


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no NVIDIA GPU"


class _Entry(NamedTuple):
    factory: Callable[[], Backend]
    why_not: Callable[[], str | None]
    marks: tuple[Any, ...] = ()


BACKENDS: dict[str, _Entry] = {
    "reference": _Entry(Reference, lambda: None),
    "triton_interpreter": _Entry(
        TritonInterpreter, lambda: None if importlib.util.find_spec("triton") else "triton is not installed"
    ),
    "emulator": _Entry(Emulator, _no_emulator),
    "cuda": _Entry(Cuda, _no_gpu, (pytest.mark.cuda,)),
    "cuda_triton": _Entry(CudaTriton, _no_gpu, (pytest.mark.cuda,)),
}
# Those that have every op and are quick. A test that the emulator can run too says so.
COMPLETE = tuple(name for name in BACKENDS if name != "emulator")


@functools.cache
def backend(name: str) -> Backend:
    return BACKENDS[name].factory()


def available_backends() -> list[str]:
    return [name for name, entry in BACKENDS.items() if entry.why_not() is None]


def backend_params(names: Iterable[str] = COMPLETE) -> list[Any]:
    """One pytest parameter a backend, which skips with the reason where the backend cannot run."""
    params = []
    for name in names:
        reason = BACKENDS[name].why_not()
        marks = [*BACKENDS[name].marks, pytest.mark.skipif(reason is not None, reason=f"backend {name}: {reason}")]
        params.append(pytest.param(name, marks=marks))
    return params


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def assert_same_bits(got: Tensor, expected: Tensor, what: str) -> None:
    """Equal dtype, shape and bits, but any NaN of a floating type wider than FP8 equals any other."""
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} instead of {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    bits = _BITS[got.dtype.itemsize]
    differ = got.contiguous().view(bits) != expected.contiguous().view(bits)
    if got.dtype.itemsize > 1:
        differ &= ~(got.isnan() & expected.isnan())
    if differ.any():
        at = tuple(int(i) for i in differ.nonzero()[0])
        values = f"{got.float()[at].item()!r} instead of {expected.float()[at].item()!r}"
        raise AssertionError(f"{what}: {int(differ.sum())} of {differ.numel()} differ, first at {at}: {values}")


def from_numpy(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A torch tensor of the same bits, for the dtypes of ml_dtypes that ``torch.from_numpy`` does not know."""
    return torch.from_numpy(np.ascontiguousarray(array).view(f"int{8 * array.itemsize}")).view(dtype)
