"""The roles of dispatch and combine as steps for ``explore``: csrc/comm/kernels/{rings,dispatch,combine,serve}.cuh.

A token's data is its name, a sum the names of what was added. Each token has one expert at most on a rank: which rows
of a rank are added is no matter of the protocol. The stage of a rail's writer is left out: it has a slot for each of
the ring's and the same turns.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from explore import Count, Done, Load, Message, Place, Register, Step, Store, Sum, System, Wait, Warp

Routing: TypeAlias = Sequence[Sequence[Sequence[int]]]  # of each rank, of each of its tokens: the ranks of its experts


class Fault(enum.Enum):
    """What is wrong with the protocol. Each must be found."""

    NO_ROOM_LINK = "who writes to a link does not wait until the slot has been consumed"
    NO_ROOM_RAIL = "who writes to a rail does not wait until the slot has been consumed"
    PLAIN_FLAG_LINK = "a link's flag is stored without release"
    PLAIN_FLAG_RAIL = "a rail's flag is stored without release"
    FLAG_FIRST = "the flag is set before the data is stored"
    READ_EARLY = "data is read before the flag is waited for"
    CONSUMED_EARLY = "a slot is said to be consumed before it is read"
    FIRST_FREES = "the first reader of a chunk frees it"
    TURNS_STAY = "the next call does not know how many messages passed in this one"
    ONE_FLAG = "a flag says that a slot is filled, not how often"
    RECEIVER_STAYS = "dispatch's receiver waits at the stream that it has taken up"
    SENDER_STAYS = "combine's link sender waits for room at the stream that it has taken up"
    FORWARDER_STAYS = "combine's rail forwarder waits for room at the stream that it has taken up"
    OWN_NODE_FIRST = "combine adds its own node's sums before the others"
    ONE_MAILBOX = "the exchange of counts has one place for each source, not one for each of two calls in turn"


@dataclass
class Protocol:
    """Calls of one kind on rings of one geometry; ``calls`` follow one another without any other exchange."""

    nodes: int
    gpus: int
    calls: Sequence[Routing]
    link_slots: int = 1
    rail_slots: int = 1
    rail_chunk: int = 1
    warps: int = 1  # of each role
    fault: Fault | None = None
    turn_bits: int = 16
    ranks: int = field(init=False)
    before: dict[Place, int] = field(default_factory=lambda: defaultdict(int))  # messages of a ring in earlier calls

    def __post_init__(self) -> None:
        self.ranks = self.nodes * self.gpus

    # Who is who.
    def node(self, rank: int) -> int:
        return rank // self.gpus

    def fellow(self, rank: int, node: int) -> int:
        """The rank of ``node`` that speaks with ``rank``."""
        return node * self.gpus + rank % self.gpus

    def tokens(self, routing: Routing, source: int, rank: int) -> list[int]:
        """Those of ``source`` that go to ``rank``, in the order of their records."""
        return [t for t, to in enumerate(routing[source]) if rank in to]

    def tokens_of_node(self, routing: Routing, source: int, node: int) -> list[int]:
        return [t for t, to in enumerate(routing[source]) if any(self.node(r) == node for r in to)]

    def chunks(self, tokens: Sequence[int]) -> list[Sequence[int]]:
        return [tokens[i : i + self.rail_chunk] for i in range(0, len(tokens), self.rail_chunk)]

    # A slot of a ring, in the turn of message q: as its writer and its reader have it.
    def slot(self, ring: Place, q: int) -> tuple[Place, int, int]:
        """Its place, its count of fills before and after."""
        assert isinstance(ring, tuple)
        slots = self.link_slots if "link" in ring else self.rail_slots
        message = q + (0 if self.fault is Fault.TURNS_STAY else self.before[ring])
        turn = 2**self.turn_bits
        if self.fault is Fault.ONE_FLAG:
            return (*ring, message % slots), 0, 1
        return (*ring, message % slots), message // slots % turn, (message // slots + 1) % turn

    def room(self, ring: Place, q: int) -> tuple[tuple[Place, int], ...]:
        missing = Fault.NO_ROOM_LINK if "link" in ring else Fault.NO_ROOM_RAIL
        if self.fault is missing:
            return ()
        slot, count, _ = self.slot(ring, q)
        return (((slot, "consumed"), count),)

    def there(self, ring: Place, q: int) -> tuple[tuple[Place, int], ...]:
        slot, _, after = self.slot(ring, q)
        return (((slot, "filled"), after),)

    def fill(self, messages: Sequence[tuple[Place, int, Sequence[Any]]]) -> list[Step]:
        """Messages to several rings at once: all data, then the flags."""
        data: list[Step] = []
        flags: list[Step] = []
        for ring, q, records in messages:
            slot, _, after = self.slot(ring, q)
            plain = Fault.PLAIN_FLAG_LINK if "link" in ring else Fault.PLAIN_FLAG_RAIL
            data += [Store((slot, i), record) for i, record in enumerate(records)]
            flags.append(Store((slot, "filled"), after, self.fault is not plain))
        return flags + data if self.fault is Fault.FLAG_FIRST else data + flags

    def consumed(self, ring: Place, q: int) -> Store:
        slot, _, after = self.slot(ring, q)
        return Store((slot, "consumed"), after, True)

    @staticmethod
    def message(ready: Any, steps: Sequence[Step], stays: bool = False) -> Message:
        """``stays``: the warp asks for ``ready`` only when it has taken the message up."""
        return Message(Wait(()), (Wait(tuple(ready)), *steps)) if stays else Message(Wait(tuple(ready)), tuple(steps))

    def reading(self, wait: Any, loads: Sequence[Step], rest: Sequence[Step], releases: Sequence[Step]) -> list[Step]:
        """Loads, what becomes of them, and the release of the slots that they are from."""
        before: list[Step] = [Wait(tuple(wait))] if wait else []
        if self.fault is Fault.READ_EARLY and wait:
            return [*loads, *before, *rest, *releases]
        if self.fault is Fault.CONSUMED_EARLY:
            return [*before, *releases, *loads, *rest]
        return [*before, *loads, *rest, *releases]

    # Rings by name; the writer is at the experts' rank in combine, at the other end in dispatch.
    def link(self, source: int, rank: int) -> Place:
        return ("link", source, rank)

    def rail(self, source: int, node: int) -> Place:
        return ("rail", source, node)

    # Dispatch.
    def records(self, routing: Routing, source: int, token: int, node: int) -> list[tuple[Place, int, list[Any]]]:
        """What a token becomes on a node: a record in the ring to each rank that it goes to."""
        ranks = sorted(r for r in routing[source][token] if self.node(r) == node)
        return [(self.link(source, r), self.tokens(routing, source, r).index(token), [(source, token)]) for r in ranks]

    def dispatch(self, routing: Routing, rank: int) -> dict[str, list[list[Message]]]:
        rail_send, rail_forward, link_send, link_receive = [], [], [], []
        for node in range(self.nodes):
            if node == self.node(rank):
                continue
            ring, stream = self.rail(rank, node), []
            for q, chunk in enumerate(self.chunks(self.tokens_of_node(routing, rank, node))):
                stream.append(self.message(self.room(ring, q), self.fill([(ring, q, [(rank, t) for t in chunk])])))
            rail_send.append(stream)
            source = self.fellow(rank, node)
            ring, stream = self.rail(source, self.node(rank)), []
            for q, chunk in enumerate(self.chunks(self.tokens_of_node(routing, source, self.node(rank)))):
                steps: list[Step] = []
                for i, token in enumerate(chunk):
                    sinks = self.records(routing, source, token, self.node(rank))
                    room = tuple(w for link, at, _ in sinks for w in self.room(link, at))
                    load = Load((self.slot(ring, q)[0], i), (source, token))
                    steps += [Wait(room), load, *self.fill(sinks)]
                release = [self.consumed(ring, q)]
                steps = release + steps if self.fault is Fault.CONSUMED_EARLY else steps + release
                stream.append(self.message(self.there(ring, q), steps))
            rail_forward.append(stream)
        tokens: list[Message] = []
        for token in range(len(routing[rank])):
            sinks = self.records(routing, rank, token, self.node(rank))
            room = tuple(w for link, at, _ in sinks for w in self.room(link, at))
            tokens.append(Message(Wait(()), (Wait(room), *self.fill(sinks)) if sinks else ()))
        link_send.append(tokens)
        for source in range(self.ranks):
            ring, stream = self.link(source, rank), []
            for q, token in enumerate(self.tokens(routing, source, rank)):
                done = Done((rank, (source, token)))
                loads = [Load((self.slot(ring, q)[0], 0), (source, token))]
                early = self.fault is Fault.READ_EARLY
                steps = self.reading(self.there(ring, q) if early else (), loads, [done], [self.consumed(ring, q)])
                ready = () if early else self.there(ring, q)
                stream.append(self.message(ready, steps, self.fault is Fault.RECEIVER_STAYS))
            link_receive.append(stream)
        return {
            "rail send": rail_send,
            "rail forward": rail_forward,
            "link send": link_send,
            "link receive": link_receive,
        }

    def rows(self, routing: Routing, call: int) -> dict[Any, tuple[Any, ...]]:
        """What dispatch must do: each row once."""
        return {
            (call, rank, (source, token)): ((source, token),)
            for source, tokens in enumerate(routing)
            for token, to in enumerate(tokens)
            for rank in to
        }

    # Combine.
    def combine(self, routing: Routing, rank: int) -> dict[str, list[list[Message]]]:
        link_send, rail_forward = [], []
        for source in range(self.ranks):
            ring, stream = self.link(source, rank), []
            for q, token in enumerate(self.tokens(routing, source, rank)):
                fill = self.fill([(ring, q, [("sum", rank, source, token)])])
                stream.append(self.message(self.room(ring, q), fill, self.fault is Fault.SENDER_STAYS))
            link_send.append(stream)
        for node in range(self.nodes):
            if node == self.node(rank):
                continue
            source = self.fellow(rank, node)
            ring, stream = self.rail(source, self.node(rank)), []
            for q, chunk in enumerate(self.chunks(self.tokens_of_node(routing, source, self.node(rank)))):
                steps: list[Step] = []
                for token in chunk:
                    wait, loads, releases = self.sums(routing, source, token, self.node(rank))
                    steps += self.reading(wait, loads, [Sum(len(loads))], releases)
                steps += self.fill([(ring, q, [Register(i) for i in range(len(chunk))])])
                stream.append(self.message(self.room(ring, q), steps, self.fault is Fault.FORWARDER_STAYS))
            rail_forward.append(stream)
        receive = [self.receive(routing, rank, token) for token in range(len(routing[rank]))]
        return {"link send": link_send, "rail forward": rail_forward, "receive": [receive]}

    def sums(self, routing: Routing, source: int, token: int, node: int) -> tuple[list[Any], list[Step], list[Step]]:
        """Of the ranks of a node, for one token: what to wait for, to load, to release."""
        wait, loads, releases = [], [], []
        for link, q, _ in self.records(routing, source, token, node):
            wait += self.there(link, q)
            assert isinstance(link, tuple)
            loads.append(Load((self.slot(link, q)[0], 0), ("sum", link[2], source, token)))
            releases.append(self.consumed(link, q))
        return wait, loads, releases

    def receive(self, routing: Routing, rank: int, token: int) -> Message:
        wait: list[Any] = []
        loads: dict[int, list[Step]] = {}
        releases: list[Step] = []
        for node in sorted({self.node(r) for r in routing[rank][token]}):
            if node == self.node(rank):
                of_node = self.sums(routing, rank, token, node)
                wait += of_node[0]
                loads[node] = of_node[1]
                releases += of_node[2]
                continue
            ring, tokens = self.rail(rank, node), self.tokens_of_node(routing, rank, node)
            q, i = divmod(tokens.index(token), self.rail_chunk)
            slot = self.slot(ring, q)[0]
            wait += self.there(ring, q)
            ranks = sorted(r for r in routing[rank][token] if self.node(r) == node)
            loads[node] = [Load((slot, i), tuple(("sum", r, rank, token) for r in ranks))]
            last = 1 if self.fault is Fault.FIRST_FREES else len(self.chunks(tokens)[q])
            releases.append(Count((slot, "reads"), last, self.consumed(ring, q)))
        first = self.node(rank) if self.fault is Fault.OWN_NODE_FIRST else -1
        ordered = [load for node in sorted(loads, key=lambda n: (n != first, n)) for load in loads[node]]
        steps = self.reading(wait, ordered, [Done((rank, token))], releases)
        return Message(Wait(()), tuple(steps))

    def tokens_back(self, routing: Routing, call: int) -> dict[Any, tuple[Any, ...]]:
        """What combine must do: of each token the sums of all nodes in order, its own node's as those of its ranks."""
        results: dict[Any, tuple[Any, ...]] = {}
        for rank, tokens in enumerate(routing):
            for token, to in enumerate(tokens):
                parts: list[Any] = []
                for node in range(self.nodes):
                    ranks = tuple(("sum", r, rank, token) for r in sorted(to) if self.node(r) == node)
                    parts += ranks if node == self.node(rank) else [ranks] if ranks else []
                results[call, rank, token] = tuple(parts)
        return results

    # The exchange of counts (exchange.cuh): no ring, no credit; a rank is never two exchanges ahead of another.
    def exchange(self, rank: int, call: int) -> Message:
        place = 0 if self.fault is Fault.ONE_MAILBOX else (call + 1) % 2
        epoch, here = call + 1, self.node(rank)

        def flag(kind: str) -> int:
            """Those of mail count how often it was filled, as all flags of rails do."""
            return (epoch + 1) // 2 if kind == "mail" and self.fault is not Fault.ONE_MAILBOX else epoch

        def tell(kind: str, to: int, source: int, word: Any) -> list[Step]:
            at = (kind, to, source, place)
            return [Store((at, "words"), word), Store((at, "flag"), flag(kind), True)]

        def hear(kind: str, source: int, word: Any) -> list[Step]:
            at = (kind, rank, source, place)
            return [Wait((((at, "flag"), flag(kind)),)), Load((at, "words"), word)]

        own = range(here * self.gpus, (here + 1) * self.gpus)
        fellows = [self.fellow(rank, node) for node in range(self.nodes) if node != here]
        steps = [s for to in own for s in tell("counts", to, rank, (call, rank, to))]
        steps += [s for fellow in fellows for s in tell("mail", fellow, rank, (call, rank, self.node(fellow)))]
        for fellow in fellows:
            steps += hear("mail", fellow, (call, fellow, here))
            steps += [s for to in own for s in tell("counts", to, fellow, (call, fellow, to))]
        for source in range(self.ranks):
            steps += hear("counts", source, (call, source, rank))
        return Message(Wait(()), (*steps, Done((call, rank))))

    def exchanges(self, calls: int) -> System:
        warps = [
            Warp(f"rank {rank}, exchange", (tuple(self.exchange(rank, call) for call in range(calls)),))
            for rank in range(self.ranks)
        ]
        results = {
            (call, rank): tuple(
                [
                    (call, self.fellow(rank, node), self.node(rank))
                    for node in range(self.nodes)
                    if node != self.node(rank)
                ]
                + [(call, source, rank) for source in range(self.ranks)]
            )
            for call in range(calls)
            for rank in range(self.ranks)
        }
        return System(warps, results)

    # All of it.
    def system(self, dispatches: bool) -> System:
        warps: list[Warp] = []
        results: dict[Any, tuple[Any, ...]] = {}
        earlier: dict[int, tuple[int, ...]] = defaultdict(tuple)
        for call, routing in enumerate(self.calls):
            results |= self.rows(routing, call) if dispatches else self.tokens_back(routing, call)
            now: dict[int, tuple[int, ...]] = defaultdict(tuple)
            for rank in range(self.ranks):
                roles = self.dispatch(routing, rank) if dispatches else self.combine(routing, rank)
                for role, streams in roles.items():
                    for share in self.shares([s for s in streams if s]):
                        now[rank] += (len(warps),)
                        own = tuple(tuple(self.of_call(m, call) for m in stream) for stream in share)
                        warps.append(Warp(f"rank {rank}, call {call}, {role}", own, earlier[rank]))
            self.advance(routing)
            for rank in range(self.ranks):
                earlier[rank] += now[rank]
        return System(warps, results)

    def shares(self, streams: Sequence[Sequence[Message]]) -> list[list[Sequence[Message]]]:
        """Of each warp of a role, as ``serve`` shares streams out."""
        found = []
        for index in range(self.warps if streams else 0):
            step = min(self.warps, len(streams))
            first = index % step
            abreast = (self.warps - first + step - 1) // step
            found.append([stream[index // step :: abreast] for stream in streams[first::step]])
        return found

    @staticmethod
    def of_call(message: Message, call: int) -> Message:
        steps = tuple(Done((call, *s.name)) if isinstance(s, Done) else s for s in message.steps)
        return message._replace(steps=steps)

    def advance(self, routing: Routing) -> None:
        for source in range(self.ranks):
            for rank in range(self.ranks):
                self.before[self.link(source, rank)] += len(self.tokens(routing, source, rank))
            for node in set(range(self.nodes)) - {self.node(source)}:
                self.before[self.rail(source, node)] += len(self.chunks(self.tokens_of_node(routing, source, node)))
