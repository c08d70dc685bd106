"""Machines, kernels and launches: what a host program does with a GPU."""

from __future__ import annotations

import math
import numbers
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from .build import native
from .tensor_map import MAP_BYTES, Buffer, TensorMap, buffer_of, is_memory, memory_of

EmulationError = native().EmulationError

MAX_THREADS = 1024
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = ((1 << 31) - 1, 65535, 65535)
MAX_CLUSTER = 16  # of them 8 are portable
MAX_SHARED = 227 * 1024
# Steps of the machine's seed from launch to launch: Knuth's MMIX generator, in 63 bits.
_SEED_FACTOR, _SEED_STEP, _SEED_MASK = 6364136223846793005, 1442695040888963407, (1 << 63) - 1


class Counters(SimpleNamespace):
    """What a launch did.

    Attributes:
        instructions: that warps executed; thread_instructions: lanes of them; opcodes: the former by opcode, as a dict.
        wgmma_flops: 2 for each product of a wgmma.
        tma_bytes: that bulk copies moved.
        global_sectors: of 32 bytes, that loads, stores and atomics of warps touched.
        shared_bank_conflicts: passes over the 32 banks beyond the first.
        warp_stalls: instructions that could not go on at once.
        stored_bytes: that store instructions wrote, by the address of the buffer, as a dict.
    """


