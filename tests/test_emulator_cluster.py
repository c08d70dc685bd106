"""Clusters: each other's shared memory, the cluster's barrier, remote mbarriers, and who may still be reached."""

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
.const .b32 constant = 5;
.visible .entry kernel(.param .u64 pa, .param .u64 pd) {{
  .reg .pred p, q, r;
  .reg .b32 %a, %b, %c, %d, %t, %i, %n, %k, %s, %z;
  .reg .b64 %x, %y, %o, %g, %h;
  .local .b32 own;
  .shared .align 16 .b32 word;
  .shared .align 8 .b64 bar;
  mov.u32 %t, %tid.x;
  mov.u32 %k, %cluster_ctarank;
  mov.u32 %n, %cluster_nctarank;
  mov.u32 %i, %ctaid.x;
  mov.u32 %a, %ntid.x;
  mad.lo.u32 %i, %i, %a, %t;
  mul.wide.u32 %o, %i, 4;
  add.u32 %c, %k, 1;
  rem.u32 %c, %c, %n;
  setp.eq.u32 p, %t, 0;
  mov.u32 %d, 0;
  {body}
  ld.param.u64 %x, [pd];
  add.s64 %y, %x, %o;
  st.global.b32 [%y], %d;
  ret;
}}
"""
SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; "
Values = np.ndarray[Any, np.dtype[np.uint32]]


def run(body: str, ctas: int = 4, cluster: int = 4, threads: int = 32, seed: int = 0) -> Values:
    """%d of each thread, by CTA."""
    from emulator import Machine

    out, a = np.zeros(ctas * threads, np.uint32), np.zeros(64, np.uint32)
    Machine(seed).load(PTX.format(body=body))["kernel"].launch(ctas, threads, cluster, args=[a, out])
    return out.reshape(ctas, threads)


def raises(body: str, words: str, ctas: int = 2, cluster: int = 2, threads: int = 32, seeds: int = 1) -> None:
    from emulator import EmulationError

    for seed in range(seeds):
        with pytest.raises(EmulationError, match=words):
            run(body, ctas, cluster, threads, seed)


@pytest.mark.parametrize(
    "read",
    [
        "mapa.shared::cluster.u32 %s, word, %c; ld.shared::cluster.b32 %d, [%s];",
        "mov.u32 %s, word; mapa.shared::cluster.u32 %s, %s, %c; ld.shared::cluster.b32 %d, [%s];",
        "mov.u64 %g, word; cvta.shared.u64 %g, %g; mapa.u64 %g, %g, %c; ld.b32 %d, [%g];",
        "mov.u64 %g, word; mapa.shared::cluster.u64 %g, %g, %c; cvt.u32.u64 %s, %g; ld.shared::cluster.b32 %d, [%s];",
    ],
)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_each_reads_its_neighbour(cluster: int, read: str) -> None:
    body = "add.u32 %b, %k, 100; @p st.shared.b32 [word], %b; " + SYNC + read + SYNC
    for seed in range(4):
        d = run(body, 8, cluster, 64, seed)
        assert d.tolist() == [[100 + (cta % cluster + 1) % cluster] * 64 for cta in range(8)]


def test_ranks_of_addresses_and_spaces() -> None:
    body = "mapa.shared::cluster.u32 %s, word, %c; getctarank.shared::cluster.u32 %d, %s; "
    body += "mov.u64 %g, word; cvta.shared.u64 %g, %g; mapa.u64 %h, %g, %c; getctarank.u64 %b, %h;"
    assert run(body + "mad.lo.u32 %d, %d, 16, %b;")[:, 0].tolist() == [17 * ((k + 1) % 4) for k in range(4)]
    tests = {"shared": 1, "shared::cta": 1, "shared::cluster": 2, "global": 4, "local": 8, "const": 16}
    addresses = {
        "mov.u64 %g, word; cvta.shared.u64 %g, %g;": 3,
        "mov.u64 %g, word; cvta.shared.u64 %g, %g; mapa.u64 %g, %g, %c;": 2,
        "ld.param.u64 %g, [pa];": 4,
        "mov.u64 %g, own; cvta.local.u64 %g, %g;": 8,
        "mov.u64 %g, constant; cvta.const.u64 %g, %g;": 16,
    }
    for address, expected in addresses.items():
        body = address
        for space, bit in tests.items():
            body += f"isspacep.{space} q, %g; @q or.b32 %d, %d, {bit};"
        assert (run(body) == expected).all(), address


def test_the_barrier_counts_threads() -> None:
    # Lanes of a warp arrive by different ways, some CTAs late, in several rounds.
    body = """mov.u32 %a, 0; @p st.shared.b32 [word], %a;
      L: and.b32 %b, %t, 1; setp.eq.u32 q, %b, 0; @q bra EVEN;
      barrier.cluster.arrive; barrier.cluster.wait; bra.uni ON;
      EVEN: barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
      ON: mapa.shared::cluster.u32 %s, word, %c; @p atom.shared::cluster.add.u32 %b, [%s], 1;
      barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
      ld.shared.b32 %b, [word]; mad.lo.u32 %d, %d, 10, %b;
      add.u32 %a, %a, 1; setp.lt.u32 r, %a, 3; @r bra L;
      barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    for seed in range(5):
        assert (run(body, 4, 4, 64, seed) == 123).all()


