"""The tensor-core model against a scalar one in exact rational arithmetic, and its promotion against the contract."""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction

import pytest
import torch
from scalar_tensor_core import round_fp32, scalar_gemm, scalar_k32
from torch import Tensor

import fastfp8
from fastfp8.layout import BLOCK, Block, ceil_div
from fastfp8.reference.tensor_core import BF16_NAN, FP32_NAN, fma, gemm, wgmma_k32

E4M3 = torch.float8_e4m3fn


def bits(value: Tensor) -> list[int]:
    return [x & 0xFFFFFFFF for x in value.contiguous().view(torch.int32).flatten().tolist()]


def bits_of(values: list[float]) -> list[int]:
    """FP32 bit patterns, NaN as the canonical one."""
    return [FP32_NAN if math.isnan(v) else bits(torch.tensor([v]))[0] for v in values]


def codes(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(E4M3)


def assert_k32(a: Tensor, b: Tensor, acc: Tensor) -> None:
    """The vectorised step of codes [M, 32] and [N, 32] equals the scalar one, bit for bit."""
    before = acc.clone()
    got = bits(wgmma_k32(a, b, acc))
    assert bits(acc) == bits(before), "the accumulator was modified"
    rows, cols = a.view(torch.uint8).tolist(), b.view(torch.uint8).tolist()
    pairs = list(itertools.product(range(len(rows)), range(len(cols))))
    want = bits_of([scalar_k32(rows[i], cols[j], acc[i, j].item()) for i, j in pairs])
    wrong = [(p, hex(g), hex(w)) for p, g, w in zip(pairs, got, want, strict=True) if g != w]
    assert not wrong, f"{len(wrong)} of {len(pairs)} elements differ, the first (index, got, want): {wrong[0]}"


def random_codes(generator: torch.Generator, rows: int, low: int = 0, high: int = 127) -> Tensor:
    """Codes of magnitude [low, high) with random signs."""
    magnitude = torch.randint(low, high, (rows, 32), generator=generator)
    return (magnitude + 128 * torch.randint(0, 2, (rows, 32), generator=generator)).to(torch.uint8).view(E4M3)


def random_fp32(generator: torch.Generator, shape: tuple[int, ...], low: int, high: int) -> Tensor:
    """FP32 numbers with random signs and fractions and a biased exponent in [low, high)."""
    exponent = torch.randint(low, high, shape, generator=generator)
    fraction = torch.randint(0, 1 << 23, shape, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator)
    return ((sign << 31) | (exponent << 23) | fraction).to(torch.int32).view(torch.float32)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20250101)


