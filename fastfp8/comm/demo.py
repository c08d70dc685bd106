"""Dispatch and combine between processes, on the routing of fastfp8.route, checked against the oracle.

    torchrun --nproc_per_node 4 -m fastfp8.comm.demo
    python -m fastfp8.comm.demo --ranks 4

The second starts the ranks itself. Prints the tokens of each rank and expert, the bytes over each kind of link, times
and memory. Exits with an error where a bit is wrong. On one machine all links are gloo's sockets; which of them would
be NVLink and which InfiniBand, ``--nodes`` says.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from .. import ScaledTensor, quantize, route
from ..reference import comm as reference
from .buffer import Buffer

_TIMEOUT_S = 120.0


class Options(NamedTuple):
    """Those of the command line."""

    ranks: int
    nodes: int
    top_nodes: int
    experts: int
    top_k: int
    tokens: int
    hidden: int
    repeats: int


class Result(NamedTuple):
    """What one rank got, as bytes, and how long it took."""

    recv: dict[str, Tensor]
    sums: Tensor
    of_experts: list[int]
    copies: Tensor
    seconds: dict[str, float]


def _options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m fastfp8.comm.demo", description=(__doc__ or "").split("\n")[0])
    defaults = Options(ranks=4, nodes=2, top_nodes=2, experts=32, top_k=8, tokens=96, hidden=1024, repeats=5)
    helps = {
        "ranks": "processes to start; torchrun says it where that is used",
        "nodes": "nodes that the ranks make up",
        "top_nodes": "nodes that a token may go to",
        "tokens": "tokens of the first rank; each further one has a seventh fewer",
        "repeats": "times that each step is timed",
    }
    for name, value in defaults._asdict().items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=value, help=f"{helps.get(name, '')} (default {value})".strip())
    return Options(**vars(parser.parse_args(argv)))


def tokens_and_routing(options: Options, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a rank, the experts that its gate chooses, and their weights. Any rank can make those of all."""
    generator = torch.Generator().manual_seed(rank)
    shape = (max(options.tokens - rank * options.tokens // 7, 0), options.hidden)
    x = torch.randn(shape, generator=generator).bfloat16()
    gate = torch.randn((options.hidden, options.experts), generator=torch.Generator().manual_seed(1 << 20))
    chosen = route(
        x.float() @ gate / options.hidden**0.5,
        torch.zeros(options.experts),
        top_k=options.top_k,
        groups=options.nodes,
        top_groups=options.top_nodes,
        scale=2.5,
    )
    return x, chosen.topk_idx, chosen.topk_weights


def _timed(step: Callable[[], object], repeats: int) -> float:
    """The median of seconds; ranks begin together."""
    taken = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def _work(options: Options, buffer: Buffer) -> Result:
    """Dispatch, experts that do nothing but dequantise, combine."""
    x, topk_idx, topk_weights = tokens_and_routing(options, dist.get_rank())
    recv, offsets, handle = buffer.dispatch(x, topk_idx, topk_weights)
    assert isinstance(recv, ScaledTensor)
    outs = recv.dequantize(torch.bfloat16)
    sums = buffer.combine(outs, handle)
    x8 = quantize(x)
    seconds = {
        "dispatch": _timed(lambda: buffer.dispatch(x, topk_idx, topk_weights), options.repeats),
        "dispatch of FP8 by a handle": _timed(lambda: buffer.dispatch(x8, handle=handle), options.repeats),
        "combine": _timed(lambda: buffer.combine(outs, handle), options.repeats),
    }
    rows = int(offsets[-1])
    got = {"codes": recv.data[:rows], "scales": recv.scale[:rows], "weights": handle.recv_weights[:rows]}
    of_experts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return Result({name: _bytes(t) for name, t in got.items()}, _bytes(sums), of_experts, handle.copies, seconds)


def _wrong(options: Options, results: list[Result]) -> list[str]:
    """What differs from the oracle."""
    inputs = [tokens_and_routing(options, rank) for rank in range(len(results))]
    xs, indices, weights = ([given[part] for given in inputs] for part in range(3))
    expected = reference.dispatch(xs, indices, weights, num_experts=options.experts)
    wrong, outs = [], []
    for rank, (want, got) in enumerate(zip(expected, results, strict=True)):
        assert isinstance(want.recv, ScaledTensor)
        outs.append(want.recv.dequantize(torch.bfloat16))
        parts = {"codes": want.recv.data, "scales": want.recv.scale, "weights": want.recv_weights}
        wrong += [f"{name} of rank {rank}" for name, t in parts.items() if not torch.equal(_bytes(t), got.recv[name])]
    of_node = len(results) // options.nodes
    sums = reference.combine(outs, [want.placement for want in expected], ranks_per_node=of_node)
    same = [torch.equal(_bytes(want), got.sums) for want, got in zip(sums, results, strict=True)]
    return wrong + [f"sums of rank {rank}" for rank, equal in enumerate(same) if not equal]


def _print(options: Options, results: list[Result], buffer: Buffer) -> None:
    layout, world = buffer.layout, len(results)
    print(
        f"{world} ranks on {layout.nodes} nodes, {layout.num_experts} experts, top {layout.top_k} on at most "
        f"{options.top_nodes} nodes, hidden {layout.hidden}"
    )
    indices = [tokens_and_routing(options, rank)[1] for rank in range(world)]
    print("\nrank  tokens  rows  rows of its experts")
    for rank, result in enumerate(results):
        counts = result.of_experts
        print(f"{rank:>4}  {len(indices[rank]):>6}  {sum(counts):>4}  {' '.join(map(str, counts))}")

    copies, node = results[0].copies, torch.arange(world) // layout.ranks_per_node
    same_node = node[:, None] == node[None, :]
    near, far = int(copies[same_node].sum() - copies.diagonal().sum()), int(copies[~same_node].sum())
    least = reference.copies(indices, num_experts=layout.num_experts, ranks_per_node=layout.ranks_per_node)
    print("\nMB over each kind of link          dispatch, FP8        combine, BF16")
    print("                                   NVLink       IB      NVLink       IB")
    ways = {
        "here, straight to each rank": (near, far),
        "least, once to each node": (int(least.nvlink.sum()), int(least.ib.sum())),
    }
    for name, tokens in ways.items():
        cells = [n * reference.token_bytes(layout.hidden, fp8) / 1e6 for fp8 in (True, False) for n in tokens]
        print(f"{name:<32}{cells[0]:>9.3f}{cells[1]:>9.3f}{cells[2]:>12.3f}{cells[3]:>9.3f}")

    print("\nms, median of the slowest rank")
    for step in results[0].seconds:
        print(f"{step:<32}{max(result.seconds[step] for result in results) * 1e3:>9.2f}")
    print(f"\n{buffer.memory()}")


def run(options: Options) -> bool:
    """The demo on each rank of the default group; the first prints. Whether every bit was right."""
    world = dist.get_world_size()
    with Buffer(
        hidden=options.hidden,
        num_experts=options.experts,
        top_k=options.top_k,
        max_tokens=options.tokens,
        ranks_per_node=world // options.nodes,
        timeout=_TIMEOUT_S,
    ) as buffer:
        gathered: list[Result | None] = [None] * world
        dist.all_gather_object(gathered, _work(options, buffer))
        results = [result for result in gathered if result is not None]
        if dist.get_rank():
            return True
        _print(options, results, buffer)
        wrong = _wrong(options, results)
        print("\nagainst the oracle: " + ("; ".join(wrong) if wrong else "every bit of every rank is equal"))
        return not wrong


def _rank(rank: int, options: Options, rendezvous: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("gloo", rendezvous, limit, options.ranks, rank)
    right = run(options)
    dist.destroy_process_group()
    if not right:
        raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> None:
    options = _options(argv)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=_TIMEOUT_S))
        right = run(options._replace(ranks=dist.get_world_size()))
        dist.destroy_process_group()
        raise SystemExit(not right)
    with tempfile.TemporaryDirectory() as folder:
        args = (options, f"file://{folder}/rendezvous")
        multiprocessing.spawn(_rank, args, options.ranks)  # type: ignore[attr-defined,no-untyped-call]


if __name__ == "__main__":
    main()
