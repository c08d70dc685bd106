"""The negative controls of training, in forty steps: what the report says not to do is visibly worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import controls


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, list[float]]]:
    return controls.run(40)


@pytest.mark.parametrize("task", controls.TASKS)
def test_the_default_recipe_learns_as_bf16_does(task: str, found: dict[str, dict[str, list[float]]]) -> None:
    bf16, fp8 = (controls.end(found[task][recipe]) for recipe in ("bf16", "fp8"))
    assert bf16 < 0.75
    assert fp8 == pytest.approx(bf16, rel=0.03)


@pytest.mark.parametrize("task", controls.TASKS)
def test_the_control_does_not_learn(task: str, found: dict[str, dict[str, list[float]]]) -> None:
    (control,) = (losses for recipe, losses in found[task].items() if recipe not in ("bf16", "fp8"))
    assert controls.end(control) > 0.95
    assert controls.end(control) > 1.25 * controls.end(found[task]["fp8"])


def test_the_command_keeps_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: make setup installs it")
    controls.main(["--steps", "2", "--out", str(tmp_path)])
    kept = json.loads((tmp_path / "controls.json").read_text())
    assert kept["steps"] == 2
    assert kept["losses"].keys() == controls.TASKS.keys()
    assert "fp8, no promotion" in capsys.readouterr().out
    assert (tmp_path / "controls.png").read_bytes()[:4] == b"\x89PNG"
