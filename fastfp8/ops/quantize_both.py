"""Quantisation of activations or gradients for all of their GEMMs: by row, and transposed for Wgrad."""

from __future__ import annotations

import torch
from torch import Tensor

from ..counters import check_counters
from ..errors import check_device, check_tensor, check_type, value_error
from ..layout import BLOCK, Block, empty_scale, empty_transposed, grouped_tokens, pad16, scale_shape_of
from ..reference import quantize_both as reference
from ..scaled_tensor import ScaledTensor
from .counted import check_pair, register
from .grouped_gemm import check_error, word_for
from .quantize import INPUT_DTYPES, check_eps, check_options

_BOTH, _GROUPED = "quantize_both", "quantize_grouped_both"
_BLOCK: Block = (1, BLOCK)


def quantize_both(
    x: Tensor,
    *,
    pow2: bool = False,
    eps: float = 0.0,
    pad: bool = False,
    counters: tuple[Tensor, Tensor] | None = None,
) -> tuple[ScaledTensor, ScaledTensor]:
    """``quantize(x)`` and ``quantize(x.T)`` from one read of ``x``, bit for bit: see :func:`fastfp8.quantize`.

    The first is an operand of Fprop or Dgrad, the second, with its blocks along the tokens, one of Wgrad. DeepSeek-V3
    report, sections 3.3.2 and 3.5.

    A GEMM sums over the tokens of a Wgrad operand and wants a multiple of 16 of them. So the rows of the transposed
    codes are a multiple of 16 bytes apart, as TMA wants, whatever M is, and the codes in between are zero. ``pad`` lets
    the ScaledTensor reach over them: zeros change no weight gradient and no scale, and any M will do.

    Args:
        x: bfloat16, float16 or float32 [M, K]; any extents and strides, CPU or CUDA.
        pow2: round each scale up to a power of two.
        eps: a floor of amax, in units of ``x``.
        pad: whether the transposed one has zeros up to the next multiple of 16 tokens.
        counters: None, or two as :func:`fastfp8.quantize` takes one: of the first result, of the second.

    Returns:
        Two ScaledTensors in (1, 128) blocks: [M, K], row-major, and [K, M], whose rows are M rounded up to 16 codes
        apart; with ``pad`` [K, M rounded up to 16].

    Raises:
        TypeError: ``x`` is not a tensor of such a dtype, ``pow2`` or ``pad`` is no bool, or ``eps`` no number.
        ValueError: ``x`` has other dimensions, or ``eps`` is negative or not finite.
    """
    if not torch.compiler.is_compiling():  # there the fake implementation checks: Dynamo cannot trace all of it
        check_options(_BOTH, pow2, eps)
        check_type(pad, bool, _BOTH, "pad", "a bool")
        check_pair(_BOTH, counters)
        _check(_BOTH, x, eps, *(counters or ()))
    op = torch.ops.fastfp8.quantize_both
    if counters is None:
        data, scale, data_t, scale_t = op.default(x, pow2, eps)
    else:
        data, scale, data_t, scale_t = op.counted(x, pow2, eps, counters=counters[0], counters_t=counters[1])
    return ScaledTensor._trusted(data, scale, _BLOCK), transposed_tensor(data_t, scale_t, None if pad else x.shape[0])


def transposed_tensor(data_t: Tensor, scale_t: Tensor, tokens: int | None) -> ScaledTensor:
    """Of codes padded to 16 tokens; only those of ``tokens`` unless that is None."""
    return ScaledTensor._trusted(data_t if tokens is None else data_t[:, :tokens], scale_t, _BLOCK)


def quantize_grouped_both(
    x: Tensor,
    offsets: Tensor,
    *,
    pow2: bool = False,
    eps: float = 0.0,
    counters: tuple[Tensor, Tensor] | None = None,
) -> tuple[ScaledTensor, ScaledTensor, Tensor]:
    """:func:`quantize_both` of tokens in groups, the experts of a mixture, for grouped GEMMs and their Wgrad.

    Group ``g`` is rows ``offsets[g - 1]`` (0 for the first) to ``offsets[g]`` of ``x``, as in
    :func:`fastfp8.grouped_gemm`, and has the codes and scales of ``quantize(x[rows])`` and of ``quantize(x[rows].T)``.
    In the transposed tensor each group begins at a multiple of 128 tokens, so that no block has tokens of two groups,
    and zero codes fill its last block. DeepSeek-V3 report, sections 3.3.2 and 3.5.

    Its number of columns, T', is what the most unfavourable split of T tokens into G groups needs: with
    ``n = min(T, G)``, ``(T + 127 * n) // 128`` blocks of 128. It depends on T and G alone, so nothing waits for the
    device. What lies past the last group's last block, codes and scales, is never written: its content is undefined, as
    is that of the first tensor's rows from ``offsets[-1]`` on, which are never read from ``x`` either.

    With one group, ``offsets`` = [M], it makes Wgrad operands of any number of tokens.

    Args:
        x: bfloat16, float16 or float32 [T, K]; any extents and strides, CPU or CUDA.
        offsets: int32 [G] on the device of ``x``, contiguous, at least one: the row at which each group ends, ascending
            from 0 to at most T. They are read by the kernel, never by the host, so that CUDA graphs may capture the
            call.
        pow2: round each scale up to a power of two.
        eps: a floor of amax, in units of ``x``.
        counters: as of :func:`quantize_both`. Only rows of a group are counted.

    Returns:
        A ScaledTensor [T, K] and one [K, T'], both row-major in (1, 128) blocks, and ``padded_offsets``, int32 [G] on
        the device of ``x``: the column at which the tokens of each group end in the second. Group ``g`` begins there at
        ``padded_offsets[g - 1]`` rounded up to 128, and ends where it begins if it has no token.

    Raises:
        TypeError: ``x`` or ``offsets`` is not a tensor of such a dtype, ``pow2`` is no bool, or ``eps`` no number.
        ValueError: ``x`` has other dimensions, ``offsets`` has another shape, stride or device, ``eps`` is negative or
            not finite, or T' exceeds what int32 can hold. On a CPU also offsets that decrease, are negative or exceed
            T. On a GPU each of these is taken as ``min(T, max(0, largest offset so far))``, and the next
            :func:`fastfp8.check` raises.
    """
    if not torch.compiler.is_compiling():
        check_options(_GROUPED, pow2, eps)
        check_pair(_GROUPED, counters)
        _check(_GROUPED, x, eps, *(counters or ()))
        check_tensor(offsets, _GROUPED, "offsets", (torch.int32,), dim=1)
    op, arguments = torch.ops.fastfp8.quantize_grouped_both, (x, offsets, word_for(offsets), pow2, eps)
    if counters is None:
        data, scale, data_t, scale_t, ends_t = op.default(*arguments)
    else:
        data, scale, data_t, scale_t, ends_t = op.counted(*arguments, counters=counters[0], counters_t=counters[1])
    first, second = ScaledTensor._trusted(data, scale, _BLOCK), ScaledTensor._trusted(data_t, scale_t, _BLOCK)
    return first, second, ends_t


