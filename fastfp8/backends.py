"""Which backends can serve here, and why the others cannot. ``python -m fastfp8`` prints it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from . import _C

KERNELS = Path(__file__).parent / "kernels"
OPS = (
    "quantize",
    "dequantize",
    "quantize_both",
    "quantize_grouped_both",
    "requantize_transpose",
    "rmsnorm_quantize",
    "rmsnorm_quantize_transpose",
    "rmsnorm_backward",
    "swiglu_quantize",
    "swiglu_backward_quantize",
    "gemm",
    "grouped_gemm",
    "masked_grouped_gemm",
    "grouped_wgrad",
    "gemm_swiglu_quantize",
    "route",
    "row_map",
    "permute",
    "permute_quantize",
    "unpermute",
    "pack_e5m6",
    "unpack_e5m6",
    "requantize_e5m6",
    "adamw",
)
# Those that have a CUDA C++ kernel.
SM90_OPS = ("gemm", "grouped_gemm", "masked_grouped_gemm", "grouped_wgrad", "gemm_swiglu_quantize")
# Triton has conversions to and from e4m3 from this compute capability on.
FP8_CAPABILITY = (8, 9)


def triton_unusable_reason() -> str:
    """'' if Triton can be imported. It is not imported here: that takes most of a second."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (a CUDA build of torch brings it)"
    return ""


def announce() -> None:
    """Tell the C++ side what only Python knows. Called once, at import."""
    _C.set_kernel_directory(str(KERNELS))
    _C.set_triton_unusable_reason(triton_unusable_reason())


def built_kernels() -> dict[str, Any]:
    """What the build recorded: nvcc's version and origin, the kernels and their registers. {} without a build."""
    record = KERNELS / "build.json"
    return dict(json.loads(record.read_text())) if record.exists() else {}


def _gpu_reason() -> str:
    if _C.driver_unusable_reason():
        return _C.driver_unusable_reason()
    if not torch.version.cuda:
        return f"torch {torch.__version__} is not a CUDA build"
    return ""


def _triton_reason() -> str:
    reason = triton_unusable_reason() or _gpu_reason()
    if reason:
        return reason
    old = [name for name, *capability, _ in _C.devices() if tuple(capability) < FP8_CAPABILITY]
    return f"needs compute capability 8.9 or newer for FP8, {', '.join(old)} is older" if old else ""


def _sm90_reason() -> str:
    if not built_kernels():
        return f"no kernels were built: {KERNELS} has no build.json"
    reason = _gpu_reason()
    if reason:
        return reason
    reasons = [_C.gemm_sm90_unusable_reason(index) for index in range(len(_C.devices()))]
    return "" if "" in reasons else reasons[0]


def usable() -> dict[str, dict[str, str]]:
    """For each op and backend '' if it can be used here, else why not. CUDA tensors take sm_90a before Triton."""
    table: dict[str, dict[str, str]] = {}
    for op in OPS:
        table[op] = {"reference (CPU)": "", "Triton": _triton_reason()}
        if op in SM90_OPS:
            table[op]["CUDA sm_90a"] = _sm90_reason()
    return table
