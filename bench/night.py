"""A night: a run, what it is compared with, and whether it was green. Reports and the exit status are views of it."""

from __future__ import annotations

import dataclasses
import itertools

from .rows import NotRun, Row, Run, Spread, Suite


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row against its row in the baseline."""

    key: tuple[str, ...]
    unit: str
    before: Spread
    now: Spread
    #: "regressed", "improved", "same", "suspect" (slower once, not confirmed by a second measurement), or, with NaN for
    #: the side that is not there, "new" or "gone".
    verdict: str
    #: One sentence with the figures.
    why: str


@dataclasses.dataclass(frozen=True)
class Night:
    run: Run
    baseline: Run | None
    comparisons: list[Comparison]
    #: Earlier runs of this machine, oldest first.
    history: list[Run]
    #: Seconds of each stage, in order.
    stages: dict[str, float]
    #: What was asked for.
    minutes: float

    @property
    def failures(self) -> list[str]:
        """One line each; none is a green night."""
        lines = [_suite(suite) for suite in self.run.suites if not suite.ok]
        lines += [_not_run(entry) for entry in self.run.not_run if entry.failed]
        lines += [_bar(row) for row in self.run.rows if not row.passed]
        lines += [_regressed(c) for c in self.comparisons if c.verdict == "regressed"]
        return [" ".join(line.split()) for line in lines]


def name(*parts: str) -> str:
    """Family, op, shape and the like as one name; what is empty, or what the next begins with, is left out."""
    given = [part for part in parts if part]
    kept = [part for part, following in itertools.pairwise(given) if not f"{following} ".startswith(f"{part} ")]
    return " ".join([*kept, *given[-1:]])


def _suite(suite: Suite) -> str:
    what = ", ".join(suite.failures[:3]) + (f" and {len(suite.failures) - 3} more" if len(suite.failures) > 3 else "")
    return f"tests, {suite.name}: {suite.failed} failed" + (f": {what}" if what else "")


def _not_run(entry: NotRun) -> str:
    return f"{name(entry.family, entry.op, entry.shape)}: {entry.reason}"


def _regressed(found: Comparison) -> str:
    unit = "" if found.unit in found.why.split() else found.unit
    return f"{name(*found.key[1:5], unit)}: regressed: {found.why}"


def _bar(row: Row) -> str:
    peer = None if row.bar_on == "median" else next(iter(row.ratios), None)
    value = f"{row.score:.4g} {row.unit}" if peer is None else f"{row.score:.4g} times {peer}"
    return f"{name(row.family, row.op, row.shape, row.backend)}: {value}, over its bar of {row.bar:.4g}"
