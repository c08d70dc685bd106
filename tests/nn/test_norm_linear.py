"""fastfp8.nn.RMSNormLinear: against FP64, what it keeps for backward, and as a module."""

import copy

import pytest
import torch
import torch.nn.functional as F
from linear_support import BF16, FP16, FP32, FP32_SCALES, ROW, SQUARE, QuantizeCalls, gradients, sqnr, values
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastfp8
import fastfp8.nn
from fastfp8 import Format, Recipe

# M, K, N: whole blocks; nothing that fits; one token; an edge block.
SHAPES = [(256, 256, 384), (37, 112, 50), (1, 16, 8), (130, 144, 257)]
RECIPES = {
    "default": Recipe(),
    "fp32scales": FP32_SCALES,
    "squares": Recipe(weight=Format(SQUARE, pow2=True), gradient=Format(SQUARE, pow2=True)),
}


def normal_layer(k: int, n: int, recipe: Recipe | None, **options: object) -> fastfp8.nn.RMSNormLinear:
    torch.manual_seed(0)
    layer = fastfp8.nn.RMSNormLinear(k, n, bias=True, recipe=recipe, **options)  # type: ignore[arg-type]
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, mean=float(name == "norm_weight"), std=0.2 if name == "norm_weight" else 1.0)
    return layer


def all_gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    return gradients(layer, x, dy, layer.norm_weight, layer.weight, layer.bias)


class Exact(nn.Module):
    """The same in plain torch."""

    def __init__(self, layer: fastfp8.nn.RMSNormLinear, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.eps = layer.eps
        self.norm_weight, self.weight, self.bias = (
            nn.Parameter(p.detach().to(dtype)) for p in (layer.norm_weight, layer.weight, layer.bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, x.shape[-1:], self.norm_weight, self.eps), self.weight, self.bias)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_each_gemm_is_the_fp64_product_of_the_right_operands(shape: tuple[int, int, int], name: str) -> None:
    m, k, n = shape
    recipe = RECIPES[name]
    layer = normal_layer(k, n, recipe)
    x, dy = 3 * torch.randn(m, k), torch.randn(m, n)
    y = layer(x)
    dx, dnorm, dw, db = all_gradients(layer, x, dy)

    exact = Exact(layer)
    normed = F.rms_norm(x, (k,), layer.norm_weight, layer.eps)
    # The op has tests of its own: its operands are what it says, and near to torch's.
    weight, pow2 = layer.norm_weight.detach(), recipe.activation.pow2
    ours = fastfp8.rmsnorm_quantize(x, weight, layer.eps, pow2=pow2, transpose=True)
    x8, x8_t = values(ours.quantized), values(ours.transposed).t()
    assert sqnr(x8, normed) > 28
    assert sqnr(x8_t, normed) > 28
    w8 = values(fastfp8.quantize(layer.weight.detach(), SQUARE, pow2=recipe.weight.pow2))
    square, pow2 = recipe.gradient.block == SQUARE, recipe.gradient.pow2
    dy8, dy8_t = (values(fastfp8.quantize(dy, SQUARE if square else b, pow2=pow2)) for b in (ROW, (128, 1)))
    x64 = x.double().requires_grad_()
    norm = F.rms_norm(x64, (k,), exact.norm_weight, layer.eps)
    dx64, dnorm64 = torch.autograd.grad(norm, (x64, exact.norm_weight), dy8 @ w8)
    expected = {
        "y": (y, x8 @ w8.t() + layer.bias.double()),
        "dx": (dx, dx64),
        "dnorm": (dnorm, dnorm64),
        "dw": (dw, dy8_t.t() @ x8_t),
        "db": (db, dy.double().sum(0)),
    }
    for what, (got, wanted) in expected.items():
        assert got.shape == wanted.shape, what
        assert sqnr(got, wanted) > 110, what


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(512, 512, 384), (300, 912, 130)], ids=lambda s: "x".join(map(str, s)))
def test_signal_to_noise_against_fp64_autograd_on_normal_data(shape: tuple[int, int, int], name: str) -> None:
    m, k, n = shape
    layer = normal_layer(k, n, RECIPES[name])
    x, dy = torch.randn(m, k), torch.randn(m, n)
    exact = Exact(layer)
    assert sqnr(layer(x), exact(x.double())) > 28.2
    for got, wanted in zip(all_gradients(layer, x, dy), all_gradients(exact, x.double(), dy.double()), strict=True):
        assert sqnr(got, wanted) > 27.8  # measured: 28.08 and more


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_high_precision_is_torch_and_keeps_as_little(dtype: torch.dtype) -> None:
    layer = normal_layer(100, 50, None, dtype=dtype)
    exact = Exact(layer)
    x, dy = torch.randn(2, 20, 100).to(dtype), torch.randn(2, 20, 50).to(dtype)
    least = 110 if dtype == FP32 else 45
    assert sqnr(layer(x), exact(x.double())) > least
    for got, wanted in zip(all_gradients(layer, x, dy), all_gradients(exact, x.double(), dy.double()), strict=True):
        assert sqnr(got, wanted) > least
    with torch.autocast("cpu", BF16):
        y = layer(x)
        grads = all_gradients(layer, x, dy.to(BF16))
    assert y.dtype == BF16
    assert sqnr(y, exact(x.double())) > 45
    assert [g.dtype for g in grads] == [dtype] * 4


