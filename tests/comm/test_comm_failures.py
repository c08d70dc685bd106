"""What goes wrong between ranks ends in an error on every one of them, in time, and names who."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import comm_failures
import pytest
import torch
from backends import assert_same_bits
from comm_cases import Case, unpacked
from rank_pool import Died, Ranks, ranks

from fastfp8 import comm
from fastfp8.reference import comm as reference

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(4, top_k=2, ranks_per_node=2)
TOKENS = CASE.tokens_of(1)


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(4) as started:
        yield started


# What rank 1 is told of its own calls, of which the others are told too, and what all are told.
REFUSED = [
    f"dispatch: argument 'x': expected [T, 128], got shape ({TOKENS}, 64)",
    "dispatch: argument 'x': expected dtype torch.bfloat16, got torch.float32",
    "dispatch: argument 'topk_idx': expected experts from 0 to below num_experts = 12, or -1, got 12 for token 0",
    "dispatch: argument 'x': expected at most max_tokens = 9 tokens, got 10",
    "dispatch: argument 'topk_weights': expected dtype torch.float32, got torch.float64",
    "dispatch: argument 'topk_idx': expected a torch.Tensor, got NoneType",
    "dispatch: argument 'pow2': expected a bool, got int 2",
    "dispatch: argument 'x': expected blocks of (1, 128), got blocks of (128, 128)",
    "dispatch: argument 'stream': expected None for a Buffer on a CPU, got 3",
    "rank 1 calls dispatch with quantize: False",
    "rank 1 calls combine with weighted: True",
    f"dispatch: argument 'x': expected {TOKENS} tokens, as the handle's dispatch had, got {TOKENS + 1}",
    "dispatch: argument 'topk_idx': expected None with a handle, got Tensor",
    "combine: argument 'expert_out': expected shape (72, 128), got shape (71, 128)",
    f"combine: argument 'out': expected shape ({TOKENS}, 128), got shape ({TOKENS}, 1)",
    "dispatch_backward: argument 'grad_rows': expected dtype torch.bfloat16, got torch.float32",
    f"weights_backward: argument 'grad_recv_weights': expected 1 dimension, got shape ({TOKENS}, 2)",
    "combine_backward: argument 'expert_out': expected shape (72, 128), got shape (71, 128)",
]
KNOWN_ALONE = [
    "combine: argument 'self': expected an open Buffer, got a closed one",
    "combine: argument 'handle': expected one of this Buffer, got one of another",
    "combine: argument 'handle': expected a fastfp8.comm.Handle, got NoneType None",
]


def test_what_one_rank_refuses_all_are_told(pool: Ranks) -> None:
    found = pool.run(comm_failures.refused, CASE)
    for rank, (said, _) in enumerate(found):
        for expected, got in zip([*REFUSED, *KNOWN_ALONE], said, strict=True):
            assert expected in got, f"rank {rank}"
            own = rank == 1 or expected in KNOWN_ALONE
            assert got.startswith("Argument" if own and "calls" not in expected else "PeerError"), f"rank {rank}"
    xs, index, weights = CASE.all_inputs()
    dense = reference.dispatch(xs, index, weights, num_experts=CASE.num_experts, quantize=False)
    sums = reference.combine([d.recv for d in dense], [d.placement for d in dense], ranks_per_node=2)
    for rank, (_, y) in enumerate(found):
        assert_same_bits(unpacked(y), sums[rank], "after all the errors")


def test_overflow_is_the_same_on_every_rank(pool: Ranks) -> None:
    found = pool.run(comm_failures.overflow, CASE)
    xs, index, weights = CASE.all_inputs()
    rows = [len(r.recv_weights) for r in reference.dispatch(xs, index, num_experts=CASE.num_experts)]
    assert max(rows) > 6
    over = ", ".join(f"rank {rank} would get {n}" for rank, n in enumerate(rows) if n > 6)
    for said, _, _ in found:
        assert said == [
            f"Overflow: fastfp8.comm.Buffer.dispatch: a rank has room for 6 rows, {over}: no row was sent; "
            f"a Buffer with capacity={max(rows)} takes this routing"
        ]
    index = [unpacked(i) for _, _, i in found]
    dense = reference.dispatch(xs, index, weights, num_experts=CASE.num_experts, quantize=False)
    sums = reference.combine([d.recv for d in dense], [d.placement for d in dense], ranks_per_node=2)
    for rank, (_, y, _) in enumerate(found):
        assert_same_bits(unpacked(y), sums[rank], "after the overflow")


def test_sizes_must_fit_and_be_equal(pool: Ranks) -> None:
    found = pool.run(comm_failures.unequal, CASE)
    told = [
        "'hidden': expected a positive multiple of 128, got 64",
        "'num_experts': expected a positive multiple of the number of ranks, 4, got 13",
        "'top_k': expected 1 to 32, got 33",
        "'max_tokens': expected 0 or more, got -1",
        "'ranks_per_node': expected a divisor of the number of ranks, 4, got 3",
        "'capacity': expected 0 or more, got -2",
        "'num_sms': expected an even number from 2 up, got 3",
        "'top_k': expected an int, got float 2.0",
        "'max_tokens': expected the same on every rank, got [9, 10, 9, 10] of ranks 0 to 3",
        "'timeout': expected more than 0 seconds, got 0",
        "'timeout': expected seconds, got str '1'",
        "'group': expected a torch.distributed.ProcessGroup of this rank, got 3",
    ]
    for rank, said in enumerate(found):
        for place, (expected, got) in enumerate(zip(told, said, strict=True)):
            assert expected in got
            assert got.startswith("PeerError") == (place < 8 and rank != 2)


def test_a_killed_rank_is_named_in_time() -> None:
    with ranks(4) as pool:
        pool.begin(comm_failures.die, CASE, 2, 8.0)
        found = pool.results()
    assert isinstance(found.pop(2), Died)
    for text, missing, seconds, after in found:
        assert missing == [2], text
        assert "no word from rank 2" in text
        assert "role dispatch: " in text
        assert seconds < 8.0
        assert "expected a Buffer whose ranks all answer, got one that failed" in after


def test_a_late_rank_is_named_and_learns_why() -> None:
    with ranks(3) as pool:
        found = pool.run(comm_failures.late, Case(3), 1, 3.0)
    for rank in (0, 2):
        text, missing, seconds = found[rank]
        assert missing == [1], text
        assert 2.2 < seconds < 5
    text, missing, _ = found[1]
    assert missing == []
    assert "rank 0 had given up before, in dispatch: status and counts" in text
    assert "rank 2 had given up before" in text


# A rank that gives up while another sleeps, and ends.
GIVE_UP = """
import datetime, os, sys, time, torch, torch.distributed as dist
from fastfp8 import comm
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
rank, rendezvous = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rendezvous, datetime.timedelta(seconds=200), 2, rank)
buffer = comm.Buffer(hidden=128, num_experts=2, top_k=1, max_tokens=1, timeout=4)
if rank:
    time.sleep(120)
