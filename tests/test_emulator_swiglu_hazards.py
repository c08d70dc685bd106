"""The product with SwiGLU behind it broken on purpose, and launched to overlap with the grid before it.

What it shares with the plain product is broken in test_emulator_hazards.py; here is what its epilogue adds.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch
from backends import backend_params
from swiglu_backends import SwiGlu
from test_emulator_grouped import slices
from test_emulator_overlap import ENDS
from test_emulator_swiglu import ALONE, PAIR, Case, Outputs, case, expected_of, launched, plan, problem

from fastfp8 import _C
from fastfp8.backends import KERNELS
from fastfp8.counters import new_counters
from fastfp8.numerics import Counts, totals

pytestmark = backend_params(["emulator"])[0].marks

SEEDS = range(4)
# Groups with a ragged end, and one with two whole tiles: rows of warps and rows by TMA.
ENDS_OF_ROWS, F, K = [70, 396], 256, 272
OPTIONS = SwiGlu(limit=3.0)
BAR, READ = r"bar\.sync %r\d+, %r\d+;", r"cp\.async\.bulk\.wait_group\.read 0;"
# What is broken: (pattern, replacement, words of the report). None for words: wrong bits, or any report.
BROKEN: dict[str, tuple[str, str, str | None]] = {
    "no proxy fence before the TMA stores": (r"fence\.proxy\.async\.shared::cta;", "", "without a fence.proxy.async"),
    "no barrier between writers and the TMA stores": (BAR, "", "race"),
    "the panels of gate and up do not wait for each other": (rf"(?s)({READ}.*?){READ}", r"\1", "still being read"),
    "the codes do not wait for the last panel": (rf"(?s)(.*){READ}(.*?{READ})", r"\1\2", "still being read"),
    "swizzle of the staging forgotten": (r"xor\.b32 (\s*%r\d+, %r\d+), %r\d+;", r"or.b32 \1, 0;", None),
    "amax of a lane alone": (r"shfl\.sync\.bfly\.b32 (\s*%r\d+)\|%p\d+, (%r\d+), [^;]*;", r"mov.b32 \1, \2;", None),
    "gate is not rounded to BF16": (r"and\.b32 (\s*%r\d+, %r\d+), -65536;", r"and.b32 \1, -256;", None),
    "warps read others' rows too early": (r"bar\.warp\.sync\s+-1;", "", "race"),
    "counts of a lane alone": (r"redux\.sync\.add\.u32 (\s*%r\d+, %r\d+), [^;]*;", r"mov.b32 \1;", None),
    "counts stored, not added": (r"red\.relaxed\.gpu\.global\.add\.u64", "st.relaxed.gpu.global.u64", None),
}


@functools.cache
def given_and_expected() -> tuple[Case, Outputs, Counts]:
    used, counters = slices(ENDS_OF_ROWS), new_counters("cpu")
    given = case(ENDS_OF_ROWS[-1], used, F, K, 0)
    return given, expected_of(given, used, F, OPTIONS, counters), totals(counters)


def right(text: str | None, seed: int, config: str) -> bool:
    """Whether all outputs have the right bits, and the counts are right."""
    given, expected, counts = given_and_expected()
    ends, counters = torch.tensor(ENDS_OF_ROWS, dtype=torch.int32), new_counters("cpu")
    launch, read = plan(given, ends, OPTIONS, True, config, 2, counters)
    got = Outputs.make(ENDS_OF_ROWS[-1], F)
    launched(launch, {**read, "counters": counters}, got, seed, text)
    return got.same_memory(expected) and totals(counters) == counts


@pytest.mark.parametrize("config", [ALONE, PAIR])
def test_the_kernel_as_it_is(config: str) -> None:
    assert all(right(None, seed, config) for seed in SEEDS)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_shows(name: str) -> None:
    from emulator import EmulationError

    pattern, replacement, words = BROKEN[name]
    ptx = (KERNELS / "gemm_grouped_swiglu.ptx").read_text()
    begin = ptx.index(".entry gemm_sm90_grouped_swiglu_128x256(")
    end = ptx.find(".entry ", begin + 1)
    broken, count = re.subn(pattern, replacement, ptx[begin : end if end > 0 else None])
    assert count > 0, "the pattern is not in the kernel's PTX: nothing was broken"
    text = ptx[:begin] + broken + (ptx[end:] if end > 0 else "")
    found = []
    for seed in SEEDS:
        try:
            found.append("the right result" if right(text, seed, ALONE) else "wrong bits")
        except EmulationError as error:
            found.append(str(error))
        if words in found[-1] if words else found[-1] != "the right result":
            return
    pytest.fail(f"no seed shows it: {found}")


@pytest.mark.parametrize("waits", [True, False], ids=["as it is", "without waits"])
def test_ends_of_groups_may_come_from_the_grid_before(waits: bool) -> None:
    from emulator import EmulationError, Machine
    from emulator.plan import prepare_plan

    ptx = (KERNELS / "gemm_grouped_swiglu.ptx").read_text()
    if not waits:
        ptx = ptx.replace("griddepcontrol.wait;", "")
    used, options = slices([70, 100]), SwiGlu()
    given = case(100, used, 128, 144, 0)
    expected = expected_of(given, used, 128, options)
    found = []
    for seed in range(5):
        ends, machine, got = torch.zeros(2, dtype=torch.int32), Machine(seed), Outputs.make(100, 128)
        launch, read = plan(given, ends, options, True, None, 3)
        written = {name: output.tensor for name, output in got._asdict().items()}
        tensors = {**read, **written, "error": torch.zeros(1, dtype=torch.int32)}
        before = machine.load(ENDS)["ends"].prepare(1, 1, args=[ends])
        try:
            machine.launch_all([before, prepare_plan(launch, tensors, machine, ptx)])
        except EmulationError:
            found.append(False)
            continue
        found.append(got.same_memory(expected))
    assert all(found) == waits, found


def test_every_config_may_overlap() -> None:
    for groups in (0, 4):
        asked = problem(256, 512, 256, groups)
        assert all(_C.gemm_plan(asked, config).overlaps for config, _ in _C.gemm_candidates(asked))
