"""Dispatch and combine of ranks that one GPU stands for, in one launch: our kernels without a network, beside torch.

All that ranks send one another goes through this GPU's memory, so times say what the kernels' warps can move and
synchronise, and nothing of NVLink or InfiniBand. The bytes of a row are the least: each token read once, each row
written once, and for combine the reverse. So its share of the measured copy bandwidth is that of the payload, whatever
went through the rings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfp8 import _C, ScaledTensor, quantize
from fastfp8.comm import loopback, tune
from fastfp8.comm.kernels import KernelRouting, Kernels

from . import device
from .case import Case, Contestant, Subject, Work
from .device import require
from .shapes import EXPERTS

MODEL = EXPERTS[0]  # DeepSeek-V3
BACKEND = "fastfp8 sm_90a"
#: Sums of combine against FP32's: each of three roundings to BF16 is at most 2^-9 of what it rounds.
TOLERANCE = 2.0**-6


@dataclass(frozen=True)
class Size:
    """Of each rank ``tokens``; ``channels`` None for as many as the GPU has SMs for, but at most MOST_CHANNELS."""

    nodes: int = 2
    gpus: int = 4
    tokens: int = 4096
    hidden: int = MODEL.hidden
    experts: int = MODEL.count
    top_k: int = MODEL.top_k
    channels: int | None = None
    warps: int = 16

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    def __str__(self) -> str:
        tokens = f"{self.tokens}x{self.hidden} a rank"
        return f"{self.nodes} nodes x {self.gpus}, {tokens}, {self.top_k} of {self.experts} experts"


MOST_CHANNELS = 10  # 20 SMs a rank, as the report has
TINY = Size(2, 2, 4, 128, 8, 2, 1, 2)


def channels_of(size: Size, sms: int) -> int:
    """As many as all ranks have room for."""
    return min(MOST_CHANNELS, sms // (loopback.CTAS_OF_A_CHANNEL * size.ranks))


class Ranks:
    """Tokens of all ranks, where they go, and what must come."""

    def __init__(self, size: Size, where: torch.device) -> None:
        self.size, self.where = size, where
        generator = torch.Generator().manual_seed(0)
        shape = (size.ranks, size.tokens, size.experts)
        self.idx = torch.rand(shape, generator=generator).topk(size.top_k).indices.int().to(where)
        self.weights = torch.full(self.idx.shape, 1 / size.top_k, device=where)
        given = torch.Generator(where).manual_seed(0)
        self.x = torch.randn(
            (size.ranks, size.tokens, size.hidden), generator=given, device=where, dtype=torch.bfloat16
        )
        # Rows lie by expert, within an expert by rank, token and slot.
        experts, order = self.idx.flatten().sort(stable=True)
        self.tokens = order // size.top_k
        self.place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=where))
        self.rows = torch.bincount(experts * size.ranks // size.experts, minlength=size.ranks).tolist()
        self.kernels = self._kernels()

    def _kernels(self) -> Kernels:
        size = self.size
        name = torch.cuda.get_device_name(self.where) if self.where.type == "cuda" else ""
        channels = size.channels
        if channels is None:
            channels = channels_of(size, torch.cuda.get_device_properties(self.where).multi_processor_count)
        chosen = tune.defaults(
            *(size.nodes, size.gpus, size.hidden, size.top_k, name),
            experts=size.experts,
            max_tokens=size.tokens,
            num_sms=2 * channels,
        )
        geometry = _C.CommGeometry(
            nodes=size.nodes,
            gpus=size.gpus,
            channels=channels,
            experts=size.experts,
            top_k=size.top_k,
            hidden=size.hidden,
            max_tokens=size.tokens,
            capacity=max(self.rows),
            link_slots=chosen.link_slots,
            rail_slots=chosen.rail_slots,
            rail_chunk=chosen.rail_chunk,
        )
        return loopback.loopback(geometry, self.where, warps=size.warps)

    @property
    def config(self) -> str:
        g = self.kernels.geometry
        return f"{g.ranks} ranks x {2 * g.channels} SMs of {self.size.warps} warps"

    def of_ranks(self, rows: Tensor) -> list[Tensor]:
        """What each rank has of rows that are one rank's after the other's."""
        return list(torch.split(rows, self.rows))

    def given(self) -> Tensor:
        """The tokens of every row, BF16, by rank with room for the fullest: what experts that do nothing put out."""
        outs = torch.zeros((self.size.ranks, max(self.rows), self.size.hidden), device=self.where, dtype=torch.bfloat16)
        flat = self.x.flatten(0, 1)
        for out, tokens in zip(outs, self.of_ranks(self.tokens), strict=True):
            torch.index_select(flat, 0, tokens, out=out[: len(tokens)])
        return outs

    def check_exchange(self, routing: KernelRouting) -> None:
        self.kernels.check()
        counts = torch.bincount(self.idx.flatten(), minlength=self.size.experts).view(self.size.ranks, -1)
        assert torch.equal(routing.offsets.long(), counts.cumsum(1)), "other rows than the counts say"

    def check_dispatch(self, recv: Any) -> None:
        """Bit for bit the quantised tokens, in order."""
        assert isinstance(recv, ScaledTensor)
        self.kernels.check()
        expected = quantize(self.x.flatten(0, 1))
        for rank, tokens in enumerate(self.of_ranks(self.tokens)):
            n, wrong = len(tokens), f"rank {rank} did not get the rows meant for it"
            assert torch.equal(codes_of(recv)[rank, :n], codes_of(expected)[tokens]), wrong
            assert torch.equal(recv.scale[rank, :n], expected.scale[tokens]), wrong

    def check_combine(self, y: Any) -> None:
        """Each token again, for its rows are copies and its weights sum to one."""
        self.kernels.check()
        apart = (y.float() - self.x.float()).abs() <= TOLERANCE * self.x.float().abs()
        assert bool(apart.all()), "sums are not the tokens again"


def codes_of(t: ScaledTensor) -> Tensor:
    return t.data.view(torch.uint8)


def subject(op: str, size: Size, where: torch.device) -> Subject:
    if where.type == "cuda":
        reason = _C.gemm_sm90_unusable_reason(where.index or 0)
        require(not reason, reason)
    ranks = Ranks(size, where)
    kernels, hidden = ranks.kernels, size.hidden
    tokens, rows = size.ranks * size.tokens, len(ranks.tokens)

    def ours(run: Callable[[int], Any], check: Callable[[Any], None]) -> Contestant:
        return Contestant(BACKEND, run, check, config=ranks.config)

    if op == "exchange":
        return Subject([ours(lambda i: kernels.exchange(ranks.idx, ranks.weights), ranks.check_exchange)])
    routing = kernels.exchange(ranks.idx, ranks.weights)
    if op == "dispatch":
        flat = ranks.x.flatten(0, 1)
        found = [
            ours(lambda i: kernels.dispatch(ranks.x, routing, quantize=True), ranks.check_dispatch),
            Contestant("torch index_select, BF16", lambda i: flat.index_select(0, ranks.tokens)),
        ]
        moved = tokens * 2 * hidden + rows * (hidden + hidden // 32)
    else:
        kernels.dispatch(ranks.x, routing, quantize=True)  # by which combine knows the rows of each token
        outs = ranks.given()
        flat = torch.cat([out[:n] for out, n in zip(outs, ranks.rows, strict=True)])
        found = [
            ours(lambda i: kernels.combine(outs, routing, weighted=True), ranks.check_combine),
            Contestant("torch index_select, mean", lambda i: _means(flat, ranks), ranks.check_combine),
        ]
        moved = (tokens + rows) * 2 * hidden
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    found.append(Contestant("torch copy_, as many bytes", lambda i: target.copy_(source)))
    return Subject(found, bytes=float(moved))


def _means(flat: Tensor, ranks: Ranks) -> Tensor:
    size = ranks.size
    picked = flat.index_select(0, ranks.place).view(size.ranks, size.tokens, size.top_k, size.hidden)
    return picked.mean(2, dtype=torch.float32).to(flat.dtype)


def works(tiny: bool) -> list[Work]:
    size = TINY if tiny else Size()
    return [
        Case(
            *("comm", f"{op}, loopback", str(size), "gpu"),
            functools.partial(subject, op, size, device.DEVICE),
            *(priority, "us"),
        )
        for op, priority in (("dispatch", 0), ("combine", 0), ("exchange", 1))
    ]
