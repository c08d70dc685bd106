"""rmsnorm_quantize, rmsnorm_quantize_transpose and rmsnorm_backward on every backend, bit by bit, against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backends import assert_same_bits, backend_params
from hypothesis import given, settings
from hypothesis import strategies as st
from rmsnorm_backends import EPS, NAMES, again, backward, forward
from test_quantize import DTYPES, as_tensor, expected_strides, make, oracle
from torch import Tensor

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.layout import BLOCK

KERNELS = [name for name in NAMES if name != "reference"]
KINDS = ["normal", "zero", "tiny", "subnormal", "huge", "infinite", "nan", "mixed"]
SHAPES = [(1, 1), (1, 128), (3, 129), (17, 256), (33, 130), (2, 1000), (0, 128), (5, 0), (0, 0)]
EMULATED = [(3, 129), (5, 0)]
OPTIONS = [{"pow2": pow2, "amax_floor": floor} for pow2 in (False, True) for floor in (0.0, 1e-2)]


def tree(values: np.ndarray) -> np.ndarray:
    """Sums over rows by halves of a power of two of columns, neighbours first; not -0."""
    width = 1
    while width < values.shape[1]:
        width *= 2
    values = np.pad(values, ((0, 0), (0, width - values.shape[1])))
    while values.shape[1] > 1:
        values = values[:, 0::2] + values[:, 1::2]
    return values[:, 0] + np.float32(0)


def norm(x: Tensor, weight: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """What is quantised, and rstd: FP32 in NumPy, whose root and quotient are rounded once."""
    values = x.float().numpy()
    with np.errstate(all="ignore"):
        mean = tree(values * values) / np.float32(max(1, values.shape[1]))
        rstd = np.float32(1) / np.sqrt(mean + np.float32(eps))
        return torch.from_numpy(values * rstd[:, None] * weight.float().numpy()), torch.from_numpy(rstd)


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A row at a time, in FP32."""
    g, values, r = (t.float().numpy() for t in (grad, x, rstd[:, None]))
    rows, cols = values.shape
    together = max(1, -(-rows // 512), min(32, -(-rows // 128)))
    with np.errstate(all="ignore"):
        n, weighted = values * r, g * weight.float().numpy()
        mean = tree(weighted * n) / np.float32(max(1, cols))
        dx = (weighted - n * mean[:, None]) * r
        if residual_grad is not None:
            dx = dx + residual_grad.float().numpy()
        sums = np.zeros((-(-rows // together), cols), np.float32)
        for row in range(rows):
            sums[row // together] = sums[row // together] + g[row] * n[row]
        return torch.from_numpy(dx).to(x.dtype), torch.from_numpy(tree(sums.T))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_codes(data: Tensor, scale: Tensor, values: Tensor, pow2: bool = False, amax_floor: float = 0.0) -> None:
    codes, expected = oracle(values, (1, BLOCK), pow2=pow2, eps=amax_floor)
    assert_same_bits(scale, expected, "scale")
    assert_same_bits(data[:, : codes.shape[1]], codes, "data")
    assert not data.view(torch.uint8)[:, codes.shape[1] :].any()
    assert data.is_contiguous()
    assert scale.stride() == expected_strides(scale.shape, (1, BLOCK))


def check_forward(
    name: str,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    eps: float = EPS,
    turned: bool = True,
    **options: Any,
) -> Tensor:
    """All of forward, and the transpose unless ``turned`` is False; returns rstd."""
    data, scale, rstd, summed = forward(name, x, weight, residual, eps=eps, **options)
    given = x
    if residual is not None:
        given = (x.float() + residual.float()).to(residual.dtype)
        assert_same_bits(summed, given, "residual")
        assert summed.is_contiguous()
    else:
        assert summed.shape == (0, x.shape[1])
    values, expected = norm(given, weight, eps)
    assert_same_bits(rstd, expected, "rstd")
    check_codes(data, scale, values, **options)
    if turned:
        check_codes(*again(name, given, weight, rstd, **options), values.t().contiguous(), **options)
    return rstd


def check_backward(name: str, *args: Tensor | None) -> None:
    for got, expected, what in zip(backward(name, *args), gradients(*args), ("dx", "dweight"), strict=True):
        assert_same_bits(got, expected, what)
        assert got.is_contiguous()


def cases() -> list[Any]:
    """Each backend with each shape, the emulator with a few: each kernel has to be compiled for it."""
    return [
        pytest.param(param.values[0], shape, marks=param.marks, id=f"{param.values[0]}-{shape}")
        for param in backend_params(NAMES)
        for shape in (EMULATED if param.values[0] == "emulator" else SHAPES)
    ]


def some_of(name: str, turn: int, choices: list[Any]) -> list[Any]:
    """All ``choices`` for the reference, which is quick, and one in turn for the others."""
    return choices if name in ("reference", "cuda") else [choices[turn % len(choices)]]


@pytest.mark.parametrize(("name", "shape"), cases())
def test_shapes(name: str, shape: tuple[int, int]) -> None:
    """Each dtype of each argument."""
    for i in some_of(name, sum(shape), [0, 1, 2]) if name == "emulator" else range(3):
        dtype = list(DTYPES)[i]
        other, third = (list(DTYPES)[(i + n) % 3] for n in (1, 2))
        x, weight = randn(*shape, dtype=dtype), randn(shape[1], seed=1, dtype=other)
        residual = randn(*shape, seed=2, dtype=third) if i else None
        rstd = check_forward(name, x, weight, residual, **OPTIONS[(i + sum(shape)) % 4])
        check_backward(name, randn(*shape, seed=3, dtype=third), x, weight, rstd, residual)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_values(name: str, kind: str) -> None:
    for dtype in some_of(name, KINDS.index(kind), list(DTYPES)) if name != "emulator" else [torch.bfloat16]:
        x, weight = as_tensor(make(kind, (9, 272)), dtype), as_tensor(make("normal", (1, 272), 1), dtype)[0]
        rstd = check_forward(name, x, weight, eps=1e-12 if kind == "tiny" else EPS)
        grad = as_tensor(make("normal" if kind == "mixed" else kind, (9, 272), 2), dtype)
        check_backward(name, grad, x, weight, rstd)


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_weights_that_are_not_finite(name: str) -> None:
    """They spoil their column alone, of the transpose too, whose padding is zero all the same."""
    x, weight = (randn(*shape, dtype=torch.bfloat16) for shape in ((9, 272), (272,)))
    weight[3], weight[271], weight[7] = float("inf"), float("-inf"), float("nan")
    check_forward(name, x, weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("name", backend_params(NAMES[:2]))
def test_a_row_that_is_not_finite_touches_no_other(name: str, value: float) -> None:
    """Nor does it say anything of itself: all is NaN, or 0 but for the infinity."""
    x, weight = randn(5, 300), randn(300, seed=1)
    spoilt = x.clone()
    spoilt[2, 7] = value
    clean, got = forward(name, x, weight), forward(name, spoilt, weight)
    for row in (0, 1, 3, 4):
        for part in range(3):
            assert_same_bits(got[part][row], clean[part][row], f"row {row}")
    codes = got[0][2].view(torch.uint8)
    others = torch.arange(300) != 7
    nan = 0x7F
    assert ((codes[others] == nan) if value != value else (codes[others] & nan == 0)).all()
    assert codes[7] & nan == (0 if value == 3e38 else nan)
    assert (got[1][2] == 1).all()


@pytest.mark.parametrize("name", backend_params(NAMES[:3]))
def test_negative_zeros(name: str) -> None:
    """Whose sum is 0, whatever is added to fill a power of two."""
    for cols in (4, 128):
        x, grad = torch.ones(2, cols), torch.full((2, cols), -0.0)
        check_backward(name, grad, x, torch.ones(cols), torch.ones(2))


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_strides(name: str) -> None:
    big, grads = randn(60, 600, dtype=torch.bfloat16), randn(60, 600, seed=1, dtype=torch.bfloat16)
    cuts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t[1:50:2, 1:270:3],
        lambda t: t[:, :40].t(),
        lambda t: t[:40, 3:140],
        lambda t: t[:1].expand(7, 600),
    ]
    for cut in cuts if name != "emulator" else cuts[:1]:
        x, g = cut(big), cut(grads)
        rstd = check_forward(name, x, randn(x.shape[1]), g)
        check_backward(name, g, x, randn(x.shape[1]), rstd, g.flip(0))


@pytest.mark.parametrize("name", backend_params(NAMES[1:3]))
def test_rows_beyond_registers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In chunks, read twice: the bits of a row in one piece. Some programs of backward have two rows."""
    from fastfp8.triton_kernels import rmsnorm

    monkeypatch.setattr(rmsnorm, "LONGEST", 256)
    x, residual, weight = randn(129, 600, dtype=torch.bfloat16), randn(129, 600, seed=1), randn(600, seed=2)
    rstd = check_forward(name, x, weight, residual, turned=False)
    check_backward(name, residual, x, weight, rstd, residual)


@pytest.mark.parametrize("name", backend_params(NAMES[1:3]))
def test_several_tiles_a_program(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of several rows and of one, whose scales are kept for some tiles; the last program has fewer."""
    from fastfp8.triton_kernels import rmsnorm

    monkeypatch.setattr(rmsnorm, "_PROGRAMS", 2)
    for rows, cols in ((130, 260), (35, 2050)):
        x, residual = randn(rows, cols), randn(rows, cols, seed=2, dtype=torch.bfloat16)
        check_forward(name, x, randn(cols, seed=1), residual, turned=False)


@pytest.mark.parametrize("name", backend_params(NAMES[:3]))
def test_gradient_of_the_weight_in_several_sums(name: str) -> None:
    for rows in (129,) if name == "triton_interpreter" else (128, 129, 300, 515):
        x, grad, weight = randn(rows, 24), randn(rows, 24, seed=1), randn(24, seed=2)
        check_backward(name, grad, x, weight, norm(x, weight)[1])


def test_rows_together() -> None:
    """Programs enough for a GPU, and at most 512 sums, none of them of no rows."""
    from fastfp8.reference.rmsnorm import rows_together

    for rows in (*range(1, 700), 4096, 5000, 16384, 16385, 1 << 20):
        together = rows_together(rows)
        sums = -(-rows // together)
        assert sums <= 512
        assert sums >= min(rows, 65)
        assert rows < 4096 or together >= 32


@pytest.mark.parametrize(("rows", "cols"), [(2, 7168), pytest.param(2, 20000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_hidden_size(name: str, rows: int, cols: int) -> None:
    x, weight = randn(rows, cols, dtype=torch.bfloat16), randn(cols, seed=1, dtype=torch.bfloat16)
    residual = randn(rows, cols, seed=2, dtype=torch.bfloat16)
    rstd = check_forward(name, x, weight, residual)
    check_backward(name, residual, x, weight, rstd)


@pytest.mark.parametrize("name", backend_params(NAMES[:2]))
def test_a_row_does_not_depend_on_the_batch(name: str) -> None:
    x, weight, grad = randn(40, 300), randn(300, seed=1), randn(40, 300, seed=2)
    data, scale, rstd, _ = forward(name, x, weight)
    dx, _ = backward(name, grad, x, weight, rstd)
    for row in (slice(0, 1), slice(17, 18), slice(33, 40)):
        alone = forward(name, x[row], weight)
        assert_same_bits(data[row], alone[0], "data")
        assert_same_bits(scale[row], alone[1], "scale")
        assert_same_bits(rstd[row], alone[2], "rstd")
        assert_same_bits(dx[row], backward(name, grad[row], x[row], weight, rstd[row])[0], "dx")


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_the_sum_is_that_of_float32(name: str) -> None:
    """Of a bfloat16 input and a float16 residual, which may fit float16 where the input alone does not."""
    x = torch.tensor([[70000.0, -70000.0, -1e-12]]).bfloat16()
    residual = torch.tensor([[-10000.0, 10000.0, 0.0]]).half()
    check_forward(name, x, randn(3), residual)
    assert forward(name, x, randn(3), residual)[3].isfinite().all()


def check_any_input(name: str, examples: settings) -> None:
    @examples
    @given(
        st.sampled_from(KINDS),
        st.tuples(st.integers(0, 20), st.integers(0, 600)),
        st.sampled_from(list(DTYPES)),
        st.sampled_from([None, *DTYPES]),
        st.sampled_from([1e-20, 1e-6, 1.0]),
        st.sampled_from(OPTIONS),
    )
    def run(
        kind: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        other: torch.dtype | None,
        eps: float,
        options: dict[str, Any],
    ) -> None:
        x, weight = as_tensor(make(kind, shape), dtype), randn(shape[1], seed=1)
        residual = None if other is None else as_tensor(make(kind, shape, 2), other)
        rstd = check_forward(name, x, weight, residual, eps, **options)
        check_backward(name, x, x, weight, rstd, residual)

    run()


@pytest.mark.parametrize("name", backend_params([n for n in NAMES if n != "emulator"]))
def test_any_input(name: str) -> None:
    check_any_input(name, settings(max_examples=10, deadline=None, derandomize=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_any_input_long(name: str) -> None:
    check_any_input(name, settings(max_examples=40 if name == "emulator" else 200, deadline=None))


@pytest.mark.parametrize("seed", range(1, 3))
@pytest.mark.parametrize("name", backend_params(["emulator"]))
def test_bits_under_other_timing(name: str, seed: int) -> None:
    x, weight, grad = (randn(*s, seed=seed, dtype=torch.bfloat16) for s in ((130, 272), (272,), (130, 272)))
    values, rstd = norm(x, weight)
    data, scale, *_ = forward(name, x, weight, seed=seed)
    check_codes(data, scale, values)
    check_codes(*again(name, x, weight, rstd, seed=seed), values.t().contiguous())
    for got, expected in zip(
        backward(name, grad, x, weight, rstd, seed=seed), gradients(grad, x, weight, rstd), strict=True
    ):
        assert_same_bits(got, expected, "gradient")


@pytest.mark.parametrize("name", backend_params(["triton_interpreter"]))
def test_the_padding_of_scales_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from fastfp8.triton_kernels import rmsnorm

    storage = torch.full((3 * 12,), -7.0)
    monkeypatch.setattr(rmsnorm, "empty_scale", lambda *_: storage.as_strided((10, 3), (1, 12)))
    _, scale, *_ = forward(name, randn(10, 300), randn(300))
    assert (scale > 0).all()
    scale.fill_(-7.0)
    assert (storage == -7.0).all()


class Exact:
    """RMSNorm in float64 with autograd."""

    def __init__(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
        self.leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
        given = self.leaves[0] if residual is None else self.leaves[0] + residual.double()
        mean = given.square().mean(1, keepdim=True)
        self.given, self.out = given, given / (mean + EPS).sqrt() * self.leaves[1]


def test_near_what_float64_computes() -> None:
    """One rounding to e4m3 is 2^-4 of a value at most, and 2^-10 of the block's largest where it is subnormal."""
    x, weight = randn(40, 1024), randn(1024, seed=1)
    got = fastfp8.rmsnorm_quantize(x, weight).quantized.dequantize().double()
    exact = Exact(x, weight).out.detach()
    largest = exact.abs().view(40, -1, BLOCK).amax(2, keepdim=True).expand(-1, -1, BLOCK).reshape(exact.shape)
    assert ((got - exact).abs() <= exact.abs() * 2.0**-4 * (1 + 1e-5) + largest / 448 * 2.0**-10).all()


@pytest.mark.parametrize("cols", [7, 300, 1024])
def test_gradients_are_those_of_float64(cols: int) -> None:
    x, weight, grad, up = (randn(*s, seed=i) for i, s in enumerate([(200, cols), (cols,), (200, cols), (200, cols)]))
    exact = Exact(x, weight)
    loss = (exact.out * grad.double()).sum() + (exact.given * up.double()).sum()
    expected = torch.autograd.grad(loss, exact.leaves)
    rstd = fastfp8.rmsnorm_quantize(x, weight).rstd
    got = fastfp8.rmsnorm_backward(grad, x, weight, rstd, up)
    for name, ours, theirs in zip(("dx", "dweight"), got, expected, strict=True):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < 1e-6, name


class NormedLinear(torch.autograd.Function):
    """A pre-norm and the Linear behind it that keep a residual in BF16 and a number a row: all else is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, gain: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed = fastfp8.rmsnorm_quantize(x, gain, EPS, residual=residual)
        assert normed.residual is not None
        ctx.save_for_backward(normed.residual, normed.rstd, gain, weight)
        return fastfp8.gemm(normed.quantized, fastfp8.quantize(weight, (BLOCK, BLOCK))), normed.residual

    @staticmethod
    def backward(ctx: Any, dy: Tensor, residual_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        given, rstd, gain, weight = ctx.saved_tensors
        dy8, dy8_t = fastfp8.quantize_both(dy, pad=True)
        grad = fastfp8.gemm(dy8, fastfp8.quantize(weight.t(), (BLOCK, BLOCK)))
        x8_t = fastfp8.rmsnorm_quantize_transpose(given, gain, rstd, pad=True)
        dx, dgain = fastfp8.rmsnorm_backward(grad, given, gain, rstd, residual_grad)
        return dx, dx, dgain, fastfp8.gemm(dy8_t, x8_t, out_dtype=torch.float32)


def test_a_layer_trains_through_the_three() -> None:
    """FP8 leaves some per cent of error in each gradient; a wrong formula would leave all of it."""
    x, residual = (randn(130, 256, seed=i, dtype=torch.bfloat16).requires_grad_() for i in range(2))
    gain, weight = (1 + randn(256, seed=2) / 4).requires_grad_(), (randn(128, 256, seed=3) / 16).requires_grad_()
    up, up_residual = randn(130, 128, seed=4), randn(130, 256, seed=5)
    leaves = (x, residual, gain, weight)
    y, h = NormedLinear.apply(*leaves)
    got = torch.autograd.grad((y.float() * up).sum() + (h.float() * up_residual).sum(), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    given = exact[0] + exact[1]
    out = given / (given.square().mean(1, keepdim=True) + EPS).sqrt() * exact[2] @ exact[3].t()
    expected = torch.autograd.grad((out * up).sum() + (given * up_residual).sum(), exact)
    for ours, theirs in zip(got, expected, strict=True):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < 0.06


@pytest.mark.parametrize("m", [128, 130, 0])
def test_what_the_api_puts_together(m: int) -> None:
    x, weight, residual = randn(m, 96), randn(96, seed=1), randn(m, 96, seed=2, dtype=torch.bfloat16)
    plain = fastfp8.rmsnorm_quantize(x, weight)
    assert plain.residual is None
    assert plain.transposed is None
    options: dict[str, Any] = {"pow2": True, "amax_floor": 1e-4}
    full = fastfp8.rmsnorm_quantize(x, weight, 1e-5, residual=residual, transpose=True, **options)
    padded = fastfp8.rmsnorm_quantize(x, weight, 1e-5, residual=residual, transpose=True, pad=True, **options)
    assert full.residual is not None
    alone = fastfp8.rmsnorm_quantize_transpose(full.residual, weight, full.rstd, **options)
    values, rstd = norm(full.residual, weight, 1e-5)
    assert_same_bits(full.rstd, rstd, "rstd")
    for got, of in ((full.quantized, values), (full.transposed, values.t()), (alone, values.t())):
        assert isinstance(got, ScaledTensor)
        expected = fastfp8.quantize(of, pow2=True, eps=1e-4)
        assert_same_bits(got.data, expected.data, "data")
        assert_same_bits(got.scale, expected.scale, "scale")
        assert got.block == (1, BLOCK)
    assert padded.transposed is not None
    assert padded.transposed.shape == (96, -(-m // 16) * 16)


def test_chunks_of_the_reference_agree_with_the_whole() -> None:
    x, weight = as_tensor(make("mixed", (200, 2048)), torch.bfloat16), randn(2048)
    whole = forward("reference", x, weight, x)
    for first in range(0, 200, 60):
        rows = slice(first, first + 60)
        for got, part, what in zip(whole, forward("reference", x[rows], weight, x[rows]), "abcd", strict=True):
            assert_same_bits(got[rows], part, f"{what} from row {first}")


@pytest.mark.parametrize("name", backend_params(["triton_interpreter"]))
def test_sm_89_gets_the_sticky_bit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from recorder import Recorder

    from fastfp8.triton_kernels import rmsnorm as module

    calls: dict[str, Callable[[], Any]] = {
        "rmsnorm_quantize_kernel": lambda: module.rmsnorm_quantize(*(randn(5, 40), randn(40)), EPS, None, False, 0.0),
        "rmsnorm_quantize_transpose_kernel": lambda: module.rmsnorm_quantize_transpose(
            randn(5, 40), randn(40), randn(5), False, 0.0
        ),
    }
    for kernel, call in calls.items():
        recorder = Recorder(getattr(module, kernel))
        monkeypatch.setattr(module, kernel, recorder)
        for capability in ((8, 9), (9, 0)):
            monkeypatch.setattr(module, "require_fp8", lambda op, device, found=capability: found)
            call()
            assert recorder.kwargs["STICKY"] == (capability == (8, 9))
