"""What the ranks of a new Buffer tell each other: their sizes, which must be equal, and on which machine they are."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import check_type, check_value, value_error
from .footprint import TEXT_WORDS, Layout, layout_of
from .link import Link
from .preflight import refusals, text_words

_OP = "comm.Buffer"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Sizes(NamedTuple):
    """As :class:`fastfp8.comm.Buffer` takes them."""

    hidden: int
    num_experts: int
    top_k: int
    max_tokens: int
    ranks_per_node: int | None
    capacity: int | None
    num_sms: int


def _checked(sizes: Sizes, world: int) -> Layout:
    for name, value in sizes._asdict().items():
        if value is not None or name not in ("ranks_per_node", "capacity"):
            check_type(value, int, _OP, name, "an int")
    fits = sizes.num_sms >= 2 and sizes.num_sms % 2 == 0
    check_value(fits, _OP, "num_sms", "an even number from 2 up", sizes.num_sms)
    of_node = world if sizes.ranks_per_node is None else sizes.ranks_per_node
    return layout_of(world, *sizes[:4], of_node, sizes.capacity, _OP)


def _machine() -> int:
    """A number that processes of one machine share: containers on it may have names of their own."""
    boot = _BOOT_ID.read_text() if _BOOT_ID.exists() else platform.node()
    return int.from_bytes(hashlib.blake2b(boot.encode(), digest_size=8).digest(), "little", signed=True)


def _ranks_per_node(machines: list[int]) -> int:
    """How many neighbouring ranks share a machine."""
    starts = [rank for rank, machine in enumerate(machines) if rank == 0 or machine != machines[rank - 1]]
    ends = [*starts[1:], len(machines)]
    runs = [end - start for start, end in zip(starts, ends, strict=True)]
    expected = "a number, as the ranks of each machine are not equally many neighbours"
    check_value(len(set(runs)) == 1, _OP, "ranks_per_node", expected, f"None, with runs of {runs} ranks")
    return runs[0]


def tell(
    link: Link, role: str, numbers: Sequence[int], problem: Exception | None = None, call: str = "__init__"
) -> list[list[int]]:
    """The ``numbers`` of every rank, equally many of each. Raises, on all ranks, where one has a problem.

    Raises:
        Exception: ``problem``, this rank's.
        PeerError: another's.
        Timeout: a rank did not come.
    """
    head = [int(problem is not None), *numbers]
    row = torch.tensor(head + text_words(str(problem) if problem else ""))
    rows = link.gather(row, role, link.deadline())
    if problem is not None:
        raise problem
    heads: list[list[int]] = rows[:, : len(head)].tolist()
    refused = refusals(call, [h[0] for h in heads], rows[:, -TEXT_WORDS:].tolist())
    if refused is not None:
        raise refused
    return [h[1:] for h in heads]


def agree(link: Link, sizes: Sizes) -> Layout:
    """Raise, on all ranks, unless all gave the same sizes, and these fit."""
    problem = None
    try:
        _checked(sizes, link.world)
        numbers = [-1 if size is None else int(size) for size in sizes]
    except (TypeError, ValueError) as error:
        problem, numbers = error, [0] * len(sizes)
    told = tell(link, "Buffer: sizes", [_machine(), *numbers], problem)
    for place, name in enumerate(Sizes._fields, 1):
        given = [None if row[place] < 0 else row[place] for row in told]
        if len(set(given)) > 1:
            raise value_error(_OP, name, "the same on every rank", f"{given} of ranks 0 to {link.world - 1}")
    if sizes.ranks_per_node is None:
        sizes = sizes._replace(ranks_per_node=_ranks_per_node([row[0] for row in told]))
    return _checked(sizes, link.world)
