"""The backward of SwiGLU with the quantisation of all that the next GEMMs need, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..counters import check_counters
from ..errors import check_device, check_tensor, check_type, value_error
from ..layout import BLOCK, empty_scale, empty_transposed, grouped_tokens, pad16, scale_shape
from ..reference.swiglu_backward_quantize import swiglu_backward_quantize as reference_swiglu_backward_quantize
from ..scaled_tensor import ScaledTensor
from .counted import check_each, register
from .grouped_gemm import check_error, word_for
from .quantize import INPUT_DTYPES
from .quantize_both import check_offsets, transposed_tensor
from .swiglu_quantize import ROW_BLOCK, check_gate_up, check_options, check_swiglu, parts_of

_OP = "swiglu_backward_quantize"
_COUNTERS = ("activation_counters", "counters", "counters_t")


class SwiGluGradients(NamedTuple):
    """What :func:`swiglu_backward_quantize` returns, in (1, 128) blocks; its ``pad`` and ``offsets`` say what M' is."""

    activation: ScaledTensor | Tensor
    """``swiglu`` of the inputs again: [F, M'] transposed, for Wgrad of the next product; or bfloat16 [M, F]."""
    gate_up: ScaledTensor
    """The gradient of gate and up [M, 2 F], for Dgrad."""
    gate_up_t: ScaledTensor
    """The same transposed, [2 F, M'], for Wgrad."""
    weight: Tensor | None
    """The gradient of the rows' weights, float32 [M]; None without weights."""
    padded_offsets: Tensor | None
    """int32 [G], the token at which each group ends in what is transposed; None without ``offsets``."""


def swiglu_backward_quantize(
    grad: Tensor,
    gate_up: Tensor | ScaledTensor,
    weight: Tensor | None = None,
    limit: float | None = None,
    *,
    offsets: Tensor | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    pad: bool = False,
    dense_activation: bool = False,
    counters: tuple[Tensor, Tensor, Tensor] | None = None,
) -> SwiGluGradients:
    """The gradients of ``h = silu(gate) * up * weight`` and ``h`` itself, quantised for all of their GEMMs in one pass.

    In FP32, one rounding for each operation, with silu and exp as in :func:`fastfp8.swiglu_quantize`, gate and up as
    clamped by ``limit``, and ``d = grad * weight`` (``grad`` without weights)::

        h         = (silu(gate) * up) * weight                   # the bits that swiglu_quantize quantised
        grad_up   = d * silu(gate)
        grad_gate = (d * up) * (s * (1 + gate * (1 - s)))        # s = 1 / (1 + exp(-gate))
        grad_weight[row] = sum of grad * (silu(gate) * up)

    A gradient is 0 where its own argument was beyond ``limit``. The sum is taken in blocks of 128 columns, each by a
    binary tree that adds neighbours first, and then over the blocks in ascending order from 0: deterministic and the
    same on every backend. Each result has the bits of :func:`fastfp8.quantize` of these FP32 values, or of their
    transpose; they never go to memory themselves. What is not finite stays in its own place and touches no scale.
    DeepSeek-V3 report, sections 3.3.2 and 3.3.3: the inputs of SwiGLU are kept in FP8, its output computed again.

    Args:
        grad: bfloat16, float16 or float32 [M, F], the gradient of h; F a multiple of 128, any M and strides.
        gate_up: a ScaledTensor [M, 2 F] in (1, 128) blocks, gate in the first F columns, or bfloat16, float16 or
            float32 of that shape; any strides.
        weight: float32 [M], what each row was multiplied by, or None.
        limit: as of :func:`fastfp8.swiglu_quantize`.
        offsets: None, or int32 [G] as of :func:`fastfp8.quantize_grouped_both`: the row at which each group of tokens
            ends. What is transposed then has room for M' tokens as there, each group beginning at a multiple of 128.
        pow2: as of :func:`fastfp8.quantize`, for all results; so is ``eps``.
        pad: as of :func:`fastfp8.quantize_both`: without ``offsets``, whether what is transposed has zeros up to the
            next multiple of 16 tokens.
        dense_activation: return the activation as bfloat16 [M, F], rounded once, instead of quantised and transposed.
        counters: as of :func:`fastfp8.quantize`, of ``activation``, ``gate_up`` and ``gate_up_t``, or None. A dense
            activation is not counted, and of groups only their rows are.

    Returns:
        SwiGluGradients. Of rows from ``offsets[-1]`` on nothing takes part and nothing is written: what they, and what
        tokens past the last group's last block, have in any result is undefined.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, blocks or devices do not fit, or a number is out of range. On a CPU also bad offsets; on a
            GPU these are brought into range, and the next :func:`fastfp8.check` raises.
    """
    values, values_scale = parts_of(_OP, gate_up)
    if not torch.compiler.is_compiling():  # there the fake implementation checks: Dynamo cannot trace all of it
        check_options(_OP, limit, pow2, eps)
        for name, value in (("pad", pad), ("dense_activation", dense_activation)):
            check_type(value, bool, _OP, name, "a bool")
        if offsets is not None:
            check_tensor(offsets, _OP, "offsets", (torch.int32,), dim=1)
        check_each(_OP, counters, "three tensors", 3)
        _check(grad, values, values_scale, weight, limit, offsets, None, eps, *(counters or ()))
    # Without offsets nothing reports, but torch.compile wants the word (fastfp8/error_word.py).
    operands = (grad, values, values_scale, weight, limit, offsets, word_for(grad))
    op, options = torch.ops.fastfp8.swiglu_backward_quantize, (pow2, eps, dense_activation)
    if counters is None:
        found = op.default(*operands, *options)
    else:
        found = op.counted(*operands, *options, **dict(zip(_COUNTERS, counters, strict=True)))
    activation, activation_scale, data, scale, data_t, scale_t, grad_weight, ends_t = found
    tokens = None if pad or offsets is not None else grad.shape[0]
    return SwiGluGradients(
        activation if dense_activation else transposed_tensor(activation, activation_scale, tokens),
        ScaledTensor._trusted(data, scale, ROW_BLOCK),
        transposed_tensor(data_t, scale_t, tokens),
        None if weight is None else grad_weight,
        None if offsets is None else ends_t,
    )


