"""``fastfp8.comm.kernels`` on emulated GPUs: what its launches are given, what comes back, and how errors arrive."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from comm_ranks import geometry
from emulator import Launch, Machine
from emulator.plan import prepare_plan
from test_emulator_comm import Case, assert_rows_equal, bits
from torch import Tensor

from fastfp8 import _C, ScaledTensor, quantize
from fastfp8.comm.errors import Overflow, Timeout
from fastfp8.comm.kernels import Kernels
from fastfp8.reference import comm as oracle


class Gpus:
    """A GPU for each rank. A launch waits until all ranks have launched, then they run together."""

    def __init__(self, g: _C.CommGeometry, seed: int = 0, timeout: float = 0.02) -> None:
        self.machine = Machine(seed, g.ranks)
        self.windows = [torch.zeros(g.window_bytes, dtype=torch.uint8) for _ in range(g.ranks)]
        self.waiting: dict[int, Launch] = {}
        addresses = torch.tensor([w.data_ptr() for w in self.windows], dtype=torch.int64)

        def kernels(rank: int) -> Kernels:
            def launch(plan: _C.LaunchPlan, tensors: Mapping[str, Tensor]) -> None:
                self.waiting[rank] = prepare_plan(plan, tensors, self.machine, None, rank, self.windows)
                if len(self.waiting) == g.ranks:
                    self.run()

            state = torch.zeros(g.state_words, dtype=torch.int32)
            return Kernels(g, rank, addresses, state, timeout=timeout, warps=2, launch=launch)

        self.ranks = [kernels(rank) for rank in range(g.ranks)]

    def run(self) -> None:
        self.machine.launch_all(self.waiting.values())
        self.waiting.clear()


@pytest.mark.parametrize("payload", ["quantize", "plain", "scaled"])
def test_there_and_back(payload: str) -> None:
    g = geometry(2, 2, hidden=256, max_tokens=5)
    case = Case.random(g, 20)
    assert case.weights is not None
    if payload == "scaled":
        case.xs = [quantize(x) for x in case.xs]
    gpus = Gpus(g, 20)
    parts = list(zip(gpus.ranks, case.idx, case.weights, strict=True))
    # int64 and strided indices come as they are.
    routings = [rank.exchange(idx.long().t().contiguous().t(), weights) for rank, idx, weights in parts]
    plain = payload == "plain"
    recvs = [k.dispatch(x, r, quantize=not plain) for k, x, r in zip(gpus.ranks, case.xs, routings, strict=True)]
    want = oracle.dispatch(case.xs, case.idx, case.weights, num_experts=8, quantize=not plain)
    rows = [len(w.recv_weights) for w in want]
    for recv, routing, expected, n in zip(recvs, routings, want, rows, strict=True):
        assert torch.equal(routing.offsets, expected.offsets)
        assert torch.equal(routing.weights[:n], expected.recv_weights)
        if isinstance(recv, ScaledTensor):
            assert_rows_equal(ScaledTensor(recv.data[:n], recv.scale[:n], recv.block), expected.recv)
        else:
            assert_rows_equal(recv[:n], expected.recv)
    outs = [torch.randn(g.capacity, 256).bfloat16() for _ in rows]
    for weighted in (True, False):
        ys = [k.combine(o, r, weighted=weighted) for k, o, r in zip(gpus.ranks, outs, routings, strict=True)]
        expected_ys = oracle.combine(outs, [w.placement for w in want], ranks_per_node=2, weighted=weighted)
        assert all(torch.equal(bits(y), bits(e)) for y, e in zip(ys, expected_ys, strict=True))
    for kernels in gpus.ranks:
        kernels.check()


def test_overflow_is_raised_once() -> None:
    g = geometry(1, 2, capacity=3, max_tokens=4)
    gpus = Gpus(g)
    crowd = torch.zeros((4, 2), dtype=torch.int32)
    for kernels in gpus.ranks:
        kernels.exchange(crowd, None)
    with pytest.raises(Overflow, match="rank 0 would get 16"):
        gpus.ranks[0].check()
    for kernels in gpus.ranks:
        kernels.check()
        kernels.exchange(crowd[:1, :1].repeat(1, 2), None)
    gpus.ranks[1].check()


def test_a_wrong_expert_is_named() -> None:
    gpus = Gpus(geometry(1, 2))
    for kernels in gpus.ranks:
        kernels.exchange(torch.tensor([[0, 1], [-3, 0]]), None)
    with pytest.raises(ValueError, match=r"topk_idx.*experts from 0 to 3, or -1, got -3 for token 1"):
        gpus.ranks[1].check()


def test_a_timeout_stays() -> None:
    gpus = Gpus(geometry(1, 2), timeout=5e-5)
    gpus.ranks[0].exchange(torch.zeros((1, 2), dtype=torch.int32), None)
    gpus.run()  # rank 1 does not come
    for _ in range(2):
        with pytest.raises(Timeout, match=r"rank 0 gave up waiting .channel 0, role exchange, .* no word from rank 1"):
            gpus.ranks[0].check()
    with pytest.raises(Timeout):
        gpus.ranks[0].exchange(torch.zeros((1, 2), dtype=torch.int32), None)
