"""Dispatch and combine through a process group: the way that runs everywhere, and the fallback.

    source rank                                                    expert's rank
    status and counts of all ranks   -- all_gather -------------->  sizes of all that follows
    slots of each copy               -- all_to_all_single ------->  place: a row for each slot
    a copy of each token             -- all_to_all_single ------->  recv: each copy to its rows
    node sums, sum                   <- all_to_all_single --------  partial sums, one a copy

A copy is a token for one rank, however many experts it has there. Sizes come from the counts, so the host waits for
these once a routing. Across nodes a copy goes straight to its rank: that a token crosses InfiniBand once a node only is
for the kernels to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import BLOCK, Block, ceil_div, empty_scale
from ..ops.permute import RowMap
from ..scaled_tensor import ScaledTensor
from . import sums
from .errors import Overflow
from .footprint import Layout
from .link import Flight, Link
from .routing import Sent, place, slots_of

_BLOCK: Block = (1, BLOCK)
Rows = Tensor | ScaledTensor


@dataclass(frozen=True)
class Routing:
    """Where tokens go, where rows come from: what a handle keeps."""

    sent: Sent
    sent_slots: Tensor
    """bool [copies sent, top_k]: the slots whose expert is on the copy's rank."""
    where: RowMap
    """The rows [copies received, top_k] of each slot, and their inverse."""
    weights: Tensor
    """float32 [capacity]: the weight of each row; not written past the last row."""
    counts: Tensor
    """int32 [world, local experts]: the rows from each rank for each expert here."""
    copies: Tensor
    """int32 [world, world]: copies from rank to rank, on the host."""
    rows: int
    """Rows in use."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.sent.tokens

    @property
    def offsets(self) -> Tensor:
        """int32 [local experts]."""
        return self.where.offsets

    @property
    def copy_of(self) -> Tensor:
        """int64 [rows]: the copy that each row is of."""
        return self.where.slots[: self.rows].long() // self.sent.top_k


class Collective:
    """One rank's part of the exchanges."""

    def __init__(self, link: Link, layout: Layout) -> None:
        self.link, self.layout = link, layout

    def counts(self, topk_idx: Tensor) -> tuple[Sent, Tensor]:
        """What this rank sends, and int32 [num_experts + world]: its rows for each expert, its copies for each rank."""
        layout = self.layout
        sent = Sent.of(topk_idx, layout.world, layout.local_experts)
        rows = torch.bincount(topk_idx[topk_idx >= 0].long(), minlength=layout.num_experts)
        return sent, torch.cat([rows, sent.counts]).int()

    def check_room(self, counts: Tensor) -> None:
        """Raise Overflow, on all ranks, where one has more rows than room. ``counts``: those of all ranks."""
        layout = self.layout
        rows = counts[:, : layout.num_experts].sum(0, dtype=torch.int64).view(layout.world, -1).sum(1)
        if int(rows.max()) > layout.capacity:
            raise Overflow(layout.capacity, rows.tolist())

    def route(self, sent: Sent, counts: Tensor, topk_idx: Tensor, topk_weights: Tensor, deadline: float) -> Routing:
        """Tell each rank the slots of the copies that it gets, and place those that come. ``counts``: of all ranks."""
        layout, rank = self.layout, self.link.rank
        local, top_k = layout.local_experts, layout.top_k
        copies = counts[:, layout.num_experts :].contiguous()
        slots = slots_of(sent, topk_idx, topk_weights, local)
        came = torch.empty((int(copies[:, rank].sum()), 2 * top_k), dtype=torch.int32, device=self.link.device)
        given = copies[rank].tolist(), copies[:, rank].tolist()
        self.link.exchange(slots, given[0], came, given[1], "dispatch: slots").wait(deadline)
        where, slot_weights = place(came, local)
        here = counts[:, rank * local : (rank + 1) * local].contiguous()
        rows = int(here.sum())
        weights = torch.empty(layout.capacity, device=self.link.device)
        torch.index_select(slot_weights.view(-1), 0, where.slots[:rows], out=weights[:rows])
        return Routing(sent, slots[:, :top_k] >= 0, where, weights, here.to(self.link.device), copies, rows)

    def send_rows(self, x: Rows, routing: Routing, recv: Rows) -> tuple[Flight, Callable[[], None]]:
        """Begin to send a copy of each row of ``x`` where it goes. When it has come, the function fills ``recv``."""
        copies, flight = self._send(x, routing, "dispatch: rows")
        return flight, lambda: self._fill(recv, copies, routing)

    def send_copies(self, x: Tensor, routing: Routing, role: str, deadline: float) -> Tensor:
        """A copy of each row of ``x``, any dtype, as they come: [copies received, columns]."""
        copies, flight = self._send(x, routing, role)
        flight.wait(deadline)
        return copies.view(x.dtype)

    def _send(self, x: Rows, routing: Routing, role: str) -> tuple[Tensor, Flight]:
        token, codes = routing.sent.token, x.data if isinstance(x, ScaledTensor) else x
        parts = [codes.contiguous().view(torch.uint8)]
        if isinstance(x, ScaledTensor):
            parts.append(x.scale.clone(memory_format=torch.contiguous_format).view(torch.uint8))
        width = sum(part.shape[1] for part in parts)
        out, into = (self._bytes(copies, width) for copies in (token.numel(), int(sum(self._came(routing)))))
        first = 0
        for part in parts:
            out[:, first : first + part.shape[1]] = part[token]
            first += part.shape[1]
        return into, self.link.exchange(out, self._went(routing), into, self._came(routing), role)

    def _fill(self, recv: Rows, copies: Tensor, routing: Routing) -> None:
        """Each copy to its rows."""
        n, hidden = routing.rows, self.layout.hidden
        if not isinstance(recv, ScaledTensor):
            recv[:n] = copies.view(recv.dtype)[routing.copy_of]
            return
        recv.data.view(torch.uint8)[:n] = copies[:, :hidden][routing.copy_of]
        recv.scale[:n] = copies[:, hidden:].view(torch.float32)[routing.copy_of]

    def return_sums(
        self, rows: Tensor, weights: Tensor | None, routing: Routing, role: str
    ) -> tuple[Flight, Callable[[Tensor], None]]:
        """Begin to send the sum over each copy's rows back. When all came, the function writes the tokens' sums."""
        hidden, went = self.layout.hidden, self._went(routing)
        partials = self._bytes(sum(self._came(routing)), 2 * hidden)
        sums.rank_partials(rows, routing.where.rows, weights, partials.view(torch.bfloat16))
        into = self._bytes(sum(went), 2 * hidden)
        flight = self.link.exchange(partials, self._came(routing), into, went, role)
        of_node, token = self.layout.ranks_per_node, routing.sent.token
        return flight, lambda out: sums.node_sums(into.view(torch.bfloat16), token, went, of_node, out)

    def return_values(self, values: Tensor, routing: Routing, role: str, deadline: float) -> Tensor:
        """Give each slot the value of its row: float32 [rows in use, ...] back to [T, top_k], 0 where there is none."""
        top_k, where = routing.sent.top_k, routing.where.rows.long()
        of_slot = torch.zeros(where.shape, device=self.link.device)
        of_slot[where >= 0] = values[where[where >= 0]]
        into = torch.empty((sum(self._went(routing)), top_k), device=self.link.device)
        self.link.exchange(of_slot, self._came(routing), into, self._went(routing), role).wait(deadline)
        out = torch.zeros((routing.sent.tokens, top_k), device=self.link.device)
        copy, slot = routing.sent_slots.nonzero().unbind(1)
        out[routing.sent.token[copy], slot] = into[copy, slot]
        return out

    def empty_recv(self, quantized: bool) -> Rows:
        """Rows of the capacity."""
        rows, hidden, device = self.layout.capacity, self.layout.hidden, self.link.device
        if not quantized:
            return torch.empty((rows, hidden), dtype=torch.bfloat16, device=device)
        data = torch.empty((rows, hidden), dtype=torch.float8_e4m3fn, device=device)
        return ScaledTensor._trusted(data, empty_scale(data, (rows, ceil_div(hidden, BLOCK)), _BLOCK), _BLOCK)

    def _bytes(self, rows: int, width: int) -> Tensor:
        return torch.empty((rows, width), dtype=torch.uint8, device=self.link.device)

    def _went(self, routing: Routing) -> list[int]:
        """Copies sent to each rank."""
        return [int(n) for n in routing.copies[self.link.rank]]

    def _came(self, routing: Routing) -> list[int]:
        """Copies received from each rank."""
        return [int(n) for n in routing.copies[:, self.link.rank]]
