"""What a benchmark says: rows, and what could not be measured, in files that people and programs read.

``results.jsonl`` has one JSON object a line: a measurement with the machine that made it, or what was not run and why.
``bench/results/<machine>/*.json`` holds the same run in a compact form, for the history. ``Run.load`` reads both.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

#: How a value was had. Only the first two are measurements of speed.
KINDS = {
    "gpu": "measured on a GPU",
    "cpu": "measured on a CPU",
    "static": "read off the compiled kernels",
    "emulated": "counted on the emulator",
    "modelled": "predicted by a model",
}

#: A process beside a timing on all cores stops one of their threads, and the others wait for that one.
MOST_FOREIGN_CORES = 0.2

Spread = tuple[float, float, float]  # lower quartile, median, upper quartile


def spread(values: Sequence[float]) -> Spread:
    """Quartiles and median; of one value, three times itself."""
    if len(values) == 1:
        return (values[0],) * 3
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


@dataclasses.dataclass(frozen=True)
class Row:
    """One value with its spread. Of times, counts and sizes alike, less is better.

    ``ratios`` holds, for each peer timed beside it, the spread of own time over the peer's in the same round: below 1
    this row is faster. ``floor`` is the least time that the machine's measured ceilings allow, in ``unit``.
    ``bar`` is the largest ``score`` that passes. Several units of one work, as of a kernel its registers and its
    instructions, are rows of their own.
    """

    family: str
    op: str
    shape: str
    backend: str
    kind: str
    unit: str
    median: float
    lower: float
    upper: float
    samples: int = 1
    config: str | None = None
    rate: float | None = None
    rate_unit: str | None = None
    #: FLOPs for each byte that must move through memory.
    intensity: float | None = None
    floor: float | None = None
    ratios: dict[str, Spread] = dataclasses.field(default_factory=dict)
    bar: float | None = None
    #: "median" where the bar is for that although there are peers.
    bar_on: str | None = None
    clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    #: NVML's names of what held the clocks down, joined by commas; empty where nothing did.
    throttle: str | None = None
    #: CPU cores that other processes used meanwhile, of a time on the host's clock.
    foreign_cores: float | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows of two runs the same measurement."""
        return (self.kind, self.family, self.op, self.shape, self.backend, self.unit)

    @property
    def ours(self) -> bool:
        return self.backend.startswith("fastfp8")

    @property
    def share(self) -> float | None:
        """Of the ceiling: 1 is as fast as the machine allows."""
        return None if not self.floor else self.floor / self.median

    @property
    def score(self) -> float:
        """What the bar is for: the ratio to the first peer where there is one and ``bar_on`` does not say otherwise."""
        if self.bar_on == "median":
            return self.median
        return next((median for _, median, _ in self.ratios.values()), self.median)

    @property
    def disturbed(self) -> bool:
        """Whether other processes used so much of the CPUs that the time says little of the code."""
        return self.foreign_cores is not None and self.foreign_cores > MOST_FOREIGN_CORES

    @property
    def passed(self) -> bool:
        """A time that was disturbed is not judged."""
        return self.bar is None or self.disturbed or self.score <= self.bar


@dataclasses.dataclass(frozen=True)
class NotRun:
    """A measurement that was not made, or a stage that was left out, and why. ``failed`` turns the night red."""

    family: str
    op: str
    shape: str
    reason: str
    failed: bool = False


