"""What quantisation does to a model's numbers: how many saturate, become zero or subnormal, or are not finite.

The kernels count while they quantise: no further pass over memory, a few integer atomics a program, nothing that waits
for the device. See :mod:`fastfp8.counters` for what exactly is counted::

    fastfp8.numerics.start(model)
    for step, batch in enumerate(batches):
        train(model, batch)
        if step % 100 == 0:
            fastfp8.numerics.report(model)  # of the steps since the last report

:func:`watch` looks at more, signal to noise and the range of amax, in the steps that it is told to.

The same of a :class:`fastfp8.optim.AdamW` with ``emit_fp8`` counts the weights that its steps write in FP8.
"""

from __future__ import annotations

import sys
from typing import NamedTuple, TextIO

import torch
from torch import Tensor

from .counters import FIELDS, Counted, new_counters
from .errors import check_type
from .saved import Saved, memory
from .watch import Row, Watch, columns, watch

__all__ = [
    "Counts",
    "Row",
    "Saved",
    "Watch",
    "memory",
    "new_counters",
    "report",
    "start",
    "stop",
    "totals",
    "watch",
]


class Counts(NamedTuple):
    """Numbers of elements: see :mod:`fastfp8.counters`."""

    values: int
    saturated: int
    underflowed: int
    subnormal: int
    nonfinite: int

    def share(self, field: str) -> float:
        """Of all values; 0 where there were none."""
        found: int = getattr(self, field)
        return found / self.values if self.values else 0.0


assert Counts._fields == FIELDS


def totals(counters: Tensor) -> Counts:
    """The sums over the rows of counters. Waits for the device."""
    return Counts(*counters.sum(0).tolist())


def start(model: torch.nn.Module | torch.optim.Optimizer) -> None:
    """Count from here on in every FP8 module of ``model``, or in an optimizer, from zero; on the device of the weights.

    A module that moves to another device must be started again, and an optimizer that gets further parameters.

    Raises:
        TypeError: ``model`` is no Module and no fastfp8.optim.AdamW.
    """
    for _, module in _counted("start", model):
        module.counters = {role: new_counters(device) for role, device in module.roles().items()}


def stop(model: torch.nn.Module | torch.optim.Optimizer) -> None:
    """Count no more, and forget what was counted.

    Raises:
        TypeError: as of :func:`start`.
    """
    for _, module in _counted("stop", model):
        module.counters = None


def report(
    model: torch.nn.Module | torch.optim.Optimizer, *, file: TextIO | None = None, reset: bool = True
) -> dict[str, dict[str, Counts]]:
    """Print what was counted in each FP8 module of ``model``, by the role of what was quantised; wait for the device.

    The first report of a model that was not started starts it, and has nothing to tell yet.

    Args:
        model: a Module with :class:`fastfp8.nn.Linear` in it, or a :class:`fastfp8.optim.AdamW`.
        file: where to print; None is standard output.
        reset: begin again from zero.

    Returns:
        The counts by the module's name and by role ("activation", "weight", "gradient", and the first and the last
        "transposed" for Wgrad), where anything was counted. Of an optimizer, named as its class is, a role is a
        parameter: by the name that the optimizer was given, else by its place among all.

    Raises:
        TypeError: as of :func:`start`.
    """
    modules = list(_counted("report", model))
    found: dict[str, dict[str, Counts]] = {}
    kept = [(name, role, t) for name, module in modules for role, t in (module.counters or {}).items()]
    sums = [t.sum(0) for _, _, t in kept]  # all before the first is waited for
    for (name, role, _), of_role in zip(kept, sums, strict=True):
        counts = Counts(*of_role.tolist())
        if counts.values:
            found.setdefault(name, {})[role] = counts
    if any(module.counters is None for _, module in modules):
        start(model)
    elif reset:
        for _, _, counters in kept:
            counters.zero_()
    where = f"{len(modules)} FP8 modules" if isinstance(model, torch.nn.Module) else modules[0][0]
    _print(found, where, file or sys.stdout)
    return found


def _counted(op: str, model: torch.nn.Module | torch.optim.Optimizer) -> list[tuple[str, Counted]]:
    own = type(model).__name__
    if isinstance(model, Counted) and isinstance(model, torch.optim.Optimizer):
        return [(own, model)]
    check_type(model, torch.nn.Module, f"numerics.{op}", "model", "a torch.nn.Module or a fastfp8.optim.AdamW")
    assert isinstance(model, torch.nn.Module)
    return [(name or own, module) for name, module in model.named_modules() if isinstance(module, Counted)]


def _print(found: dict[str, dict[str, Counts]], where: str, file: TextIO) -> None:
    if not found:
        print(f"fastfp8.numerics: nothing was counted yet in {where}", file=file)
        return
    rows: list[tuple[str, ...]] = [("layer", "role", *FIELDS)]
    for name, roles in found.items():
        for role, counts in roles.items():
            rows.append((name, role, f"{counts.values:,}", *(f"{counts.share(field):.3%}" for field in FIELDS[1:])))
    for line in columns(rows):
        print(line, file=file)
