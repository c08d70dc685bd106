"""The night: builds, tests, measures every family, compares and reports, by a deadline and whatever fails on the way.

Everything that touches a GPU, or our extension before it is built, is a process of its own: this one only starts them,
collects what they leave, and writes the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from xml.etree.ElementTree import Element

from . import FAMILIES, checks, regression
from .families import Families
from .family import NO_TIME
from .night import Comparison, Night
from .process import MIN_SECONDS, Child, Clock, Ended
from .rows import RESULTS, Environment, NotRun, Row, Run

#: For saying which machine this is. A driver that hangs here would hang everywhere.
PROBE_SECONDS = 60.0
UNKNOWN = "unknown"
GPU_FAMILIES = ("ceilings", "gemm", "grouped", "wgrad", "swiglu", "quantize", "fused", "layer", "comm")

# With as many compilers as there are cores; the tests' sessions, which run beside other things, use two.
_BUILD_EMULATOR = """
import importlib.util, os
spec = importlib.util.spec_from_file_location("build", "tests/emulator/build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build.JOBS = os.cpu_count()
build.load()
"""
_ENVIRONMENT = """
import dataclasses, json
from bench.machine import environment
print(json.dumps(dataclasses.asdict(environment())))
"""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the night. It gets its weight's share of the time that is left to it and those after it.

    ``most`` is the largest part of the whole night that it may have. ``run`` is told its seconds; ``skip`` is called
    with the reason instead where there are too few.
    """

    name: str
    weight: float
    run: Callable[[float], str]
    skip: Callable[[str], None]
    most: float = 1.0


class Shift:
    """One night's work and all it has found so far, so that it can be reported at any time."""

    def __init__(self, out: Path, minutes: float, baseline: Run | None = None) -> None:
        """``baseline`` is the one that was asked for; without it, the machine's history has one. Empties ``out``."""
        self.out, self.logs, self.minutes = out, out / "logs", minutes
        self.clock = Clock(minutes)
        self.run = Run(_bare_environment())
        self.families = Families(self.run, self.logs, self.clock)
        self.suites: list[Element] = []
        self.stages: dict[str, float] = {}
        self.baseline = baseline
        self.history: list[Run] = []
        #: The second measurements of what was slower in the first.
        self.again: list[Row] = []
        self._children = contextlib.ExitStack()
        self._emulator: Child | None = None
        for old in (RESULTS, "report.md", "report.html", "junit.xml"):
            (out / old).unlink(missing_ok=True)
        for folder in (self.logs, out / "plots"):
            shutil.rmtree(folder, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.write_results()  # whatever happens, the folder is a night's

    def work(self) -> None:
        """The whole night but its report."""
        with self._children:
            self._emulator = self._children.enter_context(
                Child([sys.executable, "-c", _BUILD_EMULATOR], self.logs / "build-emulator.log")
            )
            self.follow([Stage("build", 1, self.build, self.missing("build"), 0.6)])
            self.find_baseline()
            if self.run.environment.machine == UNKNOWN:
                self.give_up("the package cannot be imported: see the build")
            else:
                self.follow(self.with_gpu() if self.run.environment.gpu else self.without_gpu())

    def with_gpu(self) -> list[Stage]:
        """Tests first. The emulator's C++ build goes on beside those that do not need it."""
        tests = [
            self.tests(checks.GPU, 40, 0.28),
            Stage("the emulator's build", 10, self.await_emulator, self.missing("build"), 0.2),
            self.tests(checks.SILICON, 14, 0.16),
            Stage("compute-sanitizer", 10, self.sanitize, self.missing("tests", "compute-sanitizer"), 0.12),
        ]
        weights = {
            "ceilings": 4,
            "gemm": 20,
            "grouped": 8,
            "wgrad": 5,
            "swiglu": 3,
            "quantize": 9,
            "fused": 12,
            "layer": 4,
            "comm": 3,
            "cpu": 5,
            "accuracy": 2,
            "static": 4,
            "traffic": 2,
            "emulator": 4,
        }
        return [*tests, *(self.family(f, weight) for f, weight in weights.items()), *self.last_stages()]

    def without_gpu(self) -> list[Stage]:
        """What no clock measures goes beside the emulator's C++ build; the timings wait for it."""
        self.leave_out("torch sees no NVIDIA GPU on this machine", checks.ON_GPU, GPU_FAMILIES)
        return [
            *(self.tests(tests, 8, 0.15) for tests in checks.NO_GPU),
            self.family("static", 5),
            self.family("accuracy", 2),
            Stage("the emulator's build", 10, self.await_emulator, self.missing("build"), 0.4),
            self.family("cpu", 9),
            self.family("traffic", 3),
            self.family("emulator", 6),
            *self.last_stages(),
        ]

    def give_up(self, why: str) -> None:
        self.leave_out(why, (*checks.NO_GPU, *checks.ON_GPU), FAMILIES)

    def leave_out(self, why: str, selections: Iterable[checks.Selection], families: Iterable[str]) -> None:
        for tests in selections:
            self.run.not_run.append(NotRun("tests", tests.name, "", why))
            self.suites.append(checks.left_out(tests.name, why))
        self.run.not_run += [NotRun(family, "", "", why) for family in families]

    def last_stages(self) -> list[Stage]:
        nothing = self.missing("")
        stages = [Stage("what had no time", 3, self.families.catch_up, nothing)]
        if self.baseline is not None:
            stages.append(Stage("second measurements", 3, self.measure_again, nothing))
        return stages

    def follow(self, stages: Sequence[Stage]) -> None:
        """The stages in turn. One that fails is told of in the results; all after it are still run."""
        for index, stage in enumerate(stages):
            share = stage.weight / sum(s.weight for s in stages[index:])
            seconds = min(share * self.clock.left, stage.most * self.clock.total)
            if seconds < MIN_SECONDS:
                stage.skip(NO_TIME)
                self.tell(f"{stage.name}: {NO_TIME}")
                continue
            self.tell(f"{stage.name}, for up to {_minutes(seconds)}")
            start = time.monotonic()
            try:
                found = stage.run(seconds)
            except Exception as error:
                found = self.fault(error)
                self.run.not_run.append(NotRun("nightly", stage.name, "", found, failed=True))
            finally:
                self.stages[stage.name] = self.stages.get(stage.name, 0.0) + time.monotonic() - start
            self.tell(f"{stage.name}: {found}")

    def fault(self, error: Exception) -> str:
        """A fault of this very command, which must not cost the results of the others."""
        with (self.logs / "nightly.log").open("a") as log:
            traceback.print_exception(error, file=log)
        return f"{type(error).__name__}: {error}"

    def tell(self, text: str) -> None:
        print(f"[{_minutes(self.clock.elapsed)} of {_minutes(self.clock.total)}] {text}", file=sys.stderr, flush=True)

    def missing(self, family: str, op: str = "") -> Callable[[str], None]:
        """A stage's ``skip``: lists it as not run, if it has a name."""

        def skip(why: str) -> None:
            if family:
                self.run.not_run.append(NotRun(family, op, "", why))

        return skip

    def build(self, seconds: float) -> str:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        ended = self.child(command, "build", seconds)
        if ended.code != 0:
            self.run.not_run.append(NotRun("build", "kernels and extension", "", ended.why, failed=True))
        self.probe()
        return "done" if ended.code == 0 else ended.how

    def await_emulator(self, seconds: float) -> str:
        assert self._emulator is not None
        ended = self._emulator.wait(seconds)
        if ended.code != 0:
            # Being slow is no fault; whoever needs the emulator next goes on with what is built.
            self.run.not_run.append(NotRun("build", "emulator", "", ended.why, failed=ended.code is not None))
        return "done" if ended.code == 0 else ended.how

    def probe(self) -> None:
        """The environment, from a process that may load torch, the extension and libcuda."""
        load = self.run.environment.load  # from before we began to build
        ended = self.child([sys.executable, "-c", _ENVIRONMENT], "environment", PROBE_SECONDS)
        lines = ended.log.read_text(errors="replace").splitlines()
        if ended.code == 0 and lines:
            self.run.environment = dataclasses.replace(Environment(**json.loads(lines[-1])), load=load)
            return
        self.run.not_run.append(NotRun("nightly", "environment", "", ended.why, failed=True))

    def find_baseline(self) -> None:
        """What was named, or else the latest run that was kept of this kind of machine."""
        from .history import runs_of

        where = self.run.environment
        self.history = runs_of(where.machine)
        if self.baseline is None and self.history:
            self.baseline = self.history[-1]
        if self.baseline is not None:
            before = self.baseline.environment
            if why := regression.why_not(where, before) or regression.why_not_cpu(where, before):
                self.run.not_run.append(NotRun("baseline", "", "", why))

    def tests(self, tests: checks.Selection, weight: float, most: float) -> Stage:
        def skip(why: str) -> None:
            self.leave_out(why, [tests], [])

        def run(seconds: float) -> str:
            junit = self.logs / f"{tests.slug}.xml"
            ended = self.child(checks.command(tests, junit, seconds), tests.slug, seconds)
            return self.take(checks.judge(tests, ended, junit))

        return Stage(f"tests, {tests.name}", weight, run, skip, most)

    def take(self, outcome: checks.Outcome) -> str:
        self.suites.append(outcome.element)
        self.run.not_run += outcome.not_run
        if outcome.suite is None:
            return outcome.not_run[0].reason if outcome.not_run else "nothing"
        self.run.suites.append(outcome.suite)
        return f"{outcome.suite.passed} passed, {outcome.suite.failed} failed, {outcome.suite.skipped} skipped"

    def sanitize(self, seconds: float) -> str:
        """All tools at a time: they take long, and nothing is timed meanwhile."""
        program = checks.sanitizer()
        if program is None:
            why = "there is no compute-sanitizer on PATH, beside nvcc, in /usr/local/cuda/bin or in NVIDIA's wheels"
            self.run.not_run.append(NotRun("tests", "compute-sanitizer", "", why))
            self.suites.append(checks.left_out("compute-sanitizer", why))
            return why
        limit = time.monotonic() + seconds
        found = []
        with contextlib.ExitStack() as stack:
            started = []
            for tests in checks.SANITIZERS:
                junit, log = (self.logs / f"{tests.slug}.{suffix}" for suffix in ("xml", "log"))
                command = checks.command(tests, junit, seconds, program)
                started.append((tests, junit, stack.enter_context(Child(command, log))))
            for tests, junit, child in started:
                ended = child.wait(max(0.0, limit - time.monotonic()))
                found.append(f"{tests.tool}: {self.take(checks.judge(tests, ended, junit))}")
        return "; ".join(found)

    def family(self, family: str, weight: float) -> Stage:
        return Stage(family, weight, lambda seconds: self.families.measure(family, seconds), self.missing(family))

    def measure_again(self, seconds: float) -> str:
        """Each suspect a second time: only what is slow twice has regressed."""
        suspects = [c.key for c in self.comparisons() if c.verdict == "suspect"]
        self.again = self.families.again(suspects, seconds)
        regressed = sum(c.verdict == "regressed" for c in self.comparisons())
        return f"{len(suspects)} slower in the first, {regressed} rows regressed"

    def comparisons(self) -> list[Comparison]:
        if self.baseline is None:
            return []
        first = regression.compare(self.run, self.baseline)
        return regression.confirm(first, self.again, self.run, self.baseline)

    def child(self, command: Sequence[str | Path], log: str, seconds: float) -> Ended:
        with Child(command, self.logs / f"{log}.log") as child:
            return child.wait(seconds)

    def report(self) -> int:
        """Writes the files; 1 if anything failed. A view that cannot be made costs neither the rows nor the others."""
        checks.write_junit(self.suites, self.out / "junit.xml")
        self.write_results()
        faults = self.views()
        if faults:
            self.run.not_run += [NotRun("nightly", what, "", why, failed=True) for what, why in faults]
            self.write_results()
        failures = self.night().failures
        for line in failures:
            print(line)
        print(f"{'red' if failures else 'green'}: {len(self.run.rows)} rows, {self.out / 'report.md'}")
        return int(bool(failures))

    def night(self) -> Night:
        return Night(self.run, self.baseline, self.comparisons(), self.history, self.stages, self.minutes)

    def write_results(self) -> None:
        (self.out / RESULTS).write_text("\n".join(self.run.lines()) + "\n")

    def views(self) -> list[tuple[str, str]]:
        """report.md, plots/ and report.html; returns what could not be made and why."""
        faults: list[tuple[str, str]] = []
        night = self.night()

        @contextlib.contextmanager
        def guarded(what: str) -> Iterator[None]:
            try:
                yield
            except Exception as error:
                faults.append((what, self.fault(error)))

        plots = []
        with guarded("report.md"):
            from .report import markdown

            (self.out / "report.md").write_text(markdown(night))
        with guarded("plots"):
            from .plots import draw, save

            plots = draw(night)
            save(plots, self.out / "plots")
        with guarded("report.html"):
            from .page import html

            (self.out / "report.html").write_text(html(night, plots))
        return faults


def nightly(out: Path, baseline: Path | None, minutes: float) -> int:
    """Everything in so many minutes; the files are in ``out``. An earlier night's files there are replaced.

    Args:
        baseline: a run, or a folder with runs; None is the latest that was kept of this kind of machine.

    Returns:
        The exit status: 0 if all is well, 1 if anything failed or regressed, 2 if it was not begun, 130 if it was
        interrupted.
    """
    try:
        if out.exists() and any(out.iterdir()) and not (out / RESULTS).exists():
            raise ValueError(f"{out} has files that are no night's, and would lose some: name an empty folder")
        shift = Shift(out.resolve(), minutes, Run.load(baseline) if baseline else None)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    interrupted = False
    with _terminated_is_interrupted():
        try:
            shift.work()
        except KeyboardInterrupt:
            interrupted = True
            why = f"interrupted after {_minutes(shift.clock.elapsed)}"
            shift.run.not_run.append(NotRun("nightly", "the rest of the night", "", why, failed=True))
            shift.tell(f"{why}; writing what there is")
    status = shift.report()
    return 130 if interrupted else status


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """A runner that cancels the job sends SIGTERM: that, too, leaves a report."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bare_environment() -> Environment:
    """Until the extension is built, and where it cannot be."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    cores = len(os.sched_getaffinity(0))
    return Environment(UNKNOWN, date, None, platform.machine(), cores, round(os.getloadavg()[0], 2))


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