try:
    buffer.dispatch(torch.zeros(0, 128).bfloat16(), torch.zeros((0, 1), dtype=torch.int64))
except comm.Timeout:
    print("gave up", flush=True)
"""


@pytest.mark.slow
def test_a_process_that_gave_up_can_end(tmp_path: Path) -> None:
    """No thread of torch waits on for the other."""
    command = [sys.executable, "-c", GIVE_UP]
    sleeper = subprocess.Popen([*command, "1", f"file://{tmp_path}/rendezvous"], cwd=ROOT)
    try:
        arguments = ["0", f"file://{tmp_path}/rendezvous"]
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert (done.returncode, done.stdout) == (0, "gave up\n"), done.stderr


def test_errors_say_what_they_know() -> None:
    error = comm.Timeout(
        rank=3, missing=[1, 2], channel=4, role="IB send", head=5, tail=9, seconds=1.25, detail="socket closed"
    )
    assert str(error) == (
        "fastfp8.comm: rank 3 gave up waiting (channel 4, role IB send, head 5, tail 9) after 1.2 s, "
        "no word from ranks 1, 2: socket closed"
    )
    assert isinstance(error, TimeoutError)
    assert (error.rank, error.missing, error.channel, error.role) == (3, (1, 2), 4, "IB send")
    assert (error.head, error.tail) == (5, 9)
    assert comm.Overflow(3, torch.tensor([1, 7]).tolist()).rows == (1, 7)
