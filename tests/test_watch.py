"""fastfp8.numerics.watch: what is seen of each layer at chosen steps, and that the others pay nothing."""

from __future__ import annotations

import builtins
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfp8
from fastfp8 import Format, Recipe, numerics
from fastfp8.numerics import Counts
from fastfp8.observation import FIELDS, new_statistics, observe

ROLES = fastfp8.nn.Linear.ROLES


def model() -> nn.Sequential:
    torch.manual_seed(0)
    norm = fastfp8.nn.RMSNormLinear(64, 48, recipe=Recipe())
    return nn.Sequential(fastfp8.nn.Linear(100, 64), nn.ReLU(), norm, fastfp8.nn.Linear(48, 30, cache="e5m6"))


def batch(tokens: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, 100, generator=generator) * 2.0 ** -torch.arange(100.0).remainder(30)


def step(layers: nn.Module, x: Tensor | None = None) -> None:
    layers((batch() if x is None else x).requires_grad_()).square().sum().backward()


def snr(exact: Tensor, actual: Tensor) -> float:
    exact = exact.double()
    return float(10 * torch.log10(exact.square().sum() / (exact - actual.double()).square().sum()))


def test_counts_are_those_of_the_kernels() -> None:
    layers, x = model(), batch()
    x[3, 5], x[4, 6] = torch.inf, torch.nan
    numerics.start(layers)
    with numerics.watch(layers, every=1) as watch:
        step(layers, x)
        assert watch.step()
    counted = {
        (name, role): numerics.totals(t)
        for name, module in layers.named_children()
        for role, t in (getattr(module, "counters", None) or {}).items()
    }
    assert len(watch.rows) == 3 * len(ROLES)
    for row in watch.rows:
        if row.role == "activation, transposed" and row.layer != "2":
            continue  # the kernels see what was kept of the input
        assert Counts(*row[3:8])[1:] == counted[row.layer, row.role][1:]  # the kernels' values have the padding
        assert row.values <= counted[row.layer, row.role].values
    first = next(row for row in watch.rows if row[1:3] == ("0", "activation"))
    assert (first.values, first.saturated, first.nonfinite) == (20 * 100, 1, 2)
    assert first.underflowed > 100


def test_signal_to_noise_and_amax_are_those_of_the_tensors() -> None:
    layer = fastfp8.nn.Linear(256, 64, bias=False)
    x, dy = torch.randn(40, 256), torch.randn(40, 64)
    with numerics.watch(layer) as watch:
        layer(x.requires_grad_()).backward(dy)
        watch.step()
    rows = {row.role: row for row in watch.rows}
    assert {(row.step, row.layer) for row in watch.rows} == {(0, "Linear")}
    x8 = fastfp8.quantize(x.detach(), pow2=True).dequantize()
    w8 = fastfp8.quantize(layer.weight.detach(), (128, 128)).dequantize()
    expected = {
        "activation": (x, x8),
        "weight": (layer.weight, w8),
        "gradient": (dy, fastfp8.quantize(dy, pow2=True).dequantize()),
        "activation, transposed": (x, fastfp8.quantize(x8, (128, 1), pow2=True).dequantize()),
        "gradient, transposed": (dy, fastfp8.quantize(dy, (128, 1), pow2=True).dequantize()),
    }
    for role, (exact, actual) in expected.items():
        assert rows[role].sqnr == pytest.approx(snr(exact.detach(), actual), abs=1e-4), role
        assert rows[role].values == exact.numel()
    blocks = x.detach().abs().view(40, 2, 128).amax(2)
    assert (rows["activation"].amax_max, rows["activation"].amax_min) == (blocks.max(), blocks.min())
    assert rows["weight"].amax_min == min(layer.weight[:, cols].abs().max() for cols in (slice(128), slice(128, None)))
    assert rows["gradient, transposed"].amax_min == dy.abs().amax(0).min()


@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=str)
def test_observe_of_stacks_padding_and_zeros(block: tuple[int, int]) -> None:
    x = torch.randn(3, 150, 200)
    x[1, :128, :128] = 0
    padded = fastfp8.quantize(nn.functional.pad(x, (0, 8, 0, 10)), block)
    statistics = new_statistics("cpu")
    for _ in range(2):
        observe(statistics, x, padded)
    found = dict(zip(FIELDS, statistics.tolist(), strict=True))
    assert found["values"] == 2 * x.numel()
    assert 10 * math.log10(found["signal"] / found["error"]) == pytest.approx(
        snr(x, padded.dequantize()[:, :150, :200]), abs=1e-4
    )
    assert found["amax_max"] == x.abs().max()
    assert found["amax_min"] > 0
    untouched = new_statistics("cpu")
    observe(untouched, x[:, :0], padded)
    observe(untouched, x, None)
    assert torch.equal(untouched, new_statistics("cpu"))


