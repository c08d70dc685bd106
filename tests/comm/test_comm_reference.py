"""The oracle of dispatch and combine against permute and unpermute, exact arithmetic, and cases worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from backends import assert_same_bits
from exact import BF16, F32, rounded
from torch import Tensor

import fastfp8
from fastfp8.reference import comm

HIDDEN = 256


def tokens(count: int, seed: int) -> Tensor:
    return torch.randn((count, HIDDEN), generator=torch.Generator().manual_seed(seed)).bfloat16()


def indices(count: int, top_k: int, experts: int, seed: int) -> Tensor:
    """Some are -1, and some tokens name an expert twice."""
    return torch.randint(-1, experts, (count, top_k), generator=torch.Generator().manual_seed(seed))


def weights_of(index: Tensor, seed: int) -> Tensor:
    return torch.rand(index.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pow2", [False, True])
def test_one_rank_is_permute_and_unpermute(pow2: bool) -> None:
    x, index = tokens(50, 0), indices(50, 4, 6, 1)
    weights = weights_of(index, 2)
    for quantize, expected in ((True, fastfp8.quantize(x, pow2=pow2)), (False, x)):
        rows, where = fastfp8.permute(expected, index, 6)
        used = int(where.offsets[-1])
        for given in (x, expected):
            (got,) = comm.dispatch([given], [index], [weights], num_experts=6, quantize=quantize, pow2=pow2)
            assert_same_bits(got.offsets, where.offsets, "offsets")
            assert_same_bits(got.recv_weights, weights.flatten()[where.slots[:used].long()], "weights")
            if quantize:
                assert_same_bits(got.recv.data, rows.data[:used], "codes")
                assert_same_bits(got.recv.scale, rows.scale[:used], "scales")
            else:
                assert_same_bits(got.recv, rows[:used], "rows")
    # Products of a row and a weight of 16 bits are exact in FP32: then a sum of fma has the bits of unpermute, which
    # rounds products.
    y, short = tokens(used, 3), weights.bfloat16().float()
    given = torch.cat([y, y.new_zeros(index.numel() - used, HIDDEN)])
    (got,) = comm.dispatch([x], [index], [short], num_experts=6)
    (sums,) = comm.combine([y], [got.placement])
    assert_same_bits(sums, fastfp8.unpermute(given, where, short), "with weights")
    (sums,) = comm.combine([y], [got.placement], weighted=False)
    assert_same_bits(sums, fastfp8.unpermute(given, where), "without weights")


def test_a_product_is_not_rounded_before_it_is_added() -> None:
    """weight * row, rounded, minus weight * row: what the rounding took away, where unpermute has 0."""
    weight, value = 1 + 2.0**-23, 1 + 2.0**-7
    index, weights = torch.tensor([[0, 1]]), torch.full((1, 2), weight)
    (got,) = comm.dispatch([tokens(1, 0)], [index], [weights], num_experts=2)
    y = torch.full((2, HIDDEN), value).bfloat16()
    y[1] *= -1
    (sums,) = comm.combine([y], [got.placement])
    assert (sums == -(2.0**-30)).all()
    assert not fastfp8.unpermute(y, fastfp8.row_map(index, 2), weights).any()


def test_rows_are_ordered_by_expert_source_token_and_slot() -> None:
    xs = [tokens(n, n) for n in (2, 0, 1)]
    index = [torch.tensor([[5, 0], [0, 0]]), torch.empty((0, 2), dtype=torch.int64), torch.tensor([[1, 0]])]
    got = comm.dispatch(xs, index, num_experts=6, quantize=False)
    places = [list(zip(g.placement.source, g.placement.token, g.placement.slot, strict=True)) for g in got]
    assert places == [[(0, 0, 1), (0, 1, 0), (0, 1, 1), (2, 0, 1), (2, 0, 0)], [], [(0, 0, 0)]]
    assert [g.offsets.tolist() for g in got] == [[4, 5], [0, 0], [0, 1]]
    assert_same_bits(got[0].recv, torch.stack([xs[0][0], xs[0][1], xs[0][1], xs[2][0], xs[2][0]]), "rows")


def test_combine_rounds_where_sums_travel() -> None:
    """Against rationals: an fma a slot, BF16 after each rank, node and all."""
    world, of_node, top_k = 6, 2, 8
    index = [indices(3, top_k, 12, seed) for seed in range(world)]
    xs, weights = [tokens(3, 10 + s) for s in range(world)], [weights_of(i, 20) for i in index]
    got = comm.dispatch(xs, index, weights, num_experts=12, quantize=False)
    outs = [g.recv * (1 + rank) for rank, g in enumerate(got)]  # so that ranks differ
    ys = comm.combine(outs, [g.placement for g in got], ranks_per_node=of_node)
    for source in range(world):
        for token in range(3):
            for col in (0, 7, HIDDEN - 1):
                total = 0.0
                for node in range(world // of_node):
                    node_sum = 0.0
                    for rank in range(node * of_node, (node + 1) * of_node):
                        acc = 0.0
                        for slot, expert in enumerate(index[source][token].tolist()):
                            if expert >= 0 and expert // 2 == rank:
                                weight = float(weights[source][token, slot])
                                value = float((xs[source] * (1 + rank))[token, col])
                                acc = rounded(Fraction(weight) * Fraction(value) + Fraction(acc), F32)
                        node_sum = rounded(Fraction(node_sum) + Fraction(rounded(Fraction(acc), BF16)), F32)
                    total = rounded(Fraction(total) + Fraction(rounded(Fraction(node_sum), BF16)), F32)
                assert float(ys[source][token, col]) == rounded(Fraction(total), BF16), (source, token, col)


def test_backward_is_that_of_the_sum() -> None:
    index, world = [indices(n, 3, 8, n) for n in (4, 0, 9, 1)], 4
    xs, weights = [tokens(len(i), 1) for i in index], [weights_of(i, 2) for i in index]
    got = comm.dispatch(xs, index, weights, num_experts=8, quantize=False)
    dys = [tokens(len(i), 3) for i in index]
    grad_rows, grad_weights = comm.combine_backward(dys, [g.recv for g in got], [g.placement for g in got])
    for rank in range(world):
        where = got[rank].placement
        for row, (source, token, slot) in enumerate(zip(where.source, where.token, where.slot, strict=True)):
            assert_same_bits(
                grad_rows[rank][row], (dys[source][token].float() * weights[source][token, slot]).bfloat16(), "row"
            )
        dots = (dys[rank].double() * xs[rank].double()).sum(1, keepdim=True) * (index[rank] >= 0)
        assert torch.allclose(grad_weights[rank].double(), dots, atol=1e-4, rtol=1e-5)
    # The order of the sum of one of them, by hand.
    source, token, slot = (got[0].placement[i][0] for i in range(3))
    lanes = [float(a) * float(b) for a, b in zip(dys[source][token], xs[source][token], strict=True)]
    lanes = [rounded(Fraction(lane), F32) for lane in lanes]
    while len(lanes) > 1:
        lanes = [rounded(Fraction(a) + Fraction(b), F32) for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
    assert float(grad_weights[source][token, slot]) == lanes[0]


def test_copies_by_hand() -> None:
    """2 nodes of 2 ranks with 1 expert each. Rank 1's token for all: itself, rank 0 by NVLink, rank 3 over IB, and from
    there rank 2. Rank 2's token for rank 1 alone goes over IB to rank 0, and on."""
    none = torch.empty((0, 4), dtype=torch.int64)
    index = [none, torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 1, -1, -1]]), torch.tensor([[-1, -1, -1, -1]])]
    nvlink, ib = comm.copies(index, num_experts=4, ranks_per_node=2)
    assert nvlink.nonzero().tolist() == [[0, 1], [1, 0], [3, 2]]
    assert ib.nonzero().tolist() == [[1, 3], [2, 0]]
    assert nvlink.max() == ib.max() == 1
    one_node = comm.copies(index, num_experts=4)
    assert one_node.ib.sum() == 0
    assert one_node.nvlink.sum() == 4


def test_bytes_of_a_token() -> None:
    assert comm.token_bytes(7168, True) == 7168 + 4 * math.ceil(7168 / 128)
    assert comm.token_bytes(7168, False) == 14336
