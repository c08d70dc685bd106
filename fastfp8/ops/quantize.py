"""Quantisation to FP8 in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..counters import check_counters
from ..errors import check_type, check_value
from ..layout import BLOCK, Block, as_block, check_blocked, empty_scale, scale_shape_of
from ..presets import Preset, Rules
from ..reference.quantize import quantize as reference_quantize
from ..scaled_tensor import ScaledTensor
from .counted import register

_OP = "quantize"
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize(
    x: Tensor,
    block: Sequence[int] = (1, BLOCK),
    *,
    pow2: bool = False,
    eps: float = 0.0,
    preset: Preset | None = None,
    counters: Tensor | None = None,
) -> ScaledTensor:
    """Quantise ``x`` [R, C], or a stack [G, R, C] matrix by matrix, to float8_e4m3fn with one FP32 scale a block.

    Per block: ``amax`` is the largest finite absolute value; ``scale = amax / 448`` (IEEE division); a code is
    ``x * (448 / amax)`` in FP32, rounded to nearest even and saturated. ``amax`` is floored at ``max(eps, 2**-110)``. A
    block of zeros has scale 1. An infinity saturates to +-448, a NaN stays a NaN (code 0x7F) in its own place, and
    neither touches the scale. Bit for bit equal on every backend. DeepSeek-V3 report, section 3.3.2. On a GPU a stack
    is one launch where its matrices lie one below the other and, of (128, 128) blocks, R is a multiple of 128; else it
    is one launch a matrix.

    Args:
        x: bfloat16, float16 or float32 [R, C] or, not in (128, 1) blocks, [G, R, C]; any extents (edge blocks are
            ragged, and none spans two matrices), any strides, CPU or CUDA.
        block: (1, 128) for activations and gradients, (128, 1) for Wgrad operands, (128, 128) for weights.
        pow2: round each scale up to a power of two; the multiplier is then its exact inverse.
        eps: a floor of amax, in units of ``x``: 1e-4 gives the codes of TileKernels.
        preset: None, or one of :mod:`fastfp8.presets`: the codes and scales of another project bit for bit, its floor
            of amax instead of ``eps`` included.
        counters: None, or counters on the device of ``x`` (:func:`fastfp8.numerics.new_counters`), to which is added
            how many values saturated, became zero or subnormal, or were not finite: see :mod:`fastfp8.counters`.

    Returns:
        ScaledTensor of ``data`` in the shape of ``x``, row-major, and ``scale`` [ceil(R / block[0]),
        ceil(C / block[1])], of a stack [G, ...]; its layout is in :mod:`fastfp8.layout`.

    Raises:
        TypeError: ``x`` is not a tensor of such a dtype, ``pow2`` no bool, ``eps`` no number, ``preset`` no Preset, or
            ``counters`` no int64 tensor.
        ValueError: ``x`` has other dimensions, the block is another, ``eps`` is negative or not finite, it or ``pow2``
            is given beside a preset that has its own or none, or ``counters`` has another shape, stride or device or is
            given beside a preset.
    """
    checked = as_block(block, _OP)
    rules = ""
    if preset is not None:
        check_type(preset, Preset, _OP, "preset", "a fastfp8.presets.Preset or None")
        check_value(eps == 0, _OP, "eps", f"0 with preset {preset.name}, whose floor is {preset.eps}", eps)
        eps, rules = preset.eps, preset.rules.text
    if not torch.compiler.is_compiling():  # there the fake implementation checks: Dynamo cannot trace all of it
        check_options(_OP, pow2, eps)
        _check(x, checked, pow2, eps, rules, counters)
    op = torch.ops.fastfp8.quantize
    if counters is None:
        data, scale = op.default(x, checked, pow2, eps, rules)
    else:
        check_value(preset is None, _OP, "counters", "None with a preset", "counters")
        data, scale = op.counted(x, checked, pow2, eps, counters=counters)
    return ScaledTensor._trusted(data, scale, checked)


def check_options(op: str, pow2: object, eps: object) -> None:
    """Raise unless ``pow2`` is a bool and ``eps`` a number."""
    check_type(pow2, bool, op, "pow2", "a bool")
    check_type(eps, (float, int), op, "eps", "a number")


def check_eps(op: str, eps: float) -> None:
    check_value(0 <= eps < 2.0**100, op, "eps", "a number from 0 up to 2**100", eps)


def _rules(pow2: bool, text: str) -> Rules | None:
    """Those of a preset, or None for our own."""
    if not text:
        return None
    rules = Rules.parse(_OP, text)
    check_value(not pow2 or rules.pow2 != "none", _OP, "pow2", "False: this preset knows no powers of two", pow2)
    return rules


def _check(
    x: Tensor, block: Sequence[int], pow2: bool, eps: float, text: str, counters: Tensor | None
) -> tuple[Block, Rules | None]:
    checked = as_block(block, _OP)
    check_blocked(x, _OP, "x", INPUT_DTYPES, checked)
    check_eps(_OP, eps)
    check_counters(_OP, counters, x, "x")
    return checked, _rules(pow2, text)


@register("quantize", "CPU")
def _cpu(
    x: Tensor,
    block: Sequence[int] = (1, BLOCK),
    pow2: bool = False,
    eps: float = 0.0,
    rules: str = "",
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    checked, parsed = _check(x, block, pow2, eps, rules, counters)
    return reference_quantize(x, checked, pow2, eps, parsed, counters)


@register("quantize", "CUDA")
def _cuda(
    x: Tensor,
    block: Sequence[int] = (1, BLOCK),
    pow2: bool = False,
    eps: float = 0.0,
    rules: str = "",
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from ..triton_kernels.quantize import quantize as triton_quantize

    checked, parsed = _check(x, block, pow2, eps, rules, counters)
    return triton_quantize(x, checked, pow2, eps, parsed, counters)


@register("quantize", "fake")
def _fake(
    x: Tensor,
    block: Sequence[int] = (1, BLOCK),
    pow2: bool = False,
    eps: float = 0.0,
    rules: str = "",
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    checked, _ = _check(x, block, pow2, eps, rules, counters)
    data = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return data, empty_scale(x, scale_shape_of(x.shape, checked), checked)
