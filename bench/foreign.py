"""What else the machine's CPUs do while a time is taken: a busy machine is no measure of the code."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

_TICK = os.sysconf("SC_CLK_TCK")


class ForeignLoad:
    """Cores that other processes used between the first sample and the last. Without /proc/stat it says nothing."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []

    def sample(self) -> None:
        stat = Path("/proc/stat")
        if stat.exists():
            self._samples.append((time.monotonic(), busy_seconds(stat.read_text()) - own_seconds()))

    def fields(self) -> dict[str, Any]:
        """The field of Row that it fills; samples begin anew."""
        samples, self._samples = self._samples, []
        if len(samples) < 2 or samples[-1][0] <= samples[0][0]:
            return {}
        elapsed = samples[-1][0] - samples[0][0]
        return {"foreign_cores": max(0.0, (samples[-1][1] - samples[0][1]) / elapsed)}


def busy_seconds(stat: str) -> float:
    """Of all CPUs since they were started, out of /proc/stat: all but what they were idle or waited for a disk."""
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(n) for n in stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICK


def own_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])
