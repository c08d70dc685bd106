"""Other libraries' ways to the same product, on the same operands. Each is tried once; one that cannot says why."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfp8 import ScaledTensor
from fastfp8.layout import BLOCK, pad4

from .case import Contestant, Unavailable
from .device import require

# A way to one product: it gets the operands and the type of the output, lays the scales out as it wants them, and
# returns the call that is timed.
Maker = Callable[[ScaledTensor, ScaledTensor, torch.dtype], Callable[[], Tensor]]


def cublaslt(a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype) -> Callable[[], Tensor]:
    """torch's ``scaled_mm`` with the same blocks: cuBLASLt 12.9 or newer, sm_90 only.

    It wants the scale of 1x128 blocks with stride (1, M), without padding, and that of 128x128 blocks transposed, its
    K blocks padded to a multiple of four.
    """
    require(hasattr(F, "scaled_mm"), "torch.nn.functional.scaled_mm came with torch 2.10")
    rows, kind = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise1x128

    def dense(scale: Tensor) -> Tensor:
        return scale.t().contiguous().t()

    a_scale = dense(a.scale)
    if b.block == (BLOCK, BLOCK):
        kind = F.ScalingType.BlockWise128x128
        blocks = b.scale.shape[1]
        b_scale = F.pad(b.scale, (0, pad4(blocks) - blocks)).t()
    else:
        b_scale = dense(b.scale)
    weight = b.data.t()
    return lambda: F.scaled_mm(a.data, weight, a_scale, rows, b_scale, kind, output_dtype=out_dtype)


def deep_gemm_library() -> Any:
    require(importlib.util.find_spec("deep_gemm"), "deep_gemm is not installed (pip install sgl-deep-gemm)")
    import deep_gemm as library

    return library


def deep_gemm(a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype) -> Callable[[], Tensor]:
    """DeepGEMM, which compiles when first called. On sm_90 its 1x128 by 1x128 accumulates in FP32 and does no other."""
    library = deep_gemm_library()
    shape, blocked = (a.shape[0], b.shape[0]), b.block == (BLOCK, BLOCK)
    require(blocked == (out_dtype == torch.bfloat16), "DeepGEMM has 128x128 with BF16 and 1x128 with FP32 output only")
    left, right = (a.data, a.scale), (b.data, b.scale)
    if blocked:

        def run() -> Tensor:
            out = torch.empty(shape, dtype=out_dtype, device=a.data.device)
            library.fp8_gemm_nt(left, right, out)
            return out

        return run
    zero = torch.zeros(shape, dtype=out_dtype, device=a.data.device)

    def accumulate() -> Tensor:
        out = torch.empty_like(zero)
        library.fp8_gemm_nt(left, right, out, c=zero, recipe=(1, 1, BLOCK))
        return out

    return accumulate


def triton(a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype) -> Callable[[], Tensor]:
    """Our own Triton kernel, which serves where sm_90a's cannot."""
    operands = (a.data, a.scale, b.data, b.scale, b.block, out_dtype, None)
    return lambda: torch.ops.fastfp8._gemm_triton(*operands)


def bf16(a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype) -> Callable[[], Tensor]:
    """What the FP8 product replaces: cuBLAS on BF16 operands, twice the bytes and half the rate."""
    import fastfp8

    left, right = fastfp8.dequantize(a), fastfp8.dequantize(b).t()
    require(out_dtype == torch.bfloat16, "torch.mm of BF16 operands has BF16 output")
    return lambda: left @ right


GEMM_PEERS: dict[str, Maker] = {
    "cuBLASLt scaled_mm": cublaslt,
    "DeepGEMM": deep_gemm,
    "fastfp8 Triton": triton,
    "BF16 cuBLAS": bf16,
}


def contestants(
    makers: dict[str, Maker],
    operands: Sequence[tuple[ScaledTensor, ScaledTensor]],
    out_dtype: torch.dtype,
    check: Callable[[Any], None],
) -> tuple[list[Contestant], dict[str, str]]:
    """A contestant for each maker that can do it, on every copy of the operands, and why the others cannot."""
    found, missing = contestants_of(
        {name: [functools.partial(maker, a, b, out_dtype) for a, b in operands] for name, maker in makers.items()}
    )
    return [dataclasses.replace(contestant, check=check) for contestant in found], missing


def contestants_of(
    makers: dict[str, Sequence[Callable[[], Callable[[], Any]]]],
) -> tuple[list[Contestant], dict[str, str]]:
    """The same of makers that know their operands, one for each copy; no output is checked."""
    found, missing = [], {}
    for name, copies in makers.items():
        try:
            calls = [make() for make in copies]
            calls[0]()
            torch.cuda.synchronize()
        except Unavailable as reason:
            missing[name] = str(reason)
        # A library may refuse a shape in any way it likes: an error of its own, an assertion, a failed compile.
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            found.append(Contestant(name, lambda i, calls=calls: calls[i]()))  # type: ignore[misc]
    return found, missing
