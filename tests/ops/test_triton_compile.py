"""The Triton kernels compiled for real GPUs, from the very arguments that the host functions launch them with."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

triton = pytest.importorskip("triton")
from recorder import CompiledKernel, Recorder  # noqa: E402

from fastfp8.counters import FIELDS, new_counters  # noqa: E402
from fastfp8.layout import empty_scale, scale_shape, scale_shape_of  # noqa: E402
from fastfp8.reference.adamw import factors  # noqa: E402
from fastfp8.triton_kernels import (  # noqa: E402
    adamw,
    dequantize,
    e5m6,
    gemm,
    gemm_swiglu_quantize,
    grouped_gemm,
    grouped_wgrad,
    quantize,
    quantize_both,
    requantize_transpose,
    swiglu_quantize,
)

BLOCKS = [(1, 128), (128, 1), (128, 128)]
CAPABILITIES = [89, 90, *(pytest.param(c, marks=pytest.mark.slow) for c in (100, 120))]
# Bytes of shared memory that a block may have: CUDA programming guide, table of compute capabilities.
SHARED_MEMORY = {89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# Bytes of stack that a thread may get for spilled registers: what the GEMMs' large tile, at the limit of 255 registers,
# needs at most under Triton 3.6 to 3.9. All else needs none.
STACK = {89: 8, 90: 0, 100: 16, 120: 24}


def record(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> Recorder:
    recorder = Recorder(getattr(module, name))
    monkeypatch.setattr(module, name, recorder)
    return recorder


def compile_gemm(monkeypatch: pytest.MonkeyPatch, m: int, b_block: tuple[int, int], capability: int) -> CompiledKernel:
    recorder = record(monkeypatch, gemm, "gemm_kernel")
    operands = []
    for rows, block in ((m, (1, 128)), (256, b_block)):
        data = torch.zeros(rows, 512, dtype=torch.float8_e4m3fn)
        operands += [data, empty_scale(data, scale_shape(rows, 512, block), block)]
    gemm.gemm(*operands, b_block, torch.bfloat16, torch.zeros(m, 256))
    return recorder.compile(capability)


def compile_grouped(monkeypatch: pytest.MonkeyPatch, op: str, rows: int, capability: int) -> CompiledKernel:
    """Four groups of ``rows`` rows on average, or at most."""
    recorder = record(monkeypatch, grouped_gemm, "grouped_gemm_kernel")
    operands = []
    for shape, block in (((4 * rows,) if op == "grouped_gemm" else (4, rows), (1, 128)), ((4, 256), (128, 128))):
        data = torch.zeros(*shape, 512, dtype=torch.float8_e4m3fn)
        operands += [data, empty_scale(data, scale_shape_of(data.shape, block), block)]
    words = [torch.zeros(n, dtype=torch.int32) for n in (4, 1)]
    getattr(grouped_gemm, op)(*operands, *words, torch.bfloat16)
    return recorder.compile(capability)


def compile_wgrad(monkeypatch: pytest.MonkeyPatch, n: int, accumulate: bool, capability: int) -> CompiledKernel:
    recorder = record(monkeypatch, grouped_wgrad, "grouped_wgrad_kernel")
    operands = []
    for rows in (n, 256):
        data = torch.zeros(rows, 512, dtype=torch.float8_e4m3fn)
        operands += [data, empty_scale(data, scale_shape(rows, 512, (1, 128)), (1, 128))]
    words = [torch.zeros(n, dtype=torch.int32) for n in (4, 1)]
    grouped_wgrad.grouped_wgrad(*operands, *words, torch.zeros(4, n, 256), accumulate)
    return recorder.compile(capability)


def compile_adamw(
    monkeypatch: pytest.MonkeyPatch, fp8: bool, counted: bool, stochastic: bool, capability: int
) -> CompiledKernel:
    """Of a bfloat16 parameter with a float32 gradient, all of it aligned."""
    recorder = record(monkeypatch, adamw, "adamw_kernel")
    monkeypatch.setattr(adamw, "require_fp8", lambda op, device: divmod(capability, 10))
    wide, moment = torch.zeros(256, 512), torch.zeros(256, 512, dtype=torch.bfloat16)
    data, scale = torch.zeros(256, 512, dtype=torch.float8_e4m3fn), torch.zeros(2, 4)
    lists = ([moment], [wide], [wide], [moment], [moment], [data, scale, data.t().contiguous(), scale.t().contiguous()])
    f = factors(1, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    counters = [new_counters("cpu")] if counted else []
    adamw.adamw(*lists[:5], lists[5] if fp8 else [], counters, [0], 1, f, stochastic, 0)
    return recorder.compile(capability)


def opcodes(kernel: CompiledKernel) -> list[str]:
    return re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]+)", kernel.asm["ptx"], re.MULTILINE)


def check_common(kernel: CompiledKernel, capability: int) -> None:
    ops = opcodes(kernel)
    assert len(ops) > 50
    assert not [op for op in ops if ".ftz" in op or "approx" in op or op.startswith("div.full")]
    assert kernel.metadata.shared <= SHARED_MEMORY[capability]
    assert stack_bytes(kernel) <= STACK[capability]


def stack_bytes(kernel: CompiledKernel) -> int:
    """The stack that ptxas gave a thread, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r" STACK:(\d+) ", usage)
    assert found, usage
    return int(found[1])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_quantize(monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], pow2: bool, capability: int) -> None:
    recorder = record(monkeypatch, quantize, "quantize_kernel")
    monkeypatch.setattr(quantize, "require_fp8", lambda op, device: divmod(capability, 10))
    quantize.quantize(torch.zeros(256, 512, dtype=torch.bfloat16), block, pow2, 0.0)
    kernel = recorder.compile(capability)
    check_common(kernel, capability)
    check_quantizes(recorder, kernel)
    # One read of x, in the widest loads there are.
    loads = [op for op in opcodes(kernel) if op.startswith("ld.global")]
    tile, threads = recorder.kwargs["TILE_ROWS"] * recorder.kwargs["TILE_COLS"], 32 * recorder.kwargs["num_warps"]
    assert loads == ["ld.global.v4.b32"] * (tile // threads // 8)


def check_quantizes(recorder: Recorder, kernel: CompiledKernel) -> None:
    """What decides the bits of codes and scales."""
    ops = opcodes(kernel)
    floating_divisions = {op for op in ops if op.startswith("div.") and ".f" in op}
    assert floating_divisions == {"div.rn.f32"}
    direct, by_fp16 = {"cvt.rn.satfinite.e4m3x2.f32"}, {"cvt.rn.satfinite.e4m3x2.f16x2", "cvt.rz.f16.f32"}
    conversions = {op for op in ops if op.startswith("cvt") and ("e4m3x2.f" in op or op.endswith("f16.f32"))}
    assert conversions == direct or (conversions == by_fp16 and recorder.kwargs["STICKY"])
    assert not [op for op in ops if op.startswith("fma")]


def check_transposes(
    recorder: Recorder, kernel: CompiledKernel, capability: int, in_bytes: int, written: int, grouped: bool
) -> None:
    """A tile of elements of ``in_bytes`` is read once, 16 bytes a thread, and written ``written`` times, as many.

    All else is scales and offsets, and one atomic, by which bad offsets are reported.
    """
    check_common(kernel, capability)
    check_quantizes(recorder, kernel)
    ops, each = opcodes(kernel), 128 * 128 // (32 * recorder.kwargs["num_warps"]) // 16
    accesses, store = [op for op in ops if re.match(r"(ld|st)\.global", op)], f"st.global.v{4 // in_bytes}.b32"
    assert accesses.count("ld.global.v4.b32") == in_bytes * each
    assert accesses.count(store) == in_bytes * written * each
    assert set(accesses) <= {"ld.global.v4.b32", store, "ld.global.b32", "st.global.b32"}
    assert len([op for op in ops if op.startswith(("atom.", "red."))]) == (1 if grouped else 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("groups", [0, 6])
def test_quantize_both(monkeypatch: pytest.MonkeyPatch, groups: int, capability: int) -> None:
    recorder = record(monkeypatch, quantize_both, "quantize_both_kernel")
    monkeypatch.setattr(quantize_both, "require_fp8", lambda op, device: divmod(capability, 10))
    x = torch.zeros(256, 512, dtype=torch.bfloat16)
    if groups:
        words = [torch.zeros(n, dtype=torch.int32) for n in (groups, 1)]
        quantize_both.quantize_grouped_both(x, *words, False, 0.0)
    else:
        quantize_both.quantize_both(x, False, 0.0)
    check_transposes(recorder, recorder.compile(capability), capability, in_bytes=2, written=2, grouped=groups > 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("groups", [0, 6])
def test_requantize_transpose(monkeypatch: pytest.MonkeyPatch, groups: int, capability: int) -> None:
    recorder = record(monkeypatch, requantize_transpose, "requantize_transpose_kernel")
    monkeypatch.setattr(requantize_transpose, "require_fp8", lambda op, device: divmod(capability, 10))
    data = torch.zeros(256, 512, dtype=torch.float8_e4m3fn)
    t = data, empty_scale(data, scale_shape(256, 512, (1, 128)), (1, 128))
    if groups:
        words = [torch.zeros(n, dtype=torch.int32) for n in (groups, 1)]
        requantize_transpose.requantize_grouped_transpose(*t, *words)
    else:
        requantize_transpose.requantize_transpose(*t)
    check_transposes(recorder, recorder.compile(capability), capability, in_bytes=1, written=1, grouped=groups > 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_dequantize(monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], capability: int) -> None:
    recorder = record(monkeypatch, dequantize, "dequantize_kernel")
    data = torch.zeros(256, 512, dtype=torch.float8_e4m3fn)
    scale = empty_scale(data, scale_shape(256, 512, block), block)
    for dtype, narrow in ((torch.bfloat16, "cvt.rn.bf16x2.f32"), (torch.float16, "cvt.rn.f16x2.f32")):
        dequantize.dequantize(data, scale, block, dtype)
        kernel = recorder.compile(capability)
        check_common(kernel, capability)
        ops = opcodes(kernel)
        assert "cvt.rn.f16x2.e4m3x2" in ops
        assert narrow in ops
        assert not [op for op in ops if op.startswith("fma")]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("m", [16, 256])
@pytest.mark.parametrize("b_block", [(128, 128), (1, 128)], ids=str)
def test_gemm(monkeypatch: pytest.MonkeyPatch, b_block: tuple[int, int], m: int, capability: int) -> None:
    kernel = compile_gemm(monkeypatch, m, b_block, capability)
    check_common(kernel, capability)
    check_product(kernel, m, capability)
    # The product of the scales and the sum with c are roundings of their own.
    assert float_arithmetic(kernel) == {"fma.rn.f32", "mul.rn.f32", "add.rn.f32"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("m", [16, 256])
@pytest.mark.parametrize("op", ["grouped_gemm", "masked_grouped_gemm"])
def test_grouped_gemm(monkeypatch: pytest.MonkeyPatch, op: str, m: int, capability: int) -> None:
    """The same product as gemm; and one atomic, by which bad offsets or counts are reported."""
    kernel = compile_grouped(monkeypatch, op, m, capability)
    check_common(kernel, capability)
    check_product(kernel, m, capability)
    assert float_arithmetic(kernel) == {"fma.rn.f32", "mul.rn.f32"}
    assert [o for o in opcodes(kernel) if o.startswith(("atom.", "red."))] == ["atom.global.gpu.acq_rel.or.b32"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("n", "accumulate"), [(16, True), (256, False)], ids=str)
def test_grouped_wgrad(monkeypatch: pytest.MonkeyPatch, n: int, accumulate: bool, capability: int) -> None:
    """The same product as gemm, a sum where it accumulates; and one atomic, by which bad offsets are reported."""
    kernel = compile_wgrad(monkeypatch, n, accumulate, capability)
    check_common(kernel, capability)
    check_product(kernel, n, capability)
    assert float_arithmetic(kernel) == {"fma.rn.f32", "mul.rn.f32"} | ({"add.rn.f32"} if accumulate else set())
    assert [o for o in opcodes(kernel) if o.startswith(("atom.", "red."))] == ["atom.global.gpu.acq_rel.or.b32"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("pow2", [False, True])
def test_swiglu_quantize(monkeypatch: pytest.MonkeyPatch, pow2: bool, capability: int) -> None:
    """gate and up are read once, in the widest loads there are; exp is an fma at a time, divisions are exact."""
    recorder = record(monkeypatch, swiglu_quantize, "swiglu_quantize_kernel")
    monkeypatch.setattr(swiglu_quantize, "require_fp8", lambda op, device: divmod(capability, 10))
    swiglu_quantize.swiglu_quantize(torch.zeros(256, 1024, dtype=torch.bfloat16), torch.ones(256), 7.0, pow2, 0.0)
    kernel = recorder.compile(capability)
    check_common(kernel, capability)
    check_swiglu(kernel)
    tile, threads = recorder.kwargs["TILE_ROWS"] * recorder.kwargs["TILE_COLS"], 32 * recorder.kwargs["num_warps"]
    loads = [op for op in opcodes(kernel) if op == "ld.global.v4.b32"]
    assert len(loads) == 2 * (tile // threads // 8)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("counted", [False, True], ids=["", "counted"])
@pytest.mark.parametrize("groups", [0, 4])
def test_gemm_swiglu_quantize(monkeypatch: pytest.MonkeyPatch, groups: int, counted: bool, capability: int) -> None:
    recorder = record(monkeypatch, gemm_swiglu_quantize, "gemm_swiglu_quantize_kernel")
    monkeypatch.setattr(gemm_swiglu_quantize, "require_fp8", lambda op, device: divmod(capability, 10))
    operands, rows = [], 256
    for shape, block in (((rows, 512), (1, 128)), ((*([groups] if groups else []), 512, 512), (128, 128))):
        data = torch.zeros(shape, dtype=torch.float8_e4m3fn)
        operands += [data, empty_scale(data, scale_shape_of(shape, block), block)]
    words = [torch.zeros(n, dtype=torch.int32) for n in (groups, 1)] if groups else [None, None]
    options = (torch.ones(rows), 7.0, True, 0.0, True, new_counters("cpu") if counted else None)
    gemm_swiglu_quantize.gemm_swiglu_quantize(*operands, *words, *options)
    kernel = recorder.compile(capability)
    check_common(kernel, capability)
    check_swiglu(kernel)
    check_instruction(kernel, "m64n64k32", capability)
    atomics = [o for o in opcodes(kernel) if o.startswith(("atom.", "red."))]
    counts = [o for o in atomics if o.endswith(".u64")]
    assert len(counts) == (len(FIELDS) if counted else 0)
    assert [o for o in atomics if o not in counts] == (["atom.global.gpu.acq_rel.or.b32"] if groups else [])


def check_swiglu(kernel: CompiledKernel) -> None:
    ops = opcodes(kernel)
    assert {op for op in ops if op.startswith("div.") and ".f" in op} == {"div.rn.f32"}
    assert float_arithmetic(kernel) == {"fma.rn.f32", "mul.rn.f32", "add.rn.f32"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(
    ("fp8", "counted"), [(False, False), (True, False), (True, True)], ids=["plain", "fp8", "counted"]
)
def test_adamw(monkeypatch: pytest.MonkeyPatch, fp8: bool, counted: bool, stochastic: bool, capability: int) -> None:
    """Every rounding is one of the contract; a thread has four elements at a time, 16 bytes of FP32."""
    kernel = compile_adamw(monkeypatch, fp8, counted, stochastic, capability)
    check_common(kernel, capability)
    ops = opcodes(kernel)
    assert float_arithmetic(kernel) <= {"mul.rn.f32", "mul.f32", "add.rn.f32", "add.f32", "sub.rn.f32", "sub.f32"}
    assert {op for op in ops if op.startswith(("sqrt", "div.")) and ".f" in op} == {"sqrt.rn.f32", "div.rn.f32"}
    atomics = [op for op in ops if op.startswith(("atom.", "red."))]
    assert len(atomics) == (len(FIELDS) * adamw.BLOCK_STRIPS if counted else 0)
    # Of the table 64 bits at a time, of the list of tiles too; scales one by one. Four BF16 are 8 bytes, four codes 4.
    table = {"ld.global.b64", "st.global.b32"} if fp8 else {"ld.global.b64"}
    four = {f"{op}.global.v{n}.b32" for op in ("ld", "st") for n in (2, 4)}
    assert {op for op in ops if op.startswith(("ld.global", "st.global"))} - {"st.global.v4.b32"} == (
        table | four - {"st.global.v4.b32"}
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("per_row", [False, True], ids=["1x128", "per row"])
def test_e5m6(monkeypatch: pytest.MonkeyPatch, per_row: bool, capability: int) -> None:
    monkeypatch.setattr(e5m6, "require_fp8", lambda op, device: divmod(capability, 10))
    words, scale = torch.zeros(256, 192, dtype=torch.int32), empty_scale(torch.zeros(0), (256, 4), (1, 128))
    scale = scale[:, :1] if per_row else scale
    calls = {
        "pack_e5m6": (torch.zeros(256, 512, dtype=torch.bfloat16), False, 0.0, per_row),
        "unpack_e5m6": (words, scale, 512, per_row, torch.bfloat16),
        "requantize_e5m6": (words, scale, 512, per_row, False),
    }
    for op, args in calls.items():
        recorder = record(monkeypatch, e5m6, f"{op}_kernel")
        getattr(e5m6, op)(*args)
        kernel = recorder.compile(capability)
        check_common(kernel, capability)
        assert {o for o in opcodes(kernel) if o.startswith("div.") and ".f" in o} <= {"div.rn.f32"}
        assert not [o for o in opcodes(kernel) if o.startswith("fma")]


def float_arithmetic(kernel: CompiledKernel) -> set[str]:
    return {op.replace("x2", "") for op in opcodes(kernel) if re.match(r"(fma|mul|add|sub)\..*f32", op)}


def check_product(kernel: CompiledKernel, m: int, capability: int) -> None:
    check_instruction(kernel, {16: "m64n64k32", 256: "m64n128k32"}[m], capability)


def check_instruction(kernel: CompiledKernel, wide: str, capability: int) -> None:
    """What decides the bits of a product, and that its loads are asynchronous."""
    ops = opcodes(kernel)
    products = {op for op in ops if re.match(r"(wgmma\.mma|mma\.|tcgen05\.mma)", op)}
    # One instruction whatever the tile, for a row's bits must not depend on M.
    assert (
        products
        == {
            89: {"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"},
            90: {f"wgmma.mma_async.sync.aligned.{wide}.f32.e4m3.e4m3"},
            100: {"tcgen05.mma.cta_group::1.kind::f8f6f4"},
            120: {"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"},
        }[capability]
    )
    assert [op for op in ops if op.startswith("cp.async")]  # the loads of the next k-blocks are in flight


def test_wgmma_starts_each_k_block_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """scale-d of the first of the four products is 0, so that nothing but the promotion adds k-blocks up."""
    kernel = compile_gemm(monkeypatch, 256, (128, 128), 90)
    scale_d = re.findall(r"wgmma\.mma_async[^;]*\}, %\w+, %\w+, ([%\w]+), 1, 1;", kernel.asm["ptx"])
    assert [value == "0" for value in scale_d] == [True, False, False, False]
    assert "wgmma.wait_group.sync.aligned" in opcodes(kernel)
