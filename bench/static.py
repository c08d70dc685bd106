"""What the compiler made of the kernels, and what the planner's model says of real shapes. Nothing here is a time.

Rows of kind "static" are read off cubins, of the sm_90a kernels as built and of the Triton kernels as compiled here for
sm_90; rows of kind "modelled" are what csrc/gemm/select.cpp predicts.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastfp8 import _C
from fastfp8.backends import KERNELS, built_kernels
from fastfp8.layout import BLOCK, BLOCKS, Block, ceil_div, empty_scale, scale_shape

from . import sass
from .borrowed import borrow
from .case import Computed, Session, Unavailable, Work
from .rows import Row
from .shapes import DEEPSEEK_V3, Linear

SMS = 132  # of an H100 or H200 SXM
BATCHES = (1, 64, 128, 1024, 4096)
ROW, SQUARE = (1, BLOCK), (BLOCK, BLOCK)

# What each thread may have: 384 threads of 168 registers are all that an SM has, and nothing may spill.
BARS = {"registers": 168.0, "bytes of stack": 0.0, "bytes of spills": 0.0, "LDL and STL": 0.0}
# The same of dispatch and combine, for 512 threads.
COMM_BARS = BARS | {"registers": 128.0}
MODEL_NOTE = f"{SMS} SMs; the model's constants are what others measured on an H100"
# Other instructions than QGMMA and FFMA in the consumers' main loop, % of its FFMA: the most that a kernel may have, by
# the end of its name, and why where that is over 30. They are what there is with the nvcc of build_kernels.WHEELS. A
# k-block has 8 sums of descriptors, 2 to order wgmma, 3 for the barriers and a NOP, whatever the tile.
GOAL_OF_OTHERS = 30.0
_ROW = "a scale a column: one FMUL an FFMA, and a load of each pair of columns' scales"
_FEW = "what a k-block always has, and its scales, over so few FFMA"
_SWAPPED = "operands swapped: few FFMA, and half as many FMUL, for a row of A is a column of wgmma"
_ANYWHERE = f"{_SWAPPED}; rows of groups begin anywhere, so that no load takes the scales of two"
MOST_OTHERS: dict[str, tuple[float, str]] = {
    r"(row|wgrad)_\w+_128x128(_pair)?": (155.5, _ROW),
    r"row_\w+_(64x128|128x64)": (180.0, _ROW),
    r"row_\w+_64x64": (234.0, f"{_ROW}; {_FEW}"),
    r"(block|grouped)_\w+_(64x128|128x64)": (67.0, f"32 FFMA: {_FEW}"),
    r"block_\w+_64x64": (133.0, f"16 FFMA: {_FEW}"),
    r"block_\w+_64x64_split": (375.0, f"16 FFMA: {_FEW}; a segment of K is mostly shorter than a turn of the ring"),
    r"block_\w+_32x128": (182.5, _SWAPPED),
    r"block_\w+_16x128": (289.5, _SWAPPED),
    r"grouped_\w+_32x128": (208.0, _ANYWHERE),
    r"grouped_\w+_16x128": (316.0, _ANYWHERE),
    r"\w+": (GOAL_OF_OTHERS, ""),
}


def most_others(kernel: str) -> tuple[float, str]:
    return next(most for name, most in MOST_OTHERS.items() if re.fullmatch(f"gemm_sm90_{name}", kernel))


def passes(kernel: str) -> int:
    """Of 128 columns of wgmma, that a consumer of the kernel takes one after the other."""
    return 2 if re.search(r"_128x256(_pair)?$", kernel) else 1


# Opcodes of a kernel that are worth a row: tensor core, promotion, scaling, fences, barriers, local memory.
OPCODES = {
    "QGMMA": ("QGMMA",),
    "FFMA": ("FFMA", "FFMA2"),
    "FMUL": ("FMUL", "FMUL2"),
    "MEMBAR": ("MEMBAR",),
    "BAR and SYNCS": ("BAR", "SYNCS"),
    "LDL and STL": ("LDL", "STL"),
}


def works(tiny: bool) -> list[Work]:
    """``tiny`` takes one module of ours, one Triton kernel and one batch."""
    modules = sorted(built_kernels().get("modules", {}).items(), key=lambda item: is_comm(item[0]))[
        : 1 if tiny else None
    ]
    kernels = [(module, kernel) for module, made in modules for kernel in made]
    found: list[Work] = [Computed(kernel, "", functools.partial(_built, module, kernel)) for module, kernel in kernels]
    if not found:
        found.append(Computed("kernels", "", _nothing_built))
    for linear in DEEPSEEK_V3:
        for m in BATCHES[: 1 if tiny else None]:
            found.append(Computed("gemm", linear.shape(m), functools.partial(_modelled, linear, m), 1))
    for op, shape, launch in list(triton_launches())[: 1 if tiny else None]:
        found.append(Computed(op, shape, functools.partial(_triton, op, shape, launch), 2))
    return found


def is_comm(name: str) -> bool:
    """Whether a module or a kernel is of dispatch and combine, not of GEMM."""
    return name.startswith("comm_")


def _nothing_built(_: Session) -> list[Row]:
    raise Unavailable(f"no kernels were built: {KERNELS} has no build.json")


CUDA, TRITON = "fastfp8 sm_90a", "fastfp8 Triton"  # backends


def _rows(op: str, shape: str, backend: str, values: dict[str, float], note: str | None) -> list[Row]:
    rows = [Row("static", op, shape, backend, "static", unit, *(float(v),) * 3) for unit, v in values.items()]
    bars = {} if backend != CUDA else COMM_BARS if is_comm(op) else BARS
    return [dataclasses.replace(row, bar=bars.get(row.unit), note=note) for row in rows]


def _built(module: str, kernel: str, _: Session) -> list[Row]:
    made = built_kernels()["modules"][module][kernel]
    values = {
        "registers": made["registers"],
        "bytes of stack": made["stack"],
        "bytes of spills": made["spill_bytes"],
        "bytes of shared memory": (comm_plans() if is_comm(kernel) else plans())[kernel].shared_bytes,
    }
    more, note = _instructions(KERNELS / f"{module}.cubin", kernel)
    if is_comm(kernel):
        return _rows(kernel, COMM_SHAPE, CUDA, values | more, note)
    return _rows(kernel, "", CUDA, values | more, note) + _mix(KERNELS / f"{module}.cubin", kernel)


K_BLOCKS, OTHERS, SHARE = "k-blocks a turn of the main loop", "others a k-block", "others, % of FFMA"


def _mix(cubin: Path, kernel: str) -> list[Row]:
    try:
        found = sass.mix(sass.code(cubin, kernel), passes(kernel))
    except Unavailable:
        return []
    if found is None:
        return []
    bar, reason = most_others(kernel)
    values = {K_BLOCKS: found.blocks, OTHERS: found.others, SHARE: found.share}
    rows = _rows(kernel, "", CUDA, values, reason or None)
    return [dataclasses.replace(row, bar=bar) if row.unit == SHARE else row for row in rows]


def _instructions(cubin: Path, kernel: str) -> tuple[dict[str, float], str | None]:
    """Counts by unit; without a disassembler none, and a note that says so."""
    try:
        code = sass.code(cubin, kernel)
    except Unavailable as reason:
        return {}, str(reason)
    counts: dict[str, float] = {"instructions": len(code.instructions) - code.opcodes["NOP"]}  # which pad the end
    if loop := code.loop("QGMMA"):
        counts["instructions of the main loop"] = len(loop)
    for unit, opcodes in OPCODES.items():
        counts[unit] = sum(code.opcodes[opcode] for opcode in opcodes)
    return counts, None


# Of the planner.


def problem(
    m: int,
    n: int,
    k: int,
    b_block: Block = SQUARE,
    out_dtype: str = "bfloat16",
    num_sms: int = SMS,
    machine: str = "H100",
) -> _C.GemmProblem:
    """A product as the planner sees it, of tensors that are nowhere."""
    operands = []
    for rows, block in ((m, ROW), (n, b_block)):
        data = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device="meta")
        operands += [_view(data), _view(empty_scale(data, scale_shape(rows, k, block), block))]
    a, a_scale, b, b_scale = operands
    return _C.GemmProblem(a, a_scale, b, b_scale, b_block, out_dtype, None, num_sms, machine)


def grouped_problem(
    rows: int, groups: int, n: int, k: int, out_dtype: str = "bfloat16", num_sms: int = SMS
) -> _C.GemmProblem:
    """``rows`` in ``groups``, each by a B [n, k] of its own."""
    a = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device="meta")
    b = torch.empty(groups * n, k, dtype=torch.float8_e4m3fn, device="meta")
    scales = (
        empty_scale(a, scale_shape(rows, k, ROW), ROW),
        torch.empty(groups * ceil_div(n, BLOCK), ceil_div(k, BLOCK), device="meta"),
    )
    ends = torch.empty(groups, dtype=torch.int32, device="meta")
    a_view, a_scale, b_view, b_scale, end_view = (_view(t) for t in (a, scales[0], b, scales[1], ends))
    return _C.GemmProblem.grouped(a_view, a_scale, b_view, b_scale, end_view, groups, False, out_dtype, num_sms)


def wgrad_problem(
    n: int, k: int, tokens: int, groups: int, out_dtype: str = "float32", num_sms: int = SMS
) -> _C.GemmProblem:
    """Weight gradients [n, k] of ``groups`` that share ``tokens``, not accumulated."""
    operands = []
    for rows in (n, k):
        data = torch.empty(rows, tokens, dtype=torch.float8_e4m3fn, device="meta")
        operands += [_view(data), _view(empty_scale(data, scale_shape(rows, tokens, ROW), ROW))]
    ends = torch.empty(groups, dtype=torch.int32, device="meta")
    out = torch.empty(groups * n, k, dtype=getattr(torch, out_dtype), device="meta")
    grad_t, grad_t_scale, input_t, input_t_scale = operands
    return _C.GemmProblem.wgrad(grad_t, grad_t_scale, input_t, input_t_scale, _view(ends), _view(out), False, num_sms)


def _view(t: torch.Tensor) -> _C.TensorView:
    """At an address that is aligned as the kernels want it."""
    return _C.TensorView(str(t.dtype).removeprefix("torch."), list(t.shape), list(t.stride()), 0, 1 << 20)


def plans() -> dict[str, _C.LaunchPlan]:
    """A launch of each instance of the GEMM kernel, by the kernel's name."""
    return {kernel: plan for kernel, (_, plan) in _launches().items()}


