"""What other processes take of the CPUs: counted, shown, and a reason not to judge."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import foreign, regression
from bench.case import Contestant, HostTimer, Subject
from bench.rows import MOST_FOREIGN_CORES, Environment, Row, Run

STAT = "cpu  100 20 30 4000 500 6 7 8 90 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
needs_proc = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="there is no /proc/stat")


def test_busy_seconds() -> None:
    """User, nice, system, both kinds of interrupts and what a hypervisor took; a guest's time is in the user's."""
    assert foreign.busy_seconds(STAT) * foreign._TICK == pytest.approx(100 + 20 + 30 + 6 + 7 + 8)


def load(monkeypatch: pytest.MonkeyPatch, busy: list[float], own: list[float]) -> dict[str, float]:
    clock, machine, ours = iter([10.0, 12.0]), iter(busy), iter(own)
    monkeypatch.setattr(foreign.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(foreign, "busy_seconds", lambda stat: next(machine))
    monkeypatch.setattr(foreign, "own_seconds", lambda: next(ours))
    watch = foreign.ForeignLoad()
    watch.sample()
    watch.sample()
    found = watch.fields()
    assert watch.fields() == {}, "samples begin anew"
    return found


@needs_proc
@pytest.mark.parametrize(("busy", "own", "cores"), [([5.0, 9.0], [1.0, 4.0], 0.5), ([5.0, 6.0], [1.0, 2.1], 0.0)])
def test_cores_of_others(monkeypatch: pytest.MonkeyPatch, busy: list[float], own: list[float], cores: float) -> None:
    """Four busy seconds of which three are ours, in two: half a core. A tick of rounding is not less than nothing."""
    assert load(monkeypatch, busy, own) == {"foreign_cores": pytest.approx(cores)}


@needs_proc
def test_a_process_beside_a_timing_is_seen() -> None:
    timer = HostTimer()
    subject = Subject([Contestant("fastfp8", lambda i: time.sleep(0.02))])
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        timer.time(subject, 20)
        other.kill()
    assert timer.telemetry is not None
    assert timer.telemetry.fields()["foreign_cores"] > 0.4


def row(median: float, foreign_cores: float) -> Row:
    spread = (median, median, median)
    return Row("cpu", "gemm", "1x1x1", "fastfp8", "cpu", "ms", *spread, 21, bar=2.0, foreign_cores=foreign_cores)


def test_a_disturbed_time_is_not_judged() -> None:
    assert not row(3.0, 0.0).passed
    assert not row(3.0, MOST_FOREIGN_CORES).passed
    assert row(3.0, MOST_FOREIGN_CORES + 0.1).passed
    where = Environment("cpu-x", "2026-01-01T00:00:00Z", "abc", "x", 2, 0.0)
    quiet, slow, disturbed = (Run(where, [row(*r)]) for r in ((1.0, 0.0), (3.0, 0.0), (3.0, 1.0)))
    assert [c.verdict for c in regression.compare(slow, quiet)] == ["suspect"]
    assert regression.compare(disturbed, quiet) == []
    assert [c.verdict for c in regression.compare(slow, disturbed)] == ["new"]
    assert [c.verdict for c in regression.compare(dataclasses.replace(quiet, rows=[]), quiet)] == ["gone"]
