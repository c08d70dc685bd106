"""ScaledTensor: FP8 data with the block scales that dequantise it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import check_device, check_tensor, check_value
from .layout import BLOCKS, Block, as_block, empty_scale, has_scale_layout, scale_shape

_NAME = "ScaledTensor"


class ScaledTensor:
    """An [R, C] tensor in FP8: ``value = data * scale``, one scale for each block.

    Args:
        data: float8_e4m3fn [R, C].
        scale: float32 [ceil(R / block[0]), ceil(C / block[1])] on the device of ``data``. It multiplies: a scale of 2
            doubles the value. Kept in the layout that :mod:`fastfp8.layout` states; a scale that comes in another
            layout is copied into it here, once, so that no op ever has to.
        block: (rows, cols) that share a scale: (1, 128) for activations and gradients, (128, 1) for the operands of
            Wgrad, (128, 128) for weights (DeepSeek-V3 report, section 3.3.2).

    Raises:
        TypeError: ``data`` or ``scale`` is not a tensor of the dtype above.
        ValueError: a shape, a device or the block does not fit.

    It is a pytree node (leaves ``data`` and ``scale``), and ``torch.save`` and ``torch.load`` take it. For safetensors,
    which knows plain contiguous tensors only, use :meth:`state_dict` and :meth:`from_state_dict`.
    """

    data: torch.Tensor
    scale: torch.Tensor
    block: Block

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, block: Block) -> None:
        check_tensor(data, _NAME, "data", (torch.float8_e4m3fn,))
        check_tensor(scale, _NAME, "scale", (torch.float32,))
        check_device(scale, _NAME, "scale", data, "data")
        block = as_block(block, _NAME)
        shape = scale_shape(data.shape[0], data.shape[1], block)
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
        """The shape [R, C] of the data."""
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

    def t(self) -> ScaledTensor:
        """The [C, R] transpose with its block turned. The data is a view: a GEMM needs :meth:`contiguous` after it. The
        scale is a view too, but for (128, 128) blocks, whose small scale is copied into its layout."""
        scale = self.scale.t()
        if self.block[0] == self.block[1]:
            scale = scale.contiguous()
        return ScaledTensor._trusted(self.data.t(), scale, (self.block[1], self.block[0]))

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
    if isinstance(scale, torch.Tensor) and scale.dim() == 2 and not has_scale_layout(scale, block):
        scale = empty_scale(scale, (scale.shape[0], scale.shape[1]), block).copy_(scale)
    return ScaledTensor._trusted(data, scale, block)


pytree.register_pytree_node(ScaledTensor, _flatten, _unflatten, serialized_type_name="fastfp8.ScaledTensor")
torch.serialization.add_safe_globals([ScaledTensor])
