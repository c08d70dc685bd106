"""What ranks do in the tests of fastfp8.comm, and the inputs of all of them, which any process can make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from groups import POISON, poisoned_empty
from torch import Tensor

import fastfp8
from fastfp8 import ScaledTensor, comm

# Seconds that a rank waits for another where nothing should fail: many times what it takes on a busy machine.
PATIENCE = 60.0


@dataclass(frozen=True)
class Case:
    """A routing of ``kind`` on ``world`` ranks, ``experts`` on each."""

    world: int
    kind: str = "some"
    experts: int = 3
    top_k: int = 2
    hidden: int = 128
    ranks_per_node: int | None = None
    capacity: int | None = None

    @property
    def num_experts(self) -> int:
        return self.world * self.experts

    def tokens_of(self, rank: int) -> int:
        """0, 1, and odd numbers that differ."""
        return (0, 1, 5, 9, 3, 7, 1)[(rank + len(self.kind)) % 7]

    def inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, indices and weights of a rank."""
        seed = torch.Generator().manual_seed(rank * 1000 + self.top_k)
        count = self.tokens_of(rank)
        x = torch.randn((count, self.hidden), generator=seed).bfloat16()
        index = torch.randint(-1, self.num_experts, (count, self.top_k), generator=seed)
        if self.kind == "one expert":
            index[:] = self.num_experts - 2
        elif self.kind == "none":
            index[:] = -1
        elif self.kind == "twice":
            index[:, -1] = index[:, 0]
        elif self.kind == "distinct":
            index = torch.rand((count, self.num_experts), generator=seed).topk(self.top_k).indices
        return x, index if rank % 2 else index.int(), torch.rand(index.shape, generator=seed)

    def all_inputs(self) -> list[list[Tensor]]:
        """Tokens, indices and weights, of every rank each."""
        return [list(of_ranks) for of_ranks in zip(*map(self.inputs, range(self.world)), strict=True)]

    def buffer(self, group: Any, **options: Any) -> comm.Buffer:
        given = {"timeout": PATIENCE, "max_tokens": 9, "capacity": self.capacity, **options}
        sizes = {"hidden": self.hidden, "num_experts": self.num_experts, "top_k": self.top_k}
        return comm.Buffer(group, ranks_per_node=self.ranks_per_node, **sizes, **given)

    def room(self) -> int:
        """Rows enough for any of these, duplicates too."""
        return self.world * 9 * self.top_k


Packed = tuple[str, tuple[int, ...], bytes]


def packed(t: Tensor) -> Packed:
    """A tensor as the bytes of a pipe, which needs no shared memory."""
    flat = t.detach().clone(memory_format=torch.contiguous_format).view(-1)
    return str(t.dtype).removeprefix("torch."), tuple(t.shape), flat.view(torch.uint8).numpy().tobytes()


def unpacked(given: Packed) -> Tensor:
    dtype, shape, raw = given
    if not raw:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)


def used(recv: Tensor | ScaledTensor, rows: int) -> list[Packed]:
    """The rows in use."""
    if isinstance(recv, ScaledTensor):
        return [packed(recv.data[:rows]), packed(recv.scale[:rows])]
    return [packed(recv[:rows])]


def scaled_rows(recv: Tensor, factor: int) -> Tensor:
    """What stands for an expert's output: ``recv`` times a number of the rank, NaN past the rows in use."""
    return recv * (1 + factor / 8)


