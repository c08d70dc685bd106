"""Instructions among the lanes of a warp, against models in NumPy and plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import backend_params
from machines import machine, silicon_too

pytestmark = backend_params(["emulator"])[0].marks

LANES = 32
PTX = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 pa, .param .u64 pb, .param .u64 pd) {{
  .reg .pred p, q;
  .reg .b32 %a, %b, %c, %d, %e, %t, %m;
  .reg .b64 %x, %y, %o, %w;
  mov.u32 %t, %tid.x;
  mul.wide.u32 %o, %t, 4;
  ld.param.u64 %x, [pa];
  add.s64 %y, %x, %o;
  ld.global.b32 %a, [%y];
  ld.param.u64 %x, [pb];
  add.s64 %y, %x, %o;
  ld.global.b32 %b, [%y];
  mov.u32 %m, -1;
  mov.u32 %d, 0;
  mov.u32 %e, 0;
  setp.ne.u32 p, %b, 0;
  {body}
  ld.param.u64 %x, [pd];
  add.s64 %y, %x, %o;
  st.global.b32 [%y], %d;
  st.global.b32 [%y+128], %e;
  ret;
}}
"""
Lanes = np.ndarray[Any, np.dtype[np.uint32]]


def run(body: str, a: Lanes, b: Lanes, seed: int = 0, threads: int = LANES) -> tuple[Lanes, Lanes]:
    """What %d and %e hold at the end."""
    out = np.zeros(2 * LANES, np.uint32)
    machine(seed).load(PTX.format(body=body))["kernel"].launch(1, threads, args=[a, b, out])
    return out[:LANES], out[LANES:]


def raises(body: str, words: str, a: Lanes | None = None, threads: int = LANES) -> None:
    from emulator import EmulationError

    lanes = np.arange(LANES, dtype=np.uint32)
    with pytest.raises(EmulationError, match=words):
        run(body, lanes if a is None else a, lanes, 0, threads)


def random_lanes(rng: np.random.Generator, high: int = 1 << 32) -> Lanes:
    return rng.integers(0, high, LANES, dtype=np.uint64).astype(np.uint32)


def shuffled(mode: str, values: Lanes, by: int, limits: int) -> tuple[list[int], list[int]]:
    """The ISA's pseudocode."""
    segment, clamp = limits >> 8 & 31, limits & 31
    out, valid = [], []
    for lane in range(LANES):
        last, first = (lane & segment) | (clamp & ~segment & 31), lane & segment
        if mode == "up":
            j = lane - by
            inside = j >= last
        elif mode == "down":
            j = lane + by
            inside = j <= last
        elif mode == "bfly":
            j = lane ^ by
            inside = j <= last
        else:
            j = first | (by & ~segment & 31)
            inside = j <= last
        valid.append(int(inside))
        out.append(int(values[j if inside else lane]))
    return out, valid


@silicon_too
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle(mode: str) -> None:
    rng = np.random.default_rng(0)
    limits = [0, 0x1F, 0x1C03, 0x1E01, 0x1000, 0x101F, 0x181F, int(rng.integers(0, 0x2000))]
    for limit in limits:
        for by in [0, 1, 2, 7, 16, 31, 33, int(rng.integers(0, 1 << 32))]:
            a = random_lanes(rng)
            body = f"shfl.sync.{mode}.b32 %d|q, %a, {by}, {limit}, -1; selp.u32 %e, 1, 0, q;"
            d, e = run(body, a, a)
            expected, valid = shuffled(mode, a, by & 31, limit)
            assert d.tolist() == expected
            assert e.tolist() == valid


@silicon_too
def test_shuffle_with_a_source_lane_of_each_lane() -> None:
    rng = np.random.default_rng(1)
    a, b = random_lanes(rng), random_lanes(rng, 32)
    d, _ = run("shfl.sync.idx.b32 %d, %a, %b, 31, -1;", a, b)
    assert d.tolist() == a[b].tolist()


def test_what_absent_lanes_give_is_not_their_value() -> None:
    a = np.full(LANES, 7, np.uint32)
    # Lanes 0 to 15 shuffle among themselves; the others have values, but take no part.
    body = "setp.lt.u32 q, %t, 16; mov.u32 %m, 0xffff; @q shfl.sync.down.b32 %d, %a, 8, 31, %m;"
    d, _ = run(body, a, a)
    assert (d[:8] == 7).all()
    assert (d[8:16] != 7).all()


