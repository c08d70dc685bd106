"""pack_e5m6, unpack_e5m6 and requantize_e5m6 on every backend, against an oracle of exact comparisons in NumPy."""

from __future__ import annotations

import functools
import io
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from backends import BACKENDS, assert_same_bits, backend, backend_params
from torch import Tensor
from torch.utils import _pytree as pytree

import fastfp8
from fastfp8 import PackedE5M6, ScaledTensor

EVERYWHERE = backend_params([name for name in BACKENDS if name != "cuda_triton"])
SHAPES = [(1, 1), (1, 8), (3, 129), (17, 264), (5, 7), (2, 128), (0, 16), (4, 0), (33, 300)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def value_of(code: int) -> float:
    """Of one of 4096 codes, by the definition of the format."""
    sign, exponent, mantissa = code >> 11, code >> 6 & 31, code & 63
    if exponent == 31:
        value = math.nan if mantissa else math.inf
    elif exponent:
        value = float(Fraction(64 + mantissa, 64) * Fraction(2) ** (exponent - 15))
    else:
        value = float(Fraction(mantissa, 64) * Fraction(2) ** -14)
    return -value if sign else value


VALUES = np.array([value_of(code) for code in range(4096)])
POSITIVE = VALUES[: 31 << 6]  # ascending, all finite
MIDDLES = (POSITIVE[1:] + POSITIVE[:-1]) / 2  # exact in float64


def codes_of(x: np.ndarray) -> np.ndarray:
    """The nearest code of each float64, of two the even one."""
    magnitude = np.abs(x)
    below = np.searchsorted(MIDDLES, magnitude, "left")
    tie = (below < len(MIDDLES)) & (MIDDLES[np.minimum(below, len(MIDDLES) - 1)] == magnitude)
    codes = np.where(tie & (below % 2 == 1), below + 1, below)
    codes = np.where(np.isinf(x), 0x7C0, codes) + np.where(np.signbit(x), 0x800, 0)
    return np.where(np.isnan(x), 0x7E0, codes)


def words_of(codes: np.ndarray) -> Tensor:
    """Rows of codes as numbers of 96 bits, first code first, cut in three."""
    rows = []
    for row in codes.tolist():
        row += [0] * (-len(row) % 8)
        numbers = [sum(c << 12 * (7 - k) for k, c in enumerate(row[i : i + 8])) for i in range(0, len(row), 8)]
        rows.append([n >> shift & 0xFFFFFFFF for n in numbers for shift in (64, 32, 0)])
    columns = -(-codes.shape[1] // 8) * 3
    return torch.from_numpy(np.array(rows, np.uint32).reshape(len(rows), columns).view(np.int32))


def oracle(x: Tensor, *, pow2: bool = True, eps: float = 0.0, per_row: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scale and the FP32 values that they stand for."""
    values = x.float().numpy()
    rows, cols = values.shape
    group = max(cols, 1) if per_row else 128
    codes, dense = np.zeros((rows, cols), np.int64), np.zeros((rows, cols), np.float32)
    scale = np.zeros((rows, math.ceil(cols / group)), np.float32)
    for i, j in np.ndindex(*scale.shape):
        part = np.s_[i, j * group : (j + 1) * group]
        finite = np.abs(values[part][np.isfinite(values[part])])
        amax, one, multiplier = np.float32(finite.max(initial=0)), np.float32(1), np.float32(1)
        if amax > 0:
            floored = max(amax, np.float32(max(eps, 2.0**-110)))
            # A double holds 2 * 24 + 2 bits, so that rounding its quotient to FP32 is rounding the exact quotient.
            one, multiplier = np.float32(float(floored) / 65024), np.float32(65024 / float(floored))
            if pow2:
                fraction, exponent = math.frexp(float(one))
                one = np.float32(2.0 ** (exponent - 1 if fraction == 0.5 else exponent))
                multiplier = np.float32(1 / float(one))
        scaled = (values[part].astype(np.float64) * float(multiplier)).astype(np.float32)
        codes[part], scale[i, j] = codes_of(scaled.astype(np.float64)), one
        with np.errstate(over="ignore"):
            dense[part] = (VALUES[codes[part]] * float(one)).astype(np.float32)
    return words_of(codes), torch.from_numpy(scale), torch.from_numpy(dense)


def cpu(packed: PackedE5M6, device: str = "cpu") -> PackedE5M6:
    words, scale = (
        packed.words.to(device),
        torch.empty_strided(packed.scale.shape, packed.scale.stride(), device=device).copy_(packed.scale),
    )
    return PackedE5M6(words, scale, packed.shape, per_row=packed.per_row)


def run_host(name: str, function: str, *args: Any) -> Any:
    """The Triton host function ``function``, interpreted or with its kernel's PTX for sm_90."""
    from fastfp8.triton_kernels import e5m6 as module

    if name == "emulator":
        host = functools.partial(getattr(module, function), *args)
        return backend(name)._run_triton(module, f"{function}_kernel", host)
    from interpreter import interpreted

    with interpreted():
        return getattr(module, function)(*args)


def pack(name: str, x: Tensor, *, pow2: bool = True, eps: float = 0.0, per_row: bool = False) -> PackedE5M6:
    if name == "reference":
        return fastfp8.pack_e5m6(x, pow2=pow2, eps=eps, per_row=per_row)
    if name == "cuda":
        on_gpu = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)
        return cpu(fastfp8.pack_e5m6(on_gpu, pow2=pow2, eps=eps, per_row=per_row))
    return PackedE5M6._trusted(*run_host(name, "pack_e5m6", x, pow2, eps, per_row), x.shape, per_row)


def unpack(name: str, p: PackedE5M6, dtype: torch.dtype) -> Tensor:
    if name == "reference":
        return fastfp8.unpack_e5m6(p, dtype)
    if name == "cuda":
        return fastfp8.unpack_e5m6(cpu(p, "cuda"), dtype).cpu()
    return run_host(name, "unpack_e5m6", p.words, p.scale, p.shape[1], p.per_row, dtype)


def requantize(name: str, p: PackedE5M6, pow2: bool) -> ScaledTensor:
    if name == "reference":
        return fastfp8.requantize_e5m6(p, pow2=pow2)
    if name == "cuda":
        return fastfp8.requantize_e5m6(cpu(p, "cuda"), pow2=pow2).to("cpu")
    made = run_host(name, "requantize_e5m6", p.words, p.scale, p.shape[1], p.per_row, pow2)
    return ScaledTensor(*made, (128, 1))


def check(name: str, x: Tensor, **options: Any) -> PackedE5M6:
    """Packed, unpacked to every dtype, and requantised."""
    words, scale, dense = oracle(x, **options)
    p = pack(name, x, **options)
    assert p.shape == x.shape
    assert_same_bits(p.words, words, "words")
    assert_same_bits(p.scale, scale, "scale")
    emulated = name == "emulator"  # which is slow
    for dtype in DTYPES[:1] if emulated else DTYPES:
        assert_same_bits(unpack(name, p, dtype), dense.to(dtype), f"values in {dtype}")
    for pow2 in (True,) if emulated else (False, True):
        got, want = requantize(name, p, pow2), fastfp8.quantize(dense, (128, 1), pow2=pow2)
        assert_same_bits(got.data, want.data, "requantised data")
        assert_same_bits(got.scale, want.scale, "requantised scale")
    return p


def make(kind: str, rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    x = torch.randn(rows, cols, generator=generator)
    if kind == "wide":  # within a group 2^-30 to 1, so that many codes are subnormal or zero
        return x * torch.exp2(-30 * torch.rand(rows, cols, generator=generator))
    if kind == "special":
        values = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 3.3e38, -1e-45, 1e-38, 0.0, -0.0])
        some = torch.rand(rows, cols, generator=generator) < 0.1
        x = torch.where(some, values[torch.randint(0, 9, (rows, cols), generator=generator)], x)
        x[1::3] *= 2.0**-125
        x[2::3] = values[torch.randint(0, 4, x[2::3].shape, generator=generator)]
    return x


@pytest.mark.parametrize("per_row", [False, True], ids=["1x128", "per row"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_shapes(name: str, shape: tuple[int, int], per_row: bool) -> None:
    p = check(name, make("wide", *shape), per_row=per_row)
    assert p.words.is_contiguous()
    assert p.scale.stride() == (1, -(-shape[0] // 4) * 4)


@pytest.mark.parametrize("kind", ["normal", "wide", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_values(name: str, dtype: torch.dtype, kind: str) -> None:
    x = make(kind, 19, 270).to(dtype)
    for pow2, eps, per_row in ((True, 0.0, False), (False, 0.0, False), (False, 1e-4, True), (True, 1e-4, True)):
        check(name, x, pow2=pow2, eps=eps, per_row=per_row)
    check(name, torch.zeros(3, 130, dtype=dtype))


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_code(name: str) -> None:
    """Each is unpacked as the format says, and packed again to itself; NaN to 0x7E0."""
    codes = np.arange(4096).reshape(32, 128)
    values = torch.from_numpy(VALUES.reshape(32, 128)).float()
    one = torch.ones(1, 32).t()
    words = words_of(codes)
    assert_same_bits(unpack(name, PackedE5M6(words, one, (32, 128)), torch.float32), values, "values")
    # With 65024 in each row the scale is 1.
    x = torch.cat([values, torch.full((32, 8), 65024.0)], 1)
    p = pack(name, x, per_row=True)
    assert (p.scale == 1).all()
    again = np.where(np.isnan(VALUES), 0x7E0, np.arange(4096)).reshape(32, 128)
    assert_same_bits(p.words[:, :48], words_of(again), "words")


@pytest.mark.parametrize("name", EVERYWHERE)
def test_ties_go_to_even(name: str) -> None:
    """Halfway between any two codes, and an ulp of FP32 below and above."""
    middles = MIDDLES.astype(np.float32)
    assert (middles == MIDDLES).all()
    near = [middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(math.inf))]
    x = torch.from_numpy(np.concatenate(near))
    x = torch.cat([x, -x, torch.full((-2 * len(x) % 120,), 1.0)]).view(-1, 120)
    x = torch.cat([x, torch.full((len(x), 8), 65024.0)], 1)
    assert (check(name, x).scale == 1).all()


@pytest.mark.parametrize("name", EVERYWHERE)
def test_strides(name: str) -> None:
    big = make("normal", 60, 300)
    for x in (big.t()[:150], big[3:40:2, 1:270:3], big[:, 5:140], big[:1].expand(20, 300)):
        check(name, x)


def tile_kernels_code(x: np.ndarray) -> np.ndarray:
    """The rule of TileKernels: FP16 towards zero less 4 bits, plus 1 if the low 17 bits of FP32 and evenness say so."""
    half = x.astype(np.float16)
    half = np.where(np.abs(half.astype(np.float32)) > np.abs(x), np.nextafter(half, np.float16(0)), half)
    code, low = half.view(np.uint16) >> 4, x.view(np.uint32) & 0x1FFFF
    return code + ((code & 1) + low > 0x10000)


def test_codes_of_tile_kernels() -> None:
    """With per_row and eps=1e-4 the same bits, but for about half of the codes that are subnormal."""
    x = make("wide", 16, 512).numpy()
    multiplier = (np.float32(65024) / np.abs(x).max(1, keepdims=True)).astype(np.float32)
    scaled = x * multiplier
    theirs = tile_kernels_code(scaled)
    p = fastfp8.pack_e5m6(torch.from_numpy(x), pow2=False, eps=1e-4, per_row=True)
    ours = codes_of(scaled.astype(np.float64))
    assert_same_bits(p.words, words_of(ours), "words")
    normal = np.abs(scaled) >= 2.0**-14
    subnormal = (np.abs(scaled) > 2.0**-20) & ~normal
    assert (ours == theirs)[normal].all()
    assert subnormal.sum() > 200
    assert 0.3 < (ours != theirs)[subnormal].mean() < 0.7


@pytest.mark.parametrize("per_row", [False, True], ids=["1x128", "per row"])
def test_sqnr(per_row: bool) -> None:
    """Three bits of mantissa more than e4m3 has: 18 dB more than its 31.5."""
    x = make("normal", 256, 512)
    noise = (fastfp8.unpack_e5m6(fastfp8.pack_e5m6(x, per_row=per_row), torch.float32) - x).double().square().sum()
    assert 49.3 < 10 * math.log10(x.double().square().sum() / noise) < 50


def test_a_packed_tensor() -> None:
    p = fastfp8.pack_e5m6(make("normal", 5, 300))
    assert p.nbytes == 5 * 114 * 4 + 5 * 3 * 4
    assert repr(p) == "PackedE5M6((5, 300), one scale a 1x128)"
    assert repr(fastfp8.pack_e5m6(torch.ones(1, 8), per_row=True)) == "PackedE5M6((1, 8), one scale a row)"
    file = io.BytesIO()
    torch.save(p, file)
    file.seek(0)
    for other in (
        torch.load(file),
        pytree.tree_map(torch.clone, p),
        PackedE5M6(p.words, p.scale.contiguous(), p.shape),
    ):
        assert (other.shape, other.per_row, other.device) == (p.shape, False, p.device)
        assert other.scale.stride() == p.scale.stride()
        assert torch.equal(fastfp8.unpack_e5m6(other), fastfp8.unpack_e5m6(p))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"words": torch.zeros(5, 114)}, TypeError, "'words': expected dtype torch.int32, got torch.float32"),
        ({"words": torch.zeros(5, 113).int()}, ValueError, r"'words': expected shape \(5, 114\), got shape \(5, 113\)"),
        ({"words": torch.zeros(114, 5).int().t()}, ValueError, "'words': expected a contiguous tensor, got stride"),
        ({"words": torch.zeros(4, 114).int()}, ValueError, "'scale'|'words'"),
        ({"scale": torch.ones(5, 2)}, ValueError, r"'scale': expected shape \(5, 3\), got shape \(5, 2\)"),
        ({"scale": torch.ones(5, 3).double()}, TypeError, "'scale': expected dtype torch.float32"),
        ({"shape": (5, 3, 100)}, ValueError, r"'shape': expected \(R, C\)"),
        ({"shape": 5}, TypeError, r"'shape': expected \(R, C\)"),
        ({"shape": (6, 300)}, ValueError, "'words': expected 6 rows"),
        ({"per_row": True}, ValueError, r"'scale': expected shape \(5, 1\)"),
        ({"per_row": 1}, TypeError, "'per_row': expected a bool"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_bad_packed_tensors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    p = fastfp8.pack_e5m6(make("normal", 5, 300))
    arguments = {"words": p.words, "scale": p.scale, "shape": (5, 300), "per_row": False, **change}
    with pytest.raises(error, match=rf"fastfp8\.PackedE5M6: argument {text}"):
        PackedE5M6(arguments["words"], arguments["scale"], arguments["shape"], per_row=arguments["per_row"])


def test_bad_input() -> None:
    x, p = make("normal", 5, 300), fastfp8.pack_e5m6(make("normal", 5, 300))
    for call, error, text in (
        (lambda: fastfp8.pack_e5m6(x.double()), TypeError, "pack_e5m6: argument 'x'.*float64"),
        (lambda: fastfp8.pack_e5m6(x[0]), ValueError, r"pack_e5m6: argument 'x': expected 2 dimensions"),
        (lambda: fastfp8.pack_e5m6(x, eps=-1.0), ValueError, "pack_e5m6: argument 'eps'"),
        (lambda: fastfp8.pack_e5m6(x, pow2=1), TypeError, "pack_e5m6: argument 'pow2': expected a bool"),
        (lambda: fastfp8.pack_e5m6(x, per_row=0), TypeError, "pack_e5m6: argument 'per_row': expected a bool"),
        (lambda: fastfp8.unpack_e5m6(p.words), TypeError, "unpack_e5m6: argument 'packed'.*Tensor"),
        (lambda: fastfp8.unpack_e5m6(p, torch.int32), TypeError, "unpack_e5m6: argument 'dtype'"),
        (lambda: fastfp8.requantize_e5m6(p.words), TypeError, "requantize_e5m6: argument 'packed'"),
        (lambda: fastfp8.requantize_e5m6(p, pow2=None), TypeError, "requantize_e5m6: argument 'pow2'"),
        (
            lambda: torch.ops.fastfp8.unpack_e5m6(p.words, p.scale.contiguous(), 300),
            RuntimeError,
            r"unpack_e5m6: argument 'scale': expected stride \(1, a multiple of 4",
        ),
        (lambda: torch.ops.fastfp8.requantize_e5m6(p.words, p.scale, 400), RuntimeError, "'words': expected shape"),
    ):
        with pytest.raises(error, match=text):
            call()
