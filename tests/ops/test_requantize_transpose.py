"""requantize_transpose on every backend: bit for bit what dequantize, a transpose and quantize make together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from backends import BACKENDS, Backend, Emulator, assert_same_bits, backend, backend_params
from groups import ends_of, groups_of, part, poisoned_empty
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dequantize import make
from test_dequantize import oracle as dequantized
from test_quantize import oracle as quantized
from test_quantize_both import SIZES, SPLITS, TAIL, sqnr
from torch import Tensor
from transposing import (
    check_groups,
    check_padded,
    reported,
    requantize_grouped_transpose,
    requantize_transpose,
)

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.error_word import REQUANTIZE_OFFSETS
from fastfp8.layout import BLOCK, Block

ROW_BLOCK: Block = (1, BLOCK)
NAMES = [name for name in BACKENDS if name != "cuda_triton"]
SHAPES = [(1, 1), (1, 128), (3, 129), (127, 130), (128, 128), (129, 257), (260, 40), (0, 128), (0, 5), (5, 0), (130, 0)]


def expected_of(t: ScaledTensor) -> ScaledTensor:
    """By the oracles of quantize and dequantize, which share no code with the library."""
    return ScaledTensor(*quantized(dequantized(t, torch.float32).t(), ROW_BLOCK, pow2=True), ROW_BLOCK)


def check(b: Backend, t: ScaledTensor) -> None:
    check_padded(requantize_transpose(b, t), expected_of(t), "the transpose")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_shapes(name: str, shape: tuple[int, int]) -> None:
    """Of every code and of scales from FP32's subnormals to where the dequantised value is infinite."""
    check(backend(name), make(shape, ROW_BLOCK))


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_strides(name: str) -> None:
    t = make((260, 270), ROW_BLOCK)
    check(backend(name), ScaledTensor(t.data[:130, 3:140], t.scale[:130, :2], ROW_BLOCK))
    turned = t.data[:140, :260].t().contiguous().t()
    check(backend(name), ScaledTensor(turned, t.scale[:140, :3], ROW_BLOCK))
    # has_scale_layout lets any stride pass where an extent is 1
    check(backend(name), ScaledTensor._trusted(t.data[:1, :1], t.scale.flatten()[::3][:1, None], ROW_BLOCK))


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_special_values(name: str) -> None:
    """NaN codes and scales, scales of infinity and of zero, a matrix of zeros."""
    t = make((150, 260), ROW_BLOCK)
    t.scale[7], t.scale[9], t.scale[11] = math.nan, math.inf, 0.0
    t.data.view(torch.uint8)[:, 5] = 0x7F
    check(backend(name), t)
    t.data.view(torch.uint8)[:] = 0x80
    check(backend(name), t)
    t.scale.fill_(1.0)
    got = requantize_transpose(backend(name), t)
    assert (got.scale == 1).all()


def check_any(name: str, examples: settings) -> None:
    @examples
    @given(st.tuples(st.integers(0, 280), st.integers(0, 280)), st.integers(0, 1 << 30))
    def run(shape: tuple[int, int], seed: int) -> None:
        check(backend(name), make(shape, ROW_BLOCK, seed))

    run()


