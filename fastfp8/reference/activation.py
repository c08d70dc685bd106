"""SiLU and SwiGLU on the CPU, and the definition of their numerics: the same bits on every machine.

A libm's or a GPU's exponential is defined to an accuracy, not to a bit. So :func:`exp` is built here of FP32 operations
that IEEE 754 defines, and the kernels (``triton_kernels/activation.py``, ``csrc/gemm/kernels/swiglu.cuh``) do the same
operations in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .tensor_core import fma as sure_fma

# exp(x) = 2**n * exp(r) with n = round(x / ln 2) and r = x - n ln 2, at most 0.3466 in magnitude (Cody and Waite 1980).
# Adding 1.5 * 2**23 rounds to an integer, which is then in the low bits of the sum.
LOG2_E, ROUNDER = float.fromhex("0x1.715476p+0"), 12582912.0
# ln 2 in two parts: n * LN_2_HIGH is short enough for x - n * LN_2_HIGH to be exact in one fma.
LN_2_HIGH, LN_2_LOW = float.fromhex("0x1.62e430p-1"), float.fromhex("-0x1.05c610p-29")
# exp(r) = 1 + r + r**2 * (c[0] + c[1] r + ...): coefficients for the least largest relative error, 4e-9, by reweighted
# least squares, rounded to FP32.
EXP_COEFFICIENTS = tuple(
    float.fromhex(c) for c in ("0x1.fffffcp-2", "0x1.555492p-3", "0x1.5558f2p-5", "0x1.123a20p-7", "0x1.6a23d0p-10")
)
# Beyond these the result is 0 or infinite whatever x is: n would leave -127 to 128, which are 0 and infinity as the
# exponent field of 2**n.
EXP_LEAST, EXP_MOST = -88.0, 89.0
# Where exp(-x) is infinite for certain: -89 / inf is the -0 that silu(-inf) must be, and -inf / inf were a NaN.
SILU_LEAST = -89.0
# The slope of silu takes what is above for this, where it is 1 anyway: infinity times 0 were a NaN.
SLOPE_MOST = 89.0

_TIE = 1 << 28  # the bits of a double beyond FP32's, where it lies half way between two FP32


def _fma(x: Tensor, y: Tensor | float, z: Tensor | float) -> Tensor:
    """``x * y + z`` in FP32 with one rounding, where the result is a normal number or exact.

    The sum is rounded to double first, which a second rounding does not notice unless that double is a tie of FP32.
    """
    total = x.double() * y + z
    out = total.float()
    tie = (total.view(torch.int64) & (2 * _TIE - 1)) == _TIE
    if tie.any():
        parts = (p if isinstance(p, Tensor) else torch.tensor(p) for p in (x, y, z))
        out[tie] = sure_fma(*(p.expand(x.shape)[tie] for p in parts))
    return out


def exp(x: Tensor) -> Tensor:
    """``e ** x`` of float32, within 1 ulp.

    0 below -87.68, where the exact value is subnormal, and infinite above 88.37, where it is no more than a factor of
    1.42 below FP32's largest number or beyond. A NaN stays one.
    """
    x = torch.where(x < EXP_LEAST, EXP_LEAST, torch.where(x > EXP_MOST, EXP_MOST, x))
    shifted = _fma(x, LOG2_E, ROUNDER)
    n = shifted - ROUNDER
    r = _fma(n, -LN_2_LOW, _fma(n, -LN_2_HIGH, x))
    p = torch.full_like(r, EXP_COEFFICIENTS[-1])
    for c in (*EXP_COEFFICIENTS[-2::-1], 1.0, 1.0):
        p = _fma(p, r, c)
    # The low 9 bits of the integer plus the bias are the sign and exponent field of 2**n.
    return p * ((shifted.view(torch.int32) + 127) << 23).view(torch.float32)


def silu(x: Tensor) -> Tensor:
    """``x / (1 + exp(-x))`` of float32: exp as above, an addition, a division, each rounded once. Within 2.4 ulp.

    -0 below -88.37, of -infinity too, where the exact value lies between -4e-37 and 0. A NaN stays one.
    """
    x = torch.where(x < SILU_LEAST, SILU_LEAST, x)
    return x / (exp(-x) + 1)


def silu_slope(x: Tensor) -> Tensor:
    """The derivative of silu: ``s * (1 + x * (1 - s))`` with ``s = 1 / (1 + exp(-x))``, each operation rounded once.

    1 above 16.64, of infinity too; -0 below -88.37, of -infinity too. A NaN stays one.
    """
    x = torch.where(x < SILU_LEAST, SILU_LEAST, x)
    sigmoid = torch.ones_like(x) / (exp(-x) + 1)
    return sigmoid * (1 + torch.where(x > SLOPE_MOST, SLOPE_MOST, x) * (1 - sigmoid))


@functools.cache
def _table(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """``function`` of every value of a type of 16 bits, by its bits."""
    bits = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.int16)
    return function(bits.view(dtype).float())


def _of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function`` of ``x`` in FP32; of 16 bits from a table, which is 6 times as fast (measured on 2 cores).

    FP32 values that are BF16 ones, as those of E4M3 codes with scales of powers of two are, come from its table.
    """
    if x.dtype != torch.float32:
        return _table(function, x.dtype)[x.view(torch.int16).int() & 0xFFFF]
    bits = x.contiguous().view(torch.int32)
    if (bits & 0xFFFF).any():
        return function(x)
    return _table(function, torch.bfloat16)[(bits >> 16) & 0xFFFF]


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float | None) -> Tensor:
    """``silu(gate) * up * weight`` in FP32, a product and its rounding at a time.

    Args:
        gate: bfloat16, float16 or float32 [R, F].
        up: of the same dtype and shape.
        weight: float32 [R], one for each row, or None.
        limit: the most that ``gate`` may be, and ``up`` in magnitude, or None. A NaN passes.

    Returns:
        float32 [R, F].
    """
    out, up = _clamped(gate, up, limit)
    out *= up
    return out if weight is None else out.mul_(weight[:, None])


