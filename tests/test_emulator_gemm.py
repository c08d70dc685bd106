"""The sm_90a GEMM kernel from its PTX, on the emulator: bit for bit what the model of the tensor core computes."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from backends import Emulator, assert_same_bits, backend, backend_params
from torch import Tensor

from fastfp8 import _C, ScaledTensor
from fastfp8.layout import BLOCK, Block, empty_scale, scale_shape
from fastfp8.reference import tensor_core

pytestmark = backend_params(["emulator"])[0].marks

E4M3 = torch.float8_e4m3fn
A_BLOCK: Block = (1, BLOCK)
B_BLOCKS: list[Block] = [(BLOCK, BLOCK), (1, BLOCK)]
OUT_DTYPES = (torch.bfloat16, torch.float32)
SPLIT = "64x64 split"
# The wide ones serve one segment of K only.
WIDE = ("128x256", "128x256 pair")
SWAPPED = ("16x128", "32x128")
BLOCK_ONLY = (SPLIT, *WIDE, *SWAPPED)
CONFIGS = ("64x64", "64x128", "128x64", "128x128", "128x128 pair", *BLOCK_ONLY)
# The last has four segments of K.
SHAPES = [(1, 8, 16), (63, 40, 144), (64, 64, 128), (129, 136, 400), (130, 264, 272), (65, 72, 1936)]
# Elements on either side of `out` that must stay as they are, and what they are.
GUARD, GUARD_VALUE = 64, -77.0
NAN = float("nan")


def scaled(rows: int, k: int, block: Block, generator: torch.Generator, pitch: int = 0) -> ScaledTensor:
    """Every finite code alike, with scales of 24 bits, so that any change of order or rounding shows.

    What lies between rows of ``pitch`` elements, beyond the last, and in the padding of the scale is NaN.
    """
    magnitude = torch.randint(0, 0x7F, (rows, k), generator=generator)
    sign = torch.randint(0, 2, (rows, k), generator=generator) << 7
    wide = torch.full((rows + 3, max(k, pitch)), 0x7F, dtype=torch.uint8)
    wide[:rows, :k] = magnitude | sign
    shape = scale_shape(rows, k, block)
    scale = empty_scale(wide, shape, block)
    scale.as_strided((scale.untyped_storage().nbytes() // 4,), (1,)).fill_(NAN)
    exponent = torch.randint(-4, 5, shape, generator=generator)
    scale.copy_((1 + torch.rand(shape, generator=generator)) * 2.0**exponent)
    return ScaledTensor(wide.view(E4M3)[:rows, :k], scale, block)


@functools.cache
def operands(m: int, n: int, k: int, b_block: Block, seed: int = 0, strided: bool = False) -> tuple[ScaledTensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    pitch = k + 48 if strided else 0
    return scaled(m, k, A_BLOCK, generator, pitch), scaled(n, k, b_block, generator, pitch)


def addend(kind: str, m: int, n: int) -> Tensor | None:
    """c of the kind: none, one row for all (stride 0), or rows with NaN between them."""
    if kind == "none":
        return None
    x = 1000 * torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    if kind == "one row":
        return x[:1].expand(m, n)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[kind]
    wide = torch.full((m, n + 24), NAN, dtype=dtype)
    wide[:, :n] = x
    return wide[:, :n]


C_KINDS = ("none", "bfloat16", "float32", "one row")


def everything_of(*tensors: Tensor | None) -> list[Tensor]:
    """A copy of all the bytes that lie under each tensor, padding included."""
    given = [t for t in tensors if t is not None]
    return [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone() for t in given]


_products: dict[tuple[bytes, ...], Tensor] = {}


def model(a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype, c: Tensor | None) -> Tensor:
    """The expected bits. The model takes seconds for some products, so each is computed once and ``c`` added here."""
    parts = (a.data, a.scale, b.data, b.scale)
    key = tuple(t.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes() for t in parts)
    if key not in _products:
        _products[key] = tensor_core.gemm(*parts, b.block, torch.float32, None)
    product = _products[key]
    return (product if c is None else product + c.float()).to(out_dtype)


def check(a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype, c: Tensor | None, on: Emulator) -> Tensor:
    """The result, after comparing its bits with the model's and that nothing but ``out`` was written."""
    m, n = a.shape[0], b.shape[0]
    memory = torch.full((2 * GUARD + m * n,), GUARD_VALUE, dtype=out_dtype)
    out = memory[GUARD : GUARD + m * n].view(m, n).fill_(NAN)
    read = (a.data, a.scale, b.data, b.scale, c)
    before = everything_of(*read)
    counters = on.gemm_into(out, a, b, c)
    assert counters.shared_bank_conflicts == 0
    assert_same_bits(out, model(a, b, out_dtype, c), f"{(m, n, a.shape[1])}")
    assert (memory[:GUARD] == GUARD_VALUE).all()
    assert (memory[GUARD + m * n :] == GUARD_VALUE).all()
    for was, now in zip(before, everything_of(*read), strict=True):
        assert torch.equal(was, now), "an operand was written"
    return out


