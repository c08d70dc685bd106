"""Settings of a buffer: defaults from the model, a sweep of measurements, and a file that keeps what one found.

:func:`defaults` measures nothing. :func:`sweep` tries settings with whatever ``measure`` it is given; what it finds a
:class:`Cache` keeps from run to run. All ranks of a buffer must have the same settings, so ``measure`` has to give all
of them the same seconds, those of the slowest; and one rank alone should write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .model import MACHINES, Machine, Settings, Shape, ring_bytes
from .simulation import simulate

#: What is tried, each in ascending order of what it takes.
CHOICES: dict[str, tuple[int, ...]] = {
    "num_sms": (4, 8, 12, 16, 20, 24, 32),
    "rail_chunk": (1, 2, 4, 8, 16, 32),
    "rail_slots": (2, 4, 8),
    "link_slots": (1, 2, 4, 8, 16, 32),
}
#: Those of CHOICES that are of rings; without rails.
RINGS, RINGS_OF_ONE_NODE = ("rail_chunk", "rail_slots", "link_slots"), ("link_slots",)
#: Fewer SMs, which the GEMMs have then, are worth so much time; smaller rings so much.
WORTH = {"num_sms": 1.05, "rail_chunk": 1.01, "rail_slots": 1.01, "link_slots": 1.01}
#: Rings of a rank, in bytes, unless the smallest are larger.
MOST_BYTES = 1 << 30
#: Ranks are not in step as the model's are: rings get more slots than it finds use for, up to so many bytes.
SPARE_BYTES = 1 << 27
#: Link slots, rail slots and chunk from which a search starts: the first that fit.
STARTS = ((32, 8, 4), (16, 8, 4), (8, 4, 4), (4, 4, 2), (2, 2, 2), (1, 2, 1))
#: Tokens that the model is asked about, at most: its rates change little beyond.
MOST_TOKENS = 2048

Seconds: TypeAlias = Callable[[Settings], float]


def machine_of(gpu: str) -> Machine:
    """The machine whose name is in the GPU's, as torch gives it; H100 for one that the model does not know."""
    return next((machine for name, machine in MACHINES.items() if name in gpu), MACHINES["H100"])


