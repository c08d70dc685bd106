"""The rails over NCCL without a network: signals, plans, the connection against a pretended libnccl, what was compiled.

Nothing here runs a kernel: the emulator has no network card for GIN to talk to, and no machine with one was at hand.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import build_kernels as build
import pytest
import torch
from comm_ranks import geometry

from fastfp8 import _C, backends
from fastfp8.comm.kernels import Kernels

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("exchange", "dispatch_quantize", "dispatch_scaled", "dispatch_plain", "combine")
MOST_REGISTERS = 128  # what 512 threads leave of 65536


@pytest.fixture(scope="module")
def headers() -> build.Nccl:
    found = build.find_nccl(build.find_toolkit())
    if not isinstance(found, build.Nccl):
        pytest.skip(found)
    return found


def compile_program(target: Path, *arguments: str | Path) -> Path:
    subprocess.run(["g++", "-std=c++20", "-Wall", "-Wextra", *arguments, "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def rail_signals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(tmp_path_factory.mktemp("signals") / "rail_signals", ROOT / "tests" / "rail_signals.cpp")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (3, 2, 2, 5), (5, 8, 7, 3)], ids=str)
def test_each_flag_of_a_rail_has_its_signal(rail_signals: Path, shape: tuple[int, ...]) -> None:
    """Nodes, GPUs, channels, slots: every signal from 0 on is one flag's, and the mail's are the last."""
    command = [rail_signals, *map(str, shape)]
    *lines, count = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    flags, signals, mails = zip(*(map(int, line.split()) for line in lines), strict=True)
    assert len(set(flags)) == len(flags)
    nodes, _, channels, slots = shape
    assert count == f"count {4 * channels * nodes * slots + 2 * nodes}"
    assert sorted(signals) == list(range(len(flags)))
    assert count == f"count {len(flags)}"
    assert [signal for signal, mail in zip(signals, mails, strict=True) if mail] == list(range(len(flags)))[
        -2 * nodes :
    ]


def call() -> _C.CommCall:
    return _C.CommCall(first_rank=1, tokens=3)


def plans(g: _C.CommGeometry, rail: str, **how: object) -> list[_C.LaunchPlan]:
    by_payload = [_C.comm_dispatch_plan(g, call(), p, rail=rail, **how) for p in ("quantize", "scaled", "plain")]
    exchange, combine = (plan(g, call(), rail=rail, **how) for plan in (_C.comm_exchange_plan, _C.comm_combine_plan))
    return [exchange, *by_payload, combine]


def test_plans_of_either_rail_differ_in_module_kernel_and_last_argument() -> None:
    g, constants = geometry(2, 2), bytes(range(200))
    for name, ours, loop in zip(KERNELS, plans(g, "nccl", rail_constants=constants), plans(g, "loopback"), strict=True):
        assert (ours.module, ours.kernel) == ("comm_nccl", f"comm_{name}_nccl")
        assert (loop.module, loop.kernel) == ("comm_loopback", f"comm_{name}_loopback")
        assert ours.arguments[-1] == constants
        assert list(map(repr, ours.arguments[:-1])) == list(map(repr, loop.arguments))
        assert (ours.grid, ours.block, ours.shared_bytes) == (loop.grid, loop.block, loop.shared_bytes)


@pytest.mark.parametrize(("rail", "of"), [("nccl", "nccl_traced"), ("loopback", "traced")])
def test_traced_plans_have_one_more_argument(rail: str, of: str) -> None:
    g, given = geometry(2, 2), {"rail_constants": b"some"} if rail == "nccl" else {}
    for name, ours, plain in zip(KERNELS, plans(g, rail, traced=True, **given), plans(g, rail, **given), strict=True):
        assert (ours.module, ours.kernel) == (f"comm_{of}", f"comm_{name}_{of}")
        assert ours.arguments[-1].slot == "trace"
        assert list(map(repr, ours.arguments[:-1])) == list(map(repr, plain.arguments))


def test_launches_go_by_the_rail_that_was_chosen() -> None:
    """Those of fastfp8.comm.kernels, on memory that no kernel touches."""
    g, launched = geometry(2, 2), []
    kernels = Kernels(
        g,
        1,
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(g.state_words, dtype=torch.int32),
        timeout=1.0,
        rail="nccl",
        rail_constants=b"some",
        launch=lambda plan, _: launched.append((plan.module, plan.arguments[-1])),
    )
    routing = kernels.exchange(torch.zeros(3, g.top_k, dtype=torch.int32), None)
    kernels.dispatch(torch.zeros(3, g.hidden).bfloat16(), routing, quantize=True)
    kernels.combine(torch.zeros(g.capacity, g.hidden).bfloat16(), routing, weighted=False)
    assert launched == 3 * [("comm_nccl", b"some")]


def expect(words: str, plan: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=re.escape(words)):
        plan()


def test_plans_refuse_what_a_rail_cannot_do() -> None:
    g, some = geometry(2, 2), {"rail": "nccl", "rail_constants": b"some"}
    plan = _C.comm_exchange_plan
    expect("argument 'rail': expected 'loopback' or 'nccl', got ibgda", lambda: plan(g, call(), rail="ibgda"))
    expect("argument 'rail_constants': expected those of a connection", lambda: plan(g, call(), rail="nccl"))
    expect("argument 'rail_constants': expected none", lambda: plan(g, call(), rail_constants=b"some"))
    expect("argument 'ranks': expected 1, for NCCL has a GPU for each, got 4", lambda: plan(g, call(), ranks=4, **some))
    large = geometry(2, 2, hidden=1 << 17, rail_chunk=1 << 13)
    plan(large, call())
    expect("argument 'rail_chunk': expected chunks of at most 2^30 bytes", lambda: plan(large, call(), **some))


def test_a_build_without_headers_says_so() -> None:
    if _C.comm_nccl_headers():
        pytest.skip("fastfp8 was built with NCCL's headers")
    assert "built without the headers of NCCL 2.30.7 or newer" in _C.comm_nccl_unusable_reason()
    expect("built without the headers", lambda: _C.CommNccl(communicator=1, geometry=geometry(2, 2), address=4096))


@dataclass
class Connection:
    """A program that connects, and the pretended library."""

    program: Path
    library: Path

    def run(self, *, library: bool = True, **environment: str) -> tuple[int, list[str], list[str]]:
        command = [self.program, *([self.library] if library else [])]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

    def error(self, **environment: str) -> tuple[str, list[str]]:
        code, said, calls = self.run(**environment)
        assert code == 1
        return said[-1], calls


def with_headers(headers: build.Nccl) -> list[str]:
    return ["-isystem", str(headers.include), f"-I{build.find_toolkit().include}", "-DFASTFP8_NCCL"]


def compile_fake_nccl(folder: Path, headers: build.Nccl) -> Path:
    shared, source = ["-shared", "-fPIC", "-Wl,-soname,libnccl.so.2"], ROOT / "tests" / "fake_libnccl.cpp"
    return compile_program(folder / "libnccl.so.2", *shared, *with_headers(headers), source)


@pytest.fixture(scope="module")
def connection(headers: build.Nccl, tmp_path_factory: pytest.TempPathFactory) -> Connection:
    folder, comm = tmp_path_factory.mktemp("nccl"), ROOT / "csrc" / "comm"
    library = compile_fake_nccl(folder, headers)
    sources = [ROOT / "tests" / "nccl_connection.cpp", comm / "nccl.cpp", comm / "plan.cpp"]
    return Connection(compile_program(folder / "connect", *with_headers(headers), *sources, "-ldl"), library)


REGISTER, CREATE = "register 1000 {bytes} flags=1", "create signals=124 "


def test_connection_asks_for_what_the_kernels_need(connection: Connection, headers: build.Nccl) -> None:
    code, said, calls = connection.run()
    assert code == 0
    assert said[:3] == [
        f"headers {headers.version}: ''",
        "window 77 rank 3 contexts 3 signals 124",  # 4 x 3 channels x 2 nodes x 5 slots and 2 x 2 mails
        "0 0 10000 20000 ",
    ]
    assert calls == [
        "properties of 1234: size 1, version 1",
        REGISTER.format(bytes=said[4].split()[1]),
        CREATE + "counters=0 contexts=3 connection=2 strong=0 va=0 barriers=0000 force=0",
        "pointer 77 0 0",
        "pointer 77 0 1",
        "destroy rank 3",
        "deregister 77",
    ], "weak signals by index, railed; given back once"


def test_connection_names_both_versions(connection: Connection, headers: build.Nccl) -> None:
    said, calls = connection.error(FAKE_NCCL_VERSION="23008")
    assert f"built with the headers of NCCL {headers.version}, the library in this process is NCCL 2.30.8" in said
    assert calls == []
    said, calls = connection.error(FAKE_NCCL_VERSION="23005")
    assert "the rails need NCCL 2.30.7 or newer, the library in this process is NCCL 2.30.5" in said
    assert calls == []
    versioned = tuple(map(int, headers.version.split("."))) >= (2, 31)
    code, _, _ = connection.run(FAKE_NCCL_VERSION="29901")
    assert code == (0 if versioned else 1), "from 2.31 on a newer library takes older structures"


def test_connection_wants_the_library_that_torch_opened(connection: Connection) -> None:
    code, said, _ = connection.run(library=False)
    assert code == 1
    assert "no libnccl.so.2 has been opened in this process" in said[-1]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FAKE_NCCL_RANKS": "8"}, "the communicator has 8 ranks, the buffer 4"),
        ({"FAKE_NCCL_TEAMS": "1"}, "NCCL finds 1 groups of GPUs that reach each other's memory"),
        ({"FAKE_NCCL_GIN": "0"}, "NCCL has no GPU-initiated networking between the nodes"),
        ({"FAKE_NCCL_DEVICE_API": "0"}, "device API is not supported"),
        ({"FAKE_NCCL_FAIL": "ncclCommQueryProperties"}, "NCCL says a pretended failure (the cable is pretended too)"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_connection_refuses_before_it_takes_anything(
    connection: Connection, environment: dict[str, str], words: str
) -> None:
    said, calls = connection.error(**environment)
    assert words in said
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("environment", "words", "undone"),
    [
        ({"FAKE_NCCL_FAIL": "ncclDevCommCreate"}, "creating the device communicator: NCCL says", ["deregister 77"]),
        ({"FAKE_NCCL_LSA": "4"}, "rank 3 is GPU 1 of 4", ["destroy rank 3", "deregister 77"]),
        ({"FAKE_NCCL_CONTEXTS": "0"}, "no network context", ["destroy rank 3", "deregister 77"]),
        ({"FAKE_NCCL_FAIL": "ncclGetLsaDevicePointer"}, "neighbour's window", ["destroy rank 3", "deregister 77"]),
    ],
    ids=lambda v: "-".join(v.values()) if isinstance(v, dict) else "",
)
def test_connection_gives_back_what_it_took(
    connection: Connection, environment: dict[str, str], words: str, undone: list[str]
) -> None:
    said, calls = connection.error(**environment)
    assert words in said
    assert [c for c in calls if c.startswith(("destroy", "deregister"))] == undone


def test_a_failure_of_closing_is_told_once(connection: Connection) -> None:
    said, calls = connection.error(FAKE_NCCL_FAIL="ncclDevCommDestroy")
    assert "closing the rails: NCCL says a pretended failure" in said
    assert calls[-2:] == ["destroy rank 3", "deregister 77"]


def test_only_plain_calls_of_gin() -> None:
    """What every back end has: nothing of one of them, no strong signal, no signal by address."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / "comm" / "kernels" / "rail_nccl.cuh").read_text())
    used = set(re.findall(r"\bnccl[A-Z]\w+", text))
    assert used == {
        "ncclGin",
        "ncclGinSignal_t",
        "ncclGin_WeakSignalInc",
        "ncclGin_None",
        "ncclCoopWarp",
        "ncclTeamRail",
    }
    assert set(re.findall(r"\bgin\(flag\)\.(\w+)", text)) == {"put", "signal", "readSignal"}


