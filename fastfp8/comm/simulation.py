"""A discrete-event simulation of dispatch and combine. **All that it says is predicted.**

One channel of one rank is simulated, which stands for all: what it sends it also gets, at the same time, from ranks
that do as it does. Events are chunks. A chunk is held up by the warps of a role, by the two SMs' copy rate, by the NIC
and by NVLink, whichever is the slowest, and by credits: a rail's slot comes back when the chunk was read and the flag
has travelled. Warps are shared out among roles as the kernels do (``csrc/comm/kernels/serve.cuh``). Left out: that a
receiver in combine waits for all sums of a token before it frees any, congestion in the network, and other work on the
GPU.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import check_value
from .model import GB, REGISTERS, US, Copying, Machine, Settings, Shape, traffic

#: From a load to its data: hundreds of cycles (HBM, random) at under 2 GHz, and a queue. A guess.
LOAD_S = 0.6 * US
#: Of a warp, to hand a chunk to the NIC. A guess; that messages of one record reach the line's rate, DeepEP's
#: low-latency rows show.
PUT_S = 1.0 * US
#: Tokens of this rank's own node that are followed together.
BATCH = 8
#: Of an SM, bytes a second: DeepEP V2's own constants for Hopper.
SM_READ, SM_WRITE = 200 * GB, 50 * GB


@dataclass(frozen=True)
class Prediction:
    seconds: float
    bound: str  # what was busy for the longest part: "rail", "link", "SMs" or a role
    busy: dict[str, float]  # of each, the part of the time

    @property
    def us(self) -> float:
        return self.seconds / US


def warps_of_roles(warps: int, loads: Sequence[float]) -> list[int]:
    """As ``share_of`` in csrc/comm/kernels/serve.cuh: one for each role with a load, the others in proportion."""
    active = [role for role, load in enumerate(loads) if load > 0]
    counts = [0] * len(loads)
    for role in active:
        counts[role] = 1 + int(loads[role] * (warps - len(active)) / sum(loads))
    if active:
        counts[active[-1]] += warps - sum(counts)
    return counts


class _Work(NamedTuple):
    """Of warps: ``rounds`` of loads in all ``messages``, one after another in each; bytes that the SMs read and write,
    and that go by NVLink; chunks that are handed to the NIC."""

    messages: float
    rounds: float
    read: float
    write: float
    link: float = 0.0
    puts: float = 0.0


class _Server:
    """Does one thing after another; ``count`` of them side by side."""

    def __init__(self, count: int = 1) -> None:
        self.count, self.busy = count, 0.0
        self.free = [0.0] * max(count, 1)

    def start(self, now: float) -> float:
        return max(now, self.free[0])

    def take(self, start: float, seconds: float) -> float:
        """From ``start`` on or when it is free; when it is done."""
        end = max(start, self.free[0]) + seconds
        self.hold(end, seconds)
        return end

    def hold(self, until: float, seconds: float) -> None:
        self.busy += seconds
        heapq.heapreplace(self.free, until)

    def times(self, work: _Work) -> tuple[float, float]:
        """How long one of them is held by this work, and how long the work lasts."""
        seconds = work.rounds * LOAD_S + work.puts * PUT_S
        return seconds, seconds


class _Crowd(_Server):
    """Warps that share out a batch's messages: as fast as all of them, but no faster than one with one message."""

    def __init__(self, warps: int) -> None:
        super().__init__()
        self.warps = max(warps, 1)

    def times(self, work: _Work) -> tuple[float, float]:
        seconds = work.rounds * LOAD_S
        return seconds / self.warps, seconds / max(1.0, min(self.warps, work.messages))


