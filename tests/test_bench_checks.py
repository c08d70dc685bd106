"""The night's child processes, and what the ends of its tests mean."""

from __future__ import annotations

import re
import signal
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import checks, process
from bench.checks import Selection
from bench.process import Child, Ended
from bench.rows import NotRun


def alive(pid: int) -> bool:
    """Whether it runs: a killed one that nobody has waited for is in state Z."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# A child that starts another, says its process id, and then does as the rest of the text says.
PARENT = "import os, signal, subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); "


@pytest.mark.parametrize(
    ("then", "code", "hung", "how"),
    [
        ("time.sleep(60)", None, False, "was stopped"),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)", None, True, "hung"),
        ("os.abort()", -signal.SIGABRT, False, "died of SIGABRT"),
        ("raise SystemExit(3)", 3, False, "ended with status 3"),
        ("", 0, False, "ended with status 0"),
    ],
    ids=["stops", "deaf", "crash", "status", "well"],
)
def test_no_end_leaves_anything_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str, code: int | None, hung: bool, how: str
) -> None:
    monkeypatch.setattr(process, "GRACE", 0.3)
    log = tmp_path / "log"
    with Child([sys.executable, "-c", PARENT + then], log) as child:
        ready = 2 if "deaf" in then else 1
        while log.read_text().count("\n") < ready:
            time.sleep(0.01)
        ended = child.wait(0.2 if code is None else 30)
        grandchild = int(log.read_text().split()[0])
        deadline = time.monotonic() + 5
        while alive(grandchild) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not alive(grandchild)
    assert (ended.code, ended.hung) == (code, hung)
    assert how in ended.how
    assert ended.seconds < 10


def test_a_background_job_can_stop_its_children(tmp_path: Path) -> None:
    """There SIGINT is ignored, which children inherit."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Child(["sleep", "60"], tmp_path / "log") as child:
            assert not child.wait(0.2).hung
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_child_goes_when_its_stage_is_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Child(["sleep", "60"], tmp_path / "log") as child:
        raise KeyboardInterrupt
    assert not alive(child._process.pid)


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(
        b"first\n\n  ^^^~\n 10%|#  |\r 90%|###|\n" + f"File {process.ROOT}/bench/x.py\n".encode() + b"\xff bad\r\n"
    )
    assert process.tail(log, 3) == " 90%|###|\nFile bench/x.py\n\ufffd bad"
    assert "x.log ends with:\n" in Ended(1, 2.0, log).why
    assert process.tail(tmp_path / "none") == ""


