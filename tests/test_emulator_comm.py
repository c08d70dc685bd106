"""The sm_90a all-to-all on emulated GPUs, a rank each: bit for bit what ``fastfp8/reference/comm.py`` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comm_ranks import Loopback, Ranks, Received, geometry
from torch import Tensor

from fastfp8 import ScaledTensor, quantize
from fastfp8.reference import comm as oracle

TOPOLOGIES = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 4), (3, 2)]


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_rows_equal(got: Tensor | ScaledTensor, want: Tensor | ScaledTensor) -> None:
    if isinstance(want, ScaledTensor):
        assert isinstance(got, ScaledTensor)
        assert torch.equal(bits(got.data), bits(want.data))
        assert torch.equal(bits(got.scale), bits(want.scale))
    else:
        assert isinstance(got, Tensor)
        assert torch.equal(bits(got), bits(want))


@dataclass
class Case:
    """Tokens of each rank, their experts and weights."""

    geometry: Any
    idx: list[Tensor]
    weights: list[Tensor] | None
    xs: list[Tensor]

    @classmethod
    def random(cls, g: Any, seed: int, tokens: list[int] | None = None, idx: list[Tensor] | None = None) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def of(most: int) -> int:
            return int(torch.randint(0, most + 1, (), generator=generator))

        if idx is None:
            tokens = tokens or [of(g.max_tokens) for _ in range(g.ranks)]
            experts = g.ranks * g.local_experts
            idx = [torch.randint(-1, experts, (t, g.top_k), generator=generator, dtype=torch.int32) for t in tokens]
        weights = [torch.randn(i.shape, generator=generator) for i in idx]
        xs = [torch.randn(len(i), g.hidden, generator=generator).bfloat16() for i in idx]
        return cls(g, idx, weights, xs)

    def outs(self, want: list[oracle.Received], seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed + 1000)
        return [torch.randn(len(w.recv_weights), self.geometry.hidden, generator=generator).bfloat16() for w in want]


def check_round(ranks: Ranks, case: Case, seed: int = 0, **how: Any) -> list[Received]:
    """Exchange, dispatch, combine, each against the oracle."""
    g = ranks.geometry
    received = ranks.exchange(case.idx)
    check_dispatch(ranks, received, case, **how)
    check_combine(ranks, received, case, seed)
    assert ranks.statuses() == [None] * g.ranks
    return received


def check_dispatch(ranks: Ranks, received: list[Received], case: Case, **how: Any) -> list[oracle.Received]:
    g = ranks.geometry
    ranks.send(received, case.xs, case.weights, **how)
    want = oracle.dispatch(case.xs, case.idx, case.weights, num_experts=g.ranks * g.local_experts, **how)
    for got, expected in zip(received, want, strict=True):
        assert torch.equal(got.offsets, expected.offsets)
        assert_rows_equal(got.recv(), expected.recv)
        assert torch.equal(got.weights(g), expected.recv_weights)
        assert torch.isnan(got.data[got.rows :].float()).all(), "rows behind the last offset were written"
    return want


def check_combine(ranks: Ranks, received: list[Received], case: Case, seed: int, weighted: bool = True) -> None:
    g = ranks.geometry
    want = oracle.dispatch(case.xs, case.idx, case.weights, num_experts=g.ranks * g.local_experts, quantize=False)
    outs = case.outs(want, seed)
    ys = ranks.combine(received, outs, weighted=weighted)
    placements = [w.placement for w in want]
    expected = oracle.combine(outs, placements, ranks_per_node=g.gpus, weighted=weighted)
    for rank, (got, y) in enumerate(zip(ys, expected, strict=True)):
        assert torch.equal(bits(got), bits(y)), rank


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"{t[0]}x{t[1]}")
def test_uneven_tokens(topology: tuple[int, int]) -> None:
    """Two rounds, so that the rings of one slot turn over from call to call too."""
    ranks = Ranks(geometry(*topology), seed=1)
    for seed in range(2):
        check_round(ranks, Case.random(ranks.geometry, seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"{t[0]}x{t[1]}")
@pytest.mark.parametrize("seed", range(10))
def test_ten_seeds(topology: tuple[int, int], seed: int) -> None:
    g = geometry(*topology, max_tokens=17, channels=1 + seed % 2, link_slots=1 + seed % 3, rail_slots=1 + seed % 2)
    ranks = Ranks(g, seed=seed, warps=2 + seed % 3)
    for turn in range(2):
        check_round(ranks, Case.random(g, 10 * seed + turn), seed)


def special(name: str, g: Any) -> list[Tensor]:
    experts, t = g.ranks * g.local_experts, g.max_tokens
    shapes = [(t, g.top_k)] * g.ranks
    if name == "no token":
        return [torch.zeros(0, g.top_k, dtype=torch.int32) for _ in shapes]
    if name == "one token":
        return [torch.full((int(rank == 1), g.top_k), experts - 1, dtype=torch.int32) for rank in range(g.ranks)]
    if name == "one expert":
        return [torch.full(s, experts - 1, dtype=torch.int32) for s in shapes]
    if name == "all -1":
        return [torch.full(s, -1, dtype=torch.int32) for s in shapes]
    if name == "one rank silent":
        generator = torch.Generator().manual_seed(5)
        return [
            torch.full(s, -1, dtype=torch.int32)
            if rank == 2
            else torch.randint(0, experts, s, generator=generator).int()
            for rank, s in enumerate(shapes)
        ]
    assert name == "own rank"
    return [torch.full(s, rank * g.local_experts, dtype=torch.int32) for rank, s in enumerate(shapes)]


@pytest.mark.parametrize("name", ["no token", "one token", "one expert", "all -1", "one rank silent", "own rank"])
def test_special_routings(name: str) -> None:
    g = geometry(2, 2, max_tokens=5, capacity=60)
    check_round(Ranks(g, seed=3), Case.random(g, 3, idx=special(name, g)))


@pytest.mark.parametrize("top_k", [1, 6, 8])
@pytest.mark.parametrize("hidden", [256, 384])
def test_shapes(top_k: int, hidden: int) -> None:
    g = geometry(2, 2, top_k=top_k, hidden=hidden, experts_each=3, max_tokens=6, link_slots=2)
    check_round(Ranks(g, seed=top_k), Case.random(g, top_k))


def test_many_slots_and_channels() -> None:
    """32 slots a token, more warps than streams, three channels, of which one may have no token."""
    g = geometry(2, 2, top_k=32, experts_each=9, max_tokens=7, channels=3, link_slots=3, rail_slots=2, rail_chunk=1)
    check_round(Ranks(g, seed=4, warps=4), Case.random(g, 4, tokens=[7, 1, 0, 2]))


@pytest.mark.slow
def test_hidden_of_the_report() -> None:
    g = geometry(2, 2, top_k=8, hidden=7168, experts_each=4, max_tokens=6, channels=2)
    check_round(Ranks(g, seed=6, warps=4), Case.random(g, 6))


@pytest.mark.parametrize("payload", ["plain", "scaled", "pow2"])
def test_payloads(payload: str) -> None:
    g = geometry(2, 2, hidden=256)
    case = Case.random(g, 7)
    if payload == "scaled":
        case.xs = [quantize(x, (1, 128)) for x in case.xs]
    how = {"pow2": {"pow2": True}, "plain": {"quantize": False}, "scaled": {}}[payload]
    ranks = Ranks(g, seed=7)
    check_dispatch(ranks, ranks.exchange(case.idx), case, **how)
    assert ranks.statuses() == [None] * g.ranks


def test_values_of_all_kinds() -> None:
    """NaN, infinities, zeros and tiny values quantise in flight as they do at home."""
    g = geometry(1, 2, hidden=256)
    case = Case.random(g, 8, tokens=[8, 8])
    for x in case.xs:
        x[0] = 0
        x[1, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-38, -0.0])
        x[2] *= 1e-37
        x[3] *= 1e37
    ranks = Ranks(g, seed=8)
    check_dispatch(ranks, ranks.exchange(case.idx), case)


def test_replay_of_handles() -> None:
    """Two routings live at once; each serves other tokens again, without a new exchange."""
    g = geometry(2, 2, hidden=128)
    ranks = Ranks(g, seed=9)
    cases = [Case.random(g, 9 + i) for i in range(2)]
    handles = [ranks.exchange(case.idx) for case in cases]
    for turn in (1, 0, 1):
        case = cases[turn]
        case.xs = [torch.randn_like(x.float()).bfloat16() for x in case.xs]
        check_dispatch(ranks, handles[turn], case, quantize=turn == 0)
        check_combine(ranks, handles[turn], case, turn, weighted=turn == 0)
    assert ranks.statuses() == [None] * g.ranks


@pytest.mark.parametrize("topology", [(1, 3), (2, 2)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_values_come_back(topology: tuple[int, int]) -> None:
    """What the gradient of the weights needs: each slot gets its row's value, 0 where it has none."""
    g = geometry(*topology, top_k=5, max_tokens=5)
    case = Case.random(g, 10)
    ranks = Ranks(g, seed=10)
    received = ranks.exchange(case.idx)
    want = check_dispatch(ranks, received, case)
    of_rows = [torch.randn(len(w.recv_weights)) for w in want]
    values = ranks.bring_back(received, of_rows)
    expected = [torch.zeros(idx.shape) for idx in case.idx]
    for w, own in zip(want, of_rows, strict=True):
        for row, (source, token, slot) in enumerate(zip(*w.placement[:3], strict=True)):
            expected[source][token, slot] = own[row]
    for got, of_slots in zip(values, expected, strict=True):
        assert torch.equal(got, of_slots)
    check_combine(ranks, received, case, 10)


