"""The families of the benchmark on a machine without a GPU: that they run, and that what they tell is so."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import multiprocessing
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BACKENDS
from test_plan import DENSE_TABLE

import bench
import fastfp8
from bench import borrowed, comm, cpu, emulator, family, sass, shapes, static
from bench.case import Case, HostTimer, Session, Unavailable
from bench.rows import KINDS, NotRun, Row
from fastfp8 import _C
from fastfp8.backends import KERNELS, built_kernels

needs_emulator = pytest.mark.skipif(
    (BACKENDS["emulator"].why_not() or "") != "", reason=str(BACKENDS["emulator"].why_not())
)
SESSION = Session(2, tiny=True, timers={"cpu": HostTimer()})


def measure(works: Any, name: str) -> tuple[list[Row], list[NotRun]]:
    report = family.Report()
    family.run(name, works, SESSION, report)
    return report.rows, report.not_run


@functools.cache
def tiny(name: str) -> tuple[list[Row], list[NotRun]]:
    return measure(importlib.import_module(f"bench.{name}").works(tiny=True), name)


@functools.cache
def static_rows() -> tuple[list[Row], list[NotRun]]:
    return measure(static.works(tiny=False), "static")


@pytest.mark.parametrize("name", bench.FAMILIES)
def test_family_runs(name: str) -> None:
    """Nothing fails, whatever is missing here, and a row can be measured again by the op and the shape it names."""
    works = importlib.import_module(f"bench.{name}").works(tiny=True)
    names = [f"{work.op} {work.shape}" for work in works]
    assert len(names) == len(set(names))
    rows, not_run = tiny(name)
    assert not [n for n in not_run if n.failed]
    assert rows or not_run
    keys = Counter(row.key for row in rows)
    assert set(keys.values()) <= {1}
    for row in rows:
        assert row.family == name
        assert row.kind in KINDS
        assert f"{row.op} {row.shape}" in names
        assert row.lower <= row.median <= row.upper
        assert row.passed
        assert not row.ratios or row.ours


# cpu


def test_cpu_bars() -> None:
    """The first two of a bar are ratios; the others are for what it costs, however long the peer took."""
    told = {w.op: w.case if isinstance(w, cpu.Import) else w for w in cpu.works(tiny=False)}
    cases = {op: (c.unit, c.bar, c.bar_on, c.shape) for op, c in told.items() if isinstance(c, Case)}
    assert cases == {
        "gemm": ("ms", 3.0, None, "2048x2048x2048"),
        "torch.ops.fastfp8.quantize": ("us", 60.0, "median", "1x128"),
        "import fastfp8, beyond torch": ("s", 0.3, "median", ""),
        "quantize 1x128": ("ms", 12.0, None, "4096x7168"),
        "quantize 128x1": ("ms", 12.0, None, "4096x7168"),
        "quantize 128x128": ("ms", 12.0, None, "4096x7168"),
        "dequantize 1x128": ("ms", None, None, "4096x7168"),
    }
    least = {w.op for w in cpu.works(tiny=False) if w.priority == 0}
    assert least == {"gemm", "quantize 1x128", "torch.ops.fastfp8.quantize"}


def test_cpu_rows_have_peers() -> None:
    rows, _ = tiny("cpu")
    ours = {row.op: row for row in rows if row.ours}
    alone = {op for op, row in ours.items() if not row.ratios}
    assert alone == {"Triton modules it imports"}
    assert (ours["Triton modules it imports"].median, ours["Triton modules it imports"].bar) == (0.0, 0.0)
    for row in ours.values():
        assert all(0 < least <= most for least, _, most in row.ratios.values())


@pytest.mark.parametrize(
    ("op", "name", "wrong"),
    [
        ("gemm", "gemm", lambda a, b: torch.zeros(64, 64, dtype=torch.bfloat16)),
        (
            "quantize 128x1",
            "quantize",
            lambda x, block: fastfp8.ScaledTensor((0.97 * x).to(torch.float8_e4m3fn), *ONES),
        ),
        ("dequantize 1x128", "dequantize", lambda t: t.data.bfloat16()),
    ],
)
def test_cpu_checks_outputs(monkeypatch: pytest.MonkeyPatch, op: str, name: str, wrong: Any) -> None:
    """An op that is wrong gets no time."""
    (work,) = (w for w in cpu.works(tiny=True) if w.op == op)
    assert isinstance(work, Case)
    subject = work.build()
    right = getattr(fastfp8, name)
    subject.contestants[0].check(subject.contestants[0].run(0))  # type: ignore[misc]
    monkeypatch.setattr(fastfp8, name, wrong)
    output = subject.contestants[0].run(0)
    monkeypatch.setattr(fastfp8, name, right)
    with pytest.raises(AssertionError):
        subject.contestants[0].check(output)  # type: ignore[misc]


FP8, ONES = torch.float8_e4m3fn, (torch.ones(1, 256), (128, 1))


def test_imports_are_fresh() -> None:
    """Each takes as long as a first one: a second import of a module in one process takes microseconds."""
    rounds = cpu.ImportTimer().time(cpu._imports(), 3)
    assert [len(times) for times in rounds] == [3, 3]
    assert min(map(min, rounds)) > 1e-3


def test_a_failing_import_is_told() -> None:
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        cpu.measure_imports([["no_such_module"]])


# static


def test_static_rows_say_what_the_build_says() -> None:
    rows, not_run = static_rows()
    assert not not_run or not_run[0].op == "quantize_kernel"
    ours = {(row.op, row.unit): row for row in rows if row.backend == static.CUDA and row.kind == "static"}
    kernels = {k: v for made in built_kernels()["modules"].values() for k, v in made.items()}
    assert {op for op, _ in ours} == set(kernels)
    assert {kernel for kernel in kernels if not static.is_comm(kernel)} == set(static.plans())
    for kernel, used in kernels.items():
        registers, comm = ours[kernel, "registers"], static.is_comm(kernel)
        assert registers.median == used["registers"]
        assert registers.bar == (128 if comm else used["registers"])
        assert ours[kernel, "bytes of stack"].median == used["stack"]
        assert ours[kernel, "bytes of stack"].bar == ours[kernel, "bytes of spills"].bar == 0
        assert (1 if comm else 64 << 10) < ours[kernel, "bytes of shared memory"].median <= 227 << 10


def test_static_rows_of_the_code() -> None:
    rows, not_run = static_rows()
    if any("nvdisasm" in str(row.note) for row in rows) or not_run:
        pytest.skip("no triton package, from which the disassembler comes")
    found = {(row.op, row.shape, row.unit): row.median for row in rows}
    for kernel in static.plans():
        tile_m, tile_n = map(int, kernel.removesuffix("_pair").removesuffix("_split").split("_")[-1].split("x"))
        # Of one consumer's wgmma, all that it promotes by 64 rows; tiles of fewer rows have A and B change places.
        columns = tile_m if tile_m < 64 else tile_n // 2 if tile_m == 64 else tile_n
        passes = max(1, columns // 128)  # of a wgmma's most columns in one accumulator
        # Whole turns of the ring are unrolled, but in a split; k-blocks that make none have a copy of the code.
        split = kernel.endswith("_split")
        turn = 1 if split else static.configs()[kernel].stages
        copies = turn + (not split)
        assert found[kernel, "", static.K_BLOCKS] == turn
        assert found[kernel, "", "QGMMA"] == 4 * passes * copies
        if "swiglu" in kernel:  # which has those of its exponential and its divisions too
            assert found[kernel, "", "FFMA"] > columns // 2 * copies
        else:
            assert found[kernel, "", "FFMA"] == columns // 2 * copies
        assert found[kernel, "", static.SHARE] == 100 * found[kernel, "", static.OTHERS] / (columns // 2)
        assert found[kernel, "", "LDL and STL"] == 0
        assert columns // 2 < found[kernel, "", "instructions of the main loop"] < found[kernel, "", "instructions"]
    triton = {(op, shape) for op, shape, _ in found if op.endswith("_kernel")}
    assert len(triton) == 10
    for op, shape in triton:
        assert 16 <= found[op, shape, "registers"] <= 255
        assert ((op, shape, "QGMMA") in found) == (op == "gemm_kernel")


def test_modelled_rows_are_the_planners_choice() -> None:
    rows = [row for row in static_rows()[0] if row.kind == "modelled"]
    assert len(rows) == len(DENSE_TABLE) * len(static.BATCHES)
    for row in rows:
        config = _C.gemm_select(static.problem(*map(int, row.shape.split("x"))))
        assert (row.kind, row.unit, row.median) == ("modelled", "cycles", config.cycles)
        assert row.config == static.describe(config)
        assert "others measured" in str(row.note)


def test_without_a_disassembler_the_budgets_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tool(name: str) -> str:
        raise Unavailable(f"no {name}")

    monkeypatch.setattr(sass, "tool", no_tool)
    sass._disassembly.cache_clear()
    rows, not_run = measure(static.works(tiny=True), "static")
    sass._disassembly.cache_clear()
    (registers,) = (r for r in rows if r.op == "gemm_sm90_block_bf16_64x64" and r.unit == "registers")
    assert (registers.median, registers.note) == (168, "no nvdisasm")
    assert not [r for r in rows if r.unit == "instructions"]
    assert not any(n.failed for n in not_run)


def test_without_kernels_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (static, emulator):
        monkeypatch.setattr(module, "built_kernels", dict)
        _, not_run = measure(module.works(tiny=True), module.__name__.split(".")[1])
        assert any(str(KERNELS) in n.reason for n in not_run)
        assert not any(n.failed for n in not_run)


LOOPS = """
	.section	.text.other,"ax",@progbits
        /*0000*/                   QGMMA.64x32x32.F32 R24, gdesc[UR12], R24 ;
	.section	.text.kernel,"ax",@progbits
