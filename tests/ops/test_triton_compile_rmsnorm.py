"""The Triton kernels with RMSNorm compiled for real GPUs: test_triton_compile.py has the others."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from recorder import CompiledKernel, Recorder
from test_triton_compile import CAPABILITIES, check_common, float_arithmetic, opcodes, record

from fastfp8.triton_kernels import rmsnorm

M = 4096
FORWARD, BACKWARD = "rmsnorm_quantize_kernel", "rmsnorm_backward_kernel"


@functools.cache
def tensors(cols: int) -> tuple[torch.Tensor, ...]:
    """x, a residual or gradient, weight and rstd; pages that nothing writes cost no memory."""
    wide = torch.empty(M, cols, dtype=torch.bfloat16)
    return wide, torch.empty(M, cols, dtype=torch.bfloat16), torch.empty(cols), torch.empty(M)


def forward(cols: int) -> Any:
    x, residual, weight, _ = tensors(cols)
    return rmsnorm.rmsnorm_quantize(x, weight, 1e-6, residual, False, 0.0)


def again(cols: int) -> Any:
    x, _, weight, rstd = tensors(cols)
    return rmsnorm.rmsnorm_quantize_transpose(x, weight, rstd, False, 0.0)


def backward(cols: int) -> Any:
    x, grad, weight, rstd = tensors(cols)
    return rmsnorm.rmsnorm_backward(grad, x, weight, rstd, grad)


LAUNCHES: dict[str, tuple[str, Callable[[], Any]]] = {
    "forward": (FORWARD, lambda: forward(7168)),
    "forward-beyond": (FORWARD, lambda: forward(20480)),
    "again": ("rmsnorm_quantize_transpose_kernel", lambda: again(7168)),
    "backward": (BACKWARD, lambda: backward(7168)),
    "backward-beyond": (BACKWARD, lambda: backward(20480)),
    "sum": ("sum_rows_kernel", lambda: backward(7168)),
}


def compiled(monkeypatch: pytest.MonkeyPatch, name: str, capability: int) -> tuple[CompiledKernel, Recorder]:
    """A kernel and its launch."""
    kernel, launch = LAUNCHES[name]
    kernels = (FORWARD, "rmsnorm_quantize_transpose_kernel", BACKWARD, "sum_rows_kernel")
    recorders = {other: record(monkeypatch, rmsnorm, other) for other in kernels}
    monkeypatch.setattr(rmsnorm, "require_fp8", lambda op, device: divmod(capability, 10))
    launch()
    return recorders[kernel].compile(capability), recorders[kernel]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_kernel(monkeypatch: pytest.MonkeyPatch, name: str, capability: int) -> None:
    """Without spills (check_common says so) and with the roundings that the definition names."""
    kernel, _ = compiled(monkeypatch, name, capability)
    check_common(kernel, capability)
    operations = {op.replace(".rn.f32", ".f32") for op in float_arithmetic(kernel)}
    allowed = {"again": {"mul.f32"}, "sum": {"add.f32"}}.get(name, {"mul.f32", "add.f32", "sub.f32"})
    assert operations <= allowed
    roots = {op for op in opcodes(kernel) if op.startswith(("sqrt", "rsqrt", "rcp"))}
    assert roots == ({"sqrt.rn.f32"} if name.startswith("forward") else set())
    divisions = {op for op in opcodes(kernel) if op.startswith("div.") and ".f" in op}
    assert divisions == (set() if name == "sum" else {"div.rn.f32"})
    assert not [op for op in opcodes(kernel) if op.startswith(("atom.", "red."))]


@pytest.mark.parametrize(("name", "inputs"), [("forward", 2), ("backward", 3)])
def test_each_input_is_read_once(monkeypatch: pytest.MonkeyPatch, name: str, inputs: int) -> None:
    """In loads of 16 bytes: of the first row before the loop over rows, of the next one in it, of the weight once."""
    kernel, recorder = compiled(monkeypatch, name, 90)
    assert recorder.kwargs["num_warps"] * 32 * rmsnorm._VALUES == 8192
    loads = [op for op in opcodes(kernel) if re.match(r"ld\.global\.(v4\.b32|v2\.b64)$", op)]
    of_row, of_weight = rmsnorm._VALUES // 8, rmsnorm._VALUES // 4
    again = 1 if name.startswith("backward") else 0  # what is added to dx is read where it is added
    assert len(loads) == (2 * inputs - again) * of_row + of_weight
