"""route on every backend, against an oracle in plain Python that shares no code with the library."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from backends import assert_same_bits, backend_params
from routing_backends import NAMES, routing
from torch import Tensor

from fastfp8 import Routing, route

INF, NAN = math.inf, math.nan
# Experts, top_k, groups, top_groups: DeepSeek-V3's, no limit, groups of no power of two, one of each.
CONFIGS = [(256, 8, 8, 4), (24, 6, 6, 2), (48, 4, 3, 2), (7, 3, 1, 1), (5, 5, 5, 5), (1, 1, 1, 1), (33, 32, 1, 1)]
KINDS = ["normal", "ties", "constant", "wide", "special", "nothing finite"]


def make(kind: str, tokens: int, experts: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, experts)) * 2
    if kind == "ties":
        x = np.round(x)
    elif kind == "constant":
        x = np.full(x.shape, 0.25)
    elif kind == "wide":
        x = x * 60
    elif kind == "special":
        x = np.where(rng.random(x.shape) < 0.3, rng.choice([INF, -INF, NAN, 0.0, -0.0, 1e-40, 3e38], x.shape), x)
    elif kind == "nothing finite":
        x = rng.choice([-INF, NAN], x.shape)
    return torch.from_numpy(x.astype(np.float32))


def make_bias(experts: int, seed: int = 1) -> Tensor:
    """Of few values, so that there are ties with it too."""
    return torch.from_numpy((np.random.default_rng(seed).integers(-2, 3, experts) / 8).astype(np.float32))


def best(values: list[float], candidates: list[int], count: int) -> list[int]:
    """Of ``candidates`` those with the largest of ``values``, the lowest first among equals, NaN last with -inf."""
    return sorted(candidates, key=lambda i: (INF if math.isnan(values[i]) else -values[i], i))[:count]


def choose(biased: np.ndarray, top_k: int, groups: int, top_groups: int) -> list[int]:
    """The experts of one token, from its biased FP32 affinities."""
    values, size = biased.tolist(), len(biased) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    group_score = []
    for group in members:
        total = np.float32(0)
        for i in best(values, group, top_k // top_groups):
            with np.errstate(invalid="ignore"):
                total = np.float32(total + (np.float32(-INF) if math.isnan(values[i]) else biased[i]))
        group_score.append(float(total))
    kept = best(group_score, list(range(groups)), top_groups)
    return best(values, [i for g in sorted(kept) for i in members[g]], top_k)


def check(logits: Tensor, bias: Tensor, got: Routing, config: tuple[int, ...], score: str, scale: float) -> None:
    """All that follows from the affinities, exactly, and those to a few units of the last place."""
    _, top_k, groups, top_groups = config
    x = logits.float().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        if score == "sigmoid":
            exact = 1 / (1 + np.exp(-x.astype(np.float64)))
        else:  # of differences that FP32 has rounded
            exact = np.exp((x - np.fmax.reduce(x, 1, keepdims=True)).astype(np.float64))
            exact /= exact.sum(1, keepdims=True)
    scores = got.scores.numpy()
    # Below 1e-37 the exponential of FP32 is 0 or infinite.
    np.testing.assert_allclose(scores, exact, rtol=1e-6, atol=1e-37)
    with np.errstate(invalid="ignore"):
        biased = scores + bias.numpy()
    chosen = [choose(row, top_k, groups, top_groups) for row in biased]
    assert got.topk_idx.tolist() == chosen
    assert (got.topk_idx.dtype, got.load.dtype) == (torch.int64, torch.int32)
    assert got.load.tolist() == np.bincount(np.array(chosen, int).flatten(), minlength=len(bias)).tolist()
    weights = np.zeros((len(chosen), top_k), np.float32)
    for t, experts in enumerate(chosen):
        total = np.float32(0)
        for e in experts:
            total = np.float32(total + scores[t, e])
        total = np.float32(1e-20) if total < np.float32(1e-20) else total
        weights[t] = scores[t, experts] / total * np.float32(scale)
    assert_same_bits(got.topk_weights, torch.from_numpy(weights), "weights")


def options_of(config: tuple[int, ...], score: str, scale: float = 2.5) -> dict[str, Any]:
    _, top_k, groups, top_groups = config
    return {"top_k": top_k, "groups": groups, "top_groups": top_groups, "score": score, "scale": scale}


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_choices(name: str, config: tuple[int, ...], score: str) -> None:
    for kind in KINDS if name in ("reference", "cuda") else ["ties", "special"]:
        bias = make_bias(config[0])
        for dtype in (torch.float32, torch.bfloat16):
            logits = make(kind, 9, config[0]).to(dtype)
            got = routing(name).route(logits, bias, **options_of(config, score))
            check(logits, bias, got, config, score, 2.5)
            for part, expected in zip(got, route(logits, bias, **options_of(config, score)), strict=True):
                assert_same_bits(part.float(), expected.float(), kind)


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_shapes_and_strides(name: str) -> None:
    config = (24, 6, 6, 2)
    bias = make_bias(24)
    big = make("normal", 140, 60)
    for logits in (big[:0, :24], big[:1, :24], big[:70, :24], big[3:100:7, 1:49:2], big[:24, :37].t(), big[:, :24]):
        got = routing(name).route(logits, bias, **options_of(config, "sigmoid", 1.0))
        check(logits, bias, got, config, "sigmoid", 1.0)


def test_infinite_biases() -> None:
    """An expert that must not be chosen, and one that must; together in a group they sum to NaN, which loses."""
    logits, bias = make("normal", 6, 8), torch.zeros(8)
    bias[2], bias[5] = -INF, INF
    got = route(logits, bias, top_k=3)
    check(logits, bias, got, (8, 3, 1, 1), "sigmoid", 1.0)
    assert got.load[[2, 5]].tolist() == [0, 6]
    bias[4:6] = torch.tensor([-INF, INF])
    got = route(logits, bias, top_k=2, groups=4, top_groups=1)
    check(logits, bias, got, (8, 2, 4, 1), "sigmoid", 1.0)
    assert got.load[4:6].tolist() == [0, 0]


def test_the_bias_moves_the_choice_but_no_weight() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([-9.0, 0.0, 0.0, 0.0])
    got = route(logits, bias, top_k=2)
    assert got.topk_idx.tolist() == [[1, 2]]
    affinity = torch.tensor([1.0, 0.0]).double().sigmoid()
    torch.testing.assert_close(got.topk_weights[0].double(), affinity / affinity.sum(), rtol=1e-6, atol=0)
    assert route(logits, bias.zero_(), top_k=2).topk_idx.tolist() == [[0, 1]]


def float64_loss(logits: Tensor, topk_idx: Tensor, score: str, scale: float) -> tuple[Tensor, Tensor]:
    s = logits.sigmoid() if score == "sigmoid" else logits.softmax(1)
    chosen = s.gather(1, topk_idx)
    return chosen / chosen.sum(1, keepdim=True) * scale, s


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_gradient_is_that_of_float64(score: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        logits = make("normal", 40, 24).to(dtype).requires_grad_()
        exact = logits.detach().double().requires_grad_()
        got = route(logits, make_bias(24), top_k=4, groups=4, top_groups=2, score=score, scale=2.5)
        weights, scores = float64_loss(exact, got.topk_idx, score, 2.5)
        up = [torch.randn(t.shape, generator=generator) for t in (weights, scores)]
        for use_weights, use_scores in ((1, 0), (0, 1), (1, 1)):
            logits.grad = exact.grad = None
            outs = [(got.topk_weights, weights, up[0])] * use_weights + [(got.scores, scores, up[1])] * use_scores
            sum((o * u).sum() for o, _, u in outs).backward(retain_graph=True)
            sum((o * u).sum() for _, o, u in outs).backward(retain_graph=True)
            assert logits.grad.dtype == dtype
            error = (logits.grad.double() - exact.grad).norm() / exact.grad.norm()
            assert error < tolerance, (dtype, use_weights, use_scores)


def test_gradient_where_the_sum_of_the_chosen_is_clamped() -> None:
    """There weights are affinities * 1e20, of which each has the derivative 1e20."""
    logits = torch.tensor([[-47.0, -48.0, -80.0]], requires_grad=True)
    got = route(logits, torch.zeros(3), top_k=2)
    got.topk_weights.backward(torch.tensor([[1.0, 3.0]]))
    expected = torch.tensor([1.0, 3.0, 0.0]) * logits.detach()[0].double().exp() * 1e20
    torch.testing.assert_close(logits.grad[0].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", backend_params(NAMES[1:]))
def test_gradient_bits(name: str, score: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for config in CONFIGS[:4]:
        for kind in ("normal", "special"):
            experts, top_k = config[:2]
            got = route(make(kind, 9, experts), make_bias(experts), **options_of(config, score))
            weights, scores = torch.randn(9, top_k, generator=generator), torch.randn(9, experts, generator=generator)
            some = ((weights, None), (None, scores), (weights[:1].expand(9, top_k), scores.t().contiguous().t()))
            for given in some:
                for dtype in (torch.float32, torch.bfloat16):
                    options = {"score": score, "scale": 2.5, "out_dtype": dtype}
                    args = (*given, got.topk_idx, got.scores)
                    expected = routing("reference").route_backward(*args, **options)
                    assert_same_bits(routing(name).route_backward(*args, **options), expected, str(config))


def test_no_gradient_flows_from_indices_or_to_the_bias() -> None:
    logits, bias = make("normal", 3, 8).requires_grad_(), torch.zeros(8, requires_grad=True)
    got = route(logits, bias, top_k=2)
    assert [t.requires_grad for t in got] == [False, True, True, False]
    got.topk_weights.square().sum().backward()
    assert logits.grad.abs().sum() > 0
    assert bias.grad is None


def test_no_biased_affinity_is_minus_zero() -> None:
    """Which the kernel would rank below 0: an affinity of 0 and a bias of -0 are a tie with 0 and 0."""
    logits, bias = torch.full((3, 4), -200.0), torch.tensor([-0.0, 0.0, -0.0, 0.0])
    for name in ("reference", "triton_interpreter") if find_spec("triton") else ("reference",):
        got = routing(name).route(logits, bias, top_k=3)
        assert got.topk_idx.tolist() == [[0, 1, 2]] * 3
