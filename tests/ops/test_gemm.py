"""gemm on every backend, against float64; the interpreted Triton kernel bit by bit against the contract."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from backends import BACKENDS, assert_same_bits, backend, backend_params
from hypothesis import given, settings
from hypothesis import strategies as st

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.layout import empty_scale
from fastfp8.reference import tensor_core

A_BLOCK = (1, 128)
B_BLOCKS = [(128, 128), (1, 128)]
MS, NS, KS = (0, 1, 17, 130), (8, 72, 136), (16, 128, 144, 384)
OUT_DTYPES = (torch.float32, torch.bfloat16)
C_DTYPES = (None, torch.bfloat16, torch.float32)

# calc_diff of an FP32 output, and the largest relative error where nothing cancels. Measured: 5e-14 and 3e-7 on the
# CPU, 2e-15 and 3e-7 interpreted. A Hopper tensor core keeps 13 fraction bits: 8e-9 and 6e-4 are expected of one.
TENSOR_CORE = (5e-8, 2e-3)
BOUNDS = {
    "reference": (5e-13, 2e-6),
    "triton_interpreter": (2e-14, 2e-6),
    "emulator": TENSOR_CORE,
    "cuda": TENSOR_CORE,
    "cuda_triton": TENSOR_CORE,
}
# calc_diff is half the squared relative error, and one rounding to BF16's 8 bits errs by 2^-8 at most.
BF16_BOUND = 2.0**-17 + 5e-8


def operands(
    m: int, n: int, k: int, b_block: tuple[int, int], *, positive: bool = False, seed: int = 0
) -> tuple[ScaledTensor, ScaledTensor]:
    generator = torch.Generator().manual_seed(seed)
    make = torch.rand if positive else torch.randn
    a, b = (make(rows, k, generator=generator) for rows in (m, n))
    a *= 4.0 ** torch.randint(-3, 4, (m, 1), generator=generator)
    return fastfp8.quantize(a, A_BLOCK), fastfp8.quantize(b, b_block)


def addend(m: int, n: int, dtype: torch.dtype | None, seed: int = 1) -> torch.Tensor | None:
    return None if dtype is None else torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dequantized(t: ScaledTensor) -> np.ndarray:
    """The exact values, in float64."""
    codes = t.data.contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scale = t.scale.numpy().astype(np.float64).repeat(t.block[0], 0).repeat(t.block[1], 1)
    return codes * scale[: codes.shape[0], : codes.shape[1]]


def exact(a: ScaledTensor, b: ScaledTensor, c: torch.Tensor | None = None) -> np.ndarray:
    product = dequantized(a) @ dequantized(b).T
    return product if c is None else product + c.double().numpy()


def calc_diff(x: torch.Tensor, y: np.ndarray) -> float:
    """DeepGEMM's measure: 0 for equal matrices, 1 for unrelated ones."""
    got = x.double().numpy()
    return 1 - 2 * (got * y).sum() / (got**2 + y**2).sum()


