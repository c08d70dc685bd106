"""fastfp8.numerics: what is counted in a model's FP8 modules, and the report of it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fastfp8
from fastfp8 import numerics
from fastfp8.numerics import Counts

ROLES = fastfp8.nn.Linear.ROLES


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(fastfp8.nn.Linear(128, 64), nn.ReLU(), fastfp8.nn.Linear(64, 32), nn.Linear(32, 3))


def step(layers: nn.Module, tokens: int = 16) -> None:
    x = torch.linspace(-4, 4, tokens * 128).view(tokens, 128).requires_grad_()
    layers(x).square().sum().backward()


def report(layers: nn.Module, reset: bool = True) -> tuple[dict[str, dict[str, Counts]], list[str]]:
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
        with pytest.raises(TypeError, match=r"argument 'model': expected a torch\.nn\.Module, got int 3"):
            call(3)  # type: ignore[arg-type]
