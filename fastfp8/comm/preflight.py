"""What every rank tells all others before bytes move: which call it makes, with what, and whether it can.

So a rank that refuses its arguments, or makes another call, is an error on every rank at once and no hang.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PeerError
from .footprint import STATUS_WORDS, TEXT_WORDS, Layout
from .link import Link

# Options of a call that must be equal everywhere; of rows and weights whether they will have gradients.
OPTIONS = {
    "dispatch": ("quantize", "pow2", "a handle", "gradients of rows", "gradients of weights"),
    "combine": ("weighted", "gradients of rows", "gradients of weights"),
    "dispatch_backward": (),
    "combine_backward": ("weighted",),
    "weights_backward": (),
}
_CALLS = tuple(OPTIONS)


@dataclass(frozen=True)
class Call:
    """A call that all ranks must make alike. ``options`` are in the order of OPTIONS."""

    name: str
    options: tuple[bool, ...] = ()

    def words(self) -> list[int]:
        return [_CALLS.index(self.name), sum(int(on) << i for i, on in enumerate(self.options))]

    @staticmethod
    def text(words: list[int]) -> str:
        name = _CALLS[words[0]]
        return f"{name} with " + ", ".join(f"{o}: {bool(words[1] >> i & 1)}" for i, o in enumerate(OPTIONS[name]))


def text_words(text: str) -> list[int]:
    """The first bytes of ``text`` as TEXT_WORDS numbers."""
    raw = text.encode()[: 4 * TEXT_WORDS].ljust(4 * TEXT_WORDS, b"\0")
    return [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4)]


def words_text(words: list[int]) -> str:
    raw = b"".join(word.to_bytes(4, "little", signed=True) for word in words)
    return raw.rstrip(b"\0").decode(errors="replace")


def refusals(name: str, statuses: list[int], texts: list[list[int]]) -> PeerError | None:
    """The error for ranks whose status is not 0."""
    ranks = [rank for rank, status in enumerate(statuses) if status]
    if not ranks:
        return None
    return PeerError(name, ranks, "; ".join(f"rank {rank} refused: {words_text(texts[rank])}" for rank in ranks))


def preflight(
    link: Link,
    layout: Layout,
    call: Call,
    deadline: float,
    problem: Exception | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Tell all ranks ``counts`` int32 [num_experts + world] and return those of all, [world, ...], on the host.

    Raises:
        Exception: ``problem``, what this rank found wrong with its own arguments.
        PeerError: another rank found something, or makes another call.
        Timeout: a rank did not come.
    """
    row = torch.zeros(layout.status_words, dtype=torch.int32, device=link.device)
    head = [int(problem is not None), *call.words()]
    row[: len(head)] = row.new_tensor(head)
    row[-TEXT_WORDS:] = row.new_tensor(text_words(str(problem) if problem else ""))
    if counts is not None:
        row[STATUS_WORDS:-TEXT_WORDS] = counts
    rows = link.gather(row, f"{call.name}: status and counts", deadline)
    if problem is not None:
        raise problem
    heads: list[list[int]] = rows[:, : len(head)].tolist()
    error = refusals(call.name, [h[0] for h in heads], rows[:, -TEXT_WORDS:].tolist())
    if error is not None:
        raise error
    others = [rank for rank, h in enumerate(heads) if h[1:] != head[1:]]
    if others:
        theirs = Call.text(heads[others[0]][1:])
        reason = f"rank {link.rank} calls {Call.text(head[1:])}; rank {others[0]} calls {theirs}"
        raise PeerError(call.name, others, reason)
    return rows[:, STATUS_WORDS:-TEXT_WORDS]
