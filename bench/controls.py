"""Two things that the DeepSeek-V3 report says not to do, on layers small enough to see why.

``python -m bench.controls`` trains them, draws the curves and keeps the numbers.

A recipe that trains as well as BF16 says little if every recipe does. Here are tasks on which the default recipe does
and two others cannot:

``block gradients``  gradients in 128 x 128 blocks (appendix B.2). Tokens of two kinds, each with outputs of its own,
    share blocks, and the gradients of one kind are 2**32 times as large, as outliers are that come with a token. AdamW
    learns both as fast, for each weight belongs to one kind; but beside its largest value a block has only zeros.
``no promotion``  sums that never leave the tensor core's accumulator (section 3.3.2), by the model of the hardware. 64
    channels at the beginning and 64 at the end are large and cancel, as massive activations may. In between, the
    accumulator is so large that it cuts off what the other channels add.

The loss is that of the student against its teacher, relative to the teacher's outputs; in the first task of the tokens
with small gradients alone. 1 is what a student has that says zero.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fastfp8
from fastfp8 import Format, Recipe
from fastfp8.train.curve import write_atomically

STEPS = 300
RECIPES: dict[str, Recipe | None] = {
    "bf16": None,
    "fp8": Recipe(),
    "fp8, block gradients": Recipe(gradient=Format((128, 128), pow2=True)),
    "fp8, no promotion": Recipe(promotion=None),
}


class Task(NamedTuple):
    """A student and its teacher. ``tokens`` makes inputs, what the teacher says of them, and the weight of each output
    in the loss; ``counts`` are the outputs of which the loss is reported."""

    student: torch.nn.Module
    tokens: Callable[[torch.Generator], tuple[Tensor, Tensor, Tensor]]
    counts: Tensor
    recipes: tuple[str, ...]
    lr: float


def outliers() -> Task:
    """Every other token, with features and outputs of its own, has gradients 2**-32 as large."""
    features, tokens_of_a_step = 256, 256
    student = torch.nn.Linear(features, features, bias=False)
    kind = torch.arange(features) % 2
    teacher = torch.randn(features, features) / (features / 2) ** 0.5 * (kind[:, None] == kind)
    small = torch.arange(tokens_of_a_step) % 2 == 1

    def tokens(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(tokens_of_a_step, features, generator=generator) * (small[:, None] == kind)
        return x, x @ teacher.t(), torch.where(small, 2.0**-32, 1.0)[:, None] * (small[:, None] == kind)

    return Task(student, tokens, small[:, None] & (kind == 1), ("bf16", "fp8", "fp8, block gradients"), 3e-3)


def long_sums() -> Task:
    """The student knows the large channels and learns the others."""
    k, n, large, tokens_of_a_step = 1024, 16, 64, 64
    teacher = torch.randn(n, k) * 2.0**-9
    teacher[:, :large], teacher[:, -large:] = 1.0, -1.0
    student = torch.nn.Linear(k, n, bias=False)
    with torch.no_grad():
        student.weight.copy_(teacher)
        student.weight[:, large:-large] = 0.0

    def tokens(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(tokens_of_a_step, k, generator=generator)
        x[:, :large] = x[:, -large:] = 1.0
        return x, x @ teacher.t(), torch.ones(tokens_of_a_step, 1)

    counts = torch.ones(tokens_of_a_step, n, dtype=torch.bool)
    return Task(student, tokens, counts, ("bf16", "fp8", "fp8, no promotion"), 1e-4)


TASKS: dict[str, Callable[[], Task]] = {"block gradients": outliers, "no promotion": long_sums}


def train(make: Callable[[], Task], recipe: Recipe | None, steps: int) -> list[float]:
    """The relative loss of each step, from the same weights and tokens whatever the recipe."""
    torch.manual_seed(0)
    task = make()
    student = task.student if recipe is None else fastfp8.nn.convert(task.student, recipe).module
    optimizer = torch.optim.Adam(student.parameters(), lr=task.lr, betas=(0.9, 0.95), eps=1e-30)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = task.lr * (1 + math.cos(math.pi * step / steps)) / 2
        x, target, weight = task.tokens(generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe is None):
            y = student(x).float()
        square = (y - target).square()
        (square * weight).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(square[task.counts].mean().detach() / target[task.counts].square().mean()))
    return losses


def run(steps: int = STEPS) -> dict[str, dict[str, list[float]]]:
    """By task and recipe."""
    return {
        name: {recipe: train(make, RECIPES[recipe], steps) for recipe in make().recipes} for name, make in TASKS.items()
    }


def end(losses: Sequence[float]) -> float:
    """The geometric mean of the last tenth."""
    last = losses[-max(len(losses) // 10, 1) :]
    return math.exp(sum(map(math.log, last)) / len(last))


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(11, 4))
    for axis, (task, curves) in zip(axes, found.items(), strict=True):
        for recipe, losses in curves.items():
            axis.plot(losses, label=f"{recipe}: {end(losses):.2g}", linewidth=1)
        axis.set(title=task, xlabel="step", ylabel="loss over the teacher's", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(title="at the end")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.controls", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/training"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="(default: %(default)s)")
    given = parser.parse_args(arguments)
    found = run(given.steps)
    for task, curves in found.items():
        for recipe, losses in curves.items():
            print(f"{task:<18}{recipe:<24}{end(losses):.3g}")
    about = {"torch": torch.__version__, "steps": given.steps, "device": "cpu"}
    write_atomically(given.out / "controls.json", json.dumps({**about, "losses": found}).encode())
    draw(found, given.out / "controls.png")


if __name__ == "__main__":
    main()
