"""The night's tests: which are run, how pytest and compute-sanitizer are called, and what their ends mean."""

from __future__ import annotations

import collections
import dataclasses
import re
import shutil
import sys
import sysconfig
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from .process import Ended
from .rows import NotRun, Suite


@dataclasses.dataclass(frozen=True)
class Selection:
    """Some tests of ours. ``arguments`` are pytest's; ``tool`` is of compute-sanitizer, under which they run."""

    name: str
    arguments: tuple[str, ...]
    tool: str | None = None

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


GPU = Selection("ops on the GPU", ("-m", "cuda and not slow and not download"))
SILICON = Selection("instructions, emulator against silicon", ("tests/test_silicon.py", "-m", "hopper"))
# A few launches of each kernel: bounds, strides, C and NaN. The tools slow a kernel down by 10 to 100 times.
SANITIZED = (
    *("tests/ops/test_gemm.py", "tests/ops/test_quantize.py", "-m", "cuda and not slow", "-k"),
    "not cuda_triton and (test_positive_inputs or test_c_is_added or test_a_nan_stays or test_strides)",
)
SANITIZERS = tuple(
    Selection(f"compute-sanitizer {tool}", SANITIZED, tool) for tool in ("memcheck", "racecheck", "synccheck")
)
ON_GPU = (GPU, SILICON, *SANITIZERS)
# Without a GPU: what a change to an op, a planner or a kernel breaks first, quick enough for any night.
NO_GPU = (
    Selection("ops, reference", ("tests/ops", "-m", "not slow and not cuda", "-k", "reference")),
    Selection("plans and built kernels", ("tests/test_plan.py", "tests/test_build.py", "-m", "not slow")),
)

_FOUND_ERRORS = 86
_RESULT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def sanitizer() -> Path | None:
    """The program compute-sanitizer: on PATH, beside nvcc, where CUDA is usually installed, or in NVIDIA's wheels."""
    on_path, nvcc = shutil.which("compute-sanitizer"), shutil.which("nvcc")
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    places = [folder / "compute-sanitizer" for folder in (*folders, Path("/usr/local/cuda/bin"), wheels)]
    return Path(on_path) if on_path else next((place for place in places if place.exists()), None)


