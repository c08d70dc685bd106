"""The benchmark itself: timing in turns, rows, bars, what was not run, exit status. Not the times."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bench
from bench import __main__, case, family, machine
from bench.case import Case, Ceilings, Computed, Contestant, HostTimer, Session, Subject, Unavailable, Work, turns
from bench.rows import Environment, NotRun, Row, Run, Suite, from_lines, spread

ROOT = Path(__file__).parents[1]
WHERE = Environment("cpu-test", "2026-01-02T03:04:05Z", "abc1234", "a CPU", 2, 0.5)


def row(median: float, bar: float | None = None, ratio: float | None = None, **more: Any) -> Row:
    ratios = {"peer": (ratio, ratio, ratio)} if ratio else {}
    return Row("fake", "op", "8x8", "fastfp8", "cpu", "ms", median, median, median, bar=bar, ratios=ratios, **more)


def computed(op: str, result: Row | Exception, priority: int = 0) -> Computed:
    def compute(_: Session) -> list[Row]:
        if isinstance(result, Exception):
            raise result
        return [result]

    return Computed(op, "8x8", compute, priority)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Work]], None]:
    """Makes a family ``fake`` of the given works."""

    def make(works: Sequence[Work]) -> None:
        module = ModuleType("bench.fake")
        module.works = lambda tiny: list(works)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "bench.fake", module)
        monkeypatch.setitem(bench.FAMILIES, "fake", "for a test")

    return make


def run_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """What ``python -m bench fake --json`` prints, with its exit status."""
    status = __main__.main(["fake", "--json", *options])
    return {**json.loads(capsys.readouterr().out), "status": status}


# Timing.


class Clock:
    """Contestants that take the seconds they are given, call by call; ``order`` is how they were called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.order = 0.0, []  # type: float, list[tuple[str, int]]
        monkeypatch.setattr(case.time, "perf_counter", lambda: self.now)

    def contestant(self, name: str, seconds: Sequence[float], **more: Any) -> Contestant:
        durations = iter(seconds)

        def run(copy: int) -> str:
            self.order.append((name, copy))
            self.now += next(durations)
            return name

        return Contestant(name, run, **more)


