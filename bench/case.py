"""A case: what to time, beside what, and how its times become rows. What cannot be had says why."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .foreign import ForeignLoad
from .rows import Row, Spread, spread

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}


class Unavailable(Exception):
    """Why something cannot be measured here. It is listed as not run; nothing failed."""


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine was measured to do, in bytes and FLOPs a second; None where it was not measured."""

    bytes: float | None = None
    fp8: float | None = None
    bf16: float | None = None

    def floor(self, subject: Subject) -> float | None:
        """The least seconds for a subject's bytes and FLOPs; None where a ceiling that it needs is not known."""
        rate = getattr(self, subject.tensor_rate)
        if (subject.bytes and self.bytes is None) or (subject.flops and rate is None):
            return None
        return max(subject.bytes / (self.bytes or 1.0), subject.flops / (rate or 1.0)) or None


class Telemetry(Protocol):
    """What the machine says of itself while it works."""

    def sample(self) -> None: ...

    def fields(self) -> dict[str, Any]:
        """The fields of Row that it fills, over the samples since the last call."""
        ...


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do the work. ``run(i)`` does it once, on the i-th copy of the inputs, and returns its output.

    ``check`` raises AssertionError for a wrong output. ``calls`` is how many calls make one sample on the host's clock.
    """

    backend: str
    run: Callable[[int], Any]
    check: Callable[[Any], None] | None = None
    calls: int = 1
    config: str | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
    """The contestants of a case, ours first, with what they all must move and compute.

    ``copies`` of the inputs lie in memory, more than L2 holds, and are used in turn. ``missing`` says, by peer, why one
    that belongs here is not there.
    """

    contestants: Sequence[Contestant]
    copies: int = 1
    bytes: float = 0.0
    flops: float = 0.0
    tensor_rate: str = "fp8"
    missing: dict[str, str] = dataclasses.field(default_factory=dict)


class Timer(Protocol):
    """Seconds a call of each contestant, one sample a round: ``times[contestant][round]``."""

    telemetry: Telemetry | None

    def time(self, subject: Subject, rounds: int) -> list[list[float]]: ...


@dataclasses.dataclass(frozen=True)
class Session:
    """What every case of a run shares. ``tiny`` shrinks shapes until the times mean nothing, to try the benchmark."""

    samples: int
    tiny: bool = False
    ceilings: Ceilings = Ceilings()
    timers: dict[str, Timer] = dataclasses.field(default_factory=dict)


class Work(Protocol):
    """One entry of a family's list. A smaller ``priority`` comes earlier in the night."""

    @property
    def op(self) -> str: ...
    @property
    def shape(self) -> str: ...
    @property
    def priority(self) -> int: ...

    def measure(self, session: Session) -> list[Row]:
        """Raises Unavailable where it cannot be measured here."""
        ...


@dataclasses.dataclass(frozen=True)
class Case:
    """Contestants to be timed in turns. ``build`` makes inputs and contestants when the case's turn comes."""

    family: str
    op: str
    shape: str
    kind: str
    build: Callable[[], Subject]
    priority: int = 0
    unit: str = "ms"
    bar: float | None = None
    #: "median": see Row.
    bar_on: str | None = None

    def measure(self, session: Session) -> list[Row]:
        timer = session.timers.get(self.kind)
        if timer is None:
            raise Unavailable(f"there is no {self.kind.upper()} to measure on")
        subject = self.build()
        times = timer.time(subject, session.samples)
        return self.rows(subject, times, session.ceilings, timer.telemetry.fields() if timer.telemetry else {})

    def rows(
        self, subject: Subject, times: Sequence[Sequence[float]], ceilings: Ceilings, telemetry: dict[str, Any]
    ) -> list[Row]:
        """A row a contestant; ours, the first, has its ratio to each of the others, round by round, and the bar."""
        floor, scale = ceilings.floor(subject), UNITS[self.unit]
        found = []
        for contestant, own in zip(subject.contestants, times, strict=True):
            lower, median, upper = spread(own)
            first = contestant is subject.contestants[0]
            rate, rate_unit = _rate(subject, median)
            found.append(
                Row(
                    *(self.family, self.op, self.shape, contestant.backend, self.kind, self.unit),
                    *(median * scale, lower * scale, upper * scale, len(own)),
                    config=contestant.config,
                    rate=rate,
                    rate_unit=rate_unit,
                    intensity=subject.flops / subject.bytes if subject.flops and subject.bytes else None,
                    floor=None if floor is None else floor * scale,
                    ratios=_ratios(subject, times) if first else {},
                    bar=self.bar if first else None,
                    bar_on=self.bar_on if first else None,
                    note="; ".join(f"without {p}: {why}" for p, why in subject.missing.items()) if first else None,
                    **telemetry,
                )
            )
        return found


def _rate(subject: Subject, seconds: float) -> tuple[float | None, str | None]:
    if subject.flops:
        return subject.flops / seconds / 1e12, "TFLOPS"
    return (subject.bytes / seconds / 1e9, "GB/s") if subject.bytes else (None, None)


def _ratios(subject: Subject, times: Sequence[Sequence[float]]) -> dict[str, Spread]:
    peers = zip(subject.contestants[1:], times[1:], strict=True)
    return {c.backend: spread([t / b for t, b in zip(times[0], base, strict=True)]) for c, base in peers}


@dataclasses.dataclass(frozen=True)
class Computed:
    """Rows that are computed or counted, not timed in turns."""

    op: str
    shape: str
    compute: Callable[[Session], list[Row]]
    priority: int = 0

    def measure(self, session: Session) -> list[Row]:
        return self.compute(session)


def turns(count: int, rounds: int) -> list[list[int]]:
    """For each round, the contestants in an order of its own, so that none always follows the same other."""
    shuffler = random.Random(0)
    return [shuffler.sample(range(count), count) for _ in range(rounds)]


class HostTimer:
    """The host's clock, for work that is done when the call returns. One round before the first is not counted."""

    def __init__(self) -> None:
        self.telemetry: Telemetry | None = ForeignLoad()

    def time(self, subject: Subject, rounds: int) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in subject.contestants]
        for contestant in subject.contestants:
            output = contestant.run(0)
            if contestant.check:
                contestant.check(output)
        assert self.telemetry
        self.telemetry.sample()
        for round_, order in enumerate(turns(len(times), rounds)):
            for index in order:
                contestant = subject.contestants[index]
                start = time.perf_counter()
                for _ in range(contestant.calls):
                    contestant.run(round_ % subject.copies)
                times[index].append((time.perf_counter() - start) / contestant.calls)
        self.telemetry.sample()
        return times
