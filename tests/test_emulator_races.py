"""The detector of races in shared memory, against a model that looks at all pairs of accesses."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from backends import backend_params
from numpy.typing import NDArray
from planted.program import TEXT, arrive, init, wait

pytestmark = backend_params(["emulator"])[0].marks

WARPS = 3
THREADS = 32 * WARPS
HALVES = 128  # of shared memory that random programs use, 16 bits each


def run(body: str, block: int = THREADS, seed: int = 0) -> str:
    """The report, or "" where there is none."""
    from emulator import EmulationError, Machine

    text = TEXT.format(body=body, directives="", number="%ctaid.x")
    d, a = np.zeros(1024, np.uint32), np.arange(1024, dtype=np.uint32)
    try:
        Machine(seed).load(text)["kernel"].launch(1, block, 1, 0, [d, a, bytes(128), bytes(128)])
    except EmulationError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Access:
    """By one warp: lane l of thread t is at unit (t * factor + term) of `size` bytes."""

    warp: int
    write: bool
    size: int
    factor: int
    term: int

    def bytes_of(self, thread: int) -> range:
        unit = (thread * self.factor + self.term) % (2 * HALVES // self.size)
        return range(unit * self.size, (unit + 1) * self.size)

    def ptx(self, value: int) -> str:
        where = f"""
  setp.eq.u32 %p0, %w, {self.warp};
  mad.lo.u32 %r0, %t, {self.factor}, {self.term};
  and.b32 %r0, %r0, {2 * HALVES // self.size - 1};
  mad.lo.u32 %r0, %r0, {self.size}, %s;
"""
        if not self.write:
            return where + f"@%p0 ld.shared.u{8 * self.size} %v, [%r0];"
        # Each write has values of its own: writes of equal ones are no race.
        return where + f"add.u32 %r1, %t, {value}; @%p0 st.shared.u{8 * self.size} [%r0], %r1;"


@dataclass(frozen=True)
class Sync:
    """kind: "cta"; "warp", each for itself; or "hand", from the first of `warps` to the second."""

    kind: str
    warps: tuple[int, ...] = ()
    barrier: int = 0

    def ptx(self) -> str:
        if self.kind == "cta":
            return "bar.sync 0;"
        if self.kind == "warp":
            return "bar.warp.sync -1;"
        giver, taker = self.warps
        return f"""
  setp.eq.u32 %p0, %w, {giver};
  setp.eq.u32 %p1, %w, {taker};
  @%p0 bar.arrive {self.barrier}, 64;
  @%p1 bar.sync {self.barrier}, 64;
"""


Program = list[Access | Sync]


def program(rng: random.Random) -> Program:
    steps: Program = []
    barriers = itertools.count(1)
    size = rng.choice([2, 2, 2, 4])
    factor = rng.choice([1, 3])  # 3: the warps interleave, each half its own
    for _ in range(rng.randint(4, 14)):
        kind = rng.random()
        if kind < 0.5:
            term = rng.choice([0, 0, 0, 32 * factor, 64 * factor, 1])
            write = rng.random() < 0.4
            other = rng.random() < 0.1
            steps.append(Access(rng.randrange(WARPS), write, 6 - size if other else size, factor, term))
        elif kind < 0.56:
            steps.append(Sync("cta"))
        elif kind < 0.66:
            steps.append(Sync("warp"))
        else:
            giver, taker = rng.sample(range(WARPS), 2)
            steps.append(Sync("hand", (giver, taker), next(barriers)))
    return steps


def lanes_of(warp: int) -> range:
    return range(32 * warp, 32 * warp + 32)


def has_race(steps: Program) -> bool:
    """Whether two accesses to one byte are ordered by no path through threads and barriers."""
    # known[t, u]: how many of thread u's steps are over before t's next one.
    known: NDArray[np.int64] = np.zeros((THREADS, THREADS), np.int64)
    history: dict[int, list[tuple[int, int, bool]]] = {}
    for now, step in enumerate(steps, 1):
        if isinstance(step, Access):
            for thread in lanes_of(step.warp):
                for byte in step.bytes_of(thread):
                    for other, time, write in history.setdefault(byte, []):
                        if (write or step.write) and other != thread and known[thread, other] < time:
                            return True
                    history[byte].append((thread, now, step.write))
            continue
        groups: list[tuple[Sequence[int], Sequence[int]]]
        if step.kind == "cta":
            groups = [(range(THREADS), range(THREADS))]
        elif step.kind == "warp":
            groups = [(lanes_of(warp), lanes_of(warp)) for warp in range(WARPS)]
        else:
            # Those that wait for the giver arrive as well, so that they know of each other.
            giver, taker = step.warps
            groups = [([*lanes_of(giver), *lanes_of(taker)], lanes_of(taker))]
        for arrive_here, leave_here in groups:
            told = known[list(arrive_here)].max(0)
            told[list(arrive_here)] = now
            known[list(leave_here)] = told
    return False


def text_of(steps: Program) -> str:
    fill = "st.shared.u32 [%si], 0; bar.sync 0;"
    return fill + "".join(
        step.ptx(1000 * (i + 1)) if isinstance(step, Access) else step.ptx() for i, step in enumerate(steps)
    )


@pytest.mark.parametrize("chunk", range(10))
def test_random_programs(chunk: int) -> None:
    """Found if and only if it is there, whatever the schedule: barriers order the same in all."""
    found = 0
    for seed in range(80 * chunk, 80 * chunk + 80):
        steps = program(random.Random(seed))
        expected = has_race(steps)
        report = run(text_of(steps), seed=seed)
        assert ("race: " in report) == expected, f"{steps}\n{report}"
        assert expected or not report
        found += expected
    assert 10 < found < 70


def test_report() -> None:
    report = run(
        """
  setp.eq.u32 %p0, %t, 5;
  @%p0 st.shared.v2.u32 [%s], {%t, %t};
  setp.eq.u32 %p0, %t, 7;
  @%p0 ld.shared.u32 %v, [%s+4];
""",
        block=32,
    )
    found = re.search(
        r"race: 4 bytes of shared memory written by thread 5 at line (\d+) \(.*st\.shared.*\), "
        r"and read by thread 7 at line (\d+), with no barrier in between",
        report,
    )
    assert found, report
    assert int(found[2]) == int(found[1]) + 2


CASES: dict[str, tuple[str, bool]] = {
    "bytes of one word": ("add.u32 %r0, %s, %t; st.shared.u8 [%r0], %t; ld.shared.u8 %v, [%r0];", False),
    "the same value from all": ("st.shared.u32 [%s], 7; bar.sync 0; ld.shared.u32 %v, [%s];", False),
    "the same value, read at once": ("st.shared.u32 [%s], 7; ld.shared.u32 %v, [%s];", True),
    "different values in one instruction": ("@%lead bra A; A: st.shared.u32 [%s], %l;", True),
    "a read before a write": (
        "@%lead st.shared.u32 [%s], 1; bar.sync 0; ld.shared.u32 %v, [%s]; @%lead st.shared.u32 [%s], 2;",
        True,
    ),
    "a volatile flag": (
        """
  @%lead st.volatile.shared.u32 [%s+64], 0;
  bar.sync 0;
  setp.ne.u32 %p0, %w, 0;
  @%p0 bra POLL;
  @%lead st.shared.u32 [%s], 5;
  @%lead st.volatile.shared.u32 [%s+64], 1;
  bra DONE;
POLL:
  ld.volatile.shared.u32 %v, [%s+64];
  setp.eq.u32 %p0, %v, 0;
  @%p0 bra POLL;
  ld.shared.u32 %v, [%s];
DONE:
""",
        False,
    ),
    "a fence on each side of a flag in global memory": (
        """
  setp.ne.u32 %p0, %w, 0;
  @%p0 bra POLL;
  @%lead st.shared.u32 [%s], 5;
  fence.acq_rel.gpu;
  @%lead st.relaxed.gpu.global.u32 [%d], 1;
  bra DONE;
POLL:
  ld.relaxed.gpu.global.u32 %v, [%d];
  setp.eq.u32 %p0, %v, 0;
  @%p0 bra POLL;
  fence.acq_rel.gpu;
  ld.shared.u32 %v, [%s];
DONE:
""",
        False,
    ),
    "an ordinary flag": (
        """
  @%lead st.shared.u32 [%s+64], 0;
  bar.sync 0;
  setp.ne.u32 %p0, %w, 0;
  @%p0 bra POLL;
  @%lead st.shared.u32 [%s+64], 1;
  bra DONE;
POLL:
  ld.shared.u32 %v, [%s+64];
  setp.eq.u32 %p0, %v, 0;
  @%p0 bra POLL;
DONE:
""",
        True,
    ),
    "from a barrier to an mbarrier": (
        f"""
  {init("%b", 32)}
  bar.sync 0;
  setp.eq.u32 %p0, %w, 0;
  setp.eq.u32 %p1, %w, 1;
  setp.eq.u32 %p2, %w, 2;
  @%p0 st.shared.u32 [%si], %t;
  @%p0 bar.arrive 1, 64;
  @%p1 bar.sync 1, 64;
  @%p1 {arrive("%b")}
  @!%p2 bra DONE;
  {wait("%b", 0)}
  ld.shared.u32 %v, [%si-256];
DONE:
""",
        False,
    ),
    "an mbarrier that was not the writer's": (
        f"""
  {init("%b", 32)}
  bar.sync 0;
  setp.eq.u32 %p0, %w, 0;
  setp.eq.u32 %p1, %w, 1;
  setp.eq.u32 %p2, %w, 2;
  @%p0 st.shared.u32 [%si], %t;
  @%p1 {arrive("%b")}
  @!%p2 bra DONE;
  {wait("%b", 0)}
  @%p2 st.shared.u32 [%si-256], %t;
DONE:
""",
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    body, expected = CASES[name]
    reports = [run(body, seed=seed) for seed in range(10)]
    if expected:
        assert any("race: " in report for report in reports), reports
    else:
        assert not any(reports), reports


def test_matrices_take_part() -> None:
    """stmatrix and ldmatrix are accesses like others, by the lane that gives the row."""
    body = """
  shl.b32 %r0, %l, 4;
  add.u32 %r0, %r0, %s;
  setp.eq.u32 %p0, %w, 0;
  @%p0 stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r0], {%t, %t, %t, %t};
  BARRIER
  setp.eq.u32 %p0, %w, 1;
  @%p0 ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r0];
"""
    for seed in range(5):
        assert not run(body.replace("BARRIER", "bar.sync 0;"), seed=seed)
    assert any("race: " in run(body.replace("BARRIER", ""), seed=seed) for seed in range(20))
