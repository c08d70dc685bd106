"""The ops with SwiGLU on each backend of tests/backends.py: what its classes inherit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from placement import aligned, on_gpu, scaled_on_gpu
from torch import Tensor

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.error_word import error_word
from fastfp8.layout import BLOCK, Block, has_scale_layout

ROW: Block = (1, BLOCK)


class SwiGlu(NamedTuple):
    """The options of the ops with SwiGLU, as the kernels' host functions take them."""

    weight: Tensor | None = None
    limit: float | None = None
    pow2: bool = False
    eps: float = 0.0

    def on_gpu(self) -> SwiGlu:
        return self if self.weight is None else self._replace(weight=on_gpu(self.weight))


def arguments(gate_up: Tensor | ScaledTensor, *options: Any, **named: Any) -> tuple[Any, ...]:
    """Those of the host function of swiglu_quantize, which takes the scale of an FP8 ``gate_up`` last."""
    data, scale = (gate_up.data, gate_up.scale) if isinstance(gate_up, ScaledTensor) else (gate_up, None)
    return (data, *SwiGlu(*options, **named), scale)


class InterpretedSwiGlu:
    _interpreted: Callable[[], AbstractContextManager[None]]
    error: Tensor

    def swiglu_quantize(
        self,
        gate_up: Tensor | ScaledTensor,
        weight: Tensor | None = None,
        limit: float | None = None,
        **options: Any,
    ) -> ScaledTensor:
        from fastfp8.triton_kernels import swiglu_quantize as module

        with self._interpreted():
            return ScaledTensor._trusted(*module.swiglu_quantize(*arguments(gate_up, weight, limit, **options)), ROW)

    def gemm_swiglu_quantize(
        self, a: ScaledTensor, b: ScaledTensor, offsets: Tensor | None = None, **options: Any
    ) -> tuple[ScaledTensor, Tensor]:
        from fastfp8.triton_kernels import gemm_swiglu_quantize as module

        operands = (a.data, a.scale, b.data, b.scale, offsets, self.error)
        with self._interpreted():
            data, scale, gate_up = module.gemm_swiglu_quantize(*operands, *SwiGlu(**options), True)
        return ScaledTensor._trusted(data, scale, ROW), gate_up


class CudaSwiGlu:
    def swiglu_quantize(
        self,
        gate_up: Tensor | ScaledTensor,
        weight: Tensor | None = None,
        limit: float | None = None,
        **options: Any,
    ) -> ScaledTensor:
        weight = None if weight is None else on_gpu(weight)
        on_device = scaled_on_gpu(gate_up) if isinstance(gate_up, ScaledTensor) else on_gpu(gate_up)
        t = fastfp8.swiglu_quantize(on_device, weight, limit, **options)
        assert has_scale_layout(t.scale, ROW)  # here, because the copy to the CPU would mend it
        return t.to("cpu")

    def gemm_swiglu_quantize(
        self, a: ScaledTensor, b: ScaledTensor, offsets: Tensor | None = None, **options: Any
    ) -> tuple[ScaledTensor, Tensor]:
        operands = (scaled_on_gpu(a), scaled_on_gpu(b), None if offsets is None else on_gpu(offsets))
        given = SwiGlu(**options).on_gpu()._asdict()
        t, gate_up = fastfp8.gemm_swiglu_quantize(*operands, **given, return_gate_up=True)
        assert has_scale_layout(t.scale, ROW)
        return t.to("cpu"), gate_up.cpu()


class CudaTritonSwiGlu:
    def gemm_swiglu_quantize(
        self, a: ScaledTensor, b: ScaledTensor, offsets: Tensor | None = None, **options: Any
    ) -> tuple[ScaledTensor, Tensor]:
        left, right = scaled_on_gpu(a), scaled_on_gpu(b)
        operands = (left.data, left.scale, right.data, right.scale)
        groups = (None, None) if offsets is None else (on_gpu(offsets), error_word(left.device))
        op = torch.ops.fastfp8._gemm_swiglu_quantize_triton
        data, scale, gate_up = op(*operands, *groups, *SwiGlu(**options).on_gpu(), True)
        return ScaledTensor._trusted(data, scale, ROW).to("cpu"), gate_up.cpu()


class EmulatedSwiGlu:
    """The Triton kernels; tests/test_emulator_swiglu.py has the CUDA one."""

    _run_triton: Callable[[ModuleType, str, Callable[[], Any]], Any]
    error: Tensor

    def swiglu_quantize(
        self,
        gate_up: Tensor | ScaledTensor,
        weight: Tensor | None = None,
        limit: float | None = None,
        **options: Any,
    ) -> ScaledTensor:
        from fastfp8.triton_kernels import swiglu_quantize as module

        host = functools.partial(module.swiglu_quantize, *arguments(gate_up, weight, limit, **options))
        return ScaledTensor._trusted(*self._run_triton(module, "swiglu_quantize_kernel", host), ROW)

    def gemm_swiglu_quantize(
        self, a: ScaledTensor, b: ScaledTensor, offsets: Tensor | None = None, **options: Any
    ) -> tuple[ScaledTensor, Tensor]:
        from recorder import NO_PROXY_FENCE

        from fastfp8.triton_kernels import gemm_swiglu_quantize as module

        if NO_PROXY_FENCE:
            pytest.skip(NO_PROXY_FENCE)
        operands = [aligned(t) for t in (a.data, a.scale, b.data, b.scale)]
        host = functools.partial(module.gemm_swiglu_quantize, *operands, offsets, self.error, *SwiGlu(**options), True)
        data, scale, gate_up = self._run_triton(module, "gemm_swiglu_quantize_kernel", host)
        return ScaledTensor._trusted(data, scale, ROW), gate_up
