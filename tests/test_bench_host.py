"""What a call costs the host: the programs that time it, and what is said where they cannot be had."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import goals, host
from bench.case import Session, Unavailable

CALLS = 300
SESSION = Session(5)


def measured(of: Callable[[int, int], host.Measured]) -> host.Times:
    try:
        return of(SESSION.samples, CALLS).times
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_parts_of_a_launch_make_up_the_launch() -> None:
    times = measured(host.launches)
    assert list(times) == [*host.PARTS, host.VECTORS]
    assert {len(samples) for samples in times.values()} == {SESSION.samples}
    least = {op: min(samples) for op, samples in times.items()}
    *_, whole, _ = least.values()
    make_problem, select, plan, recall, driver = (least[op] for op in host.PARTS[:-1])
    assert min(least.values()) > 1e-9
    assert 0.4 < whole / (make_problem + recall + driver) < 2.5
    assert recall < select + plan, "a plan is remembered because that is cheaper"


def test_a_call_has_a_launch_in_it() -> None:
    """From C++ a call is a launch and torch's dispatch; from Python, Python's part too. The driver is the same one."""
    launch, times = min(measured(host.launches)[host.LAUNCH]), measured(host.calls)
    assert list(times) == [*host.CALLED, host.ALIAS]
    assert {len(samples) for samples in times.values()} == {SESSION.samples}
    least = {op: min(samples) for op, samples in times.items()}
    assert launch < least[host.DISPATCHED] < min(least[goals.HOST_OP], least[host.PUBLIC])
    assert least[host.NOTHING] < least[goals.HOST_OP]
    assert least[host.PUBLIC] < 1e-3


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Microseconds; what is ours has the bar, a call from Python the goal; what else the CPUs did is in the row."""
    times = {op: [1e-6, 2e-6, 3e-6] for op in (*host.PARTS, *host.CALLED)}
    peers = {host.VECTORS: [1e-6, 1e-6, 1e-6], host.ALIAS: [2e-6, 4e-6, 6e-6]}
    found = host.Measured(times | peers, {"foreign_cores": 0.1})
    monkeypatch.setattr(host, "launches", lambda samples, calls: found)
    monkeypatch.setattr(host, "calls", lambda samples, calls: found)
    rows = [row for work in host.works(False) for row in work.measure(Session(3))]
    assert [row.op for row in rows] == [*host.PARTS, *host.CALLED]
    assert {(row.unit, row.lower, row.median, row.upper) for row in rows} == {("us", 1.5, 2.0, 2.5)}
    assert [row.ratios for row in rows[:7]] == [*[{host.VECTORS: (1.5, 2.0, 2.5)}] * 6, {host.ALIAS: (0.5, 0.5, 0.5)}]
    assert {row.bar_on for row in rows if row.bar} == {"median"}
    assert {row.op for row in rows if row.bar == 6.0} == {host.LAUNCH, host.DISPATCHED}
    assert {row.foreign_cores for row in rows} == {0.1}
    assert not any(row.bar for work in host.works(True) for row in work.measure(Session(3, tiny=True)))


def test_what_is_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "FOLDER", tmp_path / "made")
    source, runs = tmp_path / "x.cpp", []
    source.write_text("int main() { return 0; }")

    def run(command: list[Any], **options: Any) -> Any:
        runs.append(command)
        Path(command[-1]).write_text("")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(host.subprocess, "run", run)
    made = host.compiled("x", [source], [], [])
    assert made == tmp_path / "made" / "x"
    assert host.compiled("x", [source], [], []) == made
    assert len(runs) == 1
    later = made.stat().st_mtime + 5
    os.utime(source, (later, later))
    host.compiled("x", [source], [], [])
    assert len(runs) == 2


def test_what_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "FOLDER", tmp_path)
    (tmp_path / "x.cpp").write_text("#include <no_such_header.h>")
    with pytest.raises(Unavailable, match=r"x\.cpp cannot be compiled: .*no_such_header"):
        host.compiled("x", [tmp_path / "x.cpp"], [], [])
    assert not list(tmp_path.glob("x.[0-9]*"))
    monkeypatch.setattr(host.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match=r"no g\+\+"):
        host.compiled("x", [tmp_path / "x.cpp"], [], [])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(Unavailable, match="CUDA build"):
        host.calls.__wrapped__(1, 1)


def test_a_program_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "compiled", lambda name, *_: host.FOLDER / name)
    monkeypatch.setattr(host, "toolkit", lambda: Path())
    with pytest.raises(RuntimeError, match="sh failed: of this"):
        host._run(["sh", "-c", "echo because >&2; echo of this >&2; exit 3"])
