"""The rings' protocol, all interleavings of two ranks: no deadlock, no slot overwritten, each token once, in order.

And what it is needed for: with any one part of it missing, some interleaving goes wrong. Timeouts are not in the model.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from explore import System, Wrong
from roles import Fault, Protocol, Routing

THREE: Routing = [[(1,)] * 3, []]
FOUR: Routing = [[(1,)] * 4, []]
BOTH = (0, 1)  # a token to both ranks
LINK, RAIL = {"nodes": 1, "gpus": 2}, {"nodes": 2, "gpus": 1}
TWO_SLOTS = {"link_slots": 2, "rail_slots": 2}


def system(dispatches: bool, routing: Routing, options: dict[str, Any], fault: Fault | None = None) -> System:
    calls = [routing] * options.get("calls", 1)
    return Protocol(**{**options, "calls": calls, "fault": fault}).system(dispatches)


# Each is exact for its routing: every interleaving of the warps' steps and of the stores' arrivals.
RIGHT: dict[str, tuple[Routing, dict[str, Any]]] = {
    "link wraps": (THREE, LINK),
    "link, two slots wrap": (FOUR, {**LINK, **TWO_SLOTS}),
    "link, both ways": ([[BOTH, BOTH], [BOTH]], LINK),
    "link, four tokens, both ways": ([[BOTH, BOTH], [BOTH, BOTH]], LINK),
    "link, two warps a role": ([[BOTH] * 3, []], {**LINK, "warps": 2}),
    "link, the next call": (THREE, {**LINK, **TWO_SLOTS, "calls": 2}),
    "rail wraps": (THREE, RAIL),
    "rail, two slots wrap": (FOUR, {**RAIL, **TWO_SLOTS}),
    "rail, to its own node too": ([[BOTH, BOTH], []], RAIL),
    "rail, both ways": ([[(1,), (1,)], [(0,)]], RAIL),
    "rail, chunks of two": (FOUR, {**RAIL, "rail_chunk": 2}),
    "rail, a part of a chunk": (THREE, {**RAIL, "rail_chunk": 2}),
    "rail, two warps a role": (FOUR, {**RAIL, "rail_chunk": 2, "warps": 2}),
    "rail, the next call": ([[(1,)] * 2, []], {**RAIL, **TWO_SLOTS, "calls": 3}),
    "turns of one bit": (THREE, {**RAIL, "turn_bits": 1, "calls": 2}),
    "no tokens": ([[], [()]], RAIL),
}
SLOW: dict[str, tuple[Routing, dict[str, Any]]] = {
    "link, both ways, two slots": ([[BOTH, BOTH], [BOTH]], {**LINK, **TWO_SLOTS}),
    "rail, own nodes, both ways": ([[BOTH], [BOTH]], RAIL),
    "rail, own nodes, three tokens": ([[BOTH, BOTH], [BOTH]], RAIL),
    "rail, both ways, four tokens": ([[(1,), (1,)], [(0,), (0,)]], RAIL),
}


def check(case: tuple[Routing, dict[str, Any]], dispatches: bool) -> None:
    routing, options = case
    states = system(dispatches, routing, options).explore()
    assert states > 10 or not any(to for tokens in routing for to in tokens)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dispatches", [True, False], ids=["dispatch", "combine"])
def test_every_interleaving_is_right(name: str, dispatches: bool) -> None:
    check(RIGHT[name], dispatches)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("dispatches", [True, False], ids=["dispatch", "combine"])
def test_every_interleaving_of_more_is_right(name: str, dispatches: bool) -> None:
    check(SLOW[name], dispatches)


def wander(large: System, ways: int) -> None:
    for seed in range(ways):
        large.wander(random.Random(seed))


@pytest.mark.parametrize("dispatches", [True, False], ids=["dispatch", "combine"])
@pytest.mark.parametrize(("nodes", "gpus"), [(3, 1), (2, 2)], ids=["3x1", "2x2"])
def test_ways_through_more_ranks_are_right(nodes: int, gpus: int, dispatches: bool) -> None:
    """These have too many states for all of them."""
    everywhere = tuple(range(nodes * gpus))
    routing = [[everywhere] * 3] * len(everywhere)
    wander(system(dispatches, routing, {"nodes": nodes, "gpus": gpus, "rail_chunk": 2}), 5)


FOUND = [
    *((Fault.NO_ROOM_LINK, d, THREE, o) for d in (True, False) for o in (LINK, {**LINK, **TWO_SLOTS})),
    *((Fault.NO_ROOM_RAIL, d, THREE, o) for d in (True, False) for o in (RAIL, {**RAIL, **TWO_SLOTS})),
    *((Fault.PLAIN_FLAG_LINK, d, THREE, LINK) for d in (True, False)),
    *((Fault.PLAIN_FLAG_RAIL, d, THREE, RAIL) for d in (True, False)),
    *((Fault.FLAG_FIRST, d, THREE, o) for d in (True, False) for o in (LINK, RAIL)),
    *((Fault.READ_EARLY, d, THREE, o) for d in (True, False) for o in (LINK, RAIL)),
    *((Fault.CONSUMED_EARLY, d, THREE, o) for d in (True, False) for o in (LINK, RAIL)),
    (Fault.FIRST_FREES, False, FOUR, {**RAIL, "rail_chunk": 2}),
    *((Fault.TURNS_STAY, d, THREE, {**o, **TWO_SLOTS, "calls": 2}) for d in (True, False) for o in (LINK, RAIL)),
    *((Fault.ONE_FLAG, d, THREE, o) for d in (True, False) for o in (LINK, RAIL)),
    (Fault.RECEIVER_STAYS, True, [[BOTH, BOTH], [BOTH, BOTH]], LINK),
    (Fault.SENDER_STAYS, False, [[BOTH, BOTH], [BOTH, BOTH]], LINK),
    (Fault.OWN_NODE_FIRST, False, [[], [BOTH]], RAIL),
]
DEADLOCKS = (Fault.RECEIVER_STAYS, Fault.SENDER_STAYS, Fault.FORWARDER_STAYS)


@pytest.mark.parametrize(
    ("fault", "dispatches", "routing", "options"),
    FOUND,
    ids=[f"{f.name}-{'dispatch' if d else 'combine'}-{i}" for i, (f, d, _, _) in enumerate(FOUND)],
)
def test_a_fault_is_found(fault: Fault, dispatches: bool, routing: Routing, options: dict[str, Any]) -> None:
    system(dispatches, routing, options).explore()  # as it is, it is right
    with pytest.raises(Wrong, match="deadlock" if fault in DEADLOCKS else None):
        system(dispatches, routing, options, fault=fault).explore()


def test_every_fault_is_looked_for() -> None:
    assert {fault for fault, *_ in FOUND} | {Fault.FORWARDER_STAYS, Fault.ONE_MAILBOX} == set(Fault)


@pytest.mark.parametrize("options", [LINK, RAIL], ids=["link", "rail"])
def test_exchanges_need_two_mailboxes(options: dict[str, Any]) -> None:
    assert Protocol(**options, calls=[]).exchanges(3).explore() > 100
    with pytest.raises(Wrong):
        Protocol(**options, calls=[], fault=Fault.ONE_MAILBOX).exchanges(3).explore()


def test_a_forwarder_that_waits_for_room_needs_three_nodes_to_deadlock() -> None:
    """Forwarders of nodes 2 and 3 have a stream to each of nodes 0 and 1. One waits for room at 0, whose receiver waits
    for the other, which waits for room at 1, whose receiver waits for the first. Of two nodes a forwarder has one
    stream only, and to wait there is to look at all of them."""
    routing = [[(2, 3)] * 2, [(2, 3)] * 2, [], []]
    nodes = {"nodes": 4, "gpus": 1}
    faulty = system(False, routing, nodes, fault=Fault.FORWARDER_STAYS)
    with pytest.raises(Wrong, match="deadlock"):
        wander(faulty, 30)
    wander(system(False, routing, nodes), 30)
    system(False, FOUR, RAIL, fault=Fault.FORWARDER_STAYS).explore()


def test_a_lost_or_doubled_token_is_seen() -> None:
    protocol = Protocol(1, 2, [THREE])
    whole = protocol.system(True)
    warps = [w for w in whole.warps if "receive" not in w.name or w.streams]
    with pytest.raises(Wrong, match="lost or doubled"):
        type(whole)([*warps, warps[-1]], whole.results)
    with pytest.raises(Wrong, match="lost or doubled"):
        type(whole)(warps[:-1], whole.results)
