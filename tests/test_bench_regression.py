"""The regression gate's rule, row by row."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench import regression
from bench.family import NO_TIME
from bench.rows import Environment, NotRun, Row, Run

HERE = Environment("some-gpu", "2026-11-22T00:00:00Z", "abc", "some CPU", 8, 0.1, "GPU", "13000", {"torch": "2.13"})


def row(
    median: float, *, ratio: float | None = None, kind: str = "gpu", unit: str = "ms", backend: str = "fastfp8"
) -> Row:
    """A time or count with quartiles 10 % around it."""
    ratios = {} if ratio is None else {"cublas": (0.9 * ratio, ratio, 1.1 * ratio)}
    lower, upper = sorted((0.9 * median, 1.1 * median)) if kind in ("gpu", "cpu") else (median, median)
    return Row("gemm", "op", "8", backend, kind, unit, median, lower, upper, 21, ratios=ratios)


def verdicts(now: Row, before: Row, **changes: Any) -> list[str]:
    run, baseline = Run(dataclasses.replace(HERE, **changes), [now]), Run(HERE, [before])
    return [c.verdict for c in regression.compare(run, baseline)]


@pytest.mark.parametrize(
    ("now", "before", "verdict"),
    [
        (row(1.0), row(1.0), "same"),
        (row(1.15), row(1.0), "same"),  # above the quartile of 1.1, but not by 5 %
        (row(1.16), row(1.0), "suspect"),
        (row(0.86), row(1.0), "same"),
        (row(0.85), row(1.0), "improved"),
        (row(1.5, ratio=0.5), row(1.0, ratio=0.5), "same"),  # a slow machine
        (row(1.5, ratio=0.75), row(1.0, ratio=0.5), "suspect"),
        (row(1.0, ratio=0.75), row(1.0, ratio=0.5), "same"),  # a fast peer
        (row(0.5, ratio=0.25), row(1.0, ratio=0.5), "improved"),
        (row(0.5, ratio=0.5), row(1.0, ratio=0.5), "same"),
        (row(1.5, ratio=0.5), row(1.0), "suspect"),  # no peer in common
        (row(0, kind="static", unit="bytes"), row(0, kind="static", unit="bytes"), "same"),
        (row(4, kind="static", unit="bytes"), row(0, kind="static", unit="bytes"), "regressed"),
        (row(0, kind="static", unit="bytes"), row(4, kind="static", unit="bytes"), "improved"),
        (row(105, kind="emulated", unit="cycles"), row(100, kind="emulated", unit="cycles"), "same"),
        (row(106, kind="emulated", unit="cycles"), row(100, kind="emulated", unit="cycles"), "regressed"),
        (row(3, kind="cpu", unit="modules"), row(0, kind="cpu", unit="modules"), "regressed"),
        (row(-10.0, kind="cpu"), row(-10.0, kind="cpu"), "same"),  # a difference of times
        (row(-8.9, kind="cpu"), row(-10.0, kind="cpu"), "same"),
        (row(-8.4, kind="cpu"), row(-10.0, kind="cpu"), "suspect"),
    ],
)
def test_the_rule(now: Row, before: Row, verdict: str) -> None:
    assert verdicts(now, before) == [verdict]


def test_what_is_not_compared() -> None:
    assert verdicts(row(9.0), row(1.0), machine="other") == []
    assert verdicts(row(9.0, kind="cpu"), row(1.0, kind="cpu"), threads=2) == []
    assert verdicts(row(9.0, kind="modelled"), row(1.0, kind="modelled")) == []
    assert verdicts(row(9.0, backend="cublas"), row(1.0, backend="cublas")) == []
    once = dataclasses.replace(row(9.0), samples=1)
    assert verdicts(once, dataclasses.replace(once, median=1.0)) == []


def test_a_peer_of_another_version_says_nothing() -> None:
    slow, before = row(1.5, ratio=0.5), row(1.0, ratio=0.5)
    assert verdicts(slow, before, versions={"torch": "2.14"}) == ["suspect"]
    assert verdicts(slow, before, versions={"torch": "2.13", "nvcc": "13.1"}) == ["same"]


def test_a_suspect_needs_a_second_measurement() -> None:
    run, baseline = Run(HERE, [row(1.5)]), Run(HERE, [row(1.0)])
    first = regression.compare(run, baseline)
    assert [c.verdict for c in regression.confirm(first, [row(1.4)], run, baseline)] == ["regressed"]
    assert [c.verdict for c in regression.confirm(first, [row(1.1)], run, baseline)] == ["same"]
    (alone,) = regression.confirm(first, [], run, baseline)
    assert alone.verdict == "suspect"
    assert alone.why == "1.5 after 1 (0.9 to 1.1) ms, +50.0%; it was not measured a second time"


def test_rows_of_one_run_only() -> None:
    new, gone = row(1.0), dataclasses.replace(row(1.0), op="old")
    found = regression.compare(Run(HERE, [new]), Run(HERE, [gone]))
    assert [(c.verdict, c.key[2]) for c in found] == [("new", "op"), ("gone", "old")]
    for entry in (NotRun("gemm", "old", "8", NO_TIME), NotRun("gemm", "", "", "died")):
        assert [c.verdict for c in regression.compare(Run(HERE, [new], [entry]), Run(HERE, [gone]))] == ["new"]
    entry = NotRun("gemm", "old", "9", NO_TIME)
    assert len(regression.compare(Run(HERE, [new], [entry]), Run(HERE, [gone]))) == 2
    assert verdicts(row(1.0), row(1.0, unit="us")) == ["new", "gone"]
