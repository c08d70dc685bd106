"""``python -m fastfp8.train``: one process and several, what they leave, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from train_cases import TEXT

from fastfp8.train import Curve, command

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--config", "micro", "--batch", "4", "--length", "32", "--warmup", "2", "--device", "cpu"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return str(path)


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastfp8.train", *SMALL, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def result(out: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((out / "loss.json").read_text())
    return whole


def test_compare(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: make setup installs it")
    where = ["--text", text, "--out", str(tmp_path), "--save-every", "3", "--log-every", "2"]
    command.main([*SMALL, *where, "--steps", "6", "--compare", "fp32,bf16"])
    shown = capsys.readouterr()
    whole = result(tmp_path)
    assert whole["reference"] == "fp32"
    assert whole["options"]["steps"] == 6
    assert whole["text"] == {"source": text, "bytes": len(TEXT)}
    curves = {name: Curve(**curve) for name, curve in whole["curves"].items()}
    assert [len(curve.loss) for curve in curves.values()] == [6, 6]
    assert 0 < whole["gaps"]["bf16"]["largest"] < 0.01
    assert f"{whole['gaps']['bf16']['largest']:.3%}" in shown.out
    assert shown.err.count("fp32: step") == shown.err.count("bf16: step") == 3
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in sorted((tmp_path / "bf16").iterdir())] == ["step-00000003", "step-00000006"]


def test_watching(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--text", text, "--out", str(tmp_path), "--save-every", "0", "--watch-every", "2"]
    command.main([*SMALL, *where, "--steps", "3", "--precision", "fp8"])
    seen = json.loads((tmp_path / "fp8" / "numerics.json").read_text())
    assert {row["step"] for row in seen["rows"]} == {0, 2}
    layers = {row["layer"] for row in seen["rows"]}
    assert {"layers.0.attention.o_proj", "layers.0.ffn.gate_up", "layers.0.ffn.shared.down"} <= layers
    assert all(row["sqnr"] > 25 for row in seen["rows"] if row["role"] == "activation")
    assert "layers.0.ffn.gate_up" in capsys.readouterr().err


def test_processes_are_started_and_go_on(tmp_path: Path, text: str) -> None:
    """Two ranks. What they finished, they find again."""
    where = ("--text", text, "--out", str(tmp_path), "--precision", "bf16", "--ranks", "2", "--save-every", "2")
    first = started(*where, "--steps", "4", "--schedule", "constant")
    assert first.returncode == 0, first.stderr
    assert result(tmp_path)["ranks"] == 2
    before = result(tmp_path)["curves"]["bf16"]["loss"]
    assert len(before) == 4
    again = started(*where, "--steps", "4", "--schedule", "constant", "--resume")
    assert again.returncode == 0, again.stderr
    assert "step" not in again.stderr
    assert result(tmp_path)["curves"]["bf16"]["loss"] == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--compare", "bf16,int4"], "--compare: expected some of fp32, bf16, fp8"),
        (["--compare", "bf16,bf16"], "each once, got bf16,bf16"),
        (["--precision", "int4"], "argument --precision: invalid choice: 'int4'"),
        (["--config", "huge"], "argument --config: invalid choice: 'huge'"),
        (["--ranks", "0"], "--ranks must be positive"),
        (["--save-every", "-1"], "--save-every must be positive"),
    ],
)
def test_arguments(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert text in capsys.readouterr().err
