"""grouped_gemm and masked_grouped_gemm on every backend: bit for bit gemm of each group, and nothing else touched."""

from __future__ import annotations

import random

import pytest
import torch
from backends import BACKENDS, Backend, Emulator, assert_same_bits, backend, backend_params
from groups import ends_of, groups_of, oracle, part, poisoned_empty, scaled, spoil, untouched
from test_gemm import BF16_BOUND, BOUNDS, NO_HOPPER, calc_diff, exact, promoted
from torch import Tensor

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.error_word import COUNTS, OFFSETS, error_word
from fastfp8.layout import BLOCK, Block

A_BLOCK: Block = (1, BLOCK)
B_BLOCK: Block = (BLOCK, BLOCK)
# Rows past the last group, in each case of SIZES. Both of Triton's tiles are used: averages on either side of 64.
TAIL = 3
SIZES = [(0,), (1,), (70,), (0, 1, 0, 63, 64, 65, 0), (127, 128, 129, 0), (0, 0, 300, 0)]
COUNTS_OF_GROUPS = [(0,), (1,), (70, 0, 70), (63, 64, 65), (1, 128, 127, 129, 0)]
# N and K of each case in turn. The last has two segments of K, and meets FP32, which shows that.
SHAPES = [(8, 16), (40, 144), (136, 272), (72, 1040)]
OUT_DTYPES = (torch.float32, torch.bfloat16)
ON_CPU = ["reference", "triton_interpreter", "emulator"]


def operands(sizes: tuple[int, ...], n: int, k: int, seed: int = 0, pitch: int = 0) -> tuple[ScaledTensor, ...]:
    a = scaled((sum(sizes) + TAIL, k), A_BLOCK, seed, pitch)
    return a, scaled((len(sizes), n, k), B_BLOCK, seed + 1, pitch)


def masked_operands(groups: int, m: int, n: int, k: int, seed: int = 0, pitch: int = 0) -> tuple[ScaledTensor, ...]:
    return scaled((groups, m, k), A_BLOCK, seed, pitch), scaled((groups, n, k), B_BLOCK, seed + 1, pitch)


def check_groups(b: Backend, left: ScaledTensor, right: ScaledTensor, offsets: Tensor, out_dtype: torch.dtype) -> None:
    """Each group has the bits of gemm."""
    out = b.grouped_gemm(left, right, offsets, out_dtype=out_dtype)
    assert out.shape == (left.shape[0], right.shape[1])
    assert out.is_contiguous()
    for group, rows in enumerate(groups_of(offsets)):
        expected = b.gemm(part(left, rows), right[group], out_dtype=out_dtype)
        assert_same_bits(out[rows], expected, f"group {group}, rows {rows.start} to {rows.stop}")


def check_masked(b: Backend, left: ScaledTensor, right: ScaledTensor, counts: Tensor, out_dtype: torch.dtype) -> None:
    out = b.masked_grouped_gemm(left, right, counts, out_dtype=out_dtype)
    assert out.shape == (*left.shape[:2], right.shape[1])
    assert out.is_contiguous()
    for group, count in enumerate(counts.tolist()):
        expected = b.gemm(part(left[group], slice(0, count)), right[group], out_dtype=out_dtype)
        assert_same_bits(out[group, :count], expected, f"group {group}, {count} rows")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_groups_have_the_bits_of_gemm(name: str, sizes: tuple[int, ...]) -> None:
    """Rows past the last group and what lies between rows are NaN."""
    case = SIZES.index(sizes)
    a, b = operands(sizes, *SHAPES[case % len(SHAPES)], seed=case, pitch=(case % 2) * 1088)
    spoil(a, slice(sum(sizes), None))
    check_groups(backend(name), a, b, ends_of(sizes), OUT_DTYPES[1 - case % 2])


@pytest.mark.parametrize("counts", COUNTS_OF_GROUPS, ids=str)
@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_masked_groups_have_the_bits_of_gemm(name: str, counts: tuple[int, ...]) -> None:
    case = COUNTS_OF_GROUPS.index(counts)
    room = max(counts) + (0 if len(counts) == 3 else 2)  # some full groups, and scales that start anywhere
    a, b = masked_operands(len(counts), room, *SHAPES[case % len(SHAPES)], seed=case, pitch=(case % 2) * 1088)
    for group, count in enumerate(counts):
        spoil(a[group], slice(count, None))
    check_masked(backend(name), a, b, torch.tensor(counts, dtype=torch.int32), OUT_DTYPES[1 - case % 2])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", backend_params())
