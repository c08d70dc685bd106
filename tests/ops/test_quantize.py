"""quantize on every backend, bit by bit, against an oracle in NumPy that shares no code with the library."""

from __future__ import annotations

import math
import subprocess
import sys
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
from backends import Backend, assert_same_bits, backend, backend_params, from_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import fastfp8
from fastfp8 import ScaledTensor

BLOCKS = [(1, 128), (128, 1), (128, 128)]
SHAPES = [(1, 1), (1, 128), (3, 129), (127, 130), (128, 128), (129, 257), (0, 128), (0, 5), (5, 0), (130, 0)]
DTYPES = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
OPTIONS = [{"pow2": pow2, "eps": eps} for pow2 in (False, True) for eps in (0.0, 1e-4)]
KINDS = ["normal", "constant", "zero", "tiny", "subnormal", "huge", "infinite", "nan", "mixed"]


def make(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """FP32 values of ``kind``; "mixed" changes magnitude from one element to the next and has all special values."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    some = rng.random(shape) < 0.02
    if kind == "constant":
        x = np.full(shape, -0.3)
    elif kind == "zero":
        x = np.where(some, -0.0, 0.0)
    elif kind == "tiny":
        x = x * 1e-30
    elif kind == "subnormal":
        x = x * 2.0**-130
    elif kind == "huge":
        x = np.clip(x, -3, 3) * 1e38
    elif kind == "infinite":
        x = np.where(some, np.copysign(math.inf, x), x)
    elif kind == "nan":
        x = np.where(some, np.copysign(math.nan, x), x)
    elif kind == "mixed":
        x = x * 2.0 ** rng.integers(-140, 120, (shape[0], 1)) * 2.0 ** rng.integers(-12, 3, shape)
        special = rng.choice([math.inf, -math.inf, math.nan, 0.0, -0.0, 3.4e38, 1e-45], shape)
        x = np.where(some, special, x)
        x[1::7] = rng.choice([math.inf, math.nan], x[1::7].shape)  # rows with nothing finite
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


def as_tensor(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    with np.errstate(over="ignore", invalid="ignore"):
        return from_numpy(x.astype(DTYPES[dtype]), dtype)


def oracle_block(x: np.ndarray, pow2: bool, eps: float) -> tuple[np.ndarray, np.float32]:
    """Codes (uint8) and scale of one block of FP32 values, each rounding done from the exact float64 result."""
    finite = np.abs(x[np.isfinite(x)])
    amax = np.float32(finite.max(initial=0))
    scale = multiplier = np.float32(1)
    if amax > 0:
        floored = max(amax, np.float32(max(eps, 2.0**-110)))
        # A double holds 2 * 24 + 2 bits, so that rounding its quotient to FP32 is rounding the exact quotient.
        scale = np.float32(float(floored) / 448.0)
        multiplier = np.float32(448.0 / float(floored))
        if pow2:
            fraction, exponent = math.frexp(float(scale))
            scale = np.float32(2.0 ** (exponent - 1 if fraction == 0.5 else exponent))
            multiplier = np.float32(1 / float(scale))
    with np.errstate(over="ignore"):
        scaled = (x.astype(np.float64) * float(multiplier)).astype(np.float32)
    codes = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    codes[np.isnan(x)] = 0x7F
    return codes, scale


def oracle(
    x: torch.Tensor, block: tuple[int, int], *, pow2: bool = False, eps: float = 0.0
) -> tuple[torch.Tensor, ...]:
    values = x.float().numpy()
    (rows, cols), (block_rows, block_cols) = values.shape, block
    codes = np.zeros(values.shape, np.uint8)
    scale = np.zeros((math.ceil(rows / block_rows), math.ceil(cols / block_cols)), np.float32)
    for i, j in np.ndindex(*scale.shape):
        part = np.s_[i * block_rows : (i + 1) * block_rows, j * block_cols : (j + 1) * block_cols]
        codes[part], scale[i, j] = oracle_block(values[part], pow2, eps)
    return from_numpy(codes, torch.float8_e4m3fn), torch.from_numpy(scale)


def check(b: Backend, x: torch.Tensor, block: tuple[int, int], **options: float) -> ScaledTensor:
    t = b.quantize(x, block, **options)
    codes, scale = oracle(x, block, **options)
    assert t.block == block
    assert_same_bits(t.scale, scale, f"scale, {options}")
    assert_same_bits(t.data, codes, f"data, {options}")
    return t


def expected_strides(shape: torch.Size, block: tuple[int, int]) -> tuple[int, int]:
    """What fastfp8/layout.py states in words."""
    padded = [math.ceil(extent / 4) * 4 for extent in shape]
    return {(1, 128): (1, padded[0]), (128, 1): (padded[1], 1), (128, 128): (shape[1], 1)}[block]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", backend_params())
def test_shapes(name: str, block: tuple[int, int], dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = as_tensor(make("mixed", shape), dtype)
    t = check(backend(name), x, block)
    assert t.data.is_contiguous()
    assert t.scale.stride() == expected_strides(t.scale.shape, block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", backend_params())
def test_values(name: str, block: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    x = as_tensor(make(kind, (130, 136)), dtype)
    for options in OPTIONS:
        check(backend(name), x, block, **options)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", backend_params())
def test_strides(name: str, block: tuple[int, int]) -> None:
    for dtype in DTYPES:
        big = as_tensor(make("normal", (300, 280)), dtype)
        for x in (big.t(), big[3:150:2, 1:270:3], big[:, 5:140], big[:1].expand(130, 280), big[:, 7:8].t()):
            t = check(backend(name), x, block)
            assert t.data.is_contiguous()
            assert t.scale.stride() == expected_strides(t.scale.shape, block)


@pytest.mark.parametrize("layout", ["contiguous", "apart", "transposed", "expanded"])
@pytest.mark.parametrize("shape", [(3, 5, 300), (2, 128, 130), (2, 150, 136), (0, 5, 8), (3, 0, 8), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("name", backend_params())
def test_stacks(name: str, block: tuple[int, int], shape: tuple[int, int, int], layout: str) -> None:
    """Each matrix as it would be alone, whether that takes one launch or several."""
    matrices, rows, cols = shape
    x = as_tensor(make("mixed", (matrices * rows, cols)), torch.bfloat16).view(shape)
    if layout == "apart":
        x = torch.full((matrices, rows + 3, cols), math.nan, dtype=x.dtype)[:, :rows].copy_(x)
    elif layout == "transposed":
        x = x.mT.contiguous().mT
    elif layout == "expanded":
        x = x[:, :1].expand(shape)
    t = backend(name).quantize(x, block, pow2=True)
    assert t.data.is_contiguous()
    for index in range(matrices):
        codes, scale = oracle(x[index], block, pow2=True)
        assert_same_bits(t.data[index], codes, f"data of matrix {index}")
        assert_same_bits(t.scale[index], scale, f"scale of matrix {index}")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", backend_params())
def test_a_nan_or_an_infinity_touches_no_neighbour(name: str, block: tuple[int, int]) -> None:
    clean = as_tensor(make("normal", (130, 136)), torch.bfloat16)
    clean[5, 7] = clean[129, 131] = 0.0
    expected = backend(name).quantize(clean, block)
    for value, code in ((math.nan, 0x7F), (-math.nan, 0x7F), (math.inf, 0x7E), (-math.inf, 0xFE)):
        x = clean.clone()
        x[5, 7] = x[129, 131] = value
        t = backend(name).quantize(x, block)
        assert t.data.view(torch.uint8)[[5, 129], [7, 131]].tolist() == [code, code]
        t.data[5, 7] = t.data[129, 131] = 0.0
        assert_same_bits(t.data, expected.data, "data")
        assert_same_bits(t.scale, expected.scale, "scale")


@pytest.mark.parametrize("name", backend_params())
def test_every_bf16_value_with_scale_one(name: str) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):
        values = values[np.abs(values.astype(np.float32)) <= 448]
    values = np.concatenate([values, np.zeros(-len(values) % 127, values.dtype)])
    x = np.concatenate([np.full((len(values) // 127, 1), 448, values.dtype), values.reshape(-1, 127)], axis=1)
    t = backend(name).quantize(from_numpy(x, torch.bfloat16), (1, 128))
    assert (t.scale == 1).all()
    assert_same_bits(t.data, from_numpy(x.astype(ml_dtypes.float8_e4m3fn), torch.float8_e4m3fn), "data")


@pytest.mark.parametrize("name", backend_params())
def test_amax_beside_every_power_of_two(name: str) -> None:
    """FP32 neighbours of 448 * 2^k: where a scale by log2 or by a reciprocal goes wrong."""
    amax = (448 * 2.0 ** np.arange(-118, 119)).astype(np.float32)
    amax = np.concatenate([amax, np.nextafter(amax, np.float32(0)), np.nextafter(amax, np.float32(math.inf))])
    x = torch.from_numpy(amax)[:, None] * torch.tensor([1.0, 0.5, -1.0, 0.0])
    for options in OPTIONS:
        check(backend(name), x, (1, 128), **options)


def test_pow2_scales_are_powers_of_two_not_below_the_ordinary_ones() -> None:
    x = as_tensor(make("normal", (300, 256)), torch.float32)
    plain, pow2 = fastfp8.quantize(x), fastfp8.quantize(x, pow2=True)
    mantissa = pow2.scale.contiguous().view(torch.int32) & 0x7FFFFF
    assert not mantissa.any()
    assert ((pow2.scale >= plain.scale) & (pow2.scale < 2 * plain.scale)).all()


@pytest.mark.parametrize("name", backend_params())
def test_sqnr(name: str) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    t = backend(name).quantize(x)
    noise = (backend(name).dequantize(t, torch.float32) - x).double().square().sum()
    sqnr = 10 * torch.log10(x.double().square().sum() / noise).item()
    # 31.8 dB is what 3 bits of mantissa leave of a normal distribution scaled by its amax; a lost bit costs 6 dB.
    assert 31 < sqnr < 33


INPUTS = st.builds(
    make, st.sampled_from(KINDS), st.tuples(st.integers(0, 140), st.integers(0, 280)), st.integers(0, 1 << 30)
)


def check_any_input(name: str, examples: settings) -> None:
    @examples
    @given(INPUTS, st.sampled_from(list(DTYPES)), st.sampled_from(BLOCKS), st.sampled_from(OPTIONS))
    def run(x: np.ndarray, dtype: torch.dtype, block: tuple[int, int], options: dict[str, float]) -> None:
        check(backend(name), as_tensor(x, dtype), block, **options)

    run()


@pytest.mark.parametrize("name", backend_params())
def test_any_input(name: str) -> None:
    check_any_input(name, settings(max_examples=50, deadline=None, derandomize=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", backend_params())
def test_any_input_long(name: str) -> None:
    check_any_input(name, settings(max_examples=1000, deadline=None))


def test_chunks_of_the_reference_agree_with_the_whole() -> None:
    """The CPU implementation works through large inputs in chunks; none of the shapes above is large enough."""
    x = as_tensor(make("mixed", (1300, 1024)), torch.bfloat16)
    for block in BLOCKS:
        whole = fastfp8.quantize(x, block)
        for i in range(0, 1300, 256):
            part = fastfp8.quantize(x[i : i + 256], block)
            assert_same_bits(whole.data[i : i + 256], part.data, f"data from row {i}")
            first, last = i // block[0], i // block[0] + part.scale.shape[0]
            assert_same_bits(whole.scale[first:last], part.scale, f"scale from row {i}")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_triton_leaves_the_padding_of_the_scale_alone(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fastfp8.triton_kernels import quantize

    storage = torch.full((2000,), -7.0)

    def empty_scale(like: torch.Tensor, shape: tuple[int, int], _: tuple[int, int]) -> torch.Tensor:
        return storage.as_strided(shape, expected_strides(torch.Size(shape), block))

    monkeypatch.setattr(quantize, "empty_scale", empty_scale)
    x = as_tensor(make("normal", (130, 134)), torch.float32)
    t = backend("triton_interpreter").quantize(x, block)
    scales = t.scale.clone()
    t.scale.fill_(-7.0)
    assert (scales > 0).all()
    assert (storage == -7).all()


@pytest.mark.parametrize("sticky", [False, True])
def test_a_conversion_by_way_of_truncated_fp16(monkeypatch: pytest.MonkeyPatch, sticky: bool) -> None:
    """What Triton before 3.9 does for sm_89 gives wrong codes, and right ones with the kernel's sticky bit."""
    pytest.importorskip("triton")
    import interpreter

    from fastfp8.triton_kernels import quantize

    def truncate(values: np.ndarray) -> np.ndarray:
        """FP32 to FP16 towards zero, finite values to finite ones, as cvt.rz does."""
        half = np.clip(values, -65504, 65504).astype(np.float16)
        half = np.where(np.abs(half.astype(np.float32)) > np.abs(values), np.nextafter(half, np.float16(0)), half)
        return half.astype(np.float32)

    convert = interpreter.convert_float
    narrow = mock.Mock(side_effect=lambda data, source, target, mode: convert(truncate(data), source, target, mode))
    by_fp16 = ((interpreter.triton_interpreter, "_convert_float", narrow), *interpreter._CORRECTIONS[1:])
    monkeypatch.setattr(interpreter, "_CORRECTIONS", by_fp16)
    monkeypatch.setattr(quantize, "require_fp8", lambda op, device: (8, 9) if sticky else (9, 0))
    wrong = 0
    for kind in KINDS:
        x = as_tensor(make(kind, (64, 256)), torch.float32)
        data, (codes, _) = backend("triton_interpreter").quantize(x).data, oracle(x, (1, 128))
        wrong += int((data.view(torch.uint8) != codes.view(torch.uint8)).sum())
    assert narrow.called
    assert (wrong == 0) == sticky, wrong


def test_an_old_gpu_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fastfp8.triton_kernels import dequantize, gemm, quantize, require_fp8

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(RuntimeError, match=r"fastfp8.quantize: cuda:1 has compute capability 8\.6.*8\.9 or newer.*CPU"):
        require_fp8("quantize", torch.device("cuda:1"))
    assert require_fp8("quantize", torch.device("cpu")) is None
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert require_fp8("quantize", torch.device("cuda:0")) == capability

    asked = []
    for module in (quantize, dequantize, gemm):
        monkeypatch.setattr(module, "require_fp8", lambda op, device: asked.append((op, device.type)))
    b = backend("triton_interpreter")
    t = b.quantize(torch.zeros(0, 128))
    b.dequantize(t)
    b.gemm(t, t)
    assert asked == [("quantize", "cpu"), ("dequantize", "cpu"), ("gemm", "cpu")]


def test_the_library_imports_no_triton() -> None:
    code = "import sys, fastfp8, torch; fastfp8.quantize(torch.ones(4, 128)); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
