"""The ops of routing and permutation as torch sees them: tests/test_registration.py has the others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from opcheck import opcheck
from test_registration import compiled, randn, same, split
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfp8
from fastfp8 import Routing, RowMap, ScaledTensor

OPS = torch.ops.fastfp8


def indices(tokens: int = 5) -> Tensor:
    """Two of four experts for each token, so that every row is used: the others have no values to compare."""
    return torch.stack([torch.arange(tokens) % 4, (torch.arange(tokens) * 3 + 1) % 4], 1)


def rows(tokens: int = 5) -> Tensor:
    return fastfp8.row_map(indices(tokens), 4).rows


def route_args(logits: Tensor, *options: Any) -> tuple[Any, ...]:
    """With all that the schema has behind the star."""
    defaults = (2, 1, 1, "sigmoid", 1.0)
    return (logits, randn(logits.shape[1]), *options, *defaults[len(options) :])


def routed(score: str = "sigmoid") -> tuple[Tensor, Tensor]:
    got = fastfp8.route(randn(5, 12), randn(12), top_k=2, score=score)
    return got.topk_idx, got.scores


def scaled(tokens: int, cols: int) -> tuple[Tensor, Tensor]:
    t = fastfp8.quantize(randn(tokens, cols))
    return t.data, t.scale


WORD = torch.zeros(1, dtype=torch.int32)
CASES = {
    OPS.route.default: {
        "defaults": route_args(randn(5, 12)),
        "limited": route_args(randn(5, 12).bfloat16(), 4, 4, 2, "softmax", 2.5),
        "strided": route_args(randn(12, 5).t(), 3),
        "no-tokens": route_args(randn(0, 12)),
    },
    OPS.route_backward.default: {
        "both": (randn(5, 2), randn(5, 12), *routed(), "sigmoid", 1.0, torch.float32),
        "weights": (randn(1, 2).expand(5, 2), None, *routed("softmax"), "softmax", 2.5, torch.bfloat16),
        "scores": (None, randn(5, 12), *routed(), "sigmoid", 1.0, torch.float32),
    },
    OPS.row_map.default: {
        "defaults": (indices(), 4, None),
        "error-word": (indices().int(), 7, WORD),
        "no-tokens": (indices(0), 4, None),
    },
    OPS.permute.default: {
        "float32": (randn(5, 300), rows()),
        "requires-grad": (randn(5, 300).bfloat16().requires_grad_(), rows()),
        "strided": (randn(300, 5).half().t(), rows()),
        "no-tokens": (randn(0, 300), rows(0)),
        "no-columns": (randn(5, 0), rows()),
    },
    OPS.permute_scaled.default: {"defaults": (*scaled(5, 300), rows()), "no-tokens": (*scaled(0, 300), rows(0))},
    OPS.permute_quantize.default: {
        "defaults": (randn(5, 300), rows()),
        "options": (randn(5, 300).bfloat16(), rows(), True, 1e-4),
        "no-tokens": (randn(0, 300), rows(0)),
    },
    OPS.unpermute.default: {
        "defaults": (randn(10, 300), None, rows()),
        "weights": (randn(10, 300).bfloat16(), None, rows(), randn(5, 2), torch.float32),
        "scaled": (*scaled(10, 300), rows(), randn(5, 2)),
        "requires-grad": (randn(10, 300).requires_grad_(), None, rows(), randn(5, 2).requires_grad_(), torch.float32),
        "requires-grad-alone": (randn(10, 300).requires_grad_(), None, rows()),
        "no-tokens": (randn(0, 300), None, rows(0)),
    },
    OPS.unpermute_backward.default: {
        "defaults": (randn(5, 300), randn(10, 300), rows(), randn(5, 2)),
        "mixed": (randn(1, 300).expand(5, 300), randn(300, 10).half().t(), rows(), randn(5, 2)),
        "no-tokens": (randn(0, 300), randn(0, 300), rows(0), randn(0, 2)),
    },
}
every_case = pytest.mark.parametrize(
    ("op", "args"),
    [pytest.param(op, args, id=f"{op._opname}-{name}") for op, cases in CASES.items() for name, args in cases.items()],
)


@every_case
def test_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    opcheck(op, *split(op, args))


def test_opcheck_of_route_with_a_gradient() -> None:
    """Without test_aot_dispatch_dynamic, which sums the outputs, integers with floats, and so fails; TestCompile."""
    args = split(OPS.route.default, route_args(randn(5, 12).requires_grad_()))
    opcheck(OPS.route.default, *args, utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@every_case
def test_fake(op: Any, args: tuple[Any, ...]) -> None:
    given, named = split(op, args)
    real = op(*given, **named)
    with FakeTensorMode() as mode:
        given = tuple(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in given)
        fake = op(*given, **named)
    pairs = zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]
    for got, want in pairs:
        assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
        assert got.stride() == want.stride()


def experts(x: Tensor, logits: Tensor, bias: Tensor, w: ScaledTensor) -> tuple[Tensor, Routing, RowMap]:
    """A whole mixture: route, permute and quantise, the experts' product, back."""
    got = fastfp8.route(logits, bias, top_k=2, groups=2, top_groups=1, score="softmax")
    tokens, where = fastfp8.permute_quantize(x, got.topk_idx, w.shape[0])
    y = fastfp8.grouped_gemm(tokens, w, where.offsets)
    return fastfp8.unpermute(y, where, got.topk_weights, out_dtype=torch.float32), got, where


