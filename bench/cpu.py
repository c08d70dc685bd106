"""The CPU reference beside what torch takes for as much arithmetic or memory, the cost of a call and of the import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

import fastfp8
from fastfp8.layout import BLOCKS

from . import Case, Row, measure_cases, row_from_samples

# Bars, as a ratio to the baseline or absolute; each leaves room for a busy machine.
GEMM_RATIO = 3.0
QUANTIZE_RATIO = 12.0
CALL_US = 60.0
IMPORT_S = 0.3

_IMPORT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import fastfp8
elapsed = time.perf_counter() - start
triton = sum(name.split(".")[0] == "triton" for name in set(sys.modules) - before)
print(json.dumps([elapsed, triton]))
"""


def cases(tiny: bool) -> list[Case]:
    size = 64 if tiny else 2048
    rows, cols = (8, 256) if tiny else (4096, 7168)
    left, right = torch.randn(size, size), torch.randn(size, size)
    a, b = fastfp8.quantize(left), fastfp8.quantize(right, (128, 128))
    x = torch.randn(rows, cols).bfloat16()
    small = torch.randn(1, 128)
    t = fastfp8.quantize(x)
    square, wide = f"{size}x{size}x{size}", f"{rows}x{cols}"
    mm, clone = ("torch.mm float32", lambda: left @ right), ("clone bfloat16", x.clone)
    found = [Case("gemm", square, lambda: fastfp8.gemm(a, b), mm, GEMM_RATIO)]
    for block in BLOCKS:
        name = f"quantize {block[0]}x{block[1]}"
        found.append(Case(name, wide, lambda block=block: fastfp8.quantize(x, block), clone, QUANTIZE_RATIO))  # type: ignore[misc]
    found.append(Case("dequantize 1x128", wide, lambda: fastfp8.dequantize(t), clone))
    found.append(
        Case(
            "torch.ops.fastfp8.quantize", "1x128", lambda: torch.ops.fastfp8.quantize(small), None, CALL_US, "us", 1000
        )
    )
    return found


def measure_import(samples: int) -> list[Row]:
    """The time of ``import fastfp8`` after ``import torch`` in fresh processes, and the Triton modules it imports."""
    times, triton = [], []
    for _ in range(samples):
        command = [sys.executable, "-c", _IMPORT]
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        elapsed, modules = json.loads(out.stdout)
        times.append(elapsed)
        triton.append(float(modules))
    return [
        row_from_samples("import fastfp8, beyond torch", "", "s", times, IMPORT_S),
        row_from_samples("Triton modules it imports", "", "modules", triton, 0.0),
    ]


def measure(samples: int, tiny: bool) -> list[Row]:
    """All rows of the family; ``tiny`` shrinks the shapes until the times mean nothing."""
    return measure_cases(cases(tiny), samples) + measure_import(1 if tiny else samples)
