"""Benchmarks, one file a family: ``python -m bench FAMILY [--json]``.

A family measures everything in one run, interleaved: each round times each case and its baseline once, so that what
else the machine does meets all of them alike. It gives rows; the table and the JSON are views of them.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SAMPLES = 15


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. ``bar`` is the largest ``score`` that passes; None sets no bar."""

    name: str
    shape: str
    unit: str
    median: float
    lower_quartile: float
    upper_quartile: float
    samples: int
    baseline: str | None = None
    baseline_median: float | None = None
    #: The median, over the rounds, of time over the baseline's time.
    ratio: float | None = None
    bar: float | None = None

    @property
    def score(self) -> float:
        """What the bar is for: the ratio where there is a baseline, else the median."""
        return self.median if self.ratio is None else self.ratio

    @property
    def passed(self) -> bool:
        return self.bar is None or self.score <= self.bar

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "passed": self.passed}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call to time, ``calls`` times a sample, beside a baseline or alone."""

    name: str
    shape: str
    run: Callable[[], object]
    baseline: tuple[str, Callable[[], object]] | None = None
    bar: float | None = None
    unit: str = "ms"
    calls: int = 1


UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}


def time_calls(run: Callable[[], object], calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def measure_cases(cases: Sequence[Case], samples: int) -> list[Row]:
    """``samples`` rounds over all cases, after one that is not counted."""
    times: list[list[float]] = [[] for _ in cases]
    baselines: list[list[float]] = [[] for _ in cases]
    for round_ in range(samples + 1):
        for case, own, other in zip(cases, times, baselines, strict=True):
            elapsed = time_calls(case.run, case.calls)
            base = time_calls(case.baseline[1], case.calls) if case.baseline else 0.0
            if round_:
                own.append(elapsed)
                other.append(base)
    return [row_of(case, own, other) for case, own, other in zip(cases, times, baselines, strict=True)]


def row_of(case: Case, times: Sequence[float], baselines: Sequence[float]) -> Row:
    """The row of a case from its samples, in seconds, and those of its baseline in the same rounds."""
    row = row_from_samples(case.name, case.shape, case.unit, [t * UNITS[case.unit] for t in times], case.bar)
    if case.baseline is None:
        return row
    return dataclasses.replace(
        row,
        baseline=case.baseline[0],
        baseline_median=statistics.median(baselines) * UNITS[case.unit],
        ratio=statistics.median(t / b for t, b in zip(times, baselines, strict=True)),
    )


def row_from_samples(name: str, shape: str, unit: str, values: Sequence[float], bar: float | None) -> Row:
    lower, median, upper = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    )
    return Row(name, shape, unit, median, lower, upper, len(values), bar=bar)


def environment() -> dict[str, Any]:
    """What a reader needs to know to compare two runs."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "load": round(os.getloadavg()[0], 2),
        "commit": commit(),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout, with a plus where files differ from it; None outside of a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout else "")


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    head = ("case", "shape", "median", "quartiles", "baseline", "ratio", "bar", "")
    lines = [head]
    for row in rows:
        baseline = "" if row.baseline is None else f"{row.baseline} {row.baseline_median:.4g} {row.unit}"
        lines.append(
            (
                row.name,
                row.shape,
                f"{row.median:.4g} {row.unit}",
                f"{row.lower_quartile:.4g} .. {row.upper_quartile:.4g}",
                baseline,
                "" if row.ratio is None else f"{row.ratio:.2f}x",
                "" if row.bar is None else f"{row.bar:g}" + (f" {row.unit}" if row.ratio is None else "x"),
                "" if row.bar is None else "pass" if row.passed else "FAIL",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
