"""The speed of the tests' emulator: thread-instructions of arithmetic, and a tile of the GEMM kernel with its wgmma."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

import fastfp8

from . import Row, row_from_samples, time_calls

# Bars in seconds.
ALU_S = 1.0  # ten million thread-instructions
TILE_S = 5.0

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
  .reg .b64 %rd;
  ld.param.u64 %rd, [out];
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
  st.global.u32 [%rd], %r6;
  ret;
}
"""


def measure(samples: int, tiny: bool) -> list[Row]:
    """All rows of the family, each on one core; ``tiny`` shrinks the work until the times mean nothing."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from backends import Emulator
    from emulator import Machine

    machine = Machine()
    threads, out = 128, torch.zeros(1, dtype=torch.int32)
    turns = 10 if tiny else ALU_INSTRUCTIONS // (10 * threads)
    mixed = machine.load(_ALU)["mixed"]
    run_alu = functools.partial(mixed.launch, (1, 1, 1), (threads, 1, 1), args=[out, turns])
    executed = run_alu().thread_instructions

    k = 256 if tiny else 2048
    a, b = fastfp8.quantize(torch.randn(128, k)), fastfp8.quantize(torch.randn(128, k), (128, 128))
    result = torch.empty(128, 128, dtype=torch.bfloat16)
    run_tile = functools.partial(Emulator(1, tile_n=128).gemm_into, result, a, b)
    run_tile()

    alu, tile = [], []
    for _ in range(samples):
        alu.append(time_calls(run_alu, 1) * ALU_INSTRUCTIONS / executed)
        tile.append(time_calls(run_tile, 1))
    return [
        row_from_samples("10 million thread-instructions", "mixed ALU kernel", "s", alu, ALU_S),
        row_from_samples("one tile of gemm_sm90_block_bf16_n128", f"128x128x{k}", "s", tile, TILE_S),
    ]
