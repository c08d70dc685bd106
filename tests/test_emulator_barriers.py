"""Barriers of a CTA: counts, reductions, exits, divergence, and what they order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import backend_params

pytestmark = backend_params(["emulator"])[0].marks

PTX = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 pa, .param .u64 pd) {{
  .reg .pred p, q, r;
  .reg .b32 %a, %b, %c, %d, %t, %w, %s;
  .reg .b64 %x, %y, %o;
  .shared .align 16 .b8 buffer[4096];
  mov.u32 %t, %tid.x;
  shr.u32 %w, %t, 5;
  mov.u32 %s, buffer;
  shl.b32 %b, %t, 2;
  add.u32 %s, %s, %b;
  mul.wide.u32 %o, %t, 4;
  ld.param.u64 %x, [pa];
  add.s64 %y, %x, %o;
  ld.global.b32 %a, [%y];
  setp.ne.u32 p, %a, 0;
  mov.u32 %d, 0;
  {body}
  ld.param.u64 %x, [pd];
  add.s64 %y, %x, %o;
  st.global.b32 [%y], %d;
  ret;
}}
"""
Values = np.ndarray[Any, np.dtype[np.uint32]]


def run(body: str, a: Values, seed: int = 0, threads: int | None = None) -> Values:
    from emulator import Machine

    out = np.zeros(1024, np.uint32)
    threads = threads or len(a)
    Machine(seed).load(PTX.format(body=body))["kernel"].launch(1, threads, args=[a, out])
    return out[:threads]


def raises(body: str, words: str, threads: int = 64, seeds: int = 1) -> None:
    from emulator import EmulationError

    for seed in range(seeds):
        with pytest.raises(EmulationError, match=words):
            run(body, np.zeros(threads, np.uint32), seed)


# Each thread passes its number on to the one 32 further on.
PASS_ON = """st.shared.b32 [%s], %a;
  {barrier}
  add.u32 %b, %t, 32; rem.u32 %b, %b, {threads}; shl.b32 %b, %b, 2; mov.u32 %c, buffer; add.u32 %c, %c, %b;
  ld.shared.b32 %d, [%c];"""


@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 0;",
        "bar.cta.sync 3, 128;",
        "barrier.sync.aligned 15;",
        "barrier.cta.sync 7, 128;",
        "mov.u32 %c, 5; bar.sync %c;",
        "mov.u32 %c, 128; bar.sync 9, %c;",
        "bar.red.popc.u32 %c, 2, p;",
        "setp.ge.u32 q, %w, 2; @q bar.sync 1, 128; @!q bar.sync 1;",
    ],
)
def test_barriers_order_shared_memory(barrier: str) -> None:
    a = np.random.default_rng(0).integers(0, 1 << 32, 128, dtype=np.uint64).astype(np.uint32)
    for seed in range(10):
        d = run(PASS_ON.format(barrier=barrier, threads=128), a, seed)
        assert d.tolist() == np.roll(a, -32).tolist()


def test_without_the_barrier_it_shows() -> None:
    raises(PASS_ON.format(barrier="", threads=128), "it reads %d, uninitialised|race", 128)


def test_reductions() -> None:
    rng = np.random.default_rng(1)
    for a in [np.zeros(96), np.ones(96), np.eye(96)[40], rng.integers(0, 2, 96)]:
        a = a.astype(np.uint32)
        for text, expected in {
            "bar.red.popc.u32 %d, 0, p;": int(a.sum()),
            "barrier.cta.red.popc.aligned.u32 %d, 1, 96, !p;": int(96 - a.sum()),
            "bar.red.and.pred q, 0, p; selp.u32 %d, 1, 0, q;": int(a.all()),
            "bar.red.or.pred q, 2, 96, p; selp.u32 %d, 1, 0, q;": int(a.any()),
            "barrier.red.or.pred q, 2, !p; selp.u32 %d, 1, 0, q;": int(not a.all()),
        }.items():
            assert run(text, a, 3).tolist() == [expected] * 96, text


def test_reductions_count_the_threads_that_exist() -> None:
    a = np.ones(40, np.uint32)
    assert run("bar.red.popc.u32 %d, 0, p;", a).tolist() == [40] * 40
    assert run("bar.red.and.pred q, 0, p; selp.u32 %d, 1, 0, q;", a).tolist() == [1] * 40


def test_a_loop_of_reductions_keeps_its_phases_apart() -> None:
    rounds = """mov.u32 %b, 0;
      L: setp.eq.u32 q, %b, %w;
      bar.red.popc.u32 %c, 0, q;
      mad.lo.u32 %d, %d, 3, %c;
      add.u32 %b, %b, 1; setp.lt.u32 r, %b, 6; @r bra L;"""
    expected = 0
    for i in range(6):
        expected = expected * 3 + 32 * (i < 4)
    for seed in range(10):
        assert run(rounds, np.zeros(128, np.uint32), seed).tolist() == [expected] * 128


