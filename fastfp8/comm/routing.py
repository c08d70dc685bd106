"""Who gets which token, and where its rows lie there: index arithmetic without a loop over tokens, on CPU and GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.permute import RowMap, row_map


@dataclass(frozen=True)
class Sent:
    """What one rank sends: a copy of a token for each rank that has an expert of it, by rank, then by token."""

    token: Tensor
    """int64 [copies]: the token of each copy."""
    rank: Tensor
    """int64 [copies]: where it goes, ascending."""
    counts: Tensor
    """int64 [world]: copies for each rank."""
    tokens: int
    """T, how many tokens there are to sum up again."""
    top_k: int

    @staticmethod
    def of(topk_idx: Tensor, world: int, local: int) -> Sent:
        """Of indices from 0 to below world * local, or -1."""
        tokens, top_k = topk_idx.shape
        wanted = topk_idx.new_zeros((tokens, world + 1), dtype=torch.bool)
        wanted.scatter_(1, ranks_of(topk_idx, world, local), True)
        rank, token = wanted[:, :world].t().nonzero().unbind(1)
        return Sent(token, rank, wanted[:, :world].sum(0), tokens, top_k)


def ranks_of(topk_idx: Tensor, world: int, local: int) -> Tensor:
    """int64: the rank of each slot's expert; ``world`` where it has none."""
    return torch.where(topk_idx < 0, world, topk_idx // local).long()


def slots_of(sent: Sent, topk_idx: Tensor, topk_weights: Tensor, local: int) -> Tensor:
    """int32 [copies, 2 * top_k]: what a copy tells its rank: which of its experts each slot is, or -1, and the bits of
    each slot's weight."""
    index = topk_idx[sent.token] - (sent.rank * local)[:, None]
    index = torch.where((index >= 0) & (index < local) & (topk_idx[sent.token] >= 0), index, -1)
    return torch.cat([index.int(), topk_weights[sent.token].view(torch.int32)], 1)


def place(slots: Tensor, local: int) -> tuple[RowMap, Tensor]:
    """Rows for the copies that came, by source rank, then by token, as :func:`slots_of` tells of them.

    So the order of (copy, slot) is that of (source, token, slot), and the counting sort that permutes the tokens of one
    rank places those of all. Returns the map and float32 [copies, top_k] weights.
    """
    top_k = slots.shape[1] // 2
    index, weights = slots[:, :top_k].contiguous(), slots[:, top_k:].contiguous().view(torch.float32)
    return row_map(index, local), weights
