"""What fastfp8.nn.MoE and SwiGLU compute: against FP64 of the dequantised operands, and against BF16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from linear_support import BF16, sqnr
from moe_support import EXPERTS, HIDDEN, TOP_K, WIDTH, exact, found, in_fp8, moe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastfp8
from fastfp8 import Format, Recipe
from fastfp8.nn import MoE, SwiGLU

TOKENS = 300
NAMES = ("y", "x", "gate_up", "down", "routing weights")


def inputs(tokens: int = TOKENS, seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(tokens, HIDDEN, dtype=BF16), torch.randn(tokens, HIDDEN, dtype=BF16)


def run(module: torch.nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x and of all parameters."""
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    return y.detach(), *torch.autograd.grad(y, (leaf, *module.parameters()), dy)


class Calls(TorchDispatchMode):
    """Records the calls of fastfp8's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastfp8":
            self.found.append((func._schema.name.split("::")[1], args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("cached", ["e4m3", "bf16"])
def test_signal_to_noise_against_fp64_of_the_dequantised_operands(cached: str, limit: float | None) -> None:
    module = in_fp8(moe(limit=limit), Recipe(cached=cached))
    x, dy = inputs()
    for name, actual, wanted in zip(NAMES, found(module, x, dy), exact(module, x, dy), strict=True):
        assert sqnr(actual, wanted) > (28 if name == "y" else 26), name


def test_it_is_near_bf16() -> None:
    dense, (x, dy) = moe(shared=1), inputs()
    for actual, wanted in zip(run(in_fp8(copy.deepcopy(dense)), x, dy), run(dense, x, dy), strict=True):
        assert actual.dtype == wanted.dtype
        assert sqnr(actual, wanted) > 20


def test_dense_is_the_sum_of_its_experts() -> None:
    module, (x, _) = moe(shared=2, limit=1.0), inputs()
    y = module(x)
    assert module.routing is not None
    idx, weights = module.routing.topk_idx, module.routing.topk_weights
    assert module.shared is not None
    with torch.autocast("cpu", BF16):
        expected = module.shared(x).float()
    for expert in range(EXPERTS):
        token, slot = (idx == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ module.gate_up.weight[expert].bfloat16().t()).float().chunk(2, 1)
        h = torch.nn.functional.silu(gate.clamp(max=1.0)) * up.clamp(-1.0, 1.0)
        out = h.bfloat16() @ module.down.weight[expert].bfloat16().t()
        expected[token] += out.float() * weights[token, slot, None]
    assert sqnr(y, expected) > 40


def test_routing_is_that_of_the_op() -> None:
    module, (x, _) = moe(groups=4, top_groups=2, score="softmax"), inputs()
    module.gate.bias.copy_(torch.randn(EXPERTS))
    module(x)
    logits = torch.nn.functional.linear(x.float(), module.gate.weight)
    options = {"top_k": TOP_K, "groups": 4, "top_groups": 2, "score": "softmax", "scale": 2.5}
    expected = fastfp8.route(logits, module.gate.bias, **options)  # type: ignore[arg-type]
    assert module.routing is not None
    assert all(map(torch.equal, module.routing, expected))


def test_the_bias_follows_the_load_and_the_loss_has_a_gradient() -> None:
    module, (x, _) = in_fp8(moe()), inputs()
    loads = []
    for _ in range(2):  # two micro-batches
        module(x)
        assert module.routing is not None
        assert module.balance_loss is not None
        loads.append(module.routing.load)
        expected = fastfp8.balance_loss(module.routing.scores, module.routing.topk_idx, alpha=1e-4)
        assert torch.equal(module.balance_loss.detach(), expected)
    (gradient,) = torch.autograd.grad(module.balance_loss, module.gate.weight)
    assert gradient.abs().max() > 0
    total = torch.stack(loads).sum(0)
    assert torch.equal(module.update_bias(0.25), total)
    assert torch.equal(module.gate.bias, 0.25 * torch.sign(total.float().mean() - total))
    assert not module.load.any()
    module.eval()(x)
    assert not module.load.any()


def test_balance_by_bias_evens_an_uneven_load() -> None:
    module, (x, _) = moe(), inputs(2048)
    with torch.no_grad():
        module.gate.weight[0] += 3 * x.float().mean(0) / x.float().mean(0).norm()
    module.gate.bias[1] = 0.2
    spread = []
    for _ in range(150):
        module(x)
        load = module.update_bias(4e-3)
        spread.append(int(load.max() - load.min()))
    assert spread[0] > 400
    assert max(spread[-5:]) < spread[0] / 4


def test_only_fp8_and_the_input_of_the_gate_are_kept_for_backward() -> None:
    module, (x, _) = in_fp8(moe()), inputs()
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = module(x.requires_grad_())
    assert y.requires_grad
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    rows = TOKENS * TOP_K
    fp8 = rows * HIDDEN + rows * 2 * WIDTH  # codes of rows, and of gate and up
    scales = 4 * rows * (HIDDEN + 2 * WIDTH) // 128
    gate = 2 * TOKENS * HIDDEN  # x
    routing = TOKENS * (4 * EXPERTS + 8 * TOP_K) + 4 * rows + 4 * EXPERTS
    balance = 4 * TOKENS * EXPERTS * 3 + 8 * EXPERTS  # a loss of a few numbers a token
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    assert fp8 + scales <= total <= fp8 + scales + gate + routing + balance


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_few_tokens(tokens: int, fp8: bool) -> None:
    module = moe(shared=1)
    module = in_fp8(module) if fp8 else module
    x, dy = inputs(tokens)
    y, dx, *gradients = run(module, x, dy)
    assert y.shape == dx.shape == x.shape
    assert all(g.isfinite().all() for g in gradients)
    if not tokens:
        assert not any(g.any() for g in gradients)


def test_leading_dimensions_and_dtypes() -> None:
    module, (x, _) = in_fp8(moe(shared=1)), inputs(24)
    flat = module(x)
    assert torch.equal(module(x.view(2, 3, 4, HIDDEN), sequences=2), flat.view(2, 3, 4, HIDDEN))
    assert torch.equal(module(x.float()).bfloat16(), flat) or sqnr(module(x.float()), flat.float()) > 40
    assert module(x.float()).dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit_and_counts_no_token_twice(reentrant: bool) -> None:
    module, (x, dy) = in_fp8(moe(shared=1)), inputs()
    plain = run(module, x, dy)
    module.load.zero_()
    leaf = x.detach().requires_grad_()
    checkpoint(module, leaf, use_reentrant=reentrant).backward(dy)  # type: ignore[no-untyped-call]
    gradients = (leaf.grad, *(p.grad for p in module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain[1:], strict=True))  # type: ignore[arg-type]
    assert int(module.load.sum()) == TOKENS * TOP_K


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_compile_changes_no_bit(fp8: bool) -> None:
    module, (x, dy) = moe(shared=1), inputs(100)
    module = in_fp8(module) if fp8 else module
    plain = run(module, x, dy)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    leaf = x.detach().requires_grad_()
    y = compiled(leaf)
    found = y.detach(), *torch.autograd.grad(y, (leaf, *module.parameters()), dy)
    assert all(map(torch.equal, found, plain))


def test_gradients_in_square_blocks_are_worse() -> None:
    x, dy = inputs()
    dy *= torch.logspace(-9, 9, TOKENS, base=2)[torch.randperm(TOKENS), None].bfloat16()
    noise = {}
    for block in ((1, 128), (128, 128)):
        module = in_fp8(moe(), Recipe(gradient=Format(block, True)))
        actual, wanted = found(module, x, dy)[1], exact(module, x, dy)[1]
        noise[block] = min(sqnr(a, b) for a, b in zip(actual, wanted, strict=True))
    assert noise[128, 128] < noise[1, 128] - 10


def test_main_grads_of_two_micro_batches() -> None:
    module, (x, dy) = in_fp8(moe(shared=1)), inputs()
    names = ("gate_up.weight", "down.weight", "shared.gate_up.weight", "shared.down.weight")
    parameters = dict(module.named_parameters())
    gradients = dict(zip(parameters, run(module, x, dy)[2:], strict=True))
    for name in names:
        parameters[name].main_grad = torch.zeros_like(parameters[name])  # type: ignore[attr-defined]
    for _ in range(2):
        module(x).backward(dy)
    for name in names:
        assert parameters[name].grad is None
        torch.testing.assert_close(parameters[name].main_grad, 2 * gradients[name])  # type: ignore[attr-defined]


def test_watching_and_counting_see_every_role_and_change_no_bit() -> None:
    module, (x, dy) = in_fp8(moe(shared=1, limit=2.0)), inputs()
    plain = run(module, x, dy)
    fastfp8.numerics.start(module)
    with fastfp8.numerics.watch(module, every=1) as watch:
        again = run(module, x, dy)
        watch.step()
    assert all(map(torch.equal, plain, again))
    rows = {(row.layer, row.role): row for row in watch.rows}
    for layer in ("gate_up", "down", "shared.gate_up", "shared.down"):
        for role in ("activation", "weight", "gradient"):
            assert 29 < rows[layer, role].sqnr < 36, (layer, role)
    assert rows["gate_up", "activation"].values == TOKENS * HIDDEN
    assert rows["down", "activation"].values == TOKENS * TOP_K * WIDTH
    assert rows["gate_up", "gradient"].values == TOKENS * TOP_K * 2 * WIDTH
    counts = fastfp8.numerics.report(module)
    assert set(counts) == {"gate_up", "down", "shared.gate_up", "shared.down"}
    for layer, of_layer in counts.items():
        assert len(of_layer) == 5, layer
        assert all(count.nonfinite == 0 for count in of_layer.values())
    assert counts["down"]["activation"].values == TOKENS * TOP_K * WIDTH


def test_the_gate_has_the_gradients_of_a_linear_in_fp32() -> None:
    module, (x, _) = moe(), inputs()
    leaf, grad = x.float().requires_grad_(), torch.randn(TOKENS, EXPERTS)
    expected = torch.autograd.grad(
        torch.nn.functional.linear(leaf, module.gate.weight), (leaf, module.gate.weight), grad
    )
    leaf = x.requires_grad_()
    found = torch.autograd.grad(module.gate(leaf), (leaf, module.gate.weight), grad)
    assert torch.equal(found[0], expected[0].bfloat16())
    torch.testing.assert_close(found[1], expected[1])


def test_inference_writes_neither_gate_nor_up() -> None:
    module, (x, _) = in_fp8(moe(shared=1)), inputs()
    y = module(x)
    with torch.no_grad(), Calls() as calls:
        assert torch.equal(module(x), y)
    fused = [args for name, args in calls.found if name == "gemm_swiglu_quantize"]
    assert len(fused) == 2
    assert not any(args[10:] and args[10] for args in fused)  # return_gate_up
    assert "quantize" not in [name for name, args in calls.found if args[0].shape == (TOKENS * TOP_K, 2 * WIDTH)]


def test_the_gate_stays_in_fp32() -> None:
    module = moe(dtype=BF16).to(BF16)
    assert {p.dtype for p in module.parameters()} == {BF16, torch.float32}
    assert module.gate.weight.dtype == module.gate.bias.dtype == torch.float32
    module.gate.bias += 1e-3
    before = module.gate.bias.clone()
    assert torch.equal(module.bfloat16().gate.bias, before)


def test_a_dense_layer_dispatches_nothing() -> None:
    """Its tokens and gradients have the scales of activations and gradients, whatever dispatched ones have."""
    torch.manual_seed(0)
    fp32, pow2 = Format((1, 128), False), Format((1, 128), True)
    module, (x, dy) = SwiGLU(HIDDEN, WIDTH).bfloat16(), inputs(32)
    results = []
    for dispatched, own in ((pow2, fp32), (fp32, fp32), (fp32, pow2), (pow2, pow2)):
        layer = copy.deepcopy(module)
        fastfp8.nn.convert(layer, Recipe(activation=own, gradient=own, dispatched=dispatched))
        results.append(run(layer, x, dy))
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[2], results[3]))
    assert not torch.equal(results[0][0], results[2][0])


def test_swiglu_fused_is_near_its_linears_and_keeps_fp8_alone() -> None:
    torch.manual_seed(0)
    dense, (x, dy) = SwiGLU(HIDDEN, WIDTH, limit=2.0), inputs(77)
    dense = dense.bfloat16()
    module = copy.deepcopy(dense)
    fastfp8.nn.convert(module, Recipe())
    for actual, wanted in zip(run(module, x, dy), run(dense, x, dy), strict=True):
        assert sqnr(actual, wanted) > 20
    kept: list[Tensor] = []
    own = {p.data_ptr() for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = module(x.requires_grad_())
    assert y.shape == x.shape
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) == 77 * (HIDDEN + 2 * WIDTH) * (1 + 4 / 128) + 4


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"num_experts": 0}, ValueError, "'num_experts': expected a positive number, got 0"),
        ({"top_k": 2.0}, TypeError, "'top_k': expected an int"),
        ({"hidden": 100}, ValueError, "'in_features': expected a multiple of 16, got 100"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, object], kind: type[Exception], match: str) -> None:
    sizes = {"hidden": HIDDEN, "intermediate": WIDTH, "num_experts": EXPERTS, "top_k": TOP_K}
    with pytest.raises(kind, match=match):
        MoE(**{**sizes, **options})  # type: ignore[arg-type]


def test_what_does_not_fit_forward_is_named() -> None:
    with pytest.raises(ValueError, match="'x': expected a last dimension of 256"):
        moe()(torch.randn(3, 128))
    with pytest.raises(TypeError, match="'x'"):
        moe()([1])