def kernels() -> list[tuple[Block, torch.dtype, str]]:
    """Every kernel that there is."""
    every = itertools.product(B_BLOCKS, OUT_DTYPES, CONFIGS)
    return [kernel for kernel in every if kernel[2] not in BLOCK_ONLY or kernel[0] == B_BLOCKS[0]]


def shape_for(shape: tuple[int, int, int], config: str) -> tuple[int, int, int]:
    """The same with a K of one segment where the config serves no other."""
    m, n, k = shape
    return (m, n, min(k, 1168) if config in WIDE else k)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("b_block", "out_dtype", "config"), [k for k in kernels() if k[2] != SPLIT], ids=str)
def test_bits(b_block: Block, out_dtype: torch.dtype, config: str, shape: tuple[int, int, int]) -> None:
    """Every kernel but the split ones on tails of each kind. The kinds of c and of a's pitch take turns."""
    case = SHAPES.index(shape) + CONFIGS.index(config) + B_BLOCKS.index(b_block) + 2 * OUT_DTYPES.index(out_dtype)
    shape = shape_for(shape, config)
    a, b = operands(*shape, b_block, strided=case % 2 == 1)
    check(a, b, out_dtype, addend(C_KINDS[case % 4], *shape[:2]), Emulator(3, case, config))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_sms", [2, 4, 7])
@pytest.mark.parametrize("config", ["128x128 pair", "128x256 pair"])
def test_clusters(config: str, num_sms: int, seed: int) -> None:
    """Five rows of tiles for pairs of CTAs, so that the last pair has one tile past M; more k-blocks than stages."""
    b_block = B_BLOCKS[seed % 2 if config not in WIDE else 0]
    a, b = operands(520, 136, 1040, b_block, seed=seed)
    check(a, b, torch.bfloat16, None, Emulator(num_sms, seed, config))


# M, N, K with 4 and 8 segments: the last with tails in each extent, and segments of four and of five k-blocks.
@pytest.mark.parametrize(
    ("shape", "segments"), [((65, 72, 1936), 4), ((7, 200, 2048), 4), ((70, 24, 4400), 8)], ids=str
)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_split(seed: int, out_dtype: torch.dtype, shape: tuple[int, int, int], segments: int) -> None:
    """One cluster walks all tiles, then there are more clusters than tiles; with each kind of c."""
    a, b = operands(*shape, B_BLOCKS[0], seed=seed, strided=True)
    kind = C_KINDS[(seed + 2 * OUT_DTYPES.index(out_dtype)) % 4]
    num_sms = segments + 1 if seed == 0 else 132
    check(a, b, out_dtype, addend(kind, *shape[:2]), Emulator(num_sms, seed, SPLIT))


