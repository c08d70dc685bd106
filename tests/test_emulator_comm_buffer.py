"""``comm.Buffer`` by kernels on emulated GPUs, a thread for each rank: what a user writes, forward and backward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from comm_ranks import geometry
from emulator import Launch, Machine
from emulator.plan import prepare_plan
from test_emulator_comm import Case, bits
from torch import Tensor

import fastfp8
from fastfp8 import _C, comm
from fastfp8.comm import Buffer, Overflow
from fastfp8.comm.footprint import Layout
from fastfp8.comm.kernel_exchange import KernelExchange, geometry_of, settings_of
from fastfp8.comm.kernels import Kernels
from fastfp8.reference import comm as oracle


class Node:
    """GPUs whose ranks are threads: a launch waits for those of all ranks, then they run at the same time."""

    def __init__(self, g: _C.CommGeometry, seed: int = 0) -> None:
        self.machine = Machine(seed, g.ranks)
        self.windows = [torch.zeros(g.window_bytes, dtype=torch.uint8) for _ in range(g.ranks)]
        addresses = torch.tensor([w.data_ptr() for w in self.windows], dtype=torch.int64)
        self.launches: dict[int, Launch] = {}
        self.barrier = threading.Barrier(g.ranks, self.run, timeout=60)
        layout = Layout(g.ranks, g.hidden, g.ranks * g.local_experts, g.top_k, g.max_tokens, g.gpus, g.capacity)

        def buffer(rank: int) -> Buffer:
            def launch(plan: _C.LaunchPlan, tensors: Mapping[str, Tensor]) -> None:
                self.launches[rank] = prepare_plan(plan, tensors, self.machine, None, rank, self.windows)
                self.barrier.wait()

            state = torch.zeros(g.state_words, dtype=torch.int32)
            kernels = Kernels(g, rank, addresses, state, timeout=0.05, warps=2, launch=launch)
            made = Buffer.__new__(Buffer)
            made._use(KernelExchange(kernels, layout), "cpu")
            return made

        self.buffers = [buffer(rank) for rank in range(g.ranks)]

    def run(self) -> None:
        self.machine.launch_all(self.launches.values())
        self.launches.clear()

    def on_all(self, work: Callable[[int, Buffer], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.buffers)) as pool:
            return list(pool.map(work, range(len(self.buffers)), self.buffers))


@pytest.mark.parametrize("topology", [(1, 3), (2, 2)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_training_step(topology: tuple[int, int]) -> None:
    """BF16 dispatch, an expert layer, combine; gradients of tokens, rows and weights bit for bit the oracle's."""
    g = geometry(*topology, top_k=3, hidden=128, max_tokens=4)
    case = Case.random(g, 30)
    assert case.weights is not None
    experts = g.ranks * g.local_experts
    generator = torch.Generator().manual_seed(31)
    dys = [torch.randn(x.shape, generator=generator).bfloat16() for x in case.xs]

    def step(rank: int, buffer: Buffer) -> dict[str, Tensor]:
        x, weights = case.xs[rank].clone().requires_grad_(), case.weights[rank].clone().requires_grad_()
        recv, offsets, handle = buffer.dispatch(x, case.idx[rank], weights, quantize=False)
        rows = recv * 2
        rows.retain_grad()
        y = buffer.combine(rows, handle)
        y.backward(dys[rank])
        buffer.check()
        n = int(offsets[-1])
        return {"y": y.detach(), "rows": rows.detach()[:n], "grad_rows": rows.grad[:n], "x": x.grad, "w": weights.grad}

    got = Node(g, 30).on_all(step)
    want = oracle.dispatch(case.xs, case.idx, case.weights, num_experts=experts, quantize=False)
    placements = [w.placement for w in want]
    rows = [2 * w.recv for w in want]  # type: ignore[operator]
    ys = oracle.combine(rows, placements, ranks_per_node=g.gpus)
    grad_rows, grad_weights = oracle.combine_backward(dys, rows, placements)
    dxs = oracle.combine([2 * r for r in grad_rows], placements, ranks_per_node=g.gpus, weighted=False)
    for rank, mine in enumerate(got):
        assert torch.equal(bits(mine["y"]), bits(ys[rank]))
        assert torch.equal(bits(mine["rows"]), bits(rows[rank]))
        assert torch.equal(bits(mine["grad_rows"]), bits(grad_rows[rank]))
        assert torch.equal(bits(mine["x"]), bits(dxs[rank]))
        assert torch.equal(mine["w"], grad_weights[rank])


