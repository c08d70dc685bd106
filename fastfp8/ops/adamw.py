"""A step of AdamW on many tensors at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..counters import check_counters
from ..errors import ArgumentTypeError, check_device, check_tensor, check_value, message, value_error
from ..layout import BLOCK, Block, has_scale_layout, scale_shape_of
from ..reference.adamw import adamw as reference_adamw
from ..reference.adamw import factors

_OP = "adamw"
PARAM_DTYPES = GRAD_DTYPES = MOMENT_DTYPES = (torch.float32, torch.bfloat16)
WEIGHT_BLOCK: Block = (BLOCK, BLOCK)
# Of `fp8`, for each parameter.
FP8_PARTS = ("data", "scale", "transposed data", "transposed scale")


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    fp8: list[Tensor],
    indices: list[int],
    *,
    step: int,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    stochastic_rounding: bool = False,
    seed: int = 0,
    counters: list[Tensor] | None = None,
) -> None:
    """One step of AdamW (arXiv 1711.05101, algorithm 2), in place: what :class:`fastfp8.optim.AdamW` calls.

    The arithmetic is FP32 in a fixed order, one rounding an operation, stated in ``fastfp8/reference/adamw.py``; the
    same bits on every backend. Moments in bfloat16 are rounded to nearest even, or stochastically by Philox-4x32-10,
    whose key is ``seed`` and whose counter is made of the element, ``step`` and the parameter's index; a NaN stays one.
    On a GPU it is one launch for all tensors whose gradients and moments share dtypes, and another for those that do
    not start and end at multiples of 16 bytes.

    Args:
        params: contiguous tensors of any shape, all float32 or all bfloat16.
        grads: float32 or bfloat16, contiguous, in the shapes of ``params``.
        masters: of bfloat16 parameters their float32 values, which are updated; each parameter becomes its master,
            rounded to nearest even. Empty where parameters are float32.
        exp_avgs, exp_avg_sqs: first and second moments, contiguous, float32 or bfloat16 (both of a parameter the same).
        fp8: empty, or for each parameter [N, K] or [G, N, K] what to write: data [N, K] and scale of
            ``quantize(master, (128, 128))``, data [K, N] and scale of its transpose, each row-major.
        indices: for each parameter a number that tells it from others of the same seed.
        step: 1 for the first one.
        seed: from 0 to 2**63 - 1.
        counters: None, or with ``fp8`` one for each parameter, as of :func:`fastfp8.quantize`. A value is counted once,
            for its code is the same in both of ``fp8``.

    Raises:
        TypeError: a dtype is another.
        ValueError: a length, shape, device or layout does not fit, or a number is out of its range.
    """
    options = (step, lr, betas, eps, weight_decay, stochastic_rounding, seed)
    counters = [] if counters is None else counters
    torch.ops.fastfp8.adamw(params, grads, masters, exp_avgs, exp_avg_sqs, fp8, counters, indices, *options)
    if not torch.compiler.is_compiling():
        # Who keeps something made of a parameter, as autograd does, sees by this that it has changed.
        torch.autograd.graph.increment_version([*params, *masters, *exp_avgs, *exp_avg_sqs, *fp8, *counters])


def check_numbers(op: str, lr: float, betas: Sequence[float], eps: float, weight_decay: float, seed: int) -> None:
    """Raise unless each is in its range."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check_value(0 <= value < math.inf, op, name, "a finite number from 0 on", value)
    check_value(len(betas) == 2 and all(0 <= b < 1 for b in betas), op, "betas", "two numbers from 0 to below 1", betas)
    check_value(0 <= seed < 1 << 63, op, "seed", "an integer from 0 to 2**63 - 1", seed)


def _check_like(name: str, tensors: list[Tensor], params: list[Tensor], dtypes: tuple[torch.dtype, ...]) -> None:
    if len(tensors) != len(params):
        raise value_error(_OP, name, f"{len(params)} tensors, as 'params' has", len(tensors))
    for i, (t, param) in enumerate(zip(tensors, params, strict=True)):
        at = f"{name}[{i}]"
        check_tensor(t, _OP, at, dtypes, dim=param.dim())
        check_device(t, _OP, at, params[0], "params[0]")
        if t.shape != param.shape:
            raise value_error(_OP, at, f"shape {tuple(param.shape)}", f"shape {tuple(t.shape)}")
        if not t.is_contiguous():
            raise value_error(_OP, at, "a contiguous tensor", f"stride {t.stride()}")