@dataclass
class Compiled:
    usage: dict[str, dict[str, int]]
    ptx: str

    def body(self, kernel: str) -> str:
        return self.ptx.split(f".entry {kernel}(")[1].split(".entry ")[0]


def compile_module(module: str, headers: build.Nccl, folder: Path) -> Compiled:
    """As the build left it, or compiled here where the headers came after the build."""
    built = backends.built_kernels()["modules"].get(module)
    if built is not None:
        return Compiled(built, (backends.KERNELS / f"{module}.ptx").read_text())
    source = ROOT / "csrc" / "comm" / "instantiations" / f"{module}.cu"
    usage = build._compile(source, build.find_toolkit(), headers, folder)
    return Compiled(usage, (folder / f"{module}.ptx").read_text())


@pytest.fixture(scope="module")
def compiled(headers: build.Nccl, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_module("comm_nccl", headers, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("of", ["nccl", "nccl_traced"])
def test_kernels_keep_to_their_registers(headers: build.Nccl, of: str, tmp_path: Path) -> None:
    usage = compile_module(f"comm_{of}", headers, tmp_path).usage
    assert sorted(usage) == sorted(f"comm_{name}_{of}" for name in KERNELS)
    for use in usage.values():
        assert use["registers"] <= MOST_REGISTERS
        assert use["spill_bytes"] == 0
        assert use["stack"] <= build.NCCL_STACK, "a word that a fence of NCCL's stores to"


def test_ptx_of_the_rails(compiled: Compiled, connection: Connection) -> None:
    """Nothing to link, a second structure by value, signals read by acquiring loads and announced behind a fence."""
    constants = int(connection.run()[1][3].removeprefix("constants "))
    externs = re.findall(r"\.extern (.*)", compiled.ptx)
    assert [e for e in externs if "shared" not in e and "__assertfail" not in e] == []
    for plan in plans(geometry(2, 2), "nccl", rail_constants=b"some"):
        body = compiled.body(plan.kernel)
        sizes = re.findall(r"\.param \.align 8 \.b8 \w+_param_(\d+)\[(\d+)\]", body)
        assert [int(at) for at, _ in sizes] == [0, len(plan.arguments) - 1]
        assert [int(size) for _, size in sizes] == [len(plan.arguments[0]), constants], "nvcc and g++ agree"
        assert "ld.acquire.sys.b64" in body, "readSignal"
        assert "fence.acq_rel.sys" in body, "a put through the proxy"
        assert "fence.release.gpu" in body, "a put through the card's own queue"
        assert "%nanosleep" not in body
        assert "trap;" not in body, "NCCL's device code is to return, as ours does"
