"""fastfp8.optim.AdamW: the optimizer around the op, beside torch's."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import assert_same_bits
from torch import Tensor

import fastfp8
from fastfp8.optim import AdamW

F32, BF16 = torch.float32, torch.bfloat16


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype: torch.dtype = F32) -> list[torch.nn.Parameter]:
    shapes = [(130, 136), (7,), (2, 3, 16)]
    return [torch.nn.Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    for i, param in enumerate(params):
        param.grad = randn(*param.shape, seed=100 * step + i, dtype=param.dtype)


def train(optimizer: AdamW, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def tensors_of(optimizer: AdamW) -> Iterator[tuple[str, Tensor]]:
    for i, (param, state) in enumerate(optimizer.state.items()):
        yield f"param {i}", param.detach()
        for name, value in state.items():
            if isinstance(value, Tensor):
                yield f"{name} {i}", value


def assert_same_state(left: AdamW, right: AdamW) -> None:
    ours, theirs = dict(tensors_of(left)), dict(tensors_of(right))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_same_bits(value, theirs[name], name)


def test_float32_moments_are_those_of_torch() -> None:
    """But for the order of roundings: a few ulps a step, of the weight or of the update."""
    ours, theirs = parameters(), parameters()
    mine = AdamW(ours, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, moments=F32)
    other = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(100):
        for params, optimizer in ((ours, mine), (theirs, other)):
            set_gradients(params, step)
            optimizer.step()
    for left, right in zip(ours, theirs, strict=True):
        assert (left - right).abs().max() < 2e-6 * right.abs().max()
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine.state[left][key], other.state[right][key], rtol=2e-6, atol=2e-6)


def regression(dtype: torch.dtype) -> tuple[torch.nn.Parameter, Any]:
    """Weights to fit to noisy targets, and the loss of a batch."""
    x, target = randn(512, 32, seed=1), randn(32, 8, seed=2)
    y = x @ target + 0.1 * randn(512, 8, seed=3)
    weight = torch.nn.Parameter(torch.zeros(32, 8, dtype=dtype))

    def loss(step: int) -> Tensor:
        rows = slice(64 * (step % 8), 64 * (step % 8 + 1))
        return (x[rows] @ weight.float() - y[rows]).square().mean()

    return weight, loss


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bf16_moments_train_as_torch_does(dtype: torch.dtype, stochastic: bool) -> None:
    """300 steps: the loss all along, and the weights at the end, beside FP32 moments and weights."""
    losses: list[list[float]] = []
    masters = []
    for make in (torch.optim.AdamW, lambda p, **kw: AdamW(p, stochastic_rounding=stochastic, **kw)):
        weight, loss = regression(F32 if make is torch.optim.AdamW else dtype)
        optimizer = make([weight], lr=2e-2, betas=(0.9, 0.95), weight_decay=1e-2)
        losses.append([])
        for step in range(300):
            optimizer.zero_grad()
            value = loss(step)
            value.backward()
            optimizer.step()
            losses[-1].append(value.item())
        masters.append(optimizer.state[weight].get("master", weight.detach()))
    curves = torch.tensor(losses)
    assert curves[:, 0].min() > 20
    assert curves[:, -8:].max() < 0.05
    assert ((curves[1] - curves[0]).abs() <= 0.02 * curves[0] + 2e-3).all()
    assert (masters[1] - masters[0]).norm() < 1e-2 * masters[0].norm()


def test_a_second_moment_in_bf16_decays_at_0999_by_stochastic_rounding_only() -> None:
    """What the docstring says of ``betas``, and why 0.95 is the default."""
    left = {}
    for betas, stochastic in (((0.9, 0.999), False), ((0.9, 0.999), True), ((0.9, 0.95), False)):
        param = torch.nn.Parameter(torch.zeros(4096))
        optimizer = AdamW([param], betas=betas, stochastic_rounding=stochastic)
        param.grad = torch.full_like(param, 10.0)
        optimizer.step()
        first = optimizer.state[param]["exp_avg_sq"].float().mean().item()
        param.grad.zero_()
        for _ in range(100):
            optimizer.step()
        left[betas[1], stochastic] = optimizer.state[param]["exp_avg_sq"].float().mean().item() / first
    assert left[0.999, False] == 1
    assert abs(left[0.999, True] - 0.999**100) < 2e-3
    assert abs(left[0.95, False] / 0.95**100 - 1) < 0.2


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_state(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = AdamW(params, emit_fp8=True)
    train(optimizer, params, range(3))
    for param in params:
        state = optimizer.state[param]
        assert state["step"] == 3
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {BF16}
        assert ("master" in state) == (dtype == BF16)
        assert ("weight_fp8" in state) == (param.dim() > 1)
        if dtype == BF16:
            assert state["master"].dtype == F32
            assert_same_bits(param.detach(), state["master"].bfloat16(), "param")
            assert not torch.equal(param.detach().float(), state["master"])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_quantized(dtype: torch.dtype) -> None:
    """Bit for bit what quantize makes of the master, before the first step, after each, and after a load."""
    params = parameters(dtype)
    optimizer = AdamW(params, emit_fp8=True)

    def check(optimizer: AdamW, params: list[torch.nn.Parameter]) -> None:
        for param in (params[0], params[2]):
            want = fastfp8.quantize(optimizer.state[param].get("master", param.detach()), (128, 128))
            weight, weight_t = optimizer.quantized(param)
            for got, expected in ((weight, want), (weight_t, want.t().contiguous())):
                assert got.block == (128, 128)
                assert got.data.is_contiguous()
                assert_same_bits(got.data, expected.data, "data")
                assert_same_bits(got.scale, expected.scale, "scale")

    check(optimizer, params)
    data = optimizer.quantized(params[0])[0].data
    train(optimizer, params, range(3))
    check(optimizer, params)
    assert optimizer.quantized(params[0])[0].data.data_ptr() == data.data_ptr()
    other = AdamW([torch.nn.Parameter(p.detach().clone()) for p in params], emit_fp8=True)
    other.load_state_dict(optimizer.state_dict())
    check(other, other.param_groups[0]["params"])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_quantized_sees_a_write_from_outside(dtype: torch.dtype) -> None:
    """Before a step and after one: not what was quantised of the parameter as it was."""
    param = torch.nn.Parameter(randn(130, 136, dtype=dtype))
    optimizer = AdamW([param], emit_fp8=True)
    optimizer.quantized(param)
    for seed in (1, 2):
        with torch.no_grad():
            param.copy_(randn(130, 136, seed=seed))
        expected = fastfp8.quantize(param.detach(), (128, 128))
        for got, want in zip(optimizer.quantized(param), (expected, expected.t().contiguous()), strict=True):
            assert_same_bits(got.data, want.data, "data")
            assert_same_bits(got.scale, want.scale, "scale")
        param.grad = randn(130, 136, dtype=dtype)
        optimizer.step()


def test_quantized_feeds_a_gemm() -> None:
    param = torch.nn.Parameter(randn(256, 144))
    optimizer = AdamW([param], emit_fp8=True)
    param.grad = randn(256, 144, seed=1)
    optimizer.step()
    weight, weight_t = optimizer.quantized(param)
    x, dy = fastfp8.quantize(randn(5, 144)), fastfp8.quantize(randn(5, 256))
    want = fastfp8.quantize(param.detach(), (128, 128))
    assert torch.equal(fastfp8.gemm(x, weight), fastfp8.gemm(x, want))
    assert torch.equal(fastfp8.gemm(dy, weight_t), fastfp8.gemm(dy, want.t().contiguous()))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("way", ["state_dict", "torch.save", "pickle", "deepcopy"])
def test_a_resumed_run_has_the_same_bits(way: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "stochastic_rounding": True, "seed": 3, "emit_fp8": True}
    params = parameters(dtype)
    optimizer = AdamW(params, **options)
    train(optimizer, params, range(4))
    if way == "deepcopy":
        resumed = copy.deepcopy(optimizer)
    elif way == "pickle":
        resumed = pickle.loads(pickle.dumps(optimizer))
    else:
        state = optimizer.state_dict()
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file)
        resumed = AdamW([torch.nn.Parameter(p.detach().clone()) for p in params])
        resumed.load_state_dict(state)
    its = resumed.param_groups[0]["params"]
    for mine, loaded in zip(params, its, strict=True):
        assert mine.data_ptr() != loaded.data_ptr()
        for key, value in resumed.state[loaded].items():
            assert not isinstance(value, Tensor) or value.data_ptr() != optimizer.state[mine][key].data_ptr()
    train(optimizer, params, range(4, 8))
    train(resumed, its, range(4, 8))
    assert_same_state(optimizer, resumed)
    assert_same_bits(optimizer.quantized(params[0])[1].data, resumed.quantized(its[0])[1].data, "weight_fp8_t")


def test_a_checkpoint_of_torch_goes_on() -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params, lr=1e-2)
    set_gradients(params, 0)
    theirs.step()
    optimizer = AdamW(params)
    optimizer.load_state_dict({**theirs.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]})
    for param in params:
        assert optimizer.state[param]["step"] == 1
        assert_same_bits(optimizer.state[param]["exp_avg"], theirs.state[param]["exp_avg"].bfloat16(), "exp_avg")
    train(optimizer, params, range(1, 3))
    assert optimizer.state[params[0]]["step"] == 3


def test_main_grad() -> None:
    """It wins over grad, in FP32, and zero_grad leaves it."""
    params, plain = parameters(BF16), parameters(BF16)
    optimizer, expected = AdamW(params), AdamW(plain)
    for i, (param, other) in enumerate(zip(params, plain, strict=True)):
        param.grad, param.main_grad = torch.full_like(param, math.nan), randn(*param.shape, seed=i)
        expected.state[other] = {}
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None and p.main_grad.any() for p in params)
    fp32 = [torch.nn.Parameter(p.detach().float()) for p in plain]
    reference = AdamW(fp32)
    for i, param in enumerate(fp32):
        param.grad = randn(*param.shape, seed=i)
    reference.step()
    for param, other in zip(params, fp32, strict=True):
        assert_same_bits(optimizer.state[param]["master"], other.detach(), "master")


def test_groups_have_options_of_their_own() -> None:
    """As two optimizers would, for random bits tell parameters by their place."""
    params = parameters()
    optimizer = AdamW(
        [
            {"params": params[:1], "lr": 1e-1, "emit_fp8": True},
            {"params": params[1:], "weight_decay": 0.0, "moments": F32},
        ]
    )
    train(optimizer, params, range(2))
    for part, options in ((slice(0, 1), {"lr": 1e-1}), (slice(1, 3), {"weight_decay": 0.0, "moments": F32})):
        mine = parameters()[part]
        alone = AdamW(mine, **options)
        for step in range(2):
            for param, grad in zip(parameters(), range(3), strict=True):
                for candidate in mine:
                    if candidate.shape == param.shape:
                        candidate.grad = randn(*param.shape, seed=100 * step + grad)
            alone.step()
        for left, right in zip(params[part], mine, strict=True):
            assert_same_bits(left.detach(), right.detach(), "param")
            assert_same_bits(optimizer.state[left]["exp_avg"], alone.state[right]["exp_avg"], "exp_avg")
    assert "weight_fp8" in optimizer.state[params[0]]
    assert "weight_fp8" not in optimizer.state[params[2]]


def test_every_parameter_has_random_bits_of_its_own() -> None:
    """Equal ones, in one group and in another, part; those of one that has no gradient are not given to the next."""
    params = [torch.nn.Parameter(torch.ones(256)) for _ in range(4)]
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:]}], stochastic_rounding=True)
    for absent in (None, 1):
        for i, param in enumerate(params):
            param.grad = None if i == absent else randn(256)
        optimizer.state.clear()
        optimizer.step()
        moments = [optimizer.state[p]["exp_avg"] for p in params if p.grad is not None]
        assert len({tuple(m.tolist()) for m in moments}) == len(moments)
        if absent is None:
            first = optimizer.state[params[3]]["exp_avg"].clone()
    assert_same_bits(optimizer.state[params[3]]["exp_avg"], first, "exp_avg")


def test_a_parameter_without_a_gradient_waits() -> None:
    params = parameters()
    optimizer = AdamW(params, stochastic_rounding=True)
    train(optimizer, params, range(1))
    before = params[1].detach().clone()
    set_gradients(params, 1)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1].detach(), before)
    assert [optimizer.state[p]["step"] for p in params] == [2, 1, 2]
    train(optimizer, params, range(2, 3))
    assert [optimizer.state[p]["step"] for p in params] == [3, 2, 3]


def test_closure_and_scheduler() -> None:
    weight, loss = regression(F32)
    optimizer = AdamW([weight], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(0)
        value.backward()
        return value

    first = optimizer.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 5e-3
    assert optimizer.step(closure) < first


def test_a_step_is_seen_by_the_version_of_a_parameter() -> None:
    """So that autograd refuses to go back through a weight that has changed, and FP8 copies are made anew."""
    layer = fastfp8.nn.Linear(144, 32).eval()
    optimizer = AdamW(layer.parameters(), lr=0.1)
    x = randn(5, 144)
    with torch.no_grad():
        before = layer(x)
    for param in layer.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(layer(x), before)
    y = (layer.weight * layer.weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_gradients_with_other_strides() -> None:
    params, others = parameters(), parameters()
    left, right = AdamW(params), AdamW(others)
    set_gradients(params, 0)
    set_gradients(others, 0)
    params[0].grad = params[0].grad.t().contiguous().t()
    others[1].grad = randn(1, seed=5).expand(7)
    params[1].grad = randn(1, seed=5).repeat(7)
    left.step()
    right.step()
    assert_same_state(left, right)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, r"argument 'lr': expected a finite number from 0 on, got -1\.0"),
        ({"lr": math.nan}, ValueError, "'lr'.*nan"),
        ({"lr": torch.tensor(1.0)}, TypeError, "'lr': expected a number, got Tensor"),
        ({"betas": (0.9, 1.0)}, ValueError, "'betas': expected two numbers from 0 to below 1"),
        ({"betas": (0.9,)}, ValueError, "'betas'"),
        ({"eps": math.inf}, ValueError, "'eps'"),
        ({"weight_decay": -0.1}, ValueError, "'weight_decay'"),
        ({"moments": torch.float16}, TypeError, "'moments': expected torch.float32 or torch.bfloat16"),
        ({"seed": -1}, ValueError, "'seed': expected an integer from 0 to"),
        ({"seed": 0.5}, TypeError, "'seed': expected an integer"),
        ({"stochastic_rounding": 1}, TypeError, "'stochastic_rounding': expected a bool"),
        ({"emit_fp8": "yes"}, TypeError, "'emit_fp8': expected a bool"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=rf"fastfp8\.optim\.AdamW: .*{text}"):
        AdamW(parameters(), **options)
    with pytest.raises(error, match=rf"fastfp8\.optim\.AdamW: .*{text}"):
        AdamW([{"params": parameters(), **options}])


def test_bad_parameters_and_gradients() -> None:
    with pytest.raises(TypeError, match=r"'params': expected torch.float32 or torch.bfloat16, got torch.float16"):
        AdamW([torch.nn.Parameter(randn(3, dtype=torch.float16))])
    with pytest.raises(ValueError, match=r"'params': expected contiguous parameters, got stride \(1, 3\)"):
        AdamW([torch.nn.Parameter(randn(3, 5).t().contiguous().t())])
    param = torch.nn.Parameter(randn(3, 5))
    optimizer = AdamW([param])
    param.grad = randn(3, 5).to_sparse()
    with pytest.raises(ValueError, match=r"'grad': expected a dense"):
        optimizer.step()
    param.grad = None
    for bad, error, text in (
        (randn(3, 5).double(), TypeError, r"'main_grad': expected torch.float32 or torch.bfloat16, got torch.float64"),
        (randn(5, 3), ValueError, r"'grads\[0\]': expected shape \(3, 5\), got shape \(5, 3\)"),
    ):
        param.main_grad = bad
        with pytest.raises(error, match=text):
            optimizer.step()
    for other, text in ((torch.nn.Parameter(randn(3)), "a parameter of this optimizer"), (param, "'emit_fp8'")):
        with pytest.raises(ValueError, match=rf"AdamW.quantized: argument 'param': expected .*{text}"):
            optimizer.quantized(other)
