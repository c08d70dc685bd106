"""The way by kernels: launches on the current stream, over NVLink within a node and NCCL's rails between nodes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ..errors import check_value
from .agreement import tell
from .collective import Rows
from .exchange import Arrival, Exchange
from .footprint import Layout, Memory, kernel_items
from .kernels import KernelRouting, Kernels
from .link import Link
from .model import Settings, Shape, ring_bytes
from .preflight import Call
from .sums import row_gradients
from .trial import Trial, random_routing
from .tune import CHOICES, MOST_BYTES, RINGS, RINGS_OF_ONE_NODE, Cache, Key, Tuned, defaults, sweep
from .windows import Windows, connect, why_not


class _Stream:
    """A call's end on a stream, for which the stream that waits has to wait."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self, deadline: float) -> None:
        if self._event is not None:
            self._event.wait()


@dataclass(frozen=True)
class Joined:
    """What a Buffer's kernels have of its process group."""

    link: Link
    windows: Windows
    settings: Settings
    num_sms: int
    """The most that they may have."""


class KernelExchange(Exchange):
    """Launches of one rank's kernels."""

    way = "kernels"

    def __init__(self, kernels: Kernels, layout: Layout, joined: Joined | None = None) -> None:
        """``joined``: None where windows are another's, and nothing can be tuned."""
        super().__init__(layout, kernels.rank)
        self.kernels, self.joined = kernels, joined

    @property
    def settings(self) -> Settings | None:
        return None if self.joined is None else self.joined.settings

    def memory(self, quantize: bool) -> Memory:
        return Memory(self.way, kernel_items(self.layout, self.kernels.geometry, quantize))

    def deadline(self) -> float:
        return math.inf  # the kernels have their own

    def check(self) -> None:
        self.kernels.check()

    def end(self) -> None:
        """Ranks that are connected by NCCL part together, for none may write to a window that another gave back."""
        joined = self.joined
        if joined is None or joined.windows.connection is None or not self.kernels.survived():
            return
        tell(joined.link, "Buffer.close", [], call="close")
        joined.windows.close()

    def tune(
        self, topk_idx: Tensor | None, names: Sequence[str] | None, repeats: int, problem: Exception | None
    ) -> Tuned:
        joined, layout = self.joined, self.layout
        assert joined is not None
        link, start = joined.link, joined.settings
        if names is None:
            names = (*(RINGS_OF_ONE_NODE if layout.nodes == 1 else RINGS), "num_sms")
        # The same number of numbers on every rank.
        asked = [names.index(name) if problem is None and name in names else -1 for name in CHOICES]
        told = tell(link, "Buffer.tune: arguments", [0 if problem else repeats, *asked], problem, "tune")
        same = all(row == told[0] for row in told)
        check_value(same, "comm.Buffer.tune", "names", "these and repeats the same on every rank", (names, repeats))
        if topk_idx is None:
            topk_idx = random_routing(layout, link.rank)
        shape = Shape(layout.nodes, layout.ranks_per_node, hidden=layout.hidden, top_k=layout.top_k)
        most = max(MOST_BYTES, ring_bytes(shape, start))

        def fits(settings: Settings) -> bool:
            return settings.num_sms <= joined.num_sms and ring_bytes(shape, settings) <= most

        def trying(settings: Settings) -> KernelExchange:
            return connected(link, layout, settings, joined.num_sms)

        with Trial(link, layout, topk_idx.to(link.device), trying) as trial:
            found = sweep(trial, start, names, repeats=repeats, fits=fits)
        if link.rank % layout.ranks_per_node == 0:  # nodes may have homes of their own
            Cache().store(key_of(layout, gpu_name(link.device)), found.settings)
        return found

    def agree(self, call: Call, deadline: float, problem: Exception | None) -> None:
        if problem is not None:
            raise problem

    def route(
        self,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        call: Call,
        deadline: float,
        problem: Exception | None,
    ) -> KernelRouting:
        self.agree(call, deadline, problem)
        return self.kernels.exchange(topk_idx, None if topk_weights is None else topk_weights.detach().contiguous())

    def rows_of_tokens(self, x: Rows, routing: KernelRouting, quantize: bool, pow2: bool) -> tuple[Rows, Arrival]:
        if isinstance(x, Tensor):
            x = x.detach()
        return self.kernels.dispatch(x, routing, quantize=quantize, pow2=pow2), self._end()

    def tokens_of_rows(
        self, rows: Tensor, weights: Tensor | None, routing: KernelRouting, role: str, out: Tensor | None = None
    ) -> tuple[Tensor, Arrival]:
        y = self.kernels.combine(rows.detach(), routing, weighted=weights is not None, out=out)
        return y, self._end()

    def dispatch_backward(self, grad_rows: Tensor, routing: KernelRouting, problem: Exception | None = None) -> Tensor:
        self._begin("dispatch_backward", problem)
        return self.kernels.combine(grad_rows, routing, weighted=False)

    def combine_backward(
        self, dy: Tensor, rows: Tensor, weights: Tensor | None, routing: KernelRouting, problem: Exception | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self._begin("combine_backward", problem)
        dys = self.kernels.dispatch(dy, routing, quantize=False)
        assert isinstance(dys, Tensor)
        if weights is None:
            return dys, None
        # How many rows are in use only the GPU knows: the others' numbers are worked on too, and put right at the end.
        every = torch.arange(self.layout.capacity, device=dy.device)
        grad_rows, grad_weights = torch.empty_like(dys), torch.empty_like(weights)
        row_gradients(dys, rows, every, weights, grad_rows, grad_weights)
        return grad_rows, grad_weights.masked_fill_(every >= routing.offsets[-1], 0)

    def weights_backward(self, grad: Tensor, routing: KernelRouting, problem: Exception | None = None) -> Tensor:
        self._begin("weights_backward", problem)
        return self.kernels.bring_back(grad, routing)

    def _begin(self, call: str, problem: Exception | None) -> None:
        self.start(call)
        if problem is not None:
            raise problem

    def _end(self) -> Arrival:
        """Of a call. What went wrong before it is raised now that others have what they wait for."""
        self.kernels.raise_seen()
        return _Stream(self.kernels.state.device), lambda: None


def geometry_of(layout: Layout, settings: Settings) -> _C.CommGeometry:
    """The rings of a Buffer of these sizes."""
    return _C.CommGeometry(
        nodes=layout.nodes,
        gpus=layout.ranks_per_node,
        channels=settings.num_sms // 2,
        experts=layout.num_experts,
        top_k=layout.top_k,
        hidden=layout.hidden,
        max_tokens=max(1, layout.max_tokens),
        capacity=max(1, layout.capacity),
        link_slots=settings.link_slots,
        rail_slots=settings.rail_slots,
        rail_chunk=settings.rail_chunk,
    )


def key_of(layout: Layout, gpu: str) -> Key:
    return Key(layout.nodes, layout.world, layout.hidden, layout.top_k, gpu)


def settings_of(layout: Layout, num_sms: int, gpu: str) -> Settings:
    """What :meth:`fastfp8.comm.Buffer.tune` found for such ranks; else the model's, of :mod:`fastfp8.comm.tune`."""
    found = Cache().load(key_of(layout, gpu))
    if found is not None:
        return dataclasses.replace(found, num_sms=min(found.num_sms, num_sms))
    return defaults(
        layout.nodes,
        layout.ranks_per_node,
        layout.hidden,
        layout.top_k,
        gpu,
        experts=layout.num_experts,
        max_tokens=layout.max_tokens,
        num_sms=num_sms,
    )


def kernel_exchange(link: Link, layout: Layout, num_sms: int) -> KernelExchange:
    """All ranks with rank 0's settings, or an error on all of them. Not run on GPUs yet."""
    problem: Exception | None = None
    numbers = [0] * len(dataclasses.fields(Settings))
    try:
        reason = why_not(link, layout)
        check_value(reason == "", "comm.Buffer", "way", f"'collective' here: {reason}", "'kernels'")
        if link.rank == 0:
            numbers = list(dataclasses.astuple(settings_of(layout, num_sms, gpu_name(link.device))))
    except (ValueError, RuntimeError) as error:
        problem = error
    settings = Settings(*tell(link, "Buffer: settings", numbers, problem)[0])
    return connected(link, layout, settings, num_sms)


def connected(link: Link, layout: Layout, settings: Settings, num_sms: int) -> KernelExchange:
    """With windows of its own. All ranks must come, with the same settings."""
    geometry = geometry_of(layout, settings)
    windows = connect(link, layout, geometry)
    state = torch.zeros(geometry.state_words, dtype=torch.int32, device=link.device)
    kernels = Kernels(
        geometry,
        link.rank,
        windows.addresses,
        state,
        timeout=link.timeout,
        warps=settings.warps,
        rail=windows.rail,
        rail_constants=windows.rail_constants,
    )
    return KernelExchange(kernels, layout, Joined(link, windows, settings, num_sms))


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