def test_without_weights() -> None:
    g = geometry(1, 2)
    case = Case.random(g, 11)
    case.weights = None
    check_round(Ranks(g, seed=11), case)


def test_capacity_is_a_bound_and_its_excess_an_error() -> None:
    g = geometry(1, 2, capacity=7, max_tokens=6)
    case = Case.random(g, 12, idx=special("one expert", g))
    ranks = Ranks(g, seed=12)
    received = ranks.exchange(case.idx)
    status = ranks.statuses()
    assert status[0] is None
    assert status[1] is not None
    assert (status[1]["trouble"], status[1]["rows"]) == ("overflow", 24)
    ranks.send(received, case.xs, case.weights)
    assert received[1].offsets.tolist() == [0, 7]
    want = oracle.dispatch(case.xs, case.idx, case.weights, num_experts=4)
    whole = want[1].recv
    assert isinstance(whole, ScaledTensor)
    assert torch.equal(bits(received[1].data), bits(whole.data[:7])), "what fits is there, and nothing else is touched"
    ranks.combine(received, [torch.zeros(0, 128), torch.zeros(7, 128)])


def test_an_expert_that_is_none() -> None:
    g = geometry(1, 2)
    idx = [torch.tensor([[0, 3], [1, 4]], dtype=torch.int32), torch.tensor([[-2, 0]], dtype=torch.int32)]
    case = Case.random(g, 13, idx=idx)
    ranks = Ranks(g, seed=13)
    received = ranks.exchange(idx)
    assert [s["trouble"] for s in ranks.statuses() if s] == ["bad expert"] * 2
    ranks.send(received, case.xs, case.weights)
    assert [r.rows for r in received] == [3, 1], "it counts as unused"


