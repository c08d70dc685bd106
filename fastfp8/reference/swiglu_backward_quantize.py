"""The backward of SwiGLU with the quantisation of all that the next GEMMs need, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BLOCK, Block, empty_scale, scale_shape_of
from .activation import swiglu_backward
from .pairwise import pairwise_sum
from .quantize import quantize_matrix
from .quantize_both import grouped_transposed, transposed
from .swiglu_quantize import rows_of

_OP = "swiglu_backward_quantize"
_BLOCK: Block = (1, BLOCK)
# Elements of a gradient worked on at a time: temporaries stay in the cache.
_CHUNK = 1 << 17


def _gradients(
    grad: Tensor, gate_up: Tensor, gate_up_scale: Tensor | None, weight: Tensor | None, limit: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """In float32: the value [T, F], the gradient of gate and up [T, 2 F], and that of a weight [T].

    The sum over a row is that of its blocks of 128 products, by a binary tree each, in ascending order from 0.
    """
    (rows, f), blocks = grad.shape, grad.shape[1] // BLOCK
    value, grad_gate_up, grad_weight = torch.empty(rows, f), torch.empty(rows, 2 * f), torch.zeros(rows)
    step = max(1, _CHUNK // max(1, f))
    for first in range(0, rows if f else 0, step):
        chunk = slice(first, first + step)
        gate, up = rows_of(gate_up, gate_up_scale, chunk).chunk(2, 1)
        found = swiglu_backward(grad[chunk], gate, up, None if weight is None else weight[chunk], limit)
        value[chunk], grad_gate_up[chunk, :f], grad_gate_up[chunk, f:] = found.value, found.grad_gate, found.grad_up
        sums = pairwise_sum(found.products.view(-1, blocks, BLOCK))
        for block in range(blocks):
            grad_weight[chunk] += sums[:, block]
    return value, grad_gate_up, grad_weight


def swiglu_backward_quantize(
    grad: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    weight: Tensor | None,
    limit: float | None,
    offsets: Tensor | None,
    pow2: bool,
    eps: float,
    dense_activation: bool,
    activation_counters: Tensor | None = None,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See :func:`fastfp8.swiglu_backward_quantize`; arguments are checked already, but not what ``offsets`` has."""
    value, grad_gate_up, grad_weight = _gradients(grad, gate_up, gate_up_scale, weight, limit)

    def turned(x: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if offsets is not None:
            return grouped_transposed(_OP, x, offsets, pow2, eps, counts)
        return *transposed(x, pow2, eps, counts), torch.empty(0, dtype=torch.int32)

    *both_t, ends_t = turned(grad_gate_up, counters_t)
    activation = (value.bfloat16(), torch.empty(0)) if dense_activation else turned(value, activation_counters)[:2]
    taken = grad.shape[0] if offsets is None else int(offsets[-1])
    data = torch.empty(grad_gate_up.shape, dtype=torch.float8_e4m3fn)
    scale = empty_scale(data, scale_shape_of(data.shape, _BLOCK), _BLOCK)
    if taken and data.numel():
        quantize_matrix(grad_gate_up[:taken], data[:taken], scale[:taken], _BLOCK, pow2, eps, counters=counters)
    return *activation, data, scale, *both_t, torch.empty(0) if weight is None else grad_weight, ends_t
