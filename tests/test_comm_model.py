"""The model of dispatch and combine: its expectations are those of real routings, its times keep to what must hold."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import fastfp8
from fastfp8 import _C
from fastfp8.comm.model import MACHINES, Settings, Shape, deepep_rate, flat_seconds, ring_bytes, traffic, wire_rates
from fastfp8.comm.simulation import simulate, warps_of_roles
from fastfp8.reference.comm import copies

SETTINGS = Settings(num_sms=20, link_slots=16, rail_slots=8, rail_chunk=4)
H800 = MACHINES["H800"]
TOKENS = 2000


def test_traffic_of_one_rank_a_node_and_of_one_node() -> None:
    assert traffic(Shape(1, 1, top_k=3)) == traffic(Shape(1, 1)), "all experts are here"
    assert dataclasses.astuple(traffic(Shape(1, 1))) == (1, 1, 0, 0)
    one = traffic(Shape(2, 4, experts=8, top_k=1))
    assert dataclasses.astuple(one) == pytest.approx((1, 1, 1 / 2, 3 / 4))
    every = traffic(Shape(2, 4, experts=8, top_k=8))
    assert dataclasses.astuple(every) == pytest.approx((8, 2, 1, 6))


@pytest.mark.parametrize(
    "shape",
    [Shape(1, 8), Shape(2, 8), Shape(4, 8), Shape(3, 2, experts=48, top_k=6), Shape(8, 8, top_k=2)],
    ids=["1x8", "2x8", "4x8", "3x2", "8x8"],
)
def test_traffic_is_that_of_random_routing(shape: Shape) -> None:
    """Against the bytes that the reference counts, so against a second account of who sends what."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(TOKENS, shape.experts, generator=generator)
    check_traffic(shape, scores.topk(shape.top_k).indices, 0.02)


@pytest.mark.parametrize("top_groups", [2, 4])
def test_traffic_is_that_of_a_gate_limited_to_nodes(top_groups: int) -> None:
    """The gate is the library's own."""
    shape = Shape(8, 8, top_groups=top_groups)
    logits = torch.randn(TOKENS, shape.experts, generator=torch.Generator().manual_seed(1))
    routing = fastfp8.route(logits, torch.zeros(shape.experts), top_k=8, groups=8, top_groups=top_groups)
    check_traffic(shape, routing.topk_idx, 0.02)


