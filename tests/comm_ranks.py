"""Virtual ranks of the all-to-all: the sm_90a kernels on emulated GPUs, from their launch plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from emulator import Counters, Launch, Machine
from emulator.plan import prepare_plan
from torch import Tensor

from fastfp8 import _C, ScaledTensor

NAN_BYTE = 0xFF
# Of a call and the ranks of its launch.
PlanOf = Callable[[_C.CommCall, int], _C.LaunchPlan]


def geometry(
    nodes: int,
    gpus: int,
    *,
    experts_each: int = 2,
    top_k: int = 2,
    hidden: int = 128,
    max_tokens: int = 8,
    capacity: int | None = None,
    channels: int = 1,
    link_slots: int = 1,
    rail_slots: int = 1,
    rail_chunk: int = 2,
) -> _C.CommGeometry:
    """Of the smallest rings, where nothing else is said, so that all of them wrap."""
    ranks = nodes * gpus
    return _C.CommGeometry(
        nodes=nodes,
        gpus=gpus,
        channels=channels,
        experts=ranks * experts_each,
        top_k=top_k,
        hidden=hidden,
        max_tokens=max_tokens,
        capacity=capacity or ranks * max_tokens * min(top_k, experts_each),
        link_slots=link_slots,
        rail_slots=rail_slots,
        rail_chunk=rail_chunk,
    )


@dataclass
class Received:
    """What dispatch left at one rank, and the routing that combine wants."""

    data: Tensor
    scale: Tensor | None
    offsets: Tensor
    routing: Tensor
    topk_idx: Tensor

    @property
    def rows(self) -> int:
        return int(self.offsets[-1])

    def recv(self) -> Tensor | ScaledTensor:
        if self.scale is None:
            return self.data[: self.rows]
        return ScaledTensor(self.data[: self.rows], self.scale[: self.rows], (1, 128))

    def weights(self, geometry: _C.CommGeometry) -> Tensor:
        return self.routing[geometry.weight_at :][: self.rows].view(torch.float32)


@dataclass
class Ranks:
    """The ranks of a geometry, each on a GPU of its own of one machine.

    Windows are full of NaNs but for their flags, which are zero at first, as all memory that a rank gives a kernel.
    """

    geometry: _C.CommGeometry
    seed: int = 0
    warps: int = 2
    timeout_us: int = 20_000
    rail_delay: int = 0
    ptx: str | None = None
    windows: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    counters: list[Counters] = field(default_factory=list)

    def __post_init__(self) -> None:
        g = self.geometry
        self.windows = [torch.zeros(g.window_bytes, dtype=torch.uint8) for _ in range(g.ranks)]
        self.states = [torch.zeros(g.state_words, dtype=torch.int32) for _ in range(g.ranks)]
        self.addresses = torch.tensor([w.data_ptr() for w in self.windows], dtype=torch.int64)
        self.machine = Machine(self.seed, g.ranks)

    def call(self, rank: int, **options: Any) -> _C.CommCall:
        return _C.CommCall(first_rank=rank, timeout_us=self.timeout_us, rail_delay=self.rail_delay, **options)

    def launch(
        self,
        plan_of: PlanOf,
        calls: Sequence[dict[str, Any]],
        tensors: Sequence[dict[str, Any]],
        without: Sequence[int] = (),
    ) -> None:
        """A launch for each rank with its call and tensors, all at the same time; ``without`` those of some."""
        launches: list[Launch] = []
        for rank, (call, own) in enumerate(zip(calls, tensors, strict=True)):
            if rank in without:
                continue
            plan = plan_of(self.call(rank, **call), 1)
            bound = {"windows": self.addresses, "state": self.states[rank], **own}
            launches.append(prepare_plan(plan, bound, self.machine, self.ptx, rank, self.windows))
        self.counters += self.machine.launch_all(launches)

    def statuses(self) -> list[dict[str, Any] | None]:
        at = self.geometry.status_at
        return [_C.comm_status([w & 0xFFFFFFFF for w in s[at : at + 7].tolist()]) for s in self.states]

    def exchange(self, topk_idxs: Sequence[Tensor], without: Sequence[int] = ()) -> list[Received]:
        g = self.geometry
        received = []
        for topk_idx in topk_idxs:
            received.append(
                Received(
                    torch.empty(0),
                    None,
                    torch.full((g.local_experts,), -1, dtype=torch.int32),
                    torch.full((g.routing_words,), 0x7FC0DEAD, dtype=torch.int32),
                    topk_idx,
                )
            )
        self.launch(
            lambda call, ranks: _C.comm_exchange_plan(g, call, ranks, self.warps),
            [{"tokens": len(r.topk_idx)} for r in received],
            [{"topk_idx": r.topk_idx, "routing": r.routing, "offsets": r.offsets} for r in received],
            without,
        )
        return received

    def send(
        self,
        received: Sequence[Received],
        xs: Sequence[Tensor | ScaledTensor],
        topk_weights: Sequence[Tensor] | None = None,
        *,
        quantize: bool = True,
        pow2: bool = False,
        without: Sequence[int] = (),
    ) -> None:
        g = self.geometry
        calls, tensors = [], []
        for rank, (r, x) in enumerate(zip(received, xs, strict=True)):
            scaled = isinstance(x, ScaledTensor)
            payload = "scaled" if scaled else "quantize" if quantize else "plain"
            own: dict[str, Any] = {"routing": r.routing, "topk_idx": r.topk_idx, "x": x.data if scaled else x}
            if scaled:
                own["x_scale"] = x.scale
            row_bytes = 2 * g.hidden if payload == "plain" else g.hidden
            r.data = torch.full((g.capacity, row_bytes), NAN_BYTE, dtype=torch.uint8)
            r.data = r.data.view(torch.bfloat16 if payload == "plain" else torch.float8_e4m3fn)
            own["recv"] = r.data
            if payload != "plain":
                blocks = g.hidden // 128
                r.scale = torch.full((blocks, g.scale_pitch), float("nan")).t()[: g.capacity]
                own["recv_scale"] = r.scale
            if topk_weights is not None:
                own["topk_weights"] = topk_weights[rank]
            pitch = x.scale.stride(1) if scaled and len(r.topk_idx) else 0
            weighted = topk_weights is not None
            calls.append({"tokens": len(r.topk_idx), "scale_pitch": pitch, "pow2": pow2, "weighted": weighted})
            tensors.append(own)
        self.launch(
            lambda call, ranks: _C.comm_dispatch_plan(g, call, payload, ranks, self.warps), calls, tensors, without
        )

    def combine(
        self,
        received: Sequence[Received],
        expert_outs: Sequence[Tensor],
        *,
        weighted: bool = True,
        without: Sequence[int] = (),
    ) -> list[Tensor]:
        g = self.geometry
        ys = [torch.full((len(r.topk_idx), g.hidden), float("nan"), dtype=torch.bfloat16) for r in received]
        padded = [behind(out, g.capacity) for out in expert_outs]
        tensors = [{"expert_out": out, "y": y} for out, y in zip(padded, ys, strict=True)]
        self._bring_back(received, {"weighted": weighted}, tensors, without)
        return ys

    def bring_back(self, received: Sequence[Received], row_values: Sequence[Tensor]) -> list[Tensor]:
        """For each slot the value of its row."""
        g = self.geometry
        values = [torch.full((len(r.topk_idx), g.top_k), float("nan")) for r in received]
        padded = [behind(of_rows, g.capacity) for of_rows in row_values]
        tensors = [{"row_values": of_rows, "values": out} for of_rows, out in zip(padded, values, strict=True)]
        self._bring_back(received, {"sums": False, "values": True}, tensors)
        return values

    def _bring_back(
        self,
        received: Sequence[Received],
        options: dict[str, bool],
        tensors: Sequence[dict[str, Any]],
        without: Sequence[int] = (),
    ) -> None:
        self.launch(
            lambda call, ranks: _C.comm_combine_plan(self.geometry, call, ranks, self.warps),
            [{"tokens": len(r.topk_idx), **options} for r in received],
            [{"routing": r.routing, "topk_idx": r.topk_idx, **own} for r, own in zip(received, tensors, strict=True)],
            without,
        )


def behind(rows: Tensor, capacity: int) -> Tensor:
    """The rows with NaNs up to the capacity."""
    return torch.cat([rows, rows.new_full((capacity - len(rows), *rows.shape[1:]), float("nan"))])


class Loopback(Ranks):
    """All ranks in one launch on one GPU, each with CTAs of its own. All have the same number of tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.machine = Machine(self.seed, 1)

    def launch(
        self,
        plan_of: PlanOf,
        calls: Sequence[dict[str, Any]],
        tensors: Sequence[dict[str, Any]],
        without: Sequence[int] = (),
    ) -> None:
        assert not without
        assert all(call == calls[0] for call in calls)
        owns = [{"state": state, **own} for state, own in zip(self.states, tensors, strict=True)]
        stacked = {slot: torch.stack([memory_of(own[slot]).view(torch.uint8) for own in owns]) for slot in owns[0]}
        plan = plan_of(self.call(0, **calls[0]), self.geometry.ranks)
        bound = {"windows": self.addresses, **stacked}
        self.counters += self.machine.launch_all([prepare_plan(plan, bound, self.machine, self.ptx, 0, self.windows)])
        for rank, own in enumerate(owns):
            for slot, tensor in own.items():
                written = stacked[slot][rank].view(tensor.dtype)
                by_columns = written.shape != tensor.shape
                tensor.copy_(written[:, : len(tensor)].t() if by_columns else written)


def memory_of(x: Tensor) -> Tensor:
    """The rows of a tensor behind one another, or its columns where they are what is dense, with their padding."""
    if x.dim() != 2 or x.stride(1) == 1:
        return x
    return F.pad(x.t(), (0, x.stride(1) - x.shape[0]), value=float("nan"))
