"""Compiles csrc/gemm/instantiations and its like to PTX and sm_90a cubins, with whatever nvcc can be had.

Run by setup.py, and by hand as ``python build_support/build_kernels.py [DESTINATION]``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCH = "90a"
OLDEST_NVCC = (12, 8)
# Seen to compile the kernels on a machine without a toolkit.
WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]
OLDEST_NCCL = (2, 30, 7)
# Built only where NCCL's headers are. Some of its fences store to a word of the stack: that much is no spill of ours.
NCCL_MODULES = {"comm_nccl", "comm_nccl_traced"}
NCCL_STACK = 8
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch=compute_{ARCH}", "-ptx"]


class BuildError(Exception):
    """Says what could not be built, and what to do."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    source: str  # where it came from, for people
    version: str
    root: Path

    @property
    def ptxas(self) -> Path:
        return self.root / "bin" / "ptxas"

    @property
    def include(self) -> Path:
        """The folder that has cuda.h."""
        for folder in (self.root / "include", self.root / "targets" / "x86_64-linux" / "include"):
            if (folder / "cuda.h").exists():
                return folder
        raise BuildError(f"{self.nvcc} ({self.source}) has no cuda.h beside it; install the CUDA runtime headers")


@dataclass(frozen=True)
class Nccl:
    include: Path  # the folder that has nccl.h
    source: str
    version: str


def _run(command: list[str | Path], what: str) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{what} failed: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _toolkit(nvcc: Path, source: str) -> Toolkit | str:
    """The toolkit of ``nvcc``, or why it cannot serve."""
    if not nvcc.exists():
        return f"{source}: no {nvcc}"
    # nvcc on PATH may be a wrapper: its own dry run tells where it lives.
    try:
        version = re.search(r"V(\d+)\.(\d+)\.(\d+)", _run([nvcc, "--version"], "nvcc --version"))
        top = re.search(r"^#\$ TOP=(.+)$", _run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], "nvcc"), re.M)
    except BuildError as error:
        return f"{source}: {error}"
    if version is None or top is None:
        return f"{source}: {nvcc} does not say its version or its folder"
    numbers = tuple(int(n) for n in version.groups())
    if numbers[:2] < OLDEST_NVCC:
        return f"{source}: nvcc {version[0][1:]} is older than {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]}"
    return Toolkit(nvcc, source, version[0][1:], Path(top[1].strip()).resolve())


def _places() -> Iterator[tuple[Path, str]]:
    if os.environ.get("CUDA_HOME"):
        yield Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc", "CUDA_HOME"
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path), "PATH"
    yield Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc", "installed NVIDIA wheels"


def find_toolkit() -> Toolkit:
    """nvcc from CUDA_HOME, PATH, installed NVIDIA wheels, or PyPI. Raises BuildError that lists what was tried."""
    tried = []
    for nvcc, source in _places():
        found = _toolkit(nvcc, source)
        if isinstance(found, Toolkit):
            return found
        tried.append(found)
    target = ROOT / "build" / "cuda-toolkit"
    nvcc = target / "nvidia" / "cu13" / "bin" / "nvcc"
    try:
        if not nvcc.exists():
            print("no nvcc found: taking NVIDIA's wheels from PyPI (about 120 MB)", flush=True)
            _run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, *WHEELS], "pip")
            for program in (*(nvcc.parent).iterdir(), *(nvcc.parent.parent / "nvvm" / "bin").iterdir()):
                program.chmod(program.stat().st_mode | 0o111)
        found = _toolkit(nvcc, "NVIDIA wheels from PyPI")
    except BuildError as error:
        found = f"PyPI: {error}"
    if isinstance(found, Toolkit):
        return found
    lines = "\n  ".join((*tried, found))
    raise BuildError(f"the kernels need nvcc {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer. Tried:\n  {lines}")


def find_nccl(toolkit: Toolkit) -> Nccl | str:
    """NCCL's headers, of an installed wheel (``nvidia-nccl-cu13``) or beside the toolkit; else what was tried."""
    places = [
        (Path(folder) / "nvidia" / "nccl" / "include", "installed NVIDIA wheels") for folder in sys.path if folder
    ]
    places += [(toolkit.root / "include", "beside nvcc"), (toolkit.include, "beside nvcc")]
    tried = []
    for include, source in places:
        header = include / "nccl.h"
        if not header.exists():
            continue
        numbers = re.findall(r"^#define NCCL_(?:MAJOR|MINOR|PATCH) (\d+)", header.read_text(), re.M)
        version = ".".join(numbers)
        if tuple(map(int, numbers)) >= OLDEST_NCCL and (include / "nccl_device.h").exists():
            return Nccl(include, source, version)
        tried.append(f"{header} is of NCCL {version}")
    oldest = ".".join(map(str, OLDEST_NCCL))
    return f"no headers of NCCL {oldest} or newer" + (f" ({', '.join(dict.fromkeys(tried))})" if tried else "")