def test_host_timer_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round has each contestant once; the round before the first does not count, and it warms each one up."""
    clock = Clock(monkeypatch)
    names, rounds = "abc", 12
    contestants = [
        clock.contestant(name, [1000.0, *itertools.repeat(float(i), rounds)]) for i, name in enumerate("abc")
    ]
    times = HostTimer().time(Subject(contestants), rounds)
    assert times == [[float(i)] * rounds for i in range(3)]
    called = [name for name, _ in clock.order]
    played = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert played[0] == names
    assert len(played) == rounds + 1
    assert all(sorted(one) == list(names) for one in played)
    assert len(set(played[1:])) > 2, "the order changes"


def test_host_timer_goes_round_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    HostTimer().time(Subject([clock.contestant("a", [1.0] * 6)], copies=2), 5)
    assert [copy for _, copy in clock.order] == [0, 0, 1, 0, 1, 0]


def test_host_timer_divides_by_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    contestant = clock.contestant("a", [9.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0], calls=3)
    assert HostTimer().time(Subject([contestant]), 2) == [[2.0, 6.0]]


def test_wrong_output_is_found_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def check(output: Any) -> None:
        raise AssertionError(f"wrong: {output}")

    with pytest.raises(AssertionError, match="wrong: a"):
        HostTimer().time(Subject([clock.contestant("a", [1.0] * 9, check=check)]), 3)
    assert len(clock.order) == 1


def test_turns_are_fair_and_repeatable() -> None:
    orders = turns(3, 600)
    assert orders == turns(3, 600)
    counts = [orders.count(list(order)) for order in itertools.permutations(range(3))]
    assert sum(counts) == 600
    assert min(counts) > 60


# Rows.


def test_rows_of_a_case() -> None:
    """Rate, floor, share, intensity; ratios are of the rounds, and ours alone has them and the bar."""
    contestants = [Contestant("fastfp8", int, config="tile"), Contestant("x", int), Contestant("y", int)]
    subject = Subject(contestants, bytes=2e9, flops=4e12, missing={"z": "not installed"})
    made = Case("gemm", "gemm", "1x2x3", "cpu", lambda: subject, unit="ms", bar=1.5)
    times = [[1.0, 2.0, 4.0], [2.0, 2.0, 2.0], [1.0, 4.0, 2.0]]
    ours, x, y = made.rows(subject, times, Ceilings(bytes=1e9, fp8=8e12), {"clock_mhz": 1980.0})
    assert (ours.median, ours.lower, ours.upper, ours.samples) == (2000.0, 1500.0, 3000.0, 3)
    assert (ours.rate, ours.rate_unit) == (2.0, "TFLOPS")
    assert ours.intensity == 2000.0
    assert ours.floor == 2000.0, "memory binds: 2 s for the bytes, 0.5 s for the FLOPs"
    assert ours.share == 1.0
    assert ours.ratios == {"x": (0.75, 1.0, 1.5), "y": (0.75, 1.0, 1.5)}
    assert (ours.bar, ours.score, ours.passed) == (1.5, 1.0, True)
    assert ours.note == "without z: not installed"
    assert (ours.config, ours.clock_mhz) == ("tile", 1980.0)
    assert (x.backend, x.median, x.ratios, x.bar, x.note) == ("x", 2000.0, {}, None, None)
    assert (y.median, ours.ours, y.ours) == (2000.0, True, False)


def test_ratio_is_of_the_rounds_and_not_of_the_medians() -> None:
    subject = Subject([Contestant("fastfp8", int), Contestant("x", int)])
    ours, _ = Case("f", "o", "s", "cpu", lambda: subject).rows(
        subject, [[1.0, 2.0, 3.0], [1.0, 1.0, 6.0]], Ceilings(), {}
    )
    assert ours.ratios["x"][1] == 1.0
    assert (ours.floor, ours.share, ours.rate) == (None, None, None)


@pytest.mark.parametrize(
    ("subject", "ceilings", "expected"),
    [
        (Subject([], bytes=4.0), Ceilings(bytes=2.0), 2.0),
        (Subject([], bytes=4.0), Ceilings(fp8=2.0), None),
        (Subject([], bytes=4.0, flops=8.0), Ceilings(bytes=2.0, fp8=1.0), 8.0),
        (Subject([], flops=8.0, tensor_rate="bf16"), Ceilings(fp8=1.0, bf16=4.0), 2.0),
        (Subject([], bytes=4.0, flops=8.0), Ceilings(bytes=2.0), None),
        (Subject([]), Ceilings(bytes=2.0), None),
    ],
    ids=["memory", "unknown", "tensor", "bf16", "half-known", "nothing"],
)
def test_floor(subject: Subject, ceilings: Ceilings, expected: float | None) -> None:
    assert ceilings.floor(subject) == expected


def test_rate_of_bytes_and_bar_on_the_median() -> None:
    subject = Subject([Contestant("fastfp8", int)], bytes=4e9)
    made = Case("q", "o", "s", "cpu", lambda: subject, unit="s", bar=2.5, bar_on="median")
    (ours,) = made.rows(subject, [[2.0]], Ceilings(), {})
    assert (ours.rate, ours.rate_unit, ours.intensity) == (2.0, "GB/s", None)
    assert (ours.unit, ours.median, ours.bar, ours.bar_on) == ("s", 2.0, 2.5, "median")


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (row(9.0), True),
        (row(3.0, 3.0), True),
        (row(3.0, 2.9), False),
        (row(3.0, 2.0, 1.5), True),
        (row(3.0, 1.4, 1.5), False),
        (row(3.0, 2.0, 1.5, bar_on="median"), False),
        (row(1.0, 2.0, 9.0, bar_on="median"), True),
    ],
    ids=["no-bar", "at-bar", "missed", "ratio", "ratio-missed", "median-missed", "median"],
)
def test_bar(given: Row, passed: bool, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It is for the ratio where there is a peer, unless the row says otherwise; a missed one is the exit status."""
    assert given.passed == passed
    fake([computed("other", row(1.0, 2.0)), computed("op", given)])
    told = run_json(capsys)
    assert (told["status"], told["passed"]) == (0 if passed else 1, passed)
    assert __main__.main(["fake"]) == told["status"]
    assert capsys.readouterr().out.strip()


def test_spread() -> None:
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    assert spread([3.0, 1.0, 2.0]) == (1.5, 2.0, 2.5)


def test_key_tells_units_apart() -> None:
    one, other = (Row("static", "k", "", "fastfp8", "static", unit, 1.0, 1.0, 1.0) for unit in ("registers", "bytes"))
    assert one.key != other.key


def test_kind_must_be_known() -> None:
    with pytest.raises(ValueError, match="one of gpu, cpu, static, emulated, modelled, not 'guessed'"):
        Row("f", "o", "s", "b", "guessed", "ms", 1.0, 1.0, 1.0)


