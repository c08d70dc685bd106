"""SiLU and SwiGLU on the CPU, and the definition of their numerics: the same bits on every machine.

A libm's or a GPU's exponential is defined to an accuracy, not to a bit. So :func:`exp` is built here of FP32 operations
that IEEE 754 defines, and the kernels (``triton_kernels/activation.py``, ``csrc/gemm/kernels/swiglu.cuh``) do the same
operations in the same order.
"""

from __future__ import annotations

import functools

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


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    """silu of every value of a type of 16 bits, by its bits."""
    bits = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.int16)
    return silu(bits.view(dtype).float())


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
    values, up = gate.float(), up.float()
    bound = values.new_tensor(torch.inf if limit is None else limit)
    if gate.dtype == torch.float32:
        out = silu(torch.where(values > bound, bound, values))
    else:  # from a table: 6 times as fast (measured on 2 cores)
        out = _table(gate.dtype)[gate.view(torch.int16).int() & 0xFFFF]
        if limit is not None:
            out = torch.where(values > bound, silu(bound), out)
    if limit is not None:
        up = torch.where(up > bound, bound, torch.where(up < -bound, -bound, up))
    out *= up
    return out if weight is None else out.mul_(weight[:, None])