class TestK32:
    def test_every_code_times_every_code(self) -> None:
        """A single product among zeros: exact, for all 256 x 256 pairs."""
        a = torch.zeros(256, 32, dtype=torch.uint8)
        a[:, 5] = torch.arange(256)
        out = wgmma_k32(a.view(E4M3), a.view(E4M3), torch.zeros(256, 256))
        value = torch.arange(256, dtype=torch.uint8).view(E4M3).double()
        exact = value[:, None] * value
        assert torch.equal(out.isnan(), exact.isnan())
        assert set(bits(out[exact.isnan()])) == {FP32_NAN}
        assert torch.equal(out.double()[~exact.isnan()], exact[~exact.isnan()])
        assert not out[exact == 0].signbit().any()

    @pytest.mark.parametrize(
        ("low", "high"),
        [(0, 127), (0, 8), (0, 16), (1, 2), (8, 16), (48, 64), (112, 127), (126, 127)],
        ids=lambda v: str(v),
    )
    @pytest.mark.parametrize("exponents", [(0, 1), (100, 145), (110, 120), (1, 255)], ids=str)
    def test_random(self, generator: torch.Generator, low: int, high: int, exponents: tuple[int, int]) -> None:
        """Magnitude ranges: all codes, subnormals, the edge to the normals, one value, one binade, the largest."""
        acc = random_fp32(generator, (6, 6), *exponents)
        assert_k32(random_codes(generator, 6, low, high), random_codes(generator, 6, low, high), acc)

    def test_zero_accumulator(self, generator: torch.Generator) -> None:
        a, b = random_codes(generator, 12), random_codes(generator, 12)
        assert_k32(a, b, torch.zeros(12, 12))
        assert_k32(a, b, -torch.zeros(12, 12))

    def test_mostly_zeros(self, generator: torch.Generator) -> None:
        """Zeros of both signs beside large codes must not take part in the alignment."""
        a, b = random_codes(generator, 12), random_codes(generator, 12)
        a[:, ::2], b[:, 1::4] = 0.0, -0.0
        a[:6, 3:], b[:6, :3] = 0.0, 0.0
        assert_k32(a, b, random_fp32(generator, (12, 12), 90, 130))

    def test_all_zero_terms(self) -> None:
        zeros = torch.zeros(2, 32).to(E4M3)
        zeros[1] = -0.0
        assert bits(wgmma_k32(zeros, zeros, -torch.zeros(2, 2))) == [0] * 4
        # With no product the accumulator is truncated and otherwise kept, even subnormal or near the largest.
        kept = torch.tensor([[1e-40, -3.4e38], [2.0**-126, 1.9999999]])
        assert_k32(zeros, zeros, kept)

    def test_cancellation(self, generator: torch.Generator) -> None:
        """Large products that cancel still set the alignment, so what is left of the small ones is truncated."""
        a, b = random_codes(generator, 8), random_codes(generator, 8, 0, 32)
        a[:, 16] = 448.0
        a[:, 17] = -448.0
        b[:, 16:18] = 320.0
        assert_k32(a, b, random_fp32(generator, (8, 8), 118, 130))
        # 2**-18 beside 448 * 320 - 448 * 320 is gone; beside itself it stays.
        least = codes([[1] + [0] * 15 + [0x7E, 0xFE] + [0] * 14])
        other = codes([[1] + [0] * 15 + [0x7A, 0x7A] + [0] * 14])
        assert wgmma_k32(least, other, torch.zeros(1, 1)).item() == 0.0
        assert wgmma_k32(codes([[1] + [0] * 31]), codes([[1] + [0] * 31]), torch.zeros(1, 1)).item() == 2.0**-18

    def test_truncates_toward_zero_at_both_places(self) -> None:
        one = codes([[0x38] + [0] * 31])  # 1.0
        for sign in (1.0, -1.0):
            # Alignment: of 1 + 1.5 * 2**-13 the half of the last place is dropped, for either sign. Flooring, which
            # fills with the sign, would give -(1 + 2 * 2**-13).
            acc = torch.tensor([[sign * 1.5 * 2.0**-13]])
            want = sign * (1 + 2.0**-13)
            a = one if sign > 0 else codes([[0xB8] + [0] * 31])
            assert wgmma_k32(a, one, acc).item() == want
            # Normalisation: 2 + 2**-13 has 14 fraction bits.
            assert wgmma_k32(a, one, torch.tensor([[sign * (1 + 2.0**-13)]])).item() == sign * 2.0

    def test_products_are_not_renormalised(self) -> None:
        """1.875**2 = 3.52 has the exponent 0, so a term of 2**-13 survives beside it; with exponent 1 it would not."""
        a, b = codes([[0x3F, 0x3E] + [0] * 30]), codes([[0x3F, 0xBE] + [0] * 30])
        assert wgmma_k32(a, b, torch.tensor([[2.0**-13]])).item() == 1.875**2 - 1.75**2 + 2.0**-13
        # Subnormals: 2**-9 * 2**-9 has the exponent -12 and the significand 2**-6; a term of 2**-25 is its last place.
        least = codes([[0x01] + [0] * 31])
        assert wgmma_k32(least, least, torch.tensor([[2.0**-25]])).item() == 2.0**-18 + 2.0**-25
        assert wgmma_k32(least, least, torch.tensor([[2.0**-26]])).item() == 2.0**-18

    def test_nan(self, generator: torch.Generator) -> None:
        a, b = random_codes(generator, 5), random_codes(generator, 5)
        a.view(torch.uint8)[1, 31], b.view(torch.uint8)[3, 0] = 0x7F, 0xFF
        b.view(torch.uint8)[4] = 0
        acc = torch.zeros(5, 5)
        acc[0, 0] = math.nan
        acc.view(torch.int32)[4, 4] = -0x3FFFFF  # another NaN, with sign and payload
        out = wgmma_k32(a, b, acc)
        expected = torch.zeros(5, 5, dtype=torch.bool)
        expected[1], expected[:, 3], expected[0, 0], expected[4, 4] = True, True, True, True
        assert torch.equal(out.isnan(), expected)
        assert set(bits(out[expected])) == {FP32_NAN}
        assert_k32(a, b, acc)

    def test_infinite_accumulator(self, generator: torch.Generator) -> None:
        a, b = random_codes(generator, 2), random_codes(generator, 2)
        acc = torch.tensor([[math.inf, -math.inf], [math.inf, 0.0]])
        assert torch.equal(wgmma_k32(a, b, acc).isinf(), acc.isinf())
        assert torch.equal(wgmma_k32(a, b, acc)[0], acc[0])
        a.view(torch.uint8)[0, 0] = 0x7F
        assert wgmma_k32(a, b, acc)[0].isnan().all()

    def test_chain(self, generator: torch.Generator) -> None:
        """Four steps from zero, as a promotion interval has them."""
        a, b = [random_codes(generator, 5) for _ in range(4)], [random_codes(generator, 5) for _ in range(4)]
        acc = torch.zeros(5, 5)
        want = [0.0] * 25
        for x, y in zip(a, b, strict=True):
            acc = wgmma_k32(x, y, acc)
            rows, cols = x.view(torch.uint8).tolist(), y.view(torch.uint8).tolist()
            want = [scalar_k32(rows[i // 5], cols[i % 5], want[i]) for i in range(25)]
        assert bits(acc) == bits_of(want)
        assert not any(b & 0x3FF for b in bits(acc))

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(40))
    def test_sweep(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        low = int(torch.randint(0, 120, (1,), generator=generator))
        high = int(torch.randint(low + 1, 128, (1,), generator=generator))
        a, b = random_codes(generator, 24, low, high), random_codes(generator, 24)
        assert_k32(a, b, random_fp32(generator, (24, 24), 95, 150))


class TestFma:
    def check(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        got = bits(fma(x, y, z))
        exact = [
            Fraction(p) * Fraction(q) + Fraction(r) for p, q, r in zip(*(t.tolist() for t in (x, y, z)), strict=True)
        ]
        want = bits_of([round_fp32(value) for value in exact])
        # The sign of a zero is a rule of its own, tested apart.
        wrong = [i for i, (g, w) in enumerate(zip(got, want, strict=True)) if g != w and exact[i]]
        wrong += [i for i, value in enumerate(exact) if not value and got[i] & 0x7FFFFFFF]
        # A result that underflows keeps the sign of the exact value.
        wrong = [i for i in wrong if not (want[i] == 0 and got[i] == (0x80000000 if exact[i] < 0 else 0))]
        first = wrong[0] if wrong else 0
        where = f"{x[first].item()!r} * {y[first].item()!r} + {z[first].item()!r}"
        assert not wrong, (
            f"{len(wrong)} of {len(got)} differ, the first: {where}: {got[first]:#x}, not {want[first]:#x}"
        )

    @pytest.mark.parametrize(
        ("x", "y", "z"),
        [
            ((120, 134), (120, 134), (120, 134)),  # ordinary
            ((127, 128), (127, 128), (127, 129)),  # about the same size
            ((127, 128), (127, 128), (98, 106)),  # z around half a unit in the last place of the product
            ((127, 128), (127, 128), (148, 156)),  # the product around half a unit in the last place of z
            ((1, 40), (60, 100), (0, 4)),  # subnormal results
            ((0, 2), (110, 130), (0, 2)),  # subnormal operands
            ((1, 60), (1, 60), (0, 1)),  # underflow
            ((180, 254), (180, 254), (250, 255)),  # overflow and near it
            ((1, 255), (1, 255), (1, 255)),
        ],
    )
    def test_random(
        self, generator: torch.Generator, x: tuple[int, int], y: tuple[int, int], z: tuple[int, int]
    ) -> None:
        self.check(*(random_fp32(generator, (400,), *exponents) for exponents in (x, y, z)))

    def test_where_two_roundings_go_wrong(self, generator: torch.Generator) -> None:
        """z a half of the product's last FP32 place, short of or beyond a tie by less than FP64 resolves."""
        few = torch.randint(0, 64, (3, 4000), generator=generator).float()
        x, y = 1 + few[0] * 2.0**-12, 1 + few[1] * 2.0**-12  # the product has 24 fraction bits: ties abound
        tiny = torch.where(few[2] > 31, 1.0, -1.0) * 2.0 ** (-40 - few[2])
        self.check(x, y, tiny)
        self.check(x, -y, tiny)
        double_rounded = (x.double() * y.double() + tiny.double()).float()
        assert (double_rounded != fma(x, y, tiny)).any(), "no case here tells one rounding from two"

    def test_odd_last_bit_of_fp64(self) -> None:
        """Sums within one FP64 place of a tie, where the FP64 sum is odd already and must stay."""
        x = 1 + torch.arange(1 << 16) * 2.0**-23
        for offset in (-(2.0**-28), 2.0**-28):
            y = ((1 + offset) / x.double()).float()
            near = ((x.double() * y.double() - 1 - offset).abs() < 2.0**-29).nonzero().squeeze(1)
            assert len(near) > 200
            for z in (1.0, 1 + 2.0**-23, -1.0, -1 - 2.0**-23):
                self.check(x[near] * 2.0**-24, y[near], torch.full((len(near),), z))

    def test_subnormal_ties(self) -> None:
        """Sums half a unit of 2**-149 from a number, odd or even, exactly or by 2**-196 less (not held by FP64)."""
        z = torch.tensor([0.0, 1.0, 2.0, 2.0**22, 2.0**22 + 1, 2.0**23 - 2, 2.0**23 - 1]) * 2.0**-149
        y = torch.full_like(z, 2.0**-75)
        less = 1 - 2.0**-23, 1 + 2.0**-23  # their product is 1 - 2**-46
        for sign in (1.0, -1.0):
            self.check(sign * y, y, z)
            self.check(sign * y * less[0], y * less[1], z)
        assert fma(y * less[0], y * less[1], z)[4] == z[4], "a tie that FP64 would round to even"

    def test_signed_zeros(self) -> None:
        x = torch.tensor([1.0, -1.0, 0.0, -0.0, -0.0, 2.0**-100, 2.0**-100])
        y = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 2.0**-100, -(2.0**-100)])
        z = torch.tensor([-1.0, 1.0, -0.0, -0.0, 0.0, 0.0, 0.0])
        assert [v.signbit().item() for v in fma(x, y, z)] == [False, False, False, True, False, False, True]
        assert not fma(x, y, z).any()

    def test_infinities_and_nan(self) -> None:
        inf = math.inf
        x = torch.tensor([inf, 1.0, inf, inf, math.nan, 1.0, 3e38])
        y = torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0, 1.0, 2.0])
        z = torch.tensor([1.0, -inf, inf, 1.0, 1.0, math.nan, -3e38])
        out = fma(x, y, z)
        assert out[:2].tolist() == [inf, -inf]
        assert out[2:6].isnan().all()
        assert out[6].item() == round_fp32(Fraction(x[6].item()) * 2 + Fraction(z[6].item()))


