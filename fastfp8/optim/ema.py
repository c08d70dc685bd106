"""A moving average of the parameters in CPU memory, made while the next step runs (DeepSeek-V3 report, 3.2.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..errors import check_type, check_value

_OP = "optim.EMA"


class EMA:
    """``average = decay * average + (1 - decay) * parameter`` in FP32 after each step, and no step waits for it.
    Bit for bit ``average.lerp_(parameter, 1 - decay)``.

    A thread does the work. What it reads is safe, for the next ``optimizer.step()`` first waits until all is read: on a
    GPU, its stream waits for the copies to pinned memory, which go over a stream of their own, and the host does not;
    on a CPU, the thread reads the parameters themselves, and the step waits for it. It has forward and backward for
    that. A parameter that has an FP32 master in the state of the optimizer, as a bfloat16 one of
    :class:`fastfp8.optim.AdamW` does, is averaged from that.

    Args:
        model: whose parameters that need a gradient are averaged, from their values now. Shared ones once.
        optimizer: each step of which is followed by an update. Make it first.
        decay: from 0 to 1.

    It counts ``steps``. ``close()`` ends it; so does ``with``.

    Raises:
        TypeError, ValueError: an argument is of another type or out of its range.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, decay: float = 0.999) -> None:
        check_type(model, torch.nn.Module, _OP, "model", "a torch.nn.Module")
        check_type(optimizer, torch.optim.Optimizer, _OP, "optimizer", "a torch.optim.Optimizer")
        check_type(decay, (float, int), _OP, "decay", "a number")
        check_value(0 <= decay <= 1, _OP, "decay", "a number from 0 to 1", decay)
        self.decay, self.steps = float(decay), 0
        self._model, self._optimizer = model, optimizer
        self._params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._averages = {
            name: self._source(param).detach().float().cpu().clone() for name, param in self._params.items()
        }
        self._staged = {name: _pinned(param) for name, param in self._params.items() if param.is_cuda}
        devices = {param.device for param in self._params.values() if param.is_cuda}
        self._streams = {device: torch.cuda.Stream(device) for device in devices}  # type: ignore[no-untyped-call]
        self._copied: list[torch.cuda.Event] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastfp8-ema")
        self._work: Future[None] | None = None
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._release()),
            optimizer.register_step_post_hook(lambda *_: self._update()),
        ]

    def wait(self) -> None:
        """Until the averages are those of the last step. Raises what went wrong in the thread."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def averages(self) -> dict[str, Tensor]:
        """float32 in CPU memory, by the name of the parameter, of the last step: not copies, and the next step changes
        them."""
        self.wait()
        return dict(self._averages)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[torch.nn.Module]:
        """The model with the averages in place of its parameters, which come back afterwards. No step in between."""
        self.wait()
        kept = {name: param.detach().clone() for name, param in self._params.items()}
        try:
            for name, param in self._params.items():
                param.copy_(self._averages[name])
            yield self._model
        finally:
            for name, param in self._params.items():
                param.copy_(kept[name])

    def state_dict(self) -> dict[str, Any]:
        """``decay``, ``steps`` and ``averages``, of the last step; the tensors are copies."""
        return {
            "decay": self.decay,
            "steps": self.steps,
            "averages": {name: average.clone() for name, average in self.averages().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict()``. Raises ValueError where its parameters are others."""
        self.wait()
        given = {name: tuple(t.shape) for name, t in state["averages"].items()}
        expected = {name: tuple(t.shape) for name, t in self._averages.items()}
        differing = sorted(name for name in given.keys() | expected.keys() if given.get(name) != expected.get(name))
        check_value(not differing, f"{_OP}.load_state_dict", "state", "the averages of this model", differing)
        self.decay, self.steps = float(state["decay"]), int(state["steps"])
        for name, average in state["averages"].items():
            self._averages[name].copy_(average)

    def close(self) -> None:
        """Wait, and follow the optimizer no longer. Raises what went wrong in the thread."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> EMA:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _source(self, param: Tensor) -> Tensor:
        master = self._optimizer.state.get(param, {}).get("master")
        return param if master is None else master

    def _release(self) -> None:
        """Before a step: parameters may be written once this returns, in the order of the current streams."""
        for event in self._copied:
            torch.cuda.current_stream(event.device).wait_event(event)
        self._copied.clear()
        if any(not param.is_cuda for param in self._params.values()):
            self.wait()

    @torch.no_grad()
    def _update(self) -> None:
        """After a step."""
        self.wait()  # what is staged may be written again; it had a whole step for it
        self.steps += 1
        sources = {name: self._source(param).detach() for name, param in self._params.items()}
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for name, staged in self._staged.items():
                    if sources[name].device == device:
                        staged.copy_(sources[name], non_blocking=True)
                        sources[name].record_stream(stream)
                self._copied.append(stream.record_event())
        events, sources = list(self._copied), {**sources, **self._staged}
        self._work = self._thread.submit(self._average, events, sources)

    @torch.no_grad()
    def _average(self, events: list[torch.cuda.Event], sources: dict[str, Tensor]) -> None:
        for event in events:
            event.synchronize()
        for name, average in self._averages.items():
            average.lerp_(sources[name].float(), 1 - self.decay)


def _pinned(param: Tensor) -> Tensor:
    return torch.empty(param.shape, dtype=torch.float32, pin_memory=True)
