"""What ranks do in the tests of windows over several nodes: processes of gloo that pretend to be GPUs with NCCL."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from fastfp8 import _C, comm
from fastfp8.comm import kernel_exchange, trial, windows
from fastfp8.comm.footprint import Layout
from fastfp8.comm.link import Link
from fastfp8.comm.tune import Tuned

COMMUNICATOR = 0x1234
SIZES = {"hidden": 256, "num_experts": 8, "top_k": 2, "max_tokens": 3, "ranks_per_node": 2, "num_sms": 4}
LAYOUT = Layout(4, 256, 8, 2, 3, 2, 24)


class Communicator:
    """torch's end of NCCL."""

    def _comm_ptr(self) -> int:
        return COMMUNICATOR


class Connection:
    """What a build without NCCL's headers takes for _C.CommNccl."""

    constants = b"constants of NCCL"

    def __init__(self, *, communicator: int, geometry: _C.CommGeometry, address: int) -> None:
        assert (communicator, address % 4096) == (COMMUNICATOR, 0)
        rank = dist.get_rank()
        self.windows = [address + 16 * r if r // 2 == rank // 2 else 0 for r in range(geometry.ranks)]
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def memory(_: Any, nbytes: int, device: torch.device) -> tuple[Tensor, object]:
    room = torch.zeros(nbytes + 4096, dtype=torch.uint8, device=device)
    return room[-room.data_ptr() % 4096 :][:nbytes], room


@contextlib.contextmanager
def pretended(connection: Any = Connection) -> Iterator[None]:
    """GPUs of two nodes, whose libnccl is ``connection`` or, where that is None, the one that is loaded."""
    with (
        mock.patch.object(windows, "_backend", return_value=Communicator()),
        mock.patch.object(windows, "_nccl_memory", memory),
        mock.patch.object(kernel_exchange, "why_not", return_value=""),
        mock.patch.object(kernel_exchange, "gpu_name", return_value="NVIDIA H800"),
        mock.patch.object(_C, "CommNccl", connection or _C.CommNccl),
    ):
        yield


def used(group: Any, library: str | None = None) -> dict[str, Any]:
    """A Buffer between two nodes: what its kernels are launched with, and what its end gives back."""
    if library is not None:
        os.environ["FAKE_NCCL_RANK"] = str(dist.get_rank(group))
        ctypes.CDLL(library)
    launched: list[tuple[Any, ...]] = []
    others = len(windows._held)
    with pretended(None if library else Connection):
        buffer = comm.Buffer(group, way="kernels", **SIZES)
        kernels, opened = buffer._exchange.kernels, buffer._exchange.joined.windows

        def launch(plan: _C.LaunchPlan, tensors: Any) -> None:
            launched.append((plan.module, plan.kernel, plan.arguments[-1], tensors["windows"].tolist()))

        kernels.launch = launch
        with buffer:
            x, index = torch.zeros(3, 256).bfloat16(), torch.zeros(3, 2, dtype=torch.int32)
            recv, _, handle = buffer.dispatch(x, index, quantize=False)
            buffer.combine(recv, handle)
            connection, held = opened.connection, len(windows._held) - others
        settings = kernel_exchange.settings_of(buffer.layout, 4, "NVIDIA H800")
    return {
        "launched": launched,
        "constants": connection.constants,
        "held": (held, len(windows._held) - others),
        "closed": getattr(connection, "closed", None),
        "bytes": (kernels.geometry.window_bytes, kernel_exchange.geometry_of(buffer.layout, settings).window_bytes),
        "why": _C.comm_nccl_unusable_reason(),
    }


def settled(group: Any) -> int:
    """Ranks that would choose differently."""
    rank = dist.get_rank(group)
    chosen = kernel_exchange.Settings(num_sms=4, link_slots=1 + rank, rail_slots=2, rail_chunk=1 + rank)
    with pretended(), mock.patch.object(kernel_exchange, "settings_of", return_value=chosen):
        buffer = comm.Buffer(group, way="kernels", **SIZES)
        return buffer._exchange.kernels.geometry.window_bytes


class Clock:
    """Seconds that settings take by rank: all like chunks of 2 best but one rank, for which they are slow."""

    def __init__(self, rank: int) -> None:
        self.rank, self.rounds = rank, 0

    def __call__(self, work: Any, device: torch.device) -> float:
        work()
        self.rounds += 1
        settings = work.__self__._settings
        seconds = 1 / min(settings.num_sms, 8) + 0.1 * abs(settings.rail_chunk - 2) + 0.1 * (settings.rail_slots != 4)
        return float(seconds + (self.rank == 3 and settings.rail_chunk == 2))


@contextlib.contextmanager
def tunable(rank: int, home: str) -> Iterator[tuple[Clock, list[str]]]:
    """Kernels that do nothing; a home for each rank."""
    clock, launched = Clock(rank), list[str]()
    idle = functools.partial(kernel_exchange.Kernels, launch=lambda plan, _: launched.append(plan.kernel))
    with (
        pretended(),
        mock.patch.object(trial, "seconds_of", clock),
        mock.patch.object(kernel_exchange, "Kernels", idle),
        mock.patch.object(Path, "home", return_value=Path(home) / str(rank)),
    ):
        yield clock, launched


def tuned(group: Any, home: str) -> tuple[Tuned, list[Any], list[Any]]:
    rank = dist.get_rank(group)
    sizes = {**SIZES, "num_sms": 16}
    with tunable(rank, home) as (clock, launched):
        others = len(windows._held)
        with comm.Buffer(group, way="kernels", **sizes) as buffer:
            before = buffer.settings
            found = buffer.tune(repeats=3)
            counts = [clock.rounds, len(launched), buffer.settings == before, len(windows._held) - others]
        later = [comm.Buffer(group, way="kernels", **{**SIZES, "num_sms": n}).settings for n in (32, 4)]
        later.append(comm.Buffer(group, way="kernels", **{**sizes, "hidden": 128}).settings)
    return found, counts, later


def refused_tuning(group: Any, home: str) -> list[str]:
    """By rank 2 alone; by what ranks ask for; by a routing that fits."""
    rank, heard = dist.get_rank(group), []
    idx = torch.zeros((2, 2), dtype=torch.int32)
    with tunable(rank, home), comm.Buffer(group, way="kernels", **SIZES) as buffer:
        for options in (
            {"repeats": 0 if rank == 2 else 1},
            {"topk_idx": idx + 8 if rank == 2 else idx},
            {"topk_idx": torch.zeros((4, 2), dtype=torch.int32) if rank == 2 else idx},
            {"names": ["warps"] if rank == 2 else ["num_sms"]},
            {"names": ["num_sms"], "repeats": 1 + rank},
            {"names": ["num_sms"], "repeats": 1, "topk_idx": idx},
        ):
            try:
                heard.append(str(buffer.tune(**options).settings.num_sms))
            except (ValueError, comm.PeerError) as error:
                heard.append(f"{type(error).__name__}: {error}")
    return heard


def collective_tuning(group: Any) -> str:
    with comm.Buffer(group, **SIZES) as buffer:
        assert buffer.settings is None
        try:
            buffer.tune()
        except ValueError as error:
            return str(error)
    return "nothing"


def said(group: Any) -> list[str]:
    """What is told of a rank that lacks something, of one whose NCCL fails, and of one that does not close."""
    rank, heard = dist.get_rank(group), []

    def attempt(work: Any) -> None:
        try:
            work()
        except (ValueError, RuntimeError, comm.Timeout) as error:
            heard.append(f"{type(error).__name__}: {error}")
        else:
            heard.append("nothing")

    def buffer(**options: Any) -> comm.Buffer:
        return comm.Buffer(group, way="kernels", **SIZES, **options)

    with pretended(), mock.patch.object(kernel_exchange, "why_not", return_value="no cable" if rank == 2 else ""):
        attempt(buffer)

    class Failing(Connection):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            if rank == 1:
                raise RuntimeError("NCCL says no")

    with pretended(Failing):
        attempt(buffer)
    with pretended():
        one = buffer(timeout=1.0)
        one._exchange.kernels.state[one._exchange.kernels.geometry.status_at] = 1  # a Timeout of its kernels
        attempt(one.close if rank != 3 else lambda: None)
        two = buffer(timeout=1.0)
        if rank == 3:
            two._exchange.closed = True
        attempt(two.close)
        attempt(two.close)
    return heard


def reasons(group: Any) -> list[str]:
    """Of a rank whose GPU could run the kernels, by what else it has."""
    with mock.patch.object(_C, "gemm_sm90_unusable_reason", return_value=""):
        link = Link(group, torch.device("cpu"), 30.0)
        found = [windows.why_not(link, LAYOUT)]
        link.device = torch.device("cuda", 0)
        found.append(windows.why_not(link, LAYOUT))
        with mock.patch.object(_C, "comm_nccl_unusable_reason", return_value=""):
            found.append(windows.why_not(link, LAYOUT))
        found.append(windows.why_not(link, Layout(4, 256, 8, 2, 3, 4, 24)))
    return found
