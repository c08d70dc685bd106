"""Statistics of the experts in a step that is watched (:func:`fastfp8.numerics.watch`): the only steps that pay."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BLOCK, Block
from ..observation import observe
from ..ops.dequantize import dequantize
from ..ops.quantize import quantize
from ..scaled_tensor import ScaledTensor
from .activation import swiglu
from .tokens import coding_of
from .weight import FP8Weight

_ROW: Block = (1, BLOCK)


def rows(statistics: Tensor | None, high_precision: Tensor, quantized: ScaledTensor, offsets: Tensor) -> None:
    """``observe`` of rows in groups, of which those from ``offsets[-1]`` on are undefined. The host waits for it."""
    if statistics is not None:
        end = int(offsets[-1])
        inside = ScaledTensor._trusted(quantized.data[:end], quantized.scale[:end], _ROW)
        observe(statistics, high_precision[:end], inside)


def forward(
    modules: tuple[FP8Weight, FP8Weight],
    weights: tuple[ScaledTensor, ScaledTensor],
    x: Tensor,
    gate_up: Tensor,
    h: ScaledTensor,
    tokens: tuple[Tensor, Tensor | None, float | None],
) -> None:
    """``tokens``: ``offsets``, the rows' weights and ``limit``."""
    offsets, weight, limit = tokens
    for module, w8 in zip(modules, weights, strict=True):
        observe((module.statistics or {}).get("weight"), module.weight, w8)
    _of_tokens(modules[0], "activation", x, weight is not None)
    statistics = (modules[1].statistics or {}).get("activation")
    if statistics is not None:
        rows(statistics, _activation(gate_up.float(), weight, limit), h, offsets)


def backward(
    modules: tuple[FP8Weight, FP8Weight],
    dy: Tensor,
    dh: Tensor,
    gate_up: Tensor | ScaledTensor,
    d_gate_up: ScaledTensor,
    tokens: tuple[Tensor, Tensor | None, float | None],
) -> None:
    offsets, weight, limit = tokens
    _of_tokens(modules[1], "gradient", dy, weight is not None)
    statistics = (modules[0].statistics or {}).get("gradient")
    if statistics is not None:
        dense = dequantize(gate_up) if isinstance(gate_up, ScaledTensor) else gate_up.float()
        with torch.enable_grad():
            leaf = dense.requires_grad_()
            (exact,) = torch.autograd.grad(_activation(leaf, weight, limit), leaf, dh.float())
        rows(statistics, exact, d_gate_up, offsets)


def _of_tokens(module: FP8Weight, role: str, x: Tensor, routed: bool) -> None:
    """Of tokens as they are quantised when they are sent."""
    statistics = (module.statistics or {}).get(role)
    if statistics is not None:
        observe(statistics, x, quantize(x, pow2=coding_of(module, role, routed).pow2))


def _activation(gate_up: Tensor, weight: Tensor | None, limit: float | None) -> Tensor:
    h = swiglu(gate_up, limit)
    return h if weight is None else h * weight[:, None]
