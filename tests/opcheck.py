"""``torch.library.opcheck`` for ops with FP8 arguments and padded scales.

Two things in torch 2.11 to 2.13 are corrected, in ``corrected`` alone; ``tests/test_registration.py`` shows that both
are still needed. ``test_schema`` compares arguments by ``torch.allclose``, which does not know float8. And
``test_aot_dispatch_dynamic`` hands the op a ``torch.clone`` of each argument, which drops the padding of a scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@contextlib.contextmanager
def corrected() -> Iterator[None]:
    """torch.allclose compares float8 as float32, and torch.clone keeps strides, within."""
    allclose, clone = torch.allclose, torch.clone

    def wide(t: Tensor) -> Tensor:
        return t.float() if t.dtype == torch.float8_e4m3fn else t

    def wide_allclose(left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> bool:
        return allclose(wide(left), wide(right), *args, **kwargs)

    def padded_clone(t: Tensor) -> Tensor:
        # Rows that share memory (stride 0) cannot be written one by one.
        if 0 in t.stride():
            return clone(t)
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)

    torch.allclose, torch.clone = wide_allclose, padded_clone  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.allclose, torch.clone = allclose, clone


def opcheck(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, utils: Sequence[str] = ALL) -> None:
    """Run the checks ``utils`` of torch on ``op(*args, **kwargs)``; raises for the first that fails."""
    with corrected():
        torch.library.opcheck(op, args, kwargs or {}, test_utils=utils)