class _Channel:
    """One channel of the rank that stands for all. Rates of what the channels share are divided among them."""

    def __init__(self, machine: Machine, shape: Shape, settings: Settings, options: tuple[float, Copying]) -> None:
        self.machine, self.shape, self.settings = machine, shape, settings
        self.skew, self.copying = options
        self.channels = settings.num_sms // 2
        self.tokens = shape.tokens / self.channels
        self.traffic = traffic(shape)
        self.out_nodes = shape.nodes - 1
        self.copies = self.traffic.ranks / self.traffic.nodes  # ranks of a node that a record goes to
        self.sms = _Server()
        self.rail_out, self.rail_in, self.link_out, self.link_in = (_Server() for _ in range(4))
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.rail_records = self.tokens * self.traffic.rails
        self.own_records = self.tokens * self.traffic.ranks / shape.nodes  # by link, of this rank's own tokens
        # Records that the rings between one rank and all GPUs of a node hold, of one stream.
        self.ring = float(settings.link_slots * shape.gpus)

    def turn(self, rounds: float) -> float:
        """From a link's slot being filled until its writer may fill it again; the reader needs ``rounds`` for it."""
        return 2 * self.machine.link_us * US + rounds * LOAD_S

    def at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time, next(self.order), event))

    def run(self) -> float:
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            event()
        return self.now

    def work(self, role: _Server, work: _Work, wait: float = 0.0, blocks: bool = True) -> float:
        """When this ends, which begins now at the earliest. It waits for room ``wait`` in all; ``blocks``: the warps do
        nothing else meanwhile."""
        start = role.start(self.now)
        held, lasts = role.times(work)
        until = max(start + held, self.sms.take(start, (work.read / SM_READ + work.write / SM_WRITE) / 2))
        if work.link:
            until = max(until, self.link_out.take(start, work.link * self.channels / (self.machine.link * GB)))
        if blocks:
            until = max(until, start + wait)
        role.hold(until, until - start)
        return max(until, start + max(lasts, wait))

    def rail(self, sent: float, bytes_: float) -> float:
        """When a chunk that is handed to the NIC at ``sent`` has arrived, at a NIC as busy as this one."""
        seconds = bytes_ * self.channels / (self.machine.rail * GB)
        out = self.rail_out.take(sent, seconds)
        hot = 1 + (self.skew - 1) / self.shape.gpus
        return max(out, self.rail_in.take(out - seconds, seconds * hot)) + self.machine.rail_us * US

    def linked(self, sent: float, bytes_: float) -> float:
        """When records have arrived by NVLink that their writer is done with at ``sent``."""
        seconds = bytes_ * self.channels / (self.machine.link * GB) * self.skew
        return max(sent, self.link_in.take(sent - seconds, seconds)) + self.machine.link_us * US

    def chunks(self) -> list[list[float]]:
        """Records of each chunk of each rail stream: as many streams of as many records as there are on average."""
        if not self.out_nodes:
            return []
        size, each = self.settings.rail_chunk, self.rail_records / self.out_nodes
        full = int(each / size)
        rest = each - full * size
        return [[float(size)] * full + ([rest] if rest > 0.01 else []) for _ in range(self.out_nodes)]

    @property
    def traveling(self) -> float:
        """The part of a node's copies that are for other GPUs than the one in between."""
        return 1 - 1 / self.shape.gpus

    def prediction(self, end: float, roles: dict[str, _Server]) -> Prediction:
        end = max(end, 1e-12)
        shared = {"rail": self.rail_in, "link": self.link_in, "link out": self.link_out, "SMs": self.sms}
        servers = {**shared, **{name: role for name, role in roles.items() if role.count}}
        busy = {name: server.busy / server.count / end for name, server in servers.items()}
        # Warps that wait for a link are busy, too: a role is named only where nothing that it waits for is.
        first = max(shared, key=lambda name: busy[name])
        bound = first if busy[first] > 0.8 else max(busy, key=lambda name: busy[name])
        return Prediction(end + self.machine.call_us * US, bound, busy)


class _Window:
    """Records of a ring that have been sent and not yet read; who sends more waits for the oldest."""

    def __init__(self, records: float) -> None:
        self.records, self.in_flight = records, 0.0
        self.ends: deque[tuple[float, float]] = deque()

    def wait(self, now: float, records: float, turn: float) -> float:
        """How long ``records`` wait for room, those too that the ring does not hold at once, if a slot comes back after
        ``turn``."""
        wanted, free = min(records, self.records), now
        while self.ends and (self.ends[0][0] <= free or self.in_flight + wanted > self.records):
            end, count = self.ends.popleft()
            free, self.in_flight = max(free, end), self.in_flight - count
        return free - now + max(0.0, records / self.records - 1) * turn

    def fill(self, until: float, records: float) -> None:
        wanted = min(records, self.records)
        self.in_flight += wanted
        self.ends.append((until, wanted))


