"""fastfp8.nn.Linear as a module: torch.compile, its kept FP8 weight, copies, state_dict, freeze, from_float, errors."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_support import BF16, E4M3, FP16, FP32, FP32_SCALES, RECIPES, QuantizeCalls, gradients, normal_linear
from torch import Tensor, nn

import fastfp8
import fastfp8.nn

# --- torch.compile


@pytest.mark.parametrize("size", [(100, 50), (64, 96)], ids=["padded", "fitting"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_in_one_graph(dynamic: bool, size: tuple[int, int]) -> None:
    torch._dynamo.reset()
    k, n = size
    layer = normal_linear(k, n)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lead in ((3, 7), (4, 9), ()):
        x, dy = torch.randn(*lead, k), torch.randn(*lead, n)
        assert torch.equal(compiled(x), layer(x))
        eager = gradients(layer, x, dy, layer.weight, layer.bias)
        assert all(
            torch.equal(a, b) for a, b in zip(gradients(compiled, x, dy, layer.weight, layer.bias), eager, strict=True)
        )
    # The weight is read at each call, though an inference forward before it kept an FP8 copy.
    layer.eval()
    with torch.no_grad():
        before = layer(x), compiled(x)
        layer.weight.mul_(-2)
        after = layer(x), compiled(x)
    assert torch.equal(before[0], before[1])
    assert torch.equal(after[0], after[1])
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("name", ["e5m6", "fp32scales", "squares"])
def test_compile_by_other_recipes(name: str) -> None:
    torch._dynamo.reset()
    recipe, cache = RECIPES[name]
    layer = normal_linear(100, 50, recipe=recipe, cache=cache)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(7, 100), torch.randn(7, 50)
    assert torch.equal(compiled(x), layer(x))
    found, eager = (gradients(module, x, dy, layer.weight, layer.bias) for module in (compiled, layer))
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


def test_compile_with_autocast_and_frozen() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(normal_linear(64, 96), nn.ReLU(), normal_linear(96, 64).freeze())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(8, 64), torch.randn(8, 64)
    assert torch.equal(compiled(x), model(x))
    assert torch.equal(gradients(compiled, x, dy)[0], gradients(model, x, dy)[0])
    with torch.autocast("cpu", BF16):
        assert torch.equal(compiled(x), model(x))


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    layer = normal_linear(40, 24)
    compiled = torch.compile(layer, fullgraph=True)
    x, dy = torch.randn(6, 40), torch.randn(6, 24)
    assert torch.equal(compiled(x), layer(x))
    for a, b in zip(
        gradients(compiled, x, dy, layer.weight, layer.bias),
        gradients(layer, x, dy, layer.weight, layer.bias),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


# --- the kept FP8 weight


def weight_quantisations(layer: fastfp8.nn.Linear, x: Tensor) -> int:
    with QuantizeCalls() as calls:
        layer(x)
    return calls.of_weights


def test_an_unchanged_weight_is_quantised_once_for_inference() -> None:
    layer, x = normal_linear(64, 64).eval(), torch.randn(4, 64)
    with torch.no_grad():
        assert [weight_quantisations(layer, x) for _ in range(3)] == [1, 0, 0]
        layer.weight.mul_(2)
        assert [weight_quantisations(layer, x) for _ in range(2)] == [1, 0]
        layer.load_state_dict(normal_linear(64, 64, seed=1).state_dict())
        assert [weight_quantisations(layer, x) for _ in range(2)] == [1, 0]
        version = layer.weight._version
        layer.weight.data = torch.randn(64, 64)
        assert layer.weight._version == version  # the address tells
        assert [weight_quantisations(layer, x) for _ in range(2)] == [1, 0]
        layer.weight = nn.Parameter(torch.randn(64, 64))
        assert [weight_quantisations(layer, x) for _ in range(2)] == [1, 0]
    assert [weight_quantisations(layer, x) for _ in range(2)] == [1, 1]  # grad mode
    layer.train()
    with torch.no_grad():
        assert [weight_quantisations(layer, x) for _ in range(2)] == [1, 1]  # a rollout between steps, a checkpoint
    layer.weight.requires_grad_(False)  # a fixed base under adapters, in grad mode
    assert [weight_quantisations(layer, x) for _ in range(2)] == [1, 0]


def test_a_weight_kept_in_inference_mode_serves_a_backward() -> None:
    layer, x, dy = normal_linear(64, 32), torch.randn(4, 64), torch.randn(4, 32)
    expected = gradients(layer, x, dy)[0]
    layer.weight.requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    assert weight_quantisations(layer, x) == 0
    assert torch.equal(gradients(layer, x, dy)[0], expected)
    with torch.inference_mode():
        layer.freeze()
    assert torch.equal(gradients(layer, x, dy)[0], expected)


def test_a_weight_of_inference_mode_is_not_kept() -> None:
    with torch.inference_mode():
        layer, x = fastfp8.nn.Linear(64, 64).eval(), torch.randn(4, 64)
        before = layer(x)
        layer.weight.mul_(2)  # an inference tensor has no version to tell
        layer.bias.mul_(2)
        assert torch.equal(layer(x), before * 2)


def after_a_fused_step(layer: fastfp8.nn.Linear, x: Tensor) -> None:
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5, fused=True).step()


def after_train(layer: fastfp8.nn.Linear, x: Tensor) -> None:
    layer.weight.data.mul_(3)
    layer.train()


def after_eval(layer: fastfp8.nn.Linear, x: Tensor) -> None:
    layer.weight.data.mul_(3)
    layer.eval()


def after_a_move(layer: fastfp8.nn.Linear, x: Tensor) -> None:
    layer.weight.data.mul_(3)
    layer.to("cpu")


def after_compiled_training(layer: fastfp8.nn.Linear, x: Tensor) -> None:
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    layer.weight.data.mul_(3)


@pytest.mark.parametrize(
    "change",
    [after_a_fused_step, after_train, after_eval, after_a_move, after_compiled_training],
    ids=lambda f: f.__name__,
)
def test_writes_that_do_not_raise_the_version_are_seen(change: Callable[[fastfp8.nn.Linear, Tensor], None]) -> None:
    layer, x = normal_linear(64, 64).eval(), torch.randn(4, 64)
    with torch.no_grad():
        stale = layer(x)
    assert layer._kept is not None
    version = layer.weight._version
    change(layer, x)
    assert layer.weight._version == version, "the version tells: this test has lost its point"
    fresh = fastfp8.nn.Linear(64, 64)
    fresh.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(layer(x), fresh(x))
        assert not torch.equal(layer(x), stale)


# --- as a module


def by_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))  # type: ignore[no-any-return]


def by_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("frozen", [False, True], ids=["master", "frozen"])
@pytest.mark.parametrize("clone", [copy.deepcopy, by_pickle, by_torch_save], ids=lambda f: f.__name__)
def test_copies(clone: Callable[[nn.Module], nn.Module], frozen: bool) -> None:
    layer, x = normal_linear(64, 96, recipe=FP32_SCALES, cache="e5m6").eval(), torch.randn(4, 64)
    with torch.no_grad():
        expected = layer(x)  # leaves a kept FP8 weight behind
        if frozen:
            layer.freeze()
        again = clone(layer)
        assert isinstance(again, fastfp8.nn.Linear)
        assert torch.equal(again(x), expected)
        assert (again.recipe, again.cache, again.frozen) == (FP32_SCALES, "e5m6", frozen)
        if not frozen:
            assert len(pickle.dumps(layer)) < 64 * 96 * 4 + 3000  # no FP8 copy beside the FP32 weight
            again.weight.zero_()
            again.bias.zero_()
            assert not again(x).any()
        assert torch.equal(layer(x), expected)


def test_state_dict_is_that_of_torch_linear() -> None:
    ours, theirs = normal_linear(48, 32), nn.Linear(48, 32)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.weight, ours.weight)
    other = fastfp8.nn.Linear(48, 32)
    other.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 48)
    assert torch.equal(other(x), ours(x))
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "bias"]


def test_to_dtype_and_device() -> None:
    layer, x = normal_linear(64, 64).eval(), torch.randn(4, 64)
    reference = normal_linear(64, 64, dtype=BF16)
    with torch.no_grad():
        reference.weight.copy_(layer.weight)
        reference.bias.copy_(layer.bias)
        layer(x)
        layer.to(BF16)
        assert layer.weight.dtype == BF16
        assert torch.equal(layer(x), reference(x))
    assert layer.to("meta").weight.is_meta
    y = layer(torch.empty(3, 64, device="meta", requires_grad=True))
    assert (y.shape, y.dtype, y.is_meta) == ((3, 64), FP32, True)


def test_repr_tells_what_it_is() -> None:
    layer = fastfp8.nn.Linear(8, 4)
    assert repr(layer) == "Linear(in_features=8, out_features=4, bias=True, cache='e4m3')"
    assert repr(layer.freeze()).endswith("cache='e4m3', frozen)")
    assert repr(fastfp8.nn.Linear(8, 4, recipe=None)).endswith("bias=True, recipe=None)")


# --- freeze


@pytest.mark.parametrize("shape", [(64, 256, 384), (3, 100, 50)], ids=lambda s: "x".join(map(str, s)))
def test_freeze_changes_no_bit_and_drops_the_master_weight(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    layer = normal_linear(k, n)
    x, dy = torch.randn(m, k), torch.randn(m, n)
    y, dx = layer(x), gradients(layer, x, dy)[0]
    assert layer.freeze() is layer
    assert torch.equal(layer(x), y)
    assert torch.equal(gradients(layer, x, dy)[0], dx)
    assert layer.freeze() is layer
    assert {name: t.dtype for name, t in layer.state_dict().items()} == {
        "bias": FP32,
        "weight_data": E4M3,
        "weight_scale": FP32,
    }
    padded = (-(-k // 16) * 16) * (-(-n // 16) * 16)
    blocks = -(-k // 128) * -(-n // 128)
    assert sum(t.nbytes for t in layer.state_dict().values()) == padded + 4 * blocks + 4 * n
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer(x).requires_grad


def test_frozen_state_dict_round_trip() -> None:
    layer, other = normal_linear(100, 50).freeze(), fastfp8.nn.Linear(100, 50).freeze()
    x = torch.randn(4, 100)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="weight_data"):
        fastfp8.nn.Linear(100, 50).load_state_dict(layer.state_dict())


def test_frozen_weight_survives_a_change_of_dtype() -> None:
    layer = normal_linear(256, 64).freeze()
    data, scale = layer.weight_data.clone(), layer.weight_scale.clone()
    for change in (
        lambda: layer.bfloat16(),
        lambda: layer.to("cpu", FP16),
        lambda: layer.double(),
        lambda: layer.to(BF16),
    ):
        change()
        assert (layer.weight_data.dtype, layer.weight_scale.dtype) == (E4M3, FP32)
        assert torch.equal(layer.weight_data.view(torch.uint8), data.view(torch.uint8))
        assert torch.equal(layer.weight_scale, scale)
    assert layer.bias.dtype == BF16
    assert layer(torch.randn(2, 256, dtype=BF16)).dtype == BF16
    assert layer.to("meta").weight_data.is_meta


def test_training_a_frozen_layer_is_a_clear_error() -> None:
    layer = normal_linear(16, 16).freeze()
    with pytest.raises(ValueError, match=r"requires_grad_.*frozen.*dropped the master weight"):
        layer.requires_grad_()
    with pytest.raises(AttributeError, match=r"frozen.*dropped the master weight"):
        layer.weight  # noqa: B018
    assert not hasattr(layer, "weight")
    assert layer.requires_grad_(False) is layer
    assert layer.train().training  # dropout elsewhere may train; this layer still only passes gradients on
    with pytest.raises(AttributeError, match="no_such_name"):
        layer.no_such_name  # noqa: B018


# --- from_float and errors


def test_from_float_shares_the_parameters() -> None:
    linear = nn.Linear(32, 48).eval()
    random_state = torch.get_rng_state()
    layer = fastfp8.nn.Linear.from_float(linear, FP32_SCALES, "bf16")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features, layer.training) == (32, 48, False)
    assert (layer.recipe, layer.cache) == (FP32_SCALES, "bf16")
    assert fastfp8.nn.Linear.from_float(nn.Linear(32, 48, bias=False)).bias is None


class Subclass(nn.Linear):
    pass


def hooked() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda *_: None)
    return linear


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Subclass(4, 4), TypeError, "no subclass, got Subclass"),
        (lambda: nn.ReLU(), TypeError, "got ReLU"),
        (lambda: nn.Linear(4, 4, dtype=torch.float64), TypeError, "got torch.float64"),
        (hooked, ValueError, "no hooks.*1 in _forward_hooks"),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), ValueError, "a Parameter 'weight'"),
    ],
    ids=["subclass", "no-linear", "float64", "hook", "weight_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_from_float_refuses(make: Callable[[], nn.Linear], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"from_float: argument 'linear': .*{text}"):
        fastfp8.nn.Linear.from_float(make())


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([1.0], TypeError, "a torch.Tensor, got list"),
        (torch.zeros(2, 16, dtype=torch.float64), TypeError, "got torch.float64"),
        (torch.zeros(2, 16, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(2, 15), ValueError, r"a last dimension of 16, got shape \(2, 15\)"),
        (torch.zeros(()), ValueError, r"a last dimension of 16, got shape \(\)"),
        (torch.zeros(2, 16, device="meta"), ValueError, "device cpu, where 'weight' is, got meta"),
    ],
    ids=["list", "float64", "int64", "size", "scalar", "device"],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["master", "frozen"])
def test_input_errors_name_what_was_wrong(x: Any, error: type[Exception], text: str, frozen: bool) -> None:
    layer = fastfp8.nn.Linear(16, 8)
    if frozen:
        layer.freeze()
    with pytest.raises(error, match=f"nn.Linear: argument 'input': expected .*{text}"):
        layer(x)


def test_parameters_of_another_dtype_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"nn\.Linear: argument 'dtype'.*torch.float64"):
        fastfp8.nn.Linear(4, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"torch\.float64"):
        fastfp8.nn.Linear(16, 16).double()(torch.zeros(2, 16))