def _check(
    grad: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    weight: Tensor | None,
    limit: float | None,
    offsets: Tensor | None,
    error: Tensor | None,
    eps: float,
    *counters: Tensor | None,
) -> None:
    check_tensor(grad, _OP, "grad", INPUT_DTYPES)
    rows, f = grad.shape
    if f % BLOCK:
        raise value_error(_OP, "grad", f"F columns, F a multiple of {BLOCK}", f"shape {tuple(grad.shape)}")
    check_gate_up(_OP, gate_up, gate_up_scale)
    if tuple(gate_up.shape) != (rows, 2 * f):
        expected = f"shape {(rows, 2 * f)}, twice as many columns as 'grad' has"
        raise value_error(_OP, "gate_up", expected, f"shape {tuple(gate_up.shape)}")
    check_device(gate_up, _OP, "gate_up", grad, "grad")
    check_swiglu(_OP, weight, limit, eps, rows, grad, "grad")
    if offsets is None:
        check_error(_OP, error, grad, "grad")
    else:
        check_offsets(_OP, offsets, error, grad, "grad")
    for name, counts in zip(_COUNTERS, counters, strict=False):
        check_counters(_OP, counts, grad, "grad", name)


@register(_OP, "CPU")
@torch.no_grad()
def _cpu(
    grad: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None = None,
    weight: Tensor | None = None,
    limit: float | None = None,
    offsets: Tensor | None = None,
    error: Tensor | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    dense_activation: bool = False,
    *,
    activation_counters: Tensor | None = None,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    counted = (activation_counters, counters, counters_t)
    _check(grad, gate_up, gate_up_scale, weight, limit, offsets, error, eps, *counted)
    operands = (grad, gate_up, gate_up_scale, weight, limit, offsets)
    return reference_swiglu_backward_quantize(*operands, pow2, eps, dense_activation, *counted)


@register(_OP, "CUDA")
@torch.no_grad()
def _cuda(
    grad: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None = None,
    weight: Tensor | None = None,
    limit: float | None = None,
    offsets: Tensor | None = None,
    error: Tensor | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    dense_activation: bool = False,
    *,
    activation_counters: Tensor | None = None,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    from ..triton_kernels import swiglu_backward_quantize as kernels

    counted = (activation_counters, counters, counters_t)
    _check(grad, gate_up, gate_up_scale, weight, limit, offsets, error, eps, *counted)
    operands = (grad, gate_up, gate_up_scale, weight, limit, offsets, error)
    return kernels.swiglu_backward_quantize(*operands, pow2, eps, dense_activation, *counted)


@register(_OP, "fake")
def _fake(
    grad: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None = None,
    weight: Tensor | None = None,
    limit: float | None = None,
    offsets: Tensor | None = None,
    error: Tensor | None = None,
    pow2: bool = False,
    eps: float = 0.0,
    dense_activation: bool = False,
    *,
    activation_counters: Tensor | None = None,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    counted = (activation_counters, counters, counters_t)
    _check(grad, gate_up, gate_up_scale, weight, limit, offsets, error, eps, *counted)
    rows, f = grad.shape
    tokens = pad16(rows) if offsets is None else grouped_tokens(rows, offsets.shape[0])
    if dense_activation:
        activation = grad.new_empty((rows, f), dtype=torch.bfloat16), grad.new_empty(0, dtype=torch.float32)
    else:
        activation = empty_transposed(grad, f, tokens)
    data = grad.new_empty((rows, 2 * f), dtype=torch.float8_e4m3fn)
    both = (
        data,
        empty_scale(data, scale_shape(rows, 2 * f, ROW_BLOCK), ROW_BLOCK),
        *empty_transposed(grad, 2 * f, tokens),
    )
    grad_weight = grad.new_empty(0 if weight is None else rows, dtype=torch.float32)
    return (
        *activation,
        *both,
        grad_weight,
        grad.new_empty(0 if offsets is None else offsets.shape[0], dtype=torch.int32),
    )