class Operands:
    """Random codes and scales of an [M, K] x [N, K] product."""

    def __init__(self, generator: torch.Generator, m: int, n: int, k: int, b_block: Block, wild: bool = False) -> None:
        self.a = self._codes(generator, m, k)
        self.b = self._codes(generator, n, k)
        self.b_block = b_block
        exponents = (40, 150) if wild else (115, 122)
        self.a_scale = random_fp32(generator, (m, ceil_div(k, BLOCK)), *exponents).abs()
        self.b_scale = random_fp32(generator, (ceil_div(n, b_block[0]), ceil_div(k, BLOCK)), *exponents).abs()

    @staticmethod
    def _codes(generator: torch.Generator, rows: int, k: int) -> Tensor:
        return (torch.randn(rows, k, generator=generator) * 64).to(E4M3)

    def run(self, out_dtype: torch.dtype = torch.float32, c: Tensor | None = None, **options: int | None) -> Tensor:
        return gemm(self.a, self.a_scale, self.b, self.b_scale, self.b_block, out_dtype, c, **options)

    def scalar(self, every: int = BLOCK, c: Tensor | None = None) -> list[float]:
        a, b = (t.view(torch.uint8).tolist() for t in (self.a, self.b))
        spread = [self.b_scale[j // self.b_block[0]].tolist() for j in range(len(b))]
        return scalar_gemm(a, self.a_scale.tolist(), b, spread, every, None if c is None else c.float().tolist())


class TestGemm:
    @pytest.mark.parametrize("wild", [False, True], ids=["ordinary", "wild-scales"])
    @pytest.mark.parametrize("b_block", [(128, 128), (1, 128)], ids=["128x128", "1x128"])
    @pytest.mark.parametrize(("m", "n", "k"), [(3, 8, 128), (2, 8, 256), (3, 8, 16), (2, 8, 304), (1, 136, 144)])
    def test_scalar(self, generator: torch.Generator, m: int, n: int, k: int, b_block: Block, wild: bool) -> None:
        operands = Operands(generator, m, n, k, b_block, wild)
        assert bits(operands.run()) == bits_of(operands.scalar())

    @pytest.mark.parametrize("every", [32, 64, 128])
    def test_shorter_intervals(self, generator: torch.Generator, every: int) -> None:
        operands = Operands(generator, 3, 8, 304, (1, 128))
        assert bits(operands.run(promote_every=every)) == bits_of(operands.scalar(every))

    @pytest.mark.parametrize("every", [96, 256, 384, None])
    def test_intervals_that_span_blocks(self, generator: torch.Generator, every: int | None) -> None:
        operands = Operands(generator, 3, 8, 304, (1, 128))
        operands.a_scale = operands.a_scale[:, :1].repeat(1, 3)
        operands.b_scale = operands.b_scale[:, :1].repeat(1, 3)
        assert bits(operands.run(promote_every=every)) == bits_of(operands.scalar(every or 304))

    @pytest.mark.parametrize("every", [96, 256, None])
    @pytest.mark.parametrize("operand", ["a_scale", "b_scale"])
    def test_interval_over_different_scales(self, generator: torch.Generator, every: int | None, operand: str) -> None:
        operands = Operands(generator, 3, 8, 256, (1, 128))
        operands.a_scale = torch.ones(3, 2)
        operands.b_scale = torch.ones(8, 2)
        operands.run(promote_every=every)
        getattr(operands, operand)[2, 1] = 2.0
        with pytest.raises(ValueError, match=rf"promote_every.*single scale.*got {every}"):
            operands.run(promote_every=every)

    @pytest.mark.parametrize("every", [0, -32, 16, 48, 100])
    def test_bad_interval(self, generator: torch.Generator, every: int) -> None:
        with pytest.raises(ValueError, match=rf"promote_every.*multiple of 32.*got {every}"):
            Operands(generator, 1, 8, 128, (1, 128)).run(promote_every=every)

    @pytest.mark.parametrize("c_dtype", [torch.float32, torch.bfloat16])
    def test_c(self, generator: torch.Generator, c_dtype: torch.dtype) -> None:
        operands = Operands(generator, 3, 8, 144, (128, 128))
        c = torch.randn(3, 8, generator=generator).to(c_dtype)
        assert bits(operands.run(c=c)) == bits_of(operands.scalar(c=c))

    def test_bfloat16_rounds_the_float32_result_once(self, generator: torch.Generator) -> None:
        operands = Operands(generator, 24, 24, 256, (128, 128))
        wide = operands.run()
        # To nearest even by integers: add half of the last place, less one where that place is even already.
        pattern = torch.tensor(bits(wide))
        rounded = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
        got = operands.run(torch.bfloat16).view(torch.int16).flatten().long() & 0xFFFF
        assert torch.equal(got, rounded)
        c = torch.full((24, 24), 1e6)
        assert torch.equal(operands.run(torch.bfloat16, c), operands.run(c=c).bfloat16())

    def test_nan(self, generator: torch.Generator) -> None:
        operands = Operands(generator, 4, 8, 144, (128, 128))
        operands.a.view(torch.uint8)[2, 140] = 0xFF
        for dtype, view, pattern in ((torch.float32, torch.int32, FP32_NAN), (torch.bfloat16, torch.int16, BF16_NAN)):
            out = operands.run(dtype)
            assert out[[0, 1, 3]].isfinite().all()
            assert (out[2].view(view) == pattern).all()

    @pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 128), (3, 0, 128), (3, 8, 0)])
    def test_empty(self, generator: torch.Generator, m: int, n: int, k: int) -> None:
        operands = Operands(generator, m, n, k, (128, 128))
        for every in (32, 128, None):
            out = operands.run(promote_every=every)
            assert out.shape == (m, n)
            assert not out.any()
        c = torch.randn(m, n, generator=generator)
        assert torch.equal(operands.run(c=c), c)

    def test_row_invariance(self, generator: torch.Generator) -> None:
        """A row's bits do not depend on the rows beside it, nor on where it lies; the same for columns."""
        operands = Operands(generator, 150, 264, 304, (1, 128))
        full = operands.run()
        for row, col in ((0, 0), (63, 127), (64, 128), (149, 263)):
            part = Operands(generator, 1, 1, 304, (1, 128))
            part.a, part.a_scale = operands.a[row : row + 1], operands.a_scale[row : row + 1]
            part.b, part.b_scale = operands.b[col : col + 1], operands.b_scale[col : col + 1]
            assert bits(part.run()) == bits(full[row, col])
        order = torch.randperm(150, generator=generator)
        moved = Operands(generator, 1, 1, 304, (1, 128))
        moved.a, moved.a_scale = operands.a.view(torch.uint8)[order].view(E4M3), operands.a_scale[order]
        moved.b, moved.b_scale = operands.b, operands.b_scale
        assert torch.equal(moved.run(), full[order])

    def test_layout_does_not_matter(self, generator: torch.Generator) -> None:
        """Rows further apart than K and column-major scales, as the operands of a GEMM have them."""
        operands = Operands(generator, 70, 136, 272, (1, 128))
        want = operands.run()
        wide = torch.full((70, 320), math.nan).to(E4M3)
        wide[:, :272] = operands.a
        operands.a = wide[:, :272]
        operands.a_scale = operands.a_scale.t().contiguous().t()
        assert bits(operands.run()) == bits(want)


