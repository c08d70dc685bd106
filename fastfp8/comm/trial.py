"""What a Buffer's dispatch and combine take with one setting after another, on the GPUs of its ranks."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .agreement import tell
from .footprint import Layout
from .link import Link
from .model import Settings

if TYPE_CHECKING:
    from .kernel_exchange import KernelExchange

_NS = 1e-9


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Of work that is launched, by the GPU's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream(device)
    begin.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def random_routing(layout: Layout, rank: int) -> Tensor:
    """int32 [max_tokens, top_k]: different experts for each token, all as likely as others."""
    generator = torch.Generator().manual_seed(rank)
    scores = torch.rand(layout.max_tokens, layout.num_experts, generator=generator)
    found = torch.full((layout.max_tokens, layout.top_k), -1, dtype=torch.int32)
    most = min(layout.top_k, layout.num_experts)
    found[:, :most] = scores.topk(most).indices
    return found


class Trial:
    """Measures settings for :func:`fastfp8.comm.tune.sweep`: a new routing, its dispatch in FP8, and combine.

    All ranks must ask for the same settings in the same order, and get the same seconds: those of the slowest.
    """

    def __init__(
        self, link: Link, layout: Layout, topk_idx: Tensor, connect: Callable[[Settings], KernelExchange]
    ) -> None:
        self._link, self._connect, self._topk_idx = link, connect, topk_idx
        generator = torch.Generator(link.device).manual_seed(link.rank)
        shape = (len(topk_idx), layout.hidden)
        self._x = torch.randn(shape, generator=generator, device=link.device, dtype=torch.bfloat16)
        self._weights = torch.full(topk_idx.shape, 1 / layout.top_k, device=link.device)
        self._rows = torch.zeros((layout.capacity, layout.hidden), device=link.device, dtype=torch.bfloat16)
        self._settings: Settings | None = None
        self._exchange: KernelExchange | None = None

    def __call__(self, settings: Settings) -> float:
        """Seconds of one round. The first with new settings is not counted, for it loads kernels."""
        if settings != self._settings:
            self._end()
            self._exchange, self._settings = self._connect(settings), settings
            self._measure()
        return self._measure()

    def __enter__(self) -> Trial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end()

    def _measure(self) -> float:
        own = seconds_of(self._round, self._link.device)
        assert self._exchange is not None
        self._exchange.check()
        # After it no rank's kernels run, and all begin the next round together.
        return max(row[0] for row in tell(self._link, "Buffer.tune: times", [round(own / _NS)])) * _NS

    def _round(self) -> None:
        assert self._exchange is not None
        kernels = self._exchange.kernels
        routing = kernels.exchange(self._topk_idx, self._weights)
        kernels.dispatch(self._x, routing, quantize=True)
        kernels.combine(self._rows, routing, weighted=True)

    def _end(self) -> None:
        if self._exchange is not None:
            self._exchange.end()
        self._exchange = self._settings = None