def check_traffic(shape: Shape, topk_idx: torch.Tensor, tolerance: float) -> None:
    topk_idxs = list(topk_idx.tensor_split(shape.ranks))  # as many tokens of each rank
    counted = copies(topk_idxs, num_experts=shape.experts, ranks_per_node=shape.gpus)
    expected = traffic(shape)
    assert counted.nvlink.sum().item() / TOKENS == pytest.approx(expected.links, rel=tolerance)
    assert counted.ib.sum().item() / TOKENS == pytest.approx(expected.rails, rel=tolerance)
    owners = topk_idx // (shape.experts // shape.ranks)
    for per, count in ((1, expected.ranks), (shape.gpus, expected.nodes)):
        found = sum(len(set(row)) for row in (owners // per).tolist()) / TOKENS
        assert found == pytest.approx(count, rel=tolerance)


def test_rates_by_both_definitions() -> None:
    """DeepEP's counts the own node: of N nodes, 1 / N of it is on no wire. On one node it counts the own rank."""
    shape = Shape(2, 8, tokens=1000)
    assert deepep_rate(shape, 7392, 1e-3) == pytest.approx(1000 * 7392 * traffic(shape).nodes / 1e6)
    rail, link = wire_rates(shape, 7392, 1e-3)
    assert rail == pytest.approx(deepep_rate(shape, 7392, 1e-3) / 2)
    assert link == pytest.approx(1000 * 7392 * traffic(shape).ranks * 7 / 8 / 1e6)
    node = Shape(1, 8, tokens=1000)
    assert wire_rates(node, 7392, 1e-3) == pytest.approx((0, deepep_rate(node, 7392, 1e-3) * 7 / 8))


def test_ring_bytes_are_those_of_the_window() -> None:
    """A window has flags and counts besides, 128 bytes of rounding for each."""
    shape = Shape(3, 4, tokens=64, hidden=1024, experts=24, top_k=6)
    settings = Settings(num_sms=6, link_slots=3, rail_slots=2, rail_chunk=5)
    geometry = _C.CommGeometry(
        **{"nodes": 3, "gpus": 4, "channels": 3, "experts": 24, "top_k": 6, "hidden": 1024, "max_tokens": 64},
        **{"capacity": 1000, "link_slots": 3, "rail_slots": 2, "rail_chunk": 5},
    )
    flags = 2 * 2 * 4 * 3 * (12 * 3 + 3 * 2)
    words = 2 * 12 * (2 + 3 + 1) + 2 * 2 * 3 * (4 * (2 + 3) + 3 + 3 + 1)
    assert 0 <= geometry.window_bytes - ring_bytes(shape, settings) - flags <= 4 * words + 20 * 128


def test_warps_are_shared_out_as_by_the_kernels() -> None:
    assert warps_of_roles(32, [0, 10, 0, 10]) == [0, 16, 0, 16]
    assert warps_of_roles(4, [1, 1, 1, 1000]) == [1, 1, 1, 1]
    assert warps_of_roles(32, [1000, 1, 0, 0]) == [30, 2, 0, 0]
    generator = random.Random(0)
    for _ in range(200):
        loads = [generator.choice((0, generator.randrange(1, 5000))) for _ in range(4)]
        warps = warps_of_roles(32, loads)
        assert sum(warps) == (32 if any(loads) else 0)
        assert all((count > 0) == (load > 0) for count, load in zip(warps, loads, strict=True))


SHAPES = [Shape(1, 8), Shape(2, 8), Shape(4, 8), Shape(8, 8, top_groups=4), Shape(32, 8), Shape(3, 2, experts=48)]


@pytest.mark.parametrize("combine", [False, True], ids=["dispatch", "combine"])
@pytest.mark.parametrize("shape", SHAPES, ids=[f"{s.nodes}x{s.gpus}" for s in SHAPES])
def test_no_time_is_below_that_of_the_bytes(shape: Shape, combine: bool) -> None:
    """And with SMs, slots and latencies out of the way it is hardly above."""
    size = 2 * shape.hidden if combine else shape.record_bytes
    of_token = traffic(shape)
    least = shape.tokens * size * max(of_token.rails / H800.rail, of_token.links / H800.link) / 1e9
    many = dataclasses.replace(SETTINGS, num_sms=64, link_slots=128, rail_slots=16)
    quick = dataclasses.replace(H800, call_us=0.0, link_us=0.1, rail_us=0.1)
    for machine, settings, most in ((H800, SETTINGS, 2.0), (quick, many, 1.15)):
        found = simulate(machine, shape, settings, combine=combine)
        assert least <= found.seconds * 1.001
        assert found.seconds <= most * least
        assert all(0 <= part <= 1.001 for part in found.busy.values())


@pytest.mark.parametrize("combine", [False, True], ids=["dispatch", "combine"])
def test_what_is_worse_is_never_predicted_to_be_faster(combine: bool) -> None:
    shape = Shape(4, 8)

    def seconds(settings: Settings = SETTINGS, skew: float = 1.0, **of_machine: float) -> float:
        machine = dataclasses.replace(H800, **of_machine)
        return simulate(machine, shape, settings, combine=combine, skew=skew).seconds

    by_sms = [seconds(dataclasses.replace(SETTINGS, num_sms=n)) for n in (4, 8, 16, 32)]
    assert by_sms == sorted(by_sms, reverse=True)
    assert by_sms[0] > 3 * by_sms[-1]
    assert seconds(rail=90.0) < seconds() < seconds(rail=20.0)
    assert seconds() < seconds(link=40.0)
    assert seconds() < seconds(skew=2.0) < seconds(skew=4.0)
    slow = {"rail_us": 100.0, "link_us": 50.0}
    few_rails, few_links = dataclasses.replace(SETTINGS, rail_slots=1), dataclasses.replace(SETTINGS, link_slots=1)
    assert seconds(few_rails, **slow) > 1.5 * seconds(**slow), "credits that come back late hold the rails up"
    assert seconds(few_links, **slow) > 1.5 * seconds(**slow)
    assert seconds(call_us=131.0) == pytest.approx(seconds() + 100e-6)


def test_a_forwarder_waits_for_slots_that_come_back_late() -> None:
    """Any chunk fits into these rings; the next one has to wait for them."""
    machine = dataclasses.replace(H800, link_us=100.0)
    few, many = (dataclasses.replace(SETTINGS, rail_chunk=2, link_slots=slots) for slots in (2, 32))
    assert simulate(machine, Shape(8, 8), few).seconds > 2 * simulate(machine, Shape(8, 8), many).seconds


@pytest.mark.parametrize("combine", [False, True], ids=["dispatch", "combine"])
@pytest.mark.parametrize("shape", [Shape(1, 8), Shape(8, 1)], ids=["links", "rails"])
def test_twice_the_rows_at_one_rank_take_it_twice_as_long(shape: Shape, combine: bool) -> None:
    """With SMs out of the way: what is slow is the wire to that rank, in combine from it."""
    machine = dataclasses.replace(H800, call_us=0.0, link=20.0, rail=10.0)
    settings = dataclasses.replace(SETTINGS, num_sms=64, link_slots=64)
    even, skewed = (simulate(machine, shape, settings, combine=combine, skew=s).seconds for s in (1.0, 2.0))
    assert skewed == pytest.approx(2 * even, rel=0.05)


def test_what_bounds_a_call_is_named() -> None:
    assert simulate(H800, Shape(8, 8), SETTINGS).bound == "rail"
    assert simulate(H800, Shape(1, 8), SETTINGS).bound == "link"
    assert simulate(H800, Shape(8, 8), dataclasses.replace(SETTINGS, num_sms=2)).bound not in ("rail", "link")


def test_the_flat_protocol_is_linear_in_its_bytes() -> None:
    few, many = (flat_seconds(H800, Shape(4, 8, tokens=tokens), 7408) for tokens in (128, 256))
    assert many - few == pytest.approx(128 * 8 * 7408 * 3 / 4 / (H800.rail * 1e9))


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ValueError, match="an even number of SMs"):
        simulate(H800, Shape(1, 8), dataclasses.replace(SETTINGS, num_sms=3))
    with pytest.raises(ValueError, match="at least a token"):
        simulate(H800, Shape(1, 8, tokens=0), SETTINGS)