def configs() -> dict[str, _C.GemmConfig]:
    """The config of each of ``plans``."""
    return {kernel: config for kernel, (config, _) in _launches().items()}


COMM_SHAPE = "8 nodes of 8"
COMM_INSTANCES = ("_loopback", "_nccl", "_traced", "_nccl_traced")


@functools.cache
def comm_plans() -> dict[str, _C.LaunchPlan]:
    """A launch of each kernel of dispatch and combine, by its name; neither network nor trace changes what it takes."""
    geometry = _C.CommGeometry(
        nodes=8,
        gpus=8,
        channels=10,
        experts=256,
        top_k=8,
        hidden=7168,
        max_tokens=4096,
        capacity=65536,
        link_slots=4,
        rail_slots=4,
        rail_chunk=8,
    )
    call = _C.CommCall(first_rank=0, tokens=4096)
    made = [_C.comm_exchange_plan(geometry, call), _C.comm_combine_plan(geometry, call)]
    made += [_C.comm_dispatch_plan(geometry, call, payload) for payload in ("quantize", "scaled", "plain")]
    plans = {plan.kernel: plan for plan in made}
    return {kernel.replace("_loopback", of): plan for kernel, plan in plans.items() for of in COMM_INSTANCES}


_Launches = dict[str, tuple[_C.GemmConfig, _C.LaunchPlan]]


