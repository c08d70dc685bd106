"""The GEMM kernel broken on purpose: what is taken out of its PTX here must show on the emulator.

That is what lets the tests of the whole kernel say anything about its barriers and fences. Two things are not in the
list: fence.mbarrier_init alone, as the barriers behind it, of the CTA or with .release of the cluster, order the
initialisation as well; and .cta in place of .cluster where a split tells its peers of its sums, because the emulator
shows shared memory to a peer at once.
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

SEEDS = range(4)
ALONE, PAIR, SPLIT, WIDE, WGRAD = "128x64", "128x128 pair", "64x64 split", "128x256", "wgrad"
SCALER = "128x128"

# What is broken: (pattern, replacement, words of the report). None for words: any report will do, or wrong bits.
Broken = tuple[str, str, str | None]
BROKEN: dict[str, Broken] = {
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
    "use before the mbarriers are initialised": (r"bar\.sync\s+0;", "", "mbarrier.init"),
    "swizzle of the staging forgotten": (r"xor\.b32 (\s*%r\d+, %r\d+), %r\d+;", r"or.b32 \1, 0;", None),
    "store without a committed group": (r"cp\.async\.bulk\.commit_group;", "", "still being read"),
    "no wgmma.fence": (r"wgmma\.fence\.sync\.aligned;", "", "no wgmma.fence"),
    "a stage is freed before all lanes have read it": (r"bar\.warp\.sync\s+-1;", "", "race"),
}
_MEETING = r"barrier\.cluster\.arrive\.release;(.*?)barrier\.cluster\.wait\.acquire;"
BROKEN_PAIRS: dict[str, Broken] = {
    "CTAs begin without each other": (rf"(?s){_MEETING}(.*?{_MEETING})", r"\1\2", None),
    "a CTA ends while its peer needs it": (rf"(?s)({_MEETING}.*?){_MEETING}", r"\1\3", "exited"),
    "the start does not release": (
        r"(?s)fence\.mbarrier_init\.release\.cluster;((?:(?!fence\.mbarrier_init).)*?)barrier\.cluster\.arrive\.release;",
        r"\1barrier.cluster.arrive.relaxed;",
        "race",
    ),
    "a stage is freed here only": (r"mapa\.shared::cluster\.u32 (\S+), (\S+), \S+;", r"mov.u32 \1, \2;", None),
    "multicast without the peer": (r"mov\.u16 (\s*%rs\d+), 3;", r"mov.u16 \1, 1;", "hangs"),
    "the empty barriers count one CTA": (r"mov\.u32 (\s*%r\d+), 16;", r"mov.u32 \1, 8;", None),
}
BROKEN_SPLITS: dict[str, Broken] = {
    "sums are told of before all are there": (r"bar\.sync %r\d+, %r\d+;", "", "race"),
    "peers are not waited for": (
        r"mbarrier\.try_wait\.parity\.acquire\.cluster\S* p, \[%r\d+\], %r\d+;",
        "setp.eq.s32 p, 0, 0;",
        None,
    ),
    "sums are overwritten while a peer reads": (
        r"mbarrier\.arrive\.release\.cta\.shared::cluster\.b64 _, \[%r\d+\];",
        "",
        "hangs",
    ),
    "a CTA ends while a peer reads its sums": (rf"(?s)({_MEETING}.*?){_MEETING}", r"\1\3", "exited"),
}
BROKEN_WIDE: dict[str, Broken] = {
    "the consumers do not meet": (r"bar\.arrive %r\d+, %r\d+;", "", "hangs"),
    "the second pass does not wait for the staging": (
        r"(?s)(cp\.async\.bulk\.wait_group\.read 0;.*?)cp\.async\.bulk\.wait_group\.read 0;",
        r"\1",
        "still being read",
    ),
}
# What the scaler does lies between two of its waits, around its stores.
_PRODUCTS = r"(?=(?:(?!mbarrier\.)[\s\S])*?st\.shared\.v2\.f32)"
_WRITTEN = r"(st\.shared\.v2\.f32(?:(?!st\.shared\.v2|mbarrier\.)[\s\S])*?)"
BROKEN_SCALER: dict[str, Broken] = {
    "the scaler does not wait for the scales": (
        rf"mbarrier\.try_wait\.parity\S* p, \[%r\d+\], %r\d+;{_PRODUCTS}",
        "setp.eq.s32 p, 0, 0;",
        None,
    ),
    "products are told of before all lanes have written them": (
        rf"{_WRITTEN}bar\.warp\.sync\s+-1;",
        r"\1",
        "race",
    ),
    "products are not told of": (
        rf"{_WRITTEN}mbarrier\.arrive\.release\.cta\S* _, \[%r\d+\];",
        r"\1",
        "hangs",
    ),
}
# Of a tile that ends within a consumer's rows, whose warps store theirs themselves.
BROKEN_WGRAD: dict[str, Broken] = {
    name: BROKEN[name]
    for name in (
        "no proxy fence before the TMA store",
        "no wait before the staging is written again",
        "a stage is freed before all lanes have read it",
    )
}
CASES = [pytest.param(ALONE, *x, id=name) for name, x in BROKEN.items()]
CASES += [pytest.param(PAIR, *x, id=name) for name, x in BROKEN_PAIRS.items()]
CASES += [pytest.param(SPLIT, *x, id=name) for name, x in BROKEN_SPLITS.items()]
CASES += [pytest.param(WIDE, *x, id=name) for name, x in BROKEN_WIDE.items()]
CASES += [pytest.param(SCALER, *x, id=name) for name, x in BROKEN_SCALER.items()]
CASES += [pytest.param(WGRAD, *x, id=f"{name}, K in groups") for name, x in BROKEN_WGRAD.items()]


def kernel_of(config: str) -> tuple[str, str]:
    """Its module and its name. B is by row, which loads more, where there is such a kernel."""
    if config == WGRAD:
        return "gemm_wgrad_bf16", "gemm_sm90_wgrad_bf16_128x128"
    module = "gemm_block_bf16" if config in (SPLIT, WIDE, SCALER) else "gemm_row_bf16"
    return module, module.replace("gemm", "gemm_sm90") + "_" + config.replace(" ", "_")


def run(text: str | None, seed: int, config: str) -> torch.Tensor:
    """200x264 on two CTAs, or a cluster of four: several tiles a CTA, more k-blocks than stages but in a split."""
    from emulator import Machine, run_plan

    if config == WGRAD:
        return run_wgrad(text, seed)
    generator = torch.Generator().manual_seed(0)
    num_sms, k = (4, 1936) if config == SPLIT else (2, 1040)
    a = fastfp8.quantize(torch.randn(200, k, generator=generator))
    by_block = config in (SPLIT, WIDE, SCALER)
    b = fastfp8.quantize(torch.randn(264, k, generator=generator), (128, 128) if by_block else (1, 128))
    problem = Emulator(num_sms)._problem(a, b, torch.bfloat16, None)
    chosen = next(c for c, _ in _C.gemm_candidates(problem) if c.name == config)
    out = torch.full((200, 264), float("nan"), dtype=torch.bfloat16)
    tensors = {"a": a.data, "a_scale": a.scale, "b": b.data, "b_scale": b.scale, "out": out}
    run_plan(_C.gemm_plan(problem, chosen), tensors, Machine(seed), text)
    if (b.block, k) not in _expected:
        _expected[b.block, k] = tensor_core.gemm(a.data, a.scale, b.data, b.scale, b.block, torch.bfloat16, None)
    return out == _expected[b.block, k]


def run_wgrad(text: str | None, seed: int) -> torch.Tensor:
    """200x264 of two groups, more k-blocks than stages in all."""
    from emulator import Machine, run_plan
    from groups import in_groups_of_tokens, scaled, token_blocks
    from test_emulator_wgrad import problem_of, product

    offsets = torch.tensor([500, 1040], dtype=torch.int32)
    a, b = (in_groups_of_tokens(scaled((rows, 1040), (1, 128), rows), offsets) for rows in (200, 264))
    out = torch.full((2, 200, 264), float("nan"), dtype=torch.bfloat16)
    problem = problem_of(a, b, offsets, out.view(-1, 264), False, 2)
    chosen = next(c for c, _ in _C.gemm_candidates(problem) if c.name == "128x128")
    tensors = {"a": a.data, "a_scale": a.scale, "b": b.data, "b_scale": b.scale, "ends": offsets}
    tensors |= {"error": torch.zeros(1, dtype=torch.int32), "out": out}
    run_plan(_C.gemm_plan(problem, chosen), tensors, Machine(seed), text)
    if not _gradients:
        _gradients.extend(product(a, b, blocks, torch.bfloat16, None) for blocks in token_blocks(offsets))
    return out == torch.stack(_gradients)


_gradients: list[torch.Tensor] = []
_expected: dict[tuple[tuple[int, int], int], torch.Tensor] = {}


@pytest.mark.parametrize("config", [ALONE, PAIR, SPLIT, WIDE, SCALER, WGRAD])
def test_the_kernel_as_it_is(config: str) -> None:
    for seed in SEEDS:
        assert run(None, seed, config).all()


@pytest.mark.parametrize(("config", "pattern", "replacement", "words"), CASES)
def test_what_is_broken_shows(config: str, pattern: str, replacement: str, words: str | None) -> None:
    from emulator import EmulationError

    module, kernel = kernel_of(config)
    ptx = (KERNELS / f"{module}.ptx").read_text()
    begin = ptx.index(f".entry {kernel}(")
    end = ptx.find(".entry ", begin + 1)
    broken, count = re.subn(pattern, replacement, ptx[begin:end])
    assert count > 0, "the pattern is not in the kernel's PTX: nothing was broken"
    text = ptx[:begin] + broken + ptx[end:]
    found = []
    for seed in SEEDS:
        try:
            right = run(text, seed, config)
        except EmulationError as error:
            found.append(str(error))
            if words is None or words in str(error):
                return
        else:
            found.append("the right result" if right.all() else "wrong bits")
            if words is None and found[-1] == "wrong bits":
                return
    pytest.fail(f"no seed shows it: {found}")
