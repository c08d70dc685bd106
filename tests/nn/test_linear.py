"""What fastfp8.nn.Linear computes: against FP64 products of the dequantised operands and against torch.nn.Linear."""

import copy

import pytest
import torch
from linear_support import (
    BF16,
    E4M3,
    FP16,
    FP32,
    RECIPES,
    ROW,
    SQUARE,
    QuantizeCalls,
    gradients,
    normal_linear,
    sqnr,
    values,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastfp8
import fastfp8.nn
from fastfp8 import Format, Recipe

# M, K, N: whole blocks; nothing that fits; one token; an edge block of one element; fewer features than an alignment.
SHAPES = [(256, 256, 384), (37, 100, 50), (1, 16, 8), (130, 129, 257), (5, 1, 3)]


# --- values


def expected_values(
    layer: fastfp8.nn.Linear, x: Tensor, dy: Tensor, recipe: Recipe, cache: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dw in FP64, of operands quantised and dequantised here one by one."""

    def rounded(t: Tensor, block: tuple[int, int], pow2: bool) -> Tensor:
        return values(fastfp8.quantize(t, block, pow2=pow2))

    forward, back = recipe.activation.pow2, recipe.gradient.pow2
    x8 = rounded(x, ROW, forward)
    w8 = rounded(layer.weight.detach(), SQUARE, recipe.weight.pow2)
    kept = {"e4m3": x8.float(), "bf16": x, "e5m6": fastfp8.unpack_e5m6(fastfp8.pack_e5m6(x), FP32)}[cache]
    retiled = rounded(kept, (128, 1), forward)
    square = recipe.gradient.block == SQUARE
    by_token, along_tokens = (rounded(dy, SQUARE if square else block, back) for block in (ROW, (128, 1)))
    return x8 @ w8.t() + layer.bias.double(), by_token @ w8, along_tokens.t() @ retiled


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_each_gemm_is_the_fp64_product_of_the_right_operands(shape: tuple[int, int, int], name: str) -> None:
    m, k, n = shape
    recipe, cache = RECIPES[name]
    layer = normal_linear(k, n, recipe=recipe, cache=cache)
    x, dy = torch.randn(m, k), torch.randn(m, n)
    y = layer(x)
    actual = (y, *gradients(layer, x, dy, layer.weight, layer.bias))
    expected = (*expected_values(layer, x, dy, recipe, cache), dy.double().sum(0))
    for what, got, exact in zip(("y", "dx", "dw", "db"), actual, expected, strict=True):
        assert got.shape == exact.shape, what
        assert got.is_contiguous(), what
        # FP32 sums of up to 257 products: 130 dB and more; a wrong block or a missed bias is below 40.
        assert sqnr(got, exact) > 110, what


# Least SQNR of y and dx, of dw: measured 28.5 to 28.8, and of dw 28.5, 31.5 (E5M6, BF16) and, re-tiled between FP32
# scales with a loss, 27.0. Squares cost little on data without outliers.
NOISE = {"default": 28.2, "e5m6": 28.2, "bf16": 28.2, "fp32scales": 26.5, "fp32scales-e5m6": 28.2, "squares": 28.2}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(512, 512, 384), (300, 1000, 130)], ids=lambda s: "x".join(map(str, s)))
def test_signal_to_noise_against_fp64_autograd_on_normal_data(shape: tuple[int, int, int], name: str) -> None:
    m, k, n = shape
    recipe, cache = RECIPES[name]
    layer = normal_linear(k, n, recipe=recipe, cache=cache)
    exact = nn.Linear(k, n).double()
    exact.load_state_dict(layer.state_dict())
    x, dy = torch.randn(m, k), torch.randn(m, n)
    y, grads = layer(x), gradients(layer, x, dy, layer.weight, layer.bias)
    y64 = exact(x.double())
    dx, dw, db = gradients(exact, x.double(), dy.double(), exact.weight, exact.bias)
    assert sqnr(y, y64) > 28.2
    assert sqnr(grads[0], dx) > 28.2
    assert sqnr(grads[1], dw) > NOISE[name]
    assert sqnr(grads[2], db) > 110


def test_gradients_are_quantised_from_one_read_and_in_square_blocks_only_where_the_recipe_says_so() -> None:
    expected = {"default": ([SQUARE], ["quantize_both", "requantize_transpose"]), "squares": ([SQUARE, SQUARE], None)}
    for name, (blocks, others) in expected.items():
        recipe, cache = RECIPES[name]
        layer = normal_linear(256, 256, recipe=recipe, cache=cache)
        y = layer(torch.randn(32, 256, requires_grad=True))
        with QuantizeCalls() as calls:
            y.sum().backward()
        assert calls.blocks == blocks  # the weight; with squares the gradient too
        assert others is None or calls.others == others


def test_a_recipe_of_none_is_torch_linear() -> None:
    layer = normal_linear(48, 40, recipe=None)
    exact = nn.Linear(48, 40)
    exact.load_state_dict(layer.state_dict())
    x, dy = torch.randn(5, 48), torch.randn(5, 40)
    for dtype in (None, BF16):
        with torch.autocast("cpu", BF16, enabled=dtype is not None):
            assert torch.equal(layer(x), exact(x))
            ours = gradients(layer, x, dy.to(dtype or FP32), layer.weight, layer.bias)
            theirs = gradients(exact, x, dy.to(dtype or FP32), exact.weight, exact.bias)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_without_promotion_the_sum_is_that_of_the_tensor_core_alone() -> None:
    """On values of one sign, where truncation adds up: measured 10.5% too small, with promotion 0.1%."""
    plain, promoted = (
        fastfp8.nn.Linear(2048, 16, bias=False, recipe=Recipe(weight=Format(SQUARE, pow2=True), promotion=p))
        for p in (None, 128)
    )
    x = torch.rand(4, 2048)
    with torch.no_grad():
        plain.weight.uniform_(0, 1)
        promoted.weight.copy_(plain.weight)
        w8 = fastfp8.quantize(plain.weight, SQUARE, pow2=True).dequantize()
        exact = fastfp8.quantize(x, pow2=True).dequantize() @ w8.t()
        loss = [float(((y - exact) / exact).mean()) for y in (plain(x), promoted(x))]
    assert loss[0] < -0.02
    assert abs(loss[1]) < 1e-5
    dx, dw = gradients(plain, x, torch.randn(4, 16), plain.weight)
    assert dx.isfinite().all()
    assert dw.isfinite().all()


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0), (3, 7), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_any_leading_dimensions(lead: tuple[int, ...], bias: bool) -> None:
    layer = normal_linear(48, 40, bias)
    x, dy = torch.randn(*lead, 48), torch.randn(*lead, 40)
    parameters = tuple(layer.parameters())
    y, grads = layer(x), gradients(layer, x, dy, *parameters)
    assert y.shape == (*lead, 40)
    assert [g.shape for g in grads] == [x.shape, *(p.shape for p in parameters)]
    flat = gradients(layer, x.reshape(-1, 48), dy.reshape(-1, 40), *parameters)
    assert torch.equal(y.reshape(-1, 40), layer(x.reshape(-1, 48)))
    assert all(torch.equal(a, b.reshape(a.shape)) for a, b in zip(grads, flat, strict=True))
    if x.numel() == 0:
        assert all(not g.any() for g in grads)
    else:
        assert sqnr(y, nn.functional.linear(x, layer.weight, layer.bias)) > 25


@pytest.mark.parametrize(("k", "n"), [(0, 8), (8, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_features(k: int, n: int) -> None:
    layer, x, dy = normal_linear(k, n), torch.randn(3, k), torch.randn(3, n)
    assert torch.equal(layer(x), layer.bias.expand(3, n))
    grads = gradients(layer, x, dy, layer.weight, layer.bias)
    assert [g.shape for g in grads] == [(3, k), (n, k), (n,)]
    assert not grads[0].any()


def test_strided_inputs_and_gradients() -> None:
    layer = normal_linear(64, 32)
    x, dy = torch.randn(64, 20).t(), torch.randn(1, 32).expand(20, 32)
    strided = (layer(x), *gradients(layer, x, dy, layer.weight, layer.bias))
    dense = (layer(x.contiguous()), *gradients(layer, x.contiguous(), dy.contiguous(), layer.weight, layer.bias))
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_a_token_does_not_change_with_its_batch_and_nan_stays_in_its_row() -> None:
    layer = normal_linear(256, 64)
    x = torch.randn(40, 256)
    x[3, 5] = float("nan")
    y = layer(x)
    assert y[3].isnan().all()
    assert not y[torch.arange(40) != 3].isnan().any()
    assert sqnr(y[4:5], layer(x[4:5])) > 110


# --- dtypes


@pytest.mark.parametrize("weight_dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("x_dtype", [FP32, BF16, FP16], ids=str)
def test_dtypes(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    layer = normal_linear(256, 128, dtype=weight_dtype)
    x, dy = torch.randn(64, 256).to(x_dtype), torch.randn(64, 128).to(x_dtype)
    y, (dx, dw, db) = layer(x), gradients(layer, x, dy, layer.weight, layer.bias)
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (x_dtype, x_dtype, weight_dtype, weight_dtype)
    weight, bias = layer.weight.double(), layer.bias.double()
    assert sqnr(y, x.double() @ weight.t() + bias) > 28
    assert sqnr(dx, dy.double() @ weight) > 28
    assert sqnr(dw, dy.double().t() @ x.double()) > 28
    # One rounding from FP32 and none before it: the FP32 layer's result, rounded.
    single = copy.deepcopy(layer).float()
    assert torch.equal(y, single(x.float()).to(x_dtype))


def test_the_bias_gradient_is_summed_and_kept_in_fp32() -> None:
    layer = normal_linear(16, 8)
    (db,) = torch.autograd.grad(layer(torch.randn(1001, 16, dtype=BF16)), layer.bias, torch.ones(1001, 8, dtype=BF16))
    assert torch.equal(db, torch.full((8,), 1001.0))  # 1001 in BF16 is 1000


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast_decides_the_output_dtype_only(dtype: torch.dtype) -> None:
    layer = normal_linear(256, 128)
    x, dy = torch.randn(64, 256), torch.randn(64, 128).to(dtype)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        grads_inside = gradients(layer, x, dy, layer.weight, layer.bias)
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == FP32
    assert y.dtype == dtype
    assert torch.equal(y, layer(x).to(dtype))
    grads = gradients(layer, x, dy.float(), layer.weight, layer.bias)
    assert all(g.dtype == FP32 for g in grads_inside)
    assert all(torch.equal(a, b) for a, b in zip(grads_inside, grads, strict=True))


def test_autocast_feeds_a_layer_what_the_one_before_it_gave() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), fastfp8.nn.Linear(96, 64), nn.LayerNorm(64))
    with torch.autocast("cpu", BF16):
        loss = model(torch.randn(32, 64)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == FP32 and p.grad.isfinite().all() for p in model.parameters())


# --- what backward keeps and computes


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


# Bytes of 64 tokens of 512 features, in the cache and in FP32 scales, 1 a token and 128 features.
KEPT = {"e4m3": (E4M3, 64 * 512, 4 * 64 * 4), "e5m6": (torch.int32, 64 * 512 * 3 // 2, 4 * 64 * 4)}


@pytest.mark.parametrize("cache", ["e4m3", "e5m6", "bf16"])
def test_the_input_is_saved_in_its_cache_only(cache: str) -> None:
    layer = normal_linear(512, 256, cache=cache)
    x = torch.randn(64, 512, dtype=BF16, requires_grad=True)
    saved = saved_for_backward(layer, x)
    if cache == "bf16":
        assert [t.untyped_storage().data_ptr() for t in saved] == [x.untyped_storage().data_ptr()]
        return
    dtype, codes, scales = KEPT[cache]
    assert [(t.dtype, t.untyped_storage().nbytes()) for t in saved] == [(dtype, codes), (FP32, scales)]


@pytest.mark.parametrize("cache", ["e4m3", "bf16"])
def test_a_compiled_layer_saves_the_input_in_fp8(cache: str) -> None:
    """AOTAutograd computes in forward what depends on no gradient: of other caches than E4M3 Wgrad's very operand."""
    torch._dynamo.reset()
    layer = normal_linear(512, 256, cache=cache)
    x = torch.randn(64, 512, dtype=BF16, requires_grad=True)
    saved = saved_for_backward(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    scales = {"e4m3": 4 * 64 * 4, "bf16": 4 * 512}[cache]
    assert [(t.dtype, t.untyped_storage().nbytes()) for t in saved] == [(E4M3, 64 * 512), (FP32, scales)]


def test_nothing_is_saved_for_a_gradient_that_is_not_wanted() -> None:
    layer = normal_linear(512, 256)
    x = torch.randn(64, 512, dtype=BF16, requires_grad=True)
    assert sorted(t.nbytes for t in saved_for_backward(layer, x.detach())) == [4 * 64 * 4, 64 * 512]
    packing = normal_linear(512, 256, cache="e5m6")
    with torch.no_grad():
        assert saved_for_backward(layer, x) == []
        with QuantizeCalls() as calls:
            packing(x)
    assert calls.others == []
    layer.weight.requires_grad_(False)  # the kept FP8 weight serves Dgrad
    assert sorted(t.nbytes for t in saved_for_backward(layer, x)) == [4 * 2 * 4, 256 * 512]


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_wanted_gradients_are_computed(wanted: str) -> None:
    layer = normal_linear(64, 64)
    x, dy = torch.randn(16, 64), torch.randn(16, 64)
    everything = dict(zip(("x", "weight", "bias"), gradients(layer, x, dy, layer.weight, layer.bias), strict=True))
    leaves = {"x": x, "weight": layer.weight, "bias": layer.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    y = layer(x)
    with QuantizeCalls() as calls:
        y.backward(dy)
    # Of the input: nothing but the gradient; its weight is kept. Of the weight: dy along the tokens; x is re-tiled.
    assert calls.blocks == {"x": [ROW], "weight": [ROW], "bias": []}[wanted]
    assert calls.others == {"x": [], "weight": ["requantize_transpose"], "bias": []}[wanted]
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name != wanted)
    assert torch.equal(leaves[wanted].grad, everything[wanted])  # type: ignore[arg-type]


def test_double_backward_is_a_clear_error() -> None:
    layer = normal_linear(16, 16)
    x = torch.randn(4, 16, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "plain"])
def test_checkpoint(reentrant: bool) -> None:
    layer = normal_linear(96, 64)
    x, dy = torch.randn(20, 96, requires_grad=True), torch.randn(20, 64)
    plain = gradients(layer, x, dy, layer.weight, layer.bias)
    checkpoint(layer, x, use_reentrant=reentrant).backward(dy)
    again = (x.grad, layer.weight.grad, layer.bias.grad)
    assert all(b is not None and torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# --- training


def test_training_follows_fp32() -> None:
    """A regression on an MLP, 60 steps of SGD with momentum. Measured: 0.7% apart at most; the loss falls fivefold."""

    def losses(convert: bool) -> Tensor:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))
        teacher = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 64))
        if convert:
            fastfp8.nn.convert(model, Recipe())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        history = []
        for _ in range(60):
            x = torch.randn(256, 128)
            loss = nn.functional.mse_loss(model(x), teacher(x).detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        return torch.stack(history)

    exact, fp8 = losses(convert=False), losses(convert=True)
    assert exact[-1] < exact[0] / 4
    assert ((fp8 - exact) / exact).abs().max() < 0.015
