"""Errors that name the argument, what was expected of it, and what came.

The Python API promises ``ValueError`` and ``TypeError``; an operator called as ``torch.ops.fastfp8.*`` promises
``RuntimeError``, as every operator of torch does. The checks are the same, so the classes here are both.
"""

from __future__ import annotations

from typing import Any

import torch


class ArgumentValueError(ValueError, RuntimeError):
    """An argument of the right type has a value, shape, stride or device that the op cannot take."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument has the wrong Python type or dtype."""


def message(op: str, argument: str, expected: str, got: object) -> str:
    return f"fastfp8.{op}: argument '{argument}': expected {expected}, got {got}"


def value_error(op: str, argument: str, expected: str, got: object) -> ArgumentValueError:
    """To be raised where a check fails. On hot paths, so that the message is only built then."""
    return ArgumentValueError(message(op, argument, expected, got))


def check_value(condition: Any, op: str, argument: str, expected: str, got: object) -> None:
    """Raise ArgumentValueError unless ``condition`` holds."""
    if not condition:
        raise value_error(op, argument, expected, got)


def check_type(value: Any, kind: type | tuple[type, ...], op: str, argument: str, expected: str) -> None:
    """Raise ArgumentTypeError unless ``value`` is of ``kind``."""
    if not isinstance(value, kind):
        raise ArgumentTypeError(message(op, argument, expected, f"{type(value).__name__} {value!r:.40}"))


def check_tensor(
    value: Any, op: str, argument: str, dtypes: tuple[torch.dtype, ...], dim: int | tuple[int, ...] = 2
) -> None:
    """Raise unless ``value`` is a strided tensor of ``dim`` dimensions (one of them) and of one of ``dtypes``."""
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(message(op, argument, "a torch.Tensor", type(value).__name__))
    if value.dtype not in dtypes:
        names = " or ".join(str(d) for d in dtypes)
        raise ArgumentTypeError(message(op, argument, f"dtype {names}", value.dtype))
    dims = (dim,) if isinstance(dim, int) else dim
    if value.dim() not in dims:
        expected = " or ".join(map(str, dims)) + (" dimension" if dims == (1,) else " dimensions")
        raise value_error(op, argument, expected, f"shape {tuple(value.shape)}")
    # Dynamo cannot trace the question in a backward; in the ops themselves nothing else than strided arrives then.
    if not torch.compiler.is_compiling() and value.layout != torch.strided:
        raise value_error(op, argument, "a dense (strided) tensor", f"layout {value.layout}")


def check_dtype(value: Any, op: str, argument: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless ``value`` is one of ``dtypes``."""
    if not isinstance(value, torch.dtype) or value not in dtypes:
        names = " or ".join(str(d) for d in dtypes)
        raise ArgumentTypeError(message(op, argument, names, value))


def check_device(value: torch.Tensor, op: str, argument: str, like: torch.Tensor, like_name: str) -> None:
    if value.device != like.device:
        raise value_error(op, argument, f"device {like.device}, where '{like_name}' is", value.device)
