"""fastfp8.comm over gloo, several processes, against the oracle that runs in one: bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comm_cases
import pytest
import torch
from backends import assert_same_bits
from comm_cases import Case, unpacked
from rank_pool import Ranks, ranks
from torch import Tensor

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.reference import comm as reference

# On 7 processes, of which some cases take fewer.
CASES = [
    Case(4),
    Case(4, "one expert", top_k=6, hidden=256, ranks_per_node=2),
    Case(4, "none", top_k=1),
    Case(4, "twice", top_k=2, hidden=384, ranks_per_node=1),
    Case(4, "distinct", experts=2, top_k=8, ranks_per_node=2),
    Case(7, top_k=6),
    Case(7, "one expert", top_k=1, hidden=256, ranks_per_node=1),
    Case(7, "twice", top_k=8, hidden=384),
    Case(7, "none", top_k=2),
    Case(6, "some", experts=1, top_k=8, hidden=128, ranks_per_node=2),
    Case(6, "distinct", top_k=6, hidden=256, ranks_per_node=3),
    Case(1, "twice", top_k=6),
    Case(2, "some", top_k=8, hidden=7168),
]


def name_of(case: Case) -> str:
    return f"{case.world} ranks, {case.kind}, top {case.top_k}, {case.hidden}"


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(7) as started:
        yield started


def check_rows(got: list[Any], expected: Tensor | ScaledTensor, name: str) -> None:
    parts = [expected.data, expected.scale] if isinstance(expected, ScaledTensor) else [expected]
    for part, given in zip(parts, got, strict=True):
        assert_same_bits(unpacked(given), part.contiguous(), name)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ranks_do_as_the_oracle(pool: Ranks, case: Case) -> None:
    found = pool.run(comm_cases.forward, case, size=case.world)
    xs, index, weights = case.all_inputs()
    of_node = case.ranks_per_node

    def oracle(factor: float, index: list[Tensor], **options: Any) -> list[reference.Received]:
        tokens = [x * factor for x in xs]
        return reference.dispatch(tokens, index, weights, num_experts=case.num_experts, **options)

    dense = oracle(1, index, quantize=False)
    expected = {
        "fp8": oracle(1, index),
        "pow2": oracle(1, index, pow2=True),
        "given": reference.dispatch([fastfp8.quantize(x.float() * 3) for x in xs], index, num_experts=case.num_experts),
        "bf16": dense,
        "replay": oracle(2, index),
        "replay bf16": oracle(4, index, quantize=False),
        "turned": oracle(1, [i.flip(1) for i in index], quantize=False),
    }
    for name, of_ranks in expected.items():
        for rank, received in enumerate(of_ranks):
            check_rows(found[rank][name], received.recv, f"{name} on rank {rank}")
    where = [received.placement for received in dense]
    outs = [comm_cases.scaled_rows(received.recv, rank) for rank, received in enumerate(dense)]
    weighted = reference.combine(outs, where, ranks_per_node=of_node)
    unweighted = reference.combine(outs, where, ranks_per_node=of_node, weighted=False)
    copies = torch.stack([torch.zeros(case.world, dtype=torch.int32) for _ in index])
    for rank, received in enumerate(dense):
        got = found[rank]
        assert_same_bits(unpacked(got["offsets"]), received.offsets, "offsets")
        assert_same_bits(unpacked(got["weights"])[: len(received.recv_weights)], received.recv_weights, "weights")
        counts = unpacked(got["counts"])
        for row, source in enumerate(received.placement.source):
            expert = int((received.offsets <= row).sum())
            counts[source, expert] -= 1
        assert not counts.any(), f"counts of rank {rank}"
        for source, _ in set(zip(received.placement.source, received.placement.token, strict=True)):
            copies[source, rank] += 1
        assert_same_bits(unpacked(got["combined"]), weighted[rank], f"combined on rank {rank}")
        assert_same_bits(unpacked(got["replay combined"]), weighted[rank], f"combined again on rank {rank}")
        assert_same_bits(unpacked(got["unweighted"]), unweighted[rank], f"unweighted on rank {rank}")
    for rank in range(case.world):
        assert_same_bits(unpacked(found[rank]["copies"]), copies, "copies")


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[7], CASES[8]], ids=name_of)
def test_gradients_do_as_the_oracle(pool: Ranks, case: Case) -> None:
    found = pool.run(comm_cases.backward, case, size=case.world)
    xs, index, weights = case.all_inputs()
    dense = reference.dispatch(xs, index, weights, num_experts=case.num_experts, quantize=False)
    where = [received.placement for received in dense]
    outs = [comm_cases.scaled_rows(received.recv, rank) for rank, received in enumerate(dense)]
    dys = [x * 2 for x in xs]
    grad_rows, grad_weights = reference.combine_backward(dys, outs, where)
    plain = reference.dispatch(dys, index, num_experts=case.num_experts, quantize=False)
    grad_xs = reference.combine(grad_rows, where, ranks_per_node=case.ranks_per_node, weighted=False)
    for rank, got in enumerate(found):
        assert_same_bits(unpacked(got["rows"]), grad_rows[rank], f"rows of rank {rank}")
        assert_same_bits(unpacked(got["plain rows"]), plain[rank].recv, f"rows of rank {rank} without weights")
        assert_same_bits(unpacked(got["weights"]), grad_weights[rank], f"weights of rank {rank}")
        assert_same_bits(unpacked(got["x"]), grad_xs[rank], f"tokens of rank {rank}")


@pytest.mark.parametrize("where", ["combine", "expert"])
@pytest.mark.parametrize("case", [Case(4, top_k=3, ranks_per_node=2), Case(7, "twice")], ids=name_of)
def test_training_is_that_of_one_process(pool: Ranks, case: Case, where: str) -> None:
    """Against a dense mixture of experts in float64, which knows neither ranks nor rows."""
    found = pool.run(comm_cases.train, case, where, size=case.world)
    experts = comm_cases.expert_weights(case).double().requires_grad_()
    for rank, got in enumerate(found):
        x, index, weights = case.inputs(rank)
        x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
        gates = torch.zeros((len(x), case.num_experts), dtype=torch.float64)
        used = index >= 0
        gates = gates.index_put((used.nonzero()[:, 0], index[used].long()), weights[used], accumulate=True)
        y = torch.einsum("te,teh->th", gates, torch.tanh(torch.einsum("tk,ekh->teh", x, experts)))
        (y * comm_cases.loss_weights(case, rank)).sum().backward()
        # Rows, sums and their gradients are rounded to 8 bits on their way.
        for name, exact in (("y", y.detach()), ("x", x.grad), ("weights", weights.grad)):
            assert exact is not None
            assert close(unpacked(got[name]), exact), f"{name} of rank {rank}"
    assert experts.grad is not None
    for rank, got in enumerate(found):
        mine = experts.grad[rank * case.experts : (rank + 1) * case.experts]
        assert close(unpacked(got["experts"]), mine), f"experts of rank {rank}"


def close(got: Tensor, exact: Tensor) -> bool:
    """Within 2 % of the largest element, and zero where all is."""
    assert got.shape == exact.shape
    return not exact.numel() or bool((got.double() - exact).abs().max() <= 0.02 * exact.abs().max())
