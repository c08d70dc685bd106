"""Counts of what quantisation did to values: how they are kept, and what each of them counts.

A tensor of counters is int64 [LANES, 5], and the counts are the sums of its columns (FIELDS). A program of a kernel
adds to row ``program % LANES``, one integer atomic a count for all that it quantises at a time, in CUDA C++ each warp
for itself. So not all of them meet at one address; sums of integers do not depend on their order. With
``p = x * multiplier``, the FP32 product that is rounded to a code:

============ ========================================================== ===========================================
field        elements                                                   so that
============ ========================================================== ===========================================
values       all that were quantised, without padding
saturated    ``abs(p) > 464``, infinities too                           the code is +-448 and stands for more: rounding
                                                                        alone would have given the next code, 480
underflowed  ``x`` is not 0 and ``abs(p) <= 2**-10``                    the code is zero
subnormal    ``2**-10 < abs(p) < 15 * 2**-10``                          the code has fewer than 3 bits of mantissa
nonfinite    ``x`` is an infinity or a NaN
============ ========================================================== ===========================================

The scale of a block comes from its own amax, so that no finite value saturates: of these ops ``saturated`` counts the
infinities. An ``x`` that another op computes first, as SwiGLU, is its FP32 result; of AdamW, the new master.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import check_device, check_tensor, value_error

FIELDS = ("values", "saturated", "underflowed", "subnormal", "nonfinite")
LANES = 32
# The ties to even between 448 and 480, 0 and 2^-9, and 7 * 2^-9 and 2^-6: the first two round down, the last up.
MOST, UNDERFLOWS, NORMAL = 464.0, 2.0**-10, 15 * 2.0**-10


def new_counters(device: torch.device | str) -> Tensor:
    """Zeros, for the argument ``counters`` of an op on ``device``."""
    return torch.zeros((LANES, len(FIELDS)), dtype=torch.int64, device=device)


def check_counters(op: str, counters: object, like: Tensor, like_name: str, name: str = "counters") -> None:
    """Raise unless ``counters`` is None or counters on the device of ``like``."""
    if counters is None:
        return
    check_tensor(counters, op, name, (torch.int64,))
    assert isinstance(counters, Tensor)
    if tuple(counters.shape) != (LANES, len(FIELDS)):
        expected = f"shape {(LANES, len(FIELDS))}, as fastfp8.numerics.new_counters makes them"
        raise value_error(op, name, expected, f"shape {tuple(counters.shape)}")
    if not counters.is_contiguous():
        raise value_error(op, name, "a contiguous tensor", f"stride {tuple(counters.stride())}")
    check_device(counters, op, name, like, like_name)


class Counted:
    """A module or an optimizer whose quantisations can be counted, each by its role: see :mod:`fastfp8.numerics`."""

    counters: dict[str, Tensor] | None = None

    def roles(self) -> dict[str, torch.device]:
        """What can be counted, and on which device each is quantised."""
        raise NotImplementedError