@functools.lru_cache(maxsize=256)
def defaults(
    nodes: int,
    gpus: int,
    hidden: int,
    top_k: int,
    gpu: str,
    top_groups: int | None = None,
    *,
    experts: int = 256,
    max_tokens: int = 4096,
    num_sms: int | None = None,
    most_bytes: int = MOST_BYTES,
) -> Settings:
    """What the model thinks best for dispatch and combine of one layer. Nothing of it was measured.

    Args:
        nodes, gpus: of the buffer, and of each node.
        gpu: name of the GPU, as ``torch.cuda.get_device_name()`` gives it.
        top_groups: nodes that the gate lets a token go to, None for any.
        num_sms: None for the fewest that are predicted to take at most 5 % longer than the best number.
        most_bytes: of the rings of one rank, if any settings keep to that.
    """
    ranks = nodes * gpus
    experts = max(1, -(-experts // ranks)) * ranks
    shape = Shape(nodes, gpus, min(max(1, max_tokens), MOST_TOKENS), hidden, experts, min(top_k, experts), top_groups)
    machine = machine_of(gpu)

    def seconds(settings: Settings) -> float:
        return sum(simulate(machine, shape, settings, combine=combine).seconds for combine in (False, True))

    def fits(settings: Settings) -> bool:
        return ring_bytes(shape, settings) <= most_bytes and settings.num_sms <= machine.sms

    sms = num_sms or next(n for n in (20, 12, 4) if n == 4 or fits(Settings(n, *STARTS[-1])))
    start = next((s for s in (Settings(sms, *rings) for rings in STARTS) if fits(s)), Settings(sms, *STARTS[-1]))
    names = RINGS if nodes > 1 else RINGS_OF_ONE_NODE
    slots = [name for name in names if name != "rail_chunk"]
    settings = descend(seconds, start, names if num_sms else ("num_sms", *names), fits)
    for name in (*slots, *slots):
        more = dataclasses.replace(settings, **{name: 2 * getattr(settings, name)})
        if getattr(more, name) <= CHOICES[name][-1] and ring_bytes(shape, more) <= min(SPARE_BYTES, most_bytes):
            settings = more
    return settings


def descend(
    seconds: Seconds, start: Settings, names: Sequence[str], fits: Callable[[Settings], bool] = lambda _: True
) -> Settings:
    """One of ``names`` after another set to the least of its :data:`CHOICES` that is worth it, among those that fit."""
    settings = start
    for name in names:
        changed = (dataclasses.replace(settings, **{name: value}) for value in CHOICES[name])
        times = {option: seconds(option) for option in changed if fits(option)}
        if times:
            limit = WORTH[name] * min(times.values())
            settings = next(option for option, time in times.items() if time <= limit)
    return settings


@dataclass(frozen=True)
class Tuned:
    """What a sweep found: the settings, their seconds, and those of all that were tried."""

    settings: Settings
    seconds: float
    tried: dict[Settings, float]

    def __str__(self) -> str:
        rows = [
            f"{1e6 * time:10.1f} us  {settings}" for settings, time in sorted(self.tried.items(), key=lambda i: i[1])
        ]
        return "\n".join([f"{self.settings}: {1e6 * self.seconds:.1f} us", *rows])


def sweep(
    measure: Seconds,
    start: Settings,
    names: Sequence[str] = ("rail_chunk", "num_sms"),
    *,
    repeats: int = 5,
    fits: Callable[[Settings], bool] = lambda _: True,
) -> Tuned:
    """Tries chunk sizes, then numbers of SMs, and whatever else of :data:`CHOICES` ``names`` names.

    Args:
        measure: seconds of one dispatch and combine with these settings, of the slowest rank. It may warm up by itself.
        start: what the others have meanwhile; it is tried, too.
        repeats: of each; their median counts.
        fits: which settings may be tried.
    """
    tried: dict[Settings, float] = {}

    def seconds(settings: Settings) -> float:
        if settings not in tried:
            tried[settings] = statistics.median(measure(settings) for _ in range(repeats))
        return tried[settings]

    seconds(start)
    settings = descend(seconds, start, names, fits)
    return Tuned(settings, seconds(settings), tried)


@dataclass(frozen=True)
class Key:
    """What settings are kept by."""

    nodes: int
    ranks: int
    hidden: int
    top_k: int
    gpu: str

    def __str__(self) -> str:
        return f"{self.nodes} nodes, {self.ranks} ranks, hidden {self.hidden}, top {self.top_k}, {self.gpu}"


class Cache:
    """Settings by :class:`Key` in a JSON file, by default in the user's cache directory.

    A file that is missing, or that something else wrote, is an empty one; a user without a home has none. A write
    replaces the file as a whole, so a reader never sees a part of it; of two writers at once the later's file stays.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            with contextlib.suppress(RuntimeError):  # a user without a home
                path = Path.home() / ".cache" / "fastfp8" / "comm.json"
        self.path = path or Path(os.devnull) / "comm.json"

    def load(self, key: Key) -> Settings | None:
        return _settings(self._entries().get(str(key)))

    def store(self, key: Key, settings: Settings) -> None:
        """Warns if the file cannot be written: the settings are good without it."""
        entries = {**self._entries(), str(key): dataclasses.asdict(settings)}
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            with os.fdopen(handle, "w") as file:
                json.dump(entries, file, indent=1)
            os.replace(temporary, self.path)
        except OSError as error:
            warnings.warn(f"fastfp8.comm: settings are not kept: {error}", stacklevel=2)
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _entries(self) -> dict[str, Any]:
        """What is in the file and is of our kind."""
        try:
            entries = json.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(entries, dict):
            return {}
        return {key: value for key, value in entries.items() if _settings(value) is not None}


def _settings(fields: Any) -> Settings | None:
    names = [field.name for field in dataclasses.fields(Settings)]
    if not isinstance(fields, dict) or sorted(fields) != sorted(names):
        return None
    if any(type(value) is not int or value < 1 for value in fields.values()) or fields["num_sms"] % 2:
        return None
    return Settings(**fields)
