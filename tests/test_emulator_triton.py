"""The Triton kernels as compiled for sm_90: their PTX on the emulator, bit for bit against the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from backends import Emulator, assert_same_bits, backend, backend_params

from fastfp8.layout import BLOCK, BLOCKS, Block
from fastfp8.reference import tensor_core

if backend_params(["triton_interpreter"])[0].marks[-1].args[0]:
    pytest.skip("triton is not installed", allow_module_level=True)
pytestmark = backend_params(["emulator"])[0].marks

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 1), (37, 300), (130, 129)]


def values(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size, with zeros, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, cols, generator=generator) * 4.0 ** torch.randint(-7, 6, (rows, 1), generator=generator)
    if rows > 20:
        x[3, 5], x[4, 6], x[5, 7] = torch.inf, torch.nan, -torch.inf
        x[10] = 0
        x[11] = torch.nan
    return x.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pow2", [False, True], ids=["fp32", "pow2"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize(dtype: torch.dtype, block: Block, pow2: bool, shape: tuple[int, int]) -> None:
    x = values(*shape, dtype)
    got, expected = (backend(name).quantize(x, block, pow2=pow2) for name in ("emulator", "reference"))
    assert_same_bits(got.data, expected.data, "data")
    assert_same_bits(got.scale, expected.scale, "scale")
    assert got.scale.stride() == expected.scale.stride()


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_quantize_any_strides(layout: str) -> None:
    x = values(300, 74, torch.bfloat16)
    x = x.t() if layout == "transposed" else x[::3, ::2]
    got, expected = (backend(name).quantize(x, eps=1e-4) for name in ("emulator", "reference"))
    assert_same_bits(got.data, expected.data, "data")
    assert_same_bits(got.scale, expected.scale, "scale")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(dtype: torch.dtype, block: Block, shape: tuple[int, int]) -> None:
    t = backend("reference").quantize(values(*shape, torch.float32), block)
    got, expected = (backend(name).dequantize(t, dtype) for name in ("emulator", "reference"))
    assert_same_bits(got, expected, "values")


@pytest.mark.parametrize("shape", [(5, 40, 144), (64, 72, 272), (130, 136, 400)], ids=str)
@pytest.mark.parametrize("b_block", [(BLOCK, BLOCK), (1, BLOCK)], ids=str)
def test_gemm(b_block: Block, shape: tuple[int, int, int]) -> None:
    """wgmma fed by cp.async, in both of the kernel's tiles: the bits of the tensor core's model, as in CUDA C++."""
    from recorder import NO_PROXY_FENCE

    from fastfp8.triton_kernels import gemm as module

    if NO_PROXY_FENCE:
        pytest.skip(NO_PROXY_FENCE)
    m, n, k = shape
    generator = torch.Generator().manual_seed(m)
    a = backend("reference").quantize(torch.randn(m, k, generator=generator))
    b = backend("reference").quantize(torch.randn(n, k, generator=generator), b_block)
    blocked = b_block[0] == BLOCK
    dtype, c = (torch.bfloat16, None) if blocked else (torch.float32, torch.randn(m, n, generator=generator))
    given = (a.data, a.scale, b.data, b.scale, b_block, dtype, c)
    expected = tensor_core.gemm(*given)
    for seed in range(2):
        got = Emulator(seed=seed)._run_triton(module, "gemm_kernel", functools.partial(module.gemm, *given))
        assert_same_bits(got, expected, "product")
