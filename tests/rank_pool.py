"""Processes that are ranks of a gloo group and run functions together."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist

# Forked from a process that has torch already, a rank starts in milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "fastfp8"])


class RankError(AssertionError):
    """A function raised on a rank."""


class Died:
    """What a rank gives that ended without an answer."""


def _serve(rank: int, world: int, rendezvous: str, pipe: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo wants the host's name to resolve
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rendezvous, datetime.timedelta(seconds=120), world, rank)
    groups = {}
    while True:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        function, size, args = task
        if size not in groups:  # every rank makes it, as new_group wants
            groups[size] = dist.group.WORLD if size == world else dist.new_group(list(range(size)))
        if rank >= size:
            continue
        try:
            answer = (True, function(groups[size], *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it after another rank's failure
            pipe.send(answer)
    os._exit(0)  # no group waits for the others


class Ranks:
    """``world`` processes. No process is left after :meth:`stop`."""

    def __init__(self, world: int) -> None:
        self.world, self._folder = world, tempfile.TemporaryDirectory()
        rendezvous = f"file://{self._folder.name}/rendezvous"
        self._pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(rank, world, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def begin(self, function: Callable[..., Any], *args: Any, size: int | None = None) -> None:
        """Have the first ``size`` ranks, or all, call ``function(group, *args)``."""
        for pipe in self._pipes:
            pipe.send((function, size or self.world, args))

    def results(self, size: int | None = None, timeout: float = 60.0) -> list[Any]:
        """What each rank returned, or Died. Raises RankError where one raised."""
        end, waited = time.monotonic() + timeout, self._pipes[: size or self.world]
        found: dict[int, Any] = {}
        while len(found) < len(waited):
            open_pipes = [pipe for rank, pipe in enumerate(waited) if rank not in found]
            ready = connection.wait(open_pipes, max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"in {timeout} s only ranks {sorted(found)} came to an end")
            for pipe in ready:
                rank = waited.index(pipe)
                try:
                    ok, found[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    ok, found[rank] = True, Died()
                if not ok:  # others may still wait for it
                    raise RankError(f"rank {rank}: {found[rank]}")
        return [found[rank] for rank in range(len(waited))]

    def run(self, function: Callable[..., Any], *args: Any, size: int | None = None) -> list[Any]:
        self.begin(function, *args, size=size)
        return self.results(size)

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


@contextlib.contextmanager
def ranks(world: int) -> Iterator[Ranks]:
    pool = Ranks(world)
    try:
        yield pool
    finally:
        pool.stop()