@pytest.mark.parametrize("name", backend_params([n for n in NAMES if n != "emulator"]))
def test_any_shape(name: str) -> None:
    check_any(name, settings(max_examples=25, deadline=None, derandomize=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_any_shape_long(name: str) -> None:
    check_any(name, settings(max_examples=300, deadline=None))


def tensors() -> dict[str, Tensor]:
    """Normal values; a few large features; tokens of very different size; both. All within BF16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 512, generator=generator)
    features = torch.where(torch.rand(512, generator=generator) < 0.01, 100.0, 1.0)
    tokens = torch.randn(512, 1, generator=generator).exp()
    return {"normal": x, "outliers": x * features, "lognormal tokens": x * tokens, "both": x * features * tokens}


@pytest.mark.parametrize("kind", list(tensors()))
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_powers_of_two_lose_subnormals_only(name: str, kind: str) -> None:
    """A value comes back exactly unless it is below 2^-6 of its new scale, and then to half the last place there.

    So the error stays what the first quantisation made of it, which FP32 scales do not manage: of normal values they
    lose more than 2 dB.
    """
    x = tensors()[kind]
    first = fastfp8.quantize(x, pow2=True)
    got = requantize_transpose(backend(name), first)
    before, after = first.dequantize().t(), got.dequantize()
    scale = got.scale.repeat_interleave(BLOCK, 1)
    changed = before != after
    assert (before[changed].abs() < scale[changed] * 2.0**-6).all()
    assert ((before - after).abs() <= scale * 2.0**-10).all()
    assert changed.float().mean() < (1e-5 if kind == "normal" else 5e-3)
    assert abs(sqnr(got, x.t()) - sqnr(first, x)) < 0.01
    if kind == "normal":
        assert sqnr(got, x.t()) > 31
        plain = requantize_transpose(backend(name), fastfp8.quantize(x))
        assert sqnr(plain, x.t()) < sqnr(first, x) - 2


def check_grouped(b: Backend, t: ScaledTensor, offsets: Tensor) -> None:
    got, ends_t = requantize_grouped_transpose(b, t, offsets)
    alone = [expected_of(part(t, rows)) for rows in groups_of(offsets)]
    check_groups(got, ends_t, offsets, alone, t.shape[0])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_groups(name: str, sizes: tuple[int, ...]) -> None:
    k = (136, 1, 200)[SIZES.index(sizes) % 3]
    check_grouped(backend(name), make((sum(sizes) + TAIL, k), ROW_BLOCK), ends_of(sizes))


def check_any_groups(name: str, examples: settings) -> None:
    @examples
    @given(st.lists(st.integers(0, 140), min_size=1, max_size=9), st.integers(0, 150), st.integers(0, 1 << 30))
    def run(sizes: list[int], k: int, seed: int) -> None:
        check_grouped(backend(name), make((sum(sizes) + TAIL, k), ROW_BLOCK, seed), ends_of(sizes))

    run()


@pytest.mark.parametrize("name", backend_params([n for n in NAMES if n != "emulator"]))
def test_any_groups(name: str) -> None:
    check_any_groups(name, settings(max_examples=15, deadline=None, derandomize=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_any_groups_long(name: str) -> None:
    check_any_groups(name, settings(max_examples=200, deadline=None))


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_no_rows_and_no_columns(name: str) -> None:
    for shape, sizes in (((0, 136), (0, 0)), ((5, 0), (2, 0, 3)), ((0, 0), (0,))):
        check_grouped(backend(name), make(shape, ROW_BLOCK), ends_of(sizes))


@pytest.mark.parametrize("name", backend_params(["reference", "triton_interpreter", "emulator"]))
def test_what_is_of_no_group_is_neither_read_nor_written(name: str) -> None:
    sizes = (0, 65, 1, 0, 130)
    t = fastfp8.quantize(torch.randn(sum(sizes) + 300, 40))
    got, ends_t = requantize_grouped_transpose(backend(name), t, ends_of(sizes))
    t.data.view(torch.uint8)[sum(sizes) :], t.scale[sum(sizes) :] = 0x7F, math.nan
    with poisoned_empty():
        again, _ = requantize_grouped_transpose(backend(name), t, ends_of(sizes))
    columns, blocks = -(-int(ends_t[-1]) // BLOCK) * BLOCK, -(-int(ends_t[-1]) // BLOCK)
    assert (again.data[:, columns:].view(torch.uint8) == 0xFF).all()
    if name == "emulator":  # which fills all outputs with NaN
        assert again.scale[:, blocks:].isnan().all()
    assert_same_bits(again.data[:, :columns], got.data[:, :columns], "data")
    assert_same_bits(again.scale[:, :blocks], got.scale[:, :blocks], "scale")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", backend_params(["emulator"]))
def test_bits_under_other_timing(name: str, seed: int) -> None:
    b, t = Emulator(seed=seed + 1), make((200, 136), ROW_BLOCK, seed)
    check(b, t)
    check_grouped(b, t, ends_of((70, 0, 130)))


@pytest.mark.parametrize("name", backend_params(["emulator"]))
def test_memory_traffic(name: str) -> None:
    """Within 5 % of the least: each code read once and written once, in whole sectors, and the scales."""
    b, t = Emulator(), fastfp8.quantize(torch.randn(384, 256))
    least = 2 * t.nbytes
    for run in (lambda: requantize_transpose(b, t), lambda: requantize_grouped_transpose(b, t, ends_of((128, 256)))):
        run()
        assert least <= b.counters.global_sectors * 32 <= 1.05 * least


@pytest.mark.parametrize("bad", SPLITS, ids=str)
@pytest.mark.parametrize("name", backend_params(["triton_interpreter", "emulator", "cuda"]))
def test_bad_offsets_are_brought_into_range_and_reported(name: str, bad: tuple[int, ...]) -> None:
    b, t = backend(name), make((12, 40), ROW_BLOCK)
    good = torch.from_numpy(np.maximum.accumulate(np.clip(bad, 0, 12))).int()
    check_grouped(b, t, good)
    assert reported(b) == 0
    got, ends_t = requantize_grouped_transpose(b, t, torch.tensor(bad, dtype=torch.int32))
    assert reported(b) == REQUANTIZE_OFFSETS
    check_groups(got, ends_t, good, [expected_of(part(t, rows)) for rows in groups_of(good)], 12)


@pytest.mark.parametrize(("bad", "words"), list(zip(SPLITS, "10100", strict=True)), ids=str)
def test_the_cpu_names_the_first_bad_group(bad: tuple[int, ...], words: str) -> None:
    t = make((12, 40), ROW_BLOCK)
    expected = rf"fastfp8\.requantize_transpose: argument 'offsets': .* T = 12, got .* for group {words}$"
    with pytest.raises(ValueError, match=expected):
        fastfp8.requantize_transpose(t, torch.tensor(bad, dtype=torch.int32))


@pytest.mark.parametrize("m", [128, 130, 7, 0])
def test_api(m: int) -> None:
    """What the op returns, put together: a view without pad, an operand of gemm with it, always one of groups."""
    t = fastfp8.quantize(torch.randn(m, 96, generator=torch.Generator().manual_seed(m)), pow2=True)
    plain, padded = fastfp8.requantize_transpose(t), fastfp8.requantize_transpose(t, pad=True)
    grouped, ends_t = fastfp8.requantize_transpose(t, ends_of((m,)))
    assert (plain.shape, padded.shape[1], grouped.shape[1]) == ((96, m), -(-m // 16) * 16, -(-m // 128) * 128)
    assert ends_t.tolist() == [m]
    for got in (plain, padded, grouped):
        assert got.block == ROW_BLOCK
        assert_same_bits(got.dequantize()[:, :m], t.dequantize().t(), "values, of which none becomes subnormal")
        assert not got.dequantize()[:, m:].any()
    fastfp8.gemm(padded, padded)


@pytest.mark.parametrize("sticky", [False, True])
def test_sm_89_gets_the_sticky_bit(monkeypatch: pytest.MonkeyPatch, sticky: bool) -> None:
    pytest.importorskip("triton")
    from recorder import Recorder

    from fastfp8.triton_kernels import requantize_transpose as module

    monkeypatch.setattr(module, "require_fp8", lambda op, device: (8, 9) if sticky else (9, 0))
    recorder = Recorder(module.requantize_transpose_kernel)
    monkeypatch.setattr(module, "requantize_transpose_kernel", recorder)
    t = make((5, 40), ROW_BLOCK)
    module.requantize_transpose(t.data, t.scale)
    assert recorder.kwargs["STICKY"] == sticky
