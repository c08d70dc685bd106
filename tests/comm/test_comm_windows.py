"""``Buffer(way="kernels")`` over two nodes, as far as it goes without GPUs: its ranks are processes of gloo.

NCCL is a class, or the pretended libnccl where the build has NCCL's headers. No kernel runs, no byte crosses a rail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import build_kernels as build
import comm_windows
import pytest
from rank_pool import Ranks, ranks
from test_comm_nccl import compile_fake_nccl

from fastfp8 import _C


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(4) as started:
        yield started


KERNELS = ["comm_exchange_nccl", "comm_dispatch_plain_nccl", "comm_combine_nccl"]


def test_launches_go_by_the_rails(pool: Ranks) -> None:
    for rank, found in enumerate(pool.run(comm_windows.used)):
        modules, kernels, constants, addresses = zip(*found["launched"], strict=True)
        assert set(modules) == {"comm_nccl"}
        assert list(kernels) == KERNELS
        assert set(constants) == {b"constants of NCCL"} == {found["constants"]}
        for of_launch in addresses:
            assert [address != 0 for address in of_launch] == [r // 2 == rank // 2 for r in range(4)]
        assert found["held"] == (1, 0), "held as long as it is not closed by all"
        assert found["closed"] == 1
        assert found["bytes"][0] == found["bytes"][1]


def test_a_pretended_libnccl_is_connected(pool: Ranks, tmp_path: Path) -> None:
    """All of _C.CommNccl too."""
    if not _C.comm_nccl_headers():
        pytest.skip(_C.comm_nccl_unusable_reason())
    found_headers = build.find_nccl(build.find_toolkit())
    if not isinstance(found_headers, build.Nccl) or found_headers.version != _C.comm_nccl_headers():
        pytest.skip(f"fastfp8 was built with the headers of NCCL {_C.comm_nccl_headers()}, which are not here")
    library = compile_fake_nccl(tmp_path, found_headers)
    with ranks(4) as fresh:  # a library stays loaded
        answers = fresh.run(comm_windows.used, str(library))
    for rank, found in enumerate(answers):
        assert found["why"] == ""
        neighbours = [0x10000, 0x20000]
        expected = [*neighbours, 0, 0] if rank < 2 else [0, 0, *neighbours]
        for (module, kernel, constants, addresses), name in zip(found["launched"], KERNELS, strict=True):
            assert (module, kernel, addresses) == ("comm_nccl", name, expected)
            assert constants == found["constants"] != b""
        assert found["held"] == (1, 0)


def test_all_ranks_have_rank_0s_settings(pool: Ranks) -> None:
    sizes = pool.run(comm_windows.settled)
    assert len(set(sizes)) == 1


def test_tuning_agrees_and_is_kept(pool: Ranks, tmp_path: Path) -> None:
    """All ranks choose by the slowest; each node's first rank writes, and later Buffers take what rank 0 reads."""
    answers = pool.run(comm_windows.tuned, str(tmp_path))
    best = answers[0][0].settings
    assert (best.rail_chunk, best.rail_slots, best.num_sms) == (1, 4, 8), "chunks of 2 are slow for rank 3"
    for found, (rounds, launches, as_before, held), later in answers:
        assert found == answers[0][0]
        assert rounds == 4 * len(found.tried), "one not counted and three that are"
        assert launches == 3 * rounds
        assert as_before
        assert held == 1, "windows of settings that were tried are given back"
        assert {s.num_sms for s in found.tried} <= {4, 8, 12, 16}, "at most the Buffer's"
        many, few, of_others = later
        assert many == best
        assert few == dataclasses.replace(best, num_sms=4)
        assert of_others == answers[0][2][2] != best
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.json"))
    assert files == ["0/.cache/fastfp8/comm.json", "2/.cache/fastfp8/comm.json"]


def test_tuning_that_is_refused(pool: Ranks, tmp_path: Path) -> None:
    for rank, heard in enumerate(pool.run(comm_windows.refused_tuning, str(tmp_path))):
        for said, words in zip(
            heard,
            (
                "tune: argument 'repeats': expected 1 or more, got 0",
                "tune: argument 'topk_idx': expected experts from 0 to below num_experts = 8, or -1, got 8",
                "tune: argument 'topk_idx': expected at most max_tokens = 3 tokens, got 4",
                "tune: argument 'names': expected some of ('num_sms', 'rail_chunk', 'rail_slots', 'link_slots')",
            ),
            strict=False,
        ):
            assert said.startswith("ArgumentValueError" if rank == 2 else "PeerError: fastfp8.comm.Buffer.tune")
            assert words in said
        assert "the same on every rank" in heard[4]
        assert heard[5] == "4"


def test_tuning_needs_kernels(pool: Ranks) -> None:
    expected = (
        "Buffer.tune: argument 'self': expected a Buffer with way='kernels', which has settings, got 'collective'"
    )
    for said in pool.run(comm_windows.collective_tuning):
        assert expected in said


def test_what_one_rank_lacks_all_are_told(pool: Ranks) -> None:
    for rank, said in enumerate(pool.run(comm_windows.said)):
        lacks, fails, late, alone, again = said
        own = "ArgumentValueError: fastfp8.comm.Buffer: argument 'way': expected 'collective' here: no cable, got"
        assert lacks.startswith(own if rank == 2 else "PeerError: fastfp8.comm.Buffer.__init__: rank 2 refused")
        assert "no cable" in lacks
        assert fails.startswith("RuntimeError" if rank == 1 else "PeerError")
        assert "NCCL says no" in fails
        assert late == "nothing", "after a Timeout nobody is waited for"
        assert alone.startswith("nothing" if rank == 3 else "Timeout")
        assert rank == 3 or "no word from rank 3" in alone
        assert again == "nothing"


def test_what_is_missing_is_said(pool: Ranks) -> None:
    for cpu, cuda, with_library, one_node in pool.run(comm_windows.reasons):
        assert cpu == "kernels run on GPUs, the Buffer is on a CPU"
        assert cuda == _C.comm_nccl_unusable_reason() != ""
        assert with_library == "between nodes kernels need a process group of NCCL's, which this one is not"
        assert one_node == "", "one node needs no NCCL"