def run_pytest(tmp_path: Path, text: str, *arguments: str) -> checks.Outcome:
    (tmp_path / "test_it.py").write_text("import pytest\n" + text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    tests = Selection("Some tests", ("test_it.py", *arguments))
    junit = tmp_path / "junit.xml"
    with Child(checks.command(tests, junit, 30), tmp_path / "log", cwd=tmp_path) as child:
        return checks.judge(tests, child.wait(60), junit)


def test_results_of_pytest(tmp_path: Path) -> None:
    text = """
def test_good(): pass
def test_bad(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.skip(reason="not today")
def test_skipped(n): pass
"""
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    found = run_pytest(tmp_path, text, "test_broken.py")
    assert found.suite is not None
    assert (found.suite.passed, found.suite.failed, found.suite.skipped) == (1, 3, 2)
    assert found.suite.failures == ("::test_broken", "test_it::test_bad", "test_it::test_error")
    assert found.not_run == [NotRun("tests", "Some tests", "", "2 skipped: not today")]
    assert found.element.get("name") == "Some tests"


def test_a_test_that_was_interrupted_has_not_passed(tmp_path: Path) -> None:
    text = "import os, signal\ndef test_a(): pass\ndef test_b(): os.kill(os.getpid(), signal.SIGINT)\n"
    found = run_pytest(tmp_path, text)
    assert found.suite is not None
    assert found.suite.passed == 1
    assert [case.get("name") for case in found.element.findall("testcase")] == ["test_a", "Some tests"]


def test_skipped_tests_are_not_passed_ones(tmp_path: Path) -> None:
    found = run_pytest(tmp_path, "@pytest.mark.skip(reason='no GPU')\ndef test_x(): pass\n")
    assert found.suite is None
    assert [n.reason for n in found.not_run] == ["no test ran: all 1 were skipped", "1 skipped: no GPU"]


def test_no_tests_are_not_passed_ones(tmp_path: Path) -> None:
    found = run_pytest(tmp_path, "def test_x(): pass\n", "-k", "nothing_of_the_kind")
    assert found.suite is not None
    assert not found.suite.ok
    assert found.suite.failures == ("pytest found no such test",)
    assert found.element.find("testcase/error") is not None


VERBOSE = """tests/x.py::test_a[1] PASSED      [ 10%]
tests/x.py::test_b[(1, 2)] SKIPPED (no)   [ 20%]
tests/x.py::test_c FAILED      [ 30%]
tests/x.py::test_d """
PLAIN, TOOL = Selection("plain", ()), Selection("tool", (), "racecheck")


@pytest.mark.parametrize(
    ("tests", "code", "hung", "failures", "not_run"),
    [
        (PLAIN, None, True, ["tests/x.py::test_c", "hung and was killed after 9 s, in tests/x.py::test_d"], 0),
        (PLAIN, -signal.SIGSEGV, False, ["tests/x.py::test_c", "died of SIGSEGV after 9 s"], 0),
        (PLAIN, None, False, ["tests/x.py::test_c"], 1),
        (PLAIN, 0, False, ["tests/x.py::test_c"], 0),
        (PLAIN, 4, False, ["tests/x.py::test_c", "ended with status 4"], 0),
        (TOOL, None, True, ["tests/x.py::test_c"], 1),
        (TOOL, 86, False, ["tests/x.py::test_c", "compute-sanitizer found errors: RACECHECK SUMMARY: 1 hazard"], 0),
    ],
    ids=["hang", "crash", "slow", "well", "usage", "slow-tool", "race"],
)
def test_a_run_without_a_junit_file(
    tmp_path: Path, tests: Selection, code: int | None, hung: bool, failures: list[str], not_run: int
) -> None:
    """What a process did before it died is read off its log."""
    log = tmp_path / "log"
    log.write_text(VERBOSE + ("\n========= RACECHECK SUMMARY: 1 hazard\n" if code == 86 else ""))
    found = checks.judge(tests, Ended(code, 9.0, log, hung), tmp_path / "no.xml")
    assert found.suite is not None
    assert (found.suite.passed, found.suite.failed, found.suite.skipped) == (1, 1, 1)
    assert len(found.suite.failures) == len(failures)
    assert all(part in whole for part, whole in zip(failures, found.suite.failures, strict=True))
    assert len(found.not_run) == not_run


def test_leaving_slowly_is_no_hang(tmp_path: Path) -> None:
    """pytest had written all it had when it was killed."""
    (tmp_path / "log").write_text(VERBOSE)
    (tmp_path / "x.xml").write_text('<testsuites><testsuite><testcase name="t"/></testsuite></testsuites>')
    found = checks.judge(PLAIN, Ended(None, 9.0, tmp_path / "log", hung=True), tmp_path / "x.xml")
    assert found.suite is not None
    assert found.suite.ok
    assert found.not_run[0].reason.endswith("1 tests had run, the others not")


def test_one_junit_file(tmp_path: Path) -> None:
    suite = ET.fromstring('<testsuite name="a" tests="1"><testcase name="t"/></testsuite>')
    path = tmp_path / "junit.xml"
    checks.write_junit([suite, checks.left_out("b", "no GPU \x1b[0m <here>")], path)
    suites = ET.parse(path).getroot().findall("testsuite")
    assert [s.get("name") for s in suites] == ["a", "b"]
    skipped = suites[1].find("testcase/skipped")
    assert skipped is not None
    assert skipped.get("message") == "no GPU ?[0m <here>"
    assert suites[1].get("tests") == suites[1].get("skipped") == "1"


def test_the_sanitized_tests_are_there(tmp_path: Path) -> None:
    command = checks.command(checks.SANITIZERS[0], tmp_path / "x", 30, Path("/bin/compute-sanitizer"))
    assert command[:3] == [Path("/bin/compute-sanitizer"), "--tool", "memcheck"]
    with Child([*command[command.index(sys.executable) :], "--collect-only", "-qq"], tmp_path / "log") as child:
        assert child.wait(60).code == 0
    found = re.findall(r"^(tests/ops/\S+)::(\w+)\[(\w+)", (tmp_path / "log").read_text(), re.M)
    assert {backend for _, _, backend in found} == {"cuda"}
    assert {file for file, _, _ in found} == {"tests/ops/test_gemm.py", "tests/ops/test_quantize.py"}
    assert 5 <= len(found) <= 20
