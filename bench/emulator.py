"""The tests' emulator: what it counts for our kernels, and how fast it is.

The first use compiles it, in about a minute.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastfp8
from fastfp8 import _C, ScaledTensor
from fastfp8.backends import KERNELS, built_kernels
from fastfp8.layout import BLOCK, BLOCKS, Block
from fastfp8.reference import tensor_core

from .borrowed import borrow
from .case import Case, Computed, Contestant, Session, Subject, Unavailable, Work
from .rows import Row
from .static import CUDA, SMS, SQUARE, TRITON, grouped_problem, is_comm, plans

# Bars in seconds: the peers say whether it was the machine.
ALU_S = 1.0  # ten million thread-instructions
TILE_S = 5.0

THREADS = 128
ALU_INSTRUCTIONS = 10_000_000
# A loop of ten instructions: integer, shift, logic, two kinds of FP32, comparison, branch.
_ALU = """
.version 8.5
.target sm_90a
.address_size 64
.visible .entry mixed(.param .u64 out, .param .u32 turns) {
  .reg .pred %p;
  .reg .b32 %r<8>;
  .reg .f32 %f<3>;
  .reg .b64 %rd<2>;
  ld.param.u64 %rd0, [out];
  ld.param.u32 %r5, [turns];
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, 0;
  mov.u32 %r2, 17;
  mov.f32 %f0, 0f3F800000;
  mov.f32 %f1, 0f3F000000;
LOOP:
  mad.lo.s32 %r2, %r2, %r0, %r1;
  xor.b32 %r3, %r2, %r0;
  shl.b32 %r4, %r3, 3;
  fma.rn.f32 %f0, %f0, %f1, %f1;
  add.rn.f32 %f2, %f0, %f1;
  and.b32 %r6, %r4, 255;
  cvt.rn.f32.s32 %f2, %r6;
  add.s32 %r1, %r1, 1;
  setp.lt.s32 %p, %r1, %r5;
  @%p bra LOOP;
  mul.wide.u32 %rd1, %r0, 4;
  add.u64 %rd1, %rd0, %rd1;
  st.global.u32 [%rd1], %r6;
  ret;
}
"""

# The launch whose counts are reported: four tiles of the largest instance, sixteen of the smallest.
M, N, K = 256, 256, 512
FIRST_GROUP = 100  # rows, where they are in two groups
SEED = 0
NOTE = f"seed {SEED}"


def works(tiny: bool) -> list[Work]:
    """``tiny`` has no bars on times, and counts one module's kernels and one Triton kernel."""
    k = 256 if tiny else 2048
    turns = (1_000 if tiny else ALU_INSTRUCTIONS) // (10 * THREADS) + 1
    alu, tile = functools.partial(_alu, turns), functools.partial(_tile, k)
    bars = (None, None) if tiny else (ALU_S, TILE_S)
    on = "median"
    found: list[Work] = [
        Case("emulator", "10 million thread-instructions", "mixed ALU kernel", "cpu", alu, 1, "s", bars[0], on),
        Case("emulator", f"one tile of {TILE_KERNEL}", f"128x128x{k}", "cpu", tile, 1, "s", bars[1], on),
    ]
    # Wgrad and SwiGLU have operands of their own, which nothing here makes. Dispatch and combine talk to other ranks:
    # tests/test_emulator_comm.py counts what they move.
    built = built_kernels().get("modules", {}).items()
    modules = [made for name, made in built if not is_comm(name) and "wgrad" not in name and "swiglu" not in name]
    for kernel in (kernel for made in modules[: 1 if tiny else None] for kernel in made):
        found.append(Computed(kernel, f"{M}x{N}x{K}", functools.partial(_gemm_counts, kernel)))
    for op in ("quantize", "dequantize"):
        for block in BLOCKS[: 1 if tiny else None]:
            op_name, shape = f"{op} {block[0]}x{block[1]}", f"{M}x{K}"
            found.append(Computed(op_name, shape, functools.partial(_triton_counts, op, op_name, block)))
    return found


def _backends() -> ModuleType:
    if not built_kernels():
        raise Unavailable(f"no kernels were built: {KERNELS} has no build.json")
    borrow("emulator")
    return borrow("backends")


# Its speed.

TILE_KERNEL = "gemm_sm90_block_bf16_128x128"


def _alu(turns: int) -> Subject:
    mixed = borrow("emulator").Machine().load(_ALU)["mixed"]
    out = torch.zeros(THREADS, dtype=torch.int32)

    def ours(_: int) -> Tensor:
        mixed.launch((1, 1, 1), (THREADS, 1, 1), args=[out.zero_(), turns])
        return out

    def check(got: Tensor) -> None:
        assert np.array_equal(got.numpy(), _alu_by_numpy(turns)), "not what NumPy makes of the same instructions"

    peer = Contestant("NumPy, 128 lanes a call", lambda _: _alu_by_numpy(turns))
    return Subject([Contestant("fastfp8", ours, check), peer])