class Accuracy:
    """A 48x48 product of K codes under a single scale, against its exact value."""

    def __init__(self, values: Tensor, other: Tensor) -> None:
        self.a, self.b = values.to(E4M3), other.to(E4M3)
        self.exact = self.a.double() @ self.b.double().t()

    @functools.cache  # noqa: B019  (the two instances live as long as the module's tests)
    def error(self, every: int | None) -> Tensor:
        ones = torch.ones(48, ceil_div(self.a.shape[1], BLOCK))
        return gemm(self.a, ones, self.b, ones, (1, BLOCK), torch.float32, None, promote_every=every) - self.exact

    def rms(self, every: int | None) -> float:
        return math.sqrt(self.error(every).square().mean() / self.exact.square().mean())

    def most(self, every: int | None) -> float:
        return (self.error(every).abs().max() / self.exact.square().mean().sqrt()).item()

    def bias(self, every: int | None) -> float:
        return (self.error(every) / self.exact).mean().item()

    def calc_diff(self, every: int | None) -> float:
        """DeepGEMM's 1 - 2 sum(xy) / sum(x*x + y*y), as sum((x - y)**2) / sum(x*x + y*y), which keeps its digits."""
        error = self.error(every)
        return (error.square().sum() / ((error + self.exact).square() + self.exact.square()).sum()).item()


