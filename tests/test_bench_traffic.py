"""Bytes of global memory, counted on the emulator: within 5 % of the least for each op, or it is said why not."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from backends import BACKENDS

from bench import fusions, traffic
from bench.case import Session
from bench.fusions import FUSIONS

pytestmark = pytest.mark.skipif(
    BACKENDS["emulator"].why_not() is not None or BACKENDS["triton_interpreter"].why_not() is not None,
    reason="the emulator or Triton is not here",
)
# What an op that may count more than 5 % beyond the least does count.
EXCESS = {
    "dequantize 128x1": 1.08,
    "permute, FP8": 1.21,
    "permute_quantize": 1.19,
    "unpermute, FP8": 1.22,
    "swiglu_backward_quantize": 1.57,
    "swiglu_backward_quantize, FP8": 1.52,
    "swiglu_backward_quantize, FP8, grouped": 1.53,
    "rmsnorm_quantize, both ways": 1.59,
    "rmsnorm_quantize, residual, both ways": 1.3,
    "rmsnorm_quantize_transpose": 1.09,
    "rmsnorm_backward": 1.07,
    "route": 1.17,
    "pack_e5m6, per row": 1.5,
}


@functools.cache
def ratio(name: str) -> float:
    shape = (256, 3584) if name.startswith("rmsnorm") else (512, 512)
    least, counted = traffic.measured(traffic.OPS[name](*shape))
    return counted / least


@pytest.mark.parametrize("name", traffic.OPS)
def test_traffic(name: str) -> None:
    """At 512 x 512, or with RMSNorm half of its rows, the results checked bit for bit."""
    assert 1 <= ratio(name) <= EXCESS.get(name, traffic.BAR)


def test_every_excess_has_its_reason() -> None:
    assert traffic.EXCESS.keys() == EXCESS.keys() <= traffic.OPS.keys()


def test_rows() -> None:
    rows = traffic.works(True)[0].measure(Session(1, True))
    assert {(r.family, r.op, r.shape, r.kind) for r in rows} == {("traffic", "quantize 1x128", "128x256", "emulated")}
    found, n = {row.unit: row.median for row in rows}, 128 * 256
    assert found["bytes, least"] == 3 * n + 4 * n // 128
    assert found["in steps"] == 5 * n
    assert found[traffic.RATIO] == found["counted"] / found["bytes, least"]
    assert [row.bar for row in rows] == [None, None, None, traffic.BAR]
    assert rows[2].note == "the steps: amax, multiply and cast"


@pytest.mark.parametrize("rows", [8, 512])
def test_least_bytes(rows: int) -> None:
    """Of some by hand."""
    cols, blocks = 256, 2
    n = rows * cols
    expected = {
        "quantize_both": 4 * n + 4 * rows * blocks + 4 * cols * -(-rows // 128),
        "permute_quantize": 2 * n // 8 + 4 * rows + n + 4 * rows * blocks,
        "adamw": 22 * n,
        "dequantize, add": 5 * n + 4 * rows * blocks,
        "rmsnorm_quantize, residual": 7 * n + 2 * cols + 4 * rows * (blocks + 1),
        "rmsnorm_backward": 6 * n + 6 * cols + 4 * rows,
    }
    for name, least in expected.items():
        if rows % 16 and name == "quantize_both":
            least += cols * (16 - rows % 16)  # the transpose is padded with zeros
        fusion = FUSIONS[name](rows, cols)
        args = [t.clone() if isinstance(t, torch.Tensor) else t for t in fusion.args]
        assert fusion.least(fusion.op(*args)) == least


def test_other_bits_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rows: int, cols: int) -> fusions.Fusion:
        right = fusions.quantize((1, 128), rows, cols)
        return dataclasses.replace(right, host_args=(2 * right.args[0], *right.args[1:]))

    with pytest.raises(AssertionError, match="values are not the reference's"):
        traffic.measured(wrong(128, 256))


def test_an_op_that_moves_more_misses_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(fusion: Any) -> tuple[float, int]:
        return 100.0, 106

    monkeypatch.setattr(traffic, "measured", measured)
    passed = {work.op: all(row.passed for row in work.measure(Session(1))) for work in traffic.works(False)}
    assert {op for op, ok in passed.items() if ok} == set(EXCESS)
