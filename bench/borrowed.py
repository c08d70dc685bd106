"""What the benchmarks borrow from ``tests/``: the emulator, and what compiles Triton's kernels without a GPU."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

from .case import Unavailable

TESTS = Path(__file__).resolve().parents[1] / "tests"


@functools.cache
def _import(name: str) -> ModuleType | str:
    """The module, or why there is none: a build that failed is not tried again."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"{error.name or error} is not installed"
    # A build that fails raises an error of the very package that cannot be imported then.
    except Exception as error:
        return f"{name} cannot be built: {error}".splitlines()[0]


def borrow(name: str) -> ModuleType:
    """A module of ``tests/``.

    Raises:
        Unavailable: something that it needs is not there.
    """
    found = _import(name)
    if isinstance(found, str):
        raise Unavailable(found)
    return found
