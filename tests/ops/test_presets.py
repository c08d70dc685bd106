"""fastfp8.presets on every backend, bit by bit, against each project's formula written out in NumPy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from backends import Emulator, assert_same_bits, backend, backend_params, from_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import DTYPES, as_tensor, make

import fastfp8
from fastfp8 import presets
from fastfp8.presets import Preset, Rules

F32 = np.float32
MOST = F32(448)
BLOCKS = [(1, 128), (128, 1), (128, 128)]
KINDS = ["normal", "zero", "tiny", "subnormal", "huge", "infinite", "nan", "mixed"]


def e4m3(values: np.ndarray) -> np.ndarray:
    """To nearest even, saturating; a NaN becomes 0x7F."""
    codes = np.clip(values, -MOST, MOST).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), codes)


def bits(x: np.float32) -> int:
    return int(np.abs(x).view(np.int32))


def from_bits(value: int) -> np.float32:
    return np.array(value & 0xFFFFFFFF, np.uint32).view(F32)[()]


def largest(x: np.ndarray, nan: float = 0.0) -> np.float32:
    """By fmaxf, which skips a NaN, from 0; or with ``nan`` in its place."""
    return F32(nan) if math.isnan(nan) and np.isnan(x).any() else np.nan_to_num(np.abs(x), nan=0.0, posinf=np.inf).max()


def deep_gemm(x: np.ndarray, pow2: bool, dtype: torch.dtype) -> tuple[np.ndarray, np.float32]:
    """``x.abs().amax().clamp(1e-4)``, ``sf = amax / 448.0`` of a CUDA tensor, ``(x * (1 / sf)).to(e4m3)``."""
    amax = largest(x, math.nan)
    sf = (amax if math.isnan(amax) else max(amax, F32(1e-4))) * (F32(1) / MOST)
    if pow2:
        exponent = ((bits(sf) >> 23) & 0xFF) + bool(bits(sf) & 0x7FFFFF)
        sf = from_bits(min(max(exponent, 1), 254) << 23)
    return e4m3(x * (F32(1) / sf)), sf


def tile_kernels(x: np.ndarray, pow2: bool, dtype: torch.dtype) -> tuple[np.ndarray, np.float32]:
    """``sf = max(amax, 1e-4) / 448`` and ``448 / amax``; of powers of two ``((bits - 1) >> 23) + 1``."""
    amax = max(largest(x), F32(1e-4))
    sf, inverse = amax / MOST, MOST / amax
    if pow2:
        exponent = ((bits(sf) - 1) >> 23) + 1 - 127
        sf, inverse = from_bits((127 + exponent) << 23), from_bits((127 - exponent) << 23)
    return e4m3(x * inverse), sf


def transformer_engine(x: np.ndarray, pow2: bool, dtype: torch.dtype) -> tuple[np.ndarray, np.float32]:
    """``scale = 448 / amax``, 1 for an amax of 0 or infinity, never infinite; its mantissa cut; ``1 / scale`` kept."""
    amax, scale = largest(x), F32(1)
    if amax != 0 and np.isfinite(amax):
        scale = MOST / amax
        if np.isinf(scale):
            scale = F32(torch.finfo(dtype).max)
        if pow2:
            scale = from_bits(bits(scale) & 0xFF800000)
    return e4m3(x * scale), F32(1) / scale


def vllm(x: np.ndarray, pow2: bool, dtype: torch.dtype) -> tuple[np.ndarray, np.float32]:
    """``s = max(amax, 1e-10) / 448``, ``fminf(fmaxf(x / s, -448), 448)``; of powers of two from ``max(s, 1e-10)``."""
    s = max(largest(x), F32(1e-10)) / MOST
    if pow2:
        value = bits(max(s, F32(1e-10)))
        s = from_bits(((value >> 23) + bool(value & 0x7FFFFF)) << 23)
    return e4m3(np.fmin(np.fmax(x / s, -MOST), MOST)), s


def torch_ao(x: np.ndarray, pow2: bool, dtype: torch.dtype) -> tuple[np.ndarray, np.float32]:
    """``scale = float32(448 / float64(max(amax, 1e-12)))``, ``clamp(x * scale)``, ``1 / scale`` kept."""
    amax = max(float(largest(x)), 1e-12)
    scale = F32(448 / amax) if math.isfinite(amax) else F32(0)
    values = x * scale
    return e4m3(np.where(np.isnan(values), MOST, values)), F32(1) / scale


Formula = Callable[[np.ndarray, bool, torch.dtype], tuple[np.ndarray, np.float32]]
FORMULAS: dict[Preset, Formula] = {
    presets.DEEPGEMM: deep_gemm,
    presets.TILEKERNELS: tile_kernels,
    presets.TRANSFORMER_ENGINE: transformer_engine,
    presets.VLLM: vllm,
    presets.TORCHAO: torch_ao,
}
every_preset = pytest.mark.parametrize("preset", presets.ALL, ids=lambda preset: preset.name)


def expected(
    formula: Formula, x: torch.Tensor, block: tuple[int, int], pow2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.float().numpy()
    (rows, cols), (block_rows, block_cols) = values.shape, block
    codes = np.zeros(values.shape, np.uint8)
    scale = np.zeros((math.ceil(rows / block_rows), math.ceil(cols / block_cols)), F32)
    with np.errstate(all="ignore"):
        for i, j in np.ndindex(*scale.shape):
            part = np.s_[i * block_rows : (i + 1) * block_rows, j * block_cols : (j + 1) * block_cols]
            codes[part], scale[i, j] = formula(values[part], pow2, x.dtype)
    return from_numpy(codes, torch.float8_e4m3fn), torch.from_numpy(scale)


def check(b: Any, preset: Preset, x: torch.Tensor, block: tuple[int, int], pow2: bool) -> None:
    t = b.quantize(x, block, pow2=pow2, preset=preset)
    codes, scale = expected(FORMULAS[preset], x, block, pow2)
    what = f"{preset.name}, pow2={pow2}"
    assert_same_bits(t.scale, scale, f"scale of {what}")
    assert_same_bits(t.data, codes, f"data of {what}")


def modes(preset: Preset) -> list[bool]:
    return [False] if preset.rules.pow2 == "none" else [False, True]


@pytest.mark.parametrize("kind", KINDS)
@every_preset
@pytest.mark.parametrize("name", backend_params())
def test_values(name: str, preset: Preset, kind: str) -> None:
    """Types and blocks in turn."""
    turn, at = KINDS.index(kind), presets.ALL.index(preset)
    for pow2 in modes(preset):
        x = as_tensor(make(kind, (67, 200)), list(DTYPES)[(turn + at + pow2) % 3])
        check(backend(name), preset, x, BLOCKS[(turn // 3 + at) % 3], pow2)


@every_preset
@pytest.mark.parametrize("name", backend_params())
def test_amax_of_every_size(name: str, preset: Preset) -> None:
    """A block a row: all powers of two times 448 with their neighbours in FP32, from subnormals to infinity."""
    amax = (448 * 2.0 ** np.arange(-157, 120)).astype(F32)
    amax = np.concatenate([amax, np.nextafter(amax, F32(0)), np.nextafter(amax, F32(math.inf))])
    floors = np.array([f * (1 + step / 2**20) for f in (1e-4, 1e-10, 1e-12, 4.48e-8) for step in (-1, 0, 1)], F32)
    amax = np.concatenate([amax, floors, np.array([0, 1e-45, 3.4e38, math.inf], F32)])
    x = torch.from_numpy(amax)[:, None] * torch.tensor([1.0, 0.5, -0.3, 1e-3])
    for pow2 in modes(preset):
        check(backend(name), preset, x, (1, 128), pow2)


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(p, marks=[pytest.mark.slow] if p.name in ("TileKernels", "torchao") else [], id=p.name)
        for p in presets.ALL
    ],
)
@pytest.mark.parametrize("name", backend_params(["emulator"]))
def test_as_compiled_for_hopper(name: str, preset: Preset) -> None:
    turn = presets.ALL.index(preset)
    x = as_tensor(make(("mixed", "nan", "infinite")[turn % 3], (40, 200), turn), list(DTYPES)[turn % 3])
    x[:3] = torch.tensor([0.0, math.inf, math.nan])[:, None]
    for pow2 in modes(preset):
        check(Emulator(seed=turn), preset, x, BLOCKS[turn % 3], pow2)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = st.one_of(FINITE, FINITE, st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3.4e38, 448.0]))


def repeated(values: list[float], shape: tuple[int, int]) -> np.ndarray:
    return np.resize(np.array(values, F32), shape)


SHAPES = st.tuples(st.integers(0, 140), st.integers(0, 140))
FEW = st.builds(repeated, st.lists(VALUES, min_size=1, max_size=12), SHAPES)
# Halfway between two codes once 448 k is divided by k: where the operations of a preset decide.
TIES = [448.0, *(sign * tie * 2.0**e for sign in (1, -1) for tie in range(17, 32, 2) for e in range(-4, 4))]
TIED = st.builds(lambda k, shape: repeated([k * tie for tie in TIES], shape), st.integers(1, 4000), SHAPES)
MANY = st.builds(make, st.sampled_from(KINDS), SHAPES, st.integers(0, 1 << 30))


@every_preset
def test_any_input(preset: Preset) -> None:
    """A few values drawn at will, what lies between two codes, or many by chance."""

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        st.one_of(FEW, TIED, MANY),
        st.sampled_from(list(DTYPES)),
        st.sampled_from(BLOCKS),
        st.sampled_from(modes(preset)),
    )
    def run(x: np.ndarray, dtype: torch.dtype, block: tuple[int, int], pow2: bool) -> None:
        check(backend("reference"), preset, as_tensor(x, dtype), block, pow2)

    run()


def test_they_differ() -> None:
    """In the codes or scales of an input that shows it, each pair and each from ours: a copied line would be seen."""
    x = torch.cat([torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 128)])
    x[65, 3], x[64, 5] = math.nan, 1e-11
    found = {preset.name: fastfp8.quantize(x, preset=preset) for preset in presets.ALL} | {"ours": fastfp8.quantize(x)}
    same = [
        (a, b)
        for a, t in found.items()
        for b, u in found.items()
        if a < b
        and torch.equal(t.scale.nan_to_num(-1), u.scale.nan_to_num(-1))
        and torch.equal(*(v.data.view(torch.uint8) for v in (t, u)))
    ]
    assert same == []


def codes_and_scale(values: list[float], preset: Preset | None, pow2: bool = False) -> tuple[list[int], float]:
    t = fastfp8.quantize(torch.tensor([values]), preset=preset, pow2=pow2)
    return t.data.view(torch.uint8)[0].tolist(), t.scale.item()


@pytest.mark.parametrize(
    ("values", "pow2", "found"),
    [
        # A block of zeros.
        (
            [0.0],
            False,
            [([0], 1.0), ([0], 1e-4 / 448), ([0], 1e-4 / 448), ([0], 1.0), ([0], 1e-10 / 448), ([0], 1e-12 / 448)],
        ),
        # A NaN beside 448.
        (
            [math.nan, 448.0],
            False,
            [
                ([0x7F, 0x7E], 1.0),
                ([0x7F, 0x7F], math.nan),
                ([0x7F, 0x7E], 1.0),
                ([0x7F, 0x7E], 1.0),
                ([0xFE, 0x7E], 1.0),
                ([0x7E, 0x7E], 1.0),
            ],
        ),
        # An infinity beside 448.
        (
            [math.inf, 448.0],
            False,
            [
                ([0x7E, 0x7E], 1.0),
                ([0x7F, 0x00], math.inf),
                ([0x7F, 0x00], math.inf),
                ([0x7E, 0x7E], 1.0),
                ([0xFE, 0x00], math.inf),
                ([0x7E, 0x00], math.inf),
            ],
        ),
    ],
    ids=["zeros", "nan", "infinity"],
)
def test_documented_differences(values: list[float], pow2: bool, found: list[tuple[list[int], float]]) -> None:
    """Of ours, then of presets.ALL in their order."""
    for preset, (codes, scale) in zip((None, *presets.ALL), found, strict=True):
        got_codes, got_scale = codes_and_scale(values, preset, pow2)
        assert got_codes == codes, preset
        assert got_scale == pytest.approx(scale, rel=1e-6, nan_ok=True), preset


def test_the_last_bit_of_a_scale() -> None:
    """Multiplying by fl(1 / 448) changes more than half of all scales, twice the reciprocal some, division none."""
    x = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = (x.double() / 448).float()
    wrong = {p.name: (fastfp8.quantize(x, preset=p).scale != exact).float().mean().item() for p in presets.ALL}
    assert wrong["TileKernels"] == wrong["vLLM"] == 0
    assert 0.5 < wrong["DeepGEMM"] < 0.7
    assert 0.1 < wrong["TransformerEngine"] == wrong["torchao"] < 0.5
    on_a_cpu = dataclasses.replace(presets.DEEPGEMM, rules=dataclasses.replace(presets.DEEPGEMM.rules, scale="divide"))
    assert torch.equal(fastfp8.quantize(x, preset=on_a_cpu).scale, exact)


def test_powers_of_two_agree_on_bfloat16() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = fastfp8.quantize(x, pow2=True)
    for preset in presets.ALL:
        if preset.rules.pow2 != "none":
            t = fastfp8.quantize(x, pow2=True, preset=preset)
            assert_same_bits(t.data, ours.data, preset.name)
            assert_same_bits(t.scale, ours.scale, preset.name)


def test_printable() -> None:
    text = repr(presets.VLLM)
    assert all(word in text for word in ("vLLM", "eps=1e-10", "codes='divide'", "nan_code='lowest'", "layout="))
    assert Rules.parse("quantize", presets.VLLM.rules.text) == presets.VLLM.rules


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": "half"}, ("argument 'scale': expected divide or multiply or inverse", "half")),
        ({"pow2": "down"}, ("argument 'pow2': expected up or up_finite", "with scale 'divide'", "down")),
        ({"scale": "inverse", "pow2": "down"}, ("argument 'codes': expected multiply with scale 'inverse'", "divide")),
    ],
    ids=str,
)
def test_rules_that_make_no_sense(change: dict[str, str], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"fastfp8\.presets\.Rules") as caught:
        dataclasses.replace(presets.VLLM.rules, **change)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"preset": "deepgemm"}, TypeError, ("'preset': expected a fastfp8.presets.Preset or None", "deepgemm")),
        ({"preset": presets.VLLM, "eps": 1e-4}, ValueError, ("'eps': expected 0 with preset vLLM", "0.0001")),
        ({"preset": presets.TORCHAO, "pow2": True}, ValueError, ("'pow2': expected False", "True")),
    ],
    ids=["kind", "eps", "pow2"],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        fastfp8.quantize(torch.ones(3, 128), **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_bad_rules_of_the_op() -> None:
    for rules in ("divide", "divide,multiply,up,as_others,as_others,other"):
        with pytest.raises(RuntimeError, match=r"fastfp8\.(quantize|presets\.Rules): argument .* expected"):
            torch.ops.fastfp8.quantize(torch.ones(3, 128), rules=rules)
