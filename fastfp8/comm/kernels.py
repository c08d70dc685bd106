"""The sm_90a kernels of dispatch and combine: launches, and the memory that they work in (csrc/comm).

    exchange   counts of all ranks -> where each row goes          once a routing
    dispatch   tokens -> rows of recv                              any number of times a routing
    combine    rows -> their sums, or a value for each slot        likewise

A call launches and returns: nothing here waits for the GPU. What a kernel finds wrong it writes to its status, of which
a copy comes to the host behind each launch. :meth:`Kernels.raise_seen` raises what has come; a launch only does after a
Timeout, because the other ranks wait for it.

One launch may be of several ranks, of which one GPU stands for all (:mod:`fastfp8.comm.loopback`): then each tensor has
them as its first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..errors import value_error
from ..layout import BLOCK, Block, pad4
from ..scaled_tensor import ScaledTensor
from .errors import Overflow, Timeout

_BLOCK: Block = (1, BLOCK)
STATUS_WORDS = 7
# Runs a plan on the tensors of its slots.
Launcher = Callable[[_C.LaunchPlan, Mapping[str, Tensor]], None]


def launch_on_stream(plan: _C.LaunchPlan, tensors: Mapping[str, Tensor]) -> None:
    """On the current stream of the tensors' GPU."""
    device = tensors["state"].device
    with torch.cuda.device(device):
        addresses = {slot: tensor.data_ptr() for slot, tensor in tensors.items()}
        _C.launch(plan, addresses, torch.cuda.current_stream(device).cuda_stream)


@dataclass(frozen=True)
class KernelRouting:
    """Where tokens go and where rows come from: what a handle keeps, on the GPU."""

    words: Tensor
    """int32 [routing_words]: the tables of csrc/comm/layout.h, RoutingLayout."""
    topk_idx: Tensor
    """int32 [T, top_k]."""
    topk_weights: Tensor | None
    """float32 [T, top_k], which every dispatch sends again."""
    offsets: Tensor
    """int32 [local experts]: the row at which each expert ends."""
    weights: Tensor
    """float32 [capacity]: a view of ``words``; unspecified past the last row."""
    counts: Tensor | None = None
    copies: None = None

    @property
    def tokens(self) -> int:
        return self.topk_idx.shape[-2]


