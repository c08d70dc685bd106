"""Runs one family's list in a process of its own: most important first, until it is done or its time is spent."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from .case import Ceilings, HostTimer, Session, Timer, Unavailable, Work
from .rows import NotRun, Row, from_lines, to_line

#: Why a case was not run that came after the deadline; the night tries those again with what time is left over.
NO_TIME = "no time left"


class Report:
    """Rows as they come, kept and appended to a file: what a family measured outlives its process."""

    def __init__(self, path: Path | None = None) -> None:
        self.rows: list[Row] = []
        self.not_run: list[NotRun] = []
        self._file: TextIO | None = path.open("a") if path else None

    def add(self, *things: Row | NotRun) -> None:
        for thing in things:
            (self.rows if isinstance(thing, Row) else self.not_run).append(thing)  # type: ignore[arg-type]
            if self._file:
                print(to_line(thing), file=self._file, flush=True)


def timers() -> dict[str, Timer]:
    """By kind of row. Only where torch sees a GPU is there one for it."""
    import torch

    found: dict[str, Timer] = {"cpu": HostTimer()}
    if torch.cuda.is_available():
        from .device import Cuda, DeviceTimer

        found["gpu"] = DeviceTimer(Cuda())
    return found


def read_ceilings(path: Path | None) -> Ceilings:
    """From the report that the family ``ceilings`` wrote. The best backend of each counts."""
    if path is None or not path.exists():
        return Ceilings()
    rows, _ = from_lines(path.read_text().splitlines())

    def best(op: str, unit: float) -> float | None:
        rates = [row.rate * unit for row in rows if row.family == "ceilings" and row.op == op and row.rate]
        return max(rates, default=None)

    return Ceilings(bytes=best("copy", 1e9), fp8=best("fp8", 1e12), bf16=best("bf16", 1e12))


def run(family: str, works: Sequence[Work], session: Session, report: Report, seconds: float | None = None) -> None:
    """Each work in turn. What is unavailable, fails or comes too late is reported as not run."""
    from tqdm import tqdm

    deadline = None if seconds is None else time.monotonic() + seconds
    ordered = sorted(works, key=lambda work: work.priority)
    for work in (bar := tqdm(ordered, desc=family, unit="case", file=sys.stderr)):
        bar.set_postfix_str(f"{work.op} {work.shape}"[:60])
        if deadline is not None and time.monotonic() > deadline:
            report.add(NotRun(family, work.op, work.shape, NO_TIME))
            continue
        try:
            report.add(*work.measure(session))
        except Unavailable as reason:
            report.add(NotRun(family, work.op, work.shape, str(reason)))
        # Whatever a kernel or a peer raises, the rest of the night goes on.
        except Exception as error:
            report.add(NotRun(family, work.op, work.shape, f"{type(error).__name__}: {error}", failed=True))


def select(works: Sequence[Work], only: str | None) -> list[Work]:
    """Those whose op and shape, ``"op shape"``, are in a JSON list, or else contain the text."""
    if only is None:
        return list(works)
    if only.startswith("["):
        wanted = set(json.loads(only))
        return [work for work in works if f"{work.op} {work.shape}" in wanted]
    return [work for work in works if only in f"{work.op} {work.shape}"]