def bytes_between(ranks: Ranks, counters: list[Any]) -> Tensor:
    """[from, to]: what each rank's stores wrote to the window of each."""
    windows = [w.data_ptr() for w in ranks.windows]
    return torch.tensor([[c.stored_bytes.get(window, 0) for window in windows] for c in counters])


@pytest.mark.parametrize("topology", [(1, 3), (2, 2), (3, 2)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_bytes_on_the_links(topology: tuple[int, int]) -> None:
    """What travels is the routing's minimum, what says where it goes, and flags: at hidden 7168 at most 3 % over."""
    g = geometry(*topology, top_k=4, hidden=7168, experts_each=4, max_tokens=6)
    case = Case.random(g, 14, tokens=[6, 5, 4, 3, 2, 1][: g.ranks])
    ranks = Ranks(g, seed=14)
    received = ranks.exchange(case.idx)
    check_dispatch(ranks, received, case)
    dispatched = bytes_between(ranks, ranks.counters[-g.ranks :])
    ranks.combine(received, [torch.zeros(r.rows, g.hidden, dtype=torch.bfloat16) for r in received])
    combined = bytes_between(ranks, ranks.counters[-g.ranks :])
    copies = oracle.copies(case.idx, num_experts=g.ranks * g.local_experts, ranks_per_node=g.gpus)
    minimum = copies.nvlink + copies.ib
    for moved, tokens, quantized in ((dispatched, minimum, True), (combined, minimum.T, False)):
        apart = ~torch.eye(g.ranks, dtype=torch.bool)
        least = (tokens * oracle.token_bytes(g.hidden, quantized))[apart]
        most = 1.03 * least + 4 * 2 * minimum.sum()  # flags go either way
        assert (moved[apart] >= least).all()
        assert (moved[apart] <= most).all()
        assert least.sum() > 0


@pytest.mark.parametrize("payload", ["quantize", "plain", "scaled"])
def test_ranks_of_one_gpu(payload: str) -> None:
    """Virtual ranks in one launch; messages between nodes sleep on their way."""
    g = geometry(2, 2, max_tokens=6, rail_slots=2)
    case = Case.random(g, 15, tokens=[6] * 4)
    if payload == "scaled":
        case.xs = [quantize(x, (1, 128)) for x in case.xs]
    ranks = Loopback(g, seed=15, rail_delay=200)
    received = ranks.exchange(case.idx)
    check_dispatch(ranks, received, case, **({"quantize": False} if payload == "plain" else {}))
    if payload == "quantize":
        check_combine(ranks, received, case, 15)
    assert ranks.statuses() == [None] * g.ranks


@pytest.mark.parametrize("when", ["exchange", "dispatch", "combine"])
def test_a_rank_that_does_not_come(when: str) -> None:
    """The others end, and say who was waited for; ranks that need nothing of it are not disturbed."""
    g = geometry(2, 2, max_tokens=4)
    case = Case.random(g, 16, tokens=[4] * 4, idx=[torch.full((4, 2), 2 * r, dtype=torch.int32) for r in (3, 3, 2, 0)])
    case.idx[2][:, 1] = 6
    ranks = Ranks(g, seed=16)

    def absent(stage: str) -> list[int]:
        ranks.timeout_us = 200 if when == stage else 20_000
        return [3] if when == stage else []

    received = ranks.exchange(case.idx, absent("exchange"))
    if when != "exchange":
        ranks.send(received, case.xs, case.weights, without=absent("dispatch"))
    if when == "combine":
        outs = [torch.zeros(r.rows, g.hidden, dtype=torch.bfloat16) for r in received]
        ranks.combine(received, outs, without=absent("combine"))
    found = ranks.statuses()
    assert found[3] is None
    told = [s for s in found if s is not None]
    assert told
    for status in told:
        assert status["trouble"] == "timeout"
    roles = {"exchange": {"exchange"}, "dispatch": {"rail send", "rail forward", "link send", "link receive"}}
    assert {s["role"] for s in told} <= roles.get(when, {"rail forward", "link receive"})
    assert 3 in {s["peer"] for s in told}


def test_after_a_timeout_kernels_do_nothing() -> None:
    """The host may launch more before it sees one: tables are not made, so nothing may be read from them."""
    g = geometry(1, 2, max_tokens=4)
    case = Case.random(g, 17, tokens=[4, 4])
    ranks = Ranks(g, seed=17, timeout_us=100)
    received = ranks.exchange(case.idx, [1])
    windows = [w.clone() for w in ranks.windows]
    ranks.send(received, case.xs, case.weights, without=[1])
    ys = ranks.combine(received, [torch.zeros(0, g.hidden, dtype=torch.bfloat16)] * 2, without=[1])
    ranks.exchange(case.idx, [1])
    assert torch.isnan(received[0].data.float()).all()
    assert torch.isnan(ys[0].float()).all()
    assert all(torch.equal(now, before) for now, before in zip(ranks.windows, windows, strict=True))
    status = ranks.statuses()[0]
    assert status is not None
    assert (status["trouble"], status["role"], status["peer"]) == ("timeout", "exchange", 1)


def test_a_timeout_is_told_in_place_of_what_was_found_before() -> None:
    """An excess of rows is survived, a rank that does not come is not."""
    g = geometry(1, 2, capacity=3, max_tokens=4)
    case = Case.random(g, 18, idx=special("one expert", g))
    ranks = Ranks(g, seed=18)
    received = ranks.exchange(case.idx)
    ranks.timeout_us = 100
    ranks.send(received, case.xs, case.weights, without=[0])
    status = ranks.statuses()
    assert status[0] is None
    assert status[1] is not None
    assert (status[1]["trouble"], status[1]["peer"], status[1]["rows"]) == ("timeout", 0, 0)
