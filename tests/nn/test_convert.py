"""fastfp8.nn.convert: what is swapped, what is left alone, what stays shared."""

import copy
import dataclasses
import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fastfp8.nn
from fastfp8 import Format, Recipe

FP8Linear = fastfp8.nn.Linear


class Block(nn.Module):
    """A model with a Linear in each kind of container, one of them twice, and a weight tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 96)
        self.layers = nn.ModuleList([nn.Linear(96, 96), nn.Sequential(nn.GELU(), nn.Linear(96, 96, bias=False))])
        self.again = self.layers[0]
        self.table = nn.ModuleDict({"down": nn.Linear(96, 64)})
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.up(self.embed(tokens))
        for layer in [*self.layers, self.again]:
            x = x + layer(x)
        return self.head(self.table["down"](x))  # type: ignore[no-any-return]


LINEARS = ["up", "layers.0", "layers.1.1", "again", "table.down", "head"]
# Nothing stays by its name.
ALL = Recipe(high_precision=())
TOKENS = torch.arange(20).reshape(2, 10)


def signal_to_noise(actual: torch.Tensor, exact: torch.Tensor) -> float:
    actual, exact = actual.detach(), exact.detach()
    return float(10 * torch.log10(exact.square().sum() / (actual - exact).square().sum()))


def test_swaps_every_linear_in_place_over_the_same_parameters() -> None:
    model = Block()
    exact = model(TOKENS)
    parameters = dict(model.named_parameters())
    state = list(model.state_dict())
    conversion = fastfp8.nn.convert(model, ALL)
    assert conversion.module is model
    converted = [model.get_submodule(name) for name in LINEARS]
    assert all(type(layer) is FP8Linear and layer.recipe is ALL for layer in converted)
    assert model.again is model.layers[0]
    assert model.head.weight is model.embed.weight
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    assert list(model.state_dict()) == state
    actual = model(TOKENS)
    assert not torch.equal(actual, exact)
    assert signal_to_noise(actual, exact) > 21  # five layers deep: measured 22.8
    actual.sum().backward()
    assert all(p.grad is not None for p in parameters.values())


def test_filter_sees_each_linear_once_by_its_first_name() -> None:
    model, seen = Block(), {}

    def keep_head(name: str, linear: nn.Linear) -> bool:
        assert seen.setdefault(name, linear) is linear
        return name != "head"

    conversion = fastfp8.nn.convert(model, ALL, filter=keep_head)
    assert conversion.left["head"] == "filter"
    assert list(seen) == ["up", "layers.0", "layers.1.1", "table.down", "head"]
    assert seen["up"].out_features == 96
    assert type(model.head) is nn.Linear
    assert type(model.again) is FP8Linear


def test_freeze_drops_the_weights_and_changes_no_output() -> None:
    model, frozen = (fastfp8.nn.convert(Block(), ALL, freeze=freeze).module for freeze in (False, True))
    assert torch.equal(frozen(TOKENS), model(TOKENS))
    assert all(frozen.get_submodule(name).frozen for name in LINEARS)
    assert set(dict(frozen.named_parameters())) == {"embed.weight", "up.bias", "layers.0.bias", "table.down.bias"}


def test_a_root_linear_is_returned_anew() -> None:
    linear = nn.Linear(16, 8)
    assert fastfp8.nn.convert(linear, filter=lambda name, _: name != "").module is linear
    converted = fastfp8.nn.convert(linear).module
    assert type(converted) is FP8Linear
    assert converted.weight is linear.weight


class Special(nn.Linear):
    pass


def test_what_is_left_is_told_with_the_reason() -> None:
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(4, 8),
            "norm": nn.RMSNorm(8),
            "gate": nn.Linear(8, 8),
            "gate_proj": nn.Linear(8, 8),
            "o_proj": nn.Linear(8, 8),
            "special": Special(8, 8),
            "lazy": nn.LazyLinear(8),
            "hooked": hooked,
            "fp64": nn.Linear(8, 8, dtype=torch.float64),
            "frozen": FP8Linear(8, 8).freeze(),
            "conv": nn.Conv1d(1, 1, 1),
            "mine": FP8Linear(8, 8, recipe=None),
            "relu": nn.ReLU(),
        }
    )
    before = dict(model.items())
    conversion = fastfp8.nn.convert(model)
    assert conversion.changed == {
        "gate_proj": "Linear, input kept as e4m3",
        "o_proj": "Linear, input kept as e5m6",
        "mine": "Linear, input kept as e4m3",
    }
    assert conversion.left == {
        "embed": "embedding: section 3.3.1",
        "norm": "norm: section 3.3.1",
        "gate": "high_precision pattern 'gate': section 3.3.1",
        "special": "Special, a subclass of Linear: its owner may read the weight without calling it",
        "lazy": "LazyLinear, a subclass of Linear: its owner may read the weight without calling it",
        "hooked": "has hooks: register them after the conversion",
        "fp64": "dtype torch.float64",
        "frozen": "frozen: it has no master weight",
        "conv": "Conv1d is no Linear",
    }
    assert all(model[name] is before[name] for name in conversion.left)
    assert model["mine"] is before["mine"]
    assert model["mine"].recipe == conversion.recipe == Recipe()
    lines = str(conversion).splitlines()
    assert lines[0] == "3 modules in FP8, 9 left in high precision"
    assert [line.split()[:2] for line in lines[1:3]] == [["fp8", "gate_proj"], ["fp8", "o_proj"]]
    assert lines[4].split() == ["left", "embed", "embedding:", "section", "3.3.1"]


def test_a_second_conversion_changes_the_recipe_and_none_takes_it_away() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    exact = copy.deepcopy(model)
    x = torch.randn(5, 64)
    fastfp8.nn.convert(model)
    layers = list(model)
    other = Recipe(activation=Format((1, 128), pow2=False), high_precision=("2",))
    conversion = fastfp8.nn.convert(model, other)
    assert list(model) == layers
    assert model[0].recipe is other
    assert model[2].recipe is None
    assert conversion.left == {"2": "high_precision pattern '2': section 3.3.1"}
    assert not torch.equal(model(x), exact(x))
    assert fastfp8.nn.convert(model, None).left == {"0": "the recipe is None", "2": "the recipe is None"}
    assert torch.equal(model(x), exact(x))


def test_multihead_attention_still_works() -> None:
    """Its out_proj is a subclass whose weight it reads, so it stays; calling it is never FP8."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32)
    expected = attention(x, x, x)[0]
    fastfp8.nn.convert(attention, freeze=True)
    assert type(attention.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    assert torch.equal(attention(x, x, x)[0], expected)


@pytest.fixture
def _no_mha_fastpath() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("_no_mha_fastpath")
def test_transformer_encoder_layer_without_its_fast_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        exact = layer(x)
        fastfp8.nn.convert(layer, freeze=True)
        noise = signal_to_noise(layer(x), exact)
    assert 25 < noise < 60  # FP8, not FP32: measured 38.7


def test_transformer_encoder_layer_with_its_fast_path_is_a_clear_error_once_frozen() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    fastfp8.nn.convert(layer, freeze=True)
    with torch.no_grad(), pytest.raises(AttributeError, match="frozen"):
        layer(torch.randn(2, 5, 64))


def test_an_argument_of_another_type_is_an_error() -> None:
    model = Block()
    with pytest.raises(TypeError, match=r"argument 'module': expected a torch\.nn\.Module, got list"):
        fastfp8.nn.convert([model])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"argument 'recipe': expected a fastfp8\.Recipe or None, got str"):
        fastfp8.nn.convert(model, "fp8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"argument 'freeze': expected a bool, got int"):
        fastfp8.nn.convert(model, freeze=1)  # type: ignore[arg-type]


def test_a_recipe_prints_every_role_apart_from_its_value_and_section() -> None:
    patterns = tuple(f"a_long_name_{i}" for i in range(5))
    lines = str(Recipe(high_precision=patterns)).splitlines()[1:]
    cells = {line.split()[0]: re.split(r" {2,}", line.strip()) for line in lines}
    assert cells.keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert cells["cached_after_attention"] == ["cached_after_attention", "e5m6", "3.3.3"]
    assert cells["high_precision"] == ["high_precision", ", ".join(patterns), "3.3.1"]
    assert cells["weight"] == ["weight", "e4m3 128x128, fp32 scales", "3.3.2"]
