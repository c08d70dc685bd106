"""Weights quantised once an optimizer step, gradients accumulated in FP32, and FSDP2 around FP8 layers."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import fsdp_ranks
import pytest
import torch
from linear_support import BF16, FP32, ROW, SQUARE, QuantizeCalls, gradients, normal_linear, sqnr
from rank_pool import Ranks
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs

import fastfp8
import fastfp8.nn
from fastfp8 import Format, Recipe
from fastfp8.optim import AdamW


def loss_of(model: nn.Module, seed: int, features: int) -> Tensor:
    x = torch.randn(20, features, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean()  # type: ignore[no-any-return]


def stack(dtype: torch.dtype = FP32, k: int = 64) -> nn.Sequential:
    return nn.Sequential(normal_linear(k, 96, dtype=dtype), nn.Tanh(), normal_linear(96, 48, seed=1, dtype=dtype))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, features: int = 64) -> list[int]:
    """Two micro-batches a step; the number of quantisations of weights in each micro-batch and step."""
    counts = []
    for step in range(steps):
        optimizer.zero_grad()
        for batch in range(2):
            with QuantizeCalls() as calls:
                loss_of(model, 2 * step + batch, features).backward()
            counts.append(calls.of_weights)
        with QuantizeCalls() as calls:
            optimizer.step()
        counts.append(calls.of_weights)
    return counts


def state(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in model.parameters()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    # Leaves the version of a parameter as it was.
    "fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adamw": lambda p: AdamW(p, lr=1e-2),
    "emits": lambda p: AdamW(p, lr=1e-2, emit_fp8=True),
}


@pytest.mark.parametrize("features", [64, 50], ids=["fitting", "padded"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shared_weights_are_quantised_once_a_step_and_change_no_bit(name: str, features: int) -> None:
    plain, shared = stack(k=features), stack(k=features)
    plain_optimizer, optimizer = (OPTIMIZERS[name](m.parameters()) for m in (plain, shared))
    fastfp8.nn.share_weights(shared, optimizer)
    # Both weights in forward, and, transposed, in backward: that of the first serves nobody's gradient.
    assert train(plain, plain_optimizer, features=features) == [3, 3, 0] * 3
    by_hand = 2 if name != "emits" else int(features == 50)
    assert train(shared, optimizer, features=features) == [0, 0, by_hand] * 3
    assert equal(state(plain), state(shared))


def test_an_optimizer_with_masters_emits_weights_of_theirs() -> None:
    model = stack(BF16)
    optimizer = AdamW(model.parameters(), lr=1e-2, emit_fp8=True)
    fastfp8.nn.share_weights(model, optimizer)
    train(model, optimizer, 1)
    weight = model[0].weight
    w8, w8_t = model[0]._fp8_weight()
    exact = fastfp8.quantize(optimizer.state[weight]["master"], SQUARE)
    assert torch.equal(w8.dequantize(), exact.dequantize())
    assert not torch.equal(w8.dequantize(), fastfp8.quantize(weight.detach(), SQUARE).dequantize())
    assert w8_t is not None
    assert torch.equal(w8_t.dequantize(), w8.dequantize().t())
    # Of scales that the optimizer does not write, the module makes its own.
    model[0].set_recipe(Recipe(weight=Format(SQUARE, pow2=True)))
    assert torch.equal(
        model[0]._fp8_weight()[0].dequantize(), fastfp8.quantize(weight.detach(), SQUARE, pow2=True).dequantize()
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_write_after_a_step_is_seen_whoever_quantised(name: str) -> None:
    """As an average of the parameters is, put in their place for a while."""
    layer, other, x = normal_linear(64, 64), normal_linear(64, 64, seed=1), torch.randn(4, 64)
    optimizer = OPTIMIZERS[name](layer.parameters())
    shared = fastfp8.nn.share_weights(layer, optimizer)
    layer(x).sum().backward()
    optimizer.step()
    stepped = layer(x)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.load_state_dict(kept)
    assert torch.equal(layer(x), stepped)
    layer.weight.data.copy_(other.weight.data)
    layer.bias.data.copy_(other.bias.data)
    shared.refresh()
    assert torch.equal(layer(x), other(x))
    optimizer.zero_grad()  # a step that has nothing to do
    optimizer.step()
    assert torch.equal(layer(x), other(x))


def test_other_writes_are_seen_and_remove_ends_it() -> None:
    layer, x = normal_linear(64, 64), torch.randn(4, 64)
    other = normal_linear(64, 64, seed=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    shared = fastfp8.nn.share_weights(layer, optimizer)
    assert layer._kept is not None
    address = layer._kept.weight.data.data_ptr()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.weight.data.mul_(2)
    assert torch.equal(layer(x), other(x))  # not seen
    shared.refresh()
    other.weight.data.mul_(2)
    assert torch.equal(layer(x), other(x))
    for change in (lambda: layer.eval(), lambda: layer.train(), lambda: layer.to("cpu")):
        layer.weight.data.mul_(2)
        other.weight.data.mul_(2)
        change()
        assert torch.equal(layer(x), other(x))
    assert layer._kept.weight.data.data_ptr() == address
    with QuantizeCalls() as calls:
        copied = copy.deepcopy(layer)
        assert torch.equal(copied(x), layer(x))
    assert calls.of_weights == 1  # the copy's
    shared.remove()
    layer.weight.data.mul_(2)
    other.weight.data.mul_(2)
    assert torch.equal(layer(x), other(x))
    with QuantizeCalls() as calls:
        layer(x).sum().backward()
        optimizer.step()
    assert calls.of_weights == 1


def test_a_backward_through_weights_of_another_step_is_an_error() -> None:
    model = stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastfp8.nn.share_weights(model, optimizer)
    losses = [loss_of(model, i, 64) for i in range(2)]
    losses[0].backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[1].backward()


def test_compiled_modules_share_too() -> None:
    torch._dynamo.reset()
    plain, shared, recorder = stack(), stack(), AotEagerAndRecordGraphs()
    compiled = torch.compile(shared, fullgraph=True, backend=recorder)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, shared)]
    fastfp8.nn.share_weights(shared, optimizers[1])
    with torch._dynamo.config.patch(error_on_recompile=True):  # once for all steps
        for step in range(3):
            for model, optimizer in zip((plain, compiled), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(model, step, 64).backward()
                optimizer.step()
    assert equal(state(plain), state(shared))
    nodes = [node for graph in recorder.fw_graphs + recorder.bw_graphs for node in graph.graph.nodes]
    quantised = [node.args[1] for node in nodes if node.target is torch.ops.fastfp8.quantize.default]
    assert quantised == [list(ROW)] * 3  # both inputs, and the gradient that goes no further; no weight


# --- main_grad


@pytest.mark.parametrize("size", [(64, 96), (50, 30)], ids=["in the GEMM", "padded"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("recipe", [Recipe(), None], ids=["fp8", "high precision"])
def test_main_grad_takes_the_gradient_in_fp32(recipe: Recipe | None, dtype: torch.dtype, size: tuple[int, int]) -> None:
    k, n = size
    layer = normal_linear(k, n, dtype=dtype, recipe=recipe)
    x, dy = torch.randn(40, k).to(dtype), torch.randn(40, n).to(dtype)
    dx, dw, db = gradients(layer, x, dy, layer.weight, layer.bias)
    fastfp8.nn.use_main_grad(layer)
    start = torch.randn(n, k)
    layer.weight.main_grad.copy_(start)
    x.requires_grad_()
    for _ in range(2):
        layer(x).backward(dy)
    assert layer.weight.grad is None
    assert torch.equal(x.grad / 2, dx)  # type: ignore[operator]
    assert torch.equal(layer.bias.grad / 2, db)
    if dtype == FP32:
        assert torch.equal(layer.weight.main_grad, start + dw + dw)
    else:
        found = layer.weight.main_grad - start
        assert sqnr(found, 2 * dw.float()) > 45  # of dw, which was rounded to BF16
        assert recipe is None or sqnr(found, 2 * dw.float()) < 70
    fastfp8.nn.use_main_grad(layer)
    assert not layer.weight.main_grad.any()


def test_main_grad_without_tokens_and_compiled() -> None:
    torch._dynamo.reset()
    layer = normal_linear(64, 32)
    fastfp8.nn.use_main_grad(layer)
    layer(torch.randn(0, 64)).sum().backward()
    assert not layer.weight.main_grad.any()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 64)
    for module in (layer, compiled):
        module(x).sum().backward()
    once = layer.weight.main_grad / 2
    assert layer.weight.grad is None
    layer.weight.main_grad = None
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, once)


def test_main_grad_that_does_not_fit_is_an_error() -> None:
    layer = normal_linear(64, 32)
    for bad, error, text in (
        (torch.zeros(32, 64, dtype=BF16), TypeError, "a torch.float32 tensor or None, got torch.bfloat16"),
        (torch.zeros(64, 32), ValueError, r"shape \(32, 64\) on cpu, as the weight, got \(64, 32\) on cpu"),
    ):
        layer.weight.main_grad = bad
        with pytest.raises(error, match=f"argument 'weight.main_grad': expected {text}"):
            layer(torch.zeros(2, 64))
    with pytest.raises(TypeError, match=r"argument 'model': expected a torch\.nn\.Module"):
        fastfp8.nn.use_main_grad([layer])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"argument 'optimizer': expected a torch\.optim\.Optimizer"):
        fastfp8.nn.share_weights(layer, [layer.weight])  # type: ignore[arg-type]


def test_training_with_main_grad_and_shared_weights_follows_grad() -> None:
    """What is accumulated over micro-batches is the same sum, in FP32 already."""
    plain, ours = stack(), stack()
    optimizers = [AdamW(m.parameters(), lr=1e-2, emit_fp8=True) for m in (plain, ours)]
    fastfp8.nn.share_weights(ours, optimizers[1])
    for step in range(3):
        optimizers[0].zero_grad()
        optimizers[1].zero_grad()
        fastfp8.nn.use_main_grad(ours)
        for batch in range(2):
            for model in (plain, ours):
                loss_of(model, 2 * step + batch, 64).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert equal(state(plain), state(ours))


# --- FSDP2


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks(2)
    yield pool
    pool.stop()


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
def test_fsdp_equals_the_whole_module(mixed: bool, ranks: Ranks) -> None:
    whole, losses = fsdp_ranks.train_whole(2, mixed)
    for rank, (parameters, found, saved) in enumerate(ranks.run(fsdp_ranks.train_sharded, mixed)):
        assert found == [of_step[rank] for of_step in losses]
        assert equal(parameters, whole)
        # The input in FP8 and its scale; the gathered weight, which FSDP frees; Tanh's result. No weight in FP8,
        # and nothing of the layer with a norm.
        assert saved.count(torch.float8_e4m3fn) == 2 * fsdp_ranks.STEPS
