"""What the build made: PTX, cubins, their budgets, and an extension that links neither CUDA nor a CUDA libtorch."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build_kernels as build
import pytest

import fastfp8
from bench import sass, static
from bench.case import Unavailable
from fastfp8 import _C, backends
from fastfp8.backends import KERNELS

ROOT = Path(__file__).resolve().parent.parent

BUILT = backends.built_kernels()
ALL = [(module, kernel) for module, kernels in BUILT["modules"].items() for kernel in kernels]
GEMMS = [names for names in ALL if names[1].startswith("gemm_")]
COMM = [names for names in ALL if names[1].startswith("comm_")]


def test_every_instantiation_was_built():
    left_out = build.NCCL_MODULES if BUILT["nccl"]["version"] is None else set()
    sources = sorted({p.stem for p in (ROOT / "csrc").glob("*/instantiations/*.cu")} - left_out)
    assert sorted(BUILT["modules"]) == sources
    assert len(GEMMS) == 50
    assert len(COMM) == 5 * sum(module.startswith("comm_") for module in sources)
    assert len(ALL) == len(GEMMS) + len(COMM)
    for module in sources:
        assert ".target sm_90a" in (KERNELS / f"{module}.ptx").read_text()
        assert (KERNELS / f"{module}.cubin").read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize(("module", "kernel"), COMM)
def test_register_budget_of_comm(module, kernel):
    """What 512 threads leave, and no spill. A fence of NCCL's stores to a word of the stack."""
    use = BUILT["modules"][module][kernel]
    assert use["registers"] <= 128
    assert use["spill_bytes"] == 0
    assert use["stack"] <= (build.NCCL_STACK if module in build.NCCL_MODULES else 0)


@pytest.mark.parametrize(("module", "kernel"), GEMMS)
def test_register_budget(module, kernel):
    """No stack and no spill; 168 registers a thread is what 384 threads leave, and setmaxnreg shares out anew."""
    use = BUILT["modules"][module][kernel]
    assert use == {"registers": 168, "stack": 0, "spill_bytes": 0}


def code_of(module, kernel):
    try:
        return sass.code(KERNELS / f"{module}.cubin", kernel)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("module", "kernel"), [names for names in GEMMS if "swiglu" not in names[1]])
