"""The cases of single instructions on a Hopper GPU, and what runs them there, against a pretended libcuda."""

from __future__ import annotations

import ctypes
import gc
import importlib
import struct
import subprocess
from pathlib import Path

import build_kernels as build
import numpy as np
import pytest
import silicon
from backends import backend_params
from emulator_lanes import Case, check
from machines import ALSO_ON_SILICON, machine, on, on_silicon, run_all
from silicon import Attribute, Config, Gpu

pytestmark = backend_params(["emulator"])[0].marks

FAMILIES = (
    "integer",
    "bits",
    "compare",
    "float",
    "convert",
    "instructions",
    "warp",
    "atomics",
    "mma",
    "wgmma",
    "control",
)
for family in FAMILIES:
    importlib.import_module(f"test_emulator_{family}")
NO_HOPPER = silicon.unusable_reason()


@pytest.mark.hopper
@pytest.mark.skipif(NO_HOPPER is not None, reason=f"silicon: {NO_HOPPER}")
@pytest.mark.parametrize("family", FAMILIES)
def test_silicon_agrees(family: str) -> None:
    with on(Gpu()):
        run_all(test for test in ALSO_ON_SILICON if test.__module__ == f"test_emulator_{family}")


def test_every_family_has_cases_for_silicon() -> None:
    assert {test.__module__ for test in ALSO_ON_SILICON} == {f"test_emulator_{family}" for family in FAMILIES}


def test_all_cases_are_run() -> None:
    seen: list[tuple[object, ...]] = []

    @pytest.mark.parametrize(("a", "b"), [(1, 2), (3, 4)])
    @pytest.mark.parametrize("c", [(5, 6), 7])
    def parametrised(a: int, b: int, c: object) -> None:
        seen.append((a, b, c))

    run_all([parametrised, lambda: seen.append(())])
    assert set(seen) == {(1, 2, (5, 6)), (1, 2, 7), (3, 4, (5, 6)), (3, 4, 7), ()}
    assert len(seen) == 5


def test_failures_are_counted_and_the_first_one_told() -> None:
    @pytest.mark.parametrize("a", [1, 2, 3])
    def fails(a: int) -> None:
        if a > 1:
            raise RuntimeError("no")

    def fails_too() -> None:
        raise AssertionError("never")

    with pytest.raises(AssertionError) as info:
        run_all([fails, lambda: None, fails_too])
    expected = [
        "fails: 2 of 3 cases fail, the first with {'a': 2}: no",
        "fails_too: 1 of 1 cases fail, the first with {}: never",
    ]
    assert str(info.value).splitlines()[:2] == expected


def test_what_the_isa_leaves_open_binds_the_emulator_alone() -> None:
    from emulator import Machine

    body, columns = "mov.b32 %d, %a;", [np.array([5, 6], np.uint32)]
    wrong_for_5 = Case(body, "b32", ("b32",), lambda a: 0 if a == 5 else a, lambda a: a == 5)
    with pytest.raises(AssertionError, match="got 0x5"):
        check(wrong_for_5, columns)
    with on(Machine()):
        check(wrong_for_5, columns)
        with pytest.raises(AssertionError, match="got 0x6"):
            check(Case(body, "b32", ("b32",), lambda a: 0, lambda a: a == 5), columns)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("fake-gpu") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_gpu.cpp")
    include = build.find_toolkit().include
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++17", f"-I{include}", source, "-o", path], check=True)
    return str(path)


def test_structures_are_those_of_the_header(library: str) -> None:
    layout = (ctypes.c_size_t * 9)()
    ctypes.CDLL(library).fake_layout(layout)
    fields = [Config.grid, Config.block, Config.shared_bytes, Config.stream, Config.attributes, Config.attribute_count]
    ours = [ctypes.sizeof(Attribute), Attribute.extents.offset, ctypes.sizeof(Config), *(f.offset for f in fields)]
    assert list(layout) == ours


