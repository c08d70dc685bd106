"""dequantize on every backend, bit by bit, against NumPy."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from backends import assert_same_bits, backend, backend_params, from_numpy

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.layout import empty_scale, scale_shape, scale_shape_of

BLOCKS = [(1, 128), (128, 1), (128, 128)]
SHAPES = [(1, 1), (1, 128), (3, 129), (127, 130), (129, 257), (0, 128), (5, 0)]
DTYPES = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}


def make(shape: tuple[int, int], block: tuple[int, int], seed: int = 0) -> ScaledTensor:
    """Every code, NaNs among them, with scales from FP32's subnormals to where the product overflows."""
    rng = np.random.default_rng(seed)
    data = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).view(torch.float8_e4m3fn)
    shape = scale_shape(*shape, block)
    scale = (1 + rng.random(shape)) * 2.0 ** np.where(rng.random(shape) < 0.5, 0, rng.integers(-135, 127, shape))
    return ScaledTensor(data, torch.from_numpy(scale.astype(np.float32)), block)


def oracle(t: ScaledTensor, dtype: torch.dtype, add: torch.Tensor | None = None) -> torch.Tensor:
    """The exact float64 product rounded to FP32, its sum with ``add`` rounded to FP32, all that then to ``dtype``."""
    values = t.data.contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scale = t.scale.numpy().repeat(t.block[0], 0).repeat(t.block[1], 1)[: values.shape[0], : values.shape[1]]
    with np.errstate(over="ignore", invalid="ignore"):
        product = (values * scale).astype(np.float32)
        if add is not None:
            # A double holds 2 * 24 + 2 bits, so that rounding its sum of two FP32 is rounding the exact sum.
            product = (product.astype(np.float64) + add.double().numpy()).astype(np.float32)
        return from_numpy(product.astype(DTYPES[dtype]), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", backend_params())
def test_shapes(name: str, block: tuple[int, int], dtype: torch.dtype, shape: tuple[int, int]) -> None:
    t = make(shape, block)
    out = backend(name).dequantize(t, dtype)
    assert_same_bits(out, oracle(t, dtype), "out")
    assert out.is_contiguous()


@pytest.mark.parametrize("name", backend_params())
def test_every_code(name: str) -> None:
    data = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(2, 128)
    for scale in (1.0, 0.125):
        t = ScaledTensor(data, torch.full((2, 1), scale), (1, 128))
        for dtype in DTYPES:
            assert_same_bits(
                backend(name).dequantize(t, dtype), torch.from_numpy(expected * scale).to(dtype), f"{dtype}"
            )


@pytest.mark.parametrize("name", backend_params())
def test_strides(name: str) -> None:
    b = backend(name)
    for block in BLOCKS:
        t = make((260, 270), block)
        assert_same_bits(b.dequantize(t.t(), torch.float32), oracle(t, torch.float32).t(), "a transpose")
        data = t.data[:130, 3:140]
        part = ScaledTensor(data, t.scale[: -(-130 // block[0]), : -(-137 // block[1])], block)
        assert_same_bits(b.dequantize(part, torch.float32), oracle(part, torch.float32), "rows apart")
        # has_scale_layout lets any stride pass where an extent is 1
        one = ScaledTensor._trusted(t.data[:1, :1], t.scale.flatten()[::3][:1, None], block)
        assert_same_bits(b.dequantize(one, torch.float32), oracle(one, torch.float32), "one element")


@pytest.mark.parametrize("name", backend_params())
def test_stacks(name: str) -> None:
    """Each matrix as it would be alone, of stacks that are one launch and of others."""
    for block, shape in itertools.product(
        [(1, 128), (128, 128)], [(3, 5, 300), (2, 128, 130), (2, 150, 136), (2, 0, 8)]
    ):
        flat = make((shape[0] * 256, shape[2]), block)
        data = flat.data[: shape[0] * shape[1]].view(shape)
        matrices, scale_rows, _ = scale_shape_of(shape, block)
        t = ScaledTensor(data, flat.scale[: matrices * scale_rows].unflatten(0, (matrices, scale_rows)), block)
        wide = t.data.new_zeros(shape[0], shape[1] + 2, shape[2])
        apart = ScaledTensor(wide[:, : shape[1]].copy_(t.data), t.scale, block)
        for out in (backend(name).dequantize(t, torch.float32), backend(name).dequantize(apart, torch.float32)):
            assert out.is_contiguous()
            for index, matrix in enumerate(t):
                assert_same_bits(out[index], oracle(matrix, torch.float32), f"{block}, {shape}, matrix {index}")


@pytest.mark.parametrize("name", backend_params())
def test_what_surrounds_the_tensors_does_not_matter(name: str) -> None:
    for block in BLOCKS:
        t = make((130, 134), block)
        wide = torch.full((140, 150), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
        wide[:130, :134] = t.data
        scale = empty_scale(t.scale, tuple(t.scale.shape), block)
        padding = scale.as_strided((scale.untyped_storage().nbytes() // 4,), (1,))
        padding.fill_(float("nan"))
        scale.copy_(t.scale)
        poisoned = ScaledTensor(wide[:130, :134], scale, block)
        assert poisoned.scale is scale
        assert_same_bits(backend(name).dequantize(poisoned, torch.float32), oracle(t, torch.float32), f"{block}")


@pytest.mark.parametrize("name", backend_params())
def test_quantize_inverts_it_for_representable_values(name: str) -> None:
    """With 448 in each block, codes times a power of two come back as they were."""
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 0x7F, (130, 256), dtype=np.uint8))
    data[:, ::128] = 0x7E
    t = ScaledTensor(data.view(torch.float8_e4m3fn), 2.0 ** torch.randint(-20, 20, (130, 2)), (1, 128))
    again = backend(name).quantize(backend(name).dequantize(t), (1, 128))
    assert_same_bits(again.data, t.data, "data")
    assert_same_bits(again.scale, t.scale, "scale")


def residual(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Of magnitudes near those of ``make`` and far from them, infinities and NaNs among them."""
    rng = np.random.default_rng(sum(shape))
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 14, shape)
    values[rng.random(shape) < 0.01] = rng.choice([np.inf, -np.inf, np.nan])
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", backend_params(["reference", "triton_interpreter", "emulator", "cuda"]))
def test_add(name: str, block: tuple[int, int]) -> None:
    """Two roundings to FP32 and one to the result's dtype, whatever the residual's is."""
    b = backend(name)
    pairs = list(zip(DTYPES, [*DTYPES][1:] + [*DTYPES][:1], strict=True))
    few = name == "emulator"  # for which each kernel has to be compiled
    for shape in ((3, 129),) if few else ((1, 1), (3, 129), (129, 257), (0, 128), (5, 0)):
        t = make(shape, block)
        for dtype, other in pairs[:1] if few else pairs:
            add = residual(shape, other)
            assert_same_bits(b.dequantize(t, dtype, add=add), oracle(t, dtype, add), f"{shape}, {dtype}")


@pytest.mark.parametrize("name", backend_params())
def test_add_of_any_strides(name: str) -> None:
    b, big = backend(name), residual((400, 600), torch.bfloat16)
    for block in BLOCKS:
        t = make((130, 270), block)
        for add in (big[:270, :130].t(), big[::3, ::2][:130, :270], big[:1, :270].expand(130, 270)):
            assert_same_bits(b.dequantize(t, add=add), oracle(t, torch.bfloat16, add), f"{block}, {add.stride()}")
        assert_same_bits(b.dequantize(t.t(), add=add.t()), oracle(t, torch.bfloat16, add).t(), "a transpose")


@pytest.mark.parametrize("name", backend_params())
def test_add_to_stacks(name: str) -> None:
    """One launch where the residual's matrices too lie one below the other, one a matrix elsewhere."""
    for block, shape in (((1, 128), (3, 5, 300)), ((128, 128), (2, 128, 130)), ((128, 128), (2, 150, 136))):
        matrices = [make(shape[1:], block, seed) for seed in range(shape[0])]
        t = ScaledTensor(torch.stack([m.data for m in matrices]), torch.stack([m.scale for m in matrices]), block)
        flat = residual(shape, torch.float32)
        for add in (flat, flat[:1].expand(shape), flat.transpose(0, 1).contiguous().transpose(0, 1)):
            out = backend(name).dequantize(t, torch.float32, add=add)
            for got, matrix, added in zip(out, matrices, add, strict=True):
                assert_same_bits(got, oracle(matrix, torch.float32, added), f"{block}, {shape}, {add.stride()}")


def test_chunks_of_the_reference_agree_with_the_oracle() -> None:
    for block in BLOCKS:
        t = make((1300, 1024), block)
        assert_same_bits(fastfp8.dequantize(t), oracle(t, torch.bfloat16), f"{block}")
        add = residual((1300, 1024), torch.bfloat16)
        assert_same_bits(fastfp8.dequantize(t, add=add), oracle(t, torch.bfloat16, add), f"{block} with a residual")
