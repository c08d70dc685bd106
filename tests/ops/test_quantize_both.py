"""quantize_both and quantize_grouped_both on every backend: bit for bit quantize of the matrix and of its transpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backends import BACKENDS, Backend, Emulator, assert_same_bits, backend, backend_params
from groups import ends_of, groups_of, poisoned_empty
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import DTYPES, KINDS, OPTIONS, as_tensor, make, oracle
from torch import Tensor
from transposing import (
    check_groups,
    check_padded,
    quantize_both,
    quantize_grouped_both,
    reported,
    requantize_grouped_transpose,
)

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.error_word import QUANTIZE_OFFSETS
from fastfp8.layout import BLOCK, grouped_tokens

NAMES = [name for name in BACKENDS if name != "cuda_triton"]
SHAPES = [(1, 1), (1, 128), (3, 129), (127, 130), (128, 128), (129, 257), (260, 40), (0, 128), (0, 5), (5, 0), (130, 0)]
# Rows past the last group are what TAIL says.
SIZES = [(0,), (1,), (70,), (0, 1, 0, 127, 128, 129, 0), (5, 0, 300), (0, 0), (3,) * 9]
TAIL = 3
SPLITS = [(5, 3, 9), (-4, 2, 12), (5, 100, 12), (2**31 - 1, 0, -(2**31)), (-1, -1, -1)]


def check(b: Backend, x: Tensor, **options: float) -> None:
    """Against the oracle in NumPy of tests/ops/test_quantize.py, which shares no code with the library."""
    first, second = quantize_both(b, x, **options)
    for got, of in ((first, x), (second, x.t())):
        expected = ScaledTensor(*oracle(of, (1, 128), **options), (1, 128))
        if got is first:
            assert_same_bits(got.data, expected.data, "data")
            assert_same_bits(got.scale, expected.scale, "scale")
        else:
            check_padded(got, expected, "the transpose")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_shapes(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(backend(name), as_tensor(make("mixed", shape), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_values(name: str, kind: str, dtype: torch.dtype) -> None:
    x = as_tensor(make(kind, (130, 136)), dtype)
    for options in OPTIONS if name != "emulator" else OPTIONS[:: len(OPTIONS) - 1]:
        check(backend(name), x, **options)


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_strides(name: str) -> None:
    for dtype in DTYPES:
        big = as_tensor(make("normal", (300, 280)), dtype)
        for x in (big.t(), big[3:150:2, 1:270:3], big[:, 5:140], big[:1].expand(130, 280), big[:, 7:8].t()):
            check(backend(name), x)


INPUTS = st.builds(
    make, st.sampled_from(KINDS), st.tuples(st.integers(0, 280), st.integers(0, 280)), st.integers(0, 1 << 30)
)


def check_any_input(name: str, examples: settings) -> None:
    @examples
    @given(INPUTS, st.sampled_from(list(DTYPES)), st.sampled_from(OPTIONS))
    def run(x: np.ndarray, dtype: torch.dtype, options: dict[str, float]) -> None:
        check(backend(name), as_tensor(x, dtype), **options)

    run()


@pytest.mark.parametrize("name", backend_params([n for n in NAMES if n != "emulator"]))
def test_any_input(name: str) -> None:
    check_any_input(name, settings(max_examples=25, deadline=None, derandomize=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_any_input_long(name: str) -> None:
    check_any_input(name, settings(max_examples=300, deadline=None))


def sqnr(got: ScaledTensor, expected: Tensor) -> float:
    noise = (got.dequantize() - expected).double().square().sum()
    return 10 * torch.log10(expected.double().square().sum() / noise).item()


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_sqnr(name: str) -> None:
    """31.8 dB is what 3 bits of mantissa leave of a normal distribution scaled by its amax; 31.5 with powers of two."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    for pow2 in (False, True):
        for got, expected in zip(quantize_both(backend(name), x, pow2=pow2), (x, x.t()), strict=True):
            assert 31 < sqnr(got, expected) < 33