@functools.cache
def _launches() -> _Launches:
    found: _Launches = {}
    for b_block in (SQUARE, ROW):
        for out_dtype in ("bfloat16", "float32"):
            asked = problem(2 * BLOCK, 2 * BLOCK, 4 * BLOCK, b_block, out_dtype)
            found |= _launches_of(asked)
    for out_dtype in ("bfloat16", "float32"):
        found |= _launches_of(grouped_problem(2 * BLOCK, 2, 2 * BLOCK, 4 * BLOCK, out_dtype))
        found |= _launches_of(wgrad_problem(2 * BLOCK, 2 * BLOCK, 8 * BLOCK, 2, out_dtype))
    products = (
        problem(2 * BLOCK, 2 * BLOCK, 4 * BLOCK, SQUARE, "bfloat16"),
        grouped_problem(2 * BLOCK, 2, 2 * BLOCK, 4 * BLOCK, "bfloat16"),
    )
    for product in products:
        found |= _launches_of(product.with_swiglu(None, None, False, 0.0, True))
    return found


def _launches_of(asked: _C.GemmProblem) -> _Launches:
    made = [(config, _C.gemm_plan(asked, config)) for config, _ in _C.gemm_candidates(asked)]
    return {plan.kernel: (config, plan) for config, plan in made}


