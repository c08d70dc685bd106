"""All ranks of dispatch and combine in one launch on one GPU: every bit, and the same launches as a CUDA graph.

On the emulator with the smallest rings; on a GPU also with the sizes of a model. The GPU cases have not been run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comm_devices import Emulated, Silicon, device_params
from comm_ranks import geometry
from test_emulator_comm import Case, assert_rows_equal, bits
from test_emulator_comm_buffer import _any_group
from torch import Tensor

from fastfp8 import ScaledTensor, quantize
from fastfp8.comm import Buffer, Timeout, trial
from fastfp8.comm.footprint import Layout
from fastfp8.comm.kernel_exchange import KernelExchange, geometry_of
from fastfp8.comm.kernels import KernelRouting, Kernels
from fastfp8.comm.link import Link
from fastfp8.comm.loopback import check_fit
from fastfp8.comm.model import Settings
from fastfp8.reference import comm as oracle

DEVICES = pytest.mark.parametrize("kind", device_params())
# A token's row takes several rounds of a warp's loads, and rings several slots.
LARGE = {"hidden": 7168, "top_k": 8, "experts_each": 4, "channels": 4, "link_slots": 4, "rail_slots": 4}
# All CTAs of 8 ranks fit on the 78 SMs of an H20.
WIDE = {"hidden": 384, "top_k": 6, "experts_each": 3, "channels": 3, "link_slots": 2, "rail_chunk": 1}
SIZES = {"small": {}, "wide": WIDE, "large": LARGE}
Kind = type[Emulated] | type[Silicon]


def sizes(kind: Kind) -> list[str]:
    return ["small"] if kind is Emulated else list(SIZES)


def stacked(parts: list[Any], device: torch.device) -> Any:
    """Of ranks: their tensors with the rank as first dimension."""
    if not isinstance(parts[0], ScaledTensor):
        return torch.stack(parts).to(device)
    scales = torch.stack([p.scale.t().contiguous() for p in parts]).to(device).mT
    return ScaledTensor._trusted(stacked([p.data for p in parts], device), scales, parts[0].block)


def part(rows: Tensor | ScaledTensor, rank: int, n: int) -> Tensor | ScaledTensor:
    """The first ``n`` rows of a rank, on the CPU."""
    if isinstance(rows, ScaledTensor):
        return ScaledTensor(rows.data[rank, :n].cpu(), rows.scale[rank, :n].cpu(), rows.block)
    return rows[rank, :n].cpu()


class Step:
    """Exchange, dispatch and combine on tensors that stay where they are, so that a graph can have them."""

    def __init__(self, kernels: Kernels, case: Case, outs: list[Tensor], quantize: bool = True) -> None:
        self.kernels, self.quantize, self.device = kernels, quantize, kernels.state.device
        assert case.weights is not None
        self.idx, self.weights, self.x, self.outs = (
            stacked(given, self.device) for given in (case.idx, case.weights, case.xs, outs)
        )

    def take(self, case: Case, outs: list[Tensor]) -> None:
        assert case.weights is not None
        for mine, given in ((self.idx, case.idx), (self.weights, case.weights), (self.x, case.xs), (self.outs, outs)):
            mine.copy_(stacked(given, self.device))

    def __call__(self) -> tuple[KernelRouting, Any, Tensor, Tensor]:
        routing = self.kernels.exchange(self.idx, self.weights)
        recv = self.kernels.dispatch(self.x, routing, quantize=self.quantize)
        weighted = self.kernels.combine(self.outs, routing, weighted=True)
        return routing, recv, weighted, self.kernels.combine(self.outs, routing, weighted=False)


def check(g: Any, case: Case, outs: list[Tensor], results: Any, quantize: bool = True) -> None:
    routing, recv, weighted, plain = results
    want = oracle.dispatch(case.xs, case.idx, case.weights, num_experts=g.ranks * g.local_experts, quantize=quantize)
    for rank, expected in enumerate(want):
        n = len(expected.recv_weights)
        assert torch.equal(routing.offsets[rank].cpu(), expected.offsets)
        assert torch.equal(routing.weights[rank, :n].cpu(), expected.recv_weights)
        assert_rows_equal(part(recv, rank, n), expected.recv)
    placements = [w.placement for w in want]
    used = [out[: len(w.recv_weights)] for out, w in zip(outs, want, strict=True)]
    for is_weighted, got in ((True, weighted), (False, plain)):
        ys = oracle.combine(used, placements, ranks_per_node=g.gpus, weighted=is_weighted)
        for rank, y in enumerate(ys):
            assert torch.equal(bits(got[rank].cpu()), bits(y)), f"rank {rank}"


def case_of(g: Any, seed: int, tokens: int) -> tuple[Case, list[Tensor]]:
    """Of ranks with equally many tokens, and outputs of experts, NaN where they are not to be read."""
    case = Case.random(g, seed, tokens=[tokens] * g.ranks)
    generator = torch.Generator().manual_seed(seed + 1)
    rows = torch.zeros(g.ranks, dtype=torch.int64)
    for idx in case.idx:
        used = idx[idx >= 0]
        rows += torch.bincount(used // g.local_experts, minlength=g.ranks)
    outs = [torch.full((g.capacity, g.hidden), float("nan")).bfloat16() for _ in rows]
    for out, n in zip(outs, rows.tolist(), strict=True):
        out[:n] = torch.randn(n, g.hidden, generator=generator).bfloat16()
    return case, outs


@DEVICES
@pytest.mark.parametrize("payload", ["quantize", "plain", "scaled"])
@pytest.mark.parametrize("topology", [(2, 4), (3, 2)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_every_bit(kind: Kind, topology: tuple[int, int], payload: str) -> None:
    """Twice, so that rings go on where the first call left them; messages between nodes sleep on their way."""
    for name in sizes(kind):
        g = geometry(*topology, max_tokens=4 if name == "small" else 33, **SIZES[name])
        kernels = kind(1).kernels(g, rail_delay=200)
        for seed in range(2 if kind is Silicon or payload == "quantize" else 1):
            case, outs = case_of(g, 50 + seed, g.max_tokens - seed)
            if payload == "scaled":
                case.xs = [quantize(x) for x in case.xs]
            results = Step(kernels, case, outs, payload != "plain")()
            kernels.check()
            check(g, case, outs, results, payload != "plain")


@DEVICES
def test_a_graph_is_replayed_on_other_tokens(kind: Kind) -> None:
    """The same launches for other tokens, experts and weights: nothing of a call is in them but addresses."""
    for name in sizes(kind):
        g = geometry(2, 2, max_tokens=4 if name == "small" else 33, **SIZES[name])
        device = kind(2)
        kernels = device.kernels(g)
        step = Step(kernels, *case_of(g, 60, g.max_tokens))
        replay, results = device.capture(step)
        for seed in range(61, 64 if kind is Emulated else 81):
            case, outs = case_of(g, seed, g.max_tokens)
            step.take(case, outs)
            replay()
            kernels.check()
            check(g, case, outs, results)


@DEVICES
def test_a_graph_of_a_buffer(kind: Kind) -> None:
    """What a user captures, on one rank; the handle of the capture serves outside of it."""
    device, t = kind(3), 4
    buffer, g = lone_buffer(device, t)
    x, idx = torch.zeros(t, g.hidden, device=device.device).bfloat16(), torch.zeros(t, 2, dtype=torch.int32)
    idx, weights = idx.to(device.device), torch.zeros(t, 2, device=device.device)

    def step() -> tuple[Any, ...]:
        recv, offsets, handle = buffer.dispatch(x, idx, weights, quantize=False)
        assert isinstance(recv, Tensor)
        return recv, offsets, handle, buffer.combine(recv, handle)

    replay, (recv, offsets, handle, y) = device.capture(step)
    for seed in range(70, 73):
        case = Case.random(g, seed, tokens=[t])
        assert case.weights is not None
        for mine, given in ((x, case.xs), (idx, case.idx), (weights, case.weights)):
            mine.copy_(given[0])
        replay()
        buffer.check()
        (want,) = oracle.dispatch(case.xs, case.idx, case.weights, num_experts=2, quantize=False)
        n = len(want.recv_weights)
        assert torch.equal(offsets.cpu(), want.offsets)
        assert_rows_equal(recv[:n].cpu(), want.recv)
        (expected,) = oracle.combine([want.recv], [want.placement])
        assert torch.equal(bits(y.cpu()), bits(expected))
        assert torch.equal(bits(buffer.combine(recv, handle).cpu()), bits(expected))
    buffer.close()


def lone_buffer(device: Emulated | Silicon, tokens: int) -> tuple[Buffer, Any]:
    """Of one rank."""
    if isinstance(device, Silicon):
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        sizes = {"hidden": 256, "num_experts": 2, "top_k": 2, "max_tokens": tokens}
        buffer = Buffer(dist.new_group([0], backend="nccl"), way="kernels", device=device.device, **sizes)
        exchange = buffer._exchange
        assert isinstance(exchange, KernelExchange)
        return buffer, exchange.kernels.geometry
    g = geometry(1, 1, hidden=256, max_tokens=tokens)
    every = device.kernels(g)
    kernels = Kernels(g, 0, every.windows, every.state[0], timeout=0.05, warps=2, launch=device.launch)
    buffer = Buffer.__new__(Buffer)
    buffer._use(KernelExchange(kernels, Layout(1, 256, 2, 2, tokens, 1, g.capacity)), "cpu")
    return buffer, g


@DEVICES
def test_troubles_of_ranks_are_told_one_by_one(kind: Kind) -> None:
    g = geometry(1, 3, capacity=5, max_tokens=4)
    kernels = kind(4).kernels(g)
    idx = torch.tensor([[[2, 2], [2, 2], [9, 0]], [[2, 2], [4, 4], [4, 4]], [[4, 4], [-1, 1], [1, 1]]])
    kernels.exchange(idx.int().to(kernels.state.device), None)
    with pytest.raises(ValueError, match=r"experts from 0 to 5, or -1, got 9 for token 2"):
        kernels.check()
    with pytest.raises(RuntimeError, match="rank 1 would get 6"):
        kernels.check()
    with pytest.raises(RuntimeError, match="rank 2 would get 6"):
        kernels.check()
    kernels.check()


def test_a_timeout_comes_before_other_troubles() -> None:
    """Which end all use of the kernels."""
    kernels = Emulated().kernels(geometry(1, 3))
    at = kernels.geometry.status_at
    kernels.state[0, at], kernels.state[2, at : at + 4] = 3, torch.tensor([1, 7, 3, 1], dtype=torch.int32)
    for _ in range(2):
        with pytest.raises(Timeout, match=r"rank 2 gave up waiting .channel 7, role link receive.*from rank 1"):
            kernels.check()
    with pytest.raises(Timeout):
        kernels.exchange(torch.zeros((3, 1, 2), dtype=torch.int32), None)


def test_a_trial_runs_what_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Buffer.tune measures, on the emulator; a token has more slots than there are experts."""
    device, layout = Emulated(), Layout(1, 128, 2, 3, 4, 1, 8)
    made: list[Kernels] = []
    ran: list[int] = []

    def connect(settings: Settings) -> KernelExchange:
        g = geometry_of(layout, settings)
        every = device.kernels(g)
        made.append(Kernels(g, 0, every.windows, every.state[0], timeout=0.05, warps=2, launch=device.launch))
        return KernelExchange(made[-1], layout)

    def seconds_of(work: Any, _: torch.device) -> float:
        work()
        ran.append(len(made))
        return 1 / len(ran)

    monkeypatch.setattr(trial, "seconds_of", seconds_of)
    idx = trial.random_routing(layout, 0)
    assert idx[:, 2].tolist() == [-1] * 4
    assert all(sorted(experts) == [0, 1] for experts in idx[:, :2].tolist())
    link = Link(_any_group(), torch.device("cpu"), 10.0)
    first, second = Settings(2, 1, 1, 1), Settings(4, 2, 1, 1)
    with trial.Trial(link, layout, idx, connect) as measure:
        times = [measure(settings) for settings in (first, first, second)]
    assert times == pytest.approx([1 / 2, 1 / 3, 1 / 5])
    assert ran == [1, 1, 1, 2, 2], "windows are connected once for each setting"


def test_all_ctas_must_have_room() -> None:
    check_fit(geometry(2, 4, channels=8), 132)
    with pytest.raises(ValueError, match="at most 132 CTAs, one for each SM of the GPU, got 144, 9 channels a rank"):
        check_fit(geometry(2, 4, channels=9), 132)