class _Dispatch(_Channel):
    def simulate(self) -> Prediction:
        shape, settings = self.shape, self.settings
        via = self.rail_records * self.copies
        loads = (self.rail_records, self.rail_records + via, self.own_records, self.own_records + via)
        counts = warps_of_roles(2 * settings.warps, loads)
        self.send, self.forward = _Server(counts[0]), _Server(counts[1])
        self.link_send, self.receive = _Crowd(counts[2]), _Crowd(counts[3])
        self.windows = [_Window(self.ring) for _ in range(shape.nodes)]
        self.record_turn = self.turn(self.copying.rounds(shape.record_bytes))
        self.left = [deque(stream) for stream in self.chunks()]
        self.credits = [settings.rail_slots] * self.out_nodes
        self.turns = deque(range(self.out_nodes))
        self.idle = counts[0]
        self.start_sends()
        # Tokens without an expert in their own node are passed over.
        self.own_tokens = self.tokens * self.traffic.nodes / shape.nodes
        batches = math.ceil(self.own_tokens / BATCH)
        self.own = deque([self.own_tokens / batches] * batches)
        self.next_own()
        roles = {"rail send": self.send, "rail forward": self.forward}
        roles |= {"link send": self.link_send, "link receive": self.receive}
        return self.prediction(self.run(), roles)

    def source(self, records: float, copies: float, link: float) -> _Work:
        """Work on tokens that are read, and quantised if they are to be, and written ``copies`` times, ``link`` times
        by NVLink."""
        shape = self.shape
        rounds = shape.hidden / self.copying.elements if shape.quantized else self.copying.rounds(2 * shape.hidden)
        bytes_ = records * shape.record_bytes
        read = 2 * shape.hidden * records
        return _Work(records, records * math.ceil(rounds), read, copies * bytes_, link * bytes_)

    def start_sends(self) -> None:
        """Chunks of whichever streams have room, while there are warps."""
        for _ in range(len(self.turns)):
            if not self.idle:
                return
            stream = self.turns[0]
            self.turns.rotate(-1)
            if not self.left[stream] or not self.credits[stream]:
                continue
            self.idle, self.credits[stream] = self.idle - 1, self.credits[stream] - 1
            records = self.left[stream].popleft()
            sent = self.work(self.send, self.source(records, 1, 0)._replace(puts=1))
            arrived = self.rail(sent, records * self.shape.record_bytes)
            self.at(sent, self.sender_is_free)
            self.at(arrived, functools.partial(self.forward_chunk, stream, records))

    def sender_is_free(self) -> None:
        self.idle += 1
        self.start_sends()

    def forward_chunk(self, stream: int, records: float) -> None:
        copies, bytes_ = records * self.copies, self.shape.record_bytes
        window = self.windows[stream]
        sent = copies * bytes_ * self.traveling
        work = _Work(records, records * self.copying.rounds(bytes_), records * bytes_, copies * bytes_, sent)
        end = self.work(self.forward, work, window.wait(self.now, copies, self.record_turn))
        self.at(end + self.machine.rail_us * US, functools.partial(self.credit, stream))
        self.at(self.linked(end, sent), functools.partial(self.receive_records, copies))
        window.fill(end + self.record_turn, copies)

    def credit(self, stream: int) -> None:
        self.credits[stream] += 1
        self.start_sends()

    def next_own(self) -> None:
        if not self.own:
            return
        records = self.own.popleft()
        each = self.own_records / self.own_tokens
        copies, window = records * each, self.windows[-1]
        work = self.source(records, each, each * self.traveling)
        end = self.work(self.link_send, work, window.wait(self.now, copies, self.record_turn))
        self.at(self.link_send.free[0], self.next_own)
        self.at(self.linked(end, work.link), functools.partial(self.receive_records, copies))
        window.fill(end + self.record_turn, copies)

    def receive_records(self, records: float) -> None:
        """To the rows of recv: a record becomes as many as its token has experts here."""
        if not self.copying.receives:
            return
        bytes_, rows = self.shape.record_bytes, self.shape.top_k / self.traffic.ranks
        hot = records * self.skew
        work = _Work(hot, hot * self.copying.rounds(bytes_), hot * bytes_, hot * rows * bytes_)
        self.at(self.work(self.receive, work), lambda: None)


