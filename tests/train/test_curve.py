"""Smoothing and gaps by hand, the JSON, the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastfp8.train import Curve, gap, smoothed
from fastfp8.train.curve import as_json, draw, write_atomically


def test_smoothed() -> None:
    assert smoothed([]) == []
    assert smoothed([4.0, 2.0, 2.0]) == pytest.approx([4.0, 3.8, 3.62])
    assert smoothed([1.0, 0.0], 0.5) == [1.0, 0.5]


def test_gap_is_of_the_last_half() -> None:
    reference = [2.0] * 8
    losses = [9.0, 9.0, *[2.0] * 6]  # far off at first: 7 * 0.9**k * 0.9 over it, relative to 2
    relative = [3.5 * (1 - 0.1 * 0) * 0.9 ** max(k - 1, 0) for k in range(8)]
    found = gap(losses, reference)
    assert found.final == pytest.approx(relative[7])
    assert found.largest == pytest.approx(relative[4])
    assert found.mean == pytest.approx(sum(relative[4:]) / 4)
    below = gap([2.0, 2.0, 1.0, 1.0], [2.0] * 4)
    assert below.final == pytest.approx(-0.095)
    assert below.largest == pytest.approx(0.095)
    with pytest.raises(ValueError, match=r"train.gap: argument 'losses': expected 4 steps, got 3"):
        gap([1.0] * 3, [1.0] * 4)


def test_a_loss_that_is_no_number_is_the_largest_gap() -> None:
    assert math.isnan(gap([1.0, 1.0, math.nan, 9.0], [1.0] * 4).largest)


def curves() -> dict[str, Curve]:
    made = {}
    for name, up in (("bf16", 0.0), ("fp8", 0.01)):
        losses = [3.0 / (1 + k / 10) + 1 + up for k in range(40)]
        made[name] = Curve(name, losses, losses, losses, losses, [0.5] * 40, {"parameters": 1.0, "averages": 1.0})
    return made


def test_json() -> None:
    made = curves()
    whole = json.loads(as_json(made, {"ranks": 2}))
    assert whole["ranks"] == 2
    assert whole["reference"] == "bf16"
    assert whole["gaps"] == {"fp8": gap(made["fp8"].loss, made["bf16"].loss)._asdict()}
    assert whole["curves"]["fp8"]["loss"] == pytest.approx(made["fp8"].loss, rel=1e-5)
    assert Curve(**whole["curves"]["bf16"]).held_out == {"parameters": 1.0, "averages": 1.0}


@pytest.mark.parametrize("count", [1, 2])
def test_picture(tmp_path: Path, count: int) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: make setup installs it")
    path = tmp_path / "new" / "loss.png"
    draw(dict(list(curves().items())[:count]), "a title", path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size > 10_000


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "loss.json"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["loss.json"]
