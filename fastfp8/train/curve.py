"""Loss curves: smoothed, compared, kept as JSON and drawn."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import check_value

SMOOTHING = 0.9


@dataclass
class Curve:
    """What a run measured, by step."""

    precision: str
    loss: list[float] = field(default_factory=list)
    """Cross entropy of the next token, nats a token."""
    mtp: list[float] = field(default_factory=list)
    """That of the tokens further on."""
    balance: list[float] = field(default_factory=list)
    """Balance losses."""
    norm: list[float] = field(default_factory=list)
    """Of the gradients, before they were clipped."""
    seconds: list[float] = field(default_factory=list)
    """Time of the step."""
    held_out: dict[str, float] = field(default_factory=dict)
    """The loss on text that no step read, at the end: of the parameters and of their averages."""


def smoothed(losses: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """The exponential moving average that the report's appendix B.1 draws."""
    out: list[float] = []
    for loss in losses:
        out.append(weight * out[-1] + (1 - weight) * loss if out else loss)
    return out


class Gap(NamedTuple):
    """How far a smoothed curve is from another, relatively, over the last half."""

    mean: float
    """Signed: above zero where the loss is higher."""
    largest: float
    """In magnitude."""
    final: float
    """Signed, at the end."""


def gap(losses: Sequence[float], reference: Sequence[float]) -> Gap:
    """Of two curves of the same steps. Raises ValueError where they have other numbers of steps, or none."""
    check_value(len(losses) == len(reference) > 0, "train.gap", "losses", f"{len(reference)} steps", len(losses))
    relative = gaps(losses, reference)
    half = relative[len(relative) // 2 :]
    largest = max(half, key=lambda value: abs(value) if value == value else float("inf"))
    return Gap(sum(half) / len(half), abs(largest), half[-1])


def gaps(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Of each step."""
    return [(a - b) / b for a, b in zip(smoothed(losses), smoothed(reference), strict=True)]


def write_atomically(path: Path, data: bytes) -> None:
    """Whoever reads ``path`` finds the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def as_json(curves: Mapping[str, Curve], about: Mapping[str, Any]) -> str:
    """One object: ``about``, the curves, and the gaps to the first of them."""
    first = next(iter(curves.values()))
    others = {name: curve for name, curve in curves.items() if curve is not first}
    whole = {
        **about,
        "reference": first.precision,
        "gaps": {name: gap(curve.loss, first.loss)._asdict() for name, curve in others.items()},
        "curves": {name: _rounded(asdict(curve)) for name, curve in curves.items()},
    }
    return json.dumps(whole, indent=1)


def _rounded(curve: dict[str, Any]) -> dict[str, Any]:
    """Enough digits for every use, in a file that is looked at."""
    return {k: [float(f"{x:.6g}") for x in v] if isinstance(v, list) else v for k, v in curve.items()}


def draw(curves: Mapping[str, Curve], title: str, path: Path) -> None:
    """The smoothed losses and, below, how far they are from the first. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(curves)
    first = curves[names[0]]
    rows = 2 if len(names) > 1 else 1
    figure, axes = pyplot.subplots(
        rows, figsize=(10, 4 + 3 * (rows - 1)), sharex=True, squeeze=False, height_ratios=[5, 4][:rows]
    )
    top = axes[0, 0]
    for index, (name, curve) in enumerate(curves.items()):
        steps = range(1, len(curve.loss) + 1)
        top.plot(steps, curve.loss, color=f"C{index}", alpha=0.15, linewidth=0.8)
        top.plot(steps, smoothed(curve.loss), color=f"C{index}", linewidth=1.4, label=name)
    top.set_ylabel("cross entropy, nats a byte")
    top.set_title(title)
    top.legend(frameon=False)
    top.grid(alpha=0.4)
    if rows == 2:
        low = axes[1, 0]
        for index, name in enumerate(names[1:], 1):
            values = [100 * x for x in gaps(curves[name].loss, first.loss)]
            low.plot(range(1, len(values) + 1), values, color=f"C{index}", linewidth=1.2, label=name)
        low.axhspan(-0.25, 0.25, color="0.9", zorder=0, label="0.25 %: DeepSeek-V3, appendix B.1")
        low.axhline(0, color="0.5", linewidth=0.8)
        low.set_ylabel(f"smoothed loss over that of {names[0]}, %")
        low.legend(frameon=False)
        low.grid(alpha=0.4)
    axes[-1, 0].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
