"""Triton's matmul with tensor descriptors, compiled for sm_90a: made on the host, and on the device from zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from emulator import Machine, TensorMap

pytest.importorskip("triton")
import triton
import triton.language as tl
from recorder import NO_PROXY_FENCE
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if NO_PROXY_FENCE:
    pytest.skip(NO_PROXY_FENCE, allow_module_level=True)

M, N, K = 128, 256, 384
TILE = (64, 128, 128)
SIZES = {(6,): TILE[0], (7,): TILE[1], (8,): TILE[2]}


@triton.jit
def product(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([row, k]), b.load([column, k]).T, acc)
    c.store([row, column], acc.to(tl.bfloat16))


@triton.jit
def from_host(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    product(a, b, c, K, BM, BN, BK)


@triton.jit
def on_device(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    a_tiles = tl.make_tensor_descriptor(a, shape=[M, K], strides=[K, 1], block_shape=[BM, BK])
    b_tiles = tl.make_tensor_descriptor(b, shape=[N, K], strides=[K, 1], block_shape=[BN, BK])
    c_tiles = tl.make_tensor_descriptor(c, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    product(a_tiles, b_tiles, c_tiles, K, BM, BN, BK)


def compiled(kernel: Any, types: tuple[str, str, str]) -> Any:
    names = kernel.arg_names
    signature = dict(zip(names, (*types, "i32", "i32", "i32", "constexpr", "constexpr", "constexpr"), strict=True))
    pointers = types[0].startswith("*")
    divisible = {(i,): [["tt.divisibility", 16]] for i in range(0 if pointers else 3, 6)}
    source = ASTSource(kernel, signature, SIZES, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(M, K, generator=generator).to(torch.float8_e4m3fn)
    b = torch.randn(N, K, generator=generator).to(torch.float8_e4m3fn)
    return a, b, torch.zeros(M, N, dtype=torch.bfloat16), a.double() @ b.double().T


def check(kernel: Any, arguments: list[Any], out: torch.Tensor, expected: torch.Tensor) -> None:
    for seed in range(3):
        loaded = next(iter(Machine(seed).load(kernel.asm["ptx"]).values()))
        # What remains are Triton's scratch buffers.
        rest = len(loaded._parameters) - len(arguments)
        scratch = np.zeros(4096 + 128, np.uint8)
        start = -scratch.ctypes.data % 128
        loaded.launch(
            grid=(M // TILE[0], N // TILE[1], 1),
            block=128,
            shared_bytes=kernel.metadata.shared,
            args=[*arguments, *[scratch[start : start + 4096]][:rest], *[None] * (rest - 1)],
        )
        torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=0.02)
        out.zero_()


def test_descriptors_of_the_host() -> None:
    a, b, c, expected = operands()
    kernel = compiled(
        from_host, ("tensordesc<fp8e4nv[64,128]>", "tensordesc<fp8e4nv[128,128]>", "tensordesc<bf16[64,128]>")
    )
    arguments: list[Any] = []
    for x, meta in zip((a, b, c), kernel.metadata.tensordesc_meta, strict=True):
        arguments += [TensorMap(x, meta["block_size"], swizzle=[0, 32, 64, 128][meta["swizzle"]])]
        arguments += [*x.shape, *x.stride()]
    check(kernel, [*arguments, M, N, K], c, expected)


def test_descriptors_of_the_device() -> None:
    a, b, c, expected = operands()
    check(compiled(on_device, ("*fp8e4nv", "*fp8e4nv", "*bf16")), [a, b, c, M, N, K], c, expected)
