"""GEMMs that start before the one before them has ended: programmatic dependent launch, on the emulator."""

from __future__ import annotations

import re

import pytest
import torch
from backends import Emulator, assert_same_bits, backend_params

import fastfp8
from fastfp8 import _C, ScaledTensor
from fastfp8.backends import KERNELS
from fastfp8.reference import tensor_core

pytestmark = backend_params(["emulator"])[0].marks

SEEDS = range(5)
ROW = (1, 128)
SIZE = 136


def chain(seed: int, config: str, ptx: str | None = None) -> bool:
    """Whether a second product is right that reads what the first one writes, both launched to overlap.

    The first has one row. It serves the second, which has one k-block, as the scales of A and as C, a row for all.
    """
    from emulator import Machine
    from emulator.plan import prepare_plan

    generator = torch.Generator().manual_seed(seed)
    x, w = (fastfp8.quantize(torch.rand(rows, 256, generator=generator), ROW) for rows in (1, SIZE))
    left, b = (fastfp8.quantize(torch.randn(SIZE, 128, generator=generator), ROW) for _ in range(2))
    row, out = torch.full((1, SIZE), float("nan")), torch.full((SIZE, SIZE), float("nan"))
    a, c = ScaledTensor(left.data, row.t(), ROW), row.expand(SIZE, SIZE)
    machine, emulator = Machine(seed), Emulator(num_sms=3)

    def prepared(a: ScaledTensor, b: ScaledTensor, c: torch.Tensor | None, out: torch.Tensor, config: str) -> object:
        problem = emulator._problem(a, b, torch.float32, c)
        chosen = next(found for found, _ in _C.gemm_candidates(problem) if found.name == config)
        tensors = {"a": a.data, "a_scale": a.scale, "b": b.data, "b_scale": b.scale, "out": out, "c": c}
        return prepare_plan(_C.gemm_plan(problem, chosen), tensors, machine, ptx)

    machine.launch_all([prepared(x, w, None, row, "64x64"), prepared(a, b, c, out, config)])
    expected = tensor_core.gemm(x.data, x.scale, w.data, w.scale, ROW, torch.float32, None)
    assert_same_bits(row, expected, "the first product")
    second = tensor_core.gemm(a.data, expected.t(), b.data, b.scale, ROW, torch.float32, expected.expand(SIZE, SIZE))
    return torch.equal(out, second)


@pytest.mark.parametrize("config", ["64x64", "128x128", "128x128 pair"])
def test_overlapping_products_are_right(config: str) -> None:
    assert all(chain(seed, config) for seed in SEEDS)


def test_without_the_wait_it_shows() -> None:
    """The consumers wait as well, since each thread's wait is for itself; what they read late hides that here."""
    from emulator import EmulationError

    text, count = re.subn(r"griddepcontrol\.wait;", "", (KERNELS / "gemm_row_f32.ptx").read_text())
    assert count == 2 * 5, "producer and consumers of five kernels"
    shown = []
    for seed in SEEDS:
        try:
            shown.append("right" if chain(seed, "64x64", text) else "wrong bits")
        except EmulationError as error:
            shown.append(str(error))
    assert any(re.search(r"wrong bits|reads global memory .* which thread .* stored", what) for what in shown)


# Lets the next grid start, counts for a while, then writes where the groups end.
ENDS = """
.version 8.5
.target sm_90a
.address_size 64
.visible .entry ends(.param .u64 out) {
  .reg .pred %p;
  .reg .b32 %r<3>;
  .reg .b64 %rd;
  ld.param.u64 %rd, [out];
  griddepcontrol.launch_dependents;
  mov.u32 %r0, 0;
LOOP:
  add.u32 %r0, %r0, 1;
  setp.lt.u32 %p, %r0, 3000;
  @%p bra LOOP;
  mov.u32 %r1, 70;
  mov.u32 %r2, 100;
  st.global.v2.u32 [%rd], {%r1, %r2};
  ret;
}
"""


