"""What the benchmarks borrow from ``tests/`` and ``build_support/``: the emulator, compilers, pretended libraries."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

from .case import Unavailable

FOLDERS = [str(Path(__file__).resolve().parents[1] / name) for name in ("tests", "build_support")]


@functools.cache
def _import(name: str) -> ModuleType | str:
    """The module, or why there is none: a build that failed is not tried again."""
    sys.path += [folder for folder in FOLDERS if folder not in sys.path]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"{error.name or error} is not installed"
    # A build that fails raises an error of the very package that cannot be imported then.
    except Exception as error:
        return f"{name} cannot be built: {error}".splitlines()[0]


def borrow(name: str) -> ModuleType:
    """A module of ``tests/`` or ``build_support/``.

    Raises:
        Unavailable: something that it needs is not there.
    """
    found = _import(name)
    if isinstance(found, str):
        raise Unavailable(found)
    return found
