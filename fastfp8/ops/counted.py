"""Ops that can count what they did to values: each has a second overload, whose counters are arguments that it writes.

An overload of its own, because torch.compile cannot lower an op whose one mutable argument is None (seen in torch
2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import check_type, check_value

Function = TypeVar("Function", bound=Callable[..., Any])


def register(op: str, key: str) -> Callable[[Function], Function]:
    """Register a function for ``op``, and for its overload that counts, which gives it the counters by keyword.

    ``key`` is CPU, CUDA or "fake". The overload is "counted", of an overload "name" it is "name_counted".
    """

    def decorate(function: Function) -> Function:
        for name, of_name in ((op, function), (f"{op}_counted" if "." in op else f"{op}.counted", _telling(function))):
            if key == "fake":
                torch.library.register_fake(f"fastfp8::{name}")(function)
            else:
                torch.library.impl(f"fastfp8::{name}", key)(of_name)
        return function

    return decorate


def _telling(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, after which counters have a new version: who keeps one sees by it that they changed."""

    @functools.wraps(function)
    def call(*args: Any, **counters: Tensor) -> Any:
        found = function(*args, **counters)
        tell(counters.values())
        return found

    return call


def tell(counters: Iterable[Tensor]) -> None:
    """Give counters that were written a new version."""
    torch.autograd.graph.increment_version([t for t in counters if not t.is_inference()])


def check_each(op: str, counters: object, number: str, count: int) -> None:
    """Raise unless ``counters`` is None or ``count`` of them, in words ``number``; the op checks the tensors."""
    if counters is not None:
        check_type(counters, (tuple, list), op, "counters", f"{number}, one of each result, or None")
        assert isinstance(counters, (tuple, list))
        check_value(len(counters) == count, op, "counters", f"{number}, one of each result", f"{len(counters)}")


def check_pair(op: str, counters: object) -> None:
    """Raise unless ``counters`` is None or a pair."""
    check_each(op, counters, "a pair", 2)
