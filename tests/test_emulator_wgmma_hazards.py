"""Misuse of wgmma on the emulator: registers and shared memory in flight, fences, groups, descriptors, warpgroups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from backends import backend_params
from matrix_model import decode
from wgmma_cases import COMMIT, FENCE, WAIT, Case, Form, Place, small_case

pytestmark = backend_params(["emulator"])[0].marks

MMA = "{mma}"
SEEDS = range(5)


def form(*steps: str, **options: Any) -> Form:
    return replace(Form("f32", "bf16", "bf16", n=16, steps=steps), **options)


def case_of(f: Form, mode: int = 1) -> Case:
    return small_case(f, (mode, mode), 0)


def assert_fails(case: Case, words: str) -> None:
    """Whatever the timing."""
    from emulator import EmulationError

    for seed in SEEDS:
        with pytest.raises(EmulationError, match=words):
            case.run(seed)


def assert_adds(case: Case, times: int) -> None:
    """The kernel is right, and adds the product so many times."""
    expected = decode("f32", case.c) + times * (decode("bf16", case.a) @ decode("bf16", case.b).T)
    for seed in SEEDS:
        np.testing.assert_array_equal(decode("f32", case.run(seed)), expected)


# wgmma of another shape that write registers of the first, or read them as A.
NARROW = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %x, %y, 1, 1, 1, 0, 0;"
READER = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%u0, %u1, %u2, %u3}, {%d0, %d1, %d2, %d3}, %y, 0, 1, 1, 0;"
)
IN_USE = r"register %{} is in use by the wgmma of line \d+, not waited for"
WAIT_1 = "wgmma.wait_group.sync.aligned 1;"

REGISTERS = {
    "D read": (form(FENCE, MMA, COMMIT, "add.s32 %t, %d3, 0;", WAIT), IN_USE.format("d3")),
    "D written": (form(FENCE, MMA, COMMIT, "mov.b32 %d7, 0;", WAIT), IN_USE.format("d7")),
    "D read while a group may be pending": (form(FENCE, MMA, COMMIT, WAIT_1, "mov.b32 %t, %d0;"), IN_USE.format("d0")),
    "D read but never committed": (form(FENCE, MMA, WAIT), IN_USE.format("d0")),
    "D read without any wait": (form(FENCE, MMA, COMMIT), IN_USE.format("d0")),
    "A written": (form(FENCE, MMA, COMMIT, "mov.b32 %a1, 0;", registers=True), IN_USE.format("a1")),
    "A read": (form(FENCE, MMA, COMMIT, "add.s32 %t, %a2, 0;", registers=True), IN_USE.format("a2")),
    "D of two shapes": (form(FENCE, MMA, NARROW, COMMIT, WAIT), IN_USE.format("d0")),
    "D read as A": (form(FENCE, MMA, READER, COMMIT, WAIT), IN_USE.format("d0")),
    "A written as D": (form(FENCE, READER, MMA, COMMIT, WAIT), IN_USE.format("d0")),
    "exit before the wait": (form(FENCE, MMA, COMMIT, "ret;"), "exits with wgmma in flight"),
    "exit before the commit": (form(FENCE, MMA, "ret;"), "exits with wgmma in flight"),
}
NO_FENCE = "no wgmma.fence since register %{} was last used"
FENCES = {
    "none": (form(MMA, COMMIT, WAIT), "no wgmma.fence before the first wgmma"),
    "D written": (form(FENCE, "mov.b32 %d2, 0;", MMA, COMMIT, WAIT), NO_FENCE.format("d2")),
    "D read": (form(FENCE, MMA, COMMIT, WAIT, "mov.b32 %t, %d5;", MMA, COMMIT, WAIT), NO_FENCE.format("d5")),
    "A written": (form(FENCE, "mov.b32 %a3, 0;", MMA, COMMIT, WAIT, registers=True), NO_FENCE.format("a3")),
    "another shape": (form(FENCE, NARROW, COMMIT, WAIT, MMA, COMMIT, WAIT), NO_FENCE.format("d0")),
    "D turns A": (form(FENCE, MMA, COMMIT, WAIT, READER, COMMIT, WAIT), NO_FENCE.format("d0")),
}


@pytest.mark.parametrize("name", REGISTERS)
def test_registers_in_flight(name: str) -> None:
    f, words = REGISTERS[name]
    assert_fails(case_of(f), words)


@pytest.mark.parametrize("name", FENCES)
def test_missing_fences(name: str) -> None:
    f, words = FENCES[name]
    assert_fails(case_of(f), words)


SKIPPED = ("setp.gt.u32 more, %t, 1000;", "@more mov.b32 %d0, 0;")
LEGAL = {
    "other registers": (form(FENCE, MMA, COMMIT, "add.s32 %u0, %t, 1;", WAIT), 1),
    "an access that no lane executes": (form(FENCE, MMA, COMMIT, *SKIPPED, WAIT), 1),
    "a fence after an access": (form(FENCE, MMA, COMMIT, WAIT, "mov.b32 %d0, %d0;", FENCE, MMA, COMMIT, WAIT), 2),
    "no fence without an access": (form(FENCE, MMA, COMMIT, WAIT, MMA, COMMIT, WAIT), 2),
    "groups of nothing": (form(COMMIT, WAIT, FENCE, COMMIT, MMA, COMMIT, COMMIT, WAIT), 1),
    "a group waited for last": (form(FENCE, MMA, COMMIT, MMA, COMMIT, WAIT_1, WAIT), 2),
    "a chain, from shared memory": (form(FENCE, *[MMA] * 3, COMMIT, MMA, COMMIT, WAIT), 4),
    "a chain that reads one fragment": (form(FENCE, *[MMA] * 3, COMMIT, MMA, COMMIT, WAIT, registers=True), 4),
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal(name: str) -> None:
    f, times = LEGAL[name]
    assert_adds(case_of(f), times)


def test_wait_group_leaves_seven_at_most() -> None:
    """Though 9 are allowed, the oldest of 8 is waited for, and its registers are free."""
    first = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%u0, %u1, %u2, %u3}, %x, %y, 0, 1, 1, 0, 0;"
    nine = "wgmma.wait_group.sync.aligned 9;"
    assert_adds(case_of(form(FENCE, first, COMMIT, *[MMA, COMMIT] * 7, nine, "mov.b32 %t, %u0;", WAIT)), 7)
    few = case_of(form(FENCE, first, COMMIT, *[MMA, COMMIT] * 6, nine, "mov.b32 %t, %u0;", WAIT))
    assert_fails(few, IN_USE.format("u0"))


DESCRIPTORS = {
    "reserved bit 14": (Place(1, 64, stride=1024, extra=1 << 14), "reserved bits"),
    "reserved bit 31": (Place(1, 64, stride=1024, extra=1 << 31), "reserved bits"),
    "reserved bit 46": (Place(1, 64, stride=1024, extra=1 << 46), "reserved bits"),
    "reserved bit 52": (Place(1, 64, stride=1024, extra=1 << 52), "reserved bits"),
    "reserved bit 61": (Place(1, 64, stride=1024, extra=1 << 61), "reserved bits"),
    "base offset": (Place(1, 64, stride=1024, extra=1 << 49), "a base offset is not emulated"),
    "second line, 128B": (Place(1, 64, start=128, stride=1024), "not in the first 128 bytes of a swizzle pattern"),
    "middle of the pattern, 128B": (Place(1, 64, start=512, stride=1024), "not in the first 128 bytes"),
    "over the end of the line, 128B": (Place(1, 64, start=112, stride=1024), "with room for 32"),
    "second line, 64B": (Place(2, 64, start=64, stride=512), "not in the first 64 bytes"),
    "second line, 32B": (Place(3, 64, start=32, stride=256), "not in the first 32 bytes"),
    "stride, 128B": (Place(1, 64, stride=1040), "stride byte offset of 1040 bytes is no multiple of the 1024"),
    "stride, 64B": (Place(2, 64, stride=256), "stride byte offset of 256 bytes is no multiple of the 512"),
    "leading, transposed": (Place(2, 64, True, leading=256, stride=512), "leading byte offset of 256 bytes is no mult"),
    "second line, transposed": (Place(1, 64, True, start=128, stride=1024), "with room for 128"),
    "out of bounds": (
        Place(0, 64, leading=1 << 13, stride=128, extra=0x2000),
        "A: out of bounds: 16 bytes at shared address .* lie outside",
    ),
}


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_descriptors(name: str) -> None:
    place, words = DESCRIPTORS[name]
    case = case_of(form(FENCE, MMA, COMMIT, WAIT, transposed=(int(place.transposed), 0)))
    assert_fails(replace(case, places=(place, case.places[1])), words)


@pytest.mark.parametrize(("mode", "start"), [(1, 16), (1, 32), (1, 96), (2, 32), (2, 1024 + 16), (3, 256)])
def test_starts_inside_the_first_line(mode: int, start: int) -> None:
    case = case_of(form(FENCE, MMA, COMMIT, WAIT), mode)
    case.places = (replace(case.places[0], start=start), case.places[1])
    assert_adds(case, 1)


@pytest.mark.parametrize("start", [32, 64, 96])
def test_starts_inside_the_first_line_along_n(start: int) -> None:
    """Of 16-bit elements along N, 16 take 32 of the 128 bytes."""
    case = case_of(form(FENCE, MMA, COMMIT, WAIT, transposed=(0, 1)))
    case.places = (case.places[0], replace(case.places[1], start=case.places[1].start + start))
    assert_adds(case, 1)


@pytest.mark.parametrize("late", ["", "fence.proxy.async.shared::cta;"])
def test_stores_without_a_proxy_fence(late: str) -> None:
    """One behind the wgmma is too late, whenever that runs."""
    words = r"the async proxy reads shared byte \d+, which thread \d+ wrote without a fence.proxy.async"
    assert_fails(case_of(form(FENCE, MMA, late, COMMIT, WAIT, proxy_fence=False)), words)


# The lane, the warp, and what is added to a descriptor.
LANE, WARP, ADD = "and.b32 %u0, %t, 31;", "shr.u32 %u0, %t, 5;", ("cvt.u64.u32 %o, %u0;", "add.s64 %x, %x, %o;")
WARPGROUPS = {
    "too few warps": (form(FENCE, MMA, COMMIT, WAIT, block=96), "the CTA has no warps 3 to 3"),
    "lanes differ": (form(FENCE, LANE, *ADD, MMA, COMMIT, WAIT), "lanes 0 and 1 give different descriptors"),
    "warps differ": (
        form(FENCE, WARP, *ADD, MMA, COMMIT, WAIT),
        "warp 1 executes line .*, or with other descriptors",
    ),
    "scale-d differs": (
        form(FENCE, WARP, "setp.ne.s32 p, %u0, 2;", MMA, COMMIT, WAIT),
        "warp 2 executes line .* than warp 0 of its warpgroup",
    ),
    "instructions differ": (
        form(FENCE, WARP, "setp.eq.s32 more, %u0, 3;", "@more bra L;", MMA, "bra J;", "L:", MMA, "J:", COMMIT, WAIT),
        "warp 3 executes line",
    ),
    "a guard of lanes": (form(FENCE, LANE, "setp.lt.s32 more, %u0, 9;", f"@more {MMA}"), "divergent"),
    "diverged lanes": (
        form(FENCE, LANE, "setp.lt.s32 more, %u0, 9;", "@more bra L;", MMA, COMMIT, WAIT, "L:"),
        "divergent|by all lanes of a warp",
    ),
    "a warp stays away": (
        form(FENCE, WARP, "setp.eq.s32 more, %u0, 1;", "@more bra L;", MMA, COMMIT, WAIT, "L:"),
        "warp 1 has exited without this wgmma, which was executed by warp 0",
    ),
}


@pytest.mark.parametrize("name", WARPGROUPS)
def test_warpgroups(name: str) -> None:
    f, words = WARPGROUPS[name]
    assert_fails(case_of(f), words)


BF16, E4M3 = "m64n8k16.f32.bf16.bf16", "m64n8k32.f32.e4m3.e4m3"
D, A = "{%d0, %d1, %d2, %d3}", "{%a0, %a1, %a2, %a3}"
UNKNOWN = [
    ("shape", "m64n20k32.f32.e4m3.e4m3", f"{D}, %x, %y, 1, 1, 1"),
    ("shape", "m64n8k16.f32.e4m3.e4m3", f"{D}, %x, %y, 1, 1, 1"),
    ("shape", "m64n264k32.f32.e4m3.e4m3", f"{D}, %x, %y, 1, 1, 1"),
    ("shape", "m64n0k32.f32.e4m3.e4m3", f"{D}, %x, %y, 1, 1, 1"),
    ("combination of types", "m64n8k16.f16.bf16.bf16", "{%d0, %d1}, %x, %y, 1, 1, 1, 0, 0"),
    ("combination of types", "m64n8k16.f32.bf16.f16", f"{D}, %x, %y, 1, 1, 1, 0, 0"),
    ("combination of types", "m64n8k32.f32.s8.s8", f"{D}, %x, %y, 1"),
    ("combination of types", "m64n8k32.satfinite.f32.e4m3.e4m3", f"{D}, %x, %y, 1, 1, 1"),
    ("modifier .sp", f"{E4M3}.sp", f"{D}, %x, %y, 1, 1, 1"),
    ("number of registers, which must be 4", E4M3, "{%d0, %d1}, %x, %y, 1, 1, 1"),
    ("number of registers, which must be 4", BF16, f"{D}, {{%a0, %a1}}, %y, 1, 1, 1, 0"),
    ("operand, which must be of registers", E4M3, "{%d0, _, %d2, %d3}, %x, %y, 1, 1, 1"),
    ("type of a register, which must have 32 bits", E4M3, "{%d0, %x, %d2, %d3}, %x, %y, 1, 1, 1"),
    ("register twice in one operand", E4M3, "{%d0, %d0, %d2, %d3}, %x, %y, 1, 1, 1"),
    ("register that is both accumulator and A", BF16, f"{D}, {D}, %y, 1, 1, 1, 0"),
    ("immediate 3", E4M3, f"{D}, %x, %y, 2, 1, 1"),
    ("immediate 4", E4M3, f"{D}, %x, %y, 1, 0, 1"),
    ("immediate 5", E4M3, f"{D}, %x, %y, 1, 1, %t"),
    ("immediate 7", BF16, f"{D}, %x, %y, 1, 1, 1, 0, 2"),
    ("scale-d, which is a predicate", E4M3, f"{D}, %x, %y, %t, 1, 1"),
    ("number of operands", E4M3, f"{D}, %x, %y, 1, 1, 1, 0, 0"),
    ("number of operands", BF16, f"{D}, {A}, %y, 1, 1, 1, 0, 0"),
    ("number of operands", BF16, f"{D}, %x, %y, 1, 1, 1"),
    ("number of operands", E4M3, f"{D}"),
]


@pytest.mark.parametrize(("what", "modifiers", "operands"), UNKNOWN)
def test_unknown_forms_are_refused(what: str, modifiers: str, operands: str) -> None:
    assert_refused(f"wgmma.mma_async.sync.aligned.{modifiers} {operands};", what)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("wgmma.wait_group.sync.aligned;", "number of operands"),
        ("wgmma.wait_group.sync.aligned %t;", "number of groups"),
        ("wgmma.wait_group.sync.aligned -1;", "number of groups"),
        ("wgmma.fence.aligned;", "wgmma"),
        ("wgmma.fence.sync.aligned.cta;", "modifier .cta"),
        ("wgmma.commit_group.sync.aligned 0;", "number of operands"),
        ("wgmma.mma_async.sp.sync.aligned.m64n8k64.f32.e4m3.e4m3;", "wgmma"),
        ("wgmma.sync.aligned;", "wgmma"),
    ],
)
def test_unknown_instructions_are_refused(text: str, what: str) -> None:
    assert_refused(text, what)


def assert_refused(text: str, what: str) -> None:
    from emulator import EmulationError, Machine

    with pytest.raises(EmulationError, match=f"does not know this {what}: {text.split()[0].rstrip(';')}"):
        Machine().load(form(text).ptx())
