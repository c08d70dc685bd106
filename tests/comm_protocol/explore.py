"""Every interleaving of a few warps that pass messages through memory: a breadth-first search, exact and small.

A warp is one thread here, as its lanes act together. It has streams of messages and picks any of them whose next
message is ready, as ``serve`` does (``csrc/comm/kernels/serve.cuh``: it goes round, which is one of the orders that a
free choice has), and then runs that message's steps one after the other. Several warps' steps interleave in all ways.

A store is not seen when it is made: it is under way, and arrives on its own, after a store of the same warp to the same
place and, if it is a release, after all data that this warp stored before. So data and flag of a message race unless
the flag is released; flags do not wait for flags, as they may be of different lanes. Loads happen when they are
executed: an acquire that is missing is a load before the wait.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

Place: TypeAlias = Hashable
Value: TypeAlias = Hashable
EMPTY: Value = 0  # of a flag that was never set, and of a slot that was never written


class Wait(NamedTuple):
    """Until each place has its value."""

    places: tuple[tuple[Place, Value], ...]


class Load(NamedTuple):
    """Appends what is at ``place`` to the warp's registers. It must be ``expected``, unless that is None."""

    place: Place
    expected: Value


class Register(NamedTuple):
    index: int


class Store(NamedTuple):
    """``value``, or what is in a register, to ``place``; ``release``: after all data that the warp stored before."""

    place: Place
    value: Value
    release: bool = False


class Count(NamedTuple):
    """Adds one, atomically, to ``place``; whoever reaches ``last`` sets it to zero and does the store, at once."""

    place: Place
    last: int
    store: Store


class Done(NamedTuple):
    """The registers are the result ``name``."""

    name: Hashable


class Sum(NamedTuple):
    """The last ``count`` registers become one: a sum that remembers what was added, in which order."""

    count: int


Step: TypeAlias = "Wait | Load | Store | Count | Done | Sum"


class Message(NamedTuple):
    ready: Wait  # what the warp asks before it takes the message up; it asks the other streams if that does not hold
    steps: tuple[Step, ...]


class Warp(NamedTuple):
    name: str
    streams: tuple[tuple[Message, ...], ...]
    after: tuple[int, ...] = ()  # warps that must have ended before this one starts


class Doing(NamedTuple):
    """Of one warp."""

    nexts: tuple[int, ...]  # message of each stream
    stream: int  # of the message in hand, or -1
    step: int
    registers: tuple[Value, ...]
    under_way: tuple[Store, ...]


State: TypeAlias = tuple[Any, ...]  # of each warp what it is doing; last, what is in memory


class Wrong(Exception):
    """What a protocol must not do, after the steps that lead there."""


