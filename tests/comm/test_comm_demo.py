"""The demo of dispatch and combine: what it prints is true, and it finds a wrong bit."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import ranks

from fastfp8.comm import demo

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = demo.Options(ranks=4, nodes=2, top_nodes=1, experts=8, top_k=2, tokens=14, hidden=128, repeats=1)
RIGHT = "against the oracle: every bit of every rank is equal"


def demonstrate(group: Any, spoilt: str) -> tuple[bool, str]:
    """The demo with a bit of what rank 2 got turned."""
    work = demo._work

    def spoiling(*args: Any) -> demo.Result:
        result = work(*args)
        if spoilt and dist.get_rank() == 2:
            part = result.sums if spoilt == "sums" else result.recv[spoilt]
            part[-1] ^= 1
        return result

    demo._work = spoiling
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            right = demo.run(OPTIONS)
    finally:
        demo._work = work
    return right, printed.getvalue()


def test_the_demo() -> None:
    with ranks(4) as pool:
        (right, printed), *others = pool.run(demonstrate, "")
        assert right
        assert others == [(True, "")] * 3
        for part in ("codes", "scales", "weights", "sums"):
            (right, wrong), *_ = pool.run(demonstrate, part)
            assert not right
            assert wrong.rstrip().endswith(f"against the oracle: {part} of rank 2")
    assert printed.rstrip().endswith(RIGHT)
    inputs = [demo.tokens_and_routing(OPTIONS, rank) for rank in range(4)]
    loads = torch.bincount(torch.cat([index.flatten() for _, index, _ in inputs]), minlength=8).view(4, 2).tolist()
    for rank, counts in enumerate(loads):
        line = [str(n) for n in (rank, len(inputs[rank][0]), sum(counts), *counts)]
        assert line in [row.split() for row in printed.splitlines()]
    # All on one node: a token crosses at most once, by either way; NVLink carries what is for another rank there.
    far = sum(int((index[:, 0] // 4 != rank // 2).sum()) for rank, (_, index, _) in enumerate(inputs))
    least = next(row for row in printed.splitlines() if row.startswith("least, once to each node"))
    assert float(least.split()[-1]) == round(far * 256 / 1e6, 3)
    assert float(least.split()[-3]) == round(far * (128 + 4) / 1e6, 3)


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["torchrun", "itself"])
def test_the_command(starter: str) -> None:
    command = [sys.executable, "-m"]
    if starter == "torchrun":
        command += ["torch.distributed.run", "--nproc_per_node", "4", "-m"]
    command += ["fastfp8.comm.demo", "--ranks", "4", "--tokens", "14", "--hidden", "128", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(RIGHT) == 1
