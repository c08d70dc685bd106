"""A GPU with the interface of ``emulator.Machine``, so that one test body runs a PTX text on both and compares.

It talks to libcuda in torch's context. Tensor maps, several devices and concurrent launches are not offered.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


def unusable_reason() -> str | None:
    """None where there is a Hopper GPU."""
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if torch.cuda.get_device_capability()[0] != 9:
        return "the GPU is no sm_90"
    return None


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with the cluster's extents as its value."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("extents", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what} failed with CUresult {status}")


def _triple(extents: Sequence[int] | int) -> tuple[int, ...]:
    given = (extents,) if isinstance(extents, int) else tuple(extents)
    return given + (1,) * (3 - len(given))


class Kernel:
    """As ``emulator.Kernel``."""

    def __init__(self, gpu: Gpu, function: ctypes.c_void_p, parameters: Sequence[tuple[str, int]]) -> None:
        self._gpu, self._function, self._parameters = gpu, function, parameters

    def launch(
        self,
        grid: Sequence[int] | int = (1, 1, 1),
        block: Sequence[int] | int = (1, 1, 1),
        cluster: Sequence[int] | int = (1, 1, 1),
        shared_bytes: int = 0,
        args: Sequence[Any] = (),
    ) -> None:
        """Run to the end. Tensors and arrays are copied to the GPU and back."""
        copies: list[tuple[Any, torch.Tensor]] = []
        values = [self._value(arg, *kind, copies) for arg, kind in zip(args, self._parameters, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(v, ctypes.c_void_p) for v in values))
        attribute = _Attribute(_CLUSTER_DIMENSION, b"", (ctypes.c_uint * 16)(*_triple(cluster)))
        clustered = _triple(cluster) != (1, 1, 1)
        config = _Config(
            (ctypes.c_uint * 3)(*_triple(grid)),
            (ctypes.c_uint * 3)(*_triple(block)),
            shared_bytes,
            None,
            ctypes.pointer(attribute),
            int(clustered),
        )
        driver = self._gpu.driver
        _check(driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared_bytes), "cuFuncSetAttribute")
        _check(driver.cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None), "cuLaunchKernelEx")
        torch.cuda.synchronize()
        for host, device in copies:
            if isinstance(host, np.ndarray):
                host[...] = device.cpu().numpy().view(host.dtype).reshape(host.shape)
            else:
                host.copy_(device)

    def _value(self, arg: Any, kind: str, size: int, copies: list[tuple[Any, torch.Tensor]]) -> Any:
        """The argument in memory of its parameter's size."""
        if isinstance(arg, np.ndarray):
            copies.append((arg, torch.from_numpy(np.ascontiguousarray(arg).view(np.uint8).reshape(-1)).cuda()))
            arg = copies[-1][1].data_ptr()
        elif isinstance(arg, torch.Tensor):
            copies.append((arg, arg.cuda()))
            arg = copies[-1][1].data_ptr()
        if isinstance(arg, float):
            data = np.array(arg, np.float32 if size == 4 else np.float64).tobytes()
        elif isinstance(arg, (bytes, bytearray)):
            data = bytes(arg)
        else:
            data = (int(arg or 0) % (1 << (8 * size))).to_bytes(size, "little")
        if len(data) != size:
            raise TypeError(f"expected {size} bytes (.{kind}), got {len(data)}")
        return (ctypes.c_char * size).from_buffer_copy(data)


class Gpu:
    """As ``emulator.Machine``, for what one launch at a time needs."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")  # makes the context current
        self.driver = ctypes.CDLL("libcuda.so.1")

    def load(self, ptx: str) -> dict[str, Kernel]:
        """The kernels of a PTX module by their names."""
        from emulator.build import native

        parsed = native().parse(ptx)
        module = ctypes.c_void_p()
        _check(self.driver.cuModuleLoadData(ctypes.byref(module), ptx.encode()), "cuModuleLoadData")
        kernels = {}
        for name in parsed.kernels:
            function = ctypes.c_void_p()
            _check(self.driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
            kernels[name] = Kernel(self, function, parsed.parameters(name))
        return kernels
