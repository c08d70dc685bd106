"""The GEMM kernel broken on purpose: what is taken out of its PTX here must show on the emulator.

That is what lets the tests of the whole kernel say anything about its barriers and fences. Two are not in the list,
because the emulator does not model what they order yet: fence.mbarrier_init, and the bar.warp.sync before a stage is
freed.
"""

from __future__ import annotations

import re

import pytest
import torch
from backends import Emulator, backend_params

import fastfp8
from fastfp8 import _C
from fastfp8.backends import KERNELS
from fastfp8.reference import tensor_core

pytestmark = backend_params(["emulator"])[0].marks

MODULE = "gemm_row_bf16"
SEEDS = range(4)

# What is broken: (pattern, replacement, words of the report). None for words: any report will do, or wrong bits.
BROKEN = {
    "no proxy fence before the TMA store": (r"fence\.proxy\.async\.shared::cta;", "", "without a fence.proxy.async"),
    "no barrier between writers and the TMA store": (r"bar\.sync %r\d+, %r\d+;", "", "race"),
    "no wait before the staging is written again": (r"cp\.async\.bulk\.wait_group\.read 0;", "", "still being read"),
    "results read before the wgmma is done": (r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;", None),
    "no wait for the wgmma": (r"wgmma\.wait_group\.sync\.aligned 0;", "", None),
    "a stage is never freed": (r"mbarrier\.arrive\.release\.cta\.shared::cta\.b64 _, \[%r\d+\];", "", "hangs"),
    "one consumer arrival too few expected": (r"mov\.u32 (\s*%r\d+), 8;", r"mov.u32 \1, 7;", None),
    "fewer bytes expected than come": (
        r"(mbarrier\.arrive\.expect_tx\S* _, \[%r\d+\]), %r\d+;",
        r"\1, 25000;",
        "hangs",
    ),
    "producer starts with the consumers' parity": (r"xor\.b32 (\s*%r\d+), (%r\d+), 1;", r"mov.b32 \1, \2;", "hangs"),
    "mbarriers not waited for": (
        r"mbarrier\.try_wait\.parity\S* p, \[%r\d+\], %r\d+;",
        "setp.eq.s32 p, 0, 0;",
        "still writes",
    ),
    "use before the mbarriers are initialised": (r"bar\.sync\s+0;", "", "no initialised mbarrier"),
    "swizzle of the staging forgotten": (r"xor\.b32 (\s*%r\d+, %r\d+), %r\d+;", r"or.b32 \1, 0;", None),
    "store without a committed group": (r"cp\.async\.bulk\.commit_group;", "", "still being read"),
    "no wgmma.fence": (r"wgmma\.fence\.sync\.aligned;", "", "no wgmma.fence"),
}


def run(text: str | None, seed: int) -> torch.Tensor:
    """200x264x1040 in tiles of 64 columns on two CTAs: more k-blocks than stages, several tiles a CTA."""
    from emulator import Machine, run_plan

    generator = torch.Generator().manual_seed(0)
    a = fastfp8.quantize(torch.randn(200, 1040, generator=generator))
    b = fastfp8.quantize(torch.randn(264, 1040, generator=generator), (1, 128))
    problem = Emulator(num_sms=2)._problem(a, b, torch.bfloat16, None)
    config = next(config for config, _ in _C.gemm_candidates(problem) if config.tile_n == 64)
    out = torch.full((200, 264), float("nan"), dtype=torch.bfloat16)
    tensors = {"a": a.data, "a_scale": a.scale, "b": b.data, "b_scale": b.scale, "out": out}
    run_plan(_C.gemm_plan(problem, config), tensors, Machine(seed), text)
    if "expected" not in _cache:
        _cache["expected"] = tensor_core.gemm(a.data, a.scale, b.data, b.scale, b.block, torch.bfloat16, None)
    return out


_cache: dict[str, torch.Tensor] = {}


def test_the_kernel_as_it_is() -> None:
    for seed in SEEDS:
        assert torch.equal(run(None, seed), _cache["expected"])


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_shows(name: str) -> None:
    from emulator import EmulationError

    pattern, replacement, words = BROKEN[name]
    text, count = re.subn(pattern, replacement, (KERNELS / f"{MODULE}.ptx").read_text())
    assert count > 0, "the pattern is not in the PTX: nothing was broken"
    found = []
    for seed in SEEDS:
        try:
            out = run(text, seed)
        except EmulationError as error:
            found.append(str(error))
            if words is None or words in str(error):
                return
        else:
            found.append("the right result" if torch.equal(out, _cache["expected"]) else "wrong bits")
            if words is None and found[-1] == "wrong bits":
                return
    pytest.fail(f"no seed shows it: {found}")
