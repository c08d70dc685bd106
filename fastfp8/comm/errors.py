"""What can go wrong between ranks. What is wrong with one's own arguments is an error of :mod:`fastfp8.errors`."""

from __future__ import annotations

from collections.abc import Sequence


class Overflow(RuntimeError):
    """Some rank would get more rows than its ``recv`` has. Through the process group it is raised on every rank, before
    any row moves; by kernels on that rank, later, and its ``recv`` has the rows that fit. The Buffer stays usable.

    Attributes:
        capacity: rows of ``recv``.
        rows: of each rank the rows that it would have got.
    """

    def __init__(self, capacity: int, rows: Sequence[int], sent: bool = False) -> None:
        self.capacity, self.rows = capacity, tuple(rows)
        most = max(self.rows)
        over = ", ".join(f"rank {rank} would get {n}" for rank, n in enumerate(self.rows) if n > capacity)
        done = "those beyond were left out" if sent else "no row was sent"
        super().__init__(
            f"fastfp8.comm.Buffer.dispatch: a rank has room for {capacity} rows, {over}: "
            f"{done}; a Buffer with capacity={most} takes this routing"
        )


class PeerError(RuntimeError):
    """Other ranks could not take part in a call, or made another one. This rank's arguments were fine, nothing was
    sent, and the Buffer stays usable.

    Attributes:
        ranks: those ranks.
    """

    def __init__(self, call: str, ranks: Sequence[int], reason: str) -> None:
        self.ranks = tuple(ranks)
        super().__init__(f"fastfp8.comm.Buffer.{call}: {reason}")


class Timeout(TimeoutError):
    """Other ranks did not answer, or are gone. The process and other groups stay usable, this Buffer and its group not.

    Attributes:
        rank: the rank that waited, in the Buffer's group.
        missing: the ranks from which no word came; empty where all still answer.
        channel: the channel that waited; None where there are none, as in exchanges through the process group.
        role: what waited.
        head: how far the others had come. Through the process group: how many exchanges this rank has completed.
        tail: how far this rank had come. Through the process group: how many exchanges this rank has begun.
    """

    def __init__(
        self,
        *,
        rank: int,
        missing: Sequence[int],
        channel: int | None,
        role: str,
        head: int,
        tail: int,
        seconds: float,
        detail: str = "",
    ) -> None:
        self.rank, self.missing, self.channel, self.role = rank, tuple(missing), channel, role
        self.head, self.tail = head, tail
        if not self.missing:
            who = "though all ranks answer"
        elif len(self.missing) == 1:
            who = f"no word from rank {self.missing[0]}"
        else:
            who = f"no word from ranks {', '.join(map(str, self.missing))}"
        where = "" if channel is None else f"channel {channel}, "
        super().__init__(
            f"fastfp8.comm: rank {rank} gave up waiting ({where}role {role}, head {head}, tail {tail}) "
            f"after {seconds:.1f} s, {who}" + (f": {detail}" if detail else "")
        )
