"""Triton kernels compiled without a GPU, from the very arguments that the host functions launch them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction, mangle_type

# Triton 3.6 lets wgmma read what cp.async wrote with no fence.proxy.async in between, which the emulator reports.
NO_PROXY_FENCE = (
    "Triton 3.6 leaves out the proxy fence between cp.async and wgmma; 3.9 has it, 3.7 and 3.8 were not tried"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    else None
)


class Recorder:
    """Takes a kernel's place in its module and keeps the last launch: its grid and what it was called with."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def keep(*args: Any, **kwargs: Any) -> None:
            self.grid, self.args, self.kwargs = grid, args, kwargs
            self.launches += 1

        return keep

    def compile(self, capability: int) -> CompiledKernel:
        """As Triton's launcher would: 1 and None become constants, a multiple of 16 becomes known as one."""
        names = self.kernel.arg_names
        values = dict(zip(names, self.args, strict=False)) | {n: v for n, v in self.kwargs.items() if n in names}
        assert values.keys() == set(names)
        options = {n: v for n, v in self.kwargs.items() if n not in names}
        signature, constants, attributes = {}, {}, {}
        self.runtime_args: list[Any] = []
        for i, (name, param) in enumerate(zip(names, self.kernel.params, strict=True)):
            value = values[name]
            specialize = not param.do_not_specialize
            if param.is_constexpr or value is None or (specialize and isinstance(value, int) and value == 1):
                signature[name], constants[(i,)] = "constexpr", value
                continue
            signature[name] = mangle_type(value)
            self.runtime_args.append(value)
            if isinstance(value, torch.Tensor) or (specialize and isinstance(value, int) and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
