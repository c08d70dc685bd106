"""What Buffer and its gradients ask of a way to run, and the one through the process group: preflight, then bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import value_error
from ..ops.quantize import quantize as quantize_blocks
from ..scaled_tensor import ScaledTensor
from .collective import Collective, Routing, Rows
from .errors import Timeout
from .footprint import Layout, Memory, memory_of
from .link import Link
from .preflight import Call, preflight
from .sums import row_gradients

if TYPE_CHECKING:
    from .model import Settings
    from .tune import Tuned


class Landing(Protocol):
    """What is on its way."""

    def wait(self, deadline: float) -> None: ...


Arrival = tuple[Landing, Callable[[], None]]


class Exchange(ABC):
    """One rank's end of a Buffer. Each method is a call that all ranks make together."""

    way: str
    failure: Timeout | None = None
    closed = False

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout, self.rank = layout, rank

    @property
    def settings(self) -> Settings | None:
        """What :meth:`tune` could better."""
        return None

    def start(self, call: str) -> float:
        """The deadline of a call that begins. Raises where none can."""
        if self.closed:
            raise value_error(f"comm.Buffer.{call}", "self", "an open Buffer", "a closed one")
        if self.failure is not None:
            expected = "a Buffer whose ranks all answer"
            raise value_error(f"comm.Buffer.{call}", "self", expected, f"one that failed: {self.failure}")
        return self.deadline()

    def tune(
        self, topk_idx: Tensor | None, names: Sequence[str] | None, repeats: int, problem: Exception | None
    ) -> Tuned:
        """Find better settings, where there are any."""
        raise value_error("comm.Buffer.tune", "self", "a Buffer with way='kernels', which has settings", repr(self.way))

    def end(self) -> None:  # noqa: B027  (nothing to do where ranks hold nothing together)
        """The last call before :meth:`close`, unless something failed."""

    def close(self) -> None:
        self.closed = True

    def check(self) -> None:  # noqa: B027  (nothing to do where errors are raised at once)
        """Raise what went wrong since."""

    @abstractmethod
    def memory(self, quantize: bool) -> Memory:
        """What is allocated."""

    @abstractmethod
    def deadline(self) -> float:
        """Until when a call that begins now may wait."""

    @abstractmethod
    def agree(self, call: Call, deadline: float, problem: Exception | None) -> None:
        """Begin a call. Raises ``problem``, and what others found."""

    @abstractmethod
    def route(
        self,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        call: Call,
        deadline: float,
        problem: Exception | None,
    ) -> Any:
        """The same for a dispatch with a new routing, which it returns."""

    @abstractmethod
    def rows_of_tokens(self, x: Rows, routing: Any, quantize: bool, pow2: bool) -> tuple[Rows, Arrival]:
        """recv, which is filled on arrival."""

    @abstractmethod
    def tokens_of_rows(
        self, rows: Tensor, weights: Tensor | None, routing: Any, role: str, out: Tensor | None = None
    ) -> tuple[Tensor, Arrival]:
        """The sum of each token, which is written on arrival. ``weights``: those of the routing, or None for 1."""

    @abstractmethod
    def dispatch_backward(self, grad_rows: Tensor, routing: Any, problem: Exception | None = None) -> Tensor: ...

    @abstractmethod
    def combine_backward(
        self, dy: Tensor, rows: Tensor, weights: Tensor | None, routing: Any, problem: Exception | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of ``rows``, which take no part without ``weights``, and of these."""

    @abstractmethod
    def weights_backward(self, grad: Tensor, routing: Any, problem: Exception | None = None) -> Tensor: ...


class CollectiveExchange(Exchange):
    """Through the process group."""

    way = "collective"

    def __init__(self, link: Link, layout: Layout) -> None:
        super().__init__(layout, link.rank)
        self.link, self.collective = link, Collective(link, layout)

    @property
    def failure(self) -> Timeout | None:  # type: ignore[override]
        return self.link.failure

    def memory(self, quantize: bool) -> Memory:
        return memory_of(self.layout, quantize, self.way)

    def deadline(self) -> float:
        return self.link.deadline()

    def agree(self, call: Call, deadline: float, problem: Exception | None) -> None:
        preflight(self.link, self.layout, call, deadline, problem)

    def route(
        self,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        call: Call,
        deadline: float,
        problem: Exception | None,
    ) -> Routing:
        sent, counts = (None, None) if problem is not None else self.collective.counts(topk_idx)
        all_counts = preflight(self.link, self.layout, call, deadline, problem, counts)
        assert sent is not None
        self.collective.check_room(all_counts)
        if topk_weights is None:
            weights = torch.ones(topk_idx.shape, device=topk_idx.device)
        else:
            weights = topk_weights.detach().contiguous()
        return self.collective.route(sent, all_counts, topk_idx, weights, deadline)

    def rows_of_tokens(self, x: Rows, routing: Routing, quantize: bool, pow2: bool) -> tuple[Rows, Arrival]:
        rows = quantize_blocks(x.detach(), pow2=pow2) if quantize and isinstance(x, Tensor) else x
        recv = self.collective.empty_recv(isinstance(rows, ScaledTensor))
        return recv, self.collective.send_rows(rows, routing, recv)

    def tokens_of_rows(
        self, rows: Tensor, weights: Tensor | None, routing: Routing, role: str, out: Tensor | None = None
    ) -> tuple[Tensor, Arrival]:
        if out is None:
            out = torch.empty((routing.tokens, self.layout.hidden), dtype=torch.bfloat16, device=rows.device)
        flight, arrive = self.collective.return_sums(rows, weights, routing, role)
        return out, (flight, lambda: arrive(out))

    def dispatch_backward(self, grad_rows: Tensor, routing: Routing, problem: Exception | None = None) -> Tensor:
        deadline = self.start("dispatch_backward")
        self.agree(Call("dispatch_backward"), deadline, problem)
        out, (flight, arrive) = self.tokens_of_rows(grad_rows, None, routing, "dispatch_backward: sums")
        flight.wait(deadline)
        arrive()
        return out

    def combine_backward(
        self, dy: Tensor, rows: Tensor, weights: Tensor | None, routing: Routing, problem: Exception | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of ``rows``, which take no part without ``weights``, and of these."""
        deadline = self.start("combine_backward")
        self.agree(Call("combine_backward", (weights is not None,)), deadline, problem)
        dys = self.collective.send_copies(dy, routing, "combine_backward: rows", deadline)
        layout, copy_of = self.layout, routing.copy_of
        grad_rows = torch.empty((layout.capacity, layout.hidden), dtype=torch.bfloat16, device=dy.device)
        if weights is None:
            grad_rows[: routing.rows] = dys[copy_of]
            return grad_rows, None
        grad_weights = torch.zeros(layout.capacity, device=dy.device)
        row_gradients(dys, rows, copy_of, weights, grad_rows, grad_weights)
        return grad_rows, grad_weights

    def weights_backward(self, grad: Tensor, routing: Routing, problem: Exception | None = None) -> Tensor:
        deadline = self.start("weights_backward")
        self.agree(Call("weights_backward"), deadline, problem)
        return self.collective.return_values(grad, routing, "weights_backward: values", deadline)
