"""The programs of tests/cuda as nvcc compiles them to PTX, with the compiler and the flags of the package's kernels."""

from __future__ import annotations

import functools
import hashlib
import math
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import build_kernels
import numpy as np
import pytest
from exact import Format, rounded

FOLDER = Path(__file__).resolve().parent / "cuda"
# Without the last one nvcc 13 makes no jump tables.
FLAGS = [*build_kernels.NVCC_FLAGS, "-Werror=all-warnings", "--jump-table-density=50"]
CACHE = build_kernels.ROOT / "build" / "cuda_programs"

# Elements and threads of a block for the programs of one operation an element.
N, THREADS = 512, 128


@functools.cache
def _toolkit() -> build_kernels.Toolkit | str:
    try:
        return build_kernels.find_toolkit()
    except build_kernels.BuildError as error:
        return str(error)


@functools.cache
def ptx(stem: str) -> str:
    """The PTX of tests/cuda/``stem``.cu; skips the test where there is no nvcc."""
    toolkit = _toolkit()
    if isinstance(toolkit, str):
        pytest.skip(toolkit)
    source = FOLDER / f"{stem}.cu"
    key = hashlib.sha256(repr((source.read_bytes(), FLAGS, toolkit.version)).encode()).hexdigest()
    target = CACHE / f"{stem}-{key[:20]}.ptx"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        command = [toolkit.nvcc, *FLAGS, source, "-o", partial]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial.replace(target)
        for stale in set(CACHE.glob(f"{stem}-*.ptx")) - {target}:
            stale.unlink()
    return target.read_text()


@functools.cache
def kernels(stem: str) -> dict[str, Any]:
    """Of tests/cuda/``stem``.cu, on one machine."""
    from emulator import Machine

    return Machine().load(ptx(stem))


def run(stem: str, name: str, out: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
    """``out``, which is as long as each input, after the kernel has filled it."""
    kernels(stem)[name].launch(len(out) // THREADS, THREADS, args=[*inputs, out])
    return out


def random_integers(dtype: Any, seed: int) -> np.ndarray:
    """Of all magnitudes, with the corners of the type among them."""
    bits = 8 * np.dtype(dtype).itemsize
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 1 << 64, N, dtype=np.uint64) >> rng.integers(64 - bits, 64, N, dtype=np.uint64)
    x[rng.random(N) < 0.3] *= np.uint64((1 << 64) - 1)  # negative
    x[:8] = [0, 1, 2, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, 63, 33]
    return rng.permutation(x).astype(f"u{bits // 8}").view(dtype)


def random_floats(target: Format, seed: int, spread: int) -> np.ndarray:
    """Values of both signs within 2^+-``spread``, and corners: zeros, infinities, NaN, subnormals, the largest."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(N) * 2.0 ** rng.integers(-spread, spread + 1, N)
    tiny = 2.0 ** (target.lowest - 2)
    corners = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, tiny, -tiny, target.largest, 0.5, 3.0]
    x[: 4 * len(corners)] = np.repeat(corners, 4)
    return rng.permutation(x).astype(target.dtype)


def check_exactly(
    got: np.ndarray, target: Format, inputs: list[np.ndarray], exact: Callable[..., Fraction], mode: str = "rn"
) -> None:
    """Where all inputs are finite and ``exact`` has a value: it, rounded. Others only have to be no finite value."""
    compared = 0
    for i, values in enumerate(zip(*(x.astype(np.float64).tolist() for x in inputs), strict=True)):
        result = float(got[i])
        if not all(map(math.isfinite, values)):
            continue
        try:
            value = exact(*map(Fraction, values))
        except (ZeroDivisionError, ValueError):
            assert not math.isfinite(result), f"{values}: {result}"
            continue
        expected = rounded(value, target, mode)
        assert result == expected, f"{values}: {result!r} instead of {expected!r}"
        compared += 1
    assert compared > N // 4