def saved_for_backward(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What is saved beside parameters."""
    saved: list[Tensor] = []
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return saved


@pytest.mark.parametrize("recipe", [Recipe(), None], ids=["fp8", "high precision"])
def test_only_the_input_and_a_number_a_row_are_saved(recipe: Recipe | None) -> None:
    layer = normal_layer(512, 256, recipe)
    x = torch.randn(64, 512, dtype=BF16, requires_grad=True)
    saved = saved_for_backward(layer, x)
    assert saved[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert [(t.dtype, t.untyped_storage().nbytes()) for t in saved[1:]] == [(FP32, 4 * 64)]
    plain = nn.Sequential(nn.RMSNorm(512), nn.Linear(512, 256)).to(BF16)
    assert sum(t.untyped_storage().nbytes() for t in saved_for_backward(plain, x)) > 2 * 2 * 64 * 512


def test_the_input_is_quantised_from_the_norm_itself() -> None:
    layer = normal_layer(256, 128, Recipe())
    y = layer(torch.randn(32, 256, requires_grad=True))
    with QuantizeCalls() as calls:
        y.sum().backward()
    assert calls.others == ["quantize_both", "rmsnorm_quantize_transpose"]


@pytest.mark.parametrize("lead", [(), (0,), (3, 7)], ids=str)
@pytest.mark.parametrize("recipe", [Recipe(), None], ids=["fp8", "high precision"])
def test_any_leading_dimensions(recipe: Recipe | None, lead: tuple[int, ...]) -> None:
    layer = normal_layer(48, 40, recipe)
    x, dy = torch.randn(*lead, 48), torch.randn(*lead, 40)
    y, grads = layer(x), all_gradients(layer, x, dy)
    assert y.shape == (*lead, 40)
    flat = all_gradients(layer, x.reshape(-1, 48), dy.reshape(-1, 40))
    assert torch.equal(y.reshape(-1, 40), layer(x.reshape(-1, 48)))
    assert all(torch.equal(a, b.reshape(a.shape)) for a, b in zip(grads, flat, strict=True))
    assert x.numel() or not any(g.any() for g in grads)


@pytest.mark.parametrize("weight_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("x_dtype", [FP32, BF16, FP16], ids=str)
def test_dtypes(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    layer = normal_layer(256, 128, Recipe(), dtype=weight_dtype)
    x, dy = torch.randn(64, 256).to(x_dtype), torch.randn(64, 128).to(x_dtype)
    y, grads, exact = layer(x), all_gradients(layer, x, dy), Exact(layer)
    assert (y.dtype, [g.dtype for g in grads]) == (x_dtype, [x_dtype] + [weight_dtype] * 3)
    assert sqnr(y, exact(x.double())) > 28
    for got, wanted in zip(grads, all_gradients(exact, x.double(), dy.double()), strict=True):
        assert sqnr(got, wanted) > 28


@pytest.mark.parametrize("wanted", ["x", "norm_weight", "weight", "bias"])
@pytest.mark.parametrize("recipe", [Recipe(), None], ids=["fp8", "high precision"])
def test_only_wanted_gradients_are_computed(recipe: Recipe | None, wanted: str) -> None:
    layer = normal_layer(64, 32, recipe)
    x, dy = torch.randn(16, 64), torch.randn(16, 32)
    everything = dict(zip(("x", "norm_weight", "weight", "bias"), all_gradients(layer, x, dy), strict=True))
    leaves = {"x": x, **dict(layer.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    layer(x).backward(dy)
    assert {name: leaf.grad is None for name, leaf in leaves.items()} == {name: name != wanted for name in leaves}
    assert torch.equal(leaves[wanted].grad, everything[wanted])


@pytest.mark.parametrize("recipe", [Recipe(), None], ids=["fp8", "high precision"])
def test_compile_and_checkpoint(recipe: Recipe | None) -> None:
    torch._dynamo.reset()
    layer = normal_layer(64, 40, recipe)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(6, 64), torch.randn(6, 40)
    assert torch.equal(compiled(x), layer(x))
    plain = all_gradients(layer, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(all_gradients(compiled, x, dy), plain, strict=True))
    for reentrant in (True, False):
        layer.zero_grad()
        again = x.clone().requires_grad_()
        checkpoint(layer, again, use_reentrant=reentrant).backward(dy)
        found = (again.grad, layer.norm_weight.grad, layer.weight.grad, layer.bias.grad)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("recipe", [Recipe(), None], ids=["fp8", "high precision"])
def test_main_grad_and_shared_weights(recipe: Recipe | None) -> None:
    plain, layer = normal_layer(64, 48, recipe), normal_layer(64, 48, recipe)
    optimizers = [fastfp8.optim.AdamW(m.parameters(), lr=1e-2, emit_fp8=True) for m in (plain, layer)]
    fastfp8.nn.share_weights(layer, optimizers[1])
    for _ in range(2):
        fastfp8.nn.use_main_grad(layer)
        for module, optimizer in zip((plain, layer), optimizers, strict=True):
            optimizer.zero_grad()
            for _ in range(2):
                module(torch.ones(5, 64)).square().sum().backward()
            optimizer.step()
        assert layer.weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), layer.parameters(), strict=True))


def test_copies_counters_and_conversion() -> None:
    model = nn.Sequential(normal_layer(64, 48, None), normal_layer(40, 48, None))
    conversion = fastfp8.nn.convert(model)
    assert conversion.changed == {"0": "RMSNormLinear, the norm's input kept"}
    assert conversion.left == {
        "1": "fastfp8.nn.RMSNormLinear: argument 'in_features': expected a multiple of 16 in FP8, got 40"
    }
    layer, x = model[0], torch.randn(3, 64)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    fastfp8.numerics.start(layer)
    layer(x.requires_grad_()).sum().backward()
    assert layer.counters is not None
    counted = {role: fastfp8.numerics.totals(t).values for role, t in layer.counters.items()}
    assert counted == {
        "activation": 3 * 64,
        "weight": 48 * 64,
        "gradient": 3 * 48,
        "activation, transposed": 3 * 64,
        "gradient, transposed": 3 * 48,
    }


def test_errors_name_what_was_wrong() -> None:
    with pytest.raises(ValueError, match="argument 'in_features': expected a multiple of 16 in FP8, got 100"):
        fastfp8.nn.RMSNormLinear(100, 8, recipe=Recipe())
    with pytest.raises(ValueError, match="argument 'eps': expected a positive number"):
        fastfp8.nn.RMSNormLinear(16, 8, eps=0.0)
    with pytest.raises(TypeError, match=r"nn\.RMSNormLinear: argument 'dtype'.*torch.float64"):
        fastfp8.nn.RMSNormLinear(16, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"argument 'recipe': expected a fastfp8\.Recipe or None, got str"):
        fastfp8.nn.RMSNormLinear(16, 8, recipe="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"argument 'input': expected a last dimension of 16, got shape \(2, 8\)"):
        fastfp8.nn.RMSNormLinear(16, 8)(torch.zeros(2, 8))
    assert repr(fastfp8.nn.RMSNormLinear(16, 8)) == (
        "RMSNormLinear(in_features=16, out_features=8, bias=False, eps=1e-06, recipe=None)"
    )
