"""Compiles tests/emulator/src into the module _emulator, once for each state of the sources.

Objects and the module lie in build/emulator/ under names that hash all that went into them, so what is there is right.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).resolve().parent / "src"
FOLDER = Path(__file__).resolve().parents[2] / "build" / "emulator"
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden")
FUZZ_SOURCES = Path(__file__).resolve().parent / "fuzz"
FUZZ_FOLDER = FOLDER.with_name("emulator-fuzz")
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-D_GLIBCXX_ASSERTIONS",
    "-D_GLIBCXX_SANITIZE_VECTOR",
)
FUZZ_FLAGS = ("-std=c++20", "-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS)
JOBS = 2  # files compiled at a time


class BuildError(Exception):
    """Says what could not be built, with the compiler's output."""


def _run(command: Sequence[str | Path], what: str) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{what} failed: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def _with_includes(path: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """The text of ``path`` and of every file of ours that it includes, by the path."""
    if path not in seen:
        seen[path] = path.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', seen[path], re.M):
            included = (path.parent / name.decode()).resolve()
            if included.exists():
                _with_includes(included, seen)
    return seen


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a process that dies
        yield


def _compile(command: Sequence[str | Path], target: Path, what: str) -> None:
    """Runs ``command`` with ``-o``; the target appears whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    _run([*command, "-o", partial], what)
    partial.replace(target)


def _compiler(flags: Sequence[str]) -> list[str]:
    found = shutil.which("g++")
    if found is None:
        raise BuildError("the emulator is compiled with g++, which is not installed")
    return [found, *flags]


def _objects(
    files: Sequence[Path], folder: Path, compiler: Sequence[str], tools: tuple[object, ...] = ()
) -> list[Path]:
    """Compiles what is not there yet. ``tools``: what else the objects depend on. The lock must be held."""
    tools = (tools, compiler, _run([compiler[0], "-dumpfullversion"], "g++"))
    objects = {}
    for file in files:
        read = sorted(_with_includes(file, {}).items())
        key = _digest(tools, [(p.name, hashlib.sha256(text).digest()) for p, text in read])
        objects[file] = folder / f"{file.stem}-{key}.o"

    def compile_one(file: Path) -> None:
        if not objects[file].exists():
            _compile([*compiler, "-c", file], objects[file], f"compiling {file.name}")

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(compile_one, files))
    for stale in set(folder.glob("*.o")) - set(objects.values()):
        stale.unlink()
    return list(objects.values())


def _build(sources: Path, folder: Path, flags: Sequence[str]) -> Path:
    """The module's path. The lock must be held."""
    import pybind11

    files = sorted(sources.glob("*.cpp"))
    if not files:
        raise BuildError(f"the emulator has no sources: {sources} has no *.cpp")
    compiler = _compiler(flags)
    headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    objects = _objects(files, folder, [*compiler, *headers], (pybind11.__version__, sys.version))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    module = folder / _digest([p.name for p in objects]) / f"_emulator{suffix}"
    if module.exists():
        return module
    module.parent.mkdir(exist_ok=True)
    _compile([*compiler, "-shared", *objects], module, "linking the emulator")
    # A process that has loaded an older module keeps it: its file lives until it is closed.
    for stale in {p.parent for p in folder.glob("*/_emulator*")} - {module.parent}:
        shutil.rmtree(stale)
    return module


def fuzzer(sources: Path = SOURCES, folder: Path = FUZZ_FOLDER) -> Path:
    """The path of the program in ``fuzz/fuzz.cpp``: the emulator without Python, under sanitizers.

    Raises:
        BuildError: there is no compiler, or it does not like the sources.
    """
    files = [p for p in sorted(sources.glob("*.cpp")) if p.name != "bindings.cpp"] + sorted(FUZZ_SOURCES.glob("*.cpp"))
    with _locked(folder):
        compiler = _compiler(FUZZ_FLAGS)
        objects = _objects(files, folder, compiler)
        program = folder / f"fuzz-{_digest([p.name for p in objects])}"
        if not program.exists():
            _compile([*compiler, *objects], program, "linking the fuzzer")
            for stale in set(folder.glob("fuzz-*")) - {program, *objects}:
                stale.unlink()
    return program


def load(sources: Path = SOURCES, folder: Path = FOLDER, flags: Sequence[str] = FLAGS) -> ModuleType:
    """Compile what has changed, and import. ``folder`` is kept for one set of flags.

    Raises:
        BuildError: there is no compiler, or it does not like the sources.
    """
    with _locked(folder):
        path = _build(sources, folder, flags)
        spec = importlib.util.spec_from_file_location("_emulator", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@functools.cache
def native() -> ModuleType:
    """The C++ side: parse, launch and EmulationError."""
    if "_emulator" not in sys.modules:
        sys.modules["_emulator"] = load()
    return sys.modules["_emulator"]