@pytest.fixture(scope="module")
def normal() -> Accuracy:
    generator = torch.Generator().manual_seed(1)
    # Amax at 448, as quantisation puts it.
    x, y = torch.randn(2, 48, 4096, generator=generator).unbind()
    return Accuracy(x * (448 / x.abs().max()), y * (448 / y.abs().max()))


@pytest.fixture(scope="module")
def positive() -> Accuracy:
    x, y = torch.rand(2, 48, 4096, generator=torch.Generator().manual_seed(2)).unbind()
    return Accuracy(x * 448, y * 448)


class TestPromotion:
    """The published experiment (reference/gemm.md, section 4), within a factor of about 1.5."""

    @pytest.mark.parametrize(
        ("every", "rms", "most"),
        [
            (32, 4.5e-5, 1.9e-4),
            (64, 7.7e-5, 2.8e-4),
            (128, 1.3e-4, 5.8e-4),
            (256, 2.2e-4, 1.0e-3),
            (512, 3.5e-4, 1.7e-3),
            (None, 1.4e-3, 1.1e-2),
        ],
    )
    def test_normal(self, normal: Accuracy, every: int | None, rms: float, most: float) -> None:
        assert rms / 1.5 < normal.rms(every) < rms * 1.5
        assert most / 2 < normal.most(every) < most * 2

    @pytest.mark.parametrize(
        ("every", "bias"), [(32, -4e-5), (64, -1.1e-4), (128, -5.6e-4), (256, -1.9e-3), (512, -5.8e-3), (None, -7.5e-2)]
    )
    def test_positive_bias(self, positive: Accuracy, every: int | None, bias: float) -> None:
        assert bias * 1.3 < positive.bias(every) < bias / 1.3

    def test_error_grows_with_the_interval(self, normal: Accuracy) -> None:
        errors = [normal.rms(every) for every in (32, 64, 128, 256, 512, 1024, 2048, 4096)]
        assert errors == sorted(errors)
        assert errors[-1] == normal.rms(None)

    def test_gates(self, normal: Accuracy, positive: Accuracy) -> None:
        """The gates of a GEMM hold at 128 and fail without promotion. That of calc_diff is for data of zero mean: the
        bias of 5.6e-4 that promotion at 128 leaves on positive data makes it 1.6e-7 by itself."""
        assert normal.calc_diff(128) < 5e-8 < normal.calc_diff(None)
        assert normal.most(128) < 2e-3 < normal.most(None)
        assert positive.most(128) < 2e-3 < positive.most(None)
        assert 5e-8 < positive.calc_diff(128) < 3e-7 < 1e-3 < positive.calc_diff(None)

    def test_gates_of_quantised_operands(self) -> None:
        """The same through quantisation with its 1x128 and 128x128 scales, against FP64 of the dequantised operands."""
        x, w = torch.randn(2, 128, 2048, generator=torch.Generator().manual_seed(3)).unbind()
        for a, b, calc_diff in ((x, w, 5e-8), (x.abs(), w.abs(), 5e-7)):
            left, right = fastfp8.quantize(a), fastfp8.quantize(b, (128, 128))
            exact = left.dequantize().double() @ right.dequantize().double().t()
            out = gemm(left.data, left.scale, right.data, right.scale, right.block, torch.float32, None).double()
            error = out - exact
            assert error.square().sum() / (out.square() + exact.square()).sum() < calc_diff
            assert error.abs().max() / exact.square().mean().sqrt() < 2e-3
            cpu = fastfp8.gemm(left, right, out_dtype=torch.float32)
            assert (cpu - exact).abs().max() < error.abs().max(), (
                "the accuracy oracle should be closer than the hardware"
            )
