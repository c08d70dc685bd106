"""The kernels of SwiGLU's backward, of FP8 gates and of presets compiled for real GPUs: as test_triton_compile.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import (
    CAPABILITIES,
    check_common,
    check_quantizes,
    check_swiglu,
    float_arithmetic,
    opcodes,
    record,
)

from fastfp8 import presets
from fastfp8.layout import empty_scale
from fastfp8.triton_kernels import quantize, swiglu_backward_quantize, swiglu_quantize

M, F = 256, 512
BF16, E4M3 = (torch.zeros(M, 2 * F, dtype=dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn))
SCALE = empty_scale(E4M3, (M, 2 * F // 128), (1, 128))
INPUTS = {"fp8": (E4M3, SCALE), "bf16": (BF16, None)}
# Gate and up, groups, whether the activation is dense: what is quick of the product with CAPABILITIES.
VARIANTS = [("fp8", 6, False), ("bf16", 0, False), ("fp8", 0, True)]
QUICK = [(*VARIANTS[0], 90), (*VARIANTS[1], 89)]


def backward_params() -> list[Any]:
    cases = [(*variant, capability) for variant in VARIANTS for capability in (89, 90, 100, 120)]
    return [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("kind", "groups", "dense", "capability"), backward_params())
def test_swiglu_backward_quantize(
    monkeypatch: pytest.MonkeyPatch, kind: str, groups: int, dense: bool, capability: int
) -> None:
    """No register is spilled, and each element is loaded twice: from memory, and from what the cache still has."""
    module, gate_up = swiglu_backward_quantize, INPUTS[kind]
    names = ("swiglu_backward_quantize", "sum_tiles")
    recorder, sums = (record(monkeypatch, module, f"{name}_kernel") for name in names)
    monkeypatch.setattr(module, "require_fp8", lambda op, device: divmod(capability, 10))
    words = [torch.zeros(n, dtype=torch.int32) for n in (groups, 1)] if groups else [None, None]
    module.swiglu_backward_quantize(BF16[:, :F], *gate_up, torch.ones(M), 7.0, *words, False, 0.0, dense)
    kernel = recorder.compile(capability)
    check_common(kernel, capability)
    assert {op for op in opcodes(kernel) if op.startswith("div.") and ".f" in op} == {"div.rn.f32"}
    assert float_arithmetic(kernel) == {"fma.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32"}
    ops, each = opcodes(kernel), module.CHUNK * 128 // (32 * module.NUM_WARPS)
    # Of three tensors, twice, as many elements at a time as are 16 bytes of BF16.
    assert len([op for op in ops if op.startswith("ld.global.v")]) == 2 * 3 * each // 8
    assert len([op for op in ops if op.startswith(("atom.", "red."))]) == (1 if groups else 0)
    total = sums.compile(capability)
    assert float_arithmetic(total) == {"add.rn.f32"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_swiglu_quantize_of_fp8(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    recorder = record(monkeypatch, swiglu_quantize, "swiglu_quantize_kernel")
    monkeypatch.setattr(swiglu_quantize, "require_fp8", lambda op, device: divmod(capability, 10))
    swiglu_quantize.swiglu_quantize(E4M3, torch.ones(M), 7.0, False, 0.0, SCALE)
    kernel = recorder.compile(capability)
    check_common(kernel, capability)
    check_swiglu(kernel)
    tile, threads = recorder.kwargs["TILE_ROWS"] * recorder.kwargs["TILE_COLS"], 32 * recorder.kwargs["num_warps"]
    assert opcodes(kernel).count("ld.global.v4.b32") == 2 * (tile // threads // 16)


@pytest.mark.parametrize("capability", [pytest.param(89, marks=pytest.mark.slow), *CAPABILITIES[1:]])
@pytest.mark.parametrize("preset", presets.ALL, ids=lambda preset: preset.name)
def test_presets(monkeypatch: pytest.MonkeyPatch, preset: presets.Preset, capability: int) -> None:
    """Nothing but their own operations, each one instruction that IEEE 754 defines."""
    recorder = record(monkeypatch, quantize, "quantize_kernel")
    monkeypatch.setattr(quantize, "require_fp8", lambda op, device: divmod(capability, 10))
    pow2 = preset.rules.pow2 != "none"
    quantize.quantize(BF16, (1, 128), pow2, preset.eps, preset.rules)
    kernel = recorder.compile(capability)
    check_common(kernel, capability)
    check_quantizes(recorder, kernel)
    assert float_arithmetic(kernel) <= {"mul.rn.f32", "mul.f32"}