def forward(group: Any, case: Case) -> dict[str, Any]:
    """Dispatch in each form, its replay, and combine."""
    rank = dist.get_rank(group)
    x, index, weights = case.inputs(rank)
    found: dict[str, Any] = {}
    with case.buffer(group, capacity=case.room()) as buffer, poisoned_empty():
        for name, given, options in (
            ("fp8", x, {}),
            ("pow2", x, {"pow2": True}),
            ("given", fastfp8.quantize(x.float() * 3), {}),
            ("bf16", torch.cat([x, x], 1)[:, : case.hidden], {"quantize": False}),
        ):
            recv, offsets, handle = buffer.dispatch(given, index, weights, **options)
            rows = int(offsets[-1])
            codes = recv.data if isinstance(recv, ScaledTensor) else recv
            assert (codes[rows:].view(torch.uint8) == POISON).all(), f"{name}: a row past the last was written"
            assert (handle.recv_weights[rows:].view(torch.uint8) == POISON).all()
            found[name] = used(recv, rows)
        found["offsets"], found["weights"] = packed(offsets), packed(handle.recv_weights[:rows])
        found["counts"], found["copies"] = packed(handle.recv_counts), packed(handle.copies)
        outs = scaled_rows(recv, rank)
        outs[rows:] = torch.nan
        found["combined"] = packed(buffer.combine(outs, handle))
        out = torch.full_like(x, torch.nan)
        assert buffer.combine(outs.t().contiguous().t(), handle, weighted=False, out=out) is out
        found["unweighted"] = packed(out)
        # A replay, twice and in turns with another routing, async at that: other tokens, the same places.
        turned = index.flip(1)
        first = buffer.dispatch(x * 2, handle=handle, async_op=True)
        other = buffer.dispatch(x, turned, weights, quantize=False, async_op=True)
        second = buffer.dispatch(x * 4, handle=handle, quantize=False)
        for _, _, late in (other, first):
            late.wait()
        found["replay"], found["replay bf16"] = used(first[0], rows), used(second[0], rows)
        found["turned"] = used(other[0], int(other[1][-1]))
        late_sum = buffer.combine(outs, first[2], async_op=True)
        first[2].wait()
        found["replay combined"] = packed(late_sum)
    return found


def backward(group: Any, case: Case) -> dict[str, Any]:
    """The explicit gradients, of given ones."""
    rank = dist.get_rank(group)
    x, index, weights = case.inputs(rank)
    with case.buffer(group, capacity=case.room()) as buffer:
        recv, offsets, handle = buffer.dispatch(x, index, weights, quantize=False)
        rows = int(offsets[-1])
        outs = scaled_rows(recv, rank)
        grad_rows, grad_values = buffer.combine_backward(x * 2, outs, handle)
        plain_rows, no_values = buffer.combine_backward(x * 2, outs, handle, weighted=False)
        assert no_values is None
        assert grad_values is not None
        assert not grad_values[rows:].any()
        grad_weights = buffer.weights_backward(grad_values, handle)
        grad_rows[rows:] = torch.nan
        return {
            "rows": packed(grad_rows[:rows]),
            "plain rows": packed(plain_rows[:rows]),
            "weights": packed(grad_weights),
            "x": packed(buffer.dispatch_backward(grad_rows, handle)),
        }


def layer(case: Case, recv: Tensor, offsets: Tensor, experts: Tensor) -> Tensor:
    """tanh(row @ expert) of the rows in use, zeros past them."""
    ends = [0, *offsets.tolist()]
    rows = [recv[a:b].float() @ w for a, b, w in zip(ends, ends[1:], experts, strict=False)]
    out = torch.tanh(torch.cat(rows)).bfloat16()
    return torch.cat([out, out.new_zeros(recv.shape[0] - out.shape[0], case.hidden)])


def expert_weights(case: Case) -> Tensor:
    shape = (case.num_experts, case.hidden, case.hidden)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) / case.hidden**0.5


def train(group: Any, case: Case, where: str) -> dict[str, Any]:
    """A mixture of experts with autograd: the gradients of tokens, gates and experts. ``where``: gates are applied in
    'combine' or in the 'expert'."""
    rank = dist.get_rank(group)
    x, index, weights = case.inputs(rank)
    x.requires_grad_()
    weights.requires_grad_()
    mine = expert_weights(case)[rank * case.experts : (rank + 1) * case.experts].clone().requires_grad_()
    with case.buffer(group, capacity=case.room()) as buffer:
        recv, offsets, handle = buffer.dispatch(x, index, weights, quantize=False, async_op=True)
        handle.wait()
        outs = layer(case, recv, offsets, mine)
        if where == "expert":
            rows = torch.arange(outs.shape[0]) < offsets[-1]
            outs = (outs.float() * torch.where(rows, handle.recv_weights, 0.0)[:, None]).bfloat16()
        y = buffer.combine(outs, handle, weighted=where == "combine")
        (y.float() * loss_weights(case, rank)).sum().backward()
        assert x.grad is not None
        assert weights.grad is not None
        assert mine.grad is not None
    return {"y": packed(y), "x": packed(x.grad), "weights": packed(weights.grad), "experts": packed(mine.grad)}


def loss_weights(case: Case, rank: int) -> Tensor:
    shape = (case.tokens_of(rank), case.hidden)
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))
