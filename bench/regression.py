"""The regression gate: which rows of a run are slower than those of its baseline, beyond the noise. See ``RULE``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from .night import Comparison
from .rows import MOST_FOREIGN_CORES, Environment, NotRun, Row, Run, Spread

#: How far beyond the baseline's quartile a median must lie.
TOLERANCE = 0.05
#: Fewer samples than this have no quartiles to speak of: such a time is not compared.
MIN_SAMPLES = 4
TIMES = ("s", "ms", "us", "ns")
NOTHING: Spread = (math.nan,) * 3

RULE = (
    "The rule: only rows of fastfp8 count, and only times that were measured and counts that were read off the kernels "
    "or the emulator; predictions never do. A time has regressed if its median is more than 5 % above the baseline's "
    "upper quartile, and so is its ratio to every peer that both runs timed beside it with the same versions of all "
    "packages: a slow machine moves both times, only a slow kernel moves the ratio. It must be so in two measurements, "
    "the second made at the end of the night; before that, and where there was no time for it, it is a suspect. "
    f"CPU times while other processes used more than {MOST_FOREIGN_CORES} cores are not judged. "
    "Improved is the mirror image below the lower quartile, measured once. Counts have no noise: one that is more than "
    "5 % above the baseline's has regressed. Rows that only one of the runs has are listed as new or gone, unless the "
    "run says why it has them not."
)


def compare(run: Run, baseline: Run) -> list[Comparison]:
    """Each row of ours beside its row in the baseline, in the order of the run; then what is gone.

    A time that is slower by the rule is a "suspect" until ``confirm``; a count that is larger has "regressed" at once.
    "new" and "gone" rows have NaN for the side that is not there.

    Args:
        run: the new results.
        baseline: those of an earlier run on the same kind of machine; of another, nothing is compared.
    """
    if why_not(run.environment, baseline.environment):
        return []
    before = _gated(baseline.rows)
    now = _gated(run.rows)
    same_cpu = _cpu(run.environment) == _cpu(baseline.environment)
    same_versions = _peer_versions(run.environment) == _peer_versions(baseline.environment)
    found = []
    for key, row in now.items():
        if row.kind == "cpu" and not same_cpu:
            continue
        if key not in before:
            found.append(Comparison(key, row.unit, NOTHING, _spread(row), "new", "the baseline has no such row"))
        elif not _is_time(row) or min(row.samples, before[key].samples) >= MIN_SAMPLES:
            found.append(_judge(row, before[key], same_versions))
    return found + _gone(run, now, before)


def confirm(comparisons: Sequence[Comparison], again: Iterable[Row], run: Run, baseline: Run) -> list[Comparison]:
    """The suspects after a second measurement: regressed where that was slow too, the same where it was not.

    Args:
        comparisons: what ``compare`` found.
        again: the rows of the second measurement; a suspect without one stays a suspect.
        run, baseline: what ``compare`` was given.
    """
    second = _gated(again)
    before = _gated(baseline.rows)
    same_versions = _peer_versions(run.environment) == _peer_versions(baseline.environment)
    found = []
    for first in comparisons:
        if first.verdict == "suspect" and first.key in second:
            judged = _judge(second[first.key], before[first.key], same_versions)
            slow = judged.verdict == "suspect"
            why = f"{first.why}; in a second measurement {judged.why}"
            first = dataclasses.replace(first, verdict="regressed" if slow else "same", why=why)
        elif first.verdict == "suspect":
            first = dataclasses.replace(first, why=f"{first.why}; it was not measured a second time")
        found.append(first)
    return found


def why_not(now: Environment, before: Environment) -> str | None:
    """Why two runs cannot be compared at all."""
    if now.machine != before.machine:
        return f"the baseline is of another kind of machine: {before.machine}, and this one is {now.machine}"
    return None


def why_not_cpu(now: Environment, before: Environment) -> str | None:
    """Why the CPU times of two runs of one kind of machine, which the GPU gives its name, cannot be compared."""
    if why_not(now, before) or _cpu(now) == _cpu(before):
        return None
    was, is_ = (f"{e.cpu} with {e.threads} threads" for e in (before, now))
    return f"CPU times are not compared: the baseline's CPU was {was}, and this one is {is_}"


def _gated(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    return {row.key: row for row in rows if row.ours and row.kind != "modelled" and not row.disturbed}


def _gone(run: Run, now: dict[tuple[str, ...], Row], before: dict[tuple[str, ...], Row]) -> list[Comparison]:
    """Rows of the baseline of which the run has no word."""
    measured = {row.key for row in run.rows}
    return [
        Comparison(key, row.unit, _spread(row), NOTHING, "gone", "this run has no such row and does not say why")
        for key, row in before.items()
        if key not in now and key not in measured and not any(_covers(entry, row) for entry in run.not_run)
    ]


def _covers(entry: NotRun, row: Row) -> bool:
    """An entry without an op is of all its family that is not there."""
    return entry.family == row.family and (not entry.op or (entry.op, entry.shape) == (row.op, row.shape))


def _judge(now: Row, before: Row, same_versions: bool) -> Comparison:
    own, was = _spread(now), _spread(before)
    time = _is_time(now)
    peers = [peer for peer in now.ratios if peer in before.ratios] if time and same_versions else []
    moves = [_move(own, was), *(_move(now.ratios[peer], before.ratios[peer]) for peer in peers)]
    verdict = "same"
    if all(move > 0 for move in moves):
        verdict = "suspect" if time else "regressed"
    elif all(move < 0 for move in moves):
        verdict = "improved"
    figures = [_figures(own, was, now.unit if time else "")]
    figures += [f"{_figures(now.ratios[peer], before.ratios[peer], '')} of the time of {peer}" for peer in peers]
    return Comparison(now.key, now.unit, was, own, verdict, ", ".join(figures))


def _move(now: Spread, before: Spread) -> int:
    """1 if the median is beyond the upper quartile by the tolerance, -1 if beyond the lower one, else 0."""
    lower, _, upper = before
    # Less than nothing is no size to take 5 % of: a difference of two times may be negative.
    if now[1] > upper + TOLERANCE * abs(upper):
        return 1
    return -1 if now[1] < lower - TOLERANCE * abs(lower) else 0


def _figures(now: Spread, before: Spread, unit: str) -> str:
    lower, median, upper = (f"{value:.4g}" for value in before)
    quartiles = "" if lower == upper else f" ({lower} to {upper})"
    change = f", {now[1] / before[1] - 1:+.1%}" if before[1] > 0 else ""
    return f"{now[1]:.4g} after {median}{quartiles}{f' {unit}' if unit else ''}{change}"


def _is_time(row: Row) -> bool:
    return row.kind in ("gpu", "cpu") and row.unit in TIMES


def _spread(row: Row) -> Spread:
    return (row.lower, row.median, row.upper)


def _cpu(environment: Environment) -> tuple[str, int]:
    return environment.cpu, environment.threads


def _peer_versions(environment: Environment) -> dict[str, str]:
    """Of all that a peer's time can depend on; nvcc compiles our kernels only."""
    return {package: version for package, version in environment.versions.items() if package != "nvcc"}
