"""What the models keep for backward: counted from shapes, as it is counted with memory, and less in FP8."""

from __future__ import annotations

import pytest
import torch

import fastfp8
from fastfp8 import Recipe
from fastfp8.models import CONFIGS, DeepSeek
from fastfp8.models.__main__ import main, saved


@pytest.mark.parametrize("recipe", [Recipe(), None], ids=["fp8", "bf16"])
def test_shapes_tell_what_memory_holds(recipe: Recipe | None) -> None:
    model = DeepSeek(CONFIGS["micro"], recompute=True, dtype=torch.bfloat16)
    fastfp8.nn.convert(model, recipe)
    batch = torch.zeros((1, 65), dtype=torch.int64)
    real = fastfp8.numerics.memory(model, batch, run=lambda tokens: model.loss(tokens).total)
    counted = saved("micro", 64, recipe)
    assert counted.by_module.keys() == real.by_module.keys()
    assert 0 <= real.total - counted.total <= 4  # the error word, made once a process (fastfp8/error_word.py)


def test_fp8_keeps_less_and_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = (saved("micro", 64, recipe) for recipe in (Recipe(), None))
    assert ours.total < 0.8 * theirs.total
    main(["micro", "--saved", "64"])
    last = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert last == ["all", f"{ours.per_token:,.0f}", f"{theirs.per_token:,.0f}", f"{ours.total / theirs.total:.2f}"]
