"""``python -m bench comm`` without GPUs: ranks of one GPU on the emulator, and ranks that torchrun starts over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comm_devices import Emulated, device_params
from test_bench_device import Pretended

from bench import comm_loopback, comm_torchrun
from bench.case import Case, Unavailable
from bench.comm_loopback import TINY, Size
from bench.device import DeviceTimer
from fastfp8 import ScaledTensor
from fastfp8.comm import loopback
from fastfp8.reference import comm as oracle

ROOT = Path(__file__).resolve().parent.parent
emulated = pytest.mark.usefixtures("_on_the_emulator")
CPU = torch.device("cpu")


@pytest.fixture
def _on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Emulated()
    monkeypatch.setattr(loopback, "loopback", lambda geometry, _, **options: device.kernels(geometry, **options))


pytestmark = [mark for mark in device_params()[0].marks if mark.name == "skipif"]


@emulated
@pytest.mark.parametrize("op", ["exchange", "dispatch", "combine"])
def test_loopback_is_timed_and_checked(op: str) -> None:
    subject = comm_loopback.subject(op, TINY, CPU)
    times = DeviceTimer(Pretended()).time(subject, 1)
    assert len(times) == len(subject.contestants) == (1 if op == "exchange" else 3)
    assert subject.contestants[0].config == "4 ranks x 2 SMs of 2 warps"
    tokens, rows = 4 * 4 * 128, 4 * 4 * 2 * 128
    least = {"exchange": 0, "dispatch": 2 * tokens + rows + rows // 32, "combine": 2 * tokens + 2 * rows}
    assert subject.bytes == least[op]


@emulated
def test_wrong_results_get_no_time() -> None:
    ranks = comm_loopback.Ranks(TINY, CPU)
    routing = ranks.kernels.exchange(ranks.idx, ranks.weights)
    ranks.check_exchange(routing)
    recv = ranks.kernels.dispatch(ranks.x, routing, quantize=True)
    ranks.check_dispatch(recv)
    y = ranks.kernels.combine(ranks.given(), routing, weighted=True)
    ranks.check_combine(y)
    assert isinstance(recv, ScaledTensor)
    recv.scale[2, 0, 0] *= 2
    with pytest.raises(AssertionError, match="rank 2 did not get the rows"):
        ranks.check_dispatch(recv)
    y[3, 1, 7] *= 1.05
    with pytest.raises(AssertionError, match="not the tokens again"):
        ranks.check_combine(y)
    routing.offsets[1, 0] += 1
    with pytest.raises(AssertionError, match="other rows"):
        ranks.check_exchange(routing)


def test_loopback_rows_wait_for_a_gpu() -> None:
    full = comm_loopback.works(tiny=False)
    assert [work.op for work in full] == ["dispatch, loopback", "combine, loopback", "exchange, loopback"]
    assert {work.shape for work in full} == {"2 nodes x 4, 4096x7168 a rank, 8 of 256 experts"}
    session: Any = type("NoGpu", (), {"timers": {}, "samples": 1})
    for work in full:
        assert isinstance(work, Case)
        with pytest.raises(Unavailable, match="there is no GPU"):
            work.measure(session)


def test_channels_are_what_the_gpu_has_room_for() -> None:
    size = Size()
    for sms, channels in ((132, 8), (78, 4), (400, comm_loopback.MOST_CHANNELS)):
        assert comm_loopback.channels_of(size, sms) == channels


def torchrun(*options: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*launcher, "-m", "bench", "comm", "--tiny", "--samples", "2", *options]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="over gloo only where there is no GPU")
def test_ranks_of_torchrun_print_a_table() -> None:
    text = torchrun("--ranks-per-node", "1", "--top-nodes", "1")
    assert text.startswith("2 nodes x 1, 16x256 a rank, 8 of 256 experts on at most 1 nodes, way collective (gloo)")
    assert "a token goes to 1.00 nodes and 1.00 ranks, its own among them" in text
    assert comm_torchrun.DEFINITIONS in text
    for op in ("dispatch, FP8", "dispatch by a handle, FP8", "combine, BF16"):
        assert f"\n{op} " in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="over gloo only where there is no GPU")
def test_ranks_of_torchrun_give_rows(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    rows = json.loads(torchrun("--json", "--report", str(report)))["rows"]
    assert [row["op"].split(",")[0] for row in rows] == ["dispatch", "dispatch by a handle", "combine"]
    assert len(report.read_text().splitlines()) == 3, "one rank writes"
    for row in rows:
        assert row["kind"] == "cpu"
        assert row["shape"].startswith("1 nodes x 2, 16x256 a rank")
        bytes_of_all = 16 * 2 * (512 if row["op"].startswith("combine") else 264)
        assert row["rate"] == pytest.approx(bytes_of_all / row["median"] / 1e3), "a token goes to both ranks"


@pytest.mark.parametrize(("world", "gpus"), [(4, 4), (4, 2), (6, 2), (6, 1)])
def test_copies_are_those_of_the_oracle(world: int, gpus: int) -> None:
    options: Any = comm_torchrun.Options("", 9, 128, 24, 4, 2, gpus, 20, False, 1)
    idx = [comm_torchrun.limited_routing(options, world // gpus, rank) for rank in range(world)]
    for of_rank in idx:
        assert of_rank.shape == (9, 4)
        assert all(len(set(experts)) == 4 for experts in of_rank.tolist())
        nodes = [{e // (24 * gpus // world) for e in experts} for experts in of_rank.tolist()]
        assert max(map(len, nodes)) <= 2
    nodes, ranks, rails, links = sum(
        comm_torchrun.Copies.of(of_rank, rank, world, gpus, 24) for rank, of_rank in enumerate(idx)
    ).tolist()
    least = oracle.copies(idx, num_experts=24, ranks_per_node=gpus)
    assert (rails, links) == (least.ib.sum(), least.nvlink.sum())
    owners = [[{e * world // 24 for e in experts} for experts in of_rank.tolist()] for of_rank in idx]
    assert ranks == sum(len(to) for of_rank in owners for to in of_rank)
    assert nodes == sum(len({r // gpus for r in to}) for of_rank in owners for to in of_rank)


def test_rates_are_of_a_mean_rank() -> None:
    copies = comm_torchrun.Copies(2.0, 6.0, 1.0, 5.0)
    assert copies.rates(1000, 1e-6) == pytest.approx((2.0, 6.0, 1.0, 5.0))
