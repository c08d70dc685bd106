"""A checkpoint is there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastfp8.train import Ranks, checkpoint


def save(folder: Path, step: int, value: float = 0.0) -> None:
    checkpoint.save(folder, step, {"step": step, "t": torch.full((3,), value)}, Ranks())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "none", Ranks()) is None
    for step in (9, 10, 100):
        save(tmp_path, step, step / 2)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    state = checkpoint.load(tmp_path, Ranks())
    assert state is not None
    assert state["step"] == 100
    assert torch.equal(state["t"], torch.full((3,), 50.0))


def test_one_that_was_not_finished_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it ends: while the file is written, or before the folder gets its name."""
    save(tmp_path, 1)
    write = torch.save

    def half(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    def named(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    for where, what in ((torch, half), (Path, named)):
        with monkeypatch.context() as patched:
            patched.setattr(where, "save" if where is torch else "replace", what)
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, 2)
        state = checkpoint.load(tmp_path, Ranks())
        assert state is not None
        assert state["step"] == 1
    assert torch.save is write
    save(tmp_path, 2)  # what was left does not hinder
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_same_step_again(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    save(tmp_path, 1, 2.0)
    state = checkpoint.load(tmp_path, Ranks())
    assert state is not None
    assert state["t"][0] == 2


def test_of_other_ranks(tmp_path: Path) -> None:
    save(tmp_path, 4)
    other = Ranks()
    other.world = 2
    with pytest.raises(
        ValueError, match=r"'resume': expected a checkpoint of 2 ranks, got .*step-00000004.*rank-0-of-1"
    ):
        checkpoint.load(tmp_path, other)