def test_what_is_not_there_has_no_row_and_zeros_have_no_noise() -> None:
    layer = fastfp8.nn.Linear(32, 16)
    with numerics.watch(layer, every=1) as watch:
        assert str(watch) == "fastfp8.numerics: nothing was watched yet in 1 FP8 modules"
        with torch.no_grad():
            layer(torch.zeros(2, 32))
        watch.step()
        assert [row.role for row in watch.rows] == ["activation", "weight"]
        assert watch.rows[0][8:] == (math.inf, 0.0, 0.0)
        watch.step()  # nothing ran in it
        assert [row.step for row in watch.last()] == [0, 0]
        layer(torch.randn(2, 32))
    assert len(watch.rows) == 2  # a step that is not over is forgotten
    assert layer.statistics is None


def test_only_watched_steps_are_looked_at_and_no_bit_changes() -> None:
    plain, watched = model(), model()
    seen = []
    with numerics.watch(watched, every=3) as watch:
        for _ in range(5):
            seen.append([m.statistics is not None for m in watched if hasattr(m, "statistics")])
            step(plain)
            step(watched)
            assert watch.step() == seen[-1][0]
    assert seen == [[True] * 3, [False] * 3, [False] * 3, [True] * 3, [False] * 3]
    assert sorted({row.step for row in watch.rows}) == [0, 3]
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert [m.statistics for m in copy.deepcopy(watched) if hasattr(m, "statistics")] == [None] * 3


def test_caches_differ_in_the_noise_of_wgrads_operand_only() -> None:
    """With FP32 scales, between which re-tiling from FP8 loses 3 dB."""
    found = {}
    recipe = Recipe(activation=Format((1, 128), pow2=False))
    for cache in ("e4m3", "e5m6", "bf16"):
        torch.manual_seed(0)
        layer = fastfp8.nn.Linear(128, 32, recipe=recipe, cache=cache)
        with numerics.watch(layer) as watch:
            layer(torch.randn(128, 128)).sum().backward()
            watch.step()
        found[cache] = {row.role: row.sqnr for row in watch.rows}
    role = "activation, transposed"
    assert found["e4m3"][role] < found["e4m3"]["activation"] - 2
    assert found["bf16"][role] - 0.3 < found["e5m6"][role] < found["bf16"][role]
    assert found["bf16"][role] > found["bf16"]["activation"] - 0.3
    assert found["e5m6"]["activation"] == found["bf16"]["activation"] == found["e4m3"]["activation"]


def test_weights_that_are_shared_are_seen_too() -> None:
    layers = model()
    optimizer = fastfp8.optim.AdamW(layers.parameters(), emit_fp8=True)
    fastfp8.nn.share_weights(layers, optimizer)
    with numerics.watch(layers, every=1) as watch:
        for _ in range(2):
            step(layers)
            optimizer.step()
            watch.step()
    assert [row.step for row in watch.rows if row[1:3] == ("0", "weight")] == [0, 1]
    assert all(row.sqnr > 25 for row in watch.rows if row.role == "weight")


def test_compiled_layers_are_watched_too() -> None:
    torch._dynamo.reset()
    eager, layers = model()[0], model()[0]
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    found = []
    for module, runs in ((eager, eager), (layers, compiled)):
        with numerics.watch(module, every=2) as watch:
            for _ in range(3):
                step(runs)
                watch.step()
        found.append(watch.rows)
    assert len(found[0]) == 2 * len(ROLES)
    assert [row[:8] for row in found[1]] == [row[:8] for row in found[0]]
    assert all(a.sqnr == pytest.approx(b.sqnr, abs=1e-6) for a, b in zip(*found, strict=True))


def test_table_json_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    layers = model()
    with numerics.watch(layers, every=2) as watch:
        for _ in range(3):
            step(layers)
            watch.step()
    lines = str(watch).splitlines()
    assert lines[0] == "step 2"
    assert lines[1].split() == [
        *("layer", "role", "values", "SQNR", "dB", "underflowed", "subnormal", "saturated", "nonfinite", "amax")
    ]
    assert len(lines) == 2 + 3 * len(ROLES)
    text = watch.json(tmp_path / "watch.json")
    whole = json.loads((tmp_path / "watch.json").read_text())
    assert whole == json.loads(text)
    assert (whole["every"], whole["steps"]) == (2, 3)
    assert [tuple(row.values()) for row in whole["rows"]] == [tuple(row) for row in watch.rows]
    watch.rows[0] = watch.rows[0]._replace(sqnr=math.inf)
    assert json.loads(watch.json())["rows"][0]["sqnr"] is None
    watch.plot(tmp_path / "watch.png")
    assert (tmp_path / "watch.png").read_bytes()[1:4] == b"PNG"


def test_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for arguments, error, text in (
        ((3, 1), TypeError, "argument 'model': expected a torch.nn.Module, got int 3"),
        ((model(), 0), ValueError, "argument 'every': expected 1 or more, got 0"),
        ((model(), 1.5), TypeError, "argument 'every': expected an integer, got float 1.5"),
    ):
        with pytest.raises(error, match=text):
            numerics.watch(arguments[0], every=arguments[1])  # type: ignore[arg-type]
    layers = model()
    with numerics.watch(layers) as watch:
        with pytest.raises(ValueError, match="expected a watched step with FP8 modules in it, got none"):
            watch.plot(tmp_path / "none.png")
        step(layers)
        watch.step()
    real = builtins.__import__

    def without_matplotlib(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match="needs the package matplotlib: pip install matplotlib"):
        watch.plot(tmp_path / "none.png")
