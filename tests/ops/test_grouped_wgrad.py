"""grouped_wgrad on every backend: bit for bit gemm of each group's blocks of tokens, and nothing else touched."""

from __future__ import annotations

import random

import pytest
import torch
from backends import BACKENDS, Backend, Emulator, assert_same_bits, backend, backend_params
from groups import blocks_of, in_groups_of_tokens, poisoned_empty, scaled, token_blocks, token_ends, untouched
from test_gemm import BF16_BOUND, BOUNDS, NO_HOPPER, calc_diff, exact, promoted
from test_grouped_gemm import BAD_OFFSETS, DEVICE_SIDE, ON_CPU, reported
from torch import Tensor

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.error_word import TOKEN_OFFSETS
from fastfp8.layout import BLOCK, Block
from fastfp8.reference import tensor_core

OPERAND_BLOCK: Block = (1, BLOCK)
OUT_DTYPES = (torch.float32, torch.bfloat16)
SIZES = [(0,), (1,), (70,), (0, 1, 0, 63, 64, 65, 0), (127, 0, 128, 129), (0, 0, 300, 0)]
# N and K of each case in turn: both of Triton's tiles, and tails of every kind.
SHAPES = [(5, 8), (40, 136), (131, 24), (65, 72)]
# Tokens past the end of the last group: within its block; to the end of that and beyond.
TAILS = (0, 16, 272)


