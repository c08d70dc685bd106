"""The memory that the kernels of a Buffer's ranks let one another read and write, and who connects it.

Within one node it is torch's symmetric memory. Over several nodes it is a window of NCCL's in the communicator that the
process group has already: NVLink by its addresses, the rails by NCCL's device API. Handles of memory travel through the
process group, torch's or NCCL's own, and nowhere else. Neither has run on GPUs.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .agreement import tell
from .footprint import Layout
from .link import Link

# NCCL's windows that were not closed by all ranks together. Others may write there as long as the process lives.
_held: list[Windows] = []


@dataclass(eq=False)
class Windows:
    """Those of all ranks, as one of them sees them."""

    addresses: Tensor
    """int64 [ranks], on the GPU; 0 for those that only the network reaches."""
    own: Tensor
    """uint8: this rank's, zero at first."""
    keeps: object
    """What must live as long as the windows are used."""
    rail: str = "loopback"
    connection: _C.CommNccl | None = None

    @property
    def rail_constants(self) -> bytes:
        return b"" if self.connection is None else self.connection.constants

    def close(self) -> None:
        """Give back what ranks must give back together, when no kernel of any of them runs any more."""
        if self.connection is not None:
            self.connection.close()
            _held.remove(self)
            self.connection = None


def why_not(link: Link, layout: Layout) -> str:
    """'' if this rank can connect windows; else what is missing."""
    device = link.device
    if device.type != "cuda":
        return "kernels run on GPUs, the Buffer is on a CPU"
    reason = _C.gemm_sm90_unusable_reason(device.index or 0)
    if reason or layout.nodes == 1:
        return reason
    reason = _C.comm_nccl_unusable_reason()
    if not reason and _backend(link) is None:
        reason = "between nodes kernels need a process group of NCCL's, which this one is not"
    return reason


def connect(link: Link, layout: Layout, geometry: _C.CommGeometry) -> Windows:
    """Windows of ``geometry``, zero on all ranks. All ranks must come.

    Raises:
        RuntimeError: NCCL cannot; on the rank that it tells.
        PeerError: on the others.
    """
    made, problem = None, None
    try:
        made = _symmetric(link, geometry) if layout.nodes == 1 else _of_nccl(link, geometry)
        if link.device.type == "cuda":
            torch.cuda.synchronize(link.device)
    except Exception as error:  # whatever it is, the others wait to hear of it
        problem = error
    tell(link, "Buffer: windows", [], problem)  # after which all are zero
    assert made is not None
    return made


def _symmetric(link: Link, geometry: _C.CommGeometry) -> Windows:
    import torch.distributed._symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(geometry.window_bytes, dtype=torch.uint8, device=link.device)
    handle = symmetric_memory.rendezvous(own, link.group)
    own.zero_()
    return Windows(torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=link.device), own, handle)


def _of_nccl(link: Link, geometry: _C.CommGeometry) -> Windows:
    backend = _backend(link)
    own, pool = _nccl_memory(backend, geometry.window_bytes, link.device)
    connection = _C.CommNccl(communicator=backend._comm_ptr(), geometry=geometry, address=own.data_ptr())
    addresses = torch.tensor(connection.windows, dtype=torch.int64, device=link.device)
    made = Windows(addresses, own, pool, "nccl", connection)
    _held.append(made)
    return made


def _backend(link: Link) -> Any:
    """torch's end of NCCL in the group, None without. Sizes were agreed on through it, so it has a communicator."""
    with contextlib.suppress(RuntimeError):
        backend = link.group._get_backend(link.device)
        if hasattr(backend, "_comm_ptr"):
            return backend
    return None


def _nccl_memory(backend: Any, nbytes: int, device: torch.device) -> tuple[Tensor, object]:
    """Zeros that NCCL can register, and the pool that they are of."""
    pool = torch.cuda.MemPool(backend.mem_allocator)
    with torch.cuda.use_mem_pool(pool, device):
        return torch.zeros(nbytes, dtype=torch.uint8, device=device), pool