@pytest.mark.parametrize("waits", [True, False], ids=["as it is", "without waits"])
def test_ends_of_groups_may_come_from_the_grid_before(waits: bool) -> None:
    from emulator import EmulationError, Machine
    from emulator.plan import prepare_plan
    from test_emulator_grouped import case, slices, view

    ptx = (KERNELS / "gemm_grouped_f32.ptx").read_text()
    if not waits:
        ptx = ptx.replace("griddepcontrol.wait;", "")
    right = []
    for seed in SEEDS:
        a, b = case(100, 2, 72, 144, seed, slices([70, 100]))
        ends, error = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        out = torch.full((100, 72), float("nan"))
        data, scale = (torch.cat([getattr(t, part) for t in b]) for part in ("data", "scale"))
        views = [view(t) for t in (a.data, a.scale, data, scale, ends)]
        problem = _C.GemmProblem.grouped(*views, 2, False, "float32", 3)
        tensors = {"a": a.data, "a_scale": a.scale, "b": data, "b_scale": scale, "ends": ends, "error": error}
        machine = Machine(seed)
        plan = _C.gemm_plan(problem, _C.gemm_select(problem))
        before = machine.load(ENDS)["ends"].prepare(1, 1, args=[ends])
        try:
            machine.launch_all([before, prepare_plan(plan, tensors | {"out": out}, machine, ptx)])
        except EmulationError:
            right.append(False)
            continue
        products = [
            tensor_core.gemm(a.data[g], a.scale[g], w.data, w.scale, w.block, torch.float32, None)
            for g, w in zip(slices([70, 100]), b, strict=True)
        ]
        right.append(torch.equal(out, torch.cat(products)))
    assert all(right) == waits, right


@pytest.mark.parametrize("waits", [True, False], ids=["as it is", "without waits"])
def test_a_sum_of_gradients_may_overlap(waits: bool) -> None:
    """Wgrad of groups that the grid before it says, then the same added to what that one writes."""
    from emulator import EmulationError, Machine
    from emulator.plan import prepare_plan
    from groups import blocks_of, in_groups_of_tokens, scaled, token_blocks
    from test_emulator_wgrad import problem_of

    ptx = (KERNELS / "gemm_wgrad_f32.ptx").read_text()
    if not waits:
        ptx = ptx.replace("griddepcontrol.wait;", "")
    found, ends = torch.tensor([70, 200], dtype=torch.int32), ENDS.replace(" 100;", " 200;")
    assert ends != ENDS
    right = []
    for seed in SEEDS:
        a, b = (in_groups_of_tokens(scaled((rows, 208), ROW, seed + rows), found) for rows in (72, 40))
        offsets, error = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        out = torch.full((2, 72, 40), float("nan"))
        tensors = {"a": a.data, "a_scale": a.scale, "b": b.data, "b_scale": b.scale, "ends": offsets, "error": error}
        machine = Machine(seed)
        launches = [machine.load(ends)["ends"].prepare(1, 1, args=[offsets])]
        for accumulate in (False, True):
            problem = problem_of(a, b, offsets, out.view(-1, 40), accumulate, 3)
            plan = _C.gemm_plan(problem, _C.gemm_select(problem))
            launches.append(prepare_plan(plan, tensors | {"out": out.view(-1, 40)}, machine, ptx))
        try:
            machine.launch_all(launches)
        except EmulationError:
            right.append(False)
            continue
        expected = []
        for blocks in token_blocks(found):
            left, b_part = blocks_of(a, blocks), blocks_of(b, blocks)
            parts = (left.data, left.scale, b_part.data, b_part.scale, ROW, torch.float32)
            expected.append(tensor_core.gemm(*parts, tensor_core.gemm(*parts, None)))
        right.append(torch.equal(out, torch.stack(expected)))
    assert all(right) == waits, right


def test_every_gemm_may_overlap() -> None:
    """The launch attribute comes from the plan."""
    plans = []
    for n, k in ((576, 7168), (4096, 4096)):
        a, b = fastfp8.quantize(torch.zeros(3, k)), fastfp8.quantize(torch.zeros(n, k), (128, 128))
        problem = Emulator(num_sms=132)._problem(a, b, torch.bfloat16, None)
        plans += [_C.gemm_plan(problem, config) for config, _ in _C.gemm_candidates(problem)]
    assert len(plans) == 20
    assert all(plan.overlaps for plan in plans)
