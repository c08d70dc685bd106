"""A Hopper GPU with the interface of ``emulator.Machine``, so that one test body runs a PTX text on both.

The emulator checks modules and arguments first. Tensor maps, several devices and concurrent launches are not offered.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import emulator

# Of cuda.h: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
# CU_JIT_ERROR_LOG_BUFFER and its _SIZE_BYTES, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
MAX_DYNAMIC_SHARED = 8
CLUSTER_DIMENSION = 4
ERROR_LOG = (5, 6)
CAPABILITY = (75, 76)
DEVICE = 0
_LOG_BYTES = 4096


class Attribute(ctypes.Structure):
    """CUlaunchAttribute with the cluster's extents as its value, a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("extents", ctypes.c_uint * 16))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Gpu:
    """One device, for what one launch at a time needs."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        """Raises OSError without a driver, and RuntimeError without a device."""
        self.driver = ctypes.CDLL(library)
        self._device = ctypes.c_int()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(self._device), DEVICE)

    def call(self, function: str, *arguments: Any) -> None:
        status = self.driver[function](*arguments)
        if status:
            raise RuntimeError(f"{function} failed with CUresult {status}")

    @property
    def capability(self) -> tuple[int, int]:
        values = (ctypes.c_int(), ctypes.c_int())
        for value, attribute in zip(values, CAPABILITY, strict=True):
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
        return values[0].value, values[1].value

    @functools.cached_property
    def _context(self) -> ctypes.c_void_p:
        """The one that torch uses."""
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        return context

    def load(self, ptx: str) -> dict[str, Kernel]:
        """The kernels of a PTX module by their names."""
        from emulator import Machine

        checked = Machine().load(ptx)
        self.call("cuCtxSetCurrent", self._context)
        module = _Module(self, ptx)
        return {name: Kernel(self, module, kernel) for name, kernel in checked.items()}


class _Module:
    """Unloaded when none of its kernels is left."""

    def __init__(self, gpu: Gpu, ptx: str) -> None:
        self.handle = ctypes.c_void_p()
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (ctypes.c_int * 2)(*ERROR_LOG)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        try:
            gpu.call("cuModuleLoadDataEx", ctypes.byref(self.handle), ptx.encode(), 2, options, values)
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {log.value.decode(errors='replace')}") from error
        weakref.finalize(self, gpu.driver.cuModuleUnload, self.handle).atexit = False


class Kernel:
    """As ``emulator.Kernel``."""

    def __init__(self, gpu: Gpu, module: _Module, checked: emulator.Kernel) -> None:
        self._gpu, self._module, self._checked = gpu, module, checked
        self._function = ctypes.c_void_p()
        gpu.call("cuModuleGetFunction", ctypes.byref(self._function), module.handle, checked.name.encode())

    def launch(
        self,
        grid: Sequence[int] | int = (1, 1, 1),
        block: Sequence[int] | int = (1, 1, 1),
        cluster: Sequence[int] | int = (1, 1, 1),
        shared_bytes: int = 0,
        args: Sequence[Any] = (),
    ) -> None:
        """Run to the end. Tensors and arrays are copied to the GPU and back."""
        from emulator import TensorMap
        from emulator.tensor_map import is_memory, memory_of

        if any(isinstance(arg, TensorMap) for arg in args):
            raise TypeError("a TensorMap holds an address of the host's memory")
        checked = self._checked.prepare(grid, block, cluster, shared_bytes, args)
        with ExitStack() as stack:
            memory = memory_of(checked.buffers)
            copies = {first: self._copy(first, nbytes, stack) for first, nbytes, _, _ in memory}
            arguments = list(checked.arguments)
            for i, arg in enumerate(args):
                address = int.from_bytes(arguments[i], "little")
                for first, nbytes, _, _ in memory:
                    if is_memory(arg) and first <= address < first + nbytes:
                        arguments[i] = (copies[first] + address - first).to_bytes(8, "little")
            self._run(checked, arguments)
            for first, nbytes, writable, _ in memory:
                if writable:
                    size = ctypes.c_size_t(nbytes)
                    self._gpu.call("cuMemcpyDtoH_v2", ctypes.c_void_p(first), ctypes.c_uint64(copies[first]), size)

    def _copy(self, first: int, nbytes: int, stack: ExitStack) -> int:
        """The address on the GPU of a copy, which lives as long as ``stack``."""
        address, size = ctypes.c_uint64(), ctypes.c_size_t(nbytes)
        self._gpu.call("cuMemAlloc_v2", ctypes.byref(address), size)
        stack.callback(self._gpu.driver.cuMemFree_v2, address)
        self._gpu.call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(first), size)
        return address.value

    def _run(self, checked: emulator.Launch, arguments: Sequence[bytes]) -> None:
        values = [ctypes.create_string_buffer(data, len(data)) for data in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        attribute = Attribute(CLUSTER_DIMENSION, b"", (ctypes.c_uint * 16)(*checked.cluster))
        clustered = checked.cluster != (1, 1, 1)
        extents = [(ctypes.c_uint * 3)(*value) for value in (checked.grid, checked.block)]
        config = Config(*extents, checked.shared_bytes, None, ctypes.pointer(attribute), int(clustered))
        self._gpu.call("cuFuncSetAttribute", self._function, MAX_DYNAMIC_SHARED, checked.shared_bytes)
        self._gpu.call("cuLaunchKernelEx", ctypes.byref(config), self._function, pointers, None)
        self._gpu.call("cuCtxSynchronize")


def unusable_reason(library: str = "libcuda.so.1") -> str | None:
    """None where there is a Hopper GPU."""
    try:
        capability = Gpu(library).capability
    except OSError:
        return "there is no NVIDIA driver"
    except RuntimeError as error:
        return f"the NVIDIA driver has no GPU: {error}"
    return None if capability == (9, 0) else "the GPU is sm_{}{}, not sm_90".format(*capability)
