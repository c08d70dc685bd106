"""What the model of dispatch and combine knows: machines, a routing's traffic, settings, rates as others state them.

``fastfp8/comm/simulation.py`` predicts times from it, ``fastfp8/comm/tune.py`` takes its defaults from those.
``python -m bench comm --simulate`` prints what the model makes of each row that its constants were fitted on.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

GB = 1e9
US = 1e-6
#: Tokens of a sample where a mean has no closed form: good to a percent.
SAMPLE = 4096


@dataclass(frozen=True)
class Machine:
    """What the model knows of a GPU and its links. GB/s are of one direction of one GPU, usable, payload."""

    name: str
    sms: int
    link: float  # NVLink, GB/s
    rail: float = 45.5  # a 400 Gbit/s NIC, GB/s
    link_us: float = 1.5
    rail_us: float = 4.0
    call_us: float = 31.0  # of a call before and after its bytes: launches, exchange of counts, last flags

    def __str__(self) -> str:
        return f"{self.name}: {self.sms} SMs, NVLink {self.link:g} GB/s, NIC {self.rail:g} GB/s a direction"


#: ``rail`` and ``call_us``: by hand on DeepEP V1's low-latency rows of 16 to 256 GPUs, which are linear in the bytes
#: that leave a node. ``link`` of H800: DeepEP V1's rows of 8 GPUs; of the others, which have the same NVLink by their
#: data sheets: UCCL-EP's rows of 8 H200. ``link_us`` and ``rail_us`` are guesses: no published row shows them.
MACHINES = {
    "H800": Machine("H800", 132, 138.0),
    "H100": Machine("H100", 132, 293.0),
    "H200": Machine("H200", 132, 293.0),
    "H20": Machine("H20", 78, 293.0),
}


@dataclass(frozen=True)
class Copying:
    """What a warp has in flight at once: bytes when it copies, elements of BF16 when it quantises or adds."""

    bytes: int
    elements: int
    receives: bool = True  # False: what has arrived is moved on after the call, on all SMs

    def rounds(self, bytes_: float) -> int:
        return math.ceil(bytes_ / self.bytes)


#: csrc/comm/kernels/{move,combine}.cuh: loads into registers.
REGISTERS = Copying(2048, 512)
#: Of DeepEP: TMA has a whole record in flight. V2's receiving is an epilogue, which its times leave out.
BULK, BULK_SEND = Copying(1 << 20, 1 << 20), Copying(1 << 20, 1 << 20, receives=False)


@dataclass(frozen=True)
class Shape:
    """One layer's routing, the same for all ranks. ``top_groups``: nodes that a token may go to, None for any."""

    nodes: int
    gpus: int
    tokens: int = 4096
    hidden: int = 7168
    experts: int = 256
    top_k: int = 8
    top_groups: int | None = None
    quantized: bool = True  # what is in the published tables: dispatch in FP8. Combine is BF16 always.

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def row_bytes(self) -> int:
        """Of dispatch: codes and scales, or BF16."""
        return self.hidden + self.hidden // 32 if self.quantized else 2 * self.hidden

    @property
    def record_bytes(self) -> int:
        return 16 * self.top_k + self.row_bytes


@dataclass(frozen=True)
class Traffic:
    """Of one token on average: how many ranks and nodes have an expert of it, its source's own among them."""

    ranks: float
    nodes: float
    rails: float  # copies over rails: to nodes other than its own
    links: float  # copies over NVLink, in all nodes: to ranks that do not have the token already


def _hit(experts: int, of_them: float, top_k: int) -> float:
    """The probability that ``top_k`` different experts of ``experts`` are not all outside of a set of ``of_them``."""
    outside = 1.0
    for i in range(top_k):
        outside *= max(0.0, (experts - of_them - i) / (experts - i))
    return 1.0 - outside


