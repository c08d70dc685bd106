"""The gate of a mixture of experts: from logits to the experts of each token and their weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import check_device, check_dtype, check_tensor, check_type, check_value, value_error
from ..reference import route as reference

_OP, _BACKWARD = "route", "route_backward"
LOGIT_DTYPES = (torch.float32, torch.bfloat16)
SCORES = ("sigmoid", "softmax")
# What one program of the Triton kernel holds; DeepSeek-V3 has 256.
MAX_EXPERTS = 1024


class Routing(NamedTuple):
    """What :func:`route` returns."""

    topk_idx: Tensor
    """int64 [T, top_k]: the experts of each token, best first."""
    topk_weights: Tensor
    """float32 [T, top_k]: their weights."""
    scores: Tensor
    """float32 [T, E]: the affinities, without the bias."""
    load: Tensor
    """int32 [E]: how many tokens each expert got."""


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    score: str = "sigmoid",
    scale: float = 1.0,
) -> Routing:
    """Choose ``top_k`` of E experts for each token: DeepSeek-V3 report, section 2.1.2.

    The affinity of a token to an expert is ``1 / (1 + exp(-logit))``, or the softmax of its logits. Experts are chosen
    by affinity plus ``bias``: those with the largest, the lowest index among equals, best first. With ``groups`` of E /
    groups neighbouring experts each, for nodes, only the ``top_groups`` best groups take part; a group counts as much
    as its ``top_k / top_groups`` best experts together, biased. A weight is the affinity without the bias, over the sum
    of those chosen (1e-20 if that is less), times ``scale``.

    All in FP32, each operation rounded once in an order that ``fastfp8/reference/route.py`` states, exponentials too:
    choices and bits are equal on every backend. In the choice a NaN counts as minus infinity; where it is chosen for
    want of others, weights are NaN.

    ``topk_weights`` and ``scores`` have gradients with respect to ``logits``, once differentiable. ``bias`` has none:
    :func:`fastfp8.update_bias` moves it.

    Args:
        logits: float32 or bfloat16 [T, E], any strides; any T, 0 too, and E from 1 to 1024.
        bias: float32 [E], contiguous, on the device of ``logits``.
        top_k: how many experts a token gets, from 1 to ``top_groups`` times E / groups.
        groups: a divisor of E.
        top_groups: from 1 to ``groups``, a divisor of ``top_k``.
        score: "sigmoid" or "softmax".
        scale: of the weights; 2.5 in DeepSeek-V3.

    Returns:
        A named tuple of ``topk_idx`` int64 [T, top_k], ``topk_weights`` float32 [T, top_k], ``scores`` float32 [T, E]
        and ``load`` int32 [E], the tokens that each expert got; see :class:`Routing`.

    Raises:
        TypeError: a dtype or a Python type is another.
        ValueError: shapes, devices or numbers do not fit.
    """
    if not torch.compiler.is_compiling():  # there the fake implementation checks: Dynamo cannot trace all of it
        for name, value in (("top_k", top_k), ("groups", groups), ("top_groups", top_groups)):
            check_type(value, int, _OP, name, "an int")
        check_type(score, str, _OP, "score", "a str")
        check_type(scale, (float, int), _OP, "scale", "a number")
        _check(logits, bias, top_k, groups, top_groups, score, scale)
    options = {"top_k": top_k, "groups": groups, "top_groups": top_groups, "score": score, "scale": scale}
    return Routing(*torch.ops.fastfp8.route(logits, bias, **options))


def route_backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    topk_idx: Tensor,
    scores: Tensor,
    *,
    score: str = "sigmoid",
    scale: float = 1.0,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The gradient of :func:`route` with respect to its logits, which autograd calls. Bit for bit on every backend.

    Args:
        grad_weights: float32 [T, top_k], the gradient of ``topk_weights``, or None for zeros.
        grad_scores: float32 [T, E], that of ``scores``, or None for zeros.
        topk_idx: as returned by :func:`route`: int64 [T, top_k], contiguous, from 0 to below E and no two of a token
            equal. It is not checked.
        scores: as returned by :func:`route`: float32 [T, E], contiguous.
        score, scale: what :func:`route` was given.
        out_dtype: float32 or bfloat16, the dtype of the logits.

    Returns:
        A row-major tensor [T, E] of ``out_dtype``.

    Raises:
        TypeError: a dtype is another.
        ValueError: shapes, devices or strides do not fit.
    """
    args = (grad_weights, grad_scores, topk_idx, scores, score, scale, out_dtype)
    out: Tensor = torch.ops.fastfp8.route_backward(*args)
    return out


