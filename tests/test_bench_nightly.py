"""The night: what becomes of stages and families that die, hang or come too late; its gate; its workflows."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench import FAMILIES, __main__, checks, families
from bench.families import Families
from bench.family import NO_TIME
from bench.nightly import Shift, Stage, nightly
from bench.process import Child, Clock, Ended
from bench.rows import RESULTS, Environment, NotRun, Row, Run

ROOT = Path(__file__).parents[1]
HERE = Environment("some-gpu", "2026-11-22T00:00:00Z", "abc", "some CPU", 8, 0.1, "GPU", "13000", {"torch": "2.13"})


def test_every_test_and_family_has_its_place(shift: Shift) -> None:
    """With a GPU as without: run, or listed as not run."""
    for stages, gpu in ((shift.with_gpu, True), (shift.without_gpu, False)):
        for stage in stages():
            stage.skip(NO_TIME)
        listed = [entry.family for entry in shift.run.not_run if entry.family in FAMILIES]
        assert sorted(listed) == sorted(FAMILIES)
        tests = {entry.op for entry in shift.run.not_run if entry.family == "tests"}
        assert {checks.GPU.name, checks.SILICON.name} <= tests
        assert any("compute-sanitizer" in name for name in tests)
        assert all(entry.reason == NO_TIME for entry in shift.run.not_run) == gpu
        shift.run.not_run.clear()


def test_sanitizers(shift: Shift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three run at a time, each with an outcome of its own."""

    def command(tests: checks.Selection, junit: Path, seconds: float, program: Path) -> list[str | Path]:
        lines = "tests/x.py::test_a PASSED\n" + ("==== ERROR SUMMARY: 2 errors" if tests.tool == "memcheck" else "")
        met = f"open('{tmp_path}/{tests.tool}', 'w'); deadline = time.monotonic() + 30"
        wait = (
            f"while len(list(Path('{tmp_path}').glob('*check'))) < 3 and time.monotonic() < deadline: time.sleep(0.01)"
        )
        status = {"memcheck": 86, "racecheck": 0, "synccheck": 139}[tests.tool or ""]
        text = f"import sys, time\nfrom pathlib import Path\n{met}\n{wait}\nprint({lines!r})\nsys.exit({status})"
        return [sys.executable, "-c", text]

    monkeypatch.setattr(checks, "command", command)
    monkeypatch.setattr(checks, "sanitizer", lambda: Path("compute-sanitizer"))
    start = time.monotonic()
    shift.sanitize(60.0)
    assert time.monotonic() - start < 25
    assert [(s.name.split()[1], s.ok) for s in shift.run.suites] == [
        ("memcheck", False),
        ("racecheck", True),
        ("synccheck", False),
    ]
    assert shift.run.suites[0].failures == ("compute-sanitizer found errors: ERROR SUMMARY: 2 errors",)
    monkeypatch.setattr(checks, "sanitizer", lambda: None)
    assert "there is no compute-sanitizer" in shift.sanitize(60.0)
    assert shift.run.not_run[-1].op == "compute-sanitizer"


class FakeClock(Clock):
    elapsed = 0.0  # type: ignore[assignment]


@pytest.fixture
def shift(tmp_path: Path) -> Shift:
    """With 100 seconds until its report."""
    shift = Shift(tmp_path / "out", 1.0)
    shift.clock = FakeClock(1.0)
    shift.clock.total, shift.clock._reserve = 110.0, 10.0
    return shift


def test_time_that_is_left_over_flows_on(shift: Shift) -> None:
    given: list[float] = []

    def takes(seconds: float) -> Callable[[float], str]:
        def run(budget: float) -> str:
            given.append(budget)
            shift.clock.elapsed += seconds  # type: ignore[misc]
            return "done"

        return run

    late: list[str] = []
    plan = [(10, 1, 1.0), (50, 2, 1.0), (11, 1, 0.05), (27, 4, 1.0), (0, 1, 1.0)]
    shift.follow([Stage(str(i), w, takes(s), late.append, most) for i, (s, w, most) in enumerate(plan)])
    assert given == pytest.approx([100 / 9, 90 * 2 / 8, 0.05 * 110, 29 * 4 / 5])
    assert late == [NO_TIME]


def test_a_stage_that_fails_costs_no_other(shift: Shift) -> None:
    def fails(_: float) -> str:
        raise RuntimeError("boom")

    ran: list[float] = []

    def runs(seconds: float) -> str:
        ran.append(seconds)
        return "done"

    shift.follow([Stage("bad", 1, fails, shift.missing("bad")), Stage("good", 1, runs, shift.missing("good"))])
    assert ran == [100]
    assert shift.run.not_run == [NotRun("nightly", "bad", "", "RuntimeError: boom", failed=True)]
    assert list(shift.stages) == ["bad", "good"]
    assert "boom" in (shift.logs / "nightly.log").read_text()


