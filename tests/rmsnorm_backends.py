"""The ops with RMSNorm on the backends of tests/backends.py, called as torch.ops has them; CPU tensors in and out.

What a Triton kernel must not write is NaN when it starts: see ``groups.poisoned_empty``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from placement import aligned, on_gpu
from routing_backends import emulated, interpreted
from torch import Tensor

NAMES = ("reference", "triton_interpreter", "emulator", "cuda")
EPS = 1e-6


def run(name: str, op: str, *args: Any, seed: int = 0) -> tuple[Tensor, ...]:
    """The results of ``op`` on a backend, with the strides that it gave them. All arguments, by position."""
    overload = getattr(torch.ops.fastfp8, op)
    if name == "reference":
        return overload(*args)
    if name == "cuda":
        found = overload(*(on_gpu(arg) if isinstance(arg, Tensor) else arg for arg in args))
        return tuple(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in found)
    from fastfp8.triton_kernels import rmsnorm

    host = functools.partial(getattr(rmsnorm, op), *(aligned(a) if isinstance(a, Tensor) else a for a in args))
    with interpreted() if name == "triton_interpreter" else emulated(seed, (rmsnorm,)):
        return host()


def forward(
    name: str,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = EPS,
    pow2: bool = False,
    amax_floor: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    return run(name, "rmsnorm_quantize", x, weight, eps, residual, pow2, amax_floor, seed=seed)


def again(
    name: str, x: Tensor, weight: Tensor, rstd: Tensor, *, pow2: bool = False, amax_floor: float = 0.0, seed: int = 0
) -> tuple[Tensor, ...]:
    return run(name, "rmsnorm_quantize_transpose", x, weight, rstd, pow2, amax_floor, seed=seed)


def backward(
    name: str,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    residual_grad: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    return run(name, "rmsnorm_backward", grad, x, weight, rstd, residual_grad, seed=seed)
