"""Triton's matrix products as compiled for sm_90a and sm_80: wgmma and mma.sync, cp.async and TMA, on the emulator.

Every test runs in Triton's interpreter too, which shows that kernel and expectation are right, and on the emulator at
the timing of several seeds. With integer operands all sums are exact and so is the comparison.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import backend_params

if any(param.marks[-1].args[0] for param in backend_params(["triton_interpreter", "emulator"])):
    pytest.skip("triton is not installed, or the emulator cannot be built", allow_module_level=True)
import triton.language as tl
import triton_matmuls as kernels
from emulator import EmulationError
from recorder import NO_PROXY_FENCE
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_launch import Emulated, Run, run_params

if NO_PROXY_FENCE:
    pytest.skip(NO_PROXY_FENCE, allow_module_level=True)

E4M3, E5M2, BF16, F16, F32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32
I8, I32 = torch.int8, torch.int32
TL = {F32: tl.float32, F16: tl.float16, I32: tl.int32}


@pytest.fixture(params=run_params(seeds=3))
def run(request: pytest.FixtureRequest) -> Run:
    made: Run = request.param()
    return made


def integers(seed: int, shape: tuple[int, int], dtype: torch.dtype, limit: int = 4) -> Tensor:
    """From -limit to limit: exact in every type, like the sums of their products."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).to(dtype)


