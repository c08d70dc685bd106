"""Handle: a routing that was exchanged, and what is still in flight of one dispatch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .exchange import Arrival

if TYPE_CHECKING:
    from .buffer import Buffer


class Handle:
    """What :meth:`Buffer.dispatch` returns for ``combine``, for backward and for replays. Any number may live at once,
    each may be used any number of times, until the Buffer is closed.

    Attributes:
        offsets: int32 [local experts]: the row of ``recv`` at which each expert ends.
        recv_weights: float32 [capacity]: the weight of each row of ``recv``, 1 where dispatch had none. It has a
            gradient with respect to ``topk_weights``. Not written past ``offsets[-1]``.
        recv_counts: int32 [world, local experts]: the rows that each rank sent for each expert here.
        copies: int32 [world, world], on the host: tokens sent from rank to rank, each counted once a rank. None where
            the host does not know them, with kernels.
    """

    def __init__(self, buffer: Buffer, routing: Any, recv_weights: Tensor) -> None:
        self.buffer, self.routing = buffer, routing
        self.offsets, self.recv_weights = routing.offsets, recv_weights
        self.recv_counts, self.copies = routing.counts, routing.copies
        self._pending: list[Arrival] = []

    def wait(self) -> None:
        """Wait until ``recv`` of a dispatch with ``async_op=True``, and the sum of such a combine, are there.

        Raises:
            Timeout: a rank did not answer.
        """
        while self._pending:
            flight, arrive = self._pending[0]
            flight.wait(self.buffer._exchange.deadline())
            with torch.no_grad():  # what is filled here is a result that has its gradient already
                arrive()
            del self._pending[0]

    def add(self, arrival: Arrival) -> None:
        """Have :meth:`wait` wait for it."""
        self._pending.append(arrival)
