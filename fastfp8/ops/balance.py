"""What keeps the load of experts even: a bias that follows it, and a loss. Plain PyTorch on whatever device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import check_device, check_tensor, check_type, check_value, value_error

_UPDATE, _LOSS = "update_bias", "balance_loss"


def update_bias(bias: Tensor, load: Tensor, rate: float = 1e-3) -> Tensor:
    """``bias + rate * sign(mean(load) - load)``: the bias of :func:`fastfp8.route` for the next step.

    An expert with more tokens than the mean loses ``rate``, one with fewer gains it: DeepSeek-V3 report, section 2.1.2,
    which takes 1e-3, and 0 at the end of training. The comparison is of integers and so exact. ``load`` is that of the
    whole batch: sum it over micro-batches and ranks first.

    Args:
        bias: float32 [E].
        load: int32 or int64 [E] on the same device: how many tokens each expert got.
        rate: how far a bias moves.

    Returns:
        A new float32 tensor [E]. It has no gradient.

    Raises:
        TypeError: a dtype or a Python type is another.
        ValueError: shapes or devices do not fit, or ``rate`` is negative or not finite.
    """
    check_tensor(bias, _UPDATE, "bias", (torch.float32,), dim=1)
    check_tensor(load, _UPDATE, "load", (torch.int32, torch.int64), dim=1)
    check_device(load, _UPDATE, "load", bias, "bias")
    if load.shape != bias.shape:
        raise value_error(_UPDATE, "load", f"shape {tuple(bias.shape)}, as 'bias' has", f"shape {tuple(load.shape)}")
    check_type(rate, (float, int), _UPDATE, "rate", "a number")
    check_value(0 <= rate < 2.0**100, _UPDATE, "rate", "a number from 0 up to 2**100", rate)
    tokens = load.long()
    return bias.detach() + (tokens.sum() - tokens * tokens.shape[0]).sign() * rate


def balance_loss(scores: Tensor, topk_idx: Tensor, *, alpha: float = 1e-4, sequences: int = 1) -> Tensor:
    """The sequence-wise balance loss, ``alpha * sum over experts of f * P``: DeepSeek-V3 report, equations 17 to 20.

    Of a sequence of T tokens, ``f[e] = E / (top_k * T) * (tokens whose topk_idx has e)`` and ``P[e]`` is the mean of
    ``scores[t, e] / sum(scores[t])``. With perfect balance it is ``alpha``. Of several sequences it is the mean.

    The gradient goes to ``scores`` through P; f is a count. ``f`` counts the experts that the tokens went to, chosen
    with the bias, as training codes do; the equations read as if by affinity alone.

    Args:
        scores: float32 [sequences * T, E], the affinities that :func:`fastfp8.route` returns; at least one token.
        topk_idx: int64 or int32 [sequences * T, top_k] on the same device, from 0 to below E, or -1 for none.
        alpha: the weight of the loss.
        sequences: of equal length, one after the other.

    Returns:
        A float32 scalar.

    Raises:
        TypeError: a dtype or a Python type is another.
        ValueError: shapes or devices do not fit.
    """
    check_tensor(scores, _LOSS, "scores", (torch.float32,))
    check_tensor(topk_idx, _LOSS, "topk_idx", (torch.int64, torch.int32))
    check_device(topk_idx, _LOSS, "topk_idx", scores, "scores")
    check_type(alpha, (float, int), _LOSS, "alpha", "a number")
    check_type(sequences, int, _LOSS, "sequences", "an int")
    tokens, experts = scores.shape
    if tokens < 1 or experts < 1:
        raise value_error(_LOSS, "scores", "at least one token and one expert", f"shape {tuple(scores.shape)}")
    if topk_idx.shape[0] != tokens or topk_idx.shape[1] < 1:
        expected = f"shape ({tokens}, top_k), tokens as 'scores' has"
        raise value_error(_LOSS, "topk_idx", expected, f"shape {tuple(topk_idx.shape)}")
    if sequences < 1 or tokens % sequences:
        raise value_error(_LOSS, "sequences", f"a divisor of the {tokens} tokens", sequences)
    length = tokens // sequences
    chosen = topk_idx.long().reshape(sequences, -1)
    counts = scores.new_zeros((sequences, experts + 1), dtype=torch.int64)
    counts.scatter_add_(1, torch.where(chosen < 0, experts, chosen), torch.ones_like(chosen))
    frequency = counts[:, :experts].float() * (experts / (topk_idx.shape[1] * length))
    share = (scores / scores.sum(1, keepdim=True)).view(sequences, length, experts).mean(1)
    loss: Tensor = (frequency * share).sum(1).mean() * alpha
    return loss