class _Combine(_Channel):
    def simulate(self) -> Prediction:
        settings = self.settings
        self.row = 2 * self.shape.hidden
        self.rounds = math.ceil(self.shape.hidden / self.copying.elements)  # of one row
        via = self.rail_records * self.copies
        loads = (self.own_records + via, self.rail_records + via, self.tokens + self.own_records + self.rail_records)
        counts = warps_of_roles(2 * settings.warps, loads)
        self.link_send, self.forward, self.receive = _Crowd(counts[0]), _Server(counts[1]), _Crowd(counts[2])
        # What is to be sent: of each rail stream, chunk by chunk, as many sums as there are copies of its records; of
        # this node's own tokens, the last stream, in batches.
        batches = math.ceil(self.tokens / BATCH)
        self.left = [deque(chunks) for chunks in self.chunks()]
        self.left.append(deque([self.own_records / batches / self.copies] * batches))
        self.in_flight = [0.0] * len(self.left)
        self.turns = deque(range(len(self.left)))
        self.credits = [settings.rail_slots] * self.out_nodes
        self.ready: list[deque[float]] = [deque() for _ in range(self.out_nodes)]
        self.sending = False
        self.send_sums()
        roles = {"link send": self.link_send, "rail forward": self.forward, "receive": self.receive}
        return self.prediction(self.run(), roles)

    def send_sums(self) -> None:
        """Of a stream with room, each in its turn."""
        for _ in range(0 if self.sending else len(self.turns)):
            stream = self.turns[0]
            self.turns.rotate(-1)
            if not self.left[stream]:
                continue
            sums = self.left[stream][0] * self.copies
            if self.in_flight[stream] > 0 and self.in_flight[stream] + min(sums, self.ring) > self.ring:
                continue
            self.sending = True
            self.send_sum(stream, self.left[stream].popleft(), sums)
            return

    def send_sum(self, stream: int, records: float, sums: float) -> None:
        self.in_flight[stream] += min(sums, self.ring)
        rows = self.shape.top_k / self.traffic.ranks
        sent = sums * self.row * self.traveling
        hot = sums * self.skew  # the rank with the most rows has the most sums
        work = _Work(hot, hot * rows * self.rounds, hot * rows * self.row, hot * self.row, sent * self.skew)
        wait = max(0.0, sums / self.ring - 1) * self.turn(self.copies * self.rounds)
        end = self.work(self.link_send, work, wait, blocks=False)
        arrived = self.linked(end, sent)
        self.at(self.link_send.free[0], self.sender_is_free)
        if stream < self.out_nodes:
            self.at(arrived, functools.partial(self.sums_arrived, stream, records))
        else:
            self.at(arrived, functools.partial(self.receive_sums, stream, sums))

    def sender_is_free(self) -> None:
        self.sending = False
        self.send_sums()

    def sums_read(self, stream: int, sums: float) -> None:
        self.in_flight[stream] = max(0.0, self.in_flight[stream] - min(sums, self.ring))
        self.send_sums()

    def sums_arrived(self, stream: int, records: float) -> None:
        self.ready[stream].append(records)
        self.forward_chunk(stream)

    def forward_chunk(self, stream: int) -> None:
        if not self.ready[stream] or not self.credits[stream]:
            return
        self.credits[stream] -= 1
        records = self.ready[stream].popleft()
        sums = records * self.copies
        end = self.work(self.forward, _Work(records, sums * self.rounds, sums * self.row, records * self.row, puts=1))
        self.at(end + self.machine.link_us * US, functools.partial(self.sums_read, stream, sums))
        self.at(self.rail(end, records * self.row), functools.partial(self.receive_sums, stream, records))

    def receive_sums(self, stream: int, sums: float) -> None:
        """A sum is read; of a token's y, the part that it makes up is written."""
        end = self.now
        if self.copying.receives:
            of_token = self.traffic.rails + self.traffic.ranks / self.shape.nodes
            work = _Work(sums, sums * self.rounds, sums * self.row, sums / of_token * self.row)
            end = self.work(self.receive, work)
            self.at(end, lambda: None)
        if stream < self.out_nodes:
            self.at(end + self.machine.rail_us * US, functools.partial(self.credit, stream))
        else:
            self.at(end + self.machine.link_us * US, functools.partial(self.sums_read, stream, sums))

    def credit(self, stream: int) -> None:
        self.credits[stream] += 1
        self.forward_chunk(stream)


@functools.lru_cache(maxsize=4096)
def simulate(
    machine: Machine,
    shape: Shape,
    settings: Settings,
    *,
    combine: bool = False,
    skew: float = 1.0,
    copying: Copying = REGISTERS,
) -> Prediction:
    """What dispatch, or combine, is predicted to take.

    Args:
        skew: the rows of the rank that gets the most, over the mean.
        copying: how warps copy; ours, or others' for their tables.
    """
    check_value(shape.tokens > 0, "comm.simulate", "shape", "at least a token", shape)
    even = settings.num_sms > 0 and settings.num_sms % 2 == 0
    check_value(even, "comm.simulate", "settings", "an even number of SMs from 2", settings)
    channel = _Combine if combine else _Dispatch
    return channel(machine, shape, settings, (skew, copying)).simulate()