def held(library: str) -> list[int]:
    """Modules and allocations."""
    gc.collect()
    counts = (ctypes.c_int * 2)()
    ctypes.CDLL(library).fake_held(counts)
    return list(counts)


PTX = """.version 8.6
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 report, .param .u64 given, .param .u32 word, .param .s64 wide, .param .f32 single,
                       .param .f64 double, .param .u16 short, .param .align 4 .b8 bytes[12]) {{ {} ret; }}
"""
WORDS = "<11I"


@pytest.mark.parametrize(("cluster", "told"), [((1, 1, 1), (0, 0, 0, 0)), ((2, 1, 3), (2, 1, 3, 4))])
def test_a_launch_reaches_the_driver(library: str, cluster: tuple[int, int, int], told: tuple[int, ...]) -> None:
    kernel = Gpu(library).load(PTX.format(""))["kernel"]
    report = np.zeros(104, np.uint8)
    report[-8:] = 7
    given = np.arange(4, dtype=np.uint64) + np.uint64(77)
    values = [(1 << 32) - 2, -5, 1.5, -2.25, 65535, bytes(range(12))]
    kernel.launch((4, 5, 6), 96, cluster, 1 << 17, [report, given[1:], *values])
    assert struct.unpack_from(WORDS, report.data) == (4, 5, 6, 96, 1, 1, *told, 1 << 17)
    expected = struct.pack("<QIqfdH12s", 78, *values)
    assert report[struct.calcsize(WORDS) :].tobytes().startswith(expected)
    assert not report[struct.calcsize(WORDS) + len(expected) : -8].any()
    assert given.tolist() == [77, 78, 79, 80]
    kernel.launch(1, 1, args=[report, report[-8:], *values])  # memory inside of other memory
    assert report[44:52].tolist() == [7] * 8
    assert held(library) == [1, 0]
    del kernel
    assert held(library) == [0, 0]


def test_memory_that_is_read_only_stays_as_it_is(library: str) -> None:
    kernel = Gpu(library).load(PTX.format(""))["kernel"]
    report = np.zeros(96, np.uint8)
    report.flags.writeable = False
    kernel.launch(args=[report, np.zeros(1, np.uint64), 1, 1, 1.0, 1.0, 1, bytes(12)])
    assert not report.any()


def test_what_cannot_run_is_an_error(library: str) -> None:
    from emulator import EmulationError, TensorMap

    gpu = Gpu(library)
    with pytest.raises(RuntimeError, match="cuModuleLoadDataEx failed with CUresult 218: line 1: refused"):
        gpu.load("// refuse me\n" + PTX.format(""))
    with pytest.raises(EmulationError, match="line 5"):
        gpu.load(PTX.format("frobnicate.b32;"))
    kernel = gpu.load(PTX.format(""))["kernel"]
    with pytest.raises(EmulationError, match="expected 8 arguments, got 1"):
        kernel.launch(args=[1])
    with pytest.raises(TypeError, match="TensorMap"):
        kernel.launch(args=[TensorMap(np.zeros((64, 64), np.float32), box=(8, 8))] * 8)
    assert held(library)[1] == 0


def test_which_gpus_serve(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert silicon.unusable_reason(library) is None
    assert silicon.unusable_reason("libno_such_driver.so") == "there is no NVIDIA driver"
    monkeypatch.setattr(silicon, "CAPABILITY", (silicon.CAPABILITY[1],) * 2)
    assert silicon.unusable_reason(library) == "the GPU is sm_00, not sm_90"
    monkeypatch.setattr(silicon, "DEVICE", 1)
    assert silicon.unusable_reason(library) == "the NVIDIA driver has no GPU: cuDeviceGet failed with CUresult 101"


def test_cases_take_the_machine_that_is_on(library: str) -> None:
    from emulator import Machine

    gpu = Gpu(library)
    with on(gpu):
        assert on_silicon()
        assert machine(5) is gpu
    assert not on_silicon()
    emulated = machine(5)
    assert isinstance(emulated, Machine)
    assert emulated.seed == 5
