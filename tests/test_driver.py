"""driver.cpp against a pretended libcuda that writes down its calls: the last step before silicon, without silicon."""

import os
import re
import subprocess
import sys
from pathlib import Path

import build_kernels as build
import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import sys
sys.path.insert(0, "tests")
import torch, fastfp8
from fastfp8 import _C
from test_plan import operands, ROW
print(_C.driver_version(), _C.devices(), repr(_C.driver_unusable_reason()))
given = operands(300, 264, 400, ROW, c="float32")
p = _C.GemmProblem(**given)
plan = _C.gemm_plan(p, _C.gemm_select(p))
print(plan.kernel, plan.shared_bytes)
addresses = dict(a=16, a_scale=32, b=48, b_scale=64, out=80, c=96)
_C.launch(plan, {k: v for k, v in addresses.items() if k not in sys.argv[1:]}, 7)
_C.launch(plan, addresses, 8)
"""


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is allowed.
OVERLAPS = "launch attribute 6: 1 0 0"


@pytest.fixture(scope="module")
def fake_libcuda(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake-cuda")
    include = build.find_toolkit().include
    source = ROOT / "tests" / "fake_libcuda.cpp"
    library = folder / "libcuda.so.1"
    command = ["g++", "-shared", "-fPIC", "-std=c++17", f"-I{include}", source, "-o", library]
    subprocess.run(command, check=True)
    return folder


def run(fake_libcuda, *arguments, **environment):
    everything = {**os.environ, "LD_LIBRARY_PATH": str(fake_libcuda), **environment}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=everything)


def test_launch_hands_the_plan_to_the_driver(fake_libcuda):
    done = run(fake_libcuda)
    assert done.returncode == 0, done.stderr
    device, plan = done.stdout.splitlines()
    assert device == "13000 [('Fake H200', 9, 0, 132)] ''"
    kernel, shared = plan.split()
    calls = done.stderr.splitlines()
    assert calls[0].startswith("load ")
    assert calls[0].endswith("/fastfp8/kernels/gemm_row_bf16.cubin")
    assert calls[1:3] == [f"kernel {kernel}", f"attribute 8 {shared}"], "the kernel may have the plan's shared memory"
    tile_m, tile_n = map(int, re.search(r"_(\d+)x(\d+)$", kernel).groups())
    rows, columns = -(-300 // tile_m), -(-264 // tile_n)
    panel = min(64, tile_n // 2 if tile_m == 64 else tile_n)
    maps = [
        f"map 16 400 300 400 128 {tile_m} 1 1 type=0 rank=2 interleave=0 swizzle=3 fill=0",  # UINT8, 128B swizzle
        f"map 48 400 264 400 128 {tile_n} 1 1 type=0 rank=2 interleave=0 swizzle=3 fill=0",
        f"map 32 300 4 1200 {tile_m} 1 1 1 type=7 rank=2 interleave=0 swizzle=0 fill=0",  # scales as FLOAT32
        f"map 64 264 4 1056 {tile_n} 1 1 1 type=7 rank=2 interleave=0 swizzle=0 fill=0",
        f"map 80 264 300 528 {panel} 64 1 1 type=9 rank=2 interleave=0 swizzle={3 if panel == 64 else 2} fill=0",
    ]
    addresses = ["address 0", "address 0", "address 96"]  # scales of B and out come through their maps; c by address
    integers = [0, 264, 300, 264, 400, rows, columns]
    launch = [f"launch {rows * columns} 1 384 1 shared={shared} stream=7 attributes=1", OVERLAPS, *maps, *addresses]
    assert calls[3:13] == launch
    assert calls[13:20] == [f"int {i}" for i in integers]
    assert calls[21] == launch[0].replace("stream=7", "stream=8"), "the second launch loads nothing again"


def test_a_cluster_is_a_launch_attribute(fake_libcuda):
    program = PROGRAM.replace(
        "_C.gemm_select(p)", "next(c for c, _ in _C.gemm_candidates(p) if c.name == '128x128 pair')"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake_libcuda)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    calls = done.stderr.splitlines()
    launch = next(i for i, call in enumerate(calls) if call.startswith("launch "))
    assert calls[launch].startswith("launch 12 1 384 1 ")
    assert calls[launch].endswith("attributes=2")
    assert calls[launch + 1] == "launch attribute 4: 2 1 1", "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION"
    assert calls[launch + 2] == OVERLAPS
    assert calls[launch + 4] == "map 48 400 264 400 128 64 1 1 type=0 rank=2 interleave=0 swizzle=3 fill=0"


def test_an_unbound_slot_is_an_error(fake_libcuda):
    done = run(fake_libcuda, "c")
    assert "no tensor is bound to slot 'c'" in done.stderr
    assert done.returncode == 1


def test_a_failing_launch_is_an_exception_with_the_drivers_words(fake_libcuda):
    done = run(fake_libcuda, FAKE_CUDA_FAIL="1")
    assert "RuntimeError: fastfp8: launching gemm_sm90_row_bf16" in done.stderr
    assert "CUDA_ERROR_FAKE (a pretended failure)" in done.stderr


def test_a_driver_that_is_too_old_is_named(fake_libcuda):
    done = run(fake_libcuda, FAKE_CUDA_VERSION="12040")
    assert "the driver supports CUDA 12.4, the kernels were built for CUDA" in done.stdout
    assert "580 or newer" in done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize(("major", "words"), [("9", ""), ("8", "built for sm_90a, this GPU is sm_80")])
def test_other_gpus_are_told_apart(fake_libcuda, major, words):
    code = "import torch, fastfp8; from fastfp8 import _C; print(_C.gemm_sm90_unusable_reason(0))"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake_libcuda), "FAKE_CUDA_MAJOR": major}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    import torch

    # A CPU build of torch cannot say what the current stream is.
    missing = "" if torch.version.cuda else "needs a CUDA build of torch, 2.11 or newer"
    assert done.stdout.startswith(words or missing)
    assert done.returncode == 0
