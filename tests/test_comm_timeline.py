"""The timeline of dispatch and combine: every message of every role, by the warp that moved it, as JSON that loads."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from comm_devices import device_params
from comm_ranks import geometry
from test_comm_loopback import Kind, Step, case_of, check, lone_buffer
from test_emulator_comm import Case

from fastfp8.backends import KERNELS
from fastfp8.comm.buffer import Buffer
from fastfp8.comm.kernels import Kernels
from fastfp8.comm.timeline import Event, Timeline
from fastfp8.reference import comm as oracle

DEVICES = pytest.mark.parametrize("kind", device_params())
PART = None


GEOMETRY = geometry(2, 2, rail_chunk=1, channels=2, max_tokens=5)


def traced(kind: Kind, room: int = 1 << 12) -> tuple[Timeline, Any, Case]:
    """Exchange, dispatch and combine twice of ranks on one GPU, whose results are right; chunks are of one record."""
    g = GEOMETRY
    kernels = kind(5).kernels(g)
    case, outs = case_of(g, 80, 5)
    step = Step(kernels, case, outs)
    with Timeline(kernels, room) as timeline:
        results = step()
    kernels.check()
    check(g, case, outs, results)
    step()  # not in the timeline any more
    return timeline, g, case


def messages(g: Any, case: Case) -> list[Counter[tuple[str, str]]]:
    """How many each rank has in each role, by the routing."""
    copies = oracle.copies(case.idx, num_experts=g.ranks * g.local_experts, ranks_per_node=g.gpus)
    found = []
    for rank, idx in enumerate(case.idx):
        came = sum(
            any(e >= 0 and e // g.local_experts == rank for e in experts) for i in case.idx for experts in i.tolist()
        )
        out, into = int(copies.ib[rank].sum()), int(copies.ib[:, rank].sum())
        counts = {
            ("dispatch", "rail send"): out,
            ("dispatch", "rail forward"): into,
            ("dispatch", "link send"): len(idx),
            ("dispatch", "link receive"): came,
            ("combine", "link send"): came,
            ("combine", "rail forward"): into,
            ("combine", "link receive"): len(idx),
        }
        found.append(Counter({role: n for role, n in counts.items() if n}))
    return found


def by_warp(events: list[Event]) -> dict[tuple[int, int], list[Event]]:
    found = defaultdict(list)
    for event in events:
        found[event.cta, event.warp].append(event)
    return found


@DEVICES
def test_no_event_is_lost_and_each_is_where_it_belongs(kind: Kind) -> None:
    """Of each call on its own, for the emulator's clock begins anew with each launch."""
    g, device = GEOMETRY, kind(5)
    kernels = device.kernels(g)
    case, outs = case_of(g, 80, 5)
    step = Step(kernels, case, outs)
    with Timeline(kernels) as of_exchange:
        routing = kernels.exchange(step.idx, step.weights)
    with Timeline(kernels) as of_dispatch:
        kernels.dispatch(step.x, routing, quantize=True)
    with Timeline(kernels) as of_combine:
        kernels.combine(step.outs, routing, weighted=True)
    kernels.check()
    expected = messages(g, case)
    for call, timeline in (("exchange", of_exchange), ("dispatch", of_dispatch), ("combine", of_combine)):
        assert timeline.lost == [0] * g.ranks
        for wanted, events in zip(expected, timeline.events(), strict=True):
            assert {event.call for event in events} == {call}
            moved = [event for event in events if event.stream is not PART]
            assert Counter((e.call, e.role) for e in moved) == {k: n for k, n in wanted.items() if k[0] == call}
            assert len({(e.role, e.channel, e.stream, e.message) for e in moved}) == len(moved), "one warp's each"
            for (cta, _), of_warp in by_warp(events).items():
                check_warp(of_warp, cta if call == "exchange" else cta // 2)


def check_warp(events: list[Event], channel: int) -> None:
    """One part, which encloses its messages, one after the other."""
    part, *moved = events
    assert part.stream is PART
    last = part.begin
    for event in moved:
        assert event.stream is not PART
        assert event.role == part.role
        assert last <= event.begin <= event.end <= part.end
        last = event.end
    assert {event.channel for event in events} == {channel}
    assert len({event.sm for event in events}) == 1


@DEVICES
def test_json(kind: Kind, tmp_path: Path) -> None:
    timeline, g, _ = traced(kind)
    timeline.write(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = timeline.events()
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert len(complete) == sum(map(len, events))
    assert {names[rank, None] for rank in range(g.ranks)} == {f"rank {rank}" for rank in range(g.ranks)}
    flat = [event for of_rank in events for event in of_rank]
    assert trace["otherData"] == {"origin_ns": min(e.begin for e in flat), "lost_events": 0}
    for event, told in zip(flat, complete, strict=True):
        assert told["ts"] == (event.begin - trace["otherData"]["origin_ns"]) / 1e3 >= 0
        assert told["dur"] == (event.end - event.begin) / 1e3
        assert names[told["pid"], told["tid"]] == f"CTA {event.cta} warp {event.warp}"
        assert told["args"]["role"] == event.role
        whole = event.stream is PART
        assert told["name"] == (
            f"{event.call}: {event.role}" if whole else f"{event.role} {event.stream}/{event.message}"
        )


@DEVICES
def test_events_without_room_are_counted(kind: Kind) -> None:
    whole, g, _ = traced(kind)
    short, _, _ = traced(kind, room=9)
    assert short.lost == [len(of_rank) - 9 for of_rank in whole.events()]
    assert [len(of_rank) for of_rank in short.events()] == [9] * g.ranks
    assert all(event.end > 0 for of_rank in short.events() for event in of_rank), "all that is there was written"
    assert short.trace()["otherData"]["lost_events"] == sum(short.lost) > 0


@DEVICES
def test_of_a_buffer(kind: Kind) -> None:
    device = kind(6)
    buffer, g = lone_buffer(device, 3)
    x, idx = torch.ones(3, g.hidden, device=device.device).bfloat16(), torch.zeros(3, 2, dtype=torch.int32)
    with Timeline(buffer) as timeline:
        recv, _, handle = buffer.dispatch(x, idx.to(device.device), quantize=False)
    assert isinstance(recv, torch.Tensor)
    buffer.combine(recv, handle)
    assert {event.call for event in timeline.events()[0]} == {"exchange", "dispatch"}


def test_what_cannot_be_traced() -> None:
    with pytest.raises(TypeError, match=r"comm.Timeline: argument 'source': expected a comm.Buffer or its kernels"):
        Timeline(3)  # type: ignore[arg-type]
    g = geometry(2, 1)
    state = torch.zeros(g.state_words, dtype=torch.int32)
    with pytest.raises(ValueError, match="argument 'room': expected 1 to below"):
        Timeline(Kernels(g, 0, torch.zeros(2, dtype=torch.int64), state, timeout=1.0), 0)
    buffer = Buffer.__new__(Buffer)
    buffer._exchange = type("Collective", (), {"way": "collective"})()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="a Buffer with way='kernels', got one with way='collective'"):
        Timeline(buffer)


def test_kernels_that_are_not_traced_have_nothing_of_it() -> None:
    """Neither the argument nor the number of the SM."""
    plain, traced_ = ((KERNELS / f"comm_{of}.ptx").read_text() for of in ("loopback", "traced"))
    assert "%smid" not in plain
    assert traced_.count("%smid") >= 5
    arguments = [len(re.findall(r"\.param ", text)) for text in (plain, traced_)]
    assert arguments[1] - arguments[0] >= 5
