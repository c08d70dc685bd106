"""mbarrier objects: phases, counts, states, transactions, and every misuse that is an error."""

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
  .reg .b32 %a, %b, %c, %d, %e, %t, %w, %i;
  .reg .b64 %x, %y, %z, %o, %s, %u, %v;
  .shared .align 8 .b64 bar[4];
  .shared .align 16 .b8 buffer[1024];
  mov.u32 %t, %tid.x;
  shr.u32 %w, %t, 5;
  setp.eq.u32 p, %t, 0;
  mov.u32 %d, 0;
  mov.u32 %e, 0;
  ld.param.u64 %x, [pa];
  mul.wide.u32 %o, %t, 4;
  add.s64 %x, %x, %o;
  ld.global.b32 %a, [%x];
  {body}
  ld.param.u64 %x, [pd];
  mul.wide.u32 %o, %t, 8;
  add.s64 %y, %x, %o;
  st.global.v2.b32 [%y], {{%d, %e}};
  ret;
}}
"""
INIT = "@p mbarrier.init.shared.b64 [bar], {}; bar.sync 0; "
TEST = "mbarrier.test_wait.parity.shared.b64 q, [bar], {}; selp.u32 {}, 1, 0, q; "
WAIT = """W{0}: mbarrier.try_wait.parity.shared::cta.b64 q, [bar], {1}; @!q bra W{0}; """
Pairs = np.ndarray[Any, np.dtype[np.uint32]]


def run(body: str, threads: int = 1, seed: int = 0, a: Pairs | None = None) -> Pairs:
    """(%d, %e) of each thread."""
    from emulator import Machine

    out = np.zeros((threads, 2), np.uint32)
    a = np.arange(threads, dtype=np.uint32) if a is None else a
    Machine(seed).load(PTX.format(body=body))["kernel"].launch(1, threads, args=[a, out])
    return out


def raises(body: str, words: str, threads: int = 1) -> None:
    from emulator import EmulationError

    with pytest.raises(EmulationError, match=words):
        run(body, threads)


def model(expected: int, operations: list[tuple[str, int]]) -> list[tuple[int, int]]:
    """The answers to a wait on parity 0 and on parity 1 after each operation."""
    phase, pending, tx = 0, expected, 0
    answers = []
    for operation, value in operations:
        if operation == "arrive":
            pending -= value
        elif operation == "drop":
            pending -= value
            expected -= value
        elif operation == "expect":
            tx += value
        elif operation == "complete":
            tx -= value
        else:
            tx += value
            pending -= 1
        if pending == 0 and tx == 0:
            phase, pending = phase ^ 1, expected
        answers.append((int(phase != 0), int(phase != 1)))
    return answers


TEXTS = {
    "arrive": "mbarrier.arrive.shared.b64 _, [bar], {};",
    "drop": "mbarrier.arrive_drop.release.cluster.shared::cta.b64 %z, [bar], {};",
    "expect": "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], {};",
    "complete": "mbarrier.complete_tx.shared.b64 [bar], {};",
    "arrive and expect": "mbarrier.arrive.expect_tx.shared.b64 _, [bar], {};",
}


def random_operations(rng: np.random.Generator, expected: int) -> list[tuple[str, int]]:
    """Legal ones: in each phase, all arrivals and as many bytes as come."""
    operations: list[tuple[str, int]] = []
    for _ in range(6):
        if expected == 0:
            break
        phase: list[tuple[str, int]] = []
        left, drops = expected, 0
        while left:
            count = int(rng.integers(1, left + 1))
            kind = str(rng.choice(["arrive", "drop", "arrive and expect"], p=[0.5, 0.1, 0.4]))
            if kind == "arrive and expect":
                count = 1
                phase.append((kind, 16 * int(rng.integers(0, 5))))
            else:
                phase.append((kind, count))
            drops += count * (kind == "drop")
            left -= count
        total = sum(value for kind, value in phase if kind == "arrive and expect")
        if total:
            phase.insert(int(rng.integers(0, len(phase))), ("complete", 16))
            phase.append(("complete", total))
            phase.insert(0, ("expect", 16))
        operations += phase
        expected -= drops
    return operations


@pytest.mark.parametrize("seed", range(8))
def test_phases(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    operations = random_operations(rng, count)
    body = INIT.format(count)
    for operation, value in operations:
        # The answers as digits of base 2, oldest first, folded into a hash.
        body += TEXTS[operation].format(value)
        for parity in (0, 1):
            body += TEST.format(parity, "%c") + "mad.lo.u32 %d, %d, 31, %c; add.u32 %d, %d, 7;"
    expected = 0
    for pair in model(count, operations):
        for bit in pair:
            expected = (expected * 31 + bit + 7) % (1 << 32)
    assert run(body)[0, 0] == expected


def test_a_fresh_barrier() -> None:
    assert run(INIT.format(1) + TEST.format(0, "%d") + TEST.format(1, "%e")).tolist() == [[0, 1]]


def test_the_largest_counts() -> None:
    most = (1 << 20) - 1
    body = INIT.format(most) + f"mbarrier.arrive.shared.b64 _, [bar], {most}; " + TEST.format(0, "%d")
    assert run(body).tolist() == [[1, 0]]
    body = INIT.format(1) + f"mbarrier.arrive.expect_tx.shared.b64 _, [bar], {most}; " + TEST.format(0, "%d")
    body += f"mbarrier.complete_tx.shared.b64 [bar], {most}; " + TEST.format(0, "%e")
    assert run(body).tolist() == [[0, 1]]


def test_states() -> None:
    body = INIT.format(2) + "mbarrier.arrive.shared.b64 %z, [bar]; "
    body += "mbarrier.test_wait.shared.b64 q, [bar], %z; selp.u32 %d, 1, 0, q; mbarrier.arrive.b64 %y, [%s]; "
    body += "mbarrier.test_wait.acquire.cluster.shared.b64 q, [bar], %z; @q add.u32 %d, %d, 2; "
    body += "mbarrier.test_wait.relaxed.cta.b64 q, [%s], %y; @q add.u32 %d, %d, 4; "
    generic = "mov.u64 %s, bar; cvta.shared.u64 %s, %s; "
    assert run(generic + body).tolist() == [[6, 0]]


def test_pending_count() -> None:
    body = INIT.format(9) + "mbarrier.arrive.noComplete.shared.b64 %z, [bar], 3; "
    body += "mbarrier.arrive_drop.noComplete.release.cta.shared::cta.b64 %y, [bar], 2; "
    body += "mbarrier.pending_count.b64 %d, %z; mbarrier.pending_count.b64 %e, %y;"
    assert run(body).tolist() == [[9, 6]]


@pytest.mark.parametrize("threads", [32, 96])
def test_all_threads_arrive_and_see_what_the_others_stored(threads: int) -> None:
    body = INIT.format(threads) + "mov.u32 %i, 0; mov.u32 %b, buffer; shl.b32 %c, %t, 2; add.u32 %b, %b, %c;"
    body += "LOOP: and.b32 %w, %i, 1; add.u32 %c, %a, %i; st.shared.b32 [%b], %c; mbarrier.arrive.shared.b64 _, [bar];"
    body += WAIT.format(0, "%w")
    body += f"""xor.b32 %c, %t, 16; shl.b32 %c, %c, 2; add.u32 %c, %c, buffer; ld.shared.b32 %c, [%c];
      mad.lo.u32 %d, %d, 5, %c; bar.sync 0; add.u32 %i, %i, 1; setp.lt.u32 r, %i, {5}; @r bra LOOP;"""
    body = body.replace("add.u32 %c, %c, buffer;", "mov.u32 %e, buffer; add.u32 %c, %c, %e;") + "mov.u32 %e, 0;"
    a = np.random.default_rng(0).integers(0, 1 << 32, threads, dtype=np.uint64)
    expected = np.zeros(threads, np.uint64)
    for i in range(5):
        expected = (expected * 5 + a[np.arange(threads) ^ 16] + i) % (1 << 32)
    for seed in range(6):
        assert run(body, threads, seed, a.astype(np.uint32))[:, 0].tolist() == expected.tolist()


def test_try_wait_is_no_blocking_wait() -> None:
    body = INIT.format(1) + "mbarrier.arrive.shared.b64 _, [bar]; "
    body += "mbarrier.try_wait.parity.shared.b64 q, [bar], 0, 1000; selp.u32 %d, 1, 0, q;"
    assert {int(run(body, 1, seed)[0, 0]) for seed in range(60)} == {0, 1}


def test_inval_frees_the_memory() -> None:
    body = INIT.format(1) + "mbarrier.inval.shared.b64 [bar]; mov.u32 %d, 5; st.shared.b32 [bar+4], %d; "
    body += "ld.shared.b32 %e, [bar+4]; mbarrier.init.shared.b64 [bar], 3; " + TEST.format(1, "%d")
    assert run(body).tolist() == [[1, 5]]


ARRIVE = "mbarrier.arrive.shared.b64 %z, [bar]; "


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (ARRIVE, "no initialised mbarrier"),
        (TEST.format(0, "%d"), "no initialised mbarrier"),
        (INIT.format(1) + "mbarrier.inval.shared.b64 [bar];" + ARRIVE, "no initialised mbarrier"),
        ("mbarrier.inval.shared.b64 [bar];", "no initialised mbarrier"),
        (INIT.format(1) + "mbarrier.arrive.shared.b64 _, [bar+8];", "no initialised mbarrier at shared offset 8"),
        (INIT.format(1) + "mbarrier.init.shared.b64 [bar], 1;", "needs mbarrier.inval before another init"),
        (INIT.format(1) + "st.shared.b32 [bar+4], %a;", "overwrites the mbarrier at shared offset 0"),
        (INIT.format(1) + "atom.shared.add.u32 %d, [bar], 1;", "overwrites the mbarrier"),
        (INIT.format(0), "1 to 2\\^20 - 1, and this is 0"),
        ("mov.u32 %b, 0x100000;" + INIT.format("%b"), "1 to 2\\^20 - 1, and this is 1048576"),
        (INIT.format(3) + "mbarrier.arrive.shared.b64 _, [bar], 0;", "1 to 2\\^20 - 1, and this is 0"),
        (INIT.format(3) + "mbarrier.arrive.shared.b64 _, [bar], 4;", "more arrivals .* 4, where 3 of 3 are to come"),
        (INIT.format(1) + "mbarrier.expect_tx.shared.b64 [bar], 16;" + ARRIVE + ARRIVE, "more arrivals"),
        (INIT.format(2) + "mbarrier.arrive_drop.shared.b64 %z, [bar];" + ARRIVE + ARRIVE + TEST.format(1, "%d"), ""),
        (INIT.format(1) + "mbarrier.arrive_drop.shared.b64 %z, [bar];" + ARRIVE, "more arrivals"),
        (INIT.format(1) + "mbarrier.expect_tx.shared.b64 [bar], 0x100000;", "leaves its range"),
        (INIT.format(2) + "mbarrier.expect_tx.shared.b64 [bar], 0xfffff;" * 2, "leaves its range with 2097150"),
        (INIT.format(2) + "mbarrier.complete_tx.shared.b64 [bar], 0xfffff;" * 2, "leaves its range with -2097150"),
        (INIT.format(2) + "mbarrier.arrive.noComplete.shared.b64 %z, [bar], 2;", "would complete the phase"),
        (
            INIT.format(1) + ARRIVE + ARRIVE.replace("%z", "_") + "mbarrier.test_wait.shared.b64 q, [bar], %z;",
            "2 phases",
        ),
        (INIT.format(1) + "mov.u64 %z, 5; mbarrier.test_wait.shared.b64 q, [bar], %z;", "no state"),
        (INIT.format(1) + ARRIVE + "mbarrier.pending_count.b64 %d, %z;", "with .noComplete"),
        (
            "mbarrier.init.shared.b64 [bar+8], 1;"
            + INIT.format(1)
            + ARRIVE
            + "mbarrier.test_wait.shared.b64 q, [bar+8], %z;",
            "state of another mbarrier",
        ),
        ("mbarrier.init.shared.b64 [bar+4], 1;", "misaligned"),
        ("mbarrier.init.b64 [%x], 1;", "no address there"),
        (INIT.format(1) + "mbarrier.expect_tx.shared.b64 [bar], 48;", "exits while .* still expects 48 bytes"),
        (INIT.format(1) + "mbarrier.complete_tx.shared.b64 [bar], 48;", "48 bytes that nobody expected"),
        (INIT.format(1) + WAIT.format(0, 0), "waits for parity 0 of the mbarrier .* 1 of 1 arrivals and 0 bytes"),
        (
            INIT.format(1) + "mbarrier.arrive.expect_tx.shared.b64 _, [bar], 32;" + WAIT.format(0, 0),
            "in phase 0: 0 of 1 arrivals and 32 bytes to come",
        ),
    ],
)
def test_misuse(body: str, words: str) -> None:
    if words:
        raises(body, words)
    else:
        run(body)


@pytest.mark.parametrize(
    "text",
    [
        "mbarrier.init.shared::cluster.b64 [bar], 1;",
        "mbarrier.init.shared.b32 [bar], 1;",
        "mbarrier.arrive.release.shared.b64 _, [bar];",
        "mbarrier.arrive.cluster.shared.b64 _, [bar];",
        "mbarrier.arrive.relaxed.shared.b64 _, [bar];",
        "mbarrier.arrive.release.gpu.shared.b64 _, [bar];",
        "mbarrier.arrive.acquire.cta.shared.b64 _, [bar];",
        "mbarrier.arrive.shared::cluster.b64 %z, [bar];",
        "mbarrier.arrive.noComplete.shared.b64 %z, [bar];",
        "mbarrier.arrive.noComplete.release.cluster.shared.b64 %z, [bar], 1;",
        "mbarrier.arrive.expect_tx.shared.b64 _, [bar];",
        "mbarrier.expect_tx.release.cta.shared.b64 [bar], 16;",
        "mbarrier.test_wait.parity.shared.b64 q, [bar], 0, 100;",
        "mbarrier.try_wait.parity.acquire.shared.b64 q, [bar], 0;",
        "mbarrier.try_wait.parity.cta.shared.b64 q, [bar], 0;",
        "mbarrier.try_wait.parity.shared::cluster.b64 q, [bar], 0;",
        "mbarrier.try_wait.parity.release.cta.shared.b64 q, [bar], 0;",
        "mbarrier.wait.shared.b64 q, [bar], 0;",
    ],
)
def test_unknown_forms_are_refused_when_loaded(text: str) -> None:
    from emulator import EmulationError, Machine

    with pytest.raises(EmulationError, match="does not know"):
        Machine().load(PTX.format(body=text))