def command(tests: Selection, junit: Path, seconds: float, program: Path | None = None) -> list[str | Path]:
    """``program`` is compute-sanitizer, for a selection with a tool. ``seconds`` are those that it may take."""
    each = max(10, min(60, seconds / 3))
    pytest: list[str | Path] = [sys.executable, "-u", "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    # A test file that cannot be imported fails, and costs no test of another.
    pytest += [f"--timeout={each:.0f}", f"--junitxml={junit}", "--continue-on-collection-errors", *tests.arguments]
    if tests.tool is None or program is None:
        return pytest
    options = [
        *("--tool", tests.tool, "--error-exitcode", str(_FOUND_ERRORS)),
        # Of pytest only: its children are compilers. torch may load for longer than the tool waits by default.
        *("--target-processes", "application-only", "--launch-timeout", "60"),
    ]
    if tests.tool == "memcheck":
        # Our driver code checks every status itself, and torch asks for what may not be there.
        options += ["--report-api-errors", "no"]
    return [program, *options, *pytest]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a selection: a suite if anything passed or failed, what did not run and why, and its JUnit XML."""

    suite: Suite | None
    not_run: list[NotRun]
    element: ET.Element


@dataclasses.dataclass
class _Counts:
    passed: int = 0
    skipped: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    #: The test that was running when the log ended.
    last: str | None = None


def judge(tests: Selection, ended: Ended, junit: Path) -> Outcome:
    """What a selection's end means. Only tests that passed make a suite green: none at all, or skipped ones, do not.

    A selection that had to be stopped at its limit is not a failure where it heeded that: it was merely too slow. What
    ran before counts, and what did not run is said.
    """
    element = _read(junit)
    counts = _of_log(ended.log) if element is None else _of_junit(element)
    not_run = [NotRun("tests", tests.name, "", f"{n} skipped: {why}") for why, n in counts.reasons.most_common()]
    failures = list(counts.failures)
    broken = _breakage(tests, ended, counts, written=element is not None)
    if broken:
        failures.append(broken)
    elif ended.code is None:
        ran = counts.passed + counts.skipped + len(counts.failures)
        why = f"{ended.how}, its time being up; {ran} tests had run, the others not"
        not_run.append(NotRun("tests", tests.name, "", why))
    suite = None
    if failures or counts.passed:
        failed = len(counts.failures) or bool(broken)
        suite = Suite(tests.name, counts.passed, int(failed), counts.skipped, ended.seconds, tuple(failures))
    elif ended.code == 0:
        not_run.insert(0, NotRun("tests", tests.name, "", f"no test ran: all {counts.skipped} were skipped"))
    element = ET.Element("testsuite", tests="0") if element is None else element
    element.set("name", tests.name)
    if broken:
        _add_case(element, tests.name, "error", broken)
    return Outcome(suite, not_run, element)


def _breakage(tests: Selection, ended: Ended, counts: _Counts, *, written: bool) -> str | None:
    """What went wrong beyond single tests. ``written``: pytest came to write its JUnit file."""
    where = f", in {counts.last}" if counts.last else ""
    # compute-sanitizer takes long and does not heed a signal; torch may take long to leave.
    if ended.hung and tests.tool is None and not written:
        return f"{ended.how}{where}"
    if ended.code is None:
        return None
    if ended.code == 5:
        return "pytest found no such test"
    if ended.code == _FOUND_ERRORS and tests.tool:
        return f"compute-sanitizer found errors: {_summary(ended.log)}"
    if ended.code == 0 and not counts.passed and not counts.skipped:
        return "pytest left no report of what it ran"
    if ended.code == 0 or (ended.code == 1 and counts.failures):
        return None
    return f"{ended.why}{where}"


def _summary(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if "SUMMARY" in line]
    return lines[-1].strip("= ") if lines else f"see {log.name}"


def _read(junit: Path) -> ET.Element | None:
    """The suite's element, or None where the process died before it wrote one."""
    try:
        suite = ET.parse(junit).getroot().find("testsuite")
    except (OSError, ET.ParseError):
        return None
    cases = [] if suite is None else suite.findall("testcase")
    if suite is not None and cases and len(cases) > int(suite.get("tests", len(cases))) and not len(cases[-1]):
        # The test that pytest was stopped in looks as if it had passed, but is not among those it counts.
        suite.remove(cases[-1])
    return suite


def _of_junit(suite: ET.Element) -> _Counts:
    counts = _Counts()
    failed: dict[str, None] = {}
    for case in suite.iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed[name] = None
        elif skipped is not None:
            counts.skipped += 1
            counts.reasons[skipped.get("message") or "no reason given"] += 1
        else:
            counts.passed += 1
    counts.failures = list(failed)
    return counts


def _of_log(log: Path) -> _Counts:
    """From the lines of ``pytest -v``, for a process that died or hung so that it left no JUnit file."""
    counts = _Counts()
    for line in log.read_text(errors="replace").splitlines():
        match = _RESULT.match(line)
        if match is None:
            counts.last = line.strip() if re.match(r"\S+\.py::", line) else counts.last
            continue
        counts.last = None
        name, result = match.groups()
        counts.passed += result in ("PASSED", "XPASS")
        counts.skipped += result in ("SKIPPED", "XFAIL")
        if result in ("FAILED", "ERROR"):
            counts.failures.append(name)
    return counts


def _add_case(suite: ET.Element, name: str, kind: str, message: str) -> None:
    case = ET.SubElement(suite, "testcase", classname="nightly", name=name, time="0")
    ET.SubElement(case, kind, message=message)
    for attribute in ("tests", {"error": "errors", "skipped": "skipped"}[kind]):
        suite.set(attribute, str(int(suite.get(attribute, "0")) + 1))


def left_out(name: str, why: str) -> ET.Element:
    """A selection that was not started, as JUnit says it."""
    suite = ET.Element("testsuite", name=name, tests="0")
    _add_case(suite, name, "skipped", why)
    return suite


def write_junit(elements: Sequence[ET.Element], path: Path) -> None:
    """All suites in one file."""
    root = ET.Element("testsuites")
    root.extend(elements)
    # Control characters of a log's end are not XML.
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "?", ET.tostring(root, "unicode"))
    path.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n', encoding="utf-8")
