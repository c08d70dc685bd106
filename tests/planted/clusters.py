"""Clusters, cp.async, and tensor maps made on the device."""

from __future__ import annotations

import numpy as np

from .copies import BOX, HEAD, loaded
from .program import Array, Bug, expect, init, load, wait, words

CLUSTER_SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
PEER = "mov.u32 %r0, %cluster_ctarank; xor.b32 %r0, %r0, 1; mapa.shared::cluster.u32 %r1, {}, %r0;"
READ_PEER = PEER.format("%si") + "ld.shared::cluster.u32 %v, [%r1]; st.global.u32 [%di], %v;"
OWN = "ld.global.u32 %v, [%ai]; st.shared.u32 [%si], %v;"


def clustered(mistake: str, body: str, *words: str, expected: Array | None = None) -> Bug:
    """Two CTAs of 64 threads; by default each thread gets the word of the same thread of the peer."""
    order = np.arange(128) ^ 64 if expected is None else expected
    return Bug(mistake, body, words, lambda a: a.reshape(-1)[order], grid=2, cluster=2, box=BOX)


REMOTE_ARRIVE = PEER.format("%b") + "@%lead mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1];"
REMOTE_WAIT = wait("%b", 0).replace("parity.shared", "parity.acquire.cluster.shared")
MULTICAST = load("%s", "%b").replace("::bytes", "::bytes.multicast::cluster").replace("];", "], %rs;")


def multicast(arm: str) -> str:
    return f"""
  .reg .b16 %rs;
  mov.b16 %rs, 3;
  {init("%b", 1)}
  fence.mbarrier_init.release.cluster;
  {CLUSTER_SYNC}
  setp.eq.u32 %p0, %c, 0;
  and.pred %p0, %p0, %lead;
  {arm}
  @%p0 {MULTICAST}
  {wait("%b", 0)}
  ld.shared.u32 %v, [%si];
  st.global.u32 [%di], %v;
  {CLUSTER_SYNC}
"""


def copied(after: str, neighbour: int) -> str:
    return f"""
  cp.async.ca.shared.global [%si], [%ai], 4;
  {after}
  xor.b32 %r0, %t, {neighbour};
  mad.lo.u32 %r0, %r0, 4, %s;
  ld.shared.u32 %v, [%r0];
  st.global.u32 [%di], %v;
"""


# A copy of the map in shared memory gets another address and goes to the end of the output.
MAP = 1024  # bytes into the output
REPLACED = f"""
  setp.lt.u32 %p1, %t, 32;
  @!%p1 bra MADE;
  mad.lo.u32 %r3, %t, 4, %s;
  mul.wide.u32 %x3, %t, 4;
  add.u64 %x3, %in, %x3;
  ld.u32 %v, [%x3];
  st.shared.u32 [%r3+2048], %v;
  bar.warp.sync -1;
  add.u64 %x4, %a, 256;
  @%lead tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%s+2048], %x4;
  bar.warp.sync -1;
  add.u64 %x5, %d, {MAP};
  tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%x5], [%s+2048], 128;
MADE:
  bar.sync 0;
  add.u64 %in, %d, {MAP};
  <<||fence.proxy.tensormap::generic.acquire.gpu [%in], 128;>>
"""

BUGS = {
    "a remote arrival without a cluster barrier": clustered(
        "Barriers initialised and only the own CTA synchronised before a peer arrives.",
        f"""
  {init("%b", 1)}
  fence.mbarrier_init.release.cluster;
  <<bar.sync 0;||{CLUSTER_SYNC}>>
  {REMOTE_ARRIVE}
  {REMOTE_WAIT}
  ld.global.u32 %v, [%ai];
  st.global.u32 [%di], %v;
  {CLUSTER_SYNC}
""",
        "initialised",
        "race",
        "not started",
        expected=np.arange(128),
    ),
    "an initialisation without its fence": clustered(
        "No fence.mbarrier_init before the relaxed arrival at the cluster's barrier.",
        f"""
  {init("%b", 1)}
  <<||fence.mbarrier_init.release.cluster;>>
  barrier.cluster.arrive.relaxed.aligned;
  barrier.cluster.wait.aligned;
  {REMOTE_ARRIVE}
  {REMOTE_WAIT}
  ld.global.u32 %v, [%ai];
  st.global.u32 [%di], %v;
  {CLUSTER_SYNC}
""",
        "fence.mbarrier_init",
        expected=np.arange(128),
    ),
    "a peer's memory without a cluster barrier": clustered(
        "Distributed shared memory read after a barrier of the own CTA only.",
        OWN + f"<<bar.sync 0;||{CLUSTER_SYNC}>>" + READ_PEER + CLUSTER_SYNC,
        "race",
        "uninitialised",
    ),
    "exit while a peer reads": clustered(
        "No cluster barrier before the exit: the peer may still read the CTA's shared memory.",
        OWN + CLUSTER_SYNC + READ_PEER + f"<<||{CLUSTER_SYNC}>>",
        "exited",
    ),
    "exit while a peer writes": clustered(
        "A CTA ends while its peer still stores into it.",
        OWN + CLUSTER_SYNC + PEER.format("%si") + f"st.shared::cluster.u32 [%r1+256], %v; <<||{CLUSTER_SYNC}>>"
        "st.global.u32 [%di], %v;",
        "exited",
        expected=np.arange(128),
    ),
    "multicast into a barrier not armed": clustered(
        "Only the issuer of a multicast arms its barrier; the peer's gets bytes that it does not expect.",
        multicast("<<@%p0||@%lead>> " + expect("%b", 256)),
        "hangs",
        "transaction",
        "race",
        "bytes",
        expected=np.arange(128) % 64,
    ),
    "cp.async without a wait": Bug(
        "cp.async.wait_all forgotten before the thread reads what it copied.",
        copied("<<||cp.async.wait_all;>>", 0) + "cp.async.wait_all;",
        ("still writes", "in flight", "uninitialised"),
        HEAD,
    ),
    "cp.async without a barrier": Bug(
        "Each thread waits for its own copies, and reads those of others with no barrier.",
        copied("cp.async.wait_all; <<||bar.sync 0;>>", 32),
        ("race", "still writes", "in flight", "uninitialised"),
        words(lambda a: a[np.arange(64) ^ 32]),
    ),
    "cp.async waits for too few groups": Bug(
        "cp.async.wait_group 1 in the last turn of a pipeline, where 0 is due.",
        copied("cp.async.commit_group; cp.async.wait_group <<1||0>>;", 0) + "cp.async.wait_all;",
        ("still writes", "in flight", "uninitialised"),
        HEAD,
    ),
}


# The changed map begins with row 2. In the end its words are cleared, as the result must not depend on addresses.
BUGS["a stale tensor map"] = Bug(
    "A map changed in global memory and used without fence.proxy.tensormap acquire (fast.cu#8).",
    loaded(expect("%b", 256) + load("%s", "%b"), before=REPLACED) + f"@%p1 st.global.u32 [%di+{MAP}], 0;",
    ("stale",),
    words(lambda a: a[64:128]),
    box=BOX,
)