@pytest.mark.parametrize("m", [128, 130, 7, 0])
def test_pad(m: int) -> None:
    """The API's own part: without pad a view of the same codes, with it an operand of gemm for any M."""
    x, dy = as_tensor(make("normal", (m, 96)), torch.bfloat16), as_tensor(make("normal", (m, 48), 1), torch.bfloat16)
    first, second = fastfp8.quantize_both(x, pow2=True)
    assert_same_bits(first.data, fastfp8.quantize(x, pow2=True).data, "data")
    assert_same_bits(second.data, fastfp8.quantize(x.t(), pow2=True).data, "transposed data")
    assert_same_bits(second.scale, fastfp8.quantize(x.t(), pow2=True).scale, "transposed scale")
    assert second.block == first.block == (1, BLOCK)
    assert m == 0 or second.data.stride() == (-(-m // 16) * 16, 1)

    operands = [fastfp8.quantize_both(t, pad=True)[1] for t in (dy, x)]
    assert operands[1].shape == (96, -(-m // 16) * 16)
    got = fastfp8.gemm(*operands, out_dtype=torch.float32)
    values = [fastfp8.quantize(t.t()).dequantize().double() for t in (dy, x)]
    torch.testing.assert_close(got.double(), values[0] @ values[1].t(), rtol=1e-5, atol=1e-4)


def grouped_input(sizes: tuple[int, ...], k: int, kind: str = "mixed", dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return as_tensor(make(kind, (sum(sizes) + TAIL, k), seed=len(sizes)), dtype)


def check_grouped(b: Backend, x: Tensor, offsets: Tensor, **options: float) -> None:
    first, second, ends_t = quantize_grouped_both(b, x, offsets, **options)
    taken = slice(0, int(offsets[-1]))
    expected = fastfp8.quantize(x, **options)
    assert_same_bits(first.data[taken], expected.data[taken], "data")
    assert_same_bits(first.scale[taken], expected.scale[taken], "scale")
    alone = [fastfp8.quantize(x[rows].t(), **options) for rows in groups_of(offsets)]
    check_groups(second, ends_t, offsets, alone, x.shape[0])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_groups(name: str, sizes: tuple[int, ...]) -> None:
    case = SIZES.index(sizes)
    k, dtype = (136, 1, 200)[case % 3], list(DTYPES)[case % 3]
    check_grouped(backend(name), grouped_input(sizes, k, dtype=dtype), ends_of(sizes), **OPTIONS[case % len(OPTIONS)])


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_groups_of_any_strides(name: str) -> None:
    sizes = (65, 0, 70)
    big = grouped_input((300,), 300)
    for x in (big[: sum(sizes) + 1, 3:140], big[:40, : sum(sizes)].t(), big[:1].expand(sum(sizes), 300)):
        check_grouped(backend(name), x, ends_of(sizes))


@pytest.mark.parametrize("sizes", [(0, 65, 1, 0, 130, 3), (70,)], ids=str)
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_grouped_wgrad_takes_it(name: str, sizes: tuple[int, ...]) -> None:
    """As it is, whatever lies in the blocks of no group: NaN here."""
    x, dy = (torch.randn(sum(sizes), k, generator=torch.Generator().manual_seed(k)).bfloat16() for k in (72, 48))
    with poisoned_empty():
        _, x_t, ends_t = quantize_grouped_both(backend(name), x, ends_of(sizes))
        first, dy_t, _ = quantize_grouped_both(backend(name), dy, ends_of(sizes))
    got = backend(name).grouped_wgrad(dy_t, x_t, ends_t)
    assert got.shape == (len(sizes), 48, 72)
    for group, rows in enumerate(groups_of(ends_of(sizes))):
        left, right = (fastfp8.quantize(t[rows].t()).dequantize().double() for t in (dy, x))
        torch.testing.assert_close(got[group].double(), left @ right.t(), rtol=1e-2, atol=1e-2)

    t, ends_again = requantize_grouped_transpose(backend(name), first, ends_of(sizes))
    assert ends_again.tolist() == ends_t.tolist()
    assert backend(name).grouped_wgrad(t, x_t, ends_again).isfinite().all()


def check_any_groups(name: str, examples: settings) -> None:
    @examples
    @given(st.lists(st.integers(0, 140), min_size=1, max_size=9), st.integers(0, 150), st.sampled_from(OPTIONS))
    def run(sizes: list[int], k: int, options: dict[str, float]) -> None:
        check_grouped(backend(name), grouped_input(tuple(sizes), k), ends_of(sizes), **options)

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
    """The ends of groups are there all the same."""
    for shape, sizes in (((0, 136), (0, 0)), ((5, 0), (2, 0, 3)), ((0, 0), (0,))):
        check_grouped(backend(name), torch.zeros(shape), ends_of(sizes))


def test_the_room_is_what_the_worst_split_needs() -> None:
    """For every number of tokens and of groups up to a few blocks; and some split of it needs all of that."""
    for tokens in range(0, 400, 7):
        for groups in range(1, 6):
            filled = min(tokens, groups)
            worst = [1] * (filled - 1) + [tokens - filled + 1] if filled else [0]
            needed = sum(-(-size // BLOCK) for size in worst) * BLOCK
            assert grouped_tokens(tokens, groups) == needed
            even = [tokens // groups + (g < tokens % groups) for g in range(groups)]
            assert sum(-(-size // BLOCK) for size in even) * BLOCK <= needed


@pytest.mark.parametrize("name", backend_params(["reference", "triton_interpreter", "emulator"]))
def test_what_is_of_no_group_is_neither_read_nor_written(name: str) -> None:
    sizes = (0, 65, 1, 0, 130)
    x = torch.randn(sum(sizes) + 300, 40)
    with poisoned_empty():
        first, second, ends_t = quantize_grouped_both(backend(name), x, ends_of(sizes))
    x[sum(sizes) :] = float("nan")
    with poisoned_empty():
        again = quantize_grouped_both(backend(name), x, ends_of(sizes))
    blocks = -(-int(ends_t[-1]) // BLOCK)
    for got in ((first, second), again[:2]):
        assert (got[0].data[sum(sizes) :].view(torch.uint8) == 0xFF).all()
        assert (got[1].data[:, blocks * BLOCK :].view(torch.uint8) == 0xFF).all()
        assert (got[1].scale[:, :blocks] > 0).all()
        assert (got[0].scale[: sum(sizes)] > 0).all()
        if name == "emulator":  # which fills all outputs with NaN
            assert got[0].scale[sum(sizes) :].isnan().all()
            assert got[1].scale[:, blocks:].isnan().all()
    assert_same_bits(again[0].data, first.data, "data")
    assert_same_bits(again[1].data, second.data, "transposed data")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", backend_params(["emulator"]))
def test_bits_under_other_timing(name: str, seed: int) -> None:
    b, x = Emulator(seed=seed + 1), as_tensor(make("mixed", (200, 136), seed), torch.bfloat16)
    check(b, x)
    check_grouped(b, x, ends_of((70, 0, 130)))


@pytest.mark.parametrize("bad", SPLITS, ids=str)
@pytest.mark.parametrize("name", backend_params(["triton_interpreter", "emulator", "cuda"]))
def test_bad_offsets_are_brought_into_range_and_reported(name: str, bad: tuple[int, ...]) -> None:
    b, x = backend(name), grouped_input((9,), 40)
    good, largest = [], 0
    for end in bad:
        largest = max(largest, min(end, 12))
        good.append(largest)
    offsets = torch.tensor(good, dtype=torch.int32)
    check_grouped(b, x, offsets)
    assert reported(b) == 0
    first, second, ends_t = quantize_grouped_both(b, x, torch.tensor(bad, dtype=torch.int32))
    assert reported(b) == QUANTIZE_OFFSETS
    assert_same_bits(first.data[: good[-1]], fastfp8.quantize(x).data[: good[-1]], "data")
    check_groups(second, ends_t, offsets, [fastfp8.quantize(x[r].t()) for r in groups_of(offsets)], 12)


@pytest.mark.parametrize(("bad", "words"), list(zip(SPLITS, "10100", strict=True)), ids=str)
def test_the_cpu_names_the_first_bad_group(bad: tuple[int, ...], words: str) -> None:
    expected = rf"fastfp8\.quantize_grouped_both: argument 'offsets': .* T = 12, got .* for group {words}$"
    with pytest.raises(ValueError, match=expected):
        fastfp8.quantize_grouped_both(torch.ones(12, 40), torch.tensor(bad, dtype=torch.int32))


def test_grouped_api() -> None:
    """What the op returns, put together."""
    x = as_tensor(make("normal", (150, 40)), torch.bfloat16)
    first, second, ends_t = fastfp8.quantize_grouped_both(x, ends_of((20, 130)), pow2=True, eps=1e-4)
    for t, shape in ((first, (150, 40)), (second, (40, 384))):
        assert (t.shape, t.block) == (shape, (1, BLOCK))
    assert ends_t.tolist() == [20, 258]
    assert_same_bits(second.scale[:, 1:], fastfp8.quantize(x[20:].t(), pow2=True, eps=1e-4).scale, "scale")


@pytest.mark.parametrize("sticky", [False, True])
def test_sm_89_gets_the_sticky_bit(monkeypatch: pytest.MonkeyPatch, sticky: bool) -> None:
    pytest.importorskip("triton")
    from recorder import Recorder

    from fastfp8.triton_kernels import quantize_both as module

    monkeypatch.setattr(module, "require_fp8", lambda op, device: (8, 9) if sticky else (9, 0))
    recorder = Recorder(module.quantize_both_kernel)
    monkeypatch.setattr(module, "quantize_both_kernel", recorder)
    module.quantize_both(torch.zeros(5, 40), False, 0.0)
    assert recorder.kwargs["STICKY"] == sticky
