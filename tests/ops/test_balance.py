"""What keeps experts evenly loaded: update_bias and balance_loss."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import fastfp8
from fastfp8 import balance_loss, update_bias


def test_update_bias() -> None:
    bias = torch.tensor([0.5, 0.0, -0.25, 0.0])
    new = update_bias(bias, torch.tensor([5, 3, 3, 1], dtype=torch.int32), 0.125)
    assert new.tolist() == [0.375, 0.0, -0.25, 0.125]
    assert bias.tolist() == [0.5, 0.0, -0.25, 0.0]
    # In FP32 the mean would round to the load itself.
    load = torch.tensor([1 << 40, (1 << 40) + 2, 1 << 40], dtype=torch.int64)
    assert update_bias(torch.zeros(3), load, 1.0).tolist() == [1.0, -1.0, 1.0]
    assert update_bias(bias, torch.ones(4, dtype=torch.int32), 0).tolist() == bias.tolist()


def test_update_bias_evens_the_load_out() -> None:
    """The rule at work: experts that all tokens like lose them, within a few steps of the bias."""
    generator = torch.Generator().manual_seed(0)
    bias, liked = torch.zeros(16), torch.linspace(-2, 2, 16)
    logits = torch.randn(512, 16, generator=generator) + liked
    before = fastfp8.route(logits, bias, top_k=2).load
    for _ in range(300):
        bias = update_bias(bias, fastfp8.route(logits, bias, top_k=2).load, 5e-3)
    after = fastfp8.route(logits, bias, top_k=2).load
    assert before.max() > 3 * 64  # of 64 on average
    assert after.max() < 1.25 * 64


def plain_loss(scores: Tensor, topk_idx: Tensor, alpha: float, sequences: int) -> Tensor:
    """Equations 17 to 20, a sequence and an expert at a time."""
    losses = []
    for s, idx in zip(scores.chunk(sequences), topk_idx.chunk(sequences), strict=True):
        (tokens, experts), top_k = s.shape, idx.shape[1]
        loss = s.new_zeros(())
        for e in range(experts):
            f = experts / (top_k * tokens) * sum(e in row for row in idx.tolist())
            loss = loss + f * sum(s[t, e] / s[t].sum() for t in range(tokens)) / tokens
        losses.append(alpha * loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("sequences", [1, 3])
def test_balance_loss_and_its_gradient(sequences: int, dtype: torch.dtype) -> None:
    scores = torch.rand(12, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = scores.detach().double().requires_grad_()
    topk_idx = fastfp8.route(torch.logit(scores.detach()), torch.zeros(6), top_k=2).topk_idx.to(dtype)
    topk_idx[3, 1] = -1
    loss, expected = (
        balance_loss(scores, topk_idx, alpha=0.5, sequences=sequences),
        plain_loss(exact, topk_idx, 0.5, sequences),
    )
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(scores.grad.double(), exact.grad, rtol=1e-5, atol=1e-8)
    assert scores.grad.abs().max() > 1e-3


def test_perfect_balance_costs_alpha() -> None:
    topk_idx = torch.tensor([[0, 1], [2, 3]])
    assert balance_loss(torch.full((2, 4), 0.25), topk_idx).item() == pytest.approx(1e-4)


def test_through_route() -> None:
    """The gradient of the loss arrives at the logits."""
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    got = fastfp8.route(logits, torch.zeros(6), top_k=2)
    balance_loss(got.scores, got.topk_idx, alpha=1.0).backward()
    plain_loss(exact.sigmoid(), got.topk_idx, 1.0, 1).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    assert logits.grad.abs().max() > 1e-3


BAD = [
    (update_bias, {"bias": torch.zeros(4).double()}, TypeError, "'bias': expected dtype torch.float32"),
    (update_bias, {"load": torch.zeros(4)}, TypeError, "'load': expected dtype torch.int32 or torch.int64"),
    (update_bias, {"load": torch.zeros(5, dtype=torch.int32)}, ValueError, "'load': expected shape (4,)"),
    (update_bias, {"rate": "1"}, TypeError, "'rate': expected a number, got str"),
    (update_bias, {"rate": -1.0}, ValueError, "'rate': expected a number from 0 up to 2**100, got -1.0"),
    (update_bias, {"rate": float("nan")}, ValueError, "'rate': expected a number from 0 up to 2**100, got nan"),
    (balance_loss, {"scores": torch.zeros(6, 4).bfloat16()}, TypeError, "'scores': expected dtype torch.float32"),
    (balance_loss, {"scores": torch.zeros(0, 4)}, ValueError, "'scores': expected at least one token"),
    (balance_loss, {"topk_idx": torch.zeros(5, 2, dtype=torch.int64)}, ValueError, "'topk_idx': expected shape (6"),
    (balance_loss, {"topk_idx": torch.zeros(6, 2)}, TypeError, "'topk_idx': expected dtype torch.int64"),
    (balance_loss, {"sequences": 4}, ValueError, "'sequences': expected a divisor of the 6 tokens, got 4"),
    (balance_loss, {"sequences": 2.0}, TypeError, "'sequences': expected an int, got float"),
    (balance_loss, {"alpha": None}, TypeError, "'alpha': expected a number, got NoneType"),
]


@pytest.mark.parametrize(("function", "change", "error", "words"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(function: object, change: dict[str, object], error: type[Exception], words: str) -> None:
    good: dict[str, object] = (
        {"bias": torch.zeros(4), "load": torch.zeros(4, dtype=torch.int32)}
        if function is update_bias
        else {"scores": torch.ones(6, 4), "topk_idx": torch.zeros(6, 2, dtype=torch.int64)}
    )
    assert callable(function)
    function(**good)
    with pytest.raises(error, match=re.escape(words)):
        function(**(good | change))
