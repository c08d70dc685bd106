"""The ops of routing and permutation on the backends of tests/backends.py, by the names of its ``backend_params``.

Each takes and returns CPU tensors. Kernels are told from each other by their inputs alone, so what a kernel must not
write is NaN (or -1) when it starts: see ``groups.poisoned_empty``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from groups import poisoned_empty
from placement import on_gpu, scaled_on_gpu
from torch import Tensor

import fastfp8
from fastfp8 import Routing, RowMap, ScaledTensor
from fastfp8.layout import has_scale_layout
from fastfp8.ops.permute import ROW_BLOCK, unpermute_backward
from fastfp8.ops.route import route_backward

NAMES = ("reference", "triton_interpreter", "emulator", "cuda")


class Reference:
    """The ops on CPU tensors."""

    route = staticmethod(fastfp8.route)
    route_backward = staticmethod(route_backward)
    row_map = staticmethod(fastfp8.row_map)
    unpermute_backward = staticmethod(unpermute_backward)
    unpermute = staticmethod(fastfp8.unpermute)

    def permute(self, x: Tensor | ScaledTensor, where: RowMap) -> Tensor | ScaledTensor:
        return fastfp8.permute(x, where)[0]

    def permute_quantize(self, x: Tensor, where: RowMap, **options: Any) -> ScaledTensor:
        return fastfp8.permute_quantize(x, where, **options)[0]


class Kernels:
    """The Triton kernels and their host functions within ``running``; ``error`` is the error word that row_map gets."""

    def __init__(self, running: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        from fastfp8.triton_kernels import permute, route

        self._route, self._permute, self._running = route, permute, running
        self.error = torch.zeros(1, dtype=torch.int32)

    def route(
        self,
        logits: Tensor,
        bias: Tensor,
        *,
        top_k: int,
        groups: int = 1,
        top_groups: int = 1,
        score: str = "sigmoid",
        scale: float = 1.0,
    ) -> Routing:
        with self._running():
            return Routing(*self._route.route(logits, bias, top_k, groups, top_groups, score, scale))

    def route_backward(
        self,
        grad_weights: Tensor | None,
        grad_scores: Tensor | None,
        topk_idx: Tensor,
        scores: Tensor,
        *,
        score: str = "sigmoid",
        scale: float = 1.0,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        with self._running():
            return self._route.route_backward(grad_weights, grad_scores, topk_idx, scores, score, scale, out_dtype)

    def row_map(self, topk_idx: Tensor, num_experts: int) -> RowMap:
        with self._running():
            return RowMap(*self._permute.row_map(topk_idx, num_experts, self.error))

    def permute(self, x: Tensor | ScaledTensor, where: RowMap) -> Tensor | ScaledTensor:
        with self._running():
            if isinstance(x, ScaledTensor):
                return ScaledTensor._trusted(*self._permute.permute_scaled(x.data, x.scale, where.rows), ROW_BLOCK)
            return self._permute.permute(x, where.rows)

    def permute_quantize(self, x: Tensor, where: RowMap, *, pow2: bool = False, eps: float = 0.0) -> ScaledTensor:
        with self._running():
            return ScaledTensor._trusted(*self._permute.permute_quantize(x, where.rows, pow2, eps), ROW_BLOCK)

    def unpermute(
        self,
        y: Tensor | ScaledTensor,
        where: RowMap,
        weights: Tensor | None = None,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        data, scale = (y.data, y.scale) if isinstance(y, ScaledTensor) else (y, None)
        with self._running():
            return self._permute.unpermute(data, scale, where.rows, weights, out_dtype)

    def unpermute_backward(self, grad: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        with self._running():
            return self._permute.unpermute_backward(grad, y, rows, weights)


class _Launcher:
    """Takes a kernel's place in its module: each launch runs at once, on the emulator."""

    def __init__(self, kernel: Any, run: Callable[..., Any]) -> None:
        self._kernel, self._run = kernel, run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._run(self._kernel, grid, *args, **kwargs)

        return launch


@contextlib.contextmanager
def emulated(seed: int = 0, modules: tuple[ModuleType, ...] = ()) -> Iterator[None]:
    """While it lasts, launches of the Triton kernels of ``modules`` run from their PTX for sm_90 on the emulator.

    Without ``modules``, of those of routing and permutation.
    """
    from triton_launch import Emulated

    from fastfp8.triton_kernels import permute, route

    run = Emulated(seed)
    with contextlib.ExitStack() as stack:
        for module in modules or (route, permute):
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, _Launcher(value, run)))
        stack.enter_context(poisoned_empty())
        yield


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    from interpreter import interpreted as in_interpreter

    with in_interpreter(), poisoned_empty():
        yield


def _gpu(value: Any) -> Any:
    if isinstance(value, ScaledTensor):
        return scaled_on_gpu(value)
    if isinstance(value, RowMap):
        return RowMap(*map(on_gpu, value))
    return on_gpu(value) if isinstance(value, Tensor) else value


def _cpu(value: Any) -> Any:
    if isinstance(value, ScaledTensor):
        assert has_scale_layout(value.scale, value.block)  # here, because the copy to the CPU would mend it
        return value.to("cpu")
    if isinstance(value, (Routing, RowMap)):
        return type(value)(*(t.cpu() for t in value))
    return tuple(map(_cpu, value)) if isinstance(value, tuple) else value.cpu()


class Cuda:
    """The ops on a GPU."""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            return _cpu(getattr(Reference(), op)(*map(_gpu, args), **options))

        return call


@functools.cache
def routing(name: str) -> Any:
    factories = {
        "reference": Reference,
        "triton_interpreter": lambda: Kernels(interpreted),
        "emulator": lambda: Kernels(emulated),
        "cuda": Cuda,
    }
    return factories[name]()