def operands(offsets: Tensor, n: int, k: int, tail: int = 0, seed: int = 0, pitch: int = 0) -> tuple[ScaledTensor, ...]:
    """Zeros behind each group, NaN in blocks of no group, between rows and in the padding of scales."""
    tokens = -(-int(offsets[-1]) // 16) * 16 + tail
    made = (scaled((rows, tokens), OPERAND_BLOCK, seed + i, pitch) for i, rows in enumerate((n, k)))
    return tuple(in_groups_of_tokens(t, offsets) for t in made)


def addend(offsets: Tensor, n: int, k: int, out_dtype: torch.dtype) -> Tensor:
    """With -0, which a sum with 0 would lose, and NaN, which only an empty group keeps to itself."""
    generator = torch.Generator().manual_seed(n + k)
    out = (1000 * torch.randn((offsets.shape[0], n, k), generator=generator)).to(out_dtype)
    out[:, 0, 0], out[:, -1, -1] = -0.0, float("nan")
    return out


def check(b: Backend, offsets: Tensor, left: ScaledTensor, right: ScaledTensor, out_dtype: torch.dtype) -> None:
    """Each group has the bits of gemm, in a new tensor and in ``out``, without it and added to it."""
    out = b.grouped_wgrad(left, right, offsets, out_dtype=out_dtype)
    n, k = left.shape[0], right.shape[0]
    assert out.shape == (offsets.shape[0], n, k)
    assert out.is_contiguous()
    c = addend(offsets, n, k, out_dtype)
    sums, over = c.clone(), torch.full_like(c, float("nan"))
    assert b.grouped_wgrad(left, right, offsets, out=sums, accumulate=True) is sums
    assert b.grouped_wgrad(left, right, offsets, out=over, out_dtype=out_dtype) is over
    for group, blocks in enumerate(token_blocks(offsets)):
        what = f"group {group}, blocks {blocks.start} to {blocks.stop}"
        if blocks.start == blocks.stop:
            assert not out[group].count_nonzero(), what
            assert torch.equal(sums[group].view(torch.uint8), c[group].view(torch.uint8)), what
        else:
            parts = blocks_of(left, blocks), blocks_of(right, blocks)
            assert_same_bits(out[group], b.gemm(*parts, out_dtype=out_dtype), what)
            assert_same_bits(sums[group], b.gemm(*parts, out_dtype=out_dtype, c=c[group]), f"sums of {what}")
        assert_same_bits(over[group], out[group], f"out of {what}")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_groups_have_the_bits_of_gemm(name: str, sizes: tuple[int, ...]) -> None:
    case = SIZES.index(sizes)
    offsets, shape = token_ends(sizes), SHAPES[case % len(SHAPES)]
    left, right = operands(offsets, *shape, TAILS[case % len(TAILS)], seed=case, pitch=(case % 2) * 1088)
    check(backend(name), offsets, left, right, OUT_DTYPES[case // 2 % 2])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", backend_params())
def test_random_sizes(name: str, seed: int) -> None:
    """Many groups, and more rows of tiles than share their columns of input_t."""
    rng = random.Random(seed)
    n, k = [(16, 24), (1100, 136), (130, 8)][seed]
    sizes = tuple(rng.choice((0, 1, 17, 127, 128, 129, 300)) for _ in range(rng.randint(3, 3 if n > 1000 else 40)))
    offsets = token_ends(sizes)
    left, right = operands(offsets, n, k, rng.choice(TAILS), seed)
    check(backend(name), offsets, left, right, OUT_DTYPES[seed % 2])


@pytest.mark.parametrize("name", backend_params([n for n in BACKENDS if n not in ("reference", "cuda_triton")]))
def test_bits(name: str) -> None:
    """Against a model that shares no code: an exact tensor core in the interpreter, Hopper's on the emulator."""
    if name == "cuda" and NO_HOPPER:
        pytest.skip("this GPU is not sm_90, which alone has the accumulator that is modelled")
    offsets = token_ends((65, 0, 3, 300))
    left, right = operands(offsets, 65, 72, 16, seed=5)
    c = addend(offsets, 65, 72, torch.float32)
    for out in (None, c.clone()):
        got = backend(name).grouped_wgrad(left, right, offsets, out=out, accumulate=out is not None)
        for group, blocks in enumerate(token_blocks(offsets)):
            if blocks.start == blocks.stop:
                continue
            a, b, added = blocks_of(left, blocks), blocks_of(right, blocks), None if out is None else c[group]
            if name == "triton_interpreter":
                expected = promoted(a, b, added, torch.float32)
            else:
                expected = tensor_core.gemm(a.data, a.scale, b.data, b.scale, b.block, torch.float32, added)
            assert_same_bits(got[group], expected, f"group {group}")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", backend_params(["emulator"]))
def test_bits_under_other_timing(name: str, seed: int) -> None:
    offsets = token_ends((1, 0, 200, 5))
    left, right = operands(offsets, 40, 136, TAILS[seed], seed=seed)
    c = addend(offsets, 40, 136, torch.bfloat16)
    out = Emulator(seed=seed + 1).grouped_wgrad(left, right, offsets, out=c.clone(), accumulate=True)
    for group, blocks in enumerate(token_blocks(offsets)):
        if blocks.start < blocks.stop:
            a, b = blocks_of(left, blocks), blocks_of(right, blocks)
            expected = tensor_core.gemm(a.data, a.scale, b.data, b.scale, b.block, torch.bfloat16, c[group])
            assert_same_bits(out[group], expected, f"group {group}")


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_against_float64(name: str, positive: bool) -> None:
    """Dense Wgrad is one group."""
    generator = torch.Generator().manual_seed(0)
    make = torch.rand if positive else torch.randn
    left, right = (fastfp8.quantize(make(rows, 400, generator=generator)) for rows in (66, 72))
    offsets, expected = torch.tensor([400], dtype=torch.int32), exact(left, right)
    out = backend(name).grouped_wgrad(left, right, offsets)[0]
    if positive:  # nothing cancels, and what the tensor core truncates is a bias
        assert abs(out.numpy() / expected - 1).max() < BOUNDS[name][1]
    else:
        assert calc_diff(out, expected) < BOUNDS[name][0]
    out = backend(name).grouped_wgrad(left, right, offsets, out_dtype=torch.bfloat16)[0]
    assert calc_diff(out, expected) < BF16_BOUND


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("name", backend_params(ON_CPU))
def test_nothing_but_the_output_is_written(name: str, out_dtype: torch.dtype) -> None:
    offsets = token_ends((0, 65, 1, 0))
    left, right = operands(offsets, 67, 40)
    with poisoned_empty():
        out = backend(name).grouped_wgrad(left, right, offsets, out_dtype=out_dtype)
        into = torch.empty((6, 67, 40), dtype=out_dtype)
    assert out.isfinite().all()
    assert untouched(out, torch.ones(4 * 67, dtype=torch.bool))
    # Groups of a larger buffer, whose other matrices are another's.
    backend(name).grouped_wgrad(left, right, offsets, out=into[1:5])
    assert_same_bits(into[1:5], out, "into the middle of a buffer")
    assert untouched(into, torch.arange(6 * 67) // 67 % 5 > 0)


@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_a_nan_stays_in_its_group(name: str) -> None:
    offsets = token_ends((3, 200, 2))
    left, right = operands(offsets, 5, 40)
    clean = backend(name).grouped_wgrad(left, right, offsets)
    left.data.view(torch.uint8)[2, 130] = 0x7F
    right.scale[7, 1] = float("nan")
    out = backend(name).grouped_wgrad(left, right, offsets)
    bad = torch.zeros(5, 40, dtype=torch.bool)
    bad[2], bad[:, 7] = True, True
    assert torch.equal(out[1].isnan(), bad)
    for group in (0, 2):
        assert_same_bits(out[group], clean[group], f"group {group}")


@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_empty_extents(name: str) -> None:
    b, zeros = backend(name), torch.zeros(2, dtype=torch.int32)
    for n, k in ((0, 8), (5, 0), (0, 0)):
        left, right = operands(token_ends((20, 3)), n, k)
        assert b.grouped_wgrad(left, right, token_ends((20, 3))).shape == (2, n, k)
    # Without tokens all groups are empty.
    left, right = scaled((5, 0), OPERAND_BLOCK, 0), scaled((8, 0), OPERAND_BLOCK, 0)
    assert not b.grouped_wgrad(left, right, zeros).count_nonzero()
    c = addend(zeros, 5, 8, torch.float32)
    out = b.grouped_wgrad(left, right, zeros, out=c.clone(), accumulate=True)
    assert torch.equal(out.view(torch.uint8), c.view(torch.uint8))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("bad", BAD_OFFSETS, ids=str)
@pytest.mark.parametrize("name", DEVICE_SIDE)
def test_bad_offsets_are_brought_into_range_and_reported(name: str, bad: tuple[int, ...], accumulate: bool) -> None:
    """In units of 100 tokens but where that is out of range."""
    given = torch.tensor([100 * end if abs(end) < 1000 else end for end in bad], dtype=torch.int32)
    good = given.clamp(0, 1200).cummax(0).values.int()
    left, right = (in_groups_of_tokens(scaled((rows, 1200), OPERAND_BLOCK, rows), good) for rows in (40, 24))
    into = [torch.ones(3, 40, 24) for _ in range(2)]
    expected = backend(name).grouped_wgrad(left, right, good, out=into[0], accumulate=accumulate)
    assert reported(backend(name)) == 0
    out = backend(name).grouped_wgrad(left, right, given, out=into[1], accumulate=accumulate)
    assert_same_bits(out, expected, f"{good}")
    assert expected.isfinite().all()
    assert reported(backend(name)) == TOKEN_OFFSETS


@pytest.mark.parametrize(("bad", "words"), list(zip(BAD_OFFSETS, "10100", strict=True)), ids=str)
def test_the_cpu_names_the_first_bad_group(bad: tuple[int, ...], words: str) -> None:
    left, right = scaled((5, 16), OPERAND_BLOCK, 0), scaled((8, 16), OPERAND_BLOCK, 1)
    bad = tuple(17 if end == 100 else end for end in bad)
    expected = rf"fastfp8\.grouped_wgrad: argument 'offsets': .* T = 16, got .* for group {words}$"
    out = torch.ones(3, 5, 8)
    with pytest.raises(ValueError, match=expected):
        fastfp8.grouped_wgrad(left, right, torch.tensor(bad, dtype=torch.int32), out=out)
    assert (out == 1).all()
