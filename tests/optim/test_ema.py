"""EMA: exact against a plain loop, whatever the thread does, and as asynchronous as it says."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from backends import assert_same_bits
from torch import Tensor, nn

from fastfp8.optim import EMA, AdamW


def model_and_optimizer(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[nn.Module, AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8)).to(device, dtype)
    return model, AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: AdamW, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step()


def masters(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    return {
        name: optimizer.state.get(p, {}).get("master", p).detach().float().cpu().clone()
        for name, p in model.named_parameters()
    }


def plain(model: nn.Module, optimizer: AdamW, steps: int, decay: float) -> dict[str, Tensor]:
    averages = {name: value.clone() for name, value in masters(model, optimizer).items()}
    for step in range(steps):
        train(model, optimizer, 1, seed=step)
        for name, value in masters(model, optimizer).items():
            averages[name] = torch.lerp(averages[name], value, 1 - decay)
    return averages


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, average in got.items():
        assert average.device.type == "cpu"
        assert_same_bits(average, expected[name], name)


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_plain_loop(dtype: torch.dtype, device: str) -> None:
    """In bfloat16 from the FP32 masters: their differences are far below what bfloat16 shows."""
    expected = plain(*model_and_optimizer(dtype, device), steps=7, decay=0.9)
    model, optimizer = model_and_optimizer(dtype, device)
    with EMA(model, optimizer, 0.9) as ema:
        for step in range(7):
            train(model, optimizer, 1, seed=step)
        assert ema.steps == 7
        assert_equal(ema.averages(), expected)
    train(model, optimizer, 1)  # closed: it follows no longer
    assert ema.steps == 7
    assert_equal(ema.averages(), expected)


class Slow(EMA):
    """Averages when it is let."""

    def __init__(self, *args: Any) -> None:
        self.go = threading.Event()
        super().__init__(*args)

    def _average(self, *args: Any) -> None:
        assert self.go.wait(10)
        super()._average(*args)


def test_a_step_does_not_wait_for_its_average_but_for_that_before() -> None:
    model, optimizer = model_and_optimizer()
    ema = Slow(model, optimizer, 0.5)
    before = {name: average.clone() for name, average in ema._averages.items()}
    train(model, optimizer, 1)  # returns though nothing is averaged
    assert_equal(ema._averages, before)
    first = masters(model, optimizer)
    expected = {name: torch.lerp(before[name], first[name], 0.5) for name in before}

    begun = threading.Event()
    optimizer.register_step_pre_hook(lambda *_: begun.set())  # runs after that of the average
    second = threading.Thread(target=train, args=(model, optimizer, 1, 2))
    second.start()
    assert not begun.wait(0.1)  # parameters are being read still
    assert_equal(masters(model, optimizer), first)
    ema.go.set()
    second.join()
    for name, value in masters(model, optimizer).items():
        expected[name] = torch.lerp(expected[name], value, 0.5)
    assert_equal(ema.averages(), expected)
    ema.close()


def test_goes_on_from_a_state_dict() -> None:
    expected = plain(*model_and_optimizer(), steps=6, decay=0.9)
    model, optimizer = model_and_optimizer()
    with EMA(model, optimizer, 0.9) as ema:
        for step in range(3):
            train(model, optimizer, 1, seed=step)
        state = ema.state_dict()
        train(model, optimizer, 1, seed=9)  # no part of what was saved
        assert state["steps"] == 3

    again, other = model_and_optimizer()
    for step in range(3):
        train(again, other, 1, seed=step)
    with EMA(again, other, 0.1) as ema:
        ema.load_state_dict(state)
        for step in range(3, 6):
            train(again, other, 1, seed=step)
        assert (ema.steps, ema.decay) == (6, 0.9)
        assert_equal(ema.averages(), expected)
        del state["averages"]["0.bias"]
        with pytest.raises(ValueError, match=r"optim.EMA.load_state_dict: argument 'state'.*\['0.bias'\]"):
            ema.load_state_dict(state)


def test_the_model_with_averages() -> None:
    model, optimizer = model_and_optimizer()
    with EMA(model, optimizer, 0.5) as ema:
        train(model, optimizer, 2)
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        with contextlib.suppress(KeyError), ema.applied() as averaged:
            assert averaged is model
            assert_equal(dict(model.state_dict()), ema.averages())
            raise KeyError
        assert_equal(dict(model.state_dict()), own)


def test_what_goes_wrong_in_the_thread_is_raised() -> None:
    model, optimizer = model_and_optimizer()
    ema = EMA(model, optimizer)
    ema._averages["0.weight"] = torch.zeros(3)
    train(model, optimizer, 1)
    with pytest.raises(RuntimeError, match="size"):
        ema.wait()
    ema.close()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((None, None), TypeError, "argument 'model': expected a torch.nn.Module"),
        ((nn.Linear(1, 1), None), TypeError, "argument 'optimizer': expected a torch.optim.Optimizer"),
        ((*model_and_optimizer(), "0.9"), TypeError, "argument 'decay': expected a number"),
        ((*model_and_optimizer(), 1.5), ValueError, "argument 'decay': expected a number from 0 to 1, got 1.5"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        EMA(*arguments)