# Stands for a family's process: its name says what it does.
FAMILY = """
import json, os, sys, time
from pathlib import Path
from bench.rows import NotRun, Row, to_line
family, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
report = open(options["--report"], "a")
values = Path(options["--report"]).parent / "values"
value = float(values.read_text().split()[1 if "again" in options["--report"] else 0]) if values.exists() else 1.0
def row(op, bar=None):
    return Row(family, op, "8", "fastfp8", "cpu", "ms", value, value, value, 21, bar=bar)
if "--only" in options:
    things = [row(case.split()[0]) for case in json.loads(options["--only"])]
else:
    things = [row("first", bar=0.5 if family == "misses" else None)]
    things.append(NotRun(family, "second", "8", "no time left") if family == "late" else row("second"))
for thing in things:
    print(to_line(thing), file=report, flush=True)
print('{"record": "row", "fam', end="", file=report, flush=True)
if family == "dies":
    os.abort()
if family == "hangs":
    time.sleep(60)
sys.exit(family in ("misses", "lies"))
"""


@pytest.fixture
def fake_families(monkeypatch: pytest.MonkeyPatch) -> None:
    def child(command: list[Any], log: Path, echo: bool) -> Child:
        assert command[:4] == [sys.executable, "-u", "-m", "bench"]
        started = Child([sys.executable, "-c", FAMILY, *command[4:]], log, echo=echo)
        report = command[command.index("--report") + 1]
        deadline = time.monotonic() + 30
        while command[4] == "hangs" and not reported(report) and time.monotonic() < deadline:
            time.sleep(0.01)
        return started

    def reported(report: Path) -> bool:
        return report.exists() and report.read_text().endswith('"fam')

    monkeypatch.setattr(families, "Child", child)


@pytest.mark.usefixtures("fake_families")
@pytest.mark.parametrize(
    ("family", "left", "failed", "reason"),
    [
        ("well", 100.0, None, ""),
        ("misses", 100.0, None, ""),
        ("lies", 100.0, True, "ended with status 1"),
        ("dies", 100.0, True, "died of SIGABRT"),
        ("hangs", 100.0, True, "was stopped"),
        ("hangs", 1.0, False, "was stopped"),
    ],
    ids=["well", "bar", "status", "crash", "hang", "deadline"],
)
def test_rows_outlive_their_family(
    shift: Shift, monkeypatch: pytest.MonkeyPatch, family: str, left: float, failed: bool | None, reason: str
) -> None:
    """Being stopped is a failure, but not where only the night's end cut a family short."""
    monkeypatch.setattr(families, "OVERTIME", 0.5)
    shift.clock.elapsed = 100.0 - left  # type: ignore[misc]
    Families(shift.run, shift.logs, shift.clock).measure(family, 1.0)
    assert [row.op for row in shift.run.rows] == ["first", "second"]
    if failed is None:
        assert shift.run.not_run == []
    else:
        (entry,) = shift.run.not_run
        assert (entry.family, entry.op, entry.failed) == (family, "", failed)
        assert reason in entry.reason


@pytest.mark.usefixtures("fake_families")
def test_what_had_no_time_gets_what_is_left_over(shift: Shift) -> None:
    work = Families(shift.run, shift.logs, shift.clock)
    work.measure("late", 10.0)
    assert [n.reason for n in shift.run.not_run] == [NO_TIME]
    assert work.catch_up(5.0) == "0 rows more"
    assert work.catch_up(30.0) == "1 rows more"
    assert [row.op for row in shift.run.rows] == ["first", "second"]
    assert shift.run.not_run == []


@pytest.fixture
def short_night(monkeypatch: pytest.MonkeyPatch, fake_families: None) -> None:
    """A night of the family "well" only: nothing is built, and the machine is ``HERE``."""

    def work(shift: Shift) -> None:
        shift.run.environment = HERE
        shift.find_baseline()
        values.replace(shift.logs / "values") if (values := shift.out.parent / "values").exists() else None
        shift.follow([shift.family("well", 1), *shift.last_stages()])

    monkeypatch.setattr(Shift, "work", work)


@pytest.mark.usefixtures("short_night")
@pytest.mark.parametrize(
    ("values", "status", "verdict"),
    [("1 1", 0, "same"), ("1.2 1.2", 1, "regressed"), ("1.2 1", 0, "same"), ("0.8 0.8", 0, "improved")],
    ids=["same", "slow-twice", "slow-once", "fast"],
)
def test_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str], values: str, status: int, verdict: str) -> None:
    assert nightly(tmp_path / "before", None, 1.0) == 0
    (tmp_path / "values").write_text(values)
    assert nightly(tmp_path / "now", tmp_path / "before", 1.0) == status
    printed = capsys.readouterr().out
    assert printed.count("regressed: ") == (2 if status else 0)
    assert ("red: " in printed) == bool(status)
    run = Run.load(tmp_path / "now")
    assert [row.median for row in run.rows] == [float(values.split()[0])] * 2
    assert (tmp_path / "now" / "logs" / "well-again.jsonl").exists() == values.startswith("1.2")
    report = (tmp_path / "now" / "report.md").read_text().lower()
    assert verdict in report
    assert (tmp_path / "now" / "report.html").exists()
    assert (tmp_path / "now" / "junit.xml").exists()


