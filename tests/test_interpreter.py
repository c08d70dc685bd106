"""The harness that interprets Triton kernels: its arithmetic is the hardware's, and Triton's own still is not."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from backends import from_numpy

triton = pytest.importorskip("triton")
import interpreter  # noqa: E402
import triton.language as tl  # noqa: E402
from interpreter import interpreted  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

HERE = sys.modules[__name__]


@triton.jit
def cast_kernel(x, out, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    values = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, values.to(out.dtype.element_ty), mask=i < n)


@triton.jit
def fma_kernel(x, y, z, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, SIZE), tl.arange(0, K)
    product = tl.dot(tl.load(a + i[:, None] * K + k[None, :]), tl.load(b + i[None, :] * K + k[:, None]))
    tl.store(out + i[:, None] * SIZE + i[None, :], product)


def cast(x: torch.Tensor, dtype: torch.dtype, *, corrected: bool = True) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    with interpreted(HERE, corrected=corrected):
        cast_kernel[(math.ceil(x.numel() / 8192),)](x, out, x.numel(), SIZE=8192)
    return out


def every_code() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


# The values of the finite non-negative codes, from the definition: 4 exponent bits of bias 7, 3 of mantissa.
CODE_VALUES = np.array(
    [(m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)]
)
CODE_VALUES = CODE_VALUES[:127]


def nearest_codes(x: np.ndarray) -> np.ndarray:
    """The code of each FP32 value by search among the values of all codes: nearest, ties to even, saturating."""
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        magnitude = np.abs(x.astype(np.float64))
    midpoints = (CODE_VALUES[1:] + CODE_VALUES[:-1]) / 2
    below, up = np.searchsorted(midpoints, magnitude, "left"), np.searchsorted(midpoints, magnitude, "right")
    code = np.where(below % 2 == 0, below, up)  # they differ at a tie only, by one
    return np.where(np.isnan(x), 0x7F, code + 0x80 * np.signbit(x)).astype(np.uint8)


def awkward_floats() -> np.ndarray:
    """Every BF16 value, and every midpoint of two codes with the FP32 values beside it."""
    bf16 = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    middle = ((CODE_VALUES[1:] + CODE_VALUES[:-1]) / 2).astype(np.float32)
    beside = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(500))])
    return np.concatenate([bf16, beside, -beside])


def test_fp32_to_e4m3_is_the_hardware_conversion() -> None:
    x = awkward_floats()
    codes = cast(torch.from_numpy(x), torch.float8_e4m3fn).view(torch.uint8).numpy()
    wrong = np.flatnonzero(codes != nearest_codes(x))
    assert wrong.size == 0, f"{wrong.size} wrong, first {x[wrong[0]]!r} -> {codes[wrong[0]]:#x}"
    special = cast(torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 3.4e38, -0.0]), torch.float8_e4m3fn)
    assert special.view(torch.uint8).tolist() == [0x7E, 0xFE, 0x7F, 0x7F, 0x7E, 0x80]


def test_triton_still_needs_the_corrected_casts() -> None:
    """When this fails, Triton is mended: take the corrections away for the versions that are."""
    x = np.linspace(-448, 448, 100_001, dtype=np.float32)
    codes = cast(torch.from_numpy(x), torch.float8_e4m3fn, corrected=False).view(torch.uint8).numpy()
    assert (codes != nearest_codes(x)).mean() > 0.01
    assert cast(torch.tensor([-127.99]), torch.float8_e4m3fn, corrected=False).item() == -64
    assert cast(every_code(), torch.float32, corrected=False)[0x7F] == 480
    assert cast(torch.tensor([1 + 2**-8 + 2**-9]), torch.bfloat16, corrected=False).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_e4m3_widens_exactly(dtype: torch.dtype) -> None:
    values = cast(every_code(), dtype).double().numpy()
    expected = np.concatenate([CODE_VALUES, [math.nan], -CODE_VALUES, [math.nan]])
    np.testing.assert_array_equal(values, expected)
    assert math.copysign(1, values[0x80]) == -1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_narrows_to_nearest_even(dtype: torch.dtype) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 40_000, dtype=np.uint32)
    bits[:5000] = bits[:5000] & 0xFFFF0000 | 0x8000  # ties of BF16
    bits[5000:10_000] = bits[5000:10_000] & 0x8FFFE000 | 0x38001000  # ties of FP16, of moderate size
    x = torch.from_numpy(bits.view(np.float32))
    torch.testing.assert_close(cast(x, dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    x, y, z = (rng.standard_normal(4096).astype(np.float32) for _ in range(3))
    # x * y in the last bit of z and just beyond: the sums that rounding twice gets wrong
    z[:2048] *= np.float32(2.0) ** rng.integers(20, 50, 2048)
    x[2048:2304], y[2048:2304] = 1 + 2**-12, rng.choice([1 + 2**-12, 1 - 2**-12], 256)
    z[2048:2304] = rng.choice(np.array([2**-30, -(2**-30), 1e-38, 2**24 + 2], np.float32), 256)
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    expected = np.array([fmaf(*map(float, row)) for row in zip(x, y, z, strict=True)], np.float32)
    assert (expected != x * y + z).mean() > 0.1  # the inputs tell one rounding from two
    out = torch.empty(4096)
    with interpreted(HERE):
        fma_kernel[(1,)](*map(torch.from_numpy, (x, y, z)), out, SIZE=4096)
    np.testing.assert_array_equal(out.numpy(), expected)


def test_fma_of_infinities() -> None:
    x = np.array([math.inf, 3e38, 0.0, math.inf], np.float32)
    y = np.array([1.0, 3e38, math.inf, 1.0], np.float32)
    z = np.array([1.0, 1.0, 1.0, -math.inf], np.float32)
    with np.errstate(all="ignore"):
        total = interpreter.fma_f32(x, y, z)
    np.testing.assert_array_equal(total, np.array([math.inf, math.inf, math.nan, math.nan]))


def test_dot_is_the_exact_sum_of_products() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (16, 128), dtype=np.uint8) for _ in range(2))
    a[a & 0x7F == 0x7F], b[b & 0x7F == 0x7F] = 0x7E, 0x7E
    a[3, 5] = 0x7F  # a NaN
    out = torch.empty(16, 16)
    with interpreted(HERE):
        dot_kernel[(1,)](*(from_numpy(v, torch.float8_e4m3fn) for v in (a, b)), out, SIZE=16, K=128)
    values = np.concatenate([CODE_VALUES, [math.nan], -CODE_VALUES, [math.nan]])
    expected = [[math.fsum(values[row] * values[col]) for col in b] for row in a]
    np.testing.assert_array_equal(out.numpy(), np.array(expected).astype(np.float32))


def test_an_access_outside_the_tensors_is_an_error() -> None:
    whole = torch.zeros(64)
    with interpreted(HERE), pytest.raises(InterpreterError, match="1 of 33 addresses of a load lie outside"):
        cast_kernel[(1,)](whole[:32], torch.empty(64), 33, SIZE=64)
    with interpreted(HERE), pytest.raises(InterpreterError, match="1 of 33 addresses of a store lie outside"):
        cast_kernel[(1,)](whole, torch.empty(64)[:32], 33, SIZE=64)


def test_nothing_stays_swapped() -> None:
    from fastfp8.triton_kernels import gemm, quantize

    owners = (
        HERE,
        gemm,
        quantize,
        tl,
        tl.core,
        tl.standard,
        tl.math,
        tl.tensor,
        tl.dtype,
        tl.core.tensor_descriptor_base,
    )
    owners = (*owners, triton.runtime.interpreter, triton.runtime.interpreter.InterpreterBuilder)
    before = [dict(vars(owner)) for owner in owners]
    with interpreted(HERE):
        assert not isinstance(quantize.quantize_kernel, JITFunction)
        quantize.quantize(torch.zeros(3, 5), (1, 128), False, 0.0)  # a kernel that calls others
        assert vars(tl.core) != before[4]
    for owner, attributes in zip(owners, before, strict=True):
        changed = [name for name, value in attributes.items() if vars(owner).get(name) is not value]
        assert not changed, owner