def test_random_sizes(name: str, seed: int) -> None:
    """Many groups, more rows of tiles than share their columns of b, then few groups for the large tile."""
    rng = random.Random(seed)
    n, k = [(24, 16), (136, 144), (8, 272)][seed]
    sizes = tuple(rng.choice((0, 1, 2, 17, 63, 64, 65, 130)) for _ in range(rng.randint(9, 40)))
    check_groups(backend(name), *operands(sizes, n, k, seed), ends_of(sizes), torch.float32)
    sizes = tuple(rng.randint(0, 400) for _ in range(5))
    check_groups(backend(name), *operands(sizes, n, k, seed), ends_of(sizes), torch.bfloat16)
    counts = torch.tensor([rng.randint(0, 90) for _ in range(7)], dtype=torch.int32)
    check_masked(backend(name), *masked_operands(7, 90, n, k, seed), counts, torch.bfloat16)


@pytest.mark.parametrize("name", backend_params([n for n in BACKENDS if n not in ("reference", "cuda_triton")]))
def test_bits(name: str) -> None:
    """Against a model that shares no code: an exact tensor core in the interpreter, Hopper's on the emulator."""
    if name == "cuda" and NO_HOPPER:
        pytest.skip("this GPU is not sm_90, which alone has the accumulator that is modelled")
    sizes = (65, 0, 3, 20)
    a, b = operands(sizes, 136, 400, seed=5)
    out = backend(name).grouped_gemm(a, b, ends_of(sizes), out_dtype=torch.float32)
    for group, rows in enumerate(groups_of(ends_of(sizes))):
        if name == "triton_interpreter":
            expected = promoted(part(a, rows), b[group], None, torch.float32)
        else:
            expected = oracle(a, b, rows, group, torch.float32)
        assert_same_bits(out[rows], expected, f"group {group}")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", backend_params(["emulator"]))
def test_bits_under_other_timing(name: str, seed: int) -> None:
    sizes = (1, 0, 70, 5)
    a, b = operands(sizes, 72, 272, seed=seed)
    out = Emulator(seed=seed + 1).grouped_gemm(a, b, ends_of(sizes))
    for group, rows in enumerate(groups_of(ends_of(sizes))):
        assert_same_bits(out[rows], oracle(a, b, rows, group, torch.bfloat16), f"group {group}")


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_against_float64(name: str, positive: bool) -> None:
    sizes, generator = (5, 0, 66, 17), torch.Generator().manual_seed(0)
    make = torch.rand if positive else torch.randn
    a = fastfp8.quantize(make(sum(sizes), 400, generator=generator))
    b = fastfp8.quantize(make(len(sizes), 72, 400, generator=generator), B_BLOCK)
    for out_dtype in OUT_DTYPES:
        out = backend(name).grouped_gemm(a, b, ends_of(sizes), out_dtype=out_dtype)
        for group, rows in enumerate(groups_of(ends_of(sizes))):
            if rows.start == rows.stop:
                continue
            expected = exact(part(a, rows), b[group])
            if out_dtype == torch.bfloat16:
                assert calc_diff(out[rows], expected) < BF16_BOUND
            elif positive:  # nothing cancels, and what the tensor core truncates is a bias
                assert abs(out[rows].numpy() / expected - 1).max() < BOUNDS[name][1]
            else:
                assert calc_diff(out[rows], expected) < BOUNDS[name][0]


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("name", backend_params(ON_CPU))
def test_nothing_but_the_rows_of_groups_is_written(name: str, out_dtype: torch.dtype) -> None:
    """Neither rows past the last group, nor memory beside the output; the host fills nothing beforehand either."""
    sizes = (0, 65, 1, 0, 7)
    a, b = operands(sizes, 40, 144)
    with poisoned_empty():
        out = backend(name).grouped_gemm(a, b, ends_of(sizes), out_dtype=out_dtype)
    written = torch.arange(a.shape[0]) < sum(sizes)
    assert out[written].isfinite().all()
    assert untouched(out, written)

    counts = torch.tensor([3, 0, 66, 70], dtype=torch.int32)
    a, b = masked_operands(4, 70, 40, 144)
    with poisoned_empty():
        out = backend(name).masked_grouped_gemm(a, b, counts, out_dtype=out_dtype)
    written = torch.arange(70) < counts[:, None]
    assert out[written].isfinite().all()
    assert untouched(out, written.flatten())


@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_a_nan_stays_in_its_row(name: str) -> None:
    """Groups share no tile of rows, so what one has in the next rows reaches none of another."""
    sizes = (3, 4, 2)
    a, b = operands(sizes, 40, 144)
    clean = backend(name).grouped_gemm(a, b, ends_of(sizes))
    spoil(a, slice(3, 7))
    out = backend(name).grouped_gemm(a, b, ends_of(sizes))
    assert out[3:7].isnan().all()
    for rows in (slice(0, 3), slice(7, 9)):
        assert_same_bits(out[rows], clean[rows], f"{rows}")
    b.data.view(torch.uint8)[1] = 0x7F
    out = backend(name).grouped_gemm(a, b, ends_of(sizes))
    assert_same_bits(out[7:9], clean[7:9], "the group after that of a bad weight")


