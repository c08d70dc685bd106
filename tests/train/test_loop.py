"""The loop: it learns, goes on bit for bit after a break, and its micro-batches are one batch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import SMALL, TEXT, run

from fastfp8 import nn, quantize
from fastfp8.train import PRECISIONS, Options, Ranks, Trainer, checkpoint
from fastfp8.train.loop import learning_rate

PRECISION_NAMES = list(PRECISIONS)


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two states differ in a bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
        return [] if same else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [place for key in a for place in differing(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        return [place for i, (x, y) in enumerate(zip(a, b, strict=True)) for place in differing(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def state_of(out: Path) -> dict[str, Any]:
    state = checkpoint.load(out, Ranks())
    assert state is not None
    del state["curve"]["seconds"]
    return state


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_resume_is_bit_exact(tmp_path: Path, precision: str) -> None:
    whole, _ = run(tmp_path / "whole", precision, save_every=4)
    run(tmp_path / "parts", precision, save_every=4, stop_after=3)
    assert not differing(state_of(tmp_path / "parts")["step"], 3)
    torch.manual_seed(5)  # another process has other random numbers
    resumed, lines = run(tmp_path / "parts", precision, save_every=4, resume=True, log_every=1)
    assert lines.count("step") == 5
    assert resumed.loss == whole.loss
    assert resumed.norm == whole.norm
    assert resumed.held_out == whole.held_out
    assert not differing(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert differing(state_of(tmp_path / "whole"), {**state_of(tmp_path / "parts"), "step": 7}) == ["/step"]


def test_what_was_finished_is_not_run_again(tmp_path: Path) -> None:
    first, _ = run(tmp_path, save_every=4)
    again, lines = run(tmp_path, save_every=4, resume=True)
    assert lines == ""
    assert (again.loss, again.held_out) == (first.loss, first.held_out)


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path, save_every=4, stop_after=4)
    other = dataclasses.replace(SMALL, lr=1e-3)
    with pytest.raises(ValueError, match=r"argument 'resume': expected the options of the checkpoint, \{'lr': 0.003\}"):
        run(tmp_path, options=other, resume=True)


def test_it_learns(tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, steps=30, lr=1e-2)
    curve, lines = run(tmp_path, options=options, log_every=15)
    assert len(curve.loss) == len(curve.norm) == len(curve.seconds) == 30
    assert curve.loss[0] == pytest.approx(math.log(256), rel=0.02)
    assert curve.loss[-1] < 3.6
    assert curve.held_out["parameters"] < 3.8
    assert curve.held_out["averages"] != curve.held_out["parameters"]
    assert not list(tmp_path.iterdir())  # no checkpoints wanted
    shown = lines.splitlines()
    assert len(shown) == 2
    assert shown[0].startswith("bf16: step 15/30  loss ")
    assert "tokens/s  ETA 0:" in shown[0]


def test_progress_tells_what_is_measured(tmp_path: Path) -> None:
    curve, lines = run(tmp_path, log_every=1)
    for k, line in enumerate(lines.splitlines()):
        assert f"step {k + 1}/8 " in line
        assert f"norm {curve.norm[k]:.2f}" in line


def test_micro_batches_are_one_batch() -> None:
    """But for the rounding of sums, and the balance loss, which is of each sequence."""
    found = []
    for accumulate in (1, 2):
        options = dataclasses.replace(SMALL, accumulate=accumulate)
        trainer = Trainer(options, PRECISIONS["fp32"], TEXT, Ranks())
        found.append([trainer.run_step() for _ in range(3)])
        trainer.close()
    for one, other in zip(*found, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.norm == pytest.approx(one.norm, rel=1e-4)
        assert other.balance == pytest.approx(one.balance, rel=1e-4)


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for clip in (1e9, 0.25):
        trainer = Trainer(dataclasses.replace(SMALL, clip=clip), PRECISIONS["fp32"], TEXT, Ranks())
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda **_: None)
        norm = trainer.run_step().norm
        squares = [p.grad.double().square().sum() for p in trainer.model.parameters() if p.grad is not None]
        seen.append((norm, torch.stack(squares).sum().sqrt().item()))
        trainer.close()
    (norm, kept), (same_norm, clipped) = seen
    assert norm == pytest.approx(kept, rel=1e-5)
    assert same_norm == pytest.approx(norm, rel=1e-6)
    assert norm > 0.25
    assert clipped == pytest.approx(0.25, rel=1e-5)


def test_learning_rate() -> None:
    options = Options(steps=110, warmup=10, lr=1.0)
    assert [learning_rate(options, step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(options, 60) == pytest.approx(0.55)
    assert learning_rate(options, 110) == pytest.approx(0.1)
    assert learning_rate(dataclasses.replace(options, schedule="constant"), 109) == 1.0
    assert learning_rate(dataclasses.replace(options, warmup=0), 0) == 1.0


def test_norms_do_not_decay() -> None:
    for precision, others in (("bf16", 0), ("fp8", 1)):
        trainer = Trainer(SMALL, PRECISIONS[precision], TEXT, Ranks())
        groups = trainer.optimizer.param_groups
        assert len(groups) == 2 + others  # in FP8: embedding, head and gate apart
        for group in groups:
            assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] > 0}
        trainer.close()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"bf16: the loss is nan in step \d"):
        run(tmp_path, options=dataclasses.replace(SMALL, lr=1e30, warmup=0, clip=1e30))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"config": "huge"},
            ValueError,
            "argument 'config': expected 'micro' or 'tiny' or '16b' or '671b', got 'huge'",
        ),
        ({"schedule": "step"}, ValueError, "argument 'schedule': expected 'cosine' or 'constant', got 'step'"),
        ({"steps": 0}, ValueError, "argument 'steps': expected a positive number, got 0"),
        ({"steps": 1.5}, TypeError, "argument 'steps': expected int"),
        ({"lr": "1"}, TypeError, "argument 'lr': expected a number"),
        ({"ema": 2.0}, ValueError, "argument 'ema': expected a number from 0 to 1, got 2.0"),
        ({"clip": 0.0}, ValueError, "argument 'clip': expected a positive number"),
        ({"warmup": -1}, ValueError, "argument 'warmup': expected 0 or more, got -1"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Options(**options)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="argument 'batch': expected a multiple of ranks times accumulate, 3, got 4"):
        Trainer(dataclasses.replace(SMALL, accumulate=3), PRECISIONS["bf16"], TEXT, Ranks())


def test_weights_in_fp8_are_those_of_the_step() -> None:
    """Once a step, written by it: what the next forward multiplies is the parameter quantised."""
    trainer = Trainer(dataclasses.replace(SMALL, accumulate=2), PRECISIONS["fp8"], TEXT, Ranks())
    trainer.run_step()
    checked = 0
    for module in trainer.model.modules():
        if isinstance(module, nn.FP8Weight):
            kept, transposed = module._fp8_weight()
            expected = quantize(module.weight.detach(), (128, 128))
            assert transposed is not None
            assert not differing(kept.data.view(torch.uint8), expected.data.view(torch.uint8))
            assert not differing(kept.scale, expected.scale)
            assert kept is trainer.optimizer.quantized(module.weight)[0]
            assert module.weight.grad is None
            checked += 1
    assert checked == 7
    trainer.close()
