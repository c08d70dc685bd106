"""gemm_swiglu_quantize on every backend: bit for bit swiglu_quantize of the product, and nothing else touched."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from backends import BACKENDS, Backend, Emulator, assert_same_bits, backend, backend_params
from groups import ends_of, groups_of, part, poisoned_empty, scaled, spoil, untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grouped_gemm import BAD_OFFSETS, DEVICE_SIDE, ON_CPU, SIZES, TAIL, reported
from test_quantize import expected_strides
from torch import Tensor

import fastfp8
from fastfp8 import _C, ScaledTensor
from fastfp8.error_word import SWIGLU_OFFSETS
from fastfp8.layout import BLOCK, Block
from fastfp8.reference import tensor_core

A_BLOCK: Block = (1, BLOCK)
B_BLOCK: Block = (BLOCK, BLOCK)
OPTIONS: list[dict[str, Any]] = [{}, {"limit": 3.3, "pow2": True}, {"eps": 20.0}, {"limit": 0.7, "eps": 1e-4}]
# F and K of each case in turn.
SHAPES = [(128, 16), (256, 144), (128, 272), (256, 400)]


def operands(rows: int, b_shape: tuple[int, ...], seed: int = 0, pitch: int = 0) -> tuple[ScaledTensor, ScaledTensor]:
    """Whose products have the size at which SwiGLU does something."""
    a, b = scaled((rows, b_shape[-1]), A_BLOCK, seed, pitch), scaled(b_shape, B_BLOCK, seed + 1, pitch)
    a.scale.mul_(2.0**-14)
    return a, b


def weights(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed))


def compare(got: tuple[ScaledTensor, Tensor], rows: slice, gate_up: Tensor, **options: Any) -> None:
    """``rows`` of a result with what the CPU, whose bits are those of every backend, makes of a product of them."""
    quantized, product = got
    assert_same_bits(product[rows], gate_up, f"gate and up of {rows}")
    weight = options.pop("weight", None)
    expected = fastfp8.swiglu_quantize(gate_up, None if weight is None else weight[rows], **options)
    assert_same_bits(quantized.data[rows], expected.data, f"data of {rows}")
    assert_same_bits(quantized.scale[rows], expected.scale, f"scale of {rows}")


def check(
    b: Backend, left: ScaledTensor, right: ScaledTensor, offsets: Tensor | None = None, **options: Any
) -> tuple[ScaledTensor, Tensor]:
    """Against the product of the same backend."""
    got = b.gemm_swiglu_quantize(left, right, offsets, **options)
    rows, n = left.shape[0], right.shape[-2]
    assert got[0].shape == (rows, n // 2)
    assert got[0].block == A_BLOCK
    assert got[0].data.is_contiguous()
    assert got[0].scale.stride() == expected_strides(got[0].scale.shape, A_BLOCK)
    assert got[1].shape == (rows, n)
    assert got[1].is_contiguous()
    if offsets is None:
        compare(got, slice(0, rows), b.gemm(left, right), **options)
    else:
        for group, used in enumerate(groups_of(offsets)):
            compare(got, used, b.gemm(part(left, used), right[group]), **options)
    return got


@pytest.mark.parametrize("rows", [1, 63, 65, 130])
@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_dense(name: str, rows: int) -> None:
    turn = rows % 4
    f, k = SHAPES[turn]
    a, b = operands(rows, (2 * f, k), seed=turn, pitch=512 if turn == 1 else 0)
    weight = weights(2 * rows)[::2] if rows % 3 else None
    check(backend(name), a, b, weight=weight, **OPTIONS[turn])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_groups(name: str, sizes: tuple[int, ...]) -> None:
    """Rows past the last group are NaN, their weights too, and what lies between rows."""
    turn = SIZES.index(sizes) % 4
    f, k = SHAPES[turn]
    rows = sum(sizes) + TAIL
    a, b = operands(rows, (len(sizes), 2 * f, k), seed=turn, pitch=512 if turn == 1 else 0)
    spoil(a, slice(sum(sizes), None))
    weight = weights(rows)
    weight[sum(sizes) :] = torch.nan
    check(backend(name), a, b, ends_of(sizes), weight=weight, **OPTIONS[turn])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", backend_params())
def test_random_sizes(name: str, seed: int) -> None:
    rng = random.Random(seed)
    sizes = tuple(rng.choice((0, 1, 17, 63, 64, 65, 130)) for _ in range(rng.randint(9, 20)))
    a, b = operands(sum(sizes), (len(sizes), 256, 144), seed)
    check(backend(name), a, b, ends_of(sizes), **OPTIONS[seed])
    sizes = tuple(rng.randint(0, 300) for _ in range(3))
    a, b = operands(sum(sizes), (3, 512, 16), seed)
    check(backend(name), a, b, ends_of(sizes), weight=weights(sum(sizes)), **OPTIONS[seed + 2])


@pytest.mark.parametrize("name", backend_params([n for n in BACKENDS if n != "reference"]))
def test_one_segment_of_k(name: str) -> None:
    """Where gemm cuts K into segments, this op has the sums of a product so wide that gemm does not."""
    a, b = operands(3, (256, 2048), seed=2)
    assert len(_C.gemm_segments(256, 2048, B_BLOCK)) > 2
    got = backend(name).gemm_swiglu_quantize(a, b)
    if name == "emulator":
        wide = tensor_core.gemm(a.data, a.scale, b.data, b.scale, B_BLOCK, torch.bfloat16, None, one_segment=True)
    else:
        assert len(_C.gemm_segments(256 * 10, 2048, B_BLOCK)) == 2
        data, scale = b.data.view(torch.uint8).repeat(10, 1).view(torch.float8_e4m3fn), b.scale.repeat(10, 1)
        wide = backend(name).gemm(a, ScaledTensor(data, scale, B_BLOCK))[:, :256]
    compare(got, slice(0, 3), wide)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", backend_params(["emulator"]))
def test_as_compiled_for_hopper(name: str, seed: int) -> None:
    """The PTX that Triton makes, under other timings, against the model of the tensor core."""
    sizes = ((1, 0, 70, 5), (128, 1), (30, 30))[seed]
    a, b = operands(sum(sizes), (len(sizes), 256, 272), seed=seed)
    got = Emulator(seed=seed + 1).gemm_swiglu_quantize(a, b, ends_of(sizes), **OPTIONS[seed + 1])
    for group, rows in enumerate(groups_of(ends_of(sizes))):
        given = (a.data[rows], a.scale[rows], b.data[group], b.scale[group], B_BLOCK, torch.bfloat16, None)
        compare(got, rows, tensor_core.gemm(*given), **OPTIONS[seed + 1])


@pytest.mark.parametrize("name", backend_params(ON_CPU))
def test_nothing_but_the_rows_of_groups_is_written(name: str) -> None:
    """Neither rows past the last group, nor memory beside the codes, gate and up."""
    sizes = (0, 65, 1, 0, 7)
    a, b = operands(sum(sizes) + TAIL, (5, 256, 144))
    with poisoned_empty():
        quantized, gate_up = backend(name).gemm_swiglu_quantize(a, b, ends_of(sizes))
    written = torch.arange(a.shape[0]) < sum(sizes)
    assert gate_up[written].isfinite().all()
    assert untouched(gate_up, written)
    assert untouched(quantized.data.view(torch.uint8), written)


def test_triton_leaves_other_scales_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fastfp8.triton_kernels import gemm_swiglu_quantize as module

    storage = torch.full((64,), -7.0)
    monkeypatch.setattr(module, "empty_scale", lambda like, shape, block: storage.as_strided(shape, (1, 20), 8))
    a, b = operands(17, (2, 512, 144))
    quantized, _ = backend("triton_interpreter").gemm_swiglu_quantize(a, b, ends_of((3, 10)))
    assert (quantized.scale[:13] > 0).all()
    quantized.scale[:13] = -7.0
    assert (storage == -7).all()


@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_a_nan_stays_in_its_row(name: str) -> None:
    sizes = (3, 4, 2)
    a, b = operands(9, (3, 256, 144))
    clean, _ = backend(name).gemm_swiglu_quantize(a, b, ends_of(sizes))
    spoil(a, slice(3, 7))
    quantized, gate_up = backend(name).gemm_swiglu_quantize(a, b, ends_of(sizes))
    assert gate_up[3:7].isnan().all()
    assert (quantized.data.view(torch.uint8)[3:7] == 0x7F).all()
    assert (quantized.scale[3:7] == 1).all()
    for rows in (slice(0, 3), slice(7, 9)):
        assert_same_bits(quantized.data[rows], clean.data[rows], f"{rows}")
        assert_same_bits(quantized.scale[rows], clean.scale[rows], f"{rows}")
    b.data.view(torch.uint8)[2, 5] = 0x7F  # a row of gate: one column of the result
    quantized, _ = backend(name).gemm_swiglu_quantize(a, b, ends_of(sizes))
    assert (quantized.data.view(torch.uint8)[7:] == 0x7F).nonzero().tolist() == [[0, 5], [1, 5]]


@pytest.mark.parametrize("name", backend_params(BACKENDS))
def test_empty_extents(name: str) -> None:
    b = backend(name)
    for rows, f, k in ((0, 128, 16), (5, 0, 16), (0, 0, 0)):
        t, gate_up = b.gemm_swiglu_quantize(*operands(rows, (2 * f, k)))
        assert (t.shape, t.scale.shape, gate_up.shape) == ((rows, f), (rows, f // 128), (rows, 2 * f))
        t, _ = b.gemm_swiglu_quantize(*operands(rows, (2, 2 * f, k)), ends_of((0, 0)))
        assert t.shape == (rows, f)
    # Without K a row of a group is zero.
    for offsets in (None, ends_of((1, 3))):
        t, gate_up = b.gemm_swiglu_quantize(*operands(4, (*([] if offsets is None else [2]), 256, 0)), offsets)
        assert (gate_up[:4] == 0).all()
        assert (t.data.float()[:4] == 0).all()
        assert (t.scale[:4] == 1).all()


@pytest.mark.parametrize("bad", BAD_OFFSETS, ids=str)
@pytest.mark.parametrize("name", DEVICE_SIDE)
def test_bad_offsets_are_brought_into_range_and_reported(name: str, bad: tuple[int, ...]) -> None:
    a, b = operands(12, (3, 256, 144))
    good, largest = [], 0
    for end in bad:
        largest = max(largest, min(end, 12))
        good.append(largest)
    expected, _ = backend(name).gemm_swiglu_quantize(a, b, torch.tensor(good, dtype=torch.int32))
    assert reported(backend(name)) == 0
    got, _ = backend(name).gemm_swiglu_quantize(a, b, torch.tensor(bad, dtype=torch.int32))
    assert_same_bits(got.data[: good[-1]], expected.data[: good[-1]], f"{good}")
    assert_same_bits(got.scale[: good[-1]], expected.scale[: good[-1]], f"{good}")
    assert reported(backend(name)) == SWIGLU_OFFSETS


def test_the_cpu_names_the_op_of_bad_offsets() -> None:
    a, b = operands(12, (3, 256, 144))
    with pytest.raises(
        ValueError, match=r"fastfp8\.gemm_swiglu_quantize: argument 'offsets': .* 3 after 5 for group 1"
    ):
        fastfp8.gemm_swiglu_quantize(a, b, torch.tensor([5, 3, 12], dtype=torch.int32))


def test_gate_and_up_only_if_asked() -> None:
    a, b = operands(5, (512, 144))
    alone = fastfp8.gemm_swiglu_quantize(a, b, limit=2.0)
    both, gate_up = fastfp8.gemm_swiglu_quantize(a, b, limit=2.0, return_gate_up=True)
    assert isinstance(alone, ScaledTensor)
    assert_same_bits(alone.data, both.data, "data")
    assert_same_bits(alone.scale, both.scale, "scale")
    assert_same_bits(gate_up, fastfp8.gemm(a, b), "gate and up")


def test_the_result_is_what_the_next_product_takes() -> None:
    """The experts of a mixture: two launches."""
    sizes = (3, 0, 5)
    a, b = operands(8, (3, 512, 144))
    h = fastfp8.gemm_swiglu_quantize(a, b, ends_of(sizes))
    down = scaled((3, 144, 256), B_BLOCK, 7)
    out = fastfp8.grouped_gemm(h, down, ends_of(sizes))
    for group, rows in enumerate(groups_of(ends_of(sizes))):
        expected = fastfp8.gemm(fastfp8.gemm_swiglu_quantize(part(a, rows), b[group]), down[group])
        assert_same_bits(out[rows], expected, f"group {group}")


@pytest.mark.parametrize("name", backend_params())
def test_any_sizes(name: str) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        st.lists(st.integers(0, 140), min_size=0, max_size=4),
        st.integers(1, 2),
        st.integers(1, 20),
        st.sampled_from(OPTIONS),
        st.booleans(),
        st.integers(0, 1 << 20),
    )
    def run(sizes: list[int], blocks: int, k: int, options: dict[str, Any], weighted: bool, seed: int) -> None:
        """Dense without sizes."""
        rows = sum(sizes) if sizes else seed % 150
        shape = (*([len(sizes)] if sizes else []), 256 * blocks, 16 * k)
        a, b = operands(rows, shape, seed)
        weight = weights(rows, seed) if weighted else None
        check(backend(name), a, b, ends_of(sizes) if sizes else None, weight=weight, **options)

    run()
