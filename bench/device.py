"""Times work on a GPU: CUDA graphs between events, L2 cold, contestants in turns, outputs checked first.

Why not ``triton.testing.do_bench`` or cuda-bench: the first neither takes turns nor rotates inputs (it empties L2 with
a memset, which also lets the tensor cores rest), the second wants to be the process. What they do too: events, a kernel
before the first event that keeps the GPU busy until the host is ahead, medians.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree

from .case import Contestant, Subject, Telemetry, Unavailable, turns

# A sample shorter than this would be the events' resolution (0.5 us) and the start of a graph (about 2 us).
SAMPLE_SECONDS = 300e-6
# Keeps the GPU busy (clocks of an SM, about 100 us) while the host enqueues what is timed.
BLOCKING_CLOCKS = 200_000
DEVICE = torch.device("cuda")
L2_TIMES = 3  # the copies of the inputs together, over the size of L2
MOST_COPIES = 256


class Replay(Protocol):
    def __call__(self) -> None: ...


class Device(Protocol):
    """What the timer needs of a GPU; the tests have one of their own."""

    telemetry: Telemetry | None

    def capture(self, run: Callable[[int], Any], copies: int, calls: int) -> tuple[Replay, list[Any]]:
        """A graph of ``run(i % copies)`` for i below calls, and the outputs of the first ``copies``."""
        ...

    def seconds(self, replay: Replay) -> float: ...

    def poison(self, outputs: Any) -> None: ...

    def synchronize(self) -> None: ...


def copies_for(bytes_of_a_copy: int) -> int:
    """How many copies of the inputs make every call find L2 without its own: at least two."""
    l2 = torch.cuda.get_device_properties().L2_cache_size
    return min(max(2, math.ceil(L2_TIMES * l2 / max(bytes_of_a_copy, 1))), MOST_COPIES)


def elsewhere(thing: Any) -> Any:
    """A copy on DEVICE with the strides of its tensors, which ``Tensor.to`` keeps for dense tensors only."""

    def copy(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t)

    return _pytree.tree_map_only(Tensor, copy, thing)


class DeviceTimer:
    def __init__(self, device: Device) -> None:
        self._device = device
        self.telemetry = device.telemetry

    def time(self, subject: Subject, rounds: int) -> list[list[float]]:
        """Raises AssertionError, naming the contestant, where an output is wrong or was not written."""
        prepared = [self._prepare(contestant, subject.copies) for contestant in subject.contestants]
        for replay, _ in prepared:
            self._device.seconds(replay)
        times: list[list[float]] = [[] for _ in prepared]
        for order in turns(len(prepared), rounds):
            for index in order:
                replay, calls = prepared[index]
                times[index].append(self._device.seconds(replay) / calls)
            if self.telemetry:
                self.telemetry.sample()
        return times

    def _prepare(self, contestant: Contestant, copies: int) -> tuple[Replay, int]:
        """A graph that is long enough to time, and its calls; its outputs were poisoned, written anew and checked."""
        device = self._device
        replay, outputs = device.capture(contestant.run, copies, copies)
        device.poison(outputs)
        replay()
        device.synchronize()
        for output in outputs:
            if contestant.check:
                try:
                    contestant.check(output)
                except AssertionError as error:
                    raise AssertionError(f"{contestant.backend}: {error}") from error
        elapsed = statistics.median(device.seconds(replay) for _ in range(3))
        repeats = math.ceil(SAMPLE_SECONDS / elapsed)
        if repeats > 1:
            replay, _ = device.capture(contestant.run, copies, copies * repeats)
        return replay, copies * repeats


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.telemetry: Telemetry | None = Nvml.open()

    def capture(self, run: Callable[[int], Any], copies: int, calls: int) -> tuple[Replay, list[Any]]:
        # Once before: compiling, loading and choosing algorithms must not happen under capture.
        run(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [run(i) for i in range(copies)]
            for i in range(copies, calls):
                run(i % copies)
        return graph.replay, outputs

    def seconds(self, replay: Replay) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(BLOCKING_CLOCKS)  # type: ignore[no-untyped-call]
        start.record()
        replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def poison(self, outputs: Any) -> None:
        """Fills their memory with 0xFF, which is NaN in every floating type here."""
        for tensor in _pytree.tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                raw.set_(tensor.untyped_storage()).fill_(0xFF)  # type: ignore[call-overload]

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Nvml:
    """Clocks, power, temperature and what holds the clocks down, by NVML."""

    REASONS: ClassVar[dict[int, str]] = {
        0x4: "power cap",
        0x8: "hardware slowdown",
        0x10: "sync boost",
        0x20: "software thermal",
        0x40: "hardware thermal",
        0x80: "power brake",
    }

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._samples: list[tuple[float, float, float, int]] = []

    @staticmethod
    def open() -> Nvml | None:
        """None without the package nvidia-ml-py or its library. CUDA and NVML may number GPUs differently: by UUID."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
            return Nvml(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        except pynvml.NVMLError:
            return None

    def sample(self) -> None:
        nvml, handle = self._nvml, self._handle
        self._samples.append(
            (
                float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
            )
        )

    def fields(self) -> dict[str, Any]:
        """Median clock and power, highest temperature and every reason seen, of the samples since the last call."""
        if not self._samples:
            return {}
        clocks, power, temperature, reasons = zip(*self._samples, strict=True)
        self._samples = []
        seen = [name for bit, name in self.REASONS.items() if any(r & bit for r in reasons)]
        return {
            "clock_mhz": statistics.median(clocks),
            "power_w": statistics.median(power),
            "temperature_c": max(temperature),
            "throttle": ", ".join(seen),
        }


def require(condition: object, reason: str) -> None:
    """Raise Unavailable with the reason where the condition does not hold."""
    if not condition:
        raise Unavailable(reason)