@silicon_too
@pytest.mark.parametrize("votes", ["none", "all", "one", "random"])
def test_vote(votes: str) -> None:
    rng = np.random.default_rng(2)
    b = {
        "none": np.zeros(LANES, np.uint32),
        "all": np.ones(LANES, np.uint32),
        "one": np.eye(LANES, dtype=np.uint32)[9],
        "random": random_lanes(rng, 2),
    }[votes]
    yes = b != 0
    bits = int(sum(1 << i for i in range(LANES) if yes[i]))
    models = {
        "vote.sync.all.pred q, p, -1;": int(yes.all()),
        "vote.sync.any.pred q, p, -1;": int(yes.any()),
        "vote.sync.uni.pred q, p, -1;": int(yes.all() or not yes.any()),
        "vote.sync.all.pred q, !p, -1;": int(not yes.any()),
    }
    for text, expected in models.items():
        d, _ = run(text + " selp.u32 %d, 1, 0, q;", b, b)
        assert d.tolist() == [expected] * LANES, text
    assert run("vote.sync.ballot.b32 %d, p, -1;", b, b)[0].tolist() == [bits] * LANES
    assert run("vote.sync.ballot.b32 %d, !p, -1;", b, b)[0].tolist() == [bits ^ 0xFFFFFFFF] * LANES


@silicon_too
def test_a_ballot_of_some_lanes() -> None:
    rng = np.random.default_rng(3)
    b = random_lanes(rng, 2)
    body = """setp.ge.u32 q, %t, 20; mov.u32 %m, 0xfff00000;
      @!q mov.u32 %m, 0x000fffff;
      vote.sync.ballot.b32 %d, p, %m;"""
    d, _ = run(body, b, b)
    bits = int(sum(1 << i for i in range(LANES) if b[i]))
    assert d.tolist() == [bits & 0xFFFFF] * 20 + [bits & 0xFFF00000] * 12


@silicon_too
@pytest.mark.parametrize("kinds", [1, 3, 40])
def test_match(kinds: int) -> None:
    rng = np.random.default_rng(kinds)
    a = random_lanes(rng, kinds)
    expected = [int(sum(1 << j for j in range(LANES) if a[j] == a[i])) for i in range(LANES)]
    assert run("match.any.sync.b32 %d, %a, -1;", a, a)[0].tolist() == expected
    d, e = run("match.all.sync.b32 %d|q, %a, -1; selp.u32 %e, 1, 0, q;", a, a)
    same = int((a == a[0]).all())
    assert d.tolist() == [0xFFFFFFFF * same] * LANES
    assert e.tolist() == [same] * LANES
    # 64 bits of which only the upper half tells lanes apart.
    wide = "mov.b64 %w, {%t, %a}; and.b64 %w, %w, 0xffffffff00000000; match.any.sync.b64 %d, %w, -1;"
    assert run(wide, a, a)[0].tolist() == expected


