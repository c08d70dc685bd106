"""swiglu_backward_quantize and FP8 gates as torch sees them; tests/test_registration.py has the others."""

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
from fastfp8 import ScaledTensor, SwiGluGradients, presets

OPS = torch.ops.fastfp8


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cases() -> list[Any]:
    """Of groups such that all rows are in one and all blocks of the transpose are used: the rest has no values."""
    backward, word = OPS.swiglu_backward_quantize.default, torch.zeros(1, dtype=torch.int32)
    t, none = fastfp8.quantize(randn(5, 512)), fastfp8.quantize(randn(0, 256))
    options = (randn(5), 7.0)
    found = {
        "defaults": (backward, (randn(5, 256), randn(5, 512))),
        "fp8": (backward, (randn(5, 256, dtype=torch.bfloat16), t.data, t.scale, *options, None, word, True, 1e-4)),
        "dense": (backward, (randn(5, 256), t.data, t.scale, None, None, None, None, False, 0.0, True)),
        "strided": (backward, (randn(128, 40).t()[::2], randn(256, 40).t()[::2], None, randn(1).expand(20))),
        "groups": (backward, (randn(15, 128), randn(15, 256), None, randn(15), None, ends(5, 9, 15), word)),
        "no-rows": (backward, (randn(0, 128), none.data, none.scale, randn(0))),
        "no-columns": (backward, (randn(3, 0), randn(3, 0), None, randn(3))),
        "gates": (OPS.swiglu_quantize.default, (t.data, None, 7.0, True, 0.0, t.scale)),
        "preset": (OPS.quantize.default, (randn(5, 300), (1, 128), True, 1e-4, presets.DEEPGEMM.rules.text)),
    }
    return [pytest.param(*case, id=name) for name, case in found.items()]


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


def mlp_backward(grad: Tensor, gate_up: ScaledTensor, weight: Tensor, offsets: Tensor) -> tuple[Any, ...]:
    """With the error word; of groups without what is undefined: the first block is that of the first group."""
    dense = fastfp8.swiglu_backward_quantize(grad, gate_up, weight, 7.0, pad=True)
    found = fastfp8.swiglu_backward_quantize(grad, gate_up, weight, offsets=offsets, eps=1e-4)
    first = found.activation.data[:, :128].clone(), found.gate_up_t.data[:, :128].clone(), found.padded_offsets
    h = fastfp8.swiglu_quantize(gate_up, weight), fastfp8.quantize(grad, preset=presets.DEEPGEMM)
    dw = fastfp8.gemm(dense.gate_up_t, dense.activation, out_dtype=torch.float32)
    return h, dense.gate_up, dense.weight, dw, found.gate_up, found.weight, *first


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "automatic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend: str, dynamic: bool | None) -> None:
    """Bit for bit equal to eager, in one graph."""
    function = compiled(mlp_backward, backend, dynamic)
    for m in (5, 16, 130):
        gate_up = fastfp8.quantize(randn(m, 256))
        args = randn(m, 128, dtype=torch.bfloat16), gate_up, randn(m), ends(2, 2, m)
        assert same(function(*args), mlp_backward(*args))


def test_dynamic_shapes_do_not_recompile() -> None:
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def backward(grad: Tensor, gate_up: Tensor, offsets: Tensor) -> SwiGluGradients:
        return fastfp8.swiglu_backward_quantize(grad, gate_up, offsets=offsets)

    torch._dynamo.reset()
    once = torch.compile(backward, backend=count, fullgraph=True, dynamic=True)
    for m in (5, 8, 130, 300):
        once(randn(m, 128), randn(m, 256), ends(1, 1, m))
    assert graphs == 1


def test_backward_warns_and_gives_nothing() -> None:
    grad = randn(5, 128).requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        OPS.swiglu_backward_quantize(grad, randn(5, 256))[3].sum().backward()
    assert any("fastfp8::swiglu_backward_quantize" in str(w.message) for w in caught)
    assert grad.grad is None