def test_producers_and_consumers() -> None:
    # Warps 0 and 1 produce and go on; warps 2 and 3 wait for them.
    body = """setp.lt.u32 q, %w, 2;
      @!q bra CONSUME;
      st.shared.b32 [%s], %a;
      bar.arrive 4, 128;
      bra.uni DONE;
      CONSUME: bar.sync 4, 128;
      ld.shared.b32 %d, [%s+-256];
      DONE:"""
    a = np.arange(5, 133, dtype=np.uint32)
    for seed in range(10):
        assert run(body, a, seed).tolist() == [0] * 64 + a[:64].tolist()


def test_lanes_of_a_warp_may_come_to_a_barrier_by_different_ways() -> None:
    body = """and.b32 %b, %t, 1; setp.eq.u32 q, %b, 0;
      @q bra EVEN;
      barrier.sync 1; mov.u32 %d, 1; bra.uni DONE;
      EVEN: barrier.sync 1; mov.u32 %d, 2;
      DONE:"""
    for seed in range(10):
        assert run(body, np.zeros(64, np.uint32), seed).tolist() == [2, 1] * 32
    raises(body.replace("barrier.sync 1", "bar.sync 1"), "divergent: other lanes of the warp wait for these", seeds=5)
    raises(body.replace("EVEN: barrier.sync 1", "EVEN: barrier.sync 2"), "divergent: other lanes .* at barrier")


def test_barriers_without_a_count_do_not_wait_for_what_has_exited() -> None:
    for early in ("setp.eq.u32 q, %w, 1; @q exit;", "and.b32 %b, %t, 3; setp.eq.u32 q, %b, 1; @q exit;"):
        for seed in range(10):
            d = run(early + "bar.red.popc.u32 %d, 0, !p;", np.zeros(96, np.uint32), seed)
            assert set(d.tolist()) == {0, 64 if "%w" in early else 72}
    raises("setp.eq.u32 q, %w, 1; @q exit; bar.sync 0, 64;", "barrier 0, at which 32 of 64 threads")


def test_lanes_that_exit_while_others_of_their_warp_wait() -> None:
    body = "and.b32 %b, %t, 1; setp.eq.u32 q, %b, 0; @q bra WAIT; add.u32 %d, %d, 1; exit; WAIT: barrier.sync 1; "
    for seed in range(10):
        assert run(body + "mov.u32 %d, 3;", np.zeros(64, np.uint32), seed).tolist() == [3, 0] * 32


def test_errors() -> None:
    raises("bar.sync 0, 96;", "waits for 96 threads in a CTA of 64")
    raises("mov.u32 %b, 33; bar.sync 0, %b;", "multiples of 32")
    raises("mov.u32 %b, 0; bar.sync 0, %b;", "multiples of 32")
    raises("mov.u32 %b, 16; bar.sync %b;", "16 barriers")
    raises("bar.sync %t;", "16 barriers|disagree on the barrier")
    raises("setp.eq.u32 q, %w, 0; @q bar.sync 1, 64; @!q bar.sync 1, 96;", "warps disagree on the count", 96, 3)
    raises("bar.arrive 1, 64; bar.arrive 1, 64;", "twice in one phase", seeds=1)
    raises("setp.eq.u32 q, %w, 0; @q bar.sync 1; @!q bar.red.popc.u32 %d, 1, p;", "mixes .red")
    raises("setp.eq.u32 q, %w, 0; @q bar.sync 1, 64; @!q bar.sync 2, 64;", "barrier [12], at which 32 of 64")
    raises("setp.lt.u32 q, %t, 7; @q bar.sync 0;", "divergent: an aligned instruction under a guard")
    raises(
        "setp.lt.u32 q, %t, 7; setp.eq.u32 r, %t, 9; @!q bra L; bar.sync 0; L: @r bra L;",
        "lanes 0x7f: .* bar.sync 0;: waits for the lanes 0x27f to come here\\n .* lanes 0x200: .* @r bra L;\\n",
        32,
    )


@pytest.mark.parametrize(
    "text",
    [
        "bar.sync.aligned 0;",
        "bar.arrive 1;",
        "bar.red.popc.pred q, 0, p;",
        "bar.red.xor.pred q, 0, p;",
        "bar.red.and.pred q, 0;",
        "barrier.sync.fast 0;",
        "bar.sync;",
        "bar.sync 0, 32, 1;",
    ],
)
def test_unknown_forms_are_refused_when_loaded(text: str) -> None:
    from emulator import EmulationError, Machine

    with pytest.raises(EmulationError, match="does not know"):
        Machine().load(PTX.format(body=text))