class Kernels:
    """One rank's launches, or those of ranks on one GPU.

    Args:
        geometry: what all ranks agreed on.
        rank: this one, or the first.
        windows: int64 [ranks]: the addresses of the ranks' windows, each ``geometry.window_bytes`` of zeros at first;
            0 for those that only a network reaches.
        state: int32 [geometry.state_words], or [ranks, geometry.state_words] for several, zeros at first.
        timeout: seconds that a role may wait.
        warps: of a CTA.
        rail: what lies between nodes: "loopback", memory, or "nccl", NCCL's device API (untested on silicon).
        rail_constants: of the ``_C.CommNccl`` that made the windows, for "nccl".
        rail_delay: nanoseconds that messages of the loopback may sleep on their way, to overtake one another.
        launch: runs a plan.
    """

    def __init__(
        self,
        geometry: _C.CommGeometry,
        rank: int,
        windows: Tensor,
        state: Tensor,
        *,
        timeout: float,
        warps: int = 16,
        rail: str = "loopback",
        rail_constants: bytes = b"",
        rail_delay: int = 0,
        launch: Launcher = launch_on_stream,
    ) -> None:
        self.geometry, self.rank, self.windows, self.state = geometry, rank, windows, state
        self.timeout, self.rail_delay, self.launch = timeout, rail_delay, launch
        self.trace: Tensor | None = None
        """int32: where traced kernels write what they do (fastfp8/comm/timeline.py); None for those that do not."""
        self._ranks = state.shape[:-1]
        ranks = self._ranks.numel()
        self._how: dict[str, Any] = {"ranks": ranks, "warps": warps, "rail": rail, "rail_constants": rail_constants}
        self._seen = torch.zeros((ranks, STATUS_WORDS), dtype=torch.int32, pin_memory=state.is_cuda)
        self.keeps: object = None  # what must live as long as the windows are used

    def exchange(self, topk_idx: Tensor, topk_weights: Tensor | None) -> KernelRouting:
        """The routing of [T, top_k] indices. All ranks must come."""
        g, device = self.geometry, topk_idx.device
        words = torch.empty((*self._ranks, g.routing_words), dtype=torch.int32, device=device)
        offsets = torch.empty((*self._ranks, g.local_experts), dtype=torch.int32, device=device)
        weights = words[..., g.weight_at : g.weight_at + g.capacity].view(torch.float32)
        index = topk_idx.to(torch.int32).contiguous()
        routing = KernelRouting(words, index, topk_weights, offsets, weights)
        plan = _C.comm_exchange_plan(g, self._call(routing), **self._instance())
        self._launch(plan, {"routing": words, "topk_idx": index, "offsets": offsets})
        return routing

    def dispatch(
        self, x: Tensor | ScaledTensor, routing: KernelRouting, *, quantize: bool, pow2: bool = False
    ) -> Tensor | ScaledTensor:
        """The rows of ``x`` [T, hidden], BF16 or FP8 in (1, 128) blocks, at their experts: recv [capacity, hidden]."""
        g = self.geometry
        payload = "scaled" if isinstance(x, ScaledTensor) else "quantize" if quantize else "plain"
        tensors: dict[str, Tensor] = {"routing": routing.words, "topk_idx": routing.topk_idx}
        pitch = 0
        if isinstance(x, ScaledTensor):
            scale = x.scale if x.scale.stride(-2) == 1 else x.scale.mT.contiguous().mT
            pitch = scale.stride(-1)
            tensors |= {"x": x.data.contiguous(), "x_scale": scale}
        else:
            tensors["x"] = x.contiguous()
        if routing.topk_weights is not None:
            tensors["topk_weights"] = routing.topk_weights
        kind = torch.bfloat16 if payload == "plain" else torch.float8_e4m3fn
        recv = torch.empty((*self._ranks, g.capacity, g.hidden), dtype=kind, device=self.state.device)
        tensors["recv"] = recv
        if payload != "plain":
            blocks = torch.empty((*self._ranks, g.hidden // BLOCK, pad4(g.capacity)), device=self.state.device)
            tensors["recv_scale"] = blocks[..., : g.capacity].mT
        call = self._call(routing, scale_pitch=pitch, pow2=pow2, weighted=routing.topk_weights is not None)
        self._launch(_C.comm_dispatch_plan(g, call, payload, **self._instance()), tensors)
        if payload == "plain":
            return recv
        return ScaledTensor._trusted(recv, tensors["recv_scale"], _BLOCK)

    def combine(self, rows: Tensor, routing: KernelRouting, *, weighted: bool, out: Tensor | None = None) -> Tensor:
        """The sums of BF16 ``rows`` [capacity, hidden] for each token: BF16 [T, hidden]."""
        if out is None:
            shape = (*self._ranks, routing.tokens, self.geometry.hidden)
            out = torch.empty(shape, dtype=torch.bfloat16, device=rows.device)
        call = self._call(routing, weighted=weighted)
        self._bring_back(call, routing, {"expert_out": rows.contiguous(), "y": out})
        return out

    def bring_back(self, row_values: Tensor, routing: KernelRouting) -> Tensor:
        """For each slot the value of its row, 0 where it has none: float32 [capacity] to [T, top_k]."""
        values = torch.empty(routing.topk_idx.shape, device=row_values.device)
        call = self._call(routing, sums=False, values=True)
        self._bring_back(call, routing, {"row_values": row_values.contiguous(), "values": values})
        return values

    def survived(self) -> bool:
        """Wait for the GPU; whether nobody ran out of time."""
        if self.state.is_cuda:
            torch.cuda.synchronize(self.state.device)
        self._seen.copy_(self._status())
        return not self._timed_out()

    def check(self) -> None:
        """Raise what the kernels have reported so far. Waits for the GPU."""
        self._seen.copy_(self._status())
        self.raise_seen()

    def raise_seen(self) -> None:
        """Raise what has come to the host of it. Does not wait. After a Timeout, nothing works any more; other errors
        are raised once."""
        troubled = self._found()
        if troubled is None:
            return
        place, found = troubled
        rank = self.rank + place
        if found["trouble"] != "timeout":
            self._seen[place] = 0
            self._status()[place] = 0
        if found["trouble"] == "overflow":
            rows = [0] * self.geometry.ranks
            rows[rank] = found["rows"]
            raise Overflow(self.geometry.capacity, rows, sent=True)
        if found["trouble"] == "bad expert":
            expert = found["head"] - (found["head"] >> 31 << 32)
            experts = self.geometry.ranks * self.geometry.local_experts
            expected = f"experts from 0 to {experts - 1}, or -1"
            raise value_error("comm.Buffer.dispatch", "topk_idx", expected, f"{expert} for token {found['peer']}")
        raise Timeout(
            rank=rank,
            missing=[found["peer"]],
            channel=found["channel"],
            role=found["role"],
            head=found["head"],
            tail=found["tail"],
            seconds=self.timeout,
        )

    def _bring_back(self, call: _C.CommCall, routing: KernelRouting, tensors: dict[str, Tensor]) -> None:
        plan = _C.comm_combine_plan(self.geometry, call, **self._instance())
        self._launch(plan, {"routing": routing.words, "topk_idx": routing.topk_idx, **tensors})

    def _call(self, routing: KernelRouting, **options: Any) -> _C.CommCall:
        options |= {"timeout_us": min(int(self.timeout * 1e6), 2**31 - 1), "rail_delay": self.rail_delay}
        return _C.CommCall(first_rank=self.rank, tokens=routing.tokens, **options)

    def _launch(self, plan: _C.LaunchPlan, tensors: dict[str, Tensor]) -> None:
        if self._timed_out():
            self.raise_seen()
        traced = {} if self.trace is None else {"trace": self.trace}
        self.launch(plan, {"windows": self.windows, "state": self.state, **tensors, **traced})
        self._seen.copy_(self._status(), non_blocking=True)

    def _instance(self) -> dict[str, Any]:
        return {**self._how, "traced": self.trace is not None}

    def _timed_out(self) -> bool:
        troubled = self._found()
        return troubled is not None and troubled[1]["trouble"] == "timeout"

    def _found(self) -> tuple[int, _C._CommStatus] | None:
        """What has come to the host: a Timeout, or else the first trouble, and of which of the launch's ranks."""
        statuses = [_C.comm_status([word & 0xFFFFFFFF for word in words]) for words in self._seen.tolist()]
        troubled = [(place, status) for place, status in enumerate(statuses) if status is not None]
        return min(troubled, key=lambda found: found[1]["trouble"] != "timeout", default=None)

    def _status(self) -> Tensor:
        at = self.geometry.status_at
        return self.state.view(-1, self.geometry.state_words)[:, at : at + STATUS_WORDS]
