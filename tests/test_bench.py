"""The benchmark itself: rows, bars and exit status. Not the times."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from bench import Case, Row, __main__, measure_cases

ROOT = Path(__file__).parents[1]
TINY = ["cpu", "--tiny", "--samples", "3"]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What ``python -m bench cpu --tiny --json`` prints, with its exit status."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", *TINY, "--json"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode in (0, 1), done.stderr
    return {**json.loads(done.stdout), "status": done.returncode}


def test_rows(report: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in report["rows"]}
    ratios = {"gemm": 3.0, "quantize 1x128": 12.0, "quantize 128x1": 12.0, "quantize 128x128": 12.0}
    ratios["dequantize 1x128"] = None
    absolute = {"torch.ops.fastfp8.quantize": ("us", 60.0), "import fastfp8, beyond torch": ("s", 0.3)}
    absolute["Triton modules it imports"] = ("modules", 0.0)
    assert list(rows) == [*ratios, *absolute]
    assert {name: rows[name]["bar"] for name in ratios} == ratios
    assert {name: (rows[name]["unit"], rows[name]["bar"]) for name in absolute} == absolute
    for name, row in rows.items():
        assert row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
        assert (row["ratio"] is None) == (name in absolute)
        assert row["ratio"] is None or (row["ratio"] > 0 and row["baseline_median"] > 0 and row["baseline"])
        score = row["median"] if row["ratio"] is None else row["ratio"]
        assert row["passed"] == (row["bar"] is None or score <= row["bar"])
        assert row["samples"] == (1 if "import" in name else 3)
    assert rows["Triton modules it imports"]["median"] == 0


def test_status_and_environment(report: dict[str, Any]) -> None:
    assert report["family"] == "cpu"
    assert report["passed"] == all(row["passed"] for row in report["rows"])
    assert report["status"] == (0 if report["passed"] else 1)
    where = report["environment"]
    assert where["torch"] == torch.__version__
    assert where["threads"] >= 1
    assert where["cpu"]
    assert "commit" in where


def row(median: float, bar: float | None = None, ratio: float | None = None) -> Row:
    return Row("quantize", "8x8", "ms", median, median, median, 15, "clone" if ratio else None, 1.0, ratio, bar)


@pytest.mark.parametrize(
    ("rows", "status"),
    [([row(3.0, 3.0)], 0), ([row(3.0, 2.9)], 1), ([row(3.0, 2.0, 1.5)], 0), ([row(3.0, 1.4, 1.5)], 1), ([row(9.0)], 0)],
    ids=["at-bar", "missed", "ratio", "ratio-missed", "no-bar"],
)
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: list[Row], status: int
) -> None:
    """Where a ratio is there, the bar is for it and not for the median."""
    monkeypatch.setitem(__main__.FAMILIES, "cpu", lambda samples, tiny: [row(1.0, 2.0), *rows])
    assert __main__.main(["cpu"]) == status
    assert ("FAIL" in capsys.readouterr().out) == (status == 1)
    assert __main__.main(["cpu", "--json"]) == status
    assert json.loads(capsys.readouterr().out)["passed"] == (status == 0)


def test_table_names_every_row() -> None:
    text = bench.table([row(3.0, 2.0), row(4.0, 2.0, 1.5)])
    assert len(text.splitlines()) == 3
    assert "FAIL" in text.splitlines()[1]
    assert "1.50x" in text.splitlines()[2]
    assert "pass" in text.splitlines()[2]


def test_interleaving_and_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case and baseline take turns; the first round does not count; the ratio is the median of the rounds' ratios."""
    order: list[str] = []
    durations = {"a": iter([90.0, 1.0, 2.0, 3.0]), "b": iter([90.0, 1.0, 1.0, 6.0]), "c": iter([90.0, 5.0, 7.0, 6.0])}
    now = 0.0

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            order.append(name)
            now += next(durations[name])

        return run

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    first, second = measure_cases(
        [Case("x", "", call("a"), ("b", call("b")), 1.0), Case("y", "", call("c"), unit="s")], 3
    )
    assert "".join(order) == "abc" * 4
    assert (first.median, first.baseline_median, first.ratio) == (2000.0, 1000.0, 1.0)
    assert (second.lower_quartile, second.median, second.upper_quartile) == (5.5, 6.0, 6.5)
    assert (second.ratio, second.samples) == (None, 3)


def test_unknown_family(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        __main__.main(["gpu"])
    assert caught.value.code == 2
    assert "cpu" in capsys.readouterr().err
