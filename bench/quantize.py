"""``fastfp8.quantize`` and ``dequantize`` beside a copy of the input and what torch.compile makes of plain torch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.layout import BLOCK, BLOCKS, Block

from . import device
from .case import Case, Contestant, Subject, Work

# Tokens by hidden size: DeepSeek-V3's hidden, expert and dense feed-forward sizes, then a decode batch.
SHAPES = ((4096, 7168, 0), (16384, 7168, 1), (16384, 2048, 1), (4096, 18432, 1), (128, 7168, 0))
FP8_MAX = 448.0


def plain(x: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """The same codes and scales in a few lines of torch, for shapes that the block divides; scales row-major."""
    rows, cols = x.shape
    tiles = x.float().view(rows // block[0], block[0], cols // block[1], block[1])
    amax = tiles.abs().amax(dim=(1, 3)).clamp(min=2.0**-110)
    # Not `FP8_MAX / amax`: torch takes the reciprocal of that and multiplies, which rounds twice.
    multiplier = torch.full_like(amax, FP8_MAX) / amax
    codes = (tiles * multiplier[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.view(rows, cols), amax / FP8_MAX


def check_codes(expected: ScaledTensor, got: Any) -> None:
    """Ours bit for bit; of another's one code in a thousand may differ, where its compiler divides otherwise."""
    data = got.data if isinstance(got, ScaledTensor) else got[0]
    same = (data.view(torch.uint8) == expected.data.view(torch.uint8)).float().mean().item()
    least = 1.0 if isinstance(got, ScaledTensor) else 0.999
    assert same >= least, f"only {same:.4%} of the codes are as the CPU's, {least:.1%} expected"
    if isinstance(got, ScaledTensor):
        assert torch.equal(got.scale, expected.scale), "scales differ from the CPU's"


def check_equal(expected: Tensor, got: Any) -> None:
    assert torch.equal(got, expected), "values differ from the CPU's"


def scale_bytes(rows: int, cols: int, block: Block) -> int:
    return 4 * (-(-rows // block[0])) * (-(-cols // block[1]))


def quantize_subject(rows: int, cols: int, block: Block) -> Subject:
    x = torch.randn(rows, cols, dtype=torch.bfloat16)
    expected = device.elsewhere(fastfp8.quantize(x, block))
    moved = 3 * rows * cols + scale_bytes(rows, cols, block)
    inputs = [device.elsewhere(x) for _ in range(device.copies_for(moved))]
    check = functools.partial(check_codes, expected)
    compiled = torch.compile(plain, dynamic=False)
    found = [
        Contestant("fastfp8 Triton", lambda i: fastfp8.quantize(inputs[i], block), check),
        Contestant("clone", lambda i: inputs[i].clone(), functools.partial(check_equal, inputs[0])),
    ]
    missing = {}
    if rows % block[0] or cols % block[1]:
        missing["torch.compile"] = "the plain version wants whole blocks"
    else:
        found.append(Contestant("torch.compile", lambda i: compiled(inputs[i], block), check))
    return Subject(found, len(inputs), moved, missing=missing)


def dequantize_subject(rows: int, cols: int, block: Block) -> Subject:
    reference = fastfp8.quantize(torch.randn(rows, cols, dtype=torch.bfloat16), block)
    expected = fastfp8.dequantize(reference).to(device.DEVICE)
    moved = 3 * rows * cols + scale_bytes(rows, cols, block)
    inputs = [device.elsewhere(reference) for _ in range(device.copies_for(moved))]
    outputs = [torch.empty_like(expected) for _ in inputs]
    return Subject(
        [
            Contestant(
                "fastfp8 Triton",
                lambda i: fastfp8.dequantize(inputs[i]),
                functools.partial(check_equal, expected),
            ),
            # Converts the codes, leaves the scales out: the bytes without the work.
            Contestant(
                "copy_ FP8 to BF16",
                lambda i: outputs[i].copy_(inputs[i].data),
                functools.partial(check_equal, inputs[0].data.bfloat16()),
            ),
        ],
        len(inputs),
        moved,
    )


def works(tiny: bool) -> list[Work]:
    shapes = ((128, 256, 0),) if tiny else SHAPES
    found: list[Work] = []
    for rows, cols, priority in shapes:
        for block in BLOCKS:
            name, shape = f"{block[0]}x{block[1]}", f"{rows}x{cols}"
            build = functools.partial(quantize_subject, rows, cols, block)
            found.append(Case("quantize", f"quantize {name}", shape, "gpu", build, priority, "us"))
        build = functools.partial(dequantize_subject, rows, cols, (1, BLOCK))
        found.append(Case("quantize", "dequantize 1x128", shape, "gpu", build, priority, "us"))
    return found
