"""What Buffer and its gradients do once arguments are checked: preflight, then bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import value_error
from .collective import Collective, Routing, Rows
from .footprint import Layout
from .link import Flight, Link
from .preflight import Call, preflight
from .sums import row_gradients

Arrival = tuple[Flight, Callable[[], None]]


class Exchange:
    """One rank's end of a Buffer. Each method is a call that all ranks make together."""

    def __init__(self, link: Link, layout: Layout) -> None:
        self.link, self.layout, self.way = link, layout, Collective(link, layout)
        self.closed = False

    def start(self, call: str) -> float:
        """The deadline of a call that begins. Raises where none can."""
        if self.closed:
            raise value_error(f"comm.Buffer.{call}", "self", "an open Buffer", "a closed one")
        if self.link.failure is not None:
            expected = "a Buffer whose ranks all answer"
            raise value_error(f"comm.Buffer.{call}", "self", expected, f"one that failed: {self.link.failure}")
        return self.link.deadline()

    def agree(self, call: Call, deadline: float, problem: Exception | None, counts: Tensor | None = None) -> Tensor:
        return preflight(self.link, self.layout, call, deadline, problem, counts)

    def rows_of_tokens(self, x: Rows, routing: Routing) -> tuple[Rows, Arrival]:
        """recv, which is filled on arrival."""
        recv = self.way.empty_recv(not isinstance(x, Tensor))
        return recv, self.way.send_rows(x, routing, recv)

    def tokens_of_rows(
        self, rows: Tensor, weights: Tensor | None, routing: Routing, role: str, out: Tensor | None = None
    ) -> tuple[Tensor, Arrival]:
        """The sum of each token, which is written on arrival."""
        if out is None:
            out = torch.empty((routing.sent.tokens, self.layout.hidden), dtype=torch.bfloat16, device=rows.device)
        flight, arrive = self.way.return_sums(rows, weights, routing, role)
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
        dys = self.way.send_copies(dy, routing, "combine_backward: rows", deadline)
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
        return self.way.return_values(grad, routing, "weights_backward: values", deadline)
