"""The contestants of ``bench layer`` on a CPU, and what it says where there is no GPU."""

from __future__ import annotations

import pytest
import torch

import fastfp8
from bench import layer
from bench.case import Session, Unavailable
from fastfp8.models import CONFIGS


@pytest.fixture(scope="module")
def steps() -> dict[str, tuple[layer.Step | None, str]]:
    found = layer.steps(CONFIGS["micro"], (1, 32), torch.device("cpu"))
    return {name: (step, why) for name, step, why in found}


def test_all_but_what_is_not_installed_take_a_step(steps: dict[str, tuple[layer.Step | None, str]]) -> None:
    assert list(steps) == list(layer.CONTESTANTS)
    missing = {name: why for name, (step, why) in steps.items() if step is None}
    assert missing == {"TransformerEngine block scaling": "TransformerEngine is not installed"}


def test_ours_is_fp8_throughout_and_moves_every_parameter() -> None:
    block = layer.made(CONFIGS["micro"], torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    by = layer.rotations(32, CONFIGS["micro"].rope_dim, 1e4, torch.device("cpu"))
    given = (torch.randn(1, 32, 128).bfloat16(), torch.randn(1, 32, 128).bfloat16(), by)
    layer.ours(block, *given)()
    assert all(m.recipe is not None for m in block.modules() if isinstance(m, fastfp8.nn.Convertible))
    assert not any(type(m) is torch.nn.Linear for m in block.modules())
    still = {name for name, p in block.named_parameters() if torch.equal(p, before[name])}
    assert all("norm" in name for name in still)  # in BF16 a step of 1e-3 leaves 1 as it is


def test_flops_are_6_for_each_weight_that_a_token_meets() -> None:
    config = CONFIGS["micro"]
    block = layer.made(config, torch.device("cpu"))
    weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    experts = sum(p.numel() for p in block.parameters() if p.dim() == 3) * config.top_k / config.experts
    assert layer.flops(config, 10) == 60 * (weights + experts)


def test_without_a_gpu_it_says_so() -> None:
    (work,) = layer.works(tiny=False)
    assert work.shape == "16b layer, 4096 tokens"
    with pytest.raises(Unavailable, match="no GPU"):
        work.measure(Session(3))
