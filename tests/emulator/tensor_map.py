"""Host tensors as the memory of the emulated devices, and tensor maps over them.

A map has the limits of cuTensorMapEncodeTiled (CUDA driver API) and the emulator's own encoding (src/tensor_map.h).
Interleaved layouts are not modelled.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .build import native

EmulationError = native().EmulationError

MAX_RANK = 5
MAX_BOX = 256
MAX_ELEMENT_STRIDE = 8
MAP_BYTES = 128
# Bytes of an element, whether it may be filled with NaN, and its number in src/tensor_map.h. FP8 travels as UINT8: the
# driver has no FP8 type.
ELEMENTS = {
    "uint8": (1, False, 0),
    "int8": (1, False, 0),
    "float8_e4m3fn": (1, False, 0),
    "float8_e5m2": (1, False, 0),
    "uint16": (2, False, 1),
    "int16": (2, False, 1),
    "float16": (2, True, 6),
    "bfloat16": (2, True, 10),
    "uint32": (4, False, 2),
    "int32": (4, False, 3),
    "float32": (4, True, 7),
    "uint64": (8, False, 4),
    "int64": (8, False, 5),
    "float64": (8, True, 9),
}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


class Buffer(NamedTuple):
    """The bytes from a tensor's first to its last element."""

    address: int  # of the element at index 0, which a negative stride puts behind others
    first: int  # address of the lowest byte
    nbytes: int
    writable: bool
    name: str  # for messages
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    owner: Any  # keeps the memory alive


def is_memory(value: object) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


def dtype_name(tensor: Any) -> str:
    """Without the module: 'float32', 'bfloat16', 'float8_e4m3fn', ... for torch, numpy and ml_dtypes alike."""
    return str(tensor.dtype).rpartition(".")[2] if isinstance(tensor, torch.Tensor) else str(tensor.dtype.name)


def buffer_of(tensor: Any, name: str) -> Buffer:
    """The buffer of a torch CPU tensor or a numpy array.

    Raises:
        TypeError: it is something else, or has no memory on the CPU.
    """
    if isinstance(tensor, torch.Tensor):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense CPU tensor, got one on {tensor.device} ({tensor.layout})")
        address, writable, size = tensor.data_ptr(), True, tensor.element_size()
        strides = tuple(stride * size for stride in tensor.stride())
    elif isinstance(tensor, np.ndarray):
        address, writable, size = tensor.ctypes.data, tensor.flags.writeable, tensor.itemsize
        strides = tuple(tensor.strides)
    else:
        raise TypeError(f"{name}: expected a torch CPU tensor or a numpy array, got {type(tensor).__name__}")
    sizes = tuple(tensor.shape)
    ends = [(extent - 1) * stride for extent, stride in zip(sizes, strides, strict=True)]
    first = address + sum(end for end in ends if end < 0)
    nbytes = size + sum(abs(end) for end in ends) if all(sizes) else 0
    shape = "x".join(map(str, sizes)) or "scalar"
    return Buffer(address, first, nbytes, writable, f"{name} ({dtype_name(tensor)} {shape})", sizes, strides, tensor)


def memory_of(buffers: Iterable[Buffer]) -> list[tuple[int, int, bool, str]]:
    """(address, bytes, writable, name) in order of address. Buffers that share bytes become one.

    Such a one is writable if one of them is: host code that passes the same memory twice may write through either.
    """
    merged: list[tuple[int, int, bool, str]] = []
    for buffer in sorted(buffers, key=lambda b: (b.first, b.nbytes)):
        if not buffer.nbytes:
            continue
        if merged and buffer.first < merged[-1][0] + merged[-1][1]:
            first, nbytes, writable, name = merged.pop()
            end = max(first + nbytes, buffer.first + buffer.nbytes)
            both = name if buffer.name in name.split(" and ") else f"{name} and {buffer.name}"
            merged.append((first, end - first, writable or buffer.writable, both))
        else:
            merged.append((buffer.first, buffer.nbytes, buffer.writable, buffer.name))
    return merged


def _check(ok: bool, what: str, expected: str, got: object) -> None:
    if not ok:
        raise EmulationError(f"TensorMap: {what}: expected {expected}, got {got}")


def _integers(values: Sequence[Any], what: str) -> list[int]:
    try:
        return [int(v.__index__()) for v in values]
    except (AttributeError, TypeError):
        raise EmulationError(f"TensorMap: {what}: expected integers, got {values!r}") from None


