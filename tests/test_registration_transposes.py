"""The ops that write a transpose, as torch sees them; tests/test_registration.py has the others."""

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
from fastfp8 import ScaledTensor

OPS = torch.ops.fastfp8
SHAPES = [(5, 300), (128, 256), (130, 17), (0, 256), (3, 0)]


def word() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cases() -> list[Any]:
    """Of groups such that all rows are in one and all blocks of the transpose are used: the rest has no values."""
    both, both_grouped = OPS.quantize_both.default, OPS.quantize_grouped_both.default
    turn, turn_grouped = OPS.requantize_transpose.default, OPS.requantize_transpose.grouped
    found: list[tuple[str, Any, tuple[Any, ...]]] = []
    for shape, dtype in zip(SHAPES, [torch.float32, torch.bfloat16, torch.float16] * 2, strict=False):
        x = randn(*shape, dtype=dtype)
        t = fastfp8.quantize(x)
        found += [
            (f"{shape}", both, (x, True)),
            (f"{shape}", turn, (t.data, t.scale)),
            (f"{shape}", both_grouped, (x, ends(shape[0]), word(), False, 1e-4)),
            (f"{shape}", turn_grouped, (t.data, t.scale, ends(shape[0]), word())),
        ]
    wide = randn(6, 600)
    found += [("transposed", both, (wide.t(),)), ("strided", both, (wide[::2, ::2],))]
    x = randn(15, 40)
    t = fastfp8.quantize(x)
    found += [
        ("groups", both_grouped, (x, ends(5, 9, 15), None)),
        ("groups", turn_grouped, (t.data, t.scale, ends(5, 9, 15), None)),
    ]
    return [pytest.param(op, args, id=f"{op.name()}-{name}") for name, op, args in found]


@pytest.mark.parametrize(("op", "args"), cases())
class TestOne:
    def test_opcheck(self, op: Any, args: tuple[Any, ...]) -> None:
        opcheck(op, args)

    def test_fake_metadata(self, op: Any, args: tuple[Any, ...]) -> None:
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
        for got, want in zip(fake, real, strict=True):
            assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
            assert got.stride() == want.stride()
            assert got.storage_offset() == want.storage_offset()


def test_meta_device() -> None:
    first, second, offsets = fastfp8.quantize_grouped_both(
        torch.empty(5, 304, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    )
    assert (first.shape, second.shape, offsets.shape) == ((5, 304), (304, 256), (2,))
    assert fastfp8.requantize_transpose(first, pad=True).shape == (304, 16)
    assert {t.device.type for t in (first, second, offsets)} == {"meta"}


def linear_gradient(x: Tensor, dy: Tensor) -> tuple[ScaledTensor, ScaledTensor, Tensor]:
    """Wgrad of any number of tokens, the input saved by row."""
    x8, x8_t = fastfp8.quantize_both(x, pow2=True)
    _, dy8_t = fastfp8.quantize_both(dy, pad=True)
    return x8, x8_t, fastfp8.gemm(dy8_t, fastfp8.requantize_transpose(x8, pad=True), out_dtype=torch.float32)


def grouped_operands(x: Tensor, offsets: Tensor) -> tuple[ScaledTensor, Tensor, Tensor, Tensor, Tensor]:
    """Without what is undefined: the first block is that of the first group."""
    x8, x8_t, padded = fastfp8.quantize_grouped_both(x, offsets, eps=1e-4)
    again, padded_again = fastfp8.requantize_transpose(x8, offsets)
    return x8, x8_t.data[:, :128].clone(), padded, again.data[:, :128].clone(), padded_again


@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
class TestCompile:
    """Bit for bit equal to eager, in one graph."""

    def test_linear_gradient(self, backend: str, dynamic: bool | None) -> None:
        function = compiled(linear_gradient, backend, dynamic)
        for m in (5, 16, 130):
            args = randn(m, 48, dtype=torch.bfloat16), randn(m, 24)
            assert same(function(*args), linear_gradient(*args))

    def test_grouped_operands(self, backend: str, dynamic: bool | None) -> None:
        """With the error word, which the ops say they may write."""
        function = compiled(grouped_operands, backend, dynamic)
        for m in (5, 16, 130):
            args = randn(m, 40, dtype=torch.bfloat16), ends(2, 2, m)
            assert same(function(*args), grouped_operands(*args))


def quantized_and_turned(x: Tensor, offsets: Tensor) -> tuple[Any, ...]:
    x8, x8_t = fastfp8.quantize_both(x)
    return x8_t, fastfp8.requantize_transpose(x8, pad=True), fastfp8.quantize_grouped_both(x, offsets)


@pytest.mark.parametrize(
    ("function", "tokens"),
    [
        (quantized_and_turned, (5, 8, 130, 2, 300)),  # fewer tokens than groups too
        (grouped_operands, (5, 8, 130, 2, 300)),
        (lambda x, offsets: linear_gradient(x, x), (130, 257, 300, 333)),  # a sum of one block is a graph of its own
    ],
    ids=["quantize", "grouped", "Wgrad"],
)
def test_dynamic_shapes_do_not_recompile(function: Any, tokens: tuple[int, ...]) -> None:
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    once = torch.compile(function, backend=count, fullgraph=True, dynamic=True)
    for m in tokens:
        once(randn(m, 48), ends(1, 1, m))
    assert graphs == 1


@pytest.mark.parametrize("op", ["quantize_both", "quantize_grouped_both", "requantize_transpose"])
def test_backward_warns_and_gives_nothing(op: str) -> None:
    x = randn(5, 304).requires_grad_()
    t = fastfp8.quantize(x.detach())
    scale = torch.empty_strided(t.scale.shape, t.scale.stride()).copy_(t.scale).requires_grad_()
    leaf, out = {
        "quantize_both": lambda: (x, OPS.quantize_both(x)[1]),
        "quantize_grouped_both": lambda: (x, OPS.quantize_grouped_both(x, ends(5), None)[3]),
        "requantize_transpose": lambda: (scale, OPS.requantize_transpose(t.data, scale)[1]),
    }[op]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out.sum().backward()
    assert any(f"fastfp8::{op}" in str(w.message) and "autograd" in str(w.message) for w in caught)
    assert leaf.grad is None


def test_input_that_requires_grad() -> None:
    """The same bits, on the CPU computed without a graph."""
    x = randn(5, 300)
    for function in (fastfp8.quantize_both, lambda x: fastfp8.quantize_grouped_both(x, ends(5))[:2]):
        for tracked, plain in zip(function(x.clone().requires_grad_()), function(x), strict=True):
            assert same((tracked.data.detach(), tracked.scale.detach()), (plain.data, plain.scale))
