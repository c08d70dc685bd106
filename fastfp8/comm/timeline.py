"""What each warp of the kernels did when, as a trace for Perfetto (https://ui.perfetto.dev) or Chrome.

    with Timeline(buffer) as timeline:
        recv, ends, handle = buffer.dispatch(x, topk_idx, topk_weights)
        y = buffer.combine(outs, handle)
    timeline.write("rank0.json")

Meanwhile calls launch other instances of the same kernels, which write an event for each message that a warp moves and
one for all that it does in its role: what is between messages, a warp waits. Results have the same bits; the calls take
somewhat longer. Clocks are the GPUs' own: within a GPU they agree, between machines they need not. Their step may be a
microsecond. No GPU has run it.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import _C
from ..errors import check_type, check_value, value_error
from .buffer import Buffer
from .kernel_exchange import KernelExchange
from .kernels import Kernels

# TraceLayout and TraceEvent of csrc/comm/layout.h.
_HEADER_WORDS, _EVENT_WORDS, _WHOLE_PART = 4, 12, 0xFFFFFFFF
_OP = "comm.Timeline"


class Event(NamedTuple):
    """What a warp did from ``begin`` to ``end``, in nanoseconds of its GPU's clock."""

    begin: int
    end: int
    call: str
    """exchange, dispatch or combine."""
    role: str
    stream: int | None
    """Of the role's, by csrc/comm's numbers. None, as ``message``, for all that the warp did in its role."""
    message: int | None
    channel: int
    cta: int
    warp: int
    sm: int

    @property
    def name(self) -> str:
        return f"{self.call}: {self.role}" if self.stream is None else f"{self.role} {self.stream}/{self.message}"


class Timeline:
    """A context in which calls of ``source`` are traced. CUDA graphs that are captured in it trace as long as it lives.

    Args:
        source: a :class:`fastfp8.comm.Buffer` with ``way="kernels"``, or its kernels.
        room: events that are kept of each rank on this GPU, 48 bytes each; those after them are counted.

    Raises:
        TypeError, ValueError: the Buffer has no kernels, or an argument does not fit.
    """

    def __init__(self, source: Buffer | Kernels, room: int = 1 << 18) -> None:
        check_type(source, (Buffer, Kernels), _OP, "source", "a comm.Buffer or its kernels")
        check_type(room, int, _OP, "room", "an int")
        check_value(0 < room < 1 << 27, _OP, "room", "1 to below 2**27 events", room)
        if isinstance(source, Buffer):
            exchange = source._exchange
            if not isinstance(exchange, KernelExchange):
                raise value_error(_OP, "source", "a Buffer with way='kernels'", f"one with way={exchange.way!r}")
            source = exchange.kernels
        ranks = source.state.shape[:-1].numel()
        self._kernels = source
        self._words = torch.zeros(
            (ranks, _HEADER_WORDS + _EVENT_WORDS * room), dtype=torch.int32, device=source.state.device
        )
        self._words[:, 1] = room

    def __enter__(self) -> Timeline:
        self._kernels.trace = self._words
        return self

    def __exit__(self, *_: object) -> None:
        self._kernels.trace = None

    @property
    def lost(self) -> list[int]:
        """For each rank how many events had no room."""
        return [max(0, count - room) for count, room in self._counts()]

    def events(self) -> list[list[Event]]:
        """Of each rank, in the order of their begin. Waits for the GPU."""
        return [self._events_of(place, min(counts)) for place, counts in enumerate(self._counts())]

    def trace(self) -> dict[str, Any]:
        """In Chrome's format: a process for each rank, a thread for each warp; times are from the first event on."""
        events = self.events()
        origin = min((event.begin for of_rank in events for event in of_rank), default=0)
        found: list[dict[str, Any]] = []
        for place, of_rank in enumerate(events):
            rank = self._kernels.rank + place
            found.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
            warps = sorted({(event.cta, event.warp) for event in of_rank})
            for thread, (cta, warp) in enumerate(warps):
                args = {"name": f"CTA {cta} warp {warp}"}
                found.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": args})
            threads = {which: thread for thread, which in enumerate(warps)}
            found += [_complete(event, origin, rank, threads[event.cta, event.warp]) for event in of_rank]
        other = {"origin_ns": origin, "lost_events": sum(self.lost)}
        return {"traceEvents": found, "displayTimeUnit": "ns", "otherData": other}

    def write(self, path: str | PathLike[str]) -> None:
        """:meth:`trace` to a JSON file. Each process has its own ranks' events, and needs a path of its own."""
        Path(path).write_text(json.dumps(self.trace()))

    def _counts(self) -> list[tuple[int, int]]:
        return [(count & 0xFFFFFFFF, room) for count, room in self._words[:, :2].tolist()]

    def _events_of(self, place: int, count: int) -> list[Event]:
        words = self._words[place, _HEADER_WORDS:][: _EVENT_WORDS * count].cpu().view(-1, _EVENT_WORDS)
        begins_and_ends = words[:, :4].contiguous().view(torch.int64)
        found = []
        for (begin, end), (call, role, stream, message, *rest) in zip(
            begins_and_ends.tolist(), words[:, 4:].tolist(), strict=True
        ):
            whole = stream & 0xFFFFFFFF == _WHOLE_PART
            of = (None, None) if whole else (stream, message)
            found.append(Event(begin, end, _C.comm_traced_calls[call], _C.comm_roles[role], *of, *rest))
        # What encloses others first, where the clock's step hides which began first.
        return sorted(found, key=lambda event: (event.begin, event.stream is not None, event.end))


def _complete(event: Event, origin: int, rank: int, thread: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": event.name,
        "cat": event.call,
        "pid": rank,
        "tid": thread,
        "ts": (event.begin - origin) / 1e3,
        "dur": (event.end - event.begin) / 1e3,
        "args": {
            "role": event.role,
            "stream": event.stream,
            "message": event.message,
            "channel": event.channel,
            "SM": event.sm,
        },
    }