@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_empty_extents(name: str) -> None:
    b = backend(name)
    zeros = torch.zeros(2, dtype=torch.int32)
    for t, n, k in ((0, 8, 16), (5, 0, 16), (0, 0, 0)):
        left, right = scaled((t, k), A_BLOCK, 0), scaled((2, n, k), B_BLOCK, 0)
        assert b.grouped_gemm(left, right, zeros).shape == (t, n)
        assert b.masked_grouped_gemm(scaled((2, t, k), A_BLOCK, 0), right, zeros).shape == (2, t, n)
    # Without K a row of a group is zero.
    out = b.grouped_gemm(scaled((5, 0), A_BLOCK, 0), scaled((2, 8, 0), B_BLOCK, 0), ends_of((1, 3)))
    assert (out[:4] == 0).all()
    out = b.masked_grouped_gemm(scaled((2, 5, 0), A_BLOCK, 0), scaled((2, 8, 0), B_BLOCK, 0), ends_of((1, 3)))
    assert (out[0, :1] == 0).all()
    assert (out[1, :4] == 0).all()


def reported(b: Backend) -> int:
    """The bits in the error word, which is cleared."""
    word = getattr(b, "error", None)
    word = error_word(torch.device("cuda")) if word is None else word
    bits = int(word.item())
    word.zero_()
    return bits


BAD_OFFSETS = [(5, 3, 9), (-4, 2, 12), (5, 100, 12), (2**31 - 1, 0, -(2**31)), (-1, -1, -1)]
BAD_COUNTS = [(-1, 3, 6), (7, 0, 1), (2**31 - 1, -(2**31), 6)]
DEVICE_SIDE = backend_params(["triton_interpreter", "emulator", "cuda", "cuda_triton"])


@pytest.mark.parametrize("bad", BAD_OFFSETS, ids=str)
@pytest.mark.parametrize("name", DEVICE_SIDE)
def test_bad_offsets_are_brought_into_range_and_reported(name: str, bad: tuple[int, ...]) -> None:
    a, b = scaled((12, 144), A_BLOCK, 0), scaled((3, 40, 144), B_BLOCK, 1)
    good, largest = [], 0
    for end in bad:
        largest = max(largest, min(end, 12))
        good.append(largest)
    expected = backend(name).grouped_gemm(a, b, torch.tensor(good, dtype=torch.int32))
    assert reported(backend(name)) == 0
    with poisoned_empty():
        out = backend(name).grouped_gemm(a, b, torch.tensor(bad, dtype=torch.int32))
    assert_same_bits(out[: good[-1]], expected[: good[-1]], f"{good}")
    assert reported(backend(name)) == OFFSETS
    if name in ON_CPU:
        assert untouched(out, torch.arange(12) < good[-1])


@pytest.mark.parametrize("bad", BAD_COUNTS, ids=str)
@pytest.mark.parametrize("name", DEVICE_SIDE)
def test_bad_counts_are_brought_into_range_and_reported(name: str, bad: tuple[int, ...]) -> None:
    a, b = masked_operands(3, 6, 40, 144)
    good = torch.tensor(bad).clamp(0, 6).int()
    expected = backend(name).masked_grouped_gemm(a, b, good)
    assert reported(backend(name)) == 0
    with poisoned_empty():
        out = backend(name).masked_grouped_gemm(a, b, torch.tensor(bad, dtype=torch.int32))
    written = torch.arange(6) < good[:, None]
    assert_same_bits(out[written], expected[written], f"{good}")
    assert reported(backend(name)) == COUNTS
    if name in ON_CPU:
        assert untouched(out, written.flatten())


@pytest.mark.parametrize(("bad", "words"), list(zip(BAD_OFFSETS, "10100", strict=True)), ids=str)
def test_the_cpu_names_the_first_bad_group(bad: tuple[int, ...], words: str) -> None:
    a, b = scaled((12, 144), A_BLOCK, 0), scaled((3, 40, 144), B_BLOCK, 1)
    expected = rf"fastfp8\.grouped_gemm: argument 'offsets': .* T = 12, got .* for group {words}$"
    with pytest.raises(ValueError, match=expected):
        fastfp8.grouped_gemm(a, b, torch.tensor(bad, dtype=torch.int32))


@pytest.mark.parametrize(("bad", "words"), list(zip(BAD_COUNTS, ["-1", "7", "2147483647"], strict=True)), ids=str)
def test_the_cpu_names_the_first_bad_count(bad: tuple[int, ...], words: str) -> None:
    expected = rf"fastfp8\.masked_grouped_gemm: argument 'counts': .* M = 6, got {words} for group 0$"
    with pytest.raises(ValueError, match=expected):
        fastfp8.masked_grouped_gemm(*masked_operands(3, 6, 40, 144), torch.tensor(bad, dtype=torch.int32))