@silicon_too
@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x80000001, 0x00FF00F0])
def test_redux(mask: int) -> None:
    rng = np.random.default_rng(mask)
    members = [i for i in range(LANES) if mask >> i & 1]
    for _ in range(4):
        a = random_lanes(rng)
        a[members[0]] = rng.choice([0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
        unsigned, signed = a[members], a[members].view(np.int32)
        models = {
            "add.u32": int(unsigned.sum(dtype=np.uint64)),
            "add.s32": int(signed.sum(dtype=np.int64)),
            "min.u32": int(unsigned.min()),
            "max.u32": int(unsigned.max()),
            "min.s32": int(signed.min()),
            "max.s32": int(signed.max()),
            "and.b32": int(np.bitwise_and.reduce(unsigned)),
            "or.b32": int(np.bitwise_or.reduce(unsigned)),
            "xor.b32": int(np.bitwise_xor.reduce(unsigned)),
        }
        for op, expected in models.items():
            text = f"mov.u32 %m, {mask}; shr.u32 %c, %m, %t; and.b32 %c, %c, 1; setp.ne.u32 q, %c, 0;"
            d, _ = run(text + f"@q redux.sync.{op} %d, %a, %m;", a, a)
            assert d[members].tolist() == [expected & 0xFFFFFFFF] * len(members), op


def test_elect_takes_one_and_always_the_same() -> None:
    a = np.zeros(LANES, np.uint32)
    leaders = set()
    for seed in range(20):
        body = """setp.ge.u32 q, %t, 3; @!q bra SKIP; mov.u32 %m, 0xfffffff8;
          elect.sync %d|q, %m; selp.u32 %e, 1, 0, q;
          elect.sync %c|q, %m; sub.u32 %c, %c, %d; add.u32 %e, %e, %c;
          SKIP:"""
        d, e = run(body, a, a, seed)
        leader = int(d[3])
        assert (d[3:] == leader).all()
        assert e.tolist() == [int(lane == leader) for lane in range(LANES)]
        leaders.add(leader)
    assert leaders == {3, 31}


def test_active_mask() -> None:
    a = np.zeros(LANES, np.uint32)
    d, _ = run("setp.lt.u32 q, %t, 5; @q activemask.b32 %d;", a, a)
    assert d.tolist() == [0x1F] * 5 + [0] * 27


DIVERGED = """setp.lt.u32 q, %t, 16; @q bra LOW;
  {high}
  bra.uni JOIN;
  LOW: {low}
  JOIN:"""


def test_branches_may_meet_at_different_instructions() -> None:
    rng = np.random.default_rng(5)
    a = random_lanes(rng)
    shuffle = "shfl.sync.bfly.b32 %d, %a, 16, 31, -1;"
    for seed in range(8):
        d, _ = run(DIVERGED.format(high=shuffle, low="add.u32 %c, %a, 1; " + shuffle), a, a, seed)
        assert d.tolist() == a[np.arange(LANES) ^ 16].tolist()
        run(DIVERGED.format(high="bar.warp.sync -1;", low="bar.warp.sync -1;"), a, a, seed)


@silicon_too
def test_exited_lanes_are_not_waited_for() -> None:
    a = np.arange(LANES, dtype=np.uint32)
    d, _ = run("setp.ge.u32 q, %t, 24; @q exit; redux.sync.add.u32 %d, %a, -1; bar.warp.sync -1;", a, a)
    assert d[:24].tolist() == [sum(range(24))] * 24
    # They exit while others wait already.
    d, _ = run("setp.ge.u32 q, %t, 24; @!q bra GO; add.u32 %c, %a, 1; exit; GO: vote.sync.ballot.b32 %d, p, -1;", a, a)
    assert d[:24].tolist() == [0xFFFFFE] * 24


@silicon_too
def test_a_block_of_less_than_a_warp() -> None:
    a = np.ones(LANES, np.uint32)
    assert run("redux.sync.add.u32 %d, %a, -1;", a, a, threads=20)[0].tolist() == [20] * 20 + [0] * 12


def test_mask_errors() -> None:
    raises("shfl.sync.idx.b32 %d, %a, 0, 31, 0xfffffffe;", "lane 0 is not in its own member mask")
    raises("setp.eq.u32 q, %t, 0; @q mov.u32 %m, 1; vote.sync.ballot.b32 %d, p, %m;", "different member masks")
    raises(
        DIVERGED.format(high="bar.warp.sync -1;", low="vote.sync.ballot.b32 %d, p, -1;"),
        "divergent: lane [0-9]+ of the same member mask waits at line",
    )
    raises(
        DIVERGED.format(high="bar.warp.sync -1;", low="add.u32 %d, %a, 1; L: bra.uni L;"),
        "waits for the lanes 0xffffffff to come here",
    )


@pytest.mark.parametrize(
    "text",
    [
        "vote.all.pred q, p;",
        "shfl.idx.b32 %d, %a, 0, 31;",
        "vote.sync.ballot.pred q, p, -1;",
        "vote.sync.most.pred q, p, -1;",
        "redux.sync.xor.u32 %d, %a, -1;",
        "redux.sync.add.b32 %d, %a, -1;",
        "match.any.sync.b32 %d|q, %a, -1;",
        "match.any.sync.b16 %d, %a, -1;",
        "shfl.sync.left.b32 %d, %a, 0, 31, -1;",
        "shfl.sync.up.b64 %w, %x, 0, 31, -1;",
        "elect.sync %d, -1;",
    ],
)
def test_unknown_forms_are_refused_when_loaded(text: str) -> None:
    from emulator import EmulationError, Machine

    with pytest.raises(EmulationError, match="does not know"):
        Machine().load(PTX.format(body=text))