def test_sass_of_the_mainloop(module, kernel):
    """Four wgmma a pass, one FFMA a product to promote and no more multiplications than the scales need."""
    tile_m, tile_n = map(int, re.search(r"_(\d+)x(\d+)", kernel).groups())
    swapped = tile_m < 64
    columns = tile_m if swapped else tile_n // 2 if tile_m == 64 else tile_n  # of one consumer's wgmma
    passes, columns = max(1, columns // 128), min(columns, 128)
    code = code_of(module, kernel)
    count = code.opcodes
    split = kernel.endswith("_split")
    turn = 1 if split else static.configs()[kernel].stages  # k-blocks that the main loop takes a turn
    copies = turn + (not split)  # of the code of a k-block: those of a turn, and one for k-blocks that make none
    assert count["LDL"] + count["STL"] == 0, "local memory"
    matrix = [i.name + i.operands for i in code.instructions if i.opcode == "QGMMA"]
    assert len(matrix) == 4 * passes * copies
    assert all(f"QGMMA.64x{columns}x32.F32.E4M3.E4M3" in line for line in matrix)
    assert ["!UPT" in line for line in matrix] == copies * passes * [True, False, False, False], (
        "a pass starts from zero"
    )
    assert count["FFMA"] == copies * passes * columns // 2, "promotion: one FFMA for each of a thread's accumulators"
    mix = sass.mix(code, passes)
    assert mix[:3] == (turn, 4 * passes, passes * columns // 2)
    by_row = "_row_" in kernel or "_wgrad_" in kernel
    pair, scaler = kernel.endswith("_pair"), tile_m == tile_n == 128 and not by_row
    products = columns // 2 if by_row else columns // 4 if swapped else 2 * passes
    assert count["FMUL"] == (4 if scaler else copies * products), "scale_a * scale_b; a scaler has four rows a lane"
    assert count["UTMALDG"] == (4 if by_row else 3) + (tile_n == 256 and not pair)
    assert sum("MULTICAST" in i.name for i in code.instructions) == pair
    assert count["UCGABAR_ARV"] == (2 if pair or split else 0), "clusters meet at the start and at the end only"
    fences = sum(i.name == "MEMBAR.ALL.GPU" for i in code.instructions)
    assert fences == (3 if split else 2 if pair else 0), "none in the main loop; a split tells its peers of its sums"
    by_tma = "_bf16_" in kernel and not split and not swapped
    assert count["UTMASTG"] == (passes * max(1, columns // 64) if by_tma else 0)
    assert count["STSM"] == (passes * columns // 16 if by_tma else 0)
    assert count["USETMAXREG"] >= 2


@pytest.mark.parametrize(("module", "kernel"), [names for names in GEMMS if "swiglu" in names[1]])
def test_sass_of_swiglu(module, kernel):
    """The main loop of the wide tile; behind it 64 results a thread, each by 9 FFMA of exp and an exact division."""
    code = code_of(module, kernel)
    count = code.opcodes
    assert count["LDL"] + count["STL"] == 0, "local memory"
    turn = static.configs()[kernel].stages
    assert sass.mix(code, 2)[:3] == (turn, 8, 128)
    loop = [i.opcode for i in code.loop("QGMMA")]
    assert not loop.count("MUFU"), "no work of the epilogue in the main loop"
    # Two more rows of a thread have a scale and a multiplier each, and those of scales by powers of two a scale again.
    assert 64 <= count["FCHK"] <= 64 + 6, "one IEEE division an element"
    assert count["FFMA"] >= 128 * (turn + 1) + 64 * 9
    assert not [i.name for i in code.instructions if i.name.startswith("MUFU") and ".EX2" in i.name], "exp is our own"
    assert count["STSM"] == 16, "gate and up: 64 rows of 256 columns of BF16, if they are asked for"
    assert count["UTMASTG"] == 5, "four panels of gate and up, one of codes"
    assert sum("MULTICAST" in i.name for i in code.instructions) == kernel.endswith("_pair")


@pytest.mark.parametrize(("module", "kernel"), [names for names in ALL if names[1].startswith("gemm_")])
def test_other_instructions_of_the_mainloop(module, kernel):
    """At most 30 % of FFMA; where that cannot be had as few as there were: static.MOST_OTHERS says why."""
    most, reason = static.most_others(kernel)
    assert bool(reason) == (most > static.GOAL_OF_OTHERS)
    found = sass.mix(code_of(module, kernel), static.passes(kernel)).share
    assert found <= most, reason
    assert found > 0.85 * most, "fewer: lower the bar"


def test_the_build_refuses_local_memory_and_serialised_wgmma():
    good = {"kernel": {"registers": 168, "stack": 0, "spill_bytes": 0}}
    build.check_kernels(good, "ptxas info    : Used 168 registers")
    for spoilt in ({"stack": 8}, {"spill_bytes": 4}):
        with pytest.raises(build.BuildError, match="local memory"):
            build.check_kernels({"kernel": {**good["kernel"], **spoilt}}, "")
    build.check_kernels({"kernel": {**good["kernel"], "stack": 8}}, "", stack=8)
    log = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    with pytest.raises(build.BuildError, match="C7510"):
        build.check_kernels(good, log)


def test_usage_is_read_from_ptxas():
    log = (
        "ptxas info    : Compiling entry function 'k1' for 'sm_90a'\n"
        "ptxas info    : Function properties for k1\n"
        "    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function 'k2' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 40 registers\n"
    )
    assert build._usage(log) == {
        "k1": {"registers": 168, "stack": 16, "spill_bytes": 12},
        "k2": {"registers": 40, "stack": 0, "spill_bytes": 0},
    }


def fake_nvcc(folder, version):
    folder.mkdir(parents=True)
    program = folder / "nvcc"
    program.write_text(
        f'#!/bin/sh\ncase "$1" in\n--version) echo "Cuda compilation tools, release X, V{version}";;\n'
        f'*) echo "#$ TOP={folder.parent}" >&2;;\nesac\n'
    )
    program.chmod(0o755)
    return program


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch):
    """CUDA_HOME before PATH; one that is too old is passed over."""
    home, old, new = tmp_path / "home", tmp_path / "old", tmp_path / "new"
    fake_nvcc(home / "bin", "13.1.1")
    fake_nvcc(old / "bin", "12.4.9")
    fake_nvcc(new / "bin", "12.8.3")
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("PATH", f"{new / 'bin'}:/usr/bin:/bin")
    assert (build.find_toolkit().source, build.find_toolkit().version) == ("CUDA_HOME", "13.1.1")
    assert build.find_toolkit().root == home
    monkeypatch.setenv("CUDA_HOME", str(old))
    assert (build.find_toolkit().source, build.find_toolkit().version) == ("PATH", "12.8.3")


def test_without_any_nvcc_the_build_says_what_it_tried(tmp_path, monkeypatch):
    fake_nvcc(tmp_path / "old" / "bin", "12.4.9")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "WHEELS", ["no-such-wheel-of-nvcc==0"])
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(build.BuildError) as raised:
        build.find_toolkit()
    for part in ("12.8 or newer", "CUDA_HOME: nvcc 12.4.9 is older", "installed NVIDIA wheels: no", "PyPI: pip failed"):
        assert part in str(raised.value)


def test_kernels_are_rebuilt_only_when_something_changed(tmp_path, monkeypatch):
    toolkit = build.Toolkit(Path("nvcc"), "test", "13.0.88", Path("/"))
    calls = []
    monkeypatch.setattr(build, "_compile", lambda source, *_: calls.append(source.stem) or {})
    build.build(tmp_path, toolkit, "no headers")
    few = len(calls)
    assert few == len(list((ROOT / "csrc").glob("*/instantiations/*.cu"))) - len(build.NCCL_MODULES)
    build.build(tmp_path, toolkit, "no headers")
    assert len(calls) == few, "nothing changed"
    told = json.loads((tmp_path / "build.json").read_text())
    assert (told["nvcc"], told["nccl"]) == ("13.0.88", {"version": None, "reason": "no headers"})
    build.build(tmp_path, build.Toolkit(Path("nvcc"), "test", "13.1.0", Path("/")), "no headers")
    assert len(calls) == 2 * few, "another nvcc"


def test_rails_over_nccl_are_built_where_its_headers_are(tmp_path, monkeypatch):
    toolkit = build.Toolkit(Path("nvcc"), "test", "13.0.88", Path("/"))
    calls = []
    monkeypatch.setattr(build, "_compile", lambda source, *_: calls.append(source.stem) or {})
    build.build(tmp_path, toolkit, "no headers")
    assert build.NCCL_MODULES.isdisjoint(calls)
    assert build.nccl_of(tmp_path) == {"version": None, "reason": "no headers"}
    build.build(tmp_path, toolkit, build.Nccl(tmp_path, "test", "2.30.7"))
    assert set(calls) >= build.NCCL_MODULES
    assert build.nccl_of(tmp_path) == {"version": "2.30.7", "source": "test"}, "by which setup.py compiles anew"
    told = json.loads((tmp_path / "build.json").read_text())
    assert set(told["modules"]) >= build.NCCL_MODULES
    cubin = tmp_path / "comm_nccl.cubin"
    cubin.touch()
    build.build(tmp_path, toolkit, "no headers")
    assert not cubin.exists(), "one of another version of NCCL is not left about"


def nccl_headers(folder, version):
    include = folder / "nvidia" / "nccl" / "include"
    include.mkdir(parents=True)
    major, minor, patch = version.split(".")
    lines = (f"#define NCCL_MAJOR {major}", f"#define NCCL_MINOR {minor}", f"#define NCCL_PATCH {patch}")
    (include / "nccl.h").write_text("\n".join((*lines, '#define NCCL_SUFFIX ""', "")))
    (include / "nccl_device.h").touch()
    return folder


def test_headers_of_nccl_are_looked_for_in_order(tmp_path, monkeypatch):
    """In what this Python imports from, then beside nvcc; what is too old is passed over, and named."""
    home = tmp_path / "cuda"
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda.h").touch()
    toolkit = build.Toolkit(home / "bin" / "nvcc", "test", "13.0.88", home)
    old, new = nccl_headers(tmp_path / "old", "2.30.5"), nccl_headers(tmp_path / "new", "2.31.2")
    monkeypatch.setattr(build.sys, "path", [str(tmp_path)])
    assert build.find_nccl(toolkit) == "no headers of NCCL 2.30.7 or newer"
    monkeypatch.setattr(build.sys, "path", [str(old)])
    assert "nccl.h is of NCCL 2.30.5" in build.find_nccl(toolkit)
    monkeypatch.setattr(build.sys, "path", [str(old), str(new)])
    assert build.find_nccl(toolkit) == build.Nccl(
        new / "nvidia" / "nccl" / "include", "installed NVIDIA wheels", "2.31.2"
    )
    shutil.copytree(new / "nvidia" / "nccl" / "include", home / "include", dirs_exist_ok=True)
    monkeypatch.setattr(build.sys, "path", [str(old)])
    assert build.find_nccl(toolkit) == build.Nccl(home / "include", "beside nvcc", "2.31.2")


def test_extension_links_nothing_of_cuda():
    if shutil.which("readelf") is None:
        pytest.skip("no readelf (binutils)")
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search(r"cuda|cudart|nvrtc|torch_python|libc10", name)]
    symbols = subprocess.run(["readelf", "-Ws", "--dyn-syms", _C.__file__], capture_output=True, text=True, check=True)
    undefined = re.findall(r"UND\s+(\S+)", symbols.stdout)
    cplusplus = [name for name in undefined if re.match(r"_ZN?K?\d*(2at|3c10|5torch)", name)]
    assert not cplusplus, "only the stable C shim of libtorch may be used"


def test_report_says_what_is_usable_and_why_not():
    done = subprocess.run([sys.executable, "-m", "fastfp8"], capture_output=True, text=True, cwd=ROOT, check=True)
    text = done.stdout
    assert f"fastfp8      {fastfp8.__version__}" in text
    assert BUILT["nvcc"] in text
    for op in backends.OPS:
        assert re.search(rf"^{op} +reference \(CPU\) +yes$", text, re.M)
        assert re.search(rf"^{op} +Triton +(yes|no: \S.+)$", text, re.M)
    assert re.search(r"^gemm +CUDA sm_90a +(yes|no: \S.+)$", text, re.M)
    for _, kernel in ALL:
        assert kernel in text
    assert re.search(r"^rails +(over NCCL [\d.]+, headers from .+; untested on silicon|not over NCCL: .+)$", text, re.M)


def test_without_a_gpu_the_reasons_name_what_is_missing():
    if _C.driver_unusable_reason() == "":
        pytest.skip("this machine has a usable GPU")
    assert backends.usable()["gemm"]["CUDA sm_90a"] == _C.driver_unusable_reason()
    assert _C.gemm_sm90_unusable_reason(0) == _C.driver_unusable_reason()


def test_kernels_lie_where_the_driver_looks_for_them():
    """setuptools moves extensions but not data: an editable build once left the kernels in its build folder."""
    assert Path(fastfp8.__file__).parent / "kernels" == KERNELS
    for module, kernels in BUILT["modules"].items():
        text = (KERNELS / f"{module}.ptx").read_text()
        assert all(f".visible .entry {kernel}(" in text for kernel in kernels)
