"""The machine that the cases of single instructions run on: the emulator, or for a while a Hopper GPU.

A test takes its machine from ``machine`` and says ``@silicon_too`` if its expectations hold on silicon as well, which
is not so of errors, of timing, and of what only the emulator makes a rule. tests/test_silicon.py runs all of those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any

from silicon import Gpu

if TYPE_CHECKING:
    from emulator import Machine

Test = Callable[..., None]
ALSO_ON_SILICON: list[Test] = []
_others: list[Machine | Gpu] = []  # than the emulator as it starts; the last is in use


def silicon_too(test: Test) -> Test:
    ALSO_ON_SILICON.append(test)
    return test


@contextmanager
def on(other: Machine | Gpu) -> Iterator[None]:
    """Cases run on ``other``, as what they are on silicon."""
    _others.append(other)
    try:
        yield
    finally:
        _others.pop()


def on_silicon() -> bool:
    return bool(_others)


def machine(seed: int = 0) -> Machine | Gpu:
    """What this case runs on; the seed is the emulator's."""
    from emulator import Machine

    return _others[-1] if _others else Machine(seed)


def cases(test: Test) -> Iterator[dict[str, Any]]:
    """The arguments of a parametrised test, case by case."""
    choices = []
    for mark in getattr(test, "pytestmark", []):
        names, values = mark.args
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        choices.append([dict(zip(names, value if len(names) > 1 else (value,), strict=True)) for value in values])
    for chosen in product(*choices):
        yield functools.reduce(lambda a, b: a | b, chosen, {})


def run_all(tests: Iterable[Test]) -> None:
    """Each case of each test. The error tells of every test how many fail, and of the first one why."""
    reports = []
    for test in tests:
        failures: list[tuple[dict[str, Any], Exception]] = []
        every = list(cases(test))
        for case in every:
            try:
                test(**case)
            except Exception as error:
                failures.append((case, error))
        if failures:
            case, first = failures[0]
            reports.append(
                f"{test.__name__}: {len(failures)} of {len(every)} cases fail, the first with {case}: {first}"
            )
    assert not reports, "\n".join(reports)
