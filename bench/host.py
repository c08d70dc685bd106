"""What a call of ``gemm`` on CUDA tensors costs the host, up to the launch, on a machine without a GPU.

The launch goes to a libcuda that only pretends (``tests/fake_libcuda.cpp``): what the driver itself spends is not in
these times. ``host_cost.cpp`` times the library's own part by part; ``pretended_gpu.cpp`` gives a CPU build of torch a
GPU that is only there to be asked, so that a call from Python goes all its way.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .borrowed import borrow
from .case import Computed, Session, Unavailable, Work, turns
from .foreign import ForeignLoad
from .goals import HOST_OP, HOST_US
from .rows import Row, spread

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "host_cost"
SHAPE = (64, 576, 7168)
CALLS = 500  # that make one sample
SECONDS = 120  # for all samples of a program

# Each program times one thing of others' beside: where that moves alike, the machine changed.
LAUNCH = "host cost of a launch"
PARTS = (*(f"{LAUNCH}: {part}" for part in ("make_problem", "select", "plan", "recall", "driver")), LAUNCH)
VECTORS = "16 vectors made"
# Ways to call; that of HOST_OP is torch.ops.fastfp8.gemm from Python, as it is on a GPU.
PUBLIC, DISPATCHED = "host cost of fastfp8.gemm", "host cost of a call from C++"
# Called like HOST_OP: what torch itself takes for an op of the same arguments.
NOTHING = "host cost of an op with gemm's schema that does nothing"
CALLED = (HOST_OP, PUBLIC, DISPATCHED, NOTHING)
ALIAS = "torch.ops.aten.alias"
LAUNCH_NOTE = (
    "a launch is from views of the tensors to cuLaunchKernelEx of a pretended driver, of a shape that was launched "
    "before: its plan is recalled, where a new one is selected and planned"
)
CALL_NOTE = "on tensors of a pretended GPU, with a pretended driver"


def works(tiny: bool) -> list[Work]:
    shape = "x".join(map(str, SHAPE))
    return [
        Computed(op, shape, functools.partial(_rows, measured, op, peer, note), 1)
        for measured, ops, peer, note in ((launches, PARTS, VECTORS, LAUNCH_NOTE), (calls, CALLED, ALIAS, CALL_NOTE))
        for op in ops
    ]


Times = dict[str, list[float]]  # seconds, by op


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a program found, and what else the CPUs did meanwhile."""

    times: Times
    load: dict[str, Any]


def _rows(measured: Callable[[int, int], Measured], op: str, peer: str, note: str, session: Session) -> list[Row]:
    found = measured(session.samples, 2 if session.tiny else CALLS)
    own, other = found.times[op], found.times[peer]
    lower, median, upper = spread([seconds * 1e6 for seconds in own])
    where = ("cpu", op, "x".join(map(str, SHAPE)), "fastfp8", "cpu", "us", median, lower, upper, session.samples)
    ratios = {peer: spread([mine / theirs for mine, theirs in zip(own, other, strict=True)])}
    # The goal is for the call from Python: goals.py says how far it is met. What is ours of it has a bar.
    bar = HOST_US if op in (LAUNCH, DISPATCHED) and not session.tiny else None
    bar_on = None if bar is None else "median"
    return [Row(*where, ratios=ratios, bar=bar, bar_on=bar_on, note=note, **found.load)]


@functools.cache
def launches(samples: int, calls: int) -> Measured:
    """The library's own code alone, by part."""
    own = [path for folder in ("common", "gemm") for path in sorted((ROOT / "csrc" / folder).glob("*.cpp"))]
    program = compiled("host_cost", [ROOT / "bench" / "host_cost.cpp", *own], ["-ldl"], [toolkit()])
    lines, load = _run([program, *map(str, (*SHAPE, samples, calls))])
    columns = zip(*([float(word) * 1e-9 for word in line.split()] for line in lines), strict=True)
    return Measured({op: list(times) for op, times in zip((*PARTS, VECTORS), columns, strict=True)}, load)


