"""The sm_90a product of gate and up with SwiGLU and quantisation behind it, from its PTX on the emulator: bit for bit.

Expected is what the reference makes of the tensor core's product, summed in one segment of K.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from backends import assert_same_bits, backend_params
from swiglu_backends import SwiGlu
from test_emulator_gemm import A_BLOCK, B_BLOCKS, NAN, everything_of, scaled
from test_emulator_grouped import BAD_ENDS, EDGES, cumulated, slices, view
from torch import Tensor

from fastfp8 import _C, ScaledTensor
from fastfp8.counters import FIELDS, LANES, new_counters
from fastfp8.layout import pad4
from fastfp8.numerics import totals
from fastfp8.reference import tensor_core
from fastfp8.reference.activation import silu
from fastfp8.reference.swiglu_quantize import swiglu_quantize

pytestmark = backend_params(["emulator"])[0].marks

B_BLOCK = B_BLOCKS[0]
ALONE, PAIR = "128x256", "128x256 pair"
# Bytes on either side of each output, and what they and all that nothing may write are.
GUARD, POISON = 64, 0xA5
OPTIONS = (
    SwiGlu(),
    SwiGlu(limit=3.3, pow2=True),
    SwiGlu(eps=20.0),
    SwiGlu(limit=0.7, eps=1e-4),
)


class Output(NamedTuple):
    """A tensor in the middle of poisoned memory."""

    memory: Tensor
    tensor: Tensor

    @classmethod
    def make(cls, rows: int, cols: int, dtype: torch.dtype) -> Output:
        memory = torch.full((2 * GUARD + rows * cols * dtype.itemsize,), POISON, dtype=torch.uint8)
        return cls(memory, memory[GUARD : memory.numel() - GUARD].view(dtype).view(rows, cols))


class Outputs(NamedTuple):
    """The outputs of a launch. The scale is stored column by column: [F / 128, T rounded up to 4]."""

    out: Output
    out_scale: Output
    gate_up: Output

    @classmethod
    def make(cls, rows: int, f: int) -> Outputs:
        scale = Output.make(f // 128, pad4(rows), torch.float32)
        return cls(Output.make(rows, f, torch.float8_e4m3fn), scale, Output.make(rows, 2 * f, torch.bfloat16))

    def same_memory(self, other: Outputs) -> bool:
        return all(torch.equal(mine.memory, its.memory) for mine, its in zip(self, other, strict=True))


class Case(NamedTuple):
    a: ScaledTensor
    b: list[ScaledTensor]
    weight: Tensor  # [T], every second element of its memory


def case(rows: int, used: Sequence[slice], f: int, k: int, seed: int) -> Case:
    """Products of the size at which SwiGLU does something; NaN in the codes, scales and weights of unused rows."""
    generator = torch.Generator().manual_seed(seed)
    a = scaled(rows, k, A_BLOCK, generator, k + 48 * (seed % 2))
    a.scale.mul_(2.0**-14)
    unused = torch.ones(rows, dtype=torch.bool)
    for group in used:
        unused[group] = False
    a.data.view(torch.uint8)[unused] = 0x7F
    a.scale[unused] = NAN
    weight = torch.full((2 * rows,), NAN)[::2]
    weight[~unused] = torch.randn(int((~unused).sum()), generator=generator)
    return Case(a, [scaled(2 * f, k, B_BLOCK, generator) for _ in used], weight)


def plan(
    given: Case,
    ends: Tensor | None,
    options: SwiGlu,
    gate_up: bool,
    config: str | None,
    num_sms: int,
    counters: Tensor | None = None,
) -> tuple[_C.LaunchPlan, dict[str, Tensor | None]]:
    """As csrc/bindings/gemm_swiglu_quantize_op.cpp; the tensors are those that the plan reads."""
    a, data, scale = given.a, *(torch.cat([getattr(t, part) for t in given.b]) for part in ("data", "scale"))
    views = [view(t) for t in (a.data, a.scale, data, scale)]
    if ends is None:
        product = _C.GemmProblem(*views, B_BLOCK, "bfloat16", None, num_sms)
    else:
        product = _C.GemmProblem.grouped(*views, view(ends), len(given.b), False, "bfloat16", num_sms)
    weight, limit, pow2, eps = options
    of_weight, of_counters = (None if t is None else view(t) for t in (weight, counters))
    problem = product.with_swiglu(of_weight, limit, pow2, eps, gate_up, of_counters)
    chosen = _C.gemm_select(problem)
    if config is not None:
        chosen = next(found for found, _ in _C.gemm_candidates(problem) if found.name == config)
    tensors = {"a": a.data, "a_scale": a.scale, "b": data, "b_scale": scale, "weight": weight, "ends": ends}
    return _C.gemm_plan(problem, chosen), tensors


def launched(launch: _C.LaunchPlan, tensors: dict[str, Tensor | None], got: Outputs, seed: int, ptx: str | None) -> int:
    """The error word after a launch into ``got``."""
    from emulator import Machine, run_plan

    word = torch.zeros(1, dtype=torch.int32)
    written = {name: output.tensor for name, output in got._asdict().items()}
    counters = run_plan(launch, {**tensors, **written, "error": word}, Machine(seed), ptx)
    assert counters.shared_bank_conflicts == 0
    return int(word)


def expected_of(given: Case, used: Sequence[slice], f: int, options: SwiGlu, counters: Tensor | None = None) -> Outputs:
    """What the memory of the outputs holds afterwards. Counts are added to ``counters``."""
    rows = given.a.shape[0]
    expected = Outputs.make(rows, f)
    for group, b in zip(used, given.b, strict=True):
        operands = (given.a.data[group], given.a.scale[group], b.data, b.scale)
        product = tensor_core.gemm(*operands, B_BLOCK, torch.bfloat16, None, one_segment=True)
        weight = None if options.weight is None else options.weight[group]
        data, scale = swiglu_quantize(product, weight, *options[1:], None, counters)
        expected.gate_up.tensor[group] = product
        expected.out.tensor[group] = data
        expected.out_scale.tensor[:, group] = scale.t()
    return expected


def check(
    used: Sequence[slice],
    f: int,
    k: int,
    options: SwiGlu = OPTIONS[0],
    *,
    rows: int,
    ends: Sequence[int] | None = None,
    seed: int = 0,
    error: int = 0,
    weighted: bool = False,
    gate_up: bool = False,
    counted: bool = False,
    config: str | None = None,
    num_sms: int = 5,
) -> None:
    """Group g is the rows ``used[g]``; dense where there are no ``ends``. Nothing but its outputs is written."""
    counters, counts = Output.make(LANES, len(FIELDS), torch.int64), new_counters("cpu")
    counters.tensor.zero_()
    given = case(rows, used, f, k, seed)
    options = options._replace(weight=given.weight if weighted else None)
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    launch, read = plan(given, offsets, options, gate_up, config, num_sms, counters.tensor if counted else None)
    got = Outputs.make(rows, f)
    before = everything_of(*read.values())
    assert launched(launch, {**read, "counters": counters.tensor}, got, seed, None) == error
    expected = expected_of(given, used, f, options, counts if counted else None)
    assert totals(counters.tensor) == totals(counts)
    assert (counters.memory[:GUARD] == POISON).all()
    assert (counters.memory[-GUARD:] == POISON).all()
    if not gate_up:
        expected.gate_up.memory.fill_(POISON)
    for name in Outputs._fields:
        mine, wanted = getattr(got, name), getattr(expected, name)
        assert_same_bits(mine.tensor, wanted.tensor, name)
        assert torch.equal(mine.memory, wanted.memory), f"more than the rows of groups of {name} is written"
    for was, now in zip(before, everything_of(*read.values()), strict=True):
        assert torch.equal(was, now), "an operand was written"


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129, 260])
@pytest.mark.parametrize("config", [ALONE, PAIR])
def test_dense(config: str, rows: int) -> None:
    """Tails of M and K; options, weights and the second output take turns."""
    turn = rows % 4
    how: Any = {"weighted": rows % 2 == 1, "gate_up": rows % 3 != 0, "config": config, "seed": turn}
    how["counted"] = (config == PAIR) == (turn > 0)
    check([slice(0, rows)], 256 if rows < 100 else 128, 144 + 128 * turn, OPTIONS[turn], rows=rows, **how)


@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("config", [ALONE, PAIR])
def test_group_sizes(config: str, gate_up: bool) -> None:
    """All the edges of a tile, empty groups among them, none aligned to anything; then rows that are in no group."""
    ends = cumulated(EDGES)
    check(
        slices(ends),
        128,
        144,
        OPTIONS[1],
        rows=ends[-1] + 70,
        ends=ends,
        gate_up=gate_up,
        counted=gate_up,
        config=config,
    )


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes_and_timing(seed: int) -> None:
    """More k-blocks than stages, several tiles side by side; few CTAs, or more than tiles."""
    generator = torch.Generator().manual_seed(seed)
    ends = cumulated(torch.randint(0, 200, (4,), generator=generator).tolist())
    how: Any = {"weighted": True, "gate_up": seed % 2 == 0, "config": (ALONE, PAIR)[seed // 2], "seed": seed}
    num_sms = (1, 132, 2, 7)[seed]
    how["counted"] = seed < 3
    check(slices(ends), 384, 656, OPTIONS[seed], rows=ends[-1] + 3, ends=ends, num_sms=num_sms, **how)


def test_one_segment_of_k() -> None:
    """Where gemm cuts K into segments this op does not."""
    n, k = 256, 2048
    assert len(_C.gemm_segments(n, k, B_BLOCK)) > 2
    check([slice(0, 5)], n // 2, k, rows=5, gate_up=True)


@pytest.mark.parametrize("name", BAD_ENDS)
def test_ends_that_no_group_can_have(name: str) -> None:
    """They are clamped, so nothing is out of bounds, and reported by a bit of their own."""
    given, clamped = BAD_ENDS[name]
    check(slices(clamped), 128, 144, rows=100, ends=given, error=8, gate_up=True, counted=True)


def test_values_that_are_not_finite() -> None:
    """NaN and infinities stay in their own places: they come from scales here, as no code but NaN makes one."""
    given = case(9, [slice(0, 9)], 128, 128, 3)
    given.a.scale[1] = torch.inf
    given.a.scale[2] = -torch.inf
    given.a.data.view(torch.uint8)[3, 5] = 0x7F
    given.a.data[4] = 0.0
    given.a.scale[5] = 2.0**-126
    given.b[0].data.view(torch.uint8)[7, 3] = 0x7F  # of gate
    given.b[0].data.view(torch.uint8)[128 + 90, 3] = 0x7F  # of up
    weight = given.weight.clone()
    weight[6], weight[7], weight[8] = torch.inf, NAN, 0.0
    for limit in (None, 5.0):
        options = SwiGlu(weight, limit)
        counters, counts = new_counters("cpu"), new_counters("cpu")
        launch, read = plan(given, None, options, True, None, 1, counters)
        got = Outputs.make(9, 128)
        launched(launch, {**read, "counters": counters}, got, 0, None)
        expected = expected_of(given, [slice(0, 9)], 128, options, counts)
        assert totals(counters) == totals(counts)
        assert min(totals(counters).saturated, totals(counters).nonfinite) > 0
        for name in Outputs._fields:
            assert_same_bits(getattr(got, name).tensor, getattr(expected, name).tensor, f"{name}, limit {limit}")
        codes = got.out.tensor.view(torch.uint8)
        assert [int((codes[row] == 0x7F).sum()) for row in (0, 3, 7)] == [2, 128, 128]


@pytest.mark.parametrize("config", [ALONE, PAIR])
def test_counts_of_small_values(config: str) -> None:
    """Each CTA adds to a row of its own, and to what is there."""
    given, used, options = case(150, [slice(0, 150)], 256, 144, 1), [slice(0, 150)], SwiGlu(eps=300.0)
    counters, counts = torch.full((LANES, len(FIELDS)), 1000), new_counters("cpu")
    launch, read = plan(given, None, options, False, config, 2, counters)
    launched(launch, {**read, "counters": counters}, Outputs.make(150, 256), 0, None)
    expected_of(given, used, 256, options, counts)
    counters -= 1000
    assert totals(counters) == totals(counts)
    assert min(totals(counts)._replace(saturated=1, nonfinite=1)) > 0
    assert (counters.sum(1) > 0).tolist() == [row < 2 for row in range(LANES)]


def test_silu_over_the_range_of_bfloat16() -> None:
    """A row's gate and up are one value, so that its scale shows what silu is to all bits."""
    # The scales of A are the values; a single code of 1 in K and B makes them the product.
    values = torch.arange(0, 1 << 16, 1 << 5, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = values[values.isfinite()]
    rows = values.numel()
    data, ones = torch.zeros(rows, 128, dtype=torch.float8_e4m3fn), torch.zeros(256, 128, dtype=torch.float8_e4m3fn)
    data[:, 0] = ones[:, 0] = 1.0
    a, b = ScaledTensor(data, values[:, None], A_BLOCK), ScaledTensor(ones, torch.ones(2, 1), B_BLOCK)
    launch, read = plan(Case(a, [b], torch.ones(rows)), None, SwiGlu(), False, ALONE, 4)
    got = Outputs.make(rows, 128)
    launched(launch, read, got, 0, None)
    h = silu(values) * values
    amax = torch.where(h.isfinite(), h.abs(), 0.0)
    scale = torch.where(amax == 0, 1.0, amax.clamp(min=2.0**-110) / torch.tensor(448.0))
    assert_same_bits(got.out_scale.tensor[0, :rows], scale, "scale")
    expected, _ = swiglu_quantize(torch.stack([values, values], 1).bfloat16(), None, None, False, 0.0)
    assert_same_bits(got.out.tensor, expected.expand(rows, 128), "code")


def problem(m: int, n: int, k: int, groups: int = 0, num_sms: int = 132, **options: Any) -> _C.GemmProblem:
    matrices = max(groups, 1)
    views = [
        _C.TensorView("float8_e4m3fn", [m, k], [k, 1], 0, 16),
        _C.TensorView("float32", [m, -(-k // 128)], [1, pad4(m)], 0, 16),
        _C.TensorView("float8_e4m3fn", [n * matrices, k], [k, 1], 0, 16),
        _C.TensorView("float32", [-(-n // 128) * matrices, -(-k // 128)], [-(-k // 128), 1], 0, 16),
    ]
    if groups:
        ends = _C.TensorView("int32", [groups], [1], 0, 16)
        product = _C.GemmProblem.grouped(*views, ends, groups, False, "bfloat16", num_sms)
    else:
        product = _C.GemmProblem(*views, B_BLOCK, "bfloat16", None, num_sms)
    given: dict[str, Any] = {"weight": None, "limit": None, "pow2": False, "eps": 0.0, "gate_up": False}
    return product.with_swiglu(**(given | options))


def test_configs() -> None:
    """One tile, alone or in pairs; small M, a single SM and several segments of gemm leave one to take."""
    for m, groups, num_sms in itertools.product((1, 64, 130, 4096), (0, 8), (1, 132)):
        asked = problem(m, 1536, 2048, groups, num_sms)
        found = {config.name: reason for config, reason in _C.gemm_candidates(asked)}
        assert set(found) == {ALONE, PAIR}
        assert found[ALONE] == ""
        chosen = _C.gemm_select(asked)
        assert chosen.segments == 1
        assert chosen.stages == 4
        assert chosen.tiles[1] == 6
    assert _C.gemm_select(problem(8192, 4096, 7168)).grid == 132
    assert "swiglu and gate_up" in repr(problem(64, 512, 128, gate_up=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 384}, r"'b': expected 2 F rows, F a multiple of 128, got 384 rows"),
        ({"limit": 0.0}, r"'limit': expected a positive number from 2\*\*-100 to 2\*\*100, got 0"),
        ({"limit": NAN}, r"'limit': expected a positive number .*, got nan"),
        ({"eps": -1.0}, r"'eps': expected a number from 0 up to 2\*\*100, got -1"),
        ({"weight": _C.TensorView("bfloat16", [5], [1], 0, 16)}, r"'weight': expected dtype float32, got bfloat16"),
        ({"weight": _C.TensorView("float32", [6], [1], 0, 16)}, r"'weight': expected one number for each of 5 rows"),
        ({"weight": _C.TensorView("float32", [5], [1], 1, 16)}, r"'weight': expected a tensor on the device of 'a'"),
        ({"weight": _C.TensorView("float32", [5], [1 << 31], 0, 16)}, r"'weight': expected elements less than 2\^31"),
        ({"counters": _C.TensorView("int32", [32, 5], [5, 1], 0, 16)}, r"'counters': expected dtype int64, got int32"),
        ({"counters": _C.TensorView("int64", [32, 4], [4, 1], 0, 16)}, r"'counters': expected shape \(32, 5\), got 2"),
        ({"counters": _C.TensorView("int64", [32], [1], 0, 16)}, r"'counters': expected shape \(32, 5\), got 1 dim"),
        ({"counters": _C.TensorView("int64", [32, 5], [1, 32], 0, 16)}, r"'counters': expected a contiguous tensor"),
        ({"counters": _C.TensorView("int64", [32, 5], [5, 1], 1, 16)}, r"'counters': expected a tensor on the device"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_problem_that_cannot_be_served(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=r"fastfp8\.gemm_swiglu_quantize: argument " + words):
        problem(**{"m": 5, "n": 512, "k": 128, **change})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("config", [ALONE, PAIR])
def test_ten_seeds(config: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [*torch.randint(0, 200, (3,), generator=generator).tolist(), EDGES[seed % len(EDGES)]]
    ends, num_sms = cumulated(sizes), 2 + seed
    how: Any = {"weighted": seed % 3 > 0, "gate_up": seed % 2 == 0, "config": config, "seed": seed, "num_sms": num_sms}
    how["counted"] = seed % 5 != 3
    check(slices(ends), 256, 656, OPTIONS[seed % 4], rows=ends[-1] + seed, ends=ends, **how)
    check([slice(0, 150)], 256, 656, OPTIONS[seed % 4], rows=150, **how)