def _clamped(gate: Tensor, up: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """``silu(gate)`` and ``up`` in FP32, clamped."""
    out, up = _of(silu, gate), up.float()
    if limit is not None:
        bound = up.new_tensor(limit)
        out = torch.where(gate.float() > bound, silu(bound), out)
        up = torch.where(up > bound, bound, torch.where(up < -bound, -bound, up))
    return out, up


class SwiGluBackward(NamedTuple):
    """What :func:`swiglu_backward` makes, all float32 [R, F]."""

    value: Tensor
    """``swiglu`` again, bit for bit."""
    products: Tensor
    """``grad * (silu(gate) * up)``, whose sum over a row is the gradient of its weight."""
    grad_gate: Tensor
    grad_up: Tensor


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor | None, limit: float | None
) -> SwiGluBackward:
    """The gradients of :func:`swiglu`, in FP32 with one rounding for each operation, and its value again.

    With ``d = grad * weight``, or ``grad`` without a weight: ``grad_up = d * silu(gate)`` and
    ``grad_gate = (d * up) * silu_slope(gate)``, of ``gate`` and ``up`` as clamped. A gradient is 0 where its own
    argument was beyond ``limit``, and not where it was equal to it.
    """
    grad = grad.float()
    silu_gate, clamped = _clamped(gate, up, limit)
    value = silu_gate * clamped
    products = grad * value
    if weight is not None:
        grad, value = grad * weight[:, None], value * weight[:, None]
    grad_up, grad_gate = grad * silu_gate, (grad * clamped) * _of(silu_slope, gate)
    if limit is not None:
        bound = grad.new_tensor(limit)
        grad_up = torch.where(up.float().abs() > bound, 0.0, grad_up)
        grad_gate = torch.where(gate.float() > bound, 0.0, grad_gate)
    return SwiGluBackward(value, products, grad_gate, grad_up)