def test_exited_threads_count_as_arrived() -> None:
    for early in ("setp.gt.u32 q, %t, 40; @q exit;", "setp.eq.u32 q, %k, 1; @q exit;"):
        for seed in range(5):
            d = run(early + SYNC + "mov.u32 %d, 7;", 2, 2, 64, seed)
            assert set(d.ravel().tolist()) == {0, 7}


def test_barrier_errors() -> None:
    raises("barrier.cluster.wait;", "waits at the cluster's barrier without having arrived")
    raises("barrier.cluster.arrive; barrier.cluster.arrive;", "again without having waited")
    raises(
        "setp.eq.u32 q, %k, 0; @q barrier.cluster.arrive; @q barrier.cluster.wait; L: @!q bra L;",
        "cluster's barrier, to which 32 ",
    )
    raises(
        "setp.lt.u32 q, %t, 5; @q barrier.cluster.arrive.aligned;", "divergent: an aligned instruction under a guard"
    )
    raises("mapa.shared::cluster.u32 %s, word, 2;", "rank 2 in a cluster of 2 CTAs")
    raises("ld.param.u64 %x, [pa]; mapa.u64 %g, %x, 1;", "no generic address of shared memory")
    raises("mov.u32 %s, 0x05000400; ld.shared::cluster.b32 %d, [%s];", "of rank 5 in a cluster of 2")


@pytest.mark.parametrize(
    "access",
    [
        "ld.shared::cluster.b32 %d, [%s];",
        "st.shared::cluster.b32 [%s], %d;",
        "atom.shared::cluster.add.u32 %d, [%s], 1;",
        "mbarrier.arrive.shared::cluster.b64 _, [%s];",
    ],
)
def test_a_cta_that_has_exited_is_out_of_reach(access: str) -> None:
    # CTA 1 leaves at once; CTA 0 comes late.
    late = "@q exit; mov.u32 %b, 0; L: add.u32 %b, %b, 1; setp.lt.u32 r, %b, 3000; @r bra L; "
    body = "setp.eq.u32 q, %k, 1; " + late + "mapa.shared::cluster.u32 %s, word, 1; " + access
    raises(body, "shared memory of a CTA that has exited")


REMOTE = """mov.u32 %b, bar; mapa.shared::cluster.u32 %s, %b, 0;
  {fence} {sync}
  setp.ne.u32 q, %k, 0; @q bra REMOTE;
  W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 r, [bar], 0; @!r bra W;
  mov.u32 %d, 1; bra.uni DONE;
  REMOTE: @p mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%s];
  DONE: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""


@pytest.mark.parametrize(
    ("fence", "sync", "legal"),
    [
        ("fence.mbarrier_init.release.cluster;", "barrier.cluster.arrive.relaxed.aligned;", True),
        ("", "barrier.cluster.arrive.aligned;", True),
        ("fence.acq_rel.cluster;", "barrier.cluster.arrive.relaxed.aligned;", True),
        ("", "barrier.cluster.arrive.relaxed.aligned;", False),
        ("fence.acq_rel.cta;", "barrier.cluster.arrive.relaxed.aligned;", False),
    ],
)
def test_remote_arrivals_need_a_fence_behind_the_init(fence: str, sync: str, legal: bool) -> None:
    init = "setp.eq.u32 p, %t, 0; @p mbarrier.init.shared.b64 [bar], 3; " + fence
    body = REMOTE.format(fence=init, sync=sync + "barrier.cluster.wait.aligned;")
    if not legal:
        raises(body, "no fence.mbarrier_init between the init|race", 4, 4, seeds=3)
        return
    for seed in range(5):
        assert run(body, 4, 4, 32, seed)[:, 0].tolist() == [1, 0, 0, 0]


def test_a_fence_of_another_warp_counts_behind_a_barrier_of_the_cta() -> None:
    init = "setp.eq.u32 q, %t, 0; @q mbarrier.init.shared.b64 [bar], 3; {} setp.eq.u32 q, %t, 32; "
    init += "@q fence.acq_rel.cluster; barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"
    for seed in range(3):
        run(REMOTE.format(fence=init.format("bar.sync 0;"), sync=""), 4, 4, 64, seed)
    raises(REMOTE.format(fence=init.format(""), sync=""), "no fence.mbarrier_init", 4, 4, 64)


def test_waits_are_for_the_own_mbarriers() -> None:
    body = "@p mbarrier.init.shared.b64 [bar], 1; " + SYNC + "mov.u32 %b, bar; mapa.shared::cluster.u32 %s, %b, %c; "
    raises(body + "mbarrier.test_wait.parity.shared.b64 q, [%s], 1;", "another CTA's")


@pytest.mark.parametrize(
    "text",
    [
        "barrier.cluster.arrive.acquire;",
        "barrier.cluster.wait.relaxed;",
        "barrier.cluster.sync;",
        "mapa.shared.u32 %s, %b, 1;",
        "getctarank.shared::cluster.b32 %s, %b;",
        "isspacep.texture q, %g;",
    ],
)
def test_unknown_forms_are_refused_when_loaded(text: str) -> None:
    from emulator import EmulationError, Machine

    with pytest.raises(EmulationError, match="does not know"):
        Machine().load(PTX.format(body=text))