@functools.cache
def calls(samples: int, calls: int) -> Measured:
    """Whole calls, in a process of its own in which torch takes the pretended GPU for one."""
    import torch

    if torch.version.cuda:
        raise Unavailable("torch is a CUDA build, which takes no pretended GPU: the family gemm measures it on a GPU")
    libraries = Path(torch.__file__).parent
    headers = [libraries / "include", libraries / "include" / "torch" / "csrc" / "api" / "include"]
    links = ["-shared", "-fPIC", f"-L{libraries / 'lib'}", "-ltorch_cpu", "-lc10"]
    library = compiled("pretended_gpu.so", [ROOT / "bench" / "pretended_gpu.cpp"], links, headers)
    lines, load = _run([sys.executable, "-m", __spec__.name, library, str(samples), str(calls)])
    return Measured(json.loads(lines[-1]), load)


def _run(command: Sequence[str | Path]) -> tuple[list[str], dict[str, Any]]:
    """A program's lines, with the pretended driver in its way; and the fields of Row that tell of other load."""
    links = ["-shared", "-fPIC"]
    driver = compiled("libcuda.so.1", [ROOT / "tests" / "fake_libcuda.cpp"], links, [toolkit()])
    paths = [str(driver.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(paths), "FAKE_CUDA_QUIET": "1"}
    load = ForeignLoad()
    load.sample()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=SECONDS
    )
    load.sample()
    if done.returncode:
        raise RuntimeError(
            f"{Path(command[0]).name} failed: {(done.stderr.strip() or 'without a word').splitlines()[-1]}"
        )
    return done.stdout.splitlines(), load.fields()


def toolkit() -> Path:
    """The folder of cuda.h."""
    kernels = borrow("build_kernels")
    try:
        return Path(kernels.find_toolkit().include)
    except kernels.BuildError as error:
        raise Unavailable(f"no cuda.h: {error}") from error


def compiled(name: str, sources: Sequence[Path], options: Sequence[str], headers: Sequence[Path]) -> Path:
    """Built as setup.py builds the extension, where any source or header of ours is newer than what is there.

    Raises:
        Unavailable: there is no g++, or it does not take the sources with this torch.
    """
    made = FOLDER / name
    newest = max(path.stat().st_mtime for path in (*sources, *(ROOT / "csrc").glob("*/*.h")))
    if made.exists() and made.stat().st_mtime >= newest:
        return made
    if shutil.which("g++") is None:
        raise Unavailable("no g++ to compile what measures it")
    FOLDER.mkdir(parents=True, exist_ok=True)
    fresh = made.with_name(f"{name}.{os.getpid()}")
    includes = [f"-I{folder}" for folder in headers]
    command: list[str | Path] = ["g++", "-std=c++20", "-O2", *includes, *sources, *options, "-o", fresh]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise Unavailable(f"{sources[0].name} cannot be compiled: {(errors or ['no error given'])[0]}")
    return fresh.rename(made)


def main(library: str, samples: int, calls: int) -> None:
    """Prints the times of CALLED and ALIAS, in turns, as JSON: seconds of each sample by op."""
    import torch

    # Before fastfp8._C, which looks among the global symbols for what this library has in place of libtorch's.
    pretended = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    pretended.seconds_of_gemm.restype = ctypes.c_double
    # The switch that keeps Python from asking a CUDA build's own module.
    torch.cuda._initialized = True  # type: ignore[attr-defined]
    import fastfp8
    from fastfp8 import ScaledTensor

    from .gemm import WEIGHT
    from .static import ROW

    m, n, k = SHAPE
    blocks, cuda = -(-k // 128), torch.device("cuda", 0)
    data = [torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=cuda) for rows in (m, n)]
    scales = torch.empty_strided((m, blocks), (1, m), device=cuda), torch.empty(-(-n // 128), blocks, device=cuda)
    operands = (data[0], scales[0], data[1], scales[1], WEIGHT, torch.bfloat16, None)
    a, b = ScaledTensor(data[0], scales[0], ROW), ScaledTensor(data[1], scales[1], WEIGHT)

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    ways: list[Callable[[], float]] = [
        lambda: seconds(lambda: torch.ops.fastfp8.gemm(*operands)),
        lambda: seconds(lambda: fastfp8.gemm(a, b)),
        lambda: float(pretended.seconds_of_gemm(m, n, k, calls)),
        lambda: seconds(lambda: torch.ops.fastfp8_pretended.nothing(*operands)),
        lambda: seconds(lambda: torch.ops.aten.alias(data[0])),
    ]
    found: Times = {op: [] for op in (*CALLED, ALIAS)}
    for order in turns(len(ways), samples + 1):
        for way in order:
            list(found.values())[way].append(ways[way]())
    print(json.dumps({op: times[1:] for op, times in found.items()}))  # the first round loads the kernel


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
