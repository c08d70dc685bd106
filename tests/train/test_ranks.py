"""Several processes: the same training as one, and one that is lost is named in time, with a whole checkpoint left."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rank_pool import Died, Ranks, ranks
from train_cases import HANGS_S, SMALL, of_rank, train_until_killed

from fastfp8.train import checkpoint


@pytest.fixture
def pool() -> Iterator[Ranks]:
    with ranks(2) as started:
        yield started


def test_two_ranks_train_as_one(pool: Ranks) -> None:
    """In float32, so that only the order of sums differs."""
    options = dataclasses.replace(SMALL, clip=0.5)
    one, held_out, params, biases = of_rank(None, options, "fp32", 3)  # type: ignore[arg-type]
    found = pool.run(of_rank, options, "fp32", 3)
    for measured, its_held_out, _, its_biases in found:
        for a, b in zip(measured, one, strict=True):
            # Between ranks tokens travel in bfloat16.
            assert a.loss == pytest.approx(b.loss, rel=2e-4)
            assert a.norm == pytest.approx(b.norm, rel=2e-3)
            assert a.balance == pytest.approx(b.balance, rel=1e-3)
        assert its_held_out == pytest.approx(held_out, rel=1e-3)
        for a, b in zip(its_biases, biases, strict=True):
            assert (a - b).abs().max() <= 3e-3
    for name, (param, own) in params.items():
        theirs = [its_params[name][0] for _, _, its_params, _ in found]
        if own:
            assert torch.cat(theirs).shape == param.shape
            theirs = [torch.cat(theirs)]
        else:
            assert torch.equal(theirs[0], theirs[1])  # bit for bit, or ranks would drift apart
        # Three steps of at most the learning rate each, for whatever gradients round to the other side of 0.
        assert (theirs[0] - param).abs().max() < 3 * 2 * options.lr
        assert (theirs[0] - param).abs().mean() < 0.02 * options.lr
    assert [m.loss for m in found[0][0]] == [m.loss for m in found[1][0]]


@pytest.mark.parametrize("how", ["kill", "raise", "hang"])
def test_a_lost_rank_is_named(tmp_path: Path, how: str) -> None:
    with ranks(4) as pool:
        start = time.monotonic()
        pool.begin(train_until_killed, tmp_path, 1, 5, how)
        first, lost, *others = pool.results()
        assert time.monotonic() - start < 60
    assert isinstance(lost, Died)
    for name, text in (first, *others):
        assert name == "RankLost"
        assert "lost rank 1 in step 5" in text
        assert float(text.split("known after ")[1].split(" s")[0]) < HANGS_S / 2
        assert "--resume" in text
        assert ("rank 1 said: RuntimeError: " in text) == (how == "raise")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]
    for rank in range(4):
        one = checkpoint.Ranks()
        one.rank, one.world = rank, 4
        state = checkpoint.load(tmp_path, one)
        assert state is not None
        assert state["step"] == 4