def _alu_by_numpy(turns: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The kernel's arithmetic, a call of NumPy an instruction: what a simple emulator in Python could reach."""
    r0, r2, half = np.arange(THREADS, dtype=np.int32), np.full(THREADS, 17, np.int32), np.float32(0.5)
    r6, f0 = r0, np.ones(THREADS, np.float32)
    for r1 in range(turns):
        r2 = r2 * r0 + np.int32(r1)
        r3 = r2 ^ r0
        r4 = r3 << 3
        f0 = f0 * half + half
        _ = f0 + half
        r6 = r4 & 255
        _ = r6.astype(np.float32)
    return r6


def _tile(k: int) -> Subject:
    a, b = _operands(128, 128, k, SQUARE)
    out = torch.empty(128, 128, dtype=torch.bfloat16)
    emulator = _backends().Emulator(1, config="128x128")

    def ours(_: int) -> Tensor:
        emulator.gemm_into(out.fill_(torch.nan), a, b)
        return out

    def check(got: Tensor) -> None:
        _check_bits(got, a, b)

    peer = Contestant("model of the tensor core in torch", lambda _: _model(a, b, torch.bfloat16))
    return Subject([Contestant("fastfp8", ours, check), peer])


def _operands(m: int, n: int, k: int, b_block: Block) -> tuple[ScaledTensor, ScaledTensor]:
    generator = torch.Generator().manual_seed(SEED)
    left, right = (torch.randn(rows, k, generator=generator) for rows in (m, n))
    return fastfp8.quantize(left), fastfp8.quantize(right, b_block)


def _model(a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype) -> Tensor:
    """The bits that the kernel should give; on one core, as the emulator: on a busy machine two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return tensor_core.gemm(a.data, a.scale, b.data, b.scale, b.block, out_dtype, None)
    finally:
        torch.set_num_threads(threads)


def _check_bits(got: Tensor, a: ScaledTensor, b: ScaledTensor) -> None:
    assert torch.equal(got, _model(a, b, got.dtype)), "not the bits of the model of the tensor core"


# What it counts.


def counted(kernel: str) -> dict[str, float]:
    """Of one launch of an instance of the GEMM kernel, by the unit of the row. Its result is checked bit for bit."""
    backends = _backends()
    _, _, by, dtype, *config = kernel.split("_")  # gemm_sm90_block_bf16_128x128_pair
    if by == "grouped":
        return _counted_in_groups(kernel, torch.bfloat16 if dtype == "bf16" else torch.float32)
    a, b = _operands(M, N, K, SQUARE if by == "block" else (1, BLOCK))
    out_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    out = torch.full((M, N), torch.nan, dtype=out_dtype)
    emulator = backends.Emulator(SMS, SEED, " ".join(config))
    counters = emulator.gemm_into(out, a, b)
    _check_bits(out, a, b)
    return _by_unit(counters)


def _counted_in_groups(kernel: str, out_dtype: torch.dtype) -> dict[str, float]:
    """The rows in two groups, of which the first ends within a tile."""
    emulator = borrow("emulator")
    a, _ = _operands(M, N, K, SQUARE)
    weights = [fastfp8.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(g)), SQUARE) for g in (1, 2)]
    b, b_scale = (torch.cat([getattr(w, part) for w in weights]) for part in ("data", "scale"))
    ends, out = torch.tensor([FIRST_GROUP, M], dtype=torch.int32), torch.full((M, N), torch.nan, dtype=out_dtype)
    tensors = {"a": a.data, "a_scale": a.scale, "b": b, "b_scale": b_scale, "ends": ends, "out": out}
    tensors["error"] = torch.zeros(1, dtype=torch.int32)
    problem = grouped_problem(M, len(weights), N, K, str(out_dtype).removeprefix("torch."), SMS)
    plans = (_C.gemm_plan(problem, config) for config, _ in _C.gemm_candidates(problem))
    plan = next(plan for plan in plans if plan.kernel == kernel)
    counters = emulator.run_plan(plan, tensors, emulator.Machine(SEED))
    for rows, weight in zip((slice(FIRST_GROUP), slice(FIRST_GROUP, M)), weights, strict=True):
        _check_bits(out[rows], ScaledTensor(a.data[rows], a.scale[rows], a.block), weight)
    return _by_unit(counters)


def _by_unit(counters: Any) -> dict[str, float]:
    """Without ``warp_stalls``, which tell of the emulator's random timing and not of the kernel."""
    return {
        "instructions of warps": counters.instructions,
        "FLOPs of wgmma": counters.wgmma_flops,
        "bytes by TMA": counters.tma_bytes,
        "sectors of global memory": counters.global_sectors,
        "bank conflicts": counters.shared_bank_conflicts,
        "mbarrier instructions": counters.opcodes.get("mbarrier", 0),
    }


def _rows(op: str, shape: str, backend: str, values: dict[str, float]) -> list[Row]:
    where = ("emulator", op, shape, backend, "emulated")
    return [Row(*where, unit, *(float(v),) * 3, note=NOTE) for unit, v in values.items()]


def _gemm_counts(kernel: str, _: Session) -> list[Row]:
    if kernel not in plans():
        raise ValueError(f"no plan of the planner names the built kernel {kernel}")
    return _rows(kernel, f"{M}x{N}x{K}", CUDA, counted(kernel))


def _triton_counts(op: str, name: str, block: Block, _: Session) -> list[Row]:
    """Compiled by Triton for sm_90, on random BF16 values; the result is checked bit for bit."""
    backends = _backends()
    borrow("recorder")
    emulator = backends.Emulator(SMS, SEED)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(SEED)).bfloat16()
    exact = fastfp8.quantize(x, block)
    if op == "quantize":
        got = emulator.quantize(x, block)
        assert torch.equal(got.data.view(torch.uint8), exact.data.view(torch.uint8)), "other codes than the reference"
        assert torch.equal(got.scale, exact.scale), "other scales than the reference"
    else:
        assert torch.equal(emulator.dequantize(exact), fastfp8.dequantize(exact)), "other values than the reference"
    counts = {unit: count for unit, count in _by_unit(emulator.counters).items() if count}
    return _rows(name, f"{M}x{K}", TRITON, counts)
