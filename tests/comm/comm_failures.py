"""What ranks do in the tests of what goes wrong between them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from comm_cases import Case, packed

import fastfp8
from fastfp8 import comm


@contextlib.contextmanager
def heard(error: type[BaseException], said: list[str]) -> Iterator[None]:
    """Note what the block raised."""
    try:
        yield
    except error as raised:
        said.append(f"{type(raised).__name__}: {raised}")
    else:
        said.append("nothing")


def refused(group: Any, case: Case) -> tuple[list[str], Any]:
    """Calls that one rank, or all, cannot make; what this rank hears of each. At last a call that all can make."""
    rank = dist.get_rank(group)
    x, index, weights = case.inputs(rank)
    said: list[str] = []
    errors = (TypeError, ValueError, comm.PeerError)
    buffer = case.buffer(group)
    # On rank 1 alone:
    bad = rank == 1
    with heard(errors, said):
        buffer.dispatch(x[:, :64] if bad else x, index, weights)
    with heard(errors, said):
        buffer.dispatch(x.float() if bad else x, index, weights)
    with heard(errors, said):
        too_far = index.clone()
        if bad:
            too_far[0, 1] = case.num_experts
        buffer.dispatch(x, too_far, weights)
    with heard(errors, said):
        many = torch.zeros((10, case.hidden), dtype=torch.bfloat16)
        buffer.dispatch(many if bad else x, index, weights)
    with heard(errors, said):
        buffer.dispatch(x, index, weights.double() if bad else weights)
    with heard(errors, said):
        buffer.dispatch(x, None if bad else index, weights)
    with heard(errors, said):
        buffer.dispatch(x, index, weights, pow2=2 if bad else False)  # type: ignore[arg-type]
    with heard(errors, said):
        buffer.dispatch(fastfp8.quantize(x, (128, 128)) if bad else x, index, weights)
    with heard(errors, said):
        buffer.dispatch(x, index, weights, stream=3 if bad else None)  # type: ignore[arg-type]
    # Each does as it may, but not the same:
    with heard(errors, said):
        buffer.dispatch(x, index, weights, quantize=not bad)
    recv, _, handle = buffer.dispatch(x, index, weights, quantize=False)
    with heard(errors, said):
        if bad:
            buffer.combine(recv, handle)
        else:
            buffer.dispatch(x, handle=handle)
    with heard(errors, said):
        buffer.dispatch(torch.cat([x, x, x[:1]])[: len(x) + 1] if bad else x, handle=handle)
    with heard(errors, said):
        buffer.dispatch(x, index if bad else None, handle=handle)
    with heard(errors, said):
        buffer.combine(recv[1:] if bad else recv, handle)
    with heard(errors, said):
        buffer.combine(recv, handle, out=torch.empty((len(x), 1), dtype=torch.bfloat16) if bad else None)
    with heard(errors, said):
        buffer.dispatch_backward(recv.float() if bad else recv, handle)
    with heard(errors, said):
        buffer.weights_backward(weights if bad else handle.recv_weights, handle)
    with heard(errors, said):
        buffer.combine_backward(x, recv[1:] if bad else recv, handle)
    y = buffer.combine(recv, handle)
    buffer.close()
    # What a rank knows alone, and all do here:
    with heard(errors, said):
        buffer.combine(recv, handle)
    other = case.buffer(group)
    with heard(errors, said):
        other.combine(recv, handle)
    with heard(errors, said):
        other.combine(recv, None)  # type: ignore[arg-type]
    assert "open" in repr(other)
    with contextlib.suppress(KeyError), other:
        raise KeyError
    assert "closed" in repr(other)
    return said, packed(y)


def overflow(group: Any, case: Case) -> tuple[list[str], Any, Any]:
    """One dispatch too many rows for a rank, one that fits."""
    x, index, weights = case.inputs(dist.get_rank(group))
    said: list[str] = []
    with case.buffer(group, capacity=6) as buffer:
        with heard(comm.Overflow, said):
            buffer.dispatch(x, index, weights, quantize=False)
        index[1:] = -1  # a token a rank
        recv, _, handle = buffer.dispatch(x, index, weights, quantize=False)
        return said, packed(buffer.combine(recv, handle)), packed(index)


def unequal(group: Any, case: Case) -> list[str]:
    """Buffers that cannot be made."""
    rank = dist.get_rank(group)
    said: list[str] = []
    sizes = {"hidden": 128, "num_experts": case.num_experts, "top_k": 2, "max_tokens": 9, "ranks_per_node": 2}
    for name, value in (
        ("hidden", 64),
        ("num_experts", case.num_experts + 1),
        ("top_k", 33),
        ("max_tokens", -1),
        ("ranks_per_node", 3),
        ("capacity", -2),
        ("num_sms", 3),
        ("top_k", 2.0),
    ):
        with heard((TypeError, ValueError, comm.PeerError), said):
            comm.Buffer(group, **{**sizes, name: value} if rank == 2 else sizes, timeout=20)
    with heard(ValueError, said):
        comm.Buffer(group, **{**sizes, "max_tokens": 9 + rank % 2}, timeout=20)
    for options in ({"timeout": 0}, {"timeout": "1"}, {"group": 3}):
        with heard((TypeError, ValueError), said):
            comm.Buffer(**{"group": group, **sizes, **options})
    with comm.Buffer(group, **{**sizes, "ranks_per_node": None}) as buffer:  # all are on this machine
        assert buffer.layout.ranks_per_node == case.world
    return said


def die(group: Any, case: Case, victim: int, timeout: float) -> tuple[str, list[int], float, str]:
    """One rank is killed between two calls; what another learns, when, and whether it can go on."""
    rank = dist.get_rank(group)
    x, index, weights = case.inputs(rank)
    survivors = dist.new_group([r for r in range(case.world) if r != victim])
    buffer = case.buffer(group, timeout=timeout)
    _, _, handle = buffer.dispatch(x, index, weights)
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    error = None
    try:
        for _ in range(3):
            buffer.dispatch(x, handle=handle)
    except comm.Timeout as raised:
        error = raised
    seconds = time.monotonic() - start
    assert error is not None
    assert (error.rank, error.channel) == (rank, None)
    assert error.head < error.tail
    assert error.role in str(error)
    after: list[str] = []
    with heard(ValueError, after):
        buffer.dispatch(x, handle=handle)
    buffer.close()
    total = torch.ones(1)
    dist.all_reduce(total, group=survivors)  # other groups stay usable
    assert total == case.world - 1
    return str(error), list(error.missing), seconds, after[0]


def late(group: Any, case: Case, sleeper: int, timeout: float) -> tuple[str, list[int], float]:
    """One rank comes after the others gave up."""
    rank = dist.get_rank(group)
    x, index, weights = case.inputs(rank)
    dist.barrier(group)
    buffer = case.buffer(group, timeout=timeout)
    start = time.monotonic()
    if rank == sleeper:
        time.sleep(timeout + 1)
    try:
        buffer.dispatch(x, index, weights)
    except comm.Timeout as error:
        return str(error), list(error.missing), time.monotonic() - start
    raise AssertionError("no Timeout")