@dataclass(frozen=True)
class Launch:
    """A kernel with all that a launch needs; made by ``Kernel.prepare``."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    arguments: list[bytes]
    device: int
    programmatic: bool
    buffers: list[Buffer]


def _extents(kernel: str, what: str, value: Sequence[int] | int, limits: Sequence[int]) -> tuple[int, int, int]:
    extents = (value,) if isinstance(value, int) else tuple(value)
    legal = 1 <= len(extents) <= 3 and all(isinstance(e, numbers.Integral) for e in extents)
    extents += (1,) * (3 - len(extents))
    if not legal or not all(1 <= e <= limit for e, limit in zip(extents, limits, strict=True)):
        raise EmulationError(f"{kernel}: {what}: expected up to three integers from 1 to {tuple(limits)}, got {value}")
    return int(extents[0]), int(extents[1]), int(extents[2])


def _encode_integer(where: str, value: int, kind: str, size: int) -> bytes:
    if kind[0] not in "usb" or size not in (1, 2, 4, 8):
        raise TypeError(f"{where}: expected {_wanted(kind, size)}, got the integer {value}")
    # C++ ints become .u32 parameters, so either sign is legal for any integer type.
    if not -(1 << (8 * size - 1)) <= value < 1 << (8 * size):
        raise EmulationError(f"{where}: expected {size} bytes (.{kind}), got {value}, which needs more")
    return (value % (1 << (8 * size))).to_bytes(size, "little")


def _encode_float(where: str, value: float, kind: str, size: int) -> bytes:
    if (kind, size) not in (("f32", 4), ("b32", 4), ("f64", 8), ("b64", 8)):
        raise TypeError(f"{where}: expected {_wanted(kind, size)}, got the float {value}")
    if size == 8:
        return struct.pack("<d", value)
    try:
        return struct.pack("<f", value)
    except OverflowError:
        raise EmulationError(f"{where}: expected .f32, got {value}, which is out of its range") from None


def _wanted(kind: str, size: int) -> str:
    if size == MAP_BYTES:
        return f"a TensorMap or {MAP_BYTES} bytes"
    if kind[0] == "f":
        return f"a float (.{kind})"
    if (kind, size) in (("u64", 8), ("s64", 8), ("b64", 8)):
        return f"a tensor, an array, None or an integer (.{kind})"
    return f"an integer (.{kind})" if size in (1, 2, 4) else f"{size} bytes (.{kind})"


def _encode(where: str, value: Any, kind: str, size: int) -> tuple[bytes, list[Buffer]]:
    """The bytes of one argument for a parameter of ``size`` bytes and type ``kind``, and the memory it gives access to.

    Raises:
        TypeError: a value of this type cannot be that parameter.
        EmulationError: the size does not match, or the value does not fit.
    """
    if isinstance(value, TensorMap):
        if size != MAP_BYTES:
            raise EmulationError(f"{where}: expected {_wanted(kind, size)}, got {value!r} of {MAP_BYTES} bytes")
        return value.data, [] if value.buffer is None else [value.buffer._replace(name=f"{where}, {value!r}")]
    if isinstance(value, (bytes, bytearray)):
        if len(value) != size:
            raise EmulationError(f"{where}: expected {size} bytes (.{kind}), got {len(value)} bytes")
        return bytes(value), []
    if value is None or is_memory(value):
        if (kind, size) not in (("u64", 8), ("s64", 8), ("b64", 8)):
            got = "None" if value is None else type(value).__name__
            raise TypeError(f"{where}: expected {_wanted(kind, size)}, got {got}")
        if value is None:
            return bytes(8), []
        buffer = buffer_of(value, where)
        return buffer.address.to_bytes(8, "little"), [buffer]
    if isinstance(value, numbers.Integral):
        return _encode_integer(where, int(value), kind, size), []
    if isinstance(value, numbers.Real):
        return _encode_float(where, float(value), kind, size), []
    raise TypeError(f"{where}: expected {_wanted(kind, size)}, got {type(value).__name__}")


class Kernel:
    """An entry of a loaded module."""

    def __init__(self, machine: Machine, module: Any, name: str) -> None:
        self.machine, self.name = machine, name
        self._module = module
        self._parameters: list[tuple[str, int]] = [(str(t).lstrip("."), int(n)) for t, n in module.parameters(name)]

    def __repr__(self) -> str:
        return f"Kernel({self.name})"

    def prepare(
        self,
        grid: Sequence[int] | int = (1, 1, 1),
        block: Sequence[int] | int = (1, 1, 1),
        cluster: Sequence[int] | int = (1, 1, 1),
        shared_bytes: int = 0,
        args: Sequence[Any] = (),
        device: int = 0,
        memory: Iterable[Any] = (),
        programmatic: bool = False,
    ) -> Launch:
        """A launch for ``Machine.launch_all``; it keeps its tensors alive.

        Args:
            grid, block, cluster: in CTAs, threads and CTAs.
            shared_bytes: of dynamic shared memory.
            args: for each parameter an int, a float, a torch CPU tensor or numpy array, None (a null pointer), a
                TensorMap, or the bytes of a structure.
            device: which runs it.
            memory: further tensors that the kernel may touch, as through an address within another one.
            programmatic: a programmatic dependent launch: may start when all CTAs of the launch before it on the
                device have executed griddepcontrol.launch_dependents, and waits by griddepcontrol.wait.

        Raises:
            TypeError, EmulationError: an argument is not what the kernel takes, or the launch is beyond sm_90's limits.
        """
        grid = _extents(self.name, "grid", grid, MAX_GRID)
        block = _extents(self.name, "block", block, MAX_BLOCK)
        cluster = _extents(self.name, "cluster", cluster, (MAX_CLUSTER,) * 3)
        self._check_launch(grid, block, cluster, shared_bytes, device)
        wanted = len(self._parameters)
        if len(args) != wanted:
            raise EmulationError(f"{self.name}: expected {wanted} arguments, got {len(args)}")
        arguments: list[bytes] = []
        buffers = [m if isinstance(m, Buffer) else buffer_of(m, f"memory {i}") for i, m in enumerate(memory)]
        for i, (value, (kind, size)) in enumerate(zip(args, self._parameters, strict=True)):
            data, reached = _encode(f"{self.name}: argument {i}", value, kind, size)
            arguments.append(data)
            buffers += reached
        return Launch(self, grid, block, cluster, shared_bytes, arguments, device, programmatic, buffers)

    def _check_launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        shared_bytes: int,
        device: int,
    ) -> None:
        checks = [
            (math.prod(block) <= MAX_THREADS, "block", f"at most {MAX_THREADS} threads", block),
            (math.prod(cluster) <= MAX_CLUSTER, "cluster", f"at most {MAX_CLUSTER} CTAs", cluster),
            (
                all(g % c == 0 for g, c in zip(grid, cluster, strict=True)),
                "grid",
                f"whole clusters of {cluster}",
                grid,
            ),
            (0 <= shared_bytes <= MAX_SHARED, "shared_bytes", f"0 to {MAX_SHARED}", shared_bytes),
            (0 <= device < self.machine.num_devices, "device", f"one of {self.machine.num_devices}", device),
        ]
        for ok, what, expected, got in checks:
            if not ok:
                raise EmulationError(f"{self.name}: {what}: expected {expected}, got {got}")

    def launch(
        self,
        grid: Sequence[int] | int = (1, 1, 1),
        block: Sequence[int] | int = (1, 1, 1),
        cluster: Sequence[int] | int = (1, 1, 1),
        shared_bytes: int = 0,
        args: Sequence[Any] = (),
        device: int = 0,
        memory: Iterable[Any] = (),
        programmatic: bool = False,
    ) -> Counters:
        """Run to the end; arguments as in ``prepare``."""
        prepared = self.prepare(grid, block, cluster, shared_bytes, args, device, memory, programmatic)
        return self.machine.launch_all([prepared])[0]


class Machine:
    """GPUs that share the host's memory.

    Args:
        seed: of all timing. ``seed`` is that of the next launch, and each launch steps it: the launches of a machine
            differ, those of two machines of one seed do not.
        num_devices: how many GPUs.
    """

    def __init__(self, seed: int = 0, num_devices: int = 1) -> None:
        if not 0 <= seed <= _SEED_MASK:
            raise EmulationError(f"Machine: expected a seed from 0 to 2^63 - 1, got {seed}")
        if num_devices < 1:
            raise EmulationError(f"Machine: expected at least one device, got {num_devices}")
        self.seed, self.num_devices = seed, num_devices

    def load(self, ptx_text: str) -> dict[str, Kernel]:
        """The kernels of a PTX module by their names.

        Raises:
            EmulationError: an instruction or a modifier that the emulator does not know, with its line.
        """
        return self.kernels_of(native().parse(ptx_text))

    def kernels_of(self, module: Any) -> dict[str, Kernel]:
        """As ``load``, of a module parsed already."""
        return {name: Kernel(self, module, name) for name in module.kernels}

    def launch_all(self, launches: Iterable[Launch | tuple[Kernel, Mapping[str, Any]]]) -> list[Counters]:
        """Run several launches at the same time, and return what each did.

        Args:
            launches: made by ``Kernel.prepare``, or kernels with the arguments of ``prepare`` as a dict.
        """
        prepared = [x if isinstance(x, Launch) else x[0].prepare(**x[1]) for x in launches]
        for x in prepared:
            if x.kernel.machine is not self:
                raise EmulationError(f"{x.kernel.name}: loaded by another machine")
        plain = [
            (
                x.kernel._module,
                x.kernel.name,
                x.grid,
                x.block,
                x.cluster,
                x.shared_bytes,
                x.arguments,
                x.device,
                x.programmatic,
            )
            for x in prepared
        ]
        memory = memory_of(buffer for x in prepared for buffer in x.buffers)
        seed, self.seed = self.seed, (self.seed * _SEED_FACTOR + _SEED_STEP) & _SEED_MASK
        try:
            counted, printed = native().launch(seed, plain, memory)
        except EmulationError as error:
            raise EmulationError(f"{error}\nTo run this launch again: Machine(seed={seed})") from error
        if printed:
            print(printed, end="")
        return [Counters(**counters) for counters in counted]
