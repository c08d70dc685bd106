"""The Triton kernels as compiled for sm_90: their PTX on the emulator, bit for bit against the reference."""

from __future__ import annotations

import pytest
import torch
from backends import assert_same_bits, backend, backend_params

from fastfp8.layout import BLOCKS, Block

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