def _check_fp8(fp8: list[Tensor], params: list[Tensor]) -> None:
    if len(fp8) != 4 * len(params):
        raise value_error(_OP, "fp8", f"none or {4 * len(params)} tensors, four a parameter", len(fp8))
    for i, param in enumerate(params):
        if param.dim() not in (2, 3):
            raise value_error(_OP, f"params[{i}]", "2 or 3 dimensions, as 'fp8' is given", f"{param.dim()}")
        for j, part in enumerate(FP8_PARTS):
            t, at = fp8[4 * i + j], f"fp8[{4 * i + j}], {part},"
            shape = tuple(param.shape if j < 2 else param.mT.shape)
            if part.endswith("scale"):
                shape = scale_shape_of(shape, WEIGHT_BLOCK)
            check_tensor(t, _OP, at, (torch.float32 if part.endswith("scale") else torch.float8_e4m3fn,), param.dim())
            check_device(t, _OP, at, params[0], "params[0]")
            if tuple(t.shape) != shape:
                raise value_error(_OP, at, f"shape {shape}", f"shape {tuple(t.shape)}")
            fits = has_scale_layout(t, WEIGHT_BLOCK) if part.endswith("scale") else t.is_contiguous()
            if not fits:
                raise value_error(_OP, at, "a contiguous tensor", f"stride {t.stride()}")


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    fp8: list[Tensor],
    counters: list[Tensor],
    indices: Sequence[int],
    step: int,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    seed: int,
) -> None:
    check_numbers(_OP, lr, betas, eps, weight_decay, seed)
    check_value(step >= 1, _OP, "step", "1 or more", step)
    check_value(len(indices) == len(params), _OP, "indices", f"{len(params)}, as many as 'params'", len(indices))
    _check_like("params", params, params, PARAM_DTYPES)
    if len({param.dtype for param in params}) > 1:
        raise ArgumentTypeError(message(_OP, "params", "one dtype", [p.dtype for p in params]))
    _check_like("grads", grads, params, GRAD_DTYPES)
    if params and params[0].dtype == torch.float32:
        check_value(not masters, _OP, "masters", "none, as 'params' are float32", len(masters))
    else:
        _check_like("masters", masters, params, (torch.float32,))
    _check_like("exp_avgs", exp_avgs, params, MOMENT_DTYPES)
    _check_like("exp_avg_sqs", exp_avg_sqs, params, MOMENT_DTYPES)
    for i, (first, second) in enumerate(zip(exp_avgs, exp_avg_sqs, strict=True)):
        if second.dtype != first.dtype:
            expected = f"{first.dtype}, as 'exp_avgs[{i}]' is"
            raise ArgumentTypeError(message(_OP, f"exp_avg_sqs[{i}]", expected, second.dtype))
    if fp8:
        _check_fp8(fp8, params)
    expected = f"none or {len(params)}, one a parameter" if fp8 else "none, as 'fp8' is empty"
    check_value(len(counters) in (0, len(params) if fp8 else 0), _OP, "counters", expected, len(counters))
    for i, counts in enumerate(counters):
        check_counters(_OP, counts, params[0], "params[0]", f"counters[{i}]")


@torch.library.impl("fastfp8::adamw", "CPU")
@torch.no_grad()
def _cpu(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    fp8: list[Tensor],
    counters: list[Tensor],
    indices: list[int],
    step: int,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> None:
    tensors = (params, grads, masters, exp_avgs, exp_avg_sqs, fp8, counters, indices)
    _check(*tensors, step, lr, betas, eps, weight_decay, seed)
    reference_adamw(*tensors, step, factors(step, lr, betas, eps, weight_decay), stochastic_rounding, seed)


@torch.library.impl("fastfp8::adamw", "CUDA")
@torch.no_grad()
def _cuda(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    fp8: list[Tensor],
    counters: list[Tensor],
    indices: list[int],
    step: int,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> None:
    from ..triton_kernels.adamw import adamw as triton_adamw

    tensors = (params, grads, masters, exp_avgs, exp_avg_sqs, fp8, counters, indices)
    _check(*tensors, step, lr, betas, eps, weight_decay, seed)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fastfp8.adamw: it cannot be captured in a CUDA graph, whose replays would all be the same step: call it "
            "outside of the graph"
        )
    triton_adamw(*tensors, step, factors(step, lr, betas, eps, weight_decay), stochastic_rounding, seed)


@torch.library.register_fake("fastfp8::adamw")
def _fake(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    fp8: list[Tensor],
    counters: list[Tensor],
    indices: list[int],
    step: int,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> None:
    tensors = (params, grads, masters, exp_avgs, exp_avg_sqs, fp8, counters, indices)
    _check(*tensors, step, lr, betas, eps, weight_decay, seed)
