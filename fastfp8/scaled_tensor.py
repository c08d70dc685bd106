"""ScaledTensor: FP8 data with the block scales that dequantise it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import check_device, check_tensor, check_type, check_value
from .layout import BLOCK, BLOCKS, Block, as_block, check_blocked, empty_scale, has_scale_layout, scale_shape_of

_NAME = "ScaledTensor"


class ScaledTensor:
    """An [R, C] tensor in FP8, or a stack [G, R, C] of such: ``value = data * scale``, one scale for each block.

    Args:
        data: float8_e4m3fn [R, C] or [G, R, C].
        scale: float32 [ceil(R / block[0]), ceil(C / block[1])], of a stack [G, ...], on the device of ``data``. It
            multiplies: a scale of 2 doubles the value. Kept in the layout that :mod:`fastfp8.layout` states; a scale
            that comes in another layout is copied into it here, once, so that no op ever has to.
        block: (rows, cols) that share a scale: (1, 128) for activations and gradients, (128, 1) for the operands of
            Wgrad, (128, 128) for weights (DeepSeek-V3 report, section 3.3.2). No block spans two matrices of a stack,
            and a stack has no (128, 1) blocks.

    Raises:
        TypeError: ``data`` or ``scale`` is not a tensor of the dtype above.
        ValueError: a shape, a device or the block does not fit.

    ``t[g]`` is matrix ``g`` of a stack as a view. It is a pytree node (leaves ``data`` and ``scale``), and
    ``torch.save`` and ``torch.load`` take it. For safetensors, which knows plain contiguous tensors only, use
    :meth:`state_dict` and :meth:`from_state_dict`.
    """

    data: torch.Tensor
    scale: torch.Tensor
    block: Block

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, block: Block) -> None:
        block = as_block(block, _NAME)
        check_blocked(data, _NAME, "data", (torch.float8_e4m3fn,), block)
        check_tensor(scale, _NAME, "scale", (torch.float32,), dim=data.dim())
        check_device(scale, _NAME, "scale", data, "data")
        shape = scale_shape_of(data.shape, block)
        check_value(
            tuple(scale.shape) == shape,
            _NAME,
            "scale",
            f"shape {shape} for data of shape {tuple(data.shape)} in blocks of {block}",
            f"shape {tuple(scale.shape)}",
        )
        if not has_scale_layout(scale, block):
            scale = empty_scale(data, shape, block).copy_(scale)
        self.data, self.scale, self.block = data, scale, block

    @classmethod
    def _trusted(cls, data: Any, scale: Any, block: Block) -> ScaledTensor:
        """Without checks: for what an op just made, and for pytree, whose leaves may be anything."""
        self = object.__new__(cls)
        self.data, self.scale, self.block = data, scale, block
        return self

    @property
    def shape(self) -> torch.Size:
        """The shape of the data: [R, C] or [G, R, C]."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the scales together."""
        return self.data.nbytes + self.scale.nbytes

    def __repr__(self) -> str:
        rows, cols = self.block
        if not isinstance(self.data, torch.Tensor):  # what a tree_map may leave
            return f"ScaledTensor({self.data!r}, {self.scale!r}, {rows}x{cols} blocks)"
        return f"ScaledTensor({tuple(self.shape)}, {rows}x{cols} blocks, {self.data.dtype}, {self.device})"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``data * scale`` as a dense tensor of float32, bfloat16 or float16. See :func:`fastfp8.dequantize`."""
        from .ops.dequantize import dequantize

        return dequantize(self, dtype)

    def __getitem__(self, matrix: int) -> ScaledTensor:
        """Matrix ``matrix`` [R, C] of a stack [G, R, C]: a view, nothing is copied.

        In (1, 128) blocks its scale starts ``matrix * R`` floats into that of the stack. The sm_90a kernel of
        :func:`fastfp8.gemm` wants a multiple of 16 bytes, so there R must be a multiple of 4.

        Raises:
            TypeError: ``matrix`` is not an int.
            ValueError: this is no stack.
            IndexError: there is no such matrix.
        """
        check_type(matrix, int, _NAME, "matrix", "an int, the index of a matrix")
        check_value(self.data.dim() == 3, _NAME, "matrix", "a stack [G, R, C] to take it from", tuple(self.shape))
        return ScaledTensor._trusted(self.data.select(0, matrix), self.scale.select(0, matrix), self.block)

    def t(self) -> ScaledTensor:
        """The [C, R] transpose, of a stack that of each matrix, with its block turned.

        The data is a view: a GEMM needs :meth:`contiguous` after it. The scale is a view too, but for (128, 128)
        blocks, whose small scale is copied into its layout. Raises ValueError for a stack in (1, 128) blocks, because
        there are no stacks in (128, 1) blocks.
        """
        square = self.block[0] == self.block[1]
        check_value(
            square or self.data.dim() == 2,
            "ScaledTensor.t",
            "self",
            f"2 dimensions or {(BLOCK, BLOCK)} blocks",
            f"{self.block} blocks of shape {tuple(self.shape)}",
        )
        scale = self.scale.mT
        if square:
            scale = scale.contiguous()
        return ScaledTensor._trusted(self.data.mT, scale, (self.block[1], self.block[0]))

    def contiguous(self) -> ScaledTensor:
        """Itself if the data is row-major already, else with a row-major copy of the data."""
        return ScaledTensor._trusted(self.data.contiguous(), self.scale, self.block)

    def to(self, device: torch.device | str) -> ScaledTensor:
        """A copy on ``device``; itself if it is there."""
        scale = self.scale.to(device)
        return ScaledTensor(self.data.to(device), scale, self.block)

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """``{prefix}data``, ``{prefix}scale`` and ``{prefix}block`` as contiguous tensors, for safetensors."""
        return {
            f"{prefix}data": self.data.contiguous(),
            f"{prefix}scale": self.scale.contiguous(),
            f"{prefix}block": torch.tensor(self.block, dtype=torch.int32),
        }

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> ScaledTensor:
        """The inverse of :meth:`state_dict`. Raises ValueError where a key is missing."""
        names = [f"{prefix}{leaf}" for leaf in ("data", "scale", "block")]
        for name in names:
            check_value(
                name in tensors, "ScaledTensor.from_state_dict", "tensors", f"the key '{name}'", sorted(tensors)
            )
        data, scale, block = (tensors[name] for name in names)
        return cls(data, scale, as_block(block.tolist(), _NAME, allowed=BLOCKS))


def _flatten(t: ScaledTensor) -> tuple[list[Any], Block]:
    return [t.data, t.scale], t.block


def _unflatten(leaves: Iterable[Any], block: Block) -> ScaledTensor:
    data, scale = leaves
    block = (block[0], block[1])  # a list, where the spec has been through JSON
    # A tree_map of clone or of an operation drops the padding of a scale.
    if isinstance(scale, torch.Tensor) and scale.dim() in (2, 3) and not has_scale_layout(scale, block):
        scale = empty_scale(scale, scale.shape, block).copy_(scale)
    return ScaledTensor._trusted(data, scale, block)


pytree.register_pytree_node(ScaledTensor, _flatten, _unflatten, serialized_type_name="fastfp8.ScaledTensor")
torch.serialization.add_safe_globals([ScaledTensor])
