"""Executes a fastfp8 LaunchPlan, as csrc/common/driver.cpp does on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from fastfp8 import _C
from fastfp8.backends import KERNELS

from .build import native
from .kernel import Counters, EmulationError, Launch, Machine
from .tensor_map import MAP_BYTES, Buffer, TensorMap, buffer_of, dtype_name, encode


@functools.cache
def _parsed(module: str) -> Any:
    return native().parse((KERNELS / f"{module}.ptx").read_text())


def _tensor_map(slot: _C.TensorMapSlot, buffer: Buffer) -> TensorMap:
    name = dtype_name(buffer.owner)
    if name != slot.dtype:
        raise EmulationError(f"tensor map of '{slot.slot}': expected dtype {slot.dtype}, got {name}")
    data = encode(buffer.address, slot.dtype, slot.dims, [slot.pitch], slot.box, None, slot.swizzle)
    return TensorMap.from_bytes(data, repr(slot))


def prepare_plan(
    plan: _C.LaunchPlan,
    tensors: Mapping[str, Any],
    machine: Machine,
    ptx: str | None = None,
    device: int = 0,
    memory: Iterable[Any] = (),
) -> Launch:
    """The launch of ``plan`` on CPU tensors from its kernel's PTX, for ``Machine.launch_all``.

    As in the driver, a map says what the plan says, not what the tensor is: one that reaches beyond its tensor is an
    error where the kernel reads or writes there.

    Args:
        plan: from a planner of ``fastfp8._C``.
        tensors: a torch CPU tensor for each slot of the plan; others are ignored.
        machine: where it will run.
        ptx: text to run in place of the built module's, for kernels broken on purpose.
        device: which runs it.
        memory: further tensors that it may touch, as through addresses in a tensor.
    """
    buffers: dict[str, Buffer] = {}

    def bound(slot: str) -> Buffer:
        if tensors.get(slot) is None:
            raise EmulationError(f"{plan.kernel}: no tensor is bound to slot '{slot}'")
        if slot not in buffers:
            buffers[slot] = buffer_of(tensors[slot], f"{plan.kernel}: '{slot}'")
        return buffers[slot]

    args: list[Any] = []
    for argument in plan.arguments:
        if isinstance(argument, _C.TensorMapSlot):
            args.append(bytes(MAP_BYTES) if argument.slot is None else _tensor_map(argument, bound(argument.slot)))
        elif isinstance(argument, _C.TensorSlot):
            args.append(None if argument.slot is None else bound(argument.slot).address)
        else:
            args.append(argument)
    kernels = machine.kernels_of(_parsed(plan.module)) if ptx is None else machine.load(ptx)
    kernel = kernels[plan.kernel]
    return kernel.prepare(
        plan.grid,
        plan.block,
        plan.cluster,
        plan.shared_bytes,
        args,
        device,
        [*buffers.values(), *memory],
        plan.overlaps,
    )


def run_plan(
    plan: _C.LaunchPlan, tensors: Mapping[str, Any], machine: Machine | None = None, ptx: str | None = None
) -> Counters:
    """Run the kernel of ``plan`` to its end; as ``prepare_plan``, where no machine is a new one."""
    machine = Machine() if machine is None else machine
    return machine.launch_all([prepare_plan(plan, tensors, machine, ptx)])[0]