def _sampled(shape: Shape, allowed: int) -> tuple[float, float]:
    """Ranks and nodes of a token whose gate takes the ``allowed`` nodes with the best experts, as ``fastfp8.route``.

    Those nodes have an expert among the best more often than any nodes would: no closed form, but a sample.
    """
    of_node = shape.experts // shape.nodes
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(SAMPLE, shape.nodes, of_node, generator=generator).sigmoid()
    best = scores.topk(min(of_node, max(1, shape.top_k // allowed))).values.sum(2)
    nodes = best.topk(allowed).indices
    chosen = scores.gather(1, nodes[:, :, None].expand(-1, -1, of_node)).flatten(1).topk(shape.top_k).indices
    node = nodes.gather(1, chosen // of_node)
    rank = node * shape.gpus + chosen % of_node // (shape.experts // shape.ranks)
    counts = []
    for owner, of in ((rank, shape.ranks), (node, shape.nodes)):
        counts.append(torch.zeros(SAMPLE, of).scatter_(1, owner, 1.0).sum().item() / SAMPLE)
    return counts[0], counts[1]


@functools.lru_cache(maxsize=1024)
def traffic(shape: Shape) -> Traffic:
    """Of routing in which all experts are as likely as others, also those of a token's own rank and node."""
    allowed = min(shape.top_groups or shape.nodes, shape.nodes)
    if allowed < shape.nodes:
        ranks, nodes = _sampled(shape, allowed)
    else:
        ranks = shape.ranks * _hit(shape.experts, shape.experts / shape.ranks, shape.top_k)
        nodes = shape.nodes * _hit(shape.experts, shape.experts / shape.nodes, shape.top_k)
    return Traffic(ranks, nodes, nodes * (1 - 1 / shape.nodes), ranks * (1 - 1 / shape.gpus))


def deepep_rate(shape: Shape, row_bytes: int, seconds: float) -> float:
    """GB/s as DeepEP states them, for comparison with its tables: a copy of a row for each node that a token goes to
    (one node: each rank), **its own among them**, which never leaves it."""
    of_token = traffic(shape)
    copies = of_token.ranks if shape.nodes == 1 else of_token.nodes
    return shape.tokens * copies * row_bytes / seconds / GB


def wire_rates(shape: Shape, row_bytes: int, seconds: float) -> tuple[float, float]:
    """GB/s that leave a GPU by rail and by NVLink, in rows."""
    of_token = traffic(shape)
    rail, link = (shape.tokens * copies * row_bytes / seconds / GB for copies in (of_token.rails, of_token.links))
    return rail, link


def flat_seconds(machine: Machine, shape: Shape, row_bytes: int) -> float:
    """Of a protocol that sends each of a token's top_k copies on its own, as DeepEP's low-latency kernels do."""
    copies = shape.tokens * shape.top_k * row_bytes
    rail = copies * (1 - 1 / shape.nodes) / (machine.rail * GB)
    link = copies / shape.nodes * (1 - 1 / shape.gpus) / (machine.link * GB)
    return machine.call_us * US + max(rail, link)


@dataclass(frozen=True)
class Settings:
    """What a buffer can choose. ``warps`` are of one CTA; a channel is two CTAs on two SMs. Printable."""

    num_sms: int
    link_slots: int
    rail_slots: int
    rail_chunk: int
    warps: int = 16

    def __str__(self) -> str:
        rail = f"{self.rail_slots} slots of {self.rail_chunk}"
        return f"{self.num_sms} SMs of {self.warps} warps, rails {rail}, links {self.link_slots} slots"


def ring_bytes(shape: Shape, settings: Settings) -> int:
    """Of a rank's window, all but flags and counts: as WindowLayout in ``csrc/comm/layout.h``, whose records have room
    for BF16 both ways."""
    values = -(-4 * shape.top_k // 16) * 16
    records = 4 * shape.hidden + 16 * shape.top_k + values  # one of dispatch and one of combine
    links = shape.ranks * settings.link_slots
    # A rail's chunks have room where they arrive and where they are put together.
    rails = 2 * shape.nodes * settings.rail_slots * settings.rail_chunk
    return settings.num_sms // 2 * (links + rails) * records
