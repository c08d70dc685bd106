"""A process group whose waits end: every collective has a deadline, and a rank that failed says so.

After a failure the ranks tell each other through the group's store that they are alive. Whoever is silent is named:
the sockets of a group cannot tell, because the first rank that gives up may close those to all others.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllToAllOptions

from .errors import Timeout

# How long a rank that failed waits for the others to say that they are alive, at most, and as a share of the timeout.
_GRACE_S, _GRACE_SHARE = 2.0, 0.25
_POLL_S = 0.02

# Links made so far in each group, by its name: with the name it tells one's keys in the store from another's.
_made: dict[str, int] = {}


class Flight:
    """An exchange in flight."""

    def __init__(self, link: Link, work: Any, role: str, kept: Sequence[Tensor]) -> None:
        self._link, self._work, self._role = link, work, role
        self._kept = tuple(kept)  # what torch's threads read and write

    def wait(self, deadline: float) -> None:
        """Raise Timeout unless it ends until then."""
        if self._work is not None:
            self._link.finish(self._work, self._role, deadline)
            self._work = None
            self._kept = ()


class Link:
    """The ranks of ``group``, with ``timeout`` seconds for each call."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
        self.group, self.device, self.timeout = group, device, timeout
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.begun = self.ended = 0
        self.failure: Timeout | None = None
        name = group.group_name
        _made[name] = _made.get(name, 0) + 1
        self._key = f"fastfp8.comm/{name}/{_made[name]}"
        self._grace = min(_GRACE_S, timeout * _GRACE_SHARE)

    def deadline(self) -> float:
        """Until when a call that begins now may wait; what is left then is for finding out who is missing."""
        return time.monotonic() + self.timeout - self._grace

    def gather(self, row: Tensor, role: str, deadline: float) -> Tensor:
        """``row`` [n] of every rank, in the host's memory: [world, n]."""
        rows = row.to(self.device).repeat(self.world, 1)
        out = torch.empty_like(rows)
        each = [1] * self.world
        self.exchange(rows, each, out, each, role).wait(deadline)
        return out.cpu()

    def exchange(
        self, rows: Tensor, sizes: Sequence[int], into: Tensor, into_sizes: Sequence[int], role: str
    ) -> Flight:
        """Send the first ``sizes[0]`` of ``rows`` to rank 0, those after them to rank 1, and so on; receive the same.

        Both are contiguous matrices of any dtype, moved as bytes, because not every backend moves every dtype.
        """
        out, given = (t.view(torch.uint8).view(-1) for t in (into, rows))
        split, given_split = (
            [n * t.shape[1] * t.element_size() for n in s] for s, t in ((into_sizes, into), (sizes, rows))
        )
        # A method of the group, because the function of torch.distributed takes no timeout.
        options = AllToAllOptions()
        options.asyncOp = True
        if self.device.type == "cpu":
            # A thread of gloo that waited on would keep the process from ending. NCCL's watchdog would end it.
            options.timeout = datetime.timedelta(seconds=self.timeout - self._grace)
        self.begun += 1
        start = time.monotonic()
        try:
            work = self.group.alltoall_base(out, given, split, given_split, options)
        except RuntimeError as error:
            raise self._failed(role, start, error) from error
        return Flight(self, work, role, (out, given))

    def finish(self, work: Any, role: str, deadline: float) -> None:
        start = time.monotonic()
        try:
            work.wait(datetime.timedelta(seconds=max(deadline - start, 0.001)))
        except RuntimeError as error:
            raise self._failed(role, start, error) from error
        self.ended += 1

    def _failed(self, role: str, start: float, error: RuntimeError) -> Timeout:
        seconds = time.monotonic() - start
        missing, earlier = self._roll_call(role)
        detail = str(error).splitlines()[0]
        if not missing and earlier:
            detail = "; ".join(f"rank {rank} had given up before, in {said}" for rank, said in earlier.items())
        self.failure = Timeout(
            rank=self.rank,
            missing=missing,
            channel=None,
            role=role,
            head=self.ended,
            tail=self.begun,
            seconds=seconds,
            detail=detail,
        )
        return self.failure

    def _roll_call(self, role: str) -> tuple[list[int], dict[int, str]]:
        """The ranks that do not say within the grace that they failed too, and what those that had before were at."""
        store = dist.distributed_c10d._get_process_group_store(self.group)
        silent, earlier = [rank for rank in range(self.world) if rank != self.rank], {}
        # Where the store is gone, so is the process that holds it; then nobody can be told from another.
        with contextlib.suppress(RuntimeError):
            for rank in silent:
                if store.check([f"{self._key}/{rank}"]):
                    earlier[rank] = store.get(f"{self._key}/{rank}").decode()
            store.set(f"{self._key}/{self.rank}", role)
            end = time.monotonic() + self._grace
            while silent and time.monotonic() < end:
                silent = [rank for rank in silent if not store.check([f"{self._key}/{rank}"])]
                if silent:
                    time.sleep(_POLL_S)
        return silent, earlier