def describe(config: _C.GemmConfig) -> str:
    """In a few words, for a row."""
    cluster = f", clusters of {config.cluster}" if config.cluster > 1 else ""
    segments = f", {config.segments} segments of K" if config.segments > 1 else ""
    return f"{config.name}, {config.stages} stages{cluster}{segments}, {config.grid} CTAs"


def _modelled(linear: Linear, m: int, _: Session) -> list[Row]:
    config = _C.gemm_select(problem(m, linear.n, linear.k))
    row = Row("static", "gemm", linear.shape(m), CUDA, "modelled", "cycles", *(config.cycles,) * 3)
    note = f"{linear.model}, {linear.layer}; {MODEL_NOTE}"
    return [dataclasses.replace(row, config=describe(config), note=note)]


# Of Triton.

Launch = Callable[[], tuple[Any, str, Callable[[], Any]]]  # module, its kernel's name, the host function to call


def triton_launches() -> list[tuple[str, str, Launch]]:
    """Op, shape and a launch of each Triton kernel that differs in its code, on 256 rows but for gemm's small tile."""
    found: list[tuple[str, str, Launch]] = []
    for block in BLOCKS:
        name = f"{block[0]}x{block[1]}"
        found.append(("quantize_kernel", name, functools.partial(_quantize, block)))
        found.append(("dequantize_kernel", name, functools.partial(_dequantize, block)))
    for m in (16, 256):
        for block in (SQUARE, ROW):
            found.append(("gemm_kernel", f"{m} rows, B {block[0]}x{block[1]}", functools.partial(_gemm, m, block)))
    return found


def _scaled(rows: int, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    data = torch.zeros(rows, 512, dtype=torch.float8_e4m3fn)
    return data, empty_scale(data, scale_shape(rows, 512, block), block).fill_(1.0)


def _quantize(block: Block) -> tuple[Any, str, Callable[[], Any]]:
    from fastfp8.triton_kernels import quantize

    x = torch.zeros(256, 512, dtype=torch.bfloat16)
    return quantize, "quantize_kernel", functools.partial(quantize.quantize, x, block, False, 0.0)


def _dequantize(block: Block) -> tuple[Any, str, Callable[[], Any]]:
    from fastfp8.triton_kernels import dequantize

    host = functools.partial(dequantize.dequantize, *_scaled(256, block), block, torch.bfloat16)
    return dequantize, "dequantize_kernel", host


def _gemm(m: int, block: Block) -> tuple[Any, str, Callable[[], Any]]:
    from fastfp8.triton_kernels import gemm

    operands = (*_scaled(m, ROW), *_scaled(256, block))
    return gemm, "gemm_kernel", functools.partial(gemm.gemm, *operands, block, torch.bfloat16, None)


def _triton(op: str, shape: str, launch: Launch, _: Session) -> list[Row]:
    """Compiled as the host function would have it on an sm_90 GPU."""
    recorders = borrow("recorder")
    try:
        module, name, host = launch()
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    recorder = recorders.Recorder(getattr(module, name))
    with mock.patch.object(module, name, recorder):
        host()
    compiled = recorder.compile(90)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{name}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        used = sass.resources(cubin, name)
        values = {"registers": used["REG"], "bytes of stack": used["STACK"]}
        more, note = _instructions(cubin, name)
    more = {unit: count for unit, count in more.items() if count or unit in BARS}
    return _rows(op, shape, TRITON, values | {"bytes of shared memory": compiled.metadata.shared} | more, note)
