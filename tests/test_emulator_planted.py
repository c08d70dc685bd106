"""Planted bugs: the emulator reports each real-world mistake, and its corrected twin computes the right result."""

from __future__ import annotations

import numpy as np
import pytest
from backends import backend_params
from planted import clusters, copies, global_memory, mbarriers, tensor_core, threads
from planted.program import COLUMNS, ROWS, WRONG_DATA, Array, Bug

pytestmark = backend_params(["emulator"])[0].marks

SEEDS = range(20)
BUGS: dict[str, Bug] = {}
for family in (threads, global_memory, mbarriers, copies, tensor_core, clusters):
    BUGS |= family.BUGS


def output() -> Array:
    """Zeros at a multiple of 128 bytes: a kernel may put a tensor map there."""
    room = np.zeros((ROWS + 1) * COLUMNS, np.uint32)
    first = -room.ctypes.data % 128 // room.itemsize
    return room[first : first + ROWS * COLUMNS].reshape(ROWS, COLUMNS)


def run(bug: Bug, wrong: bool, seed: int) -> str:
    """The report; or WRONG_DATA; or "" where all is right."""
    from emulator import EmulationError, Machine, TensorMap

    a = bug.data()
    before = a.copy()
    d = output()
    box, swizzle = bug.box[not wrong], bug.swizzle[not wrong]
    maps = [TensorMap(x, box, swizzle=swizzle) if x.dtype == a.dtype else bytes(128) for x in (a, d)]
    machine = Machine(seed, bug.devices)
    launch = {"grid": bug.grid, "block": bug.block, "cluster": bug.cluster, "args": [d, a, *maps]}
    try:
        kernels = [machine.load(bug.text(wrong, device))["kernel"] for device in range(bug.devices)]
        machine.launch_all([(kernel, launch | {"device": device}) for device, kernel in enumerate(kernels)])
    except EmulationError as error:
        return str(error)
    assert np.array_equal(a, before)
    expected = np.zeros(d.size, np.uint32)
    result: Array = bug.expected(a)
    expected[: result.size] = result
    return "" if np.array_equal(d.reshape(-1), expected) else WRONG_DATA


@pytest.mark.parametrize("name", BUGS)
def test_the_mistake_is_found(name: str) -> None:
    bug = BUGS[name]
    for seed in SEEDS:
        outcome = run(bug, True, seed)
        if outcome:
            assert "does not know" not in outcome, outcome
            assert any(word in outcome for word in bug.words), outcome
            return
    pytest.fail("the right result under every seed")


@pytest.mark.parametrize("name", BUGS)
def test_the_correction_is_right(name: str) -> None:
    for seed in SEEDS:
        outcome = run(BUGS[name], False, seed)
        assert not outcome, outcome
