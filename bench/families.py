"""The families' part of the night: a process each, whose rows outlive it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from .family import NO_TIME
from .process import MIN_SECONDS, Child, Clock, Ended
from .rows import NotRun, Row, Run, from_lines

#: A process begins with torch's import, which a family does not count among its own seconds.
IMPORT_SECONDS = 4.0
#: What a case that was begun in time may take beyond it, at the cost of the stages after it.
OVERTIME = 20.0


class Families:
    """Runs families and adds what they find to ``run``. Their reports and logs are kept in ``logs``."""

    def __init__(self, run: Run, logs: Path, clock: Clock) -> None:
        self._run, self._logs, self._clock = run, logs, clock

    def measure(self, family: str, seconds: float) -> str:
        """All of a family; what it finds is kept however it ends."""
        report = self._logs / f"{family}.jsonl"
        rows: list[Row] = []
        not_run: list[NotRun] = []
        try:
            ended, had_its_time = self.process(family, report, seconds)
            if wrong := why_bad(ended, *collected(report)):
                # Stopped because the night was over is no fault of the family.
                not_run.append(NotRun(family, "", "", wrong, failed=had_its_time or ended.code is not None))
        finally:  # also when interrupted
            rows, others = collected(report)
            not_run += others
            self._run.rows += rows
            self._run.not_run += not_run
        return f"{len(rows)} rows, {len(not_run)} not run"

    def catch_up(self, seconds: float) -> str:
        """The cases that their family had no time for get what the others left over."""
        limit, found = time.monotonic() + seconds, 0
        late = _by_family((n.family, n.op, n.shape) for n in self._run.not_run if _was_late(n))
        for family, cases in late.items():
            left = limit - time.monotonic()
            if left < MIN_SECONDS + IMPORT_SECONDS:
                break
            report = self._logs / f"{family}-later.jsonl"
            ended, _ = self.process(family, report, left, cases)
            rows, not_run = collected(report)
            wrong = why_bad(ended, rows, not_run)
            if wrong and ended.code is not None:
                not_run.append(NotRun(family, "", "", wrong, failed=True))
            heard = {(r.family, r.op, r.shape) for r in rows} | {(n.family, n.op, n.shape) for n in not_run}
            kept = [n for n in self._run.not_run if not (_was_late(n) and (n.family, n.op, n.shape) in heard)]
            self._run.not_run[:] = [*kept, *not_run]
            self._run.rows += rows
            found += len(rows)
        return f"{found} rows more"

    def again(self, keys: Iterable[tuple[str, ...]], seconds: float) -> list[Row]:
        """A second measurement of the rows with these keys, which the run does not get."""
        limit, rows = time.monotonic() + seconds, list[Row]()
        cases = _by_family((family, op, shape) for _, family, op, shape, *_ in keys)
        for index, (family, ops) in enumerate(cases.items()):
            share = (limit - time.monotonic()) / (len(cases) - index)
            if share < MIN_SECONDS:
                break
            report = self._logs / f"{family}-again.jsonl"
            self.process(family, report, share, ops)
            rows += collected(report)[0]
        return rows

    def process(
        self, family: str, report: Path, seconds: float, only: Sequence[str] | None = None
    ) -> tuple[Ended, bool]:
        """How it ended, and whether it had all the time that it could ask for, so that being stopped is its fault."""
        own = max(1.0, seconds - IMPORT_SECONDS)
        command: list[str | Path] = [sys.executable, "-u", "-m", "bench", family, "--report", report]
        command += ["--seconds", f"{own:.1f}", "--ceilings", self._logs / "ceilings.jsonl"]
        if only is not None:
            command += ["--only", json.dumps(list(only))]
        wanted = seconds + OVERTIME
        limit = min(wanted, max(self._clock.left, seconds))
        with Child(command, report.with_suffix(".log"), echo=True) as child:
            return child.wait(limit), limit == wanted


def collected(report: Path) -> tuple[list[Row], list[NotRun]]:
    """What a family's process wrote, but for a line that it did not get to end."""
    if not report.exists():
        return [], []
    return from_lines([line for line in report.read_text().splitlines(True) if line.endswith("\n")])


def why_bad(ended: Ended, rows: Sequence[Row], not_run: Sequence[NotRun]) -> str | None:
    """Why a family's process did not end as it should. Status 1 is for missed bars and failed cases."""
    explained = any(not row.passed for row in rows) or any(n.failed for n in not_run)
    if ended.code == 0 or (ended.code == 1 and explained):
        return None
    return ended.why


def _was_late(entry: NotRun) -> bool:
    return entry.reason == NO_TIME and bool(entry.op) and entry.family != "tests"


def _by_family(cases: Iterable[tuple[str, str, str]]) -> dict[str, list[str]]:
    """What ``--only`` takes, by family."""
    found: dict[str, list[str]] = {}
    for family, op, shape in cases:
        case = f"{op} {shape}"
        if case not in found.setdefault(family, []):
            found[family].append(case)
    return found
