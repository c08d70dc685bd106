"""What memory() says is what is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from comm_cases import Case
from rank_pool import ranks
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastfp8
from fastfp8 import comm
from fastfp8.comm.footprint import Item

WORLD, TOKENS = 3, 5


class Storages(TorchDispatchMode):
    """The shape and type of the first tensor in each storage that appears, and the bytes of the storage."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []  # lest an address is used again
        self.seen: dict[int, tuple[tuple[int, ...], torch.dtype, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in pytree.tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):  # views made before share their storage with it
                self.kept.append(t)
                self.seen.setdefault(t.untyped_storage().data_ptr(), ((), t.dtype, 0))
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.seen:
                self.kept.append(t)
                entry = (tuple(t.shape), t.dtype, t.untyped_storage().nbytes())
                self.seen[t.untyped_storage().data_ptr()] = entry
        return out

    def has(self, item: Item) -> bool:
        return (item.shape, item.dtype, item.nbytes) in self.seen.values()


def held(tensors: list[Tensor]) -> int:
    """Bytes of their storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def allocate(group: Any, quantize: bool) -> list[str]:
    """The most that rank 0 can get: all tokens of all ranks. Returns what does not agree there."""
    case = Case(WORLD, experts=2, top_k=2, hidden=256)
    x = torch.randn(TOKENS, case.hidden).bfloat16()
    index = torch.tensor([[0, 2]] * TOKENS)
    wrong = []
    with case.buffer(group, max_tokens=TOKENS) as buffer:
        memory = buffer.memory(quantize)
        sizes = {"hidden": 256, "num_experts": 6, "top_k": 2, "max_tokens": TOKENS}
        assert memory == comm.memory(world=WORLD, quantize=quantize, **sizes)
        given = fastfp8.quantize(x) if quantize else x
        outs = torch.zeros((buffer.layout.capacity, case.hidden), dtype=torch.bfloat16)
        if dist.get_rank(group):  # one rank looks on: what the mode imports takes seconds
            _, _, handle = buffer.dispatch(given, index, quantize=False)
            buffer.combine(outs, handle)
            return []
        with Storages() as during_dispatch:
            recv, _, handle = buffer.dispatch(given, index, quantize=False)
        with Storages() as during_combine:
            buffer.combine(outs, handle)
        for item in memory.items:
            if not (during_combine if item.held == "combine" else during_dispatch).has(item):
                wrong.append(f"{item.held}: {item.name} {item.shape}")
        routing = handle.routing
        tables = [*routing.where, routing.sent.token, routing.sent.rank, routing.sent.counts, routing.sent_slots]
        tables += [routing.weights, routing.counts, routing.copies]
        for holder, tensors in (("recv", pytree.tree_leaves(recv)), ("handle", tables)):
            # A storage of torch's own may be shared by several: token and rank are columns of one.
            if held(tensors) != memory.held_by(holder):
                wrong.append(f"{holder}: {held(tensors)} bytes, not {memory.held_by(holder)}")
        known = {id(t) for t in tables}
        others = [t for t in pytree.tree_leaves(vars(routing)) if isinstance(t, Tensor) and id(t) not in known]
        if others or handle.recv_weights is not routing.weights:
            wrong.append("the handle holds more")
    return wrong


def test_it_is_what_is_allocated() -> None:
    with ranks(WORLD) as pool:
        for quantize in (True, False):
            assert pool.run(allocate, quantize) == [[]] * WORLD


def test_it_works_before_there_is_a_buffer_and_can_be_printed() -> None:
    sizes = {"world": 8, "hidden": 7168, "num_experts": 256, "top_k": 8, "max_tokens": 4096}
    memory = comm.memory(**sizes)
    rows = 8 * 4096 * 8
    assert memory.held_by("recv") == rows * (7168 + 4 * 56)
    text = str(memory)
    assert "recv      data" in text
    assert f"{rows * 7168:,}" in text
    assert f"{memory.nbytes:,}" in text.splitlines()[-1]
    assert len({len(line) <= 120 for line in text.splitlines()}) == 1
    assert comm.memory(**sizes, capacity=9, quantize=False).held_by("recv") == 9 * 7168 * 2
    assert comm.memory(**sizes, capacity=9).held_by("recv") == 9 * 7168 + 4 * (55 * 12 + 9)  # columns padded to 12
    for wrong, match in (
        ({"hidden": 100}, "'hidden'"),
        ({"way": "pigeons"}, "'way': expected collective or kernels, got pigeons"),
    ):
        given = {"world": 2, "hidden": 128, "num_experts": 2, "top_k": 1, "max_tokens": 1}
        with pytest.raises(ValueError, match=match):
            comm.memory(**{**given, **wrong})  # type: ignore[arg-type]