def segments(n: int, k: int, b_block: tuple[int, int]) -> list[tuple[int, int]]:
    """First and last k-block of each segment of K: as many as leave each four, and 132 tiles of 64 columns in all.

    Two would be too few to pay.
    """
    blocks, tiles = -(-k // 128), -(-n // 64)
    fitting = [s for s in (1, 4, 8) if s == 1 or (b_block != (1, 128) and s * tiles <= 132 and 4 * s <= blocks)]
    count = max(fitting)
    return [(blocks * s // count, blocks * (s + 1) // count) for s in range(count)]


def promoted(a: ScaledTensor, b: ScaledTensor, c: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """The contract with an exact tensor core: an fma of libm for each k-block of a segment in ascending order."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    fma = np.frompyfunc(fmaf, 3, 1)
    (m, k), n = a.shape, b.shape[0]
    codes = [t.data.contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn) for t in (a, b)]
    b_scale = b.scale.numpy().repeat(b.block[0], 0)[:n]
    total = None
    for first, last in segments(n, k, b.block):
        acc = np.zeros((m, n), np.float32)
        for k_block in range(first, last):
            left, right = (c[:, 128 * k_block : 128 * (k_block + 1)].astype(np.float64) for c in codes)
            factor = a.scale.numpy()[:, k_block, None] * b_scale[None, :, k_block]
            acc = fma(factor, (left @ right.T).astype(np.float32), acc).astype(np.float32)
        total = acc if total is None else total + acc
    out = torch.from_numpy(total)
    return (out if c is None else out + c.float()).to(out_dtype)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("m", MS)
@pytest.mark.parametrize("b_block", B_BLOCKS, ids=str)
@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_against_float64(name: str, b_block: tuple[int, int], m: int, n: int, k: int) -> None:
    a, b = operands(m, n, k, b_block)
    # One shape in all combinations of dtypes, the others in one each.
    combinations = list(itertools.product(OUT_DTYPES, C_DTYPES))
    for out_dtype, c_dtype in combinations if (m, n) == (17, 72) else [combinations[(m + n + k) // 8 % 6]]:
        c = addend(m, n, c_dtype)
        out = backend(name).gemm(a, b, out_dtype=out_dtype, c=c)
        assert out.dtype == out_dtype
        assert out.shape == (m, n)
        assert out.is_contiguous()
        if m:
            bound = BOUNDS[name][0] if out_dtype == torch.float32 else BF16_BOUND
            assert calc_diff(out, exact(a, b, c)) < bound, (out_dtype, c_dtype)


@pytest.mark.parametrize("b_block", B_BLOCKS, ids=str)
@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_positive_inputs(name: str, b_block: tuple[int, int]) -> None:
    """Where nothing cancels a lost promotion shows as a bias of percents, and a lost k-block as much more."""
    a, b = operands(17, 72, 2048, b_block, positive=True)
    out = backend(name).gemm(a, b, out_dtype=torch.float32)
    expected = exact(a, b)
    assert np.abs(out.numpy() / expected - 1).max() < BOUNDS[name][1]


def with_pitch(x: torch.Tensor) -> torch.Tensor:
    """A copy whose rows are a multiple of 16 elements apart; those of a contiguous tensor without columns are not."""
    rows, cols = x.shape
    return x.new_empty(rows, cols // 16 * 16 + 16)[:, :cols].copy_(x)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_empty_extents(name: str, out_dtype: torch.dtype) -> None:
    for b_block, (m, n, k) in itertools.product(
        B_BLOCKS, [(0, 8, 128), (3, 0, 128), (0, 0, 0), (3, 8, 0), (130, 8, 0)]
    ):
        a, b = (ScaledTensor(with_pitch(t.data), t.scale, t.block) for t in operands(m, n, k, b_block))
        for c in (None, with_pitch(torch.arange(m * n).view(m, n).float())):
            out = backend(name).gemm(a, b, out_dtype=out_dtype, c=c)
            assert_same_bits(out, torch.zeros(m, n, dtype=out_dtype) if c is None else c.to(out_dtype), f"{(m, n, k)}")


@pytest.mark.parametrize("shape", [(3, 0, 128), (3, 8, 0)], ids=str)
def test_contiguous_tensors_without_columns(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = operands(m, n, k, (128, 128))
    assert fastfp8.gemm(a, b, c=torch.ones(m, n)).tolist() == torch.ones(m, n).tolist()


@pytest.mark.parametrize("c_dtype", C_DTYPES, ids=str)
@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_c_is_added_in_fp32_and_the_sum_rounded_once(name: str, c_dtype: torch.dtype | None) -> None:
    a, b = operands(33, 72, 144, (128, 128))
    c = addend(33, 72, c_dtype)
    product = backend(name).gemm(a, b, out_dtype=torch.float32)
    total = product if c is None else product + c.float()
    assert_same_bits(backend(name).gemm(a, b, out_dtype=torch.float32, c=c), total, "float32")
    assert_same_bits(backend(name).gemm(a, b, c=c), total.bfloat16(), "bfloat16")


@pytest.mark.parametrize("b_block", B_BLOCKS, ids=str)
@pytest.mark.parametrize("name", backend_params(["triton_interpreter", "emulator", "cuda", "cuda_triton"]))
def test_a_row_does_not_depend_on_the_batch(name: str, b_block: tuple[int, int]) -> None:
    a, b = operands(150, 136, 400, b_block)
    c = addend(150, 136, torch.float32)
    whole = backend(name).gemm(a, b, out_dtype=torch.float32, c=c)
    for first, last in ((0, 1), (149, 150), (70, 71), (3, 20), (5, 69), (6, 71)):
        part = ScaledTensor(a.data[first:last], a.scale[first:last], A_BLOCK)
        alone = backend(name).gemm(part, b, out_dtype=torch.float32, c=c[first:last])
        assert_same_bits(alone, whole[first:last], f"rows {first} to {last}")


@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_the_number_of_sms_changes_no_bit(name: str) -> None:
    a, b = operands(150, 136, 400, (128, 128))
    expected = backend(name).gemm(a, b, out_dtype=torch.float32)
    for num_sms in (1, 2, 1000):
        out = backend(name).gemm(a, b, out_dtype=torch.float32, num_sms=num_sms)
        assert_same_bits(out, expected, f"{num_sms} SMs")


@pytest.mark.parametrize("value", [True, 1.0, "all"])
def test_a_number_of_sms_is_an_integer(value: object) -> None:
    a, b = operands(5, 16, 144, (128, 128))
    expected = f"argument 'num_sms': expected None or an integer, got {type(value).__name__}"
    with pytest.raises(TypeError, match=expected):
        fastfp8.gemm(a, b, num_sms=value)


@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_strides_and_what_lies_between_rows(name: str) -> None:
    """Codes beyond K, the padding of scales and the gap between rows are NaN, and none arrives in the result."""
    for b_block in B_BLOCKS:
        a, b = operands(18, 72, 144, b_block)
        c = addend(18, 72, torch.float32)
        expected = backend(name).gemm(a, b, out_dtype=torch.float32, c=c)

        def poisoned(t: ScaledTensor) -> ScaledTensor:
            rows, cols = t.shape
            wide = torch.full((rows + 3, cols + 144), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
            wide[:rows, :cols] = t.data
            scale = empty_scale(t.data, tuple(t.scale.shape), t.block)
            scale.as_strided((scale.untyped_storage().nbytes() // 4,), (1,)).fill_(float("nan"))
            return ScaledTensor(wide[:rows, :cols], scale.copy_(t.scale), t.block)

        wide_c = torch.full((18, 100), float("nan"))
        wide_c[:, :72] = c
        out = backend(name).gemm(poisoned(a), poisoned(b), out_dtype=torch.float32, c=wide_c[:, :72])
        assert_same_bits(out, expected, f"{b_block}")


@pytest.mark.parametrize("name", backend_params(["reference", "triton_interpreter", "emulator"]))
def test_a_bias_may_be_an_expanded_row(name: str) -> None:
    a, b = operands(18, 72, 144, (128, 128))
    bias = addend(1, 72, torch.bfloat16).expand(18, 72)
    expected = backend(name).gemm(a, b, c=bias.contiguous())
    assert_same_bits(backend(name).gemm(a, b, c=bias), expected, "out")


@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_a_nan_stays_in_its_row(name: str) -> None:
    a, b = operands(20, 72, 144, (128, 128))
    expected = backend(name).gemm(a, b, out_dtype=torch.float32)
    a.data.view(torch.uint8)[7, 140] = 0x7F
    out = backend(name).gemm(a, b, out_dtype=torch.float32)
    assert out[7].isnan().all()
    out[7] = expected[7]
    assert_same_bits(out, expected, "the other rows")


NO_HOPPER = not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)


@pytest.mark.hopper
@pytest.mark.skipif(NO_HOPPER, reason="torch sees no sm_90 GPU, which alone has the accumulator that is modelled")
@pytest.mark.parametrize("c_dtype", C_DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("b_block", B_BLOCKS, ids=str)
def test_bits_of_hopper(b_block: tuple[int, int], out_dtype: torch.dtype, c_dtype: torch.dtype | None) -> None:
    """The sm_90a kernel against the model of its tensor core, over the tails of every tile."""
    for m, n, k in [(1, 8, 16), (63, 40, 144), (64, 64, 128), (129, 136, 400), (300, 264, 1040), (64, 2112, 7168)]:
        a, b = operands(m, n, k, b_block, seed=m)
        c = addend(m, n, c_dtype)
        expected = tensor_core.gemm(a.data, a.scale, b.data, b.scale, b.block, out_dtype, c)
        assert_same_bits(backend("cuda").gemm(a, b, out_dtype=out_dtype, c=c), expected, f"{(m, n, k)}")


def random_codes(rows: int, k: int, block: tuple[int, int], rng: np.random.Generator) -> ScaledTensor:
    """Every finite code alike, with scales of 24 bits: sums that every change of order or rounding shows in."""
    codes = rng.integers(0, 0x7F, (rows, k), dtype=np.uint8) | rng.choice(np.array([0, 0x80], np.uint8), (rows, k))
    scale = (1 + rng.random((-(-rows // block[0]), -(-k // 128)))) * 2.0 ** rng.integers(-4, 5, ())
    data = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    return ScaledTensor(data, torch.from_numpy(scale.astype(np.float32)), block)


def check_bits(m: int, n: int, k: int, b_block: tuple[int, int], c_dtype: torch.dtype | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = random_codes(m, k, A_BLOCK, rng), random_codes(n, k, b_block, rng)
    c = None if c_dtype is None else (1000 * addend(m, n, torch.float32)).to(c_dtype)
    for out_dtype in OUT_DTYPES:
        out = backend("triton_interpreter").gemm(a, b, out_dtype=out_dtype, c=c)
        assert_same_bits(out, promoted(a, b, c, out_dtype), f"{out_dtype}")


triton_interpreter = pytest.mark.parametrize("name", backend_params(["triton_interpreter"]))


@pytest.mark.parametrize("c_dtype", C_DTYPES, ids=str)
@pytest.mark.parametrize("b_block", B_BLOCKS, ids=str)
@triton_interpreter
def test_bits_of_triton(name: str, b_block: tuple[int, int], c_dtype: torch.dtype | None) -> None:
    check_bits(17, 136, 400, b_block, c_dtype, 0)
    check_bits(66, 136, 272, b_block, c_dtype, 1)


@triton_interpreter
def test_bits_of_triton_over_many_tiles(name: str) -> None:
    """Twelve tiles of rows, so more than the group that shares its columns of b, and two of columns."""
    check_bits(1430, 136, 16, (128, 128), None, 0)


@triton_interpreter
def test_bits_of_triton_in_any_shape(name: str) -> None:
    sixteenths, blocks = st.integers(0, 18), st.sampled_from(B_BLOCKS)

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.integers(0, 140), st.integers(0, 20), sixteenths, blocks, st.sampled_from(C_DTYPES), st.integers(0, 99))
    def run(m: int, n: int, k: int, b_block: tuple[int, int], c_dtype: torch.dtype | None, seed: int) -> None:
        check_bits(m, 8 * n, 16 * k, b_block, c_dtype, seed)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("b_block", B_BLOCKS, ids=str)
@triton_interpreter
def test_bits_of_triton_in_long_sums(name: str, b_block: tuple[int, int]) -> None:
    check_bits(300, 264, 4096, b_block, torch.float32, 0)
