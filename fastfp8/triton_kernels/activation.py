"""SiLU and SwiGLU in Triton, by the operations of ``reference/activation.py`` in their order.

Each is exactly one instruction that IEEE 754 defines, or two integer ones: launches say ``enable_fp_fusion=False``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import activation as reference

LOG2_E, ROUNDER = tl.constexpr(reference.LOG2_E), tl.constexpr(reference.ROUNDER)
LN_2_HIGH, LN_2_LOW = tl.constexpr(reference.LN_2_HIGH), tl.constexpr(reference.LN_2_LOW)
C0, C1, C2, C3, C4 = (tl.constexpr(c) for c in reference.EXP_COEFFICIENTS)
EXP_LEAST, EXP_MOST = tl.constexpr(reference.EXP_LEAST), tl.constexpr(reference.EXP_MOST)
SILU_LEAST, SLOPE_MOST = tl.constexpr(reference.SILU_LEAST), tl.constexpr(reference.SLOPE_MOST)


@triton.jit
def exp(x):
    """``e ** x`` of FP32: see reference/activation.py."""
    x = tl.where(x < EXP_LEAST, EXP_LEAST, tl.where(x > EXP_MOST, EXP_MOST, x))
    shifted = tl.fma(x, LOG2_E, ROUNDER)
    n = shifted - ROUNDER
    r = tl.fma(n, -LN_2_LOW, tl.fma(n, -LN_2_HIGH, x))
    p = tl.fma(r, C4, C3)
    p = tl.fma(p, r, C2)
    p = tl.fma(p, r, C1)
    p = tl.fma(p, r, C0)
    p = tl.fma(p, r, 1.0)
    p = tl.fma(p, r, 1.0)
    return p * ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def silu(x):
    """``x / (1 + exp(-x))`` of FP32."""
    x = tl.where(x < SILU_LEAST, SILU_LEAST, x)
    return tl.div_rn(x, exp(-x) + 1.0)


@triton.jit
def silu_slope(x):
    """The derivative of silu: see reference/activation.py."""
    x = tl.where(x < SILU_LEAST, SILU_LEAST, x)
    sigmoid = tl.div_rn(1.0, exp(-x) + 1.0)
    return sigmoid * (1.0 + tl.where(x > SLOPE_MOST, SLOPE_MOST, x) * (1.0 - sigmoid))


@triton.jit
def clamped(gate, up, limit):
    """``limit`` may be infinite. A NaN passes."""
    return tl.where(gate > limit, limit, gate), tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))


@triton.jit
def swiglu(gate, up, weight, limit):
    """``silu(gate) * up * weight`` of FP32, gate and up clamped by ``limit`` first, which may be infinite.

    ``weight`` is of a shape that broadcasts, or None.
    """
    gate, up = clamped(gate, up, limit)
    out = silu(gate) * up
    if weight is not None:
        out *= weight
    return out


@triton.jit
def swiglu_backward(grad, gate, up, weight, limit):
    """The value of swiglu, ``grad`` times that without weight, and the gradients of gate and up."""
    gate_given, up_given = gate, up
    gate, up = clamped(gate, up, limit)
    silu_gate = silu(gate)
    value = silu_gate * up
    products = grad * value
    if weight is not None:
        grad *= weight
        value *= weight
    grad_up = tl.where(tl.abs(up_given) > limit, 0.0, grad * silu_gate)
    grad_gate = tl.where(gate_given > limit, 0.0, (grad * up) * silu_slope(gate))
    return value, products, grad_gate, grad_up