def test_fp8_step_and_replay() -> None:
    """Quantised dispatch, gradients given straight through, and the handle again for other tokens."""
    g = geometry(1, 2, hidden=256, max_tokens=4)
    case = Case.random(g, 32)
    experts = g.ranks * g.local_experts

    def step(rank: int, buffer: Buffer) -> tuple[Any, ...]:
        x, weights = case.xs[rank], None if case.weights is None else case.weights[rank]
        recv, offsets, handle = buffer.dispatch(x, case.idx[rank].long(), weights, pow2=True)
        again, _, _ = buffer.dispatch(-x, handle=handle, pow2=True, async_op=True)
        grad = buffer.dispatch_backward(torch.ones(g.capacity, g.hidden).bfloat16(), handle)
        n = int(offsets[-1])
        return recv.data[:n], again.data[:n], grad

    got = Node(g, 32).on_all(step)
    want = oracle.dispatch(case.xs, case.idx, case.weights, num_experts=experts, pow2=True)
    for rank, (codes, again, grad) in enumerate(got):
        exact = want[rank].recv
        assert isinstance(exact, fastfp8.ScaledTensor)
        assert torch.equal(bits(codes), bits(exact.data))
        assert torch.equal(again.float(), -exact.data.float())
        assert torch.equal(grad, (case.idx[rank] >= 0).sum(1, keepdim=True).expand(grad.shape).bfloat16())


def test_errors() -> None:
    node = Node(geometry(1, 2, capacity=2, max_tokens=4))
    x = torch.randn(3, 128).bfloat16()

    def crowd(_: int, buffer: Buffer) -> str:
        """Rank 0, to which all go, is told once it has done its part."""
        try:
            buffer.dispatch(x, torch.zeros(3, 2, dtype=torch.int32))
        except Overflow as error:
            return str(error)
        return "fine"

    told, fine = node.on_all(crowd)
    assert "a rank has room for 2 rows, rank 0 would get 12: those beyond were left out" in told
    assert fine == "fine"
    with pytest.raises(ValueError, match="at most max_tokens = 4 tokens, got 5"):
        node.buffers[0].dispatch(x[:1].expand(5, -1), torch.zeros(5, 2, dtype=torch.int32))
    node.buffers[0].close()
    with pytest.raises(ValueError, match="an open Buffer"):
        node.buffers[0].dispatch(x, torch.zeros(3, 2, dtype=torch.int32))
    assert "kernels, closed" in repr(node.buffers[0])


def test_memory() -> None:
    """What is said to be allocated is what the node above allocates, and the rings of real sizes fit a GPU."""
    g = geometry(1, 2)
    node = Node(g)
    memory = node.buffers[0].memory()
    assert memory.held_by("buffer") == node.windows[0].numel() + 4 * g.state_words + 8 * g.ranks
    assert "window" in str(memory)
    sizes = {"hidden": 256, "num_experts": 4, "top_k": 2, "max_tokens": 16, "capacity": 64}
    layout = Layout(2, 256, 4, 2, 16, 2, 64)
    node = Node(geometry_of(layout, settings_of(layout, 4, "NVIDIA H200")))
    for quantize in (True, False):
        told = comm.memory(world=2, **sizes, quantize=quantize, way="kernels", num_sms=4, gpu="NVIDIA H200")
        assert told == node.buffers[0].memory(quantize)
    layout = Layout(8, 7168, 256, 8, 4096, 8, 8 * 4096 * 8)
    assert geometry_of(layout, settings_of(layout, 20, "NVIDIA H200")).window_bytes < 2 << 30


def test_kernels_need_gpus() -> None:
    with pytest.raises(ValueError, match="'collective' or 'kernels', got"):
        Buffer(_any_group(), hidden=128, num_experts=1, top_k=1, max_tokens=1, way="nccl")
    with pytest.raises(ValueError, match="expected 'collective' here: kernels run on GPUs, the Buffer is on a CPU"):
        Buffer(_any_group(), hidden=128, num_experts=1, top_k=1, max_tokens=1, way="kernels")


def _any_group() -> Any:
    """A group of this process alone."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD
