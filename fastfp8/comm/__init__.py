"""Dispatch and combine: tokens to the ranks of their experts, and the weighted sums back (expert parallelism).

:mod:`fastfp8.reference.comm` defines order and bits. ``python -m fastfp8.comm.demo`` shows it on real routing,
:mod:`fastfp8.comm.timeline` what the kernels' warps do when.
"""

from .buffer import Buffer
from .errors import Overflow, PeerError, Timeout
from .footprint import Memory, memory
from .handle import Handle

__all__ = ["Buffer", "Handle", "Memory", "Overflow", "PeerError", "Timeout", "memory"]
