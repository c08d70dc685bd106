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

# What the emulator cannot run yet.
_ATOMICS, _LIFETIME = "atomic operations", "mbarrier.inval, expect_tx"
_CLUSTERS, _ASYNC, _MAPS = "clusters: mapa, barrier.cluster, multicast", "cp.async", "tensormap.replace"
_REGISTERS = "the pool of registers, operands of wgmma in registers"
PENDING = {
    "counter without an atomic": _ATOMICS,
    "locks in two orders": _ATOMICS,
    "shared lock without fences": _ATOMICS,
    "reading a histogram without a barrier": _ATOMICS,
    "initialised twice": _LIFETIME,
    "used after its end": _LIFETIME,
    "arrive before expect": _LIFETIME,
    "sums changed in flight": _REGISTERS,
    "added to what was never zeroed": _REGISTERS,
    "A registers changed in flight": _REGISTERS,
    "more registers than there are": _REGISTERS,
    "registers never given back": _REGISTERS,
    "setmaxnreg by one warp": _REGISTERS,
    "cp.async without a wait": _ASYNC,
    "cp.async without a barrier": _ASYNC,
    "cp.async waits for too few groups": _ASYNC,
    "a stale tensor map": _MAPS,
} | {name: _CLUSTERS for name, bug in clusters.BUGS.items() if bug.cluster > 1}

NAMES = [
    pytest.param(name, marks=pytest.mark.skip(reason=f"pending: {PENDING[name]}")) if name in PENDING else name
    for name in BUGS
]


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


@pytest.mark.parametrize("name", NAMES)
def test_the_mistake_is_found(name: str) -> None:
    bug = BUGS[name]
    for seed in SEEDS:
        outcome = run(bug, True, seed)
        if outcome:
            assert "does not know" not in outcome, outcome
            assert any(word in outcome for word in bug.words), outcome
            return
    pytest.fail("the right result under every seed")


@pytest.mark.parametrize("name", NAMES)
def test_the_correction_is_right(name: str) -> None:
    for seed in SEEDS:
        outcome = run(BUGS[name], False, seed)
        assert not outcome, outcome


def test_pending_names_bugs() -> None:
    assert set(PENDING) <= set(BUGS)
