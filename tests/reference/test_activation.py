"""exp and silu of the reference: accuracy against float64, special values, and the very operations step by step."""

from __future__ import annotations

import ctypes
import ctypes.util
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastfp8.reference import activation
from fastfp8.reference.activation import exp, silu, silu_slope, swiglu, swiglu_backward

INF, NAN = math.inf, math.nan


def values(count: int, seed: int = 0) -> Tensor:
    """FP32 values of both signs: evenly over the range in which exp is finite, around 0, and of every exponent."""
    generator = torch.Generator().manual_seed(seed)
    even = torch.linspace(-87.3, 88.3, count)
    normal = 4 * torch.randn(count, generator=generator)
    any_exponent = torch.randn(count, generator=generator) * 2.0 ** torch.randint(
        -149, 4, (count,), generator=generator
    )
    return torch.cat([even, normal, any_exponent])


def ulps(got: Tensor, exact: np.ndarray) -> float:
    """The largest error in units of the last place of the exact result in FP32."""
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float((np.abs(got.double().numpy() - exact) / unit).max())


def test_exp_is_within_one_ulp() -> None:
    x = values(300_000)
    assert ulps(exp(x), np.exp(x.double().numpy())) < 1


def test_silu_is_within_two_and_a_half_ulp() -> None:
    x = values(300_000)
    wide = x.double().numpy()
    exact = wide / (1 + np.exp(-wide))
    normal = np.abs(exact) >= 2.0**-126
    assert ulps(silu(x)[torch.from_numpy(normal)], exact[normal]) < 2.5
    assert np.abs(silu(x).double().numpy() - exact)[~normal].max() < 2.0**-148


def test_the_slope_of_silu() -> None:
    """Beside float64. The largest error is where ``1 - s`` has few digits, near 16; at -1.278 it crosses zero."""
    x = values(300_000)
    wide = x.double().numpy()
    sigmoid = 1 / (1 + np.exp(-wide))
    exact = sigmoid * (1 + wide * (1 - sigmoid))
    error = np.abs(silu_slope(x).double().numpy() - exact)
    assert error.max() < 17 * 2.0**-24
    assert (error / (np.abs(exact) + sigmoid / 10)).max() < 18 * 2.0**-24


def test_special_values_of_the_slope() -> None:
    x = torch.tensor([INF, 3e38, 89.0, 16.64, 0.0, -0.0, -88.4, -89.0, -3e38, -INF])
    out = silu_slope(x)
    assert out.tolist() == [1, 1, 1, 1, 0.5, 0.5, 0, 0, 0, 0]
    assert out.signbit().tolist() == [False] * 6 + [True] * 4
    assert silu_slope(torch.tensor([NAN, -NAN])).isnan().all()


def test_special_values() -> None:
    assert exp(torch.tensor([INF, 89, 3e38, -INF, -88, -3e38, 0.0, -0.0, 1e-45])).tolist() == [
        *[INF] * 3,
        *[0.0] * 3,
        *[1.0] * 3,
    ]
    assert exp(torch.tensor([NAN, -NAN])).isnan().all()
    assert silu(torch.tensor([NAN, -NAN])).isnan().all()
    x = torch.tensor([INF, -INF, 0.0, -0.0, -89.0, -88.4, -3e38, 3e38])
    out = silu(x)
    assert out.tolist() == [INF, 0, 0, 0, 0, 0, 0, torch.tensor(3e38).item()]
    assert out.signbit().tolist() == [False, True, False, True, True, True, True, False]
    assert silu(torch.tensor(-88.37)) < -3e-37


def test_clamped_values_and_weights() -> None:
    gate = torch.tensor([[5.0, 1.0, -9.0, INF, -INF, NAN, 1.0, 2.0]])
    up = torch.tensor([[1.0, 5.0, -5.0, 2.0, 1.0, 1.0, NAN, -INF]])
    bound = torch.tensor(3.0)
    s = silu(torch.tensor([3.0, 1.0, -9.0, 3.0, -INF, NAN, 1.0, 2.0]))
    expected = s * torch.tensor([1.0, 3.0, -3.0, 2.0, 1.0, 1.0, NAN, -3.0]) * 0.3
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = swiglu(gate.to(dtype), up.to(dtype), torch.tensor([0.3]), float(bound))
        assert out.dtype == torch.float32
        assert torch.equal(out.nan_to_num(7.25), expected[None].nan_to_num(7.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [None, 1.7])
def test_16_bits_have_the_results_of_32(dtype: torch.dtype, limit: float | None) -> None:
    """They go through a table of every value there is."""
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    up = gate.flip(1)
    narrow, wide = swiglu(gate, up, None, limit), swiglu(gate.float(), up.float(), None, limit)
    same = (narrow.view(torch.int32) == wide.view(torch.int32)) | (narrow.isnan() & wide.isnan())
    assert same.all()
    grad, weight = torch.full_like(up, 0.75), torch.tensor([0.3])
    wide_arguments = grad.float(), gate.float(), up.float()
    pairs = zip(
        swiglu_backward(grad, gate, up, weight, limit), swiglu_backward(*wide_arguments, weight, limit), strict=True
    )
    for narrow, wide in pairs:
        assert ((narrow.view(torch.int32) == wide.view(torch.int32)) | (narrow.isnan() & wide.isnan())).all()


def test_exp_by_the_fma_of_libm() -> None:
    """The definition, one operation after the other, on values that include ties of the rounding to double."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    fma = np.frompyfunc(lambda x, y, z: np.float32(fmaf(x, y, z)), 3, 1)
    x = values(4000, seed=1)
    x = x[(x >= activation.EXP_LEAST) & (x <= activation.EXP_MOST)].numpy()
    shifted = fma(x, activation.LOG2_E, activation.ROUNDER).astype(np.float32)
    n = shifted - np.float32(activation.ROUNDER)
    r = fma(n, -activation.LN_2_LOW, fma(n, -activation.LN_2_HIGH, x))
    p = np.full_like(x, activation.EXP_COEFFICIENTS[-1])
    for c in (*activation.EXP_COEFFICIENTS[-2::-1], 1.0, 1.0):
        p = fma(p, r, c)
    with np.errstate(over="ignore"):
        power = np.where(n == -127, 0.0, np.ldexp(1.0, n.astype(np.int32))).astype(np.float32)
    assert np.array_equal(exp(torch.from_numpy(x)).numpy(), p.astype(np.float32) * power)


@pytest.mark.parametrize(
    ("x", "y", "z", "expected"),
    [
        # 2**46 + 1 = 8384513 * 8392705, so the sum is 2**-70 above the tie between 1 and its neighbour.
        (8384513 * 2.0**-23, 8392705 * 2.0**-47, 1.0, 1 + 2.0**-23),
        # (1 - d) (1 + d) = 1 - d**2: 2**-70 below a tie, which rounds up to even.
        (1 - 2.0**-23, (1 + 2.0**-23) * 2.0**-24, 1 + 2.0**-23, 1 + 2.0**-23),
    ],
)
def test_an_fma_beside_a_tie(x: float, y: float, z: float, expected: float) -> None:
    """The sum as a double is a tie of FP32, so that rounding it again goes wrong."""
    twice = (torch.tensor(x, dtype=torch.float64) * y + z).float()
    assert twice != expected
    assert activation._fma(torch.tensor([x]), torch.tensor([y]), z).tolist() == [expected]