@pytest.mark.usefixtures("short_night")
def test_a_night_that_is_cut_off_leaves_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(_: float) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return "never"

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Shift, "last_stages", lambda shift: [Stage("late", 1, terminated, shift.missing("late"))])
    assert nightly(tmp_path / "out", None, 1.0) == 130
    run = Run.load(tmp_path / "out")
    assert len(run.rows) == 2
    assert [n.reason.split(" after")[0] for n in run.not_run if n.failed] == ["interrupted"]
    assert "interrupted" in (tmp_path / "out" / "report.md").read_text()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("short_night")
def test_a_report_that_fails_costs_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> str:
        raise ValueError("no ink")

    monkeypatch.setattr("bench.report.markdown", fails)
    assert nightly(tmp_path / "out", None, 1.0) == 1
    run = Run.load(tmp_path / "out")
    assert len(run.rows) == 2
    assert run.not_run == [NotRun("nightly", "report.md", "", "ValueError: no ink", failed=True)]
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.usefixtures("short_night")
def test_a_baseline_that_does_not_fit(tmp_path: Path) -> None:
    other = Run(
        dataclasses.replace(HERE, machine="other"), [Row("gemm", "op", "8", "fastfp8", "gpu", "ms", 1.0, 1.0, 1.0)]
    )
    (tmp_path / RESULTS).write_text("\n".join(other.lines()))
    assert nightly(tmp_path / "out", tmp_path / RESULTS, 1.0) == 0
    assert "another kind of machine" in Run.load(tmp_path / "out").not_run[0].reason


@pytest.mark.usefixtures("short_night")
def test_what_a_night_does_not_begin_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nightly(tmp_path / "out", tmp_path / "nowhere", 1.0) == 2
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "precious").touch()
    assert nightly(tmp_path, None, 1.0) == 2
    assert (tmp_path / "logs" / "precious").exists()
    assert not (tmp_path / "out").exists()
    assert nightly(tmp_path / "out", None, 1.0) == 0
    assert nightly(tmp_path / "out", tmp_path / "out", 1.0) == 0  # read before it is replaced


def test_a_build_that_fails_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that needs what it builds is tried: the report does not say that there is no GPU."""

    def child(shift: Shift, command: list[Any], log: str, seconds: float) -> Ended:
        (shift.logs / f"{log}.log").write_text("no compiler")
        return Ended(1, 1.0, shift.logs / f"{log}.log")

    monkeypatch.setattr(Shift, "child", child)
    assert nightly(tmp_path / "out", None, 1.0) == 1
    run = Run.load(tmp_path / "out")
    assert {(n.family, n.failed) for n in run.not_run if n.failed} == {("build", True), ("nightly", True)}
    assert not any("no NVIDIA GPU" in n.reason for n in run.not_run)
    assert {n.family for n in run.not_run} == {*FAMILIES, "tests", "build", "nightly"}
    assert {n.op for n in run.not_run if n.family == "tests"} == {t.name for t in (*checks.NO_GPU, *checks.ON_GPU)}


def workflow(name: str) -> dict[str, Any]:
    text = (ROOT / ".github" / "workflows" / name).read_text()
    return {("on" if key is True else key): value for key, value in yaml.safe_load(text).items()}  # YAML 1.1 reads on


def test_ci_runs_on_the_pairs_that_the_readme_names() -> None:
    ci = workflow("ci.yml")
    job = ci["jobs"]["test"]
    assert ci["permissions"] == {"contents": "read"}
    assert job["steps"][-1]["run"] == ".ci/run"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    pairs = [(p["python"], p["torch"].rsplit(".", 1)[0]) for p in job["strategy"]["matrix"]["include"]]
    readme = " ".join((ROOT / "README.md").read_text().split())
    named = readme[readme.index("The tests were run, on CPUs, with ") :].split(";")[0]
    assert pairs == re.findall(r"(\d\.\d+) and (?:torch )?(\d\.\d+)", named)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{variable} ?=" in makefile for variable in job["steps"][-1]["env"])


def test_nightly_workflow() -> None:
    night = workflow("nightly.yml")
    job = night["jobs"]["nightly"]
    assert set(night["on"]) == {"schedule", "workflow_dispatch"}
    assert night["permissions"] == {"contents": "read"}
    assert job["runs-on"] == ["self-hosted", "linux", "gpu", "hopper"]
    measure, summary, upload = job["steps"][1:]
    words = measure["run"].replace('"$MINUTES"', "9").replace('${BASELINE:+--baseline "$BASELINE"}', "").split()
    assert words[:3] == ["python", "-m", "bench"]
    options = __main__.parse(words[3:])
    assert job["timeout-minutes"] > 2 * options.minutes
    assert f"{options.out}/report.md" in summary["run"]
    assert upload["with"]["path"] == str(options.out)
    assert summary["if"] == upload["if"] == "always()"
