"""Operands, poison and expected bits for grouped GEMMs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastfp8 import ScaledTensor
from fastfp8.layout import BLOCK, Block, ceil_div, empty_scale, scale_shape_of
from fastfp8.reference import tensor_core

NAN_CODE = 0x7F
# Elements on either side of each tensor that torch.empty makes within `poisoned_empty`, and what their bytes are.
GUARD, POISON = 64, 0xFF


def scaled(shape: Sequence[int], block: Block, seed: int, pitch: int = 0) -> ScaledTensor:
    """Every finite code alike, with scales of 24 bits, so that any change of order or rounding shows.

    What lies between rows of ``pitch`` elements and in the padding of the scale is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    k = shape[-1]
    wide = torch.full((*shape[:-1], max(k, pitch)), NAN_CODE, dtype=torch.uint8)
    wide[..., :k] = torch.randint(0, 0x7F, shape, generator=generator, dtype=torch.uint8)
    wide[..., :k] |= torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) << 7
    scale = empty_scale(wide, scale_shape_of(shape, block), block)
    scale.as_strided((scale.untyped_storage().nbytes() // 4,), (1,)).fill_(float("nan"))
    exponent = torch.randint(-4, 5, scale.shape, generator=generator)
    scale.copy_((1 + torch.rand(scale.shape, generator=generator)) * 2.0**exponent)
    return ScaledTensor(wide.view(torch.float8_e4m3fn)[..., :k], scale, block)


def ends_of(sizes: Sequence[int]) -> Tensor:
    """The offsets of groups of these sizes."""
    return torch.tensor(list(accumulate(sizes)), dtype=torch.int32)


def groups_of(offsets: Tensor) -> list[slice]:
    """The rows of each group."""
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def part(t: ScaledTensor, rows: slice) -> ScaledTensor:
    """Those rows of a matrix in (1, 128) blocks, as a view."""
    return ScaledTensor._trusted(t.data[rows], t.scale[rows], t.block)


def spoil(t: ScaledTensor, rows: slice) -> None:
    """NaN codes and NaN scales in ``rows`` of a matrix."""
    t.data.view(torch.uint8)[rows] = NAN_CODE
    t.scale[rows] = float("nan")


def oracle(a: ScaledTensor, b: ScaledTensor, rows: slice, group: int, out_dtype: torch.dtype) -> Tensor:
    """The bits of Hopper for ``rows`` of a matrix ``a`` with matrix ``group`` of ``b``."""
    left = part(a, rows)
    given = (left.data, left.scale, b.data[group], b.scale[group], (BLOCK, BLOCK))
    return tensor_core.gemm(*given, out_dtype, None)


def token_ends(sizes: Sequence[int]) -> Tensor:
    """Offsets for grouped_wgrad. An empty group ends in turn where it begins, and where the one before it ends."""
    ends, end = [], 0
    for group, size in enumerate(sizes):
        begin = ceil_div(end, BLOCK) * BLOCK
        end = begin + size if size or group % 2 else end
        ends.append(end)
    return torch.tensor(ends, dtype=torch.int32)


def token_blocks(offsets: Tensor) -> list[slice]:
    """The blocks of 128 tokens of each group."""
    ends = [ceil_div(end, BLOCK) for end in offsets.tolist()]
    return [slice(first, last) for first, last in zip([0, *ends[:-1]], ends, strict=True)]


def blocks_of(t: ScaledTensor, blocks: slice) -> ScaledTensor:
    """Those blocks of columns of a matrix in (1, 128) blocks, as a view."""
    return ScaledTensor._trusted(t.data[:, blocks.start * BLOCK : blocks.stop * BLOCK], t.scale[:, blocks], t.block)


def in_groups_of_tokens(t: ScaledTensor, offsets: Tensor) -> ScaledTensor:
    """``t`` [R, T], with zero codes behind each group and NaN codes and scales in blocks of no group."""
    codes, ends = t.data.view(torch.uint8), offsets.tolist()
    for end in ends:
        codes[:, end : ceil_div(end, BLOCK) * BLOCK] = 0
    unused = ceil_div(ends[-1], BLOCK)
    codes[:, unused * BLOCK :] = NAN_CODE
    t.scale[:, unused:] = float("nan")
    return t


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """While it lasts, what torch.empty returns lies in the middle of memory full of 0xFF, which is NaN."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        room = empty(made.numel() + 2 * GUARD, dtype=made.dtype, device=made.device)
        room.view(torch.uint8).fill_(POISON)
        return room[GUARD : GUARD + made.numel()].view(made.shape)

    with mock.patch.object(torch, "empty", poisoned):
        yield


def untouched(out: Tensor, written: Tensor) -> bool:
    """Whether all is poison still around ``out``, made in `poisoned_empty`, and where ``written`` [rows] is False."""
    storage = torch.zeros(0, dtype=torch.uint8).set_(out.untyped_storage()).clone()
    assert storage.numel() == (out.numel() + 2 * GUARD) * out.element_size(), "the output is not of torch.empty"
    inside = storage[GUARD * out.element_size() :][: out.numel() * out.element_size()]
    inside.view(written.numel(), -1)[written] = POISON
    return bool((storage == POISON).all())