def encode(
    address: int,
    dtype: str,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int] | None = None,
    swizzle: int = 0,
    oob_fill: float = 0.0,
) -> bytes:
    """The 128 bytes of a map, all innermost dimension first. ``strides`` in bytes, of dimensions 1 and up.

    Raises:
        EmulationError: a limit of cuTensorMapEncodeTiled, by the name of its argument.
    """
    rank = len(dims)
    steps = [1] * rank if element_strides is None else _integers(element_strides, "elementStrides")
    box = _integers(box, "boxDim")
    _check(dtype in ELEMENTS, "tensorDataType", " or ".join(ELEMENTS), dtype)
    size, is_float, number = ELEMENTS[dtype]
    _check(1 <= rank <= MAX_RANK, "tensorRank", f"1 to {MAX_RANK}", rank)
    _check(address % 16 == 0, "globalAddress", "a multiple of 16", f"{address:#x}, {address % 16} bytes past one")
    for i, dim in enumerate(dims):
        _check(1 <= dim <= 1 << 32, f"globalDim[{i}]", "1 to 2^32", dim)
    assert len(strides) == rank - 1
    for i, stride in enumerate(strides):
        _check(stride % 16 == 0, f"globalStrides[{i}]", "a multiple of 16 bytes", stride)
        _check(0 <= stride < 1 << 40, f"globalStrides[{i}]", "at least 0 and below 2^40 bytes", stride)
    _check(len(box) == rank, "boxDim", f"one extent for each of the {rank} dimensions", box)
    for i, extent in enumerate(box):
        _check(1 <= extent <= MAX_BOX, f"boxDim[{i}]", f"1 to {MAX_BOX} elements", extent)
    inner = box[0] * size
    _check(inner % 16 == 0, "boxDim[0]", "a multiple of 16 bytes", f"{box[0]} elements of {size} bytes")
    _check(len(steps) == rank, "elementStrides", f"one for each of the {rank} dimensions", steps)
    for i, step in enumerate(steps):
        _check(1 <= step <= MAX_ELEMENT_STRIDE, f"elementStrides[{i}]", f"1 to {MAX_ELEMENT_STRIDE}", step)
    _check(swizzle in SWIZZLES, "swizzle", "0, 32, 64 or 128", swizzle)
    _check(not swizzle or inner <= swizzle, "boxDim[0]", f"at most the swizzle's {swizzle} bytes", f"{inner} bytes")
    fill_nan = math.isnan(oob_fill)
    _check(fill_nan or oob_fill == 0, "oobFill", "0.0 or nan", oob_fill)
    _check(
        is_float or not fill_nan, "oobFill", "0.0 where the element is no 16-, 32- or 64-bit float", f"nan of {dtype}"
    )

    def padded(values: Sequence[int], count: int, less: int) -> list[int]:
        return [v - less for v in values] + [0] * (count - len(values))

    steps[0] = 1  # what the driver ignores without interleave
    parts = [address, *padded(strides, MAX_RANK - 1, 0), *padded(dims, MAX_RANK, 1), *padded(box, MAX_RANK, 1)]
    parts += [*padded(steps, MAX_RANK, 1), rank - 1, number, 0, SWIZZLES[swizzle], fill_nan]
    return struct.pack("<Q4Q5I5H5B5B", *parts).ljust(MAP_BYTES, b"\0")


class TensorMap:
    """A map over a tensor, for a kernel parameter of 128 bytes.

    Args:
        tensor: torch CPU tensor or numpy array of up to 5 dimensions, the last of stride 1.
        box: elements that a copy moves, in the tensor's order of dimensions: outermost first.
        element_strides: in the same order; None is 1 for all.
        swizzle: 0, 32, 64 or 128 bytes.
        oob_fill: what loads put for elements outside of the tensor: 0.0, or nan for floating types wider than FP8.

    Raises:
        EmulationError: a limit of cuTensorMapEncodeTiled.
    """

    def __init__(
        self,
        tensor: Any,
        box: Sequence[int],
        element_strides: Sequence[int] | None = None,
        swizzle: int = 128,
        oob_fill: float = 0.0,
    ) -> None:
        buffer = buffer_of(tensor, "the tensor of a TensorMap")
        dims, strides = list(reversed(buffer.sizes)), list(reversed(buffer.strides))
        name = dtype_name(tensor)
        _check(1 <= len(dims) <= MAX_RANK, "tensorRank", f"1 to {MAX_RANK}", len(dims))
        _check(name in ELEMENTS, "tensorDataType", " or ".join(ELEMENTS), name)
        dense = dims[0] <= 1 or strides[0] == ELEMENTS[name][0]
        _check(dense, "tensor", "stride 1 in the last dimension", f"{strides[0]} bytes")
        steps = None if element_strides is None else list(reversed(element_strides))
        self.data = encode(buffer.address, name, dims, strides[1:], list(reversed(box)), steps, swizzle, oob_fill)
        self.buffer: Buffer | None = buffer
        self._text = f"{name}{buffer.sizes}, box={tuple(box)}, swizzle={swizzle}"

    @classmethod
    def from_bytes(cls, data: bytes, text: str) -> TensorMap:
        """A map that ``encode`` made. What memory it may reach must be listed with the launch."""
        made = cls.__new__(cls)
        made.data, made.buffer, made._text = data, None, text
        return made

    def __repr__(self) -> str:
        return f"TensorMap({self._text})"
