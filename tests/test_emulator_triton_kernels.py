"""Triton kernels that are no matrix products, as compiled for sm_90a: their PTX on the emulator against torch.

Every test runs in Triton's interpreter too, which shows that kernel and expectation are right, and on the emulator at
the timing of several seeds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from backends import backend_params

if any(param.marks[-1].args[0] for param in backend_params(["triton_interpreter", "emulator"])):
    pytest.skip("triton is not installed, or the emulator cannot be built", allow_module_level=True)
import triton_programs as kernels
from torch import Tensor
from triton_launch import Emulated, Run, run_params

EPS32 = 2.0**-23  # of FP32, relative


@pytest.fixture(params=run_params(seeds=3))
def run(request: pytest.FixtureRequest) -> Run:
    made: Run = request.param()
    return made


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def unwritten(like: Tensor) -> Tensor:
    """What is not written shows."""
    return torch.full_like(like, math.nan if like.is_floating_point() else -12345)


def assert_near(got: Tensor, exact: Tensor, bound: Any, what: str = "") -> None:
    error = (got.double() - exact).abs() - bound
    assert (error <= 0).all(), f"{what}: {error.max():.3g} beyond the bound"


@pytest.mark.parametrize(("cols", "block", "warps"), [(1000, 1024, 4), (31, 32, 1), (200, 256, 8)])
def test_softmax(run: Run, cols: int, block: int, warps: int) -> None:
    """ex2.approx (2 ulp), a product with log2(e) whose error is 2^-24 of an exponent below 16, sum and div.full."""
    x = randn(0, 3, cols)
    y = unwritten(x)
    run(kernels.softmax_kernel, (3,), x, y, cols, BLOCK=block, num_warps=warps)
    exact = x.double().softmax(1)
    assert_near(y, exact, (2 * (16 + 2) + 12 + 3) * EPS32 * exact)


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x.double(), x.shape[1:], w.double(), b.double(), 1e-5)


def test_layer_norm(run: Run) -> None:
    """In and out in BF16: its rounding, 2^-8 at most of the value, is far above the errors of FP32."""
    rows, cols = 4, 500
    x, w, b = randn(1, rows, cols).bfloat16(), randn(2, cols), randn(3, cols)
    y, mean, rstd = unwritten(x), torch.zeros(rows), torch.zeros(rows)
    run(kernels.layer_norm_kernel, (rows,), x, w, b, y, mean, rstd, cols, 1e-5, BLOCK=512, num_warps=4)
    exact = layer_norm(x, w, b)
    assert_near(y, exact, 2.0**-8 * exact.abs() + 2.0**-15)
    assert_near(mean, x.double().mean(1), 2.0**-20)
    assert_near(rstd, (x.double().var(1, unbiased=False) + 1e-5).rsqrt(), 2.0**-18)


def test_layer_norm_backward(run: Run) -> None:
    """Against autograd in float64; rows add up their gradients of the weights under a lock between CTAs."""
    rows, cols = 6, 300
    x, w, b = randn(4, rows, cols).bfloat16(), randn(5, cols), randn(6, cols)
    dy = randn(7, rows, cols).bfloat16()
    wide = [t.double().requires_grad_() for t in (x, w, b)]
    y = torch.nn.functional.layer_norm(wide[0], (cols,), wide[1], wide[2], 1e-5)
    gradients = torch.autograd.grad(y, wide, dy.double())
    mean, rstd = x.float().mean(1), (x.float().var(1, unbiased=False) + 1e-5).rsqrt()
    dx, dw, db, lock = unwritten(x), torch.zeros(cols), torch.zeros(cols), torch.zeros(1, dtype=torch.int32)
    args = (x, w, dy, mean, rstd, dx, dw, db, lock)
    run(kernels.layer_norm_backward_kernel, (rows,), *args, cols, BLOCK=512, num_warps=4)
    assert_near(dx, gradients[0], 2.0**-8 * gradients[0].abs() + 2.0**-14, "dx")
    for got, exact in ((dw, gradients[1]), (db, gradients[2])):
        assert_near(got, exact, 2.0**-15)
    assert lock.item() == 0


def test_group_quantize(run: Run) -> None:
    """1 x 128 groups to e4m3: scales within the 2 ulp of div.full, codes within one step of the exact quotient's."""
    rows, cols = 16, 384
    x = (randn(8, rows, cols) * 4.0 ** torch.arange(-4, 4).repeat(2)[:, None]).bfloat16()
    q, scale = torch.zeros(rows, cols, dtype=torch.float8_e4m3fn), torch.zeros(rows, cols // 128)
    run(kernels.group_quantize_kernel, (rows // 8, cols // 128), x, q, scale, cols, ROWS=8, GROUP=128, num_warps=4)
    groups = x.double().reshape(rows, -1, 128)
    exact = groups.abs().amax(2).clamp_min(1e-4) / 448
    assert_near(scale, exact, 3 * EPS32 * exact)
    ratio = groups / scale.double()[..., None]
    # Half a step of e4m3: 2^-4 of the value, 2^-10 among the subnormals; the quotient itself is good to 2 ulp.
    assert_near(q.double().reshape(groups.shape), ratio, (ratio.abs() * 2.0**-4).clamp_min(2.0**-10) * (1 + 2.0**-16))


@pytest.mark.parametrize("by_element", [True, False], ids=["atomics", "tl.histogram"])
def test_histogram(run: Run, by_element: bool) -> None:
    """Atomics of four CTAs on the same counters; tl.histogram makes them in shared memory first."""
    x, counts = integers(9, 0, 64, 900), torch.zeros(64, dtype=torch.int32)
    run(kernels.histogram_kernel, (4,), x, counts, 900, BINS=64, BLOCK=256, BY_ELEMENT=by_element, num_warps=4)
    assert torch.equal(counts, torch.bincount(x, minlength=64).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_reductions(run: Run, dtype: torch.dtype, warps: int) -> None:
    """Along lanes and along warps; of equal values the first is the argmax. Integers, so every sum is exact."""
    rows, cols = 16, 128
    x = integers(10, -50, 50, rows, cols).to(dtype)
    sums, highest, total = torch.zeros(rows, dtype=dtype), torch.zeros(cols, dtype=dtype), torch.zeros(1).int()
    argmax, argmin = torch.zeros(rows).int(), torch.zeros(cols).int()
    args = (x, sums, highest, argmax, argmin, total)
    run(kernels.reduce_kernel, (1,), *args, ROWS=rows, COLS=cols, num_warps=warps)
    assert torch.equal(sums, x.sum(1).to(dtype))
    assert torch.equal(highest, x.amax(0))
    assert (argmax.numpy() == x.numpy().argmax(1)).all()
    assert (argmin.numpy() == x.numpy().argmin(0)).all()
    assert total.item() == np.bitwise_xor.reduce(x.numpy().astype(np.int32), axis=None)


@pytest.mark.parametrize("warps", [1, 4])
def test_scans(run: Run, warps: int) -> None:
    """Running sums from both ends, and a linear recurrence whose values are exact: decays are 0, 1/2 or 1."""
    rows, cols = 2, 256
    x, decay = integers(11, -8, 8, rows, cols).float(), integers(12, 0, 3, rows, cols).float() / 2
    total, back, state = (unwritten(x) for _ in range(3))
    run(kernels.scan_kernel, (1,), x, decay, total, back, state, ROWS=rows, COLS=cols, num_warps=warps)
    assert torch.equal(total, x.cumsum(1))
    assert torch.equal(back, x.flip(1).cumsum(1).flip(1))
    exact, s = torch.zeros(rows, cols, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    for i in range(cols):
        s = exact[:, i] = decay[:, i].double() * s + x[:, i].double()
    # A decay of 1/2 keeps 24 bits of a value below 2^5: what is lost is half an ulp of that.
    assert_near(state, exact, 2.0**-18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64], ids=str)
def test_sort(run: Run, dtype: torch.dtype) -> None:
    """A bitonic network over lanes and warps, with equal values among the rest."""
    rows, cols = 2, 128
    x = (integers(13, -40, 40, rows, cols).long() * (1 << 33 if dtype == torch.int64 else 1)).to(dtype)
    up, down = unwritten(x), unwritten(x)
    run(kernels.sort_kernel, (1,), x, up, down, ROWS=rows, COLS=cols, num_warps=4)
    assert torch.equal(up, x.sort(1).values)
    assert torch.equal(down, x.sort(1, descending=True).values)


def philox(seed: int, counters: np.ndarray) -> np.ndarray:
    """The first word of Philox-4x32-10 for each counter, as in Salmon et al., Parallel random numbers (SC 2011)."""
    words = [counters.astype(np.uint64), *(np.zeros(len(counters), np.uint64) for _ in range(3))]
    key, mask = [seed & 0xFFFFFFFF, seed >> 32], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        high, low = (p >> np.uint64(32) for p in (first, second)), (p & mask for p in (first, second))
        (h0, h1), (l0, l1) = high, low
        words = [h1 ^ words[1] ^ np.uint64(key[0]), l1, h0 ^ words[3] ^ np.uint64(key[1]), l0]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return words[0].astype(np.uint32)


def test_dropout(run: Run) -> None:
    """The bits of Philox exactly; which elements are dropped, and the others divided within the 2 ulp of div.full."""
    n, p, seed = 700, 0.3, 987654321
    x = randn(14, n)
    y, bits = unwritten(x), torch.zeros(n, dtype=torch.int32)
    run(kernels.dropout_kernel, (3,), x, y, bits, seed, p, n, BLOCK=256, num_warps=4)
    expected = philox(seed, np.arange(n)).view(np.int32)
    assert (bits.numpy() == expected).all()
    # tl.rand folds the sign away and scales 31 bits to [0, 1).
    uniform = np.where(expected < 0, -expected.astype(np.int64) - 1, expected) * 4.6566127342e-10
    keep = torch.from_numpy(uniform > np.float32(p))
    assert torch.equal(y != 0, keep)
    exact = x.double() / (1 - np.float64(np.float32(p)))
    assert_near(y[keep], exact[keep], 4 * EPS32 * exact[keep].abs())


def test_gather_and_scatter(run: Run) -> None:
    """Rows to and from a permutation, and an index of its own for each element of a row."""
    rows, cols, block = 5, 200, 256
    x, index = randn(15, rows, cols), torch.randperm(rows, generator=torch.Generator().manual_seed(0)).int()
    out, scattered = unwritten(x), unwritten(x)
    run(kernels.gather_kernel, (rows,), x, index, out, scattered, cols, BLOCK=block, num_warps=4)
    assert torch.equal(out, x[index.long()].flip(1))
    assert torch.equal(scattered, x)


# Rows of maths_kernel's output: (what, float64 model, bound relative to the result, and absolute).
MATHS: list[tuple[str, Any, float, float]] = [
    ("exp", lambda x, y: x.exp(), 20 * EPS32, 0),  # ex2.approx of an exponent below 16, rounded before
    ("exp2", lambda x, y: x.exp2(), 2 * EPS32, 0),
    ("log", lambda x, y: x.abs().log(), 2 * EPS32, EPS32),
    ("log2", lambda x, y: x.abs().log2(), 2 * EPS32, EPS32),
    ("sin", lambda x, y: x.sin(), 2 * EPS32, 0),
    ("cos", lambda x, y: x.cos(), 2 * EPS32, 2.0**-26),
    ("sqrt", lambda x, y: x.abs().sqrt(), 2 * EPS32, 0),
    ("sqrt_rn", lambda x, y: x.abs().sqrt(), EPS32 / 2, 0),
    ("rsqrt", lambda x, y: x.abs().rsqrt(), 2 * EPS32, 0),
    ("erf", lambda x, y: x.erf(), 2 * EPS32, 0),
    ("sigmoid", lambda x, y: x.sigmoid(), 24 * EPS32, 0),
    ("x / y", lambda x, y: x / y, 2 * EPS32, 0),
    ("div_rn", lambda x, y: x / y, EPS32 / 2, 0),
    ("fma", lambda x, y: x * y + x, EPS32 / 2, 0),
    ("floor", lambda x, y: x.floor(), 0, 0),
    ("ceil", lambda x, y: x.ceil(), 0, 0),
]


def test_maths(run: Run) -> None:
    """Triton's functions, of libdevice and of the hardware, against float64 within the bounds of PTX and CUDA."""
    n = 256
    x, y = randn(16, n) * 3, randn(17, n)
    out = torch.full((len(MATHS), n), math.nan)
    run(kernels.maths_kernel, (2,), x, y, out, n, BLOCK=128, num_warps=4)
    for got, (name, model, relative, absolute) in zip(out, MATHS, strict=True):
        exact = model(x.double(), y.double())
        assert_near(got, exact, relative * exact.abs() + absolute, name)
    if isinstance(run, Emulated):
        assert "ex2.approx" in run.ptx
