"""What a Buffer allocates, as a list that can be printed before anything is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import _C
from ..errors import check_value
from ..layout import BLOCK, pad4

# Rows of what one rank tells all others before a call: see `preflight`.
STATUS_WORDS, TEXT_WORDS = 8, 64


@dataclass(frozen=True)
class Layout:
    """The sizes that all ranks of a Buffer agree on."""

    world: int
    hidden: int
    num_experts: int
    top_k: int
    max_tokens: int
    ranks_per_node: int
    capacity: int

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.world

    @property
    def nodes(self) -> int:
        return self.world // self.ranks_per_node

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return self.hidden // BLOCK

    @property
    def status_words(self) -> int:
        return STATUS_WORDS + self.num_experts + self.world + TEXT_WORDS

    def row_bytes(self, quantized: bool) -> int:
        """Bytes of a token on its way."""
        return self.hidden + 4 * self.blocks if quantized else 2 * self.hidden


def worst_capacity(world: int, num_experts: int, top_k: int, max_tokens: int) -> int:
    """The rows that a rank gets at most where no token names an expert twice."""
    return world * max_tokens * min(top_k, num_experts // world)


@dataclass(frozen=True)
class Item:
    """One tensor."""

    name: str
    held: str
    """By what: buffer, recv, handle, or dispatch or combine, while bytes are on the way."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    exact: bool
    """Whether it is always of that size, or of that at most: with all tokens, and as many copies as there can be."""
    padded: int = 0
    """Elements of padding."""

    @property
    def nbytes(self) -> int:
        return (math.prod(self.shape) + self.padded) * self.dtype.itemsize


