"""swiglu_quantize on every backend, bit by bit: quantize of silu(gate) * up * weight in FP32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends import Backend, Emulator, assert_same_bits, backend, backend_params
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import DTYPES, as_tensor, expected_strides, make, oracle
from torch import Tensor

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.reference.activation import silu

BLOCK = (1, 128)
SHAPES = [(1, 1), (1, 128), (3, 129), (17, 256), (70, 130), (0, 128), (5, 0), (0, 0)]
OPTIONS = [{"pow2": pow2, "eps": eps} for pow2 in (False, True) for eps in (0.0, 1e-4)]
KINDS = ["normal", "zero", "tiny", "huge", "infinite", "nan", "mixed"]


def weights(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed))


def swiglu(gate_up: Tensor, weight: Tensor | None = None, limit: float | None = None) -> Tensor:
    """In FP32 one torch operation after the other. silu is checked by tests/reference/test_activation.py."""
    gate, up = gate_up.float().chunk(2, 1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    h = silu(gate) * up
    return h if weight is None else h * weight[:, None]


def check(
    b: Backend,
    gate_up: Tensor | ScaledTensor,
    weight: Tensor | None = None,
    limit: float | None = None,
    **options: Any,
) -> ScaledTensor:
    t = b.swiglu_quantize(gate_up, weight, limit, **options)
    values = gate_up.dequantize() if isinstance(gate_up, ScaledTensor) else gate_up
    codes, scale = oracle(swiglu(values, weight, limit), BLOCK, **options)
    assert t.block == BLOCK
    assert_same_bits(t.scale, scale, f"scale, {options}")
    assert_same_bits(t.data, codes, f"data, {options}")
    assert t.data.is_contiguous()
    assert t.scale.stride() == expected_strides(t.scale.shape, BLOCK)
    return t


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", backend_params())
def test_shapes(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Also any F: the last block of a row may be short."""
    rows, f = shape
    x = as_tensor(make("normal", (rows, 2 * f)) * 3, dtype)
    turn = (rows + f) % 4
    check(backend(name), x, weights(rows) if turn % 2 else None, (None, 2.5)[turn // 2], **OPTIONS[turn])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", backend_params())
def test_values(name: str, kind: str, dtype: torch.dtype) -> None:
    x = as_tensor(make(kind, (34, 272)), dtype)
    for turn, options in enumerate(OPTIONS):
        check(backend(name), x, weights(34) if turn % 2 else None, (None, 7.0, 0.1)[turn % 3], **options)


@pytest.mark.parametrize("f", [1, 64, 100, 128, 200, 384, 0])
@pytest.mark.parametrize("name", backend_params())
def test_gate_and_up_in_fp8(name: str, f: int) -> None:
    """Also where a block has columns of both, and where one of up begins within a block of the result."""
    for turn, kind in enumerate(["normal", "mixed"]):
        t = fastfp8.quantize(as_tensor(make(kind, (21, 2 * f), f), torch.bfloat16), pow2=turn == 1)
        check(backend(name), t, weights(21) if turn else None, (None, 2.5)[turn], **OPTIONS[turn])
    wide = fastfp8.quantize(as_tensor(make("normal", (2 * f, 21)), torch.float32).t())
    wide.data = wide.data.t().contiguous().t()
    check(backend(name), wide)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", backend_params(["emulator"]))
def test_gate_and_up_in_fp8_as_compiled_for_hopper(name: str, seed: int) -> None:
    t = fastfp8.quantize(as_tensor(make(("mixed", "normal")[seed], (37, (512, 600)[seed]), seed), torch.bfloat16))
    check(Emulator(seed=seed), t, weights(37), (None, 0.7)[seed])


@pytest.mark.parametrize("name", backend_params())
def test_every_bfloat16_as_gate(name: str) -> None:
    """By 128 of one sign and exponent a row, so that a code or a scale shows what silu is."""
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, 128)
    check(backend(name), torch.cat([gate, torch.ones_like(gate)], 1))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", backend_params(["triton_interpreter", "emulator", "cuda"]))
def test_fp32_gates_of_every_size(name: str, seed: int) -> None:
    """A value a row, so that its scale is silu to all bits: where exp is finite, near where it is not, and around 0."""
    generator = torch.Generator().manual_seed(seed)
    gate = torch.cat(
        [
            torch.linspace(-90, 90, 1000) + seed / 100,
            torch.linspace(-88.4, -88.3, 100),
            torch.randn(1000, generator=generator),
            torch.randn(500, generator=generator) * 2.0 ** torch.randint(-140, 100, (500,), generator=generator),
        ]
    )
    t = backend(name).swiglu_quantize(torch.stack([gate, torch.full_like(gate, 448.0)], 1), None, None, eps=0.0)
    h = silu(gate) * 448
    amax = torch.where(h.isfinite(), h.abs(), 0.0)
    expected = torch.where(amax == 0, 1.0, amax.clamp(min=2.0**-110) / torch.tensor(448.0))
    assert_same_bits(t.scale[:, 0], expected, "scale")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", backend_params(["emulator"]))
def test_as_compiled_for_hopper(name: str, seed: int) -> None:
    """The PTX that Triton makes, under several timings; each kind of input and option in turn."""
    dtype, kind = list(DTYPES)[seed], ("mixed", "normal", "infinite")[seed]
    x = as_tensor(make(kind, (37, 600), seed), dtype)
    check(Emulator(seed=seed), x, weights(37), (None, 3.3, 0.7)[seed], **OPTIONS[seed + 1])


@pytest.mark.parametrize("name", backend_params())
def test_strides(name: str) -> None:
    big = as_tensor(make("normal", (300, 280)), torch.bfloat16)
    w = weights(600)[::2]
    for x in (big.t(), big[3:150:2, 1:270:3][:, :88], big[:, 5:145], big[:1].expand(130, 280)):
        check(backend(name), x, w[: x.shape[0]], 1.5)
    check(backend(name), big, torch.tensor([0.3]).expand(300))


@pytest.mark.parametrize("name", backend_params())
def test_a_nan_or_an_infinity_touches_no_neighbour(name: str) -> None:
    clean = as_tensor(make("normal", (6, 512)), torch.bfloat16)
    clean[2, 7], clean[2, 256 + 7] = 0.0, 1.0
    expected = backend(name).swiglu_quantize(clean)
    for value, code in ((math.nan, 0x7F), (math.inf, 0x7E), (-math.inf, 0x80)):
        x = clean.clone()
        x[2, 7] = value
        t = backend(name).swiglu_quantize(x)
        assert t.data.view(torch.uint8)[2, 7] == code
        t.data[2, 7] = 0.0
        assert_same_bits(t.data, expected.data, "data")
        assert_same_bits(t.scale, expected.scale, "scale")


def test_the_limit_is_that_of_gpt_oss_and_tilekernels() -> None:
    """gate from above only, up on both sides; it is compared in FP32, not in the type of the input."""
    x = torch.tensor([[-9.0, 9.0, 1.0, 1.703125], [1.0, 1.0, -9.0, 1.0]]).bfloat16().repeat(1, 1)
    t = fastfp8.swiglu_quantize(x, limit=1.7)
    gate, up = x.float()[:, :2], x.float()[:, 2:]
    h = silu(gate.minimum(torch.tensor(1.7))) * up.clamp(-1.7, 1.7)
    assert_same_bits(t.data, fastfp8.quantize(h).data, "data")
    assert_same_bits(t.scale, fastfp8.quantize(h).scale, "scale")
    assert torch.equal(t.scale, fastfp8.swiglu_quantize(x.float(), limit=1.7).scale)


def test_near_what_torch_computes() -> None:
    """One rounding to e4m3 is 2^-4 of a value at most, and 2^-10 of the block's largest where it is subnormal."""
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    gate, up = x.double().chunk(2, 1)
    exact = torch.nn.functional.silu(gate) * up
    got = fastfp8.swiglu_quantize(x).dequantize().double()
    largest = exact.abs().view(64, -1, 128).amax(2, keepdim=True).expand(-1, -1, 128).reshape(exact.shape)
    assert ((got - exact).abs() <= exact.abs() * 2.0**-4 * (1 + 1e-6) + largest / 448 * 2.0**-10).all()


INPUTS = st.tuples(st.sampled_from(KINDS), st.tuples(st.integers(0, 40), st.integers(0, 150)), st.integers(0, 1 << 30))


def check_any_input(name: str, examples: settings) -> None:
    @examples
    @given(
        INPUTS,
        st.sampled_from(list(DTYPES)),
        st.booleans(),
        st.sampled_from([None, 1e-3, 1.0, 7.0, 1e30]),
        st.sampled_from(OPTIONS),
    )
    def run(
        x: tuple[str, tuple[int, int], int],
        dtype: torch.dtype,
        weighted: bool,
        limit: float | None,
        options: dict[str, Any],
    ) -> None:
        kind, (rows, f), seed = x
        gate_up = as_tensor(make(kind, (rows, 2 * f), seed), dtype)
        check(backend(name), gate_up, weights(rows, seed) if weighted else None, limit, **options)

    run()


@pytest.mark.parametrize("name", backend_params())
def test_any_input(name: str) -> None:
    check_any_input(name, settings(max_examples=40, deadline=None, derandomize=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", backend_params())
def test_any_input_long(name: str) -> None:
    check_any_input(name, settings(max_examples=600, deadline=None))


def test_chunks_of_the_reference_agree_with_the_whole() -> None:
    x = as_tensor(make("mixed", (300, 2048)), torch.bfloat16)
    whole = fastfp8.swiglu_quantize(x, weights(300))
    for i in range(0, 300, 64):
        part = fastfp8.swiglu_quantize(x[i : i + 64], weights(300)[i : i + 64])
        assert_same_bits(whole.data[i : i + 64], part.data, f"data from row {i}")
        assert_same_bits(whole.scale[i : i + 64], part.scale, f"scale from row {i}")
