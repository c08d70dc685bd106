"""What fastfp8.numerics.memory counts, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastfp8.saved import memory


class Model(nn.Module):
    """Keeps its input's relu for a product, and that product's tanh for tanh itself."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2))
        self.recompute, self.seen = recompute, torch.empty(0)

    def layer(self, x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x.relu()).tanh()  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(self.layer, x, layer, use_reentrant=False) if self.recompute else self.layer(x, layer)  # type: ignore[assignment]
        self.seen = x.detach() + 1  # lives in an attribute
        return x.sum()


TOKENS, ROW = 6, 4 * 32


def test_each_storage_is_counted_once_where_it_was_made() -> None:
    saved = memory(Model(), torch.randn(TOKENS, 32))
    assert saved.tokens == TOKENS
    # Two layers: relu, which is both its own and the Linear's, and tanh. The sum is 4 bytes.
    assert saved.by_module == {"model": TOKENS * ROW * 4 + 4}
    assert saved.total == TOKENS * ROW * 4 + 4
    assert saved.by_dtype == {torch.float32: saved.total}


def test_what_a_checkpoint_holds_is_counted() -> None:
    saved = memory(Model(recompute=True), torch.randn(TOKENS, 32))
    # Of each layer its input: the first is the batch, the second the first's result; the second's is only summed.
    assert saved.total == TOKENS * ROW + 4


def test_names_have_stars_for_numbers_and_run_replaces_forward() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    tokens = torch.zeros(2, 3, 32)
    saved = memory(model, tokens, run=lambda x: model(x).square().sum())
    # Of the first Linear its result, which GELU keeps; of GELU its own; of the last its result, which the square keeps.
    assert saved.by_module == {"*": 6 * 4 * (64 + 64 + 8), "model": 4}
    assert saved.tokens == 6
    assert memory(nn.Sequential(nn.Embedding(5, 4)), torch.zeros(2, 3, dtype=torch.int64)).tokens == 6


def test_tables() -> None:
    small, large = memory(Model(), torch.randn(TOKENS, 32)), memory(Model(), torch.randn(2 * TOKENS, 32))
    assert str(small).splitlines()[1].split() == ["model", "513"]
    table = small.beside(large, ("small", "large")).splitlines()
    assert table[0].split() == ["module", "small", "large", "ratio"]
    assert table[-1].split() == ["all", "513", "512", "1.00"]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(TypeError, match=r"'model': expected a torch\.nn\.Module"):
        memory(torch.relu, torch.zeros(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'batch': expected a tensor, got none"):
        memory(Model())
    with torch.no_grad(), pytest.raises(ValueError, match="'model': expected a result that needs a gradient"):
        memory(Model(), torch.zeros(2, 32))