def _check(op: str, x: Tensor, eps: float, counters: Tensor | None = None, counters_t: Tensor | None = None) -> None:
    check_tensor(x, op, "x", INPUT_DTYPES)
    check_eps(op, eps)
    check_counters(op, counters, x, "x")
    check_counters(op, counters_t, x, "x", "counters_t")


def check_offsets(op: str, offsets: Tensor, error: Tensor | None, x: Tensor, x_name: str) -> None:
    """Raise unless ``offsets`` can end groups of the rows of argument ``x_name``, and ``error`` be an error word."""
    check_tensor(offsets, op, "offsets", (torch.int32,), dim=1)
    check_device(offsets, op, "offsets", x, x_name)
    groups = offsets.shape[0]
    if groups < 1:
        raise value_error(op, "offsets", "at least one group", f"shape {tuple(offsets.shape)}")
    if groups > 1 and offsets.stride(0) != 1:
        raise value_error(op, "offsets", "a contiguous tensor", f"stride {tuple(offsets.stride())}")
    if grouped_tokens(x.shape[0], groups) >= 2**31:
        expected = f"fewer tokens, with {groups} groups padded to 128 below 2**31 as int32 counts them"
        raise value_error(op, x_name, expected, f"shape {tuple(x.shape)}")
    check_error(op, error, x, x_name)


@register("quantize_both", "CPU")
@torch.no_grad()
def _cpu(
    x: Tensor,
    pow2: bool = False,
    eps: float = 0.0,
    *,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check(_BOTH, x, eps, counters, counters_t)
    return reference.quantize_both(x, pow2, eps, counters, counters_t)


@register("quantize_both", "CUDA")
@torch.no_grad()
def _cuda(
    x: Tensor,
    pow2: bool = False,
    eps: float = 0.0,
    *,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    from ..triton_kernels import quantize_both as kernels

    _check(_BOTH, x, eps, counters, counters_t)
    return kernels.quantize_both(x, pow2, eps, counters, counters_t)


def _empty(x: Tensor, tokens: int) -> tuple[Tensor, ...]:
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return data, empty_scale(x, scale_shape_of(x.shape, _BLOCK), _BLOCK), *empty_transposed(x, x.shape[1], tokens)


@register("quantize_both", "fake")
def _fake(
    x: Tensor,
    pow2: bool = False,
    eps: float = 0.0,
    *,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check(_BOTH, x, eps, counters, counters_t)
    return _empty(x, pad16(x.shape[0]))


@register("quantize_grouped_both", "CPU")
@torch.no_grad()
def _grouped_cpu(
    x: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    pow2: bool = False,
    eps: float = 0.0,
    *,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check_grouped(x, offsets, error, eps, counters, counters_t)
    return reference.quantize_grouped_both(x, offsets, pow2, eps, counters, counters_t)


@register("quantize_grouped_both", "CUDA")
@torch.no_grad()
def _grouped_cuda(
    x: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    pow2: bool = False,
    eps: float = 0.0,
    *,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    from ..triton_kernels import quantize_both as kernels

    _check_grouped(x, offsets, error, eps, counters, counters_t)
    return kernels.quantize_grouped_both(x, offsets, error, pow2, eps, counters, counters_t)


@register("quantize_grouped_both", "fake")
def _grouped_fake(
    x: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    pow2: bool = False,
    eps: float = 0.0,
    *,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check_grouped(x, offsets, error, eps, counters, counters_t)
    return *_empty(x, grouped_tokens(x.shape[0], offsets.shape[0])), torch.empty_like(offsets)


def _check_grouped(
    x: Tensor,
    offsets: Tensor,
    error: Tensor | None,
    eps: float,
    counters: Tensor | None,
    counters_t: Tensor | None,
) -> None:
    _check(_GROUPED, x, eps, counters, counters_t)
    check_offsets(_GROUPED, offsets, error, x, "x")
