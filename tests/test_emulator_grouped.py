"""The sm_90a GEMM with rows in groups, from its PTX on the emulator: bit for bit the product of each group alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from backends import assert_same_bits, backend_params
from test_emulator_gemm import A_BLOCK, B_BLOCKS, NAN, everything_of, scaled
from torch import Tensor

from fastfp8 import _C, ScaledTensor
from fastfp8.reference import tensor_core

pytestmark = backend_params(["emulator"])[0].marks

B_BLOCK = B_BLOCKS[0]
OUT_DTYPES = (torch.bfloat16, torch.float32)
TILES = ("16x128", "32x128", "64x128", "128x128", "128x256", "128x256 pair")
# Elements on either side of `out`, and rows of no group within it, must stay as they are.
GUARD, GUARD_VALUE = 64, -77.0
EDGES = (0, 1, 63, 64, 65, 127, 128, 129)


def view(t: Tensor) -> _C.TensorView:
    return _C.TensorView(str(t.dtype).removeprefix("torch."), list(t.shape), list(t.stride()), 0, t.data_ptr())


def launch(
    a: ScaledTensor,
    b: Sequence[ScaledTensor],
    ends: Tensor,
    out: Tensor,
    *,
    masked: bool = False,
    tile: str | None = None,
    num_sms: int = 5,
    seed: int = 0,
) -> int:
    """The error word after a launch into ``out`` [rows of a, N]."""
    from emulator import Machine, run_plan

    data, scale = (torch.cat([getattr(t, part) for t in b]) for part in ("data", "scale"))
    error = torch.zeros(1, dtype=torch.int32)
    dtype = str(out.dtype).removeprefix("torch.")
    operands = [view(t) for t in (a.data, a.scale, data, scale, ends)]
    problem = _C.GemmProblem.grouped(*operands, len(b), masked, dtype, num_sms)
    config = _C.gemm_select(problem)
    if tile is not None:
        config = next(found for found, _ in _C.gemm_candidates(problem) if found.name == tile)
    tensors = {"a": a.data, "a_scale": a.scale, "b": data, "b_scale": scale, "ends": ends, "error": error, "out": out}
    counters = run_plan(_C.gemm_plan(problem, config), tensors, Machine(seed))
    assert counters.shared_bank_conflicts == 0
    return int(error)


def case(
    rows: int, groups: int, n: int, k: int, seed: int, used: Sequence[slice]
) -> tuple[ScaledTensor, list[ScaledTensor]]:
    """Operands, with NaN in the codes and scales of all rows that are in no group."""
    generator = torch.Generator().manual_seed(seed)
    a = scaled(rows, k, A_BLOCK, generator)
    unused = torch.ones(rows, dtype=torch.bool)
    for group in used:
        unused[group] = False
    a.data.view(torch.uint8)[unused] = 0x7F
    a.scale[unused] = NAN
    return a, [scaled(n, k, B_BLOCK, generator) for _ in range(groups)]


def check(
    rows: int,
    used: Sequence[slice],
    ends: Sequence[int],
    n: int,
    k: int,
    out_dtype: torch.dtype,
    *,
    seed: int = 0,
    error: int = 0,
    **how: object,
) -> None:
    """Group g is the rows ``used[g]``. Nothing but their outputs is written."""
    a, b = case(rows, len(used), n, k, seed, used)
    memory = torch.full((2 * GUARD + rows * n,), GUARD_VALUE, dtype=out_dtype)
    out = memory[GUARD : GUARD + rows * n].view(rows, n)
    expected = memory.clone()
    given = torch.tensor(ends, dtype=torch.int32)
    read = (a.data, a.scale, given)
    before = everything_of(*read)
    assert launch(a, b, given, out, seed=seed, **how) == error  # type: ignore[arg-type]
    for group, weight in zip(used, b, strict=True):
        product = tensor_core.gemm(a.data[group], a.scale[group], weight.data, weight.scale, B_BLOCK, out_dtype, None)
        expected[GUARD : GUARD + rows * n].view(rows, n)[group] = product
    assert_same_bits(memory, expected, f"groups {ends}")
    for was, now in zip(before, everything_of(*read), strict=True):
        assert torch.equal(was, now), "an operand was written"


def slices(ends: Sequence[int]) -> list[slice]:
    return [slice(first, last) for first, last in zip([0, *ends[:-1]], ends, strict=True)]


def cumulated(sizes: Sequence[int]) -> list[int]:
    return torch.tensor(sizes).cumsum(0).tolist()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_group_sizes(out_dtype: torch.dtype, tile: str) -> None:
    """All the edges of a tile, empty groups among them, none aligned to anything; then rows that are in no group."""
    ends = cumulated(EDGES)
    check(ends[-1] + 70, slices(ends), ends, 136, 144, out_dtype, tile=tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_masked(out_dtype: torch.dtype, tile: str) -> None:
    """Groups 129 rows apart, which is no multiple of anything, of which the first few rows count."""
    counts, rows = [0, 1, 64, 127, 129], 129
    used = [slice(rows * g, rows * g + count) for g, count in enumerate(counts)]
    check(rows * len(counts), used, counts, 72, 272, out_dtype, tile=tile, masked=True)


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes_and_timing(seed: int) -> None:
    """With several segments of K; few CTAs, or more than tiles."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 90, (6,), generator=generator).tolist()
    ends, num_sms = cumulated(sizes), (1, 3, 20, 132)[seed]
    check(ends[-1] + 3, slices(ends), ends, 200, 1168, OUT_DTYPES[seed % 2], seed=seed, num_sms=num_sms)


