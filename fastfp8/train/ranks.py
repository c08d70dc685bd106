"""The processes of a run: sums over them, and who is missing where one of them is lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

_KEY = "fastfp8.train/failed"
_OF_OTHERS = "-"  # what a rank says that failed for want of others
_POLL_S, _GRACE_S = 0.02, 2.0
# Elements that travel together.
_BUCKET = 1 << 24


class RankLost(RuntimeError):
    """Other ranks ended or do not answer, and the run with them. The last checkpoint is whole.

    Attributes:
        ranks: those ranks.
        step: the step that was to be made, from 0.
    """

    def __init__(self, ranks: Sequence[int], said: dict[int, str], step: int, seconds: float) -> None:
        self.ranks, self.step = tuple(ranks), step
        who = f"rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}"
        why = "; ".join(f"rank {rank} said: {text}" for rank, text in said.items())
        super().__init__(
            f"fastfp8.train: lost {who} in step {step}, known after {seconds:.1f} s"
            + (f": {why}" if why else "")
            + "; go on from the last checkpoint with --resume"
        )


class Ranks:
    """All ranks of the default process group, or this process alone where there is none.

    Args:
        timeout: seconds that an exchange of tokens waits for other ranks; other collectives have the group's.
    """

    def __init__(self, timeout: float = 300.0) -> None:
        self.timeout = timeout
        self.group = dist.group.WORLD if dist.is_initialized() else None
        self.rank = dist.get_rank() if self.group is not None else 0
        self.world = dist.get_world_size() if self.group is not None else 1

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add float32 tensors of all ranks up, in place."""
        if self.group is None or not tensors:
            return
        buckets: list[list[Tensor]] = [[]]
        size = 0
        for tensor in tensors:
            if buckets[-1] and size + tensor.numel() > _BUCKET:
                buckets.append([])
                size = 0
            buckets[-1].append(tensor)
            size += tensor.numel()
        for bucket in buckets:
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self.group)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):  # type: ignore[no-untyped-call]
                tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    @contextlib.contextmanager
    def naming(self, step: int, longest: float) -> Iterator[None]:
        """What goes wrong inside is told to the other ranks; what is wrong with these, raised as :class:`RankLost`.

        Whoever notices waits for the others to notice too, which they do when they next want something of each other:
        within ``longest``, the seconds of a step.
        """
        start = time.monotonic()
        try:
            yield
        except Exception as error:
            if self.group is None:
                raise
            store = dist.distributed_c10d._get_process_group_store(self.group)
            if not _is_of_others(error):
                with contextlib.suppress(RuntimeError):
                    store.set(f"{_KEY}/{self.rank}", f"{type(error).__name__}: {error}")
                raise
            silent, said = self._roll_call(store, _GRACE_S + 2 * longest)
            lost = sorted({*silent, *said})
            if not lost:
                raise
            raise RankLost(lost, said, step, time.monotonic() - start) from error

    def _roll_call(self, store: Store, grace: float) -> tuple[list[int], dict[int, str]]:
        """Ranks that do not say in ``grace`` seconds that they failed, and what those say that did by themselves."""
        silent = [rank for rank in range(self.world) if rank != self.rank]
        said: dict[int, str] = {}
        end = time.monotonic() + grace
        # Where the store is gone, so is the process that holds it; then nobody can be told from another.
        with contextlib.suppress(RuntimeError):
            store.set(f"{_KEY}/{self.rank}", _OF_OTHERS)
            while silent and time.monotonic() < end:
                for rank in [rank for rank in silent if store.check([f"{_KEY}/{rank}"])]:
                    silent.remove(rank)
                    its = store.get(f"{_KEY}/{rank}").decode()
                    if its != _OF_OTHERS:
                        said[rank] = its
                if silent:
                    time.sleep(_POLL_S)
        return silent, said


def _is_of_others(error: Exception) -> bool:
    """Whether an error is that others did not answer."""
    from ..comm import PeerError, Timeout

    return isinstance(error, (Timeout, PeerError, dist.DistError)) or "gloo" in str(error)