def everything() -> Run:
    rows = [row(1.25, 2.0, 1.5, bar_on="median", note="a note"), row(0.0)]
    run = Run(WHERE, rows, [NotRun("fake", "late", "", "no time left"), NotRun("fake", "bad", "", "why", True)])
    run.suites.append(Suite("ops", 3, 1, 2, 4.5, ("test_x",)))
    return run


@pytest.mark.parametrize("name", ["results.jsonl", "2026-01-02.json"])
def test_files_give_the_run_back(tmp_path: Path, name: str) -> None:
    run, path = everything(), tmp_path / name
    path.write_text(run.compact() if name.endswith(".json") else "\n".join(run.lines()) + "\n")
    assert Run.load(path) == run
    assert Run.load(tmp_path) == run


@pytest.mark.parametrize(("name", "text"), [("a.json", "{}"), ("a.json", "no"), ("a.jsonl", '{"record": "row"}')])
def test_a_file_that_is_no_run_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        Run.load(tmp_path / name)


# Families.


def test_what_fails_or_is_missing_is_listed_and_the_rest_goes_on(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake([computed("a", Unavailable("no such chip")), computed("b", row(1.0))])
    told = run_json(capsys)
    assert (told["status"], [r["op"] for r in told["rows"]]) == (0, ["op"])
    assert [(n["op"], n["reason"], n["failed"]) for n in told["not_run"]] == [("a", "no such chip", False)]
    fake([computed("a", ZeroDivisionError("oh")), computed("b", row(1.0))])
    told = run_json(capsys)
    assert (told["status"], len(told["rows"])) == (1, 1)
    assert [(n["reason"], n["failed"]) for n in told["not_run"]] == [("ZeroDivisionError: oh", True)]


def test_a_case_needs_a_timer_for_its_kind() -> None:
    lonely = Case("gemm", "gemm", "", "gpu", lambda: pytest.fail("built for nothing"))
    with pytest.raises(Unavailable, match="there is no GPU to measure on"):
        lonely.measure(Session(3, timers={"cpu": HostTimer()}))


def test_most_important_first(capsys: pytest.CaptureFixture[str]) -> None:
    works = [computed(op, row(1.0, note=op), priority) for op, priority in (("c", 2), ("a", 0), ("d", 2), ("b", 1))]
    report = family.Report()
    family.run("fake", works, Session(1), report)
    assert [r.note for r in report.rows] == ["a", "b", "c", "d"]


def test_no_time(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake([computed("a", row(1.0)), computed("b", row(1.0))])
    told = run_json(capsys, "--seconds", "0")
    assert (told["status"], told["rows"]) == (0, [])
    assert [(n["op"], n["shape"], n["reason"]) for n in told["not_run"]] == [
        ("a", "8x8", "no time left"),
        ("b", "8x8", "no time left"),
    ]


def test_only(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of the text "op shape", or a list of whole ones."""
    fake([computed(op, row(1.0, note=op)) for op in ("gemm", "gemm wide", "quantize")])

    def ran(only: str) -> list[str]:
        return [r["note"] for r in run_json(capsys, "--only", only)["rows"]]

    assert ran("gemm") == ["gemm", "gemm wide"]
    assert ran("wide 8x8") == ["gemm wide"]
    assert ran('["gemm 8x8", "quantize 8x8"]') == ["gemm", "quantize"]
    assert ran("nothing") == []


def test_samples_and_tiny_reach_the_works(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def compute(session: Session) -> list[Row]:
        seen.append((session.samples, session.tiny, session.ceilings, sorted(session.timers)))
        return []

    fake([Computed("a", "", compute)])
    run_json(capsys)
    run_json(capsys, "--samples", "3", "--tiny")
    assert [s[:2] for s in seen] == [(bench.SAMPLES, False), (3, True)]
    assert seen[0][2] == Ceilings()
    assert "cpu" in seen[0][3]


def test_report_outlives_the_process(tmp_path: Path) -> None:
    """What was measured before a crash is in the file."""
    code = """
import os, sys, types
import bench
from bench.__main__ import main
from bench.case import Computed, Unavailable
from bench.rows import Row

def missing(session):
    raise Unavailable("why")

module = types.ModuleType("bench.fake")
row = Row("fake", "first", "", "fastfp8", "cpu", "ms", 1.5, 1.0, 2.0, ratios={"x": (0.5, 1.0, 1.5)})
module.works = lambda tiny: [
    Computed("first", "", lambda session: [row]),
    Computed("second", "", missing),
    Computed("third", "", lambda session: os._exit(41)),
]
sys.modules["bench.fake"] = module
bench.FAMILIES["fake"] = ""
main(["fake", "--report", sys.argv[1]])
"""
    path = tmp_path / "report.jsonl"
    path.write_text('{"record": "not_run", "family": "f", "op": "earlier", "shape": "", "reason": "r"}\n')
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 41, done.stderr
    rows, not_run = from_lines(path.read_text().splitlines())
    expected = Row("fake", "first", "", "fastfp8", "cpu", "ms", 1.5, 1.0, 2.0, ratios={"x": (0.5, 1.0, 1.5)})
    assert rows == [expected]
    assert [(n.op, n.reason) for n in not_run] == [("earlier", "r"), ("second", "why")]


def test_ceilings_come_from_the_report_of_their_family(tmp_path: Path) -> None:
    def line(op: str, backend: str, rate: float, unit: str, of: str = "ceilings") -> Row:
        return Row(of, op, "", backend, "gpu", "ms", 1.0, 1.0, 1.0, rate=rate, rate_unit=unit)

    report = family.Report(tmp_path / "r")
    report.add(line("copy", "a", 3000.0, "GB/s"), line("copy", "b", 4000.0, "GB/s"), line("fp8", "a", 1500.0, "TFLOPS"))
    report.add(line("bf16", "a", 1.0, "TFLOPS", of="gemm"))
    assert family.read_ceilings(tmp_path / "r") == Ceilings(bytes=4e12, fp8=1.5e15, bf16=None)
    assert family.read_ceilings(tmp_path / "none") == Ceilings()
    assert family.read_ceilings(None) == Ceilings()


# The command line, and where it runs.


@pytest.mark.parametrize(("argv", "text"), [(["gpu"], "cpu"), ([], "COMMAND"), (["cpu", "--fast"], "--fast")])
def test_bad_command_lines(capsys: pytest.CaptureFixture[str], argv: list[str], text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        __main__.main(argv)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_help_of_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        __main__.main(["static", "--help"])
    assert caught.value.code == 0
    assert bench.FAMILIES["static"] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("cpu", "gpu", "gpus", "name"),
    [
        ("AMD EPYC 7763 64-Core Processor", None, 0, "cpu-amd-epyc-7763-3cores"),
        ("Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz", None, 0, "cpu-intel-xeon-platinum-8480-3cores"),
        ("any", "NVIDIA H200", 1, "nvidia-h200"),
        ("any", "NVIDIA H100 80GB HBM3", 8, "nvidia-h100-80gb-hbm3-x8"),
    ],
)
def test_machine_name(monkeypatch: pytest.MonkeyPatch, cpu: str, gpu: str | None, gpus: int, name: str) -> None:
    monkeypatch.setattr(machine, "cpu_model", lambda: cpu)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert machine.machine_name(gpu, gpus) == name


def test_environment_is_told(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake([])
    where = run_json(capsys)["environment"]
    assert {"python", "torch"} <= where["versions"].keys()
    assert where["threads"] >= 1
    assert where["machine"]
    assert where["cpu"]


def test_the_drivers_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """By NVML, or else what libcuda says it supports; None where there is no driver."""

    class Nvml:
        NVMLError = OSError

        def __init__(self, works: bool) -> None:
            self.works = works

        def nvmlInit(self) -> None:
            if not self.works:
                raise OSError("no library")

        def nvmlSystemGetDriverVersion(self) -> str:
            return "580.1.2"

    monkeypatch.setattr(machine._C, "driver_unusable_reason", lambda: "")
    monkeypatch.setattr(machine._C, "driver_version", lambda: 13020)
    for module, expected in ((Nvml(True), "580.1.2"), (Nvml(False), "for CUDA 13.2"), (None, "for CUDA 13.2")):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        assert machine.driver_version() == expected
    monkeypatch.setattr(machine._C, "driver_unusable_reason", lambda: "no driver")
    assert machine.driver_version() is None


def test_a_line_of_results_has_its_share_of_the_ceiling() -> None:
    where = Environment("m", "2026-01-01T00:00:00Z", "abc", "cpu", 2, 0.0)
    timed = Row("gemm", "gemm", "1x1x1", "fastfp8", "gpu", "us", 4.0, 4.0, 4.0, floor=3.0)
    found = [json.loads(line) for line in Run(where, [timed]).lines()]
    assert [record["share"] for record in found if record["record"] == "row"] == [0.75]
