"""FP8 trains as BF16 does: the same weights and data, forty steps. The long run is in the README."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_cases import TEXT

from fastfp8.train import PRECISIONS, Curve, Options, Ranks, gap, load_text, train

OPTIONS = Options(config="micro", steps=40, batch=8, length=64, warmup=10, lr=1e-3)


@pytest.fixture(scope="module")
def text() -> bytes:
    try:
        return load_text()
    except ValueError:
        return TEXT  # the plays are not installed


def curve(precision: str, text: bytes, out: Path) -> Curve:
    return train(OPTIONS, PRECISIONS[precision], precision, text, Ranks(), out)


def test_forty_steps(text: bytes, tmp_path: Path) -> None:
    bf16, fp8 = curve("bf16", text, tmp_path), curve("fp8", text, tmp_path)
    assert bf16.loss[-1] < 0.65 * bf16.loss[0]
    assert 0 < gap(fp8.loss, bf16.loss).largest < 0.0025  # measured 0.0006
    assert fp8.held_out["parameters"] == pytest.approx(bf16.held_out["parameters"], rel=0.005)  # measured 0.001
    assert fp8.held_out["averages"] == pytest.approx(bf16.held_out["averages"], rel=0.005)