def test_more_groups_than_a_warp_has_lanes() -> None:
    """Groups are looked at by 32: sizes 0 to 4, so that the tiles of chunks differ."""
    sizes = [(7 * g) % 5 for g in range(70)]
    ends = cumulated(sizes)
    check(ends[-1], slices(ends), ends, 8, 16, torch.float32, tile="64x128", num_sms=7)
    used = [slice(4 * g, 4 * g + size) for g, size in enumerate(sizes)]
    check(4 * 70, used, sizes, 8, 16, torch.bfloat16, tile="64x128", num_sms=7, masked=True)


def test_nothing_but_empty_groups() -> None:
    check(5, slices([0, 0, 0]), [0, 0, 0], 72, 144, torch.bfloat16)


BAD_ENDS = {
    "decreasing": ([40, 30, 90], [40, 40, 90]),
    "negative": ([-5, 30, 90], [0, 30, 90]),
    "beyond the last row": ([40, 2_000_000_000, 90], [40, 100, 100]),
    "all of it": ([-(2**31), 2**31 - 1, -1], [0, 100, 100]),
}


@pytest.mark.parametrize("name", BAD_ENDS)
def test_ends_that_no_group_can_have(name: str) -> None:
    """They are clamped, so nothing is out of bounds, and reported."""
    given, clamped = BAD_ENDS[name]
    check(100, slices(clamped), given, 72, 144, torch.bfloat16, error=1)


def test_counts_that_no_group_can_have() -> None:
    used = [slice(0, 0), slice(30, 60), slice(60, 67)]
    check(90, used, [-3, 31, 7], 72, 144, torch.float32, masked=True, error=2)


def test_a_bad_end_in_a_later_chunk_is_reported() -> None:
    ends = [2 * g for g in range(1, 41)]
    clamped = list(ends)
    ends[32], clamped[32] = 10, clamped[31]  # the first of a chunk: the end before it is in another
    check(80, slices(clamped), ends, 8, 16, torch.float32, error=1)


def test_tiles_are_chosen_by_the_rows_of_a_group() -> None:
    def select(rows: int, groups: int) -> _C.GemmConfig:
        views = [
            _C.TensorView("float8_e4m3fn", [rows, 7168], [7168, 1], 0, 16),
            _C.TensorView("float32", [rows, 56], [1, rows], 0, 16),
            _C.TensorView("float8_e4m3fn", [groups * 4096, 7168], [7168, 1], 0, 16),
            _C.TensorView("float32", [groups * 32, 56], [56, 1], 0, 16),
            _C.TensorView("int32", [groups], [1], 0, 16),
        ]
        return _C.gemm_select(_C.GemmProblem.grouped(*views, groups, False, "bfloat16", 132))

    assert select(32 * 32, 32).name == "64x128"
    assert select(32 * 100, 32).name == "128x256"
    assert select(8 * 4096, 8).name == "128x256 pair"
    assert select(8 * 4096, 8).grid == 132


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_ten_seeds(out_dtype: torch.dtype, tile: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [*torch.randint(0, 140, (5,), generator=generator).tolist(), EDGES[seed % len(EDGES)]]
    ends = cumulated(sizes)
    check(ends[-1] + seed, slices(ends), ends, 264, 656, out_dtype, seed=seed, tile=tile, num_sms=2 + seed)
