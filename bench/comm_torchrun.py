"""Dispatch and combine of a Buffer over the ranks that torchrun started, as many nodes as it likes.

    torchrun --nproc_per_node 8 -m bench comm
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m bench comm --tune
    torchrun --nproc_per_node 2 -m bench comm --tiny

The first two on GPUs over NCCL, the last on a CPU over gloo. Rates are told by what counts as a byte: those of DeepEP's
tables count a token's copies for its own node and rank, which cross no wire.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastfp8 import ScaledTensor, quantize
from fastfp8.comm import Buffer

from . import comm
from .family import Report
from .rows import Row, spread

TIMEOUT_S = 100.0
#: Of a token: the sums of rows that were quantised are the quantised token again but for roundings of partial sums.
TOLERANCE = 2.0**-6
DEFINITIONS = """\
DeepEP, rail     GB/s: a copy of each token for every node that it goes to, its own among them (DeepEP's "RDMA")
DeepEP, NVLink   GB/s: a copy for every rank that it goes to, its own among them
wire, rail       GB/s that leave a rank for other nodes
wire, NVLink     GB/s that leave a rank for others of its node, its own tokens and those that came by rail
Bytes are a token's payload: in FP8 codes and scales, in BF16 its values. Of the slowest rank's time, median of rounds;
bytes are a rank's mean. GB/s are 1e9 bytes a second, each way."""


@dataclass(frozen=True)
class Options:
    way: str
    tokens: int
    hidden: int
    experts: int
    top_k: int
    top_nodes: int
    ranks_per_node: int | None
    num_sms: int
    tune: bool
    samples: int


@dataclass(frozen=True)
class Copies:
    """Of a rank's tokens on average over ranks: to how many places they go."""

    nodes: float
    ranks: float
    rails: float
    links: float

    @staticmethod
    def of(idx: Tensor, rank: int, world: int, ranks_per_node: int, experts: int) -> Tensor:
        """float64 [4], of the tokens of ``rank``, in the order of the fields."""
        owner = idx.long() // (experts // world)
        to_rank = torch.zeros((len(idx), world), dtype=torch.bool).scatter_(1, owner, True)
        by_node = to_rank.view(len(idx), -1, ranks_per_node)
        to_node = by_node.any(2)
        own, gpu = rank // ranks_per_node, rank % ranks_per_node
        entered = by_node.sum() - by_node[:, :, gpu].sum()  # the rank of this index in a node has the token already
        counts = (to_node.sum(), to_rank.sum(), to_node.sum() - to_node[:, own].sum(), entered)
        return torch.stack(counts).double()

    def rates(self, row_bytes: int, seconds: float) -> tuple[float, ...]:
        """GB/s in the order of DEFINITIONS."""
        copies = (self.nodes, self.ranks, self.rails, self.links)
        return tuple(n * row_bytes / seconds / 1e9 for n in copies)


def limited_routing(options: Options, nodes: int, rank: int) -> Tensor:
    """int64 [tokens, top_k]: the best experts by random scores, of the nodes with the best of them, as the report's
    gate has it. No expert twice."""
    generator = torch.Generator().manual_seed(rank)
    scores = torch.rand((options.tokens, nodes, options.experts // nodes), generator=generator)
    allowed = min(options.top_nodes, nodes)
    best = scores.topk(min(scores.shape[2], max(1, options.top_k // allowed))).values.sum(2)
    kept = torch.zeros_like(best).scatter_(1, best.topk(allowed).indices, 1.0)
    return (scores * kept[:, :, None]).flatten(1).topk(options.top_k).indices


def options_of(given: argparse.Namespace, gpu: bool) -> Options:
    tokens, hidden, experts = given.tokens or (4096 if gpu else 256), given.hidden, given.experts
    if given.tiny:
        tokens, hidden = 16, 256
    way = given.way or ("kernels" if gpu else "collective")
    return Options(
        *(way, tokens, hidden, experts, given.top_k, given.top_nodes, given.ranks_per_node, given.num_sms),
        tune=given.tune,
        samples=given.samples,
    )


def run(given: argparse.Namespace) -> int:
    """On each rank; the first prints."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", dist.get_node_local_rank()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=limit)
    try:
        rows, text = measure(options_of(given, gpu), device)
        if dist.get_rank() == 0:
            Report(given.report).add(*rows)
            print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}) if given.json else text)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


def measure(options: Options, device: torch.device) -> tuple[list[Row], str]:
    """The rows of the ranks of the default group, and a table of them."""
    sizes: dict[str, Any] = {
        "hidden": options.hidden,
        "num_experts": options.experts,
        "top_k": options.top_k,
        "max_tokens": options.tokens,
        "ranks_per_node": options.ranks_per_node,
        "num_sms": options.num_sms,
    }
    make: Callable[[], Buffer] = functools.partial(Buffer, **sizes, timeout=TIMEOUT_S, device=device, way=options.way)
    tuned = ""
    if options.tune:
        with make() as buffer:
            tuned = f"\ntuned, of all that was tried:\n{buffer.tune()}\n"
    with make() as buffer:
        steps, copies = steps_of(options, buffer, device)
        scratch = torch.empty(comm.COLD_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
        times = {
            op: [comm._slowest(comm._timed(step, scratch), device) for _ in range(options.samples)]
            for op, step in steps.items()
        }
        buffer.check()
        return rows_of(options, buffer, copies, times, device), table(options, buffer, copies, times) + tuned


def steps_of(options: Options, buffer: Buffer, device: torch.device) -> tuple[dict[str, Callable[[], Any]], Copies]:
    """What is timed, once it was seen to be right, and where this routing's tokens go."""
    rank, layout = dist.get_rank(), buffer.layout
    idx = limited_routing(options, layout.nodes, rank)
    counts = Copies.of(idx, rank, layout.world, layout.ranks_per_node, layout.num_experts).to(device)
    dist.all_reduce(counts)
    copies = Copies(*(counts / layout.world).tolist())
    generator = torch.Generator(device).manual_seed(rank)
    x = torch.randn((options.tokens, options.hidden), generator=generator, device=device, dtype=torch.bfloat16)
    where, weights = idx.to(device), torch.full(idx.shape, 1 / options.top_k, device=device)
    recv, _, handle = buffer.dispatch(x, where, weights)
    assert isinstance(recv, ScaledTensor)
    outs = recv.dequantize(torch.bfloat16)
    exact = quantize(x).dequantize()
    apart = (buffer.combine(outs, handle).float() - exact).abs() <= TOLERANCE * exact.abs()
    buffer.check()
    assert bool(apart.all()), f"rank {rank} did not get its sums"
    return {
        DISPATCH: functools.partial(buffer.dispatch, x, where, weights),
        REPLAY: functools.partial(buffer.dispatch, x, handle=handle),
        COMBINE: functools.partial(buffer.combine, outs, handle),
    }, copies


DISPATCH, REPLAY, COMBINE = "dispatch", "dispatch by a handle", "combine"


def row_bytes(op: str, hidden: int) -> int:
    return 2 * hidden if op == COMBINE else hidden + hidden // 32


def title(options: Options, buffer: Buffer) -> str:
    layout = buffer.layout
    return (
        f"{layout.nodes} nodes x {layout.ranks_per_node}, {options.tokens}x{layout.hidden} a rank, "
        f"{layout.top_k} of {layout.num_experts} experts on at most {min(options.top_nodes, layout.nodes)} nodes"
    )


def rows_of(
    options: Options, buffer: Buffer, copies: Copies, times: dict[str, list[float]], device: torch.device
) -> list[Row]:
    found = []
    for op, seconds in times.items():
        lower, median, upper = spread(seconds)
        rates = copies.rates(row_bytes(op, options.hidden), median)
        note = "; ".join(f"{name} {rate:.1f} GB/s" for name, rate in zip(NAMES, rates, strict=True))
        found.append(
            Row(
                *("comm", f"{op}, torchrun", title(options, buffer), f"fastfp8 {options.way}"),
                "gpu" if device.type == "cuda" else "cpu",
                "us",
                *(median * 1e6, lower * 1e6, upper * 1e6),
                samples=len(seconds),
                config=str(buffer.settings or dist.get_backend()),
                rate=rates[0] if buffer.layout.nodes > 1 else rates[1],
                rate_unit="GB/s",
                note=f"{note}; the rate is as DeepEP states it",
            )
        )
    return found


NAMES = ("DeepEP, rail", "DeepEP, NVLink", "wire, rail", "wire, NVLink")


def table(options: Options, buffer: Buffer, copies: Copies, times: dict[str, list[float]]) -> str:
    n = options.tokens
    lines = [
        f"{title(options, buffer)}, way {options.way} ({buffer.settings or dist.get_backend()})",
        f"a token goes to {copies.nodes / n:.2f} nodes and {copies.ranks / n:.2f} ranks, its own among them",
        "",
        f"{'':<22}{'us':>10}{'quartiles':>20}" + "".join(f"{name:>16}" for name in NAMES),
    ]
    for op, seconds in times.items():
        lower, median, upper = (1e6 * t for t in spread(seconds))
        rates = copies.rates(row_bytes(op, options.hidden), median / 1e6)
        what = f"{op}, {'BF16' if op == COMBINE else 'FP8'}"
        cells = "".join(f"{rate:>16.2f}" for rate in rates)
        lines.append(f"{what:<25}{median:>7.0f}{f'{lower:.0f} to {upper:.0f}':>20}{cells}")
    return "\n".join([*lines, "", DEFINITIONS])