def empty(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Of values that cannot be right, so that what is not written shows."""
    return torch.full(shape, 99 if dtype == I32 else float("nan")).to(dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double()


def multiply(
    run: Run, a: Tensor, b: Tensor, out: Tensor, block: tuple[int, int, int], acc: torch.dtype = F32, **options: Any
) -> Tensor:
    """``out``, filled by the kernel that takes pointers. ``b`` may be a transposed view."""
    split = options.pop("split", 1)
    (m, k), n = a.shape, b.shape[1]
    block_m, block_n, block_k = block
    grid = (-(-m // block_m) * -(-n // block_n), split)
    strides = (a.stride(0), b.stride(0), b.stride(1), out.stride(0))
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    run(kernels.matmul_kernel, grid, a, b, out, m, n, k, *strides, **blocks, SPLIT_K=split, ACC=TL[acc], **options)
    return out


# What is multiplied: (operands, output, accumulator, block, warps, stages, B is K-major, what PTX must have).
CASES: dict[str, tuple[Any, ...]] = {
    "e4m3 wgmma": (E4M3, BF16, F32, (64, 64, 64), 4, 3, True, "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3"),
    "e5m2 wgmma": (E5M2, F32, F32, (128, 64, 64), 8, 3, True, "wgmma.mma_async.sync.aligned.m64n64k32.f32.e5m2.e5m2"),
    "bf16 wgmma": (
        BF16,
        BF16,
        F32,
        (64, 128, 32),
        4,
        3,
        False,
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
    ),
    "f16 wgmma": (F16, F32, F32, (64, 64, 64), 4, 2, False, "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16"),
    "s8 wgmma": (I8, I32, I32, (64, 64, 64), 4, 3, True, "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"),
    "tf32 wgmma": (F32, F32, F32, (64, 32, 32), 4, 2, True, "wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32"),
    "f16 mma": (F16, F32, F32, (16, 32, 32), 2, 3, False, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
    "bf16 mma": (BF16, F32, F32, (16, 32, 32), 2, 3, True, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
    "e4m3 mma": (E4M3, F32, F32, (16, 32, 32), 1, 2, True, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
    "tf32 mma": (F32, F32, F32, (16, 16, 16), 1, 2, False, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
    "s8 mma": (I8, I32, I32, (16, 32, 64), 1, 3, True, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
}


@pytest.mark.parametrize("name", CASES)
def test_pointers(run: Run, name: str) -> None:
    """Two by two tiles and more k-blocks than stages; tails in M, N and K are in test_tails."""
    operands, out_dtype, acc, block, warps, stages, k_major, instruction = CASES[name]
    m, n, k = 2 * block[0], 2 * block[1], 4 * block[2]
    a = integers(0, (m, k), operands)
    b = integers(1, (n, k), operands).t() if k_major else integers(1, (k, n), operands)
    out = multiply(run, a, b, empty((m, n), out_dtype), block, acc, num_warps=warps, num_stages=stages)
    expected = product(a, b).to(out_dtype)  # one rounding, where the output is narrow
    assert torch.equal(out, expected)
    if isinstance(run, Emulated):
        assert instruction in run.ptx
        assert ("wgmma" in run.ptx) == ("wgmma" in name)


def wait_first(ptx: str) -> str:
    """With a wait right behind each commit."""
    commit = "wgmma.commit_group.sync.aligned;"
    return ptx.replace(commit, f"{commit} wgmma.wait_group.sync.aligned 0;")


@pytest.mark.parametrize("seed", range(2))
def test_f16_sums(seed: int) -> None:
    """Triton 3.9 unpacks sums in FP16 between commit_group and wait_group, while the wgmma may still write them.

    ptxas mends it by a wait of its own (message C7517), the emulator says so. With the wait the result is right.
    """
    a, b = integers(17, (64, 128), F16), integers(18, (128, 64), F16)
    options = {"num_warps": 4, "num_stages": 2}
    with pytest.raises(EmulationError, match=r"register %r\d+ .*wgmma"):
        multiply(Emulated(seed), a, b, empty((64, 64), F16), (64, 64, 64), F16, **options)
    mended = Emulated(seed, edit=wait_first)
    out = multiply(mended, a, b, empty((64, 64), F16), (64, 64, 64), F16, **options)
    assert torch.equal(out.double(), product(a, b))
    assert "wgmma.mma_async.sync.aligned.m64n64k16.f16.f16.f16" in mended.ptx


@pytest.mark.parametrize("shape", [(100, 75, 130), (1, 1, 1), (65, 64, 31)], ids=str)
def test_tails(run: Run, shape: tuple[int, int, int]) -> None:
    """Masked loads and stores in all three dimensions."""
    m, n, k = shape
    a, b = integers(2, (m, k), BF16), integers(3, (k, n), BF16)
    out = multiply(run, a, b, empty((m, n), F32), (64, 64, 32), num_warps=4, num_stages=2)
    assert torch.equal(out.double(), product(a, b))


@pytest.mark.parametrize("operands", [F16, BF16], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_sm80(operands: torch.dtype, seed: int) -> None:
    """PTX for an older GPU is PTX too: mma.sync, ldmatrix with and without .trans, a three-stage cp.async pipeline."""
    a, b = integers(4, (64, 128), operands), integers(5, (128, 64), operands)
    run = Emulated(seed, capability=80)
    out = multiply(run, a, b, empty((64, 64), F32), (32, 64, 32), num_warps=4, num_stages=3)
    assert ".target sm_80" in run.ptx
    assert torch.equal(out.double(), product(a, b))


def test_split_k(run: Run) -> None:
    """Four programs add their shares of K to one tile: red.add of floats, exact in any order."""
    a, b = integers(6, (64, 256), BF16), integers(7, (256, 64), BF16)
    out = torch.zeros(64, 64)
    multiply(run, a, b, out, (64, 64, 32), split=4, num_warps=4, num_stages=2)
    assert torch.equal(out.double(), product(a, b))


def test_bf16_rounding(run: Run) -> None:
    """Random values against float64, to the bound of sums in FP32 with the tensor core's truncation.

    Each of the K / 16 steps truncates 17 terms at 2^-25 of the largest and the sum at 2^-23: at most 2^-20 of the sum
    of magnitudes a step, as no partial sum exceeds it. Then comes the rounding to BF16, 2^-8 at most of the result.
    """
    generator = torch.Generator().manual_seed(8)
    a, b = (torch.randn(s, generator=generator).to(BF16) for s in ((64, 256), (256, 64)))
    out = multiply(run, a, b, empty((64, 64), BF16), (64, 64, 64), num_warps=4, num_stages=3).double()
    exact, magnitude = product(a, b), product(a.abs(), b.abs())
    accumulated = 16 * 2.0**-20 * magnitude
    assert ((out - exact).abs() <= accumulated + 2.0**-8 * (exact.abs() + accumulated)).all()


def test_e4m3_accumulation(run: Run) -> None:
    """Random codes against float64, to the bound of the FP8 tensor core.

    Each of the K / 32 steps truncates 33 terms at 2^-13 of the largest, and the sum at 2^-13 of itself. No term and no
    partial sum exceeds the sum of magnitudes.
    """
    generator = torch.Generator().manual_seed(9)
    a, b = (torch.randn(64, 256, generator=generator).to(E4M3) for _ in range(2))
    out = multiply(run, a, b.t(), empty((64, 64), F32), (64, 64, 64), num_warps=4, num_stages=3).double()
    exact, magnitude = product(a, b.t()), product(a.float().abs(), b.t().float().abs())
    assert ((out - exact).abs() <= 8 * 34 * 2.0**-13 * magnitude).all()
    if isinstance(run, Emulated):
        assert (out != exact).any()  # the truncation is there


def descriptors(
    a: Tensor, b: Tensor, out: Tensor, block: tuple[int, int, int], b_rows: bool = False
) -> tuple[TensorDescriptor, ...]:
    block_m, block_n, block_k = block
    boxes = ([block_m, block_k], [block_k, block_n] if b_rows else [block_n, block_k], [block_m, block_n])
    return tuple(TensorDescriptor.from_tensor(t, box) for t, box in zip((a, b, out), boxes, strict=True))


def blocks(block: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))


# (operands, output, block, warps, B has K rows). Boxes of 128, 64 and 32 bytes, which is what swizzles them so.
TMA_CASES: dict[str, tuple[Any, ...]] = {
    "bf16, 128-byte swizzle": (BF16, BF16, (64, 64, 64), 4, False),
    "bf16, MN-major B": (BF16, F32, (64, 128, 64), 4, True),
    "f16, 64-byte swizzle": (F16, F32, (64, 64, 32), 4, False),
    "bf16, 32-byte swizzle": (BF16, BF16, (64, 32, 16), 4, False),
    "e4m3, 128-byte swizzle": (E4M3, BF16, (128, 64, 128), 8, False),
    "e4m3, 32-byte swizzle": (E4M3, F32, (64, 32, 32), 4, False),
}


@pytest.mark.parametrize("name", TMA_CASES)
def test_host_descriptors(run: Run, name: str) -> None:
    """TMA loads into wgmma operands, TMA stores; a full and a ragged tile in each dimension."""
    operands, out_dtype, block, warps, b_rows = TMA_CASES[name]
    m, n, k = block[0] + 24, block[1] + 16, 3 * block[2] + 16
    a = integers(10, (m, k), operands)
    b = integers(11, (k, n) if b_rows else (n, k), operands)
    out = empty((m, n), out_dtype)
    run(
        kernels.matmul_tma_kernel,
        (2, 2),
        *descriptors(a, b, out, block, b_rows),
        k,
        **blocks(block),
        B_ROWS=b_rows,
        num_warps=warps,
        num_stages=3,
    )
    assert torch.equal(out, product(a, b if b_rows else b.t()).to(out_dtype))
    if isinstance(run, Emulated):
        assert run.ptx.count("cp.async.bulk.tensor.2d.shared::cta.global") >= 2
        assert "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group" in run.ptx


@pytest.mark.parametrize("operands", [BF16, E4M3], ids=str)
def test_device_descriptors(run: Run, operands: torch.dtype) -> None:
    """Each program writes its tensor maps to scratch memory by tensormap.replace, fences, and copies with them."""
    block = (64, 64, 64 if operands == BF16 else 128)
    m, n, k = 128, 80, 2 * block[2] + 32
    a, b, out = integers(12, (m, k), operands), integers(13, (n, k), operands), empty((m, n), F32)
    run(kernels.matmul_device_tma_kernel, (2, 2), a, b, out, m, n, k, **blocks(block), num_warps=4, num_stages=2)
    assert torch.equal(out.double(), product(a, b.t()))
    if isinstance(run, Emulated):
        assert "tensormap.cp_fenceproxy" in run.ptx


@pytest.mark.parametrize("operands", [BF16, E4M3], ids=str)
@pytest.mark.parametrize("form", ["nested", "flattened", "warp-specialised"])
def test_persistent(run: Run, form: str, operands: torch.dtype) -> None:
    """Two programs walk six tiles; the specialised form has a warp that only loads, and fewer registers for it."""
    block = (64, 64, 64 if operands == BF16 else 128)
    m, n, k = 3 * 64, 2 * 64, 2 * block[2]
    a, b, out = integers(14, (m, k), operands), integers(15, (n, k), operands), empty((m, n), BF16)
    run(
        kernels.matmul_persistent_kernel,
        (2,),
        *descriptors(a, b, out, block),
        m,
        n,
        k,
        **blocks(block),
        FLATTEN=form == "flattened",
        WARP_SPECIALIZE=form == "warp-specialised",
        num_warps=4,
        num_stages=2,
    )
    assert torch.equal(out, product(a, b.t()).to(BF16))
    if isinstance(run, Emulated):
        assert ("setmaxnreg.dec" in run.ptx) == (form == "warp-specialised")


@pytest.mark.parametrize("block", [(64, 32), (16, 16)], ids=["wgmma", "mma"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_attention(run: Run, dtype: torch.dtype, block: tuple[int, int]) -> None:
    """Causal attention against float64.

    P is rounded to the operand type, an error of half an ulp in each weight, and so is the result; the weights sum to
    one, so that is at most the ulp of 1 times the largest value. The exponents are of a relative error below 2^-18.
    """
    length, head = 64, 32
    generator = torch.Generator().manual_seed(16)
    q, k, v = (torch.randn(2, length, head, generator=generator).to(dtype) for _ in range(3))
    out = torch.full_like(q, float("nan"))
    scale = head**-0.5
    block_m, block_n = block
    run(
        kernels.attention_kernel,
        (length // block_m, 2),
        *(q, k, v, out, scale * 1.4426950408889634, length),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        HEAD=head,
        num_warps=4 if block_m == 64 else 1,
        num_stages=2,
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    bound = 1.5 * torch.finfo(dtype).eps * v.double().abs().max()
    assert (out.double() - expected).abs().max() <= bound
