"""The Triton kernels of routing and permutation compiled for real GPUs: test_triton_compile.py has the others."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
from recorder import CompiledKernel
from test_triton_compile import CAPABILITIES, check_common, float_arithmetic, opcodes, record

from fastfp8.layout import empty_scale
from fastfp8.triton_kernels import permute, route

T, K, E, H = 512, 8, 256, 1024
BF16 = torch.zeros(T * K, H, dtype=torch.bfloat16)
E4M3 = torch.zeros(T * K, H, dtype=torch.float8_e4m3fn)
SCALE = empty_scale(BF16, (T * K, H // 128), (1, 128))
ROWS, WEIGHTS, IDX = (torch.zeros(T, K, dtype=dtype) for dtype in (torch.int32, torch.float32, torch.int64))
LOGITS = torch.zeros(T, E)

LAUNCHES: dict[str, tuple[object, str, Callable[[], object]]] = {
    "route-sigmoid": (
        route,
        "route_kernel",
        functools.partial(route.route, LOGITS, LOGITS[0], K, 8, 4, "sigmoid", 2.5),
    ),
    "route-softmax": (
        route,
        "route_kernel",
        functools.partial(route.route, LOGITS, LOGITS[0], K, 1, 1, "softmax", 1.0),
    ),
    "route_backward": (
        route,
        "route_backward_kernel",
        functools.partial(route.route_backward, WEIGHTS, LOGITS, IDX, LOGITS, "softmax", 1.0, torch.bfloat16),
    ),
    **{
        name: (permute, f"{name}_kernel", functools.partial(permute.row_map, IDX, E, torch.zeros(1, dtype=torch.int32)))
        for name in ("count", "scan", "place")
    },
    "permute": (permute, "permute_kernel", functools.partial(permute.permute, BF16[:T], ROWS)),
    "permute_scaled": (
        permute,
        "permute_kernel",
        functools.partial(permute.permute_scaled, E4M3[:T], SCALE[:T], ROWS),
    ),
    "permute_quantize": (
        permute,
        "permute_kernel",
        functools.partial(permute.permute_quantize, BF16[:T], ROWS, False, 0.0),
    ),
    "unpermute": (
        permute,
        "unpermute_kernel",
        functools.partial(permute.unpermute, BF16, None, ROWS, WEIGHTS, torch.bfloat16),
    ),
    "unpermute_scaled": (
        permute,
        "unpermute_kernel",
        functools.partial(permute.unpermute, E4M3, SCALE, ROWS, WEIGHTS, torch.bfloat16),
    ),
    "unpermute_backward": (
        permute,
        "unpermute_backward_kernel",
        functools.partial(permute.unpermute_backward, BF16[:T], BF16, ROWS, WEIGHTS),
    ),
}
# The FP32 operations that their definitions name. Only exponentials are made of fma.
ARITHMETIC = {
    "route-sigmoid": {"fma.rn.f32", "mul.f32", "add.f32", "sub.f32"},
    "route-softmax": {"fma.rn.f32", "mul.f32", "add.f32", "sub.f32"},
    "route_backward": {"mul.f32", "add.f32", "sub.f32"},
    "permute_quantize": {"mul.f32"},
    "unpermute": {"mul.f32", "add.f32"},
    "unpermute_scaled": {"mul.f32", "add.f32"},
    "unpermute_backward": {"mul.f32", "add.f32"},
}


def compiled(monkeypatch: pytest.MonkeyPatch, name: str, capability: int) -> CompiledKernel:
    module, kernel, launch = LAUNCHES[name]
    if module is permute:
        for other in ("count_kernel", "scan_kernel", "place_kernel"):
            record(monkeypatch, permute, other)
        monkeypatch.setattr(permute, "require_fp8", lambda op, device: divmod(capability, 10))
    recorder = getattr(module, kernel)
    if not hasattr(recorder, "launches"):
        recorder = record(monkeypatch, module, kernel)
    launch()
    return recorder.compile(capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_kernel(monkeypatch: pytest.MonkeyPatch, name: str, capability: int) -> None:
    kernel = compiled(monkeypatch, name, capability)
    check_common(kernel, capability)
    operations = {op.replace(".rn.f32", ".f32") for op in float_arithmetic(kernel)}
    assert operations <= {op.replace(".rn.f32", ".f32") for op in ARITHMETIC.get(name, set())}
    divisions = {op for op in opcodes(kernel) if op.startswith("div.") and ".f" in op}
    assert divisions <= {"div.rn.f32"}
    assert ("div.rn.f32" in divisions) == (
        name in {"route-sigmoid", "route-softmax", "route_backward", "permute_quantize"}
    )
    atomics = {op for op in opcodes(kernel) if re.match(r"(atom|red)\.global", op)}
    # Counts of tokens, and what is wrong with an index: integers, whose sums and ors have no order.
    assert all(re.search(r"\.(add|or)\.[bsu](32|64)$", op) for op in atomics), atomics
    assert bool(atomics) == (name in {"route-sigmoid", "route-softmax", "count"})


@pytest.mark.parametrize("name", ["permute", "permute_scaled", "permute_quantize", "unpermute", "unpermute_scaled"])
def test_loads_and_stores_are_wide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """16 bytes a thread of rows that are read or written; of FP8 that is made of BF16 or becomes BF16, 8."""
    ops = opcodes(compiled(monkeypatch, name, 90))
    assert [op for op in ops if re.match(r"ld\.global\.(v4\.b32|v2\.b64|v2\.b32)$", op)]
    assert [op for op in ops if re.match(r"st\.global\.(v4\.b32|v2\.b64|v2\.b32)$", op)]
