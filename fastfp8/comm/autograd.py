"""Gradients of dispatch and combine: each is the other's, through the routing.

Contexts hold the routing and no Handle, whose weights have a gradient: that were a circle that nobody frees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .collective import Rows
from .exchange import Arrival, Exchange


def is_tracked(t: object) -> bool:
    """Whether what is made of ``t`` now has a gradient with respect to it."""
    return isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled()


def rows_of_tokens(x: Rows, exchange: Exchange, routing: Any, quantize: bool, pow2: bool) -> tuple[Rows, Arrival]:
    """recv of dispatch, with its gradient if it is dense as ``x`` is."""
    if quantize or not is_tracked(x):
        return exchange.rows_of_tokens(x, routing, quantize, pow2)
    arrivals: list[Arrival] = []
    return _Rows.apply(x, exchange, routing, arrivals), arrivals[0]  # type: ignore[no-untyped-call]


def weights_of_rows(topk_weights: Tensor | None, exchange: Exchange, routing: Any) -> Tensor:
    """recv_weights of a handle, with their gradient."""
    weights: Tensor = routing.weights
    if not is_tracked(topk_weights):
        return weights
    weights = _Weights.apply(topk_weights, exchange, routing)  # type: ignore[no-untyped-call]
    return weights


def tokens_of_rows(
    rows: Tensor, weights: Tensor | None, exchange: Exchange, routing: Any, out: Tensor | None
) -> tuple[Tensor, Arrival]:
    """The result of combine, with its gradients."""
    if not is_tracked(rows) and not is_tracked(weights):
        return exchange.tokens_of_rows(rows, weights, routing, "combine: sums", out)
    arrivals: list[Arrival] = []
    return _Tokens.apply(rows, weights, exchange, routing, arrivals), arrivals[0]  # type: ignore[no-untyped-call]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, routing: Any, arrivals: list[Arrival]) -> Rows:
        ctx.exchange, ctx.routing = exchange, routing
        recv, arrival = exchange.rows_of_tokens(x, routing, False, False)
        arrivals.append(arrival)
        return recv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.dispatch_backward(grad, ctx.routing), None, None, None


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, topk_weights: Tensor, exchange: Exchange, routing: Any) -> Tensor:
        ctx.exchange, ctx.routing = exchange, routing
        weights: Tensor = routing.weights
        return weights.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.weights_backward(grad, ctx.routing), None, None


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor | None, exchange: Exchange, routing: Any, arrivals: list[Arrival]
    ) -> Tensor:
        ctx.exchange, ctx.routing = exchange, routing
        ctx.save_for_backward(None if weights is None else rows, weights)
        y, arrival = exchange.tokens_of_rows(rows, weights, routing, "combine: sums")
        arrivals.append(arrival)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_weights = ctx.exchange.combine_backward(dy, *ctx.saved_tensors, ctx.routing)
        return grad_rows, grad_weights, None, None, None