class System:
    """Warps, and the results that they must have when they end: of each name the registers at its ``Done``."""

    def __init__(self, warps: Sequence[Warp], results: dict[Hashable, tuple[Value, ...]]) -> None:
        self.warps, self.results = tuple(warps), results
        steps = [s for w in warps for stream in w.streams for m in stream for s in (m.ready, *m.steps)]
        places = [place for s in steps for place in self.places_of(s)]
        self.index = {place: i for i, place in enumerate(dict.fromkeys(places))}
        done = [s.name for s in steps if isinstance(s, Done)]
        if sorted(map(str, done)) != sorted(map(str, results)):
            raise Wrong("lost or doubled: the roles do not have each result once")

    @staticmethod
    def places_of(step: Step) -> list[Place]:
        if isinstance(step, Wait):
            return [place for place, _ in step.places]
        if isinstance(step, Count):
            return [step.place, step.store.place]
        return [step.place] if isinstance(step, (Load, Store)) else []

    def holds(self, memory: tuple[Value, ...], wait: Wait) -> bool:
        return all(memory[self.index[place]] == value for place, value in wait.places)

    def ended(self, doing: Doing, warp: Warp) -> bool:
        return doing.stream < 0 and all(n == len(s) for n, s in zip(doing.nexts, warp.streams, strict=True))

    def following(self, state: State) -> Iterator[tuple[str, State]]:
        """Each thing that can happen next, with the state after it."""
        memory = state[-1]
        for i, warp in enumerate(self.warps):
            doing: Doing = state[i]
            for at, store in enumerate(doing.under_way):
                before = doing.under_way[:at]
                if before and any(s.place == store.place or (store.release and not s.release) for s in before):
                    continue
                arrived = doing._replace(under_way=before + doing.under_way[at + 1 :])
                yield f"{store.value} arrives at {store.place}", self.replaced(state, i, arrived, store)
            if doing.stream >= 0:
                step = warp.streams[doing.stream][doing.nexts[doing.stream]].steps[doing.step]
                if not isinstance(step, Wait) or self.holds(memory, step):
                    yield f"{warp.name}: {step}", self.stepped(state, i, step)
            elif all(self.ended(state[w], self.warps[w]) for w in warp.after):
                for of, messages in enumerate(warp.streams):
                    q = doing.nexts[of]
                    if q < len(messages) and self.holds(memory, messages[q].ready):
                        taken = self.onward(warp, doing._replace(stream=of, step=0))
                        yield f"{warp.name} takes message {q} of stream {of}", self.replaced(state, i, taken)

    def replaced(self, state: State, warp: int, doing: Doing, store: Store | None = None) -> State:
        memory = state[-1]
        if store is not None:
            at = self.index[store.place]
            memory = (*memory[:at], store.value, *memory[at + 1 :])
        return (*state[:warp], doing, *state[warp + 1 : -1], memory)

    def stepped(self, state: State, i: int, step: Step) -> State:
        """After warp i's next step: a wait that is over, a load or a count."""
        warp, doing, written = self.warps[i], state[i]._replace(step=state[i].step + 1), None
        if isinstance(step, Load):
            value = state[-1][self.index[step.place]]
            if value != step.expected:
                raise Wrong(f"{warp.name} finds {value} at {step.place}, not {step.expected}")
            doing = doing._replace(registers=(*doing.registers, value))
        elif isinstance(step, Count):
            count = state[-1][self.index[step.place]] + 1
            written = Store(step.place, count % step.last)
            if count == step.last:
                doing = doing._replace(under_way=(*doing.under_way, step.store))
        return self.replaced(state, i, self.onward(warp, doing), written)

    def onward(self, warp: Warp, doing: Doing) -> Doing:
        """Past what nobody else sees happen: sums, results, stores as they are made, and the message's end."""
        steps = warp.streams[doing.stream][doing.nexts[doing.stream]].steps
        _, stream, at, registers, under_way = doing
        for step in steps[at:]:
            if isinstance(step, Sum):
                registers = (*registers[: -step.count], registers[-step.count :])
            elif isinstance(step, Store):
                value = registers[step.value.index] if isinstance(step.value, Register) else step.value
                under_way = (*under_way, step._replace(value=value))
            elif isinstance(step, Done):
                if registers != self.results[step.name]:
                    raise Wrong(f"{step.name} is {registers}, not {self.results[step.name]}")
            elif not isinstance(step, Wait) or step.places:
                return Doing(doing.nexts, stream, at, registers, under_way)
            at += 1
        nexts = (*doing.nexts[:stream], doing.nexts[stream] + 1, *doing.nexts[stream + 1 :])
        return Doing(nexts, -1, 0, (), under_way)

    def explore(self, most: int = 1_000_000) -> int:
        """The number of states that can be reached, all of which are right and lead on or are the end.

        Raises:
            Wrong: a state that is not, with the shortest way there.
        """
        came_from: dict[State, tuple[str, State] | None] = {self.start(): None}
        queue = deque(came_from)
        while queue:
            state = queue.popleft()
            try:
                nexts = self.checked(state)
            except Wrong as wrong:
                raise Wrong("\n".join([*self.way(came_from, state), str(wrong)])) from None
            for how, new in nexts:
                if new not in came_from:
                    came_from[new] = (how, state)
                    queue.append(new)
            if len(came_from) > most:
                raise RuntimeError(f"more than {most} states")
        return len(came_from)

    def wander(self, generator: random.Random) -> None:
        """One way through, at random: for what has too many states. Raises as ``explore``."""
        state: State | None = self.start()
        way = []
        while state is not None:
            try:
                nexts = self.checked(state)
            except Wrong as wrong:
                raise Wrong("\n".join([*way, str(wrong)])) from None
            how, state = generator.choice(nexts) if nexts else ("", None)
            way.append(how)

    def start(self) -> State:
        return (*(Doing((0,) * len(w.streams), -1, 0, (), ()) for w in self.warps), (EMPTY,) * len(self.index))

    def checked(self, state: State) -> list[tuple[str, State]]:
        nexts = list(self.following(state))
        stuck = [] if nexts else [w.name for i, w in enumerate(self.warps) if not self.ended(state[i], w)]
        if stuck:
            raise Wrong(f"deadlock: {', '.join(stuck)} wait")
        return nexts

    @staticmethod
    def way(came_from: dict[State, tuple[str, State] | None], state: State) -> list[str]:
        steps = []
        while (entry := came_from[state]) is not None:
            steps.append(entry[0])
            state = entry[1]
        return steps[::-1]