def test_segments_depend_on_n_and_k_alone() -> None:
    """The split's cluster has as many CTAs as K has segments; DeepSeek-V3's shapes; by row there is one."""
    for n, k, count in (
        (576, 7168, 8),
        (2112, 7168, 4),
        (2120, 7168, 1),  # two would be too few to pay
        (4096, 7168, 1),
        (7168, 2048, 1),
        (24576, 1536, 1),
        (8, 16, 1),
    ):
        firsts = _C.gemm_segments(n, k, B_BLOCKS[0])
        assert len(firsts) == count + 1
        assert (firsts[0], firsts[-1]) == (0, -(-k // 128))
        assert all(last > first for first, last in itertools.pairwise(firsts))
        assert _C.gemm_segments(n, k, B_BLOCKS[1]) == [0, -(-k // 128)]


@pytest.mark.parametrize("c_kind", C_KINDS)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_every_kind_of_c(out_dtype: torch.dtype, c_kind: str) -> None:
    a, b = operands(70, 40, 144, B_BLOCKS[0], strided=True)
    check(a, b, out_dtype, addend(c_kind, 70, 40), Emulator())


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("b_block", B_BLOCKS, ids=str)
def test_seeds(b_block: Block, seed: int) -> None:
    a, b = operands(129, 136, 272, b_block, seed=seed)
    check(a, b, torch.bfloat16, addend("float32", 129, 136), Emulator(seed=seed))


@pytest.mark.parametrize("num_sms", [1, 2, 132])
def test_the_ring_runs_on_from_tile_to_tile(num_sms: int) -> None:
    """One CTA walks all six tiles, three each, or one a CTA: with 3 k-blocks the ring of stages wraps within a tile."""
    a, b = operands(150, 96, 272, B_BLOCKS[1])
    check(a, b, torch.bfloat16, None, Emulator(num_sms=num_sms, config="64x64"))


@pytest.mark.parametrize("b_block", B_BLOCKS, ids=str)
def test_a_long_sum(b_block: Block) -> None:
    """35 k-blocks: more than the 32 whose scales of B a warp holds at a time, and more than the stages of the ring."""
    a, b = operands(5, 24, 4400, b_block)
    check(a, b, torch.float32, None, Emulator(config="64x64"))


def test_nan() -> None:
    """A NaN code and a NaN scale give the canonical NaN, in its row or column alone."""
    a, b = (ScaledTensor(t.data.clone(), t.scale.clone(), t.block) for t in operands(70, 40, 144, B_BLOCKS[1]))
    a.data.view(torch.uint8)[7, 140] = 0x7F
    a.data.view(torch.uint8)[69, 0] = 0xFF
    b.scale[33, 1] = NAN
    for out_dtype, canonical, bits in ((torch.float32, 0x7FFFFFFF, torch.int32), (torch.bfloat16, 0x7FFF, torch.int16)):
        out = check(a, b, out_dtype, None, Emulator())
        nan = torch.zeros(70, 40, dtype=torch.bool)
        nan[[7, 69]] = True
        nan[:, 33] = True
        assert torch.equal(out.isnan(), nan)
        assert set(out.view(bits)[nan].tolist()) == {canonical}


@pytest.mark.parametrize("b_block", B_BLOCKS, ids=str)
def test_a_row_does_not_depend_on_the_batch(b_block: Block) -> None:
    """Nor on the tile or on who takes which segment of K: with B in blocks there are four."""
    a, b = operands(129, 72, 1936, b_block)
    c = addend("float32", 129, 72)
    assert c is not None
    whole = Emulator(config="128x64").gemm(a, b, out_dtype=torch.float32, c=c)
    split = SPLIT if b_block == B_BLOCKS[0] else "128x128 pair"
    for first, last, config in ((0, 1, "64x64"), (128, 129, split), (5, 69, split), (60, 129, "64x128")):
        part = ScaledTensor(a.data[first:last], a.scale[first:last], A_BLOCK)
        alone = Emulator(4, first, config).gemm(part, b, out_dtype=torch.float32, c=c[first:last])
        assert_same_bits(alone, whole[first:last], f"rows {first} to {last}")


SOME_BATCHES = (1, 2, 64, 65, 128, 129, 257, 300)
BATCHES = [pytest.param(m, marks=[] if m in SOME_BATCHES else pytest.mark.slow) for m in range(1, 301)]


def rows_of(m: int, first: int, n: int, k: int, on: Emulator) -> None:
    """The product of ``m`` rows from ``first`` on has the bits that they have in the product of all 300."""
    a, b = operands(300, n, k, B_BLOCKS[0])
    batch = ScaledTensor(a.data[first : first + m], a.scale[first : first + m], A_BLOCK)
    out = on.gemm(batch, b, out_dtype=torch.float32)
    assert_same_bits(out, model(a, b, torch.float32, None)[first : first + m], f"{m} rows from {first} of {(n, k)}")


@pytest.mark.parametrize("m", BATCHES)
def test_a_batch_of_any_size_has_the_same_rows(m: int) -> None:
    """All kernels in turn; with four segments of K those that serve them, taken by one CTA or by a cluster."""
    first = 7 * m % (301 - m)
    one = [config for config in CONFIGS if config != SPLIT]
    rows_of(m, first, 136, 144, Emulator(6, m, one[m % len(one)]))
    several = [config for config in CONFIGS if config not in WIDE]
    rows_of(m, first, 24, 1936, Emulator(8, m, several[m % len(several)]))


@pytest.mark.slow
def test_each_row_alone() -> None:
    for row in range(300):
        rows_of(1, row, 136, 144, Emulator(132))
        rows_of(1, row, 24, 1936, Emulator(132))


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("b_block", B_BLOCKS, ids=str)
def test_counters(b_block: Block, out_dtype: torch.dtype) -> None:
    """Three tiles by two with 3 k-blocks: a tile of tensor-core work each, however little of it the result needs."""
    m, n, k, tile_n = 257, 72, 272, 64
    a, b = operands(m, n, k, b_block)
    out = torch.empty(m, n, dtype=out_dtype)
    counters = Emulator(config="128x64").gemm_into(out, a, b)
    assert counters.wgmma_flops == 2 * (3 * 128) * (2 * tile_n) * (3 * 128)
    # Loads count whole boxes, as their barriers do; stores what lies within the tensor.
    loaded = 3 * 2 * 3 * (128 * 128 + tile_n * 128 + 128 * 4 + (tile_n * 4 if b_block == A_BLOCK else 0))
    assert counters.tma_bytes == loaded + (m * n * 2 if out_dtype == torch.bfloat16 else 0)
    if out_dtype == torch.float32:
        assert counters.global_sectors >= m * n * 4 // 32
    assert counters.instructions > 0


@pytest.mark.parametrize("shape", [(0, 8, 128), (3, 0, 128), (0, 0, 0), (3, 8, 0)], ids=str)
def test_empty_extents(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    generator = torch.Generator().manual_seed(0)
    a, b = scaled(m, k, A_BLOCK, generator, pitch=16), scaled(n, k, B_BLOCKS[0], generator, pitch=16)
    for c in (None, torch.arange(m * n).view(m, n).float()):
        for out_dtype in OUT_DTYPES:
            out = backend("emulator").gemm(a, b, out_dtype=out_dtype, c=c)
            assert_same_bits(out, torch.zeros(m, n, dtype=out_dtype) if c is None else c.to(out_dtype), f"{shape}")


def test_a_misaligned_operand_is_copied() -> None:
    """With its strides, and with the NaN between its rows."""
    a, b = operands(20, 40, 144, B_BLOCKS[0])
    expected = Emulator().gemm(a, b, out_dtype=torch.float32)
    memory = torch.full((8 + 20 * 160,), 0x7F, dtype=torch.uint8).view(E4M3)
    data = memory[8:].view(20, 160)[:, :144]
    data.view(torch.uint8).copy_(a.data.view(torch.uint8))
    assert data.data_ptr() % 16 == 8
    out = Emulator().gemm(ScaledTensor(data, a.scale, A_BLOCK), b, out_dtype=torch.float32)
    assert_same_bits(out, expected, "out")


def problem_of(a: ScaledTensor, b: ScaledTensor) -> _C.GemmProblem:
    return Emulator()._problem(a, b, torch.float32, None)


def test_a_plan_beyond_its_tensors_is_an_error() -> None:
    """A map or a pointer says what the plan says; the memory ends where the tensor does."""
    from emulator import EmulationError, run_plan

    a, b = operands(64, 64, 128, B_BLOCKS[0])
    problem = problem_of(a, b)
    plan = _C.gemm_plan(problem, _C.gemm_select(problem))
    tensors = {"a": a.data, "a_scale": a.scale, "b": b.data, "b_scale": b.scale, "out": torch.empty(64, 64)}
    run_plan(plan, tensors)
    for slot, value in (("out", torch.empty(63, 64)), ("a", a.data[:63]), ("a_scale", a.scale[:60])):
        with pytest.raises(EmulationError, match=f"'{slot}'"):
            run_plan(plan, {**tensors, slot: value})
    with pytest.raises(EmulationError, match="no tensor is bound to slot 'b_scale'"):
        run_plan(plan, {**tensors, "b_scale": None})
    with pytest.raises(EmulationError, match="tensor map of 'a': expected dtype float8_e4m3fn, got uint8"):
        run_plan(plan, {**tensors, "a": a.data.view(torch.uint8)})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("b_block", "out_dtype", "config"), kernels(), ids=str)
def test_ten_seeds(b_block: Block, out_dtype: torch.dtype, config: str, seed: int) -> None:
    shape = shape_for((200, 136, 1936), config)
    a, b = operands(*shape, b_block, seed=seed)
    # A split takes a cluster of four.
    check(a, b, out_dtype, addend(C_KINDS[seed % 4], *shape[:2]), Emulator(4 + seed % 4, seed, config))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(300, 264, 1040), (1, 576, 7168), (520, 520, 256), (1430, 72, 144)], ids=str)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("b_block", B_BLOCKS, ids=str)
def test_larger_shapes(b_block: Block, out_dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    a, b = operands(*shape, b_block, strided=True)
    check(a, b, out_dtype, addend("bfloat16", *shape[:2]), Emulator(num_sms=5))
