"""The ops with RMSNorm, and dequantize with a residual, as torch sees them; others are in test_registration.py."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from opcheck import opcheck
from test_registration import compiled, randn, same
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfp8
from fastfp8 import Normalized

OPS = torch.ops.fastfp8
BF16 = torch.bfloat16


def scaled(*shape: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    t = fastfp8.quantize(randn(*shape))
    return t.data, t.scale, t.block


CASES = {
    OPS.rmsnorm_quantize.default: {
        "defaults": (randn(5, 300), randn(300)),
        "all": (randn(5, 300).half(), randn(300), 1e-5, randn(5, 300, dtype=BF16), True, 1e-4),
        "strided": (randn(300, 5).t(), randn(300), 1e-6, randn(1, 300).expand(5, 300)),
        "no-rows": (randn(0, 256), randn(256), 1e-6, randn(0, 256)),
        "no-columns": (randn(3, 0), randn(0)),
    },
    OPS.rmsnorm_quantize_transpose.default: {
        "defaults": (randn(5, 300), randn(300), randn(5)),
        "all": (randn(300, 130).t().bfloat16(), randn(300), randn(130), True, 1e-4),
        "no-rows": (randn(0, 256), randn(256), randn(0)),
    },
    OPS.rmsnorm_backward.default: {
        "defaults": (randn(5, 300), randn(5, 300, dtype=BF16), randn(300), randn(5)),
        "residual": (randn(300, 5).t(), randn(5, 300), randn(300), randn(5), randn(1, 300).expand(5, 300).bfloat16()),
        "no-rows": (randn(0, 256), randn(0, 256), randn(256), randn(0)),
    },
    OPS.dequantize.default: {
        "add": (*scaled(5, 300), torch.float32, randn(300, 5).t().bfloat16()),
        "add-to-a-stack": (*scaled(3, 5, 300), BF16, randn(1, 5, 300).expand(3, 5, 300)),
    },
}
every_case = pytest.mark.parametrize(
    ("op", "args"),
    [pytest.param(op, args, id=f"{op._opname}-{name}") for op, cases in CASES.items() for name, args in cases.items()],
)


@every_case
def test_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    opcheck(op, args)


@every_case
def test_fake(op: Any, args: tuple[Any, ...]) -> None:
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
    for got, want in zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]:
        assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
        assert got.stride() == want.stride()


def normed(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Normalized, Normalized, Tensor]:
    first = fastfp8.rmsnorm_quantize(x, weight)
    second = fastfp8.rmsnorm_quantize(x, weight, 1e-5, residual=residual, transpose=True, pow2=True)
    return first, second, fastfp8.dequantize(second.quantized, torch.float32, add=residual)


def gradients(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Any, ...]:
    again = fastfp8.rmsnorm_quantize_transpose(x, weight, rstd, pad=True)
    return again, *fastfp8.rmsnorm_backward(grad, x, weight, rstd), *fastfp8.rmsnorm_backward(grad, x, weight, rstd, x)


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend: str, dynamic: bool | None) -> None:
    """Bit for bit equal to eager, in one graph."""
    forward, backward = (
        compiled(normed, backend, dynamic),
        torch.compile(gradients, backend=backend, fullgraph=True, dynamic=dynamic),
    )
    for m in (5, 8, 130):
        args = randn(m, 304, dtype=BF16), randn(304), randn(m, 304)
        got, expected = forward(*args), normed(*args)
        for g, e in zip(got[:2], expected[:2], strict=True):
            assert type(g) is Normalized
            assert all(g_part is e_part is None or same(g_part, e_part) for g_part, e_part in zip(g, e, strict=True))
        assert same(got[2], expected[2])
        of = randn(m, 304), args[0], args[1], randn(m)
        assert same(backward(*of), gradients(*of))


def test_dynamic_shapes_do_not_recompile() -> None:
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(normed, backend=count, fullgraph=True, dynamic=True)
    for m in (5, 8, 130, 257):
        function(randn(m, 304), randn(304), randn(m, 304))
    assert graphs == 1


def test_meta_device() -> None:
    x, weight = torch.empty(5, 304, device="meta", dtype=BF16), torch.empty(304, device="meta")
    got = fastfp8.rmsnorm_quantize(x, weight, residual=x.float(), transpose=True, pad=True)
    assert got.residual is not None
    assert got.transposed is not None
    assert (got.quantized.shape, got.rstd.shape, got.residual.dtype) == ((5, 304), (5,), torch.float32)
    assert got.transposed.shape == (304, 16)
    dx, dweight = fastfp8.rmsnorm_backward(x, x, weight, got.rstd)
    assert (dx.shape, dx.dtype, dweight.shape, dweight.dtype) == ((5, 304), BF16, (304,), torch.float32)


@pytest.mark.parametrize("op", ["rmsnorm_quantize", "rmsnorm_quantize_transpose", "rmsnorm_backward", "dequantize"])
def test_backward_warns_and_gives_nothing(op: str) -> None:
    x, weight, rstd = randn(5, 304).requires_grad_(), randn(304), randn(5)
    out = {
        "rmsnorm_quantize": lambda: OPS.rmsnorm_quantize(x, weight)[2],
        "rmsnorm_quantize_transpose": lambda: OPS.rmsnorm_quantize_transpose(x, weight, rstd)[1],
        "rmsnorm_backward": lambda: OPS.rmsnorm_backward(x, x, weight, rstd)[0],
        "dequantize": lambda: OPS.dequantize(*scaled(5, 304), torch.float32, x),
    }[op]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out.sum().backward()
    assert any(f"fastfp8::{op}" in str(w.message) and "autograd" in str(w.message) for w in caught)
    assert x.grad is None