def _check(logits: Tensor, bias: Tensor, top_k: int, groups: int, top_groups: int, score: str, scale: float) -> None:
    check_tensor(logits, _OP, "logits", LOGIT_DTYPES)
    check_tensor(bias, _OP, "bias", (torch.float32,), dim=1)
    check_device(bias, _OP, "bias", logits, "logits")
    experts = logits.shape[1]
    if not 1 <= experts <= MAX_EXPERTS:
        raise value_error(_OP, "logits", f"1 to {MAX_EXPERTS} experts", f"shape {tuple(logits.shape)}")
    if tuple(bias.shape) != (experts,):
        raise value_error(_OP, "bias", f"shape {(experts,)}, one for each expert", f"shape {tuple(bias.shape)}")
    if not bias.is_contiguous():
        raise value_error(_OP, "bias", "a contiguous tensor", f"stride {tuple(bias.stride())}")
    if groups < 1 or experts % groups:
        raise value_error(_OP, "groups", f"a divisor of E = {experts}", groups)
    if not 1 <= top_groups <= groups:
        raise value_error(_OP, "top_groups", f"1 to {groups}, the groups", top_groups)
    most = top_groups * (experts // groups)
    if not 1 <= top_k <= most or top_k % top_groups:
        raise value_error(_OP, "top_k", f"a multiple of top_groups = {top_groups} from 1 to {most}", top_k)
    _check_score(_OP, score, scale)


def _check_score(op: str, score: str, scale: float) -> None:
    if score not in SCORES:
        raise value_error(op, "score", " or ".join(map(repr, SCORES)), repr(score))
    check_value(abs(scale) < 2.0**100, op, "scale", "a number below 2**100 in magnitude", scale)


def _check_backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    topk_idx: Tensor,
    scores: Tensor,
    score: str,
    scale: float,
    out_dtype: torch.dtype,
) -> None:
    check_tensor(scores, _BACKWARD, "scores", (torch.float32,))
    check_tensor(topk_idx, _BACKWARD, "topk_idx", (torch.int64,))
    check_device(topk_idx, _BACKWARD, "topk_idx", scores, "scores")
    if topk_idx.shape[0] != scores.shape[0]:
        expected = f"T = {scores.shape[0]} rows, as 'scores' has"
        raise value_error(_BACKWARD, "topk_idx", expected, f"shape {tuple(topk_idx.shape)}")
    for name, tensor in (("topk_idx", topk_idx), ("scores", scores)):
        if not tensor.is_contiguous():
            raise value_error(_BACKWARD, name, "a contiguous tensor", f"stride {tuple(tensor.stride())}")
    for name, grad, like in (("grad_weights", grad_weights, topk_idx), ("grad_scores", grad_scores, scores)):
        if grad is None:
            continue
        check_tensor(grad, _BACKWARD, name, (torch.float32,))
        check_device(grad, _BACKWARD, name, scores, "scores")
        if grad.shape != like.shape:
            raise value_error(_BACKWARD, name, f"shape {tuple(like.shape)}", f"shape {tuple(grad.shape)}")
    _check_score(_BACKWARD, score, scale)
    check_dtype(out_dtype, _BACKWARD, "out_dtype", LOGIT_DTYPES)


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.impl("fastfp8::route", "CPU")
def _cpu(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    score: str = "sigmoid",
    scale: float = 1.0,
) -> _Outputs:
    _check(logits, bias, top_k, groups, top_groups, score, scale)
    return reference.route(logits, bias, top_k, groups, top_groups, score, scale)


@torch.library.impl("fastfp8::route", "CUDA")
def _cuda(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    score: str = "sigmoid",
    scale: float = 1.0,
) -> _Outputs:
    from ..triton_kernels.route import route as triton_route

    _check(logits, bias, top_k, groups, top_groups, score, scale)
    return triton_route(logits, bias, top_k, groups, top_groups, score, scale)


@torch.library.register_fake("fastfp8::route")
def _fake(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    score: str = "sigmoid",
    scale: float = 1.0,
) -> _Outputs:
    _check(logits, bias, top_k, groups, top_groups, score, scale)
    tokens, experts = logits.shape
    return (
        logits.new_empty((tokens, top_k), dtype=torch.int64),
        logits.new_empty((tokens, top_k), dtype=torch.float32),
        logits.new_empty((tokens, experts), dtype=torch.float32),
        logits.new_empty((experts,), dtype=torch.int32),
    )


@torch.library.impl("fastfp8::route_backward", "CPU")
@torch.no_grad()
def _backward_cpu(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    topk_idx: Tensor,
    scores: Tensor,
    score: str,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    args = (grad_weights, grad_scores, topk_idx, scores, score, scale, out_dtype)
    _check_backward(*args)
    return reference.route_backward(*args)


@torch.library.impl("fastfp8::route_backward", "CUDA")
@torch.no_grad()
def _backward_cuda(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    topk_idx: Tensor,
    scores: Tensor,
    score: str,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    from ..triton_kernels.route import route_backward as triton_route_backward

    args = (grad_weights, grad_scores, topk_idx, scores, score, scale, out_dtype)
    _check_backward(*args)
    out: Tensor = triton_route_backward(*args)
    return out


@torch.library.register_fake("fastfp8::route_backward")
def _backward_fake(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    topk_idx: Tensor,
    scores: Tensor,
    score: str,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_backward(grad_weights, grad_scores, topk_idx, scores, score, scale, out_dtype)
    return torch.empty(scores.shape, dtype=out_dtype, device=scores.device)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor], keyword_only_inputs: dict[str, Any], output: _Outputs
) -> None:
    ctx.set_materialize_grads(False)  # zeros [T, E] where nothing depends on the scores
    ctx.save_for_backward(output[0], output[2])
    ctx.score, ctx.scale = keyword_only_inputs.get("score", "sigmoid"), keyword_only_inputs.get("scale", 1.0)
    ctx.logits_dtype = inputs[0].dtype


def _backward(
    ctx: Any, _: None, grad_weights: Tensor | None, grad_scores: Tensor | None, __: None
) -> tuple[Tensor | None, None]:
    if grad_weights is None and grad_scores is None:
        return None, None
    args = (grad_weights, grad_scores, *ctx.saved_tensors, ctx.score, ctx.scale, ctx.logits_dtype)
    return torch.ops.fastfp8.route_backward(*args), None


torch.library.register_autograd("fastfp8::route", _backward, setup_context=_setup_context)
