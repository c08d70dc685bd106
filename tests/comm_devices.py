"""One GPU for all ranks of ``fastfp8.comm.loopback``: the emulator's, or one of silicon, for the same test bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from backends import BACKENDS
from emulator import Machine
from emulator.plan import prepare_plan
from torch import Tensor

from fastfp8 import _C
from fastfp8.comm.kernels import Kernels
from fastfp8.comm.loopback import loopback


class Emulated:
    """Runs a launch when it is made. A graph is the plans and tensors of its launches, so that what a plan says of the
    call it was made for, and a replay must not depend on, shows."""

    device = torch.device("cpu")

    def __init__(self, seed: int = 0) -> None:
        self.machine = Machine(seed, 1)
        self.memory: list[Tensor] = []
        self._graph: list[tuple[_C.LaunchPlan, Mapping[str, Tensor]]] | None = None

    def kernels(self, geometry: _C.CommGeometry, **options: Any) -> Kernels:
        made = loopback(geometry, self.device, launch=self.launch, **{"warps": 2, "timeout": 0.05, **options})
        assert isinstance(made.keeps, Tensor)
        self.memory.append(made.keeps)
        return made

    def launch(self, plan: _C.LaunchPlan, tensors: Mapping[str, Tensor]) -> None:
        if self._graph is not None:
            self._graph.append((plan, dict(tensors)))
            return
        self.machine.launch_all([prepare_plan(plan, tensors, self.machine, None, 0, self.memory)])

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What runs the launches of ``work`` again, and its results, which it then writes. It runs nothing itself."""
        self._graph, captured = [], []
        captured, results = self._graph, work()
        self._graph = None

        def replay() -> None:
            for plan, tensors in captured:
                self.launch(plan, tensors)

        return replay, results


class Silicon:
    """The current GPU."""

    def __init__(self, seed: int = 0) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def kernels(self, geometry: _C.CommGeometry, **options: Any) -> Kernels:
        return loopback(geometry, self.device, **options)

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        work()  # loads the kernels, which a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = work()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay, results


def why_no_silicon() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    return _C.gemm_sm90_unusable_reason(torch.cuda.current_device()) or None


def device_params() -> list[Any]:
    emulator, silicon = BACKENDS["emulator"].why_not(), why_no_silicon()
    return [
        pytest.param(Emulated, id="emulator", marks=pytest.mark.skipif(emulator is not None, reason=str(emulator))),
        pytest.param(
            Silicon, id="cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(silicon is not None, reason=str(silicon))]
        ),
    ]
