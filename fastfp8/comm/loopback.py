"""All ranks of a geometry on one GPU, in one process: for tests of the kernels and their benchmark, not for work.

A launch has the CTAs of every rank, and memory stands for the links and the rails. All CTAs must run at the same time,
for they wait for each other.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import _C
from ..errors import check_value
from .kernels import Kernels

CTAS_OF_A_CHANNEL = 2


def loopback(geometry: _C.CommGeometry, device: torch.device | str, timeout: float = 10.0, **options: Any) -> Kernels:
    """Kernels whose tensors have the ranks as their first dimension; all of them have as many tokens.

    Args:
        device: a GPU with an SM for each CTA, or, with a ``launch`` that does without one, the CPU.
        options: of :class:`fastfp8.comm.kernels.Kernels`.

    Raises:
        ValueError: the GPU has too few SMs.
    """
    device, ranks = torch.device(device), geometry.ranks
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        check_fit(geometry, sms)
    windows = torch.zeros((ranks, geometry.window_bytes), dtype=torch.uint8, device=device)
    addresses = windows.data_ptr() + geometry.window_bytes * torch.arange(ranks)
    state = torch.zeros((ranks, geometry.state_words), dtype=torch.int32, device=device)
    kernels = Kernels(geometry, 0, addresses.to(device), state, timeout=timeout, **options)
    kernels.keeps = windows
    return kernels


def check_fit(geometry: _C.CommGeometry, sms: int) -> None:
    """A CTA of 512 threads takes the registers of an SM."""
    ctas = CTAS_OF_A_CHANNEL * geometry.channels * geometry.ranks
    fits = f"at most {sms} CTAs, one for each SM of the GPU"
    check_value(ctas <= sms, "comm.loopback", "geometry", fits, f"{ctas}, {geometry.channels} channels a rank")
