"""PackedE5M6: values of 12 bits, eight in three words, with the scales that dequantise them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import check_device, check_tensor, check_type, check_value
from .layout import BLOCK, Block, ceil_div, empty_scale, has_scale_layout, scale_shape

_NAME = "PackedE5M6"
# Eight values fill three words.
VALUES, WORDS = 8, 3


def words_shape(rows: int, cols: int) -> tuple[int, int]:
    return rows, ceil_div(cols, VALUES) * WORDS


def group_of(cols: int, per_row: bool) -> Block:
    """The (1, columns) that share a scale."""
    return (1, max(cols, 1)) if per_row else (1, BLOCK)


class PackedE5M6:
    """An [R, C] matrix in 12 bits a value (sign, 5 bits of exponent, 6 of mantissa): ``value = code * scale``.

    Args:
        words: int32 [R, 3 * ceil(C / 8)], row-major: eight codes of a row in three words, the first code in the highest
            bits. The codes beyond C in the last three words are zero.
        scale: float32, [R, ceil(C / 128)] or with ``per_row`` [R, 1]; in the layout that :mod:`fastfp8.layout` states
            for (1, 128) blocks, into which another is copied here.
        shape: (R, C).
        per_row: one scale for each row, not for 128 columns.

    A code is a float16 without its last 4 bits: exponent bias 15, subnormals, infinities and NaN as there. The largest
    finite value is 65024.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: a shape, a stride or a device does not fit.

    It is a pytree node (leaves ``words`` and ``scale``), and ``torch.save`` and ``torch.load`` take it.
    """

    words: torch.Tensor
    scale: torch.Tensor
    shape: torch.Size
    per_row: bool

    def __init__(
        self, words: torch.Tensor, scale: torch.Tensor, shape: Iterable[int], *, per_row: bool = False
    ) -> None:
        check_type(shape, (tuple, list), _NAME, "shape", "(R, C)")
        check_type(per_row, bool, _NAME, "per_row", "a bool")
        shape = torch.Size(shape)
        check_value(len(shape) == 2 and min(shape) >= 0, _NAME, "shape", "(R, C)", tuple(shape))
        check_packed(_NAME, words, scale, shape[1], per_row)
        check_value(words.shape[0] == shape[0], _NAME, "words", f"{shape[0]} rows", f"shape {tuple(words.shape)}")
        if not has_scale_layout(scale, (1, BLOCK)):
            scale = empty_scale(words, scale.shape, (1, BLOCK)).copy_(scale)
        self.words, self.scale, self.shape, self.per_row = words, scale, shape, per_row

    @classmethod
    def _trusted(cls, words: Any, scale: Any, shape: tuple[int, ...], per_row: bool) -> PackedE5M6:
        """Without checks: for what an op just made, and for pytree, whose leaves may be anything."""
        self = object.__new__(cls)
        self.words, self.scale, self.shape, self.per_row = words, scale, torch.Size(shape), per_row
        return self

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the scales together."""
        return self.words.nbytes + self.scale.nbytes

    def __repr__(self) -> str:
        group = "row" if self.per_row else f"1x{BLOCK}"
        return f"PackedE5M6({tuple(self.shape)}, one scale a {group})"


def check_packed(op: str, words: Any, scale: Any, cols: int, per_row: bool) -> None:
    """Raise unless ``words`` and ``scale`` are those of ``cols`` columns. The layout of the scale is not looked at."""
    check_tensor(words, op, "words", (torch.int32,))
    check_tensor(scale, op, "scale", (torch.float32,))
    check_device(scale, op, "scale", words, "words")
    rows, expected = words.shape[0], words_shape(words.shape[0], cols)
    got = f"shape {tuple(words.shape)} for {cols} columns"
    check_value(cols >= 0 and tuple(words.shape) == expected, op, "words", f"shape {expected}", got)
    check_value(words.is_contiguous(), op, "words", "a contiguous tensor", f"stride {tuple(words.stride())}")
    expected = scale_shape(rows, cols, group_of(cols, per_row))
    check_value(tuple(scale.shape) == expected, op, "scale", f"shape {expected}", f"shape {tuple(scale.shape)}")


def _flatten(t: PackedE5M6) -> tuple[list[Any], tuple[tuple[int, ...], bool]]:
    return [t.words, t.scale], (tuple(t.shape), t.per_row)


def _unflatten(leaves: Iterable[Any], context: tuple[tuple[int, ...], bool]) -> PackedE5M6:
    words, scale = leaves
    # A tree_map of clone or of an operation drops the padding of a scale.
    if isinstance(scale, torch.Tensor) and scale.dim() == 2 and not has_scale_layout(scale, (1, BLOCK)):
        scale = empty_scale(scale, scale.shape, (1, BLOCK)).copy_(scale)
    return PackedE5M6._trusted(words, scale, *context)


pytree.register_pytree_node(PackedE5M6, _flatten, _unflatten, serialized_type_name="fastfp8.PackedE5M6")
torch.serialization.add_safe_globals([PackedE5M6])