.L_outer:
        /*0000*/                   MOV R1, R2 ;
.L_again:
.L_inner:
        /*0010*/               @P0 QGMMA.64x32x32.F32 R24, gdesc[UR12], RZ, !UPT ;
        /*0020*/              @!P1 BRA `(.L_skip) ;
        /*0030*/                   FFMA R1, R2, R3, R4 ;
.L_skip:
        /*0040*/                   QGMMA.64x32x32.F32 R24, gdesc[UR12], R24 ;
        /*0050*/              @!P0 BRA `(.L_inner) ;
        /*0060*/                   LDS R1, [R2] ;
        /*0070*/               @P2 BRA `(.L_again) ;
        /*0080*/              @UP0 BRA `(.L_outer) ;
.L_end:
        /*0090*/                   BRA `(.L_end);
        /*00a0*/                   NOP;
"""


def test_sass_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass, "_disassembly", lambda cubin: LOOPS)
    code = sass.code(Path("x.cubin"), "kernel")
    assert len(code.instructions) == 11
    assert code.opcodes == {"MOV": 1, "QGMMA": 2, "BRA": 5, "FFMA": 1, "LDS": 1, "NOP": 1}
    assert code.instructions[1] == (0x10, "QGMMA.64x32x32.F32", " R24, gdesc[UR12], RZ, !UPT ")
    assert code.labels[".L_inner"] == code.labels[".L_again"] == 0x10
    assert [i.address for i in code.loop("QGMMA") or []] == [0x10, 0x20, 0x30, 0x40, 0x50]
    assert [i.address for i in code.loop("MOV") or []] == list(range(0, 0x90, 0x10))
    assert code.loop("NOP") is None
    assert code.loop("HMMA") is None
    with pytest.raises(ValueError, match=r"x\.cubin has no kernel kern"):
        sass.code(Path("x.cubin"), "kern")


# shapes


def test_shapes_are_the_planners_table() -> None:
    assert sorted((s.n, s.k) for s in shapes.DEEPSEEK_V3) == sorted(DENSE_TABLE)
    deepseek = shapes.EXPERTS[0]
    assert (deepseek.gate_up.n, deepseek.gate_up.k) == (4096, 7168)
    assert (deepseek.down.n, deepseek.down.k) == (7168, 2048)
    assert deepseek.gate_up.shape(64) == "64x4096x7168"


@pytest.mark.parametrize("linear", [*shapes.DEEPSEEK_V3, *shapes.QWEN3_235B, *shapes.GLM_45], ids=str)
def test_shapes_are_what_gemm_takes(linear: shapes.Linear) -> None:
    assert _C.gemm_select(static.problem(64, linear.n, linear.k)).cycles > 0


# emulator


@needs_emulator
def test_counts_are_those_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in every run, and close in a run at other times: a change beyond that is the kernel's."""
    kernel = "gemm_sm90_block_bf16_128x128"
    first = emulator.counted(kernel)
    assert first == emulator.counted(kernel)
    monkeypatch.setattr(emulator, "SEED", 1)
    other = emulator.counted(kernel)
    assert other != first
    assert other["FLOPs of wgmma"] == first["FLOPs of wgmma"] == 2 * emulator.M * emulator.N * emulator.K
    assert other["bytes by TMA"] == first["bytes by TMA"]
    assert other["instructions of warps"] == pytest.approx(first["instructions of warps"], rel=0.03)


@needs_emulator
def test_a_cluster_loads_b_once() -> None:
    alone, cluster = (emulator.counted(f"gemm_sm90_row_f32_128x128{name}") for name in ("", "_pair"))
    blocks = emulator.K // 128
    b = (emulator.N * emulator.K) * (emulator.M // 128)  # once for each row of tiles
    scales = 4 * blocks * (emulator.M * emulator.N // 128 * 2)
    a = (emulator.M * emulator.K) * (emulator.N // 128)
    assert alone["bytes by TMA"] == a + b + scales
    assert cluster["bytes by TMA"] == a + b // 2 + scales


@needs_emulator
def test_a_kernel_with_other_bits_gets_no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator.tensor_core, "gemm", lambda *_: torch.zeros(256, 256, dtype=torch.bfloat16))
    with pytest.raises(AssertionError, match="bits of the model"):
        emulator.counted("gemm_sm90_block_bf16_128x128")


@needs_emulator
def test_emulator_and_numpy_run_the_same_instructions() -> None:
    ours, peer = emulator._alu(9).contestants
    ours.check(ours.run(0))  # type: ignore[misc]
    assert peer.run(0)[5] == emulator._alu_by_numpy(9)[5] != emulator._alu_by_numpy(8)[5]


def test_an_emulator_that_cannot_be_built_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not built again for each of its works."""
    tried = []

    def fail(name: str) -> None:
        tried.append(name)
        raise RuntimeError("g++ does not like line 7\nof many")

    borrowed._import.cache_clear()
    monkeypatch.setattr(borrowed.importlib, "import_module", fail)
    rows, not_run = measure(emulator.works(tiny=True), "emulator")
    borrowed._import.cache_clear()
    assert not rows
    assert {(n.reason, n.failed) for n in not_run} == {("emulator cannot be built: g++ does not like line 7", False)}
    assert tried == ["emulator"]


def test_what_is_not_installed_is_named() -> None:
    borrowed._import.cache_clear()
    with pytest.raises(Unavailable, match="no_such_module is not installed"):
        borrowed.borrow("no_such_module")


# comm


def exchange(world: int = 2, **more: Any) -> comm.Exchange:
    return comm.Exchange(
        **{"op": comm.BASELINE, "backend": "gloo", "world": world, "tokens": 64, "hidden": 8, "rounds": 1, **more}
    )


def test_tokens_go_to_the_ranks_of_their_experts() -> None:
    """Once to each, whichever of its experts a token has there."""
    given = exchange(4, rendezvous="")
    owners = given.experts_of(1) // 64
    assert owners.shape == (64, 8)
    for target in range(4):
        expected = [token for token in range(64) if target in owners[token].tolist()]
        assert given.sent(1, target).tolist() == expected
    assert len(set(map(str, (given.sent(0, 0), given.sent(1, 0))))) == 2, "ranks have tokens of their own"


def test_what_is_not_there_is_said() -> None:
    _, not_run = measure([w for w in comm.works(tiny=True) if "gloo" not in w.op], "comm")
    reasons = {n.op: n.reason for n in not_run}
    if torch.cuda.device_count() < 2:
        for op in comm.OPS:
            assert "needs two" in reasons[f"{op}, nccl"]
    assert not any(n.failed for n in not_run)


def test_a_rank_that_fails_is_told_and_none_is_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank \d:.*no_such_backend"):
        comm.run_ranks(exchange(backend="no_such_backend", rendezvous=f"file://{tmp_path}/r"))
    assert not multiprocessing.active_children()


class Hanging(comm.Exchange):
    def tokens_of(self, rank: int, device: torch.device) -> torch.Tensor:
        time.sleep(60)
        raise RuntimeError("woke up")


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    hanging = Hanging(**dataclasses.asdict(exchange(rendezvous=f"file://{tmp_path}/r")))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="2 ranks came to no end in time"):
        comm.run_ranks(hanging, timeout=0.3)
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()


# gemm --explain


@pytest.mark.parametrize("machine", ["H100", "H20"])
def test_explain_lists_every_candidate(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import __main__

    assert __main__.main(["gemm", "--explain", "64", "576", "7168", "--machine", machine]) == 0
    lines = capsys.readouterr().out.splitlines()
    asked = static.problem(64, 576, 7168, num_sms=78 if machine == "H20" else 132, machine=machine)
    for config, rejected in _C.gemm_candidates(asked):
        (line,) = (found for found in lines if found.strip().startswith(f"{config.name}  "))
        assert f"{config.cycles:,.0f}" in line
        assert line.endswith("chosen" if config.name == _C.gemm_select(asked).name else rejected)
    with pytest.raises(SystemExit):
        __main__.main(["gemm", "--explain", "64", "576", "7168", "--machine", "B200"])
