"""Checkpoints that are there whole or not at all: a folder for a step, a file in it for each rank."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import value_error
from .ranks import Ranks

_NAME = re.compile(r"step-(\d+)")
_KEPT = 2


def save(folder: Path, step: int, state: dict[str, Any], ranks: Ranks) -> Path:
    """Write ``state`` of each rank, after ``step`` steps. The folder gets its name when all of it is on the disk; the
    last two are kept."""
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.part"
    if ranks.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    ranks.barrier()
    with (part / _file(ranks)).open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    ranks.barrier()
    if ranks.rank == 0:
        _sync(part)
        shutil.rmtree(final, ignore_errors=True)
        part.replace(final)
        _sync(folder)
        for old in sorted(_all(folder))[:-_KEPT]:
            shutil.rmtree(folder / f"step-{old:08d}")
    ranks.barrier()
    return final


def load(folder: Path, ranks: Ranks) -> dict[str, Any] | None:
    """The state of this rank in the last checkpoint of ``folder``; None where there is none.

    Raises:
        ValueError: it is of another number of ranks.
    """
    steps = _all(folder)
    if not steps:
        return None
    last = folder / f"step-{max(steps):08d}"
    if not (last / _file(ranks)).exists():
        found = sorted(path.name for path in last.iterdir())
        raise value_error("train", "resume", f"a checkpoint of {ranks.world} ranks", f"{last} with {found}")
    state: dict[str, Any] = torch.load(last / _file(ranks), map_location="cpu", weights_only=True)
    return state


def _file(ranks: Ranks) -> str:
    return f"rank-{ranks.rank}-of-{ranks.world}.pt"


def _all(folder: Path) -> list[int]:
    found = (_NAME.fullmatch(path.name) for path in folder.glob("step-*"))
    return [int(match[1]) for match in found if match]


def _sync(folder: Path) -> None:
    """Names of files are on the disk once their folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