def _usage(ptxas_output: str) -> dict[str, dict[str, int]]:
    """Registers, stack and spills by kernel, out of ``ptxas -v``."""
    usage: dict[str, dict[str, int]] = {}
    for part in ptxas_output.split("Compiling entry function '")[1:]:
        stack, stores, loads = (
            int(n)
            for n in re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups()  # type: ignore[union-attr]
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        usage[part.split("'")[0]] = {"registers": registers, "stack": stack, "spill_bytes": stores + loads}
    return usage


def check_kernels(usage: dict[str, dict[str, int]], ptxas_output: str, stack: int = 0) -> None:
    """Raise BuildError for local memory beyond ``stack``, or for a wgmma that ptxas serialised or patched (C75xx)."""
    for kernel, use in usage.items():
        if use["stack"] > stack or use["spill_bytes"]:
            raise BuildError(f"{kernel} uses local memory: {use}")
    for line in ptxas_output.splitlines():
        if "wgmma" in line or "setmaxnreg" in line:
            raise BuildError(f"ptxas changed the kernel's schedule, which costs a large factor: {line}")


def _compile(source: Path, toolkit: Toolkit, nccl: Nccl | str, destination: Path) -> dict[str, dict[str, int]]:
    ptx, cubin = destination / f"{source.stem}.ptx", destination / f"{source.stem}.cubin"
    of_nccl = source.stem in NCCL_MODULES
    headers: list[str | Path] = ["-I", nccl.include] if of_nccl and isinstance(nccl, Nccl) else []
    _run([toolkit.nvcc, *NVCC_FLAGS, *headers, source, "-o", ptx], f"compiling {source.name}")
    log = _run([toolkit.ptxas, f"-arch=sm_{ARCH}", "-O3", "-v", ptx, "-o", cubin], f"assembling {ptx.name}")
    usage = _usage(log)
    check_kernels(usage, log, NCCL_STACK if of_nccl else 0)
    return usage


def nccl_of(destination: Path) -> Any:
    """What the build there recorded of NCCL, None without one."""
    record = destination / "build.json"
    return json.loads(record.read_text()).get("nccl") if record.exists() else None


def build(destination: Path, toolkit: Toolkit, nccl: Nccl | str) -> None:
    """Compile every instantiation to ``destination`` and write build.json there; nothing if all is newer than csrc.

    ``nccl`` is find_nccl's answer: without headers the modules that want them are left out, and build.json says why.
    """
    every = sorted((ROOT / "csrc").glob("*/instantiations/*.cu"))
    sources = [s for s in every if isinstance(nccl, Nccl) or s.stem not in NCCL_MODULES]
    of_nccl = (
        {"version": nccl.version, "source": nccl.source}
        if isinstance(nccl, Nccl)
        else {"version": None, "reason": nccl}
    )
    record = destination / "build.json"
    newest = max(p.stat().st_mtime for p in (*(ROOT / "csrc").rglob("*.*h"), *every, Path(__file__)))
    if record.exists() and record.stat().st_mtime > newest:
        built = json.loads(record.read_text())
        same = (built["nvcc"], nccl_of(destination)) == (toolkit.version, of_nccl)
        if same and sorted(built["modules"]) == [s.stem for s in sources]:
            return
    destination.mkdir(parents=True, exist_ok=True)
    for left_out in set(every) - set(sources):
        for suffix in ("ptx", "cubin"):
            (destination / f"{left_out.stem}.{suffix}").unlink(missing_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        usages = pool.map(lambda source: _compile(source, toolkit, nccl, destination), sources)
        modules = dict(zip((s.stem for s in sources), usages, strict=True))
    kernels = sum(len(m) for m in modules.values())
    contents = {
        "nvcc": toolkit.version,
        "nvcc_source": toolkit.source,
        "arch": f"sm_{ARCH}",
        "nccl": of_nccl,
        "modules": modules,
    }
    record.write_text(json.dumps(contents, indent=1) + "\n")
    print(f"built {kernels} sm_{ARCH} kernels with nvcc {toolkit.version} ({toolkit.source})", flush=True)
    print(f"rails over NCCL: {nccl.version if isinstance(nccl, Nccl) else nccl}", flush=True)


def main() -> None:
    toolkit = find_toolkit()
    destination = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "fastfp8" / "kernels"
    build(destination, toolkit, find_nccl(toolkit))


if __name__ == "__main__":
    main()
