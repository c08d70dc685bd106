"""Token exchange between ranks: dispatch and combine of fastfp8.comm through a process group, beside what torch has.

Each token goes once to every rank that has one of its experts. ``all_to_all_single`` moves it as BF16, one way, between
buffers that are ready; dispatch quantises, tells counts and slots, and places rows; combine sums rows and brings one
sum a token and rank back. Ranks are processes of this machine: over gloo on the CPU, over NCCL where there are at least
two GPUs. On one GPU the kernels are measured that stand for all ranks (``comm_loopback.py``); what torchrun starts
measures the ranks that there are (``comm_torchrun.py``).
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from fastfp8 import ScaledTensor, quantize
from fastfp8.comm import Buffer

from . import comm_loopback
from .case import Computed, Session, Unavailable, Work
from .rows import Row, spread
from .shapes import EXPERTS

TIMEOUT_S = 90.0  # for all of a case, start of the processes included
COLD_BYTES = 1 << 28  # several times any L2
BASELINE = "all_to_all_single"
OPS = (BASELINE, "dispatch", "combine")
MODEL = EXPERTS[0]  # DeepSeek-V3


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What every rank is told. The tokens are a rank's."""

    op: str
    backend: str  # torch's name
    world: int
    tokens: int
    hidden: int
    rounds: int
    rendezvous: str

    def experts_of(self, rank: int) -> Tensor:
        """Which ``top_k`` experts each token of a rank goes to, at random: [tokens, top_k]."""
        generator = torch.Generator().manual_seed(rank)
        return torch.rand(self.tokens, MODEL.count, generator=generator).topk(MODEL.top_k).indices

    def sent(self, source: int, target: int) -> Tensor:
        """The tokens of ``source`` that ``target`` has an expert for, by their index."""
        share = -(-MODEL.count // self.world)
        return (self.experts_of(source) // share == target).any(1).nonzero()[:, 0]

    @property
    def token_bytes(self) -> int:
        """Of one copy on its way, without what says where it goes."""
        return self.hidden + self.hidden // 32 if self.op == "dispatch" else 2 * self.hidden

    def tokens_of(self, rank: int, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(rank)
        return torch.randn(self.tokens, self.hidden, generator=generator, device=device, dtype=torch.bfloat16)


def works(tiny: bool) -> list[Work]:
    found: list[Work] = comm_loopback.works(tiny)
    # Tokens a rank: of training or prefill, of decoding, and as many as a CPU moves in good time.
    for backend, tokens, priority in (("nccl", 4096, 0), ("nccl", 128, 0), ("gloo", 512, 1)):
        tokens, hidden = (tokens // 32, 256) if tiny else (tokens, MODEL.hidden)
        for op in OPS:
            format_ = "FP8" if op == "dispatch" else "bfloat16"
            shape = f"{tokens}x{hidden} {format_} a rank, {MODEL.top_k} of {MODEL.count} experts"
            exchange = Exchange(op, backend, 0, tokens, hidden, 0, "")
            measure = functools.partial(_measure, exchange, shape)
            found.append(Computed(f"{op}, {backend}", shape, measure, priority if op == BASELINE else 2))
    return found


def _measure(exchange: Exchange, shape: str, session: Session) -> list[Row]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    nccl = exchange.backend == "nccl"
    if nccl and gpus < 2:
        raise Unavailable(f"NCCL between GPUs needs two, and there are {gpus}")
    world = gpus if nccl else max(2, min(4, len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        exchange = dataclasses.replace(exchange, world=world, rounds=session.samples, rendezvous=rendezvous)
        times = run_ranks(exchange)
    # A rank's bytes that leave it, on average, each way.
    copies = sum(len(exchange.sent(s, t)) for s in range(world) for t in range(world) if s != t)
    bytes_out = copies * exchange.token_bytes / world
    lower, median, upper = spread(times)
    row = Row(
        *("comm", f"{exchange.op}, {exchange.backend}", shape, exchange.backend, "gpu" if nccl else "cpu", "ms"),
        *(median * 1e3, lower * 1e3, upper * 1e3, len(times)),
        config=f"{world} ranks",
        rate=bytes_out / median / 1e9,
        rate_unit="GB/s",
        note="one way, until the slowest rank has all; the rate is of what leaves a rank for others",
    )
    return [row]


def run_ranks(exchange: Exchange, timeout: float = TIMEOUT_S) -> list[float]:
    """Seconds of each round, of its slowest rank. No process is left when this returns or raises.

    Raises:
        RuntimeError: a rank failed, with its traceback.
        TimeoutError: they did not come to an end in time.
    """
    context = multiprocessing.get_context("spawn")
    reports: Any = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, exchange, reports), daemon=True) for r in range(exchange.world)]
    started, deadline, patience = [], time.monotonic() + timeout, 0.0
    try:
        for process in ranks:
            process.start()
            started.append(process)
        times = _await(started, reports, deadline)
        patience = 10.0  # to come to an orderly end; after a failure there is nothing to wait for
        return times
    finally:
        for process in started:
            process.join(patience)
            if process.is_alive():
                process.kill()
                process.join()


def _await(ranks: Sequence[Any], reports: Any, deadline: float) -> list[float]:
    while True:
        try:
            failure, times = reports.get(timeout=0.2)
        except queue.Empty:
            died = [f"rank {i} died with status {p.exitcode}" for i, p in enumerate(ranks) if p.exitcode]
            if died:
                raise RuntimeError(", ".join(died)) from None
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(ranks)} ranks came to no end in time") from None
            continue
        if failure:
            raise RuntimeError(failure)
        return list(times)


def _rank(rank: int, exchange: Exchange, reports: Any) -> None:
    """One rank, in a process of its own; the first reports the times."""
    try:
        times = _exchange(rank, exchange)
        if rank == 0:
            reports.put((None, times))
    except Exception:
        reports.put((f"rank {rank}:\n{traceback.format_exc()}", None))


def _exchange(rank: int, exchange: Exchange) -> list[float]:
    torch.set_num_threads(1)
    gpu = exchange.backend == "nccl"
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo wants the host's name to resolve
    limit = datetime.timedelta(seconds=TIMEOUT_S)  # an orphan ends too
    dist.init_process_group(exchange.backend, exchange.rendezvous, limit, exchange.world, rank)
    try:
        step = _baseline(rank, exchange, device) if exchange.op == BASELINE else _step(rank, exchange, device)
        scratch = torch.empty(COLD_BYTES if gpu else 0, dtype=torch.uint8, device=device)
        return [_slowest(_timed(step, scratch), device) for _ in range(exchange.rounds)]
    finally:
        dist.destroy_process_group()


def _baseline(rank: int, exchange: Exchange, device: torch.device) -> Callable[[], Any]:
    """all_to_all_single of rows that lie ready, once it was seen to be right."""
    everyone = range(exchange.world)
    own = exchange.tokens_of(rank, device)
    out = torch.cat([own[exchange.sent(rank, target).to(device)] for target in everyone])
    sizes = [len(exchange.sent(rank, target)) for target in everyone]
    origins = [exchange.sent(source, rank) for source in everyone]
    into = torch.full((sum(map(len, origins)), exchange.hidden), torch.nan, device=device, dtype=torch.bfloat16)
    step = functools.partial(dist.all_to_all_single, into, out, [len(o) for o in origins], sizes)
    step()
    expected = [exchange.tokens_of(s, device)[o.to(device)] for s, o in zip(everyone, origins, strict=True)]
    assert torch.equal(into, torch.cat(expected)), f"rank {rank} did not get the tokens meant for it"
    return step


def _step(rank: int, exchange: Exchange, device: torch.device) -> Callable[[], Any]:
    """dispatch or combine, once it was seen to be right."""
    experts, tokens = exchange.experts_of(rank).to(device), exchange.tokens_of(rank, device)
    weights = torch.full(experts.shape, 1 / MODEL.top_k, device=device)
    buffer = Buffer(
        hidden=exchange.hidden,
        num_experts=MODEL.count,
        top_k=MODEL.top_k,
        max_tokens=exchange.tokens,
        timeout=TIMEOUT_S,
    )
    recv, offsets, handle = buffer.dispatch(tokens, experts, weights)
    assert isinstance(recv, ScaledTensor)
    local = MODEL.count // exchange.world
    given = [
        (exchange.experts_of(s).to(device), quantize(exchange.tokens_of(s, device))) for s in range(exchange.world)
    ]
    places = [
        (x8, (index == expert).nonzero()[:, 0])
        for expert in range(rank * local, (rank + 1) * local)
        for index, x8 in given
    ]
    rows = int(offsets[-1])
    for got, expected in (
        (recv.data, [x8.data.view(torch.uint8)[token] for x8, token in places]),
        (recv.scale, [x8.scale[token] for x8, token in places]),
    ):
        same = torch.equal(got[:rows].view(expected[0].dtype), torch.cat(expected))
        assert same, f"rank {rank} did not get the rows meant for it"
    if exchange.op == "dispatch":
        return functools.partial(buffer.dispatch, tokens, experts, weights)
    outs = recv.dequantize(torch.bfloat16)
    y = buffer.combine(outs, handle)
    # Weights are 1/8 and experts do nothing: sums are the token in FP8 again, but for the roundings of partial sums.
    exact = quantize(tokens).dequantize()
    assert ((y.float() - exact).abs() <= exact.abs() / 64).all(), f"rank {rank} did not get its sums"
    return functools.partial(buffer.combine, outs, handle)


def _timed(step: Callable[[], Any], scratch: Tensor) -> float:
    """Seconds of one exchange that all ranks begin together; on a GPU ``scratch`` first drives all else out of L2."""
    dist.barrier()
    if not scratch.is_cuda:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    scratch.zero_()
    first.record()
    step()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def _slowest(seconds: float, device: torch.device) -> float:
    value = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)