def loss(x: Tensor, logits: Tensor, bias: Tensor) -> Tensor:
    got = fastfp8.route(logits, bias, top_k=2)
    y, where = fastfp8.permute(x, got.topk_idx, logits.shape[1])
    assert isinstance(y, Tensor)
    out = fastfp8.unpermute(y.square(), where, got.topk_weights, out_dtype=torch.float32)
    return out.sum() + fastfp8.balance_loss(got.scores, got.topk_idx, alpha=3.0)


@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
class TestCompile:
    """Bit for bit equal to eager, in one graph."""

    def test_experts(self, backend: str, dynamic: bool | None) -> None:
        function = compiled(experts, backend, dynamic)
        w = fastfp8.quantize(randn(4, 24, 304), (128, 128))
        for tokens in (5, 8, 130):
            args = randn(tokens, 304, dtype=torch.bfloat16), randn(tokens, 4), randn(4), w
            got, expected = function(*args), experts(*args)
            assert type(got[1]) is Routing
            assert same(got, expected)

    def test_gradients(self, backend: str, dynamic: bool | None) -> None:
        function = compiled(loss, backend, dynamic)
        for tokens in (5, 8, 130):
            leaves = [randn(tokens, n).requires_grad_() for n in (300, 4)]
            got = torch.autograd.grad(function(*leaves, randn(4)), leaves)
            expected = torch.autograd.grad(loss(*leaves, randn(4)), leaves)
            assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_fake_checks_its_arguments() -> None:
    with pytest.raises(RuntimeError, match=r"fastfp8\.permute: argument 'rows': expected dtype torch.int32"):
        OPS.permute(torch.empty(3, 128, device="meta"), torch.empty(3, 2, dtype=torch.int64, device="meta"))


def test_meta_device() -> None:
    got = fastfp8.route(torch.empty(5, 8, device="meta"), torch.empty(8, device="meta"), top_k=2)
    rows, where = fastfp8.permute(torch.empty(5, 128, device="meta"), got.topk_idx, 8)
    assert (rows.shape, where.offsets.shape) == ((10, 128), (8,))
    assert fastfp8.unpermute(rows, where, got.topk_weights).shape == (5, 128)


@pytest.mark.parametrize("op", ["permute_quantize", "permute_scaled", "unpermute_backward", "route_backward"])
def test_ops_without_a_gradient_warn(op: str) -> None:
    data, scale = scaled(5, 384)
    x = scale.requires_grad_() if op == "permute_scaled" else randn(5, 384).requires_grad_()
    out = {
        "permute_quantize": lambda: OPS.permute_quantize(x, rows())[1],
        "permute_scaled": lambda: OPS.permute_scaled(data, x, rows())[1],
        "unpermute_backward": lambda: OPS.unpermute_backward(x, randn(10, 384), rows(), randn(5, 2))[1],
        "route_backward": lambda: OPS.route_backward(x[:, :2], None, *routed(), "sigmoid", 1.0, torch.float32),
    }[op]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out.sum().backward()
    assert any(f"fastfp8::{op}" in str(w.message) and "autograd" in str(w.message) for w in caught)


def test_a_linear_chain_is_differentiable_twice() -> None:
    """permute, and unpermute without weights, are the gradients of each other."""
    where = fastfp8.row_map(indices(), 4)
    x = randn(5, 24).requires_grad_()
    y = fastfp8.unpermute(fastfp8.permute(x, where)[0], where, out_dtype=torch.float32)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 48 * x.detach())
