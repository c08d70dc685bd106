"""Tokens on their way to the rows of their experts and back: within a process, or over a process group.

Three classes with one interface, which the experts of :mod:`fastfp8.nn.experts` use without knowing which it is:

    rows                   the first dispatch: a ScaledTensor, or dense with its gradient where ``coding`` is None
    offsets                int32 [G]: the row at which each expert ends
    weights                float32 [rows]: what each row is multiplied by; None where there is no routing
    wait()                 rows are there
    send(x, coding)        another dispatch by the same routing, quantised: a gradient's
    sums(rows)             bfloat16 [T, H]: the sum of the rows of each token
    weighted_sums(rows)    the same times the weights, with its gradients
    slots(values)          float32 [T, top_k]: a number of each row, where it came from

What rows from ``offsets[-1]`` on have is undefined everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..ops.permute import permute, permute_quantize, row_map, unpermute
from ..ops.quantize import quantize
from ..scaled_tensor import ScaledTensor
from .weight import FP8Weight

if TYPE_CHECKING:
    from ..comm import Buffer

Rows = Tensor | ScaledTensor


class Coding(NamedTuple):
    """How tokens are quantised on their way: see :func:`fastfp8.quantize`."""

    pow2: bool
    counters: Tensor | None = None


def coding_of(module: FP8Weight, role: str, routed: bool) -> Coding:
    """How the tokens of ``module``, or the gradients ("gradient"), are quantised: those that are ``routed`` as what
    is dispatched, others as any Linear's."""
    recipe = module.recipe
    assert recipe is not None
    own = recipe.gradient if role == "gradient" else recipe.activation
    return Coding((recipe.dispatched if routed else own).pow2, (module.counters or {}).get(role))


class OwnTokens:
    """Every token goes to the one expert that there is: the dense SwiGLU layer."""

    weights = None

    def __init__(self, x: Tensor, coding: Coding) -> None:
        self.rows: Rows | None = self.send(x.detach(), coding)
        self.offsets = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)

    def wait(self) -> None:
        pass

    def send(self, x: Tensor, coding: Coding) -> ScaledTensor:
        return quantize(x, **coding._asdict())

    def sums(self, rows: Tensor) -> Tensor:
        return rows


class LocalTokens:
    """All experts are in this process."""

    def __init__(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int, coding: Coding | None
    ) -> None:
        self._map = row_map(topk_idx, num_experts)
        self._topk_weights = topk_weights
        self.rows: Rows | None = permute(x, self._map)[0] if coding is None else self.send(x.detach(), coding)
        self.offsets = self._map.offsets
        self.weights = topk_weights.detach().flatten()[self._map.slots.clamp(min=0)]

    def wait(self) -> None:
        pass

    def send(self, x: Tensor, coding: Coding) -> ScaledTensor:
        return permute_quantize(x, self._map, **coding._asdict())[0]

    def sums(self, rows: Tensor) -> Tensor:
        return unpermute(rows, self._map)

    def weighted_sums(self, rows: Tensor) -> Tensor:
        return unpermute(rows, self._map, self._topk_weights)

    def slots(self, values: Tensor) -> Tensor:
        rows = self._map.rows
        return (
            torch.where(rows >= 0, values[rows.clamp(min=0)], 0.0) if values.numel() else values.new_zeros(rows.shape)
        )


class RemoteTokens:
    """Experts are spread over the ranks of a :class:`fastfp8.comm.Buffer`. Every rank makes the same calls."""

    def __init__(
        self,
        buffer: Buffer,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        coding: Coding | None,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._buffer = buffer
        if coding is None:
            self.rows, self.offsets, self._handle = buffer.dispatch(x, topk_idx, topk_weights, quantize=False)
        else:
            given = _counted(x.detach(), coding), topk_idx, topk_weights.detach()
            sent = buffer.dispatch(*given, pow2=coding.pow2, stream=stream, async_op=True)
            self.rows, self.offsets, self._handle = sent
        self.weights = self._handle.recv_weights

    def wait(self) -> None:
        self._handle.wait()

    def send(self, x: Tensor, coding: Coding) -> Rows:
        return self._buffer.dispatch(_counted(x, coding), handle=self._handle, pow2=coding.pow2)[0]

    def sums(self, rows: Tensor) -> Tensor:
        return self._buffer.combine(rows, self._handle, weighted=False)

    def weighted_sums(self, rows: Tensor) -> Tensor:
        return self._buffer.combine(rows, self._handle)

    def slots(self, values: Tensor) -> Tensor:
        return self._buffer.weights_backward(values, self._handle)


def _counted(x: Tensor, coding: Coding) -> Rows:
    """What to dispatch: the kernels that quantise on the way do not count, so that is done before where it is asked."""
    return x if coding.counters is None else quantize(x, **coding._asdict())