@dataclasses.dataclass(frozen=True)
class Suite:
    """One run of tests."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    #: pytest's names of what failed, or why the suite did not end.
    failures: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failed and not self.failures


@dataclasses.dataclass(frozen=True)
class Environment:
    """What a reader needs to know to compare two runs. ``machine`` names the folder of its history."""

    machine: str
    date: str
    commit: str | None
    cpu: str
    threads: int
    load: float
    gpu: str | None = None
    driver: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Run:
    environment: Environment
    rows: list[Row] = dataclasses.field(default_factory=list)
    not_run: list[NotRun] = dataclasses.field(default_factory=list)
    suites: list[Suite] = dataclasses.field(default_factory=list)

    @staticmethod
    def load(path: Path) -> Run:
        """A run from ``results.jsonl``, from a compact file, or from the latest of either in a folder.

        Raises:
            ValueError: the file holds no run, or one that this version cannot read; the message names file and line.
        """
        if path.is_dir():
            found = [path / RESULTS] if (path / RESULTS).exists() else sorted(path.glob("*.json"))
            if not found:
                raise ValueError(f"{path} holds neither {RESULTS} nor a *.json")
            path = max(found, key=lambda p: Run.load(p).environment.date) if len(found) > 1 else found[0]
        text = path.read_text()
        try:
            return _from_compact(json.loads(text)) if path.suffix == ".json" else _from_lines(text.splitlines())
        except (KeyError, TypeError, ValueError) as error:
            why = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{path} is no benchmark run: {why}") from error

    def lines(self) -> list[str]:
        """The lines of ``results.jsonl``."""
        where = dataclasses.asdict(self.environment)
        records = [
            _record("environment", where),
            *(_record("row", {**_row_dict(r), "share": r.share, **where}) for r in self.rows),
        ]
        records += [_record("not_run", dataclasses.asdict(n)) for n in self.not_run]
        records += [_record("suite", dataclasses.asdict(s)) for s in self.suites]
        return records

    def compact(self) -> str:
        """The run as one JSON object: rows as lists without the fields that none of them uses, a line each."""
        dicts = [_row_dict(row) for row in self.rows]
        used = [f.name for f in dataclasses.fields(Row) if any(d[f.name] not in (None, {}) for d in dicts)]
        head = {
            "environment": dataclasses.asdict(self.environment),
            "suites": [dataclasses.asdict(s) for s in self.suites],
            "not_run": [dataclasses.asdict(n) for n in self.not_run],
            "fields": used,
        }
        rows = ",\n".join(json.dumps([d[name] for name in used]) for d in dicts)
        return f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n'


RESULTS = "results.jsonl"


def to_line(thing: Row | NotRun) -> str:
    """One line of the file in which a family's process reports to the night's; ``from_lines`` reads it."""
    return _record("row", _row_dict(thing)) if isinstance(thing, Row) else _record("not_run", dataclasses.asdict(thing))


def from_lines(lines: Iterable[str]) -> tuple[list[Row], list[NotRun]]:
    things = _things(lines)
    return [t for t in things if isinstance(t, Row)], [t for t in things if isinstance(t, NotRun)]


def _record(kind: str, fields: dict[str, Any]) -> str:
    return json.dumps({"record": kind, **fields})


def _round(value: float) -> float:
    """Five significant digits, more than any timing has; a count stays whole."""
    return value if value.is_integer() else float(f"{value:.5g}")


def _row_dict(row: Row) -> dict[str, Any]:
    fields = {k: _round(v) if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()}
    return {**fields, "ratios": {peer: [_round(v) for v in values] for peer, values in row.ratios.items()}}


def _build(cls: Any, fields: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in fields.items() if k in names})


def _row(fields: dict[str, Any]) -> Row:
    ratios = {peer: tuple(values) for peer, values in fields.get("ratios", {}).items()}
    return _build(Row, {**fields, "ratios": ratios})  # type: ignore[no-any-return]


def _suite(fields: dict[str, Any]) -> Suite:
    return _build(Suite, {**fields, "failures": tuple(fields["failures"])})  # type: ignore[no-any-return]


def _things(lines: Iterable[str]) -> list[Any]:
    """What each line holds, in order; records of a kind that this version does not know are passed over."""
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if build := _BUILDERS.get(record["record"]):
                found.append(build(record))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number}: {error!r}") from error
    return found


_BUILDERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "environment": functools.partial(_build, Environment),
    "row": _row,
    "not_run": functools.partial(_build, NotRun),
    "suite": _suite,
}


def _from_lines(lines: Sequence[str]) -> Run:
    things = _things(lines)
    where = [t for t in things if isinstance(t, Environment)]
    if len(where) != 1:
        raise ValueError(f"expected one line of record 'environment', found {len(where)}")
    rows = [t for t in things if isinstance(t, Row)]
    not_run = [t for t in things if isinstance(t, NotRun)]
    return Run(where[0], rows, not_run, [t for t in things if isinstance(t, Suite)])


def _from_compact(whole: dict[str, Any]) -> Run:
    rows = [_row(dict(zip(whole["fields"], values, strict=True))) for values in whole["rows"]]
    not_run = [_build(NotRun, n) for n in whole["not_run"]]
    return Run(_build(Environment, whole["environment"]), rows, not_run, [_suite(s) for s in whole["suites"]])
