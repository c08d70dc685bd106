"""The sm_90a GEMM with K in groups, from its PTX on the emulator: bit for bit the product of each group alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from backends import assert_same_bits, backend_params
from groups import blocks_of, in_groups_of_tokens, scaled, token_blocks, token_ends
from test_emulator_gemm import A_BLOCK, everything_of
from test_emulator_grouped import EDGES, GUARD, GUARD_VALUE, view
from torch import Tensor

from fastfp8 import _C, ScaledTensor
from fastfp8.error_word import TOKEN_OFFSETS
from fastfp8.reference import tensor_core

pytestmark = backend_params(["emulator"])[0].marks

OUT_DTYPES = (torch.float32, torch.bfloat16)
ALONE, PAIR = "128x128", "128x128 pair"


def problem_of(
    left: ScaledTensor, right: ScaledTensor, offsets: Tensor, out: Tensor, accumulate: bool, num_sms: int
) -> _C.GemmProblem:
    views = [view(t) for t in (left.data, left.scale, right.data, right.scale, offsets, out)]
    return _C.GemmProblem.wgrad(*views, accumulate, num_sms)


def launch(
    left: ScaledTensor,
    right: ScaledTensor,
    offsets: Tensor,
    out: Tensor,
    *,
    accumulate: bool = False,
    config: str | None = None,
    num_sms: int = 5,
    seed: int = 0,
) -> int:
    """The error word after a launch into ``out`` [G * N, K]."""
    from emulator import Machine, run_plan

    error = torch.zeros(1, dtype=torch.int32)
    problem = problem_of(left, right, offsets, out, accumulate, num_sms)
    chosen = _C.gemm_select(problem)
    if config is not None:
        chosen = next(found for found, _ in _C.gemm_candidates(problem) if found.name == config)
    tensors = {"a": left.data, "a_scale": left.scale, "b": right.data, "b_scale": right.scale}
    tensors |= {"ends": offsets, "error": error, "out": out}
    counters = run_plan(_C.gemm_plan(problem, chosen), tensors, Machine(seed))
    assert counters.shared_bank_conflicts == 0
    return int(error)


def product(
    left: ScaledTensor, right: ScaledTensor, blocks: slice, out_dtype: torch.dtype, c: Tensor | None
) -> Tensor | None:
    """The bits of a group that is not empty."""
    if blocks.start == blocks.stop:
        return None
    a, b = blocks_of(left, blocks), blocks_of(right, blocks)
    return tensor_core.gemm(a.data, a.scale, b.data, b.scale, b.block, out_dtype, c)


def check(
    offsets: Tensor,
    n: int,
    k: int,
    out_dtype: torch.dtype,
    *,
    tail: int = 0,
    seed: int = 0,
    given: Sequence[int] | None = None,
    accumulate: bool = False,
    **how: object,
) -> None:
    """``tail`` tokens follow the last group's. ``given`` are the offsets passed, where those are brought into range."""
    groups, tokens = len(offsets), -(-int(offsets[-1]) // 16) * 16 + tail
    pitch = tokens + 48 if seed % 2 else 0
    left, right = (in_groups_of_tokens(scaled((r, tokens), A_BLOCK, seed + r, pitch), offsets) for r in (n, k))
    memory = torch.full((2 * GUARD + groups * n * k,), GUARD_VALUE, dtype=out_dtype)
    out = memory[GUARD : GUARD + groups * n * k].view(groups, n, k)
    generator = torch.Generator().manual_seed(seed)
    # What is not accumulated to is never read: it is NaN. What is has a -0 that a sum with 0 would lose.
    out[:] = 1000 * torch.randn(out.shape, generator=generator) if accumulate else float("nan")
    out[:, 0, 0] = -0.0 if accumulate else float("nan")
    expected = memory.clone()
    into = expected[GUARD : GUARD + groups * n * k].view(groups, n, k)
    for group, blocks in enumerate(token_blocks(offsets)):
        if (made := product(left, right, blocks, out_dtype, into[group] if accumulate else None)) is not None:
            into[group] = made
        elif not accumulate:
            into[group] = 0
    passed = offsets if given is None else torch.tensor(given, dtype=torch.int32)
    read = (left.data, left.scale, right.data, right.scale, passed)
    before = everything_of(*read)
    error = launch(left, right, passed, out.view(-1, k), accumulate=accumulate, seed=seed, **how)  # type: ignore[arg-type]
    assert error == (0 if given is None else TOKEN_OFFSETS)
    assert_same_bits(memory, expected, f"groups {passed.tolist()}")
    assert torch.equal(memory == 0, expected == 0)
    assert torch.equal(memory.signbit(), expected.signbit()), "a zero has another sign"
    for was, now in zip(before, everything_of(*read), strict=True):
        assert torch.equal(was, now), "an operand was written"


@pytest.mark.parametrize("accumulate", [False, True], ids=["store", "accumulate"])
@pytest.mark.parametrize("config", [ALONE, PAIR])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_group_sizes(out_dtype: torch.dtype, config: str, accumulate: bool) -> None:
    """Edges of a k-block and of more; then two blocks of no group. N and K have tails in the second tile of each."""
    seed = OUT_DTYPES.index(out_dtype) + 2 * accumulate
    k = 72 if accumulate else 144
    check(token_ends((*EDGES, 300)), 136, k, out_dtype, tail=272, seed=seed, config=config, accumulate=accumulate)


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes_and_timing(seed: int) -> None:
    """More groups and more k-blocks than stages; few CTAs, or more than tiles; the last block is not full."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 700, (4,), generator=generator).tolist()
    n, k = [(130, 264), (1, 8), (300, 24), (65, 200)][seed]
    how = {"num_sms": (2, 3, 20, 132)[seed], "accumulate": seed in (1, 2), "config": (ALONE, PAIR)[seed % 2]}
    check(token_ends(sizes), n, k, OUT_DTYPES[seed // 2], seed=seed, **how)


def test_dense() -> None:
    """One group of all tokens; one SM, for which no pair is chosen."""
    check(torch.tensor([400], dtype=torch.int32), 200, 136, torch.float32, num_sms=1)


def test_more_groups_than_a_warp_has_lanes() -> None:
    """Groups are looked at by 32."""
    sizes = [(37 * g) % 131 if g % 3 else 0 for g in range(70)]
    check(token_ends(sizes), 5, 8, torch.float32, num_sms=7)


def test_nothing_but_empty_groups() -> None:
    for accumulate in (False, True):
        check(torch.zeros(3, dtype=torch.int32), 72, 40, torch.bfloat16, tail=16, accumulate=accumulate)


BAD_ENDS = {
    "decreasing": ([400, 300, 900], [400, 400, 900]),
    "negative": ([-5, 300, 900], [0, 300, 900]),
    "beyond the last token": ([400, 2_000_000_000, 900], [400, 912, 912]),
    "all of it": ([-(2**31), 2**31 - 1, -1], [0, 912, 912]),
}


@pytest.mark.parametrize("accumulate", [False, True], ids=["store", "accumulate"])
@pytest.mark.parametrize("name", BAD_ENDS)
def test_ends_that_no_group_can_have(name: str, accumulate: bool) -> None:
    """They are clamped, so nothing is out of bounds, and reported."""
    given, clamped = BAD_ENDS[name]
    offsets = torch.tensor(clamped, dtype=torch.int32)
    check(offsets, 40, 72, OUT_DTYPES[accumulate], tail=912 - -(-clamped[-1] // 16) * 16, given=given)


def test_a_bad_end_in_a_later_chunk_is_reported() -> None:
    clamped = [128 * g for g in range(1, 41)]
    given = list(clamped)
    given[32], clamped[32] = 10, clamped[31]  # the first of a chunk: the end before it is in another
    check(torch.tensor(clamped, dtype=torch.int32), 8, 8, torch.float32, given=given)


def test_a_null_error_word_is_none() -> None:
    """Bad offsets are then brought into range all the same."""
    from emulator import Machine, run_plan

    left, right = scaled((8, 16), A_BLOCK, 0), scaled((8, 16), A_BLOCK, 1)
    out, offsets = torch.zeros(8, 8), torch.tensor([99], dtype=torch.int32)
    problem = problem_of(left, right, offsets, out, False, 1)
    plan = _C.gemm_plan(problem, _C.gemm_select(problem))
    error = torch.zeros(0, dtype=torch.int32)
    tensors = {"a": left.data, "a_scale": left.scale, "b": right.data, "b_scale": right.scale}
    run_plan(plan, tensors | {"ends": offsets, "error": error, "out": out}, Machine())
    assert_same_bits(out, product(left, right, slice(0, 1), torch.float32, None), "all 16 tokens")


def wgrad_of(n: int, k: int, tokens: int, groups: int, num_sms: int = 132, accumulate: bool = False) -> _C.GemmProblem:
    def at(dtype: str, *shape: int) -> _C.TensorView:
        return _C.TensorView(dtype, list(shape), [shape[-1], 1][-len(shape) :], 0, 16)

    def scale(rows: int) -> _C.TensorView:
        return _C.TensorView("float32", [rows, tokens // 128], [1, rows], 0, 16)

    operands = [at("float8_e4m3fn", n, tokens), scale(n), at("float8_e4m3fn", k, tokens), scale(k)]
    out = at("float32", groups * n, k)
    return _C.GemmProblem.wgrad(*operands, at("int32", groups), out, accumulate, num_sms)


def test_configs() -> None:
    """Tiles of all groups share the SMs; what accumulates moves more bytes; a low output has no pair."""
    one, four = (_C.gemm_select(wgrad_of(4096, 7168, 8192 * groups, groups)) for groups in (1, 4))
    assert (one.grid, four.grid) == (132, 132)
    assert one.tiles == four.tiles
    assert four.cost["waves"] == pytest.approx(4 * one.cost["waves"], abs=4)
    adding = _C.gemm_select(wgrad_of(4096, 7168, 8192, 1, accumulate=True))
    assert adding.cost["hbm"] > one.cost["hbm"]
    assert _C.gemm_select(wgrad_of(64, 128, 1024, 2)).name == ALONE
    assert _C.gemm_select(wgrad_of(64, 128, 1024, 2)).grid == 2
    reasons = {config.name: reason for config, reason in _C.gemm_candidates(wgrad_of(64, 128, 1024, 2))}
    assert reasons == {ALONE: "", PAIR: "half of each pair lies past M"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("accumulate", [False, True], ids=["store", "accumulate"])
@pytest.mark.parametrize("config", [ALONE, PAIR])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_ten_seeds(out_dtype: torch.dtype, config: str, accumulate: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [*torch.randint(0, 400, (3,), generator=generator).tolist(), EDGES[seed % len(EDGES)]]
    how = {"config": config, "accumulate": accumulate, "num_sms": 2 + seed, "tail": 16 * seed}
    check(token_ends(sizes), 264, 136, out_dtype, seed=seed, **how)