@dataclass(frozen=True)
class Memory:
    """Tensors of a Buffer on one rank; ``print`` shows them. Through the process group it holds none between calls:
    ``recv`` and the handle are the caller's, once a dispatch; the rest lives while a dispatch or a combine runs.
    Temporaries of torch's own operations are not counted."""

    way: str
    items: tuple[Item, ...]

    def held_by(self, holder: str) -> int:
        """Bytes of 'buffer', 'recv', 'handle', 'dispatch' or 'combine'."""
        return sum(item.nbytes for item in self.items if item.held == holder)

    @property
    def nbytes(self) -> int:
        """The most that there is at a time with one handle: its result and itself, and what a call adds."""
        calls = max(self.held_by("dispatch"), self.held_by("combine"))
        return self.held_by("buffer") + self.held_by("recv") + self.held_by("handle") + calls

    def __str__(self) -> str:
        rows = [
            (
                item.held,
                item.name,
                "x".join(map(str, item.shape)),
                str(item.dtype).removeprefix("torch."),
                f"{item.nbytes:,}",
                "" if item.exact else "at most",
            )
            for item in self.items
        ]
        rows.append(("", "at a time", "", "", f"{self.nbytes:,}", "at most"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        right = (False, False, True, False, True, False)
        lines = [
            "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
            for row in rows
        ]
        return "\n".join([f"{self.way}: bytes on one rank", *(line.rstrip() for line in lines)])


def _recv(layout: Layout, quantized: bool) -> list[Item]:
    rows = layout.capacity
    if quantized:
        return [
            Item("data", "recv", (rows, layout.hidden), torch.float8_e4m3fn, True),
            Item(
                *("scale", "recv", (rows, layout.blocks), torch.float32, True),
                padded=(pad4(rows) - rows) * (layout.blocks - 1),  # the last column has none
            ),
        ]
    return [Item("rows", "recv", (rows, layout.hidden), torch.bfloat16, True)]


def kernel_items(layout: Layout, geometry: _C.CommGeometry, quantized: bool) -> tuple[Item, ...]:
    """Of the way by kernels: what its windows and its state hold lives as long as the Buffer."""
    result = Item("result", "combine", (layout.max_tokens, layout.hidden), torch.bfloat16, False)
    return (
        Item("window: rings and mail", "buffer", (geometry.window_bytes,), torch.uint8, True),
        Item("state: positions of rings", "buffer", (geometry.state_words,), torch.int32, True),
        Item("addresses of windows", "buffer", (layout.world,), torch.int64, True),
        *_recv(layout, quantized),
        Item("routing", "handle", (geometry.routing_words,), torch.int32, True),
        Item("indices", "handle", (layout.max_tokens, layout.top_k), torch.int32, False),
        Item("offsets", "handle", (layout.local_experts,), torch.int32, True),
        result,
    )


def _collective(layout: Layout, quantized: bool) -> tuple[Item, ...]:
    rows, top_k = layout.capacity, layout.top_k
    sent = layout.max_tokens * min(top_k, layout.world)
    came = layout.max_tokens * layout.world
    width = layout.row_bytes(quantized)
    recv = _recv(layout, quantized)
    handle = [
        Item("offsets", "handle", (layout.local_experts,), torch.int32, True),
        Item("recv_counts", "handle", (layout.world, layout.local_experts), torch.int32, True),
        Item("recv_weights", "handle", (rows,), torch.float32, True),
        Item("copies", "handle", (layout.world, layout.world), torch.int32, True),
        Item("copies for each rank", "handle", (layout.world,), torch.int64, True),
        Item("token of each copy sent", "handle", (sent,), torch.int64, False),
        Item("rank of each copy sent", "handle", (sent,), torch.int64, False),
        Item("slots of each copy sent", "handle", (sent, top_k), torch.bool, False),
        Item("rows of each copy received", "handle", (came, top_k), torch.int32, False),
        Item("copy and slot of each row", "handle", (came * top_k,), torch.int32, False),
    ]
    dispatch = [
        *_of_all(layout, "dispatch"),
        Item("slots to send", "dispatch", (sent, 2 * top_k), torch.int32, False),
        Item("slots received", "dispatch", (came, 2 * top_k), torch.int32, False),
        Item("copies to send", "dispatch", (sent, width), torch.uint8, False),
        Item("copies received", "dispatch", (came, width), torch.uint8, False),
    ]
    combine = [
        *_of_all(layout, "combine"),
        Item("partial sums to send", "combine", (came, 2 * layout.hidden), torch.uint8, False),
        Item("partial sums received", "combine", (sent, 2 * layout.hidden), torch.uint8, False),
        Item("sum", "combine", (layout.max_tokens, layout.hidden), torch.float32, False),
        Item("node sum", "combine", (layout.max_tokens, layout.hidden), torch.float32, False),
        Item("result", "combine", (layout.max_tokens, layout.hidden), torch.bfloat16, False),
    ]
    return (*recv, *handle, *dispatch, *combine)


def _of_all(layout: Layout, call: str) -> list[Item]:
    """What a rank tells each other before a call, and what it is told."""
    shape = (layout.world, layout.status_words)
    return [Item(name, call, shape, torch.int32, True) for name in ("status to send", "status of all")]


# A way of running adds itself here.
WAYS: dict[str, Callable[[Layout, bool], tuple[Item, ...]]] = {"collective": _collective}


def memory_of(layout: Layout, quantized: bool, way: str) -> Memory:
    check_value(way in WAYS, "comm.memory", "way", " or ".join(WAYS), way)
    return Memory(way, WAYS[way](layout, quantized))


def memory(
    *,
    world: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    max_tokens: int,
    capacity: int | None = None,
    quantize: bool = True,
    way: str = "collective",
    ranks_per_node: int | None = None,
    num_sms: int = 20,
    gpu: str = "NVIDIA H100",
) -> Memory:
    """What a Buffer of these sizes allocates on a rank, before there is one. ``print(memory(...))`` shows it.

    Args:
        world: ranks of the group.
        hidden, num_experts, top_k, max_tokens, capacity: as :class:`fastfp8.comm.Buffer` takes them.
        quantize: as ``dispatch`` takes it.
        way: "collective", the exchange through the process group, or "kernels".
        ranks_per_node, num_sms: as Buffer takes them, for kernels; None is one node.
        gpu: the name of the GPU, for kernels: their rings are what was tuned for it here, else a model's choice.

    Raises:
        ValueError: sizes do not fit.
    """
    check_value(way in (*WAYS, "kernels"), "comm.memory", "way", " or ".join((*WAYS, "kernels")), way)
    per_node = world if ranks_per_node is None else ranks_per_node
    layout = layout_of(world, hidden, num_experts, top_k, max_tokens, per_node, capacity, "comm.memory")
    if way == "kernels":
        from .kernel_exchange import geometry_of, settings_of  # with the model that chooses its settings: 0.1 s

        geometry = geometry_of(layout, settings_of(layout, num_sms, gpu))
        return Memory(way, kernel_items(layout, geometry, quantize))
    return memory_of(layout, quantize, way)


def layout_of(
    world: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    max_tokens: int,
    ranks_per_node: int,
    capacity: int | None,
    op: str,
) -> Layout:
    """A Layout of sizes that fit, or an error that names the first that does not."""
    check_value(hidden > 0 and hidden % BLOCK == 0, op, "hidden", f"a positive multiple of {BLOCK}", hidden)
    fits = num_experts > 0 and num_experts % world == 0
    check_value(fits, op, "num_experts", f"a positive multiple of the number of ranks, {world}", num_experts)
    check_value(1 <= top_k <= 32, op, "top_k", "1 to 32", top_k)
    check_value(max_tokens >= 0, op, "max_tokens", "0 or more", max_tokens)
    fits = ranks_per_node > 0 and world % ranks_per_node == 0
    check_value(fits, op, "ranks_per_node", f"a divisor of the number of ranks, {world}", ranks_per_node)
    if capacity is None:
        capacity = worst_capacity(world, num_experts, top_k, max_tokens)
    check_value(capacity >= 0, op, "capacity", "0 or more", capacity)
    # Rows and (copy, slot) are counted in int32.
    check_value(world * max_tokens * top_k < 2**31, op, "max_tokens", "world * max_tokens * top_k < 2**31", max_tokens)
    check_value(capacity < 2**31, op, "capacity", "less than 2**31", capacity)
    return Layout(world, hidden, num_experts, top_k, max_tokens, ranks_per_node, capacity)
