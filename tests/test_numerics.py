"""fastfp8.numerics: what is counted in a model's FP8 modules, and the report of it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fastfp8
from fastfp8 import numerics
from fastfp8.numerics import Counts, new_counters
from fastfp8.optim import AdamW

ROLES = fastfp8.nn.Linear.ROLES


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(fastfp8.nn.Linear(128, 64), nn.ReLU(), fastfp8.nn.Linear(64, 32), nn.Linear(32, 3))


def step(layers: nn.Module, tokens: int = 16) -> None:
    x = torch.linspace(-4, 4, tokens * 128).view(tokens, 128).requires_grad_()
    layers(x).square().sum().backward()


def report(layers: nn.Module | AdamW, reset: bool = True) -> tuple[dict[str, dict[str, Counts]], list[str]]:
    out = io.StringIO()
    found = numerics.report(layers, file=out, reset=reset)
    return found, out.getvalue().splitlines()


def test_every_role_is_counted() -> None:
    layers = model()
    numerics.start(layers)
    step(layers)
    found, lines = report(layers)
    sizes = {"activation": (16 * 128, 16 * 64), "weight": (64 * 128, 32 * 64), "gradient": (16 * 64, 16 * 32)}
    assert list(found) == ["0", "2"]
    for name, counts in found.items():
        assert tuple(counts) == ROLES
        for role, counted in counts.items():
            assert counted.values == sizes[role.split(",")[0]][int(name) // 2]
            assert counted.nonfinite == counted.saturated == 0
    assert lines[0].split() == ["layer", "role", "values", "saturated", "underflowed", "subnormal", "nonfinite"]
    assert len(lines) == 1 + 2 * len(ROLES)


def test_counts_are_those_of_the_codes() -> None:
    layer = fastfp8.nn.Linear(128, 64)
    numerics.start(layer)
    x = torch.randn(8, 128) * 2.0 ** -torch.arange(128.0).remainder(40)
    x[3, 5], x[4, 6] = torch.inf, torch.nan
    layer(x)
    counted = report(layer)[0]["Linear"]["activation"]
    codes = fastfp8.quantize(x, pow2=True).data.view(torch.uint8) & 0x7F
    small = int(((codes > 0) & (codes < 8)).sum())
    assert counted == Counts(8 * 128, 1, int(((codes == 0) & (x != 0)).sum()), small, 2)
    assert counted.share("nonfinite") == 2 / 1024
    assert Counts(0, 0, 0, 0, 0).share("saturated") == 0


def test_the_first_report_starts_and_each_begins_anew() -> None:
    layers = model()
    assert report(layers) == ({}, ["fastfp8.numerics: nothing was counted yet in 2 FP8 modules"])
    step(layers)
    once, _ = report(layers, reset=False)
    step(layers)
    twice, _ = report(layers)
    assert twice["0"]["activation"].values == 2 * once["0"]["activation"].values > 0
    assert report(layers)[0] == {}
    numerics.stop(layers)
    step(layers)
    assert report(layers)[0] == {}


def test_counting_changes_no_bit() -> None:
    plain, counted = model(), model()
    numerics.start(counted)
    for layers in (plain, counted):
        step(layers)
    for left, right in zip(plain.parameters(), counted.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_count_too(backend: str) -> None:
    torch._dynamo.reset()
    layers = model()[:3]
    numerics.start(layers)
    step(layers)
    eager, _ = report(layers)
    compiled = torch.compile(layers, backend=backend, fullgraph=True)
    for _ in range(2):
        step(compiled)
    found, _ = report(layers)
    assert found == {n: {r: Counts(*(2 * v for v in c)) for r, c in roles.items()} for n, roles in eager.items()}


def test_copies_and_state_are_without_counters() -> None:
    layers = model()
    numerics.start(layers)
    assert [m.counters for m in copy.deepcopy(layers) if isinstance(m, fastfp8.nn.Linear)] == [None, None]
    assert not [key for key in layers.state_dict() if "counters" in key]


def test_what_is_no_module_is_an_error() -> None:
    for call in (numerics.start, numerics.stop, numerics.report):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module or a fastfp8\.optim\.AdamW, got int 3"):
            call(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"or a fastfp8\.optim\.AdamW, got SGD"):
        numerics.start(torch.optim.SGD([torch.zeros(1)]))


def trained(optimizer: AdamW, count: int = 1) -> None:
    for _ in range(count):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()


def test_an_optimizer_counts_the_weights_that_it_writes_in_fp8() -> None:
    weight, bias = nn.Parameter(torch.linspace(0, 1, 130 * 136).view(130, 136)), nn.Parameter(torch.ones(7))
    experts, plain = nn.Parameter(torch.ones(2, 3, 16)), nn.Parameter(torch.ones(4, 4))
    fp8 = [("up.weight", weight), ("up.bias", bias), ("experts", experts)]
    groups = [{"params": fp8, "emit_fp8": True}, {"params": [("plain", plain)], "emit_fp8": False}]
    optimizer = AdamW(groups)
    assert report(optimizer) == ({}, ["fastfp8.numerics: nothing was counted yet in AdamW"])
    trained(optimizer)
    found, lines = report(optimizer)
    assert list(found) == ["AdamW"]
    assert {name: counts.values for name, counts in found["AdamW"].items()} == {"up.weight": 130 * 136, "experts": 96}
    counts = new_counters("cpu")
    fastfp8.quantize(weight.detach(), (128, 128), counters=counts)
    assert found["AdamW"]["up.weight"] == numerics.totals(counts)
    assert found["AdamW"]["up.weight"].subnormal > 0
    assert [line.split()[:2] for line in lines[1:]] == [["AdamW", "up.weight"], ["AdamW", "experts"]]
    trained(optimizer, 2)
    assert report(optimizer)[0]["AdamW"]["experts"].values == 2 * 96
    numerics.stop(optimizer)
    trained(optimizer)
    assert optimizer.counters is None


def test_an_optimizer_counts_as_it_changes_no_bit() -> None:
    """Parameters without names go by their place; one added later is not counted before the next start."""
    results = []
    for counted in (False, True):
        params = [nn.Parameter(torch.linspace(-1, 1, 48).view(3, 16)) for _ in range(3)]
        optimizer = AdamW(params[:2], emit_fp8=True)
        if counted:
            numerics.start(optimizer)
            optimizer.quantized(params[1])  # before the first step it is quantised there
        optimizer.add_param_group({"params": params[2:]})
        trained(optimizer)
        results.append([t for param in params for t in (param.detach(), optimizer.quantized(param)[0].data.float())])
    assert all(torch.equal(*both) for both in zip(*results, strict=True))
    assert {name: c.values for name, c in report(optimizer)[0]["AdamW"].items()} == {"0": 48, "1": 96}
    assert copy.deepcopy(optimizer).counters is None
    numerics.start(optimizer)
    trained(optimizer)
    assert list(report(optimizer)[0]["AdamW"]) == ["0", "1", "2"]
