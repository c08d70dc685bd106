"""Dispatch and combine in one process: the oracle of every way that :mod:`fastfp8.comm` runs, and their numerics.

Rank ``r`` is entry ``r`` of each list; nothing here communicates. Expert ``e`` lives on rank ``e // (E / world)``, rank
``r`` on node ``r // ranks_per_node``. Loops over tokens and slots say what is meant, one row at a time.

**Placement.** A rank's rows are grouped by its experts in ascending order, and within an expert ordered by (source
rank, token, slot). A slot of -1 has no row. An expert that a token names twice gets two rows.

**Combine.** Three sums, each FP32 and rounded to BF16 once at its end, to nearest even, because it then travels:

1. on an expert's rank, over the token's slots there in ascending order: ``acc = fma(weight, row, acc)`` from 0, with
   one rounding an fma; without weights they are 1;
2. on a node, over its ranks in ascending order, of those with a slot of the token: ``acc = acc + partial``, from 0;
3. over nodes in ascending order, of those with a slot of the token: ``acc = acc + partial``, from 0.

A token without a slot gets zeros.

**Backward.** Of dispatch: combine without weights. Of combine: a row's gradient is ``weight * dy[token]`` in FP32,
rounded to BF16 once; that of a weight is the product of the row and ``dy[token]``, summed as
``fastfp8/reference/permute.py`` does: elements ``i``, ``i + 256``, ... of the products into 256 running sums in
ascending order, then these pairwise.

**Bytes.** The least that a routing needs: a token goes over InfiniBand once to each other node that has an expert of
it, to the rank there that has the source's place in its node, and over NVLink once to each rank that has an expert of
it, but for the one that has the token already. Combine is the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import BLOCK, Block, ceil_div, empty_scale
from ..scaled_tensor import ScaledTensor
from .pairwise import pairwise_sum
from .permute import DOT_LANES
from .quantize import quantize as quantize_blocks
from .tensor_core import fma

_BLOCK: Block = (1, BLOCK)
Rows = Tensor | ScaledTensor


class Placement(NamedTuple):
    """Where each row of one rank came from, and what combine needs to know of the tokens that this rank sent."""

    source: list[int]
    """The rank that each row came from."""
    token: list[int]
    """Its token there."""
    slot: list[int]
    """Its slot of that token."""
    weights: Tensor
    """float32 [rows]: the weight of each row; 1 where dispatch had none."""
    sent: tuple[int, int]
    """[T, top_k] of the indices that this rank dispatched."""


class Received(NamedTuple):
    """What dispatch gives one rank: exactly as many rows as there are, no capacity."""

    recv: Rows
    """[rows, hidden]: BF16, or a ScaledTensor in (1, 128) blocks."""
    offsets: Tensor
    """int32 [local experts]: the row at which each expert ends."""
    recv_weights: Tensor
    """float32 [rows]."""
    placement: Placement


class Copies(NamedTuple):
    """int64 [world, world]: how many tokens dispatch moves from rank to rank over each kind of link."""

    nvlink: Tensor
    ib: Tensor


def dispatch(
    xs: Sequence[Rows],
    topk_idxs: Sequence[Tensor],
    topk_weights: Sequence[Tensor] | None = None,
    *,
    num_experts: int,
    quantize: bool = True,
    pow2: bool = False,
) -> list[Received]:
    """Send each token to the ranks of its experts. See the module for the order of rows.

    Args:
        xs: of each rank its tokens: BF16 [T, hidden], or a ScaledTensor of that shape in (1, 128) blocks.
        topk_idxs: of each rank int32 or int64 [T, top_k], experts from 0 to below ``num_experts``, or -1.
        topk_weights: of each rank float32 [T, top_k]; None for 1.
        num_experts: E, a multiple of the number of ranks.
        quantize: rows as ``fastfp8.quantize(x, pow2=pow2)`` has them.
    """
    world = len(xs)
    local = num_experts // world
    slots_of = [index.tolist() for index in topk_idxs]
    received = []
    for rank in range(world):
        of_expert: list[list[tuple[int, int, int]]] = [[] for _ in range(local)]
        for source in range(world):
            for token, experts in enumerate(slots_of[source]):
                for slot, expert in enumerate(experts):
                    if expert >= 0 and expert // local == rank:
                        of_expert[expert % local].append((source, token, slot))
        order = [row for rows in of_expert for row in rows]
        offsets = torch.tensor([len(rows) for rows in of_expert]).cumsum(0).int()
        weights = torch.ones(len(order))
        if topk_weights is not None:
            for row, (source, token, slot) in enumerate(order):
                weights[row] = topk_weights[source][token, slot]
        sources, tokens, slots = ([row[part] for row in order] for part in range(3))
        sent = (topk_idxs[rank].shape[0], topk_idxs[rank].shape[1])
        placement = Placement(sources, tokens, slots, weights, sent)
        rows = _gather(xs, placement, quantize, pow2)
        received.append(Received(rows, offsets, weights, placement))
    return received


def _gather(xs: Sequence[Rows], placement: Placement, quantize: bool, pow2: bool) -> Rows:
    """The rows of a placement; each in FP8 on its own, as no block spans two rows."""
    parts = [x.data.view(torch.uint8) if isinstance(x, ScaledTensor) else x for x in xs]
    hidden = parts[0].shape[1]
    places = list(zip(placement.source, placement.token, strict=True))
    rows = torch.empty((len(places), hidden), dtype=parts[0].dtype)
    for row, (source, token) in enumerate(places):
        rows[row] = parts[source][token]
    if isinstance(xs[0], ScaledTensor):
        data = rows.view(torch.float8_e4m3fn)
        scale = empty_scale(data, (len(places), ceil_div(hidden, BLOCK)), _BLOCK)
        for row, (source, token) in enumerate(places):
            x = xs[source]
            assert isinstance(x, ScaledTensor)
            scale[row] = x.scale[token]
        return ScaledTensor(data, scale, _BLOCK)
    if not quantize:
        return rows
    data, scale = quantize_blocks(rows, _BLOCK, pow2, 0.0)
    return ScaledTensor(data, scale, _BLOCK)


def combine(
    expert_outs: Sequence[Tensor],
    placements: Sequence[Placement],
    *,
    ranks_per_node: int | None = None,
    weighted: bool = True,
) -> list[Tensor]:
    """Sum the rows of each token on the rank that it came from: BF16 [T, hidden] of each. See the module for the order.

    Args:
        expert_outs: of each rank BF16 [rows, hidden], as its placement says; more rows than that are not read.
        ranks_per_node: None if all ranks are of one node.
    """
    world, hidden = len(placements), expert_outs[0].shape[1]
    of_node = ranks_per_node or world
    # rows_of[rank][source, token] in ascending order of slots: there a row of each expert, so sorted by slot.
    rows_of: list[dict[tuple[int, int], list[tuple[int, int]]]] = [{} for _ in range(world)]
    for rank, where in enumerate(placements):
        for row, (source, token, slot) in enumerate(zip(where.source, where.token, where.slot, strict=True)):
            rows_of[rank].setdefault((source, token), []).append((slot, row))
    one = torch.ones(())
    results = []
    for source, where in enumerate(placements):
        y = torch.zeros((where.sent[0], hidden), dtype=torch.bfloat16)
        for token in range(where.sent[0]):
            total = torch.zeros(hidden)
            for first in range(0, world, of_node):
                node_sum, on_node = torch.zeros(hidden), False
                for rank in range(first, first + of_node):
                    found = rows_of[rank].get((source, token))
                    if found is None:
                        continue
                    acc = torch.zeros(hidden)
                    for _, row in sorted(found):
                        weight = placements[rank].weights[row] if weighted else one
                        acc = fma(weight, expert_outs[rank][row].float(), acc)
                    node_sum, on_node = node_sum + acc.bfloat16().float(), True
                if on_node:
                    total = total + node_sum.bfloat16().float()
            y[token] = total.bfloat16()
        results.append(y)
    return results


def combine_backward(
    dys: Sequence[Tensor], expert_outs: Sequence[Tensor], placements: Sequence[Placement]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of a weighted combine: of each rank BF16 [rows, hidden] for its rows, and float32 [T, top_k] for the
    weights that it dispatched, 0 where a slot has no row. ``dys``: of each rank BF16 [T, hidden]."""
    grad_weights = [torch.zeros(where.sent) for where in placements]
    grad_rows = []
    for where, outs in zip(placements, expert_outs, strict=True):
        grads = torch.empty((len(where.source), outs.shape[1]), dtype=torch.bfloat16)
        for row, (source, token, slot) in enumerate(zip(where.source, where.token, where.slot, strict=True)):
            dy = dys[source][token].float()
            grads[row] = (dy * where.weights[row]).bfloat16()
            lanes = torch.zeros(DOT_LANES)
            products = dy * outs[row].float()
            for first in range(0, products.numel(), DOT_LANES):
                part = products[first : first + DOT_LANES]
                lanes[: part.numel()] += part
            grad_weights[source][token, slot] = pairwise_sum(lanes)
        grad_rows.append(grads)
    return grad_rows, grad_weights


def copies(topk_idxs: Sequence[Tensor], *, num_experts: int, ranks_per_node: int | None = None) -> Copies:
    """How many tokens dispatch must move over each link at least; entry [a, b] goes from rank a to rank b.

    Combine moves as many partial sums the other way: entry [a, b] from rank b to rank a.
    """
    world = len(topk_idxs)
    of_node = ranks_per_node or world
    local = num_experts // world
    nvlink, ib = (torch.zeros((world, world), dtype=torch.int64) for _ in range(2))
    for source, index in enumerate(topk_idxs):
        for experts in index.tolist():
            ranks = {expert // local for expert in experts if expert >= 0}
            for node in {rank // of_node for rank in ranks}:
                entry = node * of_node + source % of_node
                if node != source // of_node:
                    ib[source, entry] += 1
                for rank in ranks:
                    if rank // of_node == node and rank != entry:
                        nvlink[entry, rank] += 1
    return Copies(nvlink, ib)


def token_bytes(hidden: int, quantized: bool) -> int:
    """Bytes of a token on a link without what says where it goes: FP8 codes and their scales, or BF16."""
    return hidden + 4 * ceil_div(hidden, BLOCK) if quantized else 2 * hidden
