"""MoE over 1, 3 and 4 ranks of gloo: what a single process computes of all their tokens.

Rows of an expert are the same codes in the same order wherever they come from, so weight gradients of experts agree bit
for bit. Sums of a token's rows are rounded to BF16 once a rank that it went to (fastfp8/reference/comm.py), and the
gate's gradient is a sum over ranks: these agree up to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from linear_support import BF16, sqnr
from rank_pool import Ranks, ranks
from torch import Tensor

import fastfp8
import fastfp8.nn

HIDDEN, WIDTH, EXPERTS, TOP_K = 256, 128, 12, 3
TOKENS = {1: [50], 3: [40, 0, 23], 4: [17, 3, 64, 30]}


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(4) as made:
        yield made


def made(fp8: bool, group: Any = None, tokens: int = 0) -> fastfp8.nn.MoE:
    torch.manual_seed(0)
    options = {"shared": 1, "groups": 3, "top_groups": 3, "scale": 2.5, "limit": 4.0, "dtype": BF16}
    module = fastfp8.nn.MoE(HIDDEN, WIDTH, EXPERTS, TOP_K, **options)  # type: ignore[arg-type]
    torch.nn.init.normal_(module.gate.weight, std=0.2)
    if group is not None:
        whole = module.state_dict()
        module = fastfp8.nn.MoE(HIDDEN, WIDTH, EXPERTS, TOP_K, process_group=group, max_tokens=tokens, **options)  # type: ignore[arg-type]
        local, rank = EXPERTS // dist.get_world_size(group), dist.get_rank(group)
        for name in ("gate_up.weight", "down.weight"):
            whole[name] = whole[name][rank * local : (rank + 1) * local]
        module.load_state_dict(whole)
    if fp8:
        fastfp8.nn.convert(module, fastfp8.Recipe())
    return module


def inputs(world: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    total = sum(TOKENS[world])
    return torch.randn(total, HIDDEN, dtype=BF16), torch.randn(total, HIDDEN, dtype=BF16)


def run(module: fastfp8.nn.MoE, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    assert module.balance_loss is not None
    y.backward(dy)
    found = {"y": y.detach(), "x": leaf.grad}
    found |= {name: p.grad for name, p in module.named_parameters()}
    found["load"] = module.update_bias(0.5)
    found["bias"] = module.gate.bias.clone()
    return found  # type: ignore[return-value]


def on_rank(group: Any, fp8: bool) -> dict[str, Tensor]:
    counts = TOKENS[dist.get_world_size(group)]
    first = sum(counts[: dist.get_rank(group)])
    rows = slice(first, first + counts[dist.get_rank(group)])
    x, dy = inputs(len(counts))
    return run(made(fp8, group, max(counts)), x[rows], dy[rows])


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("world", TOKENS)
def test_ranks_compute_what_one_process_does(world: int, fp8: bool, pool: Ranks) -> None:
    expected = run(made(fp8), *inputs(world))
    found = pool.run(on_rank, fp8, size=world)
    for name in ("y", "x"):
        together = torch.cat([f[name] for f in found])
        assert sqnr(together, expected[name]) > 45, name  # BF16 has 48 dB, and one or three more roundings
    for name in ("gate_up.weight", "down.weight"):
        together = torch.cat([f[name] for f in found])
        if fp8:
            assert torch.equal(together, expected[name]), name
        else:
            assert sqnr(together, expected[name]) > 45, name
    for name in ("gate.weight", "shared.gate_up.weight", "shared.down.weight"):
        total = sum(f[name].double() for f in found)
        # Those of the shared experts in FP8 quantise other blocks of tokens on each rank.
        assert sqnr(total, expected[name]) > (26 if fp8 else 45), name
    for f in found:
        assert torch.equal(f["load"], expected["load"])
        assert torch.equal(f["bias"], expected["bias"])
